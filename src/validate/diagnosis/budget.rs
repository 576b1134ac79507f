//! What a search for faults may cost, and how a hypothesis is ruled out by a part of a step.
//!
//! A step of the reference costs what its multiply-adds cost. A right step is two of them (exact,
//! rounded); further roundings and a search may add seven, so that with its comparisons a wrong step
//! costs some five times a right one. Small models may use more: nobody waits for them.
//!
//! Where a step is expensive a hypothesis is first run in part. Its forward must come nearer to the
//! first wrong hidden state; where the forward is right, its backward must come nearer to the
//! gradients of the top layer, from the exact input of that layer on.

use super::{Context, LEFT_OVER, Tested};
use crate::error::Result;
use crate::model::ModelConfig;
use crate::validate::dump::Case;
use crate::validate::ladder::RungName;
use crate::validate::names::place_of;
use crate::validate::reference::{Evidence, Part, Variant};
use crate::validate::roundings::looks;
use ndarray::Array2;
use std::collections::BTreeSet;

/// Steps of the reference that a search may take, beside the two that every validation takes.
const STEPS: f64 = 7.0;

/// Multiply-adds that a search may take whatever the model: some eight seconds of a laptop.
const FREE: f64 = 2.4e11;

/// A hypothesis that leaves more than this part of the gap does not explain it.
const RULED_OUT: f64 = 2.0 * LEFT_OVER;

/// So does one that predicts gaps this much larger than those of a top layer that is right.
const SPOILED: f64 = 4.0;

/// How much a search may cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Most steps of the reference.
    pub steps: f64,
    /// Whether hypotheses are first run in part.
    pub parts_first: bool,
}

impl Effort {
    /// For a step of a model.
    pub fn of(config: &ModelConfig, tokens: usize) -> Self {
        let step = 2.0 * config.parameters() as f64 * tokens as f64;
        let steps = STEPS.max(FREE / step);
        Self { steps, parts_first: steps < 40.0 }
    }
}

/// What a search has cost so far.
#[derive(Debug, Clone)]
pub(in crate::validate) struct Budget {
    limit: f64,
    spent: f64,
    /// Hypotheses that a part of a step ruled out.
    pub ruled_out: usize,
    /// Hypotheses that there was no step left for.
    pub left_out: BTreeSet<String>,
}

impl Budget {
    pub fn of(case: &Case) -> Self {
        // The roundings against which a failed step was measured before are part of it.
        let limit = (case.effort.steps - looks(case) as f64).max(1.0);
        Self { limit, ..Self::unlimited() }
    }

    pub fn unlimited() -> Self {
        Self { limit: f64::INFINITY, spent: 0.0, ruled_out: 0, left_out: BTreeSet::new() }
    }
}

impl Tested<'_> {
    /// Whether so many more steps may be run; if not, what they were for is left out.
    pub fn affords(&mut self, steps: f64, what: &str) -> bool {
        let budget = &mut self.budget;
        if budget.spent + steps > budget.limit {
            budget.left_out.insert(what.to_string());
            return false;
        }
        budget.spent += steps;
        true
    }
}

/// Numbers of a layer's and of the output projection's weights.
fn weights(config: &ModelConfig) -> (f64, f64) {
    let head = (config.vocab_size * config.hidden_size) as f64;
    let tables = if config.tie_word_embeddings { 1.0 } else { 2.0 };
    ((config.parameters() as f64 - tables * head) / config.num_hidden_layers.max(1) as f64, head)
}

/// The layer whose exact input a search keeps, if the dump is one whose hypotheses are run in part.
pub(in crate::validate) fn top_layer(case: &Case) -> Option<usize> {
    case.model.layers.len().checked_sub(1).filter(|&top| top > 0 && case.effort.parts_first)
}

impl Context<'_> {
    /// Runs part of a hypothesis; false if that rules it out. `edit` is made to what the part
    /// predicts.
    pub(super) fn may_explain(
        &self,
        variant: &Variant<'_>,
        edit: &dyn Fn(&mut Evidence),
        tested: &mut Tested<'_>,
    ) -> Result<bool> {
        let Some(part) = self.part_of(variant).filter(|_| tested.visit.is_none()) else {
            return Ok(true);
        };
        let cost = self.cost_of(&part);
        // Where the part is nearly all of it, it spares nothing.
        if cost > 0.6 {
            return Ok(true);
        }
        if !tested.affords(cost, "") {
            return Ok(true);
        }
        let Ok(mut predicted) = self.case.run(&Variant { part, ..variant.clone() }) else {
            return Ok(true);
        };
        edit(&mut predicted);
        let compared = if part.forward_only {
            Evidence { gradients: Default::default(), ..predicted }
        } else {
            predicted.gradients.retain(|name, _| place_of(name).0.is_some());
            Evidence { gradients: predicted.gradients, ..Evidence::default() }
        };
        // A top layer that is right is not nearer to anything.
        let wrong = part.forward_only
            || self.failing.iter().any(|m| compared.gradients.contains_key(&m.name));
        let explains = match self.account(&compared, self.rungs) {
            Some(account) if wrong => account.left < RULED_OUT,
            Some(account) => account.left < SPOILED,
            None => !wrong,
        };
        tested.budget.ruled_out += usize::from(!explains);
        Ok(explains)
    }

    /// The part of a hypothesis that is run first.
    fn part_of(&self, variant: &Variant<'_>) -> Option<Part<'_>> {
        if !self.case.effort.parts_first {
            return None;
        }
        if self.forward_wrong() {
            let first = self.first_wrong_layer();
            return Some(Part { forward_only: true, until: first, ..Part::default() });
        }
        let same_forward = variant.forward.is_none()
            && variant.batch.is_none()
            && variant.scale.is_none()
            && variant.ahead == 0
            && variant.unmasked.is_none();
        self.top_part().filter(|_| same_forward && self.failed(RungName::Gradients))
    }

    /// The step from the exact input of the top layer on, where hypotheses are run in part.
    pub(super) fn top_part(&self) -> Option<Part<'_>> {
        let from = self.exact.hidden.get(&self.top?.checked_sub(1)?)?;
        Some(Part { from: Some((self.top?, from)), ..Part::default() })
    }

    /// What a part of a step costs, in steps.
    pub(super) fn cost_of(&self, part: &Part<'_>) -> f64 {
        let (layer, head) = weights(&self.case.model.config);
        part.cost(self.case.model.layers.len(), layer, head)
    }

    /// The first layer whose recorded output is wrong.
    fn first_wrong_layer(&self) -> Option<usize> {
        let rung = super::rung_of(self.rungs, RungName::Hidden)?;
        let wrong = rung.tensors.iter().find(|m| !m.passes())?;
        wrong.name.rsplit(' ').next()?.parse().ok()
    }
}

/// Entries of a sample that tells whether two tensors can be the same.
const SAMPLE: usize = 2048;

/// Whether a tensor may be another within half of its norm, by a sample of its entries.
pub(super) fn may_be(got: &Array2<f64>, want: &Array2<f64>) -> bool {
    if got.dim() != want.dim() {
        return false;
    }
    // A step without a common factor with most widths, so that every column is seen.
    let step = (got.len() / SAMPLE).max(1) | 1;
    let (mut gap, mut norm) = (0.0, 0.0);
    for (g, w) in got.iter().step_by(step).zip(want.iter().step_by(step)) {
        (gap, norm) = (gap + (g - w) * (g - w), norm + w * w);
    }
    !(gap > 0.6 * norm)
}
