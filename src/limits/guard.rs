//! A guard for approximate training steps: chained where a certificate allows it, exact otherwise.

use super::bounds::BoundInputs;
use super::threshold::effective_gamma;
use crate::attention::chained;
use crate::attention::exact::streaming;
use crate::attention::factorization::{Scores, SoftmaxFactorization};
use crate::attention::{AttentionProblem, Gradients, Request};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;

/// When a chained gradient is accepted.
///
/// | field | purpose | range |
/// |---|---|---|
/// | `tolerance` | largest certified relative error of the gradient | > 0 |
/// | `largest_ratio` | largest c = Gamma / sqrt(ln L) at which a chained gradient is tried at all, if given | > 0 |
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormGuard {
    /// Largest certified relative error.
    pub tolerance: f64,
    /// Largest c, if given.
    pub largest_ratio: Option<f64>,
}

/// Why a step was chained or exact.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Chained: the certified relative error.
    Chained(f64),
    /// Exact: c is above the guard's.
    NormTooLarge,
    /// Exact: the certified relative error, above the tolerance.
    BoundTooLarge(f64),
    /// Exact: the factorization certifies nothing.
    NoCertificate,
    /// Exact: the factorization refused the head, with its reason.
    Refused(String),
}

impl Verdict {
    /// Whether the step fell back to the exact gradient.
    pub fn is_exact(&self) -> bool {
        !matches!(self, Verdict::Chained(_))
    }
}

/// A gradient with what the guard saw.
#[derive(Debug, Clone)]
pub struct Guarded<T> {
    /// The gradient; its cost holds a rejected attempt too.
    pub gradients: Gradients<T>,
    /// c of the head.
    pub ratio: f64,
    /// What was decided.
    pub verdict: Verdict,
}

impl NormGuard {
    /// The chained gradient if the guard accepts it, else the exact one.
    ///
    /// The norms are looked at first, in O(L d); then the chained gradient is made and its
    /// certificate propagated. A rejected attempt costs what it costs: far less than the exact
    /// gradient where the chained one is worth trying.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for parameters outside their range; those of the exact gradient.
    pub fn gradients<T: Real>(
        &self,
        problem: &AttentionProblem<T>,
        factorization: &dyn SoftmaxFactorization<T>,
        request: Request,
    ) -> Result<Guarded<T>> {
        for (name, value) in
            [("tolerance", self.tolerance), ("largest_ratio", self.largest_ratio.unwrap_or(1.0))]
        {
            if !(value > 0.0) {
                return Err(Error::invalid(name, value, "must be positive"));
            }
        }
        let mut cost = Cost::default();
        let projected = problem.project(&mut cost);
        let (query, key) = (projected.qkv.query.view(), projected.qkv.key.view());
        let tokens = query.nrows().max(key.nrows()) as f64;
        let ratio = effective_gamma(problem.beta(), query, key) / tokens.ln().sqrt();
        cost.elementwise += (query.len() + key.len()) as u64;
        let verdict = if self.largest_ratio.is_some_and(|most| !(ratio <= most)) {
            Verdict::NormTooLarge
        } else {
            let attempt =
                factorization.prepare(&Scores::of(problem, &projected), &mut cost).and_then(
                    |map| chained::with_map(problem, &projected, map.as_ref(), request, cost),
                );
            match attempt {
                Ok(attempt) => {
                    cost.add_operations(&attempt.gradients.cost);
                    match attempt.certificate.exp_error_bound {
                        None => Verdict::NoCertificate,
                        Some(eta) => {
                            let bound = BoundInputs::new(problem, &projected)?
                                .propagate(problem, &attempt, eta);
                            if bound.relative <= self.tolerance {
                                let verdict = Verdict::Chained(bound.relative);
                                return Ok(Guarded {
                                    gradients: attempt.gradients,
                                    ratio,
                                    verdict,
                                });
                            }
                            Verdict::BoundTooLarge(bound.relative)
                        }
                    }
                }
                Err(
                    error @ (Error::NonPositiveDenominator { .. }
                    | Error::LogitOutsideInterval { .. }
                    | Error::TooLarge { .. }
                    | Error::InvalidParam { .. }),
                ) => Verdict::Refused(error.to_string()),
                Err(error) => return Err(error),
            }
        };
        let mut gradients = streaming::gradients(problem, request)?;
        gradients.cost.add_operations(&cost);
        Ok(Guarded { gradients, ratio, verdict })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::factorization::build;
    use crate::attention::synthetic::SyntheticHead;

    fn run(c: f64, guard: NormGuard, spec: &str) -> (Guarded<f64>, f64) {
        let problem: AttentionProblem<f64> =
            SyntheticHead::new(200, 4).at_threshold_ratio(c).draw().unwrap();
        let guarded =
            guard.gradients(&problem, build(spec).unwrap().as_ref(), Request::Adapters).unwrap();
        let exact = streaming::gradients(&problem, Request::Adapters).unwrap();
        let gap = guarded.gradients.relative_gap(&exact);
        (guarded, gap)
    }

    #[test]
    fn small_norms_are_chained_within_the_tolerance_and_large_ones_are_exact() {
        let guard = NormGuard { tolerance: 0.05, largest_ratio: None };
        let (low, gap) = run(0.2, guard, "chebyshev:degree=4");
        assert!(
            matches!(low.verdict, Verdict::Chained(b) if b <= 0.05 && gap <= b),
            "{:?} {gap}",
            low.verdict
        );
        assert!((low.ratio - 0.2).abs() < 1e-9 && gap > 0.0);
        let (high, gap) = run(1.0, guard, "chebyshev:degree=4");
        assert!(
            matches!(high.verdict, Verdict::BoundTooLarge(b) if b > 0.05),
            "{:?}",
            high.verdict
        );
        assert_eq!(gap.to_bits(), 0f64.to_bits());
    }

    #[test]
    fn every_reason_to_be_exact_is_told() {
        let guard = NormGuard { tolerance: 0.05, largest_ratio: Some(0.5) };
        assert_eq!(run(0.6, guard, "chebyshev:degree=4").0.verdict, Verdict::NormTooLarge);
        assert!(!run(0.2, guard, "chebyshev:degree=4").0.verdict.is_exact());
        assert_eq!(run(0.2, guard, "positive-features:rank=64").0.verdict, Verdict::NoCertificate);
        let (refused, gap) = run(0.4, guard, "taylor:degree=3,b=0.01");
        assert!(
            matches!(&refused.verdict, Verdict::Refused(why) if why.contains("raise b")),
            "{:?}",
            refused.verdict
        );
        assert!(refused.verdict.is_exact() && gap.to_bits() == 0);
        let bad = NormGuard { tolerance: f64::NAN, largest_ratio: None };
        let problem: AttentionProblem<f64> = SyntheticHead::new(20, 4).draw().unwrap();
        let method = build("taylor:degree=2").unwrap();
        assert!(matches!(
            bad.gradients(&problem, method.as_ref(), Request::All),
            Err(Error::InvalidParam { .. })
        ));
    }
}
