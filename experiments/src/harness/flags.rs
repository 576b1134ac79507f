//! The flags that every experiment binary shares.

use super::experiment::{Experiment, Profile};
use clap::{Args, CommandFactory, FromArgMatches, Parser};
use peft_limits::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Flags of an experiment run.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct Flags {
    /// How much to measure: about a minute, or the published figures
    #[arg(long, value_enum, default_value_t = Profile::Quick)]
    pub profile: Profile,
    /// Seed from which all random streams are derived
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Output folder [default: figures/quick/NAME or, for --profile full, figures/NAME]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Threads to use; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: usize,
    /// Keep what an interrupted or failing run finished, and measure only what is missing; without
    /// it such a folder is refused
    #[arg(long)]
    pub resume: bool,
    /// Discard the points of an interrupted run; replace a finished full result, or a quick one by
    /// a full one
    #[arg(long, conflicts_with = "resume")]
    pub force: bool,
    /// Folder of attention head files (*.safetensors) for real-heads [default: tests/data/heads]
    #[arg(long, value_name = "DIR")]
    pub heads: Option<PathBuf>,
    /// Folder of right training steps for operating-curve, a dump each [default:
    /// tests/data/dumps/clean]
    #[arg(long, value_name = "DIR")]
    pub dumps: Option<PathBuf>,
    /// Folder of a trained decoder with its tokenizer, for the studies of fine-tuning: they then
    /// run on it too
    #[arg(long, value_name = "DIR", requires = "text")]
    pub base: Option<PathBuf>,
    /// Text that the decoder of --base learns
    #[arg(long, value_name = "FILE", requires = "base")]
    pub text: Option<PathBuf>,
    /// Redraw figures and findings from table.csv without measuring
    #[arg(long, conflicts_with_all = ["resume", "force"])]
    pub plot_only: bool,
}

static HEADS: OnceLock<PathBuf> = OnceLock::new();

static DUMPS: OnceLock<PathBuf> = OnceLock::new();

static DECODER: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();

/// The trained decoder of `--base` and the text of `--text`, if given.
pub(super) fn trained_decoder() -> Option<(PathBuf, PathBuf)> {
    DECODER.get().cloned()
}

/// The folder of `--heads`: by default the heads that come with the project.
pub fn heads_folder() -> PathBuf {
    HEADS.get().cloned().unwrap_or_else(|| PathBuf::from("tests/data/heads"))
}

/// The head files of [`heads_folder`], with their names (the file's without its ending), in order;
/// none if it cannot be read.
pub fn head_files() -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(heads_folder()).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|p| (p.file_stem().unwrap_or_default().to_string_lossy().into_owned(), p))
        .collect()
}

/// The folder of `--dumps`: by default the right steps that come with the project.
pub fn dumps_folder() -> PathBuf {
    DUMPS.get().cloned().unwrap_or_else(|| PathBuf::from("tests/data/dumps/clean"))
}

/// The dumps of [`dumps_folder`], with their names, in order; none if it cannot be read.
pub fn dump_folders() -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(dumps_folder()).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> =
        entries.map(|e| e.path()).filter(|p| p.join("manifest.json").is_file()).collect();
    folders.sort();
    folders
        .into_iter()
        .map(|p| (p.file_name().unwrap_or_default().to_string_lossy().into_owned(), p))
        .collect()
}

impl Flags {
    /// Sets what holds for the whole process: the thread pool, the folder of head files, the
    /// trained decoder.
    pub(super) fn use_for_process(&self) -> Result<()> {
        if let Some(folder) = &self.heads {
            // A second run in one process (tests) keeps the first folder.
            let _ = HEADS.set(folder.clone());
        }
        if let Some(folder) = &self.dumps {
            let _ = DUMPS.set(folder.clone());
        }
        if let (Some(base), Some(text)) = (&self.base, &self.text) {
            let _ = DECODER.set((base.clone(), text.clone()));
        }
        if self.threads == 0 {
            return Ok(());
        }
        let set = rayon::ThreadPoolBuilder::new().num_threads(self.threads).build_global();
        set.map_err(|e| Error::invalid("--threads", self.threads, e.to_string()))
    }
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 a check or a point failed, 2 bad input or usage, 130 interrupted by Ctrl-C \
(finished points are kept for --resume).";

#[derive(Debug, Parser)]
struct SingleArguments {
    #[command(flatten)]
    flags: Flags,
}

/// Flags of `reproduce`.
#[derive(Debug, Parser)]
pub(super) struct ReproduceArguments {
    #[command(flatten)]
    pub flags: Flags,
    /// Run only these experiments
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub only: Vec<String>,
}

/// The flags, or the exit code once help or the usage error has been printed.
pub(super) fn parse_single(
    experiment: &Experiment,
    arguments: impl IntoIterator<Item = OsString>,
) -> std::result::Result<Flags, u8> {
    let about = format!(
        "{}\n\nClaim: {}\n\nRefuted by: {}",
        experiment.title, experiment.claim, experiment.refuted_by
    );
    let name = experiment.name;
    let examples = format!(
        "Examples:\n  \
         # the small grid, into figures/quick/{name}\n  cargo run --release --bin {name}\n  \
         # the published one; Ctrl-C keeps what is finished, --resume goes on\n  \
         cargo run --release --bin {name} -- --profile full --resume\n  \
         # other seeds, into a folder of your own\n  \
         cargo run --release --bin {name} -- --seed 7 --out runs/{name}-7\n  \
         # only the figures and findings, again\n  cargo run --release --bin {name} -- \
         --plot-only\n\n{EXIT_CODES}"
    );
    let command = SingleArguments::command().name(name).about(experiment.title).long_about(about);
    let matches = command
        .after_long_help(examples)
        .version(env!("CARGO_PKG_VERSION"))
        .try_get_matches_from(arguments)
        .map_err(|e| shown(&e))?;
    SingleArguments::from_arg_matches(&matches).map(|a| a.flags).map_err(|e| shown(&e))
}

/// As [`parse_single`], for `reproduce`.
pub(super) fn parse_reproduce(
    experiments: &[Experiment],
    arguments: impl IntoIterator<Item = OsString>,
) -> std::result::Result<ReproduceArguments, u8> {
    let list: String = experiments.iter().map(|e| format!("\n  {}: {}", e.name, e.title)).collect();
    let command = ReproduceArguments::command()
        .name("reproduce")
        .about("Runs every experiment and writes an index page of their figures and findings")
        .after_help(format!(
            "Examples:\n  \
             # every experiment on its small grid, into figures/quick\n  cargo run --release\n  \
             # two of them as published\n  \
             cargo run --release -- --profile full --only phase_diagram,crossover\n  \
             # figures, findings and pages again, from the saved tables\n  \
             cargo run --release -- --profile full \
             --plot-only\n\n{EXIT_CODES}\n\nExperiments:{list}"
        ))
        .version(env!("CARGO_PKG_VERSION"));
    let matches = command.try_get_matches_from(arguments).map_err(|e| shown(&e))?;
    ReproduceArguments::from_arg_matches(&matches).map_err(|e| shown(&e))
}

fn shown(error: &clap::Error) -> u8 {
    let _ = error.print();
    u8::try_from(error.exit_code()).unwrap_or(2)
}
