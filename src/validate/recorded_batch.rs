//! The batch of a recorded step, from its file.

use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::error::{Error, Result};
use crate::model::Batch;
use crate::tensor_file::TensorFile;
use ndarray::Array2;

/// Number of each token's document in its row, where a mask keeps documents apart.
pub(super) const DOCUMENTS: &str = "documents";

/// The batch of a step's file.
///
/// # Errors
/// [`Error::MissingTensor`]; [`Error::Format`] for ids, labels or masks of a wrong shape or kind.
pub fn read_batch(file: &TensorFile) -> Result<Batch> {
    let reason = "the batch of the step";
    let ids = integers(file, "input_ids", reason)?;
    if let Some((place, id)) = ids.indexed_iter().find(|(_, id)| u32::try_from(**id).is_err()) {
        return Err(file.malformed(
            "tensor input_ids",
            "ids of at least 0",
            format!("{id} at {place:?}"),
        ));
    }
    let ids = ids.mapv(|x| x as u32);
    // Without labels a step is judged from the gradient of its loss.
    let given = ["dlogits", "dfinal"].iter().any(|name| file.contains(name));
    let labels = if given && !file.contains("labels") {
        Array2::from_elem(ids.dim(), IGNORED_LABEL)
    } else {
        integers(file, "labels", reason)?
    };
    let in_file = |e: Error| match e {
        Error::ShapeMismatch { arg, expected, got, .. } => {
            file.malformed(format!("tensor {arg}"), expected, got)
        }
        Error::InvalidParam { name, value, requirement } => {
            file.malformed(name, requirement, value)
        }
        other => other,
    };
    let mut batch = Batch::new(ids, labels).map_err(in_file)?;
    if file.contains("attention_mask") {
        let mask = integers(file, "attention_mask", reason)?;
        if let Some((place, value)) = mask.indexed_iter().find(|(_, v)| **v != 0 && **v != 1) {
            let found = format!("{value} at {place:?}");
            return Err(file.malformed("tensor attention_mask", "zeros and ones", found));
        }
        batch = batch.with_attention_mask(mask.mapv(|x| x == 1)).map_err(in_file)?;
    }
    if file.contains(DOCUMENTS) {
        let numbers = integers(file, DOCUMENTS, reason)?;
        if let Some(starts) = Batch::documents_of_numbers(&numbers) {
            batch = batch.with_documents(starts).map_err(in_file)?;
        }
    }
    if file.contains("position_ids") {
        let positions = integers(file, "position_ids", reason)?;
        if let Some(bad) = positions.iter().find(|p| **p < 0 || **p > i64::from(u32::MAX)) {
            return Err(file.malformed(
                "tensor position_ids",
                "positions of at least 0",
                bad.to_string(),
            ));
        }
        let positions = positions.mapv(|x| x as u32);
        // Positions that start again without a mask: documents that are kept apart, unless the step
        // says otherwise.
        if batch.attention_mask.is_none()
            && batch.documents.is_none()
            && let Some(documents) = Batch::documents_of_positions(&positions)
        {
            batch = batch.with_documents(documents).map_err(in_file)?;
        }
        batch = batch.with_position_ids(positions).map_err(in_file)?;
    }
    Ok(batch)
}

/// Refuses ids and labels that the model does not have.
pub(super) fn in_vocabulary(file: &TensorFile, batch: &Batch, size: usize) -> Result<()> {
    let outside = |id: i64| id < 0 || id as u64 >= size as u64;
    if let Some((place, id)) =
        batch.input_ids.indexed_iter().find(|(_, id)| outside(i64::from(**id)))
    {
        let expected = format!("ids below the vocabulary size {size}");
        return Err(file.malformed("tensor input_ids", expected, format!("{id} at {place:?}")));
    }
    let ignored = |label: i64| label == IGNORED_LABEL;
    if let Some((place, label)) =
        batch.labels.indexed_iter().find(|(_, l)| outside(**l) && !ignored(**l))
    {
        let expected = format!("{IGNORED_LABEL} or ids below the vocabulary size {size}");
        return Err(file.malformed("tensor labels", expected, format!("{label} at {place:?}")));
    }
    Ok(())
}

pub(super) fn row_lengths(
    file: &TensorFile,
    (rows, length): (usize, usize),
) -> Result<Option<Vec<usize>>> {
    if !file.contains("row_lengths") {
        return Ok(None);
    }
    let values = integers(file, "row_lengths", "tokens of each row")?;
    let fits = |n: &i64| usize::try_from(*n).is_ok_and(|n| n <= length);
    if values.len() != rows || !values.iter().all(fits) {
        let expected = format!("{rows} numbers of at most {length}");
        return Err(file.malformed("tensor row_lengths", expected, format!("{values}")));
    }
    Ok(Some(values.iter().map(|&n| n as usize).collect()))
}

/// Weight of the prediction made at each row, from those of the labels: row b T + t predicts label
/// (b, t + 1).
pub(super) fn token_weights(
    file: &TensorFile,
    (rows, length): (usize, usize),
) -> Result<Option<Vec<f64>>> {
    if !file.contains("token_weights") {
        return Ok(None);
    }
    let weights = file.matrix::<f64>("token_weights", "weights of the labels")?;
    if weights.dim() != (rows, length) {
        let expected = format!("shape [{rows}, {length}], that of the labels");
        return Err(file.malformed(
            "tensor token_weights",
            expected,
            format!("{:?}", weights.dim()),
        ));
    }
    let next = |i: usize| {
        if i % length + 1 < length { weights[[i / length, i % length + 1]] } else { 0.0 }
    };
    Ok(Some((0..rows * length).map(next).collect()))
}

fn integers(file: &TensorFile, name: &str, reason: &str) -> Result<Array2<i64>> {
    let values = file.matrix::<f64>(name, reason)?;
    match values.iter().find(|x| x.fract().abs() > 0.0 || x.abs() > 1e15) {
        Some(bad) => Err(file.malformed(format!("tensor {name}"), "integers", bad.to_string())),
        None => Ok(values.mapv(|x| x as i64)),
    }
}
