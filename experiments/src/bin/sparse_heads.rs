//! See `peft_limits_experiments::sparse_heads`.

use peft_limits_experiments::{harness, sparse_heads::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
