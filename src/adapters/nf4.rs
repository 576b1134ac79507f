//! NF4: four-bit storage of frozen weights with doubly quantized scales.
//!
//! ```text
//! levels   q_i = Phi^-1(p_i) / Phi^-1(1 - delta),    delta = (1/32 + 1/30) / 2
//!          p on 8 even steps from 1/2 to 1 - delta (upper half), 7 from delta to 1/2 (lower half), 0 shared
//! block    64 consecutive entries (row-major), c = max |w|, code = nearest level to w / c
//! scales   mean m over all c; per 256 scales s = max |c - m|, byte = round(127 (c - m) / s)
//! restored w^ = c^ q_code,   c^ = max(0, m + s byte / 127)
//! ```
//!
//! \[QLoRA\] (arXiv 2305.14314) section 3, "4-bit NormalFloat Quantization" and "Double Quantization".
//! The levels are equally likely under a normal law, so a trained weight spends its four bits evenly;
//! the two halves have different numbers of steps so that zero is exact.
//!
//! Departure: the paper keeps the second-level scales in an eight-bit float; here they are symmetric
//! eight-bit integers, whose error has the bound s / 254 that [`Nf4Matrix::error_bound`] uses.
//!
//! Memory per entry: 4 bits + 8/64 bits (scale) + 32/(64 * 256) bits (second level) = 4.127 bits.

use crate::error::{Error, Result};
use crate::linalg::{Real, norms};
use ndarray::{ArrayView2, ArrayViewMut2};
use statrs::distribution::{ContinuousCDF, Normal};
use std::sync::OnceLock;

/// Entries that share one scale.
pub const BLOCK: usize = 64;
/// Scales that share one second-level scale.
pub const SCALE_BLOCK: usize = 256;

/// The sixteen levels, ascending from -1 to 1, with an exact zero at position 7.
///
/// Computed once from normal quantiles (see the module's equation); nothing is tabulated.
///
/// ```
/// use peft_limits::adapters::nf4::levels;
/// let q = levels();
/// assert_eq!((q[0], q[7], q[15]), (-1.0, 0.0, 1.0));
/// assert!(q.windows(2).all(|w| w[0] < w[1]));
/// ```
pub fn levels() -> &'static [f64; 16] {
    static LEVELS: OnceLock<[f64; 16]> = OnceLock::new();
    LEVELS.get_or_init(|| {
        let normal = Normal::standard();
        let top = 1.0 - (1.0 / 32.0 + 1.0 / 30.0) / 2.0;
        let largest = normal.inverse_cdf(top);
        let mut q = [0.0; 16];
        for i in 0..7 {
            // Lower half: 7 steps of (top - 1/2) / 7 away from the middle, the last of them at -1.
            q[i] = -normal.inverse_cdf(top - (top - 0.5) * i as f64 / 7.0) / largest;
        }
        for i in 0..8 {
            q[15 - i] = normal.inverse_cdf(top - (top - 0.5) * i as f64 / 8.0) / largest;
        }
        q
    })
}

/// Code of the level nearest to `x`, for x in [-1, 1]; ties go to the larger level.
///
/// ```
/// use peft_limits::adapters::nf4::nearest;
/// assert_eq!((nearest(-1.0), nearest(0.0), nearest(0.99)), (0, 7, 15));
/// ```
pub fn nearest(x: f64) -> u8 {
    static MIDPOINTS: OnceLock<[f64; 15]> = OnceLock::new();
    let midpoints = MIDPOINTS.get_or_init(|| {
        let q = levels();
        std::array::from_fn(|i| 0.5 * (q[i] + q[i + 1]))
    });
    midpoints.partition_point(|&m| m <= x) as u8
}

/// A matrix in NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Matrix {
    shape: (usize, usize),
    codes: Vec<u8>,
    scales: Vec<i8>,
    second: Vec<f32>,
    mean: f32,
}

impl Nf4Matrix {
    /// Quantizes a matrix. Cost O(entries).
    ///
    /// # Errors
    /// [`Error::NonFinite`] with the position of a NaN or infinity; [`Error::InvalidParam`] for an empty
    /// matrix or entries beyond the range of f32, in which scales are kept.
    ///
    /// ```
    /// use ndarray::{array, Array2};
    /// use peft_limits::adapters::nf4::Nf4Matrix;
    /// // One block: extremes and zeros survive four bits.
    /// let w = array![[2.0f64, 0.0, -2.0], [0.0, 2.0, 0.0]];
    /// let packed = Nf4Matrix::quantize(w.view())?;
    /// assert_eq!(packed.dequantize::<f64>(), w);
    /// # Ok::<(), peft_limits::Error>(())
    /// ```
    pub fn quantize<T: Real>(w: ArrayView2<T>) -> Result<Self> {
        norms::require_finite("Nf4Matrix::quantize", "weight", &w)?;
        if w.is_empty() {
            return Err(Error::invalid("weight", format!("shape {:?}", w.dim()), "at least one entry is needed"));
        }
        let flat: Vec<f64> = w.iter().map(|x| x.widen()).collect();
        let mut codes = vec![0x77u8; flat.len().div_ceil(2)];
        let mut absmax = Vec::with_capacity(flat.len().div_ceil(BLOCK));
        for (b, block) in flat.chunks(BLOCK).enumerate() {
            let c = block.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            if c > f64::from(f32::MAX) {
                return Err(Error::invalid("weight", c, "NF4 scales are f32: entries must be below 3.4e38"));
            }
            absmax.push(c);
            if c > 0.0 {
                for (i, &x) in block.iter().enumerate() {
                    set_code(&mut codes, b * BLOCK + i, nearest(x / c));
                }
            }
        }
        let mean = (absmax.iter().sum::<f64>() / absmax.len() as f64) as f32;
        let mut scales = Vec::with_capacity(absmax.len());
        let mut second = Vec::with_capacity(absmax.len().div_ceil(SCALE_BLOCK));
        for group in absmax.chunks(SCALE_BLOCK) {
            let s = group.iter().fold(0.0f64, |m, c| m.max((c - f64::from(mean)).abs())) as f32;
            second.push(s);
            scales.extend(group.iter().map(|c| {
                let ratio = if s > 0.0 { (c - f64::from(mean)) / f64::from(s) } else { 0.0 };
                (127.0 * ratio).round().clamp(-127.0, 127.0) as i8
            }));
        }
        Ok(Self { shape: w.dim(), codes, scales, second, mean })
    }

    /// Rebuilds a matrix from its stored parts; the counterpart of the accessors below.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] naming the part whose length does not follow from `shape`;
    /// [`Error::NonFinite`] for a bad scale.
    pub fn from_parts(
        shape: (usize, usize),
        codes: Vec<u8>,
        scales: Vec<i8>,
        second: Vec<f32>,
        mean: f32,
    ) -> Result<Self> {
        let entries = shape.0 * shape.1;
        let blocks = entries.div_ceil(BLOCK);
        let checks = [
            ("codes", codes.len(), entries.div_ceil(2)),
            ("scales", scales.len(), blocks),
            ("second", second.len(), blocks.div_ceil(SCALE_BLOCK)),
        ];
        for (arg, got, expected) in checks {
            if got != expected {
                return Err(Error::ShapeMismatch {
                    op: "Nf4Matrix::from_parts",
                    arg: arg.into(),
                    expected: format!("[{expected}] for a {shape:?} matrix"),
                    got: format!("[{got}]"),
                });
            }
        }
        let bad = second.iter().chain([&mean]).position(|x| !x.is_finite());
        if let Some(i) = bad {
            let value = f64::from(second.get(i).copied().unwrap_or(mean));
            return Err(Error::NonFinite {
                op: "Nf4Matrix::from_parts",
                tensor: "second".into(),
                index: vec![i],
                value,
            });
        }
        Ok(Self { shape, codes, scales, second, mean })
    }

    /// (rows, columns).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Two codes a byte, the earlier entry in the low half.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Eight-bit scales, one per block of 64.
    pub fn scales(&self) -> &[i8] {
        &self.scales
    }

    /// Second-level scales, one per 256 blocks.
    pub fn second(&self) -> &[f32] {
        &self.second
    }

    /// Mean of the scales.
    pub fn mean(&self) -> f32 {
        self.mean
    }

    /// Bytes stored.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.len() + 4 * self.second.len() + 4
    }

    /// Bytes that a `rows x columns` matrix takes in NF4, without making one.
    ///
    /// ```
    /// use peft_limits::adapters::nf4::Nf4Matrix;
    /// let bits = 8.0 * Nf4Matrix::bytes_for(4096, 4096) as f64 / (4096.0 * 4096.0);
    /// assert!((bits - 4.127).abs() < 1e-3);
    /// ```
    pub fn bytes_for(rows: usize, columns: usize) -> usize {
        let entries = rows * columns;
        let blocks = entries.div_ceil(BLOCK);
        entries.div_ceil(2) + blocks + 4 * blocks.div_ceil(SCALE_BLOCK) + 4
    }

    /// Restored scale of a block.
    pub fn scale(&self, block: usize) -> f64 {
        let s = f64::from(self.second[block / SCALE_BLOCK]);
        (f64::from(self.mean) + s * f64::from(self.scales[block]) / 127.0).max(0.0)
    }

    /// Largest |w - w^| possible in a block: half the largest gap between levels times the block's scale,
    /// plus what the rounding of the scale itself adds, s / 254.
    pub fn error_bound(&self, block: usize) -> f64 {
        let q = levels();
        let half_gap = (0..15).map(|i| 0.5 * (q[i + 1] - q[i])).fold(0.0, f64::max);
        let rounding = f64::from(self.second[block / SCALE_BLOCK]) / 254.0;
        // The true scale is within `rounding` of the restored one; f32 storage of mean and s adds 2 ulp.
        let storage = f64::from(f32::EPSILON) * (self.mean.abs() + self.second[block / SCALE_BLOCK]) as f64;
        half_gap * (self.scale(block) + rounding + storage) + rounding + storage
    }

    /// Restores rows `first..first + out.nrows()` into `out` without allocating. Cost O(entries of `out`).
    ///
    /// # Panics
    /// If `out` reaches past the last row or has another number of columns: an internal error.
    pub fn dequantize_rows<T: Real>(&self, first: usize, mut out: ArrayViewMut2<T>) {
        let columns = self.shape.1;
        assert!(out.ncols() == columns && first + out.nrows() <= self.shape.0, "row tile outside the matrix");
        for (i, mut row) in out.rows_mut().into_iter().enumerate() {
            let start = (first + i) * columns;
            match row.as_slice_mut() {
                Some(row) => self.dequantize_range(start, row),
                None => {
                    let mut buffer = [T::zero(); BLOCK];
                    for j in (0..columns).step_by(BLOCK) {
                        let n = BLOCK.min(columns - j);
                        self.dequantize_range(start + j, &mut buffer[..n]);
                        for (x, y) in row.iter_mut().skip(j).zip(&buffer[..n]) {
                            *x = *y;
                        }
                    }
                }
            }
        }
    }

    /// The whole matrix restored.
    pub fn dequantize<T: Real>(&self) -> ndarray::Array2<T> {
        let mut out = ndarray::Array2::zeros(self.shape);
        self.dequantize_rows(0, out.view_mut());
        out
    }

    /// Entries `start..start + out.len()` in row-major order.
    fn dequantize_range<T: Real>(&self, start: usize, out: &mut [T]) {
        let q = levels();
        let mut table = [T::zero(); 16];
        let mut block = usize::MAX;
        let mut i = 0;
        while i < out.len() {
            let position = start + i;
            if position / BLOCK != block {
                block = position / BLOCK;
                let c = self.scale(block);
                table = std::array::from_fn(|k| T::of(c * q[k]));
            }
            let end = (i + BLOCK - position % BLOCK).min(out.len());
            if position % 2 == 1 {
                out[i] = table[usize::from(self.codes[position / 2] >> 4)];
                i += 1;
            }
            let pairs = (end - i) / 2;
            let bytes = &self.codes[(start + i) / 2..(start + i) / 2 + pairs];
            for (pair, byte) in out[i..i + 2 * pairs].as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                *pair = [table[usize::from(byte & 15)], table[usize::from(byte >> 4)]];
            }
            i += 2 * pairs;
            if i < end {
                out[i] = table[usize::from(self.codes[(start + i) / 2] & 15)];
                i += 1;
            }
        }
    }
}

impl<T: Real> super::PackedWeight<T> for Nf4Matrix {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn decode_into(&self, dense: &mut ArrayViewMut2<T>) {
        self.dequantize_rows(0, dense.view_mut());
    }

    fn bytes(&self) -> usize {
        Nf4Matrix::bytes(self)
    }
}

fn set_code(codes: &mut [u8], position: usize, code: u8) {
    let byte = &mut codes[position / 2];
    *byte = if position.is_multiple_of(2) { (*byte & 0xf0) | code } else { (*byte & 0x0f) | (code << 4) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, s};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, StandardNormal};

    fn normal(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Array2::from_shape_fn((rows, columns), |_| {
            let x: f64 = StandardNormal.sample(&mut rng);
            0.02 * x
        })
    }

    /// \[QLoRA\] appendix E lists the levels in single precision; a few of them, to that precision.
    #[test]
    fn levels_are_the_published_ones() {
        let q = levels();
        for (i, want) in
            [(1, -0.696_192_8), (6, -0.091_050_04), (8, 0.079_580_3), (12, 0.440_709_83), (14, 0.722_956_84)]
        {
            assert!((q[i] - want).abs() < 2e-6, "level {i}: {} against {want}", q[i]);
        }
        assert_eq!(q[7].to_bits(), 0f64.to_bits());
        assert!((q[0] + 1.0).abs() < 1e-15 && (q[15] - 1.0).abs() < 1e-15);
    }

    #[test]
    fn nearest_agrees_with_a_search_over_all_levels() {
        let q = levels();
        for i in 0..=4000 {
            let x = -1.0 + i as f64 / 2000.0;
            let best = q.iter().map(|l| (l - x).abs()).fold(f64::INFINITY, f64::min);
            let got = (q[usize::from(nearest(x))] - x).abs();
            assert!(got <= best + 1e-15, "x = {x}");
        }
    }

    #[test]
    fn error_is_within_its_bound_and_of_the_size_theory_predicts() {
        let w = normal(37, 101, 5);
        let packed = Nf4Matrix::quantize(w.view()).unwrap();
        let restored: Array2<f64> = packed.dequantize();
        let mut largest_share = 0.0f64;
        for (i, (a, b)) in w.iter().zip(&restored).enumerate() {
            let bound = packed.error_bound(i / BLOCK);
            largest_share = largest_share.max((a - b).abs() / bound);
            assert!((a - b).abs() <= bound, "entry {i}: {a} restored as {b}, bound {bound}");
        }
        // The bound is not vacuous: some entry uses most of it.
        assert!(largest_share > 0.7, "largest share of the bound {largest_share}");
        // Relative Frobenius error of NF4 on normal data with 64-blocks is near 0.09.
        let gap = norms::relative_frobenius(&restored.view(), &w.view());
        assert!((0.07..0.11).contains(&gap), "{gap}");
    }

    #[test]
    fn memory_is_4_127_bits_per_entry_and_matches_the_prediction() {
        for (rows, columns) in [(1, 1), (3, 5), (256, 688), (512, 1024)] {
            let packed = Nf4Matrix::quantize(normal(rows, columns, 1).view()).unwrap();
            assert_eq!(packed.bytes(), Nf4Matrix::bytes_for(rows, columns));
        }
        let bits = 8.0 * Nf4Matrix::bytes_for(512, 1024) as f64 / (512.0 * 1024.0);
        assert!((bits - (4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0))).abs() < 1e-4, "{bits}");
    }

    #[test]
    fn row_tiles_equal_the_whole_for_odd_shapes_and_strided_targets() {
        for (rows, columns) in [(7, 13), (5, 64), (9, 129), (3, 1), (2, 200)] {
            let packed = Nf4Matrix::quantize(normal(rows, columns, 3).view()).unwrap();
            let whole: Array2<f32> = packed.dequantize();
            for first in 0..rows {
                for n in 1..=(rows - first) {
                    let mut tile = Array2::<f32>::zeros((n, columns));
                    packed.dequantize_rows(first, tile.view_mut());
                    assert_eq!(tile, whole.slice(s![first..first + n, ..]));
                }
            }
            let mut transposed = Array2::<f32>::zeros((columns, rows));
            packed.dequantize_rows(0, transposed.view_mut().reversed_axes());
            assert_eq!(transposed.t(), whole);
        }
    }

    #[test]
    fn a_second_round_trip_changes_nothing_but_rounding_of_scales() {
        let w = normal(16, 64, 9);
        let once: Array2<f64> = Nf4Matrix::quantize(w.view()).unwrap().dequantize();
        let again = Nf4Matrix::quantize(once.view()).unwrap();
        assert_eq!(again.codes(), Nf4Matrix::quantize(w.view()).unwrap().codes());
    }

    #[test]
    fn zero_blocks_stay_exactly_zero() {
        let mut w = normal(4, 64, 2);
        w.row_mut(2).fill(0.0);
        let restored: Array2<f64> = Nf4Matrix::quantize(w.view()).unwrap().dequantize();
        assert!(restored.row(2).iter().all(|x| *x == 0.0));
        let zero: Array2<f32> = Nf4Matrix::quantize(Array2::<f32>::zeros((3, 70)).view()).unwrap().dequantize();
        assert!(zero.iter().all(|x| *x == 0.0));
    }

    #[test]
    fn hostile_input_is_refused() {
        let mut w = normal(3, 5, 1);
        w[[1, 2]] = f64::NAN;
        match Nf4Matrix::quantize(w.view()) {
            Err(Error::NonFinite { index, .. }) => assert_eq!(index, vec![1, 2]),
            other => panic!("{other:?}"),
        }
        w[[1, 2]] = 1e300;
        assert!(matches!(Nf4Matrix::quantize(w.view()), Err(Error::InvalidParam { .. })));
        assert!(matches!(Nf4Matrix::quantize(Array2::<f32>::zeros((0, 4)).view()), Err(Error::InvalidParam { .. })));
        let packed = Nf4Matrix::quantize(normal(3, 70, 1).view()).unwrap();
        let parts = |codes: &[u8], second: f32| {
            Nf4Matrix::from_parts((3, 70), codes.to_vec(), packed.scales().to_vec(), vec![second], packed.mean())
        };
        assert_eq!(parts(packed.codes(), packed.second()[0]).unwrap(), packed);
        match parts(&packed.codes()[1..], 1.0) {
            Err(Error::ShapeMismatch { arg, .. }) => assert_eq!(arg, "codes"),
            other => panic!("{other:?}"),
        }
        assert!(matches!(parts(packed.codes(), f32::NAN), Err(Error::NonFinite { .. })));
    }
}
