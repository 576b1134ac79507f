//! See `peft_limits_experiments::convergence`.

use peft_limits_experiments::{convergence::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
