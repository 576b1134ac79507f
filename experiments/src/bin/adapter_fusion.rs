//! See `peft_limits_experiments::adapter_fusion`.

use peft_limits_experiments::{adapter_fusion::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
