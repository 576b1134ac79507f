//! See `peft_limits_experiments::crossover`.

use peft_limits_experiments::{crossover::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
