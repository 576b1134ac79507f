//! Devices and precisions as commands name them: `cpu`, `gpu`, `gpu:1`, `cuda`, `cuda:0`; `f32`,
//! `tf32`, `bf16`, `f16`.

use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// This crate's own code on the processor.
    #[default]
    Cpu,
    /// A GPU by Vulkan, Metal or DirectX 12, numbered from the best one (0).
    Gpu(usize),
    /// An NVIDIA GPU by CUDA, numbered as its driver does.
    Cuda(usize),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Gpu(n) => write!(f, "gpu:{n}"),
            DeviceChoice::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = || Error::invalid("--device", text, "must be cpu, gpu, gpu:N, cuda or cuda:N");
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number.parse::<usize>().map_err(|_| refuse())?)),
            None => (text, None),
        };
        match (name, number) {
            ("cpu", None) => Ok(DeviceChoice::Cpu),
            ("gpu", n) => Ok(DeviceChoice::Gpu(n.unwrap_or(0))),
            ("cuda", n) => Ok(DeviceChoice::Cuda(n.unwrap_or(0))),
            _ => Err(refuse()),
        }
    }
}

impl DeviceChoice {
    /// The error of a build that lacks the feature this device needs.
    pub fn not_built(self) -> Error {
        let feature = if matches!(self, DeviceChoice::Cuda(_)) { "cuda" } else { "gpu" };
        Error::NoDevice {
            wanted: self.to_string(),
            found: format!(
                "this program was built without it; build with `cargo build --release --features \
                 {feature}`"
            ),
        }
    }
}

/// What a GPU rounds the operands of a product to; sums are in f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProductPrecision {
    /// Not rounded: 24 bits.
    #[default]
    F32,
    /// 11 bits, the range of f32, on NVIDIA's tensor cores.
    Tf32,
    /// 8 bits, the range of f32.
    Bf16,
    /// 11 bits, up to 65504.
    F16,
}

impl ProductPrecision {
    /// Every precision.
    pub const ALL: [ProductPrecision; 4] = [
        ProductPrecision::F32,
        ProductPrecision::Tf32,
        ProductPrecision::Bf16,
        ProductPrecision::F16,
    ];
}

impl fmt::Display for ProductPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ProductPrecision::F32 => "f32",
            ProductPrecision::Tf32 => "tf32",
            ProductPrecision::Bf16 => "bf16",
            ProductPrecision::F16 => "f16",
        })
    }
}

impl FromStr for ProductPrecision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = ProductPrecision::ALL.into_iter().find(|p| p.to_string() == text);
        found.ok_or_else(|| Error::invalid("--products", text, "must be f32, tf32, bf16 or f16"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for (text, choice) in [
            ("cpu", DeviceChoice::Cpu),
            ("gpu", DeviceChoice::Gpu(0)),
            ("gpu:3", DeviceChoice::Gpu(3)),
            ("cuda:1", DeviceChoice::Cuda(1)),
        ] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap(), choice);
            assert_eq!(choice.to_string().parse::<DeviceChoice>().unwrap(), choice);
        }
        for precision in ProductPrecision::ALL {
            assert_eq!(precision.to_string().parse::<ProductPrecision>().unwrap(), precision);
        }
        assert!("F16".parse::<ProductPrecision>().is_err());
        for text in ["", "cpu:0", "gpu:", "gpu:-1", "cuda:x", "tpu", "gpu:1:2"] {
            assert!(
                matches!(text.parse::<DeviceChoice>(), Err(Error::InvalidParam { .. })),
                "{text:?}"
            );
        }
    }
}
