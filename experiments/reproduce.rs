//! Regenerates every figure: the default run of the project.
//!
//! `cargo run --release` runs the quick profile of all experiments into `figures/quick/`;
//! `cargo run --release -- --profile full` the full one into `figures/<claim>/`.

#[path = "phase_transition.rs"]
mod phase_transition;

use peft_limits::harness::{Experiment, reproduce};
use std::process::ExitCode;

const EXPERIMENTS: [Experiment; 1] = [phase_transition::EXPERIMENT];

fn main() -> ExitCode {
    reproduce(&EXPERIMENTS)
}
