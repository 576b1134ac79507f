//! See `peft_limits_experiments::generalization`.

use peft_limits_experiments::{generalization::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
