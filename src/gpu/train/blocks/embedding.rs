//! Token embedding: x_i = `E[id_i]`.

use super::{Matrix, Sink};
use crate::gpu::Engine;
use burn::tensor::{IndexingUpdateOp, Int, Tensor};

/// Row i of the result is row `ids[i]` of the table; table `V x D`, result `N x D`.
pub fn embedding_forward<B: Engine>(ids: &Tensor<B, 1, Int>, table: &Matrix<B>) -> Matrix<B> {
    table.clone().select(0, ids.clone())
}

/// d`E[id_i]` += dx_i, in token order, so that the sum does not depend on the device's scheduling.
pub fn embedding_backward<B: Engine>(
    ids: &Tensor<B, 1, Int>,
    dx: Matrix<B>,
    rows: usize,
    dtable: &mut Sink<B>,
) {
    let [_, width] = dx.dims();
    let table = dtable.take().unwrap_or_else(|| Tensor::zeros([rows, width], &dx.device()));
    *dtable = Some(table.select_assign(0, ids.clone(), dx, IndexingUpdateOp::Add));
}
