//! Faults of the backward pass: loss and logits are right, gradients are not.

use super::forward::{one_part, whole_table};
use super::stale::previous_model;
use super::{Context, Fault, Tested};
use crate::adapters::Method;
use crate::blocks::rope::rope_forward;
use crate::cost::Cost;
use crate::error::Result;
use crate::model::options::Norm;
use crate::model::{Masked, Place, Point};
use crate::validate::reference::{Evidence, Variant};
use ndarray::{Array1, Array2};
use std::cell::RefCell;
use std::collections::HashMap;

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    dropout(context, tested)?;
    rotary(context, tested)?;
    score_scale(context, tested)?;
    input_gradients(context, tested)?;
    dora_norm(context, tested)?;
    stale(context, tested)?;
    norms(context, tested)
}

/// Masks that forward applied and backward forgot.
fn dropout(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    if context.case.trainer.masks.is_empty() {
        return Ok(());
    }
    for (at, what) in [
        (
            Masked::InputGradient,
            "the dropout mask is not applied to the adapter's part of the input gradient",
        ),
        (Masked::SavedInput, "the gradient of A is that of the input before dropout"),
    ] {
        if tested.settled() {
            return Ok(());
        }
        let fault = Fault::new(
            "dropout-mask-backward",
            what,
            "save the mask (or its seed) and use it again in backward",
        );
        context.test(
            fault,
            &Variant { unmasked: Some(at), ..Variant::default() },
            |_| (),
            tested,
        )?;
    }
    Ok(())
}

fn rotary(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let Some(parts) = one_part(context) else { return Ok(()) };
    let Some(table) = whole_table(context, context.case.model.config.rope_theta)? else {
        return Ok(());
    };
    for (times, name, what) in [
        (
            1,
            "rotary-backward-missing",
            "the gradient of queries and keys is not rotated back: the rotary backward is missing",
        ),
        (
            2,
            "rotary-backward-wrong",
            "the gradient of queries and keys is rotated forward instead of back",
        ),
    ] {
        if tested.settled() {
            return Ok(());
        }
        let tap = |place: Place, x: &mut Array2<f64>| {
            if place.gradient && matches!(place.point, Point::Query | Point::Key) {
                (0..times).for_each(|_| {
                    drop(rope_forward(&mut x.view_mut(), &table, &mut Cost::default()))
                });
            }
        };
        let fault = Fault::new(
            name,
            what,
            "the backward of a rotation is the rotation by the opposite angle",
        );
        let variant = Variant { tap: Some(&tap), parts: Some(parts.clone()), ..Variant::default() };
        context.test(fault, &variant, |_| (), tested)?;
    }
    Ok(())
}

fn score_scale(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let root = (context.case.model.config.head_dim as f64).sqrt();
    for (factor, what) in [
        (root, "the backward of the scores lacks the factor 1 / sqrt(head_dim)"),
        (1.0 / root, "the backward of the scores has the factor 1 / sqrt(head_dim) twice"),
    ] {
        if tested.settled() {
            return Ok(());
        }
        let tap = |place: Place, x: &mut Array2<f64>| {
            if place.gradient && matches!(place.point, Point::RotatedQuery | Point::RotatedKey) {
                x.mapv_inplace(|v| v * factor);
            }
        };
        let fault = Fault::new(
            "attention-scale-backward",
            what,
            "dQ = dS K / sqrt(head_dim), dK = dS^T Q / sqrt(head_dim)",
        );
        context.test(fault, &Variant { tap: Some(&tap), ..Variant::default() }, |_| (), tested)?;
    }
    Ok(())
}

/// dx without the adapter's part, or with nothing else: the backward runs with another base weight,
/// so that the sum that it adds to the adapter's part is the wanted one.
fn input_gradients(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let low_rank = |p: &crate::adapters::AdaptedLinear<f64>| {
        matches!(p.method, Method::Lora(_) | Method::Moslora(_))
    };
    let mut without_adapter = context.case.model.clone();
    let mut without_base = context.case.model.clone();
    let mut any = false;
    for model in [&mut without_adapter, &mut without_base] {
        for layer in &mut model.layers {
            any |= layer.projections().any(|(_, projection)| low_rank(projection));
        }
    }
    if !any {
        return Ok(());
    }
    for (l, layer) in context.case.model.layers.iter().enumerate() {
        for (p, projection) in layer.projections() {
            if low_rank(projection) {
                without_adapter.layers[l]
                    .projection_mut(p)
                    .add_update_to_base(&projection.method, -1.0)?;
                without_base.layers[l]
                    .projection_mut(p)
                    .base
                    .change("base", |weight| weight.fill(0.0))?;
            }
        }
    }
    for (model, name, what, fix) in [
        (
            &without_adapter,
            "adapter-input-gradient",
            "the adapter's part of the input gradient is missing: layers below get only that of \
             the frozen weight",
            "dx = dy W + s dy B A",
        ),
        (
            &without_base,
            "frozen-input-gradient",
            "the frozen weight's part of the input gradient is missing: layers below get only that \
             of the adapter",
            "dx = dy W + s dy B A; W is frozen, not absent",
        ),
    ] {
        if tested.settled() {
            return Ok(());
        }
        let variant = Variant { backward: Some(model), ..Variant::default() };
        context.test(Fault::new(name, what, fix), &variant, |_| (), tested)?;
    }
    Ok(())
}

fn dora_norm(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let mut model = context.case.model.clone();
    let mut declared = None;
    for layer in &mut model.layers {
        for (_, projection) in layer.projections_mut() {
            if let Method::Dora(dora) = &mut projection.method {
                declared = Some(dora.true_derivative);
                dora.true_derivative = !dora.true_derivative;
            }
        }
    }
    let Some(declared) = declared.filter(|_| !tested.settled()) else { return Ok(()) };
    let what = if declared {
        "DoRA's norm is treated as a constant, where its derivative was asked for"
    } else {
        "DoRA's norm is differentiated, where PEFT and the paper's section 4.3 treat it as a \
         constant"
    };
    let fault = Fault::new(
        "dora-norm",
        what,
        "detach the norm, or set dora_true_derivative in adapter_config.json",
    );
    context.test(fault, &Variant { forward: Some(&model), ..Variant::default() }, |_| (), tested)
}

fn stale(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let Some(previous) = previous_model(context)?.filter(|_| !tested.settled()) else {
        return Ok(());
    };
    let fix = "compute the gradient at the parameters that the optimizer will change";
    let fault = Fault::new(
        "stale-weight",
        "the gradient is that at the parameters of the step before",
        fix,
    );
    // What was dumped of the forward is right; only the gradient is of another one.
    let same_forward = |predicted: &mut Evidence| {
        let gradients = std::mem::take(&mut predicted.gradients);
        *predicted = Evidence { gradients, ..context.exact.clone() };
    };
    context.test(
        fault,
        &Variant { forward: Some(&previous), ..Variant::default() },
        same_forward,
        tested,
    )?;
    if tested.settled() {
        return Ok(());
    }
    // The right forward, but backward multiplies by the old factors.
    let what = "backward multiplies by the parameters of the step before";
    let fault = Fault::new("stale-backward-weight", what, fix);
    context.test(
        fault,
        &Variant { backward: Some(&previous), ..Variant::default() },
        |_| (),
        tested,
    )
}

/// RMSNorm whose root mean square is taken for a constant: dx = s g dy without the term along x.
fn norms(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let options = &context.case.model.config.options;
    if tested.settled() || options.layer_norm || options.unit_gain || options.parallel {
        return Ok(());
    }
    let model = &context.case.model;
    let (eps, last) = (model.config.rms_norm_eps, model.layers.len() - 1);
    // Inputs of norms and gradients of their outputs, by (layer, which norm).
    let inputs: RefCell<HashMap<(usize, u8), Array2<f64>>> = RefCell::default();
    let upstream: RefCell<HashMap<(usize, u8), Array2<f64>>> = RefCell::default();
    let correct = |key: (usize, u8), gain: Option<&Array1<f64>>, dx: &mut Array2<f64>| {
        let Some(gain) = gain else { return };
        let (inputs, upstream) = (inputs.borrow(), upstream.borrow());
        let (Some(x), Some(dy)) = (inputs.get(&key), upstream.get(&key)) else { return };
        if x.dim() != dx.dim() || dy.dim() != dx.dim() {
            return;
        }
        let width = x.ncols() as f64;
        for ((mut dx, x), dy) in dx.rows_mut().into_iter().zip(x.rows()).zip(dy.rows()) {
            let inverse = 1.0 / (x.dot(&x) / width + eps).sqrt();
            let along: f64 = dy.iter().zip(gain).zip(x).map(|((dy, g), x)| dy * g * x).sum();
            dx.scaled_add(inverse.powi(3) * along / width, &x);
        }
    };
    let gain = |layer: usize, norm: Norm| model.layers[layer].norm(norm).map(|norm| &norm.gain);
    let tap = |place: Place, t: &mut Array2<f64>| {
        let layer = place.layer.unwrap_or(0);
        match (place.point, place.gradient) {
            (Point::Embedded, false) => drop(inputs.borrow_mut().insert((0, 0), t.clone())),
            (Point::Middle, false) => drop(inputs.borrow_mut().insert((layer, 1), t.clone())),
            (Point::Output, false) if layer == last => {
                drop(inputs.borrow_mut().insert((0, 2), t.clone()))
            }
            (Point::Output, false) => drop(inputs.borrow_mut().insert((layer + 1, 0), t.clone())),
            (Point::NormedInput, true) => drop(upstream.borrow_mut().insert((layer, 0), t.clone())),
            (Point::NormedMiddle, true) => {
                drop(upstream.borrow_mut().insert((layer, 1), t.clone()))
            }
            (Point::FinalNorm, true) => drop(upstream.borrow_mut().insert((0, 2), t.clone())),
            (Point::Middle, true) => correct((layer, 1), gain(layer, Norm::BeforeMlp), t),
            (Point::Output, true) if layer == last => {
                correct((0, 2), Some(&model.final_norm.gain), t)
            }
            (Point::Output, true) => {
                correct((layer + 1, 0), gain(layer + 1, Norm::BeforeAttention), t)
            }
            (Point::Embedded, true) => correct((0, 0), gain(0, Norm::BeforeAttention), t),
            _ => {}
        }
    };
    let fault = Fault::new(
        "norm-backward",
        "RMSNorm's backward takes the root mean square for a constant: its term along x is missing",
        "dx = s (g dy - x s^2 / D sum(g dy x))",
    );
    context.test(fault, &Variant { tap: Some(&tap), ..Variant::default() }, |_| (), tested)
}
