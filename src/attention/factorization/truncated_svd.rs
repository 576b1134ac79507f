//! `truncated-svd:rank=k`: the best rank-k approximation, the oracle to measure against (quadratic
//! memory, cubic time).

use super::{Certificate, FeatureMap, Scores, SoftmaxFactorization};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::decompositions::{Svd, svd};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};
use std::sync::Arc;

/// Best rank-k approximation, in the Frobenius norm, of the unmasked probabilities P
/// (Eckart-Young).
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `rank` | none | k | 1 to min(L_q, L_k) |
///
/// P = exp(S - lse) is decomposed rather than exp(S): the rows are those that the softmax uses, so
/// the row shift of the feature map is the row log-sum-exp.
#[derive(Debug, Clone, PartialEq)]
pub struct TruncatedSvd {
    /// k.
    pub rank: usize,
}

/// Longest side that is decomposed (cubic time: 6 s at 1024 with nalgebra on the development
/// machine).
pub const MAX_TOKENS: usize = 4096;

/// The full decomposition, from which every rank can be cut.
#[derive(Debug, Clone)]
pub struct Oracle<T> {
    svd: Arc<Svd>,
    log_sum_exp: Arc<Vec<T>>,
}

impl<T: Real> Oracle<T> {
    /// Decomposes the unmasked probabilities of a head.
    ///
    /// # Errors
    /// [`Error::TooLarge`] above [`MAX_TOKENS`] tokens; [`Error::Decomposition`].
    pub fn new(scores: &Scores<T>, cost: &mut Cost) -> Result<Self> {
        let (m, n) = (scores.query.nrows(), scores.key.nrows());
        if m.max(n) > MAX_TOKENS {
            return Err(Error::TooLarge {
                what: "truncated-svd".into(),
                needed: m.max(n) as u128,
                limit: MAX_TOKENS as u128,
                unit: "tokens",
            });
        }
        let widen = |a: ArrayView2<T>| a.mapv(|x| x.widen());
        let mut p = widen(scores.query).dot(&widen(scores.key).t()) * scores.beta;
        let mut log_sum_exp = Vec::with_capacity(m);
        for mut row in p.rows_mut() {
            let largest = row.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let lse = largest + row.fold(0.0, |sum, &x| sum + (x - largest).exp()).ln();
            // The shift is rounded to T first, so that Phi Psi^T approximates exp(S - shift) for
            // the very shift that the gradient adds back.
            let lse = T::of(lse);
            row.mapv_inplace(|x| (x - lse.widen()).exp());
            log_sum_exp.push(lse);
        }
        cost.product(m, scores.query.ncols(), n);
        cost.exponentials += 2 * (m * n) as u64;
        // Golub-Kahan bidiagonalization with both sets of vectors: about 22 n^3 operations.
        cost.multiply_adds += 11 * (m.max(n) as u64) * (m.min(n) as u64).pow(2);
        cost.hold(3 * m * n);
        Ok(Self { svd: Arc::new(svd(p.view())?), log_sum_exp: Arc::new(log_sum_exp) })
    }

    /// Singular values of P, descending.
    pub fn singular_values(&self) -> ArrayView1<'_, f64> {
        self.svd.s.view()
    }

    /// The feature map of the best rank-k approximation.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a rank of 0 or above the smaller side.
    pub fn cut(&self, rank: usize) -> Result<Box<dyn FeatureMap<T>>> {
        let largest = self.svd.s.len();
        if rank == 0 || rank > largest {
            return Err(Error::invalid(
                "rank",
                rank,
                format!("must be between 1 and {largest}, the shorter of the sequences"),
            ));
        }
        let root = self.svd.s.slice(s![..rank]).mapv(f64::sqrt);
        // Transposed features: k x L.
        let phi = (self.svd.u.slice(s![.., ..rank]).t().to_owned()
            * root.view().insert_axis(Axis(1)))
        .mapv(T::of);
        let psi = (self.svd.vt.slice(s![..rank, ..]).to_owned() * root.view().insert_axis(Axis(1)))
            .mapv(T::of);
        Ok(Box::new(SvdMap {
            phi,
            psi,
            log_sum_exp: Arc::clone(&self.log_sum_exp),
            certificate: Certificate {
                spec: format!("truncated-svd:rank={rank}"),
                rank,
                degree: None,
                interval: None,
                // An entry of P - P_k is at most its spectral norm, the next singular value. The
                // bound is on exp(S - lse), that is on P itself.
                exp_error_bound: Some(self.svd.s.get(rank).copied().unwrap_or(0.0)),
                ..Certificate::default()
            },
        }))
    }
}

struct SvdMap<T> {
    phi: Array2<T>,
    psi: Array2<T>,
    log_sum_exp: Arc<Vec<T>>,
    certificate: Certificate,
}

impl<T: Real> FeatureMap<T> for SvdMap<T> {
    fn rank(&self) -> usize {
        self.phi.nrows()
    }

    fn query_features(&self, first_row: usize, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        out.assign(&self.phi.slice(s![.., first_row..first_row + rows.nrows()]));
    }

    fn key_features(&self, first_row: usize, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        out.assign(&self.psi.slice(s![.., first_row..first_row + rows.nrows()]));
    }

    fn row_shift(&self) -> Option<&[T]> {
        Some(&self.log_sum_exp)
    }

    fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}

impl<T: Real> SoftmaxFactorization<T> for TruncatedSvd {
    fn spec(&self) -> String {
        format!("truncated-svd:rank={}", self.rank)
    }

    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        let largest = scores.query.nrows().min(scores.key.nrows());
        if self.rank == 0 || self.rank > largest {
            return Err(Error::invalid(
                "rank",
                self.rank,
                format!("must be between 1 and {largest}, the shorter of the sequences"),
            ));
        }
        Oracle::new(scores, cost)?.cut(self.rank)
    }
}
