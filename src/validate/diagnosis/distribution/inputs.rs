//! The gradient of a column-parallel layer's input, which is a sum over the tensor-parallel
//! processes, not put together.
//!
//! Each process then goes on backward with a gradient of its own: that of the residual stream with
//! its own part of every branch. All are run at once, as copies of the batch that share the forward
//! pass and part in the backward one. A sum that is made at the other kind of branch couples them.

use super::factors::add;
use super::{Gradients, names};
use crate::adapters::{AdaptedLinear, Method};
use crate::error::Result;
use crate::model::{Batch, Place, Point, Projection};
use crate::validate::diagnosis::rows::{MOST_SEEN, Seen, points};
use crate::validate::diagnosis::{Context, Fault, Tested};
use crate::validate::ranks::{Cut, Distribution, of_ranks};
use crate::validate::reference::{Evidence, Variant};
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Outputs of a column-parallel projection that each process of the group holds.
type Held = BTreeMap<(usize, Point), Vec<Range<usize>>>;

/// Which sums over the group are missing.
#[derive(Clone, Copy)]
struct Missing {
    /// Of the input of q, k, v.
    attention: bool,
    /// Of the input of gate and up.
    mlp: bool,
    /// Of the adapter's part of it alone.
    adapter: bool,
    what: &'static str,
}

const MISSING: [Missing; 4] = [
    Missing { attention: true, mlp: true, adapter: false, what: "of every column-parallel layer" },
    Missing {
        attention: true,
        mlp: true,
        adapter: true,
        what: "of the adapter in every column-parallel layer",
    },
    Missing { attention: false, mlp: true, adapter: false, what: "of gate and up" },
    Missing { attention: true, mlp: false, adapter: false, what: "of q, k and v" },
];

pub(super) fn test(
    context: &Context<'_>,
    distribution: &Distribution,
    group: &[usize],
    tested: &mut Tested<'_>,
) -> Result<()> {
    let (case, config) = (context.case, &context.case.model.config);
    let many = group.len();
    let widths = 8 * config.hidden_size + 4 * config.intermediate_size;
    let large = many * case.batch.tokens() * widths * case.model.layers.len() > MOST_SEEN;
    let plain =
        case.given().is_none() && case.trainer.masks.is_empty() && config.options.experts.is_none();
    let held = held(context, distribution, group);
    if large || !plain || distribution.places[0].data.cut == Cut::Sequence || held.is_empty() {
        return Ok(());
    }
    for missing in MISSING {
        // The sum of the factors' gradients may be made by the same operation, and be missing with
        // it.
        for summed in [true, false] {
            if tested.settled() || !tested.affords(many as f64, "column-input-not-reduced") {
                return Ok(());
            }
            tested.watch.begins("tensor-parallel ranks with their own gradients of inputs");
            tested.steps += many;
            let of = each_process(context, distribution, group, &held, missing)?;
            let gradients = put_together(context, distribution, group, &of, summed);
            if !names(context).iter().all(|name| of.iter().any(|g| g.contains_key(name))) {
                return Ok(());
            }
            let what = format!(
                "{}: the gradient of the input {} is each tensor-parallel rank's own part, not the \
                 sum: what lies below is wrong, differently on each",
                of_ranks(&distribution.view),
                missing.what
            );
            let fix = "all-reduce the gradient of the input of column-parallel layers over the \
                       tensor-parallel group (the identity's backward), of the adapter's branch \
                       too";
            let predicted = Evidence { gradients, ..context.exact.clone() };
            context.propose(
                Fault::new("column-input-not-reduced", what, fix),
                &predicted,
                tested,
            )?;
        }
    }
    Ok(())
}

/// What each process of the group holds of the outputs of its column-parallel layers.
fn held(context: &Context<'_>, distribution: &Distribution, group: &[usize]) -> Held {
    let model = &context.case.model;
    let mut all = Held::new();
    for (l, layer) in model.layers.iter().enumerate() {
        for (p, projection) in layer.projections() {
            let Some((Point::NormedInput | Point::NormedMiddle, output)) = points(p) else {
                continue;
            };
            let module = model.config.options.module(l, p);
            let outputs = projection.shape().0;
            let of = |rank: &usize| {
                let tensors = ["lora_B", "weight"].map(|tensor| format!("{module}.{tensor}"));
                let parts = &distribution.parts[*rank];
                let lines = tensors.iter().find_map(|name| parts.get(name)?.along(0))?;
                (lines.end <= outputs).then_some(lines)
            };
            let parts: Option<Vec<Range<usize>>> = group.iter().map(of).collect();
            if let Some(parts) = parts.filter(|parts| parts.iter().any(|p| p.len() < outputs)) {
                all.insert((l, output), parts);
            }
        }
    }
    // Projections without adapter, of which nothing is recorded, are cut as their neighbours are.
    for (l, layer) in model.layers.iter().enumerate() {
        for (p, projection) in layer.projections() {
            let Some((input @ (Point::NormedInput | Point::NormedMiddle), output)) = points(p)
            else {
                continue;
            };
            let neighbour = |q: &Projection| points(*q).is_some_and(|(i, _)| i == input);
            let cut = layer.projections().any(|(q, _)| {
                neighbour(&q) && points(q).is_some_and(|(_, output)| all.contains_key(&(l, output)))
            });
            let outputs = projection.shape().0;
            if cut && outputs.is_multiple_of(group.len()) {
                let each = outputs / group.len();
                let parts = (0..group.len()).map(|i| i * each..(i + 1) * each).collect();
                all.entry((l, output)).or_insert(parts);
            }
        }
    }
    all
}

/// Rows of a batch, one after the other `many` times.
fn copies(batch: &Batch, rows: &Range<usize>, many: usize) -> Result<Batch> {
    fn of<T: Clone>(all: &Array2<T>, rows: &Range<usize>, many: usize) -> Array2<T> {
        let part = all.slice(s![rows.clone(), ..]);
        let views: Vec<ArrayView2<'_, T>> = (0..many).map(|_| part.view()).collect();
        concatenate(Axis(0), &views).unwrap_or_else(|_| part.to_owned())
    }
    let mut copy = Batch::new(of(&batch.input_ids, rows, many), of(&batch.labels, rows, many))?;
    if let Some(mask) = &batch.attention_mask {
        copy = copy.with_attention_mask(of(mask, rows, many))?;
    }
    if let Some(positions) = &batch.position_ids {
        copy = copy.with_position_ids(of(positions, rows, many))?;
    }
    if let Some(documents) = &batch.documents {
        copy = copy.with_documents(of(documents, rows, many))?;
    }
    Ok(copy)
}

/// The adapters' part of the gradient of an input, from those of the outputs that were seen.
fn through_adapters(
    context: &Context<'_>,
    (layer, input): (usize, Point),
    seen: &HashMap<(usize, Point, bool), Array2<f64>>,
) -> Array2<f64> {
    let projections = context.case.model.layers[layer].projections();
    let part = |(p, projection): (Projection, &AdaptedLinear<f64>)| {
        let (from, output) = points(p)?;
        let (Method::Lora(m), true) = (&projection.method, from == input) else { return None };
        Some(seen.get(&(layer, output, true))?.dot(&m.b).dot(&m.a) * m.scaling)
    };
    let rows = seen.values().next().map_or(0, Array2::nrows);
    let zero = Array2::zeros((rows, context.case.model.config.hidden_size));
    projections.filter_map(part).fold(zero, |sum, part| sum + part)
}

/// Gradients of the factors as each process of the group computes them.
fn each_process(
    context: &Context<'_>,
    distribution: &Distribution,
    group: &[usize],
    held: &Held,
    missing: Missing,
) -> Result<Vec<Gradients>> {
    let (case, many) = (context.case, group.len());
    let mut all = vec![Gradients::new(); many];
    for (range, divisor) in case.parts() {
        let batch = copies(&case.batch, &range, many)?;
        let each = range.len() * case.batch.input_ids.ncols();
        let seen: Seen = RefCell::default();
        let tap = |place: Place, x: &mut Array2<f64>| {
            let Some(layer) = place.layer else { return };
            if place.gradient {
                if let Some(parts) = held.get(&(layer, place.point)) {
                    for (copy, own) in parts.iter().enumerate() {
                        let mut rows = x.slice_mut(s![copy * each..(copy + 1) * each, ..]);
                        rows.slice_mut(s![.., ..own.start]).fill(0.0);
                        rows.slice_mut(s![.., own.end..]).fill(0.0);
                    }
                }
                let left_out = match place.point {
                    Point::NormedInput => missing.attention,
                    Point::NormedMiddle => missing.mlp,
                    _ => true,
                };
                if !left_out
                    || (missing.adapter
                        && matches!(place.point, Point::NormedInput | Point::NormedMiddle))
                {
                    // What each adds to the sum, and what it keeps to itself.
                    let kept = missing
                        .adapter
                        .then(|| through_adapters(context, (layer, place.point), &seen.borrow()));
                    if let Some(kept) = &kept {
                        *x -= kept;
                    }
                    let mut sum = x.slice(s![..each, ..]).to_owned();
                    (1..many)
                        .for_each(|copy| sum += &x.slice(s![copy * each..(copy + 1) * each, ..]));
                    (0..many).for_each(|copy| {
                        x.slice_mut(s![copy * each..(copy + 1) * each, ..]).assign(&sum)
                    });
                    if let Some(kept) = &kept {
                        *x += kept;
                    }
                }
            }
            seen.borrow_mut().insert((layer, place.point, place.gradient), x.clone());
        };
        let parts = Some(vec![(0..many * range.len(), divisor)]);
        case.run(&Variant { batch: Some(&batch), parts, tap: Some(&tap), ..Variant::default() })?;
        let seen = seen.into_inner();
        for (l, layer) in case.model.layers.iter().enumerate() {
            for (p, projection) in layer.projections() {
                let (Method::Lora(m), Some((input, output))) = (&projection.method, points(p))
                else {
                    continue;
                };
                let (Some(x), Some(dy)) =
                    (seen.get(&(l, input, false)), seen.get(&(l, output, true)))
                else {
                    continue;
                };
                let module = case.model.config.options.module(l, p);
                let (name_a, name_b) = (format!("{module}.lora_A"), format!("{module}.lora_B"));
                for (copy, (of, &rank)) in all.iter_mut().zip(group).enumerate() {
                    let rows = s![copy * each..(copy + 1) * each, ..];
                    let (x, dy) = (x.slice(rows), dy.slice(rows));
                    let inputs =
                        distribution.parts[rank].get(&name_a).and_then(|part| part.along(1));
                    let z = match inputs.filter(|own| own.end <= m.a.ncols()) {
                        Some(own) => x.slice(s![.., own.clone()]).dot(&m.a.slice(s![.., own]).t()),
                        None => x.dot(&m.a.t()),
                    };
                    add(of, name_a.clone(), dy.dot(&m.b).t().dot(&x) * m.scaling);
                    add(of, name_b.clone(), dy.t().dot(&z) * m.scaling);
                }
            }
        }
    }
    Ok(all)
}

/// What the processes hold together: of a divided factor each its own part, of a whole one the sum
/// or the viewer's own.
fn put_together(
    context: &Context<'_>,
    distribution: &Distribution,
    group: &[usize],
    of: &[Gradients],
    summed: bool,
) -> Gradients {
    let mut gradients = context.exact.gradients.clone();
    let viewer = group.iter().position(|rank| distribution.view.contains(rank)).unwrap_or(0);
    for (name, whole) in &mut gradients {
        let parts: Vec<&Array2<f64>> = of.iter().filter_map(|g| g.get(name)).collect();
        if parts.len() < of.len() || parts.iter().any(|part| part.dim() != whole.dim()) {
            continue;
        }
        let columns = whole.ncols();
        let divided =
            group.iter().any(|&rank| distribution.entries(rank, name, whole.len()).is_some());
        if divided {
            for (part, &rank) in parts.iter().zip(group) {
                for i in distribution.entries(rank, name, whole.len()).into_iter().flatten() {
                    whole[[i / columns, i % columns]] = part[[i / columns, i % columns]];
                }
            }
        } else if summed {
            whole.fill(0.0);
            parts.iter().for_each(|part| *whole += *part);
        } else {
            whole.assign(parts[viewer]);
        }
    }
    gradients
}
