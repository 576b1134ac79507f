//! See `peft_limits_experiments::phase_transition`.

use peft_limits_experiments::{harness, phase_transition::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
