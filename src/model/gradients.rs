//! Gradient buffers: one per trainable tensor, none for frozen ones.

use super::options::Norm;
use super::parameters::{ModelOn, Projection};
use crate::linalg::scratch::fill_zero;
use crate::linalg::{Real, Scratch, on_workers};
use crate::ops::{Cpu, Ops};
use ndarray::{Array2, ArrayView2};

/// Sinks of one layer.
#[derive(Debug, Clone)]
pub struct LayerGradientsOn<E: Ops> {
    /// Gains in the order of [`Norm::ALL`], each `1 x` its width.
    pub norms: [Option<E::Sink>; 6],
    /// Biases in the order of [`Projection::ALL`], each `1 x out`.
    pub biases: [Option<E::Sink>; 7],
    /// Trainable tensors of each projection in the order of [`Projection::ALL`].
    pub projections: [Vec<E::Sink>; 7],
    names: [&'static [&'static str]; 7],
    norm_names: [&'static str; 6],
}

/// Sinks of a model on some engine. They accumulate until they are zeroed or dropped.
#[derive(Debug, Clone)]
pub struct GradientsOn<E: Ops> {
    /// Embedding table (with the output projection's part when tied).
    pub embedding: Option<E::Sink>,
    /// One entry per layer.
    pub layers: Vec<LayerGradientsOn<E>>,
    /// Gain of the last norm, `1 x D`.
    pub final_norm: Option<E::Sink>,
    /// Output projection when not tied.
    pub lm_head: Option<E::Sink>,
    /// The engine with its working memory, kept for the next step.
    pub(crate) engine: E,
}

/// Sinks of one layer on the processor.
pub type LayerGradients<T> = LayerGradientsOn<Cpu<T>>;

/// Sinks of a model on the processor, and the working memory of its steps. They accumulate until
/// [`Gradients::fill_zero`]; keep one value over the steps of a training, so that each step reuses the buffers of the last.
pub type Gradients<T> = GradientsOn<Cpu<T>>;

impl<E: Ops> GradientsOn<E> {
    /// Zeroed sinks for what a model trains.
    pub(crate) fn zeros(model: &ModelOn<E>, engine: E) -> Self {
        let (config, parts) = (&model.config, model.trainable);
        let gain = |width: usize| parts.norms.then(|| engine.sink((1, width)));
        let layers = model
            .layers
            .iter()
            .map(|layer| LayerGradientsOn {
                norms: Norm::ALL.map(|norm| config.norm_width(norm).and_then(gain)),
                biases: Projection::ALL.map(|p| {
                    let projection = layer.projection(p);
                    let wanted = parts.biases && projection.bias.is_some();
                    wanted.then(|| engine.sink((1, projection.shape().0)))
                }),
                norm_names: Norm::ALL.map(|norm| config.options.norm_name(norm).unwrap_or("")),
                projections: Projection::ALL.map(|p| {
                    layer.projection(p).trainable_shapes().into_iter().map(|shape| engine.sink(shape)).collect()
                }),
                names: Projection::ALL.map(|p| layer.projection(p).method.trainable_names()),
            })
            .collect();
        let final_norm = gain(config.hidden_size);
        let table = |wanted: bool, table: Option<&E::Matrix>| {
            table.filter(|_| wanted).map(|table| engine.sink(E::shape(table)))
        };
        let (embedding, lm_head) =
            (table(parts.embedding, Some(&model.embedding)), table(parts.lm_head, model.lm_head.as_ref()));
        Self { embedding, layers, final_norm, lm_head, engine }
    }

    /// Every sink with its tensor's name, in the order of [`ModelOn::for_each_trainable_on`].
    pub(crate) fn sinks(&self) -> Vec<(String, &E::Sink)> {
        let mut all: Vec<(String, &E::Sink)> = Vec::new();
        all.extend(self.embedding.as_ref().map(|g| ("model.embed_tokens.weight".into(), g)));
        for (l, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            let norm = |norm: Norm| {
                let name = format!("{prefix}.{}.weight", layer.norm_names[norm as usize]);
                layer.norms[norm as usize].as_ref().map(|g| (name, g))
            };
            all.extend(norm(Norm::BeforeAttention));
            for (i, p) in Projection::ALL.into_iter().enumerate() {
                for (name, g) in layer.names[i].iter().zip(&layer.projections[i]) {
                    all.push((format!("{prefix}.{}.{name}", p.path()), g));
                }
                all.extend(layer.biases[i].as_ref().map(|g| (format!("{prefix}.{}.bias", p.path()), g)));
            }
            all.extend(Norm::ALL[1..].iter().filter_map(|&of| norm(of)));
        }
        all.extend(self.final_norm.as_ref().map(|g| ("model.norm.weight".into(), g)));
        all.extend(self.lm_head.as_ref().map(|g| ("lm_head.weight".into(), g)));
        all
    }

    /// Calls `change` on every sink, in the same order.
    pub(crate) fn for_each_sink(&mut self, mut change: impl FnMut(&mut E::Sink)) {
        self.embedding.iter_mut().for_each(&mut change);
        for layer in &mut self.layers {
            let [first, rest @ ..] = &mut layer.norms;
            first.iter_mut().for_each(&mut change);
            for (projection, bias) in layer.projections.iter_mut().zip(&mut layer.biases) {
                projection.iter_mut().chain(bias).for_each(&mut change);
            }
            rest.iter_mut().flatten().for_each(&mut change);
        }
        self.final_norm.iter_mut().for_each(&mut change);
        self.lm_head.iter_mut().for_each(&mut change);
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
