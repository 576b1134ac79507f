//! `peft-limits validate`.

use super::output::check_file;
use super::size::{SIZE_HELP, parse_size};
use super::{verdict, verdict_page};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::report::{ColourScale, Figure, HeatAxis, HeatMap};
use crate::validate::dump::{Case, DumpPaths, PlainSettings};
use crate::validate::manifest::Manifest;
use crate::validate::ranks::{Ranks, is_of_ranks, validate_ranks};
use crate::validate::selftest::{Planted, selftest};
use crate::validate::{Precision, Report, Watch, head, memory, place_of, validate};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const FORMAT: &str = "\
A dump is a folder that the Python package peft_limits writes from any PyTorch trainer:

  with dump_step(model, \"dump\"):
      loss = model(**batch).loss; loss.backward(); optimizer.step()

  manifest.json      format peft-limits-dump, version 1: model and adapter folders, trained names, \
  precision, loss
                     reduction, micro-batches, loss scale, optimizer
  step.safetensors   input_ids, labels (B x T), optional attention_mask, position_ids; loss, \
  logits, hidden.LAYER;
                     grad.NAME, applied.NAME (as the optimizer saw it), after.NAME, previous.NAME, \
                     exp_avg.NAME, ...
  model/, adapter/   Hugging Face and PEFT layout, or elsewhere as the manifest says

Where torch.distributed runs several processes each writes its part, dump/rank-N; validate puts \
them together, judges what each rank holds, and names what went wrong between them (gradients not \
reduced, averaged twice, replicas that differ, ...).

paper-notes/dump-format.md has every key. Each comparison is three-way: the exact f64 reference, \
the reference with the trainer's rounding imitated, the trainer; the column `share` is the gap in \
units of what is allowed (8 times the rounding gap). When something is wrong the known faults are \
tried, and the one that reproduces the trainer's numbers is named.

Examples:
  # a right step and one with a planted fault, from this repository
  peft-limits validate tests/data/dumps/clean/lora-bf16
  peft-limits validate tests/data/dumps/faults/half-precision-rotary-backward
  # your own dump, for people and for programs
  peft-limits validate dump --heat-map shares --json > verdict.json
  # a page to send to somebody, and what this dump can reveal at all
  peft-limits validate dump --html verdict.html
  peft-limits validate dump --selftest
  # a step of two processes, one of which kept its own gradient
  peft-limits validate tests/data/ranks/faults/data-parallel-not-reduced-f32
  # without a manifest: a model, its adapter, and the step's tensors
  peft-limits validate --model llama --adapter lora --reference step.safetensors
  # our own step on a GPU
  peft-limits validate --model llama --adapter lora --trainer gpu
  # one attention kernel
  peft-limits validate --head head.safetensors --reference kernel-output.safetensors --dtype bf16

Exit codes: 0 right, 1 wrong, 2 bad input, 130 interrupted.";

/// Flags of `peft-limits validate`.
#[derive(Args)]
#[command(after_long_help = format!("{FORMAT}\n\n{SIZE_HELP}"))]
pub(super) struct ValidateArgs {
    /// A dump folder
    #[arg(required_unless_present_any = ["model", "head"], conflicts_with_all = ["model", "head"])]
    pub(super) dump: Option<PathBuf>,
    /// Hugging Face checkpoint folder, with --reference or --trainer
    #[arg(long, value_name = "DIR")]
    pub(super) model: Option<PathBuf>,
    /// Adapter folder
    #[arg(long, value_name = "DIR", requires = "model")]
    adapter: Option<PathBuf>,
    /// One attention head (see `gradient --help`), with the kernel's output in --reference
    #[arg(long, value_name = "FILE", requires = "reference", conflicts_with = "model")]
    pub(super) head: Option<PathBuf>,
    /// What the trainer or kernel computed: tensors as in a dump's step.safetensors, or O and
    /// gradients of a head
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// Validate this program's own training step on gpu, gpu:N, cuda or cuda:N: on the batch of
    /// --reference (input_ids and labels), or on a small random one
    #[arg(long, value_name = "DEVICE", requires = "model", conflicts_with_all = ["dtype", "head"])]
    trainer: Option<DeviceChoice>,
    /// Number format of the trainer, without a manifest: f64, f32, bf16 or f16 (default: that of
    /// its gradients)
    #[arg(long, value_name = "DTYPE", value_parser = |text: &str| Precision::parse(text).map_err(|e| e.to_string()))]
    dtype: Option<Precision>,
    /// Print every tensor, not only the worst
    #[arg(long)]
    all: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Write a heat map of shares, layer by projection, to NAME.svg and NAME.png
    #[arg(long, value_name = "NAME")]
    heat_map: Option<PathBuf>,
    /// Write the report as one HTML page that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Search also a large step for known faults below every tensor's tolerance (some sixty more
    /// steps; small ones are searched anyway, in half formats)
    #[arg(long)]
    faint: bool,
    /// Plant each known fault into this dump, which must pass, and show whether it is found
    #[arg(long, requires = "dump", conflicts_with_all = ["heat_map", "html", "reference"])]
    selftest: bool,
    /// Judge the gradients of these layers alone, from the recorded output of the layer below on if
    /// the dump has it: FIRST..END or FIRST.. (layers count from 0)
    #[arg(long, value_name = "LAYERS", value_parser = Span::parse, conflicts_with_all = ["head", "trainer"])]
    layers: Option<Span>,
    /// Judge these rows of the batch alone, FIRST..END or FIRST..: their logits and hidden states,
    /// and the gradients if no other row counts in the loss
    #[arg(long, value_name = "ROWS", value_parser = Span::parse, conflicts_with_all = ["head", "trainer"])]
    rows: Option<Span>,
    /// Judge the first tokens of each row alone, likewise
    #[arg(long, value_name = "N", conflicts_with_all = ["head", "trainer"])]
    tokens: Option<usize>,
    /// Memory that may be used, for instance 24GiB (default: what is free). A model that does not
    /// fit stays on the disk and is read layer by layer
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<usize>,
}

/// Layers or rows from one on, up to another or the last.
#[derive(Debug, Clone, Copy)]
struct Span {
    first: usize,
    end: Option<usize>,
}

impl Span {
    fn parse(text: &str) -> std::result::Result<Self, &'static str> {
        let read = || {
            let (first, end) = text.split_once("..")?;
            let end = if end.is_empty() { None } else { Some(end.parse().ok()?) };
            Some(Self { first: first.parse().ok()?, end })
        };
        read().ok_or("expected FIRST..END or FIRST.., for instance 20..24")
    }

    fn within(self, all: usize) -> std::ops::Range<usize> {
        self.first..self.end.unwrap_or(all)
    }
}

/// A spinner on a terminal, nothing elsewhere.
struct Spinner {
    bar: ProgressBar,
    what: RefCell<String>,
    /// Layers of the model, once it is read.
    layers: Cell<usize>,
}

impl Spinner {
    fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::of(ProgressBar::hidden());
        }
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {msg}  {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self::of(bar)
    }

    fn of(bar: ProgressBar) -> Self {
        Self { bar, what: RefCell::default(), layers: Cell::default() }
    }
}

impl Watch for Spinner {
    fn begins(&self, what: &str) {
        *self.what.borrow_mut() = what.to_string();
        self.bar.set_message(what.to_string());
    }

    fn layer(&self, layer: usize, backward: bool) {
        let (way, all) = (if backward { "backward" } else { "forward" }, self.layers.get());
        self.bar.set_message(format!(
            "{}, {way}, layer {} of {all}",
            self.what.borrow(),
            layer + 1
        ));
    }
}

/// Runs the subcommand.
///
/// # Errors
/// Files that cannot be read or do not fit each other, a model that does not fit in memory.
pub(super) fn run(args: &ValidateArgs) -> Result<ExitCode> {
    if let Some(name) = &args.heat_map {
        check_heat_map(name)?;
    }
    if let Some(file) = &args.html {
        check_file("--html", file, &[])?;
    }
    if args.selftest {
        return plant(args);
    }
    let report = match (&args.head, &args.reference) {
        _ if args.trainer.is_some() => validate_device(args)?,
        (Some(input), Some(output)) => head::validate_head(input, output, args.dtype)?,
        _ => validate_step(args)?,
    };
    if let Some(name) = &args.heat_map {
        write_heat_map(&report, name)?;
    }
    if let Some(file) = &args.html {
        verdict_page::write(&report, file)?;
    }
    if args.json {
        println!("{}", json(&report));
    } else {
        verdict::print(&report, args.all);
    }
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Says what a dump is and how to make one, where a folder is none.
fn must_be_a_dump(folder: &Path) -> Result<()> {
    if folder.join("manifest.json").exists() {
        return Ok(());
    }
    let there = |name: &str| folder.join(name).exists();
    let found = if !folder.exists() {
        "nothing of that name"
    } else if !folder.is_dir() {
        "a file (a step's tensors go to --reference, with --model)"
    } else if there("adapter_config.json") {
        "an adapter folder (it goes to --adapter, with --model and --reference)"
    } else if there("config.json") {
        "a checkpoint folder (it goes to --model, with --reference)"
    } else if there("step.safetensors") {
        "step.safetensors without a manifest.json"
    } else {
        "a folder without manifest.json"
    };
    let expected = "a dump: a folder with manifest.json and step.safetensors, one training step as \
                    the Python package writes it with `with dump_step(model, \"dump\"): ...` \
                    around the step (peft-limits validate --help has the whole format)";
    Err(Error::format(folder, "dump", expected, found))
}

fn validate_step(args: &ValidateArgs) -> Result<Report> {
    let spinner = Spinner::new();
    if let Some(folder) = args.dump.as_ref().filter(|folder| is_of_ranks(folder)) {
        if args.rows.is_some() || args.tokens.is_some() {
            let requirement = "of one process: what ranks hold is a sum over their rows";
            return Err(Error::invalid("--rows, --tokens", folder.display(), requirement));
        }
        let ranks = Ranks::read(folder)?;
        let name = folder.display().to_string();
        let report = validate_ranks(
            &ranks,
            &|paths, manifest| read_case(args, &spinner, paths, Some(manifest), &name),
            &spinner,
        );
        spinner.bar.finish_and_clear();
        return report;
    }
    with_case(args, &spinner, |case| validate(case, &spinner))
}

/// Reads the case and does something with it.
fn with_case<T>(
    args: &ValidateArgs,
    spinner: &Spinner,
    judge: impl Fn(&Case) -> Result<T>,
) -> Result<T> {
    let (paths, manifest, name) = match (&args.dump, &args.model, &args.reference) {
        (Some(folder), ..) => {
            if args.reference.is_some() {
                return Err(Error::invalid(
                    "--reference",
                    "given",
                    "a dump folder holds its own step.safetensors",
                ));
            }
            must_be_a_dump(folder)?;
            let (paths, manifest) = DumpPaths::of_folder(folder)?;
            (paths, Some(manifest), folder)
        }
        (None, Some(model), Some(reference)) => {
            let (model, adapter) = (model.clone(), args.adapter.clone());
            (DumpPaths { model, adapter, step: reference.clone() }, None, reference)
        }
        _ => {
            return Err(Error::invalid(
                "--reference",
                "absent",
                "give a dump folder, or --model and --reference",
            ));
        }
    };
    let result = read_case(args, spinner, &paths, manifest.as_ref(), &name.display().to_string());
    let result = result.and_then(|case| judge(&case));
    spinner.bar.finish_and_clear();
    // What needs no reference is said of models that it does not have, too.
    if let (Err(_), Some(own)) = (&result, manifest.and_then(|m| m.check)) {
        eprintln!("{}", own.line().trim());
    }
    result
}

/// Reads a case in the way that fits in memory.
fn read_case(
    args: &ValidateArgs,
    spinner: &Spinner,
    paths: &DumpPaths,
    manifest: Option<&Manifest>,
    name: &str,
) -> Result<Case> {
    let limit = args.memory.or_else(memory::available).unwrap_or(usize::MAX);
    spinner.begins("reading");
    let plan = memory::plan(paths, manifest, limit)?;
    if plan.on_disk || plan.recompute {
        eprintln!("{name}: {}", plan.line(memory::rate()));
    }
    let read = if plan.on_disk { Case::open } else { Case::read };
    let case = read(name, paths, manifest, &PlainSettings { dtype: args.dtype })?;
    spinner.layers.set(case.model.layers.len());
    let case = Case { faint: args.faint.then_some(true), recompute: plan.recompute, ..case };
    let case = match (&args.rows, args.tokens) {
        (None, None) => case,
        (rows, tokens) => {
            let all = case.batch.input_ids.nrows();
            case.only_rows(rows.map_or(0..all, |rows| rows.within(all)), tokens)?
        }
    };
    match &args.layers {
        Some(layers) => case.only_layers(layers.within(spinner.layers.get())),
        None => Ok(case),
    }
}

#[cfg(not(feature = "gpu"))]
fn validate_device(args: &ValidateArgs) -> Result<Report> {
    Err(args.trainer.unwrap_or_default().not_built())
}

/// This program's own step on a device.
#[cfg(feature = "gpu")]
fn validate_device(args: &ValidateArgs) -> Result<Report> {
    use crate::gpu::Device;
    use crate::gpu::train::{DeviceCase, StepMemory};
    let (Some(folder), Some(choice)) = (&args.model, args.trainer) else {
        return Err(Error::invalid("--model", "absent", "--trainer needs a checkpoint folder"));
    };
    let device = Device::open(choice)?;
    let mut model = crate::model::Model::<f64>::read(folder)?;
    model.unpack_in(crate::precision::Precision::F32, false);
    let kind = match &args.adapter {
        Some(adapter) => Some(model.read_adapter(adapter)?),
        None => {
            model.train_fully();
            None
        }
    };
    let batch = match &args.reference {
        Some(path) => {
            crate::validate::dump::read_batch(&crate::tensor_file::TensorFile::open(path)?)?
        }
        None => random_batch(&model.config)?,
    };
    let memory = StepMemory::measure(&device, &model, &batch)?;
    let spinner = Spinner::new();
    spinner.begins("step on the device");
    let name = format!("{} on {}", folder.display(), device.info());
    let case = device.run("training step", DeviceCase { name, model, kind, batch })?;
    let report = validate(&case, &spinner);
    spinner.bar.finish_and_clear();
    if !args.json {
        println!("{memory}");
    }
    report
}

/// Two rows of at most 32 random tokens.
#[cfg(feature = "gpu")]
fn random_batch(config: &crate::model::ModelConfig) -> Result<crate::model::Batch> {
    use ndarray::Array2;
    use rand::RngExt;
    let mut rng = crate::streams::generator(1, "validate/batch", 0);
    let length = config.max_position_embeddings.min(32);
    let ids =
        Array2::from_shape_simple_fn((2, length), || rng.random_range(0..config.vocab_size as u32));
    crate::model::Batch::new(ids.clone(), ids.mapv(i64::from))
}

/// NaN and infinity have no JSON number; serde writes null.
fn json(report: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(report).unwrap_or_default()
}

/// `--selftest`: wrong if a fault outside its tolerance passes.
fn plant(args: &ValidateArgs) -> Result<ExitCode> {
    let (name, spinner) = (args.dump.clone().unwrap_or_default(), Spinner::new());
    let planted = if is_of_ranks(&name) {
        let views = Ranks::read(&name)?.views()?;
        let view = &views.views[0];
        let text = name.display().to_string();
        read_case(args, &spinner, &view.paths, Some(&view.manifest), &text)
            .and_then(|case| selftest(&case, &spinner))?
    } else {
        with_case(args, &spinner, |case| selftest(case, &spinner))?
    };
    if args.json {
        println!("{}", json(&planted));
    } else {
        verdict::print_selftest(&name.display().to_string(), &planted);
    }
    let missed = |p: &Planted| p.shows() && !p.failed;
    Ok(if planted.iter().any(missed) { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// The last part of the heat map's name, to which `.svg` and `.png` are added.
fn heat_map_stem(name: &Path) -> Result<&str> {
    let stem = name.file_name().and_then(|n| n.to_str());
    stem.ok_or_else(|| {
        Error::invalid("--heat-map", name.display(), "must end in a file name without extension")
    })
}

fn check_heat_map(name: &Path) -> Result<()> {
    let stem = heat_map_stem(name)?;
    ["svg", "png"].iter().try_for_each(|end| {
        check_file("--heat-map", &name.with_file_name(format!("{stem}.{end}")), &[])
    })
}

/// Shares of the gradients' tolerances, layer by projection.
fn write_heat_map(report: &Report, name: &Path) -> Result<()> {
    let stem = heat_map_stem(name)?;
    let gradients = report.gradients();
    let placed: Vec<(usize, String, f64)> = gradients
        .iter()
        .filter_map(|m| {
            let (layer, module, tensor) = place_of(&m.name);
            let short = module.trim_end_matches("_proj").replace("layernorm", "norm");
            // A share that is not finite is drawn as the worst that can be.
            Some((
                layer?,
                format!("{short} {}", tensor.trim_start_matches("lora_")),
                m.share.clamp(1e-6, 1e9),
            ))
        })
        .collect();
    if placed.is_empty() {
        return Err(Error::invalid(
            "--heat-map",
            "no gradients of layers",
            "there is nothing to draw",
        ));
    }
    let mut columns: Vec<String> = Vec::new();
    for (_, column, _) in &placed {
        if !columns.contains(column) {
            columns.push(column.clone());
        }
    }
    let layers: Vec<usize> =
        placed.iter().map(|p| p.0).collect::<BTreeSet<_>>().into_iter().collect();
    let value = |layer: usize, column: &String| {
        placed.iter().find(|(l, c, _)| *l == layer && c == column).map_or(f64::NAN, |p| p.2)
    };
    let values = layers.iter().map(|&l| columns.iter().map(|c| value(l, c)).collect()).collect();
    let mut map = HeatMap::new(
        "",
        HeatAxis::categories("projection and tensor", columns.clone()),
        HeatAxis::categories("layer", layers.iter().map(ToString::to_string)),
        values,
        "share of the tolerance (above 1: wrong)",
    );
    map.colours = ColourScale::Log10;
    map.annotate = true;
    let verdict = if report.passed { "pass" } else { "fail" };
    let mut figure = Figure::new(format!("{}: {verdict}", report.name), [map]);
    figure.panel_size.0 = (60.0 * columns.len() as f64 + 260.0).clamp(620.0, 2000.0);
    let folder = name.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    figure.write(folder, stem).map(drop)
}
