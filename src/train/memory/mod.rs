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
//! s is the size of a number. Activations and workspace come from the step itself, run on sizes
//! ([`crate::ops::Sizes`]): a step reuses the buffers of the last, so they are held together. A
//! test compares the total with a counting allocator, within 1% for every method.

pub mod ledger;
pub mod pytorch;

use crate::adapters::dora::DoraOn;
use crate::adapters::lora::{LoraOn, LoraSpec};
use crate::adapters::moslora::MosloraOn;
use crate::adapters::paca::PacaOn;
use crate::adapters::s2ft::{S2ftSliceOn, Side};
use crate::adapters::spft::SpftOn;
use crate::adapters::{LinearOn, MethodOn};
use crate::error::{Error, Result};
use crate::model::options::Norm;
use crate::model::s2ft::{S2ftSpec, Scope};
use crate::model::{
    GradientsOn, InstrumentsOn, LayerOn, MethodSpec, ModelConfig, ModelOn, NormOn, Projection,
    Quantization, TrainableParts, attention_shape,
};
use crate::ops::{Buffer, SizedWeight, Sizes};
use crate::train::method::{MethodName, MethodParams};
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

/// Bytes by category.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Memory {
    /// Base weights at rest, quantized where the checkpoint has them so, NF4 where the method packs
    /// them.
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
        self.weights
            + self.adapters
            + self.gradients
            + self.optimizer
            + self.activation_bytes()
            + self.workspace
    }
}

/// Predicts the peak of a training step.
///
/// Where S2FT takes its share over all layers together, the units are taken to be spread evenly
/// over them; which layers really have how many depends on the selection.
///
/// # Errors
/// As [`MethodParams::check`]; [`Error::InvalidParam`] for a rank that does not fit a projection or
/// an empty shape.
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
    for (name, value) in [("batch", shape.batch), ("length", shape.length), ("bytes", shape.bytes)]
    {
        if value == 0 {
            return Err(Error::invalid(name, value, "must be at least 1"));
        }
    }
    let model = sized(config, method)?;
    let engine = Sizes::default();
    let mut gradients = GradientsOn::zeros(&model, engine.clone());
    let instruments = InstrumentsOn::default();
    let mut saved = Vec::new();
    let attention = attention_shape(config, (shape.batch, shape.length));
    let angles = config.options.rotaries.iter().map(|rotary| rotary.width(config.head_dim)).sum();
    // Buffers settle in two steps.
    for _ in 0..3 {
        let inputs = engine.inputs(attention, angles, shape.bytes);
        let pass = model.forward_on(inputs, shape.checkpointing, &instruments, &mut gradients)?;
        saved = pass.saved_by_name();
        model.backward_on(&model, pass, &instruments, &mut gradients)?;
    }
    let activations =
        over_layers(saved.into_iter().map(|(name, numbers)| (name, numbers * shape.bytes)));
    let projections = || {
        model.layers.iter().flat_map(|layer| layer.projections().map(|(_, projection)| projection))
    };
    let base = |projection: &LinearOn<Sizes>| {
        let (out, input) = projection.shape();
        let packed = config.options.quantization.unwrap_or(Quantization::Nf4 { double: true });
        if projection.base.packed {
            packed.bytes_for(out, input)
        } else {
            out * input * shape.bytes
        }
    };
    let elements: usize = projections().map(|p| p.shape().0 * p.shape().1).sum();
    let outside = config.parameters() - elements;
    let trained = model.trainable_elements();
    Ok(Memory {
        weights: outside * shape.bytes + projections().map(base).sum::<usize>(),
        adapters: projections().map(LinearOn::held).sum::<usize>() * shape.bytes,
        gradients: trained * shape.bytes,
        optimizer: shape.state * trained * shape.bytes,
        workspace: (engine.peak() * shape.bytes).saturating_sub(activations.values().sum()),
        activations,
        trained,
    })
}

/// Numbers that a method trains.
///
/// # Errors
/// As [`predict`].
pub fn trained_numbers(config: &ModelConfig, method: &MethodParams) -> Result<usize> {
    Ok(sized(config, method)?.trainable_elements())
}

/// `model.layers.3.mlp.gate` of every layer under one name.
pub(crate) fn over_layers(
    named: impl IntoIterator<Item = (String, usize)>,
) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    for (name, size) in named {
        // The first number is the layer's.
        let mut parts =
            name.split('.').skip_while(|part| part.parse::<usize>().is_err()).skip(1).peekable();
        let rest = parts.peek().is_some().then(|| parts.collect::<Vec<_>>().join("."));
        *all.entry(rest.unwrap_or(name)).or_default() += size;
    }
    all
}

/// The longest sequence for which the prediction stays within `limit` bytes; `None` if not even one
/// token fits.
///
/// # Errors
/// As [`predict`].
pub fn longest(
    config: &ModelConfig,
    method: &MethodParams,
    shape: &StepShape,
    limit: usize,
) -> Result<Option<usize>> {
    longest_that(|length| {
        Ok(predict(config, method, &StepShape { length, ..shape.clone() })?.total() <= limit)
    })
}

/// The largest length that fits, by bisection.
fn longest_that(fits: impl Fn(usize) -> Result<bool>) -> Result<Option<usize>> {
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

/// Units of a layer under S2FT: the same in every layer, or an even share of those of all layers.
fn units_in_layer(
    config: &ModelConfig,
    spec: &S2ftSpec,
    ratio: f64,
    units: usize,
    layer: usize,
) -> usize {
    let take =
        |candidates: usize| ((ratio * candidates as f64).round() as usize).clamp(1, candidates);
    match spec.scope {
        Scope::EachLayer => take(units),
        Scope::AllLayers => {
            let (layers, all) = (config.num_hidden_layers, take(config.num_hidden_layers * units));
            (layer + 1) * all / layers - layer * all / layers
        }
    }
}

/// The model of sizes that a method makes of a configuration.
fn sized(config: &ModelConfig, method: &MethodParams) -> Result<ModelOn<Sizes>> {
    config.check()?;
    method.check()?;
    if let (Some(quantization), false) =
        (config.options.quantization, method.name.trains_beside_the_base())
    {
        let requirement =
            format!("writes into the base weights, which are quantized ({})", quantization.name());
        return Err(Error::invalid("method", method.name.name(), requirement));
    }
    let gain = |width: usize| Buffer::at_rest((1, width));
    let table = || Buffer::at_rest((config.vocab_size, config.hidden_size));
    let norm = |width: usize| NormOn {
        gain: gain(width),
        bias: config.options.layer_norm.then(|| gain(width)),
        whole: false,
    };
    let layers = (0..config.num_hidden_layers).map(|layer| {
        let projections = config.projections(layer).into_iter();
        let sized = projections.map(|p| Ok((p, sized_projection(config, method, layer, p)?)));
        let sinks = config.options.sinks.then(|| gain(config.num_attention_heads));
        let norms = Norm::ALL.map(|of| config.norm_width(of).map(norm));
        Ok(LayerOn::new(sized.collect::<Result<Vec<_>>>()?, norms, sinks))
    });
    let positions =
        |offset| Buffer::at_rest((config.max_position_embeddings + offset, config.hidden_size));
    let mut model = ModelOn {
        config: config.clone(),
        embedding: table(),
        positions: config.options.positions.map(positions),
        layers: layers.collect::<Result<_>>()?,
        final_norm: norm(config.hidden_size),
        lm_head: (!config.tie_word_embeddings).then(table),
        trainable: TrainableParts::default(),
        adapters: Default::default(),
        tables: Default::default(),
    };
    if method.name == MethodName::Full && method.targets.is_none() {
        model.train_fully();
    }
    Ok(model)
}

fn sized_projection(
    config: &ModelConfig,
    method: &MethodParams,
    layer: usize,
    p: Projection,
) -> Result<LinearOn<Sizes>> {
    let shape = config.projection_shape(p);
    let base = SizedWeight {
        dense: Buffer::at_rest(shape),
        packed: method.name.quantized() || config.options.quantization.is_some(),
    };
    // The rank is that of the method, and the projection it does not fit is named.
    let named = |error: Error| match error {
        Error::InvalidParam { name, value, requirement } if name == "rank" => {
            Error::invalid("method.rank", value, format!("{requirement}, of {}", p.module()))
        }
        error => error,
    };
    let factors = |spec: LoraSpec| -> Result<(Buffer, Buffer, f64)> {
        let scaling = spec.scaling().map_err(named)?;
        Ok((Buffer::at_rest((spec.rank, shape.1)), Buffer::at_rest((shape.0, spec.rank)), scaling))
    };
    let wanted = method.projections(config)?.contains(&p);
    let adapted = match method.spec()?.filter(|_| wanted) {
        Some(MethodSpec::Frozen) => MethodOn::Frozen,
        Some(MethodSpec::Full) => MethodOn::Full,
        Some(MethodSpec::Lora(spec)) => {
            let (a, b, scaling) = factors(spec)?;
            MethodOn::Lora(LoraOn { a, b, bias: None, spec, scaling })
        }
        Some(MethodSpec::Dora { spec, true_derivative }) => {
            let (a, b, scaling) = factors(spec)?;
            let magnitude = Buffer::at_rest((1, shape.0));
            MethodOn::Dora(DoraOn { a, b, magnitude, spec, scaling, true_derivative })
        }
        Some(MethodSpec::Moslora { spec, .. }) => {
            let (a, b, scaling) = factors(spec)?;
            let mixer = Buffer::at_rest((spec.rank, spec.rank));
            MethodOn::Moslora(MosloraOn { a, b, mixer, spec, scaling })
        }
        Some(MethodSpec::Paca(spec)) => {
            let scaling = spec.scaling(shape).map_err(named)?;
            MethodOn::Paca(PacaOn { index: spec.rank, scaling, inactive: None, active: true })
        }
        Some(MethodSpec::Spft(spec)) => {
            MethodOn::Spft(SpftOn { index: spec.entries(shape)?, inactive: None, active: true })
        }
        None if method.name == MethodName::S2ft => {
            let spec = method.s2ft()?;
            let ratio = spec.ratio(p);
            let (units, unit, rows) = units_of(config, p);
            let taken = if ratio > 0.0 {
                units_in_layer(config, &spec, ratio, units, layer) * unit
            } else {
                0
            };
            let side = if rows { Side::Output } else { Side::Input };
            match taken {
                0 => MethodOn::Frozen,
                n => {
                    MethodOn::S2ft(S2ftSliceOn { side, range: 0..n, original: None, active: true })
                }
            }
        }
        None => MethodOn::Frozen,
    };
    let mut projection = LinearOn::new(base, adapted);
    projection.bias = config.options.has_bias(p).then(|| Buffer::at_rest((1, shape.0)));
    Ok(projection)
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
        _ => (1, 0, true),
    }
}
