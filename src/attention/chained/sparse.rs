//! The part of the chain that treats single pairs: with E^ = Phi Psi^T + C, everything linear in E^
//! gains a sum over C.
//!
//! P^ and dS^ are D^-1 E^ times row and column quantities, so a corrected pair adds C_ij to the
//! denominator, C_ij [V | R]_j to the output, and once G^ and delta^ are known C_ij (G^_i.V_j -
//! delta^_i) / D_i times Z_j or W_i to the products with dS^: d_v + m operations a pair, as in the
//! exact gradient.

use super::tile::{Chain, QueryTile};
use crate::cost::Cost;
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use std::ops::Range;

/// What the key side needs of every query: upstream gradient, [1 / D | delta], and N of P^T N.
pub(super) struct QuerySide<'a, T> {
    pub upstream: ArrayView2<'a, T>,
    pub row_state: ArrayView2<'a, T>,
    pub value_left: Array2<T>,
}

impl<'a, T: Real> QuerySide<'a, T> {
    /// `None` when no pair is corrected.
    pub fn new(
        chain: &Chain<T>,
        upstream: ArrayView2<'a, T>,
        row_state: ArrayView2<'a, T>,
        cost: &mut Cost,
    ) -> Option<Self> {
        chain.map.sparse().filter(|sparse| !sparse.is_empty())?;
        let value_left = chain.contraction.value_left(chain.problem, upstream, cost);
        Some(Self { upstream, row_state, value_left })
    }
}

impl<T: Real> Chain<'_, T> {
    /// Adds C [1 | V | R] to the products of a query tile with the right moments; keys below `end`
    /// only.
    pub fn add_corrected_rows(
        &self,
        range: Range<usize>,
        end: usize,
        sums: &mut Array2<T>,
        cost: &mut Cost,
    ) {
        let Some(sparse) = self.map.sparse() else { return };
        let (value, right) = (&self.projected.qkv.value, &self.contraction.value_right);
        let split = 1 + self.widths.value;
        let mut pairs = 0;
        for (i, mut row) in range.zip(sums.rows_mut()) {
            for (j, x) in sparse.row(i).filter(|(j, _)| *j < end) {
                row[0] += x;
                row.slice_mut(s![1..split]).scaled_add(x, &value.row(j));
                row.slice_mut(s![split..split + right.ncols()]).scaled_add(x, &right.row(j));
                pairs += 1;
            }
        }
        cost.multiply_adds += (pairs * (self.widths.value + right.ncols())) as u64;
    }

    /// Adds the corrected pairs' part of dS Z to a finished query tile; keys below `end` only.
    pub fn add_corrected_scores(&self, end: usize, tile: &mut QueryTile<T>, cost: &mut Cost) {
        let Some(sparse) = self.map.sparse() else { return };
        let (value, right) = (&self.projected.qkv.value, &self.contraction.score_right);
        let mut pairs = 0;
        for (i, mut row) in tile.range.clone().zip(tile.score_right.rows_mut()) {
            let local = i - tile.range.start;
            let upstream = tile.upstream.row(local);
            let (inverse, delta) = (tile.row_state[[local, 0]], tile.row_state[[local, 1]]);
            for (j, x) in sparse.row(i).filter(|(j, _)| *j < end) {
                row.scaled_add(inverse * x * (upstream.dot(&value.row(j)) - delta), &right.row(j));
                pairs += 1;
            }
        }
        cost.multiply_adds += (pairs * (self.widths.value + right.ncols())) as u64;
    }

    /// Adds the corrected pairs' part of [dS^T W | P^T N] to key rows; queries from `first` on
    /// only.
    pub fn add_corrected_keys(
        &self,
        range: Range<usize>,
        first: usize,
        side: Option<&QuerySide<T>>,
        out: &mut ArrayViewMut2<T>,
        cost: &mut Cost,
    ) {
        let (Some(sparse), Some(side)) = (self.map.sparse(), side) else { return };
        let left = &self.contraction.score_left;
        let split = self.widths.score_left;
        let mut pairs = 0;
        for (j, mut row) in range.zip(out.rows_mut()) {
            let value = self.projected.qkv.value.row(j);
            for (i, x) in sparse.column(j).filter(|(i, _)| *i >= first) {
                let scaled = side.row_state[[i, 0]] * x;
                let score = scaled * (side.upstream.row(i).dot(&value) - side.row_state[[i, 1]]);
                row.slice_mut(s![..split]).scaled_add(score, &left.row(i));
                row.slice_mut(s![split..]).scaled_add(scaled, &side.value_left.row(i));
                pairs += 1;
            }
        }
        cost.multiply_adds += (pairs * (self.widths.value + split + self.widths.value_left)) as u64;
    }
}
