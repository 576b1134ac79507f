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
//! | `olmo2` | norms after attention and MLP only, norms of whole queries and keys |
//! | `granite` | four multipliers |
//! | `smollm3` | no rotary embedding in some layers |

use super::config::{Keys, Sizes};
use super::parameters::Projection;
use crate::blocks::rope::{Rotary, Scaling};
use crate::blocks::swiglu::Activation;
use crate::error::Result;
use crate::linalg::Real;
use ndarray::Array2;
use serde_json::{Map, Value};

/// A family of decoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// `llama`.
    #[default]
    Llama,
    /// `mistral`.
    Mistral,
    /// `qwen2`.
    Qwen2,
    /// `qwen3`.
    Qwen3,
    /// `gemma`.
    Gemma,
    /// `gemma2`.
    Gemma2,
    /// `gemma3_text`.
    Gemma3,
    /// `olmo2`.
    Olmo2,
    /// `granite`.
    Granite,
    /// `smollm3`.
    SmolLm3,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gemma,
        Self::Gemma2,
        Self::Gemma3,
        Self::Olmo2,
        Self::Granite,
        Self::SmolLm3,
    ];

    /// `model_type` of its `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
            Self::Olmo2 => "olmo2",
            Self::Granite => "granite",
            Self::SmolLm3 => "smollm3",
        }
    }

    fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma | Self::Gemma2 | Self::Gemma3)
    }

    /// Whether the output projection is the embedding where the file does not say.
    pub(super) fn tied_by_default(self) -> bool {
        self.is_gemma() || self == Self::SmolLm3
    }

    /// Head width where the file does not say; `None`: the width over the heads.
    pub(super) fn default_head_dim(self) -> Option<usize> {
        match self {
            Self::Qwen3 => Some(128),
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => Some(256),
            _ => None,
        }
    }

    /// Constant of the norms where the file does not say.
    pub(super) fn default_eps(self) -> f64 {
        if self == Self::Olmo2 { 1e-5 } else { 1e-6 }
    }

    fn default_theta(self) -> f64 {
        match self {
            Self::Gemma3 => 1e6,
            Self::SmolLm3 => 2e6,
            _ => 1e4,
        }
    }
}

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
    pub const ALL: [Self; 6] =
        [Self::BeforeAttention, Self::Query, Self::Key, Self::AfterAttention, Self::BeforeMlp, Self::AfterMlp];
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
    /// Which projections have a bias, in the order of [`Projection::ALL`].
    pub biases: [bool; 7],
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
    /// The file's own keys, for writing it again.
    source: Source,
}

/// The keys of a file. What they say of the computation is in the options; the rest makes no difference.
#[derive(Debug, Clone, Default)]
struct Source(Option<Map<String, Value>>);

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
            biases: [false; 7],
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
            source: Source::default(),
        }
    }
}

fn is_one(x: f64) -> bool {
    x.to_bits() == 1f64.to_bits()
}

impl Options {
    /// Name of a norm inside a layer; `None` if the family has none there.
    pub fn norm_name(&self, norm: Norm) -> Option<&'static str> {
        let before = self.placement != Placement::After;
        let after = self.placement != Placement::Before;
        match norm {
            Norm::BeforeAttention => before.then_some("input_layernorm"),
            Norm::Query => (self.query_key_norm != QueryKeyNorm::None).then_some("self_attn.q_norm"),
            Norm::Key => (self.query_key_norm != QueryKeyNorm::None).then_some("self_attn.k_norm"),
            Norm::AfterAttention => after.then_some("post_attention_layernorm"),
            Norm::BeforeMlp if after && before => Some("pre_feedforward_layernorm"),
            Norm::BeforeMlp => before.then_some("post_attention_layernorm"),
            Norm::AfterMlp => after.then_some("post_feedforward_layernorm"),
        }
    }

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

    /// The keys of the file that the options come from.
    pub(super) fn source(&self) -> Option<&Map<String, Value>> {
        self.source.0.as_ref()
    }

    /// Resolves a file's keys; the second result is the base of the rotary angles.
    pub(super) fn resolve(family: Family, keys: &Keys<'_>, sizes: &Sizes) -> Result<(Self, f64)> {
        let mut options = Self { family, ..Self::default() };
        let flag = |key: &str| keys.flag(key, false);
        options.biases = biases(family, flag("attention_bias")?, flag("mlp_bias")?);
        keys.refuse_unless("use_bidirectional_attention", &[Value::Bool(false)])?;
        keys.refuse_unless("quantization_config", &[])?;
        options.activation = activation(family, keys)?;
        if family.is_gemma() {
            options.unit_gain = true;
            options.embedding_multiplier = (sizes.hidden_size as f64).sqrt();
        }
        options.placement = match family {
            Family::Gemma2 | Family::Gemma3 => Placement::BeforeAndAfter,
            Family::Olmo2 => Placement::After,
            _ => Placement::Before,
        };
        options.query_key_norm = match family {
            Family::Qwen3 | Family::Gemma3 => QueryKeyNorm::Head,
            Family::Olmo2 => QueryKeyNorm::Width,
            _ => QueryKeyNorm::None,
        };
        match family {
            Family::Gemma2 | Family::Gemma3 => {
                options.attention_scale = Some(1.0 / keys.positive("query_pre_attn_scalar", 256.0)?.sqrt());
                let gemma2 = family == Family::Gemma2;
                options.attention_cap = keys.optional("attn_logit_softcapping", gemma2.then_some(50.0))?;
                options.logit_cap = keys.optional("final_logit_softcapping", gemma2.then_some(30.0))?;
            }
            Family::Granite => {
                options.attention_scale = Some(keys.positive("attention_multiplier", 1.0)?);
                options.embedding_multiplier = keys.positive("embedding_multiplier", 1.0)?;
                options.residual_multiplier = keys.positive("residual_multiplier", 1.0)?;
                options.logit_multiplier = 1.0 / keys.positive("logits_scaling", 1.0)?;
            }
            _ => {}
        }
        options.windows = windows(family, keys, sizes.layers)?;
        let theta = rotary(family, keys, sizes, &mut options)?;
        if family != Family::Llama || !options.is_plain() {
            options.source = Source(Some(keys.map.clone()));
        }
        Ok((options, theta))
    }
}

fn biases(family: Family, attention: bool, mlp: bool) -> [bool; 7] {
    Projection::ALL.map(|p| match p {
        Projection::Query | Projection::Key | Projection::Value => attention || family == Family::Qwen2,
        Projection::Output => attention && family != Family::Qwen2,
        Projection::Gate | Projection::Up | Projection::Down => mlp,
    })
}

fn activation(family: Family, keys: &Keys<'_>) -> Result<Activation> {
    let key =
        if family.is_gemma() && keys.value("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    let (name, activation) = match family.is_gemma() {
        true => ("gelu_pytorch_tanh", Activation::GeluTanh),
        false => ("silu", Activation::Silu),
    };
    match keys.value(key) {
        None => Ok(activation),
        Some(value) if value == name => Ok(activation),
        Some(_) => Err(keys.wrong(key, name)),
    }
}

/// The window of each layer.
fn windows(family: Family, keys: &Keys<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    let default = matches!(family, Family::Mistral | Family::Gemma2 | Family::Gemma3).then_some(4096);
    // A key that is null says that there is no window; one that is absent, that it is the family's own.
    let declared = match keys.map.get("sliding_window") {
        None => default,
        Some(Value::Null) => None,
        Some(_) => Some(keys.size("sliding_window", None)?),
    };
    let switched = matches!(family, Family::Qwen2 | Family::Qwen3 | Family::SmolLm3);
    let used = match family {
        Family::Mistral | Family::Gemma2 | Family::Gemma3 => declared,
        _ if switched => declared.filter(|_| keys.value("use_sliding_window") == Some(&Value::Bool(true))),
        _ => {
            if declared.is_some() {
                return Err(keys.wrong("sliding_window", "null for this family"));
            }
            None
        }
    };
    let Some(window) = used else { return Ok(Vec::new()) };
    let kinds = match keys.value("layer_types") {
        Some(Value::Array(kinds)) => {
            let kind = |value: &Value| match value.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(keys.wrong("layer_types", "sliding_attention or full_attention for each layer")),
            };
            let kinds = kinds.iter().map(kind).collect::<Result<Vec<bool>>>()?;
            if kinds.len() != layers {
                return Err(keys.wrong("layer_types", &format!("one for each of {layers} layers")));
            }
            kinds
        }
        Some(_) => return Err(keys.wrong("layer_types", "a list")),
        None => {
            let above = keys.size("max_window_layers", Some(28))?;
            let every = keys.size("sliding_window_pattern", Some(keys.size("_sliding_window_pattern", Some(6))?))?;
            let slides = |l: usize| match family {
                Family::Gemma2 => l.is_multiple_of(2),
                Family::Gemma3 => !(l + 1).is_multiple_of(every),
                Family::Mistral => true,
                _ => l >= above,
            };
            (0..layers).map(slides).collect()
        }
    };
    Ok(kinds.into_iter().map(|slides| slides.then_some(window)).collect())
}

/// Sets the rotary embeddings; returns the base of the first.
fn rotary(family: Family, keys: &Keys<'_>, sizes: &Sizes, options: &mut Options) -> Result<f64> {
    let theta = keys.positive("rope_theta", family.default_theta())?;
    let (main, local) = match keys.value("rope_parameters").or(keys.value("rope_scaling")) {
        None => (None, None),
        Some(Value::Object(map)) if map.contains_key("full_attention") || map.contains_key("sliding_attention") => {
            (map.get("full_attention"), map.get("sliding_attention"))
        }
        Some(value) => (Some(value), None),
    };
    let read = |value: Option<&Value>, theta: f64| -> Result<(Scaling, f64)> {
        match value {
            None | Some(Value::Null) => Ok((Scaling::None, theta)),
            Some(Value::Object(map)) => keys.inside("rope_parameters", map).scaling(theta, sizes),
            Some(_) => Err(keys.wrong("rope_parameters", "an object")),
        }
    };
    let (scaling, theta) = read(main, theta)?;
    options.rotaries = vec![Rotary { theta: None, scaling }];
    if family == Family::Gemma3 {
        let base = keys.positive("rope_local_base_freq", 1e4)?;
        let (scaling, base) = read(local, base)?;
        options.rotaries.push(Rotary { theta: Some(base), scaling });
        let of = |l: usize| Some(usize::from(options.windows.get(l).copied().flatten().is_some()));
        options.rotary_of = (0..sizes.layers).map(of).collect();
    }
    if family == Family::SmolLm3 {
        let wrong = || keys.wrong("no_rope_layers", "0 or 1 for each layer");
        options.rotary_of = match keys.value("no_rope_layers") {
            Some(Value::Array(list)) if list.len() == sizes.layers => {
                let of = |value: &Value| match value.as_u64() {
                    Some(0) => Ok(None),
                    Some(1) => Ok(Some(0)),
                    _ => Err(wrong()),
                };
                list.iter().map(of).collect::<Result<_>>()?
            }
            Some(_) => return Err(wrong()),
            None => {
                let every = keys.size("no_rope_layer_interval", Some(4))?;
                (0..sizes.layers).map(|l| (!(l + 1).is_multiple_of(every)).then_some(0)).collect()
            }
        };
    }
    Ok(theta)
}
