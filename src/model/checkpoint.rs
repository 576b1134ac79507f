//! Hugging Face checkpoint folders: `config.json` and `model.safetensors`, whole or in shards.

use super::config::ModelConfig;
use super::layer::Layer;
use super::layout::{self, read_projections, write_projections};
use super::names::Outside;
use super::norm::NormOn;
use super::options::{Family, Norm, Options};
use super::parameters::{Model, TrainableParts};
use super::projection::Projection;
use super::quantized::{self, Quantization};
use super::tables::Tables;
use crate::adapters::{BaseWeight, PackedWeight};
use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::Cpu;
use crate::precision::Precision;
use crate::tensor_file::{TensorFile, TensorWriter};
use ndarray::{Array1, Array2};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Packed weights by (layer, projection).
pub type PackedPlaces<T> = Vec<((usize, Projection), Arc<dyn PackedWeight<T>>)>;

/// The tensors of a checkpoint folder, one file or several, which stay on the disk.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<TensorFile>,
    place: BTreeMap<String, usize>,
    changed: BTreeSet<usize>,
}

impl Shards {
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        if single.exists() || !index.exists() {
            let file = TensorFile::open_on_disk(&single)?;
            let place = file.names().map(|name| (name.to_string(), 0)).collect();
            return Ok(Self { files: vec![file], place, changed: BTreeSet::new() });
        }
        let text = std::fs::read_to_string(&index).map_err(|e| Error::io(&index, e))?;
        let value: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| Error::format(&index, "file", "a JSON object", e.to_string()))?;
        let Some(map) = value.get("weight_map").and_then(|m| m.as_object()) else {
            return Err(Error::format(
                &index,
                "key weight_map",
                "an object of tensor: file",
                "nothing such",
            ));
        };
        let mut names = BTreeSet::new();
        for (tensor, file) in map {
            let there = |name: &&str| !name.contains(['/', '\\']) && folder.join(name).is_file();
            match file.as_str().filter(there) {
                Some(name) => names.insert(name.to_string()),
                None => {
                    let field = format!("weight_map.{tensor}");
                    return Err(Error::format(
                        &index,
                        field,
                        "a file that is in the same folder",
                        file.to_string(),
                    ));
                }
            };
        }
        let names: Vec<String> = names.into_iter().collect();
        let files = names
            .iter()
            .map(|name| TensorFile::open_on_disk(folder.join(name)))
            .collect::<Result<Vec<_>>>()?;
        let mut place = BTreeMap::new();
        for (tensor, file) in map {
            let at =
                names.iter().position(|name| Some(name.as_str()) == file.as_str()).unwrap_or(0);
            if !files[at].contains(tensor) {
                return Err(
                    files[at].missing(tensor, format!("{} says it is here", index.display()))
                );
            }
            place.insert(tensor.clone(), at);
        }
        Ok(Self { files, place, changed: BTreeSet::new() })
    }

    /// The file that holds a tensor, which will be changed.
    pub(super) fn file_mut(&mut self, name: &str) -> &mut TensorFile {
        let at = self.place.get(name).copied().unwrap_or(0);
        self.changed.insert(at);
        &mut self.files[at]
    }

    /// Writes every file that was handed out to be changed; each appears whole or not at all.
    pub(super) fn write_changed(&self) -> Result<()> {
        self.changed.iter().try_for_each(|&at| self.files[at].write_back())
    }

    /// The file that holds a tensor (or, for the error message, the first).
    pub(super) fn file(&self, name: &str) -> &TensorFile {
        &self.files[self.place.get(name).copied().unwrap_or(0)]
    }

    /// The name by which a tensor is there: hubs hold some models without what stands before the
    /// first dot.
    pub(super) fn actual<'a>(&self, name: &'a str) -> &'a str {
        match name.split_once('.') {
            Some((_, rest)) if !self.place.contains_key(name) && self.place.contains_key(rest) => {
                rest
            }
            _ => name,
        }
    }

    /// Refuses a tensor that is absent or not of a shape.
    pub(super) fn check(&self, name: &str, expected: &[usize]) -> Result<()> {
        let name = self.actual(name);
        let file = self.file(name);
        let Some(shape) = file.shape(name) else {
            return Err(file.missing(name, "config.json asks for it"));
        };
        if shape == expected {
            return Ok(());
        }
        let text = |shape: &[usize]| match shape {
            [rows, columns] => format!("({rows}, {columns})"),
            _ => format!("{shape:?}"),
        };
        let (expected, found) =
            (format!("shape {} (from config.json)", text(expected)), text(shape));
        Err(file.malformed(format!("tensor {name}"), expected, found))
    }

    /// Rows of a tensor that was checked, whose leading axes count as one.
    pub(super) fn rows<T: Real>(
        &self,
        name: &str,
        rows: Range<usize>,
        into: &mut [T],
    ) -> Result<()> {
        let name = self.actual(name);
        self.file(name).rows(name, "config.json asks for it", rows, into)
    }

    /// Whether two tables are both there, of one shape, and not the same.
    fn differ(&self, names: &[String; 2], (rows, width): (usize, usize)) -> Result<bool> {
        if !names.iter().all(|name| {
            self.place.contains_key(self.actual(name)) && !quantized::is_packed(self, name)
        }) {
            return Ok(false);
        }
        for name in names {
            self.check(name, &[rows, width])?;
        }
        const ROWS: usize = 1024;
        let mut tables = [const { Vec::<f32>::new() }; 2];
        for first in (0..rows).step_by(ROWS) {
            let part = first..(first + ROWS).min(rows);
            for (name, table) in names.iter().zip(&mut tables) {
                table.resize(part.len() * width, 0.0);
                self.rows(name, part.clone(), table)?;
            }
            if tables[0] != tables[1] {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn matrix<T: Real>(
        &self,
        name: &str,
        expected: (usize, usize),
    ) -> Result<Array2<T>> {
        let name = self.actual(name);
        let file = self.file(name);
        let array = file.matrix::<T>(name, "config.json asks for it")?;
        if array.dim() == expected {
            return Ok(array);
        }
        let (expected, found) =
            (format!("shape {expected:?} (from config.json)"), format!("{:?}", array.dim()));
        Err(file.malformed(format!("tensor {name}"), expected, found))
    }

    /// A norm, its names added to those that are known.
    fn norm<T: Real>(
        &self,
        names: [String; 2],
        width: usize,
        options: &Options,
        known: &mut BTreeSet<String>,
    ) -> Result<NormOn<Cpu<T>>> {
        let [gain, bias] = names;
        let norm = NormOn {
            gain: self.vector(&gain, width)?,
            bias: if options.layer_norm { Some(self.vector(&bias, width)?) } else { None },
            whole: false,
        };
        known.insert(gain);
        if options.layer_norm {
            known.insert(bias);
        }
        Ok(norm)
    }

    pub(super) fn vector<T: Real>(&self, name: &str, expected: usize) -> Result<Array1<T>> {
        let name = self.actual(name);
        let file = self.file(name);
        let array = file.vector::<T>(name, "config.json asks for it")?;
        if array.len() == expected {
            return Ok(array);
        }
        let (expected, found) =
            (format!("shape ({expected},) (from config.json)"), format!("({},)", array.len()));
        Err(file.malformed(format!("tensor {name}"), expected, found))
    }
}

impl<T: Real> Model<T> {
    /// Reads a checkpoint folder; weights of f64, f32, f16 and bf16 are converted to `T`, those of
    /// bitsandbytes' NF4 and int8 stay packed. Everything is frozen.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming file and key or tensor (wrong shape, NaN, a tensor
    /// that no part of the model takes); [`Error::MissingTensor`].
    pub fn read(folder: &Path) -> Result<Self> {
        Self::read_or_open(folder, false)
    }

    /// As [`Model::read`], but weights of projections, embedding and output projection stay on the
    /// disk and are read each time a step needs them. Norms, biases and learned positions are read
    /// now.
    ///
    /// # Errors
    /// As [`Model::read`], what is read later excepted: that is an error of the step.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::read_or_open(folder, true)
    }

    fn read_or_open(folder: &Path, later: bool) -> Result<Self> {
        let mut config = ModelConfig::read(&folder.join("config.json"))?;
        let shards = Arc::new(Shards::open(folder)?);
        let width = config.hidden_size;
        let table = (config.vocab_size, width);
        if config.tie_word_embeddings {
            // As Transformers does it: two tables that differ stay two, whatever the config says.
            let names = [Outside::Embedding, Outside::Head]
                .map(|m| config.options.outside_tensor(m, "weight"));
            config.tie_word_embeddings = !shards.differ(&names, table)?;
        }
        let options = &config.options;
        let outside = |module: Outside, tensor: &str| options.outside_tensor(module, tensor);
        let of_table = |module: Outside| -> Result<(Array2<T>, Option<BaseWeight<T>>)> {
            let name = outside(module, "weight");
            if quantized::is_packed(&shards, &name) {
                return Ok((quantized::read(&shards, &name, table)?.dense().into_owned(), None));
            }
            let stored = layout::table(&shards, &name, table)?;
            if later {
                return Ok((Array2::zeros((0, width)), Some(BaseWeight::Stored(stored))));
            }
            Ok((stored.read()?, None))
        };
        let (embedding, stored_embedding) = of_table(Outside::Embedding)?;
        let mut known: BTreeSet<String> =
            [Outside::Embedding, Outside::Head].map(|m| outside(m, "weight")).into();
        let positions = match options.positions {
            Some(offset) => {
                let name = outside(Outside::Positions, "weight");
                let table =
                    shards.matrix(&name, (config.max_position_embeddings + offset, width))?;
                known.insert(name);
                Some(table)
            }
            None => None,
        };
        // Not sized in advance: the config's number of layers is a claim until their tensors are
        // found.
        let mut layers = Vec::new();
        for l in 0..config.num_hidden_layers {
            let projections = read_projections(&shards, &config, l, later, &mut known)?;
            let mut norms = [const { None }; 6];
            for norm in Norm::ALL {
                if let (Some(_), Some(width)) = (options.norm_name(norm), config.norm_width(norm)) {
                    let names =
                        ["weight", "bias"].map(|tensor| options.norm_tensor(l, norm, tensor));
                    norms[norm as usize] = Some(shards.norm(names, width, options, &mut known)?);
                }
            }
            let sinks = if options.sinks {
                let name = options.sinks_name(l);
                let sinks = shards.vector(&name, config.num_attention_heads)?;
                known.insert(name);
                Some(sinks)
            } else {
                None
            };
            layers.push(Layer::new(projections, norms, sinks));
            // Old checkpoints carry the rotary frequencies and the causal mask, which follow from
            // the config.
            let attention = match options.family {
                Family::Gpt2 => "attn",
                Family::GptNeoX => "attention",
                _ => "self_attn",
            };
            let left = ["rotary_emb.inv_freq", "bias", "masked_bias"];
            known.extend(left.map(|name| format!("{}.{attention}.{name}", options.layer(l))));
        }
        let names = ["weight", "bias"].map(|tensor| outside(Outside::FinalNorm, tensor));
        let final_norm = shards.norm(names, width, options, &mut known)?;
        let (mut lm_head, mut stored_head) = (None, None);
        if !config.tie_word_embeddings {
            let (own, stored) = of_table(Outside::Head)?;
            (lm_head, stored_head) = (stored.is_none().then_some(own), stored);
        }
        let known: BTreeSet<&str> = known.iter().map(|name| shards.actual(name)).collect();
        let belongs = |name: &str| {
            known.contains(name)
                || quantized::weight_of(name).is_some_and(|w| known.contains(w.as_str()))
        };
        if let Some(extra) = shards.place.keys().find(|name| !belongs(name)) {
            let family = config.options.family.model_type();
            let expected = format!("the tensors of a {}-layer {family}", config.num_hidden_layers);
            return Err(shards.file(extra).malformed(
                format!("tensor {extra}"),
                expected,
                "an unknown name",
            ));
        }
        let packed =
            layers.iter().flat_map(|layer| layer.projections()).any(|(_, p)| p.base.is_packed());
        if packed != config.options.quantization.is_some() {
            let says = config.options.quantization.map_or("nothing", Quantization::name);
            let found = format!(
                "{says}, and {} weights",
                if packed { "quantized" } else { "no quantized" }
            );
            let expected = "what the weights are stored in";
            return Err(Error::format(
                folder.join("config.json"),
                "key quantization_config",
                expected,
                found,
            ));
        }
        Ok(Self {
            config,
            embedding,
            positions,
            layers,
            final_norm,
            lm_head,
            trainable: TrainableParts::default(),
            adapters: Default::default(),
            tables: Tables { embedding: stored_embedding, head: stored_head },
        })
    }

    /// Restores every packed weight in a format, so that it can be looked at and changed; what they
    /// were packed in, by place.
    ///
    /// With `later` they stay packed and are restored each time they are read. The codec's own
    /// format does not matter: bitsandbytes restores a weight in that of the activations.
    pub fn unpack_in(&mut self, format: Precision, later: bool) -> PackedPlaces<T> {
        let mut places = Vec::new();
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let linears = layer.projections_mut();
            let packed = linears
                .filter_map(|(p, linear)| Some(((l, p), linear.base.unpack_in(format, later)?)));
            places.extend(packed);
        }
        places
    }

    /// Writes a checkpoint folder that Transformers reads, with every adapter folded into its
    /// weight and every co-permutation undone; the model itself is left as it is. Files appear
    /// whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; as [`crate::adapters::AdaptedLinear::effective_weight`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        let mut writer = TensorWriter::new();
        writer.metadata("format", "pt");
        let options = &self.config.options;
        let outside = |module: Outside, tensor: &str| options.outside_tensor(module, tensor);
        let vector = |writer: &mut TensorWriter, name: &str, values: &Array1<T>| {
            writer.tensor(name, &[values.len()], values.iter().copied());
        };
        let tied = self.lm_head.is_none();
        if tied && (self.adapters.head.is_some() || self.adapters.embedding.is_some()) {
            let requirement = "embedding and output projection are one tensor: merging an update \
                               into it would change both; keep the adapter apart, or untie the \
                               model first";
            return Err(Error::invalid("tie_word_embeddings", true, requirement));
        }
        writer.matrix(&outside(Outside::Embedding, "weight"), self.acting_embedding()?.view());
        if let Some(table) = &self.positions {
            writer.matrix(&outside(Outside::Positions, "weight"), table.view());
        }
        let norm = |writer: &mut TensorWriter, names: [String; 2], norm: &NormOn<Cpu<T>>| {
            vector(writer, &names[0], &norm.gain);
            if let Some(bias) = &norm.bias {
                vector(writer, &names[1], bias);
            }
        };
        for (l, layer) in self.layers.iter().enumerate() {
            write_projections(&mut writer, layer, &self.config, l)?;
            for of in Norm::ALL {
                if let Some(vectors) = layer.checkpoint_norm(of, &self.config) {
                    norm(
                        &mut writer,
                        ["weight", "bias"].map(|tensor| options.norm_tensor(l, of, tensor)),
                        &vectors,
                    );
                }
            }
            if let Some(sinks) = layer.checkpoint_sinks(&self.config) {
                vector(&mut writer, &options.sinks_name(l), &sinks);
            }
        }
        let names = ["weight", "bias"].map(|tensor| outside(Outside::FinalNorm, tensor));
        norm(&mut writer, names, &self.final_norm);
        if self.lm_head.is_some() {
            writer.matrix(&outside(Outside::Head, "weight"), self.acting_head()?.view());
        }
        writer.write(&weights_path(folder))?;
        let dtype = if T::NAME == f32::NAME { "float32" } else { "float64" };
        write_bytes(&folder.join("config.json"), self.config.to_json(dtype).as_bytes())
    }
}

fn weights_path(folder: &Path) -> PathBuf {
    folder.join("model.safetensors")
}
