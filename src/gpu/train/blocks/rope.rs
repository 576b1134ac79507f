//! Rotary position embedding in the Hugging Face half-split layout.

use super::Matrix;
use crate::blocks::rope::RopeTable;
use crate::gpu::Engine;
use crate::linalg::Real;
use burn::tensor::{Tensor, TensorData};

/// The angles' cos and sin on a device, `1 x P x 1 x d/2`: P rows of what is rotated repeat over
/// the batch.
#[derive(Debug, Clone)]
pub struct RotaryAngles<B: Engine> {
    cos: Tensor<B, 4>,
    sin: Tensor<B, 4>,
}

impl<B: Engine> RotaryAngles<B> {
    /// The table's angles, rounded once from double precision.
    pub fn upload<T: Real>(table: &RopeTable<T>, device: &B::Device) -> Self {
        let upload = |values: ndarray::ArrayView2<T>| {
            let (rows, half) = values.dim();
            let flat: Vec<f32> = values.iter().map(|x| x.widen() as f32).collect();
            Tensor::from_data(TensorData::new(flat, [1, rows, 1, half]), device)
        };
        Self { cos: upload(table.cos()), sin: upload(table.sin()) }
    }

    /// Numbers held.
    pub fn elements(&self) -> usize {
        2 * self.cos.shape().num_elements()
    }
}

/// Rotates every head of every row: with a = `x[j]`, b = `x[j + d/2]`, (a, b) -> (a cos - b sin, b
/// cos + a sin).
///
/// Shapes: x `N x (H d)`; N is a multiple of the table's rows.
pub fn rope_forward<B: Engine>(x: Matrix<B>, angles: &RotaryAngles<B>) -> Matrix<B> {
    rotate(x, angles.cos.clone(), angles.sin.clone())
}

/// The transpose of [`rope_forward`], hence its inverse: rotation by the opposite angle.
pub fn rope_backward<B: Engine>(dx: Matrix<B>, angles: &RotaryAngles<B>) -> Matrix<B> {
    rotate(dx, angles.cos.clone(), angles.sin.clone().neg())
}

fn rotate<B: Engine>(x: Matrix<B>, cos: Tensor<B, 4>, sin: Tensor<B, 4>) -> Matrix<B> {
    let [rows, width] = x.dims();
    let [_, positions, _, half] = cos.dims();
    let heads = x.reshape([rows / positions, positions, width / (2 * half), 2 * half]);
    let a = heads.clone().narrow(3, 0, half);
    let b = heads.narrow(3, half, half);
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = b * cos + a * sin;
    Tensor::cat(vec![first, second], 3).reshape([rows, width])
}
