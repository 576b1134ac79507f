//! Bytes of a device's training step: what is predicted from shapes against what the allocator
//! reports.
//!
//! ```text
//! at rest         weights + adapter tensors, 4 bytes a number
//! after forward   + saved activations + batch (ids, targets, angles) + the output projection's gradient if trained
//! ```
//!
//! The activations are those of [`crate::train::memory`]: the same rule decides. A device's
//! allocator tells what is held now, not the peak, so the comparison is made where a step holds the
//! most saved tensors: between its halves.

use super::DeviceModel;
use crate::error::Result;
use crate::gpu::{Device, Engine, Opened, Work};
use crate::linalg::Real;
use crate::model::{Batch, Model, StepOptions};
use std::fmt;

/// Predicted and measured bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepMemory {
    /// Weights and adapters, predicted.
    pub at_rest: usize,
    /// The same by the allocator.
    pub measured_at_rest: usize,
    /// Held between forward and backward, predicted.
    pub after_forward: usize,
    /// The same by the allocator.
    pub measured_after_forward: usize,
}

impl StepMemory {
    /// Uploads a model, runs a forward pass and reads the allocator; the device should do nothing
    /// else meanwhile.
    ///
    /// # Errors
    /// As [`DeviceModel::upload`] and [`DeviceModel::forward`]; [`crate::Error::Device`].
    pub fn measure<T: Real>(device: &Device, model: &Model<T>, batch: &Batch) -> Result<Self> {
        device.run("measuring memory", Measure { device, model, batch })
    }
}

impl fmt::Display for StepMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        write!(
            f,
            "memory: model {:.3} MiB predicted, {:.3} allocated; after forward {:.3} MiB \
             predicted, {:.3} allocated",
            mib(self.at_rest),
            mib(self.measured_at_rest),
            mib(self.after_forward),
            mib(self.measured_after_forward)
        )
    }
}

struct Measure<'a, T: Real> {
    device: &'a Device,
    model: &'a Model<T>,
    batch: &'a Batch,
}

impl<T: Real> Work for Measure<'_, T> {
    type Output = StepMemory;

    fn run<B: Engine>(self, on: &Opened<B>) -> Result<StepMemory> {
        let in_use = || -> Result<usize> {
            B::sync(&on.device).map_err(|e| on.failure("measuring memory", &e))?;
            Ok(self.device.memory()?.in_use_bytes as usize)
        };
        let before = in_use()?;
        let there = DeviceModel::upload(self.model, on)?;
        let measured_at_rest = in_use()?.saturating_sub(before);
        let mut gradients = there.zero_gradients();
        let pass = there.forward(self.batch, &StepOptions::default(), &mut gradients, None)?;
        let measured_after_forward = in_use()?.saturating_sub(before);
        let at_rest = resident_bytes(self.model);
        let saved: usize = pass.saved_bytes_by_name().iter().map(|(_, bytes)| bytes).sum();
        let after_forward = at_rest + saved + pass.batch_bytes() + gradients.bytes();
        Ok(StepMemory { at_rest, measured_at_rest, after_forward, measured_after_forward })
    }
}

/// Bytes of weights and of what methods hold beside them. In-place methods hold their indices only:
/// the original values of what they train stay with the CPU's model.
pub fn resident_bytes<T: Real>(model: &Model<T>) -> usize {
    use crate::adapters::Method;
    let width = model.config.hidden_size;
    let mut numbers = model.embedding.len() + model.lm_head.as_ref().map_or(0, |h| h.len()) + width;
    for layer in &model.layers {
        numbers += layer.vectors();
        for (_, projection) in layer.projections() {
            let (out, input) = projection.shape();
            let shapes = || projection.trainable_shapes().iter().map(|(r, c)| r * c).sum::<usize>();
            numbers += out * input;
            numbers += match &projection.method {
                Method::Frozen | Method::Full => 0,
                Method::Paca(paca) => paca.index.len(),
                Method::S2ft(_) => 0,
                _ => shapes(),
            };
        }
    }
    numbers * size_of::<f32>()
}
