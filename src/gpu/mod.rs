//! The same gradients and training steps on a GPU, by burn tensors: wgpu (Vulkan, Metal, DirectX
//! 12) and CUDA.
//!
//! Backward passes are written by hand here as on the processor: no autodiff graph, so that the
//! saved memory is what a method claims. Everything is in f32 and is tested against the processor's
//! f64 (`paper-notes/gpu.md`).

pub mod array;
pub mod attention;
#[cfg(feature = "cuda")]
mod cuda;
pub mod device;
mod guard;
pub mod product;
pub mod train;
mod wgpu_adapters;

pub use crate::device::ProductPrecision as Precision;
pub use device::{Device, DeviceInfo, Kind, Opened, Work};
pub use product::Engine;
