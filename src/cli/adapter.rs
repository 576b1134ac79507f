//! `peft-limits adapter`: export, merge, fuse, switch, evaluate.

use super::output::{check_folder, copy_tokenizer};
use crate::adapters::update::WeightUpdate;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::model::update::{ModelUpdate, switch_off_on_disk, switch_on_on_disk};
use crate::model::{Model, ModelConfig};
use crate::train::checkpoint;
use crate::train::config::{ModelSource, TrainConfig};
use crate::train::data::Encoder;
use crate::train::evaluate_mixed::evaluate_mixed;
use crate::train::method::MethodName;
use crate::train::tasks::{Split, TaskParams};
use crate::train::tokenizer::Tokenizer;
use crate::train::trainer::Trainer;
use clap::{Args, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const EXAMPLES: &str = "\
An adapter here is what training added to the weights, apart from the model: slices of rows or \
columns (S2FT, PaCA; peft_type SLICE) or low-rank factors (LoRA, MosLoRA; PEFT's own format). Full \
fine-tuning and DoRA give a slice of every row. Wherever an adapter folder is read, folders of all \
kinds are accepted.

Examples, from a base model and two runs of `peft-limits train`:
  peft-limits adapter export --model runs/base/model --run runs/paca -o math
  peft-limits adapter export --model runs/base/model --run runs/lora -o facts
  peft-limits adapter fuse --model runs/base/model math=0.7 facts=0.3 -o both
  peft-limits adapter evaluate --model runs/base/model math facts both --task lists --task facts
`peft-limits adapter export --help` and so on show more of each.";

const EXPORT_EXAMPLES: &str = "\
Examples:
  # from an adapter folder, of PEFT or of `peft-limits train`
  peft-limits adapter export --model runs/base/model --adapter runs/s2ft/adapter -o math
  # from the difference of two checkpoints: a merged model of any trainer
  peft-limits adapter export --model runs/base/model --trained runs/s2ft/model -o math
  # from a run's latest checkpoint, as a LoRA folder that PEFT loads
  peft-limits adapter export --model runs/base/model --run runs/paca --low-rank -o math-lora";

const MERGE_EXAMPLES: &str = "\
Everything that the adapter trains is folded in: factors of projections, output head and \
embedding, modules that are trained whole (PEFT's modules_to_save), biases. Refused: an update of \
a head that is tied to the embedding, which would change both. The files of the tokenizer are \
copied.

Example:
  peft-limits adapter merge --model runs/base/model runs/lora/adapter -o merged";

const FUSE_EXAMPLES: &str = "\
Examples:
  # the sum of both updates
  peft-limits adapter fuse --model runs/base/model math facts -o both
  # a weighted sum, as a LoRA folder that PEFT loads
  peft-limits adapter fuse --model runs/base/model math=0.7 facts=0.3 --low-rank -o both-lora";

const SWITCH_EXAMPLES: &str = "\
What an adapter overwrites is kept beside the checkpoint, so that --off brings every byte back.

Examples:
  cp -r runs/base/model serving
  peft-limits adapter switch --model serving math
  # takes `math` out and puts `facts` in
  peft-limits adapter switch --model serving facts
  peft-limits adapter switch --model serving --off";

const EVALUATE_EXAMPLES: &str = "\
Example:
  peft-limits adapter evaluate --model runs/base/model math facts both --task lists --task facts \
  --rows 64";

/// Arguments of `peft-limits adapter`.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct AdapterArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Write what training added to a base model as an adapter folder
    Export(Export),
    /// Write a base model with an adapter folded into it as a checkpoint folder
    Merge(Merge),
    /// Write the weighted sum of adapters as one adapter folder
    Fuse(Fuse),
    /// Put an adapter into a checkpoint folder in place, or take it out again, byte for byte
    Switch(Switch),
    /// Serve a task's rows under the base and every adapter, mixed in the same batches
    Evaluate(Evaluate),
}

#[derive(Debug, Args)]
#[command(after_long_help = EXPORT_EXAMPLES)]
struct Export {
    /// Base checkpoint folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    source: ExportSource,
    #[command(flatten)]
    output: Output,
}

/// How an adapter folder is written.
#[derive(Debug, Args)]
struct Output {
    /// As low-rank factors (slices through a selection matrix, without rounding): a folder that
    /// PEFT loads
    #[arg(long)]
    low_rank: bool,
    /// Compute and write in double precision
    #[arg(long)]
    f64: bool,
    /// Output folder
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct ExportSource {
    /// An adapter folder of any kind
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// A trained or merged checkpoint folder
    #[arg(long, value_name = "DIR")]
    trained: Option<PathBuf>,
    /// A folder of `peft-limits train`: its latest checkpoint
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_long_help = MERGE_EXAMPLES)]
struct Merge {
    /// Base checkpoint folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter folder of any kind
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// Compute and write in double precision, not single
    #[arg(long)]
    f64: bool,
    /// Output folder
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_long_help = FUSE_EXAMPLES)]
struct Fuse {
    /// Base checkpoint folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter folders, each with an optional weight (default 1)
    #[arg(required = true, value_name = "DIR[=WEIGHT]")]
    adapters: Vec<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
#[command(after_long_help = SWITCH_EXAMPLES)]
struct Switch {
    /// Checkpoint folder, changed in place
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter folder to put in effect; one already in effect is taken out first
    #[arg(required_unless_present = "off", conflicts_with = "off")]
    adapter: Option<PathBuf>,
    /// Only take the present adapter out
    #[arg(long)]
    off: bool,
}

#[derive(Debug, Args)]
#[command(after_long_help = EVALUATE_EXAMPLES)]
struct Evaluate {
    /// Base checkpoint folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter folders
    #[arg(required = true)]
    adapters: Vec<PathBuf>,
    /// arithmetic, modular, lists, recall, facts, text=FILE or jsonl=FILE (repeat for several)
    #[arg(long = "task", required = true)]
    tasks: Vec<String>,
    /// Rows per task and split
    #[arg(long, default_value_t = 128)]
    rows: usize,
    /// Sequences per forward pass
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Most tokens per row
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Seed of the rows
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Double precision
    #[arg(long)]
    f64: bool,
}

impl AdapterArgs {
    /// What is read: the adapter where there is one, or the base model.
    pub(super) fn subject(&self) -> &Path {
        match &self.action {
            Action::Export(Export { model, source, .. }) => {
                let ExportSource { adapter, trained, run } = source;
                adapter.as_ref().or(trained.as_ref()).or(run.as_ref()).unwrap_or(model)
            }
            Action::Merge(args) => &args.adapter,
            Action::Fuse(args) => &args.model,
            Action::Switch(args) => args.adapter.as_ref().unwrap_or(&args.model),
            Action::Evaluate(args) => &args.model,
        }
    }
}

/// Runs the subcommand.
///
/// # Errors
/// Unreadable, unwritable or contradicting files, each named.
pub fn run(args: &AdapterArgs) -> Result<ExitCode> {
    match &args.action {
        Action::Export(args) if args.output.f64 => export::<f64>(args),
        Action::Export(args) => export::<f32>(args),
        Action::Merge(args) if args.f64 => merge::<f64>(args),
        Action::Merge(args) => merge::<f32>(args),
        Action::Fuse(args) if args.output.f64 => fuse::<f64>(args),
        Action::Fuse(args) => fuse::<f32>(args),
        Action::Switch(args) => switch(args),
        Action::Evaluate(args) if args.f64 => evaluate::<f64>(args),
        Action::Evaluate(args) => evaluate::<f32>(args),
    }
}

fn export<T: Real>(args: &Export) -> Result<ExitCode> {
    let ExportSource { adapter, trained, run } = &args.source;
    let sources = [adapter, trained, run].into_iter().flatten();
    check_output(&args.output, &args.model, sources)?;
    let base = Model::<T>::read(&args.model)?;
    let (update, trained) = match (&args.source.adapter, &args.source.trained, &args.source.run) {
        (Some(folder), ..) => (ModelUpdate::read(folder, &base)?, None),
        (_, Some(folder), _) => {
            let trained = Model::<T>::read(folder)?;
            (ModelUpdate::between(&base, &trained)?, Some(trained))
        }
        (.., Some(folder)) => of_run(folder, &base)?,
        _ => unreachable!("clap requires one source"),
    };
    if let Some(trained) = trained {
        let (exact, all) = update.exact_numbers(&base, &trained)?;
        println!(
            "{exact} of {all} trained numbers come back bit for bit, the others within one rounding"
        );
    }
    write(&update, &args.output, &base.config, args.source.adapter.as_deref())
}

fn merge<T: Real>(args: &Merge) -> Result<ExitCode> {
    check_folder("--out", &args.out, &[&args.model, &args.adapter])?;
    let merged = Model::<T>::read(&args.model)?.with_folder(&args.adapter)?;
    merged.write(&args.out)?;
    copy_tokenizer(&args.model, &args.out)?;
    println!(
        "merged {} into {}; wrote {}",
        args.adapter.display(),
        args.model.display(),
        args.out.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// The update of a run's latest checkpoint, and the trained model where it is no adapter's.
fn of_run<T: Real>(folder: &Path, base: &Model<T>) -> Result<(ModelUpdate<T>, Option<Model<T>>)> {
    let Some((_, latest)) = checkpoint::list(folder)?.pop() else {
        return Err(Error::format(folder, "checkpoint", "a folder step-NNNNNNNN", "none"));
    };
    let path = latest.join("config.toml");
    let config = TrainConfig::read(&path)?;
    if let ModelSource::Path(model) = &config.model
        && ModelConfig::read(&model.join("config.json"))? != base.config
    {
        return Err(Error::format(
            path,
            "key model.path",
            "a model of the sizes of --model",
            model.display().to_string(),
        ));
    }
    let full = config.method.name == MethodName::Full;
    let mut trainer = Trainer::<T>::new(config)?;
    if checkpoint::fingerprint(base) != trainer.base_fingerprint() && !full {
        let found = "another base model than --model";
        return Err(Error::format(path, "key model.path", "the weights of --model", found));
    }
    checkpoint::resume(&mut trainer, folder)?;
    if full {
        return Ok((ModelUpdate::between(base, &trainer.model)?, Some(trainer.model)));
    }
    Ok((ModelUpdate::of_adapters(&trainer.model)?, None))
}

fn write<T: Real>(
    update: &ModelUpdate<T>,
    output: &Output,
    config: &ModelConfig,
    like: Option<&Path>,
) -> Result<ExitCode> {
    let factors = if output.low_rank { Some(update.to_low_rank()?) } else { None };
    let update = factors.as_ref().unwrap_or(update);
    // The configuration of another method's folder says nothing about factors.
    let like = like.filter(|folder| crate::model::adapter_folder::is_lora(folder).unwrap_or(false));
    update.write(&output.out, config, like)?;
    let slices = update.entries.values().filter(|u| matches!(u, WeightUpdate::Slice(_))).count();
    println!(
        "{} projections ({slices} slices, {} low-rank), {} numbers, {:.1} KiB; wrote {}",
        update.entries.len(),
        update.entries.len() - slices,
        update.elements(),
        update.bytes() as f64 / 1024.0,
        output.out.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// `DIR=WEIGHT`, or `DIR` with weight 1.
fn weighted(text: &str) -> (PathBuf, f64) {
    match text.rsplit_once('=').and_then(|(path, weight)| Some((path, weight.parse().ok()?))) {
        Some((path, weight)) => (path.into(), weight),
        None => (text.into(), 1.0),
    }
}

/// Refuses an output folder that is one of those read, or cannot be written.
fn check_output<'a>(
    output: &Output,
    model: &'a Path,
    others: impl Iterator<Item = &'a PathBuf>,
) -> Result<()> {
    let inputs: Vec<&Path> = std::iter::once(model).chain(others.map(PathBuf::as_path)).collect();
    check_folder("--out", &output.out, &inputs)
}

fn fuse<T: Real>(args: &Fuse) -> Result<ExitCode> {
    let named: Vec<(PathBuf, f64)> = args.adapters.iter().map(|text| weighted(text)).collect();
    check_output(&args.output, &args.model, named.iter().map(|(path, _)| path))?;
    let base = Model::<T>::read(&args.model)?;
    let updates =
        named.iter().map(|(path, _)| ModelUpdate::read(path, &base)).collect::<Result<Vec<_>>>()?;
    let parts: Vec<(f64, &ModelUpdate<T>)> = named.iter().map(|(_, w)| *w).zip(&updates).collect();
    write(&ModelUpdate::fuse(&parts)?, &args.output, &base.config, None)
}

fn switch(args: &Switch) -> Result<ExitCode> {
    if let Some(adapter) = &args.adapter {
        // Before the present one is taken out. Shapes do not depend on which adapter is in effect.
        ModelUpdate::read(adapter, &Model::<f32>::read(&args.model)?)?;
    }
    if let Some(done) = switch_off_on_disk(&args.model)? {
        println!(
            "took an adapter out: {} bytes of {} tensors are the base's again",
            done.bytes, done.tensors
        );
    } else if args.off {
        println!("no adapter was in effect");
    }
    if let Some(adapter) = &args.adapter {
        let done = switch_on_on_disk(&args.model, adapter)?;
        println!(
            "put {} in effect: {} bytes of {} tensors, the old ones kept in {}",
            adapter.display(),
            done.bytes,
            done.tensors,
            done.kept.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn evaluate<T: Real>(args: &Evaluate) -> Result<ExitCode> {
    for (name, value) in [("--rows", args.rows), ("--batch", args.batch)] {
        if !(1..=1 << 20).contains(&value) {
            return Err(Error::invalid(name, value, "must be 1 to 2^20"));
        }
    }
    let opened = args.tasks.iter().map(|name| Ok((name, TaskParams::named(name)?.open()?)));
    let tasks: Vec<_> = opened.collect::<Result<_>>()?;
    let base = Model::<T>::read(&args.model)?;
    let tokenizer = Tokenizer::of_model(&args.model, base.config.vocab_size)?;
    let encoder = Encoder { tokenizer: &tokenizer, length: args.length, truncate: false };
    let updates = args
        .adapters
        .iter()
        .map(|path| ModelUpdate::read(path, &base))
        .collect::<Result<Vec<_>>>()?;
    let given: Vec<&ModelUpdate<T>> = updates.iter().collect();
    let names: Vec<String> = ["base".into()]
        .into_iter()
        .chain(args.adapters.iter().map(|p| p.display().to_string()))
        .collect();
    let width = names.iter().map(String::len).max().unwrap_or(0);
    println!(
        "{:<12}{:<9}{:<width$}{:>8}{:>14}{:>11}",
        "task", "split", "adapter", "exact", "tokens right", "loss nats"
    );
    for (name, task) in &tasks {
        for split in [Split::Test, Split::Shifted].into_iter().filter(|&s| task.has(s)) {
            let place = (args.seed, split);
            let scores = evaluate_mixed(
                &base,
                &given,
                &encoder,
                task.as_ref(),
                place,
                args.rows,
                args.batch,
            )?;
            for (adapter, s) in names.iter().zip(scores) {
                println!(
                    "{name:<12}{:<9}{adapter:<width$}{:>8.3}{:>14.3}{:>11.4}",
                    split.name(),
                    s.exact,
                    s.tokens,
                    s.loss
                );
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_an_equals_sign() {
        assert_eq!(weighted("a/b=0.25"), ("a/b".into(), 0.25));
        assert_eq!(weighted("a/b"), ("a/b".into(), 1.0));
        assert_eq!(weighted("lr=3/x"), ("lr=3/x".into(), 1.0));
        assert_eq!(weighted("lr=3=-1e-1"), ("lr=3".into(), -0.1));
    }
}
