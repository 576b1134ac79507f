//! The chain without a mask: three passes over row tiles.

use super::tile::{Chain, QueryTile, TILE};
use crate::attention::contraction::Products;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::reduce::{ordered_sum, tile_groups};
use crate::linalg::{Real, product, product_into};
use ndarray::{Array2, Axis, parallel::prelude::*, s};

/// Fixed number of partial sums, so that results do not depend on the number of threads.
const GROUPS: usize = 16;

/// Right moments over keys; then queries, with left moments over them; then keys again.
pub(super) fn products<T: Real>(chain: &Chain<T>, cost: &mut Cost) -> Result<(Products<T>, Array2<T>)> {
    let w = chain.widths;
    let rank = chain.map.rank();
    let (queries, keys) = (chain.problem.num_queries(), chain.problem.num_keys());
    let tile_memory = rayon::current_num_threads() * TILE * (rank + w.right().max(w.left()));
    cost.hold(tile_memory);

    // Pass 1: Psi^T [1 | V | R | V' * Z].
    let right: Array2<T> =
        ordered_sum(tile_groups(keys, TILE, GROUPS), (rank, w.right()), cost, |group, sum, cost| {
            for start in group.clone().step_by(TILE) {
                let range = start..(start + TILE).min(group.end);
                let psi = chain.key_features(range.clone(), cost);
                let columns = chain.right_columns(range, cost);
                product_into(psi.view(), columns.view(), T::one(), &mut sum.view_mut(), cost);
            }
            Ok(())
        })?;

    // Pass 2: the query side, and U^T [N | G' * W].
    let mut output = Array2::zeros((queries, w.value));
    let mut value_right = Array2::zeros((queries, w.value_right));
    let mut score_right = Array2::zeros((queries, w.score_right));
    let mut upstream = Array2::zeros((queries, w.value));
    let mut row_state = Array2::zeros((queries, 2));
    cost.hold(queries * (2 * w.value + w.value_right + w.score_right + 2));
    let tiles = query_tiles(&mut output, &mut value_right, &mut score_right, &mut upstream, &mut row_state);
    let left: Array2<T> = ordered_sum(grouped(tiles), (rank, w.left()), cost, |group, sum, cost| {
        for tile in group {
            let phi = chain.query_features(tile.range.clone(), cost);
            let sums = product(phi.t(), right.view(), cost);
            chain.finish_queries(sums.view(), tile, cost)?;
            let columns = chain.left_columns(tile.range.clone(), tile.upstream.view(), tile.row_state.view(), cost);
            product_into(phi.view(), columns.view(), T::one(), &mut sum.view_mut(), cost);
        }
        Ok(())
    })?;

    // Pass 3: the key side.
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
            chain.add_keys(range, sums.view(), &mut out, &mut cost);
            cost
        })
        .collect();
    costs.iter().for_each(|part| cost.add_operations(part));
    cost.release(tile_memory);
    let products = Products {
        output,
        value_right,
        score_right,
        score_left: key_side.slice(s![.., ..w.score_left]).to_owned(),
        value_left: key_side.slice(s![.., w.score_left..]).to_owned(),
    };
    Ok((products, upstream))
}

/// Cuts the query side's results into tiles that can be written independently.
pub(super) fn query_tiles<'a, T: Real>(
    output: &'a mut Array2<T>,
    value_right: &'a mut Array2<T>,
    score_right: &'a mut Array2<T>,
    upstream: &'a mut Array2<T>,
    row_state: &'a mut Array2<T>,
) -> Vec<QueryTile<'a, T>> {
    let chunks = |a: &'a mut Array2<T>| a.axis_chunks_iter_mut(Axis(0), TILE);
    chunks(output)
        .zip(chunks(value_right))
        .zip(chunks(score_right))
        .zip(chunks(upstream))
        .zip(chunks(row_state))
        .enumerate()
        .map(|(index, ((((output, value_right), score_right), upstream), row_state))| {
            let range = index * TILE..index * TILE + output.nrows();
            QueryTile { range, output, value_right, score_right, upstream, row_state }
        })
        .collect()
}

/// At most [`GROUPS`] runs of consecutive tiles.
fn grouped<I>(tiles: Vec<I>) -> Vec<Vec<I>> {
    let groups = tile_groups(tiles.len(), 1, GROUPS);
    let mut tiles = tiles.into_iter();
    groups.into_iter().map(|range| tiles.by_ref().take(range.len()).collect()).collect()
}
