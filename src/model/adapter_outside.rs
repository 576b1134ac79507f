//! What an adapter folder holds beside the projections of layers: updates of the embedding and the
//! output projection, modules that are trained whole, biases.

use super::adapter_config::{AdapterConfig, Beside, Biases};
use super::adapter_folder::{PREFIX, Reader};
use super::layer::Layer;
use super::names::{HEAD_IN_MEMORY, Outside};
use super::options::Norm;
use super::outside_adapters::{OutsideAdapter, outside_names};
use super::parameters::Model;
use crate::adapters::Method;
use crate::adapters::lora::Lora;
use crate::adapters::stored::AdapterKind;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::TensorWriter;
use ndarray::{Array1, Array2, Axis};

/// A module's name in an adapter's file. Transformers 5 calls every output projection `lm_head` in
/// memory, whatever the family's checkpoints do, and PEFT takes that name.
fn name_in(reader: &Reader<'_>, own: &'static str, module: Outside) -> &'static str {
    if module == Outside::Head && !reader.holds_module(own) { HEAD_IN_MEMORY } else { own }
}

impl<T: Real> Model<T> {
    /// What an adapter trains outside the projections of layers; how many updates were read.
    pub(super) fn read_outside(
        &mut self,
        reader: &mut Reader<'_>,
        config: &AdapterConfig,
    ) -> Result<usize> {
        let options = self.config.options.clone();
        let table = (self.config.vocab_size, self.config.hidden_size);
        let mut adapted = 0;
        for module in [Outside::Embedding, Outside::Head] {
            let name = name_in(reader, options.outside(module), module);
            let prefix = format!("{PREFIX}.{name}");
            let tied = config.keeps_tied && self.config.tie_word_embeddings;
            if tied && config.spec_outside(name).is_some() {
                let expected = format!(
                    "false: an update of {name} that is tied to the other table's is not \
                     implemented"
                );
                return Err(Error::format(
                    &config.path,
                    "key ensure_weight_tying",
                    expected,
                    "true",
                ));
            }
            let copy = format!("{prefix}.weight");
            if tied && !config.saved.is_empty() {
                // One table under one or both names.
                if reader.has(&copy) {
                    self.put_table(Outside::Embedding, reader.matrix(copy, table)?);
                    self.trainable.embedding = true;
                }
                continue;
            }
            if let Some(spec) = config.spec_outside(name) {
                if !config.kind.is_peft() || config.true_derivative {
                    let expected = format!(
                        "modules of layers: only LoRA and DoRA as PEFT has it adapt {name}"
                    );
                    return Err(Error::format(&config.path, "key target_modules", expected, name));
                }
                // PEFT's embedding has A r x V and B D x r, so that its weight stands the other way
                // round.
                let (ends, (out, input)) = match module {
                    Outside::Embedding => ("", (table.1, table.0)),
                    _ => (".weight", table),
                };
                let [a, b, magnitude] =
                    outside_names(module).map(|tensor| format!("{prefix}.{tensor}"));
                let a = reader.matrix(a + ends, (spec.rank, input))?;
                let b = reader.matrix(b + ends, (out, spec.rank))?;
                let lora = Lora::from_factors(spec, (out, input), a, b)?;
                let magnitude = match config.kind {
                    AdapterKind::Dora => {
                        let longer = format!("{magnitude}.weight");
                        let name = if reader.has(&longer) { longer } else { magnitude };
                        let values = Array1::from(reader.vector(&name)?);
                        if values.len() != out {
                            return Err(reader.wrong(
                                &name,
                                &format!("{out} entries"),
                                values.len().to_string(),
                            ));
                        }
                        Some(values.insert_axis(Axis(0)))
                    }
                    _ => None,
                };
                let adapter = Some(OutsideAdapter { lora, magnitude });
                match module {
                    Outside::Embedding => self.adapters.embedding = adapter,
                    _ => self.adapters.head = adapter,
                }
                adapted += 1;
            }
            // PEFT writes the tables beside the factors, and where they grew.
            let base = [format!("{prefix}.base_layer.weight"), copy.clone()];
            if let Some(base) =
                base.into_iter().find(|tensor| !config.saves(name) && reader.has(tensor))
            {
                self.put_table(module, reader.matrix(base, table)?);
            }
            if config.saves(name) {
                let copy = reader.matrix(copy, table)?;
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
        if config.biases != Biases::None {
            // PEFT trains what is called `bias`; the experts' biases have other names.
            let all = config.biases == Biases::All;
            self.trainable.biases = all;
            self.trainable.adapted_biases = !all;
            let mut biases = Vec::new();
            for (l, layer) in self.layers.iter_mut().enumerate() {
                for (&p, projection) in &mut layer.projections {
                    let adapted = projection.is_trainable();
                    if projection.whole || p.is_expert() || !(adapted || all) {
                        continue;
                    }
                    let prefix = format!("{PREFIX}.{}", options.module(l, p));
                    let name = if adapted {
                        format!("{prefix}.base_layer.bias")
                    } else {
                        format!("{prefix}.bias")
                    };
                    biases.extend(projection.bias.as_mut().map(|bias| (name, bias)));
                }
                for (norm, vectors) in Norm::ALL.into_iter().zip(&mut layer.norms) {
                    let bias = vectors
                        .as_mut()
                        .filter(|norm| all && !norm.whole)
                        .and_then(|norm| norm.bias.as_mut());
                    biases.extend(bias.map(|bias| {
                        (format!("{PREFIX}.{}", options.norm_tensor(l, norm, "bias")), bias)
                    }));
                }
            }
            let last = format!("{PREFIX}.{}", options.outside_tensor(Outside::FinalNorm, "bias"));
            let whole = self.final_norm.whole;
            biases.extend(
                self.final_norm.bias.as_mut().filter(|_| all && !whole).map(|bias| (last, bias)),
            );
            // A recorded step keeps them with the model.
            if !biases.iter().any(|(name, _)| reader.has(name)) {
                biases.clear();
            }
            for (name, bias) in biases {
                let values = reader.vector::<T>(&name)?;
                if values.len() != bias.len() {
                    return Err(reader.wrong(
                        &name,
                        &format!("{} entries", bias.len()),
                        values.len().to_string(),
                    ));
                }
                *bias = values.into();
            }
        }
        Ok(adapted)
    }

    /// Puts a frozen table in place of the base's; a tied one is both.
    fn put_table(&mut self, module: Outside, table: Array2<T>) {
        let tied = self.is_tied();
        match module {
            Outside::Head if !tied => {
                self.lm_head = Some(table);
                self.tables.head = None;
            }
            _ => {
                self.embedding = table;
                self.tables.embedding = None;
            }
        }
    }

    /// Writes what is trained outside the projections of layers.
    pub(super) fn write_outside(&self, writer: &mut TensorWriter) -> Beside {
        let (options, parts) = (&self.config.options, self.trainable);
        let own = |layer: &Layer<T>| {
            layer
                .projections()
                .any(|(_, p)| matches!(&p.method, Method::Lora(lora) if lora.bias.is_some()))
        };
        let biases = match (parts.biases, parts.adapted_biases) {
            (true, _) => Biases::All,
            (false, true) => Biases::Adapted,
            (false, false) => Biases::None,
        };
        let mut beside =
            Beside { biases, own_bias: self.layers.iter().any(own), ..Beside::default() };
        for module in [Outside::Embedding, Outside::Head] {
            let name =
                if module == Outside::Head { HEAD_IN_MEMORY } else { options.outside(module) };
            let prefix = format!("{PREFIX}.{name}");
            let (ends, whole) = match module {
                Outside::Embedding => ("", parts.embedding.then_some(&self.embedding)),
                _ => (".weight", self.lm_head.as_ref().filter(|_| parts.lm_head)),
            };
            if let Some(OutsideAdapter { lora, magnitude }) = self.adapters.of(module) {
                let [a, b, norm] = outside_names(module).map(|tensor| format!("{prefix}.{tensor}"));
                writer.matrix(&(a + ends), lora.a.view());
                writer.matrix(&(b + ends), lora.b.view());
                if let Some(magnitude) = magnitude {
                    writer.tensor(&norm, &[magnitude.len()], magnitude.iter().copied());
                    beside.dora = true;
                }
                beside.adapted.insert(name.to_string(), lora.spec);
            }
            if let Some(whole) = whole {
                writer.matrix(&format!("{prefix}.weight"), whole.view());
                beside.saved.push(name.to_string());
            }
        }
        if biases != Biases::None {
            let mut add = |name: String, bias: &Array1<T>| {
                writer.tensor(&format!("{PREFIX}.{name}"), &[bias.len()], bias.iter().copied());
            };
            for (l, layer) in self.layers.iter().enumerate() {
                for (p, projection) in layer.projections() {
                    let base = if projection.is_trainable() { ".base_layer" } else { "" };
                    let trained =
                        parts.bias_of(p, projection) && !projection.whole && !p.is_expert();
                    if let Some(bias) = projection.bias.as_ref().filter(|_| trained) {
                        add(format!("{}{base}.bias", options.module(l, p)), bias);
                    }
                }
                for norm in Norm::ALL {
                    let norm_here = layer.norm(norm).filter(|norm| parts.biases && !norm.whole);
                    if let Some(bias) = norm_here.and_then(|norm| norm.bias.as_ref()) {
                        add(options.norm_tensor(l, norm, "bias"), bias);
                    }
                }
            }
            if let Some(bias) =
                self.final_norm.bias.as_ref().filter(|_| parts.biases && !self.final_norm.whole)
            {
                add(options.outside_tensor(Outside::FinalNorm, "bias"), bias);
            }
        }
        beside
    }
}
