//! NF4: four-bit storage of frozen weights, bit for bit as bitsandbytes computes it.
//!
//! ```text
//! block    64 consecutive entries (row-major), c = max |w|, code = nearest level to w * (1 / c), in f32
//! scales   as they are, f32; or doubly quantized: m = mean of all c, and for each 256 of them s = max |c - m|,
//!          byte = code of (c - m) * (1 / s) among the 256 values d of the dynamic type
//! restored w^ = round(q_code c^),   c^ = d_byte s + m (each operation in f32), round: to the format of the weight
//! ```
//!
//! \[QLoRA\] (arXiv 2305.14314) section 3, "4-bit NormalFloat Quantization" and "Double
//! Quantization"; the dynamic type is that of arXiv 1511.04561, as arXiv 2110.02861 has it for
//! optimizer states. The levels are equally likely under a normal law; the two halves have
//! different numbers of steps so that zero is exact.
//!
//! What was measured of bitsandbytes 0.50.2 on the processor and is followed here: a last block
//! that is not full divides by c where full ones multiply by 1 / c; ties go to the smaller level;
//! the eight-bit code is that of the nearest of 65536 even steps on [-1, 1], so a scale within half
//! a step of a boundary may get the second nearest value, and a scale of m gets 2.1e-5 s more. Not
//! followed: for rows that are no whole number of blocks its kernel for AVX-512 restores some
//! blocks by their neighbour's scale (see the tests). m is an f32 mean: this crate sums in f64, so
//! its last bit may differ from PyTorch's, whose order of summation depends on the machine. Stored
//! weights carry m and are restored without any of this.
//!
//! Memory per entry: 4 bits + 8/64 bits (scale) + 32/(64 * 256) bits (second level) = 4.127 bits.

use crate::error::{Error, Result};
use crate::linalg::{Real, norms};
use crate::precision::Precision;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use std::sync::Arc;

mod scales;
#[cfg(test)]
mod tests;

pub use scales::{LEVELS, SCALE_BLOCK, Scales, dynamic_values, nearest};

/// Entries that share one scale, where nothing else is said.
pub const BLOCK: usize = 64;
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

    /// Quantizes a matrix, its scales again if `double`, to be restored in a format. Cost
    /// O(entries).
    ///
    /// # Errors
    /// [`Error::NonFinite`] with the position of a NaN or infinity; [`Error::InvalidParam`] for an
    /// empty matrix or entries beyond the range of f32, in which everything is computed.
    pub fn quantize_as<T: Real>(w: ArrayView2<T>, double: bool, format: Precision) -> Result<Self> {
        norms::require_finite("Nf4Matrix::quantize", "weight", &w)?;
        if w.is_empty() {
            return Err(Error::invalid(
                "weight",
                format!("shape {:?}", w.dim()),
                "at least one entry is needed",
            ));
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
        let mut checks =
            vec![("codes", codes.len(), entries.div_ceil(2)), ("scales", scales.len(), blocks)];
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

    /// Largest |w - w^| possible in a block that [`Nf4Matrix::quantize`] made: half the largest gap
    /// between levels times the block's scale, what the rounding of the scale adds, and that of the
    /// restored number.
    pub fn error_bound(&self, block: usize) -> f64 {
        let half_gap =
            (0..15).map(|i| f64::from(LEVELS[i + 1] - LEVELS[i]) / 2.0).fold(0.0, f64::max);
        let of_scale = self.scales.error_bound(block);
        let scale = f64::from(self.scale(block).abs()) + of_scale;
        half_gap * scale
            + of_scale
            + scale * (self.format.epsilon() + 4.0 * f64::from(f32::EPSILON))
    }

    /// Restores rows `first..first + out.nrows()` into `out` without allocating. Cost O(entries of
    /// `out`).
    ///
    /// # Panics
    /// If `out` reaches past the last row or has another number of columns: an internal error.
    pub fn dequantize_rows<T: Real>(&self, first: usize, out: ArrayViewMut2<T>) {
        self.rows_in(self.format, first, out);
    }

    fn rows_in<T: Real>(&self, format: Precision, first: usize, mut out: ArrayViewMut2<T>) {
        let columns = self.shape.1;
        assert!(
            out.ncols() == columns && first + out.nrows() <= self.shape.0,
            "row tile outside the matrix"
        );
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
        let mut all: Vec<(&'static str, Arc<dyn super::PackedWeight<T>>)> =
            vec![("nf4-nibbles", Arc::new(swapped))];
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
    *byte = if position.is_multiple_of(2) {
        (*byte & 0x0f) | (code << 4)
    } else {
        (*byte & 0xf0) | code
    };
}
