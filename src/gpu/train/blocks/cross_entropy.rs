//! Next-token cross-entropy through the output projection, in chunks of positions.

use super::linear::{linear_backward_input, linear_backward_weight, linear_forward};
use super::{Matrix, Sink, accumulate, index_tensor};
use crate::gpu::{Engine, Precision};
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

/// Logits that may exist at one time (64 MiB in f32), unless 256 positions need more.
const LOGIT_ENTRIES: usize = 1 << 24;

/// Positions whose logits exist at one time: at least 256.
pub fn logit_rows(vocabulary: usize) -> usize {
    (LOGIT_ENTRIES / vocabulary.max(1)).max(crate::blocks::cross_entropy::LOGIT_ROWS)
}

/// Rows that count, what they must predict, and where each row's gradient is found.
#[derive(Debug, Clone)]
pub struct Targets<B: Engine> {
    chunks: Vec<(Tensor<B, 1, Int>, Tensor<B, 2, Int>)>,
    /// For each hidden row its number among the counted ones, or their count (a row of zeros) if it
    /// does not count.
    inverse: Tensor<B, 1, Int>,
    /// Positions that count.
    pub counted: usize,
}

impl<B: Engine> Targets<B> {
    /// From the (row, label) pairs of [`crate::blocks::cross_entropy::prediction_targets`].
    pub fn upload(
        targets: &[(usize, usize)],
        rows: usize,
        vocabulary: usize,
        device: &B::Device,
    ) -> Self {
        let chunks = targets.chunks(logit_rows(vocabulary)).map(|chunk| {
            let labels: Vec<i32> = chunk.iter().map(|&(_, label)| label as i32).collect();
            let labels = Tensor::from_data(TensorData::new(labels, [chunk.len(), 1]), device);
            (index_tensor(chunk.iter().map(|&(row, _)| row), device), labels)
        });
        let mut inverse = vec![targets.len(); rows];
        for (position, &(row, _)) in targets.iter().enumerate() {
            inverse[row] = position;
        }
        Self {
            chunks: chunks.collect(),
            inverse: index_tensor(inverse, device),
            counted: targets.len(),
        }
    }

    /// Numbers held.
    pub fn elements(&self) -> usize {
        2 * self.counted + self.inverse.shape().num_elements()
    }
}

/// The losses log sum_v exp z_iv - z_iy of the counted rows in nats, `n x 1`, with z = hidden W^T,
/// and the gradient of (their sum / divisor) in the hidden rows if `wanted`; that of W goes to the
/// sink.
///
/// Each chunk of logits (false) and of their gradient (true) is shown to `observe`, which may
/// change it.
///
/// Shapes: hidden `N x D`, weight `V x D`. dz = (softmax(z) - onehot(y)) / divisor exists for one
/// chunk at a time.
pub fn cross_entropy<B: Engine>(
    hidden: &Matrix<B>,
    weight: &Matrix<B>,
    targets: &Targets<B>,
    divisor: f64,
    mut dweight: Option<&mut Sink<B>>,
    wanted: bool,
    observe: &dyn Fn(bool, &mut Matrix<B>),
    precision: Precision,
) -> (Matrix<B>, Option<Matrix<B>>) {
    let mut losses = Vec::with_capacity(targets.chunks.len());
    let mut gradients = Vec::new();
    for (rows, labels) in &targets.chunks {
        let rows = hidden.clone().select(0, rows.clone());
        let mut logits = linear_forward(&rows, weight, precision);
        observe(false, &mut logits);
        let largest = logits.clone().max_dim(1);
        let target = logits.clone().gather(1, labels.clone()) - largest.clone();
        let exponentials = (logits - largest).exp();
        let sum = exponentials.clone().sum_dim(1);
        losses.push(sum.clone().log() - target);
        if !wanted && dweight.is_none() {
            continue;
        }
        let scale = 1.0 / divisor;
        let minus = Tensor::full(labels.dims(), -scale, &labels.device());
        let mut dlogits = (exponentials * sum.recip().mul_scalar(scale)).scatter(
            1,
            labels.clone(),
            minus,
            IndexingUpdateOp::Add,
        );
        observe(true, &mut dlogits);
        if let Some(sink) = &mut dweight {
            accumulate(sink, linear_backward_weight(&dlogits, &rows, precision));
        }
        if wanted {
            gradients.push(linear_backward_input(&dlogits, weight, precision));
        }
    }
    let dhidden = wanted.then(|| {
        gradients.push(Tensor::zeros([1, hidden.dims()[1]], &hidden.device()));
        Tensor::cat(gradients, 0).select(0, targets.inverse.clone())
    });
    (Tensor::cat(losses, 0), dhidden)
}
