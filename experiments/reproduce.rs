//! Regenerates every figure: the default run of the project.
//!
//! `cargo run --release` runs the quick profile of all experiments into `figures/quick/`;
//! `cargo run --release -- --profile full` the full one into `figures/<claim>/`.

#[path = "adapter_serving.rs"]
mod adapter_serving;
#[path = "approximate_descent.rs"]
mod approximate_descent;
#[path = "bounds.rs"]
mod bounds;
#[path = "convergence.rs"]
mod convergence;
#[path = "crossover.rs"]
mod crossover;
#[path = "factorizations.rs"]
mod factorizations;
#[path = "generalization.rs"]
mod generalization;
#[path = "hardness.rs"]
mod hardness;
#[path = "norm_control.rs"]
mod norm_control;
#[path = "peft_accuracy.rs"]
mod peft_accuracy;
#[path = "peft_cost.rs"]
mod peft_cost;
#[path = "phase_transition.rs"]
mod phase_transition;
#[path = "rank_map.rs"]
mod rank_map;
#[path = "real_heads.rs"]
mod real_heads;
#[path = "s2ft_selection.rs"]
mod s2ft_selection;
#[path = "sequence_limit.rs"]
mod sequence_limit;
#[path = "speed_accuracy.rs"]
mod speed_accuracy;

use peft_limits::harness::{Experiment, reproduce};
use std::process::ExitCode;

const EXPERIMENTS: [Experiment; 17] = [
    phase_transition::EXPERIMENT,
    crossover::EXPERIMENT,
    speed_accuracy::EXPERIMENT,
    rank_map::EXPERIMENT,
    real_heads::EXPERIMENT,
    factorizations::EXPERIMENT,
    bounds::EXPERIMENT,
    hardness::EXPERIMENT,
    norm_control::EXPERIMENT,
    approximate_descent::EXPERIMENT,
    peft_cost::EXPERIMENT,
    sequence_limit::EXPERIMENT,
    peft_accuracy::EXPERIMENT,
    s2ft_selection::EXPERIMENT,
    generalization::EXPERIMENT,
    convergence::EXPERIMENT,
    adapter_serving::EXPERIMENT,
];

fn main() -> ExitCode {
    reproduce(&EXPERIMENTS)
}
