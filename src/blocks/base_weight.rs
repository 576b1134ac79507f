//! The weight under an adapter: dense, or packed by a codec such as NF4.

use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::precision::Precision;
use ndarray::{Array2, ArrayViewMut2, Axis, CowArray, Ix2};
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
    /// As [`PackedWeight::decode_into`], restored in another format than the codec's own, where it has one.
    fn decode_in(&self, _format: Precision, dense: &mut ArrayViewMut2<T>) {
        self.decode_into(dense);
    }
    /// Weights that known mistakes in reading the parts would restore, by the mistake's name.
    fn misread(&self, _format: Precision) -> Vec<(&'static str, Array2<T>)> {
        Vec::new()
    }
    /// Bytes held, constants and second-level scales included.
    fn bytes(&self) -> usize;
}

/// Columns that stand in place of those of a packed weight, which cannot hold them.
#[derive(Debug, Clone)]
pub struct OwnColumns<T> {
    index: Vec<usize>,
    /// `out x r`.
    values: Array2<T>,
}

/// Weight of a projection, `out x in`.
#[derive(Debug, Clone)]
pub enum BaseWeight<T> {
    /// Stored as it is computed with.
    Dense(Array2<T>),
    /// Stored packed, decoded for each product; never trainable.
    Packed(Arc<dyn PackedWeight<T>>),
    /// Packed, with some columns of its own (QPaCA).
    PackedWith(Arc<dyn PackedWeight<T>>, OwnColumns<T>),
}

impl<T: Real> BaseWeight<T> {
    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        match self {
            BaseWeight::Dense(weight) => weight.dim(),
            BaseWeight::Packed(packed) | BaseWeight::PackedWith(packed, _) => packed.shape(),
        }
    }

    /// Whether it is stored packed.
    pub fn is_packed(&self) -> bool {
        !matches!(self, BaseWeight::Dense(_))
    }

    /// The matrix itself: borrowed when dense, decoded into a fresh array when packed.
    pub fn dense(&self) -> CowArray<'_, T, Ix2> {
        let decode = |packed: &dyn PackedWeight<T>| {
            let mut dense = Array2::zeros(packed.shape());
            packed.decode_into(&mut dense.view_mut());
            dense
        };
        match self {
            BaseWeight::Dense(weight) => CowArray::from(weight.view()),
            BaseWeight::Packed(packed) => CowArray::from(decode(packed.as_ref())),
            BaseWeight::PackedWith(packed, own) => {
                let mut dense = decode(packed.as_ref());
                write_columns(&mut dense, &own.index, &own.values);
                CowArray::from(dense)
            }
        }
    }

    /// Restores a packed weight in a format and keeps it dense; what it was packed in.
    pub fn unpack_in(&mut self, format: Precision) -> Option<Arc<dyn PackedWeight<T>>> {
        let (packed, own) = match self {
            BaseWeight::Dense(_) => return None,
            BaseWeight::Packed(packed) => (packed.clone(), None),
            BaseWeight::PackedWith(packed, own) => (packed.clone(), Some(own)),
        };
        let mut dense = Array2::zeros(packed.shape());
        packed.decode_in(format, &mut dense.view_mut());
        if let Some(own) = own {
            write_columns(&mut dense, &own.index, &own.values);
        }
        *self = BaseWeight::Dense(dense);
        Some(packed)
    }

    /// Selected columns, `out x r`.
    pub fn columns(&self, index: &[usize]) -> Array2<T> {
        match self {
            BaseWeight::PackedWith(_, own) if own.index == index => own.values.clone(),
            _ => self.dense().select(Axis(1), index),
        }
    }

    /// Overwrites selected columns. A packed weight keeps them beside itself.
    pub fn put_columns(&mut self, index: &[usize], values: Array2<T>) {
        match self {
            BaseWeight::Dense(weight) => write_columns(weight, index, &values),
            BaseWeight::Packed(packed) | BaseWeight::PackedWith(packed, _) => {
                *self = BaseWeight::PackedWith(packed.clone(), OwnColumns { index: index.to_vec(), values });
            }
        }
    }

    /// Bytes held at rest, without columns beside a packed weight.
    pub fn bytes(&self) -> usize {
        match self {
            BaseWeight::Dense(weight) => weight.len() * size_of::<T>(),
            BaseWeight::Packed(packed) | BaseWeight::PackedWith(packed, _) => packed.bytes(),
        }
    }

    /// The array, for a method that trains it or part of it in place.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed weight.
    pub fn dense_mut(&mut self, method: &'static str) -> Result<&mut Array2<T>> {
        match self {
            BaseWeight::Dense(weight) => Ok(weight),
            _ => Err(Error::invalid("method", method, "writes into the base weight, which is packed (quantized)")),
        }
    }
}

fn write_columns<T: Real>(dense: &mut Array2<T>, index: &[usize], values: &Array2<T>) {
    for (k, &i) in index.iter().enumerate() {
        dense.column_mut(i).assign(&values.column(k));
    }
}
