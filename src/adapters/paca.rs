//! PaCA: r input columns of W are trained in place; backward keeps only those columns of x (\[PaCA\]).
//!
//! The stored trainable tensor is p = W[:, idx] / s, as in the official code with s = alpha / r (s = 1 in the
//! paper). With dW_idx = dy^T x[:, idx], dp = s dW_idx. The values live in W; nothing is added to the forward.

use super::BaseWeight;
use super::selection::{ColumnRule, ColumnScores};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2, Axis};
use rand::Rng;
use rayon::prelude::*;

/// Settings of partial connections.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `rank` | 8 | number of columns | 1 to in |
/// | `alpha` | none | scaling s = alpha / r; 1 when absent | finite, not zero |
/// | `rule` | random | which columns | |
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PacaSpec {
    /// Number of columns.
    pub rank: usize,
    /// Numerator of the official code's scaling; `None` is the paper's 1.
    pub alpha: Option<f64>,
    /// Which columns.
    pub rule: ColumnRule,
}

impl Default for PacaSpec {
    fn default() -> Self {
        Self { rank: 8, alpha: None, rule: ColumnRule::default() }
    }
}

/// Selected columns of a projection.
#[derive(Debug, Clone)]
pub struct Paca<T> {
    /// Selected input columns, increasing.
    pub index: Vec<usize>,
    /// s.
    pub scaling: f64,
    /// The other values of the selected columns, `out x r`: the original ones while the trained ones are
    /// active, the trained ones after an unmerge.
    pub inactive: Array2<T>,
    /// Whether the trained values are in effect.
    pub active: bool,
    /// Trained columns when the base weight is packed and cannot hold them.
    separate: Option<Array2<T>>,
}

/// Refuses indices that repeat or leave 0..width.
///
/// # Errors
/// [`Error::InvalidParam`] naming the position.
pub fn check_index(index: &[usize], width: usize) -> Result<()> {
    let mut seen = vec![false; width];
    for (position, &i) in index.iter().enumerate() {
        if i >= width {
            return Err(Error::invalid(format!("index[{position}]"), i, format!("must be below {width}")));
        }
        if std::mem::replace(&mut seen[i], true) {
            return Err(Error::invalid(format!("index[{position}]"), i, "appears twice"));
        }
    }
    Ok(())
}

impl<T: Real> Paca<T> {
    /// Selects columns of `base` by the rule; the output starts unchanged.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a rank outside 1..=in, a bad alpha, or scores that the rule needs and are absent.
    pub fn init(
        spec: PacaSpec,
        base: &BaseWeight<T>,
        scores: &ColumnScores<'_, T>,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let width = base.shape().1;
        if spec.rank == 0 || spec.rank > width {
            return Err(Error::invalid("rank", spec.rank, format!("must be in 1..={width} (the input width)")));
        }
        let scaling = spec.alpha.map_or(1.0, |alpha| alpha / spec.rank as f64);
        let mut index = spec.rule.select(base.dense().view(), scores, spec.rank, rng)?;
        index.sort_unstable();
        Self::from_index(index, scaling, base)
    }

    /// With given columns.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an index out of range or repeated, or a scaling that is zero or not finite.
    pub fn from_index(index: Vec<usize>, scaling: f64, base: &BaseWeight<T>) -> Result<Self> {
        check_index(&index, base.shape().1)?;
        if !scaling.is_finite() || scaling.abs() < f64::MIN_POSITIVE {
            return Err(Error::invalid("scaling", scaling, "must be finite and not zero"));
        }
        let inactive = base.dense().select(Axis(1), &index);
        let separate = matches!(base, BaseWeight::Packed(_)).then(|| inactive.clone());
        Ok(Self { index, scaling, inactive, active: true, separate })
    }

    /// x[:, idx], all that backward needs of the input.
    pub fn select(&self, x: ArrayView2<T>, cost: &mut Cost) -> Array2<T> {
        let rank = self.index.len();
        cost.elementwise += (x.nrows() * rank) as u64;
        let mut columns = Array2::zeros((x.nrows(), rank));
        let x = x.as_standard_layout();
        let (width, source) = (x.ncols(), x.as_slice().unwrap_or(&[]));
        let task = crate::blocks::ROWS_PER_TASK;
        columns
            .as_slice_mut()
            .unwrap_or(&mut [])
            .par_chunks_mut(task * rank.max(1))
            .zip(source.par_chunks(task * width.max(1)))
            .for_each(|(columns, x)| {
                for (to, from) in columns.chunks_exact_mut(rank).zip(x.chunks_exact(width)) {
                    for (to, &i) in to.iter_mut().zip(&self.index) {
                        *to = from[i];
                    }
                }
            });
        columns
    }

    /// The stored trainable tensor p, `out x r`.
    pub fn stored_columns(&self, base: &BaseWeight<T>) -> Array2<T> {
        // Selecting columns of a row-major matrix can leave them column-major.
        let columns = self.columns(base);
        columns.as_standard_layout().mapv(|w| w / T::of(self.scaling))
    }

    /// The columns as they act, s p.
    pub fn columns(&self, base: &BaseWeight<T>) -> Array2<T> {
        match (&self.separate, base) {
            (None, BaseWeight::Dense(weight)) => weight.select(Axis(1), &self.index),
            (Some(columns), _) => columns.clone(),
            (None, packed) => packed.dense().select(Axis(1), &self.index),
        }
    }

    /// Puts s p in effect.
    pub fn store_columns(&mut self, stored: &Array2<T>, base: &mut BaseWeight<T>) {
        self.put(stored.mapv(|p| p * T::of(self.scaling)), base);
    }

    /// Puts column values in effect as they are.
    pub fn put(&mut self, columns: Array2<T>, base: &mut BaseWeight<T>) {
        match base {
            BaseWeight::Dense(weight) => {
                for (k, &i) in self.index.iter().enumerate() {
                    weight.column_mut(i).assign(&columns.column(k));
                }
            }
            BaseWeight::Packed(_) => self.separate = Some(columns),
        }
    }

    /// Overwrites the selected columns of a decoded weight by the separate ones.
    pub fn write_columns(&self, dense: &mut Array2<T>) {
        if let Some(columns) = &self.separate {
            for (k, &i) in self.index.iter().enumerate() {
                dense.column_mut(i).assign(&columns.column(k));
            }
        }
    }

    /// Swaps the trained and the original values so that the trained ones are in effect or not.
    ///
    /// # Errors
    /// None today; the signature matches the other methods.
    pub fn activate(&mut self, base: &mut BaseWeight<T>, trained: bool) -> Result<()> {
        if self.active != trained {
            let current = self.columns(base);
            let other = std::mem::replace(&mut self.inactive, current);
            self.put(other, base);
            self.active = trained;
        }
        Ok(())
    }

    /// Numbers held beside the base weight.
    pub fn held_elements(&self) -> usize {
        self.inactive.len() + self.separate.as_ref().map_or(0, Array2::len)
    }
}
