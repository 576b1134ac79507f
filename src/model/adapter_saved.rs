//! Modules of layers, norms and learned positions that an adapter trains whole: PEFT's
//! `modules_to_save`. Embedding and output projection are read with their updates.

use super::adapter_config::AdapterConfig;
use super::adapter_experts::ExpertPart;
use super::adapter_folder::{CONFIG, PREFIX, Reader, is_written_twice};
use super::config::ModelConfig;
use super::layer::Layer;
use super::names::{HEAD_IN_MEMORY, Outside};
use super::norm::NormOn;
use super::options::{Norm, Options};
use super::parameters::Model;
use super::projection::Projection;
use crate::adapters::{AdaptedLinear, BaseWeight, Method};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::Cpu;
use crate::tensor_file::TensorWriter;
use ndarray::{Array1, Array2};
use std::collections::BTreeMap;

/// The module that holds a projection's parameters in memory; experts share one.
pub(super) fn module_of(options: &Options, layer: usize, p: Projection) -> String {
    if p.is_expert() {
        format!("{}.mlp.experts", options.layer(layer))
    } else {
        options.module(layer, p)
    }
}

/// The module that holds a layer's sinks.
fn of_sinks(options: &Options, layer: usize) -> String {
    options.sinks_name(layer).trim_end_matches(".sinks").to_string()
}

fn norm_module(options: &Options, layer: usize, norm: Norm) -> String {
    format!("{}.{}", options.layer(layer), options.norm_name(norm).unwrap_or(""))
}

/// Every module that holds parameters, by its name in memory.
pub(super) fn all_modules(config: &ModelConfig) -> Vec<String> {
    let options = &config.options;
    let outside = [Outside::Embedding, Outside::Positions, Outside::FinalNorm]
        .map(|m| options.outside(m).to_string());
    let mut all: Vec<String> = outside.into_iter().filter(|name| !name.is_empty()).collect();
    all.push(HEAD_IN_MEMORY.into());
    for l in 0..config.num_hidden_layers {
        all.extend(config.projections(l).into_iter().map(|p| module_of(options, l, p)));
        all.extend(
            Norm::ALL
                .into_iter()
                .filter(|&n| options.norm_name(n).is_some())
                .map(|n| norm_module(options, l, n)),
        );
    }
    all.dedup();
    all
}

fn input_first(options: &Options) -> bool {
    options.experts.as_ref().is_some_and(|experts| experts.input_first)
}

/// Weights and biases of a layer's experts, each set as it stands in memory.
struct Stacks<T> {
    weights: BTreeMap<ExpertPart, Vec<T>>,
    biases: BTreeMap<ExpertPart, Vec<T>>,
}

fn stack_names(options: &Options, layer: usize, part: ExpertPart) -> [String; 2] {
    let own = if part == ExpertPart::GateUp { "gate_up_proj" } else { "down_proj" };
    let name = format!("{PREFIX}.{}.mlp.experts.{own}", options.layer(layer));
    [name.clone(), format!("{name}_bias")]
}

impl<T: Real> Stacks<T> {
    fn read(
        reader: &mut Reader<'_>,
        config: &ModelConfig,
        layer: usize,
        experts: usize,
    ) -> Result<Self> {
        let mut stacks = Self { weights: BTreeMap::new(), biases: BTreeMap::new() };
        for part in [ExpertPart::GateUp, ExpertPart::Down] {
            let (out, input) = config.projection_shape(part.of(0));
            let [weight, bias] = stack_names(&config.options, layer, part);
            let shape = if input_first(&config.options) {
                [experts, input, out]
            } else {
                [experts, out, input]
            };
            stacks.weights.insert(part, reader.stack(&weight, &shape)?);
            if config.options.has_bias(part.of(0)) {
                stacks.biases.insert(part, reader.stack(&bias, &[experts, out])?);
            }
        }
        Ok(stacks)
    }

    /// One expert's weight, out x in, and bias.
    fn of(&self, config: &ModelConfig, p: Projection) -> Option<(Array2<T>, Option<Array1<T>>)> {
        let (part, expert) = ExpertPart::of_projection(p)?;
        let (out, input) = config.projection_shape(p);
        let own = self.weights.get(&part)?.chunks_exact(out * input).nth(expert)?.to_vec();
        let weight = if input_first(&config.options) {
            Array2::from_shape_vec((input, out), own)
                .ok()?
                .reversed_axes()
                .as_standard_layout()
                .into_owned()
        } else {
            Array2::from_shape_vec((out, input), own).ok()?
        };
        let bias = self.biases.get(&part).and_then(|all| all.chunks_exact(out).nth(expert));
        Some((weight, bias.map(|bias| bias.to_vec().into())))
    }
}

impl<T: Real> Model<T> {
    /// Puts the modules that an adapter trains whole in place of the base's.
    pub(super) fn read_saved(
        &mut self,
        reader: &mut Reader<'_>,
        config: &AdapterConfig,
    ) -> Result<()> {
        if config.saved.is_empty() {
            return Ok(());
        }
        let own = self.config.clone();
        let options = &own.options;
        let refuse = |expected: &str, found: &str| {
            Error::format(&config.path, "key modules_to_save", expected, found)
        };
        let all = all_modules(&own);
        // A name that no module has trains nothing; PEFT's files hold one only where it does.
        let unknown = |saved: &&String| !all.iter().any(|module| config.saves_by(saved, module));
        if let Some(other) =
            config.saved.iter().filter(unknown).find(|saved| reader.holds_module(saved))
        {
            return Err(refuse("modules of this model (it has no such one)", other));
        }
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let mut stacks = None;
            for (&p, projection) in &mut layer.projections {
                let module = module_of(options, l, p);
                if !config.saves(&module) {
                    continue;
                }
                if projection.is_trainable() {
                    let found = format!("{module}, which carries {} too", projection.method.name());
                    return Err(refuse("modules that no adapter acts on", &found));
                }
                let (weight, bias) = if p.is_expert() {
                    let experts = options.experts_of(l).map_or(0, |experts| experts.count);
                    let read = match stacks.take() {
                        Some(read) => read,
                        None => Stacks::<T>::read(reader, &own, l, experts)?,
                    };
                    let found =
                        read.of(&own, p).ok_or_else(|| refuse("experts of this model", &module))?;
                    stacks = Some(read);
                    found
                } else {
                    let (out, input) = projection.shape();
                    let name = format!("{PREFIX}.{module}.weight");
                    let weight = if options.transposed {
                        reader
                            .matrix::<T>(name, (input, out))?
                            .reversed_axes()
                            .as_standard_layout()
                            .into_owned()
                    } else {
                        reader.matrix(name, (out, input))?
                    };
                    let bias = projection
                        .bias
                        .as_ref()
                        .map(|_| reader.numbers(&format!("{PREFIX}.{module}.bias"), out));
                    (weight, bias.transpose()?)
                };
                projection.base = BaseWeight::Dense(weight);
                projection.bias = bias;
                projection.method = Method::Full;
                projection.whole = true;
            }
            for (norm, vectors) in Norm::ALL.into_iter().zip(&mut layer.norms) {
                if let Some(vectors) = vectors {
                    read_norm(reader, config, &norm_module(options, l, norm), vectors)?;
                }
            }
        }
        read_norm(reader, config, options.outside(Outside::FinalNorm), &mut self.final_norm)?;
        let positions = options.outside(Outside::Positions);
        if let (Some(table), true) = (&mut self.positions, config.saves(positions)) {
            *table = reader.matrix(format!("{PREFIX}.{positions}.weight"), table.dim())?;
            self.trainable.positions = true;
        }
        let layers = 0..self.layers.len();
        let with_sinks = layers
            .clone()
            .filter(|&l| options.sinks && config.saves(&of_sinks(options, l)))
            .count();
        if with_sinks > 0 {
            if with_sinks < self.layers.len() {
                let found = format!("{with_sinks} of {} layers' attention", self.layers.len());
                return Err(refuse("attention with sinks in every layer or in none", &found));
            }
            for (l, layer) in self.layers.iter_mut().enumerate() {
                if let Some(sinks) = &mut layer.sinks {
                    *sinks = reader
                        .numbers(&format!("{PREFIX}.{}", options.sinks_name(l)), sinks.len())?;
                }
            }
            self.trainable.sinks = true;
        }
        // Where biases are trained too, PEFT writes those of the modules that the copies stand for.
        reader
            .pass(|file, name| name.contains(".original_module.") || is_written_twice(file, name));
        Ok(())
    }

    /// Writes what is trained whole, embedding and output projection apart; the modules' names.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a weight that is trained without its bias, or experts of which
    /// some are.
    pub(super) fn write_saved(&self, writer: &mut TensorWriter) -> Result<Vec<String>> {
        let (options, mut saved) = (&self.config.options, Vec::new());
        for (l, layer) in self.layers.iter().enumerate() {
            for (p, projection) in layer.projections().filter(|(_, projection)| projection.whole) {
                let module = module_of(options, l, p);
                if p.is_expert() {
                    if saved.last() != Some(&module) {
                        self.write_experts(writer, layer, l)?;
                        saved.push(module);
                    }
                    continue;
                }
                let weight = projection.base.read()?;
                let turned = if options.transposed { weight.t() } else { weight.view() };
                writer.matrix(&format!("{PREFIX}.{module}.weight"), turned);
                if let Some(bias) = &projection.bias {
                    write_vector(writer, &format!("{module}.bias"), bias);
                }
                saved.push(module);
            }
            for norm in Norm::ALL {
                let whole = layer.norm(norm).filter(|norm| norm.whole);
                saved.extend(
                    whole.map(|vectors| write_norm(writer, norm_module(options, l, norm), vectors)),
                );
            }
            if let Some(sinks) = layer.sinks.as_ref().filter(|_| self.trainable.sinks) {
                // Sinks are a parameter of attention itself: with them all of it is saved.
                let attention = of_sinks(options, l);
                let inside = |name: &String| name.starts_with(&attention);
                let held = all_modules(&self.config)
                    .into_iter()
                    .filter(inside)
                    .all(|name| saved.contains(&name));
                if !held {
                    let requirement = "trained beside an adapter, all of the attention must be \
                                       (PEFT saves whole modules)";
                    return Err(Error::invalid(options.sinks_name(l), "trained", requirement));
                }
                write_vector(writer, &options.sinks_name(l), sinks);
                saved.push(attention);
            }
        }
        let last = Some(&self.final_norm).filter(|norm| norm.whole);
        saved.extend(
            last.map(|norm| write_norm(writer, options.outside(Outside::FinalNorm).into(), norm)),
        );
        if let Some(table) = self.positions.as_ref().filter(|_| self.trainable.positions) {
            let module = options.outside(Outside::Positions);
            writer.matrix(&format!("{PREFIX}.{module}.weight"), table.view());
            saved.push(module.into());
        }
        Ok(saved)
    }

    fn write_experts(&self, writer: &mut TensorWriter, layer: &Layer<T>, l: usize) -> Result<()> {
        let experts: Vec<(Projection, &AdaptedLinear<T>)> =
            layer.projections().filter(|(p, _)| p.is_expert()).collect();
        if let Some((p, of)) = experts.iter().find(|(_, projection)| !projection.whole) {
            let requirement =
                "one tensor holds all experts of a layer: all are trained whole or none";
            return Err(Error::invalid(
                self.config.options.module(l, *p),
                of.method.name(),
                requirement,
            ));
        }
        let turned = input_first(&self.config.options);
        for part in [ExpertPart::GateUp, ExpertPart::Down] {
            let [name, bias_name] = stack_names(&self.config.options, l, part);
            let (mut weights, mut biases, mut shape) = (Vec::new(), Vec::new(), (0, 0));
            let of_part = experts
                .iter()
                .filter(|(p, _)| ExpertPart::of_projection(*p).is_some_and(|(own, _)| own == part));
            for (_, projection) in of_part {
                let weight = projection.base.read()?;
                let weight = if turned { weight.t() } else { weight.view() };
                shape = weight.dim();
                weights.extend(weight.iter().copied());
                biases.extend(projection.bias.iter().flatten().copied());
            }
            let count = experts.len() / 2;
            writer.tensor(&name, &[count, shape.0, shape.1], weights);
            if !biases.is_empty() {
                writer.tensor(&bias_name, &[count, biases.len() / count], biases);
            }
        }
        Ok(())
    }
}

fn read_norm<T: Real>(
    reader: &mut Reader<'_>,
    config: &AdapterConfig,
    module: &str,
    norm: &mut NormOn<Cpu<T>>,
) -> Result<()> {
    if !config.saves(module) {
        return Ok(());
    }
    norm.gain = reader.numbers(&format!("{PREFIX}.{module}.weight"), norm.gain.len())?;
    if let Some(bias) = &mut norm.bias {
        *bias = reader.numbers(&format!("{PREFIX}.{module}.bias"), bias.len())?;
    }
    norm.whole = true;
    Ok(())
}

fn write_norm<T: Real>(writer: &mut TensorWriter, module: String, norm: &NormOn<Cpu<T>>) -> String {
    write_vector(writer, &format!("{module}.weight"), &norm.gain);
    if let Some(bias) = &norm.bias {
        write_vector(writer, &format!("{module}.bias"), bias);
    }
    module
}

fn write_vector<T: Real>(writer: &mut TensorWriter, name: &str, values: &Array1<T>) {
    writer.tensor(&format!("{PREFIX}.{name}"), &[values.len()], values.iter().copied());
}

impl Reader<'_> {
    /// A vector of a length.
    pub(super) fn numbers<T: Real>(&mut self, name: &str, length: usize) -> Result<Array1<T>> {
        let values = self.vector::<T>(name)?;
        if values.len() == length {
            return Ok(values.into());
        }
        Err(self.wrong(name, &format!("{length} entries"), values.len().to_string()))
    }

    /// A tensor of any number of axes.
    fn stack<T: Real>(&mut self, name: &str, expected: &[usize]) -> Result<Vec<T>> {
        let (shape, values) = self.tensor::<T>(name, &format!("{CONFIG} asks for it"))?;
        if shape == expected {
            return Ok(values);
        }
        Err(self.wrong(name, &format!("shape {expected:?}"), format!("{shape:?}")))
    }
}
