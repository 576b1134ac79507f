//! A dump read into memory: the reference model with the trainer's weights, the batch, and what the
//! trainer computed.

use super::diagnosis::budget::Effort;
use super::manifest::{Loss, Manifest, OptimizerRecord, Quantized};
use super::objective::{Objective, Upstream};
use super::own_forward::OwnForward;
use super::precision::Precision;
use super::ranks::Distribution;
use super::recorded_batch::{DOCUMENTS, in_vocabulary, row_lengths, token_weights};
use super::reference::{Restored, Rounding};
use super::routing::Tie;
use super::stacked::{names_of, placed};
use crate::adapters::Method;
use crate::error::{Error, Result};
use crate::model::adapter_folder::{AdapterKind, is_written_twice};
use crate::model::checkpoint::PackedPlaces;
use crate::model::options::Norm;
use crate::model::{Batch, Model, Outside, Projection};
use crate::tensor_file::TensorFile;
use ndarray::Array2;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use super::recorded_batch::read_batch;

/// A tensor of the trainer, as it is in the file; entries may be NaN.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Values; a vector is one row, leading axes of a hidden state or of logits are folded into
    /// rows.
    pub values: Array2<f64>,
    /// Format in the file.
    pub precision: Precision,
    /// Shape in the file.
    pub shape: Vec<usize>,
}

/// What the trainer computed.
#[derive(Debug, Clone, Default)]
pub struct Trainer {
    /// The loss.
    pub loss: Option<f64>,
    /// Logits, `(B T) x V`.
    pub logits: Option<Observed>,
    /// Output of each layer, `(B T) x D`.
    pub hidden: BTreeMap<usize, Observed>,
    /// Gradients by the reference model's names, divided by the loss scale.
    pub gradients: BTreeMap<String, Observed>,
    /// Gradients as the optimizer saw them, where they differ (clipping, unscaling).
    pub applied: BTreeMap<String, Observed>,
    /// Parameters after the step.
    pub after: BTreeMap<String, Observed>,
    /// Parameters before the step before.
    pub previous: BTreeMap<String, Observed>,
    /// First moments, or momentum, before the step.
    pub first: BTreeMap<String, Observed>,
    /// Second moments before the step.
    pub second: BTreeMap<String, Observed>,
    /// Dropout of adapters' inputs by (layer, projection), `(B T) x in`: zeros, and what is left
    /// multiplied.
    pub masks: BTreeMap<(usize, Projection), Array2<f64>>,
    /// The gradient that the loss left.
    pub upstream: Option<Upstream>,
    /// What the dump says about things that its tensors do not hold.
    pub setting: Setting,
}

/// What configurations and names say about a step beside its tensors.
#[derive(Debug, Clone, Default)]
pub struct Setting {
    /// Dropout that the configurations declare, as `key value`; whether it acted they do not say.
    pub dropout: Vec<String>,
    /// Tensors of the adapter that the trainer does not train.
    pub frozen: Vec<String>,
    /// Name of the adapter that is trained, where it is not `default`.
    pub adapter_name: Option<String>,
    /// Whether positions start again inside a row: several documents in it.
    pub packed: bool,
    /// Whether the dump says by number which document each token belongs to.
    pub documents_given: bool,
    /// Backward against differences of the trainer's own forward.
    pub own_forward: Option<OwnForward>,
    /// Tokens of each row before the recorder's own padding, where no mask says so: rows of packed
    /// documents.
    pub row_lengths: Option<Vec<usize>>,
    /// Whether the step is judged from the recorded gradient of the loss on, whatever the loss is.
    pub from_upstream: bool,
    /// The recorded loss was maximized: loss and gradients are minus the recorded ones.
    pub maximized: bool,
}

/// Everything that validation needs.
#[derive(Debug, Clone)]
pub struct Case {
    /// Name in reports.
    pub name: String,
    /// The model with its adapter; what the trainer trains is trainable.
    pub model: Model<f64>,
    /// Kind of the adapter.
    pub kind: Option<AdapterKind>,
    /// The batch of the whole step.
    pub batch: Batch,
    /// Loss settings.
    pub loss: Loss,
    /// The declared loss.
    pub objective: Objective,
    /// Optimizer settings.
    pub optimizer: Option<OptimizerRecord>,
    /// Names of trained tensors.
    pub trained: Vec<String>,
    /// Where the trainer rounds.
    pub rounding: Rounding,
    /// Weights that the checkpoint holds quantized, by place; the model has them restored.
    pub quantized: PackedPlaces<f64>,
    /// The trainer's results.
    pub trainer: Trainer,
    /// Which of two experts a token goes to, where rounding alone decides.
    pub ties: Vec<Tie>,
    /// The layers whose gradients are judged, if not all are ([`Case::only_layers`]).
    pub layers: Option<std::ops::Range<usize>>,
    /// Input of the first of them, as recorded.
    pub input: Option<Array2<f64>>,
    /// How much a search for faults may cost.
    pub effort: Effort,
    /// Whether backward runs each layer's forward again instead of keeping its activations.
    pub recompute: bool,
    /// Whether logits and hidden states alone are judged ([`Case::only_rows`]).
    pub forward_only: bool,
    /// Whether faults below every tolerance are looked for; by the size of the step when absent.
    pub faint: Option<bool>,
    /// How several processes divided the step, if they did.
    pub distribution: Option<Arc<Distribution>>,
}

/// Where the parts of a dump are.
#[derive(Debug, Clone, PartialEq)]
pub struct DumpPaths {
    /// Folder of the base model.
    pub model: PathBuf,
    /// Folder of the adapter.
    pub adapter: Option<PathBuf>,
    /// File of the step's tensors.
    pub step: PathBuf,
}

/// Settings of a reference file that has no manifest.
#[derive(Debug, Clone, Default)]
pub struct PlainSettings {
    /// Number format of the trainer; that of its gradients when absent.
    pub dtype: Option<Precision>,
}

impl DumpPaths {
    /// Opens a dump folder: its manifest and where the rest is.
    ///
    /// # Errors
    /// As [`Manifest::read`].
    pub fn of_folder(folder: &Path) -> Result<(Self, Manifest)> {
        let manifest = Manifest::read(&folder.join("manifest.json"))?;
        let place = |path: &String| folder.join(path);
        let paths = Self {
            model: place(&manifest.model),
            adapter: manifest.adapter.as_ref().map(place),
            step: folder.join("step.safetensors"),
        };
        Ok((paths, manifest))
    }
}

impl Case {
    /// Reads a dump.
    ///
    /// # Errors
    /// Those of the model and adapter folders and of the tensor file; [`Error::Format`] for inputs
    /// of a wrong shape.
    pub fn read(
        name: &str,
        paths: &DumpPaths,
        manifest: Option<&Manifest>,
        plain: &PlainSettings,
    ) -> Result<Self> {
        Self::read_or_open(name, paths, manifest, plain, false)
    }

    /// As [`Case::read`], with the model's weights left on the disk ([`Model::open`]).
    ///
    /// # Errors
    /// As [`Case::read`].
    pub fn open(
        name: &str,
        paths: &DumpPaths,
        manifest: Option<&Manifest>,
        plain: &PlainSettings,
    ) -> Result<Self> {
        Self::read_or_open(name, paths, manifest, plain, true)
    }

    fn read_or_open(
        name: &str,
        paths: &DumpPaths,
        manifest: Option<&Manifest>,
        plain: &PlainSettings,
        open: bool,
    ) -> Result<Self> {
        let file = TensorFile::open_on_disk(&paths.step)?;
        if let Some(parallel) = manifest.and_then(|m| m.parallel.as_ref()) {
            let found = format!("the part of rank {} of {}", parallel.rank, parallel.world_size);
            return Err(file.malformed(
                "step",
                "a whole step: validate the folder above, with all ranks",
                found,
            ));
        }
        refuse_unsupported(paths)?;
        let mut model =
            if open { Model::<f64>::open(&paths.model)? } else { Model::read(&paths.model)? };
        let restored = manifest
            .and_then(|m| m.compute.quantized.as_ref())
            .map(Quantized::restored)
            .transpose()?;
        // Before an adapter is read: some are made of the weight.
        let quantized = model.unpack_in(restored.map_or(Precision::F32, |r| r.forward), open);
        let kind = match &paths.adapter {
            Some(folder) => Some(model.read_adapter(folder)?),
            None => None,
        };
        let batch = read_batch(&file)?;
        in_vocabulary(&file, &batch, model.config.vocab_size)?;
        let loss = manifest.map(|m| m.loss.clone()).unwrap_or_default();
        let rows: usize = loss.micro_batch_rows.iter().sum();
        if !loss.micro_batch_rows.is_empty() && rows != batch.input_ids.nrows() {
            let expected = format!("{rows} rows, the sum of micro_batch_rows");
            return Err(file.malformed(
                "tensor input_ids",
                expected,
                batch.input_ids.nrows().to_string(),
            ));
        }
        let objective = Objective {
            label_smoothing: loss.label_smoothing,
            z_loss: loss.z_loss,
            weights: token_weights(&file, batch.labels.dim())?,
        };
        let mut optimizer = manifest.and_then(|m| m.optimizer.clone());
        // A loss that is maximized is minus the reference's: from here on it is the one that falls.
        let negated = optimizer.as_ref().is_some_and(OptimizerRecord::maximizes)
            && recorded_loss(&file)? < Some(0.0);
        if let Some(record) = optimizer.as_mut().filter(|_| negated) {
            record.groups.iter_mut().for_each(|group| group.maximize = false);
        }
        let sign = if negated { -1.0 } else { 1.0 };
        let mut trainer = read_trainer(&file, (sign, loss.scale), &model, batch.tokens())?;
        let of_adapter: Vec<String> = match kind {
            Some(_) => model.trainable_names(),
            None => Vec::new(),
        };
        let named = manifest.and_then(|m| m.trained.as_ref());
        let trained: Vec<String> = match named {
            Some(names) => names.iter().flat_map(|n| names_of(n, &model)).collect(),
            None if kind.is_some() => model.trainable_names(),
            None => trainer.gradients.keys().cloned().collect(),
        };
        train_these(&mut model, &trained, &paths.step)?;
        model.own_trained_tables()?;
        model.share_frozen();
        let known: Vec<String> = model.trainable_names();
        let trained: Vec<String> =
            known.into_iter().filter(|name| trained.contains(name)).collect();
        let mut rounding = rounding(manifest, &trainer, plain);
        // Without a word the products are those of the weights' own format.
        rounding.quantized = (!quantized.is_empty()).then(|| {
            let (compute, whole) = (rounding.products, Precision::F32);
            restored.unwrap_or(Restored {
                compute,
                forward: whole,
                backward: whole.coarser(compute),
            })
        });
        trainer.setting = Setting {
            dropout: declared_dropout(paths)
                .into_iter()
                .filter(|what| trainer.masks.is_empty() || !what.starts_with("lora_dropout"))
                .collect(),
            frozen: of_adapter.into_iter().filter(|name| !trained.contains(name)).collect(),
            adapter_name: named.and_then(|names| names.iter().find_map(|n| adapter_name(n))),
            packed: starts_again(&batch) && batch.documents.is_none(),
            documents_given: file.contains(DOCUMENTS),
            own_forward: manifest.and_then(|m| m.check.clone()),
            row_lengths: row_lengths(&file, batch.input_ids.dim())?,
            from_upstream: false,
            maximized: negated,
        };
        let effort = Effort::of(&model.config, batch.tokens());
        Ok(Self {
            name: name.to_string(),
            model,
            kind,
            batch,
            loss,
            objective,
            optimizer,
            trained,
            rounding,
            quantized,
            trainer,
            ties: Vec::new(),
            layers: None,
            input: None,
            effort,
            recompute: false,
            forward_only: false,
            faint: None,
            distribution: None,
        })
    }

    /// Whether the dump says what the loss is, so that another one is wrong.
    pub(super) fn declares_loss(&self) -> bool {
        let own = self.loss.kind.as_deref() == Some("cross_entropy");
        own || self.loss.divisor.is_some() || !self.objective.is_plain()
    }

    /// Rows of each micro-batch, as ranges of the batch.
    pub fn micro_batches(&self) -> Vec<std::ops::Range<usize>> {
        let rows = self.batch.input_ids.nrows();
        if self.loss.micro_batch_rows.is_empty() {
            return std::iter::once(0..rows).collect();
        }
        let mut start = 0;
        let next = |&n: &usize| {
            start += n;
            start - n..start
        };
        self.loss.micro_batch_rows.iter().map(next).collect()
    }
}

/// Refuses in words what the reference cannot imitate and the tensors' names betray.
fn refuse_unsupported(paths: &DumpPaths) -> Result<()> {
    let alone = |file: &TensorFile, name: &str| {
        name.contains(".modules_to_save.") && !is_written_twice(file, name)
    };
    let copies =
        |file: &TensorFile| file.names().find(|name| alone(file, name)).map(str::to_string);
    let refuse = |file: &TensorFile, name: String| {
        let expected = "modules under their own names: copies of modules_to_save are not supported \
                        here (save_pretrained and the recorder write them as the modules)";
        Err(file.malformed(
            format!("tensor {name}"),
            expected,
            "a copy that modules_to_save trains",
        ))
    };
    let weights = paths.model.join("model.safetensors");
    if weights.exists() {
        let file = TensorFile::open_on_disk(&weights)?;
        if let Some(name) = copies(&file) {
            return refuse(&file, name);
        }
    }
    let Some(adapter) =
        paths.adapter.as_ref().map(|a| a.join("adapter_model.safetensors")).filter(|a| a.exists())
    else {
        return Ok(());
    };
    let file = TensorFile::open(&adapter)?;
    if let Some(name) = copies(&file) {
        return refuse(&file, name);
    }
    let other =
        file.names().find_map(|name| adapter_name(name).map(|other| (name.to_string(), other)));
    if let Some((name, other)) = other {
        let expected = "tensors of one adapter; several adapters in one model are not supported: \
                        dump with the trained one alone (delete_adapter for the inactive ones)";
        return Err(file.malformed(
            format!("tensor {name}"),
            expected,
            format!("a second adapter, `{other}`"),
        ));
    }
    Ok(())
}

/// The adapter's own name in a tensor's name, where it is not `default`: `other` in
/// `...lora_A.other.weight`.
fn adapter_name(name: &str) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    let at = parts
        .iter()
        .position(|p| ["lora_A", "lora_B", "lora_mixer", "lora_magnitude_vector"].contains(p))?;
    let next = parts.get(at + 1)?;
    (!["weight", "bias", "default"].contains(next)).then(|| (*next).to_string())
}

/// Settings of the configurations that switch some dropout on.
fn declared_dropout(paths: &DumpPaths) -> Vec<String> {
    let files = [
        Some(paths.model.join("config.json")),
        paths.adapter.as_ref().map(|a| a.join("adapter_config.json")),
    ];
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(path).ok()?;
        serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&text).ok()
    };
    let on = |(key, value): (String, serde_json::Value)| {
        let rate = value.as_f64().filter(|rate| *rate > 0.0)?;
        // Those of heads for other tasks never act on a language model.
        let elsewhere = key.starts_with("classifier_") || key.starts_with("summary_");
        (key.contains("drop") && !elsewhere).then(|| format!("{key} {rate}"))
    };
    files.into_iter().flatten().filter_map(read).flatten().filter_map(on).collect()
}

/// Whether positions of neighbouring tokens that are not padding fail to rise by one.
fn starts_again(batch: &Batch) -> bool {
    let Some(positions) = &batch.position_ids else { return false };
    let real = |b: usize, t: usize| batch.attention_mask.as_ref().is_none_or(|m| m[[b, t]]);
    let (rows, length) = positions.dim();
    (0..rows).any(|b| {
        (1..length).any(|t| {
            real(b, t - 1)
                && real(b, t)
                && positions[[b, t]] != positions[[b, t - 1]].wrapping_add(1)
        })
    })
}

fn rounding(manifest: Option<&Manifest>, trainer: &Trainer, plain: &PlainSettings) -> Rounding {
    let parse = |name: &Option<String>| name.as_deref().and_then(|n| Precision::parse(n).ok());
    let stored = trainer.gradients.values().map(|g| g.precision).reduce(Precision::coarser);
    let weights = manifest.and_then(|m| parse(&m.compute.weights));
    let weights = plain.dtype.or(weights).or(stored).unwrap_or(Precision::F32);
    let autocast = manifest.and_then(|m| parse(&m.compute.autocast));
    let internals = manifest.and_then(|m| parse(&m.compute.internals)).unwrap_or(weights);
    let products = autocast.unwrap_or(weights);
    Rounding { stream: weights, products, autocast: autocast.is_some(), internals, quantized: None }
}

/// Makes trainable what the trainer trains outside the adapter.
fn train_these(model: &mut Model<f64>, trained: &[String], path: &Path) -> Result<()> {
    let options = model.config.options.clone();
    let outside = |module: Outside, tensor: &str| options.outside_tensor(module, tensor);
    let norm = |tensor: &str, name: &str| {
        let mut all = (0..model.layers.len())
            .flat_map(|l| Norm::ALL.map(|norm| options.norm_tensor(l, norm, tensor)));
        name == outside(Outside::FinalNorm, tensor) || all.any(|own| own == name)
    };
    let mut parts = model.trainable;
    let mut whole = Vec::new();
    // What the adapter trains already is.
    let already: BTreeSet<String> = model.trainable_names().into_iter().collect();
    for name in trained.iter().filter(|name| !already.contains(*name)) {
        let projection = |tensor: &str| {
            let module = name.strip_suffix(tensor)?;
            let mut all = model
                .layers
                .iter()
                .enumerate()
                .flat_map(|(l, layer)| layer.projections().map(move |(p, _)| (l, p)));
            all.find(|&(l, p)| options.module(l, p) == module)
        };
        if *name == outside(Outside::Embedding, "weight") {
            parts.embedding = true;
        } else if *name == outside(Outside::Positions, "weight") {
            parts.positions = true;
        } else if *name == outside(Outside::Head, "weight") {
            parts.lm_head = true;
        } else if norm("weight", name) {
            parts.norms = true;
        } else if projection(".bias").is_some_and(|(_, p)| p.is_expert()) {
            parts.expert_biases = true;
        } else if norm("bias", name) || projection(".bias").is_some() {
            parts.biases = true;
        } else if (0..model.layers.len()).any(|l| options.sinks_name(l) == *name) {
            parts.sinks = true;
        } else if let Some(place) = projection(".weight") {
            whole.push((place, name));
        }
    }
    model.trainable = parts;
    for ((layer, p), name) in whole {
        let projection = model.layers[layer].projection_mut(p);
        if projection.is_trainable() {
            let found = format!("{name} beside an adapter of {}", projection.method.name());
            return Err(Error::format(
                path,
                "trained parameters",
                "one method per projection",
                found,
            ));
        }
        projection.method = Method::Full;
    }
    Ok(())
}

/// A tensor with its leading axes folded into rows, multiplied by `factor`.
pub(super) fn observed(file: &TensorFile, name: &str, factor: f64) -> Result<Observed> {
    let (shape, mut values) = file.raw_tensor::<f64>(name, "listed in the file")?;
    let columns = shape.last().copied().unwrap_or(1);
    let rows = values.len().checked_div(columns).unwrap_or(0);
    let precision = Precision::parse(&file.dtype(name).unwrap_or_default()).map_err(|_| {
        file.malformed(format!("tensor {name}"), "a floating-point tensor", "integers")
    })?;
    if factor.to_bits() != 1f64.to_bits() {
        values.iter_mut().for_each(|x| *x *= factor);
    }
    let values = Array2::from_shape_vec((rows, columns), values).map_err(|e| {
        file.malformed(format!("tensor {name}"), "data that fill its shape", e.to_string())
    })?;
    Ok(Observed { values, precision, shape })
}

/// The projection of a module such as `transformer.h.0.mlp.c_proj`, by its last name where that
/// stands for one.
fn projection_named(model: &Model<f64>, module: &str) -> Option<(usize, Projection)> {
    let (layer, kind, _) = super::names::place_of(&format!("{module}.mask"));
    let (layer, options) = (layer?, &model.config.options);
    let all = model.layers.get(layer)?.projections().map(|(p, _)| p);
    let named: Vec<Projection> = all.filter(|&p| options.module_kind(p) == kind).collect();
    let whole = named.iter().copied().find(|&p| options.module(layer, p) == module);
    whole.or_else(|| <[Projection; 1]>::try_from(named).ok().map(|[p]| p)).map(|p| (layer, p))
}

fn recorded_loss(file: &TensorFile) -> Result<Option<f64>> {
    if !file.contains("loss") {
        return Ok(None);
    }
    Ok(file.raw_tensor::<f64>("loss", "the loss")?.1.first().copied())
}

fn read_trainer(
    file: &TensorFile,
    (sign, scale): (f64, f64),
    model: &Model<f64>,
    tokens: usize,
) -> Result<Trainer> {
    let config = &model.config;
    let mut trainer =
        Trainer { loss: recorded_loss(file)?.map(|loss| sign * loss), ..Trainer::default() };
    for name in file.names() {
        let (group, raw) = match name.split_once('.') {
            Some((group, raw)) => (group, raw),
            None => match name {
                "dlogits" | "dfinal" => {
                    let values = observed(file, name, sign / scale)?.values;
                    let (rows, width) = values.dim();
                    let known =
                        if name == "dlogits" { config.vocab_size } else { config.hidden_size };
                    if rows != tokens || width != known {
                        let expected = format!("{tokens} rows of {known}");
                        return Err(file.malformed(
                            format!("tensor {name}"),
                            expected,
                            format!("{rows} rows of {width}"),
                        ));
                    }
                    if name == "dlogits" {
                        trainer.upstream = Some(Upstream::Logits(values));
                    } else if trainer.upstream.is_none() {
                        trainer.upstream = Some(Upstream::FinalNorm(values));
                    }
                    continue;
                }
                "logits" => {
                    trainer.logits = Some(observed(file, name, 1.0)?);
                    continue;
                }
                _ => continue,
            },
        };
        let factor = match group {
            "grad" => sign / scale,
            "applied" => sign,
            _ => 1.0,
        };
        let target = match group {
            "grad" => &mut trainer.gradients,
            "applied" => &mut trainer.applied,
            "after" => &mut trainer.after,
            "previous" => &mut trainer.previous,
            "exp_avg" | "momentum_buffer" => &mut trainer.first,
            "exp_avg_sq" => &mut trainer.second,
            "dropout" => {
                let Some(place) = projection_named(model, &super::names::canonical_name(raw))
                else {
                    return Err(file.malformed(
                        format!("tensor {name}"),
                        "dropout. and a projection of a layer",
                        raw,
                    ));
                };
                let mask = observed(file, name, 1.0)?.values;
                let width = model.layers[place.0].projection(place.1).shape().1;
                if mask.dim() != (tokens, width) {
                    let (expected, found) =
                        (format!("{tokens} rows of {width}"), format!("{:?}", mask.dim()));
                    return Err(file.malformed(format!("tensor {name}"), expected, found));
                }
                trainer.masks.insert(place, mask);
                continue;
            }
            "hidden" => {
                let Ok(layer) = raw.parse::<usize>() else {
                    return Err(file.malformed(format!("tensor {name}"), "hidden.LAYER", raw));
                };
                trainer.hidden.insert(layer, observed(file, name, 1.0)?);
                continue;
            }
            _ => continue,
        };
        for (own, tensor) in placed(raw, observed(file, name, factor)?, model)? {
            if target.insert(own, tensor).is_some() {
                let expected = "one tensor per parameter";
                return Err(file.malformed(
                    format!("tensor {name}"),
                    expected,
                    "two that are the same",
                ));
            }
        }
    }
    Ok(trainer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_stands_for_two_projections_needs_its_module() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families/gpt2");
        let model: Model<f64> = Model::read(&folder).unwrap();
        let attention = projection_named(&model, "transformer.h.1.attn.c_proj").unwrap();
        let mlp = projection_named(&model, "transformer.h.1.mlp.c_proj").unwrap();
        assert_eq!((attention.0, mlp.0), (1, 1));
        assert_ne!(attention.1, mlp.1, "each has its own mask");
        assert_eq!(projection_named(&model, "transformer.h.1.c_proj"), None, "two of that name");
        assert_eq!(
            projection_named(&model, "h.1.c_attn"),
            projection_named(&model, "transformer.h.1.attn.c_attn"),
            "one of that name"
        );
        assert_eq!(projection_named(&model, "transformer.h.9.attn.c_attn"), None);
    }
}
