//! Gradients on a device: one per trainable tensor, none for frozen ones.

use super::blocks::{Matrix, Sink};
use super::layer::{DeviceLayer, LayerSinks};
use crate::error::{Error, Result};
use crate::gpu::{Engine, Opened};
use crate::model::Projection;
use burn::tensor::Tensor;
use ndarray::Array2;

/// Sinks of a model. They accumulate until they are dropped.
#[derive(Debug, Clone)]
pub struct DeviceGradients<B: Engine> {
    pub(super) embedding: Sink<B>,
    pub(super) layers: Vec<LayerSinks<B>>,
    pub(super) final_norm: Sink<B>,
    pub(super) lm_head: Sink<B>,
}

impl<B: Engine> DeviceGradients<B> {
    pub(super) fn empty(layers: &[DeviceLayer<B>]) -> Self {
        let layers = layers.iter().map(LayerSinks::of).collect();
        Self { embedding: None, layers, final_norm: None, lm_head: None }
    }

    /// The gradients themselves, as [`DeviceGradients::named`] orders them: an optimizer that takes them one by one can
    /// reuse each buffer.
    pub(super) fn into_named(self) -> Vec<(String, Matrix<B>)> {
        let names: Vec<String> = self.named().into_iter().map(|(name, _)| name).collect();
        let mut sinks = vec![self.embedding];
        for layer in self.layers {
            sinks.push(layer.input_norm);
            sinks.extend(layer.projections.into_iter().flatten());
            sinks.push(layer.post_attention_norm);
        }
        sinks.extend([self.final_norm, self.lm_head]);
        names.into_iter().zip(sinks.into_iter().flatten()).collect()
    }

    /// Every gradient with its tensor's name, in the order of [`crate::model::Model::update`].
    pub fn named(&self) -> Vec<(String, &Matrix<B>)> {
        let mut all: Vec<(String, &Sink<B>)> = vec![("model.embed_tokens.weight".into(), &self.embedding)];
        for (l, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            all.push((format!("{prefix}.input_layernorm.weight"), &layer.input_norm));
            for (i, p) in Projection::ALL.into_iter().enumerate() {
                for (name, sink) in layer.names[i].iter().zip(&layer.projections[i]) {
                    all.push((format!("{prefix}.{}.{name}", p.path()), sink));
                }
            }
            all.push((format!("{prefix}.post_attention_layernorm.weight"), &layer.post_attention_norm));
        }
        all.push(("model.norm.weight".into(), &self.final_norm));
        all.push(("lm_head.weight".into(), &self.lm_head));
        all.into_iter().filter_map(|(name, sink)| Some((name, sink.as_ref()?))).collect()
    }

    /// Copies of every gradient.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn download(&self, on: &Opened<B>) -> Result<Vec<(String, Array2<f32>)>> {
        self.named().into_iter().map(|(name, g)| Ok((name, on.download(g.clone())?))).collect()
    }

    /// Euclidean norm over all gradients: sums of squares of each tensor in f32, their total in double precision.
    ///
    /// # Errors
    /// [`Error::NonFinite`] naming the first gradient whose sum of squares is not finite; [`Error::Device`].
    pub fn norm(&self, on: &Opened<B>) -> Result<f64> {
        let named = self.named();
        if named.is_empty() {
            return Ok(0.0);
        }
        let squares = named.iter().map(|(_, g)| ((*g).clone() * (*g).clone()).sum().reshape([1, 1])).collect();
        let squares = on.download(Tensor::cat(squares, 0))?;
        for ((name, _), &square) in named.iter().zip(&squares) {
            if !square.is_finite() {
                let tensor = format!("gradient of {name}");
                return Err(Error::NonFinite { op: "gradient norm", tensor, index: vec![], value: square.into() });
            }
        }
        Ok(squares.iter().map(|&x| f64::from(x)).sum::<f64>().sqrt())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.named().iter().map(|(_, g)| g.shape().num_elements() * size_of::<f32>()).sum()
    }
}
