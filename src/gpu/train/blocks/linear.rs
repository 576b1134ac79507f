//! Linear projection y = x W^T without bias.

use super::{Matrix, product};
use crate::gpu::{Engine, Precision};

/// y = x W^T; x `N x in`, weight `out x in`, y `N x out`.
pub fn linear_forward<B: Engine>(
    x: &Matrix<B>,
    weight: &Matrix<B>,
    precision: Precision,
) -> Matrix<B> {
    product(x.clone(), weight.clone().transpose(), precision)
}

/// dx = dy W.
pub fn linear_backward_input<B: Engine>(
    dy: &Matrix<B>,
    weight: &Matrix<B>,
    precision: Precision,
) -> Matrix<B> {
    product(dy.clone(), weight.clone(), precision)
}

/// dW = dy^T x; for a slice of the weight pass the matching columns of dy (rows of W) or of x
/// (columns of W).
pub fn linear_backward_weight<B: Engine>(
    dy: &Matrix<B>,
    x: &Matrix<B>,
    precision: Precision,
) -> Matrix<B> {
    product(dy.clone().transpose(), x.clone(), precision)
}
