//! Heads of the solvable model (paper-notes/phase-diagram.md), drawn and measured: what
//! `phase_diagram` and `solvable_model` share.

use ndarray::{Array2, Axis, parallel::prelude::*};
use peft_limits::cost::Cost;
use peft_limits::limits::phase_diagram::{Law, Model};
use peft_limits::limits::rank::interpolated_rank_of;
use peft_limits::linalg::decompositions::{orthonormal_columns, singular_values};
use peft_limits::linalg::gemm::{parallel_product, parallel_transposed_product};
use peft_limits::{Error, Result};
use rand::{Rng, RngExt};
use rand_distr::{Distribution, StandardNormal};

/// Names of the laws.
pub const LAWS: [&str; 3] = ["uniform", "sign", "skewed"];

/// Numbers of the sampled law: 2 x^2 - 1 at even quantiles, crowded at -1, mean -1/3.
fn skewed() -> Vec<f64> {
    (0..1000).map(|i| 2.0 * ((f64::from(i) + 0.5) / 1000.0).powi(2) - 1.0).collect()
}

/// The law of that name.
///
/// # Errors
/// [`Error::InvalidParam`] for an unknown name.
pub fn law(name: &str) -> Result<Law> {
    match name {
        "uniform" => Ok(Law::Uniform),
        "sign" => Ok(Law::Sign),
        "skewed" => Law::sampled(&skewed()),
        _ => Err(Error::invalid("law", name, format!("must be one of {LAWS:?}"))),
    }
}

/// A drawn head: coordinates of its queries and keys, and theta.
pub struct RandomHead {
    /// `L x d`, in [-1, 1].
    pub queries: Array2<f32>,
    /// `L x d`.
    pub keys: Array2<f32>,
    /// S = theta queries keys^T.
    pub theta: f64,
}

impl RandomHead {
    /// Draws a head of a model at c, with the width of [`Model::head_dim`].
    pub fn draw(model: &Model, name: &str, tokens: usize, c: f64, rng: &mut impl Rng) -> Self {
        let length = tokens as f64;
        Self::draw_wide(name, tokens, model.head_dim(length), model.finite_theta(c, length), rng)
    }

    /// Draws a head of a given width and theta.
    pub fn draw_wide(name: &str, tokens: usize, d: usize, theta: f64, rng: &mut impl Rng) -> Self {
        let values = skewed();
        let mut one = || match name {
            "sign" => {
                if rng.random::<bool>() {
                    1.0
                } else {
                    -1.0
                }
            }
            "uniform" => rng.random_range(-1.0..1.0f64) as f32,
            _ => values[rng.random_range(0..values.len())] as f32,
        };
        let queries = Array2::from_shape_simple_fn((tokens, d), &mut one);
        let keys = Array2::from_shape_simple_fn((tokens, d), &mut one);
        Self { queries, keys, theta }
    }

    /// P, with the mean over rows of the entropies (nats) of the row and of its squares.
    pub fn probabilities(&self) -> (Array2<f32>, f64, f64) {
        let scaled = &self.queries * self.theta as f32;
        let mut p = parallel_product(scaled.view(), self.keys.t(), &mut Cost::default());
        let sums: Vec<(f64, f64)> = p
            .axis_iter_mut(Axis(0))
            .into_par_iter()
            .map(|mut row| {
                let largest = row.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                // Sums of weights and of weight times logit, for tilt 1 and 2.
                let mut sums = [0.0f64; 4];
                row.mapv_inplace(|s| {
                    let s = s - largest;
                    let e = s.exp();
                    let (s, e) = (f64::from(s), f64::from(e));
                    sums[0] += e;
                    sums[1] += e * s;
                    sums[2] += e * e;
                    sums[3] += e * e * 2.0 * s;
                    e as f32
                });
                row.mapv_inplace(|e| e / sums[0] as f32);
                (sums[0].ln() - sums[1] / sums[0], sums[2].ln() - sums[3] / sums[2])
            })
            .collect();
        let mean = |f: fn(&(f64, f64)) -> f64| sums.iter().map(f).sum::<f64>() / sums.len() as f64;
        let (plain, squared) = (mean(|s| s.0), mean(|s| s.1));
        (p, plain, squared)
    }
}

/// dS = P o (G V^T - delta) with normal G and V of `value_dim` columns.
pub fn score_gradient(p: &Array2<f32>, value_dim: usize, rng: &mut impl Rng) -> Array2<f32> {
    let mut normal = || {
        Array2::<f32>::from_shape_simple_fn((p.nrows(), value_dim), || {
            StandardNormal.sample(&mut *rng)
        })
    };
    let (upstream, value) = (normal(), normal());
    let mut ds = parallel_product(upstream.view(), value.t(), &mut Cost::default());
    ds.axis_iter_mut(Axis(0)).into_par_iter().zip(p.axis_iter(Axis(0))).for_each(|(mut row, p)| {
        let delta: f32 = row.iter().zip(&p).map(|(h, p)| h * p).sum();
        row.zip_mut_with(&p, |h, p| *h = (*h - delta) * p);
    });
    ds
}

/// Leading singular values with the energy of all.
pub struct Leading {
    values: Vec<f64>,
    total_energy: f64,
}

impl Leading {
    /// At least `count` of them, by subspace iteration from a seeded start where that is cheaper
    /// than all.
    ///
    /// # Errors
    /// Those of the decompositions.
    pub fn of(a: &Array2<f32>, count: usize, rng: &mut impl Rng) -> Result<Self> {
        const ITERATIONS: usize = 2;
        let total_energy =
            a.axis_iter(Axis(0)).map(|row| row.iter().map(|x| f64::from(x * x)).sum::<f64>()).sum();
        let width = count + count / 4 + 8;
        if width * 6 > a.nrows() {
            return Ok(Self {
                values: singular_values(a.mapv(f64::from).view())?.to_vec(),
                total_energy,
            });
        }
        let cost = &mut Cost::default();
        let mut basis =
            Array2::<f32>::from_shape_simple_fn((a.ncols(), width), || StandardNormal.sample(rng));
        for _ in 0..ITERATIONS {
            let left = orthonormal(&parallel_product(a.view(), basis.view(), cost))?;
            basis = orthonormal(&parallel_transposed_product(a.view(), left.view(), cost))?;
        }
        let image = parallel_product(a.view(), basis.view(), cost).mapv(f64::from);
        let gram = parallel_transposed_product(image.view(), image.view(), cost);
        let values = singular_values(gram.view())?.iter().map(|s| s.sqrt()).take(count).collect();
        Ok(Self { values, total_energy })
    }

    /// eps-rank with the last value in part; `None` if more values are needed.
    pub fn rank(&self, eps: f64) -> Option<f64> {
        interpolated_rank_of(&self.values, eps, self.total_energy)
    }
}

fn orthonormal(a: &Array2<f32>) -> Result<Array2<f32>> {
    Ok(orthonormal_columns(a.mapv(f64::from).view())?.mapv(|x| x as f32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_limits::limits::rank::interpolated_rank;
    use peft_limits::streams::seed_stream;

    #[test]
    fn entropies_and_ranks_are_those_of_the_dense_head() {
        let model = Model::new(Law::Uniform, 1.0).unwrap();
        let mut rng = seed_stream(1, "test");
        let head = RandomHead::draw(&model, "uniform", 300, 0.6, &mut rng);
        let (p, entropy, squared) = head.probabilities();
        let by_hand = |power: i32| {
            let rows = p.axis_iter(Axis(0)).map(|row| {
                let weights: Vec<f64> = row.iter().map(|x| f64::from(*x).powi(power)).collect();
                let total: f64 = weights.iter().sum();
                -weights.iter().map(|w| w / total * (w / total).ln()).sum::<f64>()
            });
            rows.sum::<f64>() / 300.0
        };
        assert!((entropy - by_hand(1)).abs() < 1e-4 && (squared - by_hand(2)).abs() < 1e-4);
        assert!(p.axis_iter(Axis(0)).all(|row| (row.sum() - 1.0).abs() < 1e-5));
        // Few of them by iteration, against all of them.
        let all = singular_values(p.mapv(f64::from).view()).unwrap().to_vec();
        let few = Leading::of(&p, 20, &mut rng).unwrap();
        assert_eq!(few.values.len(), 20);
        for eps in [0.3, 0.1] {
            assert!((few.rank(eps).unwrap() / interpolated_rank(&all, eps) - 1.0).abs() < 1e-3);
        }
        assert_eq!(few.rank(1e-6), None);
        let ds = score_gradient(&p, 2, &mut rng);
        assert!(ds.axis_iter(Axis(0)).all(|row| row.sum().abs() < 1e-5));
    }
}
