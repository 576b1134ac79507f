//! `nystrom:rank=k[,seed=S][,temperature=T][,tolerance=E][,center=both|keys|none]`: a coreset of
//! keys \[WildCat\].
//!
//! With x = sqrt(beta) t q and y = sqrt(beta) k / t, exp(beta q.k) = exp(x.y) is an inner product
//! of the kernel exp(y.y') on keys. Projecting every key on the span of k chosen ones S gives the
//! approximation
//!
//! ```text
//! exp(x_i.y_j) ~= exp(x_i.y_S) M_SS^-1 M_Sj,   M_jl = exp(y_j.y_l)
//! ```
//!
//! whose weights M_SS^-1 M_Sj are optimal for S, and S comes from randomly pivoted Cholesky. t^2 =
//! temperature: a hotter kernel spreads over fewer directions on the key side at the price of
//! longer queries.

use super::centering::{Center, Centered};
use super::exponential::Exponents;
use super::positive_features::balance;
use super::{Certificate, FeatureMap, MAX_RANK, Scores, SoftmaxFactorization};
use crate::attention::shards::WholeHead;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::elementwise::exp_rows;
use crate::linalg::gemm::parallel_product_into;
use crate::linalg::pivoted_cholesky::{PivotedCholesky, randomly_pivoted_cholesky};
use crate::linalg::{Real, product_into, real::cast};
use crate::streams::seed_stream;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};

/// Nystrom approximation on a random coreset of keys.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `rank` | none | keys to choose, k; fewer are if fewer suffice | 1 to L_k |
/// | `seed` | 0 | of the choice | |
/// | `temperature` | balanced | t^2; balanced: ratio of root mean squares, keys over queries | > 0 |
/// | `tolerance` | 64 eps, at least eps of the precision | residual, relative to its start, of a key that counts as represented | 0 to 1 |
/// | `center` | both | which means are taken out | |
///
/// With k the number of distinct keys the approximation is exact up to rounding and `tolerance`.
/// The bound of the certificate follows from the residuals r_j of the factorization:
/// |error_ij|^2 <= exp(|x_i|^2) r_j (Cauchy-Schwarz in the space of the kernel).
#[derive(Debug, Clone, PartialEq)]
pub struct Nystrom {
    /// Keys to choose.
    pub rank: usize,
    /// Seed of the choice.
    pub seed: u64,
    /// t^2, if given.
    pub temperature: Option<f64>,
    /// Relative residual below which a key is left alone, if given.
    pub tolerance: Option<f64>,
    /// Which means are taken out first.
    pub center: Center,
}

impl<T: Real> SoftmaxFactorization<T> for Nystrom {
    fn spec(&self) -> String {
        let optional =
            |name: &str, x: Option<f64>| x.map_or_else(String::new, |x| format!(",{name}={x}"));
        format!(
            "nystrom:rank={},seed={}{}{}{}",
            self.rank,
            self.seed,
            optional("temperature", self.temperature),
            optional("tolerance", self.tolerance),
            super::spec::center_suffix(self.center)
        )
    }

    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        let keys = scores.key.nrows();
        let most = keys.min(MAX_RANK);
        if self.rank == 0 || self.rank > most {
            return Err(Error::invalid(
                "rank",
                self.rank,
                format!("must be between 1 and {most}, the number of keys"),
            ));
        }
        if let Some(t) = self.temperature
            && !(t > 0.0 && t.is_finite())
        {
            return Err(Error::invalid("temperature", t, "must be positive and finite"));
        }
        let default = T::epsilon().widen().max(64.0 * f64::EPSILON);
        let tolerance = self.tolerance.unwrap_or(default);
        if !(0.0..1.0).contains(&tolerance) {
            return Err(Error::invalid("tolerance", tolerance, "must be at least 0 and below 1"));
        }
        let centered = Centered::new(scores, self.center, cost)?;
        let (of_query, of_key) = match self.temperature {
            Some(t) => ((scores.beta * t).sqrt(), (scores.beta / t).sqrt()),
            None => balance(&centered, scores.beta, &WholeHead)?,
        };
        let kernel = KeyKernel::new(&centered, of_key);
        let mut rng = seed_stream(self.seed, "nystrom");
        let diagonal = kernel.diagonal();
        let chosen = randomly_pivoted_cholesky(
            &diagonal,
            |rows| kernel.rows(rows),
            self.rank,
            tolerance,
            &mut rng,
            cost,
        );
        cost.exponentials += (chosen.pivots.len() * keys) as u64;
        cost.product(chosen.pivots.len(), scores.key.ncols(), keys);
        let exponents = Exponents {
            weights: cast((&kernel.points.select(Axis(0), &chosen.pivots) * of_query).view()),
            offset: chosen.pivots.iter().map(|&p| T::of(kernel.log_factor[p])).collect(),
            mean: centered.query_mean.clone(),
        };
        let query_shift = exponents.largest(scores.query, cost);
        let of_centering = |i: usize| centered.row_shift.as_ref().map_or(T::zero(), |s| s[i]);
        let row_shift = query_shift.iter().enumerate().map(|(i, &x)| x + of_centering(i)).collect();
        let factor = &chosen.transposed_factor;
        let rank = chosen.pivots.len();
        let inverse = inverse_of_lower(factor.select(Axis(1), &chosen.pivots).t());
        cost.multiply_adds += (rank as u64).pow(3) / 6;
        cost.hold(rank * (rank + keys) + 2 * scores.query.nrows());
        let certificate = Certificate {
            spec: SoftmaxFactorization::<T>::spec(self),
            rank,
            exp_error_bound: Some(error_bound(
                &centered,
                of_query,
                &query_shift,
                kernel.scale,
                &chosen,
            )),
            ..Certificate::default()
        };
        Ok(Box::new(NystromMap {
            exponents,
            query_shift,
            row_shift,
            inverse: cast(inverse.view()),
            key: cast(factor.view()),
            certificate,
        }))
    }
}

/// max_i exp(|x_i|^2 / 2 - shift_i) max_j sqrt(r_j) with r_j = exp(2 scale) times the residual of
/// the scaled kernel.
fn error_bound<T: Real>(
    centered: &Centered<T>,
    of_query: f64,
    shift: &[T],
    scale: f64,
    chosen: &PivotedCholesky,
) -> f64 {
    let exponent =
        centered.query.rows().into_iter().zip(shift).fold(f64::NEG_INFINITY, |m, (row, shift)| {
            m.max(0.5 * of_query * of_query * row.dot(&row).widen() - shift.widen())
        });
    let residual = chosen.residual.iter().fold(0.0f64, |m, &r| m.max(r));
    (exponent + scale).exp() * residual.sqrt()
}

/// The kernel exp(y_j.y_l) f_j f_l exp(-2 scale) on the keys, f the column factors and the scale
/// such that the largest entry is 1.
struct KeyKernel {
    /// y as rows.
    points: Array2<f64>,
    /// ln f.
    log_factor: Vec<f64>,
    half_squares: Vec<f64>,
    scale: f64,
}

impl KeyKernel {
    fn new<T: Real>(centered: &Centered<T>, of_key: f64) -> Self {
        let points = centered.key.mapv(|x| x.widen() * of_key);
        let log_factor: Vec<f64> = match &centered.column_factor {
            Some(factors) => factors.iter().map(|f| f.widen().ln()).collect(),
            None => vec![0.0; points.nrows()],
        };
        let half_squares: Vec<f64> =
            points.rows().into_iter().map(|row| 0.5 * row.dot(&row)).collect();
        let scale =
            log_factor.iter().zip(&half_squares).fold(f64::NEG_INFINITY, |m, (l, h)| m.max(l + h));
        Self { points, log_factor, half_squares, scale }
    }

    fn diagonal(&self) -> Vec<f64> {
        let exponent = |(l, h): (&f64, &f64)| (2.0 * (l + h - self.scale)).exp();
        self.log_factor.iter().zip(&self.half_squares).map(exponent).collect()
    }

    fn rows(&self, chosen: &[usize]) -> Array2<f64> {
        let keys = self.points.nrows();
        let column: Array1<f64> = self.log_factor.iter().map(|l| l - self.scale).collect();
        let mut tile = Array2::zeros((chosen.len(), keys));
        tile.rows_mut().into_iter().for_each(|mut row| row.assign(&column));
        let left = self.points.select(Axis(0), chosen);
        parallel_product_into(
            1.0,
            left.view(),
            self.points.t(),
            1.0,
            &mut tile.view_mut(),
            &mut Cost::default(), // counted by the caller, for the rows that are kept
        );
        let shift: Vec<f64> = chosen.iter().map(|&p| self.scale - self.log_factor[p]).collect();
        exp_rows(tile.view_mut(), &shift);
        tile
    }
}

/// Inverse of a lower triangular matrix with positive diagonal.
fn inverse_of_lower(lower: ArrayView2<f64>) -> Array2<f64> {
    let n = lower.nrows();
    let mut inverse = Array2::<f64>::zeros((n, n));
    for i in 0..n {
        let (before, mut rest) = inverse.view_mut().split_at(Axis(0), i);
        let mut row = rest.row_mut(0);
        // Row i of the inverse: (e_i - sum_{t < i} lower_it row_t) / lower_ii.
        row[i] = 1.0;
        for t in 0..i {
            let weight = lower[[i, t]];
            row.slice_mut(s![..=t]).scaled_add(-weight, &before.slice(s![t, ..=t]));
        }
        row /= lower[[i, i]];
    }
    inverse
}

struct NystromMap<T> {
    /// Exponents of the kernel between queries and chosen keys.
    exponents: Exponents<T>,
    query_shift: Vec<T>,
    row_shift: Vec<T>,
    /// F_S^-1.
    inverse: Array2<T>,
    /// F^T, `k x L_k`.
    key: Array2<T>,
    certificate: Certificate,
}

impl<T: Real> FeatureMap<T> for NystromMap<T> {
    fn rank(&self) -> usize {
        self.key.nrows()
    }

    fn query_features(&self, first_row: usize, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        let shift = &self.query_shift[first_row..first_row + rows.nrows()];
        let mut kernel = Array2::zeros(out.raw_dim());
        self.exponents.features(rows, shift, kernel.view_mut());
        product_into(self.inverse.view(), kernel.view(), T::zero(), &mut out, &mut Cost::default());
    }

    fn key_features(&self, first_row: usize, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        out.assign(&self.key.slice(s![.., first_row..first_row + rows.nrows()]));
    }

    fn count_query_features(&self, rows: usize, cost: &mut Cost) {
        self.exponents.count_features(rows, cost);
        cost.product(self.rank(), self.rank(), rows);
    }

    fn row_shift(&self) -> Option<&[T]> {
        Some(&self.row_shift)
    }

    fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inverse_is_the_inverse() {
        let lower = Array2::from_shape_fn((6, 6), |(i, j)| match i.cmp(&j) {
            std::cmp::Ordering::Less => 0.0,
            std::cmp::Ordering::Equal => 2.0 + i as f64,
            std::cmp::Ordering::Greater => ((i * 5 + j) % 7) as f64 - 3.0,
        });
        let gap = lower.dot(&inverse_of_lower(lower.view())) - Array2::<f64>::eye(6);
        assert!(gap.iter().all(|x| x.abs() < 1e-14));
    }
}
