//! Faults of the forward pass: the reference is run again with each.

use super::{Context, Fault, Tested};
use crate::adapters::Method;
use crate::blocks::rope::{RopeTable, rope_backward, rope_forward};
use crate::cost::Cost;
use crate::error::Result;
use crate::model::{Batch, Model, Place, Point, Projection};
use crate::validate::manifest::Reduction;
use crate::validate::reference::{Evidence, Variant};
use ndarray::{Array2, Axis};
use std::ops::Range;

/// Calls `change` on every low-rank method.
fn for_each_low_rank(
    model: &mut Model<f64>,
    mut change: impl FnMut(&mut f64, &mut Array2<f64>, &mut Array2<f64>),
) -> bool {
    let mut any = false;
    for layer in &mut model.layers {
        for (_, projection) in layer.projections_mut() {
            any |= match &mut projection.method {
                Method::Lora(m) => {
                    change(&mut m.scaling, &mut m.a, &mut m.b);
                    true
                }
                Method::Dora(m) => {
                    change(&mut m.scaling, &mut m.a, &mut m.b);
                    true
                }
                Method::Moslora(m) => {
                    change(&mut m.scaling, &mut m.a, &mut m.b);
                    true
                }
                _ => false,
            };
        }
    }
    any
}

/// The step as one part, for faults that look at the whole batch; `None` under a mean of means.
pub(super) fn one_part(context: &Context<'_>) -> Option<Vec<(Range<usize>, f64)>> {
    let rows = context.case.batch.input_ids.nrows();
    match (context.case.loss.reduction, &context.case.parts()[..]) {
        (Reduction::MicroMean, parts) if parts.len() > 1 => None,
        (_, parts) => parts.first().map(|(_, divisor)| vec![(0..rows, *divisor)]),
    }
}

/// Angles of the whole batch.
pub(super) fn whole_table(context: &Context<'_>, theta: f64) -> Result<Option<RopeTable<f64>>> {
    let config = &context.case.model.config;
    let Some(rotary) = config.options.rotaries.first() else { return Ok(None) };
    let (rows, length) = context.case.batch.input_ids.dim();
    let positions: Vec<u32> = match &context.case.batch.position_ids {
        Some(positions) => positions.iter().copied().collect(),
        None => (0..rows).flat_map(|_| 0..length as u32).collect(),
    };
    RopeTable::of(rotary, &positions, config.head_dim, theta).map(Some)
}

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    list(context, tested)?;
    super::bases::initial_products(context, tested)?;
    super::fitted::scalings(context, tested)?;
    // Another base comes near scaled frequencies.
    if !tested.settled()
        || tested.found.iter().any(|d| d.complete && d.fault == "rotary-theta" && d.share > 1.0)
    {
        super::frequencies::test(context, tested)?;
    }
    if !tested.settled() {
        super::families::pairs(context, tested)?;
    }
    Ok(())
}

/// Those that need no search of their own.
pub(super) fn list(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    scaling(context, tested)?;
    attention(context, tested)?;
    rotary(context, tested)?;
    super::families::test(context, tested)?;
    super::quantized::test(context, tested)?;
    super::stale::test(context, tested)?;
    weights(context, tested)?;
    super::bases::merged(context, tested)
}

fn scaling(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let model = &context.case.model;
    let specs: Vec<crate::adapters::lora::LoraSpec> = model
        .layers
        .iter()
        .flat_map(|l| l.projections())
        .filter_map(|(_, p)| match &p.method {
            Method::Lora(m) => Some(m.spec),
            Method::Dora(m) => Some(m.spec),
            Method::Moslora(m) => Some(m.spec),
            _ => None,
        })
        .collect();
    let Some(spec) = specs.first() else { return Ok(()) };
    let (r, alpha) = (spec.rank as f64, spec.alpha);
    let declared = if spec.rank_stabilized { alpha / r.sqrt() } else { alpha / r };
    let wrong = "adapter-scaling";
    let fix =
        "the scaling is alpha / r (alpha / sqrt(r) for rsLoRA), from the adapter's own config";
    let candidates = [
        (
            0.0,
            "adapter-not-applied",
            "the adapter has no effect on the forward".to_string(),
            "the module is bypassed, disabled, or wrapped after the model was traced",
        ),
        (1.0, wrong, format!("the adapter is scaled by 1 instead of {declared}"), fix),
        (
            alpha / r,
            wrong,
            format!("the adapter is scaled by alpha / r instead of {declared}"),
            fix,
        ),
        (
            alpha / r.sqrt(),
            wrong,
            format!("the adapter is scaled by alpha / sqrt(r) instead of {declared}"),
            fix,
        ),
        (
            2.0 * declared,
            wrong,
            format!(
                "the adapter is scaled by twice {declared}, or acts twice, forward and backward"
            ),
            "the scaling is alpha / r, from the adapter's own config; a module must be wrapped \
             once",
        ),
        (alpha, wrong, format!("the adapter is scaled by alpha instead of {declared}"), fix),
        (1.0 / r, wrong, format!("the adapter is scaled by 1 / r instead of {declared}"), fix),
        (
            r / alpha,
            wrong,
            format!("the adapter is scaled by r / alpha instead of {declared}"),
            fix,
        ),
        (declared * declared, wrong, format!("the adapter's scaling {declared} enters twice"), fix),
    ];
    for (value, name, what, fix) in candidates {
        if (value - declared).abs() < 1e-12 || tested.settled() {
            continue;
        }
        let mut changed = model.clone();
        for_each_low_rank(&mut changed, |s, _, _| *s *= value / declared);
        let variant = Variant { forward: Some(&changed), ..Variant::default() };
        context.test(Fault::new(name, what, fix), &variant, |_| (), tested)?;
    }
    Ok(())
}

fn attention(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let config = &context.case.model.config;
    let (d, width) = (config.head_dim as f64, config.hidden_size as f64);
    for (scale, text) in [
        (1.0, "the scores are not divided by sqrt(head_dim)"),
        (1.0 / d, "the scores are divided by head_dim instead of its root"),
        (
            1.0 / width.sqrt(),
            "the scores are divided by sqrt(hidden_size) instead of sqrt(head_dim)",
        ),
    ] {
        if tested.settled() {
            return Ok(());
        }
        let fault =
            Fault::new("attention-scale", text, "the factor of Q K^T is 1 / sqrt(head_dim)");
        context.test(
            fault,
            &Variant { scale: Some(scale), ..Variant::default() },
            |_| (),
            tested,
        )?;
    }
    let length = context.case.batch.input_ids.ncols();
    for (ahead, text) in [
        (length, "every token sees the whole sequence: there is no causal mask".to_string()),
        (
            1,
            "every token sees the next one, which it must predict: the causal mask is off by one"
                .to_string(),
        ),
    ] {
        if tested.settled() {
            return Ok(());
        }
        let fault = Fault::new("causal-leak", text, "key j is visible to query i when j <= i");
        context.test(fault, &Variant { ahead, ..Variant::default() }, |_| (), tested)?;
    }
    if context.case.batch.attention_mask.is_some() && !tested.settled() {
        let batch = Batch { attention_mask: None, ..context.case.batch.clone() };
        let fault = Fault::new(
            "padding-attended",
            "padding is attended to: the attention mask has no effect",
            "pass the mask to the attention, also through checkpointing and custom kernels",
        );
        context.test(
            fault,
            &Variant { batch: Some(&batch), ..Variant::default() },
            |_| (),
            tested,
        )?;
    }
    grouped_heads(context, tested)
}

/// Key/value heads repeated as a block instead of each in turn: query head h reads h mod H_kv
/// instead of h / group.
fn grouped_heads(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let config = &context.case.model.config;
    let (heads, kv, d) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let group = heads / kv;
    if group == 1 || kv == 1 || tested.settled() {
        return Ok(());
    }
    // Where the reference looks for head i, put the one that reads the same keys under the fault.
    let order: Vec<usize> = (0..heads).map(|i| (i % group) * kv + i / group).collect();
    let lines: Vec<usize> = order.iter().flat_map(|h| h * d..(h + 1) * d).collect();
    let mut model = context.case.model.clone();
    let pick = |a: &mut Array2<f64>, axis: Axis| {
        *a = a.select(axis, &lines).as_standard_layout().into_owned()
    };
    for layer in &mut model.layers {
        for (p, axis) in [(Projection::Query, Axis(0)), (Projection::Output, Axis(1))] {
            // Heads that are stored in one weight with others are left alone.
            let Some(projection) = layer.get_mut(p) else { return Ok(()) };
            match &mut projection.method {
                Method::Frozen | Method::Full => {}
                Method::Lora(m) => pick(if axis.index() == 0 { &mut m.b } else { &mut m.a }, axis),
                Method::Moslora(m) => {
                    pick(if axis.index() == 0 { &mut m.b } else { &mut m.a }, axis)
                }
                Method::Dora(m) if axis.index() == 0 => {
                    pick(&mut m.b, axis);
                    m.magnitude = m.magnitude.select(Axis(1), &lines);
                }
                Method::Dora(m) => pick(&mut m.a, axis),
                Method::Paca(_) | Method::S2ft(_) | Method::Spft(_) => return Ok(()),
            }
            let picked = lines.clone();
            let pick = move |a: &mut Array2<f64>| {
                *a = a.select(axis, &picked).as_standard_layout().into_owned()
            };
            projection.base.change("grouped heads", pick)?;
        }
    }
    let back = |evidence: &mut Evidence| {
        for (name, g) in &mut evidence.gradients {
            let axis = match name.rsplit_once("self_attn.").map_or("", |(_, rest)| rest) {
                "q_proj.lora_B" | "q_proj.weight" => Axis(0),
                "q_proj.lora_magnitude_vector" | "o_proj.lora_A" | "o_proj.weight" => Axis(1),
                _ => continue,
            };
            let permuted = g.clone();
            for (i, &line) in lines.iter().enumerate() {
                g.index_axis_mut(axis, line).assign(&permuted.index_axis(axis, i));
            }
        }
    };
    let fault = Fault::new(
        "grouped-heads",
        "query heads read the wrong key/value heads: these are repeated as a block instead of each \
         in turn",
        "head h reads key/value head h / group (repeat_interleave, not repeat)",
    );
    context.test(fault, &Variant { forward: Some(&model), ..Variant::default() }, back, tested)
}

/// Turns each head by its angles with neighbouring entries paired.
fn interleaved(x: &mut Array2<f64>, table: &RopeTable<f64>, head_dim: usize, backward: bool) {
    let half = head_dim / 2;
    // Pairs (2j, 2j + 1) brought to (j, j + half), turned there, and brought back.
    let place = |j: usize| if j.is_multiple_of(2) { j / 2 } else { half + j / 2 };
    let mut paired = x.clone();
    for ((i, c), v) in x.indexed_iter() {
        paired[[i, c - c % head_dim + place(c % head_dim)]] = *v;
    }
    let turn = if backward { rope_backward } else { rope_forward };
    if turn(&mut paired.view_mut(), table, &mut Cost::default()).is_ok() {
        for ((i, c), v) in x.indexed_iter_mut() {
            *v = paired[[i, c - c % head_dim + place(c % head_dim)]];
        }
    }
}

fn rotary(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let config = &context.case.model.config;
    let head_dim = config.head_dim;
    let rotated = |place: Place| {
        matches!(place.point, Point::RotatedQuery | Point::RotatedKey) && !place.gradient
    };
    let turned_back =
        |place: Place| matches!(place.point, Point::Query | Point::Key) && place.gradient;
    if let (Some(parts), false) = (one_part(context), tested.settled()) {
        let Some(table) = whole_table(context, config.rope_theta)? else { return Ok(()) };
        let undo = |x: &mut Array2<f64>| {
            drop(rope_backward(&mut x.view_mut(), &table, &mut Cost::default()))
        };
        let redo = |x: &mut Array2<f64>| {
            drop(rope_forward(&mut x.view_mut(), &table, &mut Cost::default()))
        };
        let missing = |place: Place, x: &mut Array2<f64>| {
            if rotated(place) {
                undo(x);
            } else if turned_back(place) {
                redo(x);
            }
        };
        let fault = Fault::new(
            "rotary-missing",
            "queries and keys are not rotated: there is no rotary embedding",
            "rotate queries and keys after their projections",
        );
        let variant =
            Variant { tap: Some(&missing), parts: Some(parts.clone()), ..Variant::default() };
        context.test(fault, &variant, |_| (), tested)?;
        if config.options.rotaries[0].share.is_some() {
            return Ok(());
        }
        let neighbours = |place: Place, x: &mut Array2<f64>| {
            if rotated(place) {
                undo(x);
                interleaved(x, &table, head_dim, false);
            } else if turned_back(place) {
                redo(x);
                interleaved(x, &table, head_dim, true);
            }
        };
        let fault = Fault::new(
            "rotary-layout",
            "the rotary embedding pairs neighbouring entries (2j, 2j+1) instead of (j, j + d/2)",
            "Hugging Face checkpoints have rows permuted for the half-split layout; permute them, \
             or rotate that way",
        );
        let variant = Variant { tap: Some(&neighbours), parts: Some(parts), ..Variant::default() };
        context.test(fault, &variant, |_| (), tested)?;
    }
    for theta in [1e4, 5e5, 1e6, 1e5] {
        if (theta / config.rope_theta - 1.0).abs() < 1e-9 || tested.settled() {
            continue;
        }
        let mut model = context.case.model.clone();
        model.config.rope_theta = theta;
        let what =
            format!("the rotary base is {theta} instead of the config's {}", config.rope_theta);
        let fault = Fault::new("rotary-theta", what, "read rope_theta from config.json");
        context.test(
            fault,
            &Variant { forward: Some(&model), ..Variant::default() },
            |_| (),
            tested,
        )?;
    }
    Ok(())
}

/// `a` read as if its memory held its transpose.
fn reinterpreted(a: &Array2<f64>) -> Array2<f64> {
    let flat: Vec<f64> = a.iter().copied().collect();
    Array2::from_shape_vec((a.ncols(), a.nrows()), flat)
        .map_or_else(|_| a.clone(), |t| t.t().to_owned())
}

/// The inverse of [`reinterpreted`].
fn read_back(a: &Array2<f64>) -> Array2<f64> {
    let flat: Vec<f64> = a.t().iter().copied().collect();
    Array2::from_shape_vec(a.dim(), flat).unwrap_or_else(|_| a.clone())
}

fn weights(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    for factor in ["lora_B", "lora_A"] {
        let mut model = context.case.model.clone();
        let any = for_each_low_rank(&mut model, |_, a, b| {
            let which = if factor == "lora_A" { a } else { b };
            *which = reinterpreted(which).as_standard_layout().into_owned();
        });
        if !any || tested.settled() {
            break;
        }
        let what = format!(
            "{factor} is reshaped where it has to be transposed: its memory is read in the other \
             order"
        );
        let fault = Fault::new(
            "factor-reshaped",
            what,
            "lora_A is r x in, lora_B is out x r; transpose, do not view",
        );
        let back = |evidence: &mut Evidence| {
            for (name, g) in &mut evidence.gradients {
                if name.ends_with(factor) {
                    *g = read_back(g);
                }
            }
        };
        context.test(
            fault,
            &Variant { forward: Some(&model), ..Variant::default() },
            back,
            tested,
        )?;
    }
    let eps = context.case.model.config.rms_norm_eps;
    for other in [1e-6, 1e-5, 1e-8, 1e-12, 1e-3, 1e-2] {
        if (other / eps - 1.0).abs() < 1e-9 || tested.settled() {
            continue;
        }
        let mut model = context.case.model.clone();
        model.config.rms_norm_eps = other;
        let what = format!("RMSNorm adds eps = {other:e} instead of the config's {eps:e}");
        let fault = Fault::new("norm-eps", what, "read rms_norm_eps from config.json");
        context.test(
            fault,
            &Variant { forward: Some(&model), ..Variant::default() },
            |_| (),
            tested,
        )?;
    }
    Ok(())
}
