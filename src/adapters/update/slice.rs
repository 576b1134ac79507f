//! An update that is zero outside some rows or some columns.

use crate::adapters::s2ft::Side;
use crate::blocks::require_shape;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::linalg::gemm::{parallel_product, parallel_product_into};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};

/// Which rows ([`Side::Output`]) or columns ([`Side::Input`]) of a weight, in increasing order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePlace {
    /// Rows or columns.
    pub side: Side,
    /// Which of them.
    pub index: Vec<usize>,
}

/// Some rows or columns of W' - W.
#[derive(Debug, Clone, PartialEq)]
pub struct SliceUpdate<T> {
    shape: (usize, usize),
    place: SlicePlace,
    delta: Array2<T>,
}

impl SlicePlace {
    /// Shape of the slice of a weight of shape (out, in).
    pub fn shape_in(&self, (out, width): (usize, usize)) -> (usize, usize) {
        match self.side {
            Side::Output => (self.index.len(), width),
            Side::Input => (out, self.index.len()),
        }
    }

    /// A copy of the weight's values there.
    pub fn read<T: Real>(&self, weight: ArrayView2<T>) -> Array2<T> {
        match self.side {
            Side::Output => weight.select(Axis(0), &self.index),
            Side::Input => {
                let mut values = Array2::zeros(self.shape_in(weight.dim()));
                gather_columns(weight, &self.index, &mut values);
                values
            }
        }
    }

    /// Writes values, shaped as [`SlicePlace::read`] returns them.
    pub fn write<T: Real>(&self, weight: &mut ArrayViewMut2<T>, values: ArrayView2<T>) {
        match self.side {
            Side::Output => {
                for (&i, values) in self.index.iter().zip(values.rows()) {
                    weight.row_mut(i).assign(&values);
                }
            }
            Side::Input => {
                for (mut row, values) in weight.rows_mut().into_iter().zip(values.rows()) {
                    for (&j, x) in self.index.iter().zip(values) {
                        row[j] = *x;
                    }
                }
            }
        }
    }
}

/// to = from[:, index], row by row: a walk down single columns would touch a cache line per number.
fn gather_columns<T: Real>(from: ArrayView2<T>, index: &[usize], to: &mut Array2<T>) {
    for (mut to, from) in to.rows_mut().into_iter().zip(from.rows()) {
        for (to, &j) in to.iter_mut().zip(index) {
            *to = from[j];
        }
    }
}

fn axis(side: Side) -> Axis {
    if side == Side::Output { Axis(0) } else { Axis(1) }
}

impl<T: Real> SliceUpdate<T> {
    /// From given rows or columns of a weight of shape (out, in), in any order.
    ///
    /// Shapes: delta `k x in` (rows) or `out x k` (columns).
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for an index that repeats or leaves the weight;
    /// [`crate::Error::ShapeMismatch`].
    pub fn new(
        shape: (usize, usize),
        side: Side,
        index: Vec<usize>,
        delta: Array2<T>,
    ) -> Result<Self> {
        let extent = if side == Side::Output { shape.0 } else { shape.1 };
        crate::adapters::paca::check_index(&index, extent)?;
        let mut place = SlicePlace { side, index };
        require_shape("slice update", "delta", &delta.view(), place.shape_in(shape))?;
        let mut order: Vec<usize> = (0..place.index.len()).collect();
        order.sort_unstable_by_key(|&k| place.index[k]);
        // Selecting columns can leave a matrix column-major.
        let delta = delta.select(axis(side), &order).as_standard_layout().into_owned();
        place.index = order.into_iter().map(|k| place.index[k]).collect();
        Ok(Self { shape, place, delta })
    }

    /// `trained - base` on the rows or the columns in which they differ, whichever is the smaller
    /// slice; `None` if they are equal.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    pub fn between(base: ArrayView2<T>, trained: ArrayView2<T>) -> Result<Option<Self>> {
        require_shape("slice update", "trained weight", &trained, base.dim())?;
        let (out, width) = base.dim();
        let (mut rows, mut columns) = (vec![false; out], vec![false; width]);
        for ((i, j), w) in base.indexed_iter() {
            // Bits, so that nothing that was written is missed (and NaN is a difference).
            if w.widen().to_bits() != trained[[i, j]].widen().to_bits() {
                (rows[i], columns[j]) = (true, true);
            }
        }
        let chosen = |flags: &[bool]| {
            flags.iter().enumerate().filter(|f| *f.1).map(|f| f.0).collect::<Vec<_>>()
        };
        let (rows, columns) = (chosen(&rows), chosen(&columns));
        if rows.is_empty() {
            return Ok(None);
        }
        let by_rows = rows.len() * width <= columns.len() * out;
        let (side, index) = if by_rows { (Side::Output, rows) } else { (Side::Input, columns) };
        let delta = trained.select(axis(side), &index) - base.select(axis(side), &index);
        Self::new(base.dim(), side, index, delta).map(Some)
    }

    /// (out, in) of the weight.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Which rows or columns.
    pub fn place(&self) -> &SlicePlace {
        &self.place
    }

    /// Their differences, `k x in` or `out x k`.
    pub fn delta(&self) -> ArrayView2<'_, T> {
        self.delta.view()
    }

    /// weight += update.
    pub fn add_to(&self, weight: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        cost.elementwise += self.delta.len() as u64;
        match self.place.side {
            Side::Output => {
                for (k, &i) in self.place.index.iter().enumerate() {
                    let mut row = weight.row_mut(i);
                    row += &self.delta.row(k);
                }
            }
            Side::Input => {
                for (mut row, delta) in weight.rows_mut().into_iter().zip(self.delta.rows()) {
                    for (&j, d) in self.place.index.iter().zip(delta) {
                        row[j] += *d;
                    }
                }
            }
        }
    }

    /// y += x update^T.
    pub fn forward_add(&self, x: ArrayView2<T>, y: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        let index = &self.place.index;
        match self.place.side {
            Side::Output => {
                let part = parallel_product(x, self.delta.t(), cost);
                for (mut y, part) in y.rows_mut().into_iter().zip(part.rows()) {
                    for (&i, p) in index.iter().zip(part) {
                        y[i] += *p;
                    }
                }
            }
            Side::Input => {
                let mut chosen = Array2::zeros((x.nrows(), index.len()));
                gather_columns(x, index, &mut chosen);
                parallel_product_into(T::one(), chosen.view(), self.delta.t(), T::one(), y, cost);
            }
        }
    }

    /// total += factor * this; the place of `total` holds every index of this.
    pub(super) fn add_scaled_into(&self, factor: T, total: &mut Self) {
        let axis = axis(self.place.side);
        for (k, i) in self.place.index.iter().enumerate() {
            if let Ok(at) = total.place.index.binary_search(i) {
                total
                    .delta
                    .index_axis_mut(axis, at)
                    .scaled_add(factor, &self.delta.index_axis(axis, k));
            }
        }
    }
}
