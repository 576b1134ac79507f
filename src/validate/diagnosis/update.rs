//! Faults of the optimizer step, given the gradient that it saw.

use super::{Diagnosis, Fault};
use crate::train::optimizer::{OptimizerKind, OptimizerParams};
use crate::validate::dump::Case;
use crate::validate::ladder::Rung;
use crate::validate::measure::Measure;
use crate::validate::precision::Precision;
use crate::validate::update::{before, change, group_of, measure_change};
use ndarray::Array2;

/// A rule for the change of one parameter: from its settings, values and gradient.
type Rule<'a> = &'a dyn Fn(OptimizerParams, &str, &Array2<f64>, &Array2<f64>) -> Option<Array2<f64>>;

/// The fault that explains every parameter that changed wrongly.
pub(super) fn explain(case: &Case, rung: &Rung) -> Vec<Diagnosis> {
    let Some(record) = &case.optimizer else { return Vec::new() };
    let failing: Vec<&Measure> = rung.tensors.iter().filter(|m| !m.passes()).collect();
    let before = before(case);
    let mut found = Vec::new();
    let mut add = |fault: Fault, explained: usize, share: f64| {
        found.push(Diagnosis {
            fault: fault.name.into(),
            what: fault.what,
            fix: fault.fix.into(),
            explains: vec![rung.name],
            complete: explained == failing.len(),
            tensors: (explained, failing.len()),
            share,
        });
    };
    let values = |name: &str| {
        let gradient = case.trainer.applied.get(name).or_else(|| case.trainer.gradients.get(name))?;
        let params = record.params(group_of(record, name)?).ok()?;
        Some((params, before.get(name)?, gradient, case.trainer.after.get(name)?))
    };
    let bad = |m: &&&Measure| case.trainer.after.get(&m.name).is_some_and(|o| o.values.iter().any(|x| !x.is_finite()));
    let not_finite = failing.iter().filter(bad).count();
    if not_finite > 0 {
        let eps_lost = failing.iter().any(|m| {
            values(&m.name).is_some_and(|(p, _, _, after)| {
                p.kind == OptimizerKind::AdamW
                    && after.precision == Precision::F16
                    && Precision::F16.round(p.eps) < 1e-12
            })
        });
        let (what, fix) = if eps_lost {
            (
                "AdamW's eps is zero in float16: entries with a zero second moment become NaN or infinite",
                "keep parameters or moments in float32, or raise eps above 6e-8",
            )
        } else {
            ("parameters are NaN or infinite after the step", "check the optimizer's state and learning rate")
        };
        add(Fault::new("update-not-finite", what, fix), not_finite, 0.0);
        return found;
    }
    let still = |m: &&&Measure| {
        let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits();
        values(&m.name).is_some_and(|(_, before, _, after)| before.iter().zip(&after.values).all(same))
    };
    let dropped: Vec<&str> = failing.iter().filter(still).map(|m| m.name.as_str()).collect();
    if !dropped.is_empty() {
        let what = format!("{} parameters do not change at all, {} for instance", dropped.len(), dropped[0]);
        let fix = "the optimizer holds other tensors than the model (built before wrapping or casting), or the update is lost";
        add(Fault::new("update-dropped", what, fix), dropped.len(), 0.0);
    }
    let run =
        |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| change(case, record, p, name, x, g).ok();
    let coupled = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        let decayed = g + &(x * p.weight_decay);
        run(OptimizerParams { weight_decay: 0.0, ..p }, name, x, &decayed)
    };
    let no_decay = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        run(OptimizerParams { weight_decay: 0.0, ..p }, name, x, g)
    };
    let first = record.steps_before == 0;
    let uncorrected = |p: OptimizerParams, _: &str, x: &Array2<f64>, g: &Array2<f64>| {
        first.then(|| {
            let step = g.mapv(|g| (1.0 - p.beta1) * g / (((1.0 - p.beta2) * g * g).sqrt() + p.eps));
            step * -p.lr - x * (p.lr * p.weight_decay)
        })
    };
    let unclipped = |p: OptimizerParams, name: &str, x: &Array2<f64>, _: &Array2<f64>| {
        run(p, name, x, &case.trainer.gradients.get(name)?.values)
    };
    let climbing = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| run(p, name, x, &-g);
    let rules: [(&'static str, &'static str, &'static str, Rule<'_>); 5] = [
        (
            "weight-decay-coupled",
            "weight decay is added to the gradient (Adam with L2) instead of to the parameter (AdamW)",
            "decouple it: p <- p - lr wd p",
            &coupled,
        ),
        ("weight-decay-missing", "the parameters are not decayed", "apply p <- p - lr wd p", &no_decay),
        (
            "bias-correction",
            "the moments are not corrected for their start at zero",
            "divide them by 1 - beta^t, t = 1 at the first step",
            &uncorrected,
        ),
        ("clipping-lost", "the update uses the gradient before clipping or unscaling", "step after them", &unclipped),
        ("update-sign", "the update climbs: its sign is flipped", "subtract the step", &climbing),
    ];
    for (name, what, fix, rule) in rules {
        let mut most = 0.0f64;
        let explained = failing
            .iter()
            .filter(|m| {
                let share = values(&m.name).and_then(|(p, before, gradient, after)| {
                    (gradient.values.dim() == before.dim()).then_some(())?;
                    let expected = rule(p, &m.name, before, &gradient.values)?;
                    Some(measure_change(&m.name, before, &after.values, &expected, after.precision).share)
                });
                let fine = share.is_some_and(|s| s <= super::EXPLAINED);
                most = if fine { most.max(share.unwrap_or(0.0)) } else { most };
                fine
            })
            .count();
        if explained == failing.len() && explained > 0 {
            add(Fault::new(name, what, fix), explained, most);
        }
    }
    found.sort_by_key(|d: &Diagnosis| (!d.complete, usize::MAX - d.tensors.0));
    let complete = found.iter().any(|d| d.complete);
    found.retain(|d| !complete || d.complete);
    found
}
