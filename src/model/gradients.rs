//! Gradient buffers: one per trainable tensor, none for frozen ones.

use super::names::Outside;
use super::norm::{NormOn, NormSinks};
use super::options::{Norm, Options};
use super::outside_adapters::{OutsideSinks, outside_names};
use super::parameters::ModelOn;
use super::projection::Projection;
use crate::linalg::scratch::fill_zero;
use crate::linalg::{Real, Scratch, on_workers};
use crate::ops::{Cpu, Ops};
use ndarray::{Array2, ArrayView2};
use std::collections::BTreeMap;

/// Sinks of one layer.
#[derive(Debug, Clone)]
pub struct LayerGradientsOn<E: Ops> {
    /// Norms in the order of [`Norm::ALL`], each vector `1 x` its width.
    pub norms: [NormSinks<E>; 6],
    /// Attention sinks, `1 x H`.
    pub sinks: Option<E::Sink>,
    /// Biases of projections, each `1 x out`.
    pub biases: BTreeMap<Projection, E::Sink>,
    /// Trainable tensors of each trained projection.
    pub projections: BTreeMap<Projection, Vec<E::Sink>>,
    names: BTreeMap<Projection, &'static [&'static str]>,
}

/// Sinks of a model on some engine. They accumulate until they are zeroed or dropped.
#[derive(Debug, Clone)]
pub struct GradientsOn<E: Ops> {
    /// Embedding table (with the output projection's part when tied).
    pub embedding: Option<E::Sink>,
    /// Table of learned positions.
    pub positions: Option<E::Sink>,
    /// One entry per layer.
    pub layers: Vec<LayerGradientsOn<E>>,
    /// The last norm, each vector `1 x D`.
    pub final_norm: NormSinks<E>,
    /// Output projection when not tied.
    pub lm_head: Option<E::Sink>,
    /// Low-rank updates of embedding and output projection.
    pub outside: OutsideSinks<E>,
    /// What names the tensors.
    options: Options,
    /// The engine with its working memory, kept for the next step.
    pub(crate) engine: E,
}

/// Sinks of one layer on the processor.
pub type LayerGradients<T> = LayerGradientsOn<Cpu<T>>;

/// Sinks of a model on the processor, and the working memory of its steps. They accumulate until
/// [`Gradients::fill_zero`]; keep one value over the steps of a training, so that each step reuses
/// the buffers of the last.
pub type Gradients<T> = GradientsOn<Cpu<T>>;

impl<E: Ops> GradientsOn<E> {
    /// Zeroed sinks for what a model trains.
    pub(crate) fn zeros(model: &ModelOn<E>, engine: E) -> Self {
        let (config, parts) = (&model.config, model.trainable);
        let options = config.options.clone();
        let vector = |wanted: bool, width: usize| wanted.then(|| engine.sink((1, width)));
        let norm = |of: Option<&NormOn<E>>, width: Option<usize>| {
            let [gain, bias] = of.map_or([false; 2], |norm| parts.of_norm(norm));
            let width = width.unwrap_or(0);
            NormSinks { gain: vector(gain, width), bias: vector(bias, width) }
        };
        let layers = model
            .layers
            .iter()
            .map(|layer| LayerGradientsOn {
                norms: Norm::ALL.map(|of| norm(layer.norm(of), config.norm_width(of))),
                sinks: vector(parts.sinks && options.sinks, config.num_attention_heads),
                biases: layer
                    .projections()
                    .filter(|(p, projection)| parts.bias_of(*p, projection))
                    .map(|(p, projection)| (p, engine.sink((1, projection.shape().0))))
                    .collect(),
                projections: layer
                    .projections()
                    .filter(|(_, projection)| projection.is_trainable())
                    .map(|(p, projection)| {
                        (
                            p,
                            projection
                                .trainable_shapes()
                                .into_iter()
                                .map(|shape| engine.sink(shape))
                                .collect(),
                        )
                    })
                    .collect(),
                names: layer
                    .projections()
                    .map(|(p, of)| (p, of.method.trainable_names()))
                    .collect(),
            })
            .collect();
        let table = |wanted: bool, table: Option<&E::Matrix>| {
            table.filter(|_| wanted).map(|table| engine.sink(E::shape(table)))
        };
        let (embedding, lm_head) = (
            table(parts.embedding, Some(&model.embedding)),
            table(parts.lm_head, model.lm_head.as_ref()),
        );
        let positions = table(parts.positions, model.positions.as_ref());
        let final_norm = norm(Some(&model.final_norm), Some(config.hidden_size));
        let outside = model.adapters.sinks(&engine);
        Self { embedding, positions, layers, final_norm, lm_head, outside, options, engine }
    }

    /// Every sink with its tensor's name, in the order of [`ModelOn::for_each_trainable_on`].
    pub(crate) fn sinks(&self) -> Vec<(String, &E::Sink)> {
        let options = &self.options;
        let outside = |module: Outside, tensor: &str| options.outside_tensor(module, tensor);
        let mut all: Vec<(String, &E::Sink)> = Vec::new();
        all.extend(self.embedding.as_ref().map(|g| (outside(Outside::Embedding, "weight"), g)));
        let names = outside_names(Outside::Embedding).map(|name| outside(Outside::Embedding, name));
        all.extend(names.into_iter().zip(&self.outside.embedding));
        all.extend(self.positions.as_ref().map(|g| (outside(Outside::Positions, "weight"), g)));
        for (l, layer) in self.layers.iter().enumerate() {
            let norm = |norm: Norm| {
                let sinks = &layer.norms[norm as usize];
                let gain = sinks.gain.as_ref().map(|g| (options.norm_tensor(l, norm, "weight"), g));
                let bias = sinks.bias.as_ref().map(|g| (options.norm_tensor(l, norm, "bias"), g));
                gain.into_iter().chain(bias)
            };
            all.extend(norm(Norm::BeforeAttention));
            for (&p, names) in &layer.names {
                let module = options.module(l, p);
                let sinks = layer.projections.get(&p).into_iter().flatten();
                all.extend(
                    names.iter().zip(sinks).map(|(name, g)| (format!("{module}.{name}"), g)),
                );
                all.extend(layer.biases.get(&p).map(|g| (format!("{module}.bias"), g)));
            }
            all.extend(layer.sinks.as_ref().map(|g| (options.sinks_name(l), g)));
            all.extend(Norm::ALL[1..].iter().flat_map(|&of| norm(of)));
        }
        all.extend(
            self.final_norm.gain.as_ref().map(|g| (outside(Outside::FinalNorm, "weight"), g)),
        );
        all.extend(self.final_norm.bias.as_ref().map(|g| (outside(Outside::FinalNorm, "bias"), g)));
        all.extend(self.lm_head.as_ref().map(|g| (outside(Outside::Head, "weight"), g)));
        let names = outside_names(Outside::Head).map(|name| outside(Outside::Head, name));
        all.extend(names.into_iter().zip(&self.outside.head));
        all
    }

    /// Calls `change` on every sink, in the same order.
    pub(crate) fn for_each_sink(&mut self, mut change: impl FnMut(&mut E::Sink)) {
        self.embedding.iter_mut().for_each(&mut change);
        self.outside.embedding.iter_mut().chain(&mut self.positions).for_each(&mut change);
        for layer in &mut self.layers {
            let [first, rest @ ..] = &mut layer.norms;
            first.gain.iter_mut().chain(&mut first.bias).for_each(&mut change);
            for p in layer.names.keys() {
                layer.projections.get_mut(p).into_iter().flatten().for_each(&mut change);
                layer.biases.get_mut(p).into_iter().for_each(&mut change);
            }
            layer.sinks.iter_mut().for_each(&mut change);
            rest.iter_mut()
                .flat_map(|n| n.gain.iter_mut().chain(&mut n.bias))
                .for_each(&mut change);
        }
        let last = &mut self.final_norm;
        last.gain.iter_mut().chain(&mut last.bias).chain(&mut self.lm_head).for_each(&mut change);
        self.outside.head.iter_mut().for_each(&mut change);
    }
}

impl<T: Real> Gradients<T> {
    /// Every buffer with its tensor's name, in the order of [`super::Model::update`].
    pub fn named(&self) -> Vec<(String, ArrayView2<'_, T>)> {
        self.sinks().into_iter().map(|(name, array)| (name, array.view())).collect()
    }

    /// Calls `change` on every buffer, in the same order.
    pub fn for_each_mut(&mut self, change: impl FnMut(&mut Array2<T>)) {
        self.for_each_sink(change);
    }

    /// Zeroes every buffer.
    pub fn fill_zero(&mut self) {
        on_workers(|| {
            self.for_each_mut(|g| match g.as_slice_memory_order_mut() {
                Some(entries) => fill_zero(entries),
                None => g.fill(T::zero()),
            });
        });
    }

    /// Multiplies every buffer, as gradient clipping does.
    pub fn scale(&mut self, factor: T) {
        self.for_each_mut(|g| g.mapv_inplace(|x| x * factor));
    }

    /// Bytes of working memory held for the next step; [`Gradients::release_scratch`] frees them.
    pub fn scratch_bytes(&self) -> usize {
        self.engine.scratch.bytes()
    }

    /// Frees the working memory, for instance before an evaluation.
    pub fn release_scratch(&mut self) {
        self.engine.scratch = Scratch::default();
    }

    /// Euclidean norm over all buffers, summed in double precision.
    pub fn norm(&self) -> f64 {
        let square = |g: &Array2<T>| g.iter().map(|x| x.widen() * x.widen()).sum::<f64>();
        self.sinks().iter().map(|(_, g)| square(g)).sum::<f64>().sqrt()
    }

    /// (name, bytes) of every buffer, for a memory ledger.
    pub fn bytes_by_name(&self) -> Vec<(String, usize)> {
        self.sinks().into_iter().map(|(name, g)| (name, g.len() * size_of::<T>())).collect()
    }
}
