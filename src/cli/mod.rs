//! The `peft-limits` command line: one file per subcommand.
//!
//! Exit codes: 0 done, 1 a check failed, 2 bad input or usage, 130 interrupted. Errors go to stderr
//! as one line that names the file, the tensor, what was expected and what was found.

mod adapter;
mod completions;
mod devices;
mod gradient;
#[cfg(feature = "mpi")]
mod gradient_over_ranks;
mod memory;
mod output;
mod phase;
mod prefixes;
mod probe;
mod size;
mod train;
mod validate;
mod verdict;
mod verdict_page;

use crate::attention::factorization::spec::METHODS;
use crate::error::{Error, INTERRUPTED};
use clap::{Parser, Subcommand};
use std::path::Path;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "peft-limits",
    version,
    about = "How cheap can a fine-tuning gradient be, and is a trainer's gradient right?",
    long_about = "Exact and almost-linear-time LoRA gradients of softmax attention, and the norm \
                  threshold between them.\n\nExit codes: 0 done, 1 a check failed, 2 bad input or \
                  usage, 130 interrupted (Ctrl-C).",
    after_long_help = "\
First steps, in the repository:
  # where a trained head stands against the threshold
  peft-limits probe tests/data/heads/minilm_l0_h7.safetensors
  # what is wrong with a trainer whose rotary backward is missing
  peft-limits validate tests/data/dumps/faults/half-precision-rotary-backward
  # which method fits
  peft-limits memory --config examples/configs/llama-2-7b.json --bytes 2 --fits 80GiB
`peft-limits COMMAND --help` has examples of each command."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compute the gradients of one attention head
    Gradient(gradient::GradientArgs),
    /// List the GPUs that --device can name
    Devices(devices::DevicesArgs),
    /// Measure a head's norms against the threshold, and each factorization's error and cost on it
    Probe(probe::ProbeArgs),
    /// What a random head costs at a norm, in closed form: exponents and eps-ranks
    Phase(phase::PhaseArgs),
    /// Predict the memory of a training step, and the longest sequence that fits
    Memory(memory::MemoryArgs),
    /// Pretrain or fine-tune a small model; checkpoints in Hugging Face layout
    Train(Box<train::TrainArgs>),
    /// Validate a trainer's gradients against the exact reference, and say what is wrong
    Validate(Box<validate::ValidateArgs>),
    /// Take adapters out of trained models, fuse, switch and serve them
    Adapter(adapter::AdapterArgs),
    /// Print the completions of a shell
    Completions(completions::CompletionsArgs),
}

impl Command {
    /// The file or folder that an error is about which names none.
    fn subject(&self) -> Option<&Path> {
        match self {
            Command::Gradient(args) => Some(&args.input),
            Command::Probe(args) => Some(&args.input),
            Command::Memory(args) => args.config.as_deref(),
            Command::Train(args) => args.config.as_deref().or(args.model.as_deref()),
            Command::Validate(args) => {
                args.dump.as_deref().or(args.head.as_deref()).or(args.model.as_deref())
            }
            Command::Adapter(args) => Some(args.subject()),
            Command::Devices(_) | Command::Phase(_) | Command::Completions(_) => None,
        }
    }
}

/// Whether an error is about what was read and names no file; flags name themselves.
fn is_of_input(error: &Error) -> bool {
    match error {
        Error::InvalidParam { name, .. } => !name.starts_with("--"),
        Error::ShapeMismatch { .. }
        | Error::NonFinite { .. }
        | Error::NotConverged { .. }
        | Error::LogitOutsideInterval { .. }
        | Error::NonPositiveDenominator { .. }
        | Error::Decomposition { .. } => true,
        _ => false,
    }
}

/// Parses the process's arguments, runs the subcommand and returns its exit code.
pub fn main() -> ExitCode {
    // `peft-limits ... | head` ends with its reader.
    sigpipe::reset();
    let command = Arguments::parse().command;
    // Training saves first; it installs a handler of its own.
    if !matches!(command, Command::Train(_)) {
        exit_when_interrupted();
    }
    let subject = command.subject().map(Path::to_path_buf);
    let outcome = match command {
        Command::Gradient(args) => gradient::run(&args),
        Command::Devices(args) => devices::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Phase(args) => phase::run(&args),
        Command::Memory(args) => memory::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Validate(args) => validate::run(&args),
        Command::Adapter(args) => adapter::run(&args),
        Command::Completions(args) => completions::run::<Arguments>(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            match subject.filter(|_| is_of_input(&error)) {
                Some(path) => eprintln!("peft-limits: {}: {error}", path.display()),
                None => eprintln!("peft-limits: {error}"),
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Ctrl-C ends the process with [`INTERRUPTED`] whoever waits for it: an unhandled signal is that
/// code to a shell alone.
fn exit_when_interrupted() {
    // Without a handler the signal itself ends the process.
    let _ = ctrlc::set_handler(|| {
        eprintln!("peft-limits: interrupted");
        std::process::exit(INTERRUPTED.into());
    });
}

/// What an input file holds, for help pages.
const INPUT_HELP: &str = "\
Input files (safetensors): X (or XQ, XK, XV), WQ, WK, WV, any pair of AQ,BQ AK,BK AV,BV, and Y \
(target) or G (upstream gradient). Rows are tokens: Q = X (WQ + alpha/r BQ AQ). Or Q, K, V in \
place of inputs and weights (for instance after rotary embedding). Metadata: beta (factor of Q \
K^T), alpha (with adapters), optional r, causal, softmax_one.";

/// The table of factorizations, for help pages.
fn features_help() -> String {
    let lines: Vec<String> =
        METHODS.iter().map(|(name, keys)| format!("  {name}:{keys}")).collect();
    format!("Factorizations (SPEC):\n{}", lines.join("\n"))
}
