//! What the experiments that measure a GPU share.

use super::{Experiment, flags};
use peft_limits::device::DeviceChoice;
use peft_limits::error::{Error, Result};
use peft_limits::gpu::{Device, DeviceInfo, Kind};
use std::path::Path;
use std::process::ExitCode;

/// CUDA's first device, else the best of wgpu.
///
/// # Errors
/// As [`Device::open`] for the latter.
pub fn best_device() -> Result<Device> {
    Device::open(DeviceChoice::Cuda(0)).or_else(|_| Device::open(DeviceChoice::Gpu(0)))
}

/// [`super::main`] of an experiment that runs on [`best_device`]: exit code 2 where there is none,
/// or where results of a software device would land in `figures/`.
pub fn main_on_device(experiment: &Experiment) -> ExitCode {
    let flags = match flags::parse_single(experiment, std::env::args_os()) {
        Ok(flags) => flags,
        Err(code) => return ExitCode::from(code),
    };
    // Drawing a saved table again needs no device.
    if !flags.plot_only {
        let folder = flags.out.unwrap_or_else(|| flags.profile.root());
        if let Err(error) = best_device().and_then(|device| accept(device.info(), &folder)) {
            eprintln!("{}: {error}", experiment.name);
            return ExitCode::from(2);
        }
    }
    super::main(experiment)
}

/// Whether results of this device may lie in this folder.
fn accept(device: &DeviceInfo, folder: &Path) -> Result<()> {
    let published = folder.components().any(|part| part.as_os_str() == "figures");
    if device.kind == Kind::Software && published {
        let requirement = "is a software device: give an --out folder outside figures/, where only \
                           results of a real GPU lie";
        return Err(Error::invalid("device", device, requirement));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_a_software_device_stay_outside_figures() {
        let device = |kind| DeviceInfo {
            choice: DeviceChoice::Gpu(0),
            name: "llvmpipe".into(),
            backend: "Vulkan".into(),
            kind,
            driver: String::new(),
            max_buffer_bytes: 1 << 20,
            memory_bytes: None,
        };
        for folder in ["figures", "figures/quick", "./figures/mine", "/there/figures/x"] {
            let error = accept(&device(Kind::Software), Path::new(folder)).unwrap_err();
            assert!(
                matches!(&error, Error::InvalidParam { name, .. } if name == "device"),
                "{error}"
            );
            accept(&device(Kind::Discrete), Path::new(folder)).unwrap();
        }
        for folder in ["runs", "/tmp/my-figures", "figures2/x"] {
            accept(&device(Kind::Software), Path::new(folder)).unwrap();
        }
    }
}
