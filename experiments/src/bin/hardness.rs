//! See `peft_limits_experiments::hardness`.

use peft_limits_experiments::{hardness::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
