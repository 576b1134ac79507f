//! What the chain produces, as whole arrays that are written tile by tile.

use super::tile::{Chained, QueryTile, TILE, Widths};
use crate::attention::contraction::Products;
use crate::cost::Cost;
use crate::linalg::Real;
use ndarray::{Array2, Axis, s};

/// The query side of a head.
pub(super) struct QueryResults<T> {
    output: Array2<T>,
    value_right: Array2<T>,
    score_right: Array2<T>,
    pub upstream: Array2<T>,
    /// [1 / D | delta].
    pub row_state: Array2<T>,
}

impl<T: Real> QueryResults<T> {
    pub fn new(queries: usize, w: Widths, cost: &mut Cost) -> Self {
        cost.hold(queries * (2 * w.value + w.value_right + w.score_right + 2));
        Self {
            output: Array2::zeros((queries, w.value)),
            value_right: Array2::zeros((queries, w.value_right)),
            score_right: Array2::zeros((queries, w.score_right)),
            upstream: Array2::zeros((queries, w.value)),
            row_state: Array2::zeros((queries, 2)),
        }
    }

    /// Tiles of [`TILE`] rows that can be written independently, in order.
    pub fn tiles(&mut self) -> Vec<QueryTile<'_, T>> {
        fn chunks<T>(a: &mut Array2<T>) -> ndarray::iter::AxisChunksIterMut<'_, T, ndarray::Ix2> {
            a.axis_chunks_iter_mut(Axis(0), TILE)
        }
        chunks(&mut self.output)
            .zip(chunks(&mut self.value_right))
            .zip(chunks(&mut self.score_right))
            .zip(chunks(&mut self.upstream))
            .zip(chunks(&mut self.row_state))
            .enumerate()
            .map(|(index, ((((output, value_right), score_right), upstream), row_state))| {
                let range = index * TILE..index * TILE + output.nrows();
                QueryTile { range, output, value_right, score_right, upstream, row_state }
            })
            .collect()
    }

    /// Everything, with the key side [dS^T W | P^T N] beside it.
    pub fn with_key_side(self, key_side: &Array2<T>, w: Widths) -> Chained<T> {
        let products = Products {
            output: self.output,
            value_right: self.value_right,
            score_right: self.score_right,
            score_left: key_side.slice(s![.., ..w.score_left]).to_owned(),
            value_left: key_side.slice(s![.., w.score_left..]).to_owned(),
        };
        Chained { products, upstream: self.upstream, row_state: self.row_state }
    }
}
