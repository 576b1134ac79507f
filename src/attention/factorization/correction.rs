//! A sparse matrix added to Phi Psi^T, read by rows and by columns.

use crate::error::{Error, Result};
use crate::linalg::Real;
use std::sync::OnceLock;

/// Corrections of single pairs: exp(S - shift) ~= Phi Psi^T + C with C sparse.
///
/// Entries are kept by rows for the query side and, once a column is asked for, by columns for the
/// key side, so that both sides are summed in a fixed order and in parallel.
#[derive(Debug, Clone, Default)]
pub struct SparseCorrection<T> {
    by_row: Compressed<T>,
    by_column: OnceLock<Compressed<T>>,
    columns: usize,
}

/// Lists laid end to end: list i is `starts[i]..starts[i + 1]`.
#[derive(Debug, Clone, Default)]
struct Compressed<T> {
    starts: Vec<usize>,
    indices: Vec<u32>,
    values: Vec<T>,
}

impl<T: Real> Compressed<T> {
    fn list(&self, i: usize) -> impl Iterator<Item = (usize, T)> + '_ {
        let range = self.starts[i]..self.starts[i + 1];
        self.indices[range.clone()]
            .iter()
            .map(|&j| j as usize)
            .zip(self.values[range].iter().copied())
    }

    fn transposed(&self, columns: usize) -> Self {
        let mut starts = vec![0usize; columns + 1];
        self.indices.iter().for_each(|&j| starts[j as usize + 1] += 1);
        for j in 0..columns {
            starts[j + 1] += starts[j];
        }
        let mut next = starts.clone();
        let mut indices = vec![0u32; self.indices.len()];
        let mut values = vec![T::zero(); self.values.len()];
        for i in 0..self.starts.len() - 1 {
            for (j, x) in self.list(i) {
                indices[next[j]] = i as u32;
                values[next[j]] = x;
                next[j] += 1;
            }
        }
        Self { starts, indices, values }
    }
}

/// Most entries that a correction may have: 1 GB in double precision. A threshold that keeps more
/// has lost to the exact gradient, which stores no pair at all.
pub const MAX_PAIRS: usize = 1 << 26;

impl<T: Real> SparseCorrection<T> {
    /// From the entries (column, value) of each row, columns below `columns`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] above [`MAX_PAIRS`] entries.
    pub fn from_rows(rows: &[Vec<(u32, T)>], columns: usize) -> Result<Self> {
        let pairs: usize = rows.iter().map(Vec::len).sum();
        if pairs > MAX_PAIRS {
            return Err(Error::TooLarge {
                what: "a sparse correction (raise the threshold)".into(),
                needed: pairs as u128,
                limit: MAX_PAIRS as u128,
                unit: "pairs",
            });
        }
        let mut starts = Vec::with_capacity(rows.len() + 1);
        starts.push(0);
        starts.extend(rows.iter().scan(0, |end, row| {
            *end += row.len();
            Some(*end)
        }));
        let (mut indices, mut values) = (Vec::with_capacity(pairs), Vec::with_capacity(pairs));
        for row in rows {
            indices.extend(row.iter().map(|f| f.0));
            values.extend(row.iter().map(|f| f.1));
        }
        let by_row = Compressed { starts, indices, values };
        Ok(Self { by_row, by_column: OnceLock::new(), columns })
    }

    /// (key, value) of the entries of a query row.
    pub fn row(&self, query: usize) -> impl Iterator<Item = (usize, T)> + '_ {
        self.by_row.list(query)
    }

    /// Keys and values of the entries of a query row.
    pub fn row_slices(&self, query: usize) -> (&[u32], &[T]) {
        let range = self.by_row.starts[query]..self.by_row.starts[query + 1];
        (&self.by_row.indices[range.clone()], &self.by_row.values[range])
    }

    /// (query, value) of the entries of a key column.
    pub fn column(&self, key: usize) -> impl Iterator<Item = (usize, T)> + '_ {
        self.by_column.get_or_init(|| self.by_row.transposed(self.columns)).list(key)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.by_row.values.len()
    }

    /// Whether no pair is corrected.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_hold_the_same_entries() {
        let rows = vec![vec![(2u32, 1.0), (0, 2.0)], vec![], vec![(2, 3.0)]];
        let sparse = SparseCorrection::<f64>::from_rows(&rows, 4).unwrap();
        assert_eq!(sparse.row(0).collect::<Vec<_>>(), [(2, 1.0), (0, 2.0)]);
        assert_eq!(sparse.row(1).count(), 0);
        assert_eq!(sparse.column(2).collect::<Vec<_>>(), [(0, 1.0), (2, 3.0)]);
        assert_eq!((sparse.column(1).count(), sparse.column(3).count(), sparse.len()), (0, 0, 3));
    }
}
