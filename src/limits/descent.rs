//! Descent of the adapters of one attention head, with exact, chained or guarded gradients.

use super::guard::{NormGuard, Verdict};
use crate::attention::exact::streaming;
use crate::attention::factorization::SoftmaxFactorization;
use crate::attention::{AttentionProblem, Gradients, Request, chained};
use crate::error::Result;
use crate::linalg::Real;

/// Where the gradient of a step comes from.
pub enum GradientSource<'a, T> {
    /// The streaming gradient.
    Exact,
    /// The chained gradient, whatever its error.
    Chained(&'a dyn SoftmaxFactorization<T>),
    /// The chained gradient where a guard accepts it, else the exact one.
    Guarded(&'a dyn SoftmaxFactorization<T>, NormGuard),
}

/// What a step did.
#[derive(Debug, Clone)]
pub struct HeadStep<T> {
    /// The gradient that was followed.
    pub gradients: Gradients<T>,
    /// Whether it was exact.
    pub exact: bool,
    /// The certified relative error of a guarded step that was chained or rejected by its bound.
    pub certified: Option<f64>,
}

/// How numbers move along their gradient; the optimizers of training are such rules.
pub trait UpdateRule<T> {
    /// A step begins: every tensor is updated once before the next.
    fn begin_step(&mut self);

    /// Moves the values of one tensor.
    ///
    /// # Errors
    /// Whatever the rule refuses.
    fn update(&mut self, name: &str, values: &mut [T], gradient: &[T]) -> Result<()>;
}

/// A head whose adapters move by a rule.
pub struct HeadTrainer<T, R> {
    problem: AttentionProblem<T>,
    rule: R,
}

impl<T: Real, R: UpdateRule<T>> HeadTrainer<T, R> {
    /// Starts from a head with adapters.
    pub fn new(problem: AttentionProblem<T>, rule: R) -> Self {
        Self { problem, rule }
    }

    /// The head as it is now.
    pub fn problem(&self) -> &AttentionProblem<T> {
        &self.problem
    }

    /// One gradient and one update of every A and B.
    ///
    /// # Errors
    /// Those of the gradient; [`crate::Error::NonFinite`] if an adapter diverged. The head is then
    /// left as it was before the step, or with the update that diverged.
    pub fn step(&mut self, source: &GradientSource<T>) -> Result<HeadStep<T>> {
        let step = match source {
            GradientSource::Exact => {
                let gradients = streaming::gradients(&self.problem, Request::Adapters)?;
                HeadStep { gradients, exact: true, certified: None }
            }
            GradientSource::Chained(method) => {
                let gradients =
                    chained::gradients(&self.problem, *method, Request::Adapters)?.gradients;
                HeadStep { gradients, exact: false, certified: None }
            }
            GradientSource::Guarded(method, guard) => {
                let guarded = guard.gradients(&self.problem, *method, Request::Adapters)?;
                let certified = match guarded.verdict {
                    Verdict::Chained(bound) | Verdict::BoundTooLarge(bound) => Some(bound),
                    _ => None,
                };
                HeadStep {
                    exact: guarded.verdict.is_exact(),
                    gradients: guarded.gradients,
                    certified,
                }
            }
        };
        self.rule.begin_step();
        let rule = &mut self.rule;
        let named = step.gradients.named();
        self.problem.update_adapters(|name, values| {
            match named.iter().find(|(n, _)| n.strip_prefix('d') == Some(name)) {
                Some((_, gradient)) => {
                    let gradient: Vec<T> = gradient.iter().copied().collect();
                    rule.update(name, values, &gradient)
                }
                None => Ok(()),
            }
        })?;
        Ok(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::factorization::build;
    use crate::attention::synthetic::SyntheticHead;

    /// `lr` times the gradient, or its signs.
    enum Rule {
        Gradient(f64),
        Signs(f64),
    }

    impl UpdateRule<f64> for Rule {
        fn begin_step(&mut self) {}

        fn update(&mut self, _name: &str, values: &mut [f64], gradient: &[f64]) -> Result<()> {
            for (value, g) in values.iter_mut().zip(gradient) {
                *value -= match self {
                    Self::Gradient(lr) => *lr * g,
                    Self::Signs(lr) => *lr * g.signum(),
                };
            }
            Ok(())
        }
    }

    fn trainer(c: f64, rule: Rule) -> HeadTrainer<f64, Rule> {
        let problem = SyntheticHead { rank: 2, ..SyntheticHead::new(120, 4) }
            .at_threshold_ratio(c)
            .draw()
            .unwrap();
        HeadTrainer::new(problem, rule)
    }

    /// A small step of gradient descent lowers the loss by lr times the squared gradient, to first
    /// order.
    #[test]
    fn descent_lowers_the_loss_as_the_gradient_says() {
        let mut trainer = trainer(0.5, Rule::Gradient(1e-7));
        let first = trainer.step(&GradientSource::Exact).unwrap();
        let second = trainer.step(&GradientSource::Exact).unwrap();
        let square: f64 =
            first.gradients.named().iter().map(|(_, g)| g.iter().map(|x| x * x).sum::<f64>()).sum();
        let drop = first.gradients.loss.unwrap() - second.gradients.loss.unwrap();
        assert!(
            (drop / (1e-7 * square) - 1.0).abs() < 1e-2,
            "{drop:e} against {:e}",
            1e-7 * square
        );
    }

    #[test]
    fn accurate_chained_and_guarded_training_follow_the_exact_one() {
        let method = build::<f64>("chebyshev:degree=12").unwrap();
        let guard = NormGuard { tolerance: 0.01, largest_ratio: None };
        let run = |source: GradientSource<f64>| {
            let mut trainer = trainer(0.4, Rule::Signs(0.01));
            let steps: Vec<HeadStep<f64>> =
                (0..20).map(|_| trainer.step(&source).unwrap()).collect();
            (
                steps[19].gradients.loss.unwrap(),
                steps.iter().filter(|s| s.exact).count(),
                steps[0].gradients.loss.unwrap(),
            )
        };
        let (exact, all, start) = run(GradientSource::Exact);
        let (chained, none, _) = run(GradientSource::Chained(method.as_ref()));
        let (guarded, some, _) = run(GradientSource::Guarded(method.as_ref(), guard));
        assert!(exact < 0.999 * start && all == 20 && none == 0 && some == 0);
        assert!((chained / exact - 1.0).abs() < 1e-6 && (guarded / exact - 1.0).abs() < 1e-6);
    }

    #[test]
    fn divergence_is_an_error() {
        let mut trainer = trainer(0.5, Rule::Gradient(1e200));
        let outcome = (0..3).try_for_each(|_| trainer.step(&GradientSource::Exact).map(drop));
        assert!(matches!(outcome, Err(crate::Error::NonFinite { .. })), "{outcome:?}");
    }
}
