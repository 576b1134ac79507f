//! What a family of decoders computes, as a row of options that its `config.json` resolves to.
//!
//! | family (`model_type`) | differs from LLaMA in |
//! |---|---|
//! | `llama` | nothing, or rotary scaling and biases |
//! | `mistral` | a window |
//! | `qwen2` | biases of query, key and value; a window in the upper layers |
//! | `qwen3` | a norm of each query and key head; a window in the upper layers |
//! | `gemma` | gains of 1 + w, a tanh gelu, an embedding times sqrt(D) |
//! | `gemma2` | also norms after attention and MLP, windows in every other layer, caps of scores and logits |
//! | `gemma3_text` | as `gemma2` with norms of query and key heads and another rotary base in windowed layers, no caps |
//! | `phi3` | query, key and value stored as one, gate and up too; a share of each head rotated |
//! | `olmo2` | norms after attention and MLP only, norms of whole queries and keys |
//! | `granite` | four multipliers |
//! | `smollm3` | no rotary embedding in some layers |
//! | `mixtral` | experts |
//! | `qwen3_moe` | as `qwen3` with experts, dense layers between |
//! | `gpt_oss` | experts with biases and a clamped swish, attention sinks, windows in every other layer |
//! | `gpt2` | layer norms, learned positions, an MLP without gate, weights stored transposed |
//! | `opt` | layer norms, learned positions, an MLP without gate |
//! | `gpt_neox` | layer norms, attention and MLP in parallel, a share of each head rotated |

pub use super::families::Family;
use super::projection::Projection;
use super::quantized::Quantization;
use crate::blocks::rope::Rotary;
use crate::blocks::swiglu::Activation;
use crate::linalg::Real;
use ndarray::Array2;
use serde_json::{Map, Value};

/// A norm of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Norm {
    /// Before attention, of the layer's input.
    BeforeAttention,
    /// Of the queries.
    Query,
    /// Of the keys.
    Key,
    /// Of attention's output, before it joins the residual path.
    AfterAttention,
    /// Before the MLP.
    BeforeMlp,
    /// Of the MLP's output, before it joins the residual path.
    AfterMlp,
}

impl Norm {
    /// In the order in which a layer stores them.
    pub const ALL: [Self; 6] = [
        Self::BeforeAttention,
        Self::Query,
        Self::Key,
        Self::AfterAttention,
        Self::BeforeMlp,
        Self::AfterMlp,
    ];
}

/// Where a layer normalises its residual branches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// The input of attention and MLP.
    #[default]
    Before,
    /// Input and output.
    BeforeAndAfter,
    /// The output.
    After,
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueryKeyNorm {
    /// None.
    #[default]
    None,
    /// Of each head.
    Head,
    /// Of all heads together.
    Width,
}

/// How query, key and value are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QkvStorage {
    /// As three weights.
    #[default]
    Separate,
    /// As one: all queries, all keys, all values.
    Blocks,
    /// As one: query, key and value of each head in turn.
    PerHead,
}

/// What an MLP consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MlpKind {
    /// act(gate) o up, two weights.
    #[default]
    Gated,
    /// The same with both stored as one.
    GatedInOne,
    /// act(up).
    Plain,
}

/// The experts of a mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many of them see a token.
    pub per_token: usize,
    /// Width of each.
    pub inner: usize,
    /// Whether the weights of a token's experts add up to one.
    pub renormalise: bool,
    /// Whether rows of gate and up alternate in the weight of both.
    pub interleaved: bool,
    /// Whether memory holds an expert's weight as input x output.
    pub input_first: bool,
    /// Layers that have an ordinary MLP instead.
    pub dense_layers: Vec<usize>,
}

/// What the layers of a model compute, beyond sizes; the default is LLaMA.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The family, whose names checkpoints use.
    pub family: Family,
    /// Where residual branches are normalised.
    pub placement: Placement,
    /// Norms of queries and keys.
    pub query_key_norm: QueryKeyNorm,
    /// Whether a gain is 1 + w.
    pub unit_gain: bool,
    /// Whether norms are layer norms with a bias, not root-mean-square norms.
    pub layer_norm: bool,
    /// Projections with a bias; that of the first expert stands for all.
    pub biases: Vec<Projection>,
    /// How query, key and value are stored.
    pub query_key_value: QkvStorage,
    /// What an MLP consists of.
    pub mlp: MlpKind,
    /// Experts in place of MLPs.
    pub experts: Option<Experts>,
    /// Whether checkpoints store the weights of projections as in x out.
    pub transposed: bool,
    /// Whether attention and MLP both read the layer's input.
    pub parallel: bool,
    /// Whether the softmax of each head has one more entry, a trained number.
    pub sinks: bool,
    /// Learned positions: the row of the table that stands for position 0.
    pub positions: Option<usize>,
    /// The gate's activation.
    pub activation: Activation,
    /// Factor of Q K^T; 1 / sqrt(head_dim) when absent.
    pub attention_scale: Option<f64>,
    /// c of c tanh(s / c) on the scores.
    pub attention_cap: Option<f64>,
    /// The same on the logits.
    pub logit_cap: Option<f64>,
    /// Keys that a query sees, its own among them, by layer; every earlier one when absent.
    pub windows: Vec<Option<usize>>,
    /// Kinds of rotary embedding beyond the first, which has the config's base.
    pub rotaries: Vec<Rotary>,
    /// Which of them a layer has, or none; the first everywhere when empty.
    pub rotary_of: Vec<Option<usize>>,
    /// Factor of the embedded tokens.
    pub embedding_multiplier: f64,
    /// Factor of a residual branch.
    pub residual_multiplier: f64,
    /// Factor of the logits.
    pub logit_multiplier: f64,
    /// Format of the checkpoint's weights, where they are quantized.
    pub quantization: Option<Quantization>,
    /// The file's own keys, for writing it again.
    pub(super) source: Source,
}

/// The keys of a file. What they say of the computation is in the options; the rest makes no
/// difference.
#[derive(Debug, Clone, Default)]
pub(super) struct Source(pub(super) Option<Map<String, Value>>);

impl PartialEq for Source {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            family: Family::Llama,
            placement: Placement::Before,
            query_key_norm: QueryKeyNorm::None,
            unit_gain: false,
            layer_norm: false,
            biases: Vec::new(),
            query_key_value: QkvStorage::Separate,
            mlp: MlpKind::Gated,
            experts: None,
            transposed: false,
            parallel: false,
            sinks: false,
            positions: None,
            activation: Activation::Silu,
            attention_scale: None,
            attention_cap: None,
            logit_cap: None,
            windows: Vec::new(),
            rotaries: vec![Rotary::default()],
            rotary_of: Vec::new(),
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logit_multiplier: 1.0,
            quantization: None,
            source: Source::default(),
        }
    }
}

fn is_one(x: f64) -> bool {
    x.to_bits() == 1f64.to_bits()
}

impl Options {
    /// Whether a residual branch is added as it is, so that its last product can be added in place.
    pub fn plain_branch(&self, after: Norm) -> bool {
        self.norm_name(after).is_none() && is_one(self.residual_multiplier)
    }

    /// z becomes c tanh(z / c) where the family caps its logits.
    pub fn cap_logits<T: Real>(&self, logits: &mut Array2<T>) {
        if let Some(cap) = self.logit_cap.map(T::of) {
            logits.mapv_inplace(|z| cap * (z / cap).tanh());
        }
    }

    /// The kind of rotary embedding of a layer.
    pub fn rotary(&self, layer: usize) -> Option<usize> {
        self.rotary_of.get(layer).copied().unwrap_or(Some(0))
    }

    /// Keys that a query of a layer sees.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    /// Whether the layers compute what LLaMA's do.
    pub fn is_plain(&self) -> bool {
        let plain = Self { family: self.family, ..Self::default() };
        *self == plain
    }

    /// Whether a projection has a bias.
    pub fn has_bias(&self, p: Projection) -> bool {
        let kind = match p {
            Projection::ExpertGateUp(_) => Projection::ExpertGateUp(0),
            Projection::ExpertDown(_) => Projection::ExpertDown(0),
            p => p,
        };
        self.biases.contains(&kind)
    }

    /// The experts of a layer, if it has some.
    pub fn experts_of(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| !experts.dense_layers.contains(&layer))
    }

    /// The projections of a layer, in the order in which they are updated.
    pub fn projections(&self, layer: usize) -> Vec<Projection> {
        use Projection::*;
        let mut all = match self.query_key_value {
            QkvStorage::Separate => vec![Query, Key, Value, Output],
            _ => vec![QueryKeyValue, Output],
        };
        match (self.experts_of(layer), self.mlp) {
            (Some(experts), _) => {
                let each = 0..experts.count as u16;
                all.push(Router);
                all.extend(each.clone().map(ExpertGateUp).chain(each.map(ExpertDown)));
            }
            (None, MlpKind::Gated) => all.extend([Gate, Up, Down]),
            (None, MlpKind::GatedInOne) => all.extend([GateUp, Down]),
            (None, MlpKind::Plain) => all.extend([Up, Down]),
        }
        all
    }

    /// The keys of the file that the options come from.
    pub(super) fn source(&self) -> Option<&Map<String, Value>> {
        self.source.0.as_ref()
    }
}
