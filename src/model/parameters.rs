//! The weights of a model, and what of them is trained.

use super::config::ModelConfig;
use super::gradients::Gradients;
use super::layer::{Layer, LayerOn};
use super::options::Norm;
use crate::adapters::{AdaptedLinear, LinearOn, MethodOn};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::{Cpu, Ops};
use ndarray::{Array1, Array2};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

/// The seven projections of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// `self_attn.q_proj`.
    Query,
    /// `self_attn.k_proj`.
    Key,
    /// `self_attn.v_proj`.
    Value,
    /// `self_attn.o_proj`.
    Output,
    /// `mlp.gate_proj`.
    Gate,
    /// `mlp.up_proj`.
    Up,
    /// `mlp.down_proj`.
    Down,
}

impl Projection {
    /// In the order in which a layer stores and updates them.
    pub const ALL: [Projection; 7] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::Output,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// Path inside a layer, as in a Hugging Face checkpoint.
    pub fn path(self) -> &'static str {
        match self {
            Projection::Query => "self_attn.q_proj",
            Projection::Key => "self_attn.k_proj",
            Projection::Value => "self_attn.v_proj",
            Projection::Output => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::Down => "mlp.down_proj",
        }
    }

    /// PEFT's module name, for instance `q_proj`.
    pub fn module(self) -> &'static str {
        let path = self.path();
        path.split_once('.').map_or(path, |(_, module)| module)
    }
}

impl std::str::FromStr for Projection {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Projection::ALL.into_iter().find(|p| p.module() == text || p.path() == text).ok_or_else(|| {
            let known = Projection::ALL.map(Projection::module).join(", ");
            Error::invalid("target module", text, format!("must be one of {known}"))
        })
    }
}

/// Tensors outside the projections that can only be trained in full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainableParts {
    /// The embedding table.
    pub embedding: bool,
    /// Every norm's gain.
    pub norms: bool,
    /// Every projection's bias.
    pub biases: bool,
    /// The output projection; when tied it is the embedding and follows that flag.
    pub lm_head: bool,
}

/// Gives a trained tensor's values by its name and shape.
pub type ReadValuesOn<'a, E> = dyn FnMut(&str, (usize, usize)) -> Result<<E as Ops>::Matrix> + 'a;

/// Gives them on the processor.
pub type ReadValues<'a, T> = ReadValuesOn<'a, Cpu<T>>;

/// A decoder with its adapters, on some engine.
#[derive(Debug, Clone)]
pub struct ModelOn<E: Ops> {
    /// Sizes.
    pub config: ModelConfig,
    /// Embedding table, `V x D`.
    pub embedding: E::Matrix,
    /// Layers.
    pub layers: Vec<LayerOn<E>>,
    /// Gain of the last norm.
    pub final_norm: E::Vector,
    /// Output projection, `V x D`; `None` when tied to the embedding.
    pub lm_head: Option<E::Matrix>,
    /// What is trained outside the projections.
    pub trainable: TrainableParts,
}

/// A decoder with its adapters on the processor.
pub type Model<T> = ModelOn<Cpu<T>>;

/// A trainable tensor with its gradient, as an optimizer sees it.
pub struct Trainable<'a, T> {
    /// For instance `model.layers.0.self_attn.q_proj.lora_A`.
    pub name: &'a str,
    /// The values, contiguous, to be changed in place.
    pub values: &'a mut Array2<T>,
    /// The gradient.
    pub gradient: &'a Array2<T>,
}

/// What holds trained tensors.
enum Trained<'a, E: Ops> {
    Matrix(&'a mut E::Matrix),
    Gain(&'a mut E::Vector),
    Projection(&'a mut LinearOn<E>),
}

/// Sees what holds trained tensors, by name.
type See<'a, E> = &'a mut dyn FnMut(&mut E, &str, Trained<'_, E>) -> Result<()>;

impl<E: Ops> ModelOn<E> {
    /// Full fine-tuning: every tensor is trained.
    pub fn train_fully(&mut self) {
        self.trainable = TrainableParts { embedding: true, norms: true, biases: true, lm_head: true };
        for layer in &mut self.layers {
            for p in Projection::ALL {
                layer.projection_mut(p).method = MethodOn::Full;
            }
        }
    }

    /// Ends full fine-tuning: the weights stay as they are and nothing but adapters is trained from now on.
    pub fn freeze(&mut self) {
        self.trainable = TrainableParts::default();
        for layer in &mut self.layers {
            for p in Projection::ALL {
                let method = &mut layer.projection_mut(p).method;
                if matches!(method, MethodOn::Full) {
                    *method = MethodOn::Frozen;
                }
            }
        }
    }

    /// The output projection.
    pub fn head(&self) -> &E::Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    /// Number of trained numbers.
    pub fn trainable_elements(&self) -> usize {
        let parts = self.trainable;
        let elements = |x: &E::Matrix| {
            let (rows, columns) = E::shape(x);
            rows * columns
        };
        let widths: usize = Norm::ALL.iter().filter_map(|&norm| self.config.norm_width(norm)).sum();
        let gains = if parts.norms { self.layers.len() * widths + self.config.hidden_size } else { 0 };
        let biases = || Projection::ALL.into_iter().filter(|&p| self.config.options.biases[p as usize]);
        let outs: usize = biases().map(|p| self.config.projection_shape(p).0).sum();
        let gains = gains + if parts.biases { self.layers.len() * outs } else { 0 };
        let table = if parts.embedding { elements(&self.embedding) } else { 0 };
        let head = if parts.lm_head { self.lm_head.as_ref().map_or(0, elements) } else { 0 };
        let adapters: usize = self
            .layers
            .iter()
            .flat_map(|layer| Projection::ALL.map(|p| layer.projection(p).trainable_shapes()))
            .flatten()
            .map(|(rows, columns)| rows * columns)
            .sum();
        gains + table + head + adapters
    }

    /// Calls `change` on every trainable tensor by name and puts the result in effect.
    ///
    /// Order: embedding; per layer the first gain, projections in the order of [`Projection::ALL`], the second
    /// gain; last gain; output projection.
    ///
    /// # Errors
    /// What `change` returns.
    pub fn for_each_trainable_on(
        &mut self,
        e: &mut E,
        change: &mut dyn FnMut(&str, &mut E::Matrix) -> Result<()>,
    ) -> Result<()> {
        self.visit(e, &mut |e, name, tensor| match tensor {
            Trained::Matrix(values) => change(name, values),
            Trained::Gain(gain) => {
                let mut row = e.row(gain);
                let outcome = change(name, &mut row);
                e.put_row(gain, row);
                outcome
            }
            Trained::Projection(projection) => {
                projection.update_on(e, &mut |tensor, values| change(&format!("{name}.{tensor}"), values))
            }
        })
    }

    /// Everything that holds trained tensors, in the order of [`ModelOn::for_each_trainable_on`].
    fn visit(&mut self, e: &mut E, see: See<'_, E>) -> Result<()> {
        let (parts, options) = (self.trainable, &self.config.options);
        if parts.embedding {
            see(e, "model.embed_tokens.weight", Trained::Matrix(&mut self.embedding))?;
        }
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let prefix = format!("model.layers.{l}");
            let norm_name = |norm: Norm| format!("{prefix}.{}.weight", options.norm_name(norm).unwrap_or(""));
            if let (Some(gain), true) = (&mut layer.norms[0], parts.norms) {
                see(e, &norm_name(Norm::BeforeAttention), Trained::Gain(gain))?;
            }
            for p in Projection::ALL {
                let name = format!("{prefix}.{}", p.path());
                let projection = layer.projection_mut(p);
                see(e, &name, Trained::Projection(projection))?;
                if let (Some(bias), true) = (&mut projection.bias, parts.biases) {
                    see(e, &format!("{name}.bias"), Trained::Gain(bias))?;
                }
            }
            for norm in Norm::ALL.into_iter().skip(1).filter(|_| parts.norms) {
                if let Some(gain) = &mut layer.norms[norm as usize] {
                    see(e, &norm_name(norm), Trained::Gain(gain))?;
                }
            }
        }
        if parts.norms {
            see(e, "model.norm.weight", Trained::Gain(&mut self.final_norm))?;
        }
        if let (Some(head), true) = (&mut self.lm_head, parts.lm_head) {
            see(e, "lm_head.weight", Trained::Matrix(head))?;
        }
        Ok(())
    }

    /// Copies of the trained tensors by name, made by `values` where they belong to a projection.
    fn trained_copies(
        &self,
        e: &mut E,
        values: impl Fn(&LinearOn<E>, &mut E) -> Vec<E::Matrix>,
    ) -> Vec<(String, E::Matrix)> {
        let parts = self.trainable;
        let mut all = Vec::new();
        if parts.embedding {
            all.push(("model.embed_tokens.weight".into(), self.embedding.clone()));
        }
        for (l, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            let gain = |norm: Norm, e: &mut E| {
                let name = self.config.options.norm_name(norm).unwrap_or("");
                let row = layer.gain(norm).filter(|_| parts.norms).map(|gain| e.row(gain));
                row.map(|row| (format!("{prefix}.{name}.weight"), row))
            };
            all.extend(gain(Norm::BeforeAttention, e));
            for p in Projection::ALL {
                let projection = layer.projection(p);
                let names = projection.method.trainable_names().iter();
                let named = names.zip(values(projection, e));
                all.extend(named.map(|(name, values)| (format!("{prefix}.{}.{name}", p.path()), values)));
                let bias = projection.bias.as_ref().filter(|_| parts.biases).map(|bias| e.row(bias));
                all.extend(bias.map(|bias| (format!("{prefix}.{}.bias", p.path()), bias)));
            }
            all.extend(Norm::ALL.into_iter().skip(1).filter_map(|norm| gain(norm, e)));
        }
        if parts.norms {
            all.push(("model.norm.weight".into(), e.row(&self.final_norm)));
        }
        if parts.lm_head {
            all.extend(self.lm_head.as_ref().map(|head| ("lm_head.weight".into(), head.clone())));
        }
        all
    }

    /// Copies of the trained values as they act. PaCA's are taken from the weight itself: its stored tensor is the
    /// weight over a scaling, and a division followed by a product need not return the same bits.
    pub fn acting_values_on(&self, e: &mut E) -> Vec<(String, E::Matrix)> {
        self.trained_copies(e, |projection, e| projection.acting_values(e))
    }

    /// Puts values as [`ModelOn::acting_values_on`] gives them; `read` gets each tensor's name and shape.
    ///
    /// # Errors
    /// What `read` returns.
    pub fn put_acting_values_on(&mut self, e: &mut E, read: &mut ReadValuesOn<'_, E>) -> Result<()> {
        self.visit(e, &mut |e, name, tensor| {
            match tensor {
                Trained::Matrix(values) => *values = read(name, E::shape(values))?,
                Trained::Gain(gain) => {
                    let shape = E::shape(&e.row(gain));
                    e.put_row(gain, read(name, shape)?);
                }
                Trained::Projection(projection) => {
                    let names = projection.method.trainable_names().iter();
                    let named = names.zip(projection.trainable_shapes());
                    let values = named.map(|(tensor, shape)| read(&format!("{name}.{tensor}"), shape));
                    let values = values.collect::<Result<Vec<_>>>()?;
                    projection.put_acting(e, values)?;
                }
            }
            Ok(())
        })
    }

    /// Whether anything strictly below layer `index` is trained, so that its input's gradient is needed.
    pub(crate) fn trained_below(&self, index: usize) -> bool {
        self.trainable.embedding
            || (index > 0 && (self.trainable.norms || self.trainable.biases))
            || self.layers[..index].iter().any(|l| Projection::ALL.into_iter().any(|p| l.projection(p).is_trainable()))
    }
}

impl<T: Real> Model<T> {
    /// Normal weights of deviation 0.02 (the two that end a residual branch divided by sqrt(2 layers)), gains one.
    ///
    /// # Errors
    /// As [`ModelConfig::check`]; [`Error::TooLarge`] beyond 2^33 weights.
    pub fn random(config: ModelConfig, rng: &mut impl Rng) -> Result<Self> {
        config.check()?;
        let (needed, limit) = (config.parameters() as u128, 1 << 33);
        if needed > limit {
            return Err(Error::TooLarge { what: "a model with random weights".into(), needed, limit, unit: "weights" });
        }
        let residual = 0.02 / (2.0 * config.num_hidden_layers as f64).sqrt();
        let mut normal = |shape: (usize, usize), deviation: f64| {
            Array2::from_shape_simple_fn(shape, || {
                let x: f64 = StandardNormal.sample(rng);
                T::of(deviation * x)
            })
        };
        let width = config.hidden_size;
        let embedding = normal((config.vocab_size, width), 0.02);
        // A gain of 1, whichever way the family writes it.
        let unit = T::of(if config.options.unit_gain { 0.0 } else { 1.0 });
        let layers = (0..config.num_hidden_layers)
            .map(|_| {
                let projections = Projection::ALL.map(|p| {
                    let (shape, ends) =
                        (config.projection_shape(p), matches!(p, Projection::Output | Projection::Down));
                    let mut projection = AdaptedLinear::frozen(normal(shape, if ends { residual } else { 0.02 }));
                    projection.bias = config.options.biases[p as usize].then(|| Array1::zeros(shape.0));
                    projection
                });
                let gain = |norm| config.norm_width(norm).map(|width| Array1::from_elem(width, unit));
                Layer::new(projections, Norm::ALL.map(gain))
            })
            .collect();
        let lm_head = (!config.tie_word_embeddings).then(|| normal((config.vocab_size, width), 0.02));
        let final_norm = Array1::from_elem(width, unit);
        Ok(Self { config, embedding, layers, final_norm, lm_head, trainable: TrainableParts::default() })
    }

    /// Zeroed sinks for every trainable tensor.
    pub fn zero_gradients(&self) -> Gradients<T> {
        Gradients::zeros(self, Cpu::default())
    }

    /// Calls `change` on every trainable tensor by name, as a contiguous array, and writes the result back.
    ///
    /// # Errors
    /// As [`ModelOn::for_each_trainable_on`].
    pub fn for_each_trainable(&mut self, change: &mut dyn FnMut(&str, &mut Array2<T>) -> Result<()>) -> Result<()> {
        self.for_each_trainable_on(&mut Cpu::default(), change)
    }

    /// As [`Model::for_each_trainable`], each tensor with its gradient: the interface of an optimizer.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the gradients were made for other trainable tensors; what `change` returns.
    pub fn update(
        &mut self,
        gradients: &Gradients<T>,
        change: &mut dyn FnMut(Trainable<'_, T>) -> Result<()>,
    ) -> Result<()> {
        let tensors = gradients.sinks();
        let mut sinks = tensors.iter();
        let wrong = |name: &str| Error::invalid("gradients", name, "were made for other trainable tensors");
        self.for_each_trainable(&mut |name, values| match sinks.next() {
            Some((found, gradient)) if found == name && gradient.dim() == values.dim() => {
                change(Trainable { name, values, gradient })
            }
            _ => Err(wrong(name)),
        })?;
        match sinks.next() {
            Some((name, _)) => Err(wrong(name)),
            None => Ok(()),
        }
    }

    /// Copies of the trainable tensors by name.
    ///
    /// Values are gathered without being written back, so the model is not touched.
    pub fn trainable_values(&self) -> Vec<(String, Array2<T>)> {
        self.trained_copies(&mut Cpu::default(), |projection, e| projection.values(e))
    }

    /// As [`ModelOn::acting_values_on`].
    pub fn acting_values(&self) -> Vec<(String, Array2<T>)> {
        self.acting_values_on(&mut Cpu::default())
    }

    /// As [`ModelOn::put_acting_values_on`].
    ///
    /// # Errors
    /// What `read` returns.
    pub fn put_acting_values(&mut self, read: &mut ReadValues<'_, T>) -> Result<()> {
        self.put_acting_values_on(&mut Cpu::default(), read)
    }

    /// Bytes held at rest: (weights, adapter tensors beside them).
    pub fn weight_bytes(&self) -> (usize, usize) {
        let single = size_of::<T>();
        let outside = self.embedding.len()
            + self.final_norm.len()
            + self.lm_head.as_ref().map_or(0, Array2::len)
            + self.layers.iter().map(LayerOn::vectors).sum::<usize>();
        let projections = || self.layers.iter().flat_map(|l| Projection::ALL.map(|p| l.projection(p)));
        let weights: usize = projections().map(|p| p.base.bytes()).sum();
        (outside * single + weights, projections().map(LinearOn::held).sum::<usize>() * single)
    }
}
