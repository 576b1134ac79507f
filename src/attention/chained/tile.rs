//! What one row tile does: gather the columns that moments are made of, and contract moments into
//! outputs.

use crate::attention::contraction::{Contraction, Products};
use crate::attention::factorization::FeatureMap;
use crate::attention::problem::{AttentionProblem, Objective, Projected, SoftmaxKind};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::khatri_rao::{contract_into, face_splitting_into};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use std::ops::Range;

/// Token rows of one tile.
pub(crate) const TILE: usize = 256;

/// Everything the passes read.
pub(super) struct Chain<'a, T> {
    pub problem: &'a AttentionProblem<T>,
    pub projected: &'a Projected<T>,
    pub contraction: &'a Contraction<T>,
    pub map: &'a dyn FeatureMap<T>,
    pub widths: Widths,
}

/// What the passes leave.
pub(super) struct Chained<T> {
    pub products: Products<T>,
    /// G^.
    pub upstream: Array2<T>,
    /// [1 / D | delta] of every query.
    pub row_state: Array2<T>,
}

/// Column counts: d_v, R, Z, W, N.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widths {
    pub value: usize,
    pub value_right: usize,
    pub score_right: usize,
    pub score_left: usize,
    pub value_left: usize,
}

impl Widths {
    /// Columns of the right moments Psi^T [1 | V | R | V' * Z].
    pub fn right(&self) -> usize {
        1 + self.value + self.value_right + (self.value + 1) * self.score_right
    }

    /// Columns of the left moments U^T [N | G' * W].
    pub fn left(&self) -> usize {
        self.value_left + (self.value + 1) * self.score_left
    }
}

/// Row-owned results of the query side.
pub(super) struct QueryTile<'a, T> {
    pub range: Range<usize>,
    pub output: ArrayViewMut2<'a, T>,
    pub value_right: ArrayViewMut2<'a, T>,
    pub score_right: ArrayViewMut2<'a, T>,
    pub upstream: ArrayViewMut2<'a, T>,
    /// [1 / D | delta].
    pub row_state: ArrayViewMut2<'a, T>,
}

impl<'a, T: Real> Chain<'a, T> {
    pub fn new(
        problem: &'a AttentionProblem<T>,
        projected: &'a Projected<T>,
        contraction: &'a Contraction<T>,
        map: &'a dyn FeatureMap<T>,
    ) -> Self {
        let widths = Widths {
            value: problem.value_dim(),
            value_right: contraction.value_right.ncols(),
            score_right: contraction.score_right.ncols(),
            score_left: contraction.score_left.ncols(),
            value_left: contraction.value_left_width(problem),
        };
        Self { problem, projected, contraction, map, widths }
    }

    /// Features of key rows, `k x rows`.
    pub fn key_features(&self, range: Range<usize>, cost: &mut Cost) -> Array2<T> {
        let mut out = Array2::zeros((self.map.rank(), range.len()));
        cost.elementwise += out.len() as u64;
        self.map.count_key_features(range.len(), cost);
        self.map.key_features(
            range.start,
            self.projected.qkv.key.slice(s![range, ..]),
            out.view_mut(),
        );
        out
    }

    /// Features of query rows, `k x rows`.
    pub fn query_features(&self, range: Range<usize>, cost: &mut Cost) -> Array2<T> {
        let mut out = Array2::zeros((self.map.rank(), range.len()));
        cost.elementwise += 2 * out.len() as u64;
        self.map.count_query_features(range.len(), cost);
        self.map.query_features(
            range.start,
            self.projected.qkv.query.slice(s![range, ..]),
            out.view_mut(),
        );
        out
    }

    /// [1 | V | R | V' * Z] for key rows.
    pub fn right_columns(&self, range: Range<usize>, cost: &mut Cost) -> Array2<T> {
        let w = self.widths;
        let rows = range.len();
        let mut out = Array2::zeros((rows, w.right()));
        out.column_mut(0).fill(T::one());
        let value = self.projected.qkv.value.slice(s![range.clone(), ..]);
        out.slice_mut(s![.., 1..=w.value]).assign(&value);
        let start = 1 + w.value + w.value_right;
        out.slice_mut(s![.., 1 + w.value..start])
            .assign(&self.contraction.value_right.slice(s![range.clone(), ..]));
        let z = self.contraction.score_right.slice(s![range, ..]);
        face_splitting_into(value, &vec![T::one(); rows], z, out.slice_mut(s![.., start..]));
        cost.elementwise += (rows * (w.value + 1) * w.score_right) as u64;
        out
    }

    /// [N | G' * W] / D for query rows, from the stored upstream gradient and row state.
    pub fn left_columns(
        &self,
        range: Range<usize>,
        upstream: ArrayView2<T>,
        row_state: ArrayView2<T>,
        cost: &mut Cost,
    ) -> Array2<T> {
        let w = self.widths;
        let rows = range.len();
        let mut out = Array2::zeros((rows, w.left()));
        out.slice_mut(s![.., ..w.value_left]).assign(&self.contraction.value_left(
            self.problem,
            upstream,
            cost,
        ));
        let left = self.contraction.score_left.slice(s![range, ..]);
        face_splitting_into(
            upstream,
            &negated_delta(row_state),
            left,
            out.slice_mut(s![.., w.value_left..]),
        );
        for (mut row, state) in out.rows_mut().into_iter().zip(row_state.rows()) {
            let inverse = state[0];
            row.mapv_inplace(|x| x * inverse);
        }
        cost.elementwise += (rows * (w.left() + (w.value + 1) * w.score_left)) as u64;
        out
    }

    /// Turns products with the right moments (`rows x right()`) into the query side's results.
    ///
    /// # Errors
    /// [`Error::NonPositiveDenominator`].
    pub fn finish_queries(
        &self,
        sums: ArrayView2<T>,
        tile: &mut QueryTile<T>,
        cost: &mut Cost,
    ) -> Result<()> {
        let w = self.widths;
        self.finish_outputs(sums, tile)?;
        let start = 1 + w.value + w.value_right;
        let last = negated_delta(tile.row_state.view());
        contract_into(
            tile.upstream.view(),
            &last,
            sums.slice(s![.., start..]),
            tile.score_right.view_mut(),
        );
        for (mut row, state) in tile.score_right.rows_mut().into_iter().zip(tile.row_state.rows()) {
            let inverse = state[0];
            row.mapv_inplace(|x| x * inverse);
        }
        cost.multiply_adds += (tile.range.len() * (w.value + 1) * w.score_right) as u64;
        cost.elementwise += (tile.range.len() * (w.right() + 2 * w.value)) as u64;
        Ok(())
    }

    /// The same for the first columns [1 | V | R] alone: outputs, upstream gradient and row state.
    ///
    /// # Errors
    /// [`Error::NonPositiveDenominator`].
    pub fn finish_outputs(&self, sums: ArrayView2<T>, tile: &mut QueryTile<T>) -> Result<()> {
        let w = self.widths;
        for i in 0..tile.range.len() {
            let row = tile.range.start + i;
            let extra = match self.problem.softmax() {
                SoftmaxKind::Standard => T::zero(),
                SoftmaxKind::One => {
                    self.map.row_shift().map_or(T::one(), |shift| (-shift[row]).exp())
                }
            };
            let denominator = sums[[i, 0]] + extra;
            if !(denominator > T::zero() && denominator.is_finite()) {
                return Err(Error::NonPositiveDenominator {
                    factorization: self.map.certificate().spec.clone(),
                    row,
                    value: denominator.widen(),
                });
            }
            let inverse = T::one() / denominator;
            let mut output = tile.output.row_mut(i);
            output.zip_mut_with(&sums.slice(s![i, 1..=w.value]), |o, &x| *o = x * inverse);
            let mut right = tile.value_right.row_mut(i);
            right.zip_mut_with(
                &sums.slice(s![i, 1 + w.value..1 + w.value + w.value_right]),
                |o, &x| *o = x * inverse,
            );
            let mut upstream = tile.upstream.row_mut(i);
            let given = self.problem.objective().tensor().row(row);
            match self.problem.objective() {
                Objective::Target(_) => ndarray::Zip::from(&mut upstream)
                    .and(&output)
                    .and(&given)
                    .for_each(|g, &o, &y| *g = o - y),
                Objective::UpstreamGradient(_) => upstream.assign(&given),
            }
            let delta = upstream.dot(&output);
            tile.row_state[[i, 0]] = inverse;
            tile.row_state[[i, 1]] = delta;
        }
        Ok(())
    }

    /// Adds products with the left moments (`rows x left()`) to the key side's results [dS^T W |
    /// P^T N].
    pub fn add_keys(
        &self,
        range: Range<usize>,
        sums: ArrayView2<T>,
        out: &mut ArrayViewMut2<T>,
        cost: &mut Cost,
    ) {
        let w = self.widths;
        let value = self.projected.qkv.value.slice(s![range.clone(), ..]);
        let (score, mut left) = out.view_mut().split_at(ndarray::Axis(1), w.score_left);
        left += &sums.slice(s![.., ..w.value_left]);
        contract_into(
            value,
            &vec![T::one(); range.len()],
            sums.slice(s![.., w.value_left..]),
            score,
        );
        cost.multiply_adds += (range.len() * (w.value + 1) * w.score_left) as u64;
    }
}

/// The last column of G' = [G | -delta].
fn negated_delta<T: Real>(row_state: ArrayView2<T>) -> Vec<T> {
    row_state.column(1).iter().map(|&delta| -delta).collect()
}
