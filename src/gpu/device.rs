//! Finding, describing and opening a GPU, and running work on it.

use super::guard::guarded;
use super::product::Engine;
use super::wgpu_adapters;
use crate::device::{DeviceChoice, ProductPrecision as Precision};
use crate::error::{Error, Result};
use burn::backend::Wgpu;
use burn::tensor::backend::Backend;
use cubecl::Runtime;
use std::fmt;

/// What sort of hardware a device is, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A card with memory of its own.
    Discrete,
    /// Part of the processor.
    Integrated,
    /// A share of a card in a virtual machine.
    Virtual,
    /// The driver does not say.
    Unknown,
    /// A program on the processor (llvmpipe): right, but slow; its times say nothing about GPUs.
    Software,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Discrete => "discrete",
            Kind::Integrated => "integrated",
            Kind::Virtual => "virtual",
            Kind::Unknown => "unknown",
            Kind::Software => "software",
        })
    }
}

/// A device with its limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// How commands name it.
    pub choice: DeviceChoice,
    /// The hardware's name.
    pub name: String,
    /// Vulkan, Metal, DirectX 12 or CUDA.
    pub backend: String,
    /// What sort of hardware it is.
    pub kind: Kind,
    /// Driver and version.
    pub driver: String,
    /// Largest single buffer, bytes.
    pub max_buffer_bytes: u64,
    /// Memory of the device, bytes, where the driver tells.
    pub memory_bytes: Option<u64>,
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {}, {})", self.choice, self.name, self.backend, self.kind)
    }
}

/// Bytes of a device's allocator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Held by tensors now, without padding.
    pub in_use_bytes: u64,
    /// Taken from the driver.
    pub reserved_bytes: u64,
}

/// An opened device of one burn backend.
#[derive(Debug, Clone)]
pub struct Opened<B: Backend> {
    /// Burn's handle.
    pub device: B::Device,
    /// Its name and limits.
    pub info: DeviceInfo,
}

/// An opened device.
#[derive(Debug, Clone)]
pub enum Device {
    /// By wgpu.
    Wgpu(Opened<Wgpu>),
    /// By CUDA.
    #[cfg(feature = "cuda")]
    Cuda(Opened<burn::backend::Cuda>),
}

/// A computation written once for every backend.
pub trait Work {
    /// What it gives.
    type Output;

    /// Computes on an opened device.
    ///
    /// # Errors
    /// Its own; what burn panics with is turned into an error by [`Device::run`].
    fn run<B: Engine>(self, on: &Opened<B>) -> Result<Self::Output>;
}

impl Device {
    /// Every device that can be opened, wgpu's best first, then CUDA's.
    pub fn list() -> Vec<DeviceInfo> {
        let mut all = wgpu_adapters::list();
        #[cfg(feature = "cuda")]
        all.extend(super::cuda::list());
        all
    }

    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::NoDevice`] when it is not there, is the processor, or this build lacks its feature;
    /// [`Error::Device`] when the driver refuses.
    pub fn open(choice: DeviceChoice) -> Result<Self> {
        guarded(&choice.to_string(), "opening the device", || match choice {
            DeviceChoice::Cpu => Err(Error::NoDevice {
                wanted: choice.to_string(),
                found: "the processor is not a GPU device".into(),
            }),
            DeviceChoice::Gpu(index) => {
                let (device, info) = wgpu_adapters::open(index)?;
                Ok(Device::Wgpu(Opened { device, info }))
            }
            #[cfg(feature = "cuda")]
            DeviceChoice::Cuda(index) => {
                let (device, info) = super::cuda::open(index)?;
                Ok(Device::Cuda(Opened { device, info }))
            }
            #[cfg(not(feature = "cuda"))]
            DeviceChoice::Cuda(_) => Err(choice.not_built()),
        })
    }

    /// Its name and limits.
    pub fn info(&self) -> &DeviceInfo {
        match self {
            Device::Wgpu(on) => &on.info,
            #[cfg(feature = "cuda")]
            Device::Cuda(on) => &on.info,
        }
    }

    /// Runs `work` and waits until the device has finished it. `op` names it in errors.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Device`] for whatever fails inside the engine or the driver.
    pub fn run<W: Work>(&self, op: &'static str, work: W) -> Result<W::Output> {
        guarded(&self.info().to_string(), op, || match self {
            Device::Wgpu(on) => on.run(op, work),
            #[cfg(feature = "cuda")]
            Device::Cuda(on) => on.run(op, work),
        })
    }

    /// The precisions it has products of.
    pub fn precisions(&self) -> Vec<Precision> {
        match self {
            Device::Wgpu(on) => on.precisions(),
            #[cfg(feature = "cuda")]
            Device::Cuda(on) => on.precisions(),
        }
    }

    /// What the device's allocator holds.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn memory(&self) -> Result<DeviceMemory> {
        let op = "reading the device's memory";
        let usage = guarded(&self.info().to_string(), op, || {
            let usage = match self {
                Device::Wgpu(on) => {
                    burn::backend::wgpu::WgpuRuntime::client(&on.device).memory_usage()
                }
                #[cfg(feature = "cuda")]
                Device::Cuda(on) => cubecl::cuda::CudaRuntime::client(&on.device).memory_usage(),
            };
            usage.map_err(|e| Error::Device {
                op,
                device: self.info().to_string(),
                reason: format!("{e:?}"),
            })
        })?;
        Ok(DeviceMemory { in_use_bytes: usage.bytes_in_use, reserved_bytes: usage.bytes_reserved })
    }
}

impl<B: Engine> Opened<B> {
    fn run<W: Work>(&self, op: &'static str, work: W) -> Result<W::Output> {
        let output = work.run(self)?;
        B::sync(&self.device).map_err(|e| self.failure(op, &e))?;
        Ok(output)
    }

    /// What the engine reported, as the crate's error.
    pub fn failure(&self, op: &'static str, reason: &impl fmt::Display) -> Error {
        Error::Device { op, device: self.info.to_string(), reason: reason.to_string() }
    }
}
