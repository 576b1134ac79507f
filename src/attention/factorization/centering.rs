//! Taking the means of queries and keys out of the scores, exactly.
//!
//! With means q0 and k0, beta q_i.k_j = beta q_i.k0 + beta q0.(k_j - k0) + beta (q_i - q0).(k_j -
//! k0). The first term is a shift of row i, which the softmax does not see; the second is a factor
//! of column j, which goes to Psi; only the third, whose entries are smaller, is left to the
//! polynomial. Trained heads have large means: without centering a polynomial spends its degrees on
//! a constant.

use super::Scores;
use crate::attention::shards::{RowShards, WholeHead, together};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis};
use std::fmt;
use std::str::FromStr;

/// Which means are taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Center {
    /// None, as in the published methods.
    #[default]
    None,
    /// The mean key: a shift of each row.
    Keys,
    /// The mean key and the mean query: a shift of each row and a factor of each column.
    Both,
}

impl fmt::Display for Center {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Center::None => "none",
            Center::Keys => "keys",
            Center::Both => "both",
        })
    }
}

impl FromStr for Center {
    type Err = ();
    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        match text {
            "none" => Ok(Center::None),
            "keys" => Ok(Center::Keys),
            "both" => Ok(Center::Both),
            _ => Err(()),
        }
    }
}

/// Centered queries and keys with what was taken out.
#[derive(Debug, Clone)]
pub struct Centered<T> {
    /// q_i - q0.
    pub query: Array2<T>,
    /// k_j - k0.
    pub key: Array2<T>,
    /// q0.
    pub query_mean: Array1<T>,
    /// k0.
    pub key_mean: Array1<T>,
    /// beta q_i.k0 for each query, if keys are centered.
    pub row_shift: Option<Vec<T>>,
    /// exp(beta q0.(k_j - k0)) for each key, if queries are centered.
    pub column_factor: Option<Vec<T>>,
    /// Largest column factor of all shards (1 without any): an error of the polynomial is
    /// multiplied by at most this.
    pub largest_factor: f64,
}

impl<T: Real> Centered<T> {
    /// Takes the means out. O(L d_h) operations.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if a column factor overflows.
    pub fn new(scores: &Scores<T>, center: Center, cost: &mut Cost) -> Result<Self> {
        Self::of_shard(scores, center, &WholeHead, cost)
    }

    /// As [`Centered::new`] for one shard of the rows; the means are those of all rows.
    ///
    /// # Errors
    /// As [`Centered::new`]; those of the shards.
    pub fn of_shard(
        scores: &Scores<T>,
        center: Center,
        shards: &dyn RowShards<T>,
        cost: &mut Cost,
    ) -> Result<Self> {
        let d = scores.query.ncols();
        let mean = |a: &ArrayView2<T>| -> Result<Array1<T>> {
            if shards.count() == 1 {
                return Ok(a.mean_axis(Axis(0)).unwrap_or_else(|| Array1::zeros(d)));
            }
            let sum = a.sum_axis(Axis(0));
            let mut wide: Vec<f64> =
                sum.iter().map(|x| x.widen()).chain([a.nrows() as f64]).collect();
            shards.sum_wide(&mut wide)?;
            let rows = wide[d].max(1.0);
            Ok(wide[..d].iter().map(|x| T::of(x / rows)).collect())
        };
        let key_mean = if center == Center::None { Array1::zeros(d) } else { mean(&scores.key)? };
        let query_mean =
            if center == Center::Both { mean(&scores.query)? } else { Array1::zeros(d) };
        let (query, key) = (&scores.query - &query_mean, &scores.key - &key_mean);
        let beta = T::of(scores.beta);
        let row_shift = (center != Center::None)
            .then(|| scores.query.dot(&key_mean).iter().map(|&x| beta * x).collect());
        let column_factor: Option<Vec<T>> = (center == Center::Both)
            .then(|| key.dot(&query_mean).iter().map(|&x| (beta * x).exp()).collect());
        let overflows =
            column_factor.as_ref().is_some_and(|factors| factors.iter().any(|x| !x.is_finite()));
        let checked = match overflows {
            true => Err(Error::invalid(
                "center",
                "both",
                "a column factor exp(beta q0.(k - k0)) overflows",
            )),
            false => Ok(()),
        };
        together(shards, checked)?;
        let largest_factor = match &column_factor {
            Some(factors) => shards.largest(factors.iter().fold(0.0, |m, x| m.max(x.widen())))?,
            None => 1.0,
        };
        if center != Center::None {
            cost.elementwise += 2 * (scores.query.len() + scores.key.len()) as u64;
            cost.multiply_adds += (scores.query.len() + scores.key.len()) as u64;
            cost.hold(scores.query.len() + scores.key.len());
        }
        Ok(Self { query, key, query_mean, key_mean, row_shift, column_factor, largest_factor })
    }

    /// The scores left to the polynomial.
    pub fn scores<'a>(&'a self, of: &Scores<T>) -> Scores<'a, T> {
        Scores { query: self.query.view(), key: self.key.view(), beta: of.beta, mask: of.mask }
    }

    /// Multiplies the columns of a tile of transposed key features by their factors.
    pub fn scale_columns(&self, first_row: usize, mut features: ArrayViewMut2<T>) {
        if let Some(factor) = &self.column_factor {
            let factor = ArrayView1::from(&factor[first_row..first_row + features.ncols()]);
            features.zip_mut_with(&factor, |x, &f| *x *= f);
        }
    }
}
