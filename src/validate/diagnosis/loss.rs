//! Faults of the loss: the logits are right, what is made of them is not.

use super::{Context, Fault, Tested};
use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::error::Result;
use crate::validate::manifest::Reduction;
use crate::validate::reference::Variant;
use std::ops::Range;

/// Name, sentence and fix of a fault with the (row, label) pairs that it counts.
type Counted = (&'static str, &'static str, &'static str, Vec<(usize, usize)>);

/// Faults of the loss alone: the logits are right.
pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let batch = &context.case.batch;
    let (rows, length) = batch.input_ids.dim();
    let label = |b: usize, t: usize| batch.labels[[b, t]];
    let shifted = |shift: usize, keep: &dyn Fn(usize, usize) -> Option<i64>| -> Vec<(usize, usize)> {
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
            "ignored positions (prompt and padding) are counted in the loss: labels of -100 are not masked",
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
        range.clone().map(|b| (1..length).filter(|&t| label(b, t) != IGNORED_LABEL).count()).sum::<usize>() as f64
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
        ("micro-batch-sum", "the means of the micro-batches are added without dividing", means(&micro, 1.0)),
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
