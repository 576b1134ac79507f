//! How a validation fits in memory, before anything large is read.

use super::dump::DumpPaths;
use super::manifest::Manifest;
use crate::blocks::stored_weight::BLOCK;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::gemm::parallel_product_into;
use crate::model::ModelConfig;
use crate::tensor_file::TensorFile;
use crate::train::memory::{StepShape, predict};
use crate::train::method::{MethodName, MethodParams};
use std::collections::BTreeSet;
use std::path::Path;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Most activations of a step.
const LARGEST_STEP: u128 = 1 << 53;

/// Copies of what a step computes and the dump records: exact, rounded, a fault's, and two on the
/// way to its measures.
const COPIES: usize = 5;

/// How a validation holds the model and what that takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Whether the weights stay on the disk and are read each time they are needed.
    pub on_disk: bool,
    /// Whether backward runs each layer's forward again instead of keeping its activations.
    pub recompute: bool,
    /// Bytes at the peak, predicted.
    pub bytes: usize,
    /// Bytes that may be used.
    pub limit: usize,
    /// Numbers of the model.
    pub parameters: usize,
    /// Tokens of the step.
    pub tokens: usize,
}

impl Plan {
    /// How often a right step passes over the weights: forward and backward, exact and rounded.
    pub fn passes(&self) -> usize {
        if self.recompute { 6 } else { 4 }
    }

    /// The plan in a line, given the multiply-adds a second of this machine.
    pub fn line(&self, rate: f64) -> String {
        let gib = |bytes: usize| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
        let weights = if self.on_disk { "weights stay on the disk" } else { "weights in memory" };
        let activations =
            if self.recompute { "layers run again in backward" } else { "activations kept" };
        let seconds = self.passes() as f64 * self.parameters as f64 * self.tokens as f64 / rate;
        format!(
            "{weights}, {activations}: {} at the peak (limit {}); {} passes over {:.2}e9 weights, \
             at least {seconds:.0} s",
            gib(self.bytes),
            gib(self.limit),
            self.passes(),
            self.parameters as f64 / 1e9
        )
    }
}

/// Multiply-adds in f64 that this machine does in a second, measured on one product of a step's
/// shape.
pub fn rate() -> f64 {
    let a = ndarray::Array2::from_elem((128, 1024), 1.0f64);
    let b = ndarray::Array2::from_elem((1024, 1024), 1.0f64);
    let mut c = ndarray::Array2::zeros((128, 1024));
    let mut once = || {
        let start = std::time::Instant::now();
        let view = &mut c.view_mut();
        parallel_product_into(1.0, a.view(), b.t(), 0.0, view, &mut Cost::default());
        start.elapsed().as_secs_f64()
    };
    let best = (0..8).map(|_| once()).fold(f64::INFINITY, f64::min);
    128.0 * 1024.0 * 1024.0 / best.max(1e-9)
}

/// The cheapest way of holding the model that stays within `limit` bytes.
///
/// The step is that of LoRA (or DoRA) with rank 8 on every projection if there is an adapter, of
/// full fine-tuning otherwise; what is trained besides makes little difference.
///
/// # Errors
/// Those of `config.json` and of the step's file; [`Error::TooLarge`] where even the last way needs
/// more.
pub fn plan(paths: &DumpPaths, manifest: Option<&Manifest>, limit: usize) -> Result<Plan> {
    let config = ModelConfig::read(&paths.model.join("config.json"))?;
    let file = TensorFile::open_on_disk(&paths.step)?;
    let Some(&[rows, length]) = file.shape("input_ids") else {
        return Err(file.missing("input_ids", "the batch of the step, (batch, length)"));
    };
    if rows == 0 || length == 0 {
        return Err(file.malformed(
            "tensor input_ids",
            "at least one token",
            format!("shape [{rows}, {length}]"),
        ));
    }
    let tokens = rows.saturating_mul(length);
    // A micro-batch is a part of the rows; a manifest that says more is refused when the batch is
    // read.
    let largest = manifest.and_then(|m| m.loss.micro_batch_rows.iter().max().copied());
    let rows = largest.map_or(rows, |largest| largest.clamp(1, rows));
    within_numbers(&config, rows, length)?;
    let name = match &paths.adapter {
        None => MethodName::Full,
        Some(folder) if uses_dora(folder) => MethodName::Dora,
        Some(_) => MethodName::Lora,
    };
    let sides = config.all_projections().into_iter().map(|p| config.projection_shape(p));
    let rank = sides.map(|(out, input)| out.min(input)).min().map_or(8, |least| least.clamp(1, 8));
    let method = MethodParams { rank, ..MethodParams::named(name) };
    let numbers = |keep: &dyn Fn(&str) -> bool| -> usize {
        let kept = file.names().filter(|name| keep(name)).filter_map(|name| file.shape(name));
        kept.map(|shape| shape.iter().product::<usize>()).sum()
    };
    let compared =
        |name: &str| name == "logits" || name.starts_with("hidden.") || name.starts_with("grad.");
    let recorded = (numbers(&|_| true) + COPIES * numbers(&compared)) * size_of::<f64>();
    let parameters = config.parameters();
    let weights = [parameters * size_of::<f64>(), read_at_a_time(&config) * size_of::<f64>()];
    let mut least = None;
    // Quantized weights are restored when they are read, and stay in memory.
    let may_stay = config.options.quantization.is_none();
    for (on_disk, recompute) in [(false, false), (true, false), (false, true), (true, true)] {
        if on_disk && !may_stay {
            continue;
        }
        let shape = StepShape {
            batch: rows,
            length,
            bytes: size_of::<f64>(),
            state: 0,
            checkpointing: recompute,
        };
        let step = predict(&config, &method, &shape)?;
        let bytes = step.total() - step.weights + weights[usize::from(on_disk)] + recorded;
        let plan = Plan { on_disk, recompute, bytes, limit, parameters, tokens };
        if bytes <= limit {
            return Ok(plan);
        }
        least = least.filter(|other: &Plan| other.bytes <= bytes).or(Some(plan));
    }
    let bytes = least.map_or(usize::MAX, |plan| plan.bytes);
    let what = format!(
        "{}: the f64 reference of this step, its weights read layer by layer",
        paths.model.display()
    );
    let (shift, unit) = if bytes < 1 << 24 { (10, "KiB") } else { (20, "MiB") };
    Err(Error::TooLarge {
        what,
        needed: bytes.div_ceil(1 << shift) as u128,
        limit: (limit >> shift) as u128,
        unit,
    })
}

/// Whether an adapter is DoRA's, which forms whole weights anew; what is wrong with the file is
/// said when it is read.
fn uses_dora(folder: &Path) -> bool {
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap_or_default();
    let json = serde_json::from_str::<serde_json::Value>(&text).unwrap_or_default();
    json.get("use_dora").and_then(serde_json::Value::as_bool).unwrap_or(false)
}

/// Numbers in memory of weights that stay on the disk: a buffer for each size of a projection, one
/// more of the largest where it is turned, a block of the output projection, learned positions.
fn read_at_a_time(config: &ModelConfig) -> usize {
    let sizes: BTreeSet<usize> = config
        .all_projections()
        .into_iter()
        .map(|p| config.projection_shape(p))
        .map(|(out, input)| out * input)
        .collect();
    let turned = if config.options.transposed || config.options.experts.is_some() {
        sizes.last().copied()
    } else {
        None
    };
    let table = config.vocab_size * config.hidden_size;
    let positions =
        config.options.positions.map_or(0, |offset| config.max_position_embeddings + offset);
    sizes.iter().sum::<usize>()
        + turned.unwrap_or(0)
        + table.min(BLOCK)
        + positions * config.hidden_size
}

/// Refuses a step whose activations exceed 2^53 numbers: sums of bytes would overflow.
///
/// # Errors
/// [`Error::TooLarge`].
pub fn within_numbers(config: &ModelConfig, rows: usize, length: usize) -> Result<()> {
    let widths = [
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
    ];
    let widths: u128 = widths.iter().map(|&n| 4 * n as u128).sum();
    let needed = rows as u128 * length as u128 * widths * config.num_hidden_layers as u128;
    if needed <= LARGEST_STEP {
        return Ok(());
    }
    let what = format!("a step of {rows} rows of {length} tokens");
    Err(Error::TooLarge { what, needed, limit: LARGEST_STEP, unit: "activations" })
}

/// Memory that the system says is available, if it says so.
pub fn available() -> Option<usize> {
    let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let free = System::new_with_specifics(kinds).available_memory();
    usize::try_from(free).ok().filter(|bytes| *bytes > 0)
}
