//! The gradient of a sparse P^ alone: every kept pair as in the exact gradient, and nothing else.
//!
//! One pass over the queries: [1 | V | R] summed over a row's pairs give D, O and P R; then G and
//! delta; then each pair adds dS_ij Z_j to its row and dS_ij W_i, P_ij N_i to its key, with dS_ij =
//! P_ij (G_i.V_j - delta_i). That is 2 d_v + the columns of R, Z, W and N in multiply-adds a pair,
//! on O(L k) numbers.

use super::full::grouped;
use super::query_results::QueryResults;
use super::tile::{Chain, Chained, QueryTile};
use crate::attention::factorization::SparseCorrection;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::linalg::elementwise::{Kernel, vectorized};
use crate::linalg::reduce::ordered_sum;
use ndarray::{Array2, ArrayView2, s};

/// Records begin at multiples of this many numbers, so that loops over them are whole vectors.
const LANES: usize = 8;

pub(super) fn products<T: Real>(chain: &Chain<T>, cost: &mut Cost) -> Result<Chained<T>> {
    let w = chain.widths;
    let none = SparseCorrection::default();
    let pairs = chain.map.sparse().unwrap_or(&none);
    let (queries, keys) = (chain.problem.num_queries(), chain.problem.num_keys());
    let value = &chain.projected.qkv.value;
    let values = Records::new([value.view(), chain.contraction.value_right.view()]);
    let right = Records::new([chain.contraction.score_right.view()]);
    let left = Records::new([chain.contraction.score_left.view()]);
    let (score_width, value_width) = (left.width, padded(w.value_left));
    cost.hold(values.entries.len() + right.entries.len() + left.entries.len());

    let mut results = QueryResults::new(queries, w, cost);
    let sums = ordered_sum(
        grouped(results.tiles()),
        (keys, score_width + value_width),
        cost,
        |group, sum, cost| {
            for tile in group {
                let rows = tile.range.len();
                let mut outputs = Array2::zeros((rows, 1 + w.value + w.value_right));
                let first = tile.range.start;
                vectorized(Outputs { pairs, first, values: &values, out: &mut outputs });
                chain.finish_outputs(outputs.view(), tile)?;
                let value_left =
                    chain.contraction.value_left(chain.problem, tile.upstream.view(), cost);
                let upstream = Records::new([tile.upstream.view()]);
                let value_left = Records::new([value_left.view()]);
                let kept = (0..rows).map(|i| pairs.row_slices(first + i).0.len()).sum::<usize>();
                let scores = Scores {
                    pairs,
                    tile,
                    values: &values,
                    right: &right,
                    left: &left,
                    upstream,
                    value_left,
                };
                vectorized(ScoresInto { scores, sum });
                cost.elementwise += (3 * kept + rows * (1 + 3 * w.value + w.value_right)) as u64;
                cost.multiply_adds += (kept
                    * (2 * w.value + w.value_right + w.score_right + w.score_left + w.value_left))
                    as u64;
            }
            Ok(())
        },
    )?;
    let mut key_side = Array2::zeros((keys, w.score_left + w.value_left));
    key_side.slice_mut(s![.., ..w.score_left]).assign(&sums.slice(s![.., ..w.score_left]));
    let values_left = sums.slice(s![.., score_width..score_width + w.value_left]);
    key_side.slice_mut(s![.., w.score_left..]).assign(&values_left);
    cost.hold(key_side.len());
    Ok(results.with_key_side(&key_side, w))
}

fn padded(width: usize) -> usize {
    width.next_multiple_of(LANES)
}

/// Rows of matrices side by side, each filled up with zeros.
struct Records<T> {
    width: usize,
    entries: Vec<T>,
}

impl<T: Real> Records<T> {
    fn new<const N: usize>(parts: [ArrayView2<T>; N]) -> Self {
        let rows = parts.first().map_or(0, ArrayView2::nrows);
        let width = padded(parts.iter().map(ArrayView2::ncols).sum());
        let mut entries = vec![T::zero(); rows * width];
        let mut start = 0;
        for part in parts {
            for (i, row) in part.rows().into_iter().enumerate() {
                let at = i * width + start;
                entries[at..at + row.len()].iter_mut().zip(row).for_each(|(e, &x)| *e = x);
            }
            start += part.ncols();
        }
        Self { width, entries }
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &[T] {
        &self.entries[i * self.width..][..self.width]
    }
}

/// out += factor row; both whole vectors.
#[inline(always)]
fn add_scaled<T: Real>(out: &mut [T], factor: T, row: &[T]) {
    for (out, row) in out.chunks_exact_mut(LANES).zip(row.chunks_exact(LANES)) {
        for (o, &x) in out.iter_mut().zip(row) {
            *o = factor.mul_add(x, *o);
        }
    }
}

/// a . b over the length of a; whole vectors.
#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::zero(); LANES];
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(a).zip(b) {
            *lane = x.mul_add(y, *lane);
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

/// [1 | V | R] summed over the pairs of each row.
struct Outputs<'a, T> {
    pairs: &'a SparseCorrection<T>,
    first: usize,
    values: &'a Records<T>,
    out: &'a mut Array2<T>,
}

impl<T: Real> Kernel for Outputs<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut sums = vec![T::zero(); self.values.width];
        for (i, mut out) in self.out.rows_mut().into_iter().enumerate() {
            sums.fill(T::zero());
            let mut total = T::zero();
            let (keys, weights) = self.pairs.row_slices(self.first + i);
            for (&j, &p) in keys.iter().zip(weights) {
                total += p;
                add_scaled(&mut sums, p, self.values.row(j as usize));
            }
            out[0] = total;
            out.iter_mut().skip(1).zip(&sums).for_each(|(o, &x)| *o = x);
        }
    }
}

/// What the second half of a tile reads.
struct Scores<'a, 'b, T> {
    pairs: &'a SparseCorrection<T>,
    tile: &'a mut QueryTile<'b, T>,
    values: &'a Records<T>,
    right: &'a Records<T>,
    left: &'a Records<T>,
    upstream: Records<T>,
    value_left: Records<T>,
}

/// dS Z of a tile's rows, and their part of [dS^T W | P^T N] added to `sum`.
struct ScoresInto<'a, 'b, T> {
    scores: Scores<'a, 'b, T>,
    sum: &'a mut Array2<T>,
}

impl<T: Real> Kernel for ScoresInto<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Scores { pairs, tile, values, right, left, upstream, value_left } = self.scores;
        let width = self.sum.ncols();
        let Some(sum) = self.sum.as_slice_mut() else {
            unreachable!("a fresh matrix is row-major")
        };
        let mut row_sum = vec![T::zero(); right.width];
        for (local, i) in tile.range.clone().enumerate() {
            let (inverse, delta) = (tile.row_state[[local, 0]], tile.row_state[[local, 1]]);
            let (upstream, value_left, left) =
                (upstream.row(local), value_left.row(local), left.row(i));
            row_sum.fill(T::zero());
            let (keys, weights) = pairs.row_slices(i);
            for (&j, &weight) in keys.iter().zip(weights) {
                let j = j as usize;
                let p = weight * inverse;
                let ds = p * (dot(upstream, values.row(j)) - delta);
                add_scaled(&mut row_sum, ds, right.row(j));
                let (scores, value) = sum[j * width..][..width].split_at_mut(left.len());
                add_scaled(scores, ds, left);
                add_scaled(value, p, value_left);
            }
            tile.score_right.row_mut(local).iter_mut().zip(&row_sum).for_each(|(o, &x)| *o = x);
        }
    }
}
