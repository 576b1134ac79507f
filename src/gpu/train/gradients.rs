//! Gradients on a device: one per trainable tensor, none for frozen ones.

use super::blocks::Matrix;
use super::ops::Gpu;
use crate::error::{Error, Result};
use crate::gpu::{Engine, Opened};
use crate::model::GradientsOn;
use burn::tensor::Tensor;
use ndarray::Array2;

/// Sinks of a model. They accumulate until they are dropped; one is absent until something was
/// added to it.
pub type DeviceGradients<B> = GradientsOn<Gpu<B>>;

impl<B: Engine> DeviceGradients<B> {
    /// The gradients themselves, as [`DeviceGradients::named`] orders them: an optimizer that takes
    /// them one by one can reuse each buffer.
    pub(super) fn into_named(mut self) -> Vec<(String, Matrix<B>)> {
        let names: Vec<String> = self.named().into_iter().map(|(name, _)| name).collect();
        let mut sinks = Vec::with_capacity(names.len());
        self.for_each_sink(|sink| sinks.extend(sink.take()));
        names.into_iter().zip(sinks).collect()
    }

    /// Every gradient with its tensor's name, in the order of [`crate::model::Model::update`].
    pub fn named(&self) -> Vec<(String, &Matrix<B>)> {
        self.sinks().into_iter().filter_map(|(name, sink)| Some((name, sink.as_ref()?))).collect()
    }

    /// Copies of every gradient.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn download(&self, on: &Opened<B>) -> Result<Vec<(String, Array2<f32>)>> {
        self.named().into_iter().map(|(name, g)| Ok((name, on.download(g.clone())?))).collect()
    }

    /// Euclidean norm over all gradients: sums of squares of each tensor in f32, their total in
    /// double precision.
    ///
    /// # Errors
    /// [`Error::NonFinite`] naming the first gradient whose sum of squares is not finite;
    /// [`Error::Device`].
    pub fn norm(&self, on: &Opened<B>) -> Result<f64> {
        let named = self.named();
        if named.is_empty() {
            return Ok(0.0);
        }
        let squares = named
            .iter()
            .map(|(_, g)| ((*g).clone() * (*g).clone()).sum().reshape([1, 1]))
            .collect();
        let squares = on.download(Tensor::cat(squares, 0))?;
        for ((name, _), &square) in named.iter().zip(&squares) {
            if !square.is_finite() {
                let tensor = format!("gradient of {name}");
                return Err(Error::NonFinite {
                    op: "gradient norm",
                    tensor,
                    index: vec![],
                    value: square.into(),
                });
            }
        }
        Ok(squares.iter().map(|&x| f64::from(x)).sum::<f64>().sqrt())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.named().iter().map(|(_, g)| g.shape().num_elements() * size_of::<f32>()).sum()
    }
}
