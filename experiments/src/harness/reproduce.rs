//! Runs many experiments in one process.

use super::experiment::Experiment;
use super::flags::parse_reproduce;
use super::gallery::write_gallery;
use super::index::write_index;
use super::progress::Progress;
use super::ranks::{self, Crew};
use super::{exit_code, interrupt, interrupted, run};
use peft_limits::error::{Error, Result};
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

/// Runs the experiments (all, or those of `--only`) with the process's arguments and writes the
/// index page `README.md` into the figures folder.
///
/// `--out DIR` is the folder that holds one folder per experiment. An experiment that fails does
/// not stop the others; the exit code is the worst of theirs.
pub fn reproduce(experiments: &[Experiment]) -> ExitCode {
    peft_limits::linalg::workers::keep_awake();
    interrupt::install();
    let code = ranks::in_job(experiments, |crew| {
        run_all(experiments, std::env::args_os(), &interrupted, crew, &mut std::io::stdout())
    });
    ExitCode::from(code)
}

/// [`reproduce`] with given arguments, stop signal, processes and standard output; returns the exit
/// code.
pub(super) fn run_all(
    experiments: &[Experiment],
    arguments: impl IntoIterator<Item = OsString>,
    stop: &(dyn Fn() -> bool + Sync),
    crew: Crew,
    out: &mut dyn Write,
) -> u8 {
    let arguments = match parse_reproduce(experiments, arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let flags = &arguments.flags;
    let chosen = match chosen(experiments, &arguments.only)
        .and_then(|c| flags.use_for_process().map(|()| c))
    {
        Ok(chosen) => chosen,
        Err(error) => {
            eprintln!("reproduce: {error}");
            return 2;
        }
    };
    let root = flags.out.clone().unwrap_or_else(|| flags.profile.root());
    let progress = Progress::new(Some(chosen.len()));
    let mut worst = 0;
    for experiment in chosen {
        let outcome =
            run::run(experiment, flags, &root.join(experiment.name), &progress, stop, crew);
        progress.suspend(|| match &outcome {
            // A reader that has gone away is no error of the experiments.
            Ok(done) => drop(out.write_all(done.to_text(12).as_bytes())),
            Err(error) => eprintln!("{}: {error}", experiment.name),
        });
        progress.experiment_done();
        worst = worst.max(exit_code(&outcome.map(|done| done.manifest.stop_reason)));
        if worst == peft_limits::error::INTERRUPTED {
            break;
        }
    }
    progress.close();
    // Also after an interruption: the page then shows what is there.
    let pages = write_index(&root, flags.profile, experiments);
    match pages.and_then(|()| write_gallery(&root, flags.profile, experiments)) {
        Ok(()) => eprintln!("index: {0}/README.md, {0}/index.html", root.display()),
        Err(error) => {
            eprintln!("reproduce: {error}");
            worst = worst.max(2);
        }
    }
    worst
}

fn chosen<'a>(experiments: &'a [Experiment], only: &[String]) -> Result<Vec<&'a Experiment>> {
    if let Some(unknown) =
        only.iter().find(|name| !experiments.iter().any(|e| e.name == name.as_str()))
    {
        let names: Vec<&str> = experiments.iter().map(|e| e.name).collect();
        return Err(Error::invalid(
            "--only",
            unknown,
            format!("the experiments are {}", names.join(", ")),
        ));
    }
    Ok(experiments
        .iter()
        .filter(|e| only.is_empty() || only.iter().any(|name| name == e.name))
        .collect())
}
