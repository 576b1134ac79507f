//! `positive-features:rank=k[,seed=S][,directions=orthogonal|iid][,center=both|keys|none]`: FAVOR+
//! \[Performer\].
//!
//! For w standard normal, E exp(w.x - |x|^2/2) exp(w.y - |y|^2/2) = exp(x.y). With x = sqrt(beta) t
//! q and y = sqrt(beta) k / t the mean of k such products is an unbiased, positive estimate of
//! exp(beta q.k) for any t; the variance, (exp(|x|^2 + |y|^2 + 4 x.y) - exp(2 x.y)) / k for
//! independent directions, is least where |x| and |y| are alike, so t balances their root mean
//! squares. The published estimator is t = 1 without centering.

use super::centering::{Center, Centered};
use super::exponential::Exponents;
use super::{Certificate, FeatureMap, MAX_RANK, Scores, SoftmaxFactorization};
use crate::attention::shards::{RowShards, WholeHead};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::decompositions::orthonormal_columns;
use crate::linalg::{Real, real::cast};
use crate::streams::seed_stream;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};
use rand_distr::{Distribution, StandardNormal};
use std::fmt;

/// How the directions of one block of d_h features are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Directions {
    /// Orthogonal to each other, with the lengths of independent normal vectors: each is still
    /// standard normal, and the variance of the estimate is smaller.
    #[default]
    Orthogonal,
    /// Independent.
    Iid,
}

impl fmt::Display for Directions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Directions::Orthogonal { "orthogonal" } else { "iid" })
    }
}

/// Positive random features.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `rank` | none | k | >= 1 |
/// | `seed` | 0 | of the directions | |
/// | `directions` | orthogonal | | |
/// | `center` | both | which means are taken out | |
///
/// No bound on the error: the certificate has none.
#[derive(Debug, Clone, PartialEq)]
pub struct PositiveFeatures {
    /// k.
    pub rank: usize,
    /// Seed of the directions.
    pub seed: u64,
    /// How directions are drawn.
    pub directions: Directions,
    /// Which means are taken out first.
    pub center: Center,
}

impl PositiveFeatures {
    /// w_1, ..., w_k as rows, each standard normal in d dimensions.
    ///
    /// # Errors
    /// Those of the QR decomposition.
    pub fn draw_directions(&self, dimension: usize) -> Result<Array2<f64>> {
        let mut rng = seed_stream(self.seed, "positive-features");
        let mut normal = |rows| {
            Array2::from_shape_simple_fn((rows, dimension), || StandardNormal.sample(&mut rng))
        };
        if self.directions == Directions::Iid {
            return Ok(normal(self.rank));
        }
        let mut all: Array2<f64> = Array2::zeros((self.rank, dimension));
        for start in (0..self.rank).step_by(dimension) {
            let rows = dimension.min(self.rank - start);
            let (square, lengths): (Array2<f64>, Array2<f64>) = (normal(dimension), normal(rows));
            let directions = orthonormal_columns(square.view())?;
            for i in 0..rows {
                let length = lengths.row(i).dot(&lengths.row(i)).sqrt();
                all.row_mut(start + i).assign(&(&directions.column(i) * length));
            }
        }
        Ok(all)
    }
}

impl<T: Real> SoftmaxFactorization<T> for PositiveFeatures {
    fn spec(&self) -> String {
        let directions = match self.directions {
            Directions::Orthogonal => String::new(),
            Directions::Iid => ",directions=iid".into(),
        };
        let center = super::spec::center_suffix(self.center);
        format!("positive-features:rank={},seed={}{directions}{center}", self.rank, self.seed)
    }

    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        self.prepare_shard(scores, &WholeHead, cost)
    }

    fn prepare_shard(
        &self,
        scores: &Scores<T>,
        shards: &dyn RowShards<T>,
        cost: &mut Cost,
    ) -> Result<Box<dyn FeatureMap<T>>> {
        if self.rank == 0 || self.rank > MAX_RANK {
            return Err(Error::invalid(
                "rank",
                self.rank,
                format!("must be between 1 and {MAX_RANK}"),
            ));
        }
        let centered = Centered::of_shard(scores, self.center, shards, cost)?;
        let directions = self.draw_directions(scores.query.ncols())?;
        let (of_query, of_key) = balance(&centered, scores.beta, shards)?;
        let side = |scale: f64, mean: &Array1<T>| Exponents {
            weights: cast((&directions * scale).view()),
            offset: Array1::zeros(self.rank),
            mean: mean.clone(),
        };
        let query = side(of_query, &centered.query_mean);
        let key = side(of_key, &centered.key_mean);
        // Exponents are w.x - |x|^2/2. The largest of each query row, and the largest of all keys,
        // go to the shift.
        let half_squares = |rows: &Array2<T>, scale: f64| -> Vec<T> {
            let half = T::of(0.5 * scale * scale);
            rows.rows().into_iter().map(|row| half * row.dot(&row)).collect()
        };
        cost.multiply_adds += (scores.query.len() + scores.key.len()) as u64;
        let query_shift = query.largest(scores.query, cost);
        let query_half = half_squares(&centered.query, of_query);
        let mut key_half = half_squares(&centered.key, of_key);
        if let Some(factors) = &centered.column_factor {
            key_half.iter_mut().zip(factors).for_each(|(h, f)| *h -= f.ln());
        }
        let key_largest = key.largest(scores.key, cost);
        let largest =
            key_largest.iter().zip(&key_half).fold(T::neg_infinity(), |m, (&x, &h)| m.max(x - h));
        let largest = T::of(shards.largest(largest.widen())?);
        let key_shift: Vec<T> = key_half.into_iter().map(|h| h + largest).collect();
        // Phi Psi^T is the sum, not the mean, of the products: hence ln k.
        let constant = largest - T::of(self.rank as f64).ln();
        let row_shift: Vec<T> = (0..query_shift.len())
            .map(|i| {
                let of_row = centered.row_shift.as_ref().map_or(T::zero(), |s| s[i]);
                of_row + query_shift[i] - query_half[i] + constant
            })
            .collect();
        cost.hold(2 * row_shift.len() + key_shift.len());
        let certificate = Certificate {
            spec: SoftmaxFactorization::<T>::spec(self),
            rank: self.rank,
            ..Certificate::default()
        };
        Ok(Box::new(PositiveMap { query, key, query_shift, key_shift, row_shift, certificate }))
    }
}

/// Factors of q and k: sqrt(beta) t and sqrt(beta) / t with t^2 the ratio of root mean squares,
/// keys over queries.
///
/// # Errors
/// Those of the shards.
pub(super) fn balance<T: Real>(
    centered: &Centered<T>,
    beta: f64,
    shards: &dyn RowShards<T>,
) -> Result<(f64, f64)> {
    let square = |a: &Array2<T>| a.iter().map(|x| x.widen() * x.widen()).sum::<f64>();
    let rows = |a: &Array2<T>| a.nrows() as f64;
    let mut sums = [
        square(&centered.query),
        rows(&centered.query),
        square(&centered.key),
        rows(&centered.key),
    ];
    shards.sum_wide(&mut sums)?;
    let (q, k) = (sums[0] / sums[1].max(1.0), sums[2] / sums[3].max(1.0));
    let t = if q > 0.0 && k > 0.0 { (k / q).powf(0.25) } else { 1.0 };
    Ok((beta.sqrt() * t, beta.sqrt() / t))
}

struct PositiveMap<T> {
    query: Exponents<T>,
    key: Exponents<T>,
    query_shift: Vec<T>,
    key_shift: Vec<T>,
    row_shift: Vec<T>,
    certificate: Certificate,
}

impl<T: Real> FeatureMap<T> for PositiveMap<T> {
    fn rank(&self) -> usize {
        self.certificate.rank
    }

    fn query_features(&self, first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.query.features(rows, &self.query_shift[first_row..first_row + rows.nrows()], out);
    }

    fn key_features(&self, first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.key.features(rows, &self.key_shift[first_row..first_row + rows.nrows()], out);
    }

    fn count_query_features(&self, rows: usize, cost: &mut Cost) {
        self.query.count_features(rows, cost);
    }

    fn count_key_features(&self, rows: usize, cost: &mut Cost) {
        self.key.count_features(rows, cost);
    }

    fn row_shift(&self) -> Option<&[T]> {
        Some(&self.row_shift)
    }

    fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}
