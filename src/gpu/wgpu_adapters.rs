//! Adapters that wgpu finds, and opening one.

use super::device::{DeviceInfo, Kind};
use super::guard;
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use burn::backend::wgpu::{RuntimeOptions, WgpuDevice, WgpuSetup, init_device};
use cubecl::future::block_on;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use wgpu::{Adapter, Backends, DeviceType, Features, Instance, InstanceDescriptor};

/// Best first: discrete, integrated, virtual, unknown, software.
fn adapters() -> (Instance, Vec<Adapter>) {
    let instance = Instance::new(InstanceDescriptor {
        backends: Backends::PRIMARY,
        ..InstanceDescriptor::new_without_display_handle()
    });
    let mut found = block_on(instance.enumerate_adapters(Backends::PRIMARY));
    found.sort_by_key(|adapter| kind(adapter.get_info().device_type));
    (instance, found)
}

fn kind(device_type: DeviceType) -> Kind {
    match device_type {
        DeviceType::DiscreteGpu => Kind::Discrete,
        DeviceType::IntegratedGpu => Kind::Integrated,
        DeviceType::VirtualGpu => Kind::Virtual,
        DeviceType::Other => Kind::Unknown,
        DeviceType::Cpu => Kind::Software,
    }
}

fn describe(index: usize, adapter: &Adapter) -> DeviceInfo {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    DeviceInfo {
        choice: DeviceChoice::Gpu(index),
        name: info.name,
        backend: info.backend.to_string(),
        kind: kind(info.device_type),
        driver: [info.driver, info.driver_info].join(" ").trim().to_string(),
        max_buffer_bytes: limits.max_buffer_size.min(limits.max_storage_buffer_binding_size),
        memory_bytes: None,
    }
}

/// Every adapter.
pub(super) fn list() -> Vec<DeviceInfo> {
    adapters().1.iter().enumerate().map(|(index, adapter)| describe(index, adapter)).collect()
}

/// Opens adapter `index`, once for each process.
pub(super) fn open(index: usize) -> Result<(WgpuDevice, DeviceInfo)> {
    static OPENED: Mutex<Option<HashMap<usize, (WgpuDevice, DeviceInfo)>>> = Mutex::new(None);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let opened = opened.get_or_insert_with(HashMap::new);
    if let Some(device) = opened.get(&index) {
        return Ok(device.clone());
    }
    let (instance, mut found) = adapters();
    let wanted = DeviceChoice::Gpu(index).to_string();
    if found.is_empty() {
        return Err(Error::NoDevice {
            wanted,
            found:
                "no Vulkan, Metal or DirectX 12 device was found; install the GPU's driver (for \
                    a software device on Debian: mesa-vulkan-drivers and libvulkan1, with \
                    XDG_RUNTIME_DIR set to a folder), or use --device cpu"
                    .into(),
        });
    }
    if index >= found.len() {
        let list: Vec<String> =
            found.iter().enumerate().map(|(i, a)| describe(i, a).to_string()).collect();
        return Err(Error::NoDevice {
            wanted,
            found: format!("there is only {}", list.join(", ")),
        });
    }
    let adapter = found.swap_remove(index);
    let info = describe(index, &adapter);
    let request = wgpu::DeviceDescriptor {
        label: None,
        required_features: adapter.features()
            - Features::MAPPABLE_PRIMARY_BUFFERS
            - Features::all_experimental_mask(),
        required_limits: adapter.limits(),
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        ..Default::default()
    };
    let (device, queue) = block_on(adapter.request_device(&request)).map_err(|e| {
        Error::Device { op: "opening the device", device: info.to_string(), reason: e.to_string() }
    })?;
    device.on_uncaptured_error(std::sync::Arc::new(|e: wgpu::Error| guard::report(e.to_string())));
    device.set_device_lost_callback(|reason, text| {
        guard::report(format!("device lost ({reason:?}) {text}"))
    });
    let backend = adapter.get_info().backend;
    let handle = init_device(
        WgpuSetup { instance, adapter, device, queue, backend },
        RuntimeOptions::default(),
    );
    opened.insert(index, (handle.clone(), info.clone()));
    Ok((handle, info))
}
