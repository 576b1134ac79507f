//! The experiments of `peft-limits`: one module per claim, each with one binary that runs it alone.
//!
//! [`ALL`] is what `reproduce` runs. [`harness`] is what the binaries share, [`two_layer`] the
//! closed form behind `generalization`.

pub mod harness;
pub mod random_head;
pub mod two_layer;

#[cfg(test)]
mod reproduced;

pub mod adapter_fusion;
pub mod adapter_serving;
pub mod approximate_descent;
pub mod bounds;
pub mod convergence;
pub mod crossover;
pub mod factorizations;
pub mod generalization;
#[cfg(feature = "gpu")]
pub mod gpu_crossover;
#[cfg(feature = "gpu")]
pub mod gpu_peft_cost;
pub mod hardness;
pub mod norm_control;
pub mod operating_curve;
pub mod peft_accuracy;
pub mod peft_cost;
pub mod phase_diagram;
pub mod rank_map;
pub mod real_heads;
pub mod s2ft_selection;
pub mod sequence_limit;
pub mod solvable_model;
pub mod sparse_heads;
pub mod speed_accuracy;
pub mod theorem_limits;

/// Every experiment that needs no device, in the order of the index page.
pub const ALL: [harness::Experiment; 22] = [
    phase_diagram::EXPERIMENT,
    solvable_model::EXPERIMENT,
    theorem_limits::EXPERIMENT,
    crossover::EXPERIMENT,
    speed_accuracy::EXPERIMENT,
    rank_map::EXPERIMENT,
    real_heads::EXPERIMENT,
    sparse_heads::EXPERIMENT,
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
    adapter_fusion::EXPERIMENT,
    adapter_serving::EXPERIMENT,
    operating_curve::EXPERIMENT,
];
