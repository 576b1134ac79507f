//! Norms of a head against the threshold sqrt(ln L) of \[CL-LoRA\].

use crate::attention::problem::{AttentionProblem, Mask};
use crate::attention::synthetic::largest_logit;
use crate::attention::{Qkv, problem::Projected};
use crate::cost::Cost;
use crate::linalg::{Real, norms};
use ndarray::ArrayView2;

/// Norms of one head with the threshold they are compared to.
///
/// Stated for any beta through the effective Gamma = sqrt(beta d_h max|Q| max|K|): for beta = 1/d_h
/// it is the geometric mean of the largest entries, and |logit| <= Gamma^2 always.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    /// L: the longer of the two sequences.
    pub tokens: usize,
    /// d_h.
    pub head_dim: usize,
    /// beta.
    pub beta: f64,
    /// Largest |entry| of Q, K and V.
    pub max_abs: Qkv<f64>,
    /// Gamma.
    pub gamma: f64,
    /// sqrt(ln L); 0 for L = 1.
    pub sqrt_log_tokens: f64,
    /// c = Gamma / sqrt(ln L); infinite for L = 1.
    pub ratio: f64,
    /// Largest visible |logit|, usually far below Gamma^2.
    pub largest_logit: f64,
    /// beta max|q_i| max|k_j|, the bound by row norms: between the largest logit and Gamma^2.
    pub norm_bound: f64,
}

impl Threshold {
    /// Measures a head. O(L^2 d_h) operations for the largest logit, counted in `cost`.
    pub fn measure<T: Real>(
        problem: &AttentionProblem<T>,
        projected: &Projected<T>,
        cost: &mut Cost,
    ) -> Self {
        let Qkv { query, key, value } = &projected.qkv;
        let tokens = query.nrows().max(key.nrows());
        let head_dim = query.ncols();
        let max_abs = Qkv {
            query: norms::max_abs(&query.view()),
            key: norms::max_abs(&key.view()),
            value: norms::max_abs(&value.view()),
        };
        let gamma = effective_gamma(problem.beta(), query.view(), key.view());
        let sqrt_log_tokens = (tokens as f64).ln().sqrt();
        Self {
            tokens,
            head_dim,
            beta: problem.beta(),
            max_abs,
            gamma,
            sqrt_log_tokens,
            ratio: gamma / sqrt_log_tokens,
            largest_logit: largest_logit(
                query.view(),
                key.view(),
                problem.beta(),
                problem.mask(),
                cost,
            ),
            norm_bound: problem.beta()
                * norms::max_row_norm(query.view())
                * norms::max_row_norm(key.view()),
        }
    }

    /// The largest |logit| relative to its bound Gamma^2.
    pub fn concentration(&self) -> f64 {
        self.largest_logit / (self.gamma * self.gamma)
    }
}

/// Gamma = sqrt(beta d_h max|Q| max|K|), in O(L d_h) operations.
pub fn effective_gamma<T: Real>(beta: f64, query: ArrayView2<T>, key: ArrayView2<T>) -> f64 {
    (beta * query.ncols() as f64 * norms::max_abs(&query) * norms::max_abs(&key)).sqrt()
}

/// Number of visible query-key pairs of `queries` and `keys` under a mask.
pub fn visible_pairs(queries: usize, keys: usize, mask: Mask) -> u64 {
    match mask {
        Mask::Full => queries as u64 * keys as u64,
        Mask::Causal => queries as u64 * (queries as u64 + 1) / 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::synthetic::{Entries, SyntheticHead};

    #[test]
    fn the_ratio_is_the_one_asked_for_and_bounds_are_ordered() {
        for (entries, c) in [(Entries::Uniform, 0.3), (Entries::Normal, 1.1), (Entries::Sign, 2.0)]
        {
            let head = SyntheticHead {
                entries,
                rank: 2,
                ..SyntheticHead::new(150, 6).at_threshold_ratio(c)
            };
            let problem: AttentionProblem<f64> = head.draw().unwrap();
            let projected = problem.project(&mut Cost::default());
            let t = Threshold::measure(&problem, &projected, &mut Cost::default());
            assert!((t.ratio - c).abs() < 1e-12);
            assert!(
                t.largest_logit <= t.norm_bound * (1.0 + 1e-12)
                    && t.norm_bound <= t.gamma * t.gamma * (1.0 + 1e-12)
            );
            assert!(t.concentration() <= 1.0 + 1e-12);
        }
    }

    /// Gamma does not depend on how beta and the weights share the scale of the logits.
    #[test]
    fn beta_is_absorbed() {
        let head = SyntheticHead { rank: 2, ..SyntheticHead::new(40, 4) };
        let measure = |head: SyntheticHead| {
            let problem: AttentionProblem<f64> = head.draw().unwrap();
            Threshold::measure(
                &problem,
                &problem.project(&mut Cost::default()),
                &mut Cost::default(),
            )
        };
        let one = measure(head);
        let other =
            measure(SyntheticHead { beta: head.beta / 9.0, gamma: head.gamma * 3.0, ..head });
        assert!((one.gamma - other.gamma).abs() < 1e-12);
        assert!((one.largest_logit - other.largest_logit).abs() < 1e-12);
    }
}
