//! PaCA: r input columns of W are trained in place; backward keeps only those columns of x
//! (\[PaCA\]).
//!
//! The stored trainable tensor is p = W[:, idx] / s, as in the official code with s = alpha / r
//! (s = 1 in the paper). With dW_idx = dy^T x[:, idx], dp = s dW_idx. The values live in W; nothing
//! is added to the forward.

use super::selection::{ColumnRule, ColumnScores};
use super::stored::{ReadTensors, Settings, Stored, WriteTensors};
use super::{Adaptation, BaseWeight, Change, InputNeed};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::{Cpu, InputGradient, Ops};
use ndarray::Array2;
use rand::Rng;

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

impl PacaSpec {
    /// The factor s, after checking the settings against the shape (out, in).
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a rank outside 1..=in.
    pub fn scaling(&self, (_, width): (usize, usize)) -> Result<f64> {
        if self.rank == 0 || self.rank > width {
            return Err(Error::invalid(
                "rank",
                self.rank,
                format!("must be in 1..={width} (the input width)"),
            ));
        }
        Ok(self.alpha.map_or(1.0, |alpha| alpha / self.rank as f64))
    }
}

impl Default for PacaSpec {
    fn default() -> Self {
        Self { rank: 8, alpha: None, rule: ColumnRule::default() }
    }
}

/// Selected columns of a projection, on some engine.
#[derive(Debug, Clone)]
pub struct PacaOn<E: Ops> {
    /// Selected input columns, increasing.
    pub index: E::Index,
    /// s.
    pub scaling: f64,
    /// The other values of the selected columns, `out x r`: the original ones while the trained
    /// ones are active, the trained ones after an unmerge. A device does not hold them.
    pub inactive: Option<E::Matrix>,
    /// Whether the trained values are in effect.
    pub active: bool,
}

/// Selected columns on the processor.
pub type Paca<T> = PacaOn<Cpu<T>>;

/// Refuses indices that repeat or leave 0..width.
///
/// # Errors
/// [`Error::InvalidParam`] naming the position.
pub fn check_index(index: &[usize], width: usize) -> Result<()> {
    let mut seen = vec![false; width];
    for (position, &i) in index.iter().enumerate() {
        if i >= width {
            return Err(Error::invalid(
                format!("index[{position}]"),
                i,
                format!("must be below {width}"),
            ));
        }
        if std::mem::replace(&mut seen[i], true) {
            return Err(Error::invalid(format!("index[{position}]"), i, "appears twice"));
        }
    }
    Ok(())
}

impl<E: Ops> Adaptation<E> for PacaOn<E> {
    fn name(&self) -> &'static str {
        "paca"
    }

    fn trained_names(&self) -> &'static [&'static str] {
        &["paca_columns"]
    }

    fn trained_shapes(&self, (out, _): (usize, usize)) -> Vec<(usize, usize)> {
        vec![(out, E::index_length(&self.index))]
    }

    /// The original columns; over a packed weight the trained ones too.
    fn held(&self, (out, _): (usize, usize), packed: bool) -> usize {
        out * E::index_length(&self.index) * if packed { 2 } else { 1 }
    }

    fn input_need(&self) -> InputNeed {
        InputNeed::Columns
    }

    fn saved_name(&self) -> &'static str {
        "columns"
    }

    fn forward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        save: bool,
    ) -> Result<(E::Matrix, Option<E::Matrix>)> {
        let y = e.product(x, weight, add_to);
        Ok((y, save.then(|| e.select(x, &self.index))))
    }

    fn backward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        dy: &E::Matrix,
        _: Option<&E::Matrix>,
        saved: Option<E::Matrix>,
        sinks: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>> {
        let columns = super::kept(saved, "selected columns of the input")?;
        let dx = dx.wanted().map(|add_to| e.product_backward(dy, weight, add_to));
        e.add_outer(self.scaling, dy, None, &columns, &mut sinks[0])?;
        Ok(dx)
    }

    fn values(&self, e: &mut E, weight: &E::Weight) -> Vec<E::Matrix> {
        let columns = e.columns(weight, &self.index);
        vec![e.scaled(&columns, 1.0 / self.scaling)]
    }

    fn acting_values(&self, e: &mut E, weight: &E::Weight) -> Vec<E::Matrix> {
        vec![e.columns(weight, &self.index)]
    }

    fn put_acting(
        &mut self,
        e: &mut E,
        weight: &mut E::Weight,
        values: Vec<E::Matrix>,
    ) -> Result<()> {
        values.into_iter().for_each(|columns| e.put_columns(weight, &self.index, columns));
        Ok(())
    }

    fn update(&mut self, e: &mut E, weight: &mut E::Weight, change: Change<'_, E>) -> Result<()> {
        for mut stored in self.values(e, weight) {
            change("paca_columns", &mut stored)?;
            let columns = e.scaled(&stored, self.scaling);
            e.put_columns(weight, &self.index, columns);
        }
        Ok(())
    }
}

impl<T: Real> Paca<T> {
    /// Selects columns of `base` by the rule; the output starts unchanged.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a rank outside 1..=in, a bad alpha, or scores that the rule
    /// needs and are absent.
    pub fn init(
        spec: PacaSpec,
        base: &mut BaseWeight<T>,
        scores: &ColumnScores<'_, T>,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let scaling = spec.scaling(base.shape())?;
        let mut index = spec.rule.select(base.dense().view(), scores, spec.rank, rng)?;
        index.sort_unstable();
        Self::from_index(index, scaling, base)
    }

    /// With given columns. A packed base gets columns of its own, which can then be trained.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an index out of range or repeated, or a scaling that is zero or
    /// not finite.
    pub fn from_index(index: Vec<usize>, scaling: f64, base: &mut BaseWeight<T>) -> Result<Self> {
        check_index(&index, base.shape().1)?;
        if !scaling.is_finite() || scaling.abs() < f64::MIN_POSITIVE {
            return Err(Error::invalid("scaling", scaling, "must be finite and not zero"));
        }
        let original = base.read_columns(&index)?;
        if base.is_packed() {
            base.put_columns(&index, original.clone());
        }
        Ok(Self { index, scaling, inactive: Some(original), active: true })
    }

    /// Swaps the trained and the original values so that the trained ones are in effect or not.
    pub fn activate(&mut self, base: &mut BaseWeight<T>, trained: bool) {
        if self.active != trained
            && let Some(other) = self.inactive.take()
        {
            self.inactive = Some(base.columns(&self.index));
            base.put_columns(&self.index, other);
            self.active = trained;
        }
    }

    /// The trained columns as they act, whether they are in effect or not.
    pub fn trained_columns(&self, base: &BaseWeight<T>) -> Array2<T> {
        match &self.inactive {
            Some(trained) if !self.active => trained.clone(),
            _ => base.columns(&self.index),
        }
    }
}

impl<T: Real> Stored<T> for Paca<T> {
    fn save(&self, base: &BaseWeight<T>, to: &mut dyn WriteTensors<T>) {
        to.doubles("paca_index", &self.index.iter().map(|&i| i as f64).collect::<Vec<_>>());
        to.matrix("paca_columns", self.trained_columns(base).view());
        to.doubles("paca_scaling", &[self.scaling]);
    }

    fn load(_: &Settings, base: &mut BaseWeight<T>, from: &mut dyn ReadTensors<T>) -> Result<Self> {
        let index = from.indices("paca_index")?;
        let columns = from.matrix("paca_columns", (base.shape().0, index.len()))?;
        let scaling = from.doubles("paca_scaling", 1)?[0];
        let paca = Self::from_index(index, scaling, base).map_err(|e| {
            from.malformed("paca_index", "distinct columns of the weight", e.to_string())
        })?;
        base.put_columns(&paca.index, columns);
        Ok(paca)
    }
}
