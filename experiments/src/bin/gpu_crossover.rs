//! See `peft_limits_experiments::gpu_crossover`.

use peft_limits_experiments::{gpu_crossover::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main_on_device(&EXPERIMENT)
}
