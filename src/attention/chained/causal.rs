//! The chain under a causal mask: a chunked prefix scan, the diagonal chunks exact; linear in L.
//!
//! A query of chunk t sees the keys of chunks before t through the running moments M_t = sum_{s <
//! t} Psi_s^T [...] and those of its own chunk through their exact exponentials, on the same scale
//! exp(S - shift). The key side is the mirror image, scanned from the last chunk. Groups of chunks
//! run in parallel: their totals come first, then each group scans from the sum of the groups
//! before (or after) it. Shards of rows are further groups: each starts from the sum of the shards
//! before (or after) it. Chunks begin at the first row of a shard.

use super::query_results::QueryResults;
use super::sparse::QuerySide;
use super::tile::{Chain, Chained, QueryTile, TILE};
use crate::attention::shards::{RowShards, entries, together};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::elementwise::exp_rows;
use crate::linalg::reduce::tile_groups;
use crate::linalg::{Real, product, product_into};
use ndarray::{Array2, ArrayViewMut2, Axis, parallel::prelude::*, s};
use std::ops::Range;

/// Fixed number of groups, so that results do not depend on the number of threads.
const GROUPS: usize = 8;

pub(super) fn products<T: Real>(
    chain: &Chain<T>,
    shards: &dyn RowShards<T>,
    cost: &mut Cost,
) -> Result<Chained<T>> {
    let w = chain.widths;
    let rank = chain.map.rank();
    let tokens = chain.problem.num_queries();
    let groups = tile_groups(tokens, TILE, GROUPS);
    let tile_memory =
        rayon::current_num_threads() * (TILE * (rank + w.right().max(w.left())) + TILE * TILE);
    cost.hold(tile_memory);
    cost.hold(groups.len() * rank * w.right());
    cost.hold(groups.len() * rank * w.left());

    // Totals of the right moments by group, then running sums over the groups before.
    let totals = in_parallel(&groups, cost, |range, cost| {
        let mut sum = Array2::<T>::zeros((rank, w.right()));
        for chunk in chunks(range) {
            add_right(chain, chunk, &mut sum, cost);
        }
        Ok(sum)
    })?;
    let mut earlier = total_of(&totals);
    shards.sum_before(entries(&mut earlier))?;
    let before = exclusive_sums(totals, earlier);

    let mut results = QueryResults::new(tokens, w, cost);
    let mut key_side = Array2::zeros((tokens, w.score_left + w.value_left));
    cost.hold(key_side.len());

    // Forward scan: queries, the exact diagonal's part of the key side, totals of the left moments.
    let mut tiles = results.tiles().into_iter();
    let mut key_tiles = key_side.axis_chunks_iter_mut(Axis(0), TILE);
    let mut jobs: Vec<ForwardJob<T>> = groups
        .iter()
        .zip(before)
        .map(|(range, state)| {
            let count = range.len().div_ceil(TILE);
            ForwardJob {
                state,
                queries: tiles.by_ref().take(count).collect(),
                keys: key_tiles.by_ref().take(count).collect(),
            }
        })
        .collect();
    let outcomes: Vec<Result<(Array2<T>, Cost)>> =
        jobs.par_iter_mut().map(|job| forward_scan(chain, job)).collect();
    drop(jobs);
    let mut totals = together(shards, in_order(outcomes, cost))?;
    let mut later = total_of(&totals);
    shards.sum_after(entries(&mut later))?;
    // Running sums over the groups after.
    totals.reverse();
    let mut after = exclusive_sums(totals, later);
    after.reverse();

    // Backward scan: the key side below the diagonal chunks.
    let mut key_tiles = key_side.axis_chunks_iter_mut(Axis(0), TILE);
    let mut jobs: Vec<BackwardJob<T>> = groups
        .iter()
        .zip(after)
        .map(|(range, state)| BackwardJob {
            range: range.clone(),
            state,
            keys: key_tiles.by_ref().take(range.len().div_ceil(TILE)).collect(),
        })
        .collect();
    let (upstream_view, state_view) = (results.upstream.view(), results.row_state.view());
    let side = QuerySide::new(chain, upstream_view, state_view, cost);
    let costs: Vec<Cost> = jobs
        .par_iter_mut()
        .map(|BackwardJob { range, state, keys }| {
            let mut cost = Cost::default();
            let all: Vec<Range<usize>> = chunks(range).collect();
            for (chunk, out) in all.into_iter().zip(keys).rev() {
                let psi = chain.key_features(chunk.clone(), &mut cost);
                let sums = product(psi.t(), state.view(), &mut cost);
                chain.add_keys(chunk.clone(), sums.view(), out, &mut cost);
                chain.add_corrected_keys(chunk.clone(), chunk.end, side.as_ref(), out, &mut cost);
                let phi = chain.query_features(chunk.clone(), &mut cost);
                let rows = s![chunk.clone(), ..];
                let columns = chain.left_columns(
                    chunk.clone(),
                    upstream_view.slice(rows),
                    state_view.slice(rows),
                    &mut cost,
                );
                product_into(
                    phi.view(),
                    columns.view(),
                    T::one(),
                    &mut state.view_mut(),
                    &mut cost,
                );
            }
            cost
        })
        .collect();
    drop(jobs);
    costs.iter().for_each(|part| cost.add_operations(part));
    cost.release(tile_memory);
    Ok(results.with_key_side(&key_side, w))
}

/// One group of the forward scan: its starting moments and the rows it owns.
struct ForwardJob<'a, T> {
    state: Array2<T>,
    queries: Vec<QueryTile<'a, T>>,
    keys: Vec<ArrayViewMut2<'a, T>>,
}

/// One group of the backward scan.
struct BackwardJob<'a, T> {
    range: Range<usize>,
    state: Array2<T>,
    keys: Vec<ArrayViewMut2<'a, T>>,
}

/// Returns the left moments of the group.
fn forward_scan<T: Real>(chain: &Chain<T>, job: &mut ForwardJob<T>) -> Result<(Array2<T>, Cost)> {
    let mut cost = Cost::default();
    let mut total = Array2::<T>::zeros((chain.map.rank(), chain.widths.left()));
    for (tile, out) in job.queries.iter_mut().zip(&mut job.keys) {
        let chunk = tile.range.clone();
        let phi = chain.query_features(chunk.clone(), &mut cost);
        let mut sums = product(phi.t(), job.state.view(), &mut cost);
        let exact = diagonal(chain, chunk.clone(), &mut cost);
        let right = chain.right_columns(chunk.clone(), &mut cost);
        product_into(exact.view(), right.view(), T::one(), &mut sums.view_mut(), &mut cost);
        chain.add_corrected_rows(chunk.clone(), chunk.start, &mut sums, &mut cost);
        chain.finish_queries(sums.view(), tile, &mut cost)?;
        chain.add_corrected_scores(chunk.start, tile, &mut cost);
        let left = chain.left_columns(
            chunk.clone(),
            tile.upstream.view(),
            tile.row_state.view(),
            &mut cost,
        );
        let key_sums = product(exact.t(), left.view(), &mut cost);
        chain.add_keys(chunk.clone(), key_sums.view(), out, &mut cost);
        product_into(phi.view(), left.view(), T::one(), &mut total.view_mut(), &mut cost);
        let psi = chain.key_features(chunk, &mut cost);
        product_into(psi.view(), right.view(), T::one(), &mut job.state.view_mut(), &mut cost);
    }
    Ok((total, cost))
}

/// exp(S - shift) of a diagonal chunk, zero above the diagonal.
fn diagonal<T: Real>(chain: &Chain<T>, chunk: Range<usize>, cost: &mut Cost) -> Array2<T> {
    let beta = T::of(chain.problem.beta());
    let query = chain.projected.qkv.query.slice(s![chunk.clone(), ..]).mapv(|x| x * beta);
    let mut scores =
        product(query.view(), chain.projected.qkv.key.slice(s![chunk.clone(), ..]).t(), cost);
    for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
        row.slice_mut(s![i + 1..]).fill(T::neg_infinity());
    }
    let none = vec![T::zero(); chunk.len()];
    let shift = chain.map.row_shift().map_or(&none[..], |shift| &shift[chunk.clone()]);
    exp_rows(scores.view_mut(), shift);
    cost.exponentials += scores.len() as u64;
    scores
}

fn add_right<T: Real>(chain: &Chain<T>, chunk: Range<usize>, sum: &mut Array2<T>, cost: &mut Cost) {
    let psi = chain.key_features(chunk.clone(), cost);
    let columns = chain.right_columns(chunk, cost);
    product_into(psi.view(), columns.view(), T::one(), &mut sum.view_mut(), cost);
}

fn chunks(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range.clone().step_by(TILE).map(move |start| start..(start + TILE).min(end))
}

/// Runs every group, adding its operations in order.
fn in_parallel<T: Real>(
    groups: &[Range<usize>],
    cost: &mut Cost,
    work: impl Fn(&Range<usize>, &mut Cost) -> Result<Array2<T>> + Sync,
) -> Result<Vec<Array2<T>>> {
    let outcomes: Vec<Result<(Array2<T>, Cost)>> = groups
        .par_iter()
        .map(|range| {
            let mut cost = Cost::default();
            Ok((work(range, &mut cost)?, cost))
        })
        .collect();
    in_order(outcomes, cost)
}

/// The results, with their operations added.
fn in_order<T>(
    outcomes: Vec<Result<(Array2<T>, Cost)>>,
    cost: &mut Cost,
) -> Result<Vec<Array2<T>>> {
    let mut results = Vec::with_capacity(outcomes.len());
    for outcome in outcomes {
        let (result, part) = outcome?;
        cost.add_operations(&part);
        results.push(result);
    }
    Ok(results)
}

/// Sum of the matrices.
fn total_of<T: Real>(matrices: &[Array2<T>]) -> Array2<T> {
    let mut total = matrices
        .first()
        .map_or_else(|| Array2::zeros((0, 0)), |first| Array2::zeros(first.raw_dim()));
    matrices.iter().for_each(|matrix| total += matrix);
    total
}

/// Replaces each matrix by `running` plus the sum of those before it.
fn exclusive_sums<T: Real>(mut matrices: Vec<Array2<T>>, mut running: Array2<T>) -> Vec<Array2<T>> {
    for matrix in &mut matrices {
        let next = &running + &*matrix;
        *matrix = std::mem::replace(&mut running, next);
    }
    matrices
}
