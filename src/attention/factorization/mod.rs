//! Factorizations of the exponentiated scores: exp(S - shift) ~= Phi Psi^T, one file each.
//!
//! A [`SoftmaxFactorization`] is a method with its parameters. Given one head's queries and keys it
//! prepares a [`FeatureMap`], which makes rows of Phi and Psi tile by tile, and a [`Certificate`]
//! of what it assumed.

pub mod auto;
pub mod centering;
pub mod chebyshev;
pub mod correction;
pub mod degree;
mod exponential;
pub mod fitted;
pub mod interval;
mod key_tree;
pub mod large_logits;
pub mod monomials;
pub mod nystrom;
pub mod polynomial;
pub mod positive_features;
pub mod sparse;
pub mod spec;
pub mod support_basis;
pub mod taylor;
pub mod tensor_sketch;
pub mod truncated_svd;

use super::problem::{AttentionProblem, Mask, Projected};
use super::shards::RowShards;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

pub use correction::SparseCorrection;
pub use spec::build;

/// The scores to be factorized: S = beta Q K^T on the visible pairs.
#[derive(Debug, Clone, Copy)]
pub struct Scores<'a, T> {
    /// Q, `L_q x d_h`.
    pub query: ArrayView2<'a, T>,
    /// K, `L_k x d_h`.
    pub key: ArrayView2<'a, T>,
    /// beta.
    pub beta: f64,
    /// Which pairs count for bounds.
    pub mask: Mask,
}

impl<'a, T: Real> Scores<'a, T> {
    /// The scores of a head with its projections.
    pub fn of(problem: &AttentionProblem<T>, projected: &'a Projected<T>) -> Self {
        let (query, key) = (projected.qkv.query.view(), projected.qkv.key.view());
        Self { query, key, beta: problem.beta(), mask: problem.mask() }
    }
}

/// What a prepared factorization assumed and what it guarantees.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Certificate {
    /// Spec of the method with its parameters settled.
    pub spec: String,
    /// Number of columns k of Phi and Psi.
    pub rank: usize,
    /// Polynomial degree, for polynomial methods.
    pub degree: Option<usize>,
    /// Half-width b of the interval [-b, b] on which the bound holds, with how it was obtained. For
    /// centered methods it is the interval of the centered logits.
    pub interval: Option<(f64, interval::Evidence)>,
    /// Bound on |Phi Psi^T - exp(S - shift)| for every logit in the interval, if the mathematics
    /// gives one; the shift is that of [`FeatureMap::row_shift`].
    pub exp_error_bound: Option<f64>,
    /// Visible pairs that are corrected one by one, for methods with a sparse part.
    pub corrected_pairs: u64,
    /// What finding those pairs took, for `sparse`: part of the counted cost, unless an oracle is
    /// said to know them.
    pub search: Option<Cost>,
    /// How `auto` came to its choice.
    pub selection: Option<auto::Selection>,
}

/// Rows of Phi and Psi, made tile by tile.
pub trait FeatureMap<T: Real>: Send + Sync {
    /// Number of columns k.
    fn rank(&self) -> usize;

    /// Fills `out` (`k x rows`, the transpose of a row tile of Phi) for the query rows starting at
    /// `first_row`.
    fn query_features(&self, first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>);

    /// Fills `out` (`k x rows`, the transpose of a row tile of Psi) for the key rows starting at
    /// `first_row`.
    fn key_features(&self, first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>);

    /// Adds the products and exponentials of `rows` rows of Phi; the chain itself counts
    /// elementwise steps.
    fn count_query_features(&self, _rows: usize, _cost: &mut Cost) {}

    /// The same for Psi.
    fn count_key_features(&self, _rows: usize, _cost: &mut Cost) {}

    /// The logarithm that was taken out of each query row, if any: Phi Psi^T ~= exp(S - shift).
    fn row_shift(&self) -> Option<&[T]> {
        None
    }

    /// A sparse matrix added to Phi Psi^T, if the method has one.
    fn sparse(&self) -> Option<&SparseCorrection<T>> {
        None
    }

    /// The monomials behind the features, where they are nothing else: another device can make them
    /// itself.
    fn monomials(&self) -> Option<&monomials::MonomialMap<T>> {
        None
    }

    /// What was assumed and what is guaranteed.
    fn certificate(&self) -> &Certificate;
}

/// A method of factorizing exp(S), with its parameters (design 2.3).
pub trait SoftmaxFactorization<T: Real>: Send + Sync {
    /// The spec `name:key=value,...`.
    fn spec(&self) -> String;

    /// Settles everything that depends on the head; operations are added to `cost`.
    ///
    /// # Errors
    /// [`crate::Error::LogitOutsideInterval`] when an assumption fails, [`crate::Error::TooLarge`]
    /// when the rank would exceed the limit, [`crate::Error::InvalidParam`] for parameters that do
    /// not fit the head.
    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>>;

    /// As [`SoftmaxFactorization::prepare`], from one shard of the rows and sums and maxima over
    /// all of them.
    ///
    /// Methods that must see all queries or keys at once do not have it.
    ///
    /// # Errors
    /// As there; [`Error::InvalidParam`] for a method that does not have it.
    fn prepare_shard(
        &self,
        _scores: &Scores<T>,
        _shards: &dyn RowShards<T>,
        _cost: &mut Cost,
    ) -> Result<Box<dyn FeatureMap<T>>> {
        Err(Error::invalid(
            "features",
            self.spec(),
            "needs all queries and keys in one process; with rows divided among ranks use taylor \
             or chebyshev (check=norms or off), positive-features or tensor-sketch",
        ))
    }
}

/// Largest number of feature columns that a factorization may have: above it a single tile of
/// features outgrows any cache and the method has lost to the exact one at every length we can run.
pub const MAX_RANK: usize = 1 << 18;

/// The approximation of exp(S - shift) in full, sparse part included: for tests and small studies.
pub fn approximation<T: Real>(map: &dyn FeatureMap<T>, scores: &Scores<T>) -> Array2<T> {
    let (phi, psi) = materialize(map, scores);
    let mut product = phi.dot(&psi.t());
    if let Some(sparse) = map.sparse() {
        for i in 0..product.nrows() {
            sparse.row(i).for_each(|(j, x)| product[[i, j]] += x);
        }
    }
    product
}

/// Phi (`L_q x k`) and Psi (`L_k x k`) in full, without the sparse part.
pub fn materialize<T: Real>(map: &dyn FeatureMap<T>, scores: &Scores<T>) -> (Array2<T>, Array2<T>) {
    let mut phi = Array2::zeros((map.rank(), scores.query.nrows()));
    let mut psi = Array2::zeros((map.rank(), scores.key.nrows()));
    map.query_features(0, scores.query, phi.view_mut());
    map.key_features(0, scores.key, psi.view_mut());
    (phi.reversed_axes(), psi.reversed_axes())
}
