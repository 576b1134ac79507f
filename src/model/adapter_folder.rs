//! Adapter folders: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! LoRA and DoRA use PEFT's layout, so that PEFT reads what is written here and the reverse
//! (`lora_dropout`, which acts in training only, is ignored). The other methods use the same two
//! files:
//!
//! | `peft_type` | tensors per adapted projection, after `base_model.model.model.layers.N.<path>.` |
//! |---|---|
//! | LORA | `lora_A.weight` r x in, `lora_B.weight` out x r; DoRA also `lora_magnitude_vector` out |
//! | MOSLORA | `lora_A.weight`, `lora_B.weight`, `lora_mixer.weight` r x r |
//! | PACA | `paca_index` r, `paca_columns` out x r (the weight's own values, not divided by the scaling), `paca_scaling` 1 |
//! | S2FT | `s2ft_range` 2 (rows or columns after the co-permutation), `s2ft_slice`; and per layer `s2ft_groups`, `s2ft_channels`: the original index of the head group or channel that stands at each place |
//!
//! PaCA and S2FT read their original values from the base model on loading, so a loaded adapter can
//! be unmerged.

pub use super::adapter_config::AdapterKind;
use super::adapter_config::{AdapterConfig, compose};
use super::adapter_experts::{ExpertPart, expert_stacks, stack_prefix, write_stacks};
use super::adapter_targets::ends_with;
use super::config::ModelConfig;
use super::parameters::{Model, TrainableParts};
use super::projection::Projection;
use super::s2ft::{LayerOrder, side_of};
use crate::adapters::Method;
use crate::adapters::lora::{Lora, LoraSpec};
use crate::adapters::stored::{ReadTensors, Settings, WriteTensors};
use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::{TensorFile, TensorWriter};
use ndarray::{Array2, ArrayView2, s};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub(super) const WEIGHTS: &str = "adapter_model.safetensors";
pub(super) const CONFIG: &str = "adapter_config.json";

/// What PEFT writes before every name.
pub(super) const PREFIX: &str = "base_model.model";

/// A layer's name in an adapter file.
pub(super) fn layer_prefix(config: &ModelConfig, layer: usize) -> String {
    format!("{PREFIX}.{}", config.options.layer(layer))
}

/// A projection's name in an adapter file.
pub(super) fn module_prefix(config: &ModelConfig, layer: usize, p: Projection) -> String {
    format!("{PREFIX}.{}", config.options.module(layer, p))
}

/// Whether a folder holds a plain LoRA adapter.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a configuration that cannot be read.
pub fn is_lora(folder: &Path) -> Result<bool> {
    Ok(AdapterConfig::read(&folder.join(CONFIG))?.kind == AdapterKind::Lora)
}

/// Whether a tensor under the name that a copy of `modules_to_save` has in memory stands in the
/// file under the module's own too: PEFT writes biases so where all biases are trained, with the
/// adapter's name or without it.
pub(crate) fn is_written_twice(file: &TensorFile, name: &str) -> bool {
    name.split_once(".modules_to_save.").is_some_and(|(module, rest)| {
        let inner = rest.split_once('.').map(|(_, inner)| inner);
        [Some(rest), inner]
            .into_iter()
            .flatten()
            .any(|rest| file.contains(&format!("{module}.{rest}")))
    })
}

/// Reads tensors and remembers which were taken.
pub(super) struct Reader<'a> {
    file: &'a TensorFile,
    taken: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a TensorFile) -> Self {
        Self { file, taken: BTreeSet::new() }
    }

    /// Refuses a tensor that nothing took.
    pub(super) fn refuse_leftovers(&self, layers: usize) -> Result<()> {
        match self.file.names().find(|name| !self.taken.contains(*name)) {
            Some(extra) => {
                let found =
                    format!("a tensor that {CONFIG} and the model's {layers} layers leave over");
                Err(self.file.malformed(
                    format!("tensor {extra}"),
                    "only tensors that the adapter uses",
                    found,
                ))
            }
            None => Ok(()),
        }
    }

    /// Whether the file holds a tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        self.file.contains(name)
    }

    /// Whether it holds a tensor of a module, or of something in it, whose name ends so.
    pub(super) fn holds_module(&self, end: &str) -> bool {
        let holds = |name: &str| {
            // The module of a factor stands two parts before the end: `...lm_head.lora_A.weight`.
            let mut part = name;
            while let Some((module, _)) = part.rsplit_once('.') {
                if ends_with(module, end) {
                    return true;
                }
                part = module;
            }
            false
        };
        self.file.names().any(holds)
    }

    /// Takes tensors that mean nothing here.
    pub(super) fn pass(&mut self, meaningless: impl Fn(&TensorFile, &str) -> bool) {
        self.taken.extend(
            self.file.names().filter(|name| meaningless(self.file, name)).map(String::from),
        );
    }

    /// A tensor of any shape.
    pub(super) fn tensor<T: Real>(
        &mut self,
        name: &str,
        reason: &str,
    ) -> Result<(Vec<usize>, Vec<T>)> {
        let found = self.file.tensor::<T>(name, reason)?;
        self.taken.insert(name.to_string());
        Ok(found)
    }

    pub(super) fn wrong(&self, name: &str, expected: &str, found: String) -> Error {
        self.file.malformed(format!("tensor {name}"), expected, found)
    }

    pub(super) fn matrix<T: Real>(
        &mut self,
        name: String,
        expected: (usize, usize),
    ) -> Result<Array2<T>> {
        let array = self.file.matrix::<T>(&name, format!("{CONFIG} asks for it").as_str())?;
        if array.dim() != expected {
            let wanted = format!("shape {expected:?}");
            return Err(self.file.malformed(
                format!("tensor {name}"),
                wanted,
                format!("{:?}", array.dim()),
            ));
        }
        self.taken.insert(name);
        Ok(array)
    }

    pub(super) fn vector<T: Real>(&mut self, name: &str) -> Result<Vec<T>> {
        let values = self.file.vector::<T>(name, format!("{CONFIG} asks for it").as_str())?;
        self.taken.insert(name.to_string());
        Ok(values.to_vec())
    }

    pub(super) fn indices(&mut self, name: String) -> Result<Vec<usize>> {
        let values = self.vector::<f64>(&name)?;
        match values.iter().find(|v| v.fract().abs() > 0.0 || **v < 0.0) {
            Some(bad) => Err(self.file.malformed(
                format!("tensor {name}"),
                "non-negative integers",
                bad.to_string(),
            )),
            None => Ok(values.into_iter().map(|v| v as usize).collect()),
        }
    }
}

/// The tensors of one projection.
struct Projected<'a, 'b> {
    reader: &'a mut Reader<'b>,
    prefix: String,
}

impl Projected<'_, '_> {
    fn name(&self, tensor: &str) -> String {
        format!("{}.{tensor}", self.prefix)
    }

    fn of_length<T: Real>(&mut self, tensor: &str, length: usize) -> Result<Vec<T>> {
        let values = self.reader.vector(&self.name(tensor))?;
        if values.len() == length {
            return Ok(values);
        }
        Err(self.reader.wrong(
            &self.name(tensor),
            &format!("{length} entries"),
            values.len().to_string(),
        ))
    }
}

impl<T: Real> ReadTensors<T> for Projected<'_, '_> {
    fn matrix(&mut self, tensor: &str, shape: (usize, usize)) -> Result<Array2<T>> {
        self.reader.matrix(self.name(tensor), shape)
    }

    fn vector(&mut self, tensor: &str, length: usize) -> Result<Vec<T>> {
        self.of_length(tensor, length)
    }

    fn doubles(&mut self, tensor: &str, length: usize) -> Result<Vec<f64>> {
        self.of_length(tensor, length)
    }

    fn indices(&mut self, tensor: &str) -> Result<Vec<usize>> {
        self.reader.indices(self.name(tensor))
    }

    fn contains(&self, tensor: &str) -> bool {
        self.reader.file.contains(&self.name(tensor))
    }

    fn malformed(&self, tensor: &str, expected: &str, found: String) -> Error {
        self.reader.wrong(&self.name(tensor), expected, found)
    }
}

/// Where the tensors of one projection go.
struct Written<'a> {
    writer: &'a mut TensorWriter,
    prefix: &'a str,
}

impl<T: Real> WriteTensors<T> for Written<'_> {
    fn matrix(&mut self, tensor: &str, values: ArrayView2<T>) {
        self.writer.matrix(&format!("{}.{tensor}", self.prefix), values);
    }

    fn vector(&mut self, tensor: &str, values: &[T]) {
        self.writer.tensor(
            &format!("{}.{tensor}", self.prefix),
            &[values.len()],
            values.iter().copied(),
        );
    }

    fn doubles(&mut self, tensor: &str, values: &[f64]) {
        self.writer.tensor(
            &format!("{}.{tensor}", self.prefix),
            &[values.len()],
            values.iter().copied(),
        );
    }
}

impl<T: Real> Model<T> {
    /// Reads an adapter folder onto this model, whose projections must be frozen where the adapter
    /// acts.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming file and key or tensor: an unknown method or target
    /// module, an option that is not implemented, a wrong shape, an index out of range or repeated,
    /// a tensor that nothing takes; [`Error::MissingTensor`]; [`Error::InvalidParam`] for a
    /// projection that already carries a method.
    pub fn read_adapter(&mut self, folder: &Path) -> Result<AdapterKind> {
        let config = AdapterConfig::read(&folder.join(CONFIG))?;
        let file = TensorFile::open(folder.join(WEIGHTS))?;
        let mut reader = Reader::new(&file);
        let mut adapted = 0;
        if let Some((key, target)) = config.unknown_target(&self.config) {
            let parameters = key == "target_parameters";
            let all = self.config.all_projections();
            let known: BTreeSet<String> = all
                .iter()
                .filter(|p| p.of_experts() == parameters)
                .map(|&p| self.config.options.module_kind(p))
                .collect();
            let known: Vec<String> = known.into_iter().collect();
            let expected = match (parameters, known.is_empty()) {
                (true, true) => {
                    "null: this model has no experts (target other weights by their modules)"
                        .to_string()
                }
                (true, false) => {
                    "parameters of experts: mlp.experts.gate_up_proj, mlp.experts.down_proj"
                        .to_string()
                }
                _ => format!("modules among {}", known.join(", ")),
            };
            return Err(Error::format(&config.path, format!("key {key}"), expected, target));
        }
        for l in 0..self.layers.len() {
            let there = self.config.projections(l).into_iter();
            let wanted: Vec<_> =
                there.filter_map(|p| Some((p, config.spec_of(&self.config, l, p)?))).collect();
            if wanted.is_empty() {
                continue;
            }
            if let Some(&(p, _)) =
                wanted.iter().find(|(p, _)| self.layers[l].projection(*p).is_trainable())
            {
                let name = self.layers[l].projection(p).method.name();
                return Err(Error::invalid(
                    self.config.options.module(l, p),
                    name,
                    "already adapted",
                ));
            }
            if config.kind == AdapterKind::S2ft {
                let prefix = layer_prefix(&self.config, l);
                let (groups, channels) = (
                    reader.indices(format!("{prefix}.s2ft_groups"))?,
                    reader.indices(format!("{prefix}.s2ft_channels"))?,
                );
                let expected = (self.config.num_key_value_heads, self.config.intermediate_size);
                if (groups.len(), channels.len()) != expected {
                    let found = format!("{} and {}", groups.len(), channels.len());
                    let wanted = format!("{} head groups and {} channels", expected.0, expected.1);
                    return Err(file.malformed(format!("orders of layer {l}"), wanted, found));
                }
                self.layers[l].co_permute(&LayerOrder { groups, channels }, &self.config).map_err(
                    |e| {
                        file.malformed(
                            format!("orders of layer {l}"),
                            "every place once",
                            e.to_string(),
                        )
                    },
                )?;
            }
            let stacks = if config.kind == AdapterKind::Lora {
                expert_stacks(&wanted)
            } else {
                BTreeMap::new()
            };
            let mut factors = BTreeMap::new();
            for (part, (spec, experts)) in &stacks {
                let prefix = stack_prefix(&self.config, l, *part, stacks.len());
                let (out, input) = self.config.projection_shape(part.of(0));
                let rows = spec.rank * experts;
                let a = reader.matrix::<T>(format!("{prefix}.lora_A.weight"), (rows, input))?;
                let b = reader.matrix::<T>(format!("{prefix}.lora_B.weight"), (out, rows))?;
                factors.insert(*part, (a, b, *experts));
            }
            for (p, spec) in wanted {
                adapted += 1;
                let stacked = ExpertPart::of_projection(p)
                    .and_then(|(part, expert)| Some((factors.get(&part)?, expert)));
                let Some(((a, b, experts), expert)) = stacked else {
                    self.read_one(&mut reader, &config, l, p, spec)?;
                    continue;
                };
                // PEFT's stacks: A by expert, B with the expert as the fastest index of a column.
                let rows = expert * spec.rank..(expert + 1) * spec.rank;
                let a = a.slice(s![rows, ..]).to_owned();
                let b = b.slice(s![.., expert..; *experts]).to_owned();
                let projection = self.layers[l].projection_mut(p);
                projection.method =
                    Method::Lora(Lora::from_factors(spec, projection.shape(), a, b)?);
            }
        }
        self.read_saved(&mut reader, &config)?;
        adapted += self.read_outside(&mut reader, &config)?;
        if adapted == 0 {
            return Err(Error::format(
                &config.path,
                "key target_modules",
                "modules of this model",
                "no match",
            ));
        }
        reader.refuse_leftovers(self.layers.len())?;
        Ok(config.kind)
    }

    fn read_one(
        &mut self,
        reader: &mut Reader<'_>,
        config: &AdapterConfig,
        l: usize,
        p: Projection,
        spec: LoraSpec,
    ) -> Result<()> {
        let mut from = Projected { reader, prefix: module_prefix(&self.config, l, p) };
        let settings = Settings {
            spec,
            true_derivative: config.true_derivative,
            bias: config.own_bias,
            side: side_of(p),
        };
        let projection = self.layers[l].projection_mut(p);
        projection.method = Method::load(config.kind, &settings, &mut projection.base, &mut from)?;
        Ok(())
    }

    /// Writes the adapters of this model as a folder. Files appear whole or not at all.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if there is no adapter, if methods differ between projections, if
    /// something outside the adapters is trained (then write a whole checkpoint, [`Model::write`]),
    /// or for factors of reordered weights; [`Error::Io`].
    pub fn write_adapter(&self, folder: &Path) -> Result<()> {
        self.write_adapter_like(folder, None)
    }

    /// As [`Model::write_adapter`]; the `adapter_config.json` keeps every key of the one in folder
    /// `like`, and its text to the byte if method, ranks, scalings and targets are the same.
    ///
    /// # Errors
    /// As [`Model::write_adapter`]; [`Error::Io`] and [`Error::Format`] for a `like` that cannot be
    /// read.
    pub fn write_adapter_like(&self, folder: &Path, like: Option<&Path>) -> Result<()> {
        let parts = self.trainable;
        let held = TrainableParts {
            embedding: parts.embedding,
            lm_head: parts.lm_head,
            biases: parts.biases,
            adapted_biases: parts.adapted_biases,
            positions: parts.positions,
            sinks: parts.sinks,
            ..Default::default()
        };
        if parts != held {
            let requirement =
                "an adapter holds modules and biases, not all norms or all biases of experts";
            return Err(Error::invalid("trainable", format!("{parts:?}"), requirement));
        }
        let mut writer = TensorWriter::new();
        writer.metadata("format", "pt");
        let mut kind: Option<AdapterKind> = None;
        let (mut entries, mut true_derivative) = (Vec::new(), false);
        for (l, layer) in self.layers.iter().enumerate() {
            entries.extend(write_stacks(&mut writer, layer, &self.config, l)?);
            kind = kind.or((!entries.is_empty()).then_some(AdapterKind::Lora));
            for (p, projection) in layer.projections() {
                if projection.whole || p.is_expert() && matches!(projection.method, Method::Lora(_))
                {
                    continue;
                }
                let prefix = module_prefix(&self.config, l, p);
                let mut to = Written { writer: &mut writer, prefix: &prefix };
                let written = projection.method.save(&projection.base, &mut to);
                let written = written.map_err(|_| {
                    let requirement = "is a whole weight; write a checkpoint instead";
                    Error::invalid(&prefix, projection.method.name(), requirement)
                })?;
                let Some((found, spec)) = written else { continue };
                if let Method::Dora(dora) = &projection.method {
                    true_derivative |= dora.true_derivative;
                }
                if *kind.get_or_insert(found) != found {
                    let requirement =
                        format!("one adapter folder holds one method; others are {kind:?}");
                    return Err(Error::invalid(prefix, projection.method.name(), requirement));
                }
                if layer.order.is_some() && found != AdapterKind::S2ft {
                    let requirement = "its weights are reordered by S2FT; restore the order first";
                    return Err(Error::invalid(prefix, projection.method.name(), requirement));
                }
                entries.push((l, p, spec));
            }
            if let (Some(order), Some(AdapterKind::S2ft)) = (&layer.order, kind) {
                write_indices(
                    &mut writer,
                    &format!("{}.s2ft_groups", layer_prefix(&self.config, l)),
                    &order.groups,
                );
                write_indices(
                    &mut writer,
                    &format!("{}.s2ft_channels", layer_prefix(&self.config, l)),
                    &order.channels,
                );
            }
        }
        let mut beside = self.write_outside(&mut writer);
        beside.saved.extend(self.write_saved(&mut writer)?);
        let outside = if beside.dora { AdapterKind::Dora } else { AdapterKind::Lora };
        let kind = kind.or((!beside.adapted.is_empty()).then_some(outside));
        let Some(kind) = kind else {
            return Err(Error::invalid("adapter", "none", "no projection carries an adapter"));
        };
        let more = parts != TrainableParts::default()
            || !beside.adapted.is_empty()
            || !beside.saved.is_empty();
        if !kind.is_peft() && more {
            return Err(Error::invalid(
                "trainable",
                format!("{parts:?}"),
                "an adapter of this method holds projections only",
            ));
        }
        if let Some(name) = beside.adapted.keys().next().filter(|_| kind != outside) {
            let requirement = format!("one adapter folder holds one method; others are {kind:?}");
            return Err(Error::invalid(name, format!("{outside:?}"), requirement));
        }
        let like =
            like.map(|folder| AdapterConfig::read_with_text(&folder.join(CONFIG))).transpose()?;
        let text = compose(kind, &entries, &self.config, true_derivative, &beside, like.as_ref());
        writer.write(&folder.join(WEIGHTS))?;
        write_bytes(&folder.join(CONFIG), text.as_bytes())
    }

    /// Folds every adapter into its weight ([`crate::adapters::AdaptedLinear::merge`]).
    ///
    /// # Errors
    /// As there.
    pub fn merge(&mut self) -> Result<()> {
        self.layers
            .iter_mut()
            .try_for_each(|l| l.projections_mut().try_for_each(|(_, p)| p.merge()))
    }

    /// Undoes [`Model::merge`] bit for bit; takes PaCA and S2FT out of effect.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] where a projection is fine-tuned in full.
    pub fn unmerge(&mut self) -> Result<()> {
        self.layers
            .iter_mut()
            .try_for_each(|l| l.projections_mut().try_for_each(|(_, p)| p.unmerge()))
    }
}

pub(super) fn write_factors<T: Real>(
    writer: &mut TensorWriter,
    prefix: &str,
    a: &Array2<T>,
    b: &Array2<T>,
) {
    writer.matrix(&format!("{prefix}.lora_A.weight"), a.view());
    writer.matrix(&format!("{prefix}.lora_B.weight"), b.view());
}

pub(super) fn write_indices(writer: &mut TensorWriter, name: &str, indices: &[usize]) {
    writer.tensor(name, &[indices.len()], indices.iter().map(|&i| i as f64));
}
