//! The blocks of [`crate::blocks`] on a device: one file each, a forward and a backward function
//! side by side.
//!
//! Shapes and formulas are those of the CPU's blocks. A tensor is a reference to device memory, so
//! what a backward needs is what the caller holds on to; nothing here keeps a graph. Shapes are
//! checked when a model is uploaded and a batch prepared, so the blocks themselves cannot fail.

pub mod causal_attention;
pub mod cross_entropy;
pub mod embedding;
pub mod linear;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

use crate::gpu::{Engine, Precision};
use burn::tensor::{Int, Tensor, TensorData};

/// Rows are tokens; weights are out x in.
pub type Matrix<B> = Tensor<B, 2>;

/// The gradient of a trainable tensor: absent until the step's first contribution, so that no
/// buffer of zeros exists.
pub type Sink<B> = Option<Matrix<B>>;

/// sink += gradient.
pub fn accumulate<B: Engine>(sink: &mut Sink<B>, gradient: Matrix<B>) {
    *sink = Some(match sink.take() {
        Some(sum) => sum + gradient,
        None => gradient,
    });
}

/// a b over the last two axes, operands rounded to `precision`, sums in f32. Burn's own product
/// would choose: it rounds to TF32 on NVIDIA's tensor cores.
pub fn product<B: Engine, const D: usize>(
    a: Tensor<B, D>,
    b: Tensor<B, D>,
    precision: Precision,
) -> Tensor<B, D> {
    B::product(a, b, precision)
}

/// Row or column numbers as a device tensor.
pub fn index_tensor<B: Engine>(
    indices: impl IntoIterator<Item = usize>,
    device: &B::Device,
) -> Tensor<B, 1, Int> {
    let indices: Vec<i32> = indices.into_iter().map(|i| i as i32).collect();
    let length = indices.len();
    Tensor::from_data(TensorData::new(indices, [length]), device)
}
