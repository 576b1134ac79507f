//! Memory of a training step, predicted from sizes alone.
//!
//! ```text
//! weights      (parameters) s, or 4.127 bits each in NF4         adapters   what a method adds beside them
//! gradients    (trained numbers) s                               optimizer  k (trained numbers) s, k = 2 for AdamW
//! activations  sum over layers of what its backward reads, N = B T rows:
//!              D x, D norm(x), Q + 2 K q k v, Q attention, H log-sum-exp, D h, D norm(h), 3 F gate, up, gated,
//!              each only if a trainable tensor's gradient needs it, and rank or column count where a method says so
//! workspace    buffers in use besides: gradients of activations, one layer's temporaries, one chunk of logits
//! ```
//!
//! s is the size of a number. The activations follow the rule by which the model itself saves;
//! the workspace comes from replaying the order in which a step takes and returns buffers (a step reuses the
//! buffers of the last, so they are held together). `tests/memory.rs` compares the total with a counting
//! allocator, within 1% for every method.

pub mod ledger;
mod replay;

use crate::adapters::nf4::Nf4Matrix;
use crate::error::{Error, Result};
use crate::model::s2ft::{S2ftSpec, Scope};
use crate::model::{ModelConfig, Projection};
use crate::train::method::{MethodName, MethodParams};
use replay::Replay;
use std::collections::BTreeMap;

/// What is asked about.
#[derive(Debug, Clone, PartialEq)]
pub struct StepShape {
    /// Rows per forward pass.
    pub batch: usize,
    /// Tokens per row.
    pub length: usize,
    /// Bytes of a number: 4 or 8 here; 2 tells what a half-precision trainer would hold.
    pub bytes: usize,
    /// Numbers of optimizer state per trained number.
    pub state: usize,
    /// Keep only each layer's input.
    pub checkpointing: bool,
}

/// How a projection is adapted, in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Adapted {
    trained: usize,
    beside: usize,
    whole_input: bool,
    /// Numbers per row that the method saves of or beside the input.
    saved_columns: usize,
    /// Numbers that a product needs for its duration (a decoded or normalised weight).
    temporary: usize,
}

/// Bytes by category.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Memory {
    /// Base weights at rest, NF4 where the method packs them.
    pub weights: usize,
    /// Tensors that the method holds beside them.
    pub adapters: usize,
    /// Gradient buffers.
    pub gradients: usize,
    /// Optimizer state.
    pub optimizer: usize,
    /// Saved activations by tensor name, summed over layers.
    pub activations: BTreeMap<String, usize>,
    /// Everything else live at the peak.
    pub workspace: usize,
    /// Trained numbers.
    pub trained: usize,
}

impl Memory {
    /// Saved activations, all names.
    pub fn activation_bytes(&self) -> usize {
        self.activations.values().sum()
    }

    /// Bytes at the peak.
    pub fn total(&self) -> usize {
        self.weights + self.adapters + self.gradients + self.optimizer + self.activation_bytes() + self.workspace
    }
}

/// Predicts the peak of a training step.
///
/// Where S2FT takes its share over all layers together, the units are taken to be spread evenly over them; which
/// layers really have how many depends on the selection.
///
/// # Errors
/// As [`MethodParams::check`]; [`Error::InvalidParam`] for a rank that does not fit a projection or an empty shape.
///
/// ```
/// use peft_limits::train::memory::{StepShape, predict};
/// use peft_limits::train::method::{MethodName, MethodParams};
/// use peft_limits::train::preset::preset;
/// let shape = StepShape { batch: 8, length: 256, bytes: 4, state: 2, checkpointing: false };
/// let of = |name| predict(&preset("micro")?, &MethodParams::named(name), &shape).map(|m| m.total());
/// assert!(of(MethodName::Paca)? < of(MethodName::Lora)?);
/// assert!(of(MethodName::Lora)? < of(MethodName::Full)?);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn predict(config: &ModelConfig, method: &MethodParams, shape: &StepShape) -> Result<Memory> {
    config.check()?;
    method.check()?;
    for (name, value) in [("batch", shape.batch), ("length", shape.length), ("bytes", shape.bytes)] {
        if value == 0 {
            return Err(Error::invalid(name, value, "must be at least 1"));
        }
    }
    let everything = method.name == MethodName::Full && method.targets.is_none();
    let adapted = adapted(config, method)?;
    let single = shape.bytes;
    let layers = config.num_hidden_layers;
    let sum = |f: &dyn Fn(&Adapted) -> usize| adapted.iter().flatten().map(f).sum::<usize>();
    let outside = config.parameters()
        - layers * Projection::ALL.iter().map(|&p| elements(config.projection_shape(p))).sum::<usize>();
    let base: usize = Projection::ALL
        .iter()
        .map(|&p| {
            let (out, input) = config.projection_shape(p);
            if method.name.quantized() { Nf4Matrix::bytes_for(out, input) } else { out * input * single }
        })
        .sum();
    let trained = sum(&|a| a.trained) + if everything { outside } else { 0 };
    let replay = Replay::new(config, &adapted, everything, shape);
    let (activations, held) = replay.run();
    let saved: usize = activations.values().sum();
    Ok(Memory {
        weights: outside * single + layers * base,
        adapters: sum(&|a| a.beside) * single,
        gradients: trained * single,
        optimizer: shape.state * trained * single,
        workspace: held.saturating_sub(saved),
        activations,
        trained,
    })
}

/// Numbers that a method trains.
///
/// # Errors
/// As [`predict`].
pub fn trained_numbers(config: &ModelConfig, method: &MethodParams) -> Result<usize> {
    method.check()?;
    if method.name == MethodName::Full && method.targets.is_none() {
        return Ok(config.parameters());
    }
    Ok(adapted(config, method)?.iter().flatten().map(|a| a.trained).sum())
}

/// The longest sequence for which the prediction stays within `limit` bytes; `None` if not even one token fits.
///
/// # Errors
/// As [`predict`].
pub fn longest(config: &ModelConfig, method: &MethodParams, shape: &StepShape, limit: usize) -> Result<Option<usize>> {
    let fits = |length: usize| -> Result<bool> {
        Ok(predict(config, method, &StepShape { length, ..shape.clone() })?.total() <= limit)
    };
    if !fits(1)? {
        return Ok(None);
    }
    let (mut low, mut high) = (1usize, 2usize);
    while high < 1 << 32 && fits(high)? {
        (low, high) = (high, 2 * high);
    }
    while low + 1 < high {
        let middle = low + (high - low) / 2;
        if fits(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(Some(low))
}

fn elements((out, input): (usize, usize)) -> usize {
    out * input
}

/// What the method puts on each projection of each layer.
fn adapted(config: &ModelConfig, method: &MethodParams) -> Result<Vec<[Adapted; 7]>> {
    (0..config.num_hidden_layers).map(|layer| adapted_layer(config, method, layer)).collect()
}

/// Units of a layer under S2FT: the same in every layer, or an even share of those of all layers.
fn units_in_layer(config: &ModelConfig, spec: &S2ftSpec, ratio: f64, units: usize, layer: usize) -> usize {
    let take = |candidates: usize| ((ratio * candidates as f64).round() as usize).clamp(1, candidates);
    match spec.scope {
        Scope::EachLayer => take(units),
        Scope::AllLayers => {
            let (layers, all) = (config.num_hidden_layers, take(config.num_hidden_layers * units));
            (layer + 1) * all / layers - layer * all / layers
        }
    }
}

fn adapted_layer(config: &ModelConfig, method: &MethodParams, layer: usize) -> Result<[Adapted; 7]> {
    let targets = method.projections()?;
    let r = method.rank;
    let s2ft = method.s2ft()?;
    let mut all = [Adapted::default(); 7];
    for p in Projection::ALL {
        let (out, input) = config.projection_shape(p);
        let packed = if method.name.quantized() { out * input } else { 0 };
        let mut a = Adapted { temporary: packed, ..Adapted::default() };
        if targets.contains(&p) {
            let low_rank =
                matches!(method.name, MethodName::Lora | MethodName::Qlora | MethodName::Dora | MethodName::Moslora);
            let most = if low_rank { out.min(input) } else { input };
            if !matches!(method.name, MethodName::Full | MethodName::S2ft) && (r == 0 || r > most) {
                return Err(Error::invalid("method.rank", r, format!("must be in 1..={most} for {}", p.module())));
            }
            let factors = r * (out + input);
            match method.name {
                MethodName::Full => (a.trained, a.whole_input) = (out * input, true),
                MethodName::Lora | MethodName::Qlora => {
                    (a.trained, a.beside, a.whole_input, a.saved_columns) = (factors, factors, true, r);
                }
                MethodName::Dora => {
                    (a.trained, a.beside, a.whole_input) = (factors + out, factors + out, true);
                    a.temporary = 2 * out * input;
                }
                MethodName::Moslora => {
                    let n = factors + r * r;
                    (a.trained, a.beside, a.whole_input, a.saved_columns) = (n, n, true, r);
                }
                MethodName::Paca | MethodName::Qpaca => {
                    // The original columns are kept; over a packed base the trained ones stand beside it too.
                    let copies = if method.name == MethodName::Qpaca { 2 } else { 1 };
                    (a.trained, a.beside, a.saved_columns) = (r * out, copies * r * out, r);
                }
                MethodName::S2ft => {
                    let ratio = s2ft.ratios[p as usize];
                    if ratio > 0.0 {
                        let (units, unit, rows) = units_of(config, p);
                        let n = units_in_layer(config, &s2ft, ratio, units, layer) * unit;
                        let size = if rows { n * input } else { n * out };
                        (a.trained, a.beside, a.whole_input) = (size, size, rows && n > 0);
                        a.saved_columns = if rows { 0 } else { n };
                    }
                }
            }
        }
        all[p as usize] = a;
    }
    Ok(all)
}

/// (units, rows or columns per unit, whether they are rows) of a projection under S2FT.
fn units_of(config: &ModelConfig, p: Projection) -> (usize, usize, bool) {
    let group = config.num_attention_heads / config.num_key_value_heads * config.head_dim;
    match p {
        Projection::Query => (config.num_key_value_heads, group, true),
        Projection::Key | Projection::Value => (config.num_key_value_heads, config.head_dim, true),
        Projection::Output => (config.num_key_value_heads, group, false),
        Projection::Gate | Projection::Up => (config.intermediate_size, 1, true),
        Projection::Down => (config.intermediate_size, 1, false),
    }
}
