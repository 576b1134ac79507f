//! See `peft_limits_experiments::peft_cost`.

use peft_limits_experiments::{harness, peft_cost::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
