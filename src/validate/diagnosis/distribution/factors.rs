//! Gradients of LoRA's factors in parts: by positions of the sequences, by the outputs or inputs of
//! a layer that tensor-parallel processes divide.

use super::{Gradients, Happened, combined, fitted, names};
use crate::adapters::Method;
use crate::error::Result;
use crate::model::Place;
use crate::validate::diagnosis::rows::{MOST_SEEN, Seen, points};
use crate::validate::diagnosis::{Context, Fault, Tested, gradient};
use crate::validate::ranks::{Distribution, of_ranks};
use crate::validate::reference::Variant;
use ndarray::{Array2, s};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Factors of a LoRA module, input and gradient of its output, rows of the micro-batch they are of.
struct Lora<'a> {
    name: &'a str,
    a: &'a Array2<f64>,
    b: &'a Array2<f64>,
    scaling: f64,
    x: &'a Array2<f64>,
    dy: &'a Array2<f64>,
    rows: usize,
}

impl Lora<'_> {
    /// The gradients of both factors, where `dy` and `x` are taken instead of the module's.
    fn gradient_of_a(&self, through: &Array2<f64>) -> Array2<f64> {
        through.t().dot(self.x) * self.scaling
    }

    fn gradient_of_b(&self, dy: &Array2<f64>, z: &Array2<f64>) -> Array2<f64> {
        dy.t().dot(z) * self.scaling
    }
}

/// Calls `each` with every LoRA module of every micro-batch of the exact step; false where that is
/// too large.
fn each_lora(context: &Context<'_>, each: &mut dyn FnMut(&Lora<'_>)) -> Result<bool> {
    let (case, config) = (context.case, &context.case.model.config);
    let widths = 8 * config.hidden_size + 4 * config.intermediate_size;
    if case.batch.tokens() * widths * case.model.layers.len() > MOST_SEEN {
        return Ok(false);
    }
    for (range, divisor) in case.parts() {
        let seen: Seen = RefCell::default();
        let tap = |place: Place, x: &mut Array2<f64>| {
            if let Some(layer) = place.layer {
                seen.borrow_mut().insert((layer, place.point, place.gradient), x.clone());
            }
        };
        let rows = range.len();
        case.run(&Variant {
            tap: Some(&tap),
            parts: Some(vec![(range, divisor)]),
            ..Variant::default()
        })?;
        let seen = seen.into_inner();
        for (l, layer) in case.model.layers.iter().enumerate() {
            for (p, projection) in layer.projections() {
                let (Method::Lora(m), Some((input, output))) = (&projection.method, points(p))
                else {
                    continue;
                };
                if let (Some(x), Some(dy)) =
                    (seen.get(&(l, input, false)), seen.get(&(l, output, true)))
                {
                    let name = &config.options.module(l, p);
                    each(&Lora { name, a: &m.a, b: &m.b, scaling: m.scaling, x, dy, rows });
                }
            }
        }
    }
    Ok(true)
}

pub(super) fn add(to: &mut Gradients, name: String, gradient: Array2<f64>) {
    match to.get_mut(&name) {
        Some(sum) => *sum += &gradient,
        None => drop(to.insert(name, gradient)),
    }
}

/// Gradients of the factors from each part of the sequences.
pub(super) fn gradients_of_positions(
    context: &Context<'_>,
    distribution: &Distribution,
) -> Result<Option<Vec<Gradients>>> {
    let length = context.case.batch.input_ids.ncols();
    let mut all: Vec<Gradients> = vec![Gradients::new(); distribution.spans.len()];
    let small = each_lora(context, &mut |lora| {
        let z = lora.x.dot(&lora.a.t());
        for (of, span) in all.iter_mut().zip(&distribution.spans) {
            let mut part = Array2::zeros(lora.dy.dim());
            for row in 0..lora.rows {
                let cut = s![row * length + span.start..row * length + span.end, ..];
                part.slice_mut(cut).assign(&lora.dy.slice(cut));
            }
            add(of, format!("{}.lora_A", lora.name), lora.gradient_of_a(&part.dot(lora.b)));
            add(of, format!("{}.lora_B", lora.name), lora.gradient_of_b(&part, &z));
        }
    })?;
    Ok(small.then_some(all))
}

/// The processes that hold parts of tensors together with the one whose view it is.
pub(super) fn tensor_group(distribution: &Distribution) -> Option<Vec<usize>> {
    let places = &distribution.places;
    let many = places.iter().filter_map(|p| p.tensor).map(|t| t.of).max().unwrap_or(1);
    let first = distribution.view[0];
    let group: Option<Vec<usize>> = (0..many)
        .map(|t| {
            let mut all = 0..places.len();
            let same = |r: &usize| {
                places[*r].tensor.is_some_and(|p| p.index == t)
                    && places[*r].data.index == places[first].data.index
            };
            all.find(same)
        })
        .collect();
    group.filter(|_| many > 1)
}

/// Factors that every process of a tensor-parallel group holds whole, beside one that is divided:
/// the gradient of A sums over the outputs of a column-parallel layer, that of B over the inputs of
/// a row-parallel one.
pub(super) fn replicated_factors(
    context: &Context<'_>,
    distribution: &Distribution,
    tested: &mut Tested<'_>,
) -> Result<()> {
    let Some(group) = tensor_group(distribution) else { return Ok(()) };
    let (places, many) = (&distribution.places, group.len());
    if !tested.affords(1.0, "replicated-factor-not-summed") {
        return Ok(());
    }
    tested.watch.begins("replicated factors of each rank's part");
    tested.steps += 1;
    let mut parts: Vec<Gradients> = vec![Gradients::new(); many];
    let small = each_lora(context, &mut |lora| {
        let (name_a, name_b) = (format!("{}.lora_A", lora.name), format!("{}.lora_B", lora.name));
        for (of, &rank) in parts.iter_mut().zip(&group) {
            let part = |name: &str, axis: usize| {
                distribution.parts[rank].get(name).and_then(|p| p.along(axis))
            };
            let whole = |name: &str| !distribution.parts[rank].contains_key(name);
            if let (Some(lines), true) =
                (part(&name_b, 0).filter(|l| l.end <= lora.b.nrows()), whole(&name_a))
            {
                let through =
                    lora.dy.slice(s![.., lines.clone()]).dot(&lora.b.slice(s![lines, ..]));
                add(of, name_a.clone(), lora.gradient_of_a(&through));
            } else if let (Some(lines), true) =
                (part(&name_a, 1).filter(|l| l.end <= lora.a.ncols()), whole(&name_b))
            {
                let z = lora.x.slice(s![.., lines.clone()]).dot(&lora.a.slice(s![.., lines]).t());
                add(of, name_b.clone(), lora.gradient_of_b(lora.dy, &z));
            }
        }
    })?;
    if !small {
        return Ok(());
    }
    let failing = names(context);
    if !failing.iter().all(|name| parts.iter().all(|p| p.contains_key(name))) {
        return Ok(());
    }
    let (mut weights, mut found) = (BTreeMap::new(), None);
    for &rank in &distribution.view {
        let Some(fit) = fitted(context, distribution, rank, &parts) else { return Ok(()) };
        let own = places[rank].tensor.map_or(0, |p| p.index);
        let Some((happened, exact)) = Happened::of(&fit, own) else { return Ok(()) };
        weights.insert(rank, exact);
        found = found.or(Some((rank, happened)).filter(|(_, h)| *h != Happened::Right));
    }
    let short: Vec<&str> = failing.iter().map(String::as_str).collect();
    let tensors = gradient::some(&short);
    let view = of_ranks(&distribution.view);
    let (name, what, fix) = match found {
        Some((_, Happened::Own | Happened::Of(_) | Happened::Some(_))) => (
            "replicated-factor-not-summed",
            format!(
                "{view}: the gradient of {tensors} is that of one tensor-parallel part alone. The \
                 factor is whole on every rank, and its gradient sums over the parts of the other"
            ),
            "all-reduce (sum) the gradients of A in column-parallel and of B in row-parallel \
             layers over the tensor-parallel group",
        ),
        Some((_, Happened::Divided)) => (
            "replicated-factor-averaged",
            format!(
                "{view}: the gradient of {tensors} is averaged over the {many} tensor-parallel \
                 ranks instead of summed"
            ),
            "sum over the tensor-parallel group, average over the data-parallel one only",
        ),
        Some((_, Happened::Multiplied)) => (
            "replicated-factor-summed-twice",
            format!(
                "{view}: the gradient of {tensors} is {many} times the right one: whole on every \
                 rank, and summed again"
            ),
            "sum once over the tensor-parallel group",
        ),
        _ => return Ok(()),
    };
    let predicted = combined(context, distribution, &parts, &weights, &failing);
    context.propose(Fault::new(name, what, fix), &predicted, tested)
}
