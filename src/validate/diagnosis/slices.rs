//! PaCA and S2FT: which rows or columns of the whole weight's gradient the trainer's slice really
//! holds.

use super::{Context, Fault, Tested};
use crate::adapters::Method;
use crate::adapters::s2ft::Side;
use crate::error::Result;
use crate::linalg::norms::frobenius;
use crate::model::{Model, Projection};
use crate::validate::reference::Variant;
use ndarray::{Array2, ArrayView1, Axis};

/// Most entries of the gradients of whole weights.
const MOST_ENTRIES: usize = 1 << 27;

/// What one tensor's lines were found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    Permuted,
    RowsForColumns,
    CheckpointOrder,
    OtherLines,
}

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let model = &context.case.model;
    let sliced = |l: usize, p: Projection| {
        matches!(model.layers[l].projection(p).method, Method::Paca(_) | Method::S2ft(_))
    };
    let places: Vec<(usize, Projection)> = (0..model.layers.len())
        .flat_map(|l| model.config.projections(l).into_iter().map(move |p| (l, p)))
        .filter(|&(l, p)| sliced(l, p))
        .collect();
    // Whole gradients from the top down, as many as fit.
    let mut left = MOST_ENTRIES;
    let fits = |&(l, p): &(usize, Projection)| {
        let (out, input) = model.config.projection_shape(p);
        let enough = out * input <= left;
        left -= if enough { out * input } else { left };
        enough && l < model.layers.len()
    };
    let places: Vec<(usize, Projection)> = places.into_iter().rev().take_while(fits).collect();
    let places: Vec<(usize, Projection)> = places.into_iter().rev().collect();
    if places.is_empty() || context.failing.is_empty() {
        return Ok(());
    }
    let mut whole: Model<f64> = model.clone();
    for &(l, p) in &places {
        whole.layers[l].projection_mut(p).method = Method::Full;
    }
    tested.watch.begins("gradients of whole weights");
    if !tested.affords(1.0, "other-lines") {
        return Ok(());
    }
    tested.steps += 1;
    let gradients =
        context.case.run(&Variant { forward: Some(&whole), ..Variant::default() })?.gradients;
    let mut results: Vec<(Found, String)> = Vec::new();
    for (l, p) in places {
        let prefix = model.config.options.module(l, p);
        let Some(weight) = gradients.get(&format!("{prefix}.weight")) else { continue };
        let (name, axis, expected, scaling) = match &model.layers[l].projection(p).method {
            Method::Paca(m) => {
                (format!("{prefix}.paca_columns"), Axis(1), m.index.clone(), m.scaling)
            }
            Method::S2ft(m) => {
                let axis = if m.side == Side::Output { Axis(0) } else { Axis(1) };
                (format!("{prefix}.s2ft_slice"), axis, m.range.clone().collect(), 1.0)
            }
            _ => continue,
        };
        let (true, Some(got)) = (
            context.failing.iter().any(|m| m.name == name),
            context.case.trainer.gradients.get(&name),
        ) else {
            continue;
        };
        let got = got.values.mapv(|x| x / scaling);
        let tolerance = 0.05f64.max(context.case.rounding.coarsest().epsilon() * 8.0);
        let found = match lines(&got, axis, weight, axis, tolerance) {
            Some(map) if sorted(&map) == sorted(&expected) => Some((Found::Permuted, map)),
            Some(map) => {
                let order =
                    model.layers[l].order.as_ref().map(|order| order.lines(p, &model.config));
                // Line e of the checkpoint stands, after the co-permutation, where the order says
                // e.
                let stands = |e: &usize| order.as_ref().and_then(|o| o.iter().position(|x| x == e));
                let checkpoint: Option<Vec<usize>> = expected.iter().map(stands).collect();
                let kind = if checkpoint.as_ref() == Some(&map) {
                    Found::CheckpointOrder
                } else {
                    Found::OtherLines
                };
                Some((kind, map))
            }
            None => {
                let other = Axis(1 - axis.index());
                // Rows in the shape of columns, or in their own.
                lines(&got, axis, weight, other, tolerance)
                    .or_else(|| lines(&got, other, weight, other, tolerance))
                    .map(|map| (Found::RowsForColumns, map))
            }
        };
        if let Some((kind, map)) = found {
            results.push((
                kind,
                format!("{name} holds lines {:?}, expected {:?}", head(&map), head(&expected)),
            ));
        }
    }
    let Some(kind) = results.iter().map(|r| r.0).max() else { return Ok(()) };
    let text = results.iter().find(|r| r.0 == kind).map_or("", |r| r.1.as_str());
    let (name, what, fix) = match kind {
        Found::Permuted => (
            "slice-order",
            "the right columns of the weight's gradient in another order",
            "gather the gradient by the same index, in the same order, as the values",
        ),
        Found::RowsForColumns => (
            "rows-for-columns",
            "rows of the weight's gradient where columns are trained, or the reverse",
            "PaCA and input-side S2FT train columns of an out x in weight: dW[:, idx] = dy^T x[:, \
             idx]",
        ),
        Found::CheckpointOrder => (
            "slice-before-permutation",
            "the slice of the weight before its co-permutation",
            "take rows and columns after heads and channels are reordered",
        ),
        Found::OtherLines => (
            "other-lines",
            "other rows or columns of the weight's gradient than those trained",
            "compare the selected index with the one used in backward",
        ),
    };
    let fault = Fault::new(name, format!("{what}: {text}"), fix);
    let diagnosis = context.of_gradients(fault, results.len(), 0.0);
    tested.found.push(diagnosis);
    Ok(())
}

fn head(list: &[usize]) -> &[usize] {
    &list[..list.len().min(6)]
}

fn sorted(list: &[usize]) -> Vec<usize> {
    let mut list = list.to_vec();
    list.sort_unstable();
    list
}

/// For each line of `got` the line of `whole` that it equals, if every one equals a different line.
fn lines(
    got: &Array2<f64>,
    axis: Axis,
    whole: &Array2<f64>,
    other: Axis,
    tolerance: f64,
) -> Option<Vec<usize>> {
    if got.len_of(Axis(1 - axis.index())) != whole.len_of(Axis(1 - other.index())) {
        return None;
    }
    let mut map = Vec::new();
    for line in got.axis_iter(axis) {
        let gap = |candidate: ArrayView1<f64>| {
            let norm = frobenius(&candidate);
            if norm > 0.0 { frobenius(&(&line - &candidate).view()) / norm } else { f64::INFINITY }
        };
        let best =
            whole.axis_iter(other).map(gap).enumerate().min_by(|a, b| a.1.total_cmp(&b.1))?;
        if best.1 > tolerance || map.contains(&best.0) {
            return None;
        }
        map.push(best.0);
    }
    Some(map)
}
