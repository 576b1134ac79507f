//! Faults that show in the gradients themselves: not finite, underflowing, zero, transposed,
//! exchanged.

use super::budget::may_be;
use super::factors::{common_factor, factor_of_loss, factors};
use super::{Context, Fault, Tested};
use crate::error::Result;
use crate::validate::dump::Observed;
use crate::validate::ladder::RungName;
use crate::validate::measure::{Measure, dot, floor, measure};
use crate::validate::names::place_of;
use crate::validate::precision::Precision;
use crate::validate::reference::{Evidence, Variant};
use ndarray::Array2;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    if context.failing.is_empty() {
        common_factor(context, tested);
        factor_of_loss(context, tested);
        return Ok(());
    }
    not_finite(context, tested);
    underflow(context, tested)?;
    if tested.settled() {
        return Ok(());
    }
    zeros(context, tested);
    factors(context, tested);
    layouts(context, tested);
    if !context.forward_wrong() {
        exchanged(context, tested);
    }
    lost_rows(context, tested);
    Ok(())
}

impl Context<'_> {
    pub(super) fn observed(&self, name: &str) -> Option<&Observed> {
        self.case.trainer.gradients.get(name)
    }

    /// Whether a gradient in another layout is the right one; without it its share may be infinite.
    fn reads_as(&self, failed: &Measure, share: f64) -> bool {
        if failed.share.is_finite() {
            self.accounts_for(failed, share)
        } else {
            share <= super::EXPLAINED
        }
    }

    /// The share that remains when `got` is taken for the gradient of `name`.
    pub(super) fn share_of(&self, name: &str, got: &Array2<f64>) -> f64 {
        let (Some(exact), Some(rounded)) =
            (self.exact.gradients.get(name), self.rounded.gradients.get(name))
        else {
            return f64::INFINITY;
        };
        let unit = floor(self.case.rounding.coarsest());
        measure(name, got, exact, rounded, unit, self.scale).share
    }
}

pub(super) fn some(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_string(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}

fn not_finite(context: &Context<'_>, tested: &mut Tested<'_>) {
    let bad: Vec<&str> = context
        .failing
        .iter()
        .filter(|m| {
            context.observed(&m.name).is_some_and(|o| o.values.iter().any(|x| !x.is_finite()))
        })
        .map(|m| m.name.as_str())
        .collect();
    if !bad.is_empty() {
        let what = format!(
            "NaN or infinity in the gradient of {}: an overflow, or a division by zero",
            some(&bad)
        );
        let fix = "with float16 lower the loss scale and skip such steps; check masked rows of the \
                   softmax";
        let fault = Fault::new("not-finite", what, fix);
        tested.found.push(context.of_gradients(fault, bad.len(), 0.0));
    }
}

/// float16 that loses the gradients: the imitation loses them too, and keeps them with a larger
/// loss scale.
fn underflow(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let rounding = context.case.rounding;
    let half = |p: Precision| p == Precision::F16;
    if !half(rounding.products) && !half(rounding.stream) {
        return Ok(());
    }
    // A scale at which the largest gradient is near 1.
    let largest = context.exact.gradients.values().flatten().fold(0.0f64, |m, x| m.max(x.abs()));
    if !(largest > 0.0) || largest * context.case.loss.scale > 2f64.powi(-10) {
        return Ok(());
    }
    let better = 2f64.powi(-(largest.log2().ceil() as i32));
    tested.watch.begins("hypothesis: underflow");
    if !tested.affords(1.0, "underflow") {
        return Ok(());
    }
    tested.steps += 1;
    let variant =
        Variant { rounding: Some(rounding), loss_scale: Some(better), ..Variant::default() };
    let Ok(kept) = context.case.run(&variant) else { return Ok(()) };
    let gap = |e: &Evidence| {
        let (mut gap, mut norm) = (0.0, 0.0);
        for (name, want) in &context.exact.gradients {
            if let Some(got) = e.gradients.get(name) {
                let difference = got - want;
                gap += dot(&difference, &difference);
                norm += dot(want, want);
            }
        }
        (gap / norm).sqrt()
    };
    let (now, then) = (gap(context.rounded), gap(&kept));
    if now > 0.02 && then < now / 4.0 {
        let scale = context.case.loss.scale;
        let what = format!(
            "float16 underflow: with loss scale {scale:e} the gradients are below what float16 \
             holds; rounding alone loses {:.0}% of them, with scale {better:e} only {:.1}%",
            100.0 * now,
            100.0 * then
        );
        let fault = Fault::new("underflow", what, "raise the loss scale, or use bfloat16");
        tested.found.push(context.of_gradients(fault, context.failing.len(), 0.0));
    }
    Ok(())
}

/// Gradients that are absent or zero where the reference's are not.
fn zeros(context: &Context<'_>, tested: &mut Tested<'_>) {
    let is_zero = |m: &&&Measure| match context.observed(&m.name) {
        None => true,
        Some(o) => o.values.iter().all(|x| x.abs() < f64::MIN_POSITIVE),
    };
    let zero: BTreeSet<&str> =
        context.failing.iter().filter(is_zero).map(|m| m.name.as_str()).collect();
    if zero.is_empty() {
        return;
    }
    let nonzero = |name: &&String| {
        context
            .exact
            .gradients
            .get(*name)
            .is_some_and(|g| g.iter().any(|x| x.abs() >= f64::MIN_POSITIVE))
    };
    let meaningful: Vec<&String> = context.case.trained.iter().filter(nonzero).collect();
    // Layers of which everything is zero.
    let mut layers: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    for name in &meaningful {
        if let (Some(layer), ..) = place_of(name) {
            let entry = layers.entry(layer).or_default();
            entry.0 += usize::from(zero.contains(name.as_str()));
            entry.1 += 1;
        }
    }
    let dead: Vec<usize> = layers.iter().filter(|(_, (z, n))| z == n).map(|(l, _)| *l).collect();
    let in_dead = |name: &str| place_of(name).0.is_some_and(|l| dead.contains(&l));
    let whole_layers = !dead.is_empty() && zero.iter().all(|name| in_dead(name));
    let fault = if zero.len() == meaningful.len() {
        Fault::new(
            "no-gradient",
            "no gradient reaches any trained tensor",
            "the loss was computed outside the graph (no_grad, detach), or reentrant checkpointing \
             has an input that does not require a gradient (enable_input_require_grads), or the \
             adapters are not applied",
        )
    } else if whole_layers && dead.len() == layers.len() {
        Fault::new(
            "graph-cut",
            format!(
                "the gradient stops at the output of the top layer: all {} layers have none, what \
                 stands above them has",
                layers.len()
            ),
            "reentrant checkpointing whose input does not require a gradient: \
             enable_input_require_grads(), or use_reentrant=False",
        )
    } else if whole_layers && dead.iter().copied().eq(0..dead.len()) {
        let above = dead.len();
        Fault::new(
            "graph-cut",
            format!(
                "the gradient stops at the input of layer {above}: everything below is zero, \
                 everything else is there"
            ),
            "look for a detach, a no_grad, or checkpointing without inputs that require a gradient \
             below that layer",
        )
    } else if whole_layers {
        Fault::new(
            "layer-dropped",
            format!(
                "layer {dead:?} has no gradient while layers below it have: its parameters are \
                 outside the graph"
            ),
            "activation checkpointing or a custom block that runs the layer with detached \
             parameters",
        )
    } else {
        let modules: BTreeSet<String> = zero.iter().map(|name| place_of(name).1).collect();
        let modules: Vec<String> = modules.into_iter().collect();
        Fault::new(
            "outside-graph",
            format!(
                "no gradient for {} tensors, in {}: these are outside the graph",
                zero.len(),
                modules.join(", ")
            ),
            "the module is bypassed, replaced after the optimizer was built, or its parameters are \
             detached",
        )
    };
    tested.found.push(context.of_gradients(fault, zero.len(), 0.0));
}

/// Gradients of a wrong shape: a finding of its own, after which the others are explained without
/// them.
pub(super) fn shapes(context: &mut Context<'_>, tested: &mut Tested<'_>) {
    let wrong = |m: &&Measure| {
        let want = context.exact.gradients.get(&m.name);
        matches!((context.observed(&m.name), want), (Some(got), Some(want)) if got.values.dim() != want.dim())
    };
    let names: Vec<&str> =
        context.failing.iter().copied().filter(|m| wrong(m)).map(|m| m.name.as_str()).collect();
    let Some(first) = names.first() else { return };
    let (got, want) =
        (context.observed(first).map(|o| o.shape.clone()), context.exact.gradients.get(*first));
    let what = format!(
        "the gradient of {} has a wrong shape: {:?}, expected {:?}",
        some(&names),
        got.unwrap_or_default(),
        want.map_or((0, 0), ndarray::Array2::dim)
    );
    let fix = "weights are out x in, lora_A r x in, lora_B out x r; look for a slice or a view of \
               another size";
    let count = names.len();
    let others = context.failing.len() - count;
    let mut diagnosis = context.of_gradients(Fault::new("gradient-shape", what, fix), count, 0.0);
    let own = [RungName::Names, RungName::Gradients];
    if others == 0 {
        diagnosis.explains = own.into_iter().filter(|&r| context.failed(r)).collect();
        diagnosis.complete = context.failed.iter().all(|r| own.contains(r));
    } else {
        diagnosis.explains = vec![RungName::Names];
    }
    tested.found.push(diagnosis);
    context.failing.retain(|m| m.share.is_finite());
    context.failed.remove(&RungName::Names);
}

/// Gradients stored transposed, or with their memory read in the other order.
fn layouts(context: &Context<'_>, tested: &mut Tested<'_>) {
    let (mut transposed, mut reshaped): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    let mut most = 0.0f64;
    for m in &context.failing {
        let (Some(got), Some(want)) =
            (context.observed(&m.name), context.exact.gradients.get(&m.name))
        else {
            continue;
        };
        if got.values.dim() == (want.ncols(), want.nrows()) {
            let share = context.share_of(&m.name, &got.values.t().to_owned());
            if context.reads_as(m, share) {
                transposed.push(&m.name);
                most = most.max(share);
                continue;
            }
        }
        let flat = got.values.iter().copied().collect::<Vec<f64>>();
        // The memory of the right shape, or of the transposed one; a matrix of the right shape is
        // itself.
        let own_shape = got.values.dim() == want.dim();
        let shape = if own_shape { (want.ncols(), want.nrows()) } else { want.dim() };
        let Ok(array) = Array2::from_shape_vec(shape, flat) else { continue };
        let array = if own_shape { array.t().to_owned() } else { array };
        let share = context.share_of(&m.name, &array);
        if context.reads_as(m, share) {
            reshaped.push(&m.name);
            most = most.max(share);
        }
    }
    if !transposed.is_empty() {
        let fault = Fault::new(
            "transposed",
            format!("the gradient of {} is the transpose of the right one", some(&transposed)),
            "weights are out x in, lora_A r x in, lora_B out x r",
        );
        tested.found.push(context.of_gradients(fault, transposed.len(), most));
    }
    if !reshaped.is_empty() {
        let fault = Fault::new(
            "reshaped",
            format!(
                "the gradient of {} was reshaped where it had to be transposed",
                some(&reshaped)
            ),
            "use a transpose; a view of the same memory in another shape mixes rows and columns",
        );
        tested.found.push(context.of_gradients(fault, reshaped.len(), most));
    }
}

/// Tensors under each other's names.
fn exchanged(context: &Context<'_>, tested: &mut Tested<'_>) {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    let mut most = 0.0f64;
    for m in &context.failing {
        let Some(got) = context.observed(&m.name) else { continue };
        if got.values.iter().all(|x| x.abs() < f64::MIN_POSITIVE) {
            continue;
        }
        for (other, want) in &context.exact.gradients {
            if *other == m.name || !may_be(&got.values, want) {
                continue;
            }
            let share = context.share_of(other, &got.values);
            if context.accounts_for(m, share) {
                pairs.push((&m.name, other));
                most = most.max(share);
                break;
            }
        }
    }
    if let Some((one, other)) = pairs.first() {
        let what =
            format!("{} tensors carry another's gradient: {one} has that of {other}", pairs.len());
        let fault = Fault::new(
            "exchanged",
            what,
            "the mapping of names, or the order of a fused weight's parts",
        );
        tested.found.push(context.of_gradients(fault, pairs.len(), most));
    }
}

/// Rows or columns that are zero while the rest is right.
fn lost_rows(context: &Context<'_>, tested: &mut Tested<'_>) {
    let mut lost = Vec::new();
    for m in &context.failing {
        let (Some(got), Some(want)) =
            (context.observed(&m.name), context.exact.gradients.get(&m.name))
        else {
            continue;
        };
        if got.values.dim() != want.dim() {
            continue;
        }
        for (axis, what) in [(ndarray::Axis(0), "row"), (ndarray::Axis(1), "column")] {
            let empty =
                |line: ndarray::ArrayView1<f64>| line.iter().all(|x| x.abs() < f64::MIN_POSITIVE);
            let gone: Vec<usize> = (0..want.len_of(axis))
                .filter(|&i| {
                    empty(got.values.index_axis(axis, i)) && !empty(want.index_axis(axis, i))
                })
                .collect();
            if gone.is_empty() || gone.len() == want.len_of(axis) {
                continue;
            }
            let mut filled = got.values.clone();
            gone.iter()
                .for_each(|&i| filled.index_axis_mut(axis, i).assign(&want.index_axis(axis, i)));
            if context.accounts_for(m, context.share_of(&m.name, &filled)) {
                lost.push(format!("{what} {gone:?} of {}", m.name));
                break;
            }
        }
    }
    if let Some(first) = lost.first() {
        let what = format!("parts of gradients are zero and the rest is right: {first}");
        let fault = Fault::new("rows-lost", what, "a tile, a shard or a head that backward skips");
        tested.found.push(context.of_gradients(fault, lost.len(), 0.0));
    }
}
