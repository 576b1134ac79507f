//! Pass 2: scores again, and the products with dS and P^T tile by tile (\[FA2\] backward).

use super::pass::Pass;
use crate::cost::Cost;
use crate::linalg::Real;
use crate::linalg::attention_tile::{front, key_tiles, softmax_backward_tile};
use crate::linalg::tile::{Padded, SKINNY, add_transposed_times_tile, tile_times};
use ndarray::{
    Array2, Array3, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut2, Axis, parallel::prelude::*,
    s,
};
use std::ops::Range;

/// What pass 2 reads besides [`Pass`].
pub(crate) struct Sides<'a, T> {
    pub upstream: ArrayView2<'a, T>,
    pub log_sum_exp: ArrayView1<'a, T>,
    pub delta: ArrayView1<'a, T>,
    pub score_right: Padded<T>,
    pub score_left: ArrayView2<'a, T>,
    pub value_left: ArrayView2<'a, T>,
}

/// Buffers of one thread in pass 2.
struct Workspace<T> {
    scores: Vec<T>,
    upstream: Vec<T>,
    /// W^T dS over N^T P of one query tile, in the layout of [`backward`].
    key_side: Array3<T>,
}

/// Returns dS Z (`L_q x m`) and the key side, W^T dS over N^T P, as one `(m + n) x tile.keys` block
/// for each tile of keys. Transposed, so that a row of P or dS adds to rows of its block and no
/// product has to copy its tile; in blocks, so that the rows do not lie a power of two apart, where
/// they would share few lines of the cache.
///
/// Each query tile accumulates its key side from zero in the buffer of its thread; the buffers are
/// added to the total in the order of the tiles, so the result does not depend on the number of
/// threads.
pub(crate) fn backward<T: Real>(
    pass: &Pass<T>,
    sides: &Sides<T>,
    cost: &mut Cost,
) -> (Array2<T>, Array3<T>) {
    let (queries, keys) = (pass.scaled_query.nrows(), pass.value.nrows());
    let tile = pass.tile;
    let key_width = sides.score_left.ncols() + sides.value_left.ncols();
    let mut score_right = Array2::<T>::zeros((queries, sides.score_right.columns()));
    let key_shape = (keys.div_ceil(tile.keys), key_width, tile.keys);
    let mut key_side = Array3::<T>::zeros(key_shape);
    let threads = rayon::current_num_threads().min(queries.div_ceil(tile.queries)).max(1);
    let mut workspaces: Vec<Workspace<T>> = (0..threads)
        .map(|_| Workspace {
            scores: vec![T::zero(); tile.queries * tile.keys],
            upstream: vec![T::zero(); tile.queries * tile.keys],
            key_side: Array3::zeros(key_shape),
        })
        .collect();
    cost.hold(score_right.len());
    cost.hold(key_side.len());
    for w in &workspaces {
        cost.hold(w.scores.len());
        cost.hold(w.upstream.len());
        cost.hold(w.key_side.len());
    }
    let mut tiles: Vec<(usize, ArrayViewMut2<T>)> =
        score_right.axis_chunks_iter_mut(Axis(0), tile.queries).enumerate().collect();
    for round in tiles.chunks_mut(threads) {
        let operations: Vec<Cost> = round
            .par_iter_mut()
            .zip(workspaces.par_iter_mut())
            .map(|((index, out), workspace)| {
                backward_tile(pass, sides, *index * tile.queries, out, workspace)
            })
            .collect();
        operations.iter().for_each(|part| cost.add_operations(part));
        // Blocks of the total are independent; within a block the query tiles are added in order.
        key_side.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(
            |(block, mut total)| {
                for ((index, out), workspace) in round.iter().zip(&workspaces) {
                    if block * tile.keys < pass.visible_keys(index * tile.queries, out.nrows()) {
                        total += &workspace.key_side.index_axis(Axis(0), block);
                    }
                }
            },
        );
    }
    for w in &workspaces {
        cost.release(w.scores.len() + w.upstream.len() + w.key_side.len());
    }
    (score_right, key_side)
}

/// The transpose of the key side's blocks, `L_k` rows.
pub(crate) fn key_rows<T: Real>(blocks: ArrayView3<T>, keys: usize) -> Array2<T> {
    let mut out = Array2::zeros((keys, blocks.len_of(Axis(1))));
    for (mut rows, block) in
        out.axis_chunks_iter_mut(Axis(0), blocks.len_of(Axis(2)).max(1)).zip(blocks.outer_iter())
    {
        let visible = rows.nrows();
        rows.assign(&block.slice(s![.., ..visible]).t());
    }
    out
}

/// Query rows whose P and dS are used while they are in the first-level cache: 32 x 256 f32 of each
/// take 64 kB.
const SLAB_ROWS: usize = 32;

fn backward_tile<T: Real>(
    pass: &Pass<T>,
    sides: &Sides<T>,
    first: usize,
    score_right: &mut ArrayViewMut2<T>,
    workspace: &mut Workspace<T>,
) -> Cost {
    let mut cost = Cost::default();
    let rows = score_right.nrows();
    let range = first..first + rows;
    let query = pass.scaled_query.slice(s![range.clone(), ..]);
    let upstream = sides.upstream.slice(s![range.clone(), ..]);
    let score_left = sides.score_left.slice(s![range.clone(), ..]);
    let value_left = sides.value_left.slice(s![range.clone(), ..]);
    // Copies of one tile's rows: the caller's vectors need not be contiguous.
    let log_sum_exp = sides.log_sum_exp.slice(s![range.clone()]).to_vec();
    let delta = sides.delta.slice(s![range]).to_vec();
    let visible = pass.visible_keys(first, rows);
    workspace.key_side.slice_mut(s![..visible.div_ceil(pass.tile.keys), .., ..]).fill(T::zero());
    for keys in key_tiles(0..visible, pass.tile.keys) {
        let Range { start, end } = keys;
        let mut p = front(&mut workspace.scores, rows, end - start);
        let mut ds = front(&mut workspace.upstream, rows, end - start);
        pass.scores(first, query, start..end, &mut p, &mut cost);
        let value_transposed = &pass.value_transposed[start / pass.tile.keys];
        tile_times(
            upstream,
            value_transposed,
            0..upstream.ncols(),
            false,
            ds.view_mut(),
            &mut cost,
        );
        cost.exponentials += (rows * (end - start)) as u64;
        cost.elementwise += 3 * (rows * (end - start)) as u64;
        let key_side = workspace.key_side.slice_mut(s![start / pass.tile.keys, .., ..end - start]);
        let (mut left, mut value) = key_side.split_at(Axis(0), score_left.ncols());
        // The general GEMM gains from tall tiles, the narrow products from slabs still in the
        // first-level cache.
        let wide = left.nrows().max(value.nrows()) > SKINNY;
        let slab_rows = if wide { rows } else { SLAB_ROWS };
        let mut at = 0;
        while at < rows {
            let slab = at..(at + slab_rows).min(rows);
            let mut p = p.slice_mut(s![slab.clone(), ..]);
            let mut ds = ds.slice_mut(s![slab.clone(), ..]);
            softmax_backward_tile(
                p.view_mut(),
                ds.view_mut(),
                &log_sum_exp[slab.clone()],
                &delta[slab.clone()],
            );
            let (p, ds) = (p.view(), ds.view());
            let out = score_right.slice_mut(s![slab.clone(), ..]);
            tile_times(ds, &sides.score_right, start..end, start > 0, out, &mut cost);
            add_transposed_times_tile(
                score_left.slice(s![slab.clone(), ..]),
                ds,
                left.view_mut(),
                &mut cost,
            );
            add_transposed_times_tile(
                value_left.slice(s![slab.clone(), ..]),
                p,
                value.view_mut(),
                &mut cost,
            );
            at = slab.end;
        }
    }
    cost
}
