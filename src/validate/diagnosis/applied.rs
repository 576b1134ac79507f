//! The rung between backward and optimizer: what the optimizer saw is what backward left, unscaled,
//! times one clipping factor or clipped by value, and nothing else.

use super::{Diagnosis, Fault};
use crate::linalg::norms::frobenius;
use crate::validate::dump::Case;
use crate::validate::ladder::{Outcome, Rung, RungName};
use crate::validate::measure::{dot, floor, measure};
use crate::validate::precision::Precision;
use crate::validate::update::group_of;
use ndarray::Array2;
use std::borrow::Cow;

/// What happened between the two.
struct Between {
    /// Norm of all gradients as backward left them, unscaled.
    left: f64,
    /// Norm of all gradients as the optimizer saw them.
    seen: f64,
    /// The common factor.
    factor: f64,
    /// Bound of single entries, where that explains it better.
    bound: Option<f64>,
}

/// Name, gradient of backward, what the optimizer saw and its format.
type Pair<'a> = (&'a String, &'a Array2<f64>, Cow<'a, Array2<f64>>, Precision);

/// Both gradients of every parameter that the optimizer holds; one that is not dumped apart was
/// seen as backward left it, the loss scale included.
fn pairs(case: &Case) -> Vec<Pair<'_>> {
    let trainer = &case.trainer;
    let held =
        |name: &str| case.optimizer.as_ref().is_none_or(|record| group_of(record, name).is_some());
    let mut all: Vec<Pair<'_>> = Vec::new();
    for (name, left) in &trainer.gradients {
        match trainer.applied.get(name) {
            Some(seen) if seen.values.dim() == left.values.dim() => {
                all.push((name, &left.values, Cow::Borrowed(&seen.values), seen.precision));
            }
            None if held(name) && left.values.iter().any(|x| x.abs() > 0.0) => {
                all.push((
                    name,
                    &left.values,
                    Cow::Owned(&left.values * case.loss.scale),
                    left.precision,
                ));
            }
            _ => {}
        }
    }
    all
}

fn between(case: &Case) -> Option<Between> {
    let pairs = pairs(case);
    let sum = |f: &dyn Fn(&Array2<f64>, &Array2<f64>) -> f64| -> f64 {
        pairs.iter().map(|p| f(p.1, &p.2)).sum()
    };
    let (left, seen, along) =
        (sum(&|g, _| dot(g, g)), sum(&|_, a| dot(a, a)), sum(&|g, a| dot(g, a)));
    if !(left > 0.0) || !left.is_finite() || !seen.is_finite() {
        return None;
    }
    let bound = pairs.iter().flat_map(|p| p.2.iter()).fold(0.0f64, |m, x| m.max(x.abs()));
    let at_bound = |x: f64| x.abs() >= bound * (1.0 - 1e-6);
    let many = pairs.iter().flat_map(|p| p.2.iter()).filter(|x| at_bound(**x)).count() > 1;
    // A factor first, perhaps, then the bound: what is below it shows the factor.
    let below = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        pairs
            .iter()
            .flat_map(|p| p.1.iter().zip(p.2.iter()))
            .filter(|(_, a)| !at_bound(**a))
            .map(|(g, a)| f(*g, *a))
            .sum()
    };
    let inside = below(&|g, _| g * g);
    let before_bound = if inside > 0.0 { below(&|g, a| g * a) / inside } else { 1.0 };
    let clipped = |g: &Array2<f64>| g.mapv(|x| (before_bound * x).clamp(-bound, bound));
    let by_value = sum(&|g, a| frobenius(&(&clipped(g) - a).view()).powi(2));
    let factor = along / left;
    let by_norm = sum(&|g, a| frobenius(&(&(g * factor) - a).view()).powi(2));
    let bound =
        (many && bound > 0.0 && by_value < by_norm && before_bound > 0.0 && before_bound < 1.001)
            .then_some(bound);
    let factor = if bound.is_some() { before_bound } else { factor };
    Some(Between { left: left.sqrt(), seen: seen.sqrt(), factor, bound })
}

/// Whether a norm looks like a setting: one or two digits.
fn is_setting(x: f64) -> bool {
    if !(x > 0.0) || !x.is_finite() {
        return false;
    }
    let lead = x / 10f64.powf(x.log10().floor());
    [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.5, 8.0, 10.0]
        .iter()
        .any(|s| (lead / s - 1.0).abs() < 2e-3)
}

/// The rung.
pub(in crate::validate) fn rung(case: &Case) -> Rung {
    let name = RungName::Applied;
    if case.trainer.applied.is_empty() {
        let scale = case.loss.scale;
        let seen = "the optimizer saw the gradients as backward left them";
        return Rung::skipped(
            name,
            if (scale - 1.0).abs() < 1e-9 {
                seen.to_string()
            } else {
                format!(
                    "{seen}, loss scale {scale} included: unscale them before the step (AdamW \
                     hides it)"
                )
            },
        );
    }
    let Some(between) = between(case) else {
        return Rung::skipped(name, "nothing to compare with the gradients of backward");
    };
    let mut tensors = Vec::new();
    for (name, left, seen, format) in pairs(case) {
        let expected = match between.bound {
            Some(bound) => left.mapv(|x| (between.factor * x).clamp(-bound, bound)),
            None => left * between.factor,
        };
        let mut rounded = expected.clone();
        format.round_array(&mut rounded);
        let unit = floor(format).max(2e-5);
        let scale = between.seen.max(f64::MIN_POSITIVE);
        tensors.push(measure(name, &seen, &expected, &rounded, unit, scale));
    }
    let mut rung = Rung::of(name, tensors);
    if !rung.failed() {
        match suspicion(case, &between) {
            Some(fault) => {
                rung.outcome = Outcome::Fail;
                rung.problems.push(fault.what);
            }
            None => rung.problems.push(match between.bound {
                Some(bound) if between.factor > 0.999 => {
                    format!("entries are clipped at {bound:.4e}")
                }
                Some(bound) => {
                    format!(
                        "all are {:.4e} times those of backward, then clipped at {bound:.4e}",
                        between.factor
                    )
                }
                None => format!(
                    "all are {:.4e} times those of backward: norm {:.4e}, clipped to {:.4e}",
                    between.factor, between.left, between.seen
                ),
            }),
        }
    }
    rung
}

/// What a common factor says that is not clipping.
fn suspicion(case: &Case, between: &Between) -> Option<Fault> {
    let (scale, c) = (case.loss.scale, between.factor);
    let near = |x: f64| (c / x - 1.0).abs() < 1e-3;
    let scaled = (scale - 1.0).abs() > 1e-9;
    if between.bound.is_some() {
        return None;
    }
    if c <= 0.0 {
        let what = format!(
            "the optimizer saw the gradients times {c:.4e}: zeros, or another sign than backward's"
        );
        return Some(Fault::new(
            "applied-not-gradient",
            what,
            "step with the gradients of backward, unscaled and clipped",
        ));
    }
    if scaled && near(scale) {
        let what = format!(
            "the optimizer saw gradients that still carry the loss scale {scale:e}: they were \
             never unscaled"
        );
        return Some(Fault::new(
            "never-unscaled",
            what,
            "step through the scaler: scaler.step(optimizer)",
        ));
    }
    let log = c.log2();
    let power = (log - log.round()).abs() < 1e-4 && log < -5.5 && !is_setting(between.seen);
    if (scaled && near(1.0 / scale)) || (!scaled && power) {
        let what = format!(
            "the optimizer saw {c:.4e} (2^{:.0}) times the gradients of backward: they were \
             divided by a loss scale that they do not carry",
            log.round()
        );
        return Some(Fault::new(
            "unscaled-twice",
            what,
            "unscale once, and only if the loss was scaled",
        ));
    }
    if scaled && c < 0.999 && is_setting(between.seen * scale) && !is_setting(between.seen) {
        let what = format!(
            "gradients were clipped to norm {:.4e} while they carried the loss scale {scale:e}, \
             then unscaled: the optimizer saw a norm of {:.4e}",
            between.seen * scale,
            between.seen
        );
        return Some(Fault::new(
            "clip-before-unscale",
            what,
            "call scaler.unscale_(optimizer) before clipping",
        ));
    }
    if c > 1.001 {
        let what = format!(
            "the optimizer saw {c:.4e} times the gradients of backward; clipping only shortens"
        );
        return Some(Fault::new(
            "applied-not-gradient",
            what,
            "step with the gradients of backward, unscaled and clipped",
        ));
    }
    None
}

/// What happened to the gradients, where the rung failed.
pub(in crate::validate) fn explain(case: &Case, rung: &Rung) -> Vec<Diagnosis> {
    let Some(between) = between(case) else { return Vec::new() };
    let wrong = rung.tensors.iter().filter(|m| !m.passes()).count();
    let fault = if wrong == 0 { suspicion(case, &between) } else { None };
    let fault = fault.unwrap_or_else(|| {
        let what = format!(
            "the optimizer did not see the gradients of backward: {wrong} of {} tensors changed by \
             more than one common factor (norm {:.4e} before, {:.4e} after)",
            rung.tensors.len(),
            between.left,
            between.seen
        );
        let fix = "between backward and optimizer only unscaling and clipping may change \
                   gradients; look for hooks, noise, compression, or another tensor in p.grad";
        Fault::new("applied-not-gradient", what, fix)
    });
    vec![Diagnosis {
        fault: fault.name.into(),
        what: fault.what,
        fix: fault.fix.into(),
        explains: vec![RungName::Applied],
        complete: true,
        tensors: (rung.tensors.len(), rung.tensors.len()),
        share: 0.0,
    }]
}
