//! Products with a tile straight from its rows, for the tiled passes of attention.
//!
//! A general GEMM first copies (packs) both operands so that its inner loop reads them in order. In
//! a tiled pass one operand is a tile just computed, used with few columns before it is
//! overwritten: with 8 or 16 columns the copy costs as much as the arithmetic. These kernels keep a
//! block of the result in registers and read both operands where they lie: a row of one as whole
//! registers, an entry of the other as a broadcast. They took the streaming gradient at L = 4096,
//! d = 64, r = 8 from 97 to 80 ms on one thread. Products with more than [`SKINNY`] columns go to
//! the general GEMM, which was 7% faster there.
//!
//! Sums run in an order that depends on the shapes alone, not on the instruction set or the number
//! of threads.

use super::Real;
use super::gemm::multiply;
use crate::cost::Cost;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use pulp::{Arch, Simd, WithSimd};

/// Widest small side that the kernels here take.
pub const SKINNY: usize = 32;

/// out += left^T tile.
///
/// Shapes: left `q x c`, tile `q x k`, both contiguous; out `c x k` with contiguous rows (it may be
/// a block of columns of a wider array). Anything else is an internal error and panics.
pub fn add_transposed_times_tile<T: Real>(
    left: ArrayView2<T>,
    tile: ArrayView2<T>,
    mut out: ArrayViewMut2<T>,
    cost: &mut Cost,
) {
    let (columns, width) = (left.ncols(), tile.ncols());
    assert!(
        left.nrows() == tile.nrows() && out.dim() == (columns, width),
        "shapes of a tile product"
    );
    cost.product(columns, left.nrows(), width);
    if columns > SKINNY {
        return multiply(T::one(), &left.t(), &tile, T::one(), &mut out);
    }
    if tile.is_empty() {
        return;
    }
    let (left, tile) = (contiguous(&left), contiguous(&tile));
    let mut first = 0;
    while first < columns {
        let count = block_rows(columns - first);
        let (block, rest) = out.split_at(Axis(0), count);
        out = rest;
        let part = (left, columns, first, tile, width);
        match count {
            8 => TransposedTimes::<T, 8>::run(part, block),
            4 => TransposedTimes::<T, 4>::run(part, block),
            2 => TransposedTimes::<T, 2>::run(part, block),
            _ => TransposedTimes::<T, 1>::run(part, block),
        }
        first += count;
    }
}

/// Rows of the result that one pass over the tile keeps in registers.
fn block_rows(remaining: usize) -> usize {
    match remaining {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

#[track_caller]
fn contiguous<'a, T>(view: &ArrayView2<'a, T>) -> &'a [T] {
    match view.to_slice() {
        Some(entries) => entries,
        None => panic!("tile products work on row-major operands"),
    }
}

/// The rows of a block, each contiguous.
#[track_caller]
fn rows<T, const N: usize>(block: ArrayViewMut2<'_, T>) -> [&'_ mut [T]; N] {
    let mut rest = Some(block);
    std::array::from_fn(|_| {
        let (row, tail) = rest.take().map(|r| r.split_at(Axis(0), 1)).unzip();
        rest = tail;
        row.and_then(|row| row.into_slice())
            .unwrap_or_else(|| panic!("tile products write contiguous rows"))
    })
}

/// N rows of left^T tile: columns `first..first + N` of `left`.
struct TransposedTimes<'a, T, const N: usize> {
    left: &'a [T],
    left_columns: usize,
    first: usize,
    tile: &'a [T],
    width: usize,
    out: [&'a mut [T]; N],
}

impl<T: Real, const N: usize> TransposedTimes<'_, T, N> {
    fn run(
        (left, left_columns, first, tile, width): (&[T], usize, usize, &[T], usize),
        out: ArrayViewMut2<T>,
    ) {
        Arch::new().dispatch(TransposedTimes::<T, N> {
            left,
            left_columns,
            first,
            tile,
            width,
            out: rows(out),
        });
    }

    /// Adds to the columns from `at` on, V registers wide.
    #[inline(always)]
    fn registers<S: Simd, const V: usize>(&mut self, simd: S, at: usize) {
        let end = at + V * T::lanes::<S>();
        let mut sums = [[T::splat(simd, T::zero()); V]; N];
        for (sums, out) in sums.iter_mut().zip(&self.out) {
            sums.copy_from_slice(&T::split::<S>(&out[at..end]).0[..V]);
        }
        let tile_rows = self.tile.chunks_exact(self.width);
        for (tile_row, left_row) in tile_rows.zip(self.left.chunks_exact(self.left_columns)) {
            let entries = &T::split::<S>(&tile_row[at..end]).0[..V];
            let weights = &left_row[self.first..self.first + N];
            for n in 0..N {
                let weight = T::splat(simd, weights[n]);
                for v in 0..V {
                    sums[n][v] = T::fused_multiply_add(simd, entries[v], weight, sums[n][v]);
                }
            }
        }
        for (sums, out) in sums.iter().zip(&mut self.out) {
            T::split_mut::<S>(&mut out[at..end]).0[..V].copy_from_slice(sums);
        }
    }

    /// Adds to the columns from `at` to the end, fewer than one register.
    #[inline(always)]
    fn remainder<S: Simd>(&mut self, simd: S, at: usize) {
        let mut sums = [T::splat(simd, T::zero()); N];
        for (sum, out) in sums.iter_mut().zip(&self.out) {
            *sum = T::load_part(simd, &out[at..]);
        }
        let tile_rows = self.tile.chunks_exact(self.width);
        for (tile_row, left_row) in tile_rows.zip(self.left.chunks_exact(self.left_columns)) {
            let entries = T::load_part(simd, &tile_row[at..]);
            let weights = &left_row[self.first..self.first + N];
            for n in 0..N {
                sums[n] = T::fused_multiply_add(simd, entries, T::splat(simd, weights[n]), sums[n]);
            }
        }
        for (sum, out) in sums.iter().zip(&mut self.out) {
            T::store_part(simd, &mut out[at..], *sum);
        }
    }
}

impl<T: Real, const N: usize> WithSimd for TransposedTimes<'_, T, N> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let lanes = T::lanes::<S>();
        let mut at = 0;
        while at + 2 * lanes <= self.width {
            self.registers::<S, 2>(simd, at);
            at += 2 * lanes;
        }
        if at + lanes <= self.width {
            self.registers::<S, 1>(simd, at);
            at += lanes;
        }
        if at < self.width {
            self.remainder(simd, at);
        }
    }
}

/// A `k x c` right operand whose rows are padded with zeros to whole registers.
pub struct Padded<T> {
    entries: Array2<T>,
    columns: usize,
}

impl<T: Real> Padded<T> {
    /// Rows come in multiples of this many entries: whole registers on every instruction set, f32
    /// and f64.
    const STEP: usize = 16;

    /// A padded copy.
    pub fn new(a: ArrayView2<T>) -> Self {
        let mut entries = Array2::zeros((a.nrows(), a.ncols().next_multiple_of(Self::STEP)));
        entries.slice_mut(s![.., ..a.ncols()]).assign(&a);
        Self { entries, columns: a.ncols() }
    }

    /// c: columns without the padding.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Entries held, padding included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// out = tile right (+ out, when accumulating), with the rows `range` and the first columns of
/// `right`.
///
/// Shapes: tile `q x k` contiguous, `range` of length k, out `q x c` contiguous with c at most the
/// columns of `right`. Anything else is an internal error and panics.
pub fn tile_times<T: Real>(
    tile: ArrayView2<T>,
    right: &Padded<T>,
    range: std::ops::Range<usize>,
    accumulate: bool,
    mut out: ArrayViewMut2<T>,
    cost: &mut Cost,
) {
    let (rows, width) = tile.dim();
    let columns = out.ncols();
    assert!(
        range.len() == width && out.nrows() == rows && columns <= right.columns,
        "shapes of a tile product"
    );
    cost.product(rows, width, columns);
    if width.min(columns) > SKINNY {
        let beta = if accumulate { T::one() } else { T::zero() };
        return multiply(
            T::one(),
            &tile,
            &right.entries.slice(s![range, ..columns]),
            beta,
            &mut out,
        );
    }
    let Some(out) = out.as_slice_mut() else { panic!("tile products write contiguous tiles") };
    if width == 0 && !accumulate {
        out.fill(T::zero());
    }
    if width == 0 || out.is_empty() {
        return;
    }
    let (tile, right_columns) = (contiguous(&tile), right.entries.ncols());
    let right = contiguous(&right.entries.slice(s![range, ..]));
    Arch::new().dispatch(TileTimes { tile, width, right, right_columns, out, columns, accumulate });
}

struct TileTimes<'a, T> {
    tile: &'a [T],
    width: usize,
    right: &'a [T],
    right_columns: usize,
    out: &'a mut [T],
    columns: usize,
    accumulate: bool,
}

impl<T: Real> TileTimes<'_, T> {
    /// V registers of N rows of the product, from column `at` on.
    #[inline(always)]
    fn block<S: Simd, const N: usize, const V: usize>(
        &self,
        simd: S,
        tile: &[T],
        out: &mut [T],
        at: usize,
    ) {
        let lanes = T::lanes::<S>();
        let rows: [&[T]; N] = std::array::from_fn(|n| &tile[n * self.width..][..self.width]);
        let mut sums = [[T::splat(simd, T::zero()); V]; N];
        for (j, right) in self.right.chunks_exact(self.right_columns).enumerate().take(self.width) {
            let entries = &T::split::<S>(&right[at..at + V * lanes]).0[..V];
            for n in 0..N {
                let entry = T::splat(simd, rows[n][j]);
                for v in 0..V {
                    sums[n][v] = T::fused_multiply_add(simd, entry, entries[v], sums[n][v]);
                }
            }
        }
        for (sums, out) in sums.iter().zip(out.chunks_exact_mut(self.columns)) {
            for (&sum, out) in sums.iter().zip(out[at..].chunks_mut(lanes)) {
                let one = T::splat(simd, T::one());
                match T::split_mut::<S>(out) {
                    ([out], _) if self.accumulate => {
                        *out = T::fused_multiply_add(simd, one, sum, *out)
                    }
                    ([out], _) => *out = sum,
                    (_, part) => {
                        let before = if self.accumulate {
                            T::load_part(simd, part)
                        } else {
                            T::splat(simd, T::zero())
                        };
                        T::store_part(simd, part, T::fused_multiply_add(simd, one, sum, before));
                    }
                }
            }
        }
    }

    /// V registers of every row: their columns of `right` stay in the first-level cache.
    #[inline(always)]
    fn registers<S: Simd, const V: usize>(&self, simd: S, out: &mut [T], at: usize) {
        let mut blocks = self.tile.chunks_exact(8 * self.width);
        let mut out_blocks = out.chunks_exact_mut(8 * self.columns);
        for (tile, out) in (&mut blocks).zip(&mut out_blocks) {
            self.block::<S, 8, V>(simd, tile, out, at);
        }
        let rest = blocks.remainder().chunks_exact(self.width);
        for (tile, out) in rest.zip(out_blocks.into_remainder().chunks_exact_mut(self.columns)) {
            self.block::<S, 1, V>(simd, tile, out, at);
        }
    }
}

impl<T: Real> WithSimd for TileTimes<'_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let out = std::mem::take(&mut self.out);
        let lanes = T::lanes::<S>();
        let mut at = 0;
        while at < self.columns {
            // Sixteen sums and two operands need more than the sixteen registers of the older sets.
            if S::REGISTER_COUNT >= 32 && at + lanes < self.columns {
                self.registers::<S, 2>(simd, out, at);
                at += 2 * lanes;
            } else {
                self.registers::<S, 1>(simd, out, at);
                at += lanes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize, j: usize) -> f64 {
        ((i * 7 + j * 3) % 11) as f64 - 5.0
    }

    /// Small integers: every partial sum is exact, so both kernels equal naive loops to the last
    /// bit.
    fn agree<T: Real>(rows: usize, width: usize, columns: usize) {
        let tile = Array2::from_shape_fn((rows, width), |(i, j)| T::of(value(i, j)));
        let left = Array2::from_shape_fn((rows, columns), |(i, j)| T::of(value(i + 2, 5 * j)));
        let right = Array2::from_shape_fn((width + 3, columns), |(i, j)| T::of(value(i, j + 1)));
        let mut cost = Cost::default();
        // Columns 2.. of a wider accumulator, as the key side of a query tile uses it.
        let mut key_side = Array2::from_elem((columns, width + 4), T::of(2.0));
        add_transposed_times_tile(
            left.view(),
            tile.view(),
            key_side.slice_mut(s![.., 2..width + 2]),
            &mut cost,
        );
        for ((c, k), &x) in key_side.indexed_iter() {
            let sum: f64 = match k.checked_sub(2).filter(|&k| k < width) {
                Some(k) => (0..rows).map(|q| left[[q, c]].widen() * tile[[q, k]].widen()).sum(),
                None => 0.0,
            };
            assert!((x.widen() - 2.0 - sum).abs() < 0.5, "{rows} x {width}, {columns} columns");
        }
        let padded = Padded::new(right.view());
        let mut out = Array2::from_elem((rows, columns), T::of(7.0));
        for accumulate in [false, true] {
            tile_times(tile.view(), &padded, 3..width + 3, accumulate, out.view_mut(), &mut cost);
        }
        for q in 0..rows {
            for c in 0..columns {
                let sum: f64 =
                    (0..width).map(|k| tile[[q, k]].widen() * right[[k + 3, c]].widen()).sum();
                assert!(
                    (out[[q, c]].widen() - 2.0 * sum).abs() < 0.5,
                    "{rows} x {width}, {columns} columns"
                );
            }
        }
        assert_eq!(cost.multiply_adds, 3 * (rows * width * columns) as u64);
    }

    #[test]
    fn both_kernels_agree_with_naive_loops_at_every_remainder() {
        for (rows, width) in [(1, 1), (7, 5), (8, 16), (19, 33), (64, 50), (3, 64), (40, 15)] {
            for columns in [0, 1, 2, 3, 8, 13, 16, 17, 32, 33, 40] {
                agree::<f32>(rows, width, columns);
                agree::<f64>(rows, width, columns);
            }
        }
    }
}
