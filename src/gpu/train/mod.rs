//! Training steps on a device: forward, partial backward and optimizer for every method with a
//! dense base weight.
//!
//! A [`DeviceModel`] is uploaded from a [`crate::model::Model`] and writes its trained values back
//! to it, so that checkpoints, adapters, tasks, evaluation and file formats stay the CPU's. The
//! step is the CPU's, over the operations of [`Gpu`]: what a layer saves is decided in the same
//! place. Numbers are f32, and so are products unless [`DeviceModel::with_products`] rounds their
//! operands; sums that a report rests on (loss, gradient norm) end in double precision on the host.
//! Notes: `paper-notes/gpu-training.md`.

pub mod blocks;
mod engine;
mod gradients;
pub mod memory;
mod model;
mod ops;
mod optimizer;
mod validate;

pub use engine::train_on;
pub use gradients::DeviceGradients;
pub use memory::StepMemory;
pub use model::{DeviceLoss, DeviceModel, DevicePass, DeviceTap};
pub use ops::{DeviceInputs, Gpu};
pub use optimizer::DeviceOptimizer;
pub use validate::DeviceCase;
