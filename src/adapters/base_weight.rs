//! The weight under an adapter: dense, or packed by a codec such as NF4.

use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, ArrayViewMut2, CowArray, Ix2};
use std::fmt::Debug;
use std::sync::Arc;

/// A frozen matrix in a compressed form.
///
/// A codec implements this to become a base weight (QLoRA, QPaCA): decoding fills a dense array for the time
/// of one product and is dropped again.
pub trait PackedWeight<T>: Debug + Send + Sync {
    /// (out, in).
    fn shape(&self) -> (usize, usize);
    /// Writes every entry of the decoded matrix.
    fn decode_into(&self, dense: &mut ArrayViewMut2<T>);
    /// Bytes held, constants and second-level scales included.
    fn bytes(&self) -> usize;
}

/// Weight of a projection, `out x in`.
#[derive(Debug, Clone)]
pub enum BaseWeight<T> {
    /// Stored as it is computed with.
    Dense(Array2<T>),
    /// Stored packed, decoded for each product; never trainable.
    Packed(Arc<dyn PackedWeight<T>>),
}

impl<T: Real> BaseWeight<T> {
    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        match self {
            BaseWeight::Dense(weight) => weight.dim(),
            BaseWeight::Packed(packed) => packed.shape(),
        }
    }

    /// The matrix itself: borrowed when dense, decoded into a fresh array when packed.
    pub fn dense(&self) -> CowArray<'_, T, Ix2> {
        match self {
            BaseWeight::Dense(weight) => CowArray::from(weight.view()),
            BaseWeight::Packed(packed) => {
                let mut dense = Array2::zeros(packed.shape());
                packed.decode_into(&mut dense.view_mut());
                CowArray::from(dense)
            }
        }
    }

    /// Bytes held at rest.
    pub fn bytes(&self) -> usize {
        match self {
            BaseWeight::Dense(weight) => weight.len() * size_of::<T>(),
            BaseWeight::Packed(packed) => packed.bytes(),
        }
    }

    /// The array, for a method that trains it or part of it in place.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed weight.
    pub fn dense_mut(&mut self, method: &'static str) -> Result<&mut Array2<T>> {
        match self {
            BaseWeight::Dense(weight) => Ok(weight),
            BaseWeight::Packed(_) => {
                Err(Error::invalid("method", method, "writes into the base weight, which is packed (quantized)"))
            }
        }
    }
}
