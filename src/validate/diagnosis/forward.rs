//! Faults of the forward pass: the reference is run again with each.

use super::{Context, Fault, Tested};
use crate::adapters::Method;
use crate::blocks::rope::{RopeTable, Rotary, rope_backward, rope_forward};
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
    scaling(context, tested)?;
    attention(context, tested)?;
    rotary(context, tested)?;
    super::families::test(context, tested)?;
    stale(context, tested)?;
    weights(context, tested)?;
    bases(context, tested)?;
    fitted_scaling(context, tested)?;
    frequencies(context, tested)
}

/// Adapters inside the base weight already, or taken out of it, and applied besides with the declared factor.
fn bases(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    for (sign, name, what, fix) in [
        (
            1.0,
            "adapter-twice",
            "the adapter is merged into the base weight and applied besides",
            "unmerge the base weight before training, or start from the original checkpoint",
        ),
        (
            -1.0,
            "wrong-base",
            "the base weight is the dumped one minus the adapter's product (PiSSA's residual, or another initialisation that \
             changes the base); the dump declares the original",
            "give the base model that the trainer multiplies by: model_path= of the residual weights",
        ),
    ] {
        let mut model = context.case.model.clone();
        let mut any = false;
        for layer in &mut model.layers {
            for (_, projection) in layer.projections_mut() {
                if matches!(projection.method, Method::Lora(_) | Method::Moslora(_)) {
                    let delta = projection.effective_weight()? - &projection.base.dense();
                    *projection.base.dense_mut("base")? += &(delta * sign);
                    any = true;
                }
            }
        }
        if any && !tested.settled() {
            context.test(
                Fault::new(name, what, fix),
                &Variant { forward: Some(&model), ..Variant::default() },
                |_| (),
                tested,
            )?;
        }
    }
    Ok(())
}

/// Scalings that follow from no rule: their factors are fitted to the forward, for all adapters together, then for each
/// kind of module, then for each layer.
fn fitted_scaling(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let model = &context.case.model;
    let low_rank = |l: usize, p: Projection| {
        matches!(model.layers[l].projection(p).method, Method::Lora(_) | Method::Dora(_) | Method::Moslora(_))
    };
    let places: Vec<(usize, Projection)> = (0..model.layers.len())
        .flat_map(|l| model.config.projections(l).into_iter().map(move |p| (l, p)))
        .filter(|&(l, p)| low_rank(l, p))
        .collect();
    if places.is_empty() || (context.case.trainer.hidden.is_empty() && context.case.trainer.logits.is_none()) {
        return Ok(());
    }
    let kinds: Vec<Projection> =
        model.config.all_projections().into_iter().filter(|p| places.iter().any(|(_, q)| q == p)).collect();
    let group = |what: usize, (l, p): (usize, Projection)| match what {
        0 => 0,
        1 => kinds.iter().position(|q| *q == p).unwrap_or(0),
        _ => l,
    };
    for what in 0..3 {
        let count = places.iter().map(|&place| group(what, place)).max().unwrap_or(0) + 1;
        if tested.settled() || count > 12 || (what > 0 && count == 1) {
            continue;
        }
        let scaled = |factors: &[f64]| {
            let mut changed = model.clone();
            for &(l, p) in &places {
                let f = factors[group(what, (l, p))];
                match &mut changed.layers[l].projection_mut(p).method {
                    Method::Lora(m) => m.scaling *= f,
                    Method::Dora(m) => m.scaling *= f,
                    Method::Moslora(m) => m.scaling *= f,
                    _ => {}
                }
            }
            changed
        };
        tested.watch.begins("hypothesis: fitted scalings");
        let Some(factors) = fit(context, count, &scaled, tested) else { continue };
        let off: Vec<usize> = (0..count).filter(|&i| (factors[i] - 1.0).abs() > 0.01).collect();
        let named = |i: &usize| match what {
            0 => "every adapter".to_string(),
            1 => model.config.options.path(kinds[*i]).into_owned(),
            _ => format!("layer {i}"),
        };
        let each: Vec<String> = off.iter().map(|i| format!("{} {:.4} times", named(i), factors[*i])).collect();
        let all = off.len() == count && factors.iter().all(|f| (f / factors[0] - 1.0).abs() < 0.01);
        let name = if all { "adapter-scaling" } else { "adapter-scaling-some" };
        let sentence = format!("adapters act with another scaling than the declared one: {}", each.join(", "));
        let fix =
            "the scaling is alpha / r (alpha / sqrt(r) for rsLoRA), from the adapter's own config, in every module";
        let changed = scaled(&factors);
        if !off.is_empty() {
            context.test(
                Fault::new(name, sentence, fix),
                &Variant { forward: Some(&changed), ..Variant::default() },
                |_| (),
                tested,
            )?;
        }
    }
    Ok(())
}

/// What was dumped of the forward, one vector in units of what the rung's tensors hold.
fn forward_vector(context: &Context<'_>, evidence: Option<&Evidence>) -> Vec<f64> {
    let trainer = &context.case.trainer;
    let mut all = Vec::new();
    let rows = context.case.real_rows();
    let mut add = |got: &Array2<f64>, right: Option<&Array2<f64>>, from: Option<&Array2<f64>>| {
        let (Some(right), Some(values)) = (right, if evidence.is_some() { from } else { Some(got) }) else { return };
        // A forward that grew must not count for all.
        let norm = |a: &Array2<f64>| crate::linalg::norms::frobenius(&a.view());
        let unit = norm(right).max(norm(got)).max(f64::MIN_POSITIVE);
        rows.iter().filter(|&&i| i < values.nrows()).for_each(|&i| all.extend(values.row(i).iter().map(|x| x / unit)));
    };
    for (layer, got) in &trainer.hidden {
        add(&got.values, context.exact.hidden.get(layer), evidence.and_then(|e| e.hidden.get(layer)));
    }
    if let Some(got) = &trainer.logits {
        add(&got.values, context.exact.logits.as_ref(), evidence.and_then(|e| e.logits.as_ref()));
    }
    all
}

/// Gauss-Newton on factors, from 1, with differences for derivatives.
fn fit(
    context: &Context<'_>,
    count: usize,
    scaled: &dyn Fn(&[f64]) -> Model<f64>,
    tested: &mut Tested<'_>,
) -> Option<Vec<f64>> {
    let wanted = forward_vector(context, None);
    let mut run = |factors: &[f64]| {
        tested.steps += 1;
        let model = scaled(factors);
        let evidence = context.case.run(&Variant { forward: Some(&model), ..Variant::default() }).ok()?;
        Some(forward_vector(context, Some(&evidence))).filter(|v| v.len() == wanted.len())
    };
    let gap = |v: &[f64]| v.iter().zip(&wanted).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
    let mut factors = vec![1.0; count];
    let mut here = run(&factors)?;
    let start = gap(&here);
    if count == 1 {
        // One factor may be far away.
        for factor in [0.125, 0.25, 0.5, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0] {
            let there = run(&[factor])?;
            if gap(&there) < gap(&here) {
                (factors, here) = (vec![factor], there);
            }
        }
    }
    for _ in 0..12 {
        let columns: Option<Vec<Vec<f64>>> = (0..count)
            .map(|i| {
                let mut moved = factors.clone();
                let step = 1e-4 * (1.0 + moved[i].abs());
                moved[i] += step;
                Some(run(&moved)?.iter().zip(&here).map(|(a, b)| (a - b) / step).collect())
            })
            .collect();
        let columns = columns?;
        let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let residual: Vec<f64> = wanted.iter().zip(&here).map(|(a, b)| a - b).collect();
        let matrix: Vec<Vec<f64>> = columns.iter().map(|a| columns.iter().map(|b| inner(a, b)).collect()).collect();
        let right: Vec<f64> = columns.iter().map(|a| inner(a, &residual)).collect();
        let change = super::rows::solve(matrix, right)?;
        let mut part = 1.0;
        let now = gap(&here);
        loop {
            let next: Vec<f64> = factors.iter().zip(&change).map(|(f, c)| f + part * c).collect();
            let there = run(&next)?;
            if gap(&there) < now {
                (factors, here) = (next, there);
                break;
            }
            part /= 2.0;
            if part < 0.05 {
                return (now < 1e-2 * start).then_some(factors);
            }
        }
        if change.iter().all(|c| (c * part).abs() < 1e-7) {
            break;
        }
    }
    (gap(&here) < 1e-2 * start).then_some(factors)
}

/// Rotary angles from other frequencies: scaled as for long contexts, or computed in a half format.
fn frequencies(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let config = &context.case.model.config;
    let (half, theta) = (config.head_dim / 2, config.rope_theta);
    // What follows takes whole heads with frequencies that nothing scales.
    if config.options.rotaries.first() != Some(&Rotary::default()) {
        return Ok(());
    }
    let Some(parts) = one_part(context) else { return Ok(()) };
    let plain: Vec<f64> = (0..half).map(|j| theta.powf(-2.0 * j as f64 / config.head_dim as f64)).collect();
    let llama3 = |factor: f64, low: f64, high: f64, original: f64| -> Vec<f64> {
        let scale = |f: &f64| {
            let wave = 2.0 * std::f64::consts::PI / f;
            if wave < original / high {
                *f
            } else if wave > original / low {
                f / factor
            } else {
                let smooth = (original / wave - low) / (high - low);
                (1.0 - smooth) * f / factor + smooth * f
            }
        };
        plain.iter().map(scale).collect()
    };
    let mut candidates: Vec<(String, Vec<f64>)> = Vec::new();
    let own = config.max_position_embeddings as f64;
    for factor in [8.0, 32.0, 4.0, 2.0, 16.0] {
        for original in [8192.0, own, own / factor, 4096.0, 2048.0, 16.0, 32.0, 64.0, 128.0] {
            let values = llama3(factor, 1.0, 4.0, original);
            candidates.push((format!("scaled as for Llama 3.1 (factor {factor}, original length {original})"), values));
        }
    }
    for factor in [2.0, 4.0, 8.0, 16.0, 32.0, 0.5, 0.25] {
        candidates.push((format!("divided by {factor} (linear scaling)"), plain.iter().map(|f| f / factor).collect()));
        let base = theta * f64::powf(factor, config.head_dim as f64 / (config.head_dim as f64 - 2.0).max(1.0));
        let values = (0..half).map(|j| base.powf(-2.0 * j as f64 / config.head_dim as f64)).collect();
        candidates.push((format!("those of a base scaled by NTK (factor {factor})"), values));
    }
    let mut tried: Vec<Vec<f64>> = vec![plain.clone()];
    let best = |values: &[f64], exact: bool| -> Array2<f64> { angles(context, values, exact) };
    for (text, values) in candidates {
        let same = |other: &Vec<f64>| other.iter().zip(&values).all(|(a, b)| (a / b - 1.0).abs() < 1e-9);
        if tested.settled() {
            return Ok(());
        }
        if tried.iter().any(same) {
            continue;
        }
        tried.push(values.clone());
        let what = format!("the rotary frequencies are {text}; the config declares no scaling");
        let fault = Fault::new("rotary-scaling", what, "give rope_scaling the same value in config and trainer");
        turned(context, fault, &best(&values, true), &parts, tested)?;
    }
    if !tested.settled() {
        let what = "rotary positions, frequencies and angles are computed in a half format, which is wrong from a few hundred tokens on";
        let fault =
            Fault::new("rotary-precision", what, "compute angles in float32 (autocast off), and cast cos and sin only");
        turned(context, fault, &best(&plain, false), &parts, tested)?;
    }
    Ok(())
}

/// Angles of every token of the batch.
fn angles(context: &Context<'_>, frequencies: &[f64], exact: bool) -> Array2<f64> {
    use crate::validate::precision::Precision;
    let (rows, length) = context.case.batch.input_ids.dim();
    let coarse = context.case.rounding.coarsest();
    let coarse = if coarse.epsilon() > 1e-4 { coarse } else { Precision::Bf16 };
    let round = |x: f64| if exact { x } else { coarse.round(x) };
    let position = |i: usize| match &context.case.batch.position_ids {
        Some(positions) => f64::from(positions[[i / length, i % length]]),
        None => (i % length) as f64,
    };
    Array2::from_shape_fn((rows * length, frequencies.len()), |(i, j)| {
        round(round(position(i)) * round(frequencies[j]))
    })
}

/// The step with other rotary angles.
fn turned(
    context: &Context<'_>,
    fault: Fault,
    angles: &Array2<f64>,
    parts: &[(Range<usize>, f64)],
    tested: &mut Tested<'_>,
) -> Result<()> {
    let Some(table) = whole_table(context, context.case.model.config.rope_theta)? else { return Ok(()) };
    let half = angles.ncols();
    let turn = |x: &mut Array2<f64>, direction: f64| {
        for (mut row, angle) in x.rows_mut().into_iter().zip(angles.rows()) {
            for head in 0..row.len() / (2 * half) {
                for j in 0..half {
                    let (one, other) = (head * 2 * half + j, head * 2 * half + j + half);
                    let (sin, cos) = (direction * angle[j]).sin_cos();
                    (row[one], row[other]) = (row[one] * cos - row[other] * sin, row[other] * cos + row[one] * sin);
                }
            }
        }
    };
    let tap = |place: Place, x: &mut Array2<f64>| match (place.point, place.gradient) {
        (Point::RotatedQuery | Point::RotatedKey, false) => {
            drop(rope_backward(&mut x.view_mut(), &table, &mut Cost::default()));
            turn(x, 1.0);
        }
        (Point::Query | Point::Key, true) => {
            drop(rope_forward(&mut x.view_mut(), &table, &mut Cost::default()));
            turn(x, -1.0);
        }
        _ => {}
    };
    let variant = Variant { tap: Some(&tap), parts: Some(parts.to_vec()), ..Variant::default() };
    context.test(fault, &variant, |_| (), tested)
}

/// Weights that still hold the columns of the step before, and one micro-batch alone that ran with old parameters.
fn stale_parts(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let case = context.case;
    let mut old = case.model.clone();
    let mut any = false;
    for layer in &mut old.layers {
        for (_, projection) in layer.projections_mut() {
            if let Method::Paca(m) = &mut projection.method
                && m.active
                && let Some(columns) = m.inactive.clone()
            {
                m.inactive = Some(projection.base.columns(&m.index));
                projection.base.put_columns(&m.index, columns);
                any = true;
            }
            if let Method::S2ft(m) = &mut projection.method
                && m.active
                && let Some(values) = m.original.clone()
            {
                let weight = projection.base.dense_mut("stale columns")?;
                m.of_mut(weight).assign(&values);
                any = true;
            }
        }
    }
    let previous = previous_model(context)?;
    let fix = "copy the trained columns into the weight before each forward, or right after the update";
    if any && !tested.settled() {
        let what = "the forward multiplies by the columns that the checkpoint's weight holds, those of a step before";
        let fault = Fault::new("stale-weight", what, fix);
        context.test(fault, &Variant { forward: Some(&old), ..Variant::default() }, |_| (), tested)?;
    }
    let parts = case.parts();
    if parts.len() < 2 {
        return Ok(());
    }
    for model in [previous.as_ref(), any.then_some(&old)].into_iter().flatten() {
        for k in 0..parts.len().min(4) {
            if tested.settled() {
                return Ok(());
            }
            tested.watch.begins("hypothesis: stale micro-batch");
            tested.steps += 2;
            let stale = Variant { forward: Some(model), parts: Some(vec![parts[k].clone()]), ..Variant::default() };
            let rest: Vec<_> = parts.iter().enumerate().filter(|(i, _)| *i != k).map(|(_, p)| p.clone()).collect();
            let rest = Variant { parts: Some(rest), ..Variant::default() };
            let (Ok(mut predicted), Ok(other)) = (case.run(&stale), case.run(&rest)) else { continue };
            predicted.loss += other.loss;
            if let (Some(to), Some(from)) = (&mut predicted.logits, &other.logits) {
                *to += from;
            }
            for (layer, from) in &other.hidden {
                if let Some(to) = predicted.hidden.get_mut(layer) {
                    *to += from;
                }
            }
            for (name, from) in &other.gradients {
                if let Some(to) = predicted.gradients.get_mut(name) {
                    *to += from;
                }
            }
            let what = format!(
                "micro-batch {k} of {} runs with the parameters of the step before, the others with the present ones",
                parts.len()
            );
            context.propose(Fault::new("stale-weight", what, fix), &predicted, tested);
        }
    }
    Ok(())
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
    let fix = "the scaling is alpha / r (alpha / sqrt(r) for rsLoRA), from the adapter's own config";
    let candidates = [
        (
            0.0,
            "adapter-not-applied",
            "the adapter has no effect on the forward".to_string(),
            "the module is bypassed, disabled, or wrapped after the model was traced",
        ),
        (1.0, wrong, format!("the adapter is scaled by 1 instead of {declared}"), fix),
        (alpha / r, wrong, format!("the adapter is scaled by alpha / r instead of {declared}"), fix),
        (alpha / r.sqrt(), wrong, format!("the adapter is scaled by alpha / sqrt(r) instead of {declared}"), fix),
        (
            2.0 * declared,
            "adapter-twice",
            "the adapter acts twice: the base weight already holds it".into(),
            "unmerge the base weight before training, or start from the original checkpoint",
        ),
        (alpha, wrong, format!("the adapter is scaled by alpha instead of {declared}"), fix),
        (1.0 / r, wrong, format!("the adapter is scaled by 1 / r instead of {declared}"), fix),
        (r / alpha, wrong, format!("the adapter is scaled by r / alpha instead of {declared}"), fix),
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
        (1.0 / width.sqrt(), "the scores are divided by sqrt(hidden_size) instead of sqrt(head_dim)"),
    ] {
        if tested.settled() {
            return Ok(());
        }
        let fault = Fault::new("attention-scale", text, "the factor of Q K^T is 1 / sqrt(head_dim)");
        context.test(fault, &Variant { scale: Some(scale), ..Variant::default() }, |_| (), tested)?;
    }
    let length = context.case.batch.input_ids.ncols();
    for (ahead, text) in [
        (length, "every token sees the whole sequence: there is no causal mask".to_string()),
        (1, "every token sees the next one, which it must predict: the causal mask is off by one".to_string()),
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
        context.test(fault, &Variant { batch: Some(&batch), ..Variant::default() }, |_| (), tested)?;
    }
    grouped_heads(context, tested)
}

/// Key/value heads repeated as a block instead of each in turn: query head h reads h mod H_kv instead of h / group.
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
    let pick = |a: &mut Array2<f64>, axis: Axis| *a = a.select(axis, &lines).as_standard_layout().into_owned();
    for layer in &mut model.layers {
        for (p, axis) in [(Projection::Query, Axis(0)), (Projection::Output, Axis(1))] {
            // Heads that are stored in one weight with others are left alone.
            let Some(projection) = layer.get_mut(p) else { return Ok(()) };
            match &mut projection.method {
                Method::Frozen | Method::Full => {}
                Method::Lora(m) => pick(if axis.index() == 0 { &mut m.b } else { &mut m.a }, axis),
                Method::Moslora(m) => pick(if axis.index() == 0 { &mut m.b } else { &mut m.a }, axis),
                Method::Dora(m) if axis.index() == 0 => {
                    pick(&mut m.b, axis);
                    m.magnitude = m.magnitude.select(Axis(1), &lines);
                }
                Method::Dora(m) => pick(&mut m.a, axis),
                Method::Paca(_) | Method::S2ft(_) | Method::Spft(_) => return Ok(()),
            }
            pick(projection.base.dense_mut("grouped heads")?, axis);
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
        "query heads read the wrong key/value heads: these are repeated as a block instead of each in turn",
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
    let rotated = |place: Place| matches!(place.point, Point::RotatedQuery | Point::RotatedKey) && !place.gradient;
    let turned_back = |place: Place| matches!(place.point, Point::Query | Point::Key) && place.gradient;
    if let (Some(parts), false) = (one_part(context), tested.settled()) {
        let Some(table) = whole_table(context, config.rope_theta)? else { return Ok(()) };
        let undo = |x: &mut Array2<f64>| drop(rope_backward(&mut x.view_mut(), &table, &mut Cost::default()));
        let redo = |x: &mut Array2<f64>| drop(rope_forward(&mut x.view_mut(), &table, &mut Cost::default()));
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
        let variant = Variant { tap: Some(&missing), parts: Some(parts.clone()), ..Variant::default() };
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
            "Hugging Face checkpoints have rows permuted for the half-split layout; permute them, or rotate that way",
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
        let what = format!("the rotary base is {theta} instead of the config's {}", config.rope_theta);
        let fault = Fault::new("rotary-theta", what, "read rope_theta from config.json");
        context.test(fault, &Variant { forward: Some(&model), ..Variant::default() }, |_| (), tested)?;
    }
    Ok(())
}

/// The model with the parameters of the step before, if the dump has them.
pub(super) fn previous_model(context: &Context<'_>) -> Result<Option<Model<f64>>> {
    let previous = &context.case.trainer.previous;
    if previous.is_empty() {
        return Ok(None);
    }
    let mut model = context.case.model.clone();
    model.for_each_trainable(&mut |name, values| {
        if let Some(old) = previous.get(name).filter(|old| old.values.dim() == values.dim()) {
            values.assign(&old.values);
        }
        Ok(())
    })?;
    Ok(Some(model))
}

fn stale(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    stale_weights(context, tested)?;
    stale_parts(context, tested)
}

fn stale_weights(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let Some(previous) = previous_model(context)?.filter(|_| !tested.settled()) else { return Ok(()) };
    let fix = "merge again, or refresh copies of the weights, after every update";
    let fault = Fault::new("stale-weight", "forward and backward use the parameters of the step before", fix);
    context.test(fault, &Variant { forward: Some(&previous), ..Variant::default() }, |_| (), tested)?;
    // The product with the merged weight of the step before, chain rule through the present factors.
    let mut merged = context.case.model.clone();
    let mut any = false;
    for (layer, old) in merged.layers.iter_mut().zip(&previous.layers) {
        for (p, projection) in layer.projections_mut() {
            if matches!(projection.method, Method::Lora(_) | Method::Moslora(_)) {
                let present = projection.effective_weight()?;
                let base = projection.base.dense_mut("stale weight")?;
                *base += &(old.projection(p).effective_weight()? - present);
                any = true;
            }
        }
    }
    if any && !tested.settled() {
        let what = "the forward multiplies by the merged weight of the step before, while the factors have moved on";
        let fault = Fault::new("stale-merged-weight", what, fix);
        context.test(fault, &Variant { forward: Some(&merged), ..Variant::default() }, |_| (), tested)?;
    }
    Ok(())
}

/// `a` read as if its memory held its transpose.
fn reinterpreted(a: &Array2<f64>) -> Array2<f64> {
    let flat: Vec<f64> = a.iter().copied().collect();
    Array2::from_shape_vec((a.ncols(), a.nrows()), flat).map_or_else(|_| a.clone(), |t| t.t().to_owned())
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
        let what = format!("{factor} is reshaped where it has to be transposed: its memory is read in the other order");
        let fault = Fault::new("factor-reshaped", what, "lora_A is r x in, lora_B is out x r; transpose, do not view");
        let back = |evidence: &mut Evidence| {
            for (name, g) in &mut evidence.gradients {
                if name.ends_with(factor) {
                    *g = read_back(g);
                }
            }
        };
        context.test(fault, &Variant { forward: Some(&model), ..Variant::default() }, back, tested)?;
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
        context.test(fault, &Variant { forward: Some(&model), ..Variant::default() }, |_| (), tested)?;
    }
    Ok(())
}
