//! See `peft_limits_experiments::approximate_descent`.

use peft_limits_experiments::{approximate_descent::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
