//! The device under test, the program and the test data. A binary of these tests may be carried to
//! a machine without cargo and run there from the project's folder: see `paper-notes/gpu-runs.md`.

use peft_limits::device::DeviceChoice;
use peft_limits::gpu::Device;
use std::path::{Path, PathBuf};

/// What `PEFT_LIMITS_DEVICE` names, as commands do; else the first device that wgpu finds.
pub fn choice() -> DeviceChoice {
    match std::env::var("PEFT_LIMITS_DEVICE") {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("PEFT_LIMITS_DEVICE: {e}")),
        Err(_) => DeviceChoice::Gpu(0),
    }
}

/// The device, opened.
pub fn device() -> Device {
    Device::open(choice()).unwrap_or_else(|e| {
        panic!(
            "these tests need a Vulkan, Metal or DirectX 12 device; Mesa's llvmpipe counts (see \
                .ci/gpu): {e}"
        )
    })
}

/// A file or folder of `tests/data`.
pub fn data(name: &str) -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(PathBuf::new, PathBuf::from);
    root.join("tests/data").join(Path::new(name))
}

/// Runs an expression on the opened device, which it sees as `&Opened<B>` of its backend.
macro_rules! on_device {
    ($on:ident => $body:expr) => {
        match &$crate::chosen::device() {
            peft_limits::gpu::Device::Wgpu($on) => $body,
            // Compiled twice only where the program is built too: a check of the library alone has
            // no card.
            #[cfg(all(feature = "cuda", feature = "cli"))]
            peft_limits::gpu::Device::Cuda($on) => $body,
            #[cfg(all(feature = "cuda", not(feature = "cli")))]
            _ => panic!("built without the feature cli, these tests run on wgpu's devices alone"),
        }
    };
}
pub(crate) use on_device;
