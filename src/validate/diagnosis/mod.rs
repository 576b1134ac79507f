//! Which known fault explains a failed validation.
//!
//! Two kinds of tests. Algebraic ones (`gradient`, `factors`, `slices`) look at the trainer's gradients beside the
//! reference's: zero, proportional, transposed, exchanged, permuted. The others (`forward`, `loss`, `backward`) run the
//! reference again with the fault in it and compare everything that was dumped. A fault explains a failure when what it predicts is within the tolerances that the
//! right step would have had.

mod backward;
mod factors;
mod forward;
mod gradient;
mod loss;
mod slices;
mod update;

use super::dump::Case;
use super::ladder::{Outcome, Rung, RungName, climb, rung_of};
use super::measure::Measure;
use super::reference::{Evidence, Variant};
use super::report::Watch;
use crate::error::Result;
use serde::Serialize;
use std::collections::BTreeSet;

/// Shares up to this count as explained: the fault's own arithmetic rounds elsewhere than the reference's.
const EXPLAINED: f64 = 4.0;
/// So do shares that are this much smaller than without the fault.
const REDUCTION: f64 = 1e3;

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
pub(super) struct Fault {
    pub name: &'static str,
    pub what: String,
    pub fix: &'static str,
}

impl Fault {
    pub fn new(name: &'static str, what: impl Into<String>, fix: &'static str) -> Self {
        Self { name, what: what.into(), fix }
    }
}

/// What the tests look at.
pub(super) struct Context<'a> {
    pub case: &'a Case,
    pub exact: &'a Evidence,
    pub rounded: &'a Evidence,
    /// Measures of the gradients that failed.
    pub failing: Vec<&'a Measure>,
    failed: BTreeSet<RungName>,
    rungs: &'a [Rung],
}

impl Context<'_> {
    /// Whether a rung failed.
    pub fn failed(&self, rung: RungName) -> bool {
        self.failed.contains(&rung)
    }

    /// The mean factor of the gradients and its noise.
    pub fn mean_factor(&self) -> Option<(f64, f64)> {
        let measure = rung_of(self.rungs, RungName::Scale)?.tensors.first()?;
        Some((1.0 + measure.along, measure.rounding_along))
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
        let mut shifted = predicted.clone();
        shifted.loss += self.rounded.loss - self.exact.loss;
        let shift = |to: &mut ndarray::Array2<f64>, rounded: &ndarray::Array2<f64>, exact: &ndarray::Array2<f64>| {
            if to.dim() == rounded.dim() {
                *to += &(rounded - exact);
            }
        };
        if let (Some(to), Some(r), Some(e)) = (&mut shifted.logits, &self.rounded.logits, &self.exact.logits) {
            shift(to, r, e);
        }
        for (layer, to) in &mut shifted.hidden {
            if let (Some(r), Some(e)) = (self.rounded.hidden.get(layer), self.exact.hidden.get(layer)) {
                shift(to, r, e);
            }
        }
        for (name, to) in &mut shifted.gradients {
            if let (Some(r), Some(e)) = (self.rounded.gradients.get(name), self.exact.gradients.get(name)) {
                shift(to, r, e);
            }
        }
        shifted
    }

    /// Everything dumped against what a fault predicts, exactly and rounded.
    fn judge(&self, fault: Fault, predicted: &Evidence, rounded: &Evidence) -> Diagnosis {
        let rungs = climb(self.case, predicted, rounded);
        let before = |rung: RungName, name: &str| {
            let measured = rung_of(self.rungs, rung);
            measured.and_then(|r| r.tensors.iter().find(|m| m.name == name)).map_or(0.0, |m| m.share)
        };
        let close = |rung: RungName, m: &Measure| m.share <= EXPLAINED || m.share * REDUCTION <= before(rung, &m.name);
        let fine = |r: &Rung| r.tensors.iter().all(|m| close(r.name, m));
        let predicts = || rungs.iter().filter(|r| r.name.is_of_the_step());
        let explains: Vec<RungName> =
            predicts().filter(|r| self.failed(r.name) && fine(r) && r.problems.is_empty()).map(|r| r.name).collect();
        let spoiled = predicts().any(|r| !self.failed(r.name) && !fine(r));
        let failing: BTreeSet<&str> = self.failing.iter().map(|m| m.name.as_str()).collect();
        let mine: Vec<&Measure> = gradients_of(&rungs).iter().filter(|m| failing.contains(m.name.as_str())).collect();
        let explained = mine.iter().filter(|m| close(RungName::Gradients, m)).count();
        let share = predicts().map(Rung::share).fold(0.0, f64::max);
        let targets = self.failed.iter().filter(|name| name.is_of_the_step()).count();
        Diagnosis {
            fault: fault.name.into(),
            what: fault.what,
            fix: fault.fix.into(),
            complete: !spoiled && explains.len() == targets && targets == self.failed.len(),
            explains: if spoiled { Vec::new() } else { explains },
            tensors: (explained, failing.len()),
            share,
        }
    }

    /// Whether a gradient that failed is within `share` of what a fault predicts.
    pub fn accounts_for(&self, failed: &Measure, share: f64) -> bool {
        share < failed.share && (share <= EXPLAINED || share * REDUCTION <= failed.share)
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
        tested.steps += 1;
        // A hypothesis that cannot be run (a loss that overflows, say) explains nothing.
        if let Ok(mut predicted) = self.case.run(variant) {
            edit(&mut predicted);
            let mut diagnosis = self.judge(fault.clone(), &predicted, &self.carry_rounding(&predicted));
            let near = 2 * diagnosis.tensors.0 > diagnosis.tensors.1 || !diagnosis.explains.is_empty();
            // In a half format the fault may make rounding matter more than it does in the right step.
            if near && !diagnosis.complete && self.case.rounding.coarsest().epsilon() > 1e-4 {
                tested.steps += 1;
                let variant = Variant { rounding: Some(self.case.rounding), ..variant.clone() };
                let mut rounded = self.case.run(&variant)?;
                edit(&mut rounded);
                diagnosis = self.judge(fault, &predicted, &rounded);
            }
            tested.found.push(diagnosis);
        }
        Ok(())
    }
}

/// Results of the tests so far.
pub(super) struct Tested<'a> {
    pub watch: &'a dyn Watch,
    pub found: Vec<Diagnosis>,
    pub steps: usize,
}

impl Tested<'_> {
    /// Whether something explains everything that failed in the step itself.
    fn settled(&self) -> bool {
        self.found.iter().any(|d| d.complete)
    }
}

/// The measured gradients of a ladder.
fn gradients_of(rungs: &[Rung]) -> &[Measure] {
    rung_of(rungs, RungName::Gradients).map_or(&[], |r| &r.tensors)
}

/// Tries the known faults; returns those that explain something, best first, and how many steps were run.
pub(super) fn diagnose(
    case: &Case,
    exact: &Evidence,
    rounded: &Evidence,
    rungs: &[Rung],
    watch: &dyn Watch,
) -> Result<(Vec<Diagnosis>, usize)> {
    let failing = gradients_of(rungs).iter().filter(|m| !m.passes()).collect();
    // The update is explained by itself, below.
    let failed = rungs.iter().filter(|r| r.failed() && r.name != RungName::Update).map(|r| r.name).collect();
    let context = Context { case, exact, rounded, failing, failed, rungs };
    let mut tested = Tested { watch, found: Vec::new(), steps: 0 };
    if !context.failed.is_empty() {
        gradient::test(&context, &mut tested)?;
        if !tested.settled() {
            slices::test(&context, &mut tested)?;
        }
        if !tested.settled()
            && (context.forward_wrong() || (context.failed(RungName::Loss) && !context.checked(RungName::Logits)))
        {
            forward::test(&context, &mut tested)?;
        }
        if !tested.settled() && (context.failed(RungName::Loss) || !context.checked(RungName::Loss)) {
            loss::test(&context, &mut tested)?;
        }
        if !tested.settled() && !context.forward_wrong() {
            backward::test(&context, &mut tested)?;
        }
    }
    let mut found: Vec<Diagnosis> =
        tested.found.into_iter().filter(|d| d.complete || !d.explains.is_empty() || d.tensors.0 > 0).collect();
    found.sort_by(|a, b| {
        let key = |d: &Diagnosis| (!d.complete, usize::MAX - d.explains.len(), usize::MAX - d.tensors.0);
        key(a).cmp(&key(b)).then(a.share.total_cmp(&b.share))
    });
    let complete = found.iter().any(|d| d.complete);
    found.retain(|d| !complete || d.complete);
    found.truncate(5);
    if let Some(rung) = rung_of(rungs, RungName::Update).filter(|r| r.failed()) {
        found.extend(update::explain(case, rung));
    }
    Ok((found, tested.steps))
}
