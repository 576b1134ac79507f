//! The loss of a step where it is not the plain mean cross-entropy: declared, or known by the
//! gradient that it left.
//!
//! ```text
//! loss   = sum_i w_i [ (1 - eps) (lse_i - z_iy) + eps (lse_i - mean_v z_iv) + c lse_i^2 ] / divisor
//! dz_iv  = w_i [ (1 + 2 c lse_i) p_iv - (1 - eps) [v = y] - eps / V ] / divisor,     lse_i = log sum_v exp z_iv
//! ```

use super::dump::Case;
use crate::blocks::cross_entropy::{LOGIT_ROWS, prediction_targets};
use ndarray::{Array1, Array2, ArrayView1, ArrayViewMut1};
use rayon::prelude::*;
use std::ops::Range;

/// Cross-entropy with label smoothing, token weights and z-loss.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Objective {
    /// eps: the part of a label that is spread over the vocabulary.
    pub label_smoothing: f64,
    /// c: factor of the squared log-sum-exp.
    pub z_loss: f64,
    /// w: weight of the prediction made at each row of the batch, `B T`; ones when absent.
    pub weights: Option<Vec<f64>>,
}

impl Objective {
    /// Whether it is plain cross-entropy.
    pub fn is_plain(&self) -> bool {
        self.label_smoothing.abs() < f64::MIN_POSITIVE
            && self.z_loss.abs() < f64::MIN_POSITIVE
            && self.weights.is_none()
    }

    /// Loss of one row times its weight, not divided; `gradient` becomes that of the logits.
    fn row(
        &self,
        logits: ArrayView1<'_, f64>,
        row: usize,
        label: usize,
        mut gradient: ArrayViewMut1<'_, f64>,
    ) -> f64 {
        let weight = self.weights.as_ref().and_then(|w| w.get(row)).copied().unwrap_or(1.0);
        let most = logits.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
        let log_sum = most + logits.iter().map(|x| (x - most).exp()).sum::<f64>().ln();
        let (eps, count) = (self.label_smoothing, logits.len() as f64);
        let slope = 1.0 + 2.0 * self.z_loss * log_sum;
        gradient.zip_mut_with(&logits, |g, z| {
            *g = weight * (slope * (z - log_sum).exp() - eps / count)
        });
        gradient[label] -= weight * (1.0 - eps);
        let plain =
            (1.0 - eps) * (log_sum - logits[label]) + eps * (log_sum - logits.sum() / count);
        weight * (plain + self.z_loss * log_sum * log_sum)
    }
}

/// The gradient that the trainer's loss left, all its factors included.
#[derive(Debug, Clone)]
pub enum Upstream {
    /// Of the output projection's result, `(B T) x V`.
    Logits(Array2<f64>),
    /// Of the last norm's result, `(B T) x D`.
    FinalNorm(Array2<f64>),
}

impl Upstream {
    /// Rows that have a gradient, as targets with a label of no meaning.
    pub(super) fn targets(&self) -> Vec<(usize, usize)> {
        let gradient = match self {
            Self::Logits(g) | Self::FinalNorm(g) => g,
        };
        let any = |row: &ArrayView1<'_, f64>| row.iter().any(|x| x.abs() > 0.0 || x.is_nan());
        gradient
            .rows()
            .into_iter()
            .enumerate()
            .filter(|(_, row)| any(row))
            .map(|(i, _)| (i, 0))
            .collect()
    }
}

impl Case {
    /// Whether the recorded gradient of the logits is that of the declared loss at the trainer's
    /// own logits, as far as their format tells: then judging from it on says nothing else than
    /// judging with the loss.
    pub(super) fn left_the_declared_gradient(&self) -> bool {
        let (Some(Upstream::Logits(left)), Some(logits)) =
            (&self.trainer.upstream, &self.trainer.logits)
        else {
            return false;
        };
        let config = &self.model.config;
        let (rows, length) = self.batch.input_ids.dim();
        let plain = config.options.logit_cap.is_none() && left.dim() == logits.values.dim();
        let Ok(targets) = prediction_targets(self.batch.labels.view(), config.vocab_size) else {
            return false;
        };
        if !plain || left.nrows() != rows * length {
            return false;
        }
        let multiplier = config.options.logit_multiplier;
        let mut of_row = vec![None; rows * length];
        for (range, divisor) in self.parts() {
            let inside = range.start * length..range.end * length;
            let counted = targets.iter().filter(|(row, _)| inside.contains(row));
            counted.for_each(|&(row, label)| of_row[row] = Some((label, divisor)));
        }
        let gap_and_norm = |row: usize| {
            let mut want = Array1::zeros(left.ncols());
            if let Some((label, divisor)) = of_row[row] {
                self.objective.row(logits.values.row(row), row, label, want.view_mut());
                want /= divisor * multiplier.recip();
            }
            let gap = left.row(row).iter().zip(&want).map(|(l, w)| (l - w) * (l - w)).sum::<f64>();
            [gap, want.dot(&want)]
        };
        let sum = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
        let [gap, norm] =
            (0..left.nrows()).into_par_iter().map(gap_and_norm).reduce(|| [0.0; 2], sum);
        let near = 4.0 * self.rounding.coarsest().epsilon().max(1e-5);
        gap.sqrt() <= near * norm.sqrt()
    }
}

/// Follows the chunks of logits of one part of a step, and puts another gradient in the place of
/// theirs.
pub(super) struct Chunks<'a> {
    /// (row, label) of the part, in order, rows being its own.
    targets: &'a [(usize, usize)],
    /// Row of the whole batch where the part begins.
    first: usize,
    /// Factor of the gradient: loss scale over divisor.
    factor: f64,
    /// Logits of the chunk at hand, as rounded.
    logits: Array2<f64>,
    /// Targets done.
    done: usize,
    /// Sum of the losses, not divided.
    pub loss: f64,
}

impl<'a> Chunks<'a> {
    pub fn new(targets: &'a [(usize, usize)], first: usize, factor: f64) -> Self {
        Self { targets, first, factor, logits: Array2::default((0, 0)), done: 0, loss: 0.0 }
    }

    pub fn see(&mut self, logits: &Array2<f64>) {
        self.logits.clone_from(logits);
    }

    fn chunk(&mut self) -> &'a [(usize, usize)] {
        let from = self.done;
        self.done = (from + LOGIT_ROWS).min(self.targets.len());
        &self.targets[from..self.done]
    }

    /// The gradient of an objective; `cap` is that of the logits.
    pub fn differentiate(
        &mut self,
        objective: &Objective,
        cap: Option<f64>,
        gradient: &mut Array2<f64>,
    ) {
        let chunk = self.chunk();
        for (i, &(row, label)) in chunk.iter().enumerate() {
            self.loss +=
                objective.row(self.logits.row(i), self.first + row, label, gradient.row_mut(i));
        }
        gradient.mapv_inplace(|x| x * self.factor);
        if let Some(cap) = cap {
            gradient.zip_mut_with(&self.logits, |g, z| *g *= 1.0 - (z / cap) * (z / cap));
        }
    }

    /// The rows of a given gradient of all logits, times `factor`.
    pub fn copy(&mut self, all: &Array2<f64>, factor: f64, gradient: &mut Array2<f64>) {
        for (i, &(row, _)) in self.chunk().iter().enumerate() {
            gradient.row_mut(i).assign(&(&all.row(self.first + row) * factor));
        }
    }
}

/// Rows of a given gradient of the last norm's result, times `factor`.
pub(super) fn copy_rows(
    all: &Array2<f64>,
    rows: Range<usize>,
    factor: f64,
    gradient: &mut Array2<f64>,
) {
    if gradient.nrows() == rows.len() && gradient.ncols() == all.ncols() {
        gradient.assign(&(&all.slice(ndarray::s![rows, ..]) * factor));
    }
}
