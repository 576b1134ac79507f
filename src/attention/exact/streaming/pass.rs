//! What both passes over tiles read: queries against one block of keys and values.

use super::Tile;
use crate::attention::problem::{Mask, SoftmaxKind};
use crate::cost::Cost;
use crate::linalg::Real;
use crate::linalg::attention_tile::hide_future;
use crate::linalg::tile::{Padded, tile_times};
use ndarray::{ArrayView2, ArrayViewMut2, Axis, parallel::prelude::*};

/// What both passes read.
pub(crate) struct Pass<'a, T> {
    /// beta Q.
    pub(super) scaled_query: ArrayView2<'a, T>,
    /// K^T and V^T of each tile of keys.
    pub(super) key_transposed: Vec<Padded<T>>,
    pub(super) value_transposed: Vec<Padded<T>>,
    pub(super) value: ArrayView2<'a, T>,
    pub(super) mask: Mask,
    pub(super) softmax: SoftmaxKind,
    pub(super) tile: Tile,
}

impl<'a, T: Real> Pass<'a, T> {
    /// Queries times beta against keys and values.
    pub fn new(
        scaled_query: ArrayView2<'a, T>,
        key: ArrayView2<T>,
        value: ArrayView2<'a, T>,
        mask: Mask,
        softmax: SoftmaxKind,
        tile: Tile,
    ) -> Self {
        Pass {
            scaled_query,
            key_transposed: transposed_tiles(key, tile.keys),
            value_transposed: transposed_tiles(value, tile.keys),
            value,
            mask,
            softmax,
            // No wider than the problem, so that short sequences do not pay for full workspaces.
            tile: Tile {
                queries: tile.queries.min(scaled_query.nrows()),
                keys: tile.keys.min(key.nrows()),
            },
        }
    }

    /// Numbers held.
    pub fn len(&self) -> usize {
        let transposed = self.key_transposed.iter().chain(&self.value_transposed);
        self.scaled_query.len() + transposed.map(Padded::len).sum::<usize>()
    }

    /// Number of keys that some row of the query tile starting at `first` sees.
    pub(super) fn visible_keys(&self, first: usize, rows: usize) -> usize {
        match self.mask {
            Mask::Full => self.value.nrows(),
            Mask::Causal => first + rows,
        }
    }

    /// Scores of a tile, negative infinity where masked.
    pub(super) fn scores(
        &self,
        first: usize,
        query: ArrayView2<T>,
        keys: std::ops::Range<usize>,
        out: &mut ArrayViewMut2<T>,
        cost: &mut Cost,
    ) {
        let right = &self.key_transposed[keys.start / self.tile.keys];
        tile_times(query, right, 0..query.ncols(), false, out.view_mut(), cost);
        if self.mask == Mask::Causal {
            hide_future(out, first, keys.start);
        }
    }
}

/// The transposes of the tiles of keys.
fn transposed_tiles<T: Real>(a: ArrayView2<T>, keys: usize) -> Vec<Padded<T>> {
    a.axis_chunks_iter(Axis(0), keys).into_par_iter().map(|tile| Padded::new(tile.t())).collect()
}
