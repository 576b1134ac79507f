//! The families of decoders: what the keys of each one's `config.json` mean.

use super::config::{Keys, Sizes};
use super::options::{Experts, MlpKind, Options, Placement, QkvStorage, QueryKeyNorm, Source};
use super::projection::Projection;
use super::quantized::Quantization;
use crate::blocks::rope::{Rotary, Scaling};
use crate::blocks::swiglu::Activation;
use crate::error::Result;
use serde_json::{Value, json};

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
    /// `phi3`.
    Phi3,
    /// `mixtral`.
    Mixtral,
    /// `qwen3_moe`.
    Qwen3Moe,
    /// `gpt_oss`.
    GptOss,
    /// `gpt2`.
    Gpt2,
    /// `opt`.
    Opt,
    /// `gpt_neox`.
    GptNeoX,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 17] = [
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
        Self::Phi3,
        Self::Mixtral,
        Self::Qwen3Moe,
        Self::GptOss,
        Self::Gpt2,
        Self::Opt,
        Self::GptNeoX,
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
            Self::Phi3 => "phi3",
            Self::Mixtral => "mixtral",
            Self::Qwen3Moe => "qwen3_moe",
            Self::GptOss => "gpt_oss",
            Self::Gpt2 => "gpt2",
            Self::Opt => "opt",
            Self::GptNeoX => "gpt_neox",
        }
    }

    fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma | Self::Gemma2 | Self::Gemma3)
    }

    fn is_mixture(self) -> bool {
        matches!(self, Self::Mixtral | Self::Qwen3Moe | Self::GptOss)
    }

    /// Layer norms and an MLP without gate.
    fn is_plain_mlp(self) -> bool {
        matches!(self, Self::Gpt2 | Self::Opt | Self::GptNeoX)
    }

    /// The name that a `config.json` of this family has for a size; `None` where the family has no
    /// such key.
    pub(super) fn key(self, key: &'static str) -> Option<&'static str> {
        Some(match (self, key) {
            (Self::Gpt2, "hidden_size") => "n_embd",
            (Self::Gpt2, "intermediate_size") => "n_inner",
            (Self::Gpt2, "num_hidden_layers") => "n_layer",
            (Self::Gpt2, "num_attention_heads") => "n_head",
            (Self::Gpt2, "max_position_embeddings") => "n_positions",
            (Self::Gpt2, "rms_norm_eps") => "layer_norm_epsilon",
            (Self::GptNeoX, "rms_norm_eps") => "layer_norm_eps",
            (Self::Opt, "intermediate_size") => "ffn_dim",
            (Self::Opt, "rms_norm_eps") => return None,
            (Self::Gpt2 | Self::Opt | Self::GptNeoX, "num_key_value_heads" | "head_dim") => {
                return None;
            }
            _ => key,
        })
    }

    /// Whether the output projection is the embedding where the file does not say.
    pub(super) fn tied_by_default(self) -> bool {
        self.is_gemma() || matches!(self, Self::SmolLm3 | Self::Gpt2 | Self::Opt)
    }

    /// Head width where the file does not say; `None`: the width over the heads.
    pub(super) fn default_head_dim(self) -> Option<usize> {
        match self {
            Self::Qwen3 => Some(128),
            Self::GptOss => Some(64),
            Self::Gemma | Self::Gemma2 | Self::Gemma3 => Some(256),
            _ => None,
        }
    }

    /// Constant of the norms where the file does not say.
    pub(super) fn default_eps(self) -> f64 {
        match self {
            Self::Olmo2
            | Self::Phi3
            | Self::Mixtral
            | Self::GptOss
            | Self::Gpt2
            | Self::Opt
            | Self::GptNeoX => 1e-5,
            _ => 1e-6,
        }
    }

    fn default_theta(self) -> f64 {
        match self {
            Self::Gemma3 | Self::Mixtral => 1e6,
            Self::SmolLm3 => 2e6,
            Self::GptOss => 1.5e5,
            _ => 1e4,
        }
    }
}

impl Options {
    /// Resolves a file's keys; the second result is the base of the rotary angles.
    pub(super) fn resolve(family: Family, keys: &Keys<'_>, sizes: &Sizes) -> Result<(Self, f64)> {
        let mut options = Self { family, ..Self::default() };
        let flag = |key: &str| keys.flag(key, false);
        options.biases = match family {
            Family::GptNeoX => biases(family, keys.flag("attention_bias", true)?, true),
            Family::GptOss => biases(family, keys.flag("attention_bias", true)?, true),
            Family::Opt => {
                let bias = keys.flag("enable_bias", true)?;
                biases(family, bias, bias)
            }
            _ => biases(family, flag("attention_bias")?, flag("mlp_bias")?),
        };
        keys.refuse_unless("use_bidirectional_attention", &[Value::Bool(false)])?;
        options.quantization = Quantization::resolve(keys)?;
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
            Family::Qwen3 | Family::Gemma3 | Family::Qwen3Moe => QueryKeyNorm::Head,
            Family::Olmo2 => QueryKeyNorm::Width,
            _ => QueryKeyNorm::None,
        };
        match family {
            Family::Gemma2 | Family::Gemma3 => {
                options.attention_scale =
                    Some(1.0 / keys.positive("query_pre_attn_scalar", 256.0)?.sqrt());
                let gemma2 = family == Family::Gemma2;
                options.attention_cap =
                    keys.optional("attn_logit_softcapping", gemma2.then_some(50.0))?;
                options.logit_cap =
                    keys.optional("final_logit_softcapping", gemma2.then_some(30.0))?;
            }
            Family::Granite => {
                options.attention_scale = Some(keys.positive("attention_multiplier", 1.0)?);
                options.embedding_multiplier = keys.positive("embedding_multiplier", 1.0)?;
                options.residual_multiplier = keys.positive("residual_multiplier", 1.0)?;
                options.logit_multiplier = 1.0 / keys.positive("logits_scaling", 1.0)?;
            }
            _ => {}
        }
        stored(family, keys, &mut options)?;
        options.experts =
            if family.is_mixture() { Some(experts(family, keys, sizes)?) } else { None };
        if options
            .experts
            .as_ref()
            .is_some_and(|experts| experts.count == experts.dense_layers.len())
        {
            options.experts = None;
        }
        options.windows = windows(family, keys, sizes.layers)?;
        let theta = rotary(family, keys, sizes, &mut options)?;
        if family != Family::Llama || !options.is_plain() {
            options.source = Source(Some(keys.map.clone()));
        }
        Ok((options, theta))
    }
}

fn biases(family: Family, attention: bool, mlp: bool) -> Vec<Projection> {
    use Projection::*;
    let mut all = Vec::new();
    if attention || family == Family::Qwen2 || family == Family::Gpt2 {
        all.extend([Query, Key, Value, QueryKeyValue]);
    }
    if (attention && family != Family::Qwen2) || family == Family::Gpt2 {
        all.push(Output);
    }
    if mlp || family == Family::Gpt2 {
        all.extend([Gate, Up, GateUp, Down, Router, ExpertGateUp(0), ExpertDown(0)]);
    }
    all
}

/// How weights and norms are stored, and where positions come from.
fn stored(family: Family, keys: &Keys<'_>, options: &mut Options) -> Result<()> {
    options.query_key_value = match family {
        Family::Phi3 | Family::Gpt2 => QkvStorage::Blocks,
        Family::GptNeoX => QkvStorage::PerHead,
        _ => QkvStorage::Separate,
    };
    options.mlp = match family {
        Family::Phi3 => MlpKind::GatedInOne,
        _ if family.is_plain_mlp() => MlpKind::Plain,
        _ => MlpKind::Gated,
    };
    options.layer_norm = family.is_plain_mlp();
    options.transposed = family == Family::Gpt2;
    options.sinks = family == Family::GptOss;
    let only = |key: &str, value: Value| match keys.value(key) {
        Some(found) if *found != value => Err(keys.wrong(key, &value.to_string())),
        _ => Ok(()),
    };
    match family {
        Family::Gpt2 => {
            options.positions = Some(0);
            only("scale_attn_by_inverse_layer_idx", json!(false))?;
            only("add_cross_attention", json!(false))?;
            if !keys.flag("scale_attn_weights", true)? {
                options.attention_scale = Some(1.0);
            }
        }
        Family::Opt => {
            options.positions = Some(2);
            only("do_layer_norm_before", json!(true))?;
            only("layer_norm_elementwise_affine", json!(true))?;
            only("_remove_final_layer_norm", json!(false))?;
            only("word_embed_proj_dim", keys.value("hidden_size").cloned().unwrap_or_default())?;
        }
        Family::GptNeoX => options.parallel = keys.flag("use_parallel_residual", true)?,
        _ => {}
    }
    Ok(())
}

/// The experts of a family that has some.
fn experts(family: Family, keys: &Keys<'_>, sizes: &Sizes) -> Result<Experts> {
    let either = |names: [&'static str; 2]| {
        names.into_iter().find(|key| keys.value(key).is_some()).unwrap_or(names[0])
    };
    let (count, per_token, inner, renormalise) = match family {
        Family::Qwen3Moe => (128, 8, "moe_intermediate_size", keys.flag("norm_topk_prob", false)?),
        Family::GptOss => (128, 4, "intermediate_size", true),
        _ => (8, 2, "intermediate_size", true),
    };
    let key = either(["num_local_experts", "num_experts"]);
    let count = keys.size(key, Some(count))?;
    if count > usize::from(u16::MAX) {
        return Err(keys.wrong(key, "at most 65535 experts"));
    }
    let key = either(["num_experts_per_tok", "experts_per_token"]);
    let per_token = keys.size(key, Some(per_token))?;
    if per_token > count {
        return Err(keys.wrong(key, &format!("at most the {count} experts that there are")));
    }
    let mut dense_layers = Vec::new();
    if family == Family::Qwen3Moe {
        let step = keys.size("decoder_sparse_step", Some(1))?;
        let named = match keys.value("mlp_only_layers") {
            None => Vec::new(),
            Some(value) => {
                let list = value
                    .as_array()
                    .and_then(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
                list.ok_or_else(|| keys.wrong("mlp_only_layers", "a list of layer numbers"))?
            }
        };
        dense_layers = (0..sizes.layers)
            .filter(|&l| named.contains(&(l as u64)) || !(l + 1).is_multiple_of(step))
            .collect();
    }
    let inner = keys.size(inner, if family == Family::Qwen3Moe { Some(768) } else { None })?;
    Ok(Experts {
        count,
        per_token,
        inner,
        renormalise,
        interleaved: family == Family::GptOss,
        input_first: family == Family::GptOss,
        dense_layers,
    })
}

fn activation(family: Family, keys: &Keys<'_>) -> Result<Activation> {
    let key = match family {
        Family::Gpt2 | Family::Opt => "activation_function",
        _ if family.is_gemma() && keys.value("hidden_activation").is_some() => "hidden_activation",
        _ => "hidden_act",
    };
    let known: &[(&str, Activation)] = match family {
        Family::GptOss => {
            let clamped = Activation::ClampedSwish {
                alpha: keys.positive("swiglu_alpha", 1.702)?,
                limit: keys.positive("swiglu_limit", 7.0)?,
            };
            return match keys.value(key) {
                Some(value) if value != "silu" => Err(keys.wrong(key, "silu")),
                _ => Ok(clamped),
            };
        }
        _ if family.is_gemma() => &[("gelu_pytorch_tanh", Activation::GeluTanh)],
        Family::Gpt2 => &[
            ("gelu_new", Activation::GeluTanh),
            ("gelu_pytorch_tanh", Activation::GeluTanh),
            ("gelu", Activation::Gelu),
            ("relu", Activation::Relu),
        ],
        Family::Opt => &[("relu", Activation::Relu), ("gelu", Activation::Gelu)],
        Family::GptNeoX => &[
            ("gelu", Activation::Gelu),
            ("gelu_new", Activation::GeluTanh),
            ("relu", Activation::Relu),
        ],
        _ => &[("silu", Activation::Silu)],
    };
    match keys.value(key) {
        None => Ok(known[0].1),
        Some(value) => {
            known.iter().find(|(name, _)| value == name).map(|(_, a)| *a).ok_or_else(|| {
                let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
                keys.wrong(key, &names.join(" or "))
            })
        }
    }
}

/// The window of each layer.
fn windows(family: Family, keys: &Keys<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    let always = matches!(
        family,
        Family::Mistral
            | Family::Gemma2
            | Family::Gemma3
            | Family::Phi3
            | Family::Mixtral
            | Family::GptOss
    );
    let default = match family {
        Family::Mistral | Family::Gemma2 | Family::Gemma3 => Some(4096),
        Family::GptOss => Some(128),
        _ => None,
    };
    // A key that is null says that there is no window; one that is absent, that it is the family's
    // own.
    let declared = match keys.map.get("sliding_window") {
        None => default,
        Some(Value::Null) => None,
        Some(_) => Some(keys.size("sliding_window", None)?),
    };
    let switched =
        matches!(family, Family::Qwen2 | Family::Qwen3 | Family::SmolLm3 | Family::Qwen3Moe);
    let used = match family {
        _ if always => declared,
        _ if switched => {
            declared.filter(|_| keys.value("use_sliding_window") == Some(&Value::Bool(true)))
        }
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
                _ => {
                    Err(keys
                        .wrong("layer_types", "sliding_attention or full_attention for each layer"))
                }
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
            let every = keys.size(
                "sliding_window_pattern",
                Some(keys.size("_sliding_window_pattern", Some(6))?),
            )?;
            let slides = |l: usize| match family {
                Family::Gemma2 | Family::GptOss => l.is_multiple_of(2),
                Family::Gemma3 => !(l + 1).is_multiple_of(every),
                Family::Mistral | Family::Phi3 | Family::Mixtral => true,
                Family::Qwen3Moe => false,
                _ => l >= above,
            };
            (0..layers).map(slides).collect()
        }
    };
    Ok(kinds.into_iter().map(|slides| slides.then_some(window)).collect())
}

/// Sets the rotary embeddings; returns the base of the first.
fn rotary(family: Family, keys: &Keys<'_>, sizes: &Sizes, options: &mut Options) -> Result<f64> {
    if options.positions.is_some() {
        options.rotaries = Vec::new();
        options.rotary_of = vec![None; sizes.layers];
        return Ok(family.default_theta());
    }
    let base = if family == Family::GptNeoX { "rotary_emb_base" } else { "rope_theta" };
    let theta = keys.positive(base, family.default_theta())?;
    let (main, local) = match keys.value("rope_parameters").or(keys.value("rope_scaling")) {
        None => (None, None),
        Some(Value::Object(map))
            if map.contains_key("full_attention") || map.contains_key("sliding_attention") =>
        {
            (map.get("full_attention"), map.get("sliding_attention"))
        }
        Some(value) => (Some(value), None),
    };
    let share = match family {
        Family::GptNeoX => keys.positive("rotary_pct", 0.25)?,
        Family::Phi3 => keys.positive("partial_rotary_factor", 1.0)?,
        _ => 1.0,
    };
    let read = |value: Option<&Value>, theta: f64| -> Result<(Scaling, f64)> {
        match value {
            None | Some(Value::Null) => Ok((Scaling::None, theta)),
            Some(Value::Object(map)) => keys.inside("rope_parameters", map).scaling(theta, sizes),
            Some(_) => Err(keys.wrong("rope_parameters", "an object")),
        }
    };
    let (scaling, theta) = read(main, theta)?;
    let share = match main {
        Some(Value::Object(map)) if map.contains_key("partial_rotary_factor") => {
            let inside = keys.inside("rope_parameters", map);
            let factor = inside.positive("partial_rotary_factor", share)?;
            let shared = matches!(family, Family::GptNeoX | Family::Phi3);
            if factor > 1.0 || (!shared && factor < 1.0) {
                let expected =
                    if shared { "a share of the head, at most 1" } else { "1 for this family" };
                return Err(inside.wrong("partial_rotary_factor", expected));
            }
            factor
        }
        _ => share,
    };
    options.rotaries = vec![Rotary { theta: None, scaling, share: (share < 1.0).then_some(share) }];
    if family == Family::Gemma3 {
        let base = keys.positive("rope_local_base_freq", 1e4)?;
        let (scaling, base) = read(local, base)?;
        options.rotaries.push(Rotary { theta: Some(base), scaling, share: None });
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
