//! The chain without a mask: three passes over row tiles.

use super::query_results::QueryResults;
use super::sparse::QuerySide;
use super::tile::{Chain, Chained, TILE};
use crate::attention::shards::{RowShards, entries, together};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::reduce::{ordered_sum, tile_groups};
use crate::linalg::{Real, product, product_into};
use ndarray::{Array2, Axis, parallel::prelude::*};

/// Fixed number of partial sums, so that results do not depend on the number of threads.
const GROUPS: usize = 16;

/// The moments are sums over the rows of all shards, everything else is of this shard's rows.
///
/// Right moments over keys; then queries, with left moments over them; then keys again.
pub(super) fn products<T: Real>(
    chain: &Chain<T>,
    shards: &dyn RowShards<T>,
    cost: &mut Cost,
) -> Result<Chained<T>> {
    let w = chain.widths;
    let rank = chain.map.rank();
    let (queries, keys) = (chain.problem.num_queries(), chain.problem.num_keys());
    let tile_memory = rayon::current_num_threads() * TILE * (rank + w.right().max(w.left()));
    cost.hold(tile_memory);

    // Pass 1: Psi^T [1 | V | R | V' * Z].
    let mut right: Array2<T> = ordered_sum(
        tile_groups(keys, TILE, GROUPS),
        (rank, w.right()),
        cost,
        |group, sum, cost| {
            for start in group.clone().step_by(TILE) {
                let range = start..(start + TILE).min(group.end);
                let psi = chain.key_features(range.clone(), cost);
                let columns = chain.right_columns(range, cost);
                product_into(psi.view(), columns.view(), T::one(), &mut sum.view_mut(), cost);
            }
            Ok(())
        },
    )?;

    shards.sum(entries(&mut right))?;

    // Pass 2: the query side, and U^T [N | G' * W].
    let mut results = QueryResults::new(queries, w, cost);
    let left = ordered_sum(grouped(results.tiles()), (rank, w.left()), cost, |group, sum, cost| {
        for tile in group {
            let phi = chain.query_features(tile.range.clone(), cost);
            let mut sums = product(phi.t(), right.view(), cost);
            chain.add_corrected_rows(tile.range.clone(), keys, &mut sums, cost);
            chain.finish_queries(sums.view(), tile, cost)?;
            chain.add_corrected_scores(keys, tile, cost);
            let columns = chain.left_columns(
                tile.range.clone(),
                tile.upstream.view(),
                tile.row_state.view(),
                cost,
            );
            product_into(phi.view(), columns.view(), T::one(), &mut sum.view_mut(), cost);
        }
        Ok(())
    });
    let mut left: Array2<T> = together(shards, left)?;
    shards.sum(entries(&mut left))?;

    // Pass 3: the key side.
    let side = QuerySide::new(chain, results.upstream.view(), results.row_state.view(), cost);
    let mut key_side = Array2::zeros((keys, w.score_left + w.value_left));
    cost.hold(key_side.len());
    let costs: Vec<Cost> = key_side
        .axis_chunks_iter_mut(Axis(0), TILE)
        .into_par_iter()
        .enumerate()
        .map(|(index, mut out)| {
            let mut cost = Cost::default();
            let range = index * TILE..index * TILE + out.nrows();
            let psi = chain.key_features(range.clone(), &mut cost);
            let sums = product(psi.t(), left.view(), &mut cost);
            chain.add_keys(range.clone(), sums.view(), &mut out, &mut cost);
            chain.add_corrected_keys(range, 0, side.as_ref(), &mut out, &mut cost);
            cost
        })
        .collect();
    costs.iter().for_each(|part| cost.add_operations(part));
    cost.release(tile_memory);
    Ok(results.with_key_side(&key_side, w))
}

/// At most [`GROUPS`] runs of consecutive tiles.
pub(super) fn grouped<I>(tiles: Vec<I>) -> Vec<Vec<I>> {
    let groups = tile_groups(tiles.len(), 1, GROUPS);
    let mut tiles = tiles.into_iter();
    groups.into_iter().map(|range| tiles.by_ref().take(range.len()).collect()).collect()
}
