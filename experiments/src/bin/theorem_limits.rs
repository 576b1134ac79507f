//! See `peft_limits_experiments::theorem_limits`.

use peft_limits_experiments::{harness, theorem_limits::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
