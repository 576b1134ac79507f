//! The truncated SVD of P tried on one head at rising ranks: the best that any factorization of a
//! given rank can do.

use crate::attention::chained::{ChainedGradients, with_map};
use crate::attention::factorization::Scores;
use crate::attention::factorization::truncated_svd::Oracle;
use crate::attention::problem::Projected;
use crate::attention::{AttentionProblem, Gradients, Request};
use crate::cost::Cost;
use crate::error::Result;
use std::time::Instant;

/// One decomposition, cut at any rank.
pub struct OracleTrials<'a> {
    problem: &'a AttentionProblem<f64>,
    request: Request,
    projected: Projected<f64>,
    oracle: Oracle<f64>,
    decomposition: Cost,
    /// Seconds of the projections and the decomposition, which every rank shares.
    pub decomposition_seconds: f64,
}

impl<'a> OracleTrials<'a> {
    /// Decomposes the head's P.
    ///
    /// # Errors
    /// As [`Oracle::new`].
    pub fn new(problem: &'a AttentionProblem<f64>, request: Request) -> Result<Self> {
        let start = Instant::now();
        let projected = problem.project(&mut Cost::default());
        let mut decomposition = Cost::default();
        let oracle = Oracle::new(&Scores::of(problem, &projected), &mut decomposition)?;
        let decomposition_seconds = start.elapsed().as_secs_f64();
        Ok(Self { problem, request, projected, oracle, decomposition, decomposition_seconds })
    }

    /// The largest rank: the smaller side of P.
    pub fn full_rank(&self) -> usize {
        self.oracle.singular_values().len()
    }

    /// The chained gradient of the best approximation of that rank; its cost holds the
    /// decomposition.
    ///
    /// # Errors
    /// As [`Oracle::cut`] and [`with_map`].
    pub fn gradients(&self, rank: usize) -> Result<ChainedGradients<f64>> {
        let map = self.oracle.cut(rank)?;
        with_map(self.problem, &self.projected, map.as_ref(), self.request, self.decomposition)
    }

    /// Operations of the chained gradient at that rank, without the decomposition.
    ///
    /// # Errors
    /// As [`OracleTrials::gradients`].
    pub fn chain_flops(&self, rank: usize) -> Result<u64> {
        let all = self.gradients(rank)?.gradients.cost.flops();
        Ok(all.saturating_sub(self.decomposition.flops()))
    }

    /// (relative gradient error, seconds with the decomposition) of one run; an infinite error
    /// where an approximate denominator is not positive.
    ///
    /// # Errors
    /// As [`OracleTrials::gradients`], apart from such denominators.
    pub fn trial(&self, rank: usize, exact: &Gradients<f64>) -> Result<(f64, f64)> {
        let start = Instant::now();
        let error = match self.gradients(rank) {
            Ok(chained) => chained.gradients.relative_gap(exact),
            Err(crate::Error::NonPositiveDenominator { .. }) => f64::INFINITY,
            Err(error) => return Err(error),
        };
        Ok((error, self.decomposition_seconds + start.elapsed().as_secs_f64()))
    }
}
