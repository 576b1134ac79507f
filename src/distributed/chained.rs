//! The chained gradient with the tokens divided among ranks.
//!
//! Every rank makes the features of its rows. Without a mask two all-reduces carry the right
//! moments Psi^T \[1 | V | R | V' * Z\] and the left ones U^T \[N | G' * W\]; under a causal mask
//! the first is a prefix and the second a suffix sum over ranks. A last all-reduce carries dA, dB
//! (or dW). Nothing that is sent grows with L.

use super::totals::{require_one_head, sum_over_ranks};
use super::{Ranks, Scalar};
use crate::attention::chained::{ChainedGradients, on_shard};
use crate::attention::factorization::{Scores, SoftmaxFactorization};
use crate::attention::shards::together;
use crate::attention::{AttentionProblem, Request};
use crate::cost::Cost;
use crate::error::{Error, Result};

/// Chained gradients of a head of which `problem` holds this rank's rows, in the order of the
/// ranks.
///
/// dW, dA, dB, the loss and the counted operations are those of the whole head; O, dQ, dK, dV, the
/// inverse denominators and the counted memory are this rank's. Equal to
/// [`crate::attention::chained::gradients`] of the whole head up to the rounding of sums; under a
/// causal mask the exact diagonal chunks begin at each rank's first row, so there the approximation
/// itself is another one unless every rank's first row is a multiple of
/// [`crate::attention::chained::CHUNK`], as [`super::rows::rows_of`] makes it for 256 tokens a rank
/// or more.
///
/// # Errors
/// As [`crate::attention::chained::gradients`], with rows counted from the head's first;
/// [`Error::InvalidParam`] for a factorization that needs all rows in one process; [`Error::Mpi`]
/// when the ranks' tasks differ; [`Error::OtherRank`] when another rank fails.
pub fn gradients<T: Scalar>(
    ranks: &Ranks,
    problem: &AttentionProblem<T>,
    factorization: &dyn SoftmaxFactorization<T>,
    request: Request,
) -> Result<ChainedGradients<T>> {
    require_one_head(ranks, "chained gradient", problem, request, &factorization.spec())?;
    let rows = ranks.gather_counts(problem.num_queries());
    let first_row: usize = rows[..ranks.rank()].iter().sum();
    let mut cost = Cost::default();
    let projected = problem.project(&mut cost);
    let map = factorization.prepare_shard(&Scores::of(problem, &projected), ranks, &mut cost);
    let map = together::<T, _>(ranks, map)?;
    let outcome = on_shard(problem, &projected, map.as_ref(), request, ranks, cost);
    let done = outcome.map_err(|error| match error {
        Error::NonPositiveDenominator { factorization, row, value } => {
            Error::NonPositiveDenominator { factorization, row: row + first_row, value }
        }
        other => other,
    })?;
    let gradients = sum_over_ranks(ranks, done.gradients)?;
    Ok(ChainedGradients { gradients, ..done })
}
