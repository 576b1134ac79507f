//! How a family's checkpoint holds the weights of a layer's projections: one tensor each, transposed, or experts by number or
//! in one stack.

use super::checkpoint::Shards;
use super::config::ModelConfig;
use super::layer::Layer;
use super::options::Family;
use super::parameters::Projection;
use super::quantized;
use crate::adapters::{AdaptedLinear, BaseWeight, Method};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::TensorWriter;
use ndarray::{Array1, Array2, Axis, concatenate, s};
use std::collections::BTreeSet;

/// Where the weight of a projection stands.
enum Place {
    /// A tensor out x in, or in x out where the family stores weights transposed.
    Own(String),
    /// Rows of two tensors, one after the other.
    TwoHalves([String; 2]),
    /// An entry of a tensor experts x in x out.
    Stack(String),
}

/// Names of an expert's tensors where they are stored by number: gate, up, down.
fn expert_names(config: &ModelConfig, layer: usize, expert: u16) -> [String; 3] {
    let layer = config.options.layer(layer);
    match config.options.family {
        Family::Mixtral => ["w1", "w3", "w2"].map(|w| format!("{layer}.block_sparse_moe.experts.{expert}.{w}.weight")),
        _ => ["gate_proj", "up_proj", "down_proj"].map(|w| format!("{layer}.mlp.experts.{expert}.{w}.weight")),
    }
}

fn place(config: &ModelConfig, layer: usize, p: Projection) -> Place {
    let options = &config.options;
    match (p, options.family) {
        (Projection::ExpertGateUp(_), Family::GptOss) => {
            Place::Stack(format!("{}.mlp.experts.gate_up_proj", options.layer(layer)))
        }
        (Projection::ExpertDown(_), Family::GptOss) => {
            Place::Stack(format!("{}.mlp.experts.down_proj", options.layer(layer)))
        }
        (Projection::ExpertGateUp(e), _) => {
            let [gate, up, _] = expert_names(config, layer, e);
            Place::TwoHalves([gate, up])
        }
        (Projection::ExpertDown(e), _) => {
            let [_, _, down] = expert_names(config, layer, e);
            Place::Own(down)
        }
        (Projection::Router, Family::Mixtral) => {
            Place::Own(format!("{}.block_sparse_moe.gate.weight", options.layer(layer)))
        }
        _ => Place::Own(format!("{}.weight", options.module(layer, p))),
    }
}

/// The tensor that holds a projection's weight out x in, whole and alone, if there is one.
pub(super) fn own_tensor(config: &ModelConfig, layer: usize, p: Projection) -> Option<String> {
    match place(config, layer, p) {
        Place::Own(name) if !config.options.transposed => Some(name),
        _ => None,
    }
}

/// The stacks that were read, so that each is read once.
type Stacks<T> = std::collections::BTreeMap<String, (Vec<usize>, Vec<T>)>;

/// Reads the projections of a layer and adds the names of their tensors to those that are known.
pub(super) fn read_projections<T: Real>(
    shards: &Shards,
    config: &ModelConfig,
    layer: usize,
    known: &mut BTreeSet<String>,
) -> Result<Vec<(Projection, AdaptedLinear<T>)>> {
    let mut stacks = Stacks::new();
    let mut all = Vec::new();
    for p in config.projections(layer) {
        let (out, input) = config.projection_shape(p);
        let (expert, experts) = match p {
            Projection::ExpertGateUp(e) | Projection::ExpertDown(e) => {
                (usize::from(e), config.options.experts.as_ref().map_or(0, |experts| experts.count))
            }
            _ => (0, 0),
        };
        let mut stack = |name: &str, shape: &[usize]| -> Result<Vec<T>> {
            if !stacks.contains_key(name) {
                stacks.insert(name.to_string(), shards.tensor(name, shape)?);
            }
            let size: usize = shape[1..].iter().product();
            Ok(stacks[name].1[expert * size..(expert + 1) * size].to_vec())
        };
        let (weight, bias_name) = match place(config, layer, p) {
            Place::Own(name) => {
                // What is quantized is stored out x in whatever the family's own layout.
                let weight = if config.options.transposed && !quantized::is_packed(shards, &name) {
                    let turned = shards.matrix::<T>(&name, (input, out))?;
                    BaseWeight::Dense(turned.t().as_standard_layout().into_owned())
                } else {
                    quantized::read(shards, &name, (out, input))?
                };
                let bias = name.strip_suffix("weight").map(|module| format!("{module}bias"));
                known.insert(name);
                (weight, bias)
            }
            Place::TwoHalves(names) => {
                let half = |name: &String| Ok(quantized::read(shards, name, (out / 2, input))?.dense().into_owned());
                let halves: Vec<Array2<T>> = names.iter().map(half).collect::<Result<_>>()?;
                known.extend(names);
                let views: Vec<_> = halves.iter().map(|half| half.view()).collect();
                let joined = concatenate(Axis(0), &views);
                let joined = joined.map_err(|e| Error::invalid("experts", "unequal halves", e.to_string()))?;
                (BaseWeight::Dense(joined), None)
            }
            Place::Stack(name) => {
                let entry = stack(&name, &[experts, input, out])?;
                let turned = Array2::from_shape_vec((input, out), entry)
                    .map_err(|e| Error::invalid(&name, "another size", e.to_string()))?;
                let bias = format!("{name}_bias");
                known.insert(name);
                (BaseWeight::Dense(turned.t().as_standard_layout().into_owned()), Some(bias))
            }
        };
        let mut projection = AdaptedLinear::new(weight, Method::Frozen);
        if let (Some(name), true) = (bias_name, config.options.has_bias(p)) {
            projection.bias = Some(if name.ends_with("_bias") {
                Array1::from(stack(&name, &[experts, out])?)
            } else {
                shards.vector(&name, out)?
            });
            known.insert(name);
        }
        all.push((p, projection));
    }
    Ok(all)
}

/// Writes the projections of a layer.
pub(super) fn write_projections<T: Real>(
    writer: &mut TensorWriter,
    layer: &Layer<T>,
    config: &ModelConfig,
    number: usize,
) -> Result<()> {
    let mut stacks: Stacks<T> = Stacks::new();
    let experts = config.options.experts_of(number).map_or(0, |experts| experts.count);
    let add = |stacks: &mut Stacks<T>, name: String, shape: Vec<usize>, values: Vec<T>| {
        stacks.entry(name).or_insert((shape, Vec::new())).1.extend(values);
    };
    for (p, _) in layer.projections() {
        let weight = layer.checkpoint_weight(p, config)?;
        let bias = layer.checkpoint_bias(p, config);
        let (out, input) = weight.dim();
        match place(config, number, p) {
            Place::Own(name) => {
                let turned = config.options.transposed;
                writer.matrix(&name, if turned { weight.t() } else { weight.view() });
                if let (Some(bias), Some(module)) = (bias, name.strip_suffix("weight")) {
                    writer.tensor(&format!("{module}bias"), &[bias.len()], bias.iter().copied());
                }
            }
            Place::TwoHalves([first, second]) => {
                writer.matrix(&first, weight.slice(s![..out / 2, ..]));
                writer.matrix(&second, weight.slice(s![out / 2.., ..]));
            }
            Place::Stack(name) => {
                if let Some(bias) = bias {
                    add(&mut stacks, format!("{name}_bias"), vec![experts, out], bias.to_vec());
                }
                add(&mut stacks, name, vec![experts, input, out], weight.t().iter().copied().collect());
            }
        }
    }
    for (name, (shape, values)) in stacks {
        writer.tensor(&name, &shape, values);
    }
    Ok(())
}
