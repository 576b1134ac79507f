//! Faults below every tensor's tolerance: a matched filter over all numbers of the dump at once.
//!
//! With R the exact step, F the same with a fault in it, G the trainer's, and R~ with mean B over
//! several dithered roundings, all as one long vector in units of the tolerances:
//!
//! ```text
//! a = <G - B, F - R> / |F - R|^2          amplitude: 1 if the trainer has the fault, 0 if not
//! s = deviation of <R~ - B, F - R> / |F - R|^2 over the roundings
//! ```
//!
//! Dither (module `roundings`) makes the roundings independent, and somewhat larger than the
//! trainer's.

use super::diagnosis::{self, Context, Diagnosis, Fault};
use super::dump::Case;
use super::ladder::{Outcome, Rung, RungName, climb, gradient_scale, rung_of};
use super::reference::{Evidence, Variant, select_rows};
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

/// Whether the search is worth its time: faults of single precision that hide are too small to
/// matter.
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
    let filter = Filter::new(context, watch)?;
    let amplitudes: RefCell<Vec<(Amplitude, Fault)>> = RefCell::default();
    let steps = ROUNDINGS
        + diagnosis::list(context, watch, &|fault, predicted| {
            if let Some(amplitude) =
                filter.amplitude(fault.name, &filter.direction(context, predicted))
            {
                amplitudes.borrow_mut().push((amplitude, fault.clone()));
            }
            Ok(())
        })?;
    let amplitudes = amplitudes.into_inner();
    let near = amplitudes.iter().filter(|(a, _)| a.is_the_fault() && a.deviations() >= MENTIONED);
    let strongest = near.max_by(|a, b| a.0.deviations().total_cmp(&b.0.deviations()));
    let (rung, found) = verdict(strongest, amplitudes.len());
    Ok(Search { rung, found, amplitudes: amplitudes.into_iter().map(|(a, _)| a).collect(), steps })
}

/// Tensors in units of their tolerances, each a vector.
type Scaled = Vec<Vec<f64>>;

/// The step and its roundings, to hold faults against.
struct Filter {
    right: Scaled,
    observed: Scaled,
    mean: Scaled,
    roundings: Vec<Scaled>,
}

impl Filter {
    fn new(context: &Context<'_>, watch: &dyn Watch) -> Result<Self> {
        watch.begins("dithered roundings");
        let mut roundings = Vec::with_capacity(ROUNDINGS);
        for seed in 0..ROUNDINGS as u64 {
            roundings.push(scaled(context, &dithered(context.case, seed, false)?));
        }
        let right = scaled(context, context.exact);
        let mut mean: Scaled = right.iter().map(|tensor| vec![0.0; tensor.len()]).collect();
        for rounding in &roundings {
            mean.iter_mut()
                .flatten()
                .zip(rounding.iter().flatten())
                .for_each(|(m, x)| *m += x / ROUNDINGS as f64);
        }
        Ok(Self { right, observed: scaled(context, &observed(context)), mean, roundings })
    }

    /// F - R.
    fn direction(&self, context: &Context<'_>, predicted: &Evidence) -> Scaled {
        less(&scaled(context, predicted), &self.right)
    }

    /// `None` for a fault that says nothing: less than a hundredth of a tolerance in all.
    fn amplitude(&self, fault: &'static str, direction: &Scaled) -> Option<Amplitude> {
        let square = inner(direction, direction);
        let same = direction.len() == self.observed.len();
        if !same || !(square > 1e-4) {
            return None;
        }
        let along = |v: &Scaled| inner(&less(v, &self.mean), direction) / square;
        let count = self.roundings.len() as f64;
        let spread: f64 =
            self.roundings.iter().map(|n| along(n).powi(2)).sum::<f64>() / (count - 1.0);
        let deviation = (spread * (1.0 + 1.0 / count)).sqrt();
        Some(Amplitude { fault, value: along(&self.observed), deviation })
    }
}

/// How strong a fault must be to be found in a right step, as parts of the whole fault.
#[derive(Debug, Clone, Serialize)]
pub struct Strength {
    /// Name of the fault.
    pub fault: &'static str,
    /// |F - R| / |R| over all gradients: what the whole fault changes.
    pub size: f64,
    /// The part from which on a tensor leaves its tolerance; over 1, the whole fault hides.
    pub by_tolerance: f64,
    /// The part that is [`DEVIATIONS`] deviations of the matched filter.
    pub by_filter: f64,
    /// What the filter sees in the step as it is, in deviations: chance alone.
    pub chance: f64,
}

/// For every known fault of a right step that changes its gradients, how strong it must be to be
/// found. About sixty steps.
///
/// # Errors
/// As [`Case::run`].
pub fn strengths(case: &Case, watch: &dyn Watch) -> Result<Vec<Strength>> {
    let exact = case.run(&Variant::default())?;
    let rounded = case.run(&Variant { rounding: Some(case.rounding), ..Variant::default() })?;
    let rungs = climb(case, &exact, &rounded);
    let context = Context::new(case, &exact, &rounded, &rungs);
    let filter = Filter::new(&context, watch)?;
    let gap = less(&filter.observed, &filter.right);
    let all: RefCell<Vec<Strength>> = RefCell::default();
    diagnosis::list(&context, watch, &|fault, predicted| {
        let size = apart(&exact, predicted);
        let direction = filter.direction(&context, predicted);
        if let Some(amplitude) = filter.amplitude(fault.name, &direction).filter(|_| size > 0.0) {
            let by_tolerance = gap
                .iter()
                .zip(&direction)
                .map(|(g, d)| part_to_one(g, d))
                .fold(f64::INFINITY, f64::min);
            let (by_filter, chance) = (DEVIATIONS * amplitude.deviation, amplitude.deviations());
            all.borrow_mut().push(Strength {
                fault: fault.name,
                size,
                by_tolerance,
                by_filter,
                chance,
            });
        }
        Ok(())
    })?;
    Ok(all.into_inner())
}

/// |F - R| / |R| over all gradients.
fn apart(right: &Evidence, faulty: &Evidence) -> f64 {
    let (mut gap, mut all) = (0.0, 0.0);
    for (name, r) in &right.gradients {
        let norm = frobenius(&r.view());
        all += norm * norm;
        gap += match faulty.gradients.get(name).filter(|f| f.dim() == r.dim()) {
            Some(f) => frobenius(&(f - r).view()).powi(2),
            None => 0.0,
        };
    }
    if all > 0.0 { (gap / all).sqrt() } else { 0.0 }
}

/// The smallest a >= 0 with |g + a d| >= 1.
fn part_to_one(g: &[f64], d: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let (square, along, room) = (dot(d, d), dot(g, d), 1.0 - dot(g, g));
    match () {
        () if room <= 0.0 => 0.0,
        () if square <= 0.0 => f64::INFINITY,
        () => ((along * along + square * room).sqrt() - along) / square,
    }
}

fn less(a: &Scaled, b: &Scaled) -> Scaled {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(x, y)| x - y).collect()).collect()
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

fn inner(a: &Scaled, b: &Scaled) -> f64 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(x, y)| x * y).sum()
}

/// What the trainer computed, as evidence.
fn observed(context: &Context<'_>) -> Evidence {
    let trainer = &context.case.trainer;
    Evidence {
        loss: 0.0,
        logits: trainer.logits.as_ref().map(|o| o.values.clone()),
        hidden: trainer.hidden.iter().map(|(layer, o)| (*layer, o.values.clone())).collect(),
        gradients: trainer
            .gradients
            .iter()
            .map(|(name, o)| (name.clone(), o.values.clone()))
            .collect(),
    }
}

/// Every measured tensor in units of its tolerance.
fn scaled(context: &Context<'_>, evidence: &Evidence) -> Scaled {
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
            let values =
                if name == RungName::Gradients { values } else { select_rows(&values, &rows) };
            all.push(values.iter().map(|x| x / unit).collect());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_of_a_fault_that_reaches_a_tolerance() {
        assert!((part_to_one(&[0.0, 0.0], &[3.0, 4.0]) - 0.2).abs() < 1e-15);
        // Towards the fault less is needed, away from it more.
        assert!((part_to_one(&[0.5, 0.0], &[1.0, 0.0]) - 0.5).abs() < 1e-15);
        assert!((part_to_one(&[-0.5, 0.0], &[1.0, 0.0]) - 1.5).abs() < 1e-15);
        let (g, d) = ([0.3, -0.2, 0.1], [0.2, 0.7, -0.4]);
        let a = part_to_one(&g, &d);
        let reached: f64 = g.iter().zip(&d).map(|(g, d)| (g + a * d).powi(2)).sum();
        assert!((reached - 1.0).abs() < 1e-12);
        assert!(part_to_one(&[1.5], &[0.1]).abs() < f64::MIN_POSITIVE, "outside already");
        assert!(part_to_one(&[0.5], &[0.0]).is_infinite());
    }
}
