//! The `peft-limits` command. See `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    peft_limits::cli::main()
}
