//! See `peft_limits_experiments::bounds`.

use peft_limits_experiments::{bounds::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
