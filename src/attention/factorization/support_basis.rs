//! `support-basis:degree=g,threshold=T[,center=both|keys|none]`: large logits one by one, the rest
//! by a polynomial \[SupportBasis\].
//!
//! exp(S) = p(S) + [exp(S) - p(S)], and on |S| <= T the Chebyshev polynomial p of degree g is
//! within its known error, so only pairs with |S| > T are kept of the bracket: a sparse matrix. T,
//! not the largest logit, decides the degree.

use super::centering::{Center, Centered};
use super::interval::Evidence;
use super::large_logits::{LargeLogits, large_logits};
use super::monomials::MonomialMap;
use super::polynomial::{Polynomial, chebyshev, chebyshev_error};
use super::{Certificate, FeatureMap, Scores, SoftmaxFactorization, SparseCorrection};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

/// A polynomial with the pairs outside its interval corrected.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `degree` | none | g; k = C(d + g, g) | >= 1 |
/// | `threshold` | none | T: pairs with a (centered) logit above it in magnitude are exact | > 0, exp(T) finite |
/// | `center` | both | which means are taken out | |
///
/// A threshold below every logit keeps every pair: the result is then exact up to rounding, at
/// quadratic memory, until the pairs exceed [`super::correction::MAX_PAIRS`], which is an error.
#[derive(Debug, Clone, PartialEq)]
pub struct SupportBasis {
    /// Degree g.
    pub degree: usize,
    /// T.
    pub threshold: f64,
    /// Which means are taken out first.
    pub center: Center,
}

impl<T: Real> SoftmaxFactorization<T> for SupportBasis {
    fn spec(&self) -> String {
        let center = super::spec::center_suffix(self.center);
        format!("support-basis:degree={},threshold={}{center}", self.degree, self.threshold)
    }

    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        if !(self.threshold > 0.0 && self.threshold.is_finite()) {
            return Err(Error::invalid("threshold", self.threshold, "must be positive and finite"));
        }
        let centered = Centered::new(scores, self.center, cost)?;
        let polynomial = chebyshev(self.degree, self.threshold)?;
        let large = large_logits(&centered.scores(scores), self.threshold, cost)?;
        let certificate = Certificate {
            spec: SoftmaxFactorization::<T>::spec(self),
            degree: Some(self.degree),
            interval: Some((self.threshold, Evidence::Scan)),
            exp_error_bound: Some(chebyshev_error(self.degree, self.threshold)),
            ..Certificate::default()
        };
        corrected(scores, centered, &polynomial, &large, certificate, cost)
    }
}

/// A polynomial of the centered logits with the given pairs (key, centered logit) of each query
/// made exact.
///
/// # Errors
/// [`Error::TooLarge`] for too many pairs or columns.
pub(super) fn corrected<T: Real>(
    scores: &Scores<T>,
    centered: Centered<T>,
    polynomial: &Polynomial,
    pairs: &LargeLogits<T>,
    certificate: Certificate,
    cost: &mut Cost,
) -> Result<Box<dyn FeatureMap<T>>> {
    let factor = |j: u32| centered.column_factor.as_ref().map_or(1.0, |f| f[j as usize].widen());
    // Rows are divided by their largest exponential, so that it does not overflow.
    let row_log: Vec<f64> = pairs
        .iter()
        .map(|row| row.iter().fold(0.0f64, |m, &(j, s)| m.max(s.widen() + factor(j).ln())))
        .collect();
    let corrections: Vec<Vec<(u32, T)>> = pairs
        .iter()
        .zip(&row_log)
        .map(|(row, log)| {
            let correction = |&(j, s): &(u32, T)| {
                let s = s.widen();
                let rest = polynomial.evaluate(s) * (-log).exp();
                (j, T::of(factor(j) * ((s - log).exp() - rest)))
            };
            row.iter().map(correction).collect()
        })
        .collect();
    let sparse = SparseCorrection::from_rows(&corrections, scores.key.nrows())?;
    cost.exponentials += sparse.len() as u64;
    cost.elementwise += (sparse.len() * (2 * polynomial.degree() + 4)) as u64;
    cost.hold(4 * sparse.len() + 2 * row_log.len());
    let row_shift: Vec<T> = row_log
        .iter()
        .enumerate()
        .map(|(i, &log)| centered.row_shift.as_ref().map_or(T::zero(), |s| s[i]) + T::of(log))
        .collect();
    let certificate = Certificate { corrected_pairs: sparse.len() as u64, ..certificate };
    let row_scale = row_log.iter().map(|log| T::of((-log).exp())).collect();
    let polynomial = MonomialMap::new(centered, scores.beta, polynomial, certificate)?;
    Ok(Box::new(SupportMap { polynomial, row_scale, row_shift, sparse }))
}

struct SupportMap<T> {
    polynomial: MonomialMap<T>,
    /// exp(-log) of each query row.
    row_scale: Vec<T>,
    row_shift: Vec<T>,
    sparse: SparseCorrection<T>,
}

impl<T: Real> FeatureMap<T> for SupportMap<T> {
    fn rank(&self) -> usize {
        self.polynomial.rank()
    }

    fn query_features(&self, first_row: usize, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        self.polynomial.query_features(first_row, rows, out.view_mut());
        let scale = ArrayView1::from(&self.row_scale[first_row..first_row + rows.nrows()]);
        out.zip_mut_with(&scale, |x, &s| *x *= s);
    }

    fn key_features(&self, first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.polynomial.key_features(first_row, rows, out);
    }

    fn row_shift(&self) -> Option<&[T]> {
        Some(&self.row_shift)
    }

    fn sparse(&self) -> Option<&SparseCorrection<T>> {
        Some(&self.sparse)
    }

    fn certificate(&self) -> &Certificate {
        self.polynomial.certificate()
    }
}
