//! How a family's checkpoint holds the weights of a layer's projections: one tensor each,
//! transposed, or experts by number or in one stack.

use super::checkpoint::Shards;
use super::config::ModelConfig;
use super::layer::Layer;
use super::options::Family;
use super::projection::Projection;
use super::quantized;
use crate::adapters::{AdaptedLinear, BaseWeight, Method};
use crate::blocks::numbers_mut;
use crate::blocks::stored_weight::{StoredWeight, WeightSource};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::TensorWriter;
use ndarray::{Array1, Array2, Axis, concatenate, s};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

/// Where the weight of a projection stands.
#[derive(Debug)]
enum Place {
    /// A tensor out x in, or in x out where the family stores weights transposed.
    Own(String),
    /// Rows of two tensors, one after the other.
    TwoHalves([String; 2]),
    /// An entry of a tensor experts x in x out.
    Stack(String),
}

impl Place {
    /// Names of its tensors.
    fn names(&self) -> Vec<String> {
        match self {
            Place::Own(name) | Place::Stack(name) => vec![name.clone()],
            Place::TwoHalves(names) => names.to_vec(),
        }
    }
}

/// Names of an expert's tensors where they are stored by number: gate, up, down.
fn expert_names(config: &ModelConfig, layer: usize, expert: u16) -> [String; 3] {
    let layer = config.options.layer(layer);
    match config.options.family {
        Family::Mixtral => ["w1", "w3", "w2"]
            .map(|w| format!("{layer}.block_sparse_moe.experts.{expert}.{w}.weight")),
        _ => ["gate_proj", "up_proj", "down_proj"]
            .map(|w| format!("{layer}.mlp.experts.{expert}.{w}.weight")),
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

/// Stacks that are being written.
type Stacks<T> = std::collections::BTreeMap<String, (Vec<usize>, Vec<T>)>;

/// The weight of a projection in a checkpoint.
#[derive(Debug)]
struct InCheckpoint {
    shards: Arc<Shards>,
    place: Place,
    /// (out, in).
    shape: (usize, usize),
    /// Whether the tensor stands in x out.
    transposed: bool,
    /// Which of how many experts, in a stack.
    expert: (usize, usize),
}

impl InCheckpoint {
    /// Refuses tensors that are absent or of another shape.
    fn check(&self) -> Result<()> {
        let (out, input) = self.shape;
        match &self.place {
            Place::Own(name) if self.transposed => self.shards.check(name, &[input, out]),
            Place::Own(name) => self.shards.check(name, &[out, input]),
            Place::TwoHalves(names) => {
                names.iter().try_for_each(|name| self.shards.check(name, &[out / 2, input]))
            }
            Place::Stack(name) => self.shards.check(name, &[self.expert.1, input, out]),
        }
    }

    /// The whole weight from its transpose, which begins at a row of the tensor.
    fn turned<T: Real>(&self, name: &str, first: usize) -> Result<Array2<T>> {
        let (out, input) = self.shape;
        let mut turned = Array2::<T>::zeros((input, out));
        self.shards.rows(name, first..first + input, numbers_mut(&mut turned))?;
        Ok(turned)
    }
}

impl<T: Real> WeightSource<T> for InCheckpoint {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn read_rows(&self, rows: Range<usize>, into: &mut Array2<T>) -> Result<()> {
        let half = self.shape.0 / 2;
        match &self.place {
            Place::Own(name) if self.transposed => {
                into.assign(&self.turned(name, 0)?.t().slice(s![rows, ..]))
            }
            Place::Own(name) => self.shards.rows(name, rows, numbers_mut(into))?,
            Place::Stack(name) => {
                let first = self.expert.0 * self.shape.1;
                into.assign(&self.turned(name, first)?.t().slice(s![rows, ..]));
            }
            Place::TwoHalves([first, second]) => {
                let upper = rows.start.min(half)..rows.end.min(half);
                let lower = rows.start.max(half) - half..rows.end.max(half) - half;
                let (above, below) = numbers_mut(into).split_at_mut(upper.len() * self.shape.1);
                self.shards.rows(first, upper, above)?;
                self.shards.rows(second, lower, below)?;
            }
        }
        Ok(())
    }
}

/// A table outside the layers.
pub(super) fn table<T: Real>(
    shards: &Arc<Shards>,
    name: &str,
    shape: (usize, usize),
) -> Result<StoredWeight<T>> {
    let place = Place::Own(name.to_string());
    let source =
        InCheckpoint { shards: shards.clone(), place, shape, transposed: false, expert: (0, 1) };
    source.check()?;
    Ok(StoredWeight::elsewhere(Arc::new(source)))
}

/// The projections of a layer, their weights read now or, if `later`, each time they are needed;
/// adds the names of their tensors to those that are known.
pub(super) fn read_projections<T: Real>(
    shards: &Arc<Shards>,
    config: &ModelConfig,
    layer: usize,
    later: bool,
    known: &mut BTreeSet<String>,
) -> Result<Vec<(Projection, AdaptedLinear<T>)>> {
    let mut all = Vec::new();
    for p in config.projections(layer) {
        let shape = config.projection_shape(p);
        let expert = match p {
            Projection::ExpertGateUp(e) | Projection::ExpertDown(e) => {
                (usize::from(e), config.options.experts.as_ref().map_or(0, |experts| experts.count))
            }
            _ => (0, 0),
        };
        let place = place(config, layer, p);
        // Name of the bias, and which row of it where experts have theirs in one.
        let bias = match &place {
            Place::Own(name) => {
                name.strip_suffix("weight").map(|module| (format!("{module}bias"), None))
            }
            Place::TwoHalves(_) => None,
            Place::Stack(name) => Some((format!("{name}_bias"), Some(expert))),
        };
        known.extend(place.names());
        let base = if place.names().iter().any(|name| quantized::is_packed(shards, name)) {
            packed(shards, &place, shape)?
        } else {
            let source = InCheckpoint {
                shards: shards.clone(),
                place,
                shape,
                transposed: config.options.transposed,
                expert,
            };
            source.check()?;
            let stored = StoredWeight::elsewhere(Arc::new(source));
            if later { BaseWeight::Stored(stored) } else { BaseWeight::Dense(stored.read()?) }
        };
        let mut projection = AdaptedLinear::new(base, Method::Frozen);
        if let (Some((name, row)), true) = (bias, config.options.has_bias(p)) {
            projection.bias = Some(match row {
                Some((row, rows)) => {
                    shards.check(&name, &[rows, shape.0])?;
                    let mut values = Array1::zeros(shape.0);
                    shards.rows(&name, row..row + 1, numbers_of(&mut values))?;
                    values
                }
                None => shards.vector(&name, shape.0)?,
            });
            known.insert(name);
        }
        all.push((p, projection));
    }
    Ok(all)
}

/// A quantized weight, which is small enough to be kept as it is; that of an expert in halves is
/// restored.
///
/// It is stored out x in whatever the family's own layout.
fn packed<T: Real>(shards: &Shards, place: &Place, shape: (usize, usize)) -> Result<BaseWeight<T>> {
    let (out, input) = shape;
    match place {
        Place::Own(name) => quantized::read(shards, name, shape),
        Place::TwoHalves(names) => {
            let half = |name: &String| {
                Ok(quantized::read(shards, name, (out / 2, input))?.dense().into_owned())
            };
            let halves: Vec<Array2<T>> = names.iter().map(half).collect::<Result<_>>()?;
            let views: Vec<_> = halves.iter().map(|half| half.view()).collect();
            let joined = concatenate(Axis(0), &views);
            joined
                .map(BaseWeight::Dense)
                .map_err(|e| Error::invalid("experts", "unequal halves", e.to_string()))
        }
        Place::Stack(name) => Err(Error::invalid(
            name,
            "quantized",
            "stacks of experts are read in full precision only",
        )),
    }
}

/// The numbers of a vector that was just made.
fn numbers_of<T>(values: &mut Array1<T>) -> &mut [T] {
    match values.as_slice_mut() {
        Some(values) => values,
        None => unreachable!("in one piece"),
    }
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
                add(
                    &mut stacks,
                    name,
                    vec![experts, input, out],
                    weight.t().iter().copied().collect(),
                );
            }
        }
    }
    for (name, (shape, values)) in stacks {
        writer.tensor(&name, &shape, values);
    }
    Ok(())
}
