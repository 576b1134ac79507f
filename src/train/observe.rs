//! What a run reports, and the log files.
//!
//! The library prints nothing: everything a run has to say is an [`Event`] handed to observers.

use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use crate::train::evaluate::Scores;
use crate::train::tasks::Split;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Why a run stopped.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum StopReason {
    /// All steps are done.
    StepsDone,
    /// The loss reached its target.
    TargetLoss {
        /// Steps done.
        step: u64,
        /// The loss.
        loss: f64,
    },
    /// A NaN or an infinity appeared; nothing was saved after the last good checkpoint.
    NonFinite {
        /// Step that was being computed, counted from 1.
        step: u64,
        /// Tensor in which it was seen.
        tensor: String,
    },
    /// The caller asked to stop; the state was saved.
    Interrupted {
        /// Steps done.
        step: u64,
    },
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StepsDone => write!(f, "all steps done"),
            Self::TargetLoss { step, loss } => {
                write!(f, "target loss reached at step {step} (loss {loss:.6})")
            }
            Self::NonFinite { step, tensor } => {
                write!(
                    f,
                    "NaN or infinity in {tensor} at step {step}; the last good checkpoint is kept"
                )
            }
            Self::Interrupted { step } => {
                write!(f, "interrupted after step {step}; continue with --resume")
            }
        }
    }
}

/// One optimizer update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    /// Updates done, this one included.
    pub step: u64,
    /// Mean loss over the counted positions of all micro-batches, nats.
    pub loss: f64,
    /// Learning rate used.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub gradient_norm: f64,
    /// Positions that entered the loss.
    pub counted: usize,
    /// Tokens processed, padding included.
    pub tokens: usize,
    /// Wall time of the step.
    pub seconds: f64,
}

/// Scores of one task on one split.
#[derive(Debug, Clone, PartialEq)]
pub struct EvaluationRecord {
    /// Updates done.
    pub step: u64,
    /// `data` (trained on) or `retain` (only tested).
    pub set: &'static str,
    /// Task.
    pub task: String,
    /// Split.
    pub split: Split,
    /// The scores.
    pub scores: Scores,
}

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The run starts or continues.
    Started {
        /// Updates done before.
        step: u64,
        /// Updates in all.
        steps: u64,
        /// Trained numbers.
        trainable: usize,
    },
    /// One update is done.
    Step(&'a StepRecord),
    /// One task was evaluated.
    Evaluated(&'a EvaluationRecord),
    /// A checkpoint was written.
    Saved(&'a Path),
    /// The run is over.
    Stopped(&'a StopReason),
}

/// Receives events.
pub trait Observe {
    /// Handles one event; an error ends the run.
    ///
    /// # Errors
    /// Whatever the observer cannot handle, for instance a full disk.
    fn observe(&mut self, event: &Event<'_>) -> Result<()>;
}

const STEP_HEADER: &str = "step,loss_nats,lr,gradient_norm,counted_tokens,tokens,seconds";
const EVALUATION_HEADER: &str =
    "step,set,task,split,rows,exact_match,token_accuracy,loss_nats,choice_accuracy";

/// Writes `steps.csv` and `evaluations.csv` into a folder, a row as it happens.
pub struct CsvLog {
    steps: (PathBuf, File),
    evaluations: (PathBuf, File),
}

impl CsvLog {
    /// Opens the logs. Rows after `resumed` steps, which a continued run computes again, are
    /// removed; so is a row cut off by a crash.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(folder: &Path, resumed: u64) -> Result<Self> {
        let open = |name: &str, header: &str| -> Result<(PathBuf, File)> {
            let path = folder.join(name);
            let old = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
                Err(e) => return Err(Error::io(&path, e)),
            };
            let columns = header.matches(',').count();
            let keep = |line: &&str| {
                let step = line.split(',').next().and_then(|s| s.parse::<u64>().ok());
                line.matches(',').count() == columns && step.is_some_and(|s| s <= resumed)
            };
            let complete = &old[..old.rfind('\n').map_or(0, |i| i + 1)];
            let mut text = format!("{header}\n");
            complete.lines().skip(1).filter(keep).for_each(|line| text += &format!("{line}\n"));
            write_bytes(&path, text.as_bytes())?;
            let file =
                OpenOptions::new().append(true).open(&path).map_err(|e| Error::io(&path, e))?;
            Ok((path, file))
        };
        Ok(Self {
            steps: open("steps.csv", STEP_HEADER)?,
            evaluations: open("evaluations.csv", EVALUATION_HEADER)?,
        })
    }
}

fn append((path, file): &mut (PathBuf, File), row: String) -> Result<()> {
    file.write_all(row.as_bytes()).map_err(|e| Error::io(path, e))
}

impl Observe for CsvLog {
    fn observe(&mut self, event: &Event<'_>) -> Result<()> {
        match event {
            Event::Step(r) => append(
                &mut self.steps,
                format!(
                    "{},{},{},{},{},{},{:.6}\n",
                    r.step, r.loss, r.lr, r.gradient_norm, r.counted, r.tokens, r.seconds
                ),
            ),
            Event::Evaluated(r) => {
                let s = &r.scores;
                let choice = if s.choice.is_nan() { String::new() } else { s.choice.to_string() };
                let row = format!(
                    "{},{},{},{},{},{},{},{},{choice}\n",
                    r.step,
                    r.set,
                    r.task,
                    r.split.name(),
                    s.rows,
                    s.exact,
                    s.tokens,
                    s.loss
                );
                append(&mut self.evaluations, row)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_cut_back_to_the_resumed_step() {
        let folder = tempfile::tempdir().unwrap();
        let record = |step| StepRecord {
            step,
            loss: 1.5,
            lr: 0.1,
            gradient_norm: 2.0,
            counted: 3,
            tokens: 4,
            seconds: 0.5,
        };
        let mut log = CsvLog::open(folder.path(), 0).unwrap();
        (1..=5).for_each(|s| log.observe(&Event::Step(&record(s))).unwrap());
        let path = folder.path().join("steps.csv");
        let torn = std::fs::read_to_string(&path).unwrap() + "3,1.5";
        std::fs::write(&path, torn).unwrap();
        let mut log = CsvLog::open(folder.path(), 3).unwrap();
        log.observe(&Event::Step(&record(4))).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<&str> = text.lines().map(|l| l.split(',').next().unwrap()).collect();
        assert_eq!(steps, ["step", "1", "2", "3", "4"]);
        assert_eq!(text.lines().nth(1), Some("1,1.5,0.1,2,3,4,0.500000"));
        let scores = Scores { rows: 8, exact: 0.5, tokens: 0.75, loss: 1.0, choice: f64::NAN };
        let record = EvaluationRecord {
            step: 4,
            set: "data",
            task: "lists".into(),
            split: Split::Shifted,
            scores,
        };
        log.observe(&Event::Evaluated(&record)).unwrap();
        let text = std::fs::read_to_string(folder.path().join("evaluations.csv")).unwrap();
        assert!(text.ends_with("\n4,data,lists,shifted,8,0.5,0.75,1,\n"), "{text}");
    }
}
