//! `peft-limits train`.

use super::devices::PRODUCTS_HELP;
use super::gradient::products_need_a_gpu;
use super::output::{check_folder, copy_tokenizer};
use crate::device::{DeviceChoice, ProductPrecision};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::train::checkpoint;
use crate::train::config::{Dtype, ModelSource, TrainConfig};
use crate::train::memory::{StepShape, predict};
use crate::train::method::{MethodName, MethodParams};
use crate::train::observe::{CsvLog, EvaluationRecord, Event, Observe, StopReason};
use crate::train::preset;
use crate::train::schedule::Decay;
use crate::train::tasks::TaskParams;
use crate::train::tasks::mixture::Part;
use crate::train::trainer::Trainer;
use crate::validate::memory::available;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

const EXAMPLES: &str = "\
Output folder: config.toml (resolved), steps.csv, evaluations.csv, step-*/ (to continue from), \
model/ (a Hugging Face checkpoint, adapters merged) and, for adapters, adapter/ (PEFT layout).

Examples:
  # pretrain on the mixture of tasks
  peft-limits train --preset nano --steps 1500 --batch 64 --lr 3e-3 -o runs/base
  # fine-tune on one task; what is forgotten of the others is measured
  peft-limits train --model runs/base/model --method paca --task lists -o runs/paca
  # a configuration file, some keys overridden
  peft-limits train examples/configs/finetune-paca.toml --method lora --alpha 8 -o runs/lora
  # the settings of an adapter that PEFT trains
  peft-limits train --model runs/base/model --peft adapter_config.json --task lists -o runs/lora
  # continue after Ctrl-C
  peft-limits train examples/configs/finetune-paca.toml --method lora --alpha 8 -o runs/lora \
  --resume

Configuration file (TOML; every key has a default):
  seed = 1
  [model]      preset = \"nano\" | config = \"config.json\" | path = \"DIR\"
  [method]     name = \"lora\", rank = 8, alpha = 16, targets = [\"q_proj\", \"v_proj\"]
  [optimizer]  kind = \"adamw\", lr = 1e-3, weight_decay = 0, clip = 1
  [schedule]   decay = \"cosine\", warmup = 50
  [train]      steps, batch, accumulation, length, checkpointing, bf16_storage, dtype, eval_every,
               save_every = 100 (0: save only at the end)
  [[data]]     task = \"lists\", weight = 1    (arithmetic, modular, lists, recall, facts)
  [[data]]     task = \"text\", path = \"FILE\"  (text, jsonl)
  [[retain]]   task = \"facts\"                (only tested)

Exit codes: 0 done, 1 the loss was no longer finite, 2 bad input or usage, 130 interrupted by \
Ctrl-C (the state is
saved; continue with --resume).";

/// Flags of `peft-limits train`. A flag overrides the configuration file.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct TrainArgs {
    /// Configuration file
    pub(super) config: Option<PathBuf>,
    /// Random weights of a preset size: pico, nano, micro or mini
    #[arg(long, conflicts_with = "model")]
    preset: Option<String>,
    /// Checkpoint folder to start from
    #[arg(long, value_name = "DIR")]
    pub(super) model: Option<PathBuf>,
    /// full, lora, dora, moslora, paca, s2ft, spft, qlora or qpaca
    #[arg(long)]
    method: Option<MethodName>,
    /// Rank (number of columns for PaCA)
    #[arg(long)]
    rank: Option<usize>,
    /// Scaling is alpha / rank
    #[arg(long)]
    alpha: Option<f64>,
    /// Projections to adapt, comma-separated; all-linear (the default) is all seven, every linear
    /// layer but the head
    #[arg(long, value_delimiter = ',')]
    targets: Option<Vec<String>>,
    /// The method, as PEFT writes it: an `adapter_config.json` or the folder that holds it
    #[arg(long, value_name = "PATH", conflicts_with_all = ["method", "rank", "alpha", "targets"])]
    peft: Option<PathBuf>,
    /// Task to train on (repeat for a mixture): arithmetic, modular, lists, recall, facts,
    /// text=FILE (UTF-8) or jsonl=FILE; when a checkpoint is fine-tuned, the other pretraining
    /// tasks are tested for forgetting
    #[arg(long = "task", value_name = "TASK")]
    tasks: Vec<String>,
    /// Optimizer updates
    #[arg(long)]
    steps: Option<u64>,
    /// Rows per forward pass
    #[arg(long)]
    batch: Option<usize>,
    /// Forward passes per update
    #[arg(long)]
    accumulation: Option<usize>,
    /// Most tokens per row
    #[arg(long)]
    length: Option<usize>,
    /// Peak learning rate
    #[arg(long)]
    lr: Option<f64>,
    /// Steps of linear warm-up
    #[arg(long)]
    warmup: Option<u64>,
    /// constant, linear or cosine
    #[arg(long)]
    decay: Option<String>,
    /// Largest global gradient norm
    #[arg(long)]
    clip: Option<f64>,
    /// Steps between checkpoints, the two latest of which are kept; 0 saves only at the end
    /// [default: 100]
    #[arg(long, value_name = "STEPS")]
    save_every: Option<u64>,
    /// Steps between evaluations
    #[arg(long, value_name = "STEPS")]
    eval_every: Option<u64>,
    /// Rows per task and split in an evaluation
    #[arg(long, value_name = "ROWS")]
    eval_rows: Option<usize>,
    /// Recompute activations in backward
    #[arg(long)]
    checkpointing: bool,
    /// Double precision
    #[arg(long)]
    f64: bool,
    /// Where the steps are computed: cpu, gpu or gpu:N, cuda or cuda:N; evaluation stays on the
    /// processor
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceChoice,
    #[arg(long, value_name = "PRECISION", default_value_t, help = PRODUCTS_HELP)]
    products: ProductPrecision,
    /// Seed of every random choice
    #[arg(long)]
    seed: Option<u64>,
    /// Output folder
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Continue from the latest checkpoint in the output folder
    #[arg(long)]
    resume: bool,
}

fn set<V>(target: &mut V, flag: Option<V>) {
    if let Some(value) = flag {
        *target = value;
    }
}

impl TrainArgs {
    /// The file (or the defaults) with the flags on top.
    ///
    /// # Errors
    /// As [`TrainConfig::read`] and [`TrainConfig::check`].
    pub fn resolve(&self) -> Result<TrainConfig> {
        let mut config = match &self.config {
            Some(path) => TrainConfig::read(path)?,
            None => TrainConfig::default(),
        };
        if let Some(name) = &self.preset {
            preset::preset(name)?;
            config.model = ModelSource::Preset(name.clone());
        }
        if let Some(folder) = &self.model {
            config.model = ModelSource::Path(folder.clone());
        }
        set(&mut config.seed, self.seed);
        set(&mut config.method.name, self.method);
        set(&mut config.method.rank, self.rank);
        config.method.alpha = self.alpha.or(config.method.alpha);
        config.method.targets = self.targets.clone().or(config.method.targets);
        if let Some(path) = &self.peft {
            config.method = MethodParams::of_peft(path, &config.model.sizes()?)?;
        }
        let run = &mut config.train;
        set(&mut run.steps, self.steps);
        set(&mut run.batch, self.batch);
        set(&mut run.accumulation, self.accumulation);
        set(&mut run.length, self.length);
        set(&mut run.save_every, self.save_every);
        set(&mut run.eval_every, self.eval_every);
        set(&mut run.eval_rows, self.eval_rows);
        run.checkpointing |= self.checkpointing;
        if self.f64 {
            run.dtype = Dtype::F64;
        }
        set(&mut config.optimizer.lr, self.lr);
        set(&mut config.optimizer.clip, self.clip);
        set(&mut config.schedule.warmup, self.warmup);
        if let Some(decay) = &self.decay {
            config.schedule.decay = match decay.as_str() {
                "constant" => Decay::Constant,
                "linear" => Decay::Linear,
                "cosine" => Decay::Cosine,
                _ => {
                    return Err(Error::invalid(
                        "--decay",
                        decay,
                        "must be constant, linear or cosine",
                    ));
                }
            };
        }
        if !self.tasks.is_empty() {
            let named = self
                .tasks
                .iter()
                .map(|name| Ok(Part { weight: 1.0, task: TaskParams::named(name)? }));
            config.data = named.collect::<Result<Vec<_>>>()?;
            if matches!(config.model, ModelSource::Path(_)) && config.retain.is_empty() {
                config.retain = TaskParams::pretraining();
                config.retain.retain(|part| !config.data.iter().any(|d| d.task == part.task));
            }
        }
        config.check()?;
        Ok(config)
    }
}

/// Runs the subcommand.
///
/// # Errors
/// Bad configuration, unreadable or unwritable files, or an interrupt.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    products_need_a_gpu(args.products, args.device)?;
    let config = args.resolve()?;
    match config.train.dtype {
        Dtype::F32 => train::<f32>(args, config),
        Dtype::F64 => train::<f64>(args, config),
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

fn train<T: Real>(args: &TrainArgs, config: TrainConfig) -> Result<ExitCode> {
    let out = &args.out;
    if !args.resume && !checkpoint::list(out)?.is_empty() {
        let requirement = "already holds a run; pass --resume to continue it, or another folder";
        return Err(Error::invalid("--out", out.display(), requirement));
    }
    check_folder("--out", out, &inputs(&config))?;
    check_memory(&config, size_of::<T>())?;
    let mut trainer = Trainer::<T>::new(config)?;
    if args.resume {
        checkpoint::resume(&mut trainer, out)?;
    }
    if args.device != DeviceChoice::Cpu {
        move_to(&mut trainer, args.device, args.products)?;
    }
    crate::atomic_file::write_bytes(
        &out.join("config.toml"),
        trainer.config.to_toml()?.as_bytes(),
    )?;
    let handler = || {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(crate::error::INTERRUPTED.into());
        }
        eprintln!("stopping after this step, saving; press Ctrl-C again to stop at once");
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("Ctrl-C will end the run at once: {error}");
    }
    let mut log = CsvLog::open(out, trainer.steps_done())?;
    let mut bar = Bar::default();
    let reason = trainer.run(Some(out), &mut [&mut log, &mut bar], &STOP)?;
    match &reason {
        StopReason::NonFinite { .. } => {
            eprintln!("peft-limits: {reason} ({})", out.display());
            return Ok(ExitCode::from(1));
        }
        StopReason::Interrupted { .. } => return Err(Error::Interrupted),
        _ => {}
    }
    let model = out.join("model");
    trainer.model.write(&model)?;
    if let ModelSource::Path(base) = &trainer.config.model {
        copy_tokenizer(base, &model)?;
    }
    let adapted = trainer.config.method.name != MethodName::Full;
    if adapted {
        trainer.model.write_adapter(&out.join("adapter"))?;
    }
    print!("{}", bar.table());
    println!("{reason}; wrote {}{}", model.display(), if adapted { " and adapter/" } else { "" });
    Ok(ExitCode::SUCCESS)
}

/// Files and folders that the run reads.
fn inputs(config: &TrainConfig) -> Vec<&Path> {
    match &config.model {
        ModelSource::Path(path) | ModelSource::Config(path) => vec![path.as_path()],
        ModelSource::Preset(_) => Vec::new(),
    }
}

/// Refuses a model whose weights, adapters and gradients alone exceed the memory that is free.
fn check_memory(config: &TrainConfig, bytes: usize) -> Result<()> {
    let shape = StepShape { batch: 1, length: 1, bytes, state: 0, checkpointing: false };
    let memory = predict(&config.model.sizes()?, &config.method, &shape)?;
    let (needed, limit) =
        (memory.weights + memory.adapters + memory.gradients, available().unwrap_or(usize::MAX));
    if needed <= limit {
        return Ok(());
    }
    let what = "the model with its gradients".to_string();
    Err(Error::TooLarge {
        what,
        needed: (needed >> 20) as u128,
        limit: (limit >> 20) as u128,
        unit: "MiB",
    })
}

#[cfg(feature = "gpu")]
fn move_to<T: Real>(
    trainer: &mut Trainer<T>,
    choice: DeviceChoice,
    products: ProductPrecision,
) -> Result<()> {
    let device = crate::gpu::Device::open(choice)?;
    eprintln!("training on {}, {products} products", device.info());
    crate::gpu::train::train_on(trainer, &device, products)
}

#[cfg(not(feature = "gpu"))]
fn move_to<T: Real>(
    _trainer: &mut Trainer<T>,
    choice: DeviceChoice,
    _products: ProductPrecision,
) -> Result<()> {
    Err(choice.not_built())
}

/// A progress bar on stderr, hidden off-terminal, and the last evaluation.
#[derive(Default)]
struct Bar {
    bar: Option<ProgressBar>,
    last: Vec<EvaluationRecord>,
}

impl Bar {
    fn table(&self) -> String {
        let mut text = format!(
            "{:<8}{:<12}{:<9}{:>6}{:>13}{:>11}{:>8}\n",
            "set", "task", "split", "exact", "tokens right", "loss nats", "choice"
        );
        for r in &self.last {
            let s = &r.scores;
            let choice = if s.choice.is_nan() { "-".into() } else { format!("{:.3}", s.choice) };
            text += &format!(
                "{:<8}{:<12}{:<9}{:>6.3}{:>13.3}{:>11.4}{choice:>8}\n",
                r.set,
                r.task,
                r.split.name(),
                s.exact,
                s.tokens,
                s.loss
            );
        }
        text
    }
}

impl Observe for Bar {
    fn observe(&mut self, event: &Event<'_>) -> Result<()> {
        match event {
            Event::Started { step, steps, trainable } => {
                let bar = ProgressBar::new(*steps).with_position(*step);
                if let Ok(style) =
                    ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}  {eta} left")
                {
                    bar.set_style(style);
                }
                bar.println(format!("training {trainable} numbers"));
                self.bar = Some(bar);
            }
            Event::Step(record) => {
                if let Some(bar) = &self.bar {
                    bar.set_position(record.step);
                    bar.set_message(format!("loss {:.4}", record.loss));
                }
            }
            Event::Evaluated(record) => {
                if self.last.first().is_some_and(|first| first.step != record.step) {
                    self.last.clear();
                }
                self.last.push((*record).clone());
            }
            Event::Stopped(_) => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
            }
            Event::Saved(_) => {}
        }
        Ok(())
    }
}
