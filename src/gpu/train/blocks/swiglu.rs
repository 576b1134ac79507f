//! The gated unit a = silu(gate) o up with silu(g) = g / (1 + e^(-g)).

use super::Matrix;
use crate::gpu::Engine;
use burn::tensor::activation::sigmoid;

/// a = silu(gate) o up, all `N x F`. Backward needs gate and up.
pub fn swiglu_forward<B: Engine>(gate: &Matrix<B>, up: &Matrix<B>) -> Matrix<B> {
    sigmoid(gate.clone()) * gate.clone() * up.clone()
}

/// (dgate, dup): dgate = da o up o s (1 + gate (1 - s)) and dup = da o gate o s with s = sigmoid(gate).
pub fn swiglu_backward<B: Engine>(da: Matrix<B>, gate: Matrix<B>, up: Matrix<B>) -> (Matrix<B>, Matrix<B>) {
    let s = sigmoid(gate.clone());
    let silu = gate * s.clone();
    let dgate = da.clone() * up * (s.clone() + silu.clone() * s.neg().add_scalar(1.0));
    (dgate, da * silu)
}
