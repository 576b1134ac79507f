//! The last rung: parameters after the step, from the gradient that the trainer's optimizer saw.
//!
//! Using the trainer's own gradient keeps the rungs apart: AdamW's first step is lr times the sign
//! of the gradient, so a tiny gap in an entry near zero would otherwise become a whole step.

use super::dump::Case;
use super::ladder::{Outcome, Rung, RungName};
use super::manifest::{OptimizerRecord, ParameterGroup};
use super::measure::{Measure, floor, measure};
use super::names::canonical_name;
use super::precision::Precision;
use crate::error::Result;
use crate::train::optimizer::{Optimizer, OptimizerParams};
use ndarray::Array2;

/// The group of a parameter.
pub(super) fn group_of<'a>(record: &'a OptimizerRecord, name: &str) -> Option<&'a ParameterGroup> {
    // Experts stand in one parameter of the trainer.
    let parts: Vec<&str> = name.split('.').collect();
    let expert = parts.iter().position(|part| *part == "experts").filter(|i| i + 2 < parts.len());
    let stack = expert.map(|i| match parts.last() {
        Some(&"weight") => [&parts[..=i], &parts[i + 2..i + 3]].concat().join("."),
        Some(&"bias") => {
            format!("{}_bias", [&parts[..=i], &parts[i + 2..i + 3]].concat().join("."))
        }
        _ => [&parts[..=i], &parts[i + 3..]].concat().join("."),
    });
    let is = |raw: &String| {
        let raw = canonical_name(raw);
        raw == name || Some(&raw) == stack.as_ref()
    };
    let named = |g: &&ParameterGroup| g.parameters.iter().any(is);
    record
        .groups
        .iter()
        .find(named)
        .or_else(|| record.groups.iter().find(|g| g.parameters.is_empty()))
}

/// The change of one parameter by one update with `params` and `gradient`, moments as dumped.
pub(super) fn change(
    case: &Case,
    record: &OptimizerRecord,
    params: OptimizerParams,
    name: &str,
    before: &Array2<f64>,
    gradient: &Array2<f64>,
) -> Result<Array2<f64>> {
    let lr = params.lr;
    if lr.abs() < f64::MIN_POSITIVE {
        return Ok(Array2::zeros(before.dim()));
    }
    let mut optimizer: Optimizer<f64> = params.check()?;
    let moments = |part: &str, from: &std::collections::BTreeMap<String, super::dump::Observed>| {
        from.get(name)
            .map(|o| (format!("{part}.{name}"), o.values.iter().copied().collect::<Vec<f64>>()))
    };
    let kept = params.state_per_parameter();
    let state = [moments("first", &case.trainer.first), moments("second", &case.trainer.second)];
    let state: Vec<_> = state.into_iter().take(kept).flatten().collect();
    if state.len() == kept && kept > 0 {
        optimizer.restore(record.steps_before, state)?;
    }
    optimizer.begin_step();
    let mut values: Vec<f64> = before.iter().copied().collect();
    let gradient: Vec<f64> = gradient.iter().copied().collect();
    let ascends = group_of(record, name).is_some_and(|group| group.maximize);
    optimizer.update(name, &mut values, &gradient, lr, if ascends { -1.0 } else { 1.0 })?;
    let after = Array2::from_shape_vec(before.dim(), values).unwrap_or_else(|_| before.clone());
    Ok(after - before)
}

/// Parameters before the step, by name.
pub(super) fn before(case: &Case) -> std::collections::BTreeMap<String, Array2<f64>> {
    case.model.trainable_values().into_iter().collect()
}

/// The expected change of a parameter and that after rounding the result to its format.
pub(super) fn measure_change(
    name: &str,
    before: &Array2<f64>,
    after: &Array2<f64>,
    expected: &Array2<f64>,
    precision: Precision,
) -> Measure {
    let mut stored = before + expected;
    precision.round_array(&mut stored);
    let mut start = before.clone();
    precision.round_array(&mut start);
    let scale = crate::linalg::norms::frobenius(&before.view()).max(f64::MIN_POSITIVE);
    // Arithmetic in single precision leaves a few units of the parameter, whatever the size of the
    // change.
    let size = crate::linalg::norms::frobenius(&expected.view());
    let unit = precision.epsilon().max(Precision::F32.epsilon().min(floor(precision)));
    let own = if size > 0.0 { scale / size } else { 1.0 };
    let floor = floor(precision).max(2.0 * unit * own).max(if precision == Precision::F64 {
        1e-9
    } else {
        2e-5
    });
    measure(name, &(after - &start), expected, &(stored - &start), floor, scale)
}

/// How far a stored parameter is from the exact result of the update, where the format rounds most
/// of it away.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    /// Distance of the farthest entry from the exact result, in units in the last place.
    pub farthest: f64,
    /// What of the update, along itself, arrived.
    pub kept: f64,
    /// Whether every entry is the nearest number, not only one of the two neighbours.
    pub nearest: bool,
}

/// Numbers of the format on both sides of x.
fn neighbours(precision: Precision, x: f64) -> (f64, f64) {
    if x.abs() < f64::MIN_POSITIVE || !x.is_finite() {
        return (x, x);
    }
    let unit = ulp(precision, x);
    ((x / unit).floor() * unit, (x / unit).ceil() * unit)
}

/// Distance between neighbouring numbers of the format at x.
fn ulp(precision: Precision, x: f64) -> f64 {
    let exponent = x.abs().max(f64::MIN_POSITIVE).log2().floor();
    (exponent.exp2() * precision.epsilon()).max(precision.smallest())
}

/// Whether `after` is the exact result in the parameter's own format: rounded to nearest, or up and
/// down by chance (stochastic rounding, a compensating buffer), where the mean of the update must
/// arrive.
///
/// `slack` is what the optimizer's own arithmetic may be off, entry by entry. After the `first`
/// update a compensating buffer holds what earlier ones lost, up to half a unit each, and gives it
/// back.
pub(super) fn stored_in_format(
    before: &Array2<f64>,
    after: &Array2<f64>,
    expected: &Array2<f64>,
    slack: &Array2<f64>,
    precision: Precision,
    first: bool,
) -> Option<Stored> {
    if precision == Precision::F64 || after.dim() != before.dim() || expected.dim() != before.dim()
    {
        return None;
    }
    let (mut farthest, mut beyond, mut moved, mut should_move) = (0.0f64, 0usize, 0usize, 0usize);
    let (mut arrived, mut wanted, mut spread, mut allowed) = (0.0, 0.0, 0.0, 0.0);
    let (mut plain, mut whole) = (0.0, 0.0);
    for (((&b, &a), &e), &s) in before.iter().zip(after).zip(expected).zip(slack) {
        let target = b + e;
        let (low, high) = (target - s, target + s);
        let unit = ulp(precision, target.abs().max(b.abs()));
        if !a.is_finite() {
            return None;
        }
        let nearest = precision.round(low) <= a && a <= precision.round(high);
        // What earlier updates lost may come back in either direction.
        let repaid = if first { 0.0 } else { unit };
        let within = neighbours(precision, low).0.min(low - repaid) <= a
            && a <= neighbours(precision, high).1.max(high + repaid);
        if !within {
            return None;
        }
        beyond += usize::from(!nearest);
        moved += usize::from((a - b).abs() > 0.0);
        should_move += usize::from((precision.round(target) - b).abs() > 0.0);
        farthest = farthest.max(((a - high).max(low - a) / unit).max(0.0));
        plain += (a - b) * e;
        whole += e * e;
        let weight = e / (unit * unit);
        let part = (e.abs() / unit).fract();
        arrived += (a - b) * weight;
        wanted += e * weight;
        allowed += s * weight.abs();
        spread += weight * weight * unit * unit * part * (1.0 - part);
    }
    let nearest = beyond <= before.len() / 500;
    // By chance or not, the mean must arrive: otherwise the update is another one.
    let arrives = (arrived - wanted).abs() <= 5.0 * spread.sqrt() + allowed + 1e-12;
    let kept = if whole > 0.0 { plain / whole } else { 1.0 };
    let repaid = !first && 2 * moved >= should_move;
    (nearest || arrives || repaid).then_some(Stored { farthest, kept, nearest })
}

/// What the arithmetic of an optimizer in the parameter's format may be off: moments and their
/// quotient are rounded, and decay is applied by itself.
pub(super) fn slack(
    expected: &Array2<f64>,
    before: &Array2<f64>,
    params: OptimizerParams,
    precision: Precision,
) -> Array2<f64> {
    let decay = params.lr * params.weight_decay;
    let decayed = decay.abs() > 0.0;
    ndarray::Zip::from(expected).and(before).map_collect(|e, b| {
        if precision.epsilon() > 1e-4 {
            return 0.03 * e.abs() + decay * b.abs();
        }
        // Decay rounds the parameter once more.
        1e-5 * e.abs() + if decayed { ulp(precision, *b) } else { 0.0 }
    })
}

/// The rung.
pub(super) fn rung(case: &Case) -> Rung {
    let name = RungName::Update;
    if case.trainer.after.is_empty() {
        return Rung::skipped(name, "the dump holds no parameters after a step");
    }
    let Some(record) = &case.optimizer else {
        return Rung::skipped(name, "the dump does not say which optimizer made the step");
    };
    let before = before(case);
    let (mut arrived, mut whole, mut all_nearest, mut format) = (0.0, 0.0, true, Precision::F64);
    let mut rung = Rung { name, outcome: Outcome::Pass, problems: Vec::new(), tensors: Vec::new() };
    for parameter in &case.trained {
        let (Some(before), Some(after)) =
            (before.get(parameter), case.trainer.after.get(parameter))
        else {
            continue;
        };
        let Some(group) = group_of(record, parameter) else {
            rung.problems
                .push(format!("{parameter}: no optimizer group holds it, so it never changes"));
            continue;
        };
        let params = match record.params(group) {
            Ok(params) => params,
            Err(why) => return Rung::skipped(name, why),
        };
        let gradient =
            case.trainer.applied.get(parameter).or_else(|| case.trainer.gradients.get(parameter));
        // Parameters without a gradient are left alone, decay included.
        let expected = match gradient {
            Some(g) if g.values.dim() != before.dim() => continue,
            Some(g) => change(case, record, params, parameter, before, &g.values),
            None => Ok(Array2::zeros(before.dim())),
        };
        match expected {
            Ok(expected) if after.values.dim() == before.dim() => {
                let mut measure =
                    measure_change(parameter, before, &after.values, &expected, after.precision);
                let slack = slack(&expected, before, params, after.precision);
                let first = record.steps_before == 0;
                let stored = stored_in_format(
                    before,
                    &after.values,
                    &expected,
                    &slack,
                    after.precision,
                    first,
                );
                if let Some(stored) = stored {
                    let size = crate::linalg::norms::frobenius(&expected.view()).powi(2);
                    arrived += stored.kept * size;
                    whole += size;
                    all_nearest &= stored.nearest;
                    if !measure.passes() {
                        measure.share = measure.share.min(stored.farthest.min(1.0));
                    }
                    format = after.precision;
                }
                rung.tensors.push(measure);
            }
            Ok(_) => rung.problems.push(format!("{parameter}: another shape after the step")),
            Err(error) => rung.problems.push(format!("{parameter}: {error}")),
        }
    }
    if !rung.problems.is_empty() || rung.tensors.iter().any(|m| !m.passes()) {
        rung.outcome = Outcome::Fail;
    } else if whole > 0.0 && arrived < 0.9 * whole && all_nearest {
        rung.problems.push(format!(
            "{} keeps {:.0}% of this update: the rest is lost to rounding, being less than half a \
             unit in the last place (parameters in float32, stochastic rounding or a larger \
             learning rate keep it)",
            format.name(),
            (100.0 * arrived / whole).max(0.0)
        ));
    } else if whole > 0.0 && !all_nearest {
        rung.problems.push(format!(
            "{} parameters are rounded up and down by chance, or with a compensating buffer: each \
             is within one unit in the last place and the mean of the update arrives",
            format.name()
        ));
    }
    rung
}
