//! See `peft_limits_experiments::solvable_model`.

use peft_limits_experiments::{harness, solvable_model::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
