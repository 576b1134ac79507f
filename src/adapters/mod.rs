//! Adaptation methods of one linear projection, and the small interface by which a model uses them.
//!
//! An [`AdaptedLinear`] is a base weight and a [`Method`]. `forward` returns the output and what the method
//! needs for backward ([`LinearSaved`]); the layer's input itself is kept by the caller, once per group of
//! projections that read it, and only if some method's [`Method::input_need`] is [`InputNeed::Whole`].
//!
//! | method | trains | needs of the input | module |
//! |---|---|---|---|
//! | `Frozen` | nothing | nothing | |
//! | `Full` | W | whole | |
//! | `Lora` | A, B | whole, and xA^T | [`lora`] |
//! | `Dora` | A, B, magnitude | whole | [`dora`] |
//! | `Moslora` | A, B, mixer | whole, and xA^T | [`moslora`] |
//! | `Paca` | r columns of W in place | x at r columns | [`paca`] |
//! | `S2ft` | a slice of rows or columns of W in place | whole (rows) or the slice (columns) | [`s2ft`] |

mod adapted_linear;
pub mod base_weight;
pub mod dora;
pub mod lora;
mod low_rank;
pub mod moslora;
pub mod nf4;
pub mod paca;
pub mod s2ft;
pub mod selection;
pub mod update;

use crate::linalg::Real;
pub use adapted_linear::AdaptedLinear;
pub use base_weight::{BaseWeight, PackedWeight};
use ndarray::{Array2, ArrayViewMut2};

/// How a projection is adapted.
#[derive(Debug, Clone)]
pub enum Method<T> {
    /// Not at all.
    Frozen,
    /// The whole weight is trained.
    Full,
    /// Low-rank update.
    Lora(lora::Lora<T>),
    /// Low-rank update with trained row magnitudes.
    Dora(dora::Dora<T>),
    /// Low-rank update with a mixer between its factors.
    Moslora(moslora::Moslora<T>),
    /// Partial connections.
    Paca(paca::Paca<T>),
    /// A dense slice of a co-permuted weight.
    S2ft(s2ft::S2ftSlice<T>),
}

/// How much of a projection's input its backward needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputNeed {
    /// Nothing: frozen.
    Nothing,
    /// Some columns, which forward copies into [`LinearSaved::columns`].
    Columns,
    /// All of it, kept by the caller.
    Whole,
}

impl<T: Real> Method<T> {
    /// Name used in configuration files, tables and adapter files.
    pub fn name(&self) -> &'static str {
        match self {
            Method::Frozen => "frozen",
            Method::Full => "full",
            Method::Lora(_) => "lora",
            Method::Dora(_) => "dora",
            Method::Moslora(_) => "moslora",
            Method::Paca(_) => "paca",
            Method::S2ft(_) => "s2ft",
        }
    }

    /// What backward needs of the input.
    pub fn input_need(&self) -> InputNeed {
        match self {
            Method::Frozen => InputNeed::Nothing,
            Method::Full | Method::Lora(_) | Method::Dora(_) | Method::Moslora(_) => InputNeed::Whole,
            Method::Paca(_) => InputNeed::Columns,
            Method::S2ft(slice) => match slice.side {
                s2ft::Side::Output => InputNeed::Whole,
                s2ft::Side::Input => InputNeed::Columns,
            },
        }
    }

    /// Names of the trainable tensors, in the order of the gradient sinks.
    pub fn trainable_names(&self) -> &'static [&'static str] {
        match self {
            Method::Frozen => &[],
            Method::Full => &["weight"],
            Method::Lora(_) => &["lora_A", "lora_B"],
            Method::Dora(_) => &["lora_A", "lora_B", "lora_magnitude_vector"],
            Method::Moslora(_) => &["lora_A", "lora_B", "lora_mixer"],
            Method::Paca(_) => &["paca_columns"],
            Method::S2ft(_) => &["s2ft_slice"],
        }
    }
}

/// What forward leaves for backward, beyond the shared input.
#[derive(Debug, Clone)]
pub struct LinearSaved<T> {
    /// xA^T, `N x r` (LoRA, MosLoRA).
    pub projected: Option<Array2<T>>,
    /// Selected columns of x (PaCA, input-side S2FT).
    pub columns: Option<Array2<T>>,
}

impl<T> Default for LinearSaved<T> {
    fn default() -> Self {
        Self { projected: None, columns: None }
    }
}

/// Where the gradient of an input goes: dx = beta dx + gradient.
pub struct InputSink<'a, 'v, T> {
    /// `N x in`.
    pub dx: &'a mut ArrayViewMut2<'v, T>,
    /// Zero overwrites, one accumulates.
    pub beta: T,
}
