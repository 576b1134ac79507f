//! `peft-limits memory`.

use super::size::{SIZE_HELP, parse_size};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::train::memory::{Memory, StepShape, longest, predict};
use crate::train::method::{MethodName, MethodParams};
use crate::train::preset;
use crate::validate::memory::within_numbers;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
The prediction is that of this crate's own training step (see train::memory); --bytes 2 tells what the same step would \
hold with half-precision numbers throughout. Logits exist 256 rows at a time. S2FT's units are taken to be spread evenly over the layers.

{SIZE_HELP}

Examples:
  peft-limits memory --preset micro --batch 8 --length 256
  # three methods on LLaMA-2-7B in half precision
  peft-limits memory --config examples/configs/llama-2-7b.json --method lora,paca,s2ft --length 2048 --bytes 2
  # the longest sequence in 24 GiB
  peft-limits memory --config examples/configs/llama-2-7b.json --method qpaca --batch 1 --bytes 2 --fits 24GiB";

/// Flags of `peft-limits memory`.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES.replace("{SIZE_HELP}", SIZE_HELP))]
pub struct MemoryArgs {
    /// A Hugging Face `config.json`, or the folder that holds it
    #[arg(long, value_name = "PATH", required_unless_present = "preset")]
    config: Option<PathBuf>,
    /// A preset size instead: pico, nano, micro or mini
    #[arg(long, conflicts_with = "config")]
    preset: Option<String>,
    /// Methods, comma-separated (all when absent)
    #[arg(long, value_delimiter = ',')]
    method: Vec<MethodName>,
    /// Rank (number of columns for PaCA)
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Projections to adapt, comma-separated; all-linear (the default) is all seven, every linear layer but the head
    #[arg(long, value_delimiter = ',')]
    targets: Option<Vec<String>>,
    /// Rows per forward pass
    #[arg(long, default_value_t = 8, value_parser = between::<1, { 1 << 20 }>)]
    batch: usize,
    /// Tokens per row
    #[arg(long, default_value_t = 256, value_parser = between::<1, { 1 << 32 }>)]
    length: usize,
    /// Bytes of a number: 4 (f32), 8 (f64), or 2 for a hypothetical half-precision step
    #[arg(long, default_value_t = 4, value_parser = parse_bytes)]
    bytes: usize,
    /// Numbers of optimizer state per trained number: 2 for AdamW, 1 for SGD with momentum, 0 for SGD
    #[arg(long, default_value_t = 2, value_parser = between::<0, 8>)]
    state: usize,
    /// Keep only each layer's input between forward and backward
    #[arg(long)]
    checkpointing: bool,
    /// Also print the longest sequence that fits this much memory, for instance 24GiB (a unit is needed)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    fits: Option<usize>,
    /// One JSON object per method
    #[arg(long)]
    json: bool,
}

/// An integer in a range; larger ones would overflow the sums of bytes.
fn between<const LEAST: u64, const MOST: u64>(text: &str) -> std::result::Result<usize, String> {
    match text.parse::<u64>() {
        Ok(n) if (LEAST..=MOST).contains(&n) => Ok(n as usize),
        _ => Err(format!("expected an integer from {LEAST} to {MOST}")),
    }
}

/// Bytes of a number that a step can be predicted for.
fn parse_bytes(text: &str) -> std::result::Result<usize, String> {
    match text {
        "2" => Ok(2),
        "4" => Ok(4),
        "8" => Ok(8),
        _ => Err("expected 2 (half precision), 4 (f32) or 8 (f64)".into()),
    }
}

fn human(bytes: usize) -> String {
    let b = bytes as f64;
    match bytes {
        0..1_048_576 => format!("{:.1} KiB", b / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", b / 1_048_576.0),
        _ => format!("{:.2} GiB", b / 1_073_741_824.0),
    }
}

/// Runs the subcommand.
///
/// # Errors
/// A bad config, a rank that does not fit, or an empty shape.
pub fn run(args: &MemoryArgs) -> Result<ExitCode> {
    let config = match (&args.config, &args.preset) {
        (Some(path), _) if path.is_dir() => ModelConfig::read(&path.join("config.json"))?,
        (Some(path), _) => ModelConfig::read(path)?,
        (None, Some(name)) => preset::preset(name)?,
        (None, None) => return Err(Error::invalid("--config", "absent", "give --config or --preset")),
    };
    let shape = StepShape {
        batch: args.batch,
        length: args.length,
        bytes: args.bytes,
        state: args.state,
        checkpointing: args.checkpointing,
    };
    let mut methods = if args.method.is_empty() { MethodName::ALL.to_vec() } else { args.method.clone() };
    if args.method.is_empty() && config.options.quantization.is_some() {
        methods.retain(|name| name.trains_beside_the_base());
    }
    // Everything is computed before anything is printed: a refusal comes alone.
    let mut rows = Vec::with_capacity(methods.len());
    for name in methods {
        let targets = if name == MethodName::S2ft { None } else { args.targets.clone() };
        let method = MethodParams { rank: args.rank, targets, ..MethodParams::named(name) };
        within_numbers(&config, shape.batch, shape.length)?;
        let memory = predict(&config, &method, &shape)?;
        let fits = args.fits.map(|limit| longest(&config, &method, &shape, limit)).transpose()?;
        rows.push((name, memory, fits));
    }
    if args.json {
        rows.iter().for_each(|(name, memory, fits)| print_json(*name, memory, *fits));
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{:<9}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{}",
        "method",
        "trained",
        "weights",
        "adapters",
        "gradients",
        "optimizer",
        "activations",
        "workspace",
        "peak",
        if args.fits.is_some() { "  longest" } else { "" }
    );
    rows.iter().for_each(|(name, memory, fits)| print_row(*name, memory, *fits));
    if let ([(_, memory, _)], 1) = (rows.as_slice(), args.method.len()) {
        println!("\nactivations by tensor, all layers");
        for (name, bytes) in &memory.activations {
            println!("  {name:<24}{:>12}", human(*bytes));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_row(name: MethodName, m: &Memory, fits: Option<Option<usize>>) {
    let longest = match fits {
        None => String::new(),
        Some(None) => "     none".into(),
        Some(Some(length)) => format!("{length:>9}"),
    };
    println!(
        "{:<9}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{longest}",
        name.name(),
        m.trained,
        human(m.weights),
        human(m.adapters),
        human(m.gradients),
        human(m.optimizer),
        human(m.activation_bytes()),
        human(m.workspace),
        human(m.total())
    );
}

fn print_json(name: MethodName, m: &Memory, fits: Option<Option<usize>>) {
    let value = serde_json::json!({
        "method": name.name(),
        "trained": m.trained,
        "weights_bytes": m.weights,
        "adapters_bytes": m.adapters,
        "gradients_bytes": m.gradients,
        "optimizer_bytes": m.optimizer,
        "activations_bytes": m.activations,
        "workspace_bytes": m.workspace,
        "peak_bytes": m.total(),
        "longest_length": fits.flatten(),
    });
    println!("{value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_in_their_unit() {
        assert_eq!([human(24 << 30), human(1536), human(5 << 20)], ["24.00 GiB", "1.5 KiB", "5.0 MiB"]);
    }

    #[test]
    fn numbers_have_two_four_or_eight_bytes() {
        assert_eq!(["2", "4", "8"].map(parse_bytes), [Ok(2), Ok(4), Ok(8)]);
        for bad in ["3", "1", "0", "16", "x"] {
            assert!(parse_bytes(bad).unwrap_err().contains("half precision"), "{bad}");
        }
    }
}
