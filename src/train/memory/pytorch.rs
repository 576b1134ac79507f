//! Memory of the same step in PyTorch: a Transformers model with PEFT's adapters, or the papers'
//! own PaCA and S2FT.
//!
//! ```text
//! peak = weights + adapters + gradients + optimizer + saved + max(loss, layer) + allocator + context
//! saved   what autograd keeps between forward and backward: the table below, by tensor
//! loss    8 N V beside the log-softmax in `saved`: its gradient and that of the logits, f32     0 with a fused loss
//! layer   backward of one layer: gradients of its activations; DoRA's dense update in forward; with
//!         checkpointing also what the layer saves
//! ```
//!
//! With N = B T tokens, s the bytes of weights and activations, a those of adapters:
//!
//! | saved | bytes | when |
//! |---|---|---|
//! | norm of width w | 4 N w in f32, 4 for each row; its scaled input when the gain is trained | its input needs a gradient |
//! | adapter's input | s N in once for all that read it; a N in for each where a differs | an adapter reads it |
//! | LoRA | a N r | |
//! | DoRA | a N r; s N out, a N out, 3 a out | |
//! | attention, sdpa or flash | s N (2 H d + 2 K d), 4 N H | query, key or value needs a gradient |
//! | attention, eager | 3 s N H d (keys and values repeated for every head), (4 + s) N T H | likewise; (4) N T H in f32 |
//! | MLP | gate, its activation, up: 3 s N F | gate or up needs a gradient |
//! | last | log-softmax 4 N V, its labels 8 N | not with a fused loss |
//!
//! The saved bytes are counted in PyTorch by hooks (`python/count_saved_tensors.py`), and a test
//! compares. What is beyond them, workspaces of kernels, fragments of the allocator and the
//! context, is modelled by rule.

use super::sized;
use crate::adapters::MethodOn;
use crate::adapters::s2ft::Side;
use crate::error::{Error, Result};
use crate::model::options::{Family, MlpKind, Norm, QueryKeyNorm};
use crate::model::{LayerOn, ModelConfig, Projection, Quantization};
use crate::ops::Sizes;
use crate::train::method::{MethodName, MethodParams};
use std::collections::BTreeMap;

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernel {
    /// Scores and probabilities as matrices.
    Eager,
    /// PyTorch's `scaled_dot_product_attention`.
    #[default]
    Sdpa,
    /// FlashAttention 2, which keeps the same.
    Flash,
}

/// Optimizers of the trainer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainerOptimizer {
    /// `torch.optim.AdamW`: two moments in the format of the parameter.
    #[default]
    AdamW,
    /// bitsandbytes' `AdamW8bit`: two bytes a number, tensors of fewer than 4,096 numbers in f32.
    AdamW8bit,
    /// `torch.optim.SGD` without momentum.
    Sgd,
}

/// A step in PyTorch.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerShape {
    /// Rows per forward pass.
    pub batch: usize,
    /// Tokens per row.
    pub length: usize,
    /// Bytes of weights and activations: 2 or 4.
    pub bytes: usize,
    /// Bytes of the adapters' numbers; 4 is PEFT's default whatever the base.
    pub adapter_bytes: usize,
    /// Attention.
    pub kernel: Kernel,
    /// Layers run again in backward.
    pub checkpointing: bool,
    /// Whether the loss is computed in pieces from the hidden states (Liger's and others'): no
    /// logits exist whole.
    pub fused_loss: bool,
    /// The optimizer.
    pub optimizer: TrainerOptimizer,
    /// What of a quantized model is not quantized is in f32 (`prepare_model_for_kbit_training`),
    /// and so are the activations.
    pub prepared: bool,
    /// Cards over which weights, gradients and optimizer state are divided (FSDP, ZeRO stage 3).
    pub cards: usize,
}

/// Bytes by category.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainerMemory {
    /// Base weights.
    pub weights: usize,
    /// The adapters' tensors; nothing where parts of the weights themselves are trained.
    pub adapters: usize,
    /// Gradients of what is trained.
    pub gradients: usize,
    /// Optimizer state.
    pub optimizer: usize,
    /// What autograd keeps, by tensor over all layers.
    pub saved: BTreeMap<String, usize>,
    /// The larger of what the loss and one layer hold besides.
    pub moment: usize,
    /// Rounding of blocks.
    pub allocator: usize,
    /// Context and workspaces of the libraries.
    pub context: usize,
    /// Trained numbers.
    pub trained: usize,
}

/// Context and loaded kernels of one process, and cuBLAS' workspace: 0.5 GiB, of which a current
/// card's driver takes 0.4 to 0.6.
pub const CONTEXT: usize = 1 << 29;

impl TrainerMemory {
    /// What autograd keeps.
    pub fn saved_bytes(&self) -> usize {
        self.saved.values().sum()
    }

    /// Bytes at the peak.
    pub fn total(&self) -> usize {
        self.weights
            + self.adapters
            + self.gradients
            + self.optimizer
            + self.saved_bytes()
            + self.moment
            + self.allocator
            + self.context
    }
}

/// Saved tensors of a part of the model, by name.
pub type Saved = BTreeMap<String, usize>;

/// What autograd keeps of each layer and outside them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SavedParts {
    /// Of each layer.
    pub layers: Vec<Saved>,
    /// Of each layer while it runs, where `layers` has its input only.
    pub inside: Vec<Saved>,
    /// Last norm, head and loss.
    pub outside: Saved,
}

/// A layer on its way forward.
struct LayerCount<'a> {
    config: &'a ModelConfig,
    shape: &'a TrainerShape,
    layer: &'a LayerOn<Sizes>,
    full: bool,
    saved: Saved,
}

impl LayerCount<'_> {
    fn tokens(&self) -> usize {
        self.shape.batch * self.shape.length
    }

    fn add(&mut self, name: &str, bytes: usize) {
        *self.saved.entry(name.into()).or_default() += bytes;
    }

    fn adapted(&self, p: Projection) -> bool {
        let mut all = self.layer.projections();
        all.any(|(q, projection)| q == p && projection.is_trainable())
    }

    /// A norm of rows of `width` numbers, `rows` of them for each token.
    fn norm(&mut self, name: &str, width: usize, rows: usize) {
        let tokens = self.tokens();
        self.add(name, norm_bytes(self.config, self.shape, self.full, tokens * rows, width));
    }

    /// What projections of one input save; whether their outputs need gradients. `shared`: the
    /// input is kept already.
    fn projections(
        &mut self,
        all: &[Projection],
        input: &str,
        input_needed: bool,
        shared: bool,
    ) -> Vec<bool> {
        let (s, n) = (self.shape.bytes, self.tokens());
        let (mut kept, mut needed) = (shared, Vec::new());
        for &p in all {
            let found = self.layer.projections().find(|(q, _)| *q == p);
            let Some((_, projection)) = found else { continue };
            let (out, width) = projection.shape();
            let a = adapter_bytes(self.shape, &projection.method);
            // int8 keeps its input for itself, where no hook sees it.
            if self.config.options.quantization == Some(Quantization::Int8) && input_needed && !kept
            {
                self.add("int8.input", s * n * width);
                kept = true;
            }
            let whole = |this: &mut Self, kept: &mut bool| {
                if a != s {
                    this.add(input, a * n * width);
                } else if !*kept {
                    this.add(input, s * n * width);
                    *kept = true;
                }
            };
            match &projection.method {
                MethodOn::Frozen => {}
                MethodOn::Full | MethodOn::Spft(_) => whole(self, &mut kept),
                MethodOn::Lora(lora) => {
                    whole(self, &mut kept);
                    self.add("adapters.xA", a * n * lora.spec.rank);
                }
                MethodOn::Dora(dora) => {
                    whole(self, &mut kept);
                    self.add("adapters.xA", a * n * dora.spec.rank);
                    self.add("adapters.base_result", s * n * out);
                    self.add("adapters.lora_result", a * n * out);
                    // The factor of a base result that needs no gradient is not kept.
                    self.add("adapters.magnitude", if input_needed { 3 } else { 2 } * a * out);
                }
                MethodOn::Moslora(mosaic) => {
                    whole(self, &mut kept);
                    self.add("adapters.xA", 2 * a * n * mosaic.spec.rank);
                }
                MethodOn::Paca(paca) => self.add("adapters.columns", s * n * paca.index),
                MethodOn::S2ft(slice) => match slice.side {
                    Side::Input => self.add("adapters.columns", s * n * slice.range.len()),
                    Side::Output => whole(self, &mut kept),
                },
            }
            needed.push(input_needed || self.adapted(p));
        }
        needed
    }

    /// Attention from its needed inputs; whether its output needs a gradient.
    fn attention(&mut self, [query, key, value]: [bool; 3]) -> bool {
        let (s, n, config) = (self.shape.bytes, self.tokens(), self.config);
        let (heads, groups, width) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        if self.shape.kernel == Kernel::Eager {
            let scores = n * self.shape.length * heads;
            let each = s * n * heads * width;
            let probabilities = query || key;
            // The gradient of each factor of a product needs the other one.
            self.add("attention.query", if key { each } else { 0 });
            self.add("attention.key", if query { each } else { 0 });
            if probabilities {
                self.add("attention.softmax", 4 * scores);
                self.add(
                    "attention.cap",
                    if config.options.attention_cap.is_some() { s * scores } else { 0 },
                );
                self.add("attention.value", each);
            }
            self.add("attention.probabilities", if value && s != 4 { s * scores } else { 0 });
        } else if query || key || value {
            self.add("attention.query", s * n * heads * width);
            self.add("attention.key", s * n * groups * width);
            self.add("attention.value", s * n * groups * width);
            self.add("attention.output", s * n * heads * width);
            self.add("attention.log_sum_exp", 4 * n * heads);
        }
        query || key || value
    }

    /// Whether forward goes through the layer with a gradient at its output, given that at its
    /// input.
    fn run(&mut self, input_needed: bool) -> bool {
        use Projection::*;
        let (config, options) = (self.config, &self.config.options);
        let (s, n, hidden) = (self.shape.bytes, self.tokens(), config.hidden_size);
        let before = options.norm_name(Norm::BeforeAttention).is_some();
        if before && (input_needed || self.full) {
            self.norm("norms", hidden, 1);
        }
        let read = self.projections(
            &[Query, Key, Value, QueryKeyValue],
            "attention.input",
            input_needed || self.full,
            false,
        );
        let needed = match read[..] {
            [query, key, value] => [query, key, value],
            _ => [read.first().copied().unwrap_or(input_needed); 3],
        };
        if let Some(width) = config.norm_width(Norm::Query) {
            let rows = |heads| if options.query_key_norm == QueryKeyNorm::Head { heads } else { 1 };
            if needed[0] {
                self.norm("query_key_norms", width, rows(config.num_attention_heads));
            }
            if needed[1] {
                let width = config.norm_width(Norm::Key).unwrap_or(width);
                self.norm("query_key_norms", width, rows(config.num_key_value_heads));
            }
        }
        let attended = self.attention(needed);
        // sdpa returns its output as the projection reads it, unless heads came before tokens
        // (Phi-3's rotation joins two parts).
        let shared =
            attended && self.shape.kernel != Kernel::Eager && options.family != Family::Phi3;
        let out = self.projections(&[Output], "attention.output_input", attended, shared)[0];
        if options.norm_name(Norm::AfterAttention).is_some() && (out || self.full) {
            self.norm("norms", hidden, 1);
        }
        let middle = input_needed || out;
        if options.norm_name(Norm::BeforeMlp).is_some() && (middle || self.full) {
            self.norm("norms", hidden, 1);
        }
        let inner = s * n * config.intermediate_size;
        let read = self.projections(&[Gate, Up, GateUp], "mlp.input", middle || self.full, false);
        let [gate, up] = match read[..] {
            [gate, up] => [gate, up],
            _ => [read.first().copied().unwrap_or(middle); 2],
        };

        self.add("mlp.gate", if gate { inner } else { 0 });
        self.add("mlp.activated", if up { inner } else { 0 });
        self.add("mlp.up", if gate { inner } else { 0 });
        let down = self.projections(&[Down], "mlp.gated", gate || up, false)[0];
        if options.norm_name(Norm::AfterMlp).is_some() && (down || self.full) {
            self.norm("norms", hidden, 1);
        }
        middle || down
    }
}

fn activation_bytes(shape: &TrainerShape) -> usize {
    if shape.prepared { 4 } else { shape.bytes }
}

/// Bytes of the numbers of a method: adapters have a format of their own, parts of the weights do
/// not.
fn adapter_bytes(shape: &TrainerShape, method: &MethodOn<Sizes>) -> usize {
    match method {
        MethodOn::Lora(_) | MethodOn::Dora(_) | MethodOn::Moslora(_) => shape.adapter_bytes,
        _ => shape.bytes,
    }
}

/// What an RMSNorm over rows of `width` numbers keeps.
fn norm_bytes(
    config: &ModelConfig,
    shape: &TrainerShape,
    full: bool,
    rows: usize,
    width: usize,
) -> usize {
    // 1 + w in f32, and for a trained gain the normalised input: in f32 where the gain multiplies
    // before the cast.
    let unit = if config.options.unit_gain { 4 * width } else { 0 };
    let late_cast = config.options.unit_gain || config.options.family == Family::Olmo2;
    let scaled = if late_cast { 4 } else { shape.bytes };
    4 * rows * width + 4 * rows + unit + if full { scaled * rows * width } else { 0 }
}

/// What autograd keeps after the forward pass.
///
/// # Errors
/// As [`super::predict`]; [`Error::InvalidParam`] for a family whose saved tensors were not
/// counted.
pub fn saved_tensors(
    config: &ModelConfig,
    method: &MethodParams,
    shape: &TrainerShape,
) -> Result<SavedParts> {
    let options = &config.options;
    if options.layer_norm
        || options.experts.is_some()
        || options.sinks
        || options.mlp == MlpKind::Plain
        || options.parallel
    {
        let requirement = "is not modelled for --trainer pytorch: dense decoders with RMSNorm and \
                           a gated MLP are";
        return Err(Error::invalid("model_type", options.family.model_type(), requirement));
    }
    let model = sized(config, method)?;
    // Norms and embedding in f32 make every activation f32.
    let shape = &TrainerShape { bytes: activation_bytes(shape), ..shape.clone() };
    let full = method.name == MethodName::Full && method.targets.is_none();
    let (s, n, hidden) = (shape.bytes, shape.batch * shape.length, config.hidden_size);
    let mut parts = SavedParts::default();
    // Checkpointing makes the embedding's output require a gradient.
    let mut needed = full || shape.checkpointing;
    let mut angles = vec![false; options.rotaries.len()];
    for (index, layer) in model.layers.iter().enumerate() {
        let mut count = LayerCount { config, shape, layer, full, saved: Saved::new() };
        needed = count.run(needed);
        // Cosines and sines are shared by the layers of one kind; the first keeps them.
        let rotated = needed && count.saved.contains_key("attention.query");
        if let Some(kind) =
            options.rotary_of.get(index).copied().unwrap_or(Some(0)).filter(|_| rotated)
            && let Some(seen) = angles.get_mut(kind)
            && !std::mem::replace(seen, true)
        {
            let one = if options.family == Family::Olmo2 { 4 } else { s };
            count.add(
                "rotary",
                2 * one * shape.length * options.rotaries[kind].width(config.head_dim),
            );
        }
        let saved = count.saved;
        if shape.checkpointing {
            parts.layers.push(Saved::from([("layer.input".to_string(), s * n * hidden)]));
            parts.inside.push(saved);
        } else {
            parts.layers.push(saved);
        }
    }
    let mut outside = Saved::new();
    if needed {
        outside.insert("last_norm".into(), norm_bytes(config, shape, full, n, hidden));
    }
    if full {
        outside.insert("head.input".into(), s * n * hidden);
        outside.insert("ids".into(), 8 * n);
    }
    if !shape.fused_loss {
        outside.insert("log_softmax".into(), 4 * n * config.vocab_size);
        // One row's shifted labels stay a part of the padded ones.
        outside.insert("labels".into(), 8 * (n + usize::from(shape.batch == 1)) + 4);
        if options.logit_cap.is_some() {
            outside.insert("logits.cap".into(), s * n * config.vocab_size);
        }
    }
    parts.outside = outside;
    Ok(parts)
}

/// Predicts the peak of a training step in PyTorch.
///
/// # Errors
/// As [`saved_tensors`]; [`Error::InvalidParam`] for an empty shape.
///
/// ```
/// use peft_limits::train::memory::pytorch::{TrainerShape, predict};
/// use peft_limits::train::method::{MethodName, MethodParams};
/// use peft_limits::train::preset::preset;
/// let shape = TrainerShape { batch: 2, length: 256, ..TrainerShape::default() };
/// let of = |name| predict(&preset("micro")?, &MethodParams::named(name), &shape).map(|m| m.saved_bytes());
/// assert!(of(MethodName::Lora)? < of(MethodName::Dora)?);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn predict(
    config: &ModelConfig,
    method: &MethodParams,
    shape: &TrainerShape,
) -> Result<TrainerMemory> {
    for (name, value) in [
        ("batch", shape.batch),
        ("length", shape.length),
        ("bytes", shape.bytes),
        ("cards", shape.cards),
    ] {
        if value == 0 {
            return Err(Error::invalid(name, value, "must be at least 1"));
        }
    }
    let parts = saved_tensors(config, method, shape)?;
    let model = sized(config, method)?;
    let (s, n) = (shape.bytes, shape.batch * shape.length);
    let projections = || {
        model.layers.iter().flat_map(|layer| layer.projections().map(|(_, projection)| projection))
    };
    let packed = config.options.quantization.unwrap_or(Quantization::Nf4 { double: true });
    let (mut weights, mut allocator, mut elements) = (0, 0, 0);
    let mut hold = |bytes: usize, rounded: &mut usize| {
        weights += bytes;
        *rounded += allocated(bytes) - bytes;
    };
    for projection in projections() {
        let (out, input) = projection.shape();
        elements += out * input;
        let bytes =
            if projection.base.packed { packed.bytes_for(out, input) } else { out * input * s };
        hold(bytes, &mut allocator);
    }
    let rest = if shape.prepared { 4 } else { s };
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    let table = config.vocab_size * config.hidden_size;
    (0..tables).for_each(|_| hold(table * rest, &mut allocator));
    hold(config.parameters().saturating_sub(elements + tables * table) * rest, &mut allocator);

    let trained = model.trainable_elements();
    let beside: usize = projections()
        .filter(|p| {
            matches!(p.method, MethodOn::Lora(_) | MethodOn::Dora(_) | MethodOn::Moslora(_))
        })
        .map(|p| p.held())
        .sum();
    let a = if beside > 0 { shape.adapter_bytes } else { s };
    let optimizer = match shape.optimizer {
        TrainerOptimizer::AdamW => 2 * trained * a,
        TrainerOptimizer::Sgd => 0,
        TrainerOptimizer::AdamW8bit => projections()
            .flat_map(|p| p.trainable_shapes())
            .map(|(rows, columns)| rows * columns)
            .map(|n| if n < 4096 { 8 * n } else { 2 * n + 8 * n.div_ceil(256) })
            .sum(),
    };
    let over_cards = |bytes: usize| bytes.div_ceil(shape.cards);
    let mut saved = Saved::new();
    for (name, bytes) in parts.layers.iter().chain([&parts.outside]).flatten() {
        *saved.entry(name.clone()).or_default() += bytes;
    }
    // Gradients of one layer's activations: three of the MLP's width and two of the model's at
    // once.
    let backward =
        activation_bytes(shape) * n * (3 * config.intermediate_size + 2 * config.hidden_size);
    let again = parts.inside.iter().map(|layer| layer.values().sum::<usize>()).max().unwrap_or(0);
    // PEFT's DoRA multiplies its factors with an identity, adds the product to the weight and takes
    // the norms: four such matrices.
    let dora = projections().filter(|p| matches!(p.method, MethodOn::Dora(_))).map(|p| {
        let (out, input) = p.shape();
        a * (input * input + 3 * out * input)
    });
    let decoded = projections()
        .filter(|p| p.base.packed)
        .map(|p| p.shape().0 * p.shape().1 * s)
        .max()
        .unwrap_or(0);
    // A layer divided over cards is gathered whole, and the next one while it runs.
    let gathered = if shape.cards > 1 { 2 * elements * s / config.num_hidden_layers } else { 0 };
    let layer = (backward + again).max(dora.max().unwrap_or(0)) + decoded + gathered;
    let loss = if shape.fused_loss { 0 } else { 8 * n * config.vocab_size };
    Ok(TrainerMemory {
        weights: over_cards(weights),
        adapters: over_cards(beside * a),
        gradients: over_cards(trained * a),
        optimizer: over_cards(optimizer),
        moment: loss.max(layer),
        saved,
        allocator: over_cards(allocator),
        context: CONTEXT,
        trained,
    })
}

/// The longest sequence that stays within `limit` bytes; `None` if not even one token fits.
///
/// # Errors
/// As [`predict`].
pub fn longest(
    config: &ModelConfig,
    method: &MethodParams,
    shape: &TrainerShape,
    limit: usize,
) -> Result<Option<usize>> {
    super::longest_that(|length| {
        Ok(predict(config, method, &TrainerShape { length, ..shape.clone() })?.total() <= limit)
    })
}

/// Bytes that PyTorch's allocator takes for a tensor: multiples of 512, and of 2 MiB from 10 MiB
/// on.
fn allocated(bytes: usize) -> usize {
    let unit = if bytes >= 10 << 20 { 2 << 20 } else { 512 };
    bytes.next_multiple_of(unit)
}

impl Default for TrainerShape {
    fn default() -> Self {
        Self {
            batch: 1,
            length: 512,
            bytes: 2,
            adapter_bytes: 4,
            kernel: Kernel::Sdpa,
            checkpointing: false,
            fused_loss: false,
            optimizer: TrainerOptimizer::AdamW,
            prepared: false,
            cards: 1,
        }
    }
}
