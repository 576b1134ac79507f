//! The `peft-limits` command. See `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    peft_limits::linalg::workers::keep_awake();
    peft_limits::cli::main()
}
