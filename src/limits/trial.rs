//! One factorization tried on one head: what it cost and how wrong its gradient is.

use crate::attention::chained;
use crate::attention::exact::{dense, streaming};
use crate::attention::factorization::{Certificate, SoftmaxFactorization};
use crate::attention::{AttentionProblem, Gradients, Request};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::{Real, norms};
use std::time::Instant;

/// The outcome of a trial.
#[derive(Debug, Clone)]
pub struct Trial {
    /// What was assumed and guaranteed.
    pub certificate: Certificate,
    /// Relative Frobenius error of dA and dB together (dQ, dK, dV for heads without adapters).
    pub gradient_error: f64,
    /// Relative Frobenius error of O.
    pub output_error: f64,
    /// Counted operations.
    pub cost: Cost,
    /// Wall-clock seconds of one run.
    pub seconds: f64,
}

/// The request that suits a head: its adapters if it has any, else everything.
pub fn natural_request<T: Real>(problem: &AttentionProblem<T>) -> Request {
    let adapters = problem.adapters();
    let any = adapters.query.is_some() || adapters.key.is_some() || adapters.value.is_some();
    if any { Request::Adapters } else { Request::All }
}

/// Longest sequence whose reference gradient is the dense one; beyond, the streaming one in f64.
pub const DENSE_REFERENCE_TOKENS: usize = 2048;

/// Exact gradients in f64 to measure against.
///
/// # Errors
/// Those of the exact routines.
pub fn reference(problem: &AttentionProblem<f64>, request: Request) -> Result<Gradients<f64>> {
    if problem.num_queries().max(problem.num_keys()) <= DENSE_REFERENCE_TOKENS {
        dense::gradients(problem, request)
    } else {
        streaming::gradients(problem, request)
    }
}

/// Runs one factorization and measures its gradient against the reference.
///
/// # Errors
/// Those of [`chained::gradients`].
pub fn trial<T: Real>(
    problem: &AttentionProblem<T>,
    reference: &Gradients<f64>,
    factorization: &dyn SoftmaxFactorization<T>,
    request: Request,
) -> Result<Trial> {
    trial_of(reference, || chained::gradients(problem, factorization, request))
}

/// Times a chained gradient, wherever it is computed, and measures it against the reference.
///
/// # Errors
/// Those of `compute`.
pub fn trial_of<T: Real>(
    reference: &Gradients<f64>,
    compute: impl FnOnce() -> Result<chained::ChainedGradients<T>>,
) -> Result<Trial> {
    let start = Instant::now();
    let chained = compute()?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Trial {
        gradient_error: chained.gradients.relative_gap(reference),
        output_error: norms::relative_frobenius(
            &chained.gradients.output.view(),
            &reference.output.view(),
        ),
        cost: chained.gradients.cost,
        certificate: chained.certificate,
        seconds,
    })
}
