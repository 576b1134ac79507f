//! See `peft_limits_experiments::speed_accuracy`.

use peft_limits_experiments::{harness, speed_accuracy::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
