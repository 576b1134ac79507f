//! Activation and gradient norms on a few batches, by which sparse methods choose what to train.

use super::batch::{Batch, StepOptions};
use super::parameters::{Model, Projection, TrainableParts};
use crate::adapters::Method;
use crate::adapters::selection::ColumnScores;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2, Axis};

/// Norms of one projection.
#[derive(Debug, Clone, PartialEq)]
pub struct ProjectionStatistics<T> {
    /// Root of the sum of squares of each input column over all calibration tokens.
    pub input: Vec<T>,
    /// Norm of each row of the gradient of the summed mean losses.
    pub gradient_rows: Vec<T>,
    /// Norm of each column of it.
    pub gradient_columns: Vec<T>,
}

impl<T> ProjectionStatistics<T> {
    /// As scores of input columns.
    pub fn column_scores(&self) -> ColumnScores<'_, T> {
        ColumnScores { activation: Some(&self.input), gradient: Some(&self.gradient_columns) }
    }
}

/// Norms of every projection, by layer in the order of [`Projection::ALL`].
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration<T> {
    /// One entry per layer.
    pub layers: Vec<[ProjectionStatistics<T>; 7]>,
}

fn squares<T: Real>(a: ArrayView2<T>, axis: Axis) -> Vec<f64> {
    a.axis_iter(axis).map(|v| v.iter().map(|x| x.widen() * x.widen()).sum()).collect()
}

impl<T: Real> Model<T> {
    /// Measures the norms with every projection trainable, in the model's present order of heads and channels.
    /// Costs full fine-tuning's time and memory for each batch, and a copy of the model; nothing is trained.
    ///
    /// # Errors
    /// As [`Model::loss_and_gradients`].
    pub fn calibrate(&self, batches: &[Batch], cost: &mut Cost) -> Result<Calibration<T>> {
        let mut probe = self.clone();
        probe.trainable = TrainableParts::default();
        for layer in &mut probe.layers {
            for p in Projection::ALL {
                let weight = layer.projection(p).effective_weight()?;
                let bias = layer.projection_mut(p).bias.take();
                *layer.projection_mut(p) = crate::adapters::AdaptedLinear::frozen(weight);
                layer.projection_mut(p).method = Method::Full;
                layer.projection_mut(p).bias = bias;
            }
        }
        let mut gradients = probe.zero_gradients();
        let mut inputs: Vec<[Vec<f64>; 7]> = vec![Default::default(); self.layers.len()];
        for batch in batches {
            let pass = probe.forward(batch, &StepOptions::default(), &mut gradients, cost)?;
            for (l, sums) in inputs.iter_mut().enumerate() {
                let Some(cache) = pass.layer_cache(l) else { continue };
                let mut add = |ps: &[Projection], x: &Option<Array2<T>>| {
                    let Some(x) = x else { return };
                    let columns = squares(x.view(), Axis(1));
                    for &p in ps {
                        let sum = &mut sums[p as usize];
                        sum.resize(columns.len(), 0.0);
                        sum.iter_mut().zip(&columns).for_each(|(s, c)| *s += c);
                    }
                };
                add(&[Projection::Query, Projection::Key, Projection::Value], &cache.normed_input);
                add(&[Projection::Output], &cache.attention_output);
                add(&[Projection::Gate, Projection::Up], &cache.normed_middle);
                add(&[Projection::Down], &cache.gated);
            }
            probe.backward(pass, &mut gradients, cost)?;
        }
        let root = |values: &[f64]| values.iter().map(|x| T::of(x.sqrt())).collect::<Vec<T>>();
        let layers = gradients
            .layers
            .iter()
            .zip(&inputs)
            .map(|(gradients, inputs)| {
                Projection::ALL.map(|p| {
                    let gradient = gradients.projections[p as usize][0].view();
                    ProjectionStatistics {
                        input: root(&inputs[p as usize]),
                        gradient_rows: root(&squares(gradient, Axis(0))),
                        gradient_columns: root(&squares(gradient, Axis(1))),
                    }
                })
            })
            .collect();
        Ok(Calibration { layers })
    }
}
