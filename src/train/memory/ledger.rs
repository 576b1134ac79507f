//! Memory of a training step, read off the live objects.

use super::{Memory, over_layers};
use crate::blocks::cross_entropy::LOGIT_ROWS;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::model::{Batch, Gradients, Model, StepOptions};
use crate::ops::loss_chunk;
use crate::train::optimizer::Optimizer;

/// Saved tensors that do not come from the buffers a step reuses.
const OUTSIDE: [&str; 4] = ["rope", "inverse_rms", ".projected", ".columns"];

/// Runs one step's forward and backward and reads the bytes held at its peak: weights, adapters,
/// gradient sinks and optimizer state as they are, activations by name as saved at the end of the
/// forward pass, and as workspace the reused buffers beyond those, and what lives outside them for
/// a moment: the embedded tokens, one chunk of logits, one decoded weight. The gradients keep what
/// the step added.
///
/// Call it after a few steps: the first ones still grow the buffers and the optimizer's state.
///
/// # Errors
/// As [`Model::forward`] and [`Model::backward`].
pub fn measure<T: Real>(
    model: &Model<T>,
    optimizer: &Optimizer<T>,
    gradients: &mut Gradients<T>,
    batch: &Batch,
    options: &StepOptions,
) -> Result<Memory> {
    let mut cost = Cost::default();
    let pass = model.forward(batch, options, gradients, &mut cost)?;
    let named = pass.saved_bytes_by_name();
    model.backward(pass, gradients, &mut cost)?;
    let (weights, adapters) = model.weight_bytes();
    let mut memory = Memory {
        weights,
        adapters,
        gradients: gradients.bytes_by_name().iter().map(|(_, bytes)| bytes).sum(),
        optimizer: optimizer.bytes(),
        trained: model.trainable_elements(),
        ..Memory::default()
    };
    let inside = |name: &str| !OUTSIDE.iter().any(|outside| name.ends_with(outside));
    let reused: usize = named.iter().filter(|(name, _)| inside(name)).map(|(_, bytes)| bytes).sum();
    memory.activations = over_layers(named);
    let (tokens, width) = (batch.tokens(), model.config.hidden_size);
    let chunk = loss_chunk(tokens, width, model.config.vocab_size, size_of::<T>());
    let capped = if model.config.options.logit_cap.is_some() {
        LOGIT_ROWS.min(tokens) * model.config.vocab_size
    } else {
        0
    };
    let projections =
        model.layers.iter().flat_map(|layer| layer.projections().map(|(_, projection)| projection));
    let packed = projections.filter(|p| p.base.is_packed()).map(|p| p.shape().0 * p.shape().1);
    let moment = (tokens * width + chunk + capped + packed.max().unwrap_or(0)) * size_of::<T>();
    memory.workspace = gradients.scratch_bytes().saturating_sub(reused) + moment;
    Ok(memory)
}
