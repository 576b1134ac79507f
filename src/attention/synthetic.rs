//! Seeded synthetic heads whose queries and keys have a prescribed largest entry.

use super::problem::{
    Adapter, AttentionProblem, Hidden, Mask, Objective, Projection, Qkv, SoftmaxKind, Source,
};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::{Real, norms};
use ndarray::{Array2, ArrayView2};
use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal, Uniform};

/// How the entries of the hidden states are drawn; queries and keys inherit it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entries {
    /// Uniform on [-1, 1]: fills the box that the theorems bound.
    Uniform,
    /// Standard normal: the largest entry is far from the typical one, as in trained models.
    Normal,
    /// -1 or 1: every entry is as large as the bound allows.
    Sign,
}

/// Parameters of a synthetic self-attention head.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `tokens` | none | L | >= 1 |
/// | `head_dim` | none | d_in = d_h = d_v | >= 1 |
/// | `rank` | 4 | r of the adapters of Q, K and V | 1 to `head_dim` |
/// | `alpha` | 2 r | scaling alpha / r | finite |
/// | `gamma` | 1 | max abs entry of Q and of K, exactly | > 0 |
/// | `beta` | 1 / `head_dim` | factor of Q K^T | > 0 |
/// | `entries` | `Uniform` | distribution | |
/// | `mask`, `softmax` | `Full`, `Standard` | | |
/// | `seed` | 0 | everything random | |
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SyntheticHead {
    /// L.
    pub tokens: usize,
    /// d_in = d_h = d_v.
    pub head_dim: usize,
    /// r.
    pub rank: usize,
    /// alpha.
    pub alpha: f64,
    /// max |Q_ij| = max |K_ij|.
    pub gamma: f64,
    /// Factor of Q K^T.
    pub beta: f64,
    /// Distribution of the hidden states.
    pub entries: Entries,
    /// Mask.
    pub mask: Mask,
    /// Softmax kind.
    pub softmax: SoftmaxKind,
    /// Seed.
    pub seed: u64,
}

impl SyntheticHead {
    /// A head with the defaults of the table.
    pub fn new(tokens: usize, head_dim: usize) -> Self {
        let rank = 4.min(head_dim);
        Self {
            tokens,
            head_dim,
            rank,
            alpha: 2.0 * rank as f64,
            gamma: 1.0,
            beta: 1.0 / head_dim as f64,
            entries: Entries::Uniform,
            mask: Mask::Full,
            softmax: SoftmaxKind::Standard,
            seed: 0,
        }
    }

    /// Sets Gamma to c sqrt(ln L), the scale of \[CL-LoRA\]'s threshold.
    pub fn at_threshold_ratio(mut self, c: f64) -> Self {
        self.gamma = c * (self.tokens.max(2) as f64).ln().sqrt();
        self
    }

    /// Draws the head.
    ///
    /// Hidden states X have independent entries. W_Q, W_K, W_V are random signed permutations (so
    /// that Q, K and V keep the distribution of X) with LoRA updates of about a tenth of their
    /// size; W_Q, W_K and their A are then scaled so that the largest entries of Q and of K equal
    /// `gamma`. Y is normal.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a gamma that is not positive and finite; those of
    /// [`AttentionProblem::new`].
    pub fn draw<T: Real>(&self) -> Result<AttentionProblem<T>> {
        if !(self.gamma > 0.0 && self.gamma.is_finite()) {
            return Err(Error::invalid("gamma", self.gamma, "must be positive and finite"));
        }
        if self.rank == 0 || self.rank > self.head_dim {
            return Err(Error::invalid(
                "rank",
                self.rank,
                format!("must be between 1 and head_dim = {}", self.head_dim),
            ));
        }
        let (l, d, r) = (self.tokens, self.head_dim, self.rank);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let uniform = Uniform::new_inclusive(-1.0, 1.0)
            .map_err(|e| Error::invalid("entries", "Uniform", e.to_string()))?;
        let x = match self.entries {
            Entries::Uniform => Array2::from_shape_simple_fn((l, d), || uniform.sample(&mut rng)),
            Entries::Normal => normal(&mut rng, l, d, 1.0),
            Entries::Sign => {
                Array2::from_shape_simple_fn(
                    (l, d),
                    || if rng.random::<bool>() { 1.0 } else { -1.0 },
                )
            }
        }
        .into_shared();
        let scaling = self.alpha / r as f64;
        let mut projection = || {
            let mut order: Vec<usize> = (0..d).collect();
            order.shuffle(&mut rng);
            let mut weight = Array2::zeros((d, d));
            for (i, &j) in order.iter().enumerate() {
                weight[[i, j]] = if rng.random::<bool>() { 1.0 } else { -1.0 };
            }
            // Entries of (alpha/r) B A have standard deviation 0.1 / sqrt(d): a tenth of a row of
            // W.
            let lora_b = normal(&mut rng, d, r, 1.0 / (r as f64).sqrt());
            let lora_a = normal(
                &mut rng,
                r,
                d,
                0.1 / (d as f64).sqrt() / scaling.abs().max(f64::MIN_POSITIVE),
            );
            Projection { weight, adapter: Some(Adapter { lora_a, lora_b }) }
        };
        let mut projections = Qkv { query: projection(), key: projection(), value: projection() };
        let target = normal(&mut rng, l, d, 1.0);
        for p in [&mut projections.query, &mut projections.key] {
            if let Some(adapter) = &mut p.adapter {
                let weight = &p.weight + &(adapter.lora_b.dot(&adapter.lora_a) * scaling);
                let factor =
                    self.gamma / norms::max_abs(&x.dot(&weight).view()).max(f64::MIN_POSITIVE);
                p.weight *= factor;
                adapter.lora_a *= factor;
            }
        }
        let source = Source::Hidden(Box::new(Hidden {
            inputs: Qkv { query: x.clone(), key: x.clone(), value: x },
            projections,
            scaling,
        }));
        let problem = AttentionProblem::new(
            source,
            Objective::Target(target),
            self.mask,
            self.softmax,
            self.beta,
        )?;
        Ok(problem.cast())
    }
}

fn normal(rng: &mut ChaCha8Rng, rows: usize, columns: usize, deviation: f64) -> Array2<f64> {
    Array2::from_shape_simple_fn((rows, columns), || {
        let x: f64 = StandardNormal.sample(rng);
        x * deviation
    })
}

/// Largest |logit| = beta |q_i . k_j| over visible pairs, by tiles. O(L_q L_k d) operations,
/// counted.
pub fn largest_logit<T: Real>(
    query: ArrayView2<T>,
    key: ArrayView2<T>,
    beta: f64,
    mask: Mask,
    cost: &mut Cost,
) -> f64 {
    use ndarray::{Axis, parallel::prelude::*, s};
    const ROWS: usize = 128;
    const COLUMNS: usize = 512;
    let (parts, costs): (Vec<f64>, Vec<Cost>) = query
        .axis_chunks_iter(Axis(0), ROWS)
        .into_par_iter()
        .enumerate()
        .map_init(
            || Array2::<T>::zeros((ROWS, COLUMNS)),
            |buffer, (index, q)| {
                let mut cost = Cost::default();
                let first = index * ROWS;
                let visible = if mask == Mask::Causal { first + q.nrows() } else { key.nrows() };
                let mut largest = 0.0f64;
                for start in (0..visible).step_by(COLUMNS) {
                    let end = (start + COLUMNS).min(visible);
                    let mut tile = buffer.slice_mut(s![..q.nrows(), ..end - start]);
                    crate::linalg::product_into(
                        q,
                        key.slice(s![start..end, ..]).t(),
                        T::zero(),
                        &mut tile,
                        &mut cost,
                    );
                    for (i, row) in tile.rows().into_iter().enumerate() {
                        let seen = if mask == Mask::Causal {
                            (first + i + 1).saturating_sub(start).min(row.len())
                        } else {
                            row.len()
                        };
                        largest = largest.max(norms::max_abs(&row.slice(s![..seen])));
                    }
                }
                (largest, cost)
            },
        )
        .unzip();
    costs.iter().for_each(|c| cost.add_operations(c));
    beta * parts.into_iter().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_entries_are_as_asked_and_the_seed_decides() {
        for entries in [Entries::Uniform, Entries::Normal, Entries::Sign] {
            let head =
                SyntheticHead { entries, ..SyntheticHead::new(37, 5).at_threshold_ratio(0.7) };
            let problem: AttentionProblem<f64> = head.draw().unwrap();
            let projected = problem.project(&mut Cost::default());
            let want = 0.7 * 37f64.ln().sqrt();
            for a in [&projected.qkv.query, &projected.qkv.key] {
                assert!((norms::max_abs(&a.view()) - want).abs() < 1e-12);
            }
            let again: AttentionProblem<f64> = head.draw().unwrap();
            assert_eq!(again.project(&mut Cost::default()).qkv, projected.qkv);
            let other: AttentionProblem<f64> = SyntheticHead { seed: 1, ..head }.draw().unwrap();
            assert_ne!(other.project(&mut Cost::default()).qkv, projected.qkv);
        }
    }

    #[test]
    fn the_largest_logit_agrees_with_the_dense_scores() {
        for (mask, tokens) in [(Mask::Full, 150), (Mask::Causal, 150), (Mask::Causal, 700)] {
            let problem: AttentionProblem<f64> =
                SyntheticHead { mask, ..SyntheticHead::new(tokens, 3) }.draw().unwrap();
            let qkv = problem.project(&mut Cost::default()).qkv;
            let got = largest_logit(
                qkv.query.view(),
                qkv.key.view(),
                problem.beta(),
                mask,
                &mut Cost::default(),
            );
            let scores = crate::attention::exact::dense::matrices(&problem, &qkv).S;
            let want = scores.iter().filter(|s| s.is_finite()).fold(0.0f64, |m, s| m.max(s.abs()));
            assert!((got - want).abs() < 1e-12);
        }
    }

    #[test]
    fn bad_parameters_are_refused() {
        let head = SyntheticHead::new(10, 4);
        for bad in [
            SyntheticHead { gamma: f64::NAN, ..head },
            SyntheticHead { gamma: 0.0, ..head },
            SyntheticHead { rank: 5, ..head },
            SyntheticHead { tokens: 0, ..head },
        ] {
            assert!(matches!(bad.draw::<f64>(), Err(Error::InvalidParam { .. })), "{bad:?}");
        }
    }
}
