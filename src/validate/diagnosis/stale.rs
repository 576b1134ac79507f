//! Parameters of the step before: in the whole step, in a merged weight, in one micro-batch.

use super::{Context, Fault, Tested};
use crate::adapters::Method;
use crate::error::Result;
use crate::model::Model;
use crate::validate::reference::Variant;
use ndarray::Array2;

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

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    stale_weights(context, tested)?;
    stale_parts(context, tested)
}

fn stale_weights(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let Some(previous) = previous_model(context)?.filter(|_| !tested.settled()) else {
        return Ok(());
    };
    let fix = "merge again, or refresh copies of the weights, after every update";
    let fault = Fault::new(
        "stale-weight",
        "forward and backward use the parameters of the step before",
        fix,
    );
    context.test(
        fault,
        &Variant { forward: Some(&previous), ..Variant::default() },
        |_| (),
        tested,
    )?;
    // The product with the merged weight of the step before, chain rule through the present
    // factors.
    let mut merged = context.case.model.clone();
    let mut any = false;
    for (layer, old) in merged.layers.iter_mut().zip(&previous.layers) {
        for (p, projection) in layer.projections_mut() {
            let present = projection.method.clone();
            if projection.add_update_to_base(&present, -1.0)? {
                any |= projection.add_update_to_base(&old.projection(p).method, 1.0)?;
            }
        }
    }
    if any && !tested.settled() {
        let what = "the forward multiplies by the merged weight of the step before, while the \
                    factors have moved on";
        let fault = Fault::new("stale-merged-weight", what, fix);
        context.test(
            fault,
            &Variant { forward: Some(&merged), ..Variant::default() },
            |_| (),
            tested,
        )?;
    }
    Ok(())
}

/// Weights that still hold the columns of the step before, and one micro-batch alone that ran with
/// old parameters.
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
                let (side, range) = (m.side, m.range.clone());
                let put = move |weight: &mut Array2<f64>| {
                    side.of_mut(weight, range.clone()).assign(&values)
                };
                projection.base.change("stale columns", put)?;
                any = true;
            }
        }
    }
    let previous = previous_model(context)?;
    let fix =
        "copy the trained columns into the weight before each forward, or right after the update";
    if any && !tested.settled() {
        let what = "the forward multiplies by the columns that the checkpoint's weight holds, \
                    those of a step before";
        let fault = Fault::new("stale-weight", what, fix);
        context.test(
            fault,
            &Variant { forward: Some(&old), ..Variant::default() },
            |_| (),
            tested,
        )?;
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
            if !tested.affords(1.0, "stale-weight") {
                return Ok(());
            }
            tested.steps += 2;
            let stale = Variant {
                forward: Some(model),
                parts: Some(vec![parts[k].clone()]),
                ..Variant::default()
            };
            let rest: Vec<_> =
                parts.iter().enumerate().filter(|(i, _)| *i != k).map(|(_, p)| p.clone()).collect();
            let rest = Variant { parts: Some(rest), ..Variant::default() };
            let (Ok(mut predicted), Ok(other)) = (case.run(&stale), case.run(&rest)) else {
                continue;
            };
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
                "micro-batch {k} of {} runs with the parameters of the step before, the others \
                 with the present ones",
                parts.len()
            );
            context.propose(Fault::new("stale-weight", what, fix), &predicted, tested)?;
        }
    }
    Ok(())
}
