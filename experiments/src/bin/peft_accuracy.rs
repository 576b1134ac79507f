//! See `peft_limits_experiments::peft_accuracy`.

use peft_limits_experiments::{harness, peft_accuracy::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
