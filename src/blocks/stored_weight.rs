//! A weight that several models share, or that is read each time it is needed; what a model changes
//! in it is kept beside it.

use super::base_weight::{BaseWeight, OwnColumns, write_columns};
use super::embedding::check_ids;
use crate::error::Result;
use crate::linalg::Real;
use ndarray::{Array2, Axis};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Gives the rows of a matrix, from a disk for instance.
pub trait WeightSource<T>: fmt::Debug + Send + Sync {
    /// (out, in).
    fn shape(&self) -> (usize, usize);
    /// Writes some rows into an array of their shape, which lies row by row in one piece.
    ///
    /// # Errors
    /// Those of reading; a tensor that is not finite.
    fn read_rows(&self, rows: Range<usize>, into: &mut Array2<T>) -> Result<()>;
}

/// Where the matrix is.
#[derive(Debug, Clone)]
enum Source<T> {
    Memory(Arc<BaseWeight<T>>),
    Elsewhere(Arc<dyn WeightSource<T>>),
}

/// A function of an entry.
type OfEntry<T> = dyn Fn(T) -> T + Send + Sync;
/// A change of a matrix in place.
type OfMatrix<T> = dyn Fn(&mut Array2<T>) + Send + Sync;

/// A change of a weight, made again each time it is read.
#[derive(Clone)]
enum Change<T> {
    /// Of each entry by itself.
    Entries(Arc<OfEntry<T>>),
    /// Of the whole matrix, its shape excepted.
    Whole(Arc<OfMatrix<T>>),
}

/// A weight that is shared or read when it is needed. A clone costs nothing.
#[derive(Clone)]
pub struct StoredWeight<T> {
    source: Source<T>,
    changes: Vec<Change<T>>,
    own: Option<OwnColumns<T>>,
}

impl<T> fmt::Debug for StoredWeight<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredWeight").field("changes", &self.changes.len()).finish_non_exhaustive()
    }
}

/// Numbers of a block of rows.
pub(crate) const BLOCK: usize = 1 << 23;

impl<T: Real> StoredWeight<T> {
    /// A matrix in memory that several models read.
    pub fn shared(weight: Array2<T>) -> Self {
        let source = Source::Memory(Arc::new(BaseWeight::Dense(weight)));
        Self { source, changes: Vec::new(), own: None }
    }

    /// A matrix that is read each time it is needed.
    pub fn elsewhere(source: Arc<dyn WeightSource<T>>) -> Self {
        Self { source: Source::Elsewhere(source), changes: Vec::new(), own: None }
    }

    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        match &self.source {
            Source::Memory(weight) => weight.shape(),
            Source::Elsewhere(source) => source.shape(),
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.source {
            Source::Memory(weight) => weight.bytes(),
            Source::Elsewhere(_) => 0,
        }
    }

    /// The weight itself, where it is in memory as it is.
    pub(crate) fn in_memory(&self) -> Option<&BaseWeight<T>> {
        match &self.source {
            Source::Memory(weight) if self.changes.is_empty() && self.own.is_none() => Some(weight),
            _ => None,
        }
    }

    /// Changes each entry by itself.
    pub fn change_entries(&mut self, change: impl Fn(T) -> T + Send + Sync + 'static) {
        self.keep_own();
        self.changes.push(Change::Entries(Arc::new(change)));
    }

    /// Changes the matrix, which keeps its shape.
    pub fn change(&mut self, change: impl Fn(&mut Array2<T>) + Send + Sync + 'static) {
        self.keep_own();
        self.changes.push(Change::Whole(Arc::new(change)));
    }

    /// Columns of its own become a change like any other, so that later ones act on them.
    fn keep_own(&mut self) {
        if let Some(own) = self.own.take() {
            self.changes.push(Change::Whole(Arc::new(move |dense| {
                write_columns(dense, &own.index, &own.values)
            })));
        }
    }

    /// Puts columns in place of the weight's.
    pub(super) fn put_columns(&mut self, index: &[usize], values: Array2<T>) {
        if self.own.as_ref().is_some_and(|own| own.index != index) {
            self.keep_own();
        }
        self.own = Some(OwnColumns { index: index.to_vec(), values });
    }

    /// Selected columns, if they are its own.
    pub(super) fn own_columns(&self, index: &[usize]) -> Option<&Array2<T>> {
        self.own.as_ref().filter(|own| own.index == index).map(|own| &own.values)
    }

    /// Reads the matrix into an array of its shape.
    ///
    /// # Errors
    /// As [`WeightSource::read_rows`].
    pub fn read_into(&self, dense: &mut Array2<T>) -> Result<()> {
        match &self.source {
            Source::Memory(weight) => dense.assign(&weight.dense()),
            Source::Elsewhere(source) => source.read_rows(0..source.shape().0, dense)?,
        }
        for change in &self.changes {
            match change {
                Change::Entries(change) => dense.par_mapv_inplace(|x| change(x)),
                Change::Whole(change) => change(dense),
            }
        }
        if let Some(own) = &self.own {
            write_columns(dense, &own.index, &own.values);
        }
        Ok(())
    }

    /// The matrix in an array of its own.
    ///
    /// # Errors
    /// As [`WeightSource::read_rows`].
    pub fn read(&self) -> Result<Array2<T>> {
        let mut dense = Array2::zeros(self.shape());
        self.read_into(&mut dense)?;
        Ok(dense)
    }

    /// Calls `visit(first row, rows)` on blocks of rows, in order.
    ///
    /// # Errors
    /// As [`WeightSource::read_rows`]; those of `visit`.
    pub fn blocks(&self, visit: &mut dyn FnMut(usize, &Array2<T>) -> Result<()>) -> Result<()> {
        let (all, width) = self.shape();
        let height = (BLOCK / width.max(1)).max(1);
        let mut block = Array2::zeros((0, width));
        for first in (0..all).step_by(height) {
            let rows = first..all.min(first + height);
            if block.nrows() != rows.len() {
                block = Array2::zeros((rows.len(), width));
            }
            self.read_some(rows, &mut block)?;
            visit(first, &block)?;
        }
        Ok(())
    }

    /// Rows by number, in that order.
    ///
    /// # Errors
    /// As [`WeightSource::read_rows`]; [`crate::Error::InvalidParam`] for a row that the weight
    /// does not have.
    pub fn gather(&self, rows: &[u32]) -> Result<Array2<T>> {
        let (all, width) = self.shape();
        check_ids(rows, all)?;
        let mut gathered = Array2::zeros((rows.len(), width));
        let mut row = Array2::zeros((1, width));
        let mut seen = std::collections::BTreeMap::new();
        for (i, &id) in rows.iter().enumerate() {
            let at = id as usize;
            match seen.get(&id) {
                Some(&first) => row.assign(&gathered.slice(ndarray::s![first..first + 1, ..])),
                None => {
                    self.read_some(at..at + 1, &mut row)?;
                    seen.insert(id, i);
                }
            }
            gathered.row_mut(i).assign(&row.row(0));
        }
        Ok(gathered)
    }

    /// Some rows. A change of the whole matrix needs all of it.
    fn read_some(&self, rows: Range<usize>, into: &mut Array2<T>) -> Result<()> {
        if self.own.is_some()
            || self.changes.iter().any(|change| matches!(change, Change::Whole(_)))
        {
            into.assign(&self.read()?.slice(ndarray::s![rows, ..]));
            return Ok(());
        }
        match &self.source {
            Source::Memory(weight) => into.assign(&weight.dense().slice(ndarray::s![rows, ..])),
            Source::Elsewhere(source) => source.read_rows(rows, into)?,
        }
        for change in &self.changes {
            if let Change::Entries(change) = change {
                into.mapv_inplace(|x| change(x));
            }
        }
        Ok(())
    }

    /// Selected columns, `out x r`.
    ///
    /// # Errors
    /// As [`WeightSource::read_rows`].
    pub(super) fn read_columns(&self, index: &[usize]) -> Result<Array2<T>> {
        match (self.own_columns(index), self.in_memory()) {
            (Some(own), _) => Ok(own.clone()),
            (None, Some(weight)) => Ok(weight.dense().select(Axis(1), index)),
            (None, None) => Ok(self.read()?.select(Axis(1), index)),
        }
    }
}
