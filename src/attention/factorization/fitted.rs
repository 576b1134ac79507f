//! `fitted:degree=g[,samples=N][,seed=S][,center=both|keys|none]`: the polynomial of least squares
//! on sampled logits.
//!
//! Logits concentrate near 0, far inside the worst-case interval, and the fit spends its degrees
//! there. The certificate still bounds the error on the whole interval that the norms allow, which
//! shows the price.

use super::centering::{Center, Centered};
use super::interval::{Check, settle};
use super::monomials::MonomialMap;
use super::polynomial::{Polynomial, chebyshev_to_powers};
use super::{Certificate, FeatureMap, Scores, SoftmaxFactorization};
use crate::attention::problem::Mask;
use crate::attention::shards::WholeHead;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::decompositions::least_squares;
use ndarray::{Array1, Array2};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Least-squares polynomial of exp on sampled logits.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `degree` | none | g; k = C(d + g, g) | >= 1 |
/// | `samples` | 4096 | visible pairs drawn uniformly, with replacement | > degree |
/// | `seed` | 0 | of the draw | |
/// | `center` | both | which means are taken out | |
#[derive(Debug, Clone, PartialEq)]
pub struct Fitted {
    /// Degree g.
    pub degree: usize,
    /// Number of sampled pairs.
    pub samples: usize,
    /// Seed of the sample.
    pub seed: u64,
    /// Which means are taken out first.
    pub center: Center,
}

impl Fitted {
    /// Logits of pairs drawn uniformly from the visible ones.
    pub(super) fn sample<T: Real>(&self, scores: &Scores<T>, cost: &mut Cost) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        cost.product(self.samples, scores.query.ncols(), 1);
        (0..self.samples)
            .map(|_| {
                let (mut i, mut j) = (
                    rng.random_range(0..scores.query.nrows()),
                    rng.random_range(0..scores.key.nrows()),
                );
                // Reflection maps a uniform pair to a uniform visible one (the diagonal counts
                // twice).
                if scores.mask == Mask::Causal && j > i {
                    std::mem::swap(&mut i, &mut j);
                }
                scores.beta * scores.query.row(i).dot(&scores.key.row(j)).widen()
            })
            .collect()
    }
}

/// The polynomial that minimises sum_i (p(s_i) - exp(s_i))^2, with the largest |s_i|.
///
/// Solved in the Chebyshev basis of the sampled interval, which keeps the system well conditioned;
/// the degree is lowered when the sample has too few distinct values to determine it.
///
/// # Errors
/// [`Error::InvalidParam`] if exp overflows on the sample.
pub fn fit(degree: usize, logits: &[f64]) -> Result<(Polynomial, f64)> {
    let b = logits.iter().fold(1e-6f64, |m, s| m.max(s.abs()));
    if !b.exp().is_finite() {
        return Err(Error::invalid("largest sampled logit", b, "exp of it must not overflow"));
    }
    let target: Array1<f64> = logits.iter().map(|s| s.exp()).collect();
    for g in (0..=degree).rev() {
        let mut basis = Array2::zeros((logits.len(), g + 1));
        for (mut row, s) in basis.rows_mut().into_iter().zip(logits) {
            let x = s / b;
            row[0] = 1.0;
            for n in 1..=g {
                row[n] = if n == 1 { x } else { 2.0 * x * row[n - 1] - row[n - 2] };
            }
        }
        match least_squares(basis.view(), target.view()) {
            Ok(series) => {
                let mut coefficients = chebyshev_to_powers(&series.to_vec());
                coefficients.resize(degree + 1, 0.0);
                return Ok((Polynomial { coefficients, scale: b }, b));
            }
            Err(Error::Decomposition { .. }) if g > 0 => {}
            Err(e) => return Err(e),
        }
    }
    unreachable!("degree 0 always has a solution")
}

impl<T: Real> SoftmaxFactorization<T> for Fitted {
    fn spec(&self) -> String {
        let center = super::spec::center_suffix(self.center);
        format!("fitted:degree={},samples={},seed={}{center}", self.degree, self.samples, self.seed)
    }

    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        let spec = SoftmaxFactorization::<T>::spec(self);
        if self.samples <= self.degree {
            return Err(Error::invalid(
                "samples",
                self.samples,
                format!("must exceed the degree {}", self.degree),
            ));
        }
        let centered = Centered::new(scores, self.center, cost)?;
        let left = centered.scores(scores);
        let (b, evidence) = settle(&spec, &left, None, Check::Norms, &WholeHead, cost)?;
        let (polynomial, _) = fit(self.degree, &self.sample(&left, cost))?;
        let certificate = Certificate {
            spec,
            degree: Some(self.degree),
            interval: Some((b, evidence)),
            exp_error_bound: Some(polynomial.uniform_error(b)),
            ..Certificate::default()
        };
        Ok(Box::new(MonomialMap::new(centered, scores.beta, &polynomial, certificate)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fit_is_stationary_and_beats_its_neighbours() {
        let logits: Vec<f64> =
            (0..200).map(|i| ((i * 37 % 101) as f64 / 50.0 - 1.0).powi(3)).collect();
        let (p, _) = fit(3, &logits).unwrap();
        let residual: Vec<f64> = logits.iter().map(|&s| p.evaluate(s) - s.exp()).collect();
        // Optimality: the residual is orthogonal to every power up to the degree.
        for n in 0..=3 {
            let inner: f64 = residual.iter().zip(&logits).map(|(r, s)| r * s.powi(n)).sum();
            assert!(inner.abs() < 1e-12, "power {n}: {inner}");
        }
    }

    #[test]
    fn a_single_distinct_logit_still_has_a_fit() {
        let (p, _) = fit(4, &[0.25; 30]).unwrap();
        assert!((p.evaluate(0.25) - 0.25f64.exp()).abs() < 1e-12);
        assert_eq!(p.degree(), 4);
    }
}
