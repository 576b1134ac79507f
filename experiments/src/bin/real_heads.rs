//! See `peft_limits_experiments::real_heads`.

use peft_limits_experiments::{harness, real_heads::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
