//! Adapter files: which tensors each method writes, and how they are read back.

use super::lora::LoraSpec;
use super::s2ft::Side;
use super::{BaseWeight, Method, dora, lora, moslora, paca, s2ft, spft};
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2};

/// What kind of adapter a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterKind {
    /// `peft_type` LORA.
    Lora,
    /// `peft_type` LORA with `use_dora`.
    Dora,
    /// Ours: LORA's tensors and `lora_mixer`.
    Moslora,
    /// Ours: selected columns.
    Paca,
    /// Ours: slices of co-permuted weights.
    S2ft,
    /// Ours: single entries.
    Spft,
}

impl AdapterKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Lora, Self::Dora, Self::Moslora, Self::Paca, Self::S2ft, Self::Spft];

    /// The `peft_type` of `adapter_config.json`. DoRA's is LoRA's, with `use_dora`.
    pub fn peft_type(self) -> &'static str {
        match self {
            Self::Lora | Self::Dora => "LORA",
            Self::Moslora => "MOSLORA",
            Self::Paca => "PACA",
            Self::S2ft => "S2FT",
            Self::Spft => "SPFT",
        }
    }

    /// The kind of a configuration.
    pub fn of(peft_type: &str, use_dora: bool) -> Option<Self> {
        let fits = |kind: &Self| {
            kind.peft_type() == peft_type && (*kind == Self::Dora) == (use_dora && kind.is_peft())
        };
        Self::ALL.into_iter().find(fits)
    }

    /// Whether PEFT reads it.
    pub fn is_peft(self) -> bool {
        self.peft_type() == "LORA"
    }

    /// Whether it has factors, hence a rank and an alpha.
    pub fn has_factors(self) -> bool {
        matches!(self, Self::Lora | Self::Dora | Self::Moslora)
    }
}

/// What an adapter's configuration says of one projection.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Rank, alpha, scaling, for methods with factors.
    pub spec: LoraSpec,
    /// DoRA: differentiate the norm.
    pub true_derivative: bool,
    /// LoRA: whether the update has a bias of its own.
    pub bias: bool,
    /// S2FT: which side of this projection its slice cuts.
    pub side: Side,
}

/// The tensors of one projection in an adapter file, by the names that follow its own.
pub trait ReadTensors<T> {
    /// A matrix of a known shape.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Format`] for another shape.
    fn matrix(&mut self, tensor: &str, shape: (usize, usize)) -> Result<Array2<T>>;
    /// A vector of a known length.
    ///
    /// # Errors
    /// As [`ReadTensors::matrix`].
    fn vector(&mut self, tensor: &str, length: usize) -> Result<Vec<T>>;
    /// A vector of a known length in double precision.
    ///
    /// # Errors
    /// As [`ReadTensors::matrix`].
    fn doubles(&mut self, tensor: &str, length: usize) -> Result<Vec<f64>>;
    /// A vector of indices.
    ///
    /// # Errors
    /// As [`ReadTensors::matrix`]; [`Error::Format`] for an entry that is no index.
    fn indices(&mut self, tensor: &str) -> Result<Vec<usize>>;
    /// Whether there is a tensor.
    fn contains(&self, tensor: &str) -> bool;
    /// The error that says what is wrong with a tensor.
    fn malformed(&self, tensor: &str, expected: &str, found: String) -> Error;
}

/// Takes the tensors of one projection, by the names that follow its own.
pub trait WriteTensors<T> {
    /// A matrix.
    fn matrix(&mut self, tensor: &str, values: ArrayView2<T>);
    /// A vector.
    fn vector(&mut self, tensor: &str, values: &[T]);
    /// Numbers in double precision.
    fn doubles(&mut self, tensor: &str, values: &[f64]);
}

/// A method that is kept in adapter files.
pub trait Stored<T: Real>: Sized {
    /// Writes the tensors.
    fn save(&self, base: &BaseWeight<T>, to: &mut dyn WriteTensors<T>);

    /// Reads them, and puts what is trained in place into the weight.
    ///
    /// # Errors
    /// As [`ReadTensors`]; [`Error::InvalidParam`] for settings that do not fit the weight.
    fn load(
        settings: &Settings,
        base: &mut BaseWeight<T>,
        from: &mut dyn ReadTensors<T>,
    ) -> Result<Self>;
}

impl<T: Real> Method<T> {
    /// Reads the method of a projection.
    ///
    /// # Errors
    /// As [`Stored::load`].
    pub fn load(
        kind: AdapterKind,
        settings: &Settings,
        base: &mut BaseWeight<T>,
        from: &mut dyn ReadTensors<T>,
    ) -> Result<Self> {
        Ok(match kind {
            AdapterKind::Lora => Method::Lora(lora::Lora::load(settings, base, from)?),
            AdapterKind::Dora => Method::Dora(dora::Dora::load(settings, base, from)?),
            AdapterKind::Moslora => Method::Moslora(moslora::Moslora::load(settings, base, from)?),
            AdapterKind::Paca => Method::Paca(paca::Paca::load(settings, base, from)?),
            AdapterKind::S2ft => Method::S2ft(s2ft::S2ftSlice::load(settings, base, from)?),
            AdapterKind::Spft => Method::Spft(spft::Spft::load(settings, base, from)?),
        })
    }

    /// Writes the method's tensors; its kind and settings, or nothing for a frozen projection.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for full fine-tuning, which a checkpoint holds.
    pub fn save(
        &self,
        base: &BaseWeight<T>,
        to: &mut dyn WriteTensors<T>,
    ) -> Result<Option<(AdapterKind, LoraSpec)>> {
        let none = LoraSpec::default();
        Ok(Some(match self {
            Method::Frozen => return Ok(None),
            Method::Full => {
                return Err(Error::invalid(
                    "method",
                    "full",
                    "is a whole weight; write a checkpoint instead",
                ));
            }
            Method::Lora(method) => {
                method.save(base, to);
                (AdapterKind::Lora, method.spec)
            }
            Method::Dora(method) => {
                method.save(base, to);
                (AdapterKind::Dora, method.spec)
            }
            Method::Moslora(method) => {
                method.save(base, to);
                (AdapterKind::Moslora, method.spec)
            }
            Method::Paca(method) => {
                method.save(base, to);
                (AdapterKind::Paca, none)
            }
            Method::S2ft(method) => {
                method.save(base, to);
                (AdapterKind::S2ft, none)
            }
            Method::Spft(method) => {
                method.save(base, to);
                (AdapterKind::Spft, none)
            }
        }))
    }
}
