//! Hugging Face checkpoint folders: `config.json` and `model.safetensors`, whole or in shards.

use super::config::ModelConfig;
use super::layer::Layer;
use super::options::Norm;
use super::parameters::{Model, Projection, TrainableParts};
use crate::adapters::AdaptedLinear;
use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::{TensorFile, TensorWriter};
use ndarray::{Array1, Array2};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The tensors of a checkpoint folder, one file or several.
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
            let file = TensorFile::open(&single)?;
            let place = file.names().map(|name| (name.to_string(), 0)).collect();
            return Ok(Self { files: vec![file], place, changed: BTreeSet::new() });
        }
        let text = std::fs::read_to_string(&index).map_err(|e| Error::io(&index, e))?;
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| Error::format(&index, "file", "a JSON object", e.to_string()))?;
        let Some(map) = value.get("weight_map").and_then(|m| m.as_object()) else {
            return Err(Error::format(&index, "key weight_map", "an object of tensor: file", "nothing such"));
        };
        let mut names = BTreeSet::new();
        for (tensor, file) in map {
            match file.as_str().filter(|name| !name.contains(['/', '\\'])) {
                Some(name) => names.insert(name.to_string()),
                None => {
                    let field = format!("weight_map.{tensor}");
                    return Err(Error::format(&index, field, "a file name in the same folder", file.to_string()));
                }
            };
        }
        let names: Vec<String> = names.into_iter().collect();
        let files = names.iter().map(|name| TensorFile::open(folder.join(name))).collect::<Result<Vec<_>>>()?;
        let mut place = BTreeMap::new();
        for (tensor, file) in map {
            let at = names.iter().position(|name| Some(name.as_str()) == file.as_str()).unwrap_or(0);
            if !files[at].contains(tensor) {
                return Err(files[at].missing(tensor, format!("{} says it is here", index.display())));
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
    fn file(&self, name: &str) -> &TensorFile {
        &self.files[self.place.get(name).copied().unwrap_or(0)]
    }

    fn matrix<T: Real>(&self, name: &str, expected: (usize, usize)) -> Result<Array2<T>> {
        let file = self.file(name);
        let array = file.matrix::<T>(name, "config.json asks for it")?;
        if array.dim() == expected {
            return Ok(array);
        }
        let (expected, found) = (format!("shape {expected:?} (from config.json)"), format!("{:?}", array.dim()));
        Err(file.malformed(format!("tensor {name}"), expected, found))
    }

    fn vector<T: Real>(&self, name: &str, expected: usize) -> Result<Array1<T>> {
        let file = self.file(name);
        let array = file.vector::<T>(name, "config.json asks for it")?;
        if array.len() == expected {
            return Ok(array);
        }
        let (expected, found) = (format!("shape ({expected},) (from config.json)"), format!("({},)", array.len()));
        Err(file.malformed(format!("tensor {name}"), expected, found))
    }
}

impl<T: Real> Model<T> {
    /// Reads a checkpoint folder; weights of f64, f32, f16 and bf16 are converted to `T`. Everything is frozen.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming file and key or tensor (wrong shape, NaN, a tensor that no part of
    /// the model takes); [`Error::MissingTensor`].
    pub fn read(folder: &Path) -> Result<Self> {
        let config = ModelConfig::read(&folder.join("config.json"))?;
        let shards = Shards::open(folder)?;
        let width = config.hidden_size;
        let table = (config.vocab_size, width);
        let embedding = shards.matrix("model.embed_tokens.weight", table)?;
        let mut known: BTreeSet<String> =
            ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(String::from).into();
        // Not sized in advance: the config's number of layers is a claim until their tensors are found.
        let mut layers = Vec::new();
        for l in 0..config.num_hidden_layers {
            let prefix = format!("model.layers.{l}");
            let mut projections = Vec::with_capacity(7);
            for p in Projection::ALL {
                let name = format!("{prefix}.{}.weight", p.path());
                let shape = config.projection_shape(p);
                let mut projection = AdaptedLinear::frozen(shards.matrix(&name, shape)?);
                known.insert(name);
                if config.options.biases[p as usize] {
                    let name = format!("{prefix}.{}.bias", p.path());
                    projection.bias = Some(shards.vector(&name, shape.0)?);
                    known.insert(name);
                }
                projections.push(projection);
            }
            let Ok(projections) = <[AdaptedLinear<T>; 7]>::try_from(projections) else {
                unreachable!("one push per projection")
            };
            let mut norms = [const { None }; 6];
            for norm in Norm::ALL {
                let (Some(name), Some(width)) = (config.options.norm_name(norm), config.norm_width(norm)) else {
                    continue;
                };
                let name = format!("{prefix}.{name}.weight");
                norms[norm as usize] = Some(shards.vector(&name, width)?);
                known.insert(name);
            }
            layers.push(Layer::new(projections, norms));
            // Old checkpoints carry the rotary frequencies, which follow from the config.
            known.insert(format!("{prefix}.self_attn.rotary_emb.inv_freq"));
        }
        let final_norm = shards.vector("model.norm.weight", width)?;
        let lm_head = if config.tie_word_embeddings { None } else { Some(shards.matrix("lm_head.weight", table)?) };
        if let Some(extra) = shards.place.keys().find(|name| !known.contains(*name)) {
            let family = config.options.family.model_type();
            let expected = format!("the tensors of a {}-layer {family}", config.num_hidden_layers);
            return Err(shards.file(extra).malformed(format!("tensor {extra}"), expected, "an unknown name"));
        }
        Ok(Self { config, embedding, layers, final_norm, lm_head, trainable: TrainableParts::default() })
    }

    /// Writes a checkpoint folder that Transformers reads, with every adapter folded into its weight and every
    /// co-permutation undone; the model itself is left as it is. Files appear whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; as [`AdaptedLinear::effective_weight`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        let mut writer = TensorWriter::new();
        writer.metadata("format", "pt");
        writer.matrix("model.embed_tokens.weight", self.embedding.view());
        for (l, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            for p in Projection::ALL {
                let weight = layer.checkpoint_weight(p, &self.config)?;
                writer.matrix(&format!("{prefix}.{}.weight", p.path()), weight.view());
                if let Some(bias) = layer.checkpoint_bias(p, &self.config) {
                    writer.tensor(&format!("{prefix}.{}.bias", p.path()), &[bias.len()], bias.iter().copied());
                }
            }
            for norm in Norm::ALL {
                let (Some(name), Some(gain)) = (self.config.options.norm_name(norm), layer.gain(norm)) else {
                    continue;
                };
                writer.tensor(&format!("{prefix}.{name}.weight"), &[gain.len()], gain.iter().copied());
            }
        }
        writer.tensor("model.norm.weight", &[self.final_norm.len()], self.final_norm.iter().copied());
        if let Some(head) = &self.lm_head {
            writer.matrix("lm_head.weight", head.view());
        }
        writer.write(&weights_path(folder))?;
        let dtype = if T::NAME == f32::NAME { "float32" } else { "float64" };
        write_bytes(&folder.join("config.json"), self.config.to_json(dtype).as_bytes())
    }
}

fn weights_path(folder: &Path) -> PathBuf {
    folder.join("model.safetensors")
}
