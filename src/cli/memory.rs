//! `peft-limits memory`.

use super::size::{SIZE_HELP, parse_size};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::train::memory::pytorch::{self, Kernel, TrainerMemory, TrainerOptimizer, TrainerShape};
use crate::train::memory::{Memory, StepShape, longest, predict};
use crate::train::method::{MethodName, MethodParams};
use crate::train::preset;
use crate::validate::memory::within_numbers;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Two predictions, one beside the other. Ours is this crate's own training step (see train::memory); \
--bytes 2 tells what the same step would hold with half-precision numbers throughout, and logits \
exist 256 rows at a time. PyTorch's is what Transformers with PEFT (or the papers' own PaCA and \
S2FT) holds on a card: what autograd saves, counted by hooks, the loss or a layer's backward, and \
rules for the allocator and the context (train::memory::pytorch; paper-notes/memory-of-trainers.md \
has its errors). S2FT's units are taken to be spread evenly over the layers.

{SIZE_HELP}

Examples:
  peft-limits memory --preset micro --batch 8 --length 256
  # three methods on LLaMA-2-7B in half precision
  peft-limits memory --config examples/configs/llama-2-7b.json --method lora,paca,s2ft --length \
  2048 --bytes 2
  # what Transformers and PEFT would hold, with FlashAttention and bf16 adapters
  peft-limits memory --config examples/configs/llama-2-7b.json --method lora,dora --batch 1 \
  --length 512 --bytes 2 --trainer pytorch --attention flash --adapter-bytes 2
  # the longest sequence in 24 GiB
  peft-limits memory --config examples/configs/llama-2-7b.json --method qpaca --batch 1 --bytes 2 \
  --fits 24GiB";

/// Flags of `peft-limits memory`.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES.replace("{SIZE_HELP}", SIZE_HELP))]
pub struct MemoryArgs {
    /// A Hugging Face `config.json`, or the folder that holds it
    #[arg(long, value_name = "PATH", required_unless_present = "preset")]
    pub(super) config: Option<PathBuf>,
    /// A preset size instead: pico, nano, micro or mini
    #[arg(long, conflicts_with = "config")]
    preset: Option<String>,
    /// Methods, comma-separated (all when absent)
    #[arg(long, value_delimiter = ',')]
    method: Vec<MethodName>,
    /// Rank (number of columns for PaCA)
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Projections to adapt, comma-separated; all-linear (the default) is all seven, every linear
    /// layer but the head
    #[arg(long, value_delimiter = ',')]
    targets: Option<Vec<String>>,
    /// The method, as PEFT writes it: an `adapter_config.json` or the folder that holds it
    #[arg(long, value_name = "PATH", conflicts_with_all = ["method", "rank", "targets"])]
    peft: Option<PathBuf>,
    /// Rows per forward pass
    #[arg(long, default_value_t = 8, value_parser = between::<1, { 1 << 20 }>)]
    batch: usize,
    /// Tokens per row
    #[arg(long, default_value_t = 256, value_parser = between::<1, { 1 << 32 }>)]
    length: usize,
    /// Bytes of a number: 4 (f32), 8 (f64), or 2 for a hypothetical half-precision step
    #[arg(long, default_value_t = 4, value_parser = parse_bytes)]
    bytes: usize,
    /// Numbers of optimizer state per trained number: 2 for AdamW, 1 for SGD with momentum, 0 for
    /// SGD
    #[arg(long, default_value_t = 2, value_parser = between::<0, 8>)]
    state: usize,
    /// Keep only each layer's input between forward and backward
    #[arg(long)]
    checkpointing: bool,
    /// Whose step: this program's, that of PyTorch (Transformers and PEFT), or one beside the other
    #[arg(long, value_enum, default_value = "both", value_name = "WHOSE")]
    trainer: Of,
    /// PyTorch: how attention is computed
    #[arg(long, value_enum, default_value = "sdpa", value_name = "KERNEL")]
    attention: KernelArg,
    /// PyTorch: bytes of an adapter's number; PEFT keeps adapters in f32 unless told otherwise
    #[arg(long, default_value_t = 4, value_parser = parse_bytes, value_name = "BYTES")]
    adapter_bytes: usize,
    /// PyTorch: the loss is computed in pieces (Liger and others): logits never exist whole
    #[arg(long)]
    fused_loss: bool,
    /// PyTorch: the optimizer
    #[arg(long, value_enum, default_value = "adamw")]
    optimizer: OptimizerArg,
    /// PyTorch: what is not quantized, and with it every activation, is in f32, as
    /// prepare_model_for_kbit_training leaves it
    #[arg(long)]
    prepared: bool,
    /// PyTorch: cards over which weights, gradients and optimizer state are divided (FSDP, ZeRO
    /// stage 3)
    #[arg(long, default_value_t = 1, value_parser = between::<1, { 1 << 16 }>)]
    cards: usize,
    /// Also print the longest sequence that fits this much memory, for instance 24GiB (a unit is
    /// needed)
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

/// Whose step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Of {
    /// This program's own
    Ours,
    /// Transformers and PEFT
    Pytorch,
    /// One beside the other
    Both,
}

/// Attention of the PyTorch step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KernelArg {
    /// Scores as matrices
    Eager,
    /// scaled_dot_product_attention
    Sdpa,
    /// FlashAttention 2
    Flash,
}

/// Optimizer of the PyTorch step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OptimizerArg {
    /// torch.optim.AdamW
    Adamw,
    /// bitsandbytes' AdamW8bit
    Adamw8bit,
    /// torch.optim.SGD
    Sgd,
}

impl MemoryArgs {
    fn trainer_shape(&self) -> TrainerShape {
        TrainerShape {
            batch: self.batch,
            length: self.length,
            bytes: self.bytes,
            adapter_bytes: self.adapter_bytes,
            kernel: match self.attention {
                KernelArg::Eager => Kernel::Eager,
                KernelArg::Sdpa => Kernel::Sdpa,
                KernelArg::Flash => Kernel::Flash,
            },
            checkpointing: self.checkpointing,
            fused_loss: self.fused_loss,
            optimizer: match self.optimizer {
                OptimizerArg::Adamw => TrainerOptimizer::AdamW,
                OptimizerArg::Adamw8bit => TrainerOptimizer::AdamW8bit,
                OptimizerArg::Sgd => TrainerOptimizer::Sgd,
            },
            prepared: self.prepared,
            cards: self.cards,
        }
    }
}

/// What is known of one method.
struct Row {
    name: MethodName,
    ours: Memory,
    theirs: Option<TrainerMemory>,
    /// The longest sequences, ours and theirs, if asked for.
    longest: Option<[Option<usize>; 2]>,
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
        (None, None) => {
            return Err(Error::invalid("--config", "absent", "give --config or --preset"));
        }
    };
    let shape = StepShape {
        batch: args.batch,
        length: args.length,
        bytes: args.bytes,
        state: args.state,
        checkpointing: args.checkpointing,
    };
    let trainer = args.trainer_shape();
    let given = args.peft.as_ref().map(|path| MethodParams::of_peft(path, &config)).transpose()?;
    let mut methods = match &given {
        Some(method) => vec![method.name],
        None if args.method.is_empty() => MethodName::ALL.to_vec(),
        None => args.method.clone(),
    };
    if args.method.is_empty() && config.options.quantization.is_some() {
        methods.retain(|name| name.trains_beside_the_base());
    }
    // Everything is computed before anything is printed: a refusal comes alone.
    let mut rows = Vec::with_capacity(methods.len());
    for name in methods {
        let targets = if name == MethodName::S2ft { None } else { args.targets.clone() };
        let by_flags = MethodParams { rank: args.rank, targets, ..MethodParams::named(name) };
        let method = given.clone().unwrap_or(by_flags);
        within_numbers(&config, shape.batch, shape.length)?;
        let ours = predict(&config, &method, &shape)?;
        let theirs = match pytorch::predict(&config, &method, &trainer) {
            _ if args.trainer == Of::Ours || args.bytes == 8 => None,
            // Beside ours a family that is not modelled is a gap in the table.
            Err(Error::InvalidParam { name, .. })
                if args.trainer == Of::Both && name == "model_type" =>
            {
                None
            }
            theirs => Some(theirs?),
        };
        let longest = args.fits.map(|limit| -> Result<_> {
            let ours = longest(&config, &method, &shape, limit)?;
            let theirs = match theirs {
                Some(_) => pytorch::longest(&config, &method, &trainer, limit)?,
                None => None,
            };
            Ok([ours, theirs])
        });
        rows.push(Row { name, ours, theirs, longest: longest.transpose()? });
    }
    if args.trainer == Of::Pytorch && args.bytes == 8 {
        return Err(Error::invalid("--bytes", 8, "--trainer pytorch is predicted for 2 and 4"));
    }
    if args.json {
        rows.iter().for_each(print_json);
        return Ok(ExitCode::SUCCESS);
    }
    print_table(args, &rows);
    if let ([row], 1) = (rows.as_slice(), args.method.len()) {
        if args.trainer != Of::Pytorch {
            println!("\nactivations by tensor, all layers");
            row.ours
                .activations
                .iter()
                .for_each(|(name, bytes)| println!("  {name:<28}{:>12}", human(*bytes)));
        }
        if let Some(theirs) = &row.theirs {
            println!("\nsaved by PyTorch's autograd, all layers");
            theirs
                .saved
                .iter()
                .for_each(|(name, bytes)| println!("  {name:<28}{:>12}", human(*bytes)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Names of the columns and the bytes in them; the last is the peak.
fn columns(row: &Row, of: Of) -> Vec<(&'static str, Option<usize>)> {
    let ours = &row.ours;
    if of == Of::Pytorch {
        let theirs = row.theirs.clone().unwrap_or_default();
        return [
            ("weights", theirs.weights),
            ("adapters", theirs.adapters),
            ("gradients", theirs.gradients),
            ("optimizer", theirs.optimizer),
            ("saved", theirs.saved_bytes()),
            ("loss, layer", theirs.moment),
            ("allocator", theirs.allocator),
            ("context", theirs.context),
            ("peak", theirs.total()),
        ]
        .map(|(name, bytes)| (name, Some(bytes)))
        .to_vec();
    }
    let mut all = vec![
        ("weights", Some(ours.weights)),
        ("adapters", Some(ours.adapters)),
        ("gradients", Some(ours.gradients)),
        ("optimizer", Some(ours.optimizer)),
        ("activations", Some(ours.activation_bytes())),
        ("workspace", Some(ours.workspace)),
        (if of == Of::Both { "peak: ours" } else { "peak" }, Some(ours.total())),
    ];
    if of == Of::Both {
        all.push(("pytorch", row.theirs.as_ref().map(TrainerMemory::total)));
    }
    all
}

fn print_table(args: &MemoryArgs, rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    let mut head = format!("{:<9}{:>12}", "method", "trained");
    for (name, _) in columns(first, args.trainer) {
        head += &format!("{name:>13}");
    }
    if args.fits.is_some() {
        head += match args.trainer {
            Of::Both => "    longest: ours  pytorch",
            _ => "  longest",
        };
    }
    println!("{head}");
    for row in rows {
        let mut line = format!("{:<9}{:>12}", row.name.name(), row.ours.trained);
        for (_, bytes) in columns(row, args.trainer) {
            line += &format!("{:>13}", bytes.map_or("-".into(), human));
        }
        if let Some([ours, theirs]) = row.longest {
            let wanted = match args.trainer {
                Of::Ours => vec![ours],
                Of::Pytorch => vec![theirs],
                Of::Both => vec![ours, theirs],
            };
            let width = if args.trainer == Of::Both { [17, 9] } else { [9, 9] };
            for (length, width) in wanted.into_iter().zip(width) {
                line += &format!("{:>width$}", length.map_or("none".into(), |n| n.to_string()));
            }
        }
        println!("{line}");
    }
}

fn print_json(row: &Row) {
    let (m, [longest, theirs_longest]) = (&row.ours, row.longest.unwrap_or_default());
    let theirs = row.theirs.as_ref().map(|t| {
        serde_json::json!({
            "weights_bytes": t.weights,
            "adapters_bytes": t.adapters,
            "gradients_bytes": t.gradients,
            "optimizer_bytes": t.optimizer,
            "saved_bytes": t.saved,
            "moment_bytes": t.moment,
            "allocator_bytes": t.allocator,
            "context_bytes": t.context,
            "peak_bytes": t.total(),
            "longest_length": theirs_longest,
        })
    });
    let value = serde_json::json!({
        "method": row.name.name(),
        "trained": m.trained,
        "weights_bytes": m.weights,
        "adapters_bytes": m.adapters,
        "gradients_bytes": m.gradients,
        "optimizer_bytes": m.optimizer,
        "activations_bytes": m.activations,
        "workspace_bytes": m.workspace,
        "peak_bytes": m.total(),
        "longest_length": longest,
        "pytorch": theirs,
    });
    println!("{value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_in_their_unit() {
        assert_eq!(
            [human(24 << 30), human(1536), human(5 << 20)],
            ["24.00 GiB", "1.5 KiB", "5.0 MiB"]
        );
    }

    #[test]
    fn numbers_have_two_four_or_eight_bytes() {
        assert_eq!(["2", "4", "8"].map(parse_bytes), [Ok(2), Ok(4), Ok(8)]);
        for bad in ["3", "1", "0", "16", "x"] {
            assert!(parse_bytes(bad).unwrap_err().contains("half precision"), "{bad}");
        }
    }
}
