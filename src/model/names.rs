//! Names of a family's modules, as its checkpoints, PEFT and PyTorch use them.

use super::options::{Family, Norm, Options, Placement, QueryKeyNorm};
use super::projection::Projection;
use std::borrow::Cow;

/// Transformers' name of every family's output projection in memory.
pub(super) const HEAD_IN_MEMORY: &str = "lm_head";

/// What stands outside the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outside {
    /// The embedding of tokens.
    Embedding,
    /// The embedding of positions, in families that learn one.
    Positions,
    /// The last norm.
    FinalNorm,
    /// The output projection.
    Head,
}

impl Options {
    /// Name of a module outside the layers.
    pub fn outside(&self, module: Outside) -> &'static str {
        let [embedding, positions, norm, head] = match self.family {
            Family::Gpt2 => ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"],
            Family::Opt => [
                "model.decoder.embed_tokens",
                "model.decoder.embed_positions",
                "model.decoder.final_layer_norm",
                "lm_head",
            ],
            Family::GptNeoX => ["gpt_neox.embed_in", "", "gpt_neox.final_layer_norm", "embed_out"],
            _ => ["model.embed_tokens", "", "model.norm", "lm_head"],
        };
        match module {
            Outside::Embedding => embedding,
            Outside::Positions => positions,
            Outside::FinalNorm => norm,
            Outside::Head => head,
        }
    }

    /// Name of a tensor outside the layers, for instance `model.norm.weight`.
    pub fn outside_tensor(&self, module: Outside, tensor: &str) -> String {
        format!("{}.{tensor}", self.outside(module))
    }

    /// Name of a layer, for instance `model.layers.3`.
    pub fn layer(&self, layer: usize) -> String {
        let layers = match self.family {
            Family::Gpt2 => "transformer.h",
            Family::Opt => "model.decoder.layers",
            Family::GptNeoX => "gpt_neox.layers",
            _ => "model.layers",
        };
        format!("{layers}.{layer}")
    }

    /// Path of a projection inside its layer.
    pub fn path(&self, p: Projection) -> Cow<'static, str> {
        let own = match (self.family, p) {
            (Family::Gpt2, Projection::QueryKeyValue) => "attn.c_attn",
            (Family::Gpt2, Projection::Output) => "attn.c_proj",
            (Family::Gpt2, Projection::Up) => "mlp.c_fc",
            (Family::Gpt2, Projection::Down) => "mlp.c_proj",
            (Family::Opt, Projection::Output) => "self_attn.out_proj",
            (Family::Opt, Projection::Up) => "fc1",
            (Family::Opt, Projection::Down) => "fc2",
            (Family::GptNeoX, Projection::QueryKeyValue) => "attention.query_key_value",
            (Family::GptNeoX, Projection::Output) => "attention.dense",
            (Family::GptNeoX, Projection::Up) => "mlp.dense_h_to_4h",
            (Family::GptNeoX, Projection::Down) => "mlp.dense_4h_to_h",
            (Family::GptOss, Projection::Router) => "mlp.router",
            (_, Projection::ExpertGateUp(e)) => {
                return format!("mlp.experts.{e}.gate_up_proj").into();
            }
            (_, Projection::ExpertDown(e)) => return format!("mlp.experts.{e}.down_proj").into(),
            _ => p.path(),
        };
        own.into()
    }

    /// Full name of a projection, as PEFT matches its patterns against.
    pub fn module(&self, layer: usize, p: Projection) -> String {
        format!("{}.{}", self.layer(layer), self.path(p))
    }

    /// Last part of a projection's name, for instance `q_proj`.
    pub fn module_kind(&self, p: Projection) -> String {
        let path = self.path(p);
        path.rsplit('.').next().unwrap_or(&path).to_string()
    }

    /// Name of a norm inside a layer; `None` if the family has none there.
    pub fn norm_name(&self, norm: Norm) -> Option<&'static str> {
        let before = self.placement != Placement::After;
        let after = self.placement != Placement::Before;
        let query_key = self.query_key_norm != QueryKeyNorm::None;
        match (self.family, norm) {
            (Family::Gpt2, Norm::BeforeAttention) => Some("ln_1"),
            (Family::Gpt2, Norm::BeforeMlp) => Some("ln_2"),
            (Family::Opt, Norm::BeforeAttention) => Some("self_attn_layer_norm"),
            (Family::Opt, Norm::BeforeMlp) => Some("final_layer_norm"),
            (_, Norm::BeforeAttention) => before.then_some("input_layernorm"),
            (_, Norm::Query) => query_key.then_some("self_attn.q_norm"),
            (_, Norm::Key) => query_key.then_some("self_attn.k_norm"),
            (_, Norm::AfterAttention) => after.then_some("post_attention_layernorm"),
            (_, Norm::BeforeMlp) if after && before => Some("pre_feedforward_layernorm"),
            (_, Norm::BeforeMlp) => before.then_some("post_attention_layernorm"),
            (_, Norm::AfterMlp) => after.then_some("post_feedforward_layernorm"),
        }
    }

    /// Full name of a tensor of a norm.
    pub fn norm_tensor(&self, layer: usize, norm: Norm, tensor: &str) -> String {
        format!("{}.{}.{tensor}", self.layer(layer), self.norm_name(norm).unwrap_or(""))
    }

    /// Full name of a layer's attention sinks.
    pub fn sinks_name(&self, layer: usize) -> String {
        format!("{}.self_attn.sinks", self.layer(layer))
    }
}
