//! The points of a grid handed out over the ranks of an MPI job, as each becomes free.
//!
//! Rank 0 parses flags, shows progress, hands out points, collects rows and writes the results; it
//! measures too, in a second thread. The other ranks wait for experiments ([`Message::Begin`]), ask
//! for points and send rows back. Every rank first writes what it has measured into its own file of
//! finished points, so that when a rank dies - and the launcher, as MPI launchers do, ends the
//! job - `--resume` measures only what is missing.

use super::experiment::{Experiment, Point};
use super::flags::Flags;
use super::partial::{Partial, run_key};
use super::run::{Collected, Grid, lock, measure_caught};
use super::{interrupt, interrupted};
use peft_limits::distributed::ranks::PATIENCE;
use peft_limits::distributed::{Job, Ranks};
use peft_limits::error::{Error, Result};
use peft_limits::report::Row;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, mpsc};

/// Who measures the points of a grid.
#[derive(Clone, Copy, Default)]
pub(super) struct Crew<'a> {
    /// All ranks, or this process alone.
    ranks: Option<&'a Ranks>,
}

/// Runs `lead` in rank 0, or in this process when no launcher started it; other ranks measure
/// points for it.
pub(super) fn in_job(experiments: &[Experiment], lead: impl FnOnce(Crew) -> u8) -> u8 {
    let job = match Job::launched() {
        Ok(Some(job)) => job,
        Ok(None) => return lead(Crew::default()),
        Err(error) => {
            eprintln!("{error}");
            return 2;
        }
    };
    if job.ranks().size() == 1 {
        return lead(Crew::default());
    }
    if job.ranks().is_first() {
        let code = lead(Crew { ranks: Some(job.ranks()) });
        tell_all(job.ranks(), &Message::Quit);
        return code;
    }
    // A rank that gave up by itself would leave the others waiting: it ends the job.
    if let Err(error) = follow(experiments, job.ranks()) {
        eprintln!("rank {}: {error}", job.ranks().rank());
        job.abort(2);
    }
    0
}

/// What rank 0 tells the others, as JSON.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Prepare for points of an experiment whose results go to this folder.
    Begin { experiment: String, folder: PathBuf, flags: Flags },
    /// Measure these points of the grid.
    Measure(Vec<usize>),
    /// No more points of this experiment.
    End,
    /// No more experiments.
    Quit,
}

/// What the others answer.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Ready for points, at most this many at a time.
    Ready(usize),
    /// What became of them.
    Measured(Vec<(usize, Outcome)>),
}

/// What became of a point, in words that can be sent.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Rows(Vec<Row>),
    Failed(String),
    Interrupted,
    /// The rows could not be written.
    Broken(PathBuf, String),
}

impl Crew<'_> {
    /// Number of processes.
    pub fn size(self) -> usize {
        self.ranks.map_or(1, Ranks::size)
    }

    /// Measures the missing points with all ranks; false, and nothing done, when this process is
    /// alone.
    pub fn measure(self, grid: &Grid, missing: &[usize], collected: &Mutex<Collected>) -> bool {
        let Some(ranks) = self.ranks else { return false };
        let folder = std::path::absolute(grid.folder).unwrap_or_else(|_| grid.folder.to_path_buf());
        let experiment = grid.experiment.name.to_string();
        tell_all(ranks, &Message::Begin { experiment, folder, flags: grid.flags.clone() });
        let mut desk =
            Desk { ranks, grid, queue: missing.iter().copied().collect(), collected, working: 0 };
        // Rank 0's own points: indices one way, outcomes the other.
        let (give, take) = mpsc::channel::<Vec<usize>>();
        let (put, measured) = mpsc::channel();
        let own_width = width(grid.experiment);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for batch in take {
                    let done = measure_batch(grid.experiment, grid.points, &batch, grid.stop);
                    if put.send((batch, done)).is_err() {
                        break;
                    }
                }
            });
            let mut widths = vec![0; ranks.size()];
            let mut ready = 1;
            desk.hand_out(own_width, |batch| drop(give.send(batch)));
            while ready < ranks.size() || desk.working > 0 {
                let mut idle = true;
                if let Ok((batch, done)) = measured.try_recv() {
                    idle = false;
                    desk.working -= 1;
                    let mut all = lock(collected);
                    for (index, outcome) in batch.into_iter().zip(done) {
                        grid.bar.point_done();
                        all.take(index, grid.points, grid.keys, outcome);
                    }
                    drop(all);
                    desk.hand_out(own_width, |batch| drop(give.send(batch)));
                }
                if let Some((from, bytes)) = ranks.arrived() {
                    idle = false;
                    match serde_json::from_slice(&bytes) {
                        Ok(Answer::Ready(width)) => {
                            widths[from] = width;
                            ready += 1;
                        }
                        Ok(Answer::Measured(points)) => {
                            desk.working -= 1;
                            points
                                .into_iter()
                                .for_each(|(index, outcome)| desk.file(index, outcome));
                        }
                        Err(error) => lock(collected).broken = Some(unreadable(&error)),
                    }
                    desk.hand_out(widths[from], |batch| {
                        tell(ranks, from, &Message::Measure(batch))
                    });
                }
                if idle {
                    std::thread::sleep(PATIENCE);
                }
            }
            drop(give);
        });
        tell_all(ranks, &Message::End);
        true
    }
}

/// Where points are handed out and rows come back.
struct Desk<'a, 'b> {
    ranks: &'a Ranks,
    grid: &'a Grid<'a>,
    queue: VecDeque<usize>,
    collected: &'a Mutex<Collected<'b>>,
    /// Ranks that hold points.
    working: usize,
}

impl Desk<'_, '_> {
    /// Gives the next points, at most `width`, and fewer towards the end so that all finish
    /// together; none once the run is to stop.
    fn hand_out(&mut self, width: usize, give: impl FnOnce(Vec<usize>)) {
        let mut all = lock(self.collected);
        all.interrupted |= (self.grid.stop)();
        if all.interrupted || all.broken.is_some() {
            self.queue.clear();
        }
        let share = self.queue.len().div_ceil(2 * self.ranks.size());
        let batch: Vec<usize> = self.queue.drain(..width.min(share)).collect();
        drop(all);
        if let Some(&first) = batch.first() {
            self.grid.bar.point_begins(&self.grid.points[first].label);
            self.working += 1;
            give(batch);
        }
    }

    /// Files the outcome of another rank's point, whose rows are in that rank's file already.
    fn file(&self, index: usize, outcome: Outcome) {
        let mut all = lock(self.collected);
        let Some(key) = self.grid.keys.get(index) else { return };
        self.grid.bar.point_done();
        match outcome {
            Outcome::Rows(rows) => {
                all.rows.insert(key.clone(), rows);
            }
            Outcome::Failed(error) => all.fail(index, self.grid.points, error),
            Outcome::Interrupted => all.interrupted = true,
            Outcome::Broken(path, reason) => {
                all.broken = Some(Error::io(path, std::io::Error::other(reason)))
            }
        }
    }
}

/// Points a process measures at the same time: one when they are timed.
fn width(experiment: &Experiment) -> usize {
    if experiment.parallel { rayon::current_num_threads() } else { 1 }
}

/// A rank other than 0: measures what it is given, experiment after experiment.
fn follow(experiments: &[Experiment], ranks: &Ranks) -> Result<()> {
    interrupt::install();
    let mut set_up = false;
    loop {
        match next(ranks)? {
            Message::Quit => return Ok(()),
            Message::Begin { experiment, folder, flags } => {
                let Some(experiment) = experiments.iter().find(|e| e.name == experiment) else {
                    return Err(Error::invalid(
                        "experiment",
                        experiment,
                        "rank 0 runs another program",
                    ));
                };
                if !set_up {
                    flags.use_for_process()?;
                    set_up = true;
                }
                measure_for(experiment, folder, &flags, ranks)?;
            }
            // Of an experiment that has ended.
            Message::Measure(_) | Message::End => {}
        }
    }
}

fn measure_for(
    experiment: &Experiment,
    folder: PathBuf,
    flags: &Flags,
    ranks: &Ranks,
) -> Result<()> {
    let points = (experiment.grid)(flags.profile, flags.seed);
    let mut partial = None;
    tell_first(ranks, &Answer::Ready(width(experiment)));
    loop {
        let batch = match next(ranks)? {
            Message::Measure(batch) => batch,
            _ => return Ok(()),
        };
        if let Some(wrong) = batch.iter().find(|i| **i >= points.len()) {
            return Err(Error::invalid(
                "grid",
                wrong,
                format!("this rank's grid has {} points", points.len()),
            ));
        }
        let done = measure_batch(experiment, &points, &batch, &interrupted);
        let mut answers = Vec::with_capacity(batch.len());
        for (index, outcome) in batch.into_iter().zip(done) {
            let outcome = match outcome {
                Ok(rows) => {
                    // The file appears with the first rows: a rank without any leaves none.
                    let file = match partial.take() {
                        Some(file) => Ok(file),
                        None => Partial::of_rank(
                            &folder,
                            experiment,
                            flags.profile.name(),
                            ranks.rank(),
                        ),
                    };
                    let key = run_key(experiment, flags.seed, &points[index]);
                    let label = &points[index].label;
                    let written =
                        file.and_then(|mut file| file.append(&key, label, &rows).map(|()| file));
                    match written {
                        Ok(file) => {
                            partial = Some(file);
                            Outcome::Rows(rows)
                        }
                        Err(error) => Outcome::Broken(folder.clone(), error.to_string()),
                    }
                }
                Err(Error::Interrupted) => Outcome::Interrupted,
                Err(error) => Outcome::Failed(error.to_string()),
            };
            answers.push((index, outcome));
        }
        tell_first(ranks, &Answer::Measured(answers));
    }
}

/// Measures some points, at the same time where the experiment allows it.
fn measure_batch(
    experiment: &Experiment,
    points: &[Point],
    batch: &[usize],
    stop: &(dyn Fn() -> bool + Sync),
) -> Vec<Result<Vec<Row>>> {
    let one = |&index: &usize| match stop() {
        true => Err(Error::Interrupted),
        false => measure_caught(experiment, &points[index]),
    };
    match batch {
        [index] => vec![one(index)],
        _ => batch.par_iter().map(one).collect(),
    }
}

fn next(ranks: &Ranks) -> Result<Message> {
    let (_, bytes) = ranks.wait_for_message();
    serde_json::from_slice(&bytes).map_err(|error| unreadable(&error))
}

fn unreadable(error: &serde_json::Error) -> Error {
    Error::Mpi { op: "message between ranks", reason: error.to_string() }
}

fn tell(ranks: &Ranks, to: usize, message: &Message) {
    // Plain data under string keys: always JSON.
    ranks.send_bytes(to, &serde_json::to_vec(message).unwrap_or_default());
}

fn tell_all(ranks: &Ranks, message: &Message) {
    (1..ranks.size()).for_each(|to| tell(ranks, to, message));
}

fn tell_first(ranks: &Ranks, answer: &Answer) {
    ranks.send_bytes(0, &serde_json::to_vec(answer).unwrap_or_default());
}
