//! NF4: four-bit storage of frozen weights, bit for bit as bitsandbytes computes it.
//!
//! ```text
//! block    64 consecutive entries (row-major), c = max |w|, code = nearest level to w * (1 / c), in f32
//! scales   as they are, f32; or doubly quantized: m = mean of all c, and for each 256 of them s = max |c - m|,
//!          byte = code of (c - m) * (1 / s) among the 256 values d of the dynamic type
//! restored w^ = round(q_code c^),   c^ = d_byte s + m (each operation in f32), round: to the format of the weight
//! ```
//!
//! \[QLoRA\] (arXiv 2305.14314) section 3, "4-bit NormalFloat Quantization" and "Double Quantization"; the dynamic type is
//! that of arXiv 1511.04561, as arXiv 2110.02861 has it for optimizer states. The levels are equally likely under a normal
//! law; the two halves have different numbers of steps so that zero is exact.
//!
//! What was measured of bitsandbytes 0.50.2 on the processor and is followed here: a last block that is not full divides by c
//! where full ones multiply by 1 / c; ties go to the smaller level; the eight-bit code is that of the nearest of 65536 even
//! steps on [-1, 1], so a scale within half a step of a boundary may get the second nearest value, and a scale of m gets
//! 2.1e-5 s more. Not followed: for rows that are no whole number of blocks its kernel for AVX-512 restores some blocks by
//! their neighbour's scale (see the tests). m is an f32 mean: this crate sums in f64, so its last bit may differ from PyTorch's, whose order of
//! summation depends on the machine. Stored weights carry m and are restored without any of this.
//!
//! Memory per entry: 4 bits + 8/64 bits (scale) + 32/(64 * 256) bits (second level) = 4.127 bits.

use crate::error::{Error, Result};
use crate::linalg::{Real, norms};
use crate::precision::Precision;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use std::sync::{Arc, LazyLock};

/// Entries that share one scale, where nothing else is said.
pub const BLOCK: usize = 64;
/// Scales that share one second-level scale.
pub const SCALE_BLOCK: usize = 256;

/// The sixteen levels, ascending from -1 to 1, with an exact zero at position 7 (\[QLoRA\] appendix E).
///
/// They are quantiles of a normal law, rounded on the way: `Phi^-1(p) / Phi^-1(p_max)` to 2e-6.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Code of the level nearest to `x`, for x in [-1, 1]; ties go to the smaller level.
///
/// ```
/// use peft_limits::adapters::nf4::nearest;
/// assert_eq!((nearest(-1.0), nearest(0.0), nearest(0.99)), (0, 7, 15));
/// ```
pub fn nearest(x: f32) -> u8 {
    static MIDPOINTS: LazyLock<[f32; 15]> =
        LazyLock::new(|| std::array::from_fn(|i| (LEVELS[i] + LEVELS[i + 1]) / 2.0));
    MIDPOINTS.partition_point(|&m| m < x) as u8
}

/// The 256 values of the dynamic eight-bit type, ascending: 0, 1 and, for each exponent i from -6 to 0, 2^(i + 6) means
/// of even steps of [0.1, 1] times 10^i, with both signs.
pub fn dynamic_values() -> &'static [f32; 256] {
    static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut values = vec![0.0, 1.0];
        for i in 0..7 {
            let steps = 1usize << i;
            // PyTorch's linspace counts from either end up to the middle, in f32.
            let step = (1.0f32 - 0.1) / steps as f32;
            let boundary = |k: usize| {
                if 2 * k < steps + 1 { step.mul_add(k as f32, 0.1) } else { (-step).mul_add((steps - k) as f32, 1.0) }
            };
            // The power is an f64 that a product with an f32 tensor rounds.
            let power = 10f64.powi(i - 6) as f32;
            values.extend((0..steps).flat_map(|k| {
                let value = power * ((boundary(k) + boundary(k + 1)) / 2.0);
                [value, -value]
            }));
        }
        values.sort_unstable_by(f32::total_cmp);
        std::array::from_fn(|k| values[k])
    });
    &VALUES
}

/// Eight-bit code of x in [-1, 1], by the nearest of 65536 even steps.
fn dynamic_code(x: f32) -> u8 {
    const HALF: f32 = 32767.5;
    static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let d = dynamic_values();
        let code = |step: usize| {
            let x = step as f32 / HALF - 1.0;
            d.windows(2).filter(|pair| (pair[0] + pair[1]) / 2.0 < x).count() as u8
        };
        (0..1 << 16).map(code).collect()
    });
    TABLE[(((x + 1.0) * HALF + 0.5).floor().clamp(0.0, 65535.0)) as usize]
}

/// How the scales of the blocks are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// One f32 for each block.
    Single(Vec<f32>),
    /// Quantized again.
    Double {
        /// One for each block.
        bytes: Vec<u8>,
        /// Second-level scales, one for each `block` bytes.
        second: Vec<f32>,
        /// Value of each byte.
        values: Arc<[f32; 256]>,
        /// Mean of the scales.
        mean: f32,
        /// Bytes that share a second-level scale.
        block: usize,
    },
}

impl Scales {
    /// Scales of blocks, quantized again.
    fn double(scales: &[f32]) -> Self {
        static VALUES: LazyLock<Arc<[f32; 256]>> = LazyLock::new(|| Arc::new(*dynamic_values()));
        let mean = (scales.iter().map(|&c| f64::from(c)).sum::<f64>() / scales.len().max(1) as f64) as f32;
        let (mut bytes, mut second) = (Vec::with_capacity(scales.len()), Vec::new());
        for group in scales.chunks(SCALE_BLOCK) {
            let s = group.iter().fold(0.0f32, |m, c| m.max((c - mean).abs()));
            second.push(s);
            let inverse = 1.0 / s;
            bytes.extend(group.iter().map(|c| if s > 0.0 { dynamic_code((c - mean) * inverse) } else { 0 }));
        }
        Self::Double { bytes, second, values: VALUES.clone(), mean, block: SCALE_BLOCK }
    }

    /// Restored scale of a block.
    fn of(&self, index: usize) -> f32 {
        match self {
            Self::Single(scales) => scales[index],
            Self::Double { bytes, second, values, mean, block } => {
                values[usize::from(bytes[index])] * second[index / block] + mean
            }
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Single(scales) => scales.len(),
            Self::Double { bytes, .. } => bytes.len(),
        }
    }

    /// Bytes stored, without the table of values, which all matrices share.
    fn bytes(&self) -> usize {
        match self {
            Self::Single(scales) => 4 * scales.len(),
            Self::Double { bytes, second, .. } => bytes.len() + 4 * second.len() + 4,
        }
    }

    /// Most by which the restored scale of a block can differ from the true one.
    fn error_bound(&self, index: usize) -> f64 {
        match self {
            Self::Single(_) => 0.0,
            Self::Double { second, values, mean, block, .. } => {
                let s = f64::from(second[index / block]);
                let ends = [1.0 + values[0], 1.0 - values[255]];
                let gaps = values.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).chain(ends);
                let half_gap = f64::from(gaps.fold(0.0, f32::max));
                s * (half_gap + 1.0 / 65535.0) + 4.0 * f64::from(f32::EPSILON) * (s + f64::from(mean.abs()))
            }
        }
    }
}

/// A matrix in NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Matrix {
    shape: (usize, usize),
    codes: Vec<u8>,
    scales: Scales,
    block: usize,
    format: Precision,
}

impl Nf4Matrix {
    /// Quantizes a matrix doubly, to be restored in f32. Cost O(entries).
    ///
    /// # Errors
    /// As [`Nf4Matrix::quantize_as`].
    ///
    /// ```
    /// use ndarray::array;
    /// use peft_limits::adapters::nf4::Nf4Matrix;
    /// // One block: extremes and zeros survive four bits.
    /// let w = array![[2.0f64, 0.0, -2.0], [0.0, 2.0, 0.0]];
    /// let packed = Nf4Matrix::quantize(w.view())?;
    /// assert_eq!(packed.dequantize::<f64>(), w);
    /// # Ok::<(), peft_limits::Error>(())
    /// ```
    pub fn quantize<T: Real>(w: ArrayView2<T>) -> Result<Self> {
        Self::quantize_as(w, true, Precision::F32)
    }

    /// Quantizes a matrix, its scales again if `double`, to be restored in a format. Cost O(entries).
    ///
    /// # Errors
    /// [`Error::NonFinite`] with the position of a NaN or infinity; [`Error::InvalidParam`] for an empty
    /// matrix or entries beyond the range of f32, in which everything is computed.
    pub fn quantize_as<T: Real>(w: ArrayView2<T>, double: bool, format: Precision) -> Result<Self> {
        norms::require_finite("Nf4Matrix::quantize", "weight", &w)?;
        if w.is_empty() {
            return Err(Error::invalid("weight", format!("shape {:?}", w.dim()), "at least one entry is needed"));
        }
        let flat: Vec<f32> = w.iter().map(|x| x.widen() as f32).collect();
        if let Some(x) = flat.iter().position(|x| !x.is_finite()) {
            let requirement = "NF4 is computed in f32: entries must be below 3.4e38";
            return Err(Error::invalid("weight", format!("entry {x}"), requirement));
        }
        // Half a byte that is left over holds zero.
        let mut codes = vec![0x77u8; flat.len().div_ceil(2)];
        let mut scales = Vec::with_capacity(flat.len().div_ceil(BLOCK));
        for (b, entries) in flat.chunks(BLOCK).enumerate() {
            let mut c = entries.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            if entries.len() < BLOCK {
                c = c.max(1e-38);
            }
            scales.push(c);
            let inverse = 1.0 / c.max(1e-38);
            for (i, &x) in entries.iter().enumerate() {
                let x = if entries.len() < BLOCK { x / c } else { x * inverse };
                set_code(&mut codes, b * BLOCK + i, nearest(x.clamp(-1.0, 1.0)));
            }
        }
        let scales = if double { Scales::double(&scales) } else { Scales::Single(scales) };
        Ok(Self { shape: w.dim(), codes, scales, block: BLOCK, format })
    }

    /// A matrix from its stored parts: codes, scales, and the entries that share one of them.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] naming the part whose length does not follow from `shape`;
    /// [`Error::NonFinite`] for a bad scale; [`Error::InvalidParam`] for blocks of no entry.
    pub fn from_parts(
        shape: (usize, usize),
        codes: Vec<u8>,
        scales: Scales,
        block: usize,
        format: Precision,
    ) -> Result<Self> {
        let nested = match &scales {
            Scales::Double { block, .. } => *block,
            Scales::Single(_) => 1,
        };
        if block == 0 || nested == 0 {
            return Err(Error::invalid("blocksize", 0, "must be at least 1"));
        }
        let entries = shape.0 * shape.1;
        let blocks = entries.div_ceil(block);
        let mut checks = vec![("codes", codes.len(), entries.div_ceil(2)), ("scales", scales.len(), blocks)];
        if let Scales::Double { second, .. } = &scales {
            checks.push(("second", second.len(), blocks.div_ceil(nested)));
        }
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
        let packed = Self { shape, codes, scales, block, format };
        match (0..blocks).find(|&b| !packed.scales.of(b).is_finite()) {
            None => Ok(packed),
            Some(b) => Err(Error::NonFinite {
                op: "Nf4Matrix::from_parts",
                tensor: "scales".into(),
                index: vec![b],
                value: f64::from(packed.scales.of(b)),
            }),
        }
    }

    /// (rows, columns).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Two codes a byte, the earlier entry in the high half.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Scales of the blocks.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Bytes stored.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.bytes()
    }

    /// Bytes that a `rows x columns` matrix takes in NF4, doubly quantized, without making one.
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
    pub fn scale(&self, block: usize) -> f32 {
        self.scales.of(block)
    }

    /// Largest |w - w^| possible in a block that [`Nf4Matrix::quantize`] made: half the largest gap between levels times the
    /// block's scale, what the rounding of the scale adds, and that of the restored number.
    pub fn error_bound(&self, block: usize) -> f64 {
        let half_gap = (0..15).map(|i| f64::from(LEVELS[i + 1] - LEVELS[i]) / 2.0).fold(0.0, f64::max);
        let of_scale = self.scales.error_bound(block);
        let scale = f64::from(self.scale(block).abs()) + of_scale;
        half_gap * scale + of_scale + scale * (self.format.epsilon() + 4.0 * f64::from(f32::EPSILON))
    }

    /// Restores rows `first..first + out.nrows()` into `out` without allocating. Cost O(entries of `out`).
    ///
    /// # Panics
    /// If `out` reaches past the last row or has another number of columns: an internal error.
    pub fn dequantize_rows<T: Real>(&self, first: usize, out: ArrayViewMut2<T>) {
        self.rows_in(self.format, first, out);
    }

    fn rows_in<T: Real>(&self, format: Precision, first: usize, mut out: ArrayViewMut2<T>) {
        let columns = self.shape.1;
        assert!(out.ncols() == columns && first + out.nrows() <= self.shape.0, "row tile outside the matrix");
        for (i, mut row) in out.rows_mut().into_iter().enumerate() {
            let start = (first + i) * columns;
            match row.as_slice_mut() {
                Some(row) => self.dequantize_range(format, start, row),
                None => {
                    let mut buffer = [T::zero(); BLOCK];
                    for j in (0..columns).step_by(BLOCK) {
                        let n = BLOCK.min(columns - j);
                        self.dequantize_range(format, start + j, &mut buffer[..n]);
                        for (x, y) in row.iter_mut().skip(j).zip(&buffer[..n]) {
                            *x = *y;
                        }
                    }
                }
            }
        }
    }

    /// The whole matrix restored.
    pub fn dequantize<T: Real>(&self) -> Array2<T> {
        let mut out = Array2::zeros(self.shape);
        self.dequantize_rows(0, out.view_mut());
        out
    }

    /// Entries `start..start + out.len()` in row-major order.
    fn dequantize_range<T: Real>(&self, format: Precision, start: usize, out: &mut [T]) {
        let mut table = [T::zero(); 16];
        let mut block = usize::MAX;
        let mut i = 0;
        while i < out.len() {
            let position = start + i;
            if position / self.block != block {
                block = position / self.block;
                let c = self.scale(block);
                table = LEVELS.map(|level| T::of(format.round(f64::from(level * c))));
            }
            let end = (i + self.block - position % self.block).min(out.len());
            if position % 2 == 1 {
                out[i] = table[usize::from(self.codes[position / 2] & 15)];
                i += 1;
            }
            let pairs = (end - i) / 2;
            let bytes = &self.codes[(start + i) / 2..(start + i) / 2 + pairs];
            for (pair, byte) in out[i..i + 2 * pairs].as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
            }
            i += 2 * pairs;
            if i < end {
                out[i] = table[usize::from(self.codes[(start + i) / 2] >> 4)];
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

    fn decode_rows(&self, format: Precision, first: usize, dense: &mut ArrayViewMut2<T>) {
        self.rows_in(format, first, dense.view_mut());
    }

    fn misread(&self) -> Vec<(&'static str, Arc<dyn super::PackedWeight<T>>)> {
        let mut swapped = self.clone();
        swapped.codes.iter_mut().for_each(|byte| *byte = byte.rotate_left(4));
        let mut all: Vec<(&'static str, Arc<dyn super::PackedWeight<T>>)> = vec![("nf4-nibbles", Arc::new(swapped))];
        let mut without = self.clone();
        if let Scales::Double { mean, .. } = &mut without.scales {
            *mean = 0.0;
            all.push(("nf4-offset", Arc::new(without)));
        }
        all
    }

    fn bytes(&self) -> usize {
        Nf4Matrix::bytes(self)
    }
}

fn set_code(codes: &mut [u8], position: usize, code: u8) {
    let byte = &mut codes[position / 2];
    *byte = if position.is_multiple_of(2) { (*byte & 0x0f) | (code << 4) } else { (*byte & 0xf0) | code };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor_file::TensorFile;
    use ndarray::s;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, StandardNormal};
    use statrs::distribution::{ContinuousCDF, Normal};
    use std::path::Path;

    fn normal(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Array2::from_shape_fn((rows, columns), |_| {
            let x: f64 = StandardNormal.sample(&mut rng);
            0.02 * x
        })
    }

    /// tests/data/quantized/nf4.safetensors: bitsandbytes' own codes, scales and restored weights.
    #[test]
    fn every_case_of_bitsandbytes_is_equal_bit_for_bit() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantized/nf4.safetensors");
        let file = TensorFile::open(path).unwrap();
        let floats = |name: &str| file.tensor::<f32>(name, "test").unwrap().1;
        let bytes = |name: &str| file.bytes(name, "test").unwrap().1.to_vec();
        assert_eq!(floats("code"), LEVELS);
        let mut cases = 0;
        for name in ["f32", "bf16", "odd", "large", "zeros"] {
            let weight = file.matrix::<f32>(&format!("{name}.weight"), "test").unwrap();
            let format = Precision::parse(&file.dtype(&format!("{name}.weight")).unwrap()).unwrap();
            for kind in ["single", "double"] {
                let of = |part: &str| format!("{name}.{kind}.{part}");
                let packed = Nf4Matrix::quantize_as(weight.view(), kind == "double", format).unwrap();
                assert_eq!(packed.codes(), bytes(&of("packed")), "{name} {kind}");
                match packed.scales() {
                    Scales::Single(scales) => assert_eq!(*scales, floats(&of("absmax")), "{name}"),
                    // PyTorch's f32 mean of these six scales is one unit above the nearest, and all that follows from it with it.
                    Scales::Double { mean, .. } if name == "zeros" => {
                        let theirs = floats(&of("offset"))[0];
                        assert_eq!(mean.to_bits() + 1, theirs.to_bits());
                        let theirs = file.matrix::<f32>(&of("dequantized"), "test").unwrap();
                        let ours: Array2<f32> = packed.dequantize();
                        assert!(norms::relative_frobenius(&ours.view(), &theirs.view()) < 1e-6);
                        cases += 1;
                        continue;
                    }
                    Scales::Double { bytes: found, second, values, mean, block } => {
                        assert_eq!(*found, bytes(&of("absmax")), "{name}");
                        assert_eq!(*second, floats(&of("nested_absmax")), "{name}");
                        assert_eq!(values.to_vec(), floats(&of("nested_code")), "{name}");
                        assert_eq!(([*mean].to_vec(), *block), (floats(&of("offset")), 256), "{name}");
                    }
                }
                let theirs = file.matrix::<f32>(&of("dequantized"), "test").unwrap();
                let ours: Array2<f32> = packed.dequantize();
                let equal = |a: &Array2<f32>| a.iter().zip(&theirs).all(|(a, b)| a.to_bits() == b.to_bits());
                // Rows of 96 are no whole number of blocks: the kernel for AVX-512 takes block row (96 / 64) + column / 64
                // where quantization used the entries in sequence. That restores other weights than were stored.
                let misplaced = Array2::from_shape_fn(ours.dim(), |(i, j)| {
                    let position = i * ours.ncols() + j;
                    let byte = packed.codes()[position / 2];
                    let code = if position.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                    LEVELS[usize::from(code)] * packed.scale(i * (ours.ncols() / BLOCK) + j / BLOCK)
                });
                assert!(equal(if name == "f32" { &misplaced } else { &ours }), "{name} {kind}");
                if name == "f32" {
                    let gap = |a: &Array2<f32>| norms::relative_frobenius(&a.view(), &weight.view());
                    assert!(gap(&theirs) > 2.0 * gap(&ours), "{} {}", gap(&ours), gap(&theirs));
                }
                cases += 1;
            }
        }
        assert_eq!(cases, 10);
    }

    #[test]
    fn levels_are_quantiles_of_a_normal_law() {
        let law = Normal::standard();
        let top = 1.0 - (1.0 / 32.0 + 1.0 / 30.0) / 2.0;
        let quantile =
            |i: usize, n: usize| law.inverse_cdf(top - (top - 0.5) * i as f64 / n as f64) / law.inverse_cdf(top);
        for i in 0..8 {
            assert!((f64::from(LEVELS[i]) + quantile(i, 7)).abs() < 2e-6, "level {i}");
            assert!((f64::from(LEVELS[15 - i]) - quantile(i, 8)).abs() < 2e-6, "level {}", 15 - i);
        }
    }

    #[test]
    fn nearest_agrees_with_a_search_over_all_levels() {
        for i in 0..=4000 {
            let x = -1.0 + i as f32 / 2000.0;
            let best = LEVELS.iter().map(|l| (l - x).abs()).fold(f32::INFINITY, f32::min);
            let got = (LEVELS[usize::from(nearest(x))] - x).abs();
            assert!(got <= best + 1e-7, "x = {x}");
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
        w[[1, 2]] = 1e300; // beyond f32
        assert!(matches!(Nf4Matrix::quantize(w.view()), Err(Error::InvalidParam { .. })));
        assert!(matches!(Nf4Matrix::quantize(Array2::<f32>::zeros((0, 4)).view()), Err(Error::InvalidParam { .. })));
        let packed = Nf4Matrix::quantize_as(normal(3, 70, 1).view(), false, Precision::Bf16).unwrap();
        let Scales::Single(scales) = packed.scales().clone() else { panic!("{:?}", packed.scales()) };
        let parts = |codes: &[u8], scales: Vec<f32>| {
            Nf4Matrix::from_parts((3, 70), codes.to_vec(), Scales::Single(scales), BLOCK, Precision::Bf16)
        };
        assert_eq!(parts(packed.codes(), scales.clone()).unwrap(), packed);
        match parts(&packed.codes()[1..], scales.clone()) {
            Err(Error::ShapeMismatch { arg, .. }) => assert_eq!(arg, "codes"),
            other => panic!("{other:?}"),
        }
        let bad = [scales[0], f32::NAN, scales[2], scales[3]];
        match parts(packed.codes(), bad.to_vec()) {
            Err(Error::NonFinite { index, .. }) => assert_eq!(index, vec![1]),
            other => panic!("{other:?}"),
        }
    }
}
