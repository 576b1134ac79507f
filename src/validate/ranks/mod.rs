//! Steps of several processes (`paper-notes/dump-format.md`): each records its own part, and what
//! it holds afterwards is judged against the one step that all of them made.
//!
//! [`Ranks::read`] checks the folders against each other, [`Ranks::views`] puts them together,
//! [`validate_ranks`] judges. What went wrong between processes is looked for by
//! `diagnosis::distribution`, which sees [`Distribution`] in the case.

mod batch;
mod divisors;
mod layout;
mod merge;
mod read;
mod settings;

pub use layout::{Across, Cut, DataPlace, Parallel, Part, Place, Reduce};
pub use merge::{Told, View, Views};
pub use read::{Rank, Ranks, is_of_ranks};

use super::diagnosis::Diagnosis;
use super::dump::{Case, DumpPaths};
use super::ladder::{Outcome, Rung, RungName};
use super::manifest::Manifest;
use super::measure::{floor, measure};
use super::reference::Evidence;
use super::report::{Report, Watch, validate};
use crate::error::Result;
use ndarray::Array2;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// How a step was divided, for the search for faults.
#[derive(Debug, Clone)]
pub struct Distribution {
    /// The processes that hold what the case shows.
    pub view: Vec<usize>,
    /// What each process held.
    pub places: Vec<Parallel>,
    /// Parts of tensors by process and name; whole where absent.
    pub parts: Vec<BTreeMap<String, Part>>,
    /// Rows (positions, where sequences are cut) of each part of the data.
    pub spans: Vec<Range<usize>>,
    /// By which tokens the loss is divided.
    pub across: Across,
    /// Divisors of the micro-batches under the other way.
    pub otherwise: Vec<f64>,
    /// Trained tensors of parts of the data whose process has others than the case's.
    pub own: BTreeMap<usize, BTreeMap<String, Array2<f64>>>,
    /// The process that lacks the last update, if that is known.
    pub stale: Option<usize>,
}

/// What a process holds of the gradients, against the exact step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankResult {
    /// Its number.
    pub rank: usize,
    /// Rows of its own, and their labels that count, in the merged batch; positions where sequences
    /// are cut.
    pub span: (usize, usize),
    /// Tensors of which it holds something.
    pub tensors: usize,
    /// Those outside their tolerance.
    pub wrong: usize,
    /// Largest share of a tolerance.
    pub share: f64,
    /// The tensor with that.
    pub worst: String,
}

impl Distribution {
    /// Entries that a process holds of a tensor of `entries` entries; `None` for all of them.
    pub(super) fn entries(&self, rank: usize, name: &str, entries: usize) -> Option<Vec<usize>> {
        let part = self.parts[rank].get(name)?;
        if part.shape().iter().product::<usize>() != entries {
            return None;
        }
        Some(part.runs().into_iter().flat_map(|(there, _, n)| there..there + n).collect())
    }

    /// Each process's own part of the gradients.
    pub(super) fn results(
        &self,
        case: &Case,
        exact: &Evidence,
        rounded: &Evidence,
    ) -> Vec<RankResult> {
        let unit = floor(case.rounding.coarsest());
        let scale = super::ladder::gradient_scale(&exact.gradients);
        let own = |rank: &usize| {
            let span = self.spans.get(self.places[*rank].data.index).cloned().unwrap_or_default();
            let mut result = RankResult {
                rank: *rank,
                span: (span.start, span.end),
                tensors: 0,
                wrong: 0,
                share: 0.0,
                worst: String::new(),
            };
            for name in &case.trained {
                let (Some(exact), Some(rounded)) =
                    (exact.gradients.get(name), rounded.gradients.get(name))
                else {
                    continue;
                };
                let entries = self.entries(*rank, name, exact.len());
                if entries.as_ref().is_some_and(Vec::is_empty) {
                    continue;
                }
                let zero = || Array2::zeros(exact.dim());
                let got = case.trainer.gradients.get(name).map_or_else(zero, |o| o.values.clone());
                let m = match entries.filter(|_| got.dim() == exact.dim()) {
                    None => measure(name, &got, exact, rounded, unit, scale),
                    Some(entries) => {
                        let of = |a: &Array2<f64>| some_entries(a, &entries);
                        measure(name, &of(&got), &of(exact), &of(rounded), unit, scale)
                    }
                };
                result.tensors += 1;
                result.wrong += usize::from(!m.passes());
                if m.share > result.share || result.worst.is_empty() {
                    (result.share, result.worst) = (m.share, m.name);
                }
            }
            result
        };
        self.view.iter().map(own).collect()
    }
}

/// Some entries of an array in a row.
pub(super) fn some_entries(a: &Array2<f64>, entries: &[usize]) -> Array2<f64> {
    let columns = a.ncols();
    let values: Vec<f64> = entries.iter().map(|&i| a[[i / columns, i % columns]]).collect();
    Array2::from_shape_fn((1, values.len()), |(_, i)| values[i])
}

/// Reads the case of a merged dump.
pub type ReadCase<'a> = &'a dyn Fn(&DumpPaths, &Manifest) -> Result<Case>;

/// Validates a step of several processes.
///
/// # Errors
/// As [`Ranks::views`], [`Case::read`] and [`validate`].
pub fn validate_ranks(ranks: &Ranks, read: ReadCase<'_>, watch: &dyn Watch) -> Result<Report> {
    watch.begins("putting the ranks' parts together");
    let views = ranks.views()?;
    let found = settings::look(ranks)?;
    let several = views.views.len() > 1;
    let values = if several { trained_values(&views, read)? } else { Vec::new() };
    let mut judged: Vec<(Vec<usize>, Report)> = Vec::new();
    let mut across = views.views[0].across;
    for (number, view) in views.views.iter().enumerate() {
        let mut case = read(&view.paths, &view.manifest)?;
        case.name = ranks.folder.display().to_string();
        if several {
            case.faint = Some(false);
        }
        let mut distribution = ranks.distribution(view);
        distribution.stale = found.stale;
        for (part, speaker) in ranks.speakers(view.ranks[0]).into_iter().enumerate() {
            let theirs =
                views.views.iter().position(|v| v.ranks.contains(&speaker)).unwrap_or(number);
            if several && values[theirs] != values[number] {
                distribution.own.insert(part, values[theirs].clone());
            }
        }
        case.distribution = Some(Arc::new(distribution.clone()));
        let mut report = validate(&case, watch)?;
        let named = report.diagnoses.first().filter(|d| d.complete).map(|d| d.fault.as_str());
        if matches!(named, Some("rank-mean" | "global-mean")) && across.1 != Told::Declared {
            // Nothing says which was meant.
            distribution.across =
                if across.0 == Across::RankMean { Across::GlobalMean } else { Across::RankMean };
            across = (distribution.across, Told::Recorded);
            case.loss.micro_batch_divisors = distribution.otherwise.clone();
            case.distribution = Some(Arc::new(distribution));
            report = validate(&case, watch)?;
        }
        judged.push((view.ranks.clone(), report));
    }
    Ok(verdict(ranks, found, across, judged))
}

/// Trained tensors before the step, of each view.
fn trained_values(views: &Views, read: ReadCase<'_>) -> Result<Vec<BTreeMap<String, Array2<f64>>>> {
    let of = |view: &View| {
        Ok(read(&view.paths, &view.manifest)?.model.trainable_values().into_iter().collect())
    };
    views.views.iter().map(of).collect()
}

impl Ranks {
    fn distribution(&self, view: &View) -> Distribution {
        Distribution {
            view: view.ranks.clone(),
            places: self.ranks.iter().map(|r| r.parallel.clone()).collect(),
            parts: self.ranks.iter().map(|r| r.parts.clone()).collect(),
            spans: view.spans.clone(),
            across: view.across.0,
            otherwise: view.otherwise.clone(),
            own: BTreeMap::new(),
            stale: None,
        }
    }
}

/// `rank 0`, `ranks 1, 2`.
pub(super) fn of_ranks(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(ToString::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, list.join(", "))
}

/// One report of all views.
fn verdict(
    ranks: &Ranks,
    found: settings::Found,
    across: (Across, Told),
    judged: Vec<(Vec<usize>, Report)>,
) -> Report {
    let several = judged.len() > 1;
    // What is shown in full is the first that fails.
    let shown = judged.iter().position(|(_, report)| !report.passed).unwrap_or(0);
    let mut diagnoses: Vec<Diagnosis> = Vec::new();
    let mut results = Vec::new();
    let (mut steps, mut ruled_out) = (0, 0);
    let mut order: Vec<&(Vec<usize>, Report)> = judged.iter().collect();
    order.swap(0, shown);
    for (view, report) in order {
        results.extend(report.ranks.clone());
        (steps, ruled_out) = (steps + report.reference_steps, ruled_out + report.ruled_out);
        for d in &report.diagnoses {
            let what = if several && !d.what.starts_with("rank") {
                format!("{}: {}", of_ranks(view), d.what)
            } else {
                d.what.clone()
            };
            match diagnoses.iter_mut().find(|other| other.fault == d.fault) {
                Some(other) if other.what == what => {}
                Some(other) => {
                    other.what += &format!("; {what}");
                    other.complete &= d.complete;
                }
                None => diagnoses.push(Diagnosis { what, ..d.clone() }),
            }
        }
    }
    results.sort_by_key(|r: &RankResult| r.rank);
    let all_pass = judged.iter().all(|(_, report)| report.passed);
    let mut rung = Rung::of(RungName::Ranks, Vec::new());
    rung.problems = vec![ranks.layout(across)];
    if !found.faults.is_empty() {
        rung.outcome = Outcome::Fail;
        rung.problems.splice(0..0, found.faults.iter().map(|f| f.what.clone()));
    }
    for fault in found.faults.into_iter().rev() {
        match diagnoses.iter().position(|d| d.fault == fault.name) {
            Some(at) => {
                let same = diagnoses.remove(at);
                diagnoses.insert(0, same);
            }
            None => diagnoses.insert(
                0,
                Diagnosis {
                    explains: vec![RungName::Ranks],
                    ..Diagnosis::of_setting(fault, all_pass)
                },
            ),
        }
    }
    let failed = rung.failed();
    let mut judged = judged;
    let (_, mut report) = judged.swap_remove(shown);
    report.rungs.insert(0, rung);
    report.passed = all_pass && !failed;
    (report.diagnoses, report.ranks) = (diagnoses, results);
    (report.reference_steps, report.ruled_out) = (steps, ruled_out);
    report.recorded.insert(0, ("ranks", ranks.layout(across)));
    report
}

impl Ranks {
    /// How the step was divided, in a line.
    fn layout(&self, across: (Across, Told)) -> String {
        let first = &self.ranks[0].parallel;
        let parts = first.data.of;
        let data = match first.data.cut {
            Cut::Rows => format!("each of {parts} with its own rows"),
            Cut::Same => "all with the same rows".to_string(),
            Cut::Sequence => format!("each of {parts} with its part of every row"),
        };
        let by = first.wrapper.as_ref().map_or(String::new(), |w| format!(" ({w})"));
        let sharded = self.ranks.iter().map(|r| r.parts.len()).max().unwrap_or(0);
        let sharded =
            if sharded > 0 { format!(", {sharded} tensors in parts") } else { String::new() };
        let loss = match (parts, across) {
            (1, _) => String::new(),
            (_, (Across::RankMean, told)) => {
                format!("; loss: mean of the ranks' means{}", told.words())
            }
            (_, (Across::GlobalMean, told)) => {
                format!("; loss: mean over the tokens of all ranks{}", told.words())
            }
        };
        format!("{} ranks{by}, {data}{sharded}{loss}", self.size())
    }
}

impl Told {
    fn words(self) -> &'static str {
        match self {
            Self::Declared => ", as declared",
            Self::Recorded => ", as recorded",
            Self::Assumed => ", taken to be so",
            Self::Same => " and over the tokens of all, which is the same here",
        }
    }
}
