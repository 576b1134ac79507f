//! Activation and gradient norms on a few batches, by which sparse methods choose what to train.

use super::batch::{Batch, StepOptions};
use super::parameters::{Model, TrainableParts};
use super::projection::{Input, Projection};
use crate::adapters::Method;
use crate::adapters::selection::ColumnScores;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use ndarray::{ArrayView2, Axis};
use std::collections::BTreeMap;

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

/// Norms of every projection, by layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration<T> {
    /// One entry per layer.
    pub layers: Vec<BTreeMap<Projection, ProjectionStatistics<T>>>,
}

fn squares<T: Real>(a: ArrayView2<T>, axis: Axis) -> Vec<f64> {
    a.axis_iter(axis).map(|v| v.iter().map(|x| x.widen() * x.widen()).sum()).collect()
}

impl<T: Real> Model<T> {
    /// Measures the norms with every projection trainable, in the model's present order of heads
    /// and channels. Costs full fine-tuning's time and memory for each batch, and a copy of the
    /// model; nothing is trained.
    ///
    /// # Errors
    /// As [`Model::loss_and_gradients`].
    pub fn calibrate(&self, batches: &[Batch], cost: &mut Cost) -> Result<Calibration<T>> {
        let mut probe = self.clone();
        probe.trainable = TrainableParts::default();
        for layer in &mut probe.layers {
            for (_, projection) in layer.projections_mut() {
                let (weight, bias) = (projection.effective_weight()?, projection.bias.take());
                *projection = crate::adapters::AdaptedLinear::frozen(weight);
                projection.method = Method::Full;
                projection.bias = bias;
            }
        }
        let mut gradients = probe.zero_gradients();
        let mut inputs: Vec<BTreeMap<Projection, Vec<f64>>> =
            vec![Default::default(); self.layers.len()];
        for batch in batches {
            let pass = probe.forward(batch, &StepOptions::default(), &mut gradients, cost)?;
            for (l, sums) in inputs.iter_mut().enumerate() {
                let Some(cache) = pass.layer_cache(l) else { continue };
                for (p, projection) in self.layers[l].projections() {
                    // Experts see rows of their own, which the mixture keeps to itself.
                    let x = match p.input() {
                        _ if p.of_experts() => None,
                        Input::Normed => cache.normed_input.as_ref(),
                        Input::Attended => cache.attention_output.as_ref(),
                        Input::NormedMiddle => cache.normed_middle.as_ref(),
                        Input::Gated => cache.mlp.gated.as_ref(),
                    };
                    let sum = sums.entry(p).or_insert_with(|| vec![0.0; projection.shape().1]);
                    if let Some(x) = x {
                        sum.iter_mut().zip(squares(x.view(), Axis(1))).for_each(|(s, c)| *s += c);
                    }
                }
            }
            probe.backward(pass, &mut gradients, cost)?;
        }
        let root = |values: &[f64]| values.iter().map(|x| T::of(x.sqrt())).collect::<Vec<T>>();
        let layers = gradients
            .layers
            .iter()
            .zip(&inputs)
            .map(|(gradients, inputs)| {
                let of = |(&p, inputs): (&Projection, &Vec<f64>)| {
                    let gradient = gradients.projections.get(&p)?.first()?.view();
                    let statistics = ProjectionStatistics {
                        input: root(inputs),
                        gradient_rows: root(&squares(gradient, Axis(0))),
                        gradient_columns: root(&squares(gradient, Axis(1))),
                    };
                    Some((p, statistics))
                };
                inputs.iter().filter_map(of).collect()
            })
            .collect();
        Ok(Calibration { layers })
    }
}
