//! Gradients, training steps, validation and commands on a GPU, against the processor.

#![cfg(feature = "gpu")]

mod attention;
mod chosen;
#[cfg(feature = "cli")]
mod commands;
mod training;
mod validation;
