//! `peft-limits memory`.

use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::train::memory::{Memory, StepShape, longest, predict};
use crate::train::method::{MethodName, MethodParams};
use crate::train::preset;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
The prediction is that of this crate's own training step (see train::memory); --bytes 2 tells what the same step would \
hold with half-precision numbers throughout. Logits exist 256 rows at a time. S2FT's units are taken to be spread evenly over the layers.

Examples:
  peft-limits memory --preset micro --batch 8 --length 256
  # three methods on LLaMA-2-7B in half precision
  peft-limits memory --config examples/configs/llama-2-7b.json --method lora,paca,s2ft --length 2048 --bytes 2
  # the longest sequence in 24 GiB
  peft-limits memory --config examples/configs/llama-2-7b.json --method qpaca --batch 1 --bytes 2 --fits 24GiB";

/// Flags of `peft-limits memory`.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
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
    /// Projections to adapt, comma-separated
    #[arg(long, value_delimiter = ',')]
    targets: Option<Vec<String>>,
    /// Rows per forward pass
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens per row
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Bytes of a number: 4 (f32), 8 (f64), or 2 for a hypothetical half-precision step
    #[arg(long, default_value_t = 4)]
    bytes: usize,
    /// Numbers of optimizer state per trained number: 2 for AdamW, 1 for SGD with momentum, 0 for SGD
    #[arg(long, default_value_t = 2)]
    state: usize,
    /// Keep only each layer's input between forward and backward
    #[arg(long)]
    checkpointing: bool,
    /// Also print the longest sequence that fits this much memory, for instance 24GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    fits: Option<usize>,
    /// One JSON object per method
    #[arg(long)]
    json: bool,
}

/// A size in bytes: a number with an optional unit.
pub(super) fn parse_size(text: &str) -> std::result::Result<usize, String> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (text[..at].parse::<f64>(), text[at..].trim());
    let factor = match unit {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("unknown unit `{unit}`: use B, kB, MB, GB, KiB, MiB or GiB")),
    };
    match number {
        Ok(n) if n > 0.0 => Ok((n * factor) as usize),
        _ => Err("a positive number with a unit, for instance 24GiB".into()),
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
    let methods = if args.method.is_empty() { MethodName::ALL.to_vec() } else { args.method.clone() };
    if !args.json {
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
    }
    let mut one = None;
    for name in methods {
        let targets = if name == MethodName::S2ft { None } else { args.targets.clone() };
        let method = MethodParams { rank: args.rank, targets, ..MethodParams::named(name) };
        let memory = predict(&config, &method, &shape)?;
        let fits = args.fits.map(|limit| longest(&config, &method, &shape, limit)).transpose()?;
        if args.json {
            print_json(name, &memory, fits);
        } else {
            print_row(name, &memory, fits);
        }
        one = if one.is_none() && args.method.len() == 1 { Some(memory) } else { None };
    }
    if let (Some(memory), false) = (one, args.json) {
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
    fn sizes_have_units() {
        assert_eq!(parse_size("24GiB"), Ok(24 << 30));
        assert_eq!(parse_size("1.5 MB"), Ok(1_500_000));
        assert_eq!(parse_size("100"), Ok(100));
        for bad in ["", "GiB", "-1GiB", "3 furlongs", "0GiB", "nan"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(human(24 << 30), "24.00 GiB");
    }
}
