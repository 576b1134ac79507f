//! What was recorded, for the head of a report.

use super::dump::Case;
use super::update::group_of;

/// (what, how): model, adapter, batch, formats, loss, optimizer.
pub(super) fn list(case: &Case) -> Vec<(&'static str, String)> {
    let config = &case.model.config;
    let (rows, length) = case.batch.input_ids.dim();
    let micro = case.micro_batches().len();
    let rounding = case.rounding;
    let mut all = vec![
        (
            "model",
            format!(
                "{}, {} layers of width {}, {} parameters",
                config.options.family.model_type(),
                config.num_hidden_layers,
                config.hidden_size,
                config.parameters()
            ),
        ),
        ("trained", format!("{} tensors ({})", case.trained.len(), kinds(case).join(", "))),
        (
            "batch",
            format!(
                "{rows} rows of {length} tokens, {} counted{}",
                case.batch.counted(),
                if micro > 1 { format!(", in {micro} micro-batches") } else { String::new() }
            ),
        ),
        (
            "formats",
            format!(
                "weights {}, products {}{}, norms and softmax {}",
                rounding.stream.name(),
                rounding.products.name(),
                if rounding.autocast { " (autocast)" } else { "" },
                rounding.internals.name()
            ),
        ),
    ];
    let mut loss = vec![format!("{:?} of the counted tokens", case.loss.reduction).to_lowercase()];
    if case.loss.label_smoothing > 0.0 {
        loss.push(format!("label smoothing {}", case.loss.label_smoothing));
    }
    if case.loss.z_loss.abs() > 0.0 {
        loss.push(format!("z-loss {}", case.loss.z_loss));
    }
    if case.trainer.setting.maximized {
        loss.push("minus the recorded one, which the optimizer maximizes".into());
    }
    if (case.loss.scale - 1.0).abs() > 0.0 {
        loss.push(format!("scaled by {}", case.loss.scale));
    }
    all.push(("loss", loss.join(", ")));
    if let Some(record) = &case.optimizer {
        let group = case.trained.first().and_then(|name| group_of(record, name));
        let rates = group
            .map_or(String::new(), |g| format!(", lr {}, weight decay {}", g.lr, g.weight_decay));
        all.push((
            "optimizer",
            format!("{}, step {}{rates}", record.kind, record.steps_before + 1),
        ));
    }
    all
}

/// Last parts of the trained tensors' names, each once.
fn kinds(case: &Case) -> Vec<&str> {
    let mut all: Vec<&str> =
        case.trained.iter().filter_map(|name| name.rsplit('.').next()).collect();
    all.sort_unstable();
    all.dedup();
    all
}
