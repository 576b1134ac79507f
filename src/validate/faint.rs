//! Faults below every tensor's tolerance: a matched filter over all numbers of the dump at once.
//!
//! With R the exact step, F the same with a fault in it, G the trainer's, and R~ with mean B over several dithered roundings, all
//! as one long vector in units of the tolerances:
//!
//! ```text
//! a = <G - B, F - R> / |F - R|^2          amplitude: 1 if the trainer has the fault, 0 if not
//! s = deviation of <R~ - B, F - R> / |F - R|^2 over the roundings
//! ```
//!
//! Dither (module `roundings`) makes the roundings independent, and somewhat larger than the trainer's.

use super::diagnosis::{self, Context, Diagnosis, Fault};
use super::dump::Case;
use super::ladder::{Outcome, Rung, RungName, gradient_scale, rung_of};
use super::reference::{Evidence, select_rows};
use super::report::Watch;
use super::roundings::dithered;
use crate::error::Result;
use crate::linalg::norms::frobenius;
use serde::Serialize;
use std::cell::RefCell;

/// Dithered roundings.
const ROUNDINGS: usize = 8;
/// From so many deviations on a fault is named.
pub const DEVIATIONS: f64 = 6.0;
/// From so many on it is mentioned.
pub const MENTIONED: f64 = 4.0;
/// Amplitudes that count as the fault itself.
const AMPLITUDES: std::ops::Range<f64> = 0.5..1.5;
/// Parameters times tokens up to which the search is made unasked: it takes some sixty steps.
const LARGEST: usize = 1 << 27;

/// How much of a fault is in the trainer's numbers.
#[derive(Debug, Clone, Serialize)]
pub struct Amplitude {
    /// Name of the fault.
    pub fault: &'static str,
    /// 1 if the trainer has the fault, 0 if not.
    pub value: f64,
    /// Standard deviation of the value from rounding.
    pub deviation: f64,
}

/// What the search found.
pub(super) struct Search {
    pub rung: Rung,
    pub found: Option<Diagnosis>,
    pub amplitudes: Vec<Amplitude>,
    pub steps: usize,
}

impl Amplitude {
    /// Whether the value is 1 as far as its deviation lets it.
    fn is_the_fault(&self) -> bool {
        AMPLITUDES.contains(&self.value) && (self.value - 1.0).abs() <= 0.1 + 3.0 * self.deviation
    }

    /// The value in deviations.
    pub fn deviations(&self) -> f64 {
        self.value / self.deviation.max(f64::MIN_POSITIVE)
    }
}

/// Whether the search is worth its time: faults of single precision that hide are too small to matter.
pub(super) fn wanted(case: &Case) -> bool {
    let parameters = case.model.config.parameters();
    let small = parameters.saturating_mul(case.batch.input_ids.len()) <= LARGEST;
    case.rounding.coarsest().epsilon() > 1e-4 && case.faint.unwrap_or(small)
}

/// Looks for every known fault of the step in numbers that are all within their tolerances.
///
/// # Errors
/// As [`Case::run`].
pub(super) fn search(context: &Context<'_>, watch: &dyn Watch) -> Result<Search> {
    let case = context.case;
    watch.begins("dithered roundings");
    let vector = |evidence: &Evidence| vector(context, evidence);
    let right = vector(context.exact);
    let mut roundings = Vec::with_capacity(ROUNDINGS);
    for seed in 0..ROUNDINGS as u64 {
        roundings.push(vector(&dithered(case, seed, false)?));
    }
    let count = roundings.len() as f64;
    let mean: Vec<f64> = (0..right.len()).map(|i| roundings.iter().map(|r| r[i]).sum::<f64>() / count).collect();
    let less_mean = |v: &[f64]| -> Vec<f64> { v.iter().zip(&mean).map(|(x, m)| x - m).collect() };
    let gap = less_mean(&vector(&observed(context)));
    let noise: Vec<Vec<f64>> = roundings.iter().map(|r| less_mean(r)).collect();
    let amplitudes: RefCell<Vec<(Amplitude, Fault)>> = RefCell::default();
    let visit = |fault: &Fault, predicted: &Evidence| {
        let direction: Vec<f64> = vector(predicted).iter().zip(&right).map(|(f, r)| f - r).collect();
        let square = inner(&direction, &direction);
        // Less than a hundredth of a tolerance in all says nothing.
        if direction.len() == gap.len() && square > 1e-4 {
            let along = |v: &[f64]| inner(v, &direction) / square;
            let spread: f64 = noise.iter().map(|n| along(n).powi(2)).sum::<f64>() / (count - 1.0);
            let deviation = (spread * (1.0 + 1.0 / count)).sqrt();
            let amplitude = Amplitude { fault: fault.name, value: along(&gap), deviation };
            amplitudes.borrow_mut().push((amplitude, fault.clone()));
        }
        Ok(())
    };
    let steps = ROUNDINGS + diagnosis::list(context, watch, &visit)?;
    let amplitudes = amplitudes.into_inner();
    let near = amplitudes.iter().filter(|(a, _)| a.is_the_fault() && a.deviations() >= MENTIONED);
    let strongest = near.max_by(|a, b| a.0.deviations().total_cmp(&b.0.deviations()));
    let (rung, found) = verdict(strongest, amplitudes.len());
    Ok(Search { rung, found, amplitudes: amplitudes.into_iter().map(|(a, _)| a).collect(), steps })
}

fn verdict(strongest: Option<&(Amplitude, Fault)>, tried: usize) -> (Rung, Option<Diagnosis>) {
    let mut rung = Rung::of(RungName::Faint, Vec::new());
    let Some((strongest, Fault { name, what, fix })) = strongest else {
        rung.problems.push(format!("none of {tried} known faults is hidden below the tolerances"));
        return (rung, None);
    };
    let seen = format!(
        "amplitude {:.2} +- {:.2} of what it would be, over all numbers together",
        strongest.value, strongest.deviation
    );
    rung.problems.push(format!("{name}: {seen}"));
    if strongest.deviations() < DEVIATIONS {
        return (rung, None);
    }
    rung.outcome = Outcome::Fail;
    let found = Diagnosis {
        fault: (*name).into(),
        what: format!("{what} (no tensor by itself is outside its tolerance; {seen})"),
        fix: (*fix).into(),
        explains: vec![RungName::Faint],
        complete: true,
        tensors: (0, 0),
        share: 1.0,
    };
    (rung, Some(found))
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// What the trainer computed, as evidence.
fn observed(context: &Context<'_>) -> Evidence {
    let trainer = &context.case.trainer;
    Evidence {
        loss: 0.0,
        logits: trainer.logits.as_ref().map(|o| o.values.clone()),
        hidden: trainer.hidden.iter().map(|(layer, o)| (*layer, o.values.clone())).collect(),
        gradients: trainer.gradients.iter().map(|(name, o)| (name.clone(), o.values.clone())).collect(),
    }
}

/// Every measured tensor in units of its tolerance, one after the other.
fn vector(context: &Context<'_>, evidence: &Evidence) -> Vec<f64> {
    let rows = context.case.real_rows();
    let scale = gradient_scale(&context.exact.gradients);
    let mut all = Vec::new();
    for name in [RungName::Logits, RungName::Hidden, RungName::Gradients] {
        for m in rung_of(context.rungs, name).iter().flat_map(|r| &r.tensors) {
            let of = |evidence: &Evidence| evidence.tensor(name, &m.name).cloned();
            let (Some(right), Some(values)) = (of(context.exact), of(evidence)) else { continue };
            if values.dim() != right.dim() {
                continue;
            }
            let norm = frobenius(&right.view());
            let unit = m.tolerance * if norm > 0.0 { norm } else { scale };
            let values = if name == RungName::Gradients { values } else { select_rows(&values, &rows) };
            all.extend(values.iter().map(|x| x / unit));
        }
    }
    all
}
