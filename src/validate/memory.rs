//! Whether a validation fits in memory, before anything large is read.

use super::dump::DumpPaths;
use super::manifest::Manifest;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::tensor_file::TensorFile;
use crate::train::memory::{StepShape, predict};
use crate::train::method::{MethodName, MethodParams};
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Most activations of a step.
const LARGEST_STEP: u128 = 1 << 53;

/// Bytes of an f64 step of the reference with its gradients, and a second copy of the weights, which hypotheses and
/// rounding need.
///
/// The step is that of LoRA with rank 8 on every projection if there is an adapter, of full fine-tuning otherwise; what is
/// trained besides makes little difference.
///
/// # Errors
/// Those of `config.json` and of the step's file.
pub fn needed(paths: &DumpPaths, manifest: Option<&Manifest>) -> Result<usize> {
    let config = ModelConfig::read(&paths.model.join("config.json"))?;
    let file = TensorFile::open(&paths.step)?;
    let Some(&[rows, length]) = file.shape("input_ids") else {
        return Err(file.missing("input_ids", "the batch of the step, (batch, length)"));
    };
    if rows == 0 || length == 0 {
        return Err(file.malformed("tensor input_ids", "at least one token", format!("shape [{rows}, {length}]")));
    }
    // A micro-batch is a part of the rows; a manifest that says more is refused when the batch is read.
    let largest = manifest.and_then(|m| m.loss.micro_batch_rows.iter().max().copied());
    let rows = largest.map_or(rows, |largest| largest.clamp(1, rows));
    within_numbers(&config, rows, length)?;
    let name = if paths.adapter.is_some() { MethodName::Lora } else { MethodName::Full };
    let rank = 8.min(config.hidden_size).min(config.head_dim * config.num_key_value_heads);
    let method = MethodParams { rank, ..MethodParams::named(name) };
    let shape = StepShape { batch: rows, length, bytes: size_of::<f64>(), state: 0, checkpointing: false };
    let step = predict(&config, &method, &shape)?;
    Ok(step.total() + step.weights)
}

/// Refuses a step whose activations exceed 2^53 numbers: sums of bytes would overflow.
///
/// # Errors
/// [`Error::TooLarge`].
pub fn within_numbers(config: &ModelConfig, rows: usize, length: usize) -> Result<()> {
    let widths = [config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim];
    let widths: u128 = widths.iter().map(|&n| 4 * n as u128).sum();
    let needed = rows as u128 * length as u128 * widths * config.num_hidden_layers as u128;
    if needed <= LARGEST_STEP {
        return Ok(());
    }
    let what = format!("a step of {rows} rows of {length} tokens");
    Err(Error::TooLarge { what, needed, limit: LARGEST_STEP, unit: "activations" })
}

/// Refuses a validation that needs more than `limit` bytes.
///
/// # Errors
/// [`Error::TooLarge`] with both numbers; as [`needed`].
pub fn require(paths: &DumpPaths, manifest: Option<&Manifest>, limit: usize) -> Result<usize> {
    let bytes = needed(paths, manifest)?;
    if bytes <= limit {
        return Ok(bytes);
    }
    let what = format!("{}: the f64 reference of this step", paths.model.display());
    let (shift, unit) = if bytes < 1 << 24 { (10, "KiB") } else { (20, "MiB") };
    Err(Error::TooLarge { what, needed: bytes.div_ceil(1 << shift) as u128, limit: (limit >> shift) as u128, unit })
}

/// Memory that the system says is available, if it says so.
pub fn available() -> Option<usize> {
    let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let free = System::new_with_specifics(kinds).available_memory();
    usize::try_from(free).ok().filter(|bytes| *bytes > 0)
}
