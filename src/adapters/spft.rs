//! SpFT: single entries of W, anywhere in it, are trained in place (\[S2FT\], unstructured sparse
//! fine-tuning).
//!
//! With I the trained positions, `dW[I] = (dy^T x)[I]`. Nothing is added to the forward, but unlike
//! a slice or a few columns the entries need the whole input and, in passing, the whole of dy^T x:
//! sparsity without structure saves optimizer state and nothing else. That is the paper's reason
//! for structure; this method is what it is compared with.

use super::stored::{ReadTensors, Settings, Stored, WriteTensors};
use super::{Adaptation, BaseWeight, Change, InputNeed};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::{Cpu, InputGradient, Ops};
use ndarray::{Array2, ArrayView2};
use rand::Rng;

/// Settings of unstructured sparse fine-tuning.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `share` | 0.01 | share of the weight's entries, drawn at random | above 0, at most 1 |
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SpftSpec {
    /// Share of the weight's entries.
    pub share: f64,
}

impl Default for SpftSpec {
    fn default() -> Self {
        Self { share: 0.01 }
    }
}

impl SpftSpec {
    /// Trained entries of a weight of shape (out, in): the nearest number to the share, at least
    /// one.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a share outside (0, 1].
    pub fn entries(&self, (out, width): (usize, usize)) -> Result<usize> {
        if !(self.share > 0.0 && self.share <= 1.0) {
            return Err(Error::invalid("share", self.share, "must be above 0 and at most 1"));
        }
        Ok(((self.share * (out * width) as f64).round() as usize).clamp(1, out * width))
    }
}

/// Trained entries of a projection, on some engine.
#[derive(Debug, Clone)]
pub struct SpftOn<E: Ops> {
    /// Trained entries (row x in + column), increasing.
    pub index: E::Index,
    /// Their other values, `1 x n`: the original ones while the trained ones are active.
    pub inactive: Option<E::Matrix>,
    /// Whether the trained values are in effect.
    pub active: bool,
}

/// Trained entries on the processor.
pub type Spft<T> = SpftOn<Cpu<T>>;

impl<E: Ops> SpftOn<E> {
    /// The trained entries of a matrix, which is given up.
    fn pick(&self, e: &mut E, x: E::Matrix) -> E::Matrix {
        let (rows, columns) = E::shape(&x);
        let flat = e.reshape(x, (1, rows * columns));
        e.select(&flat, &self.index)
    }
}

impl<E: Ops> Adaptation<E> for SpftOn<E> {
    fn name(&self) -> &'static str {
        "spft"
    }

    fn trained_names(&self) -> &'static [&'static str] {
        &["spft_entries"]
    }

    fn trained_shapes(&self, _: (usize, usize)) -> Vec<(usize, usize)> {
        vec![(1, E::index_length(&self.index))]
    }

    fn input_need(&self) -> InputNeed {
        InputNeed::Whole
    }

    fn backward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        _: Option<E::Matrix>,
        sinks: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>> {
        let x = super::whole(x)?;
        let dx = dx.wanted().map(|add_to| e.product_backward(dy, weight, add_to));
        let whole = e.outer(dy, x);
        let picked = self.pick(e, whole);
        e.accumulate(&mut sinks[0], 1.0, &picked);
        Ok(dx)
    }

    fn values(&self, e: &mut E, weight: &E::Weight) -> Vec<E::Matrix> {
        let dense = e.dense(weight);
        vec![self.pick(e, dense)]
    }

    fn update(&mut self, e: &mut E, weight: &mut E::Weight, change: Change<'_, E>) -> Result<()> {
        for mut values in self.values(e, weight) {
            change("spft_entries", &mut values)?;
            e.put_entries(E::dense_mut(weight, "spft")?, &self.index, &values)?;
        }
        Ok(())
    }
}

impl<T: Real> Spft<T> {
    /// Draws the entries; the output starts unchanged.
    ///
    /// # Errors
    /// As [`SpftSpec::entries`]; [`Error::InvalidParam`] for a packed weight.
    pub fn init(spec: SpftSpec, base: &mut BaseWeight<T>, rng: &mut impl Rng) -> Result<Self> {
        let (out, width) = base.shape();
        let count = spec.entries((out, width))?;
        let index = rand::seq::index::sample(rng, out * width, count).into_vec();
        Self::from_index(index, base)
    }

    /// With given entries, in any order.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an entry out of range or repeated, or a packed weight.
    pub fn from_index(mut index: Vec<usize>, base: &mut BaseWeight<T>) -> Result<Self> {
        let (out, width) = base.shape();
        super::paca::check_index(&index, out * width)?;
        index.sort_unstable();
        let original = entries(base.dense_mut("spft")?.view(), &index);
        Ok(Self { index, inactive: Some(original), active: true })
    }

    /// Swaps the trained and the original values so that the trained ones are in effect or not.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed weight.
    pub fn activate(&mut self, base: &mut BaseWeight<T>, trained: bool) -> Result<()> {
        if self.active != trained
            && let Some(other) = self.inactive.take()
        {
            let weight = base.dense_mut("spft")?;
            self.inactive = Some(entries(weight.view(), &self.index));
            Cpu::default().put_entries(weight, &self.index, &other)?;
            self.active = trained;
        }
        Ok(())
    }
}

fn entries<T: Real>(weight: ArrayView2<T>, index: &[usize]) -> Array2<T> {
    let width = weight.ncols();
    Array2::from_shape_fn((1, index.len()), |(_, i)| weight[[index[i] / width, index[i] % width]])
}

impl<T: Real> Stored<T> for Spft<T> {
    fn save(&self, base: &BaseWeight<T>, to: &mut dyn WriteTensors<T>) {
        to.doubles("spft_index", &self.index.iter().map(|&i| i as f64).collect::<Vec<_>>());
        let trained = match &self.inactive {
            Some(trained) if !self.active => trained.clone(),
            _ => entries(base.dense().view(), &self.index),
        };
        to.matrix("spft_entries", trained.view());
    }

    fn load(_: &Settings, base: &mut BaseWeight<T>, from: &mut dyn ReadTensors<T>) -> Result<Self> {
        let index = from.indices("spft_index")?;
        if index.is_empty() || index.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Err(from.malformed(
                "spft_index",
                "rising entries, at least one",
                format!("{} entries", index.len()),
            ));
        }
        let loaded = Self::from_index(index, base).map_err(|e| {
            from.malformed("spft_index", "distinct entries of the weight", e.to_string())
        })?;
        let values = from.matrix("spft_entries", (1, loaded.index.len()))?;
        Cpu::default().put_entries(base.dense_mut("spft")?, &loaded.index, &values)?;
        Ok(loaded)
    }
}
