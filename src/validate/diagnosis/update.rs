//! Faults of the optimizer step, given the gradient that it saw.

use super::{Diagnosis, Fault, LEFT_OVER};
use crate::train::optimizer::{OptimizerKind, OptimizerParams};
use crate::validate::dump::Case;
use crate::validate::ladder::Rung;
use crate::validate::measure::{Measure, dot};
use crate::validate::precision::Precision;
use crate::validate::update::{before, change, group_of, measure_change, slack, stored_in_format};
use ndarray::{Array2, Zip};

/// Moments after a step: first, second, number of steps.
type Moments = (Array2<f64>, Array2<f64>, i32);
/// A rule for the change of one parameter: from its settings, name, values and gradient.
type Rule<'a> =
    &'a dyn Fn(OptimizerParams, &str, &Array2<f64>, &Array2<f64>) -> Option<Array2<f64>>;

/// AdamW's moments after the step.
fn moments(case: &Case, p: OptimizerParams, name: &str, g: &Array2<f64>) -> Option<Moments> {
    let record = case.optimizer.as_ref()?;
    if p.kind != OptimizerKind::AdamW {
        return None;
    }
    let zero = || Array2::zeros(g.dim());
    let (m, v, before) = match (case.trainer.first.get(name), case.trainer.second.get(name)) {
        (Some(m), Some(v)) if m.values.dim() == g.dim() && v.values.dim() == g.dim() => {
            (m.values.clone(), v.values.clone(), record.steps_before)
        }
        _ => (zero(), zero(), 0),
    };
    let steps = i32::try_from(before + 1).ok()?;
    Some((m * p.beta1 + g * (1.0 - p.beta1), v * p.beta2 + &(g * g) * (1.0 - p.beta2), steps))
}

/// The fault that explains every parameter that changed wrongly.
pub(super) fn explain(case: &Case, rung: &Rung) -> Vec<Diagnosis> {
    let Some(record) = &case.optimizer else { return Vec::new() };
    let failing: Vec<&Measure> = rung.tensors.iter().filter(|m| !m.passes()).collect();
    let before = before(case);
    let diagnosis = |fault: Fault, explained: usize, share: f64| Diagnosis {
        fault: fault.name.into(),
        what: fault.what,
        fix: fault.fix.into(),
        explains: vec![rung.name],
        complete: explained >= failing.len(),
        tensors: (explained, failing.len()),
        share,
    };
    let values = |name: &str| {
        let gradient =
            case.trainer.applied.get(name).or_else(|| case.trainer.gradients.get(name))?;
        let params = record.params(group_of(record, name)?).ok()?;
        Some((params, before.get(name)?, gradient, case.trainer.after.get(name)?))
    };
    let bad = |m: &&&Measure| {
        case.trainer.after.get(&m.name).is_some_and(|o| o.values.iter().any(|x| !x.is_finite()))
    };
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
                "AdamW's eps is zero in float16: entries with a zero second moment become NaN or \
                 infinite",
                "keep parameters or moments in float32, or raise eps above 6e-8",
            )
        } else {
            (
                "parameters are NaN or infinite after the step",
                "check the optimizer's state and learning rate",
            )
        };
        return vec![diagnosis(Fault::new("update-not-finite", what, fix), not_finite, 0.0)];
    }
    let still = |m: &&&Measure| {
        let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits();
        values(&m.name)
            .is_some_and(|(_, before, _, after)| before.iter().zip(&after.values).all(same))
    };
    let mut dropped: Vec<&str> = failing.iter().filter(still).map(|m| m.name.as_str()).collect();
    let measured = dropped.len();
    let in_no_group = |name: &&String| group_of(record, name).is_none();
    dropped.extend(case.trained.iter().filter(in_no_group).map(String::as_str));
    if !dropped.is_empty() {
        let what = format!(
            "{} parameters do not change at all, {} for instance",
            dropped.len(),
            dropped[0]
        );
        let fix = "the optimizer holds other tensors than the model (built before wrapping or \
                   casting, or groups that leave some out), or the update is lost";
        let found = diagnosis(Fault::new("update-dropped", what, fix), measured, 0.0);
        if found.complete {
            return vec![found];
        }
        let mut all =
            best_rule(case, rung, &failing, &values, &diagnosis).into_iter().collect::<Vec<_>>();
        all.push(found);
        return all;
    }
    best_rule(case, rung, &failing, &values, &diagnosis).into_iter().collect()
}

type Values<'a> = (
    OptimizerParams,
    &'a Array2<f64>,
    &'a crate::validate::dump::Observed,
    &'a crate::validate::dump::Observed,
);

/// The wrong rule that comes nearest to what was stored, if it explains all and the right one
/// leaves clearly more.
fn best_rule<'a>(
    case: &'a Case,
    rung: &Rung,
    failing: &[&Measure],
    values: &dyn Fn(&str) -> Option<Values<'a>>,
    diagnosis: &dyn Fn(Fault, usize, f64) -> Diagnosis,
) -> Option<Diagnosis> {
    let record = case.optimizer.as_ref()?;
    let run = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        change(case, record, p, name, x, g).ok()
    };
    let undecayed = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        run(OptimizerParams { weight_decay: 0.0, ..p }, name, x, g)
    };
    let coupled = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        let decayed = g + &(x * p.weight_decay);
        run(OptimizerParams { weight_decay: 0.0, ..p }, name, x, &decayed)
    };
    let after_update = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        let step = undecayed(p, name, x, g)?;
        Some(&step - &((x + &step) * (p.lr * p.weight_decay)))
    };
    // One factor of the decay, fitted over all tensors.
    let (mut along, mut square) = (0.0, 0.0);
    for m in &rung.tensors {
        if let Some((p, x, g, after)) = values(&m.name)
            && g.values.dim() == x.dim()
            && after.values.dim() == x.dim()
            && let Some(step) = undecayed(p, &m.name, x, &g.values)
        {
            along -= dot(&(&after.values - x - &step), x);
            square += dot(x, x);
        }
    }
    let decay = if square > 0.0 { along / square } else { 0.0 };
    let factor = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        Some(undecayed(p, name, x, g)? - x * decay)
    };
    let adam = |p: OptimizerParams,
                name: &str,
                x: &Array2<f64>,
                g: &Array2<f64>,
                rule: &dyn Fn(f64, f64, f64, f64) -> f64| {
        let (m, v, t) = moments(case, p, name, g)?;
        let (c1, c2) = (1.0 - p.beta1.powi(t), 1.0 - p.beta2.powi(t));
        let step = Zip::from(&m).and(&v).map_collect(|m, v| rule(*m, *v, c1, c2));
        Some(step * -p.lr - x * (p.lr * p.weight_decay))
    };
    let uncorrected = |p: OptimizerParams, n: &str, x: &Array2<f64>, g: &Array2<f64>| {
        adam(p, n, x, g, &|m, v, _, _| m / (v.sqrt() + p.eps))
    };
    let first_uncorrected = |p: OptimizerParams, n: &str, x: &Array2<f64>, g: &Array2<f64>| {
        adam(p, n, x, g, &|m, v, _, c2| m / ((v / c2).sqrt() + p.eps))
    };
    let second_uncorrected = |p: OptimizerParams, n: &str, x: &Array2<f64>, g: &Array2<f64>| {
        adam(p, n, x, g, &|m, v, c1, _| m / c1 / (v.sqrt() + p.eps))
    };
    let eps_inside = |p: OptimizerParams, n: &str, x: &Array2<f64>, g: &Array2<f64>| {
        adam(p, n, x, g, &|m, v, c1, c2| m / c1 / (v / c2 + p.eps).sqrt())
    };
    let eps_inside_early = |p: OptimizerParams, n: &str, x: &Array2<f64>, g: &Array2<f64>| {
        adam(p, n, x, g, &|m, v, c1, c2| m / c1 / ((v + p.eps) / c2).sqrt())
    };
    let eps_early = |p: OptimizerParams, n: &str, x: &Array2<f64>, g: &Array2<f64>| {
        adam(p, n, x, g, &|m, v, c1, c2| m / c1 / ((v.sqrt() + p.eps) / c2.sqrt()))
    };
    let unclipped = |p: OptimizerParams, name: &str, x: &Array2<f64>, _: &Array2<f64>| {
        case.trainer.applied.get(name)?;
        run(p, name, x, &case.trainer.gradients.get(name)?.values)
    };
    let scaled = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        run(p, name, x, &(g * case.loss.scale))
    };
    let climbing =
        |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| run(p, name, x, &-g);
    let step_flipped = |p: OptimizerParams, name: &str, x: &Array2<f64>, g: &Array2<f64>| {
        Some(-undecayed(p, name, x, g)? - x * (p.lr * p.weight_decay))
    };
    let wd = record.groups.first().map_or(0.0, |g| g.lr * g.weight_decay);
    let decay_text = format!(
        "the decay multiplies the parameters by 1 - {decay:.4e} instead of 1 - lr wd = 1 - {wd:.4e}"
    );
    let correct = "divide them by 1 - beta^t, t = 1 at the first step";
    let place = "p <- p - lr m^ / (sqrt(v^) + eps), m^ and v^ corrected for their start";
    let rules: [(&'static str, &str, &'static str, Rule<'_>); 14] = [
        (
            "weight-decay-coupled",
            "weight decay is added to the gradient (Adam with L2) instead of to the parameter \
             (AdamW)",
            "decouple it: p <- p - lr wd p",
            &coupled,
        ),
        (
            "weight-decay-missing",
            "the parameters are not decayed",
            "apply p <- p - lr wd p",
            &undecayed,
        ),
        (
            "weight-decay-order",
            "the parameters are decayed after the update instead of before it",
            "p <- p (1 - lr wd), then the update",
            &after_update,
        ),
        (
            "bias-correction",
            "the moments are not corrected for their start at zero",
            correct,
            &uncorrected,
        ),
        (
            "bias-correction",
            "the first moment is not corrected for its start at zero",
            correct,
            &first_uncorrected,
        ),
        (
            "bias-correction",
            "the second moment is not corrected for its start at zero",
            correct,
            &second_uncorrected,
        ),
        ("eps-placement", "eps stands inside the square root", place, &eps_inside),
        (
            "eps-placement",
            "eps stands inside the square root, before the correction",
            place,
            &eps_inside_early,
        ),
        ("eps-placement", "eps is added before the second moment is corrected", place, &eps_early),
        (
            "never-unscaled",
            "the update uses gradients that still carry the loss scale",
            "step through the scaler",
            &scaled,
        ),
        (
            "clipping-lost",
            "the update uses the gradient before clipping or unscaling",
            "step after them",
            &unclipped,
        ),
        ("update-sign", "the update climbs: its sign is flipped", "subtract the step", &climbing),
        ("update-sign", "the update climbs: the step is added", "subtract the step", &step_flipped),
        ("weight-decay-factor", &decay_text, "p <- p - lr wd p", &factor),
    ];
    let before_it =
        |name: &str| rung.tensors.iter().find(|m| m.name == name).map_or(0.0, |m| m.share);
    // Largest share under a rule, over all tensors; and over those that failed.
    let judge = |rule: Rule<'_>| {
        let mut most = 0.0f64;
        let (mut left, mut gap) = (0.0, 0.0);
        for m in &rung.tensors {
            let (p, x, gradient, after) = values(&m.name)?;
            if gradient.values.dim() != x.dim() {
                return None;
            }
            let expected = rule(p, &m.name, x, &gradient.values)?;
            let mut share =
                measure_change(&m.name, x, &after.values, &expected, after.precision).share;
            if share > 1.0 {
                let slack = slack(
                    &expected,
                    x,
                    OptimizerParams { weight_decay: 0.0, ..p },
                    after.precision,
                );
                let stored =
                    stored_in_format(x, &after.values, &expected, &slack, after.precision, true);
                share = stored.map_or(share, |s| s.farthest.min(1.0));
            }
            most = most.max(share);
            left += share * share;
            gap += before_it(&m.name).powi(2);
        }
        (most <= 1.0 && left <= LEFT_OVER * LEFT_OVER * gap).then_some(most)
    };
    let mut best: Option<(f64, Fault)> = None;
    for (name, what, fix, rule) in rules {
        if let Some(share) = judge(rule)
            // A later rule has to be clearly better: the fitted one always comes near.
            && best.as_ref().is_none_or(|b| share < 0.5 * b.0)
        {
            best = Some((share, Fault::new(name, what, fix)));
        }
    }
    best.map(|(share, fault)| diagnosis(fault, failing.len(), share))
}
