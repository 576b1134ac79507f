//! S2FT at one projection: a dense slice of a co-permuted weight is trained in place (\[S2FT\]).
//!
//! Output side (rows of q, k, v, gate, up): dW[s..e, :] = dy[:, s..e]^T x needs the whole input but computes only
//! the slice. Input side (columns of o, down): dW[:, s..e] = dy^T x[:, s..e] keeps only the slice of the input.
//! Which rows and columns form the slice is the business of the layer's co-permutation (`model::s2ft`).

use crate::blocks::linear::linear_backward_weight;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use std::ops::Range;

/// Which side of the weight the slice cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Rows.
    Output,
    /// Columns.
    Input,
}

/// A trained slice of a projection.
#[derive(Debug, Clone)]
pub struct S2ftSlice<T> {
    /// Rows or columns.
    pub side: Side,
    /// The contiguous range of them.
    pub range: Range<usize>,
    /// The slice's other values: the original ones while the trained ones are active.
    pub original: Array2<T>,
    /// Whether the trained values are in effect.
    pub active: bool,
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
        let mut slice = Self { side, range, original: Array2::zeros((0, 0)), active: true };
        slice.original = slice.of(&weight).to_owned();
        Ok(slice)
    }

    /// Shape of the slice of a weight of shape (out, in).
    pub fn shape(&self, (out, width): (usize, usize)) -> (usize, usize) {
        match self.side {
            Side::Output => (self.range.len(), width),
            Side::Input => (out, self.range.len()),
        }
    }

    /// The slice of a weight.
    pub fn of<'a>(&self, weight: &'a ArrayView2<T>) -> ArrayView2<'a, T> {
        match self.side {
            Side::Output => weight.slice(s![self.range.clone(), ..]),
            Side::Input => weight.slice(s![.., self.range.clone()]),
        }
    }

    /// The slice of a weight, to be written.
    pub fn of_mut<'a>(&self, weight: &'a mut Array2<T>) -> ArrayViewMut2<'a, T> {
        match self.side {
            Side::Output => weight.slice_mut(s![self.range.clone(), ..]),
            Side::Input => weight.slice_mut(s![.., self.range.clone()]),
        }
    }

    /// x[:, s..e] on the input side; nothing on the output side, which needs all of x.
    pub fn select(&self, x: ArrayView2<T>) -> Option<Array2<T>> {
        match self.side {
            Side::Output => None,
            Side::Input => Some(x.slice(s![.., self.range.clone()]).to_owned()),
        }
    }

    /// Adds the gradient of the slice to `sink`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] if the saved input is absent.
    pub fn backward(
        &self,
        dy: ArrayView2<T>,
        x: Option<ArrayView2<T>>,
        columns: Option<&Array2<T>>,
        sink: &mut Array2<T>,
        cost: &mut Cost,
    ) -> Result<()> {
        let absent = || Error::invalid("input of an S2FT slice", "absent", "forward must save it");
        match self.side {
            Side::Output => {
                let dy = dy.slice(s![.., self.range.clone()]);
                linear_backward_weight(T::one(), dy, x.ok_or_else(absent)?, &mut sink.view_mut(), cost)
            }
            Side::Input => {
                let x = columns.ok_or_else(absent)?.view();
                linear_backward_weight(T::one(), dy, x, &mut sink.view_mut(), cost)
            }
        }
    }

    /// Swaps the trained and the original values so that the trained ones are in effect or not.
    ///
    /// # Errors
    /// None today; the signature matches the other methods.
    pub fn activate(&mut self, weight: &mut Array2<T>, trained: bool) -> Result<()> {
        if self.active != trained {
            let current = self.of(&weight.view()).to_owned();
            self.of_mut(weight).assign(&self.original);
            self.original = current;
            self.active = trained;
        }
        Ok(())
    }
}
