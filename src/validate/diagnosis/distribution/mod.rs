//! Faults between the processes of a step: gradients that are not put together, or more than once,
//! or by other divisors; replicas that have other weights; factors that every process of a
//! tensor-parallel group holds whole and whose gradient is in parts.
//!
//! With P_d the gradient of the part d of the data (all of them together are the step's), what a
//! process holds is fitted by sum_d w_d P_d. The weights say what happened; what they predict is
//! then judged like any other fault.

mod factors;
mod inputs;

use super::rows::solve;
use super::{Context, Fault, Tested};
use crate::error::Result;
use crate::linalg::norms::frobenius;
use crate::model::Model;
use crate::validate::ladder::RungName;
use crate::validate::measure::dot;
use crate::validate::ranks::{Across, Cut, Distribution, Reduce, of_ranks, some_entries};
use crate::validate::reference::{Evidence, Variant};
use factors::{gradients_of_positions, replicated_factors, tensor_group};
use ndarray::Array2;
use std::collections::BTreeMap;
use std::ops::Range;

/// How far a weight may be from the one that a fault predicts, as a part of the largest.
const NEAR: f64 = 0.15;

type Gradients = BTreeMap<String, Array2<f64>>;

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let Some(distribution) = context.case.distribution.as_deref() else { return Ok(()) };
    if context.forward_wrong() && distribution.own.is_empty() {
        return Ok(());
    }
    if !distribution.own.is_empty() {
        other_weights(context, distribution, tested)?;
    }
    if context.failing.is_empty() && !context.failed(RungName::Scale) {
        return Ok(());
    }
    let parts = distribution.spans.len();
    let rows = distribution.places[0].data.cut == Cut::Rows;
    if !tested.settled() && parts > 1 {
        if rows {
            other_divisors(context, distribution, tested)?;
        }
        if !tested.settled() && tested.affords(1.0, "data-parallel-not-reduced") {
            tested.watch.begins("gradients of each rank's data");
            tested.steps += 1;
            let of = if rows {
                gradients_of_rows(context, distribution)
            } else {
                gradients_of_positions(context, distribution)
            };
            if let Some(of) = of? {
                not_reduced(context, distribution, &of, tested)?;
            }
        }
    }
    if !tested.settled() && distribution.places.iter().any(|p| p.tensor.is_some()) {
        replicated_factors(context, distribution, tested)?;
        if let Some(group) = tensor_group(distribution).filter(|_| !tested.settled()) {
            inputs::test(context, distribution, &group, tested)?;
        }
    }
    Ok(())
}

/// A model with other trained tensors.
fn with_values(model: &Model<f64>, values: &Gradients) -> Result<Model<f64>> {
    let mut other = model.clone();
    other.for_each_trainable(&mut |name, own| {
        if let Some(theirs) = values.get(name).filter(|v| v.dim() == own.dim()) {
            own.assign(theirs);
        }
        Ok(())
    })?;
    Ok(other)
}

/// Parts of the step within some rows.
fn parts_in(context: &Context<'_>, rows: &Range<usize>) -> Vec<(Range<usize>, f64)> {
    let inside =
        |part: &(Range<usize>, f64)| rows.contains(&part.0.start) && part.0.end <= rows.end;
    context.case.parts().into_iter().filter(inside).collect()
}

/// Each part of the data with the weights of its own process.
fn other_weights(
    context: &Context<'_>,
    distribution: &Distribution,
    tested: &mut Tested<'_>,
) -> Result<()> {
    if distribution.places[0].data.cut != Cut::Rows || !tested.affords(1.0, "replicas-differ") {
        return Ok(());
    }
    tested.watch.begins("each rank with its own weights");
    tested.steps += 1;
    let mut sum: Option<Evidence> = None;
    for (part, rows) in distribution.spans.iter().enumerate() {
        let model =
            distribution.own.get(&part).map(|v| with_values(&context.case.model, v)).transpose()?;
        let parts = parts_in(context, rows);
        if parts.is_empty() {
            continue;
        }
        let variant = Variant { forward: model.as_ref(), parts: Some(parts), ..Variant::default() };
        let evidence = context.case.run(&variant)?;
        sum = Some(match sum {
            None => evidence,
            Some(sum) => added(sum, &evidence),
        });
    }
    let Some(predicted) = sum else { return Ok(()) };
    let others: Vec<usize> = distribution.own.keys().copied().collect();
    let view = of_ranks(&distribution.view);
    let (name, what, fix) = match distribution.stale {
        Some(rank) => (
            "stale-rank",
            format!(
                "rank {rank} has the trained weights of the step before: its rows' gradients are \
                 of those"
            ),
            "update on every rank, or broadcast the weights after the update; look at what skips \
             or undoes it on this rank",
        ),
        None => (
            "replicas-differ",
            format!(
                "{view}: the gradient sums over ranks that trained other weights (parts {others:?} \
                 of the data): each trains an adapter of its own"
            ),
            "make the adapter before DistributedDataParallel (or broadcast it): it copies rank 0's \
             weights when it wraps the model",
        ),
    };
    context.propose(Fault::new(name, what, fix), &predicted, tested)
}

fn added(mut sum: Evidence, more: &Evidence) -> Evidence {
    sum.loss += more.loss;
    if let (Some(a), Some(b)) = (&mut sum.logits, &more.logits) {
        *a += b;
    }
    for (layer, a) in &mut sum.hidden {
        if let Some(b) = more.hidden.get(layer) {
            *a += b;
        }
    }
    for (name, a) in &mut sum.gradients {
        if let Some(b) = more.gradients.get(name) {
            *a += b;
        }
    }
    sum
}

/// The loss divided by each process's own tokens where those of all were meant, or the other way
/// round.
fn other_divisors(
    context: &Context<'_>,
    distribution: &Distribution,
    tested: &mut Tested<'_>,
) -> Result<()> {
    let case = context.case;
    let micro = case.micro_batches();
    if micro.len() != distribution.otherwise.len() || case.given().is_some() {
        return Ok(());
    }
    let parts: Vec<(Range<usize>, f64)> = micro
        .into_iter()
        .zip(&distribution.otherwise)
        .map(|(rows, &d)| (rows, d))
        .filter(|p| p.1 > 0.0)
        .collect();
    let now = case.parts();
    if parts.iter().zip(&now).all(|(a, b)| (a.1 / b.1 - 1.0).abs() < 1e-9) {
        return Ok(());
    }
    let (name, what, fix) = match distribution.across {
        Across::GlobalMean => (
            "rank-mean",
            "each rank divides by its own tokens and the ranks are averaged: tokens of ranks with \
             fewer of them count more than in the mean over all tokens",
            "divide by the tokens of all ranks, times their number if gradients are averaged \
             (Trainer: average_tokens_across_devices)",
        ),
        Across::RankMean => (
            "global-mean",
            "the loss is divided by the tokens of all ranks, where the mean of the ranks' means is \
             declared",
            "declare parallel={\"loss\": \"global_mean\"} if that is meant",
        ),
    };
    context.test(
        Fault::new(name, what, fix),
        &Variant { parts: Some(parts), ..Variant::default() },
        |_| {},
        tested,
    )
}

/// Gradients of each part of the data.
fn gradients_of_rows(
    context: &Context<'_>,
    distribution: &Distribution,
) -> Result<Option<Vec<Gradients>>> {
    let mut all = Vec::new();
    for rows in &distribution.spans {
        let parts = parts_in(context, rows);
        if parts.is_empty() {
            let zeros =
                context.exact.gradients.iter().map(|(n, g)| (n.clone(), Array2::zeros(g.dim())));
            all.push(zeros.collect());
            continue;
        }
        all.push(
            context.case.run(&Variant { parts: Some(parts), ..Variant::default() })?.gradients,
        );
    }
    Ok(Some(all))
}

/// Weights with which parts make up what a process holds, over the tensors that failed.
fn fitted(
    context: &Context<'_>,
    distribution: &Distribution,
    rank: usize,
    parts: &[Gradients],
) -> Option<Vec<f64>> {
    let n = parts.len();
    let (mut matrix, mut right) = (vec![vec![0.0; n]; n], vec![0.0; n]);
    for name in names(context) {
        let (Some(got), Some(want)) = (context.observed(&name), context.exact.gradients.get(&name))
        else {
            continue;
        };
        let norm = frobenius(&want.view());
        let of: Vec<&Array2<f64>> = parts.iter().map(|p| p.get(&name)).collect::<Option<_>>()?;
        if got.values.dim() != want.dim()
            || !(norm > 0.0)
            || !got.values.iter().all(|x| x.is_finite())
        {
            continue;
        }
        let entries = distribution.entries(rank, &name, want.len());
        let take =
            |a: &Array2<f64>| entries.as_ref().map_or_else(|| a.clone(), |e| some_entries(a, e));
        let (got, of): (Array2<f64>, Vec<Array2<f64>>) =
            (take(&got.values), of.into_iter().map(take).collect());
        let weight = 1.0 / (norm * norm);
        for i in 0..n {
            right[i] += weight * dot(&of[i], &got);
            (0..n).for_each(|j| matrix[i][j] += weight * dot(&of[i], &of[j]));
        }
    }
    solve(matrix, right)
}

/// Tensors that failed, or all where only their common factor did.
fn names(context: &Context<'_>) -> Vec<String> {
    if context.failing.is_empty() {
        return context.all_gradients().iter().map(|m| m.name.clone()).collect();
    }
    context.failing.iter().map(|m| m.name.clone()).collect()
}

/// What happened to a process's gradients, by the weights of the parts of the data in them.
#[derive(Debug, Clone, PartialEq)]
enum Happened {
    Right,
    /// Its own part alone.
    Own,
    /// Another's part alone.
    Of(usize),
    /// Some parts, its own among them.
    Some(Vec<usize>),
    /// All, divided by their number.
    Divided,
    /// All, times their number.
    Multiplied,
}

impl Happened {
    /// What the weights are near to, with the weights that it predicts.
    fn of(weights: &[f64], own: usize) -> Option<(Self, Vec<f64>)> {
        let (n, most) = (weights.len(), weights.iter().fold(0.0f64, |m, w| m.max(*w)));
        let there: Vec<usize> = (0..n).filter(|&i| weights[i] > 0.5 * most).collect();
        let (many, some) = (n as f64, there.len() as f64);
        // Summed, averaged over those that are there, or averaged over all: the weights are in
        // units of the right sum's.
        let factors: &[f64] =
            if there.len() == n { &[1.0, 1.0 / many, many] } else { &[1.0, many / some] };
        let near = |factor: f64| {
            let want = |i: usize| if there.contains(&i) { factor } else { 0.0 };
            weights.iter().enumerate().all(|(i, w)| (w - want(i)).abs() <= NEAR * factor)
        };
        let factor = *factors.iter().find(|f| near(**f))?;
        let predicted = (0..n).map(|i| if there.contains(&i) { factor } else { 0.0 }).collect();
        let happened = match there[..] {
            _ if there.len() == n && factor < 1.0 => Self::Divided,
            _ if there.len() == n && factor > 1.0 => Self::Multiplied,
            _ if there.len() == n => Self::Right,
            [only] if only == own => Self::Own,
            [only] => Self::Of(only),
            _ => Self::Some(there),
        };
        Some((happened, predicted))
    }
}

/// The gradient that a combination predicts, each process's own entries by its own weights.
fn combined(
    context: &Context<'_>,
    distribution: &Distribution,
    parts: &[Gradients],
    weights: &BTreeMap<usize, Vec<f64>>,
    names: &[String],
) -> Evidence {
    let mut gradients = context.exact.gradients.clone();
    for name in names {
        let Some(whole) = gradients.get_mut(name) else { continue };
        for (&rank, weights) in weights {
            let mut sum = Array2::<f64>::zeros(whole.dim());
            for (part, w) in parts.iter().zip(weights) {
                if let Some(p) = part.get(name) {
                    sum.scaled_add(*w, p);
                }
            }
            match distribution.entries(rank, name, whole.len()) {
                None => *whole = sum,
                Some(entries) => {
                    let columns = whole.ncols();
                    entries.iter().for_each(|&i| {
                        whole[[i / columns, i % columns]] = sum[[i / columns, i % columns]]
                    });
                }
            }
        }
    }
    Evidence { gradients, ..context.exact.clone() }
}

/// Gradients that are not put together over the parts of the data, or not as they should be.
fn not_reduced(
    context: &Context<'_>,
    distribution: &Distribution,
    parts: &[Gradients],
    tested: &mut Tested<'_>,
) -> Result<()> {
    let mut happened: BTreeMap<usize, Happened> = BTreeMap::new();
    let mut weights = BTreeMap::new();
    for &rank in &distribution.view {
        let own = distribution.places[rank].data.index;
        let Some(found) = fitted(context, distribution, rank, parts) else { return Ok(()) };
        let Some((what, exact)) = Happened::of(&found, own) else { return Ok(()) };
        happened.insert(rank, what);
        weights.insert(rank, exact);
    }
    let all_names: Vec<String> = if context.failing.len() == context.all_gradients().len() {
        parts[0].keys().cloned().collect()
    } else {
        names(context)
    };
    let mut predicted = combined(context, distribution, parts, &weights, &all_names);
    same_in_loss(context, weights.values(), &mut predicted);
    let Some(fault) = named(context, distribution, &happened) else { return Ok(()) };
    context.propose(fault, &predicted, tested)
}

/// The other thing that a factor of the number of ranks may be.
fn same_as_scaling(context: &Context<'_>, ranks: f64, how: &str) -> String {
    let same = super::factors::scalings(context)
        .iter()
        .any(|(scaling, _)| (scaling / ranks - 1.0).abs() < 1e-3);
    if same {
        format!("; or the scaling alpha / r = {ranks} is {how} in the backward of the factors")
    } else {
        String::new()
    }
}

/// A loss that is off by the factor that all parts have.
fn same_in_loss<'a>(
    context: &Context<'_>,
    weights: impl Iterator<Item = &'a Vec<f64>>,
    predicted: &mut Evidence,
) {
    let mut all = weights.flatten();
    let (Some(first), Some(loss)) = (all.next(), context.case.trainer.loss) else { return };
    let common = all.all(|w| (w - first).abs() < 1e-9);
    if common
        && context.failed(RungName::Loss)
        && (loss / context.exact.loss / first - 1.0).abs() < NEAR
    {
        predicted.loss *= first;
    }
}

fn named(
    context: &Context<'_>,
    distribution: &Distribution,
    happened: &BTreeMap<usize, Happened>,
) -> Option<Fault> {
    let ranks = |want: &dyn Fn(&Happened) -> bool| -> Vec<usize> {
        happened.iter().filter(|(_, h)| want(h)).map(|(rank, _)| *rank).collect()
    };
    let span = |part: usize| distribution.spans.get(part).cloned().unwrap_or_default();
    let sequence = distribution.places[0].data.cut == Cut::Sequence;
    let data = if sequence { "positions" } else { "rows" };
    let tensors = match context.failing.len() {
        n if n == 0 || n == context.all_gradients().len() => String::new(),
        _ => {
            let names: Vec<&str> = context.failing.iter().map(|m| m.name.as_str()).collect();
            format!(" in {}", super::gradient::some(&names))
        }
    };
    let (own, n) = (ranks(&|h| *h == Happened::Own), distribution.spans.len());
    if !own.is_empty() {
        let each: Vec<String> = own
            .iter()
            .map(|&rank| {
                let own = span(distribution.places[rank].data.index);
                format!(
                    "rank {rank} holds the gradient of its own {data} {}..{} alone{tensors}",
                    own.start, own.end
                )
            })
            .collect();
        let fix = if sequence {
            "all-reduce the gradients of replicated tensors over the sequence-parallel group"
        } else {
            "reduce gradients over ranks: wrap the model in DistributedDataParallel before the \
             step and call the wrapper, no no_sync at the last backward, the adapter made before \
             it is wrapped"
        };
        let name = if sequence { "sequence-shard-only" } else { "data-parallel-not-reduced" };
        return Some(Fault::new(name, format!("{}: not reduced over ranks", each.join("; ")), fix));
    }
    if let Some((&rank, Happened::Of(part))) =
        happened.iter().find(|(_, h)| matches!(h, Happened::Of(_)))
    {
        let what = format!(
            "rank {rank} holds the gradient of part {part} of the data alone{tensors}: another \
             rank's, not the sum"
        );
        return Some(Fault::new(
            "data-parallel-not-reduced",
            what,
            "all-reduce the gradients; a broadcast, or a reduce to one rank, leaves the others out",
        ));
    }
    let divided = ranks(&|h| *h == Happened::Divided);
    if !divided.is_empty() {
        let left = context.case.left_the_declared_gradient();
        let micro = context.case.micro_batches().len();
        let or = if !left && micro == n * n {
            format!(" (or by the {n} micro-batches)")
        } else {
            String::new()
        };
        let where_ = if left {
            "; the loss's own gradient is right, so this happens after it"
        } else if distribution.places[0].reduce == Reduce::Mean {
            "; the loss is divided already, or the sum over ranks is averaged again"
        } else {
            ""
        };
        let scaling = same_as_scaling(context, n as f64, "missing");
        let what = format!(
            "{} hold 1/{n} of the gradient{tensors}: divided by the {n} ranks{or} \
             twice{where_}{scaling}",
            of_ranks(&divided)
        );
        let fix = "divide once: DistributedDataParallel and fully_shard average over ranks, so \
                   neither the loss nor the gradients may be divided by their number again";
        return Some(Fault::new("averaged-twice", what, fix));
    }
    let multiplied = ranks(&|h| *h == Happened::Multiplied);
    if !multiplied.is_empty() {
        let scaling = same_as_scaling(context, n as f64, "taken twice");
        let what = format!(
            "{} hold {n} times the gradient{tensors}: summed over the {n} ranks, not \
             averaged{scaling}",
            of_ranks(&multiplied)
        );
        let fix = "average: divide the sum by the number of ranks, or declare reduce=\"sum\" if \
                   each rank's loss is its part of the step's";
        return Some(Fault::new("summed-not-averaged", what, fix));
    }
    let (rank, some) = happened.iter().find_map(|(rank, h)| match h {
        Happened::Some(parts) => Some((*rank, parts)),
        _ => None,
    })?;
    let missing: Vec<usize> = (0..n).filter(|part| !some.contains(part)).collect();
    let what = format!(
        "{}: parts {missing:?} of the data are missing in the gradient{tensors} of rank {rank}, \
         which holds those of parts {some:?}",
        of_ranks(&distribution.view)
    );
    let fix = "reduce over all ranks: look at the process group of the all-reduce, and at the \
               second one where shards are replicated";
    Some(Fault::new("data-parallel-not-reduced", what, fix))
}
