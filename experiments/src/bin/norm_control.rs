//! See `peft_limits_experiments::norm_control`.

use peft_limits_experiments::{harness, norm_control::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
