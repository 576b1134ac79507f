//! The weight under an adapter: dense, packed by a codec such as NF4, or stored elsewhere.

use super::stored_weight::{StoredWeight, WeightSource};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::precision::Precision;
use ndarray::{Array2, ArrayViewMut2, Axis, CowArray, Ix2};
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

/// A frozen matrix in a compressed form.
///
/// A codec implements this to become a base weight (QLoRA, QPaCA): decoding fills a dense array for
/// the time of one product and is dropped again.
pub trait PackedWeight<T>: Debug + Send + Sync {
    /// (out, in).
    fn shape(&self) -> (usize, usize);
    /// Writes every entry of the decoded matrix.
    fn decode_into(&self, dense: &mut ArrayViewMut2<T>);
    /// Writes the decoded rows from `first` on, restored in a format where the codec has one.
    fn decode_rows(&self, format: Precision, first: usize, dense: &mut ArrayViewMut2<T>);
    /// What known mistakes in reading the parts would make of them, by the mistake's name.
    fn misread(&self) -> Vec<(&'static str, Arc<dyn PackedWeight<T>>)> {
        Vec::new()
    }
    /// Bytes held, constants and second-level scales included.
    fn bytes(&self) -> usize;
}

/// A packed weight that is restored in a format each time it is read.
#[derive(Debug)]
struct Restored<T> {
    packed: Arc<dyn PackedWeight<T>>,
    format: Precision,
}

impl<T: Real> WeightSource<T> for Restored<T> {
    fn shape(&self) -> (usize, usize) {
        self.packed.shape()
    }

    fn read_rows(&self, rows: Range<usize>, into: &mut Array2<T>) -> Result<()> {
        self.packed.decode_rows(self.format, rows.start, &mut into.view_mut());
        Ok(())
    }
}

/// Columns that stand in place of those of a packed weight, which cannot hold them.
#[derive(Debug, Clone)]
pub struct OwnColumns<T> {
    pub(super) index: Vec<usize>,
    /// `out x r`.
    pub(super) values: Array2<T>,
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
    /// Shared with other models, or read each time it is needed.
    Stored(StoredWeight<T>),
}

impl<T: Real> BaseWeight<T> {
    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        match self {
            BaseWeight::Dense(weight) => weight.dim(),
            BaseWeight::Packed(packed) | BaseWeight::PackedWith(packed, _) => packed.shape(),
            BaseWeight::Stored(stored) => stored.shape(),
        }
    }

    /// Whether it is stored packed.
    pub fn is_packed(&self) -> bool {
        matches!(self, BaseWeight::Packed(_) | BaseWeight::PackedWith(..))
    }

    /// The matrix itself: borrowed when dense, decoded into a fresh array when packed. A stored
    /// weight that cannot be read is NaN here: [`BaseWeight::read`] says why.
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
            BaseWeight::Stored(stored) => match stored.in_memory() {
                Some(weight) => weight.dense(),
                None => CowArray::from(
                    stored.read().unwrap_or_else(|_| Array2::from_elem(stored.shape(), T::nan())),
                ),
            },
        }
    }

    /// As [`BaseWeight::dense`], with the reason where a stored weight cannot be read.
    ///
    /// # Errors
    /// As [`super::stored_weight::WeightSource::read_rows`].
    pub fn read(&self) -> Result<CowArray<'_, T, Ix2>> {
        match self {
            BaseWeight::Stored(stored) if stored.in_memory().is_none() => {
                stored.read().map(CowArray::from)
            }
            _ => Ok(self.dense()),
        }
    }

    /// As [`BaseWeight::columns`], with the reason where a stored weight cannot be read.
    ///
    /// # Errors
    /// As [`BaseWeight::read`].
    pub fn read_columns(&self, index: &[usize]) -> Result<Array2<T>> {
        match self {
            BaseWeight::Stored(stored) => stored.read_columns(index),
            _ => Ok(self.columns(index)),
        }
    }

    /// Changes the matrix, which keeps its shape; a stored one each time that it is read.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed weight.
    pub fn change(
        &mut self,
        method: &'static str,
        change: impl Fn(&mut Array2<T>) + Send + Sync + 'static,
    ) -> Result<()> {
        match self {
            BaseWeight::Stored(stored) => stored.change(change),
            _ => change(self.dense_mut(method)?),
        }
        Ok(())
    }

    /// Changes each entry by itself; those of a stored weight each time that it is read.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed weight.
    pub fn change_entries(
        &mut self,
        method: &'static str,
        change: impl Fn(T) -> T + Send + Sync + 'static,
    ) -> Result<()> {
        match self {
            BaseWeight::Stored(stored) => stored.change_entries(change),
            _ => self.dense_mut(method)?.par_mapv_inplace(change),
        }
        Ok(())
    }

    /// A packed weight that is restored in a format each time it is read, and can be changed like a
    /// stored one.
    pub fn restored(packed: Arc<dyn PackedWeight<T>>, format: Precision) -> Self {
        BaseWeight::Stored(StoredWeight::elsewhere(Arc::new(Restored { packed, format })))
    }

    /// Restores a packed weight in a format, and keeps it dense or, `later`, does so each time it
    /// is read; what it was packed in.
    pub fn unpack_in(
        &mut self,
        format: Precision,
        later: bool,
    ) -> Option<Arc<dyn PackedWeight<T>>> {
        let (packed, own) = match self {
            BaseWeight::Dense(_) | BaseWeight::Stored(_) => return None,
            BaseWeight::Packed(packed) => (packed.clone(), None),
            BaseWeight::PackedWith(packed, own) => (packed.clone(), Some(&*own)),
        };
        let own = own.cloned();
        *self = if later {
            Self::restored(packed.clone(), format)
        } else {
            let mut dense = Array2::zeros(packed.shape());
            packed.decode_rows(format, 0, &mut dense.view_mut());
            BaseWeight::Dense(dense)
        };
        if let Some(own) = own {
            self.put_columns(&own.index, own.values);
        }
        Some(packed)
    }

    /// Selected columns, `out x r`.
    pub fn columns(&self, index: &[usize]) -> Array2<T> {
        match self {
            BaseWeight::PackedWith(_, own) if own.index == index => own.values.clone(),
            BaseWeight::Stored(stored) if stored.own_columns(index).is_some() => {
                stored.own_columns(index).cloned().unwrap_or_default()
            }
            _ => self.dense().select(Axis(1), index),
        }
    }

    /// Overwrites selected columns. A packed weight keeps them beside itself.
    pub fn put_columns(&mut self, index: &[usize], values: Array2<T>) {
        match self {
            BaseWeight::Dense(weight) => write_columns(weight, index, &values),
            BaseWeight::Stored(stored) => stored.put_columns(index, values),
            BaseWeight::Packed(packed) | BaseWeight::PackedWith(packed, _) => {
                *self = BaseWeight::PackedWith(
                    packed.clone(),
                    OwnColumns { index: index.to_vec(), values },
                );
            }
        }
    }

    /// Bytes held at rest, without columns beside a packed weight.
    pub fn bytes(&self) -> usize {
        match self {
            BaseWeight::Dense(weight) => weight.len() * size_of::<T>(),
            BaseWeight::Packed(packed) | BaseWeight::PackedWith(packed, _) => packed.bytes(),
            BaseWeight::Stored(stored) => stored.bytes(),
        }
    }

    /// The array, for a method that trains it or part of it in place. A stored weight becomes this
    /// model's own.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed weight; as [`BaseWeight::read`].
    pub fn dense_mut(&mut self, method: &'static str) -> Result<&mut Array2<T>> {
        if let BaseWeight::Stored(stored) = self {
            *self = BaseWeight::Dense(stored.read()?);
        }
        match self {
            BaseWeight::Dense(weight) => Ok(weight),
            _ => Err(Error::invalid(
                "method",
                method,
                "writes into the base weight, which is packed (quantized)",
            )),
        }
    }
}

pub(super) fn write_columns<T: Real>(dense: &mut Array2<T>, index: &[usize], values: &Array2<T>) {
    for (k, &i) in index.iter().enumerate() {
        dense.column_mut(i).assign(&values.column(k));
    }
}
