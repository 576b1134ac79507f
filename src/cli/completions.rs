//! `peft-limits completions`: shell completions, made from the same definitions that parse the
//! arguments.

use clap::CommandFactory;
use clap_complete::{Shell, generate};
use std::io::Write;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  peft-limits completions bash > ~/.local/share/bash-completion/completions/peft-limits
  # with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc
  peft-limits completions zsh > ~/.zfunc/_peft-limits
  peft-limits completions fish > ~/.config/fish/completions/peft-limits.fish
  peft-limits completions elvish >> ~/.config/elvish/rc.elv
  peft-limits completions powershell >> $PROFILE")]
pub(super) struct CompletionsArgs {
    /// The shell that will read them
    shell: Shell,
}

pub(super) fn run<Arguments: CommandFactory>(args: &CompletionsArgs) -> crate::Result<ExitCode> {
    let mut command = Arguments::command();
    let name = command.get_name().to_string();
    // Through a buffer: a reader that closes the pipe early must not make the generator panic.
    let mut script = Vec::new();
    generate(args.shell, &mut command, name, &mut script);
    // As for any other output, a closed pipe is the reader's choice.
    let _ = std::io::stdout().write_all(&script);
    Ok(ExitCode::SUCCESS)
}
