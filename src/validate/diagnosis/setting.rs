//! What can be said without comparing numbers: adapters that are not trained, labels that were
//! shifted before the loss shifts them, documents that attend to each other; and which steps cannot
//! be judged.

use super::{Diagnosis, Fault};
use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::error::{Error, Result};
use crate::validate::dump::Case;
use crate::validate::ladder::{Outcome, Rung, RungName, rung_of};
use crate::validate::names::place_of;
use crate::validate::reference::{Part, Variant};
use std::collections::BTreeSet;

/// Tensors of the adapter that are not trained; the kinds that are trained nowhere, if these are
/// all.
fn frozen(case: &Case) -> Option<Fault> {
    let frozen = &case.trainer.setting.frozen;
    let first = frozen.first()?;
    let trains_adapter = case.trained.iter().any(|n| place_of(n).2 != "weight");
    let what = if trains_adapter {
        format!(
            "{} adapter tensors are frozen while others of their kind train: {first} for instance",
            frozen.len()
        )
    } else {
        format!(
            "every adapter tensor is frozen ({first} for instance): the step trains nothing of the \
             adapter"
        )
    };
    let fix = "requires_grad must be true for the adapter after every preparation of the model (a \
               late prepare_model_for_kbit_training or requires_grad_(False) freezes it again)";
    Some(Fault::new("frozen-adapters", what, fix))
}

/// Whether one kind of tensor is frozen everywhere and the others train: LoRA-FA and its like.
fn frozen_by_kind(case: &Case) -> bool {
    let kinds =
        |names: &[String]| names.iter().map(|n| place_of(n).2).collect::<BTreeSet<String>>();
    let trained: Vec<String> =
        case.trained.iter().filter(|n| place_of(n).2 != "weight").cloned().collect();
    !trained.is_empty() && kinds(&case.trainer.setting.frozen).is_disjoint(&kinds(&trained))
}

/// Whether the labels are the ids moved by one: label t is id t + 1.
pub(in crate::validate) fn labels_moved(case: &Case) -> bool {
    let (ids, labels) = (&case.batch.input_ids, &case.batch.labels);
    let length = ids.ncols();
    let (mut moved, mut same, mut all) = (0, 0, 0);
    for ((b, t), &label) in labels.indexed_iter().filter(|(_, l)| **l != IGNORED_LABEL) {
        if t + 1 < length {
            all += 1;
            moved += usize::from(label == i64::from(ids[[b, t + 1]]));
            same += usize::from(label == i64::from(ids[[b, t]]));
        }
    }
    all >= 4 && moved * 20 >= all * 19 && same * 2 < all
}

/// The case with labels moved back, so that the reference's shift makes of them what a loss without
/// shift does.
pub(in crate::validate) fn with_labels_moved_back(case: &Case) -> Case {
    let mut other = case.clone();
    let (rows, length) = other.batch.labels.dim();
    for b in 0..rows {
        for t in (0..length).rev() {
            other.batch.labels[[b, t]] =
                if t > 0 { case.batch.labels[[b, t - 1]] } else { IGNORED_LABEL };
        }
    }
    other
}

/// The case with each row taken for one document.
pub(in crate::validate) fn as_one_document(case: &Case) -> Case {
    let mut other = case.clone();
    other.batch.documents = None;
    other
}

/// Documents of a row, which `declared` says there are, attend to each other.
pub(in crate::validate) fn documents_leak(declared: &str) -> Fault {
    let what = format!(
        "{declared}, yet later documents attend to earlier ones: packed documents leak into each \
         other"
    );
    let fix = "pass a block-diagonal mask, or restarting position_ids with no attention_mask and \
               use_cache=False (a mask of ones switches their separation off)";
    Fault::new("packing-leak", what, fix)
}

/// Positions that start again, no mask, and attention over the row: a leak or meant so, which the
/// dump does not say. Transformers 5 keeps such documents apart without a cache (`use_cache=False`)
/// only.
pub(in crate::validate) fn ambiguous_documents() -> Error {
    let what = "positions start again inside rows (packed documents) and no mask says what that \
                means. The step is right if later documents may attend to earlier ones; if not, \
                they leak into each other (Transformers keeps them apart without a cache only: \
                use_cache=False). Pass a mask: ones for one document a row";
    Error::invalid("position_ids", "packed", what)
}

/// Loss of the reference with the declared loss function, if a position counts.
pub(in crate::validate) fn declared_loss(case: &Case) -> Option<f64> {
    if case.batch.counted() == 0 {
        return None;
    }
    let part = Part { forward_only: case.objective.is_plain(), ..Part::default() };
    let run = case.run(&Variant { part, ..Variant::default() });
    run.ok().map(|evidence| evidence.loss)
}

/// What is said of a loss that is not the declared one.
pub(in crate::validate) fn another_loss(case: &Case, declared: f64) -> String {
    let of = |loss: Option<f64>| loss.map_or("not recorded".into(), |l| format!("{l:.6}"));
    if declared.is_nan() {
        return "no labels: the loss function itself is not checked".into();
    }
    format!(
        "the loss function itself is not checked: it is {}, and the declared cross-entropy of \
         these labels is {declared:.6}. Declare label_smoothing, z_loss, token_weights or a \
         divisor to have it checked",
        of(case.trainer.loss)
    )
}

/// The fault that is left where all below the loss is right and the loss is the model's own.
pub(in crate::validate) fn loss_gradient(case: &Case, declared: f64) -> Diagnosis {
    let loss = case.trainer.loss.map_or("not recorded".into(), |l| format!("{l:.6}"));
    let what = format!(
        "the loss (recorded: {loss}; reference: {declared:.6}) or its gradient is not that of the \
         declared cross-entropy, and everything below it is right"
    );
    let fix = "look at the loss function alone: labels, masks, divisor, a fused kernel; or declare \
               another loss";
    Diagnosis {
        explains: vec![RungName::Loss],
        ..Diagnosis::of_setting(Fault::new("loss-gradient", what, fix), true)
    }
}

/// Faults of the setting, and sentences that are none.
///
/// # Errors
/// For packed rows that a mask says are one document and the trainer kept apart, in words.
pub(in crate::validate) fn findings(
    case: &Case,
    rungs: &[Rung],
) -> Result<(Vec<Fault>, Vec<String>)> {
    let (mut faults, mut remarks) = (Vec::new(), Vec::new());
    let outcome = |name| rung_of(rungs, name).map(|r| &r.outcome);
    let passed = |name| outcome(name) == Some(&Outcome::Pass);
    if !case.trainer.setting.frozen.is_empty() {
        if frozen_by_kind(case) {
            let kinds: BTreeSet<String> =
                case.trainer.setting.frozen.iter().map(|n| place_of(n).2).collect();
            let kinds: Vec<String> = kinds.into_iter().collect();
            remarks.push(format!(
                "{} frozen in every module, which LoRA-FA and its like intend",
                kinds.join(", ")
            ));
        } else {
            faults.extend(frozen(case));
        }
    }
    if labels_moved(case) && (passed(RungName::Loss) || passed(RungName::Gradients)) {
        let what = "the labels are the ids moved by one already, and the loss shifts them again: \
                    each position predicts the token after the next";
        faults.push(Fault::new(
            "labels-shifted-twice",
            what,
            "shift in the collator or in the model, not in both",
        ));
    }
    if case.trainer.setting.packed {
        if !passed(RungName::Hidden) && !passed(RungName::Logits) {
            let what = "positions start again inside rows (packed documents), and with the dump's \
                        mask of ones the reference lets all tokens of a row attend to those before \
                        them, which the trainer did not; leave the attention_mask out of the dump, \
                        or dump one document in a row";
            return Err(Error::invalid("position_ids", "packed", what));
        }
        faults.push(documents_leak("positions start again inside rows"));
    }
    Ok((faults, remarks))
}
