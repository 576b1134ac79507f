//! Features that are exponentials of linear functions: exp(W x + offset - shift), column by column.
//!
//! The shift of a column is the largest exponent of its row of features, so that nothing overflows
//! and the largest feature is 1; the feature map reports it as a row shift, which the softmax does
//! not see.

use crate::cost::Cost;
use crate::linalg::elementwise::exp_columns;
use crate::linalg::{Real, product_into};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, parallel::prelude::*};

/// k linear functions of rows less a mean: W (x - mean) + offset.
#[derive(Debug, Clone)]
pub(super) struct Exponents<T> {
    /// W, `k x d`.
    pub weights: Array2<T>,
    /// Added to every function, `k`.
    pub offset: Array1<T>,
    /// Taken from every row first, `d`.
    pub mean: Array1<T>,
}

/// Rows of one task of [`Exponents::largest`].
const ROWS: usize = 256;

impl<T: Real> Exponents<T> {
    /// Fills `out` (`k x rows`) with the exponents.
    fn fill(&self, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        for (mut row, &offset) in out.rows_mut().into_iter().zip(&self.offset) {
            row.fill(offset);
        }
        let centered = &rows - &self.mean;
        product_into(self.weights.view(), centered.t(), T::one(), &mut out, &mut Cost::default());
    }

    /// Fills `out` (`k x rows`) with exp(exponent - shift of the column).
    pub fn features(&self, rows: ArrayView2<T>, shift: &[T], mut out: ArrayViewMut2<T>) {
        self.fill(rows, out.view_mut());
        exp_columns(out, shift);
    }

    /// The operations of [`Exponents::features`].
    pub fn count_features(&self, rows: usize, cost: &mut Cost) {
        cost.product(self.weights.nrows(), self.weights.ncols(), rows);
        cost.exponentials += (self.weights.nrows() * rows) as u64;
    }

    /// Largest exponent of each row, by tiles. O(L k d) operations, counted.
    pub fn largest(&self, rows: ArrayView2<T>, cost: &mut Cost) -> Vec<T> {
        cost.product(rows.nrows(), rows.ncols(), self.weights.nrows());
        let parts: Vec<Vec<T>> = rows
            .axis_chunks_iter(Axis(0), ROWS)
            .into_par_iter()
            .map(|rows| {
                let mut tile = Array2::zeros((self.weights.nrows(), rows.nrows()));
                self.fill(rows, tile.view_mut());
                let mut largest = vec![T::neg_infinity(); rows.nrows()];
                for row in tile.rows() {
                    for (m, &x) in largest.iter_mut().zip(row) {
                        *m = if x > *m { x } else { *m };
                    }
                }
                largest
            })
            .collect();
        parts.concat()
    }
}
