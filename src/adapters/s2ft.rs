//! S2FT at one projection: a dense slice of a co-permuted weight is trained in place (\[S2FT\]).
//!
//! Output side (rows of q, k, v, gate, up): dW[s..e, :] = dy[:, s..e]^T x needs the whole input but
//! computes only the slice. Input side (columns of o, down): dW[:, s..e] = dy^T x[:, s..e] keeps
//! only the slice of the input. Which rows and columns form the slice is the business of the
//! layer's co-permutation (`model::s2ft`).

use super::stored::{ReadTensors, Settings, Stored, WriteTensors};
use super::{Adaptation, BaseWeight, Change, InputNeed};
use crate::error::{Error, Result};
use crate::linalg::Real;
pub use crate::ops::Side;
use crate::ops::{Cpu, InputGradient, Ops};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use std::ops::Range;

/// A trained slice of a projection, on some engine.
#[derive(Debug, Clone)]
pub struct S2ftSliceOn<E: Ops> {
    /// Rows or columns.
    pub side: Side,
    /// The contiguous range of them.
    pub range: Range<usize>,
    /// The slice's other values: the original ones while the trained ones are active. A device does
    /// not hold them.
    pub original: Option<E::Matrix>,
    /// Whether the trained values are in effect.
    pub active: bool,
}

/// A trained slice on the processor.
pub type S2ftSlice<T> = S2ftSliceOn<Cpu<T>>;

impl<E: Ops> Adaptation<E> for S2ftSliceOn<E> {
    fn name(&self) -> &'static str {
        "s2ft"
    }

    fn trained_names(&self) -> &'static [&'static str] {
        &["s2ft_slice"]
    }

    fn trained_shapes(&self, weight: (usize, usize)) -> Vec<(usize, usize)> {
        vec![self.side.shape(weight, &self.range)]
    }

    fn input_need(&self) -> InputNeed {
        match self.side {
            Side::Output => InputNeed::Whole,
            Side::Input => InputNeed::Columns,
        }
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
        let save = save && self.side == Side::Input;
        Ok((y, save.then(|| e.select_range(x, self.range.clone()))))
    }

    fn backward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        saved: Option<E::Matrix>,
        sinks: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>> {
        let dx = dx.wanted().map(|add_to| e.product_backward(dy, weight, add_to));
        match self.side {
            Side::Output => {
                e.add_outer(1.0, dy, Some(self.range.clone()), super::whole(x)?, &mut sinks[0])?
            }
            Side::Input => e.add_outer(
                1.0,
                dy,
                None,
                &super::kept(saved, "slice of the input")?,
                &mut sinks[0],
            )?,
        }
        Ok(dx)
    }

    fn values(&self, e: &mut E, weight: &E::Weight) -> Vec<E::Matrix> {
        vec![e.slice(weight, self.side, self.range.clone())]
    }

    fn update(&mut self, e: &mut E, weight: &mut E::Weight, change: Change<'_, E>) -> Result<()> {
        let mut values = e.slice(weight, self.side, self.range.clone());
        change("s2ft_slice", &mut values)?;
        e.put_slice(weight, self.side, self.range.clone(), values)
    }
}

impl<T: Real> S2ftSlice<T> {
    /// The slice of `weight`, with a copy of its values.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an empty range or one that leaves the weight.
    pub fn new(side: Side, range: Range<usize>, weight: ArrayView2<T>) -> Result<Self> {
        let extent = if side == Side::Output { weight.nrows() } else { weight.ncols() };
        if range.is_empty() || range.end > extent {
            let requirement = format!("must be a non-empty range within 0..{extent}");
            return Err(Error::invalid("slice", format!("{range:?}"), requirement));
        }
        let original = side.of(&weight, range.clone()).to_owned();
        Ok(Self { side, range, original: Some(original), active: true })
    }

    /// The slice of a weight.
    pub fn of<'a>(&self, weight: &'a ArrayView2<T>) -> ArrayView2<'a, T> {
        self.side.of(weight, self.range.clone())
    }

    /// The slice of a weight, to be written.
    pub fn of_mut<'a>(&self, weight: &'a mut Array2<T>) -> ArrayViewMut2<'a, T> {
        self.side.of_mut(weight, self.range.clone())
    }

    /// Swaps the trained and the original values so that the trained ones are in effect or not.
    pub fn activate(&mut self, weight: &mut Array2<T>, trained: bool) {
        if self.active != trained
            && let Some(other) = self.original.take()
        {
            self.original = Some(self.of(&weight.view()).to_owned());
            self.of_mut(weight).assign(&other);
            self.active = trained;
        }
    }

    /// The trained slice, whether it is in effect or not.
    pub fn trained_slice(&self, weight: ArrayView2<T>) -> Array2<T> {
        match &self.original {
            Some(trained) if !self.active => trained.clone(),
            _ => self.of(&weight).to_owned(),
        }
    }
}

impl<T: Real> Stored<T> for S2ftSlice<T> {
    fn save(&self, base: &BaseWeight<T>, to: &mut dyn WriteTensors<T>) {
        to.doubles("s2ft_range", &[self.range.start as f64, self.range.end as f64]);
        to.matrix("s2ft_slice", self.trained_slice(base.dense().view()).view());
    }

    fn load(
        settings: &Settings,
        base: &mut BaseWeight<T>,
        from: &mut dyn ReadTensors<T>,
    ) -> Result<Self> {
        let range = from.indices("s2ft_range")?;
        let [start, end] = range[..] else {
            return Err(from.malformed(
                "s2ft_range",
                "start and end",
                format!("{} entries", range.len()),
            ));
        };
        let shape = base.shape();
        let slice = Self::new(settings.side, start..end, base.read()?.view())
            .map_err(|e| from.malformed("s2ft_range", "a range of the weight", e.to_string()))?;
        let values = from.matrix("s2ft_slice", slice.side.shape(shape, &slice.range))?;
        let (side, range) = (slice.side, slice.range.clone());
        base.change("s2ft", move |weight| side.of_mut(weight, range.clone()).assign(&values))?;
        Ok(slice)
    }
}
