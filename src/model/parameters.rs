//! The weights of a model, and what of them is trained.

use super::config::ModelConfig;
use super::gradients::Gradients;
use super::layer::{Layer, LayerOn};
use super::names::Outside;
use super::norm::NormOn;
use super::options::Norm;
use super::outside_adapters::{OutsideAdapters, outside_names};
use super::projection::Projection;
use super::tables::Tables;
use crate::adapters::{AdaptedLinear, LinearOn, MethodOn};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::{Cpu, Ops};
use ndarray::{Array1, Array2};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

/// Tensors outside the projections that can only be trained in full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainableParts {
    /// The embedding table.
    pub embedding: bool,
    /// Every norm's gain.
    pub norms: bool,
    /// Every bias of projections, experts' apart, and of layer norms (PEFT's `bias: all`).
    pub biases: bool,
    /// Biases of experts.
    pub expert_biases: bool,
    /// The biases of projections that carry a method, the others not (PEFT's `bias: lora_only`).
    pub adapted_biases: bool,
    /// Attention sinks.
    pub sinks: bool,
    /// The table of learned positions.
    pub positions: bool,
    /// The output projection; when tied it is the embedding and follows that flag.
    pub lm_head: bool,
}

impl TrainableParts {
    /// All of them.
    pub fn all() -> Self {
        Self {
            embedding: true,
            norms: true,
            biases: true,
            expert_biases: true,
            adapted_biases: false,
            sinks: true,
            positions: true,
            lm_head: true,
        }
    }

    /// Whether the bias of a projection is trained.
    pub(super) fn bias_of<E: Ops>(&self, p: Projection, projection: &LinearOn<E>) -> bool {
        let all = if p.is_expert() { self.expert_biases } else { self.biases };
        let adapted = self.adapted_biases && projection.is_trainable();
        projection.bias.is_some() && (all || adapted || projection.whole)
    }

    /// Whether vectors of every layer are.
    pub(super) fn vectors(&self) -> bool {
        self.norms || self.biases || self.expert_biases
    }

    /// Whether a norm's gain and bias are trained.
    pub(super) fn of_norm<E: Ops>(&self, norm: &NormOn<E>) -> [bool; 2] {
        [self.norms || norm.whole, norm.bias.is_some() && (self.biases || norm.whole)]
    }
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
    /// Table of learned positions.
    pub positions: Option<E::Matrix>,
    /// Layers.
    pub layers: Vec<LayerOn<E>>,
    /// The last norm.
    pub final_norm: NormOn<E>,
    /// Output projection, `V x D`; `None` when tied to the embedding.
    pub lm_head: Option<E::Matrix>,
    /// What is trained outside the projections.
    pub trainable: TrainableParts,
    /// Low-rank updates of embedding and output projection.
    pub adapters: OutsideAdapters<E>,
    /// Embedding and output projection where they are not arrays of this model.
    pub tables: Tables<E>,
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
    Vector(&'a mut E::Vector),
    Projection(&'a mut LinearOn<E>),
}

/// Sees what holds trained tensors, by name.
type See<'a, E> = &'a mut dyn FnMut(&mut E, &str, Trained<'_, E>) -> Result<()>;

/// Shows a norm's vectors, as far as they are trained.
fn see_norm<E: Ops>(
    e: &mut E,
    see: See<'_, E>,
    parts: TrainableParts,
    norm: &mut NormOn<E>,
    names: [String; 2],
) -> Result<()> {
    let [gain, bias_too] = parts.of_norm(norm);
    if gain {
        see(e, &names[0], Trained::Vector(&mut norm.gain))?;
    }
    match &mut norm.bias {
        Some(bias) if bias_too => see(e, &names[1], Trained::Vector(bias)),
        _ => Ok(()),
    }
}

impl<E: Ops> ModelOn<E> {
    /// Full fine-tuning: every tensor is trained.
    pub fn train_fully(&mut self) {
        self.trainable = TrainableParts::all();
        for layer in &mut self.layers {
            layer.projections_mut().for_each(|(_, projection)| projection.method = MethodOn::Full);
        }
    }

    /// Ends full fine-tuning: the weights stay as they are and nothing but adapters is trained from
    /// now on.
    pub fn freeze(&mut self) {
        self.trainable = TrainableParts::default();
        for layer in &mut self.layers {
            for (_, projection) in layer.projections_mut() {
                if matches!(projection.method, MethodOn::Full) {
                    projection.method = MethodOn::Frozen;
                }
                projection.whole = false;
            }
        }
        self.norms_mut().for_each(|norm| norm.whole = false);
    }

    /// Whether the output projection is the embedding.
    pub fn is_tied(&self) -> bool {
        self.lm_head.is_none() && self.tables.head.is_none()
    }

    /// The output projection; of no rows where it stands in [`ModelOn::tables`].
    pub fn head(&self) -> &E::Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    /// Every norm.
    pub(super) fn norms(&self) -> impl Iterator<Item = &NormOn<E>> {
        self.layers.iter().flat_map(|layer| layer.norms.iter().flatten()).chain([&self.final_norm])
    }

    fn norms_mut(&mut self) -> impl Iterator<Item = &mut NormOn<E>> {
        self.layers
            .iter_mut()
            .flat_map(|layer| layer.norms.iter_mut().flatten())
            .chain([&mut self.final_norm])
    }

    /// Number of trained numbers.
    pub fn trainable_elements(&self) -> usize {
        let parts = self.trainable;
        let elements = |x: &E::Matrix| {
            let (rows, columns) = E::shape(x);
            rows * columns
        };
        let (config, options) = (&self.config, &self.config.options);
        let widths = Norm::ALL.map(|norm| config.norm_width(norm).unwrap_or(0));
        let of_norm = |(norm, width): (&NormOn<E>, usize)| {
            parts.of_norm(norm).into_iter().filter(|trained| *trained).count() * width
        };
        let in_layer = |layer: &LayerOn<E>| -> usize {
            layer
                .norms
                .iter()
                .zip(widths)
                .filter_map(|(norm, width)| Some(of_norm((norm.as_ref()?, width))))
                .sum()
        };
        let mut numbers = self.layers.iter().map(in_layer).sum::<usize>()
            + of_norm((&self.final_norm, config.hidden_size));
        let biased = self
            .layers
            .iter()
            .flat_map(|layer| layer.projections())
            .filter(|(p, of)| parts.bias_of(*p, of));
        numbers += biased.map(|(_, p)| p.shape().0).sum::<usize>();
        numbers += if parts.sinks && options.sinks {
            self.layers.len() * config.num_attention_heads
        } else {
            0
        };
        numbers += if parts.embedding { elements(&self.embedding) } else { 0 };
        numbers += if parts.positions { self.positions.as_ref().map_or(0, elements) } else { 0 };
        numbers += if parts.lm_head { self.lm_head.as_ref().map_or(0, elements) } else { 0 };
        numbers += self.adapters.tensors().map(elements).sum::<usize>();
        let projections = self.layers.iter().flat_map(|layer| layer.projections());
        numbers += projections
            .flat_map(|(_, p)| p.trainable_shapes())
            .map(|(rows, columns)| rows * columns)
            .sum::<usize>();
        numbers
    }

    /// Calls `change` on every trainable tensor by name and puts the result in effect.
    ///
    /// Order: embedding; per layer the first gain, projections in the order of [`Projection::ALL`],
    /// the second gain; last gain; output projection.
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
            Trained::Vector(gain) => {
                let mut row = e.row(gain);
                let outcome = change(name, &mut row);
                e.put_row(gain, row);
                outcome
            }
            Trained::Projection(projection) => projection
                .update_on(e, &mut |tensor, values| change(&format!("{name}.{tensor}"), values)),
        })
    }

    /// Everything that holds trained tensors, in the order of [`ModelOn::for_each_trainable_on`].
    fn visit(&mut self, e: &mut E, see: See<'_, E>) -> Result<()> {
        let (parts, options) = (self.trainable, &self.config.options);
        let outside = |module: Outside, tensor: &str| options.outside_tensor(module, tensor);
        if parts.embedding {
            see(e, &outside(Outside::Embedding, "weight"), Trained::Matrix(&mut self.embedding))?;
        }
        let adapter = self.adapters.embedding.iter_mut().flat_map(|adapter| adapter.tensors_mut());
        for (tensor, name) in adapter.zip(outside_names(Outside::Embedding)) {
            see(e, &outside(Outside::Embedding, name), Trained::Matrix(tensor))?;
        }
        if let (Some(table), true) = (&mut self.positions, parts.positions) {
            see(e, &outside(Outside::Positions, "weight"), Trained::Matrix(table))?;
        }
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let names =
                |norm: Norm| ["weight", "bias"].map(|tensor| options.norm_tensor(l, norm, tensor));
            let [first, rest @ ..] = &mut layer.norms;
            if let Some(first) = first {
                see_norm(e, see, parts, first, names(Norm::BeforeAttention))?;
            }
            for (&p, projection) in &mut layer.projections {
                let name = options.module(l, p);
                see(e, &name, Trained::Projection(projection))?;
                let trained = parts.bias_of(p, projection);
                if let (Some(bias), true) = (&mut projection.bias, trained) {
                    see(e, &format!("{name}.bias"), Trained::Vector(bias))?;
                }
            }
            if let (Some(sinks), true) = (&mut layer.sinks, parts.sinks) {
                see(e, &options.sinks_name(l), Trained::Vector(sinks))?;
            }
            for (of, vectors) in Norm::ALL.into_iter().skip(1).zip(rest) {
                if let Some(vectors) = vectors {
                    see_norm(e, see, parts, vectors, names(of))?;
                }
            }
        }
        let names = ["weight", "bias"].map(|tensor| outside(Outside::FinalNorm, tensor));
        see_norm(e, see, parts, &mut self.final_norm, names)?;
        if let (Some(head), true) = (&mut self.lm_head, parts.lm_head) {
            see(e, &outside(Outside::Head, "weight"), Trained::Matrix(head))?;
        }
        let adapter = self.adapters.head.iter_mut().flat_map(|adapter| adapter.tensors_mut());
        for (tensor, name) in adapter.zip(outside_names(Outside::Head)) {
            see(e, &outside(Outside::Head, name), Trained::Matrix(tensor))?;
        }
        Ok(())
    }

    /// Copies of the trained tensors by name, made by `values` where they belong to a projection.
    fn trained_copies(
        &self,
        e: &mut E,
        values: impl Fn(&LinearOn<E>, &mut E) -> Vec<E::Matrix>,
    ) -> Vec<(String, E::Matrix)> {
        let (parts, options) = (self.trainable, &self.config.options);
        let outside = |module: Outside, tensor: &str| options.outside_tensor(module, tensor);
        let mut all = Vec::new();
        if parts.embedding {
            all.push((outside(Outside::Embedding, "weight"), self.embedding.clone()));
        }
        let adapter = |module: Outside| {
            let tensors =
                self.adapters.of(module).into_iter().flat_map(|adapter| adapter.tensors());
            tensors
                .zip(outside_names(module))
                .map(move |(tensor, name)| (outside(module, name), tensor.clone()))
        };
        all.extend(adapter(Outside::Embedding));
        if parts.positions {
            all.extend(
                self.positions
                    .as_ref()
                    .map(|table| (outside(Outside::Positions, "weight"), table.clone())),
            );
        }
        let norm = |e: &mut E, norm: Option<&NormOn<E>>, names: [String; 2]| {
            let ([gain, bias], trained) =
                (names, norm.map_or([false; 2], |norm| parts.of_norm(norm)));
            let gain = norm.filter(|_| trained[0]).map(|norm| (gain, e.row(&norm.gain)));
            let bias = norm
                .filter(|_| trained[1])
                .and_then(|norm| Some((bias, e.row(norm.bias.as_ref()?))));
            gain.into_iter().chain(bias)
        };
        for (l, layer) in self.layers.iter().enumerate() {
            let names =
                |norm: Norm| ["weight", "bias"].map(|tensor| options.norm_tensor(l, norm, tensor));
            all.extend(norm(e, layer.norm(Norm::BeforeAttention), names(Norm::BeforeAttention)));
            for (p, projection) in layer.projections() {
                let module = options.module(l, p);
                let named = projection.method.trainable_names().iter().zip(values(projection, e));
                all.extend(named.map(|(name, values)| (format!("{module}.{name}"), values)));
                let bias = projection
                    .bias
                    .as_ref()
                    .filter(|_| parts.bias_of(p, projection))
                    .map(|bias| e.row(bias));
                all.extend(bias.map(|bias| (format!("{module}.bias"), bias)));
            }
            let sinks = layer.sinks.as_ref().filter(|_| parts.sinks);
            all.extend(sinks.map(|sinks| (options.sinks_name(l), e.row(sinks))));
            for of in Norm::ALL.into_iter().skip(1) {
                all.extend(norm(e, layer.norm(of), names(of)));
            }
        }
        let names = ["weight", "bias"].map(|tensor| outside(Outside::FinalNorm, tensor));
        all.extend(norm(e, Some(&self.final_norm), names));
        if parts.lm_head {
            all.extend(
                self.lm_head.as_ref().map(|head| (outside(Outside::Head, "weight"), head.clone())),
            );
        }
        all.extend(adapter(Outside::Head));
        all
    }

    /// Copies of the trained values as they act. PaCA's are taken from the weight itself: its
    /// stored tensor is the weight over a scaling, and a division followed by a product need not
    /// return the same bits.
    pub fn acting_values_on(&self, e: &mut E) -> Vec<(String, E::Matrix)> {
        self.trained_copies(e, |projection, e| projection.acting_values(e))
    }

    /// Puts values as [`ModelOn::acting_values_on`] gives them; `read` gets each tensor's name and
    /// shape.
    ///
    /// # Errors
    /// What `read` returns.
    pub fn put_acting_values_on(
        &mut self,
        e: &mut E,
        read: &mut ReadValuesOn<'_, E>,
    ) -> Result<()> {
        self.visit(e, &mut |e, name, tensor| {
            match tensor {
                Trained::Matrix(values) => *values = read(name, E::shape(values))?,
                Trained::Vector(gain) => {
                    let shape = E::shape(&e.row(gain));
                    e.put_row(gain, read(name, shape)?);
                }
                Trained::Projection(projection) => {
                    let names = projection.method.trainable_names().iter();
                    let named = names.zip(projection.trainable_shapes());
                    let values =
                        named.map(|(tensor, shape)| read(&format!("{name}.{tensor}"), shape));
                    let values = values.collect::<Result<Vec<_>>>()?;
                    projection.put_acting(e, values)?;
                }
            }
            Ok(())
        })
    }

    /// Whether anything strictly below layer `index` is trained in a step that begins at layer
    /// `first`, so that the gradient of the layer's input is needed.
    pub(crate) fn trained_below(&self, index: usize, first: usize) -> bool {
        let parts = self.trainable;
        let outside = parts.embedding || parts.positions || self.adapters.embedding.is_some();
        let vectors = parts.vectors() || (parts.sinks && self.config.options.sinks);
        (first == 0 && outside)
            || (index > first && vectors)
            || self.layers[first..index].iter().any(LayerOn::has_whole_norm)
            || self.layers[first..index]
                .iter()
                .any(|l| l.projections().any(|(_, p)| p.is_trainable()))
    }
}

impl<T: Real> Model<T> {
    /// Normal weights of deviation 0.02 (the two that end a residual branch divided by sqrt(2
    /// layers)), gains one.
    ///
    /// # Errors
    /// As [`ModelConfig::check`]; [`Error::TooLarge`] beyond 2^33 weights.
    pub fn random(config: ModelConfig, rng: &mut impl Rng) -> Result<Self> {
        config.check()?;
        let (needed, limit) = (config.parameters() as u128, 1 << 33);
        if needed > limit {
            return Err(Error::TooLarge {
                what: "a model with random weights".into(),
                needed,
                limit,
                unit: "weights",
            });
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
        let options = &config.options;
        let norm = |width: usize| NormOn {
            gain: Array1::from_elem(width, unit),
            bias: options.layer_norm.then(|| Array1::zeros(width)),
            whole: false,
        };
        let layers = (0..config.num_hidden_layers)
            .map(|l| {
                let projections = config.projections(l).into_iter().map(|p| {
                    let shape = config.projection_shape(p);
                    let weight = normal(shape, if p.ends_branch() { residual } else { 0.02 });
                    let mut projection = AdaptedLinear::frozen(weight);
                    projection.bias = options.has_bias(p).then(|| Array1::zeros(shape.0));
                    (p, projection)
                });
                let projections: Vec<_> = projections.collect();
                let sinks = options.sinks.then(|| Array1::zeros(config.num_attention_heads));
                Layer::new(projections, Norm::ALL.map(|of| config.norm_width(of).map(norm)), sinks)
            })
            .collect();
        let positions = options
            .positions
            .map(|offset| normal((config.max_position_embeddings + offset, width), 0.02));
        let final_norm = norm(width);
        let lm_head =
            (!config.tie_word_embeddings).then(|| normal((config.vocab_size, width), 0.02));
        Ok(Self {
            config,
            embedding,
            positions,
            layers,
            final_norm,
            lm_head,
            trainable: TrainableParts::default(),
            adapters: Default::default(),
            tables: Default::default(),
        })
    }

    /// Zeroed sinks for every trainable tensor.
    pub fn zero_gradients(&self) -> Gradients<T> {
        Gradients::zeros(self, Cpu::default())
    }

    /// Calls `change` on every trainable tensor by name, as a contiguous array, and writes the
    /// result back.
    ///
    /// # Errors
    /// As [`ModelOn::for_each_trainable_on`].
    pub fn for_each_trainable(
        &mut self,
        change: &mut dyn FnMut(&str, &mut Array2<T>) -> Result<()>,
    ) -> Result<()> {
        self.for_each_trainable_on(&mut Cpu::default(), change)
    }

    /// As [`Model::for_each_trainable`], each tensor with its gradient: the interface of an
    /// optimizer.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the gradients were made for other trainable tensors; what
    /// `change` returns.
    pub fn update(
        &mut self,
        gradients: &Gradients<T>,
        change: &mut dyn FnMut(Trainable<'_, T>) -> Result<()>,
    ) -> Result<()> {
        let tensors = gradients.sinks();
        let mut sinks = tensors.iter();
        let wrong =
            |name: &str| Error::invalid("gradients", name, "were made for other trainable tensors");
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

    /// Names of the trainable tensors, in the order of [`ModelOn::for_each_trainable_on`].
    pub fn trainable_names(&self) -> Vec<String> {
        let nothing = |projection: &LinearOn<Cpu<T>>, _: &mut Cpu<T>| {
            projection.method.trainable_names().iter().map(|_| Array2::default((0, 0))).collect()
        };
        self.trained_copies(&mut Cpu::default(), nothing)
            .into_iter()
            .map(|(name, _)| name)
            .collect()
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
            + self.positions.as_ref().map_or(0, Array2::len)
            + self.final_norm.gain.len()
            + self.final_norm.bias.as_ref().map_or(0, Array1::len)
            + self.lm_head.as_ref().map_or(0, Array2::len)
            + self.layers.iter().map(LayerOn::vectors).sum::<usize>();
        let projections = || self.layers.iter().flat_map(|l| l.projections());
        let weights: usize = projections().map(|(_, p)| p.base.bytes()).sum();
        let factors: usize = self.adapters.tensors().map(Array2::len).sum();
        (
            outside * single + weights,
            (factors + projections().map(|(_, p)| p.held()).sum::<usize>()) * single,
        )
    }
}
