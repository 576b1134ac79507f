//! Pass 1: the online softmax over the key tiles of each query tile.

use super::pass::Pass;
use crate::attention::contraction::side_by_side;
use crate::attention::problem::SoftmaxKind;
use crate::cost::Cost;
use crate::linalg::Real;
use crate::linalg::attention_tile::{OnlineSoftmax, ROW_STATISTICS, front, key_tiles};
use crate::linalg::tile::{Padded, tile_times};
use ndarray::{Array1, Array2, ArrayView2, Axis, parallel::prelude::*, s};
use std::sync::Mutex;

/// Pass 1's results: O, P R and the logarithm of each row's sum of exponentials.
pub(crate) struct Forward<T> {
    pub output: Array2<T>,
    pub value_right: Array2<T>,
    pub log_sum_exp: Array1<T>,
}

/// O, P R and log-sum-exps over the keys of the pass.
pub(crate) fn forward<T: Real>(
    pass: &Pass<T>,
    value_right: ArrayView2<T>,
    cost: &mut Cost,
) -> Forward<T> {
    let (queries, width_v) = (pass.scaled_query.nrows(), pass.value.ncols());
    // One product for both: [V | R].
    let values = side_by_side(pass.value, value_right);
    let width = values.ncols();
    let values = Padded::new(values.view());
    let tile = pass.tile;
    let mut output = Array2::<T>::zeros((queries, width));
    let mut log_sum_exp = Array1::<T>::zeros(queries);
    cost.hold(2 * output.len() + values.len() + queries);
    let threads = rayon::current_num_threads();
    let workspace = tile.queries * (tile.keys + ROW_STATISTICS);
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
            let mut buffer = pool
                .lock()
                .ok()
                .and_then(|mut p| p.pop())
                .unwrap_or_else(|| vec![T::zero(); workspace]);
            let mut cost = Cost::default();
            let rows = query.nrows();
            let first = index * tile.queries;
            let (scores, statistics) = buffer.split_at_mut(tile.queries * tile.keys);
            let mut softmax =
                OnlineSoftmax::new(statistics, rows, pass.softmax == SoftmaxKind::One);
            for keys in key_tiles(0..pass.visible_keys(first, rows), tile.keys) {
                let mut p = front(scores, rows, keys.len());
                pass.scores(first, query, keys.clone(), &mut p, &mut cost);
                softmax.absorb(p.view_mut(), out.view_mut(), keys.start == 0);
                cost.exponentials += p.len() as u64;
                cost.elementwise += 3 * p.len() as u64;
                tile_times(
                    p.view(),
                    &values,
                    keys.clone(),
                    keys.start > 0,
                    out.view_mut(),
                    &mut cost,
                );
            }
            softmax.finish(out, &mut lse);
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
