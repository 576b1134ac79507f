//! See `peft_limits_experiments::rank_map`.

use peft_limits_experiments::{harness, rank_map::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
