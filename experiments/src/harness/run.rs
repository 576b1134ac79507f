//! Runs the grid of one experiment.

use super::experiment::{Experiment, Point, Profile};
use super::flags::Flags;
use super::outputs::{Finished, write_outputs};
use super::partial::{PARTIAL, Partial, SET_ASIDE, run_key};
use super::progress::{ExperimentProgress, Progress};
use super::ranks::Crew;
use peft_limits::error::{Error, Result};
use peft_limits::report::manifest::{Failure, Manifest};
use peft_limits::report::{Cell, Row, Table};
use rayon::prelude::*;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

/// Runs `experiment` into `folder`, or only redraws it with `--plot-only`.
///
/// # Errors
/// [`Error::InvalidParam`] when the folder holds a result that must not be replaced;
/// [`Error::Interrupted`] when `stop` held before all points were measured; [`Error::Io`].
/// A failing point is no error: it is listed in the manifest.
pub(super) fn run(
    experiment: &Experiment,
    flags: &Flags,
    folder: &Path,
    progress: &Progress,
    stop: &(dyn Fn() -> bool + Sync),
    crew: Crew,
) -> Result<Finished> {
    let earlier = Manifest::read(folder)?;
    if flags.plot_only {
        return redraw(experiment, folder, earlier);
    }
    let points = (experiment.grid)(flags.profile, flags.seed);
    let keys: Vec<String> = points.iter().map(|p| run_key(experiment, flags.seed, p)).collect();
    if let Some(i) = (1..keys.len()).find(|&i| keys[..i].contains(&keys[i])) {
        return Err(Error::invalid(
            "grid",
            &points[i].label,
            "two points have the same configuration",
        ));
    }
    let unfinished = Partial::profile_in(folder)?;
    guard(folder, flags, earlier.as_ref(), unfinished.as_deref())?;

    let config = config_of(flags.seed, &points);
    if let Some(earlier) = &earlier
        && flags.resume
        && unfinished.is_none()
    {
        let same = earlier.config == config
            && earlier.sources.package_version == env!("CARGO_PKG_VERSION");
        if same {
            return redraw(experiment, folder, Some(earlier.clone()));
        }
        if flags.profile == Profile::Full {
            return Err(refusal(
                folder,
                "holds a finished full result of another grid, seed or version",
                "--force replaces it",
            ));
        }
    }

    let mut manifest = Manifest::start(experiment.name, flags.profile.name());
    manifest.config = config;
    manifest.seeds = seeds_of(flags.seed, &points);
    manifest.machine.ranks = (crew.size() > 1).then_some(crew.size());
    let started = Instant::now();
    let keep: &[String] = if flags.resume { &keys } else { &[] };
    let (partial, mut rows, aside) = Partial::open(folder, experiment, flags.profile.name(), keep)?;
    if aside > 0 {
        let what = "finished points of another seed, grid, build or version do not fit this run";
        progress.suspend(|| eprintln!("{}: {aside} {what}; moved to {SET_ASIDE}", experiment.name));
    }
    manifest.resumed_points = rows.len();
    let bar = progress.start(experiment.name, points.len(), rows.len());
    let grid = Grid {
        experiment,
        #[cfg(feature = "mpi")]
        flags,
        #[cfg(feature = "mpi")]
        folder,
        points: &points,
        keys: &keys,
        stop,
        bar: &bar,
    };
    let (partial, failures) = match grid.measure(partial, &mut rows, crew) {
        Ok(measured) => measured,
        Err(error) => {
            bar.finish(if matches!(error, Error::Interrupted) { "interrupted" } else { "stopped" });
            return Err(error);
        }
    };
    manifest.failures = failures;
    let table = table_of(&points, &keys, &rows);
    manifest.wall_seconds = started.elapsed().as_secs_f64();
    let any_failed = !manifest.failures.is_empty();
    let written = table
        .write_csv(&folder.join("table.csv"))
        .and_then(|()| write_outputs(experiment, folder, table, manifest, earlier.as_ref()));
    bar.finish(if written.is_ok() { "done" } else { "stopped" });
    let finished = written?;
    if !any_failed {
        // With failed points the file stays, so that --resume measures only those.
        partial.remove()?;
    }
    Ok(finished)
}

/// Figures and findings anew from the saved table.
fn redraw(experiment: &Experiment, folder: &Path, earlier: Option<Manifest>) -> Result<Finished> {
    let path = folder.join("table.csv");
    let table = Table::read_csv(&path)?;
    if table.is_empty() {
        return Err(Error::format(path, "rows", "at least one", "none"));
    }
    let Some(mut manifest) = earlier else {
        return Err(Error::invalid(
            "--plot-only",
            folder.display(),
            "the folder must hold manifest.json of a finished run",
        ));
    };
    let earlier = manifest.clone();
    let kept = |f: &Failure| !super::outputs::is_output_step(&f.point);
    manifest.failures.retain(kept);
    write_outputs(experiment, folder, table, manifest, Some(&earlier))
}

/// Refuses what would destroy a more valuable result.
pub(super) fn guard(
    folder: &Path,
    flags: &Flags,
    earlier: Option<&Manifest>,
    unfinished: Option<&str>,
) -> Result<()> {
    let (quick, full) = (Profile::Quick.name(), Profile::Full.name());
    let finished = earlier.map(|m| m.profile.as_str());
    if flags.profile == Profile::Quick && (finished == Some(full) || unfinished == Some(full)) {
        return Err(refusal(
            folder,
            "holds a full result",
            "a quick run never replaces it; choose another --out",
        ));
    }
    if flags.force {
        return Ok(());
    }
    if flags.profile == Profile::Full && finished == Some(quick) {
        return Err(refusal(
            folder,
            "holds a quick result",
            "choose another --out, or --force to replace it",
        ));
    }
    if flags.profile == Profile::Full && finished == Some(full) && !flags.resume {
        return Err(refusal(
            folder,
            "holds a finished full result",
            "--force replaces it, --resume keeps it",
        ));
    }
    if unfinished.is_some() && !flags.resume {
        return Err(refusal(
            folder,
            &format!(
                "holds the finished points of an earlier run that was interrupted or had failures \
                 ({PARTIAL})"
            ),
            "--resume keeps them and measures the rest, --force discards them",
        ));
    }
    Ok(())
}

fn refusal(folder: &Path, holds: &str, hint: &str) -> Error {
    Error::invalid("--out", folder.display(), format!("the folder {holds}; {hint}"))
}

fn config_of(seed: u64, points: &[Point]) -> serde_json::Value {
    let points: Vec<_> = points.iter().map(|p| p.config.clone()).collect();
    serde_json::json!({ "seed": seed, "points": points })
}

fn seeds_of(seed: u64, points: &[Point]) -> Vec<u64> {
    let mut seeds: Vec<u64> =
        points.iter().filter_map(|p| p.u64("seed").ok()).chain([seed]).collect();
    seeds.sort_unstable();
    seeds.dedup();
    seeds
}

/// All rows in grid order, each with its point's scalars first.
fn table_of(points: &[Point], keys: &[String], rows: &HashMap<String, Vec<Row>>) -> Table {
    let mut table = Table::default();
    for (point, key) in points.iter().zip(keys) {
        for measured in rows.get(key).into_iter().flatten() {
            let mut row = Row::new();
            for (name, value) in &point.config {
                row.set(name, Cell::from(value));
            }
            measured.cells().iter().for_each(|(name, cell)| row.set(name, cell.clone()));
            table.push(&row);
        }
    }
    table
}

/// What is to be measured.
pub(super) struct Grid<'a> {
    pub experiment: &'a Experiment,
    /// What other ranks need to draw the same grid.
    #[cfg(feature = "mpi")]
    pub flags: &'a Flags,
    /// Where every rank keeps its finished points.
    #[cfg(feature = "mpi")]
    pub folder: &'a Path,
    pub points: &'a [Point],
    pub keys: &'a [String],
    pub stop: &'a (dyn Fn() -> bool + Sync),
    pub bar: &'a ExperimentProgress<'a>,
}

/// What the points measured so far left, shared by the threads.
pub(super) struct Collected<'a> {
    partial: Partial,
    pub rows: &'a mut HashMap<String, Vec<Row>>,
    failures: Vec<(usize, Failure)>,
    pub interrupted: bool,
    pub broken: Option<Error>,
}

impl Grid<'_> {
    /// Measures the points that `rows` lacks; failures are in grid order.
    fn measure(
        &self,
        partial: Partial,
        rows: &mut HashMap<String, Vec<Row>>,
        crew: Crew,
    ) -> Result<(Partial, Vec<Failure>)> {
        let missing: Vec<usize> =
            (0..self.points.len()).filter(|i| !rows.contains_key(&self.keys[*i])).collect();
        let collected = Mutex::new(Collected {
            partial,
            rows,
            failures: Vec::new(),
            interrupted: false,
            broken: None,
        });
        let one = |i: usize| {
            let halted = (self.stop)();
            {
                let mut all = lock(&collected);
                all.interrupted |= halted;
                if all.interrupted || all.broken.is_some() {
                    return;
                }
            }
            self.bar.point_begins(&self.points[i].label);
            let outcome = measure_caught(self.experiment, &self.points[i]);
            self.bar.point_done();
            lock(&collected).take(i, self.points, self.keys, outcome);
        };
        if crew.measure(self, &missing, &collected) {
            // Done by all ranks.
        } else if self.experiment.parallel {
            missing.par_iter().for_each(|i| one(*i));
        } else {
            missing.iter().for_each(|i| one(*i));
        }
        let mut all = collected.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(error) = all.broken {
            return Err(error);
        }
        if all.interrupted {
            return Err(Error::Interrupted);
        }
        all.failures.sort_by_key(|(i, _)| *i);
        Ok((all.partial, all.failures.into_iter().map(|(_, f)| f).collect()))
    }
}

pub(super) fn lock<'m, 'a>(
    collected: &'m Mutex<Collected<'a>>,
) -> std::sync::MutexGuard<'m, Collected<'a>> {
    collected.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Collected<'_> {
    /// Files the outcome of a point measured here.
    pub fn take(&mut self, i: usize, points: &[Point], keys: &[String], outcome: Result<Vec<Row>>) {
        match outcome {
            Ok(measured) => match self.partial.append(&keys[i], &points[i].label, &measured) {
                Ok(()) => {
                    self.rows.insert(keys[i].clone(), measured);
                }
                Err(error) => self.broken = Some(error),
            },
            Err(Error::Interrupted) => self.interrupted = true,
            Err(error) => self.fail(i, points, error.to_string()),
        }
    }

    /// Files a failure.
    pub fn fail(&mut self, i: usize, points: &[Point], error: String) {
        self.failures.push((i, Failure { point: points[i].label.clone(), error }));
    }
}

/// A panic in one point is that point's failure, not the run's.
pub(super) fn measure_caught(experiment: &Experiment, point: &Point) -> Result<Vec<Row>> {
    let failed =
        |text: String| Error::invalid("measure", &point.label, format!("panicked: {text}"));
    caught(|| (experiment.measure)(point), failed)
}

/// Runs `act`; a panic in it becomes the error that `failed` makes of its message.
pub(super) fn caught<T>(
    act: impl FnOnce() -> Result<T>,
    failed: impl FnOnce(String) -> Error,
) -> Result<T> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
        Err(failed(text.unwrap_or_else(|| "a panic without a message".into())))
    })
}
