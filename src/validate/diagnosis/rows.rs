//! Gradients that are right for another sum than the step's: some rows only, the step before
//! besides, a part of each sequence.

use super::{Context, Fault, Tested};
use crate::adapters::Method;
use crate::error::Result;
use crate::linalg::norms::frobenius;
use crate::model::{Outside, Place, Point, Projection};
use crate::train::optimizer::OptimizerKind;
use crate::validate::ladder::gradient_scale;
use crate::validate::measure::dot;
use crate::validate::reference::{Evidence, Variant};
use crate::validate::update::group_of;
use ndarray::{Array2, s};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

/// Rows of the batch that are run one by one at most, and entries of all their gradients.
const MOST_ROWS: usize = 16;
const MOST_ENTRIES: usize = 1 << 28;
/// Most entries of activations that are kept for a hypothesis: 512 MiB, which the plan of a large
/// model does not count.
pub(super) const MOST_SEEN: usize = 1 << 26;

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    if context.failing.is_empty() {
        return Ok(());
    }
    half_accumulation(context, tested)?;
    stale_gradients(context, tested)?;
    if !tested.settled() {
        last_micro_batch(context, tested)?;
    }
    if !tested.settled() {
        single_rows(context, tested)?;
    }
    if !tested.settled() {
        shards(context, tested)?;
    }
    Ok(())
}

/// Solves A x = b by elimination with pivots; `None` if A is singular.
pub(super) fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Option<Vec<f64>> {
    let n = b.len();
    let largest = a.iter().flatten().fold(0.0f64, |m, x| m.max(x.abs()));
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| a[i][k].abs().total_cmp(&a[j][k].abs()))?;
        a.swap(k, pivot);
        b.swap(k, pivot);
        if !(a[k][k].abs() > 1e-13 * largest) {
            return None;
        }
        let row = a[k].clone();
        for i in k + 1..n {
            let f = a[i][k] / row[k];
            a[i].iter_mut().zip(&row).for_each(|(x, r)| *x -= f * r);
            b[i] -= f * b[k];
        }
    }
    for k in (0..n).rev() {
        let sum: f64 = (k + 1..n).map(|j| a[k][j] * b[j]).sum();
        b[k] = (b[k] - sum) / a[k][k];
    }
    Some(b)
}

impl Context<'_> {
    /// One over the square of each gradient's size, so that all count alike.
    fn weights(&self) -> BTreeMap<String, f64> {
        let scale = gradient_scale(&self.exact.gradients);
        let usable = |name: &&String| {
            self.case
                .trainer
                .gradients
                .get(*name)
                .is_some_and(|o| o.values.iter().all(|x| x.is_finite()))
        };
        let weight = |name: &String| {
            let want = self.exact.gradients.get(name)?;
            let same = self.case.trainer.gradients.get(name)?.values.dim() == want.dim();
            let norm = frobenius(&want.view());
            let unit = if norm > 1e-9 * scale { norm } else { scale };
            same.then(|| (name.clone(), 1.0 / (unit * unit)))
        };
        self.case.trained.iter().filter(usable).filter_map(weight).collect()
    }

    /// <G - P, F - P> / |F - P|^2 over all gradients.
    pub(super) fn amplitude(&self, from: &Evidence, to: &Evidence) -> f64 {
        let (mut along, mut square) = (0.0, 0.0);
        for (name, w) in self.weights() {
            let (Some(p), Some(f), Some(g)) =
                (from.gradients.get(&name), to.gradients.get(&name), self.observed(&name))
            else {
                continue;
            };
            let direction = f - p;
            along += w * dot(&(&g.values - p), &direction);
            square += w * dot(&direction, &direction);
        }
        along / square
    }

    /// The right step times the factor that comes nearest to the trainer's gradients.
    pub(super) fn common_factor(&self) -> Evidence {
        let none = self.with_gradients(
            self.exact.gradients.iter().map(|(n, g)| (n.clone(), g * 0.0)).collect(),
        );
        let c = self.amplitude(&none, self.exact);
        self.with_gradients(self.exact.gradients.iter().map(|(n, g)| (n.clone(), g * c)).collect())
    }

    fn with_gradients(&self, gradients: BTreeMap<String, Array2<f64>>) -> Evidence {
        Evidence { gradients, ..self.exact.clone() }
    }
}

/// The gradient of the step before is still there: G = R + c m with m the optimizer's first moment.
fn stale_gradients(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let case = context.case;
    // SGD counts no steps; its buffer says that there were some.
    let Some(record) = case.optimizer.as_ref().filter(|r| r.steps_before > 0 || r.kind == "sgd")
    else {
        return Ok(());
    };
    let (mut along, mut square) = (0.0, 0.0);
    for (name, w) in context.weights() {
        let (Some(m), Some(r), Some(g)) = (
            case.trainer.first.get(&name),
            context.exact.gradients.get(&name),
            context.observed(&name),
        ) else {
            continue;
        };
        if m.values.dim() == r.dim() {
            along += w * dot(&(&g.values - r), &m.values);
            square += w * dot(&m.values, &m.values);
        }
    }
    let c = along / square;
    if !(c > 0.0) || !c.is_finite() {
        return Ok(());
    }
    let beta = case
        .trained
        .first()
        .and_then(|n| record.params(group_of(record, n)?).ok())
        .map_or(0.0, |p| if p.kind == OptimizerKind::AdamW { p.beta1 } else { 0.0 });
    // After one step the moment is (1 - beta) times that step's gradient.
    let c = if record.steps_before == 1 { 1.0 / (1.0 - beta) } else { c };
    let mut gradients = context.exact.gradients.clone();
    for (name, g) in &mut gradients {
        if let Some(m) = case.trainer.first.get(name).filter(|m| m.values.dim() == g.dim()) {
            g.scaled_add(c, &m.values);
        }
    }
    let what = format!(
        "the gradient of the step before is still there and this one's is added: {c:.3} times the \
         optimizer's first moment is left over"
    );
    let fix = "call optimizer.zero_grad() (or set gradients to None) after every update";
    context.propose(
        Fault::new("stale-gradients", what, fix),
        &context.with_gradients(gradients),
        tested,
    )
}

/// The gradients of the last micro-batch alone.
fn last_micro_batch(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let parts = context.case.parts();
    let Some(last) = parts.last().filter(|_| parts.len() > 1) else { return Ok(()) };
    let variant = Variant { parts: Some(vec![last.clone()]), ..Variant::default() };
    let what = format!("only the last of {} micro-batches is in the gradient", parts.len());
    let fix = "call zero_grad once a step, before the first micro-batch, not before each";
    context.test_gradients(Fault::new("last-micro-batch-only", what, fix), &variant, tested)
}

/// Weights with which the gradients of single rows make up the trainer's.
fn single_rows(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let case = context.case;
    let rows = case.batch.input_ids.nrows();
    let entries: usize = context.exact.gradients.values().map(Array2::len).sum();
    if !(2..=MOST_ROWS).contains(&rows) || entries * rows > MOST_ENTRIES {
        return Ok(());
    }
    tested.watch.begins("gradients of single rows");
    if !tested.affords(1.0, "data-parallel-not-reduced") {
        return Ok(());
    }
    let parts = case.parts();
    let mut each = Vec::new();
    tested.steps += 1;
    for (range, divisor) in &parts {
        for row in range.clone() {
            let variant =
                Variant { parts: Some(vec![(row..row + 1, *divisor)]), ..Variant::default() };
            each.push((row, case.run(&variant)?.gradients));
        }
    }
    let weights = context.weights();
    let inner =
        |a: &BTreeMap<String, Array2<f64>>, b: &dyn Fn(&str) -> Option<Array2<f64>>| -> f64 {
            weights.iter().filter_map(|(name, w)| Some(w * dot(a.get(name)?, &b(name)?))).sum()
        };
    let matrix: Vec<Vec<f64>> = each
        .iter()
        .map(|(_, a)| each.iter().map(|(_, b)| inner(a, &|n| b.get(n).cloned())).collect())
        .collect();
    let right: Vec<f64> = each
        .iter()
        .map(|(_, a)| inner(a, &|n| Some(context.observed(n)?.values.clone())))
        .collect();
    let Some(found) = solve(matrix, right) else { return Ok(()) };
    let most = found.iter().fold(0.0f64, |m, w| m.max(w.abs()));
    let kept: Vec<usize> = (0..each.len()).filter(|&i| found[i].abs() > 0.1 * most).collect();
    let mean = kept.iter().map(|&i| found[i]).sum::<f64>() / kept.len().max(1) as f64;
    let equal = kept.iter().all(|&i| (found[i] / mean - 1.0).abs() < 0.1);
    if kept.len() == each.len() || kept.is_empty() || !equal || !(mean > 0.0) {
        return Ok(());
    }
    let there: Vec<usize> = kept.iter().map(|&i| each[i].0).collect();
    let mut gradients = context.exact.gradients.clone();
    for (name, g) in &mut gradients {
        g.fill(0.0);
        kept.iter().for_each(|&i| g.scaled_add(mean, &each[i].1[name]));
    }
    let micro = case.micro_batches();
    let last = micro.last().is_some_and(|range| there.iter().copied().eq(range.clone()));
    let (name, what, fix) = if micro.len() > 1 && last {
        (
            "last-micro-batch-only",
            format!(
                "only the last of {} micro-batches is in the gradient ({mean:.4} times its part)",
                micro.len()
            ),
            "call zero_grad once a step, before the first micro-batch, not before each",
        )
    } else {
        (
            "data-parallel-not-reduced",
            format!(
                "the gradient is that of rows {there:?} of {rows} alone ({mean:.4} times their \
                 part): one rank's, not reduced over ranks"
            ),
            "reduce gradients over ranks (wrap the model in DistributedDataParallel before the \
             step; no no_sync at the last backward)",
        )
    };
    context.propose(Fault::new(name, what, fix), &context.with_gradients(gradients), tested)
}

/// Inputs and gradients of the outputs of each layer's projections.
pub(super) type Seen = RefCell<HashMap<(usize, Point, bool), Array2<f64>>>;

/// Where a projection's input and the gradient of its output are seen.
pub(super) fn points(p: Projection) -> Option<(Point, Point)> {
    Some(match p {
        Projection::Query => (Point::NormedInput, Point::Query),
        Projection::Key => (Point::NormedInput, Point::Key),
        Projection::Value => (Point::NormedInput, Point::Value),
        Projection::Output => (Point::Attended, Point::Middle),
        Projection::Gate => (Point::NormedMiddle, Point::Gate),
        Projection::Up => (Point::NormedMiddle, Point::Up),
        Projection::Down => (Point::Gated, Point::Output),
        _ => return None,
    })
}

/// Factors whose gradient sums over a part of each sequence only: a rank's shard under sequence
/// parallelism.
fn shards(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let case = context.case;
    let model = &case.model;
    if case.micro_batches().len() > 1 {
        return Ok(());
    }
    let seen: Seen = RefCell::default();
    let tap = |place: Place, x: &mut Array2<f64>| {
        if let Some(layer) = place.layer {
            seen.borrow_mut().insert((layer, place.point, place.gradient), x.clone());
        }
    };
    tested.watch.begins("hypothesis: shards of sequences");
    let config = &model.config;
    let widths = 8 * config.hidden_size + 4 * config.intermediate_size;
    if case.batch.tokens() * widths * model.layers.len() > MOST_SEEN
        || !tested.affords(1.0, "sequence-shard-only")
    {
        return Ok(());
    }
    tested.steps += 1;
    case.run(&Variant { tap: Some(&tap), ..Variant::default() })?;
    let seen = seen.into_inner();
    let (rows, length) = case.batch.input_ids.dim();
    for shards in [2usize, 4, 8] {
        for rank in 0..shards {
            let (from, to) = (length * rank / shards, length * (rank + 1) / shards);
            // Both ways of dividing an odd length.
            for (from, to) in [
                (from, to),
                ((length * rank).div_ceil(shards), (length * (rank + 1)).div_ceil(shards)),
            ] {
                if tested.settled() || from == to {
                    continue;
                }
                let mut gradients = context.exact.gradients.clone();
                let mut changed = Vec::new();
                for (l, layer) in model.layers.iter().enumerate() {
                    for (p, projection) in layer.projections() {
                        let Method::Lora(m) = &projection.method else { continue };
                        let Some((input, output)) = points(p) else { continue };
                        let (Some(x), Some(dy)) =
                            (seen.get(&(l, input, false)), seen.get(&(l, output, true)))
                        else {
                            continue;
                        };
                        let mut part = dy.clone();
                        for b in 0..rows {
                            part.slice_mut(s![b * length..b * length + from, ..]).fill(0.0);
                            part.slice_mut(s![b * length + to..(b + 1) * length, ..]).fill(0.0);
                        }
                        let prefix = model.config.options.module(l, p);
                        let da = part.dot(&m.b).t().dot(x) * m.scaling;
                        let db = part.t().dot(&x.dot(&m.a.t())) * m.scaling;
                        for (name, g) in
                            [(format!("{prefix}.lora_A"), da), (format!("{prefix}.lora_B"), db)]
                        {
                            let failing = context.failing.iter().find(|f| f.name == name);
                            if let (Some(failing), Some(got)) = (failing, context.observed(&name)) {
                                // A rank's part, summed or averaged over ranks.
                                let along =
                                    dot(&got.values, &g) / dot(&g, &g).max(f64::MIN_POSITIVE);
                                let near = [1.0, shards as f64, 1.0 / shards as f64]
                                    .into_iter()
                                    .min_by(|a, b| {
                                        (along / a - 1.0).abs().total_cmp(&(along / b - 1.0).abs())
                                    });
                                gradients.insert(name, g * near.unwrap_or(1.0));
                                changed.push(failing.name.as_str());
                            }
                        }
                    }
                }
                if changed.len() < context.failing.len() {
                    return Ok(());
                }
                let what = format!(
                    "the gradient of {} sums over positions {from}..{to} of each sequence only: \
                     shard {rank} of {shards}, not summed over ranks",
                    super::gradient::some(&changed)
                );
                let fix = "all-reduce the gradients of replicated factors over the sequence- or \
                           tensor-parallel group";
                context.propose(
                    Fault::new("sequence-shard-only", what, fix),
                    &context.with_gradients(gradients),
                    tested,
                )?;
                // A part says nothing: each position is in some shard.
                tested.found.pop_if(|found| !found.complete);
            }
        }
    }
    Ok(())
}

/// The head's weight gradient summed chunk by chunk in the half format that holds it.
fn half_accumulation(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let case = context.case;
    let name = &case.model.config.options.outside_tensor(Outside::Head, "weight");
    let (Some(got), Some(want)) = (context.observed(name), context.exact.gradients.get(name))
    else {
        return Ok(());
    };
    let alone = context.failing.iter().all(|m| m.name == *name);
    let tokens = case.batch.counted();
    if got.precision.epsilon() < 1e-4
        || !alone
        || got.values.dim() != want.dim()
        || want.len() * tokens > MOST_ENTRIES * 16
    {
        return Ok(());
    }
    let hidden: RefCell<Vec<Array2<f64>>> = RefCell::default();
    let logits: RefCell<Vec<Array2<f64>>> = RefCell::default();
    let tap = |place: Place, x: &mut Array2<f64>| match (place.point, place.gradient) {
        (Point::FinalNorm, false) => hidden.borrow_mut().push(x.clone()),
        (Point::Logits, true) => logits.borrow_mut().push(x.clone()),
        _ => {}
    };
    tested.watch.begins("hypothesis: head summed in a half format");
    if !tested.affords(1.0, "half-accumulation") {
        return Ok(());
    }
    tested.steps += 1;
    case.run(&Variant { tap: Some(&tap), rounding: Some(case.rounding), ..Variant::default() })?;
    let (hidden, logits) = (hidden.into_inner(), logits.into_inner());
    let [hidden] = &hidden[..] else { return Ok(()) };
    let targets = crate::blocks::cross_entropy::prediction_targets(
        case.batch.labels.view(),
        case.model.config.vocab_size,
    )?;
    let lines: Vec<(&Array2<f64>, usize)> =
        logits.iter().flat_map(|c| (0..c.nrows()).map(move |i| (c, i))).collect();
    if lines.len() != targets.len() {
        return Ok(());
    }
    let gap = |a: &Array2<f64>| frobenius(&(a - &got.values).view());
    let right = gap(want);
    let mut best: Option<(usize, f64, Array2<f64>)> = None;
    for chunk in [1usize, 2, 4, 8, 16, 32, 64, 128, 256] {
        if chunk * 2 > lines.len() {
            break;
        }
        let mut sum = Array2::<f64>::zeros(want.dim());
        for part in lines.iter().zip(&targets).collect::<Vec<_>>().chunks(chunk) {
            let mut add = Array2::<f64>::zeros(want.dim());
            for ((d, i), (row, _)) in part {
                let (d, x) = (
                    d.row(*i).insert_axis(ndarray::Axis(1)),
                    hidden.row(*row).insert_axis(ndarray::Axis(0)),
                );
                add += &d.dot(&x);
            }
            got.precision.round_array(&mut add);
            sum += &add;
            got.precision.round_array(&mut sum);
        }
        let sum = sum / case.loss.scale;
        let left = gap(&sum);
        if best.as_ref().is_none_or(|b| left < b.1) {
            best = Some((chunk, left, sum));
        }
    }
    let Some((chunk, left, _)) = best.filter(|b| b.1 < 0.6 * right) else { return Ok(()) };
    let what = format!(
        "the head's gradient is summed in {} over many chunks (about {} tokens each), where small \
         addends are lost: imitating that leaves {:.0}% of the gap",
        got.precision.name(),
        chunk,
        100.0 * left / right
    );
    let fix = "accumulate the weight's gradient in float32 and round once";
    let mut diagnosis = context.of_gradients(
        Fault::new("half-accumulation", what, fix),
        context.failing.len(),
        0.0,
    );
    diagnosis.explains.retain(|r| context.failed(*r));
    tested.found.push(diagnosis);
    Ok(())
}
