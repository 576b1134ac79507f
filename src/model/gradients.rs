//! Gradient buffers: one per trainable tensor, none for frozen ones.

use super::parameters::{Model, Projection};
use crate::linalg::scratch::fill_zero;
use crate::linalg::{Real, Scratch, on_workers};
use ndarray::{Array2, ArrayView2};

/// Sinks of one layer.
#[derive(Debug, Clone)]
pub struct LayerGradients<T> {
    /// Gain of the norm before attention, `1 x D`.
    pub input_norm: Option<Array2<T>>,
    /// Gain of the norm before the feed-forward part, `1 x D`.
    pub post_attention_norm: Option<Array2<T>>,
    /// Trainable tensors of each projection in the order of [`Projection::ALL`].
    pub projections: [Vec<Array2<T>>; 7],
    names: [&'static [&'static str]; 7],
}

/// Sinks of a model, and the working memory of its steps. They accumulate until [`Gradients::fill_zero`]; keep one
/// value over the steps of a training, so that each step reuses the buffers of the last.
#[derive(Debug, Clone)]
pub struct Gradients<T> {
    /// Embedding table (with the output projection's part when tied).
    pub embedding: Option<Array2<T>>,
    /// One entry per layer.
    pub layers: Vec<LayerGradients<T>>,
    /// Gain of the last norm, `1 x D`.
    pub final_norm: Option<Array2<T>>,
    /// Output projection when not tied.
    pub lm_head: Option<Array2<T>>,
    /// Working memory of a step, kept for the next one.
    pub(super) scratch: Scratch<T>,
}

impl<T: Real> Gradients<T> {
    pub(super) fn zeros(model: &Model<T>) -> Self {
        let width = model.config.hidden_size;
        let parts = model.trainable;
        let gain = || parts.norms.then(|| Array2::zeros((1, width)));
        let layers = model
            .layers
            .iter()
            .map(|layer| LayerGradients {
                input_norm: gain(),
                post_attention_norm: gain(),
                projections: Projection::ALL
                    .map(|p| layer.projection(p).trainable_shapes().into_iter().map(Array2::zeros).collect()),
                names: Projection::ALL.map(|p| layer.projection(p).method.trainable_names()),
            })
            .collect();
        Self {
            embedding: parts.embedding.then(|| Array2::zeros(model.embedding.dim())),
            layers,
            final_norm: gain(),
            lm_head: model.lm_head.as_ref().filter(|_| parts.lm_head).map(|head| Array2::zeros(head.dim())),
            scratch: Scratch::default(),
        }
    }

    /// Every buffer with its tensor's name, in the order of [`Model::update`].
    pub fn named(&self) -> Vec<(String, ArrayView2<'_, T>)> {
        self.tensors().into_iter().map(|(name, array)| (name, array.view())).collect()
    }

    pub(super) fn tensors(&self) -> Vec<(String, &Array2<T>)> {
        let mut all: Vec<(String, &Array2<T>)> = Vec::new();
        all.extend(self.embedding.as_ref().map(|g| ("model.embed_tokens.weight".into(), g)));
        for (l, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            all.extend(layer.input_norm.as_ref().map(|g| (format!("{prefix}.input_layernorm.weight"), g)));
            for (i, p) in Projection::ALL.into_iter().enumerate() {
                for (name, g) in layer.names[i].iter().zip(&layer.projections[i]) {
                    all.push((format!("{prefix}.{}.{name}", p.path()), g));
                }
            }
            let name = format!("{prefix}.post_attention_layernorm.weight");
            all.extend(layer.post_attention_norm.as_ref().map(|g| (name, g)));
        }
        all.extend(self.final_norm.as_ref().map(|g| ("model.norm.weight".into(), g)));
        all.extend(self.lm_head.as_ref().map(|g| ("lm_head.weight".into(), g)));
        all
    }

    /// Calls `change` on every buffer, in the same order.
    pub fn for_each_mut(&mut self, mut change: impl FnMut(&mut Array2<T>)) {
        self.embedding.iter_mut().for_each(&mut change);
        for layer in &mut self.layers {
            layer.input_norm.iter_mut().for_each(&mut change);
            layer.projections.iter_mut().flatten().for_each(&mut change);
            layer.post_attention_norm.iter_mut().for_each(&mut change);
        }
        self.final_norm.iter_mut().for_each(&mut change);
        self.lm_head.iter_mut().for_each(&mut change);
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
        self.scratch.bytes()
    }

    /// Frees the working memory, for instance before an evaluation.
    pub fn release_scratch(&mut self) {
        self.scratch = Scratch::default();
    }

    /// Euclidean norm over all buffers, summed in double precision.
    pub fn norm(&self) -> f64 {
        let square = |g: &Array2<T>| g.iter().map(|x| x.widen() * x.widen()).sum::<f64>();
        self.tensors().iter().map(|(_, g)| square(g)).sum::<f64>().sqrt()
    }

    /// (name, bytes) of every buffer, for a memory ledger.
    pub fn bytes_by_name(&self) -> Vec<(String, usize)> {
        self.tensors().into_iter().map(|(name, g)| (name, g.len() * size_of::<T>())).collect()
    }
}
