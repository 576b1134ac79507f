//! One more entry in each head's softmax: a trained number that takes weight and gives no value.

use super::causal_attention::AttentionShape;
use super::require_shape;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2, s};

fn require_heads<T>(sinks: &[T], shape: &AttentionShape) -> Result<()> {
    if sinks.len() == shape.heads {
        return Ok(());
    }
    Err(Error::shape("attention_sinks", "sinks", (1, shape.heads), (1, sinks.len())))
}

/// Adds exp(sink) to the denominator of every row: the output shrinks, the log-sum-exp grows.
///
/// Shapes: output `(B T) x (H d)`, log-sum-exp `(B H) x T`, one sink for each head.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn add_sinks<T: Real>(
    output: &mut Array2<T>,
    log_sum_exp: &mut Array2<T>,
    sinks: &[T],
    shape: &AttentionShape,
) -> Result<()> {
    require_heads(sinks, shape)?;
    require_shape(
        "add_sinks",
        "log_sum_exp",
        &log_sum_exp.view(),
        (shape.batch * shape.heads, shape.length),
    )?;
    for (index, mut row) in log_sum_exp.rows_mut().into_iter().enumerate() {
        let (batch, head) = (index / shape.heads, index % shape.heads);
        let columns = head * shape.head_dim..(head + 1) * shape.head_dim;
        for (t, lse) in row.iter_mut().enumerate() {
            let mut out = output.slice_mut(s![batch * shape.length + t, columns.clone()]);
            if *lse == T::infinity() {
                // No key at all: only the sink is left, and exp(s - sink) of a hidden score is
                // still 0.
                *lse = sinks[head];
                continue;
            }
            let more = (sinks[head] - *lse).exp();
            let kept = T::one() / (T::one() + more);
            out.mapv_inplace(|o| o * kept);
            *lse = if more.is_finite() { *lse + more.ln_1p() } else { sinks[head] };
        }
    }
    Ok(())
}

/// The sinks' gradient: minus the sum over rows of exp(sink - lse) (G . O), with what [`add_sinks`]
/// left.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn sinks_backward<T: Real>(
    upstream: ArrayView2<T>,
    output: ArrayView2<T>,
    log_sum_exp: ArrayView2<T>,
    sinks: &[T],
    shape: &AttentionShape,
) -> Result<Vec<T>> {
    require_heads(sinks, shape)?;
    require_shape("sinks_backward", "upstream", &upstream, output.dim())?;
    require_shape(
        "sinks_backward",
        "log_sum_exp",
        &log_sum_exp,
        (shape.batch * shape.heads, shape.length),
    )?;
    let mut gradient = vec![T::zero(); shape.heads];
    for (index, row) in log_sum_exp.rows().into_iter().enumerate() {
        let (batch, head) = (index / shape.heads, index % shape.heads);
        let columns = head * shape.head_dim..(head + 1) * shape.head_dim;
        for (t, &lse) in row.iter().enumerate() {
            let at = s![batch * shape.length + t, columns.clone()];
            gradient[head] -= (sinks[head] - lse).exp() * upstream.slice(at).dot(&output.slice(at));
        }
    }
    Ok(gradient)
}
