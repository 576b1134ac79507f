//! A factorization of exp(S) of your own, plugged into the chained gradient and compared with the
//! dense one.
//!
//! exp(x) ~= (1 + x/2)^2, the compound-interest formula after two periods. It is no better than the
//! Taylor polynomial of degree 2, but it is never negative, so that no softmax denominator can
//! vanish, whatever the logits are. `cargo run --release --example own_factorization`

use ndarray::{ArrayView2, ArrayViewMut2};
use peft_limits::Error;
use peft_limits::attention::exact::dense;
use peft_limits::attention::factorization::interval::Evidence;
use peft_limits::attention::factorization::{
    Certificate, FeatureMap, Scores, SoftmaxFactorization,
};
use peft_limits::attention::factorization::{approximation, build};
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Request, chained};
use peft_limits::cost::Cost;
use peft_limits::linalg::{Real, norms};

/// (1 + x/2)^2; it has no parameters.
struct Compound;

/// With z = (1, sqrt(beta/2) q) and w = (1, sqrt(beta/2) k), (1 + beta q.k / 2)^2 = (z.w)^2 is the
/// inner product of the products z_a z_b over a <= b, those of a < b times sqrt 2.
struct CompoundMap<T> {
    head_dim: usize,
    /// sqrt(beta / 2).
    scale: T,
    certificate: Certificate,
}

impl<T: Real> SoftmaxFactorization<T> for Compound {
    fn spec(&self) -> String {
        "compound".into()
    }

    fn prepare(
        &self,
        scores: &Scores<T>,
        cost: &mut Cost,
    ) -> Result<Box<dyn FeatureMap<T>>, Error> {
        let head_dim = scores.query.ncols();
        // Cauchy-Schwarz: no logit is larger than this. exp(x) - (1 + x/2)^2 is largest at the
        // right end.
        let b = scores.beta * norms::max_row_norm(scores.query) * norms::max_row_norm(scores.key);
        cost.multiply_adds += (scores.query.len() + scores.key.len()) as u64;
        let certificate = Certificate {
            spec: SoftmaxFactorization::<T>::spec(self),
            rank: (head_dim + 1) * (head_dim + 2) / 2,
            degree: Some(2),
            interval: Some((b, Evidence::Norms)),
            exp_error_bound: Some(b.exp() - (1.0 + 0.5 * b).powi(2)),
            ..Certificate::default()
        };
        Ok(Box::new(CompoundMap {
            head_dim,
            scale: T::of((0.5 * scores.beta).sqrt()),
            certificate,
        }))
    }
}

impl<T: Real> CompoundMap<T> {
    /// Queries and keys are treated alike, row by row.
    fn features(&self, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        let root = T::of(std::f64::consts::SQRT_2);
        for (i, row) in rows.rows().into_iter().enumerate() {
            let z = |a: usize| if a == 0 { T::one() } else { self.scale * row[a - 1] };
            let mut column = 0;
            for a in 0..=self.head_dim {
                for b in a..=self.head_dim {
                    out[[column, i]] = if a == b { z(a) * z(a) } else { root * z(a) * z(b) };
                    column += 1;
                }
            }
        }
    }
}

impl<T: Real> FeatureMap<T> for CompoundMap<T> {
    fn rank(&self) -> usize {
        self.certificate.rank
    }

    fn query_features(&self, _first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.features(rows, out);
    }

    fn key_features(&self, _first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.features(rows, out);
    }

    fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}

pub(crate) fn main() -> Result<(), Error> {
    println!(
        "   c  columns  |exp error| <= bound     gradient error: compound, taylor of degree 2"
    );
    let mut errors = Vec::new();
    for c in [0.1, 0.2, 0.4, 0.8, 1.6] {
        let head: AttentionProblem<f64> =
            SyntheticHead::new(300, 5).at_threshold_ratio(c).draw()?;
        let projected = head.project(&mut Cost::default());
        let scores = Scores::of(&head, &projected);

        // Entry by entry against exp(S): the bound of the certificate must hold.
        let map = Compound.prepare(&scores, &mut Cost::default())?;
        let logits = scores.query.dot(&scores.key.t()) * scores.beta;
        let gap = norms::max_abs(
            &(&approximation(map.as_ref(), &scores) - &logits.mapv(f64::exp)).view(),
        );
        let bound = map.certificate().exp_error_bound.unwrap_or(f64::NAN);
        assert!(
            gap <= bound * (1.0 + 1e-12),
            "the certificate promises {bound:e}, the error is {gap:e}"
        );

        let exact = dense::gradients(&head, Request::Adapters)?;
        let ours = chained::gradients(&head, &Compound, Request::Adapters)?;
        let taylor =
            chained::gradients(&head, build("taylor:degree=2")?.as_ref(), Request::Adapters)?;
        // No softmax denominator is negative, even where the approximation is far off.
        assert!(ours.inverse_denominators.iter().all(|&x| x > 0.0));
        let (ours, taylor) =
            (ours.gradients.relative_gap(&exact), taylor.gradients.relative_gap(&exact));
        println!(
            "{c:>4}  {:>7}  {gap:.2e} <= {bound:.2e}     {ours:.2e}, {taylor:.2e}",
            map.rank()
        );
        errors.push(ours);
    }
    assert!(
        errors[0] < 0.02 && errors.windows(2).all(|e| e[0] < e[1]),
        "the error must grow with the norm: {errors:?}"
    );
    Ok(())
}
