//! A validation from beginning to end, and its result.

use super::diagnosis::setting;
use super::diagnosis::{self, Diagnosis};
use super::dump::Case;
use super::faint::Amplitude;
use super::ladder::{Outcome, Rung, RungName, climb, rung_of};
use super::measure::Measure;
use super::objective::Upstream;
use super::own_forward::OwnForward;
use super::ranks::RankResult;
use super::reference::Variant;
use super::roundings::{self, SecondLook};
use crate::error::Result;
use crate::model::Outside;
use serde::Serialize;

/// The result of a validation.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was validated.
    pub name: String,
    /// Whether every rung that could be checked passed, and the trainer's own forward agrees with
    /// its backward.
    pub passed: bool,
    /// Format of the trainer's products, and of its weights.
    pub precision: (String, String),
    /// Loss of the reference.
    pub reference_loss: f64,
    /// The rungs in order.
    pub rungs: Vec<Rung>,
    /// Faults that explain the failure, the best explanation first.
    pub diagnoses: Vec<Diagnosis>,
    /// Backward against differences of the trainer's own forward, if the recorder looked at that.
    pub own_forward: Option<OwnForward>,
    /// Model, batch, loss and optimizer as recorded: (what, how).
    pub recorded: Vec<(&'static str, String)>,
    /// What this step cannot show.
    pub not_exercised: Vec<String>,
    /// How much of each known fault is in a step whose tensors are all within their tolerances, if
    /// that was looked for.
    pub amplitudes: Vec<Amplitude>,
    /// Steps of the reference that were run.
    pub reference_steps: usize,
    /// Hypotheses that a part of a step ruled out.
    pub ruled_out: usize,
    /// Hypotheses that were not tried because the search had cost what it may.
    pub left_out: Vec<String>,
    /// What each process holds, of several that made the step.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<RankResult>,
}

impl Report {
    /// The first rung that failed.
    pub fn first_failure(&self) -> Option<&Rung> {
        self.rungs.iter().find(|r| r.failed())
    }

    /// Where the first gap is, for failures that no known fault explains.
    pub fn lead(&self) -> Option<String> {
        let of = |name| rung_of(&self.rungs, name);
        if let Some(hidden) = of(RungName::Hidden).filter(|r| r.failed()) {
            let first = hidden.tensors.iter().find(|m| !m.passes())?;
            return Some(format!(
                "the forward is right up to the input of the layer whose result is the {}",
                first.name
            ));
        }
        let gradients = of(RungName::Gradients).filter(|r| r.failed())?;
        let bad: Vec<&Measure> = gradients.tensors.iter().filter(|m| !m.passes()).collect();
        let layer = |m: &Measure| super::names::place_of(&m.name).0;
        let highest = bad.iter().filter_map(|m| layer(m)).max()?;
        let mut modules: Vec<String> = bad
            .iter()
            .filter(|m| layer(m) == Some(highest))
            .map(|m| super::names::place_of(&m.name).1)
            .collect();
        modules.dedup();
        let above = gradients.tensors.iter().any(|m| layer(m).is_some_and(|l| l > highest));
        let right = if above {
            "gradients above it are right, so backward is right down to there; "
        } else {
            ""
        };
        Some(format!(
            "{right}the highest layer with a wrong gradient is {highest}, in {}; {} of {} tensors \
             are wrong in all",
            modules.join(", "),
            bad.len(),
            gradients.tensors.len()
        ))
    }

    /// The measured gradients.
    pub fn gradients(&self) -> &[Measure] {
        rung_of(&self.rungs, RungName::Gradients).map_or(&[], |r| &r.tensors)
    }
}

/// What a long validation tells while it runs.
pub trait Watch {
    /// A part begins.
    fn begins(&self, what: &str);
    /// A layer is done, forward or backward.
    fn layer(&self, _layer: usize, _backward: bool) {}
}

/// Says nothing.
pub struct Silent;

impl Watch for Silent {
    fn begins(&self, _what: &str) {}
}

/// Validates a case.
///
/// The declared loss comes first. Where that fails and no fault of the step explains it, but the
/// dump holds the gradient that the loss left, everything below is judged from there.
///
/// # Errors
/// As [`Case::run`]; [`crate::error::Error::InvalidParam`] for a step that cannot be judged:
/// another loss than the declared one whose gradient is not in the dump, noise on the embeddings,
/// or rows of several documents that are right only if these may attend to each other.
pub fn validate(case: &Case, watch: &dyn Watch) -> Result<Report> {
    let tied = super::routing::with_ties(case)?;
    let case = tied.as_ref().unwrap_or(case);
    if case.trainer.upstream.is_none() {
        return with_declared_loss(case, watch);
    }
    if case.batch.counted() == 0 {
        return below_the_loss(case, watch);
    }
    let declared = with_declared_loss(case, watch);
    let of_step =
        |r: &Report| r.rungs.iter().any(|rung| rung.name.is_of_the_step() && rung.failed());
    if let Ok(report) = &declared {
        // Dropout is the word where nothing could be compared: from the loss on there may be more
        // to say.
        let named = report.diagnoses.iter().any(|d| d.complete && d.fault != "dropout-active");
        if !of_step(report) || named || case.left_the_declared_gradient() {
            return declared;
        }
    }
    let mut below = match (below_the_loss(case, watch), declared) {
        (Ok(below), _) => below,
        (Err(_), declared) => return declared,
    };
    if case.declares_loss() && !of_step(&below) {
        below.diagnoses.insert(0, setting::loss_gradient(case, below.reference_loss));
        below.passed = false;
        if let Some(rung) = below.rungs.iter_mut().find(|r| r.name == RungName::Loss) {
            (rung.outcome, rung.problems) = (Outcome::Fail, Vec::new());
        }
    }
    Ok(below)
}

/// Everything but the loss, from the gradient that it left.
fn below_the_loss(case: &Case, watch: &dyn Watch) -> Result<Report> {
    let mut below = case.clone();
    below.trainer.setting.from_upstream = true;
    if matches!(case.trainer.upstream, Some(Upstream::FinalNorm(_))) {
        let module = if !case.model.is_tied() { Outside::Head } else { Outside::Embedding };
        let head = case.model.config.options.outside_tensor(module, "weight");
        below.trained.retain(|name| *name != head);
    }
    let mut report = judge(&below, watch)?;
    report.reference_loss = setting::declared_loss(case).unwrap_or(f64::NAN);
    if let Some(rung) = report.rungs.iter_mut().find(|r| r.name == RungName::Loss) {
        rung.problems.push(setting::another_loss(case, report.reference_loss));
    }
    Ok(report)
}

fn with_declared_loss(case: &Case, watch: &dyn Watch) -> Result<Report> {
    let mut report = judge(case, watch)?;
    if !report.passed
        && !case.ties.is_empty()
        && let Some((other, moved)) = super::routing::as_trainer(case, watch)?
    {
        report = judge(&other, watch)?;
        if let Some(names) = report.rungs.iter_mut().find(|r| r.name == RungName::Names) {
            names.problems.push(format!(
                "{moved} of {} tokens that stand between two experts within rounding go to the \
                 other one in the trainer",
                case.ties.len()
            ));
        }
    }
    if !report.passed
        && case.batch.documents.is_some()
        && judge(&setting::as_one_document(case), watch)?.passed
    {
        if !case.trainer.setting.documents_given {
            return Err(setting::ambiguous_documents());
        }
        let leak = setting::documents_leak("the attention mask holds several documents a row");
        report.diagnoses.insert(0, Diagnosis::of_setting(leak, true));
    }
    // Labels that the collator moved, with a loss that does not move them again, are right.
    if !report.passed
        && report.diagnoses.iter().any(|d| d.fault == "labels-not-shifted")
        && setting::labels_moved(case)
    {
        let mut other = judge(&setting::with_labels_moved_back(case), watch)?;
        if other.passed {
            if let Some(loss) = other.rungs.iter_mut().find(|r| r.name == RungName::Loss) {
                loss.problems.push(
                    "the labels are the ids moved by one, and the loss does not shift them again"
                        .into(),
                );
            }
            return Ok(other);
        }
    }
    Ok(report)
}

fn judge(case: &Case, watch: &dyn Watch) -> Result<Report> {
    watch.begins("exact reference");
    let below = diagnosis::budget::top_layer(case).and_then(|top| top.checked_sub(1));
    let hidden = below.into_iter().collect();
    let exact = case.run(&Variant { watch: Some(watch), hidden, ..Variant::default() })?;
    watch.begins("reference with the trainer's rounding");
    let rounded = case.run(&Variant {
        rounding: Some(case.rounding),
        watch: Some(watch),
        ..Variant::default()
    })?;
    let mut rungs = climb(case, &exact, &rounded);
    let (mut steps, mut lost) = (2, None);
    if rungs.iter().any(|r| r.name.is_of_the_step() && r.failed()) {
        steps += roundings::looks(case);
        match roundings::second_look(case, &exact, &rounded, &rungs, watch)? {
            SecondLook::Passes(passed) => rungs = passed,
            SecondLook::Lost(why) => lost = Some(why),
            SecondLook::Fails => {}
        }
    }
    let (faults, remarks) = setting::findings(case, &rungs)?;
    let (mut diagnoses, mut amplitudes) = (Vec::new(), Vec::new());
    let (mut ruled_out, mut left_out, mut other_loss) = (0, Vec::new(), false);
    if rungs.iter().any(Rung::failed) {
        let outcome = diagnosis::diagnose(case, &exact, &rounded, &rungs, watch)?;
        diagnoses = outcome.found;
        steps += outcome.steps;
        ruled_out = outcome.budget.ruled_out;
        left_out = outcome.budget.left_out.into_iter().collect();
        if let Some(measured) = outcome.measured {
            (rungs, other_loss) = (measured, true);
        } else if let Some(why) = lost
            && !diagnoses.iter().any(|d| d.complete)
        {
            return Err(why);
        }
    }
    let alone = !rungs.iter().any(Rung::failed);
    // The exact step has the declared loss.
    if alone && !other_loss && faults.is_empty() && super::faint::wanted(case) {
        let context = diagnosis::Context::new(case, &exact, &rounded, &rungs);
        let search = super::faint::search(&context, watch)?;
        diagnoses.extend(search.found);
        amplitudes = search.amplitudes;
        steps += search.steps;
        rungs.push(search.rung);
    }
    if let Some(names) = rungs.iter_mut().find(|r| r.name == RungName::Names) {
        names.problems.extend(remarks);
        names.problems.extend(faults.iter().map(|f| f.what.clone()));
        if !faults.is_empty() {
            names.outcome = Outcome::Fail;
        }
    }
    diagnoses.splice(0..0, faults.into_iter().map(|f| Diagnosis::of_setting(f, alone)));
    let own_forward = case.trainer.setting.own_forward.clone();
    let passed =
        !rungs.iter().any(Rung::failed) && !own_forward.as_ref().is_some_and(OwnForward::failed);
    let format = |p: super::Precision| p.name().to_string();
    Ok(Report {
        name: case.name.clone(),
        passed,
        precision: (format(case.rounding.inside()), format(case.rounding.stream)),
        reference_loss: exact.loss,
        rungs,
        diagnoses,
        own_forward,
        recorded: super::recorded::list(case),
        not_exercised: super::not_exercised::list(case),
        amplitudes,
        reference_steps: steps,
        ruled_out,
        left_out,
        ranks: case.distribution.as_ref().map_or(Vec::new(), |d| d.results(case, &exact, &rounded)),
    })
}
