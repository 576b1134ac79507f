//! Chained low-rank gradients: O(L k r d_v) operations from factors exp(S) ~= Phi Psi^T (design
//! 2.2).
//!
//! With D = Phi (Psi^T 1) and U = D^{-1} Phi, the approximate probabilities are P^ = U Psi^T.
//! Writing V' = [V | 1] and G' = [G | -delta], the gradient of the scores is
//!
//! ```text
//! dS^ = P^ o (G V^T - delta 1^T) = sum_c diag(G'_c) U Psi^T diag(V'_c)
//! ```
//!
//! so a product with it is a sum over the d_v + 1 columns c of thin products, all made at once with
//! the row-wise Khatri-Rao product `*`:
//!
//! ```text
//! (dS^ Z)_i   = sum_c G'_ic [U (Psi^T (V' * Z))]_{i,(c,:)}
//! (dS^^T W)_j = sum_c V'_jc [Psi (U^T (G' * W))]_{j,(c,:)}
//! ```
//!
//! Without a mask, three passes over row tiles do it; a causal mask scans chunks and treats the
//! diagonal ones exactly. Without columns (a sparse P^ alone) there is nothing to chain: each pair
//! is treated as in the exact gradient.

mod causal;
mod full;
mod pairs;
mod query_results;
mod sparse;
mod tile;

use super::contraction::Contraction;
use super::factorization::{Certificate, FeatureMap, Scores, SoftmaxFactorization};
use super::gradients::{Gradients, Request};
use super::problem::{AttentionProblem, Mask, Projected};
use super::shards::{RowShards, WholeHead};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;

/// Rows of the chunks that a causal chain treats exactly, counted from the first row of a shard.
pub const CHUNK: usize = tile::TILE;

/// A gradient with the certificate of the factorization that made it.
#[derive(Debug, Clone)]
pub struct ChainedGradients<T> {
    /// The gradients.
    pub gradients: Gradients<T>,
    /// 1 / D_i of every query, D the approximate softmax denominator on the scale exp(S - shift).
    pub inverse_denominators: Vec<T>,
    /// What the factorization assumed and guarantees.
    pub certificate: Certificate,
}

/// Chained gradients of a head.
///
/// O(L k (d_v + 1) m) operations with m = 2 r columns for [`Request::Adapters`] and d_h for
/// [`Request::All`], causal mask included; features are made tile by tile, so memory is O(L d + k
/// (d_v + 1) m) for each thread.
///
/// # Errors
/// Those of the factorization's `prepare`; [`crate::Error::NonPositiveDenominator`] when an
/// approximate softmax denominator is not positive; [`crate::Error::InvalidParam`] for
/// [`Request::Adapters`] without adapters.
pub fn gradients<T: Real>(
    problem: &AttentionProblem<T>,
    factorization: &dyn SoftmaxFactorization<T>,
    request: Request,
) -> Result<ChainedGradients<T>> {
    let mut cost = Cost::default();
    let projected = problem.project(&mut cost);
    let map = factorization.prepare(&Scores::of(problem, &projected), &mut cost)?;
    with_map(problem, &projected, map.as_ref(), request, cost)
}

/// As [`gradients`], for projections and features already prepared; `cost` is what they cost.
///
/// # Errors
/// As [`gradients`].
pub fn with_map<T: Real>(
    problem: &AttentionProblem<T>,
    projected: &Projected<T>,
    map: &dyn FeatureMap<T>,
    request: Request,
    cost: Cost,
) -> Result<ChainedGradients<T>> {
    on_shard(problem, projected, map, request, &WholeHead, cost)
}

/// As [`with_map`], for one shard of a head's rows: `problem`, `projected` and `map` are of this
/// shard's rows.
///
/// Rows of the result (O, dQ, dK, dV) are this shard's; its dW, dA, dB and loss are still to be
/// summed over the shards.
///
/// # Errors
/// As [`gradients`], rows being counted from the shard's first; [`crate::Error::OtherRank`] when
/// another shard fails.
pub fn on_shard<T: Real>(
    problem: &AttentionProblem<T>,
    projected: &Projected<T>,
    map: &dyn FeatureMap<T>,
    request: Request,
    shards: &dyn RowShards<T>,
    mut cost: Cost,
) -> Result<ChainedGradients<T>> {
    let contraction = Contraction::new(problem, projected, request, &mut cost)?;
    let chain = tile::Chain::new(problem, projected, &contraction, map);
    let done = match problem.mask() {
        // No column: nothing to chain, and no reason to treat diagonal chunks apart.
        _ if map.rank() == 0 => pairs::products(&chain, &mut cost)?,
        Mask::Full => full::products(&chain, shards, &mut cost)?,
        Mask::Causal => causal::products(&chain, shards, &mut cost)?,
    };
    let gradients = contraction.finish(problem, projected, &done.upstream, done.products, cost);
    let inverse_denominators = done.row_state.column(0).to_vec();
    Ok(ChainedGradients { gradients, inverse_denominators, certificate: map.certificate().clone() })
}

/// Multiply-adds of a chained gradient with k feature columns on self-attention, as counted by
/// [`gradients`] apart from the projections, whose cost every method shares.
///
/// `moment_columns` is m of both dS Z and dS^T W: 2 r for adapters on Q and K, d_h for all
/// gradients; `value_columns` is that of P R and P^T N together.
pub fn predicted_multiply_adds(
    tokens: usize,
    feature_columns: u128,
    value_dim: usize,
    moment_columns: usize,
    value_columns: usize,
) -> f64 {
    let contracted = (value_dim + 1) * moment_columns;
    let columns = (2 * (1 + value_dim + contracted) + value_columns * 2 + 2 * contracted) as f64;
    tokens as f64 * (feature_columns as f64 * columns + 2.0 * contracted as f64)
}

/// Multiply-adds of a gradient from kept pairs alone, as counted by [`gradients`] apart from the
/// projections and the search. Columns as in [`predicted_multiply_adds`].
pub fn predicted_pair_multiply_adds(
    pairs: u64,
    value_dim: usize,
    moment_columns: usize,
    value_columns: usize,
) -> f64 {
    pairs as f64 * (2 * value_dim + 2 * moment_columns + value_columns) as f64
}
