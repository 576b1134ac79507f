//! The last rung: parameters after the step, from the gradient that the trainer's optimizer saw.
//!
//! Using the trainer's own gradient keeps the rungs apart: AdamW's first step is lr times the sign of the gradient,
//! so a tiny gap in an entry near zero would otherwise become a whole step.

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
    let named = |g: &&ParameterGroup| g.parameters.iter().any(|p| canonical_name(p) == name);
    record.groups.iter().find(named).or_else(|| record.groups.iter().find(|g| g.parameters.is_empty()))
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
        from.get(name).map(|o| (format!("{part}.{name}"), o.values.iter().copied().collect::<Vec<f64>>()))
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
    optimizer.update(name, &mut values, &gradient, lr, 1.0)?;
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
    // Arithmetic in single precision leaves a few units of the parameter, whatever the size of the change.
    let size = crate::linalg::norms::frobenius(&expected.view());
    let unit = precision.epsilon().max(Precision::F32.epsilon().min(floor(precision)));
    let own = if size > 0.0 { scale / size } else { 1.0 };
    let floor = floor(precision).max(2.0 * unit * own).max(if precision == Precision::F64 { 1e-9 } else { 2e-5 });
    measure(name, &(after - &start), expected, &(stored - &start), floor, scale)
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
    let mut rung = Rung { name, outcome: Outcome::Pass, problems: Vec::new(), tensors: Vec::new() };
    for parameter in &case.trained {
        let (Some(before), Some(after)) = (before.get(parameter), case.trainer.after.get(parameter)) else {
            continue;
        };
        let Some(group) = group_of(record, parameter) else {
            rung.problems.push(format!("{parameter}: no optimizer group holds it, so it never changes"));
            continue;
        };
        let params = match record.params(group) {
            Ok(params) => params,
            Err(why) => return Rung::skipped(name, why),
        };
        let gradient = case.trainer.applied.get(parameter).or_else(|| case.trainer.gradients.get(parameter));
        // Parameters without a gradient are left alone, decay included.
        let expected = match gradient {
            Some(g) if g.values.dim() != before.dim() => continue,
            Some(g) => change(case, record, params, parameter, before, &g.values),
            None => Ok(Array2::zeros(before.dim())),
        };
        match expected {
            Ok(expected) if after.values.dim() == before.dim() => {
                rung.tensors.push(measure_change(parameter, before, &after.values, &expected, after.precision));
            }
            Ok(_) => rung.problems.push(format!("{parameter}: another shape after the step")),
            Err(error) => rung.problems.push(format!("{parameter}: {error}")),
        }
    }
    if !rung.problems.is_empty() || rung.tensors.iter().any(|m| !m.passes()) {
        rung.outcome = Outcome::Fail;
    }
    rung
}
