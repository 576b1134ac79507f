//! See `peft_limits_experiments::adapter_serving`.

use peft_limits_experiments::{adapter_serving::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
