//! The reference transformer: blocks, adapters, checkpoints, training, costs; and the examples of
//! the library.

mod adapter_updates;
mod adapters;
mod blocks;
mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod cost_formulas;
mod examples;
mod families;
mod llama_fixtures;
mod padding;
mod partial_backpropagation;
mod training_runs;
