//! Several roundings of one step, where a single one says too little.
//!
//! Sharp attention and saturated softmaxes make rounding errors with heavy tails: one rounded step
//! can be ten times nearer to the exact one than the next. Here each tensor is moved by up to half
//! a unit in the last place before it is rounded, and the scores of attention, which trainers round
//! and the reference does not, by the same.

use super::dump::Case;
use super::ladder::{Rung, RungName, climb, rung_of};
use super::precision::Precision;
use super::reference::{Evidence, Variant};
use super::report::Watch;
use crate::blocks::causal_attention::ScoreErrors;
use crate::error::{Error, Result};
use crate::linalg::norms::frobenius;
use crate::model::Place;
use ndarray::Array2;
use rand::RngExt;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Roundings of a second look.
const SECOND_LOOK: usize = 5;
/// Steps that a search may take from which on a step counts as cheap.
const CHEAP: f64 = 40.0;
/// The widest of several errors counts by half: the multiples of `measure` are for one sample.
const OF_THE_WIDEST: f64 = 0.5;
/// Shares beyond this are no rounding.
const FAR: f64 = 60.0;
/// From this part of a gradient on that rounding moves, the gradient says nothing.
const LOST: f64 = 0.35;
/// So much larger is rounding than what is left where the parts of a sum cancel.
const CANCELS: f64 = 10.0;

/// The step rounded as the trainer rounds, each tensor moved by up to half a unit before, and the
/// scores of attention where `scores` says so.
pub(super) fn dithered(case: &Case, seed: u64, scores: bool) -> Result<Evidence> {
    let generator = RefCell::new(crate::streams::generator(seed, "validate/dither", 0));
    let rounding = case.rounding;
    let dither = |place: Place, x: &mut Array2<f64>| {
        let unit = rounding.at(place).epsilon() / 2.0;
        let mut generator = generator.borrow_mut();
        x.mapv_inplace(|x| x * (1.0 + unit * generator.random_range(-1.0..1.0)));
    };
    let score_errors =
        scores.then(|| ScoreErrors { size: rounding.products.epsilon() / 2.0, seed });
    case.run(&Variant {
        tap: Some(&dither),
        score_errors,
        rounding: Some(rounding),
        ..Variant::default()
    })
}

/// What several roundings say of a step that failed against one.
pub(super) enum SecondLook {
    /// Nothing else.
    Fails,
    /// It is within these.
    Passes(Vec<Rung>),
    /// Rounding alone decides most of the gradients: unless a fault explains them, the step cannot
    /// be judged.
    Lost(Error),
}

/// Roundings that a second look takes.
pub(super) fn looks(case: &Case) -> usize {
    if case.effort.steps < CHEAP { 2 } else { SECOND_LOOK }
}

/// Measures a step that failed against several roundings.
///
/// # Errors
/// As [`Case::run`].
pub(super) fn second_look(
    case: &Case,
    exact: &Evidence,
    rounded: &Evidence,
    rungs: &[Rung],
    watch: &dyn Watch,
) -> Result<SecondLook> {
    let of_step = || rungs.iter().filter(|r| r.name.is_of_the_step());
    let finite = of_step().flat_map(|r| &r.tensors).all(|m| m.share.is_finite());
    let numbers_only = of_step().all(|r| r.problems.is_empty());
    if case.rounding.coarsest() == Precision::F64
        || !of_step().any(Rung::failed)
        || !finite
        || !numbers_only
    {
        return Ok(SecondLook::Fails);
    }
    // Where a step is expensive, only for gaps that rounding may have made.
    let looks = looks(case);
    if looks < SECOND_LOOK && of_step().map(Rung::share).fold(0.0, f64::max) > FAR {
        return Ok(SecondLook::Fails);
    }
    watch.begins("several roundings");
    let mut widest = Widest::new(exact, rounded);
    for seed in 0..looks as u64 {
        widest.see(&dithered(case, seed, true)?);
    }
    let lost = widest.lost(case);
    let widest = widest.evidence();
    let mut rungs = climb(case, exact, &widest);
    // Only those that are outside their tolerance besides are left out.
    let outside =
        |name: &String| rung_of(&rungs, RungName::Gradients).is_some_and(|r| r.fails(name));
    let lost: Vec<String> = lost.into_iter().filter(outside).collect();
    let judged = case.trained.len() - lost.len();
    if !lost.is_empty() {
        let mut kept = case.clone();
        kept.trained.retain(|name| !lost.contains(name));
        rungs = climb(&kept, exact, &widest);
    }
    if rungs.iter().any(|r| r.name.is_of_the_step() && r.failed()) {
        return Ok(SecondLook::Fails);
    }
    let format = case.rounding.coarsest().name();
    if judged < lost.len() {
        let better = if case.rounding.coarsest() == Precision::F32 {
            "record one whose rows or labels do not cancel"
        } else {
            "record one in float32"
        };
        let what = format!(
            "rounding alone moves {} of {} gradients by a third or more, so this step says too \
             little: {better}",
            lost.len(),
            case.trained.len()
        );
        return Ok(SecondLook::Lost(Error::invalid("compute", format, what)));
    }
    if let Some(rung) = rungs.iter_mut().find(|r| r.name == RungName::Gradients) {
        if lost.is_empty() {
            rung.problems.push(format!(
                "measured against {} roundings: one says too little here",
                looks + 1
            ));
        } else {
            rung.problems.push(format!(
                "{} of {} are not compared: rounding to {format} alone moves them by a third or \
                 more",
                lost.len(),
                case.trained.len()
            ));
        }
    }
    Ok(SecondLook::Passes(rungs))
}

/// The largest of several rounding errors, tensor by tensor.
struct Widest<'a> {
    exact: &'a Evidence,
    /// Exact values plus the largest errors.
    values: Evidence,
    /// Squared errors of the gradients, summed over the samples.
    squares: BTreeMap<String, f64>,
    samples: f64,
}

impl<'a> Widest<'a> {
    fn new(exact: &'a Evidence, rounded: &Evidence) -> Self {
        let mut widest =
            Self { exact, values: exact.clone(), squares: BTreeMap::new(), samples: 0.0 };
        widest.see(rounded);
        widest
    }

    fn see(&mut self, sample: &Evidence) {
        let exact = self.exact;
        let error = |a: &Array2<f64>, right: &Array2<f64>| frobenius(&(a - right).view());
        let keep = |to: &mut Array2<f64>, from: &Array2<f64>, right: &Array2<f64>| {
            if error(from, right) > error(to, right) {
                to.assign(from);
            }
        };
        if (sample.loss - exact.loss).abs() > (self.values.loss - exact.loss).abs() {
            self.values.loss = sample.loss;
        }
        if let (Some(to), Some(from), Some(right)) =
            (&mut self.values.logits, &sample.logits, &exact.logits)
        {
            keep(to, from, right);
        }
        for (layer, to) in &mut self.values.hidden {
            if let (Some(from), Some(right)) = (sample.hidden.get(layer), exact.hidden.get(layer)) {
                keep(to, from, right);
            }
        }
        for (name, to) in &mut self.values.gradients {
            if let (Some(from), Some(right)) =
                (sample.gradients.get(name), exact.gradients.get(name))
            {
                keep(to, from, right);
                *self.squares.entry(name.clone()).or_default() += error(from, right).powi(2);
            }
        }
        self.samples += 1.0;
    }

    /// Gradients that rounding alone moves too far to be compared. One that is zero is such a thing
    /// only where all of the exact one cancels.
    fn lost(&self, case: &Case) -> Vec<String> {
        let moved = |name: &String| {
            let norm = frobenius(&self.exact.gradients.get(name)?.view());
            let there = case.trainer.gradients.get(name)?.values.iter().any(|x| x.abs() > 0.0);
            let error = (self.squares.get(name)? / self.samples).sqrt();
            Some(norm > 0.0 && error > if there { LOST } else { CANCELS } * norm)
        };
        case.trained.iter().filter(|name| moved(name) == Some(true)).cloned().collect()
    }

    /// The exact step with a part of the largest errors.
    fn evidence(mut self) -> Evidence {
        let exact = self.exact;
        let part = |to: &mut Array2<f64>, right: &Array2<f64>| {
            to.zip_mut_with(right, |x, r| *x = r + OF_THE_WIDEST * (*x - r));
        };
        self.values.loss = exact.loss + OF_THE_WIDEST * (self.values.loss - exact.loss);
        if let (Some(to), Some(right)) = (&mut self.values.logits, &exact.logits) {
            part(to, right);
        }
        for (layer, to) in &mut self.values.hidden {
            part(to, &exact.hidden[layer]);
        }
        for (name, to) in &mut self.values.gradients {
            part(to, &exact.gradients[name]);
        }
        self.values
    }
}
