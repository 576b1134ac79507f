//! See `peft_limits_experiments::s2ft_selection`.

use peft_limits_experiments::{harness, s2ft_selection::EXPERIMENT};

fn main() -> std::process::ExitCode {
    harness::main(&EXPERIMENT)
}
