//! See `peft_limits_experiments::phase_diagram`.

use peft_limits_experiments::{harness, phase_diagram::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
