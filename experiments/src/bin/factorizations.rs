//! See `peft_limits_experiments::factorizations`.

use peft_limits_experiments::{factorizations::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
