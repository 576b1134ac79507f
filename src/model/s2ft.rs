//! Co-permutation of a layer for S2FT.

use super::config::ModelConfig;
use super::layer::Layer;
use super::parameters::Projection;
use crate::error::Result;
use crate::linalg::Real;
use ndarray::Array2;

/// Order of heads and channels relative to the checkpoint: entry i is the original index of what now stands at i.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerOrder {
    /// Key/value heads, each with its group of query heads.
    pub groups: Vec<usize>,
    /// Feed-forward channels.
    pub channels: Vec<usize>,
}

impl<T: Real> Layer<T> {
    /// The effective weight of a projection in the checkpoint's order of heads and channels.
    pub(super) fn checkpoint_weight(&self, p: Projection, _config: &ModelConfig) -> Result<Array2<T>> {
        self.projection(p).effective_weight()
    }
}
