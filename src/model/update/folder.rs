//! Update folders: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Low-rank updates are written as PEFT's LORA. Slices are written under `peft_type` SLICE (ours):
//!
//! | tensor after `base_model.model.model.layers.N.<path>.` | shape |
//! |---|---|
//! | `slice_rows` or `slice_columns` | k, increasing; rows or columns of the checkpoint's weight |
//! | `slice_delta` | k x in or out x k: trained - base |

use super::super::adapter_config::{AdapterConfig, AdapterKind, Beside, compose, read_object};
use super::super::adapter_folder::{
    CONFIG, Reader, WEIGHTS, module_prefix, write_factors, write_indices,
};
use super::super::config::ModelConfig;
use super::super::names::Outside;
use super::super::parameters::Model;
use super::super::projection::Projection;
use super::{ModelUpdate, Switchable};
use crate::adapters::Method;
use crate::adapters::lora::LoraSpec;
use crate::adapters::s2ft::Side;
use crate::adapters::update::{SliceUpdate, WeightUpdate};
use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::{TensorFile, TensorWriter};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

const SLICE: &str = "SLICE";

/// Whether a folder holds slice updates (`peft_type` SLICE).
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] if its `adapter_config.json` is no JSON object.
pub fn is_slice_folder(folder: &Path) -> Result<bool> {
    let map = read_object(&folder.join(CONFIG))?;
    Ok(map.get("peft_type").and_then(|v| v.as_str()) == Some(SLICE))
}

/// The settings of a folder whose factors act beside the base model as it is.
fn beside_the_base(folder: &Path) -> Result<AdapterConfig> {
    let settings = AdapterConfig::read(&folder.join(CONFIG))?;
    if let Some(init) = settings.moves_base {
        let expected = "factors that act beside the base model; this initialisation subtracted the \
                        first ones from it (PEFT's save_pretrained converts: \
                        path_initial_model_for_weight_conversion)";
        return Err(Error::format(settings.path, "key init_lora_weights", expected, init));
    }
    Ok(settings)
}

impl<T: Real> Model<T> {
    /// This base model with an adapter folder of any kind in effect, to be written as a checkpoint
    /// ([`Model::write`]): modules that the adapter trains whole, biases, embedding and output
    /// projection too.
    ///
    /// # Errors
    /// As [`ModelUpdate::read`] and [`Model::read_adapter`].
    pub fn with_folder(mut self, folder: &Path) -> Result<Self> {
        if is_slice_folder(folder)? {
            let update = ModelUpdate::read(folder, &self)?;
            let mut switchable = Switchable::new(self)?;
            switchable.switch(Some(&update))?;
            return Ok(switchable.model().clone());
        }
        beside_the_base(folder)?;
        self.read_adapter(folder)?;
        // A bias of the update's own goes where there is one to hold it; elsewhere writing says
        // that none is.
        for (_, projection) in self.layers.iter_mut().flat_map(|layer| layer.projections_mut()) {
            if let (Method::Lora(lora), Some(bias)) = (&mut projection.method, &mut projection.bias)
                && let Some(own) = lora.bias.take()
            {
                bias.scaled_add(T::of(lora.scaling), &own.row(0));
            }
        }
        Ok(self)
    }
}

impl<T: Real> ModelUpdate<T> {
    /// Reads any adapter folder as an update of `base`: SLICE as it is, every other kind by putting
    /// it on a copy of the model ([`Model::read_adapter`]) and taking what it changes
    /// ([`ModelUpdate::of_adapters`]).
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`], [`Error::MissingTensor`] naming file and key or tensor; as
    /// the two above.
    pub fn read(folder: &Path, base: &Model<T>) -> Result<Self> {
        if !is_slice_folder(folder)? {
            let settings = beside_the_base(folder)?;
            if !settings.saved.is_empty() {
                let expected = "null: modules that are trained whole are no update of projections \
                                (merge the folder into a checkpoint instead: peft-limits adapter \
                                merge)";
                return Err(Error::format(
                    settings.path,
                    "key modules_to_save",
                    expected,
                    settings.saved.join(", "),
                ));
            }
            let mut adapted = base.clone();
            adapted.read_adapter(folder)?;
            let options = &base.config.options;
            let tables = [
                (adapted.embedding != base.embedding, Outside::Embedding),
                (adapted.lm_head != base.lm_head, Outside::Head),
            ];
            if let Some((_, module)) = tables.into_iter().find(|(changed, _)| *changed) {
                let requirement = "the folder has a table of its own; an update holds projections \
                                   of layers only (merge the folder into a checkpoint instead: \
                                   peft-limits adapter merge)";
                return Err(Error::invalid(
                    options.outside_tensor(module, "weight"),
                    "changed",
                    requirement,
                ));
            }
            return Self::of_adapters(&adapted);
        }
        let file = TensorFile::open(folder.join(WEIGHTS))?;
        let mut reader = Reader::new(&file);
        let mut entries = BTreeMap::new();
        for (l, layer) in base.layers.iter().enumerate() {
            for (p, projection) in layer.projections() {
                let prefix = module_prefix(&base.config, l, p);
                let names = [(Side::Output, "slice_rows"), (Side::Input, "slice_columns")];
                let mut found = names
                    .into_iter()
                    .filter(|(_, name)| file.contains(&format!("{prefix}.{name}")));
                let Some((side, name)) = found.next() else { continue };
                if found.next().is_some() {
                    let wanted = "either slice_rows or slice_columns";
                    return Err(file.malformed(format!("adapter of {prefix}"), wanted, "both"));
                }
                let index = reader.indices(format!("{prefix}.{name}"))?;
                let shape = projection.shape();
                let expected = match side {
                    Side::Output => (index.len(), shape.1),
                    Side::Input => (shape.0, index.len()),
                };
                let delta = reader.matrix(format!("{prefix}.slice_delta"), expected)?;
                let slice = SliceUpdate::new(shape, side, index, delta).map_err(|e| {
                    file.malformed(
                        format!("tensor {prefix}.{name}"),
                        "distinct places of the weight",
                        e.to_string(),
                    )
                })?;
                entries.insert((l, p), WeightUpdate::Slice(slice));
            }
        }
        if entries.is_empty() {
            let found = format!("none for the model's {} layers", base.layers.len());
            return Err(file.malformed("tensors", "slice updates", found));
        }
        reader.refuse_leftovers(base.layers.len())?;
        Ok(Self { entries })
    }

    /// Writes a folder: slices as SLICE, low-rank updates as PEFT's LORA. A mixture of both is
    /// written as LORA, the slices as factors with a selection matrix. `config` is the model's.
    /// Files appear whole or not at all.
    ///
    /// With `like`, the `adapter_config.json` of a LORA folder keeps every key of that folder's
    /// own, and its text to the byte if the ranks, scalings and targets are the same.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an update without entries; [`Error::Io`]; [`Error::Format`] for
    /// a broken `like`.
    pub fn write(&self, folder: &Path, config: &ModelConfig, like: Option<&Path>) -> Result<()> {
        if self.entries.is_empty() {
            return Err(Error::invalid("update", "empty", "must change at least one projection"));
        }
        let mut writer = TensorWriter::new();
        writer.metadata("format", "pt");
        if self.entries.values().all(|u| matches!(u, WeightUpdate::Slice(_))) {
            for (&(l, p), update) in &self.entries {
                if let WeightUpdate::Slice(slice) = update {
                    let prefix = module_prefix(config, l, p);
                    let name = if slice.place().side == Side::Output {
                        "slice_rows"
                    } else {
                        "slice_columns"
                    };
                    write_indices(&mut writer, &format!("{prefix}.{name}"), &slice.place().index);
                    writer.matrix(&format!("{prefix}.slice_delta"), slice.delta());
                }
            }
            let targets: Vec<String> =
                self.entries.keys().map(|&(l, p)| config.options.module(l, p)).collect();
            let settings = json!({
                "peft_type": SLICE, "task_type": "CAUSAL_LM", "target_modules": targets, "bias": "none",
                "inference_mode": true,
            });
            writer.write(&folder.join(WEIGHTS))?;
            return write_bytes(&folder.join(CONFIG), format!("{settings:#}\n").as_bytes());
        }
        let mut entries: Vec<(usize, Projection, LoraSpec)> = Vec::new();
        for (&(l, p), update) in &self.entries {
            let lora = update.to_low_rank()?;
            write_factors(&mut writer, &module_prefix(config, l, p), &lora.a, &lora.b);
            entries.push((l, p, lora.spec));
        }
        let like =
            like.map(|folder| AdapterConfig::read_with_text(&folder.join(CONFIG))).transpose()?;
        let text =
            compose(AdapterKind::Lora, &entries, config, false, &Beside::default(), like.as_ref());
        writer.write(&folder.join(WEIGHTS))?;
        write_bytes(&folder.join(CONFIG), text.as_bytes())
    }
}
