//! The gated unit a = act(gate) o up; act is g sigmoid(z), with z = g for silu.

use super::Matrix;
use crate::blocks::swiglu::{Activation, GELU};
use crate::gpu::Engine;
use burn::tensor::activation::sigmoid;

/// (z, dz/dg); no slope where it is 1.
fn argument<B: Engine>(activation: Activation, gate: &Matrix<B>) -> (Matrix<B>, Option<Matrix<B>>) {
    if activation == Activation::Silu {
        return (gate.clone(), None);
    }
    let square = (gate.clone() * gate.clone()).mul_scalar(GELU.1);
    let z = gate.clone() * square.clone().add_scalar(1.0).mul_scalar(GELU.0);
    (z, Some(square.mul_scalar(3.0).add_scalar(1.0).mul_scalar(GELU.0)))
}

/// a = act(gate) o up, all `N x F`. Backward needs gate and up.
pub fn gated_forward<B: Engine>(
    activation: Activation,
    gate: &Matrix<B>,
    up: &Matrix<B>,
) -> Matrix<B> {
    sigmoid(argument(activation, gate).0) * gate.clone() * up.clone()
}

/// (dgate, dup): dgate = da o up o (s + gate s (1 - s) dz/dgate) and dup = da o gate o s with s =
/// sigmoid(z).
pub fn gated_backward<B: Engine>(
    activation: Activation,
    da: Matrix<B>,
    gate: Matrix<B>,
    up: Matrix<B>,
) -> (Matrix<B>, Matrix<B>) {
    let (z, slope) = argument(activation, &gate);
    let s = sigmoid(z);
    let unit = gate * s.clone();
    let turn = unit.clone() * s.clone().neg().add_scalar(1.0);
    let turn = match slope {
        Some(slope) => turn * slope,
        None => turn,
    };
    (da.clone() * up * (s + turn), da * unit)
}
