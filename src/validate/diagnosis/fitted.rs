//! Scalings that follow from no rule, fitted to the forward.

use super::{Context, Fault, Tested};
use crate::adapters::Method;
use crate::error::Result;
use crate::model::{Model, Projection};
use crate::validate::ladder::{RungName, rung_of};
use crate::validate::reference::{Evidence, Part, Variant, hidden_name};
use ndarray::Array2;

/// Scalings that follow from no rule: their factors are fitted to the forward, for all adapters
/// together, then for each kind of module, then for each layer.
pub(super) fn scalings(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let model = &context.case.model;
    let low_rank = |l: usize, p: Projection| {
        matches!(
            model.layers[l].projection(p).method,
            Method::Lora(_) | Method::Dora(_) | Method::Moslora(_)
        )
    };
    let places: Vec<(usize, Projection)> = (0..model.layers.len())
        .flat_map(|l| model.config.projections(l).into_iter().map(move |p| (l, p)))
        .filter(|&(l, p)| low_rank(l, p))
        .collect();
    if places.is_empty()
        || (context.case.trainer.hidden.is_empty() && context.case.trainer.logits.is_none())
    {
        return Ok(());
    }
    let kinds: Vec<Projection> = model
        .config
        .all_projections()
        .into_iter()
        .filter(|p| places.iter().any(|(_, q)| q == p))
        .collect();
    let group = |what: usize, (l, p): (usize, Projection)| match what {
        0 => 0,
        1 => kinds.iter().position(|q| *q == p).unwrap_or(0),
        _ => l,
    };
    // One module alone: those of the first layer whose output is wrong.
    let hidden = rung_of(context.rungs, RungName::Hidden);
    let first = context
        .case
        .trainer
        .hidden
        .keys()
        .copied()
        .find(|l| hidden.is_some_and(|r| r.fails(&hidden_name(*l))));
    let of_first: Vec<Projection> =
        places.iter().filter(|(l, _)| Some(*l) == first).map(|(_, p)| *p).collect();
    let group = |what: usize, (l, p): (usize, Projection)| match what {
        // Group 0 is left as it is.
        3 => {
            if Some(l) == first {
                1 + of_first.iter().position(|q| *q == p).unwrap_or(0)
            } else {
                0
            }
        }
        _ => group(what, (l, p)),
    };
    for what in 0..4 {
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
        let close = if context.coarse() { 0.2 } else { 0.01 };
        let off: Vec<usize> = (0..count).filter(|&i| (factors[i] - 1.0).abs() > close).collect();
        let named = |i: &usize| match what {
            0 => "every adapter".to_string(),
            1 => model.config.options.path(kinds[*i]).into_owned(),
            3 if *i == 0 => "all others".to_string(),
            3 => format!(
                "{} of layer {}",
                model.config.options.path(of_first[*i - 1]),
                first.unwrap_or(0)
            ),
            _ => format!("layer {i}"),
        };
        let each: Vec<String> =
            off.iter().map(|i| format!("{} {:.4} times", named(i), factors[*i])).collect();
        let all = off.len() == count && factors.iter().all(|f| (f / factors[0] - 1.0).abs() < 0.01);
        let name = if all { "adapter-scaling" } else { "adapter-scaling-some" };
        let sentence =
            format!("adapters act with another scaling than the declared one: {}", each.join(", "));
        let fix = "the scaling is alpha / r (alpha / sqrt(r) for rsLoRA), from the adapter's own \
                   config, in every module";
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
        let (Some(right), Some(values)) =
            (right, if evidence.is_some() { from } else { Some(got) })
        else {
            return;
        };
        // A forward that grew must not count for all.
        let norm = |a: &Array2<f64>| crate::linalg::norms::frobenius(&a.view());
        let unit = norm(right).max(norm(got)).max(f64::MIN_POSITIVE);
        rows.iter()
            .filter(|&&i| i < values.nrows())
            .for_each(|&i| all.extend(values.row(i).iter().map(|x| x / unit)));
    };
    for (layer, got) in &trainer.hidden {
        add(
            &got.values,
            context.exact.hidden.get(layer),
            evidence.and_then(|e| e.hidden.get(layer)),
        );
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
        if !tested.affords(0.5, "adapter-scaling-some") {
            return None;
        }
        tested.steps += 1;
        let model = scaled(factors);
        let part = Part { forward_only: true, ..Part::default() };
        let evidence = context
            .case
            .run(&Variant { forward: Some(&model), part, ..Variant::default() })
            .ok()?;
        Some(forward_vector(context, Some(&evidence))).filter(|v| v.len() == wanted.len())
    };
    let gap = |v: &[f64]| v.iter().zip(&wanted).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
    let mut factors = vec![1.0; count];
    let mut here = run(&factors)?;
    let start = gap(&here);
    // Rounding is left over in a half format.
    let enough = if context.coarse() { 0.3 } else { 1e-2 };
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
        let matrix: Vec<Vec<f64>> =
            columns.iter().map(|a| columns.iter().map(|b| inner(a, b)).collect()).collect();
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
                return (now < enough * start).then_some(factors);
            }
        }
        if change.iter().all(|c| (c * part).abs() < 1e-7) {
            break;
        }
    }
    (gap(&here) < enough * start).then_some(factors)
}
