//! What an adapter folder holds beside the projections of layers: updates of the embedding and the output projection, modules
//! that are trained whole, biases.

use super::adapter_config::{AdapterConfig, Beside};
use super::adapter_folder::{PREFIX, Reader};
use super::layer::Layer;
use super::names::Outside;
use super::options::Norm;
use super::outside_adapters::{EMBEDDING_FACTORS, HEAD_FACTORS};
use super::parameters::Model;
use crate::adapters::Method;
use crate::adapters::lora::Lora;
use crate::adapters::stored::AdapterKind;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::TensorWriter;
use ndarray::Array1;

impl<T: Real> Model<T> {
    /// What an adapter trains outside the projections of layers; how many updates were read.
    pub(super) fn read_outside(&mut self, reader: &mut Reader<'_>, config: &AdapterConfig) -> Result<usize> {
        let options = self.config.options.clone();
        let table = (self.config.vocab_size, self.config.hidden_size);
        let mut adapted = 0;
        for module in [Outside::Embedding, Outside::Head] {
            let name = options.outside(module);
            let prefix = format!("{PREFIX}.{name}");
            if let Some(spec) = config.spec_outside(name) {
                if config.kind != AdapterKind::Lora {
                    let expected = format!("modules of layers: only plain LoRA adapts {name}");
                    return Err(Error::format(&config.path, "key target_modules", expected, name));
                }
                // PEFT's embedding has A r x V and B D x r, so that its weight stands the other way round.
                let (names, (out, input)) = match module {
                    Outside::Embedding => (EMBEDDING_FACTORS.map(String::from), (table.1, table.0)),
                    _ => (HEAD_FACTORS.map(|factor| format!("{factor}.weight")), table),
                };
                let a = reader.matrix(format!("{prefix}.{}", names[0]), (spec.rank, input))?;
                let b = reader.matrix(format!("{prefix}.{}", names[1]), (out, spec.rank))?;
                let lora = Some(Lora::from_factors(spec, (out, input), a, b)?);
                match module {
                    Outside::Embedding => self.adapters.embedding = lora,
                    _ => self.adapters.head = lora,
                }
                adapted += 1;
            }
            if config.saves(name) {
                let copy = reader.matrix(format!("{prefix}.weight"), table)?;
                match module {
                    Outside::Embedding => {
                        // The output projection keeps the old table if it shared it.
                        if self.is_tied() {
                            match self.tables.embedding.clone() {
                                Some(table) => self.tables.head = Some(table),
                                None => self.lm_head = Some(self.embedding.clone()),
                            }
                            self.config.tie_word_embeddings = false;
                        }
                        self.embedding = copy;
                        self.tables.embedding = None;
                        self.trainable.embedding = true;
                    }
                    _ => {
                        self.lm_head = Some(copy);
                        self.tables.head = None;
                        self.config.tie_word_embeddings = false;
                        self.trainable.lm_head = true;
                    }
                }
            }
        }
        let outside = [Outside::Embedding, Outside::Head].map(|module| options.outside(module));
        if let Some(other) =
            config.saved.iter().find(|saved| !outside.iter().any(|name| name.ends_with(saved.as_str())))
        {
            let expected = format!("{} or {} (others are not implemented)", outside[0], outside[1]);
            return Err(Error::format(&config.path, "key modules_to_save", expected, other));
        }
        if config.biases {
            self.trainable.biases = true;
            let mut biases = Vec::new();
            for (l, layer) in self.layers.iter_mut().enumerate() {
                for (&p, projection) in &mut layer.projections {
                    let adapted = projection.is_trainable();
                    let prefix = format!("{PREFIX}.{}", options.module(l, p));
                    let name = if adapted { format!("{prefix}.base_layer.bias") } else { format!("{prefix}.bias") };
                    biases.extend(projection.bias.as_mut().map(|bias| (name, bias)));
                }
                for (norm, vectors) in Norm::ALL.into_iter().zip(&mut layer.norms) {
                    let bias = vectors.as_mut().and_then(|norm| norm.bias.as_mut());
                    biases
                        .extend(bias.map(|bias| (format!("{PREFIX}.{}", options.norm_tensor(l, norm, "bias")), bias)));
                }
            }
            let last = format!("{PREFIX}.{}", options.outside_tensor(Outside::FinalNorm, "bias"));
            biases.extend(self.final_norm.bias.as_mut().map(|bias| (last, bias)));
            for (name, bias) in biases {
                let values = reader.vector::<T>(&name)?;
                if values.len() != bias.len() {
                    return Err(reader.wrong(&name, &format!("{} entries", bias.len()), values.len().to_string()));
                }
                *bias = values.into();
            }
        }
        Ok(adapted)
    }

    /// Writes what is trained outside the projections of layers.
    pub(super) fn write_outside(&self, writer: &mut TensorWriter) -> Beside {
        let (options, parts) = (&self.config.options, self.trainable);
        let own = |layer: &Layer<T>| {
            layer.projections().any(|(_, p)| matches!(&p.method, Method::Lora(lora) if lora.bias.is_some()))
        };
        let mut beside = Beside { biases: parts.biases, own_bias: self.layers.iter().any(own), ..Beside::default() };
        for module in [Outside::Embedding, Outside::Head] {
            let name = options.outside(module);
            let prefix = format!("{PREFIX}.{name}");
            let (lora, names, whole) = match module {
                Outside::Embedding => {
                    let whole = parts.embedding.then_some(&self.embedding);
                    (&self.adapters.embedding, EMBEDDING_FACTORS.map(String::from), whole)
                }
                _ => {
                    let whole = self.lm_head.as_ref().filter(|_| parts.lm_head);
                    (&self.adapters.head, HEAD_FACTORS.map(|factor| format!("{factor}.weight")), whole)
                }
            };
            if let Some(lora) = lora {
                writer.matrix(&format!("{prefix}.{}", names[0]), lora.a.view());
                writer.matrix(&format!("{prefix}.{}", names[1]), lora.b.view());
                beside.adapted.insert(name.to_string(), lora.spec);
            }
            if let Some(whole) = whole {
                writer.matrix(&format!("{prefix}.weight"), whole.view());
                beside.saved.push(name.to_string());
            }
        }
        if parts.biases {
            let mut add = |name: String, bias: &Array1<T>| {
                writer.tensor(&format!("{PREFIX}.{name}"), &[bias.len()], bias.iter().copied());
            };
            for (l, layer) in self.layers.iter().enumerate() {
                for (p, projection) in layer.projections() {
                    let base = if projection.is_trainable() { ".base_layer" } else { "" };
                    if let Some(bias) = &projection.bias {
                        add(format!("{}{base}.bias", options.module(l, p)), bias);
                    }
                }
                for norm in Norm::ALL {
                    if let Some(bias) = layer.norm(norm).and_then(|norm| norm.bias.as_ref()) {
                        add(options.norm_tensor(l, norm, "bias"), bias);
                    }
                }
            }
            if let Some(bias) = &self.final_norm.bias {
                add(options.outside_tensor(Outside::FinalNorm, "bias"), bias);
            }
        }
        beside
    }
}
