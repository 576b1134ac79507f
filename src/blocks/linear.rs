//! Linear projection y = x W^T without bias.

use super::require_shape;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::linalg::gemm::parallel_product_into;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// y = x W^T.
///
/// Shapes: x `N x in`, weight `out x in`, y `N x out`. Cost N in out multiply-adds. Nothing is
/// saved here: backward needs x only for a trainable weight, and the caller decides whether to keep
/// it.
///
/// # Errors
/// [`crate::Error::ShapeMismatch`] if the widths disagree.
///
/// ```
/// use ndarray::array;
/// use peft_limits::{blocks::linear::linear_forward, cost::Cost};
/// let y = linear_forward(array![[1.0, 2.0]].view(), array![[3.0, 5.0], [0.0, 1.0]].view(), &mut Cost::default())?;
/// assert_eq!(y, array![[13.0, 2.0]]);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn linear_forward<T: Real>(
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    cost: &mut Cost,
) -> Result<Array2<T>> {
    require_shape("linear_forward", "weight", &weight, (weight.nrows(), x.ncols()))?;
    let mut y = Array2::zeros((x.nrows(), weight.nrows()));
    parallel_product_into(T::one(), x, weight.t(), T::zero(), &mut y.view_mut(), cost);
    Ok(y)
}

/// y += x W^T: the projection that ends a residual branch.
///
/// # Errors
/// As [`linear_forward`].
pub fn linear_forward_add<T: Real>(
    x: ArrayView2<T>,
    weight: ArrayView2<T>,
    y: &mut ArrayViewMut2<T>,
    cost: &mut Cost,
) -> Result<()> {
    require_shape("linear_forward_add", "weight", &weight, (y.ncols(), x.ncols()))?;
    require_shape("linear_forward_add", "y", &y.view(), (x.nrows(), weight.nrows()))?;
    parallel_product_into(T::one(), x, weight.t(), T::one(), y, cost);
    Ok(())
}

/// dx += dy W.
///
/// Shapes: dy `N x out`, weight `out x in`, dx `N x in`.
///
/// # Errors
/// [`crate::Error::ShapeMismatch`].
pub fn linear_backward_input<T: Real>(
    dy: ArrayView2<T>,
    weight: ArrayView2<T>,
    dx: &mut ArrayViewMut2<T>,
    cost: &mut Cost,
) -> Result<()> {
    require_shape("linear_backward_input", "dy", &dy, (dx.nrows(), weight.nrows()))?;
    require_shape("linear_backward_input", "weight", &weight, (dy.ncols(), dx.ncols()))?;
    parallel_product_into(T::one(), dy, weight, T::one(), dx, cost);
    Ok(())
}

/// dW += scale dy^T x.
///
/// Shapes: dy `N x out`, x `N x in`, dweight `out x in`. For a slice of the weight pass the
/// matching columns of dy (rows of W) or of x (columns of W): only that slice is computed.
///
/// # Errors
/// [`crate::Error::ShapeMismatch`].
pub fn linear_backward_weight<T: Real>(
    scale: T,
    dy: ArrayView2<T>,
    x: ArrayView2<T>,
    dweight: &mut ArrayViewMut2<T>,
    cost: &mut Cost,
) -> Result<()> {
    require_shape("linear_backward_weight", "x", &x, (dy.nrows(), x.ncols()))?;
    require_shape("linear_backward_weight", "dweight", &dweight.view(), (dy.ncols(), x.ncols()))?;
    parallel_product_into(scale, dy.t(), x, T::one(), dweight, cost);
    Ok(())
}
