//! Root-mean-square normalisation y = gain o x / rms(x), row by row.

use super::{Matrix, Sink, accumulate};
use crate::gpu::Engine;

/// y_ij = gain_j x_ij s_i with s_i = 1 / sqrt(mean_j x_ij^2 + eps); returns (y, s).
///
/// Shapes: x `N x D`, gain `1 x D`, s `N x 1`. Backward needs x and s.
pub fn rms_norm_forward<B: Engine>(
    x: &Matrix<B>,
    gain: &Matrix<B>,
    eps: f64,
) -> (Matrix<B>, Matrix<B>) {
    let inverse_rms = (x.clone() * x.clone()).mean_dim(1).add_scalar(eps).sqrt().recip();
    (x.clone() * inverse_rms.clone() * gain.clone(), inverse_rms)
}

/// dx_ij = s_i (g_j dy_ij - x_ij (s_i^2 / D) sum_k g_k dy_ik x_ik); with a sink, dgain_j += sum_i
/// dy_ij x_ij s_i. `wanted` false skips dx.
pub fn rms_norm_backward<B: Engine>(
    dy: Matrix<B>,
    x: Matrix<B>,
    inverse_rms: Matrix<B>,
    gain: &Matrix<B>,
    dgain: Option<&mut Sink<B>>,
    wanted: bool,
) -> Option<Matrix<B>> {
    if let Some(sink) = dgain {
        accumulate(sink, (dy.clone() * x.clone() * inverse_rms.clone()).sum_dim(0));
    }
    wanted.then(|| {
        let scaled = dy * gain.clone();
        // Normalised rows first: the product of three small or large factors could leave the range
        // of f32.
        let unit = x * inverse_rms.clone();
        let along = (scaled.clone() * unit.clone()).mean_dim(1);
        (scaled - unit * along) * inverse_rms
    })
}
