//! Token embedding: x_i = `E[id_i]`.

use super::require_shape;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// Refuses an id outside the vocabulary.
///
/// # Errors
/// [`Error::InvalidParam`] naming its position.
pub fn check_ids(ids: &[u32], vocabulary: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocabulary) {
        Some(i) => {
            let requirement = format!("must be below the vocabulary size {vocabulary}");
            Err(Error::invalid(format!("input_ids[{i}]"), ids[i], requirement))
        }
        None => Ok(()),
    }
}

/// Row i of the result is row `ids[i]` of the table.
///
/// Shapes: table `V x D`, result `N x D`.
///
/// # Errors
/// [`Error::InvalidParam`] for an id outside the vocabulary, naming its position.
pub fn embedding_forward<T: Real>(ids: &[u32], table: ArrayView2<T>) -> Result<Array2<T>> {
    check_ids(ids, table.nrows())?;
    let mut x = Array2::zeros((ids.len(), table.ncols()));
    for (&id, mut row) in ids.iter().zip(x.rows_mut()) {
        row.assign(&table.row(id as usize));
    }
    Ok(x)
}

/// d`E[id_i]` += dx_i, in token order.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn embedding_backward<T: Real>(
    ids: &[u32],
    dx: ArrayView2<T>,
    dtable: &mut ArrayViewMut2<T>,
) -> Result<()> {
    require_shape("embedding_backward", "dx", &dx, (ids.len(), dtable.ncols()))?;
    for (&id, row) in ids.iter().zip(dx.rows()) {
        let mut sink = dtable.row_mut(id as usize);
        sink += &row;
    }
    Ok(())
}
