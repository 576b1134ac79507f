//! The projections of a layer, whatever its family.

use crate::error::{Error, Result};

/// The inputs of a layer's projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The normalised input of the layer.
    Normed,
    /// The output of attention.
    Attended,
    /// The normalised input of the MLP.
    NormedMiddle,
    /// act(gate) o up.
    Gated,
}

/// A projection of a layer. A family has some of them ([`super::ModelConfig::projections`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// `self_attn.q_proj`.
    Query,
    /// `self_attn.k_proj`.
    Key,
    /// `self_attn.v_proj`.
    Value,
    /// The three above stored as one, `self_attn.qkv_proj`.
    QueryKeyValue,
    /// `self_attn.o_proj`.
    Output,
    /// `mlp.gate_proj`.
    Gate,
    /// `mlp.up_proj`; the first of two where an MLP has no gate.
    Up,
    /// Gate and up stored as one, `mlp.gate_up_proj`.
    GateUp,
    /// `mlp.down_proj`.
    Down,
    /// Scores of the experts, `mlp.gate`.
    Router,
    /// Gate and up of one expert.
    ExpertGateUp(u16),
    /// `down_proj` of one expert.
    ExpertDown(u16),
}

impl Projection {
    /// The seven of a LLaMA layer, in the order in which it stores and updates them.
    pub const ALL: [Projection; 7] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::Output,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// Those that are known by name beyond [`Projection::ALL`].
    const JOINED: [Projection; 3] =
        [Projection::QueryKeyValue, Projection::GateUp, Projection::Router];

    /// Path inside a layer in LLaMA's way of naming; a family's own is
    /// [`super::options::Options::path`].
    pub fn path(self) -> &'static str {
        match self {
            Projection::Query => "self_attn.q_proj",
            Projection::Key => "self_attn.k_proj",
            Projection::Value => "self_attn.v_proj",
            Projection::QueryKeyValue => "self_attn.qkv_proj",
            Projection::Output => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::GateUp => "mlp.gate_up_proj",
            Projection::Down => "mlp.down_proj",
            Projection::Router => "mlp.gate",
            Projection::ExpertGateUp(_) => "mlp.experts.gate_up_proj",
            Projection::ExpertDown(_) => "mlp.experts.down_proj",
        }
    }

    /// The last part of the path, for instance `q_proj`.
    pub fn module(self) -> &'static str {
        let path = self.path();
        path.rsplit_once('.').map_or(path, |(_, module)| module)
    }

    /// Place in [`Projection::ALL`].
    pub fn index(self) -> Option<usize> {
        Self::ALL.iter().position(|&p| p == self)
    }

    /// Whether it ends a residual branch.
    pub fn ends_branch(self) -> bool {
        matches!(self, Projection::Output | Projection::Down | Projection::ExpertDown(_))
    }

    /// What it reads.
    pub fn input(self) -> Input {
        match self {
            Projection::Query | Projection::Key | Projection::Value | Projection::QueryKeyValue => {
                Input::Normed
            }
            Projection::Output => Input::Attended,
            Projection::Gate | Projection::Up | Projection::GateUp => Input::NormedMiddle,
            Projection::Router | Projection::ExpertGateUp(_) => Input::NormedMiddle,
            Projection::Down | Projection::ExpertDown(_) => Input::Gated,
        }
    }

    /// Whether it is one expert's.
    pub fn is_expert(self) -> bool {
        matches!(self, Projection::ExpertGateUp(_) | Projection::ExpertDown(_))
    }

    /// Whether it belongs to the experts of a mixture, which PEFT takes for parameters, not
    /// modules.
    pub fn of_experts(self) -> bool {
        self == Projection::Router || self.is_expert()
    }
}

impl std::str::FromStr for Projection {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut all = Projection::ALL.into_iter().chain(Projection::JOINED);
        all.find(|p| p.module() == text || p.path() == text).ok_or_else(|| {
            let known = Projection::ALL.map(Projection::module).join(", ");
            Error::invalid("target module", text, format!("must be one of {known}"))
        })
    }
}
