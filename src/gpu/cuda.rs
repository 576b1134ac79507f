//! NVIDIA devices that the CUDA driver finds, and opening one.

use super::device::{DeviceInfo, Kind};
use super::guard::guarded;
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use burn::backend::cuda::CudaDevice;
use cudarc::driver::CudaContext;

/// Devices, or why there is none. Loading the driver library panics where it is absent.
fn count() -> Result<usize> {
    guarded("the CUDA driver", "listing devices", || {
        CudaContext::device_count()
            .map(|n| n.max(0) as usize)
            .map_err(|e| failure("listing devices", &e))
    })
}

fn failure(op: &'static str, error: &cudarc::driver::DriverError) -> Error {
    Error::Device { op, device: "the CUDA driver".into(), reason: error.to_string() }
}

fn describe(index: usize) -> Result<DeviceInfo> {
    guarded("the CUDA driver", "reading a device", || {
        let read = |e| failure("reading a device", &e);
        let context = CudaContext::new(index).map_err(read)?;
        let memory = context.total_mem().map_err(read)? as u64;
        let (major, minor) = context.compute_capability().map_err(read)?;
        Ok(DeviceInfo {
            choice: DeviceChoice::Cuda(index),
            name: context.name().map_err(read)?,
            backend: "CUDA".into(),
            kind: Kind::Discrete,
            driver: format!("compute capability {major}.{minor}"),
            // CubeCL's largest allocation on CUDA.
            max_buffer_bytes: memory / 4,
            memory_bytes: Some(memory),
        })
    })
}

/// Every CUDA device; none where there is no driver.
pub(super) fn list() -> Vec<DeviceInfo> {
    (0..count().unwrap_or(0)).filter_map(|index| describe(index).ok()).collect()
}

/// Opens device `index`.
pub(super) fn open(index: usize) -> Result<(CudaDevice, DeviceInfo)> {
    let none =
        |found: String| Error::NoDevice { wanted: DeviceChoice::Cuda(index).to_string(), found };
    match count() {
        Err(_) => Err(none(
            "no CUDA driver (libcuda) was found on this machine; use --device gpu or --device cpu"
                .into(),
        )),
        Ok(0) => {
            Err(none("the CUDA driver finds no device; use --device gpu or --device cpu".into()))
        }
        Ok(n) if index >= n => Err(none(format!("the CUDA driver finds {n}, numbered from 0"))),
        Ok(_) => Ok((CudaDevice::new(index), describe(index)?)),
    }
}
