//! Low-rank updates of a mixture's experts, which PEFT keeps in two stacks a layer.

use super::adapter_folder::{layer_prefix, write_factors};
use super::config::ModelConfig;
use super::layer::Layer;
use super::projection::Projection;
use crate::adapters::Method;
use crate::adapters::lora::{Lora, LoraSpec};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::TensorWriter;
use ndarray::{Array2, s};
use std::collections::BTreeMap;

/// The two parameters that hold all experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ExpertPart {
    GateUp,
    Down,
}

impl ExpertPart {
    pub(super) fn of(self, expert: u16) -> Projection {
        match self {
            Self::GateUp => Projection::ExpertGateUp(expert),
            Self::Down => Projection::ExpertDown(expert),
        }
    }

    pub(super) fn of_projection(p: Projection) -> Option<(Self, usize)> {
        match p {
            Projection::ExpertGateUp(expert) => Some((Self::GateUp, usize::from(expert))),
            Projection::ExpertDown(expert) => Some((Self::Down, usize::from(expert))),
            _ => None,
        }
    }
}

/// Where PEFT keeps the factors of a layer's experts: it wraps their module once for each
/// parameter, in the order of the parameters, and the last wrapper has the shortest name.
pub(super) fn stack_prefix(
    config: &ModelConfig,
    layer: usize,
    part: ExpertPart,
    parts: usize,
) -> String {
    let inner = if part == ExpertPart::GateUp && parts == 2 { ".base_layer" } else { "" };
    format!("{}.mlp.experts{inner}", layer_prefix(config, layer))
}

/// The experts' parameters that an adapter acts on, each with its settings and number of experts.
pub(super) fn expert_stacks(
    wanted: &[(Projection, LoraSpec)],
) -> BTreeMap<ExpertPart, (LoraSpec, usize)> {
    let mut stacks = BTreeMap::new();
    for &(p, spec) in wanted {
        if let Some((part, _)) = ExpertPart::of_projection(p) {
            stacks.entry(part).or_insert((spec, 0)).1 += 1;
        }
    }
    stacks
}

/// Writes the factors of a layer's experts as PEFT stacks them.
pub(super) fn write_stacks<T: Real>(
    writer: &mut TensorWriter,
    layer: &Layer<T>,
    config: &ModelConfig,
    number: usize,
) -> Result<Vec<(usize, Projection, LoraSpec)>> {
    let mut factors: BTreeMap<ExpertPart, Vec<&Lora<T>>> = BTreeMap::new();
    let mut entries = Vec::new();
    for (p, projection) in layer.projections() {
        if let (Some((part, _)), Method::Lora(lora)) =
            (ExpertPart::of_projection(p), &projection.method)
        {
            factors.entry(part).or_default().push(lora);
            entries.push((number, p, lora.spec));
        }
    }
    let experts = config.options.experts_of(number).map_or(0, |experts| experts.count);
    for (part, loras) in &factors {
        let prefix = stack_prefix(config, number, *part, factors.len());
        if loras.len() != experts || loras.iter().any(|lora| lora.spec != loras[0].spec) {
            let requirement = "PEFT adapts all experts of a layer alike";
            return Err(Error::invalid(
                prefix,
                format!("{} of {experts} experts", loras.len()),
                requirement,
            ));
        }
        let ((rank, input), out) = (loras[0].a.dim(), loras[0].b.nrows());
        let mut a = Array2::zeros((experts * rank, input));
        let mut b = Array2::zeros((out, rank * experts));
        for (expert, lora) in loras.iter().enumerate() {
            a.slice_mut(s![expert * rank..(expert + 1) * rank, ..]).assign(&lora.a);
            b.slice_mut(s![.., expert..; experts]).assign(&lora.b);
        }
        write_factors(writer, &prefix, &a, &b);
    }
    Ok(entries)
}
