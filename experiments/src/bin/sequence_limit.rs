//! See `peft_limits_experiments::sequence_limit`.

use peft_limits_experiments::{harness, sequence_limit::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
