//! Which known fault explains a failed validation.
//!
//! Two kinds of tests. Algebraic ones (`gradient`, `factors`, `slices`) look at the trainer's
//! gradients beside the reference's: zero, proportional, transposed, exchanged, permuted. The
//! others (`forward`, `loss`, `backward`) run the reference again with the fault in it and compare
//! everything that was dumped. A fault explains a failure when what it predicts is within the
//! tolerances that the right step would have had.

pub(super) mod applied;
mod backward;
mod bases;
pub mod budget;
mod distribution;
mod factors;
mod families;
mod fitted;
mod forward;
mod frequencies;
mod gradient;
mod loss;
mod quantized;
mod rows;
pub(super) mod setting;
mod slices;
mod stale;
mod unjudged;
mod update;

use super::dump::Case;
use super::ladder::{Outcome, Rung, RungName, climb_of_step, gradient_scale, rung_of};
use super::measure::Measure;
use super::reference::{Evidence, Variant, hidden_name, select_rows};
use super::report::Watch;
use crate::error::Result;
use budget::Budget;
use ndarray::Array2;
use serde::Serialize;
use std::collections::BTreeSet;

/// Shares up to this count as explained: the fault's own arithmetic rounds elsewhere than the
/// reference's.
const EXPLAINED: f64 = 4.0;
/// So do shares that are this much smaller than without the fault.
const REDUCTION: f64 = 1e3;
/// A fault must leave less than this part of the gap that no fault leaves, in shares of the
/// tolerances.
const LEFT_OVER: f64 = 0.4;
/// How far the amplitude of a fault that explains everything may be from 1.
const AMPLITUDE: f64 = 0.25;

/// A fault that explains a failure, or part of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Diagnosis {
    /// Short name of the fault.
    pub fault: String,
    /// What is wrong, in a sentence.
    pub what: String,
    /// Where to look.
    pub fix: String,
    /// Rungs that failed and are explained.
    pub explains: Vec<RungName>,
    /// Whether that is every rung that failed.
    pub complete: bool,
    /// Tensors whose gradient is explained, of those that failed.
    pub tensors: (usize, usize),
    /// Largest share of a tolerance that remains under the fault.
    pub share: f64,
}

/// A fault with the sentence that names it.
#[derive(Debug, Clone)]
pub(in crate::validate) struct Fault {
    pub name: &'static str,
    pub what: String,
    pub fix: &'static str,
}

impl Fault {
    pub fn new(name: &'static str, what: impl Into<String>, fix: &'static str) -> Self {
        Self { name, what: what.into(), fix }
    }
}

impl Diagnosis {
    /// A fault of the setting, which nothing measured contradicts.
    pub(super) fn of_setting(fault: Fault, complete: bool) -> Self {
        Self {
            fault: fault.name.into(),
            what: fault.what,
            fix: fault.fix.into(),
            explains: vec![RungName::Names],
            complete,
            tensors: (0, 0),
            share: 0.0,
        }
    }
}

/// What a search for faults found.
pub(super) struct Search {
    /// Faults, the best explanation first.
    pub found: Vec<Diagnosis>,
    /// Steps of the reference that were run.
    pub steps: usize,
    /// The rungs measured against another loss than the declared one, where that explains the whole
    /// step as right.
    pub measured: Option<Vec<Rung>>,
    /// What it cost, and what was left out.
    pub budget: Budget,
}

/// How much of a gap a fault accounts for.
#[derive(Debug, Clone, Copy)]
struct Account {
    /// <G - R, F - R> / |F - R|^2, tensors in units of their tolerances.
    amplitude: f64,
    /// |G - F|^2 / |G - R|^2.
    left: f64,
}

/// What the tests look at.
pub(super) struct Context<'a> {
    pub case: &'a Case,
    pub exact: &'a Evidence,
    pub rounded: &'a Evidence,
    /// Measures of the gradients that failed.
    pub failing: Vec<&'a Measure>,
    failed: BTreeSet<RungName>,
    pub rungs: &'a [Rung],
    /// Typical norm of a gradient.
    scale: f64,
    /// The top layer, if the exact evidence holds its input.
    top: Option<usize>,
}

impl<'a> Context<'a> {
    pub fn new(
        case: &'a Case,
        exact: &'a Evidence,
        rounded: &'a Evidence,
        rungs: &'a [Rung],
    ) -> Self {
        let failing: Vec<&Measure> = gradients_of(rungs).iter().filter(|m| !m.passes()).collect();
        // The optimizer's two rungs are explained by themselves.
        let of_step = |r: &&Rung| r.failed() && r.name < RungName::Applied;
        let failed = rungs.iter().filter(of_step).map(|r| r.name).collect();
        let scale = gradient_scale(&exact.gradients);
        Self { case, exact, rounded, failing, failed, rungs, scale, top: budget::top_layer(case) }
    }

    /// Whether a rung failed.
    pub fn failed(&self, rung: RungName) -> bool {
        self.failed.contains(&rung)
    }

    /// Measures of all gradients.
    pub fn all_gradients(&self) -> &[Measure] {
        gradients_of(self.rungs)
    }

    /// The mean factor of the gradients and its noise.
    pub fn mean_factor(&self) -> Option<(f64, f64)> {
        let measure = rung_of(self.rungs, RungName::Scale)?.tensors.first()?;
        Some((1.0 + measure.along, measure.rounding_along))
    }

    /// Whether the trainer rounds to a half format.
    pub fn coarse(&self) -> bool {
        self.case.rounding.coarsest().epsilon() > 1e-4
    }

    /// What part of the gradients' gap is left when they are taken to be `predicted`; 1 if nothing
    /// is known.
    pub fn left_by(&self, predicted: &Evidence) -> f64 {
        self.account(predicted, self.rungs).map_or(1.0, |a| a.left)
    }

    /// Whether a rung was checked.
    pub fn checked(&self, rung: RungName) -> bool {
        rung_of(self.rungs, rung).is_some_and(|r| !matches!(r.outcome, Outcome::Skipped(_)))
    }

    /// Whether the forward pass is known to be wrong.
    pub fn forward_wrong(&self) -> bool {
        self.failed(RungName::Logits) || self.failed(RungName::Hidden)
    }

    /// A diagnosis of the gradients alone.
    pub fn of_gradients(&self, fault: Fault, explained: usize, share: f64) -> Diagnosis {
        let all = explained == self.failing.len();
        let mut explains = Vec::new();
        if all {
            let own = [RungName::Gradients, RungName::Scale, RungName::Names];
            explains.extend(own.into_iter().filter(|&r| self.failed(r)));
        }
        let complete = explains.len() == self.failed.len();
        Diagnosis {
            fault: fault.name.into(),
            what: fault.what,
            fix: fault.fix.into(),
            explains,
            complete,
            tensors: (explained, self.failing.len()),
            share,
        }
    }

    /// What a fault predicts with rounding, taken to be that of the right step.
    fn carry_rounding(&self, predicted: &Evidence) -> Evidence {
        let shift = |to: &Array2<f64>,
                     rounded: Option<&Array2<f64>>,
                     exact: Option<&Array2<f64>>| match (rounded, exact) {
            (Some(rounded), Some(exact)) if to.dim() == rounded.dim() => ndarray::Zip::from(to)
                .and(rounded)
                .and(exact)
                .map_collect(|to, rounded, exact| to + (rounded - exact)),
            _ => to.clone(),
        };
        let (rounded, exact) = (self.rounded, self.exact);
        let logits = predicted
            .logits
            .iter()
            .map(|to| shift(to, rounded.logits.as_ref(), exact.logits.as_ref()))
            .next();
        let hidden = predicted.hidden.iter();
        let gradients = predicted.gradients.iter();
        Evidence {
            loss: predicted.loss + rounded.loss - exact.loss,
            logits,
            hidden: hidden
                .map(|(l, to)| (*l, shift(to, rounded.hidden.get(l), exact.hidden.get(l))))
                .collect(),
            gradients: gradients
                .map(|(n, to)| {
                    (n.clone(), shift(to, rounded.gradients.get(n), exact.gradients.get(n)))
                })
                .collect(),
        }
    }

    /// How much of the gap a fault accounts for; `None` if it predicts nothing that differs from
    /// the right step.
    ///
    /// `rungs` are the measures under the fault, whose rounding may be larger.
    fn account(&self, predicted: &Evidence, rungs: &[Rung]) -> Option<Account> {
        let (mut along, mut fault, mut gap, mut left) = (0.0, 0.0, 0.0, 0.0);
        let mut add = |rung: RungName,
                       name: &str,
                       got: &Array2<f64>,
                       right: &Array2<f64>,
                       faulty: &Array2<f64>| {
            let measured =
                rung_of(self.rungs, rung).and_then(|r| r.tensors.iter().find(|m| m.name == name));
            let Some(m) = measured.filter(|m| m.share.is_finite()) else { return };
            if got.dim() != right.dim() || faulty.dim() != right.dim() {
                return;
            }
            let norm = crate::linalg::norms::frobenius(&right.view());
            let under =
                rung_of(rungs, rung).and_then(|r| r.tensors.iter().find(|m| m.name == name));
            let unit = under.map_or(m.tolerance, |u| u.tolerance.max(m.tolerance))
                * if norm > 0.0 { norm } else { self.scale };
            let weight = 1.0 / (unit * unit).max(f64::MIN_POSITIVE);
            ndarray::Zip::from(got).and(right).and(faulty).for_each(|&g, &r, &f| {
                along += weight * (g - r) * (f - r);
                fault += weight * (f - r) * (f - r);
                gap += weight * (g - r) * (g - r);
                left += weight * (g - f) * (g - f);
            });
        };
        let trainer = &self.case.trainer;
        // What stands at padding means nothing, and would outweigh every fault.
        let rows = self.case.real_rows();
        let mut add_rows = |rung: RungName,
                            name: &str,
                            got: &Array2<f64>,
                            right: &Array2<f64>,
                            faulty: &Array2<f64>| {
            if got.dim() != right.dim() || faulty.dim() != right.dim() {
                return;
            }
            if rows.len() == right.nrows() {
                add(rung, name, got, right, faulty);
            } else {
                add(
                    rung,
                    name,
                    &select_rows(got, &rows),
                    &select_rows(right, &rows),
                    &select_rows(faulty, &rows),
                );
            }
        };
        if let (Some(got), Some(r), Some(f)) =
            (&trainer.logits, &self.exact.logits, &predicted.logits)
        {
            add_rows(RungName::Logits, "logits", &got.values, r, f);
        }
        for (layer, got) in &trainer.hidden {
            if let (Some(r), Some(f)) = (self.exact.hidden.get(layer), predicted.hidden.get(layer))
            {
                add_rows(RungName::Hidden, &hidden_name(*layer), &got.values, r, f);
            }
        }
        for (name, r) in &self.exact.gradients {
            if let Some(f) =
                predicted.gradients.get(name).filter(|_| self.case.trained.contains(name))
            {
                match trainer.gradients.get(name) {
                    Some(got) => add(RungName::Gradients, name, &got.values, r, f),
                    None => add(RungName::Gradients, name, &Array2::zeros(r.dim()), r, f),
                }
            }
        }
        (fault > 1e-12 * gap && fault > 0.0 && gap > 0.0)
            .then(|| Account { amplitude: along / fault, left: left / gap })
    }

    /// Everything dumped against what a fault predicts, exactly and rounded.
    fn judge(&self, fault: Fault, predicted: &Evidence, rounded: &Evidence) -> Diagnosis {
        let rungs = climb_of_step(self.case, predicted, rounded);
        let before = |rung: RungName, name: &str| {
            let measured = rung_of(self.rungs, rung);
            measured
                .and_then(|r| r.tensors.iter().find(|m| m.name == name))
                .map_or(0.0, |m| m.share)
        };
        let misshapen = |m: &Measure| !before(RungName::Gradients, &m.name).is_finite();
        let close = |rung: RungName, m: &Measure| {
            let share = before(rung, &m.name);
            m.share <= EXPLAINED || (share.is_finite() && m.share * REDUCTION <= share)
        };
        let fine = |r: &Rung| {
            r.tensors
                .iter()
                .all(|m| close(r.name, m) || (r.name == RungName::Gradients && misshapen(m)))
        };
        // "No fault" must leave clearly more.
        let better = |r: &Rung| {
            let share = rung_of(self.rungs, r.name).map_or(0.0, finite_share);
            // Without gradients there is no common factor of them.
            let none = r.tensors.is_empty()
                && r.name == RungName::Scale
                && rung_of(&rungs, RungName::Gradients).is_some_and(fine);
            none || (!r.tensors.is_empty() && finite_share(r) <= LEFT_OVER * share)
        };
        let account = self.account(predicted, &rungs);
        // Rounding moves both in a half format, where a fault may be no larger than the tolerance.
        let (near, rest) =
            if self.coarse() { (0.4, 0.36) } else { (AMPLITUDE, LEFT_OVER * LEFT_OVER) };
        let accounted = account.is_some_and(|a| (a.amplitude - 1.0).abs() < near && a.left < rest);
        let predicts = || rungs.iter().filter(|r| r.name.is_of_the_step());
        let explains: Vec<RungName> = predicts()
            .filter(|r| self.failed(r.name) && fine(r) && better(r) && r.problems.is_empty())
            .map(|r| r.name)
            .collect();
        let spoiled = predicts().any(|r| !self.failed(r.name) && !fine(r));
        let failing: BTreeSet<&str> = self.failing.iter().map(|m| m.name.as_str()).collect();
        let mine: Vec<&Measure> =
            gradients_of(&rungs).iter().filter(|m| failing.contains(m.name.as_str())).collect();
        let explained = mine
            .iter()
            .filter(|m| {
                close(RungName::Gradients, m)
                    && m.share <= LEFT_OVER * before(RungName::Gradients, &m.name)
            })
            .count();
        let share = predicts().map(Rung::share).fold(0.0, f64::max);
        let targets = self.failed.iter().filter(|name| name.is_of_the_step()).count();
        Diagnosis {
            fault: fault.name.into(),
            what: fault.what,
            fix: fault.fix.into(),
            complete: !spoiled
                && accounted
                && explains.len() == targets
                && targets == self.failed.len(),
            explains: if spoiled || !accounted { Vec::new() } else { explains },
            tensors: (if accounted { explained } else { 0 }, failing.len()),
            share,
        }
    }

    /// Whether a gradient that failed is within `share` of what a fault predicts.
    pub fn accounts_for(&self, failed: &Measure, share: f64) -> bool {
        share <= LEFT_OVER * failed.share
            && failed.share.is_finite()
            && (share <= EXPLAINED || share * REDUCTION <= failed.share)
    }

    /// Judges what a fault was found to predict.
    pub fn propose(
        &self,
        fault: Fault,
        predicted: &Evidence,
        tested: &mut Tested<'_>,
    ) -> Result<()> {
        if let Some(visit) = tested.visit {
            return visit(&fault, predicted);
        }
        let diagnosis = self.judge(fault, predicted, &self.carry_rounding(predicted));
        tested.found.push(diagnosis);
        Ok(())
    }

    /// Runs the reference with a fault in it and judges the result after `edit`.
    pub fn test(
        &self,
        fault: Fault,
        variant: &Variant<'_>,
        edit: impl Fn(&mut Evidence),
        tested: &mut Tested<'_>,
    ) -> Result<()> {
        tested.watch.begins(&format!("hypothesis: {}", fault.name));
        let variant = &Variant { watch: Some(tested.watch), ..variant.clone() };
        if !self.may_explain(variant, &edit, tested)? || !tested.affords(1.0, fault.name) {
            return Ok(());
        }
        self.run_and_judge(fault, variant, |evidence, _| edit(evidence), tested)
    }

    /// A fault of the backward alone: the gradients of a variant beside the forward of the right
    /// step.
    pub fn test_gradients(
        &self,
        fault: Fault,
        variant: &Variant<'_>,
        tested: &mut Tested<'_>,
    ) -> Result<()> {
        if !tested.affords(1.0, fault.name) {
            return Ok(());
        }
        let forward_of = |evidence: &mut Evidence, right: &Evidence| {
            let gradients = std::mem::take(&mut evidence.gradients);
            *evidence = Evidence { gradients, ..right.clone() };
        };
        self.run_and_judge(fault, variant, forward_of, tested)
    }

    /// `edit` sees what the variant gives, and the right step in the same precision.
    fn run_and_judge(
        &self,
        fault: Fault,
        variant: &Variant<'_>,
        edit: impl Fn(&mut Evidence, &Evidence),
        tested: &mut Tested<'_>,
    ) -> Result<()> {
        tested.steps += 1;
        // A hypothesis that cannot be run (a loss that overflows, say) explains nothing.
        if let Ok(mut predicted) = self.case.run(variant) {
            edit(&mut predicted, self.exact);
            if let Some(visit) = tested.visit {
                return visit(&fault, &predicted);
            }
            let mut diagnosis =
                self.judge(fault.clone(), &predicted, &self.carry_rounding(&predicted));
            let near = self.account(&predicted, self.rungs).is_some_and(|a| a.left < 0.7);
            // In a half format the fault may make rounding matter more than it does in the right
            // step.
            if near && !diagnosis.complete && self.coarse() && tested.affords(1.0, fault.name) {
                tested.steps += 1;
                let variant = Variant { rounding: Some(self.case.rounding), ..variant.clone() };
                let mut rounded = self.case.run(&variant)?;
                edit(&mut rounded, self.rounded);
                diagnosis = self.judge(fault, &predicted, &rounded);
            }
            tested.found.push(diagnosis);
        }
        Ok(())
    }
}

/// Takes a fault and what it predicts.
pub(super) type Visit<'a> = &'a dyn Fn(&Fault, &Evidence) -> Result<()>;

/// Results of the tests so far.
pub(super) struct Tested<'a> {
    pub watch: &'a dyn Watch,
    pub found: Vec<Diagnosis>,
    pub steps: usize,
    pub budget: Budget,
    /// Where the faults are listed, not searched: takes each in place of a comparison.
    pub visit: Option<Visit<'a>>,
}

impl<'a> Tested<'a> {
    fn new(watch: &'a dyn Watch, budget: Budget) -> Self {
        Self { watch, found: Vec::new(), steps: 0, budget, visit: None }
    }

    /// Whether something explains everything that failed in the step itself.
    fn settled(&self) -> bool {
        self.found.iter().any(|d| d.complete)
    }

    /// Whether it does so within the tolerances of a right step.
    fn settled_well(&self) -> bool {
        self.found.iter().any(|d| d.complete && d.share <= 1.0)
    }
}

/// Runs the step with each fault in it that is found by running it; returns how many steps that
/// took.
///
/// # Errors
/// Those of `visit`.
pub(super) fn list(context: &Context<'_>, watch: &dyn Watch, visit: Visit<'_>) -> Result<usize> {
    let mut tested = Tested { visit: Some(visit), ..Tested::new(watch, Budget::unlimited()) };
    forward::list(context, &mut tested)?;
    loss::test(context, &mut tested)?;
    loss::masked_backward(context, &mut tested)?;
    backward::test(context, &mut tested)?;
    Ok(tested.steps)
}

/// The measured gradients of a ladder.
fn gradients_of(rungs: &[Rung]) -> &[Measure] {
    rung_of(rungs, RungName::Gradients).map_or(&[], |r| &r.tensors)
}

/// Largest share of a rung's tensors of the right shape.
fn finite_share(rung: &Rung) -> f64 {
    rung.tensors.iter().map(|m| m.share).filter(|s| s.is_finite()).fold(0.0, f64::max)
}

/// Tries the known faults; returns those that explain something, best first, and how many steps
/// were run.
///
/// # Errors
/// For a step that is right as far as it can be compared, and cannot be compared further.
pub(super) fn diagnose(
    case: &Case,
    exact: &Evidence,
    rounded: &Evidence,
    rungs: &[Rung],
    watch: &dyn Watch,
) -> Result<Search> {
    let mut context = Context::new(case, exact, rounded, rungs);
    let mut tested = Tested::new(watch, Budget::of(case));
    let mut measured = None;
    if !context.failed.is_empty() {
        distribution::test(&context, &mut tested)?;
        if !tested.settled() {
            gradient::test(&context, &mut tested)?;
        }
        if !tested.settled() {
            slices::test(&context, &mut tested)?;
        }
        if !tested.settled() {
            gradient::shapes(&mut context, &mut tested);
        }
        let forward_first = context.forward_wrong()
            || (context.failed(RungName::Loss) && !context.checked(RungName::Logits));
        if !tested.settled() && forward_first {
            forward::test(&context, &mut tested)?;
        }
        // In a half format the loss of a fresh model hides which labels it counts.
        let doubtful =
            context.failed(RungName::Loss) || !context.checked(RungName::Loss) || context.coarse();
        if !tested.settled() && doubtful {
            loss::test(&context, &mut tested)?;
        }
        let only_factor =
            tested.found.iter().filter(|d| d.complete).all(|d| d.fault == "constant-factor");
        if only_factor && doubtful && !context.forward_wrong() {
            measured = loss::other_losses(&context, &mut tested)?;
        }
        if !tested.settled() && measured.is_none() && !context.forward_wrong() {
            backward::test(&context, &mut tested)?;
            if !tested.settled() {
                loss::masked_backward(&context, &mut tested)?;
            }
        }
        if !tested.settled() && measured.is_none() && !context.forward_wrong() {
            rows::test(&context, &mut tested)?;
        }
        // In a half format a fault of the forward pass may show in the gradients alone.
        if !tested.settled() && measured.is_none() && !forward_first && context.coarse() {
            forward::test(&context, &mut tested)?;
        }
        if !tested.settled() && measured.is_none() {
            unjudged::test(&context, &mut tested)?;
        }
    }
    let mut found: Vec<Diagnosis> = tested
        .found
        .into_iter()
        .filter(|d| d.complete || !d.explains.is_empty() || d.tensors.0 > 0)
        .collect();
    found.sort_by(|a, b| {
        let key =
            |d: &Diagnosis| (!d.complete, usize::MAX - d.explains.len(), usize::MAX - d.tensors.0);
        key(a).cmp(&key(b)).then(a.share.total_cmp(&b.share))
    });
    let complete = found.iter().any(|d| d.complete);
    found.retain(|d| !complete || d.complete);
    if let Some(best) = found.first().filter(|d| d.complete).map(|d| d.share) {
        found.retain(|d| d.share <= 2.0 * best.max(0.5));
    }
    found.truncate(5);
    if measured.is_some() {
        found.clear();
    }
    if let Some(rung) = rung_of(rungs, RungName::Applied).filter(|r| r.failed()) {
        found.extend(applied::explain(case, rung));
    }
    let other = found.iter().any(|d| d.fault == "other-adapter");
    if let Some(rung) = rung_of(rungs, RungName::Update).filter(|r| r.failed() && !other) {
        found.extend(update::explain(case, rung));
    }
    tested.budget.left_out.remove("");
    Ok(Search { found, steps: tested.steps, measured, budget: tested.budget })
}
