//! What all experiment binaries share: flags, the grid runner, resuming, progress and outputs.
//!
//! An experiment is one [`Experiment`] value; its binary is `fn main() -> ExitCode {
//! harness::main(&EXPERIMENT) }`, and [`reproduce()`] runs many in one process. A run leaves in its
//! folder:
//!
//! - `table.csv`: one row per measurement, the point's configuration first;
//! - `<figure>.svg`, `<figure>.png`: drawn from that table alone;
//! - `findings.md`: claim, what the numbers say, checks, failed points;
//! - `manifest.json`: how it was made, with checksums.
//!
//! Under `mpirun` (feature `mpi`) the ranks share the points; see `paper-notes/many-machines.md`.
//!
//! Exit codes: 0 done, 1 a check or a grid point failed, 2 bad usage or input/output, 130
//! interrupted (finished points are kept for `--resume`).

pub mod decoder;
mod experiment;
mod flags;
mod gallery;
mod index;
mod interrupt;
#[cfg(feature = "gpu")]
mod on_device;
mod outputs;
pub mod over_bases;
mod partial;
mod progress;
#[cfg(feature = "mpi")]
mod ranks;
#[cfg(not(feature = "mpi"))]
#[path = "one_process.rs"]
mod ranks;
pub mod rates;
mod reproduce;
mod run;
pub mod study;
pub mod timed_step;
mod timing;

#[cfg(test)]
mod listed;
#[cfg(test)]
mod tests;

pub use experiment::{Checks, Experiment, Point, Profile};
pub use flags::{Flags, dump_folders, dumps_folder, head_files, heads_folder};
pub use interrupt::interrupted;
#[cfg(feature = "gpu")]
pub use on_device::{best_device, main_on_device};
pub use peft_limits::streams::seed_stream;
pub use reproduce::reproduce;
pub use timing::{Seconds, repeated_seconds};

use peft_limits::error::Result;
use peft_limits::report::manifest::StopReason;
use progress::Progress;
use ranks::Crew;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

/// Runs one experiment with the process's arguments.
pub fn main(experiment: &Experiment) -> ExitCode {
    peft_limits::linalg::workers::keep_awake();
    interrupt::install();
    let code = ranks::in_job(std::slice::from_ref(experiment), |crew| {
        run_single(experiment, std::env::args_os(), &interrupted, crew, &mut std::io::stdout())
    });
    ExitCode::from(code)
}

/// [`main`] with given arguments, stop signal, processes and standard output; returns the exit
/// code.
fn run_single(
    experiment: &Experiment,
    arguments: impl IntoIterator<Item = OsString>,
    stop: &(dyn Fn() -> bool + Sync),
    crew: Crew,
    out: &mut dyn Write,
) -> u8 {
    let flags = match flags::parse_single(experiment, arguments) {
        Ok(flags) => flags,
        Err(code) => return code,
    };
    let progress = Progress::new(None);
    let outcome = flags.use_for_process().and_then(|()| {
        let folder =
            flags.out.clone().unwrap_or_else(|| flags.profile.root().join(experiment.name));
        run::run(experiment, &flags, &folder, &progress, stop, crew)
    });
    match outcome {
        Ok(done) => {
            // A reader that has gone away is no error of the experiment.
            let _ = out.write_all(done.to_text(60).as_bytes());
            exit_code(&Ok(done.manifest.stop_reason))
        }
        Err(error) => {
            eprintln!("{}: {error}", experiment.name);
            exit_code(&Err(error))
        }
    }
}

fn exit_code(outcome: &Result<StopReason>) -> u8 {
    match outcome {
        Ok(StopReason::Completed) => 0,
        Ok(StopReason::CheckFailed | StopReason::PointsFailed) => 1,
        Err(error) => error.exit_code(),
    }
}
