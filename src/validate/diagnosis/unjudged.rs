//! Steps that nothing explains and that may be right all the same: dropout whose masks are not in
//! the dump, another adapter than the dumped one, noise on the embeddings, another loss than
//! cross-entropy.

use super::{Context, Diagnosis, Fault, Tested};
use crate::error::{Error, Result};
use crate::model::{Place, Point};
use crate::validate::ladder::{RungName, climb, rung_of};
use crate::validate::names::place_of;
use crate::validate::reference::Variant;
use ndarray::Array2;

/// Faults that are seen without comparing with the reference: zeros and numbers that are none.
const SEEN: [&str; 7] = [
    "not-finite",
    "no-gradient",
    "graph-cut",
    "layer-dropped",
    "outside-graph",
    "underflow",
    "gradient-shape",
];

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let seen = tested.found.iter().any(|d| SEEN.contains(&d.fault.as_str()) && d.tensors.0 > 0);
    if dropout(context, tested) || other_adapter(context, tested) || seen {
        return Ok(());
    }
    counted_padding(context)?;
    embedding_noise(context, tested)?;
    another_loss(context, tested)
}

/// Labels that padding predicts: what a query without keys gives is the framework's own business.
fn counted_padding(context: &Context<'_>) -> Result<()> {
    let batch = &context.case.batch;
    let Some(mask) = &batch.attention_mask else { return Ok(()) };
    let labels = batch.labels.iter().zip(mask.iter()).collect::<Vec<_>>();
    let length = batch.input_ids.ncols();
    let predicted = |i: &usize| i % length + 1 < length && *labels[i + 1].0 >= 0 && !*labels[*i].1;
    let count = (0..labels.len()).filter(predicted).count();
    if count == 0 {
        return Ok(());
    }
    let what = format!(
        "{count} counted labels are predicted by padding, which sees no token: attention kernels \
         differ there (zeros, or the mean of all values), so forward and gradients cannot be \
         compared: set the label of each row's first token to -100"
    );
    Err(Error::invalid("labels", "counted after padding", what))
}

/// A diagnosis of every rung of the step that failed.
fn of_everything(context: &Context<'_>, fault: Fault) -> Diagnosis {
    Diagnosis {
        fault: fault.name.into(),
        what: fault.what,
        fix: fault.fix.into(),
        explains: context.failed.iter().copied().collect(),
        complete: true,
        tensors: (context.failing.len(), context.failing.len()),
        share: 0.0,
    }
}

/// Dropout is declared, and what fails may be its work.
fn dropout(context: &Context<'_>, tested: &mut Tested<'_>) -> bool {
    let declared = &context.case.trainer.setting.dropout;
    if declared.is_empty() {
        return false;
    }
    let what = format!(
        "{} is declared and the model seems to have been in train mode: its masks are not in the \
         dump, so neither forward nor gradients can be compared",
        declared.join(", ")
    );
    let fix = "this says nothing against the trainer: dump one step with dropout 0, or in eval \
               mode, which passes if it is right";
    tested.found.retain(|d| SEEN.contains(&d.fault.as_str()) && d.tensors.0 > 0);
    tested.found.push(of_everything(context, Fault::new("dropout-active", what, fix)));
    true
}

/// The parameters after the step are far from those dumped before it: another adapter was trained.
fn other_adapter(context: &Context<'_>, tested: &mut Tested<'_>) -> bool {
    let Some(update) = rung_of(context.rungs, RungName::Update).filter(|r| r.failed()) else {
        return false;
    };
    let far = update.tensors.iter().filter(|m| m.relative > 20.0 && m.relative.is_finite()).count();
    // Some tensors of both may agree, at zero for instance; one half must not.
    if !context.forward_wrong() || far * 5 < update.tensors.len() * 2 || far < 2 {
        return false;
    }
    let named = match &context.case.trainer.setting.adapter_name {
        Some(name) => format!(" (the trained one is named `{name}`)"),
        None => String::new(),
    };
    let what = format!(
        "the parameters after the step are not one update away from the dumped adapter, in {far} \
         of {} tensors: another adapter than the dumped one is trained{named}",
        update.tensors.len()
    );
    let fix = "set_adapter chooses the adapter that runs and trains; dump that one";
    tested.found.clear();
    tested.found.push(of_everything(context, Fault::new("other-adapter", what, fix)));
    true
}

/// Layer 0 has another input, or computes otherwise, and everything behind it follows.
fn embedding_noise(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let case = context.case;
    let (Some(first), true) = (case.trainer.hidden.get(&0), context.failed(RungName::Hidden))
    else {
        return Ok(());
    };
    let failing = |m: &crate::validate::measure::Measure| {
        !m.passes() && m.name == crate::validate::reference::hidden_name(0)
    };
    let hidden = rung_of(context.rungs, RungName::Hidden);
    if !hidden.is_some_and(|r| r.tensors.iter().any(failing))
        || case.micro_batches().len() > 1
        || tested.settled()
    {
        return Ok(());
    }
    tested.watch.begins("the trainer's own output of layer 0");
    if !tested.affords(2.0, "noise on the embeddings") {
        return Ok(());
    }
    tested.steps += 2;
    let tap = |place: Place, x: &mut Array2<f64>| {
        if place.point == Point::Output
            && place.layer == Some(0)
            && !place.gradient
            && x.dim() == first.values.dim()
        {
            x.assign(&first.values);
        }
    };
    let variant = Variant { tap: Some(&tap), ..Variant::default() };
    let Ok(exact) = case.run(&variant) else { return Ok(()) };
    let rounded = case.run(&Variant { rounding: Some(case.rounding), ..variant })?;
    let rungs = climb(case, &exact, &rounded);
    let fine = |name: RungName, keep: &dyn Fn(&str) -> bool| {
        rung_of(&rungs, name)
            .is_none_or(|r| r.tensors.iter().filter(|m| keep(&m.name)).all(|m| m.passes()))
    };
    let forward = [RungName::Loss, RungName::Logits, RungName::Hidden]
        .into_iter()
        .all(|n| fine(n, &|_| true));
    let above = fine(RungName::Gradients, &|name: &str| {
        place_of(name).0 != Some(0) && !name.contains("embed_tokens")
    });
    // Noise is everywhere of the same size.
    let Some(right) = context.exact.hidden.get(&0).filter(|h| h.dim() == first.values.dim()) else {
        return Ok(());
    };
    let gap = &first.values - right;
    let sizes: Vec<f64> =
        case.real_rows().iter().map(|&i| gap.row(i).dot(&gap.row(i)).sqrt()).collect();
    let (low, high) =
        sizes.iter().fold((f64::INFINITY, 0.0f64), |(l, h), x| (l.min(*x), h.max(*x)));
    if !forward || !above || high > 6.0 * low {
        return Ok(());
    }
    let what = "the input of layer 0 is not the embedding of these tokens, or layer 0 computes \
                otherwise: from its output on forward and gradients are right, so this is noise on \
                the embeddings (NEFTune) or a fault in layer 0 alone; noise is not in the dump and \
                cannot be imitated: dump one step without it (neftune_noise_alpha=None)";
    Err(Error::invalid("hidden.0", "another than the reference's", what))
}

/// The logits are right and the loss is not the one that was declared.
fn another_loss(context: &Context<'_>, tested: &Tested<'_>) -> Result<()> {
    let checked = context.checked(RungName::Logits) && !context.forward_wrong();
    // In a half format gradients may agree with another loss within rounding.
    let gradients = context.failed(RungName::Gradients) || context.coarse();
    let wrong = context.failed(RungName::Loss) && gradients;
    let part = tested.found.iter().any(|d| !d.explains.is_empty());
    let (true, true, false, Some(loss)) = (checked, wrong, part, context.case.trainer.loss) else {
        return Ok(());
    };
    let what = format!(
        "the logits are right, and their mean cross-entropy with the labels is {:.6}: the step has \
         another loss function, which the dump does not declare (label smoothing, token weights, a \
         preference or distillation loss), or a fault in it that is not known; gradients cannot be \
         compared: dump a step with plain cross-entropy, or check the loss by itself",
        context.exact.loss
    );
    Err(Error::invalid("loss", format!("{loss:.6}"), what))
}
