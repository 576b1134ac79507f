//! Faults of the loss: the logits are right, what is made of them is not.

use super::{Context, Fault, Tested};
use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::error::Result;
use crate::validate::dump::Case;
use crate::validate::ladder::{Rung, RungName, climb};
use crate::validate::manifest::Reduction;
use crate::validate::objective::Objective;
use crate::validate::reference::{Evidence, Part, Rounding, Variant};
use std::ops::Range;

/// Name, sentence and fix of a fault with the (row, label) pairs that it counts.
type Counted = (&'static str, &'static str, &'static str, Vec<(usize, usize)>);

/// Faults of the loss alone: the logits are right.
pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let batch = &context.case.batch;
    let (rows, length) = batch.input_ids.dim();
    let label = |b: usize, t: usize| batch.labels[[b, t]];
    let shifted =
        |shift: usize, keep: &dyn Fn(usize, usize) -> Option<i64>| -> Vec<(usize, usize)> {
            let mut targets = Vec::new();
            for b in 0..rows {
                for t in shift..length {
                    if let Some(label) = keep(b, t).filter(|l| *l != IGNORED_LABEL && *l >= 0) {
                        targets.push((b * length + t - shift, label as usize));
                    }
                }
            }
            targets
        };
    let id = |b: usize, t: usize| i64::from(batch.input_ids[[b, t]]);
    let padding = |b: usize, t: usize| batch.attention_mask.as_ref().is_some_and(|m| !m[[b, t]]);
    let candidates: [Counted; 5] = [
        (
            "padding-counted",
            "padding is counted in the loss",
            "set its labels to -100",
            shifted(1, &|b, t| Some(if padding(b, t) { id(b, t) } else { label(b, t) })),
        ),
        (
            "padding-counted",
            "ignored positions (prompt and padding) are counted in the loss: labels of -100 are \
             not masked",
            "skip labels of -100",
            shifted(1, &|b, t| Some(id(b, t))),
        ),
        (
            "prompt-counted",
            "the masked prompt is counted in the loss",
            "keep its labels at -100",
            shifted(1, &|b, t| Some(if padding(b, t) { IGNORED_LABEL } else { id(b, t) })),
        ),
        (
            "labels-not-shifted",
            "labels are not shifted: each position predicts its own token",
            "position t predicts label t + 1",
            shifted(0, &|b, t| Some(label(b, t))),
        ),
        (
            "labels-shifted-twice",
            "labels are shifted twice: each position predicts the token after the next",
            "shift in the collator or in the model, not in both",
            shifted(2, &|b, t| Some(label(b, t))),
        ),
    ];
    let right = shifted(1, &|b, t| Some(label(b, t)));
    // Flattened first, so that rows run into each other.
    let flat: Vec<i64> = batch.labels.iter().copied().collect();
    let moved: Vec<i64> = (0..rows)
        .flat_map(|b| (0..length).map(move |t| (b, t)))
        .map(|(b, t)| if t + 1 < length { label(b, t + 1) } else { IGNORED_LABEL })
        .collect();
    let following = |labels: &[i64], by: usize| -> Vec<(usize, usize)> {
        let wanted = labels.iter().skip(by).enumerate();
        wanted.filter(|(_, l)| **l >= 0).map(|(i, l)| (i, *l as usize)).collect()
    };
    // Cut to B (T - 1) first, then flattened and shifted.
    let cut: Vec<(usize, i64)> = (0..rows)
        .flat_map(|b| (1..length).map(move |t| (b, t)))
        .map(|(b, t)| (b * length + t - 1, label(b, t)))
        .collect();
    let cut: Vec<(usize, usize)> =
        cut.windows(2).filter(|w| w[1].1 >= 0).map(|w| (w[0].0, w[1].1 as usize)).collect();
    let across = "labels-across-rows";
    let fix = "shift within each row (logits[:, :-1], labels[:, 1:]) before flattening, and once";
    let once = "logits and labels are flattened before the shift: the end of a row predicts the \
                beginning of the next";
    let twice = "labels are shifted twice, the second time flattened: each position predicts the \
                 token after the next, and the end of a row the next row";
    let candidates = candidates.into_iter().chain([
        (across, once, fix, following(&flat, 1)),
        (across, twice, fix, following(&flat, 2)),
        (across, twice, fix, following(&moved, 1)),
        (across, twice, fix, cut),
    ]);
    for (name, what, fix, targets) in candidates {
        if targets.is_empty() || targets == right || tested.settled() {
            continue;
        }
        let divisor = match context.case.loss.reduction {
            Reduction::Sum => 1.0,
            _ => targets.len() as f64,
        };
        let parts = Some(vec![(0..rows, divisor)]);
        let variant = Variant { targets: Some(targets), parts, ..Variant::default() };
        context.test(Fault::new(name, what, fix), &variant, |_| (), tested)?;
    }
    let counted = |range: &Range<usize>| {
        range
            .clone()
            .map(|b| (1..length).filter(|&t| label(b, t) != IGNORED_LABEL).count())
            .sum::<usize>() as f64
    };
    let micro = context.case.micro_batches();
    let each: Vec<Range<usize>> = (0..rows).map(|b| b..b + 1).collect();
    let means = |ranges: &[Range<usize>], over: f64| -> Vec<(Range<usize>, f64)> {
        ranges.iter().map(|r| (r.clone(), counted(r) * over)).filter(|(_, d)| *d > 0.0).collect()
    };
    let fix = "divide the summed loss of the step by the counted tokens of the whole step";
    let candidates = [
        (
            "micro-batch-mean",
            "each micro-batch is averaged by itself, so tokens of short ones weigh more",
            means(&micro, micro.len() as f64),
        ),
        (
            "micro-batch-sum",
            "the means of the micro-batches are added without dividing",
            means(&micro, 1.0),
        ),
        (
            "sequence-mean",
            "each sequence is averaged by itself, so tokens of short ones weigh more",
            means(&each, rows as f64),
        ),
    ];
    let declared = context.case.parts();
    for (name, what, parts) in candidates {
        if parts == declared || parts.len() < 2 || tested.settled() {
            continue;
        }
        let variant = Variant { parts: Some(parts), ..Variant::default() };
        context.test(Fault::new(name, what, fix), &variant, |_| (), tested)?;
    }
    Ok(())
}

/// Losses that a step may have without declaring them; the rungs measured against the one that
/// explains the whole step.
///
/// # Errors
/// As [`crate::validate::dump::Case::run`].
pub(super) fn other_losses(
    context: &Context<'_>,
    tested: &mut Tested<'_>,
) -> Result<Option<Vec<Rung>>> {
    let case = context.case;
    if case.loss.reduction == Reduction::MicroMean
        || case.declares_loss()
        || context.failing.is_empty() && !context.failed(RungName::Scale)
    {
        return Ok(None);
    }
    let batch = &case.batch;
    let (rows, length) = batch.input_ids.dim();
    let at = |shift: usize| -> Vec<(usize, usize)> {
        let each = (0..rows).flat_map(|b| (shift..length).map(move |t| (b, t)));
        let counted = each.filter(|&(b, t)| batch.labels[[b, t]] >= 0);
        counted.map(|(b, t)| (b * length + t - shift, batch.labels[[b, t]] as usize)).collect()
    };
    for shift in [1, 0] {
        let targets = at(shift);
        if targets.is_empty() || (shift == 0 && tested.settled()) {
            continue;
        }
        let divisor =
            if case.loss.reduction == Reduction::Sum { 1.0 } else { targets.len() as f64 };
        let parts: Vec<(Range<usize>, f64)> =
            case.micro_batches().into_iter().map(|r| (r, divisor)).collect();
        // The gradient is linear in the smoothing: its amplitude is that of the gap along a tenth
        // of it.
        tested.watch.begins("hypothesis: label smoothing");
        // Where a step is expensive the top layer tells as much.
        let part = context.top_part().filter(|_| !context.forward_wrong()).unwrap_or_default();
        if !tested.affords(2.0 * context.cost_of(&part), "label smoothing") {
            break;
        }
        tested.steps += 2;
        let (of_targets, of_parts) = (Some(targets.clone()), Some(parts.clone()));
        let plain = Variant { targets: of_targets, parts: of_parts, part, ..Variant::default() };
        let Ok(plain) = case.run(&plain) else { continue };
        let tenth = smoothed(case, &targets, &parts, 0.1, None, part)?;
        let exact = 0.1 * context.amplitude(&plain, &tenth);
        let short = (exact * 200.0).round() / 200.0;
        let near = if context.coarse() { 0.04 * exact } else { 1e-3 * exact };
        let epsilon = if (short - exact).abs() < near { short } else { exact };
        if !(0.004..0.95).contains(&epsilon) {
            continue;
        }
        if !tested.affords(2.0, "label smoothing") {
            break;
        }
        let predicted = smoothed(case, &targets, &parts, epsilon, None, Part::default())?;
        let rounded =
            smoothed(case, &targets, &parts, epsilon, Some(case.rounding), Part::default())?;
        tested.steps += 2;
        // A common factor must leave more.
        if context.left_by(&predicted) > 0.8 * context.left_by(&context.common_factor()) {
            continue;
        }
        if shift == 0 {
            let what = format!(
                "labels are not shifted: each position predicts its own token (with label \
                 smoothing {epsilon:.3})"
            );
            let fix = "position t predicts label t + 1, also in a loss of one's own";
            let diagnosis =
                context.judge(Fault::new("labels-not-shifted", what, fix), &predicted, &rounded);
            tested.found.push(diagnosis);
            continue;
        }
        let mut rungs = climb(case, &predicted, &rounded);
        if rungs.iter().filter(|r| r.name.is_of_the_step()).all(|r| !r.failed()) {
            if let Some(rung) = rungs.iter_mut().find(|r| r.name == RungName::Loss) {
                let why = format!(
                    "label smoothing {epsilon:.4}, found out, not declared: all below is checked \
                     with it"
                );
                *rung = Rung::skipped(RungName::Loss, why);
            }
            return Ok(Some(rungs));
        }
    }
    Ok(None)
}

/// The step with labels smoothed by `epsilon`.
fn smoothed(
    case: &Case,
    targets: &[(usize, usize)],
    parts: &[(Range<usize>, f64)],
    epsilon: f64,
    rounding: Option<Rounding>,
    part: Part<'_>,
) -> Result<Evidence> {
    case.run(&Variant {
        targets: Some(targets.to_vec()),
        parts: Some(parts.to_vec()),
        objective: Some(Objective { label_smoothing: epsilon, ..case.objective.clone() }),
        rounding,
        part,
        ..Variant::default()
    })
}

/// Forward counts the labels, backward counts every token: a fused loss that loses the weights of
/// tokens.
pub(super) fn masked_backward(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let batch = &context.case.batch;
    let (rows, length) = batch.input_ids.dim();
    let padding = |b: usize, t: usize| batch.attention_mask.as_ref().is_some_and(|m| !m[[b, t]]);
    let all = |pads: bool| -> Vec<(usize, usize)> {
        let each = (0..rows).flat_map(|b| (1..length).map(move |t| (b, t)));
        let counted = each.filter(|&(b, t)| pads || !padding(b, t));
        counted.map(|(b, t)| (b * length + t - 1, batch.input_ids[[b, t]] as usize)).collect()
    };
    let counted = batch.counted();
    for targets in [all(true), all(false)] {
        if targets.len() == counted
            || tested.settled()
            || context.case.loss.reduction == Reduction::MicroMean
        {
            return Ok(());
        }
        for divisor in [counted as f64, targets.len() as f64] {
            let divisor = if context.case.loss.reduction == Reduction::Sum { 1.0 } else { divisor };
            let same_forward = |predicted: &mut Evidence| {
                let gradients = std::mem::take(&mut predicted.gradients);
                *predicted = Evidence { gradients, ..context.exact.clone() };
            };
            let what =
                "backward counts every token, also the masked prompt, which forward does not";
            let fault = Fault::new(
                "masked-backward",
                what,
                "multiply each token's gradient by its own weight or mask",
            );
            let variant = Variant {
                targets: Some(targets.clone()),
                parts: Some(vec![(0..rows, divisor)]),
                ..Variant::default()
            };
            context.test(fault, &variant, same_forward, tested)?;
        }
    }
    Ok(())
}
