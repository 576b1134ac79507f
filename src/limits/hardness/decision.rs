//! Reading the answer off an attention output, or off the gradient of the query adapter.

use super::embedding::{Embedding, Form, HEAD_DIM};
use super::instance::NEAR;
use crate::attention::Gradients;
use crate::error::{Error, Result};
use crate::linalg::Real;

/// What an answer is read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oracle {
    /// The output O, row by row.
    Output,
    /// dB_Q alone, of a head with this loss.
    LoraGradient(Form),
}

/// Whether the instance has a near pair, according to what a gradient routine returned for its
/// head.
///
/// From the output: R_i = M O_i / (1 - O_i) exceeds the mean of a null row by half a near pair in
/// some row. From the gradient: sum_i O_i^p (1 - O_i), with p = 1 for G = 1 and 2 for Y = 0,
/// exceeds its null value by half of what a near pair adds. Either is right for certain once
/// [`guaranteed`] holds and the routine is exact.
///
/// # Errors
/// [`Error::ShapeMismatch`] if the gradients are not those of a head of [`Embedding::head`].
pub fn has_near_pair<T: Real>(
    embedding: &Embedding,
    gradients: &Gradients<T>,
    oracle: Oracle,
) -> Result<bool> {
    match oracle {
        Oracle::Output => {
            if gradients.output.dim() != (embedding.size, 1) {
                return Err(Error::shape(
                    "has_near_pair",
                    "O",
                    (embedding.size, 1),
                    gradients.output.dim(),
                ));
            }
            Ok(output_tells(embedding, gradients.output.iter().map(|o| o.widen())))
        }
        Oracle::LoraGradient(form) => {
            let db = gradients.lora_b.query.as_ref().map_or((0, 0), |db| db.dim());
            let Some(db) = gradients.lora_b.query.as_ref().filter(|_| db == (HEAD_DIM, 1)) else {
                return Err(Error::shape("has_near_pair", "dBQ", (HEAD_DIM, 1), db));
            };
            let beta = 1.0 / HEAD_DIM as f64;
            let total = -db[[HEAD_DIM - 1, 0]].widen() / (beta * embedding.gamma);
            Ok(gradient_margin(embedding, total, form) > 0.0)
        }
    }
}

/// Whether some row of an output O says that there is a near pair.
pub fn output_tells(embedding: &Embedding, output: impl IntoIterator<Item = f64>) -> bool {
    let threshold = output_threshold(embedding);
    output.into_iter().any(|o| row_sum(embedding, o) > threshold)
}

/// How far `total` = sum_i O_i^p (1 - O_i) lies above the threshold of the decision (below:
/// negative), relative to itself.
///
/// As every entry of the last 32 rows of dB_Q is -beta Gamma times the total, and none is larger,
/// an entrywise error of this share of the largest entry is the least that turns the answer.
pub fn gradient_margin(embedding: &Embedding, total: f64, form: Form) -> f64 {
    (total - gradient_threshold(embedding, form)) / total.abs()
}

/// R_i from O_i; infinite from an output of 1 or more, which only an approximation gives.
fn row_sum(embedding: &Embedding, output: f64) -> f64 {
    if output >= 1.0 { f64::INFINITY } else { embedding.dummy_mass() * output / (1.0 - output) }
}

fn output_threshold(embedding: &Embedding) -> f64 {
    embedding.background() + 0.5 * embedding.pair(NEAR)
}

/// O^p (1 - O) as a function of R.
fn of_row_sum(embedding: &Embedding, row_sum: f64, form: Form) -> f64 {
    form.of_row(row_sum / (row_sum + embedding.dummy_mass()))
}

fn gradient_threshold(embedding: &Embedding, form: Form) -> f64 {
    let null = of_row_sum(embedding, embedding.background(), form);
    let planted = of_row_sum(embedding, embedding.background() + embedding.pair(NEAR), form);
    embedding.size as f64 * null + 0.5 * (planted - null)
}

/// Whether the promise alone makes the answer of an exact routine right on every instance.
///
/// Output: no null row, at most n exp(x / 2), passes the threshold, and a near pair alone does.
/// Gradient: n null rows do not, and the planted row alone does; O^p (1 - O) grows with R up to R =
/// p M, which bounds null rows.
pub fn guaranteed(embedding: &Embedding, oracle: Oracle) -> bool {
    let (near, null) = (embedding.pair(NEAR), embedding.largest_null());
    match oracle {
        Oracle::Output => near > output_threshold(embedding) && null < output_threshold(embedding),
        Oracle::LoraGradient(form) => {
            // The planted row has between a near pair and that with n - 1 null pairs; O^p (1 - O)
            // has one maximum.
            let row = |row_sum: f64| of_row_sum(embedding, row_sum, form);
            let threshold = gradient_threshold(embedding, form);
            null <= f64::from(form.power()) * embedding.dummy_mass()
                && embedding.size as f64 * row(null) < threshold
                && row(near).min(row(near + null)) > threshold
        }
    }
}
