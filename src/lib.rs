//! Exact and almost-linear-time LoRA gradients of softmax attention, and the norm threshold between them.
//!
//! Start at [`attention`]: a head ([`attention::problem::AttentionProblem`]), its exact gradients
//! ([`attention::exact`]) and its chained low-rank ones ([`attention::chained`]). [`limits`] holds the
//! threshold, the degree, the rank and the fitted exponents.

pub mod adapters;
pub mod atomic_file;
pub mod attention;
pub mod blocks;
pub mod check;
#[cfg(feature = "experiments")]
pub mod cli;
pub mod cost;
pub mod error;
#[cfg(feature = "experiments")]
pub mod harness;
pub mod limits;
pub mod linalg;
pub mod model;
#[cfg(feature = "experiments")]
pub mod report;
pub mod streams;
pub mod tensor_file;
pub mod train;

pub use error::{Error, Result};
