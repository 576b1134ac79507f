//! eps-ranks of a head with L tokens, where L tokens are too few to see every product.
//!
//! A head samples the operator: A = X Sigma Y^T with the features of L queries and of L keys, rows
//! of variance 1/L. Sampling spreads small singular values, so a best approximation of A holds more
//! than one of the operator and the eps-rank lies below the count of products. For free X^T X and
//! Y^T Y the moments of A A^T follow from one equation (paper-notes/phase-diagram.md, equations
//! (11) to (13)); nothing is fitted.

use super::rank::{BIN, Levels};
use crate::error::{Error, Result};
use gauss_quad::{FiniteAboveNegOneF64, GaussLaguerre};
use nalgebra::Complex;
use std::f64::consts::PI;
use std::num::NonZeroUsize;

type C = Complex<f64>;

/// The operator seen through L queries and L keys.
pub struct Sample {
    /// Size and total energy of each level.
    levels: Vec<(f64, f64)>,
    tokens: f64,
    /// Points and probabilities of the weight of a row; one point for rows of equal weight.
    weights: Vec<(f64, f64)>,
}

impl Sample {
    /// P of a head of `tokens` queries and keys.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] unless there is a token.
    pub fn of_probabilities(levels: &Levels, tokens: f64) -> Result<Self> {
        Self::new(levels, tokens, 1.0, vec![(1.0, 1.0)])
    }

    /// dS = P o (G V^T - delta) with independent normal G and V of `value_dim` columns: as many
    /// copies of P, each row and each column weighted by the squared length of its row of G or V.
    ///
    /// # Errors
    /// As [`Sample::of_probabilities`], and for no value column.
    pub fn of_score_gradient(levels: &Levels, tokens: f64, value_dim: usize) -> Result<Self> {
        const NODES: NonZeroUsize = NonZeroUsize::new(40).unwrap();
        let shape = value_dim as f64 / 2.0;
        let alpha = FiniteAboveNegOneF64::new(shape - 1.0).filter(|_| value_dim > 0);
        let alpha =
            alpha.ok_or_else(|| Error::invalid("value_dim", value_dim, "must be at least 1"))?;
        let rule = GaussLaguerre::new(NODES, alpha);
        let total: f64 = rule.iter().map(|(_, w)| w).sum();
        let weights = rule.iter().map(|(x, w)| (x / shape, w / total)).collect();
        Self::new(levels, tokens, value_dim as f64, weights)
    }

    fn new(levels: &Levels, tokens: f64, copies: f64, weights: Vec<(f64, f64)>) -> Result<Self> {
        if !(tokens >= 1.0 && tokens.is_finite()) {
            return Err(Error::invalid("tokens", tokens, "must be at least 1 and finite"));
        }
        let size = |bin: usize| (-(bin as f64) * BIN - levels.normaliser).exp();
        let filled = levels.energy.iter().enumerate().filter(|(_, e)| **e > 1e-14);
        let levels = filled.map(|(bin, e)| (size(bin), e * copies)).collect();
        Ok(Self { levels, tokens, weights })
    }

    /// eps-rank (relative Frobenius), whole numbers interpolated.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for eps outside (0, 1); [`Error::NotConverged`] if the equation is
    /// not solved.
    pub fn rank(&self, eps: f64) -> Result<f64> {
        if !(eps > 0.0 && eps < 1.0) {
            return Err(Error::invalid("eps", eps, "must lie between 0 and 1"));
        }
        let total: f64 = self.levels.iter().map(|l| l.1).sum();
        let (mut low, mut high) = ((self.levels[0].0 * 1e-9).ln(), (self.levels[0].0 * 10.0).ln());
        for _ in 0..26 {
            let middle = (low + high) / 2.0;
            if self.above(middle.exp(), total)?.1 < (1.0 - eps * eps) * total {
                high = middle
            } else {
                low = middle
            }
        }
        Ok(self.above(low.exp(), total)?.0)
    }

    /// Number and sum of the eigenvalues of A A^T above x, by an integral of the resolvent along
    /// the line through x that is parallel to the imaginary axis.
    fn above(&self, x: f64, total: f64) -> Result<(f64, f64)> {
        const STEP: f64 = 0.25;
        let mut state = None;
        let (mut number, mut energy) = (0.0, 0.0);
        // In ln(y / x): the integrands fall like 1 / y far away and are bounded near the axis.
        let mut at = (1e6 * self.levels[0].0 / x).ln();
        while at > -12.0 {
            let y = x * at.exp();
            let z = C::new(x, y);
            let (kappa, weight) =
                self.solve(z, state.unwrap_or((-z, -z * (self.tokens / total))))?;
            state = Some((kappa, weight));
            let (freedom, _) = self.freedom(kappa);
            number += (freedom / z).re * y * STEP / PI;
            energy += (freedom + C::from(total) / z).re * y * STEP / PI;
            at -= STEP;
        }
        Ok((number, energy))
    }

    /// m(kappa) = sum n lambda / (lambda + kappa) and its derivative.
    fn freedom(&self, kappa: C) -> (C, C) {
        let mut sums = (C::from(0.0), C::from(0.0));
        for &(size, energy) in &self.levels {
            let inverse = (kappa + size).inv();
            sums.0 += inverse * energy;
            sums.1 -= inverse * inverse * energy;
        }
        sums
    }

    /// The root kappa of kappa g^2 = -z by Newton's method from a nearby one, with g = f t, f =
    /// m(kappa) / L = E w / (w + t); for equal weights g = 1 - f.
    fn solve(&self, z: C, (mut kappa, mut t): (C, C)) -> Result<(C, C)> {
        const MOST: usize = 100;
        for _ in 0..MOST {
            let (m, slope) = self.freedom(kappa);
            let (f, f_slope) = (m / self.tokens, slope / self.tokens);
            let (g, g_slope) = if self.weights.len() == 1 {
                (C::from(1.0) - f, -f_slope)
            } else {
                let (root, h_slope) = self.weight_root(f, t)?;
                t = root;
                (f * t, f_slope * (t + f / h_slope))
            };
            let step = (kappa * g * g + z) / (g * g + kappa * g * g_slope * 2.0);
            kappa -= step;
            if step.norm() <= 1e-10 * kappa.norm() {
                return Ok((kappa, t));
            }
        }
        Err(Error::NotConverged {
            op: "rank of a sample",
            iterations: MOST,
            residual: f64::NAN,
            tolerance: 1e-10,
        })
    }

    /// t with E w / (w + t) = f, and the derivative of the left side there.
    fn weight_root(&self, f: C, mut t: C) -> Result<(C, C)> {
        const MOST: usize = 100;
        for _ in 0..MOST {
            let (mut value, mut slope) = (-f, C::from(0.0));
            for &(w, share) in &self.weights {
                let inverse = (t + w).inv();
                value += inverse * (w * share);
                slope -= inverse * inverse * (w * share);
            }
            let step = value / slope;
            t -= step;
            if step.norm() <= 1e-11 * t.norm() {
                return Ok((t, slope));
            }
        }
        Err(Error::NotConverged {
            op: "weights of rows",
            iterations: MOST,
            residual: f64::NAN,
            tolerance: 1e-11,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Law, energies};
    use super::*;
    use crate::limits::rank::interpolated_rank;
    use crate::linalg::decompositions::singular_values;
    use ndarray::Array2;
    use rand::SeedableRng;
    use rand_distr::{Distribution, StandardNormal};

    /// X Sigma Y^T with normal X and Y, the model itself: one level of n equal products is a
    /// product of two Wishart matrices.
    #[test]
    fn ranks_are_those_of_normal_features() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let mut normal = |rows: usize, columns: usize| -> Array2<f64> {
            Array2::from_shape_simple_fn((rows, columns), || StandardNormal.sample(&mut rng))
        };
        let p = energies(&Law::Sign, 0.5).unwrap();
        let d = 8;
        let tokens = 300;
        let levels = Levels::new(&p, d, 0.05).unwrap();
        let products: Vec<f64> = (0..1usize << d)
            .map(|set| (0..d).map(|t| p[set >> t & 1]).product::<f64>().sqrt() / tokens as f64)
            .collect();
        let sigma = Array2::from_diag(&ndarray::Array1::from(products));
        let (x, y) = (normal(tokens, 1 << d), normal(tokens, 1 << d));
        let plain = x.dot(&sigma).dot(&y.t());
        let s = singular_values(plain.view()).unwrap().to_vec();
        let sample = Sample::of_probabilities(&levels, tokens as f64).unwrap();
        // dS of two value columns: each row of features times each number of its row of G or V.
        let (g, v) = (normal(tokens, 2), normal(tokens, 2));
        let gradient = &plain * &g.dot(&v.t());
        let s2 = singular_values(gradient.view()).unwrap().to_vec();
        let weighted = Sample::of_score_gradient(&levels, tokens as f64, 2).unwrap();
        for eps in [0.5, 0.3, 0.1, 0.05] {
            for (name, sample, s) in [("P", &sample, &s), ("dS", &weighted, &s2)] {
                let (ours, drawn) = (sample.rank(eps).unwrap(), interpolated_rank(s, eps));
                assert!((ours / drawn - 1.0).abs() < 0.07, "{name}, eps = {eps}: {ours} {drawn}");
            }
            // And far from the count of products, which needs no sample.
            let count = levels.ln_rank(eps).unwrap().exp();
            assert!(sample.rank(eps).unwrap() < count);
        }
    }

    #[test]
    fn many_tokens_see_every_product() {
        let levels = Levels::new(&energies(&Law::Uniform, 0.6).unwrap(), 6, 0.1).unwrap();
        let count = levels.ln_rank(0.1).unwrap().exp();
        let ranks = [1e3, 1e5, 1e7]
            .map(|l| Sample::of_probabilities(&levels, l).unwrap().rank(0.1).unwrap());
        assert!(
            ranks[0] < ranks[1] && ranks[1] < ranks[2] && (ranks[2] / count - 1.0).abs() < 0.01,
            "{ranks:?} {count}"
        );
        let copies = Sample::of_score_gradient(&levels, 1e7, 3).unwrap().rank(0.1).unwrap();
        assert!((copies / count / 3.0 - 1.0).abs() < 0.01, "{copies} {count}");
        for bad in [0.0, 1.0] {
            assert!(matches!(
                Sample::of_probabilities(&levels, 10.0).unwrap().rank(bad),
                Err(Error::InvalidParam { .. })
            ));
        }
        assert!(matches!(
            Sample::of_score_gradient(&levels, 10.0, 0),
            Err(Error::InvalidParam { .. })
        ));
        assert!(matches!(Sample::of_probabilities(&levels, 0.0), Err(Error::InvalidParam { .. })));
    }
}
