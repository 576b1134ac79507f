//! Eight-bit storage of frozen weights, as bitsandbytes holds it (LLM.int8, arXiv 2208.07339,
//! section 3).
//!
//! ```text
//! row j:   s_j = max |w_ji|,   code = round(127 w_ji / s_j),   restored = round(code * (s_j * (1/127))) in f32
//! ```
//!
//! The last rounding is to the format of the activations, which is how a training step on the
//! processor restores it. A step on a GPU also quantizes the activations of the forward pass, which
//! is not imitated.

use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::precision::Precision;
use ndarray::{Array2, ArrayViewMut2};

/// A matrix in eight bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Matrix {
    codes: Array2<i8>,
    scales: Vec<f32>,
    format: Precision,
}

impl Int8Matrix {
    /// A matrix from its stored codes, `out x in`, the largest magnitude of each row, and the
    /// format it is restored in.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another number of scales than rows; [`Error::NonFinite`] for a
    /// bad scale.
    pub fn from_parts(codes: Array2<i8>, scales: Vec<f32>, format: Precision) -> Result<Self> {
        if scales.len() != codes.nrows() {
            return Err(Error::ShapeMismatch {
                op: "Int8Matrix::from_parts",
                arg: "scales".into(),
                expected: format!("[{}] for a {:?} matrix", codes.nrows(), codes.dim()),
                got: format!("[{}]", scales.len()),
            });
        }
        if let Some(row) = scales.iter().position(|s| !s.is_finite()) {
            let value = f64::from(scales[row]);
            return Err(Error::NonFinite {
                op: "Int8Matrix::from_parts",
                tensor: "scales".into(),
                index: vec![row],
                value,
            });
        }
        Ok(Self { codes, scales, format })
    }

    /// Bytes that a `rows x columns` matrix takes.
    pub fn bytes_for(rows: usize, columns: usize) -> usize {
        rows * columns + 4 * rows
    }
}

impl<T: Real> super::PackedWeight<T> for Int8Matrix {
    fn shape(&self) -> (usize, usize) {
        self.codes.dim()
    }

    fn decode_into(&self, dense: &mut ArrayViewMut2<T>) {
        super::PackedWeight::<T>::decode_rows(self, self.format, 0, dense);
    }

    fn decode_rows(&self, format: Precision, first: usize, dense: &mut ArrayViewMut2<T>) {
        let stored = self.codes.rows().into_iter().zip(&self.scales).skip(first);
        for ((codes, &scale), mut row) in stored.zip(dense.rows_mut()) {
            let step = scale * (1.0 / 127.0f32);
            row.zip_mut_with(&codes, |x, &code| {
                *x = T::of(format.round(f64::from(f32::from(code) * step)))
            });
        }
    }

    fn bytes(&self) -> usize {
        Self::bytes_for(self.codes.nrows(), self.codes.ncols())
    }
}
