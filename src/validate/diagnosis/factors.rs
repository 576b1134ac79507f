//! Constant factors between the trainer's gradients and the reference's, and what they probably
//! are.

use super::gradient::some;
use super::{Context, Diagnosis, EXPLAINED, Fault, Tested};
use crate::linalg::norms::frobenius;
use crate::validate::ladder::RungName;
use crate::validate::measure::dot;
use crate::validate::names::place_of;
use std::collections::BTreeMap;

/// One factor between the trainer's gradients and the reference's, for all tensors or for one kind
/// of tensor.
pub(super) fn factors(context: &Context<'_>, tested: &mut Tested<'_>) {
    let factor = |names: &[&str]| {
        let (mut along, mut square) = (0.0, 0.0);
        for name in names {
            let (Some(got), Some(want)) =
                (context.observed(name), context.exact.gradients.get(*name))
            else {
                continue;
            };
            if got.values.dim() == want.dim() {
                along += dot(&got.values, want);
                square += dot(want, want);
            }
        }
        if square > 0.0 { along / square } else { f64::NAN }
    };
    let explained = |names: &[&str], c: f64| -> (usize, f64) {
        let mut most = 0.0f64;
        let mut count = 0;
        let (mut left, mut gap) = (0.0, 0.0);
        for name in names {
            let Some(got) = context.observed(name) else { continue };
            let share = context.share_of(name, &got.values.mapv(|x| x / c));
            let before = context.failing.iter().find(|m| m.name == *name).map_or(0.0, |m| m.share);
            count += usize::from(share <= EXPLAINED);
            (left, gap) = (left + share * share, gap + before * before);
            most = most.max(share);
        }
        // "No factor" must leave clearly more.
        if left <= super::LEFT_OVER * super::LEFT_OVER * gap { (count, most) } else { (0, most) }
    };
    let usable = |c: f64| c.is_finite() && c.abs() > 1e-12 && (c - 1.0).abs() > 1e-7;
    let names: Vec<&str> = context.failing.iter().map(|m| m.name.as_str()).collect();
    let c = factor(&names);
    if usable(c) {
        let (count, share) = explained(&names, c);
        if count == names.len() {
            // Those that do not fail must agree with the factor, too.
            let not_zero = |name: &&String| frobenius(&context.exact.gradients[*name].view()) > 0.0;
            let rest = context
                .exact
                .gradients
                .keys()
                .filter(not_zero)
                .filter(|name| !names.contains(&name.as_str()));
            let everything = rest.fold(true, |all, name| {
                let got = context.observed(name);
                all && got.is_some_and(|o| context.share_of(name, &o.values.mapv(|x| x / c)) <= 2.0)
            });
            let near = context.case.rounding.coarsest().epsilon().max(1e-4);
            let (name, meaning, fix) = meaning(context, c, near, everything);
            let what = format!(
                "the gradients of {} are {c:.6} times the right ones{meaning}",
                some(&names)
            );
            let mut diagnosis = context.of_gradients(Fault::new(name, what, fix), count, share);
            same_in_loss(
                context,
                c,
                if context.coarse() { 2.0 * near } else { 1e-3 },
                &mut diagnosis,
            );
            tested.found.push(diagnosis);
            return;
        }
    }
    // By kind of tensor: a factor on A and another on B.
    let mut kinds: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for name in &names {
        kinds.entry(place_of(name).2).or_default().push(name);
    }
    let found: Vec<(String, f64, usize, f64)> = kinds
        .into_iter()
        .map(|(kind, names)| {
            let c = factor(&names);
            let (count, share) = if usable(c) { explained(&names, c) } else { (0, f64::INFINITY) };
            (kind, c, if count == names.len() { count } else { 0 }, share)
        })
        .filter(|(_, _, count, _)| *count > 0)
        .collect();
    if !found.is_empty() {
        let each: Vec<String> =
            found.iter().map(|(kind, c, ..)| format!("{kind} {c:.6} times")).collect();
        let what =
            format!("constant factors by kind of tensor: {} the right gradient", each.join(", "));
        let fix = "a factor is missing in the backward of these tensors only: look at where alpha \
                   / r enters";
        let share = found.iter().map(|f| f.3).fold(0.0, f64::max);
        let fault = Fault::new("factor-by-kind", what, fix);
        tested.found.push(context.of_gradients(fault, found.iter().map(|f| f.2).sum(), share));
    }
}

/// A loss that is off by the same factor is explained with the gradients.
fn same_in_loss(context: &Context<'_>, c: f64, near: f64, diagnosis: &mut Diagnosis) {
    if let Some(loss) = context.case.trainer.loss
        && context.failed(RungName::Loss)
        && (loss / context.exact.loss / c - 1.0).abs() < near
    {
        diagnosis.explains.push(RungName::Loss);
        diagnosis.complete = diagnosis.explains.len() == context.failed.len();
    }
}

/// A factor that shows in the loss alone, gradients being rounded more: only one that counts of the
/// batch explain.
pub(super) fn factor_of_loss(context: &Context<'_>, tested: &mut Tested<'_>) {
    let Some(loss) =
        context.case.trainer.loss.filter(|_| context.failed.iter().eq([&RungName::Loss]))
    else {
        return;
    };
    let c = loss / context.exact.loss;
    let rounding = (context.rounded.loss / context.exact.loss - 1.0).abs();
    let near = (2.0 * rounding).max(2e-4).max(context.case.rounding.coarsest().epsilon() / 4.0);
    let agrees =
        context.mean_factor().is_none_or(|(mean, noise)| (mean - c).abs() < 4.0 * noise + near);
    let (name, meaning, fix) = meaning(context, c, near, true);
    if agrees && c.is_finite() && name == "loss-divisor" {
        let what = format!(
            "the loss is {c:.5} times the right one, and the gradients allow that{meaning}"
        );
        let mut diagnosis = context.of_gradients(Fault::new(name, what, fix), 0, 0.0);
        diagnosis.explains = vec![RungName::Loss];
        diagnosis.complete = true;
        tested.found.push(diagnosis);
    }
}

/// A factor too near 1 to show in any single tensor.
pub(super) fn common_factor(context: &Context<'_>, tested: &mut Tested<'_>) {
    let (true, Some((c, noise))) = (context.failed(RungName::Scale), context.mean_factor()) else {
        return;
    };
    let near = 3.0 * noise + 1e-6;
    // Common means that single tensors agree on it, as far as rounding lets them.
    let along: Vec<f64> =
        context.all_gradients().iter().map(|m| m.along).filter(|a| a.is_finite()).collect();
    let scatter = (along.iter().map(|a| (a - (c - 1.0)).powi(2)).sum::<f64>()
        / along.len().max(1) as f64)
        .sqrt();
    if scatter > 2.5 * noise + 1e-6 && scatter > 0.25 * (c - 1.0).abs() {
        return;
    }
    let (mut name, meaning, fix) = meaning(context, c, near, true);
    // A divisor would show in the loss.
    if name == "loss-divisor" && context.checked(RungName::Loss) && !context.failed(RungName::Loss)
    {
        name = "constant-factor";
    }
    let what =
        format!("all gradients together are {c:.4} (+- {near:.0e}) times the right ones{meaning}");
    let mut diagnosis = context.of_gradients(Fault::new(name, what, fix), 0, 0.0);
    same_in_loss(context, c, near.max(1e-3), &mut diagnosis);
    tested.found.push(diagnosis);
}

/// What a factor probably is.
fn meaning(
    context: &Context<'_>,
    c: f64,
    near: f64,
    everything: bool,
) -> (&'static str, String, &'static str) {
    let batch = &context.case.batch;
    let (rows, length) = batch.input_ids.dim();
    let counted = batch.counted() as f64;
    let tokens = (rows * length) as f64;
    let mask =
        batch.attention_mask.as_ref().map_or(tokens, |m| m.iter().filter(|x| **x).count() as f64);
    let before_shift = batch.labels.iter().filter(|l| **l >= 0).count() as f64;
    let micro = context.case.micro_batches().len() as f64;
    let scalings = scalings(context);
    let mut candidates: Vec<(f64, &'static str, String, &'static str)> = Vec::new();
    let averaging = "check by how many tokens the loss is divided";
    if everything {
        let wrong = "loss-divisor";
        candidates.push((
            counted,
            wrong,
            format!(": the loss is summed over its {counted} counted tokens"),
            averaging,
        ));
        candidates.push((
            1.0 / counted,
            wrong,
            ": the mean over counted tokens is taken twice".into(),
            averaging,
        ));
        for (n, of) in [
            (tokens, "all B T tokens"),
            (tokens - rows as f64, "the B (T - 1) shifted tokens"),
            (mask, "the tokens that are not padding"),
            (rows as f64, "the B sequences"),
            (before_shift, "the labels counted before the shift"),
        ] {
            let text = format!(
                ": the loss is divided by {of} ({n}) instead of the {counted} counted ones"
            );
            candidates.push((counted / n, wrong, text, averaging));
        }
        if micro > 1.0 {
            let fix =
                "divide each micro-batch's loss by their number (or by the counted tokens of all)";
            let text = format!(": the losses of {micro} micro-batches are added without dividing");
            candidates.push((micro, "accumulation", text, fix));
            candidates.push((
                1.0 / micro,
                "accumulation",
                format!(": divided by {micro} micro-batches twice"),
                fix,
            ));
        }
        candidates.push((
            -1.0,
            "sign",
            ": the sign is flipped, so descent climbs".into(),
            "negate the loss or the update",
        ));
    }
    let log = c.abs().log2();
    let power = c > 0.0 && (log - log.round()).abs() < near && log.abs() > 0.5;
    if everything && power && (-6.5..1.5).contains(&log) {
        let fix = "divide by the tokens of all ranks and sum over ranks, or by a rank's own and \
                   average: not both";
        let n = log.abs().round().exp2();
        let text = if c < 1.0 {
            format!(
                ": divided by {n} once too often, as when the tokens of all {n} ranks divide the \
                 loss and ranks are averaged"
            )
        } else {
            format!(": {n} times too much, as when {n} ranks are summed instead of averaged")
        };
        candidates.push((c, "world-size", text, fix));
    }
    for (s, r) in scalings {
        let (r, fix) = (r as f64, "check where alpha / r enters forward and backward");
        for (value, text) in [
            (
                1.0 / s,
                format!(": the scaling alpha / r = {s} is missing in the backward of the factors"),
            ),
            (s, format!(": the scaling alpha / r = {s} enters the backward twice")),
            (r, format!(": alpha is not divided by r = {r}")),
            (r.sqrt(), format!(": alpha is divided by sqrt(r), r = {r}")),
            (1.0 / r, format!(": alpha is divided by r = {r} twice")),
        ] {
            candidates.push((value, "adapter-scaling-backward", text, fix));
        }
    }
    if power && !(-6.5..1.5).contains(&log) {
        let text = format!(
            " (2^{}): a loss scale that was not divided out, or ranks that are summed and not \
             averaged",
            log.round()
        );
        let loss_scale = (c, "loss-scale", text, "unscale the gradients before they are used");
        // The forward being right, a factor of the loss is likelier than one of the rank.
        let rank =
            candidates.iter().position(|c| c.2.contains(": alpha is")).unwrap_or(candidates.len());
        candidates.insert(rank, loss_scale);
    }
    candidates.retain(|(value, ..)| {
        value.is_finite() && value.abs() > 0.0 && (c / value - 1.0).abs() < near
    });
    // With B = 0 the forward shows no scaling, and a factor of B's gradient has several
    // explanations.
    let ambiguous = b_is_zero(context) && candidates.iter().any(|c| c.1 != candidates[0].1);
    let mut candidates = candidates.into_iter();
    let Some((_, name, mut text, fix)) = candidates.next() else {
        return (
            "constant-factor",
            String::new(),
            "look for a factor of the loss that the reference does not have",
        );
    };
    for (_, _, other, _) in candidates {
        text += &format!("; or{}", other.trim_start_matches(':'));
    }
    if ambiguous {
        text += "; lora_B is zero, so this step cannot tell which";
        return ("factor-ambiguous", text, "dump a later step, where lora_B is not zero");
    }
    (name, text, fix)
}

/// Scaling and rank of the first adapted projection.
pub(super) fn scalings(context: &Context<'_>) -> Vec<(f64, usize)> {
    context
        .case
        .model
        .layers
        .iter()
        .flat_map(|l| l.projections())
        .filter_map(|(_, p)| match &p.method {
            crate::adapters::Method::Lora(m) => Some((m.scaling, m.spec.rank)),
            crate::adapters::Method::Dora(m) => Some((m.scaling, m.spec.rank)),
            crate::adapters::Method::Moslora(m) => Some((m.scaling, m.spec.rank)),
            crate::adapters::Method::Paca(m) => Some((m.scaling, m.index.len())),
            _ => None,
        })
        .take(1)
        .collect()
}

/// Whether every lora_B is zero.
fn b_is_zero(context: &Context<'_>) -> bool {
    let zero = |b: &ndarray::Array2<f64>| b.iter().all(|x| x.abs() < f64::MIN_POSITIVE);
    let of = |p: &crate::adapters::AdaptedLinear<f64>| match &p.method {
        crate::adapters::Method::Lora(m) => Some(zero(&m.b)),
        crate::adapters::Method::Dora(m) => Some(zero(&m.b)),
        crate::adapters::Method::Moslora(m) => Some(zero(&m.b)),
        _ => None,
    };
    let layers = &context.case.model.layers;
    let each: Vec<bool> =
        layers.iter().flat_map(|l| l.projections()).filter_map(|(_, p)| of(p)).collect();
    !each.is_empty() && each.iter().all(|z| *z)
}
