//! What a step cannot show, whatever its verdict.

use super::dump::Case;
use super::update::group_of;
use crate::adapters::Method;
use crate::adapters::lora::LoraSpec;
use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::blocks::rope::Scaling;
use ndarray::{Array2, s};

/// One line for each part of a trainer that the step leaves untried, with what a step would need to
/// try it.
pub(super) fn list(case: &Case) -> Vec<String> {
    let mut all = Vec::new();
    adapters(case, &mut all);
    batch(case, &mut all);
    attention(case, &mut all);
    optimizer(case, &mut all);
    all
}

/// The specification and factor B of every low-rank adapter.
fn low_rank(case: &Case) -> Vec<(LoraSpec, &Array2<f64>)> {
    let projections = case.model.layers.iter().flat_map(|layer| layer.projections());
    projections
        .filter_map(|(_, p)| match &p.method {
            Method::Lora(m) => Some((m.spec, &m.b)),
            Method::Dora(m) => Some((m.spec, &m.b)),
            Method::Moslora(m) => Some((m.spec, &m.b)),
            _ => None,
        })
        .collect()
}

fn adapters(case: &Case, all: &mut Vec<String>) {
    let adapters = low_rank(case);
    let zero = adapters.iter().filter(|(_, b)| b.iter().all(|x| x.abs() <= 0.0)).count();
    if zero > 0 {
        let part = if zero == adapters.len() {
            String::new()
        } else {
            format!(" in {zero} of {} modules", adapters.len())
        };
        all.push(format!(
            "lora_B is zero{part}: the adapter does nothing to the forward, and the gradient of \
             lora_A is zero (record a later step)"
        ));
    }
    let factor = |spec: &LoraSpec| {
        let r = spec.rank as f64;
        spec.alpha / if spec.rank_stabilized { r.sqrt() } else { r }
    };
    if !adapters.is_empty() && adapters.iter().all(|(spec, _)| (factor(spec) - 1.0).abs() < 1e-12) {
        all.push(
            "the adapters' scaling is 1: a trainer that forgets it is right here (take alpha other \
             than r)".into(),
        );
    } else if !adapters.is_empty() && adapters.iter().all(|(spec, _)| spec.rank == 1) {
        all.push("rank 1: alpha / r and alpha / sqrt(r) are the same".into());
    }
}

fn batch(case: &Case, all: &mut Vec<String>) {
    let batch = &case.batch;
    let (rows, length) = batch.input_ids.dim();
    let padded = batch.attention_mask.as_ref().is_some_and(|mask| mask.iter().any(|real| !real))
        || case
            .trainer
            .setting
            .row_lengths
            .as_ref()
            .is_some_and(|each| each.iter().any(|n| *n < length));
    if rows == 1 {
        all.push("one row: padding, and the mean over rows of several lengths".into());
    } else if !padded {
        all.push("no padding: all rows have one length".into());
    }
    let labels = batch.labels.slice(s![.., 1..]);
    if batch.counted() > 0 && labels.iter().all(|label| *label != IGNORED_LABEL) {
        all.push("no ignored labels: every token counts in the loss".into());
    }
    if case.micro_batches().len() < 2 {
        all.push("one micro-batch: accumulation of gradients".into());
    }
    if !case.trainer.setting.packed && case.batch.documents.is_none() {
        all.push("one document a row: packing".into());
    }
    if case.trainer.loss.is_none() && case.given().is_none() {
        all.push("the dump holds no loss".into());
    }
    if case.trainer.logits.is_none() && case.trainer.hidden.is_empty() {
        all.push(
            "the dump holds no logits and no hidden states: the forward is seen through the \
             gradients only"
                .into(),
        );
    }
}

fn attention(case: &Case, all: &mut Vec<String>) {
    let config = &case.model.config;
    let length = case.batch.input_ids.ncols();
    if let Some(window) =
        config.options.windows.iter().flatten().min().filter(|window| **window >= length)
    {
        all.push(format!(
            "rows of {length} tokens do not reach beyond the sliding window of {window}"
        ));
    }
    let far =
        |scaling: &Scaling| matches!(scaling, Scaling::Dynamic { .. } | Scaling::LongRope { .. });
    if config.options.rotaries.iter().any(|r| far(&r.scaling))
        && length <= config.max_position_embeddings
    {
        all.push(format!("rows of {length} tokens do not reach where the rotary scaling begins"));
    }
}

fn optimizer(case: &Case, all: &mut Vec<String>) {
    if case.trainer.after.is_empty() {
        all.push("no update: parameters after the step are not in the dump".into());
        return;
    }
    let Some(record) = &case.optimizer else { return };
    if record.steps_before == 0 {
        all.push("the optimizer's first update: its moments start at zero".into());
    }
    let groups: Vec<_> = case.trained.iter().filter_map(|name| group_of(record, name)).collect();
    if groups.iter().all(|group| group.weight_decay.abs() <= 0.0) {
        all.push("weight decay is zero".into());
    }
    if case.trainer.applied.is_empty() {
        all.push(
            "the optimizer saw the gradients as backward left them: no clipping, no unscaling"
                .into(),
        );
    }
}
