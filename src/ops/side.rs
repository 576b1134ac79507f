//! A contiguous slice of a weight.

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

impl Side {
    /// Shape of the slice of a weight of shape (out, in).
    pub fn shape(self, (out, width): (usize, usize), range: &Range<usize>) -> (usize, usize) {
        match self {
            Side::Output => (range.len(), width),
            Side::Input => (out, range.len()),
        }
    }

    /// The slice of a weight.
    pub fn of<'a, T>(self, weight: &'a ArrayView2<T>, range: Range<usize>) -> ArrayView2<'a, T> {
        match self {
            Side::Output => weight.slice(s![range, ..]),
            Side::Input => weight.slice(s![.., range]),
        }
    }

    /// The slice of a weight, to be written.
    pub fn of_mut<T>(self, weight: &mut Array2<T>, range: Range<usize>) -> ArrayViewMut2<'_, T> {
        match self {
            Side::Output => weight.slice_mut(s![range, ..]),
            Side::Input => weight.slice_mut(s![.., range]),
        }
    }
}
