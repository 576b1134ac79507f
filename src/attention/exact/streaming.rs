//! Exact gradients over tiles: no L x L memory, every product a GEMM on a tile that fits the cache.
//!
//! Pass 1 walks the key tiles of each query tile with the online softmax and leaves O, P R and the row
//! log-sum-exps. Pass 2 recomputes the scores of each tile (\[FA2\] backward) and accumulates dS Z by
//! query rows and dS^T W, P^T N by key rows.
//!
//! Counted floor, per query-key pair and head, in multiply-adds: 2 d_h + 2 d_v for S twice, P V and
//! G V^T, plus the columns of Z, W, R and N (6 r when only the adapters of Q, K and V are asked for,
//! 2 d_h + d_v for all gradients).

use crate::attention::contraction::{Contraction, Products, side_by_side, upstream_gradient};
use crate::attention::gradients::{Gradients, Request};
use crate::attention::problem::{AttentionProblem, Mask, Qkv, SoftmaxKind};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::elementwise::{online_softmax_tile, scale_rows, softmax_backward_tile};
use crate::linalg::{Real, product_into};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, parallel::prelude::*, s};
use std::sync::Mutex;

/// Rows and columns of a score tile.
///
/// Results do not depend on the number of threads; they depend on the tile only through rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// Query rows.
    pub queries: usize,
    /// Key columns.
    pub keys: usize,
}

impl Tile {
    /// The default for a number of queries: 512 x 256, fewer rows when that would leave under eight tiles.
    ///
    /// The two score tiles (S and G V^T) then take 1 MiB in f32, half of the second-level cache of one core
    /// of the development machine. Tall tiles pay: every product packs a tile of keys, and the taller the
    /// tile the more rows share it (measured at L = 4096, d = 64: 512 x 256 is 15% faster than 128 x 256).
    pub fn for_queries(queries: usize) -> Self {
        Tile { queries: queries.div_ceil(8).next_multiple_of(64).clamp(64, 512), keys: 256 }
    }
}

/// Exact gradients with the default tile. See [`gradients_with_tile`].
///
/// # Errors
/// As [`gradients_with_tile`].
pub fn gradients<T: Real>(problem: &AttentionProblem<T>, request: Request) -> Result<Gradients<T>> {
    gradients_with_tile(problem, request, Tile::for_queries(problem.num_queries()))
}

/// Exact gradients by tiles; O(L_q L_k d) operations, O((L_q + L_k) d) memory plus one tile pair and
/// one key-side accumulator for each thread.
///
/// # Errors
/// [`crate::Error::InvalidParam`] for [`Request::Adapters`] on a head without adapters, or an empty tile.
pub fn gradients_with_tile<T: Real>(
    problem: &AttentionProblem<T>,
    request: Request,
    tile: Tile,
) -> Result<Gradients<T>> {
    if tile.queries == 0 || tile.keys == 0 {
        return Err(crate::Error::invalid("tile", format!("{tile:?}"), "both sides must be at least 1"));
    }
    let mut cost = Cost::default();
    let projected = problem.project(&mut cost);
    let contraction = Contraction::new(problem, &projected, request, &mut cost)?;
    let pass = Pass::new(problem, &projected.qkv, tile);
    cost.hold(pass.scaled_query.len() + pass.key_transposed.len() + pass.value_transposed.len());
    let forward = forward(&pass, contraction.value_right.view(), &mut cost);
    let upstream = upstream_gradient(problem, &forward.output);
    let value_left = contraction.value_left(problem, upstream.view(), &mut cost);
    let delta: Array1<T> = row_dots(upstream.view(), forward.output.view());
    let sides = Sides {
        upstream: upstream.view(),
        log_sum_exp: forward.log_sum_exp.view(),
        delta: delta.view(),
        score_right: contraction.score_right.view(),
        score_left: contraction.score_left.view(),
        value_left: value_left.view(),
    };
    let (score_right, key_side) = backward(&pass, &sides, &mut cost);
    let m = contraction.score_left.ncols();
    let products = Products {
        output: forward.output,
        value_right: forward.value_right,
        score_right,
        score_left: key_side.slice(s![.., ..m]).to_owned(),
        value_left: key_side.slice(s![.., m..]).to_owned(),
    };
    Ok(contraction.finish(problem, &projected, &upstream, products, cost))
}

/// Multiply-adds of a streaming gradient on `pairs` visible query-key pairs, as counted by [`gradients`] apart from
/// the projections, whose cost every method shares. Columns as in
/// [`crate::attention::chained::predicted_multiply_adds`].
pub fn predicted_multiply_adds(
    pairs: u64,
    head_dim: usize,
    value_dim: usize,
    moment_columns: usize,
    value_columns: usize,
) -> f64 {
    pairs as f64 * (2 * head_dim + 2 * value_dim + 2 * moment_columns + value_columns) as f64
}

/// What both passes read.
struct Pass<'a, T> {
    /// beta Q.
    scaled_query: Array2<T>,
    /// K^T and V^T, row-major: a GEMM packs a tile of their columns by contiguous copies.
    key_transposed: Array2<T>,
    value_transposed: Array2<T>,
    value: ArrayView2<'a, T>,
    mask: Mask,
    softmax: SoftmaxKind,
    tile: Tile,
}

impl<'a, T: Real> Pass<'a, T> {
    fn new(problem: &AttentionProblem<T>, qkv: &'a Qkv<Array2<T>>, tile: Tile) -> Self {
        let beta = T::of(problem.beta());
        Pass {
            scaled_query: qkv.query.mapv(|x| x * beta),
            key_transposed: qkv.key.t().as_standard_layout().into_owned(),
            value_transposed: qkv.value.t().as_standard_layout().into_owned(),
            value: qkv.value.view(),
            mask: problem.mask(),
            softmax: problem.softmax(),
            // No wider than the problem, so that short sequences do not pay for full workspaces.
            tile: Tile { queries: tile.queries.min(qkv.query.nrows()), keys: tile.keys.min(qkv.key.nrows()) },
        }
    }

    /// Number of keys that some row of the query tile starting at `first` sees.
    fn visible_keys(&self, first: usize, rows: usize) -> usize {
        match self.mask {
            Mask::Full => self.value.nrows(),
            Mask::Causal => first + rows,
        }
    }

    /// Scores of a tile, negative infinity where masked.
    fn scores(
        &self,
        first: usize,
        query: ArrayView2<T>,
        keys: std::ops::Range<usize>,
        out: &mut ArrayViewMut2<T>,
        cost: &mut Cost,
    ) {
        product_into(query, self.key_transposed.slice(s![.., keys.clone()]), T::zero(), out, cost);
        if self.mask == Mask::Causal && keys.end > first {
            for (i, mut row) in out.rows_mut().into_iter().enumerate() {
                let visible = (first + i + 1).saturating_sub(keys.start).min(row.len());
                row.slice_mut(s![visible..]).fill(T::neg_infinity());
            }
        }
    }
}

struct Forward<T> {
    output: Array2<T>,
    value_right: Array2<T>,
    log_sum_exp: Array1<T>,
}

/// Contiguous `rows x columns` view of the front of a buffer.
fn front<T: Real>(buffer: &mut [T], rows: usize, columns: usize) -> ArrayViewMut2<'_, T> {
    ArrayViewMut2::from_shape((rows, columns), &mut buffer[..rows * columns])
        .unwrap_or_else(|_| unreachable!("sizes multiply"))
}

fn forward<T: Real>(pass: &Pass<T>, value_right: ArrayView2<T>, cost: &mut Cost) -> Forward<T> {
    let (queries, width_v) = (pass.scaled_query.nrows(), pass.value.ncols());
    // One product for both: [V | R].
    let values = side_by_side(pass.value, value_right);
    let width = values.ncols();
    let tile = pass.tile;
    let mut output = Array2::<T>::zeros((queries, width));
    let mut log_sum_exp = Array1::<T>::zeros(queries);
    cost.hold(2 * output.len() + values.len() + queries);
    let threads = rayon::current_num_threads();
    let workspace = tile.queries * (tile.keys + 3);
    (0..threads).for_each(|_| cost.hold(workspace));
    // At most one buffer a thread, reused from tile to tile.
    let pool: Mutex<Vec<Vec<T>>> = Mutex::new(Vec::new());
    let operations: Vec<Cost> = output
        .axis_chunks_iter_mut(Axis(0), tile.queries)
        .into_par_iter()
        .zip(log_sum_exp.axis_chunks_iter_mut(Axis(0), tile.queries))
        .zip(pass.scaled_query.axis_chunks_iter(Axis(0), tile.queries))
        .enumerate()
        .map(|(index, ((mut out, mut lse), query))| {
            let mut buffer = pool.lock().ok().and_then(|mut p| p.pop()).unwrap_or_else(|| vec![T::zero(); workspace]);
            let mut cost = Cost::default();
            let rows = query.nrows();
            let first = index * tile.queries;
            let (scores, statistics) = buffer.split_at_mut(tile.queries * tile.keys);
            let (maximum, rest) = statistics.split_at_mut(tile.queries);
            let (sum, correction) = rest.split_at_mut(tile.queries);
            let (maximum, sum, correction) = (&mut maximum[..rows], &mut sum[..rows], &mut correction[..rows]);
            // `One` starts with the extra score 0: maximum 0, sum exp(0 - 0).
            let one = pass.softmax == SoftmaxKind::One;
            maximum.fill(if one { T::zero() } else { T::neg_infinity() });
            sum.fill(if one { T::one() } else { T::zero() });
            let visible = pass.visible_keys(first, rows);
            let mut start = 0;
            while start < visible {
                let end = (start + tile.keys).min(visible);
                let mut p = front(scores, rows, end - start);
                pass.scores(first, query, start..end, &mut p, &mut cost);
                online_softmax_tile(p.view_mut(), maximum, sum, correction);
                cost.exponentials += (rows * (end - start)) as u64;
                cost.elementwise += 3 * (rows * (end - start)) as u64;
                if start > 0 {
                    scale_rows(out.view_mut(), correction);
                }
                product_into(p.view(), values.slice(s![start..end, ..]), accumulate(start), &mut out, &mut cost);
                start = end;
            }
            for i in 0..rows {
                lse[i] = maximum[i] + sum[i].ln();
                correction[i] = T::one() / sum[i];
            }
            scale_rows(out, correction);
            if let Ok(mut pool) = pool.lock() {
                pool.push(buffer);
            }
            cost
        })
        .collect();
    operations.iter().for_each(|part| cost.add_operations(part));
    (0..threads).for_each(|_| cost.release(workspace));
    let result = Forward {
        value_right: output.slice(s![.., width_v..]).to_owned(),
        output: output.slice_move(s![.., ..width_v]).as_standard_layout().into_owned(),
        log_sum_exp,
    };
    cost.release(queries * width + values.len());
    result
}

/// What pass 2 reads besides [`Pass`].
struct Sides<'a, T> {
    upstream: ArrayView2<'a, T>,
    log_sum_exp: ArrayView1<'a, T>,
    delta: ArrayView1<'a, T>,
    score_right: ArrayView2<'a, T>,
    score_left: ArrayView2<'a, T>,
    value_left: ArrayView2<'a, T>,
}

/// Buffers of one thread in pass 2.
struct Workspace<T> {
    scores: Vec<T>,
    upstream: Vec<T>,
    /// dS^T W and P^T N of one query tile, `L_k x (m + n)`.
    key_side: Array2<T>,
}

/// Returns dS Z (`L_q x m`) and [dS^T W | P^T N] (`L_k x (m' + n)`).
///
/// Each query tile accumulates its key side from zero in the buffer of its thread; the buffers are added
/// to the total in the order of the tiles, so the result does not depend on the number of threads.
fn backward<T: Real>(pass: &Pass<T>, sides: &Sides<T>, cost: &mut Cost) -> (Array2<T>, Array2<T>) {
    let (queries, keys) = (pass.scaled_query.nrows(), pass.value.nrows());
    let tile = pass.tile;
    let key_width = sides.score_left.ncols() + sides.value_left.ncols();
    let mut score_right = Array2::<T>::zeros((queries, sides.score_right.ncols()));
    let mut key_side = Array2::<T>::zeros((keys, key_width));
    key_side.fill(T::zero()); // Touches the pages by writing, as in `accumulate`.
    let threads = rayon::current_num_threads().min(queries.div_ceil(tile.queries)).max(1);
    let mut workspaces: Vec<Workspace<T>> = (0..threads)
        .map(|_| Workspace {
            scores: vec![T::zero(); tile.queries * tile.keys],
            upstream: vec![T::zero(); tile.queries * tile.keys],
            key_side: Array2::zeros((keys, key_width)),
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
            .map(|((index, out), workspace)| backward_tile(pass, sides, *index * tile.queries, out, workspace))
            .collect();
        operations.iter().for_each(|part| cost.add_operations(part));
        // Rows of the total are independent; within a row the tiles are added in order.
        key_side.axis_chunks_iter_mut(Axis(0), MERGE_ROWS).into_par_iter().enumerate().for_each(
            |(chunk, mut total)| {
                let start = chunk * MERGE_ROWS;
                for ((index, out), workspace) in round.iter().zip(&workspaces) {
                    let visible = pass.visible_keys(index * tile.queries, out.nrows());
                    if start < visible {
                        let end = (start + total.nrows()).min(visible);
                        let mut total = total.slice_mut(s![..end - start, ..]);
                        total += &workspace.key_side.slice(s![start..end, ..]);
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

/// Key rows that one task of the merge adds.
const MERGE_ROWS: usize = 1024;

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
    let log_sum_exp = &sides.log_sum_exp.as_slice().unwrap_or(&[])[range.clone()];
    let delta = &sides.delta.as_slice().unwrap_or(&[])[range];
    let left_width = score_left.ncols();
    let visible = pass.visible_keys(first, rows);
    workspace.key_side.slice_mut(s![..visible, ..]).fill(T::zero());
    let mut start = 0;
    while start < visible {
        let end = (start + pass.tile.keys).min(visible);
        let mut p = front(&mut workspace.scores, rows, end - start);
        let mut ds = front(&mut workspace.upstream, rows, end - start);
        pass.scores(first, query, start..end, &mut p, &mut cost);
        product_into(upstream, pass.value_transposed.slice(s![.., start..end]), T::zero(), &mut ds, &mut cost);
        softmax_backward_tile(p.view_mut(), ds.view_mut(), log_sum_exp, delta);
        cost.exponentials += (rows * (end - start)) as u64;
        cost.elementwise += 3 * (rows * (end - start)) as u64;
        product_into(ds.view(), sides.score_right.slice(s![start..end, ..]), accumulate(start), score_right, &mut cost);
        let mut key_side = workspace.key_side.slice_mut(s![start..end, ..]);
        let (mut left, mut value) = key_side.view_mut().split_at(Axis(1), left_width);
        product_into(ds.t(), score_left, T::one(), &mut left, &mut cost);
        product_into(p.t(), value_left, T::one(), &mut value, &mut cost);
        start = end;
    }
    cost
}

/// The first tile of keys overwrites, later ones add: fresh pages are written before they are read, which
/// spares the system a copy of its zero page (5% of the time at L = 4096).
fn accumulate<T: Real>(start: usize) -> T {
    if start == 0 { T::zero() } else { T::one() }
}

/// delta_i = G_i . O_i.
fn row_dots<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>) -> Array1<T> {
    a.rows().into_iter().zip(b.rows()).map(|(a, b)| a.dot(&b)).collect()
}
