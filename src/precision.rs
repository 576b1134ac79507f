//! Number formats of trainers, and rounding to them.

use crate::error::{Error, Result};
use ndarray::Array2;
use rayon::prelude::*;

/// A number format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// IEEE double.
    F64,
    /// IEEE single.
    F32,
    /// bfloat16: 8 bits of significand, the exponents of single.
    Bf16,
    /// IEEE half: 11 bits of significand, nothing below 6e-8.
    F16,
}

impl Precision {
    /// From the names that PyTorch (`bfloat16`) and safetensors (`BF16`) use.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] listing the names.
    pub fn parse(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "float64" | "f64" | "double" => Ok(Self::F64),
            "float32" | "f32" | "float" => Ok(Self::F32),
            "bfloat16" | "bf16" => Ok(Self::Bf16),
            "float16" | "f16" | "half" => Ok(Self::F16),
            _ => {
                Err(Error::invalid("dtype", name, "must be float64, float32, bfloat16 or float16"))
            }
        }
    }

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Distance from 1 to the next number.
    pub fn epsilon(self) -> f64 {
        match self {
            Self::F64 => f64::EPSILON,
            Self::F32 => f64::from(f32::EPSILON),
            Self::Bf16 => 2f64.powi(-7),
            Self::F16 => 2f64.powi(-10),
        }
    }

    /// Smallest positive number.
    pub fn smallest(self) -> f64 {
        match self {
            Self::F64 => f64::from_bits(1),
            Self::F32 => f64::from(f32::from_bits(1)),
            Self::Bf16 => half::bf16::from_bits(1).to_f64(),
            Self::F16 => half::f16::from_bits(1).to_f64(),
        }
    }

    /// The coarser of two: fewer bits of significand.
    pub fn coarser(self, other: Self) -> Self {
        if self.epsilon() >= other.epsilon() { self } else { other }
    }

    /// Nearest number of this format, ties to even; beyond the largest, infinity.
    ///
    /// ```
    /// use peft_limits::validate::Precision;
    /// assert_eq!(Precision::Bf16.round(1.0 + 1.0 / 200.0), 1.0078125); // steps of 1/128
    /// assert_eq!(Precision::F16.round(2e-8), 0.0);
    /// assert!(Precision::F16.round(7e4).is_infinite());
    /// ```
    pub fn round(self, x: f64) -> f64 {
        match self {
            Self::F64 => x,
            Self::F32 => f64::from(x as f32),
            Self::Bf16 => half::bf16::from_f64(x).to_f64(),
            Self::F16 => half::f16::from_f64(x).to_f64(),
        }
    }

    /// Rounds every entry.
    pub fn round_array(self, array: &mut Array2<f64>) {
        if self == Self::F64 {
            return;
        }
        match array.as_slice_mut() {
            Some(values) => values.par_chunks_mut(1 << 14).for_each(|part| {
                part.iter_mut().for_each(|x| *x = self.round(*x));
            }),
            None => array.mapv_inplace(|x| self.round(x)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_smallest_numbers_are_the_formats_own() {
        for p in [Precision::F64, Precision::F32, Precision::Bf16, Precision::F16] {
            let step = p.epsilon();
            assert_eq!(p.round(1.0 + step).to_bits(), (1.0 + step).to_bits());
            assert_eq!(p.round(p.smallest()).to_bits(), p.smallest().to_bits());
            assert_eq!(Precision::parse(p.name()).unwrap(), p);
            if p != Precision::F64 {
                assert_eq!(p.round(1.0 + 0.4 * step).to_bits(), 1f64.to_bits(), "{p:?}");
                assert_eq!(p.round(1.0 + 0.6 * step).to_bits(), (1.0 + step).to_bits(), "{p:?}");
                assert_eq!(p.round(p.smallest() * 0.4).to_bits(), 0f64.to_bits(), "{p:?}");
            }
        }
        assert!(Precision::parse("int8").unwrap_err().to_string().contains("bfloat16"));
    }
}
