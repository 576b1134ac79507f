//! See `peft_limits_experiments::gpu_peft_cost`.

use peft_limits_experiments::{gpu_peft_cost::EXPERIMENT, harness};

fn main() -> std::process::ExitCode {
    harness::main_on_device(&EXPERIMENT)
}
