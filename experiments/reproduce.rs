//! Regenerates every figure: the default run of the project.
//!
//! `cargo run --release` runs the quick profile of all experiments into `figures/quick/`;
//! `cargo run --release -- --profile full` the full one into `figures/<claim>/`.

#[path = "crossover.rs"]
mod crossover;
#[path = "phase_transition.rs"]
mod phase_transition;
#[path = "rank_map.rs"]
mod rank_map;
#[path = "real_heads.rs"]
mod real_heads;
#[path = "speed_accuracy.rs"]
mod speed_accuracy;

use peft_limits::harness::{Experiment, reproduce};
use std::process::ExitCode;

const EXPERIMENTS: [Experiment; 5] = [
    phase_transition::EXPERIMENT,
    crossover::EXPERIMENT,
    speed_accuracy::EXPERIMENT,
    rank_map::EXPERIMENT,
    real_heads::EXPERIMENT,
];

fn main() -> ExitCode {
    reproduce(&EXPERIMENTS)
}
