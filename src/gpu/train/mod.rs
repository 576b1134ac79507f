//! Training steps on a device: forward, partial backward and optimizer for every method with a dense base weight.
//!
//! A [`DeviceModel`] is uploaded from a [`crate::model::Model`] and writes its trained values back to it, so that
//! checkpoints, adapters, tasks, evaluation and file formats stay the CPU's. The step mirrors the CPU's file for
//! block: what a layer saves is decided by the same rule, layers below the first trainable one get no backward, PaCA
//! saves x[:, idx] and S2FT its slice only. Everything is f32; sums that a report rests on (loss, gradient norm) end
//! in double precision on the host. Notes: `paper-notes/gpu-training.md`.

pub mod blocks;
mod engine;
mod gradients;
mod layer;
pub mod memory;
mod model;
mod optimizer;
mod projection;
mod validate;

pub use engine::train_on;
pub use gradients::DeviceGradients;
pub use layer::DeviceTap;
pub use memory::StepMemory;
pub use model::{DeviceLoss, DeviceModel, DevicePass};
pub use optimizer::DeviceOptimizer;
pub use validate::DeviceCase;
