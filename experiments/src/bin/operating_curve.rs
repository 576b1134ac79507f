//! See `peft_limits_experiments::operating_curve`.

use peft_limits_experiments::{harness, operating_curve::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
