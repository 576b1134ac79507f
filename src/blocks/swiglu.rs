//! The gated unit a = silu(gate) o up with silu(g) = g / (1 + e^(-g)).

use super::{ROWS_PER_TASK, numbers, numbers_mut, require_shape};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::elementwise::vectorized_closure;
use crate::linalg::{Real, Scratch};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

/// 1 / (1 + e^(-g)).
#[inline(always)]
fn sigmoid<T: Real>(g: T) -> T {
    T::one() / (T::one() + (-g).exp_lane())
}

/// a = silu(gate) o up, all `N x F`. Backward needs gate and up.
///
/// # Errors
/// [`Error::ShapeMismatch`].
///
/// ```
/// use ndarray::array;
/// use peft_limits::{blocks::swiglu::swiglu_forward, cost::Cost, linalg::Scratch};
/// // silu(ln 3) = 3/4 ln 3.
/// let (scratch, cost) = (&mut Scratch::default(), &mut Cost::default());
/// let a = swiglu_forward(array![[3f64.ln()]].view(), array![[4.0]].view(), scratch, cost)?;
/// assert!((a[[0, 0]] - 3.0 * 3f64.ln()).abs() < 1e-14);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn swiglu_forward<T: Real>(
    gate: ArrayView2<T>,
    up: ArrayView2<T>,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Result<Array2<T>> {
    require_shape("swiglu_forward", "up", &up, gate.dim())?;
    cost.exponentials += gate.len() as u64;
    cost.elementwise += 4 * gate.len() as u64;
    let (gate, up) = (gate.as_standard_layout(), up.as_standard_layout());
    let mut a = scratch.array(gate.dim());
    let task = ROWS_PER_TASK * gate.ncols().max(1);
    numbers_mut(&mut a)
        .par_chunks_mut(task)
        .zip(numbers(&gate).par_chunks(task))
        .zip(numbers(&up).par_chunks(task))
        .for_each(|((a, gate), up)| {
            vectorized_closure(
                #[inline(always)]
                || {
                    for ((a, &g), &u) in a.iter_mut().zip(gate).zip(up) {
                        *a = g * sigmoid(g) * u;
                    }
                },
            );
        });
    Ok(a)
}

/// dgate = da o up o s (1 + gate (1 - s)) and dup = da o gate o s with s = sigmoid(gate).
///
/// In place: on entry `gate` and `up` hold the forward's inputs, on return their gradients.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn swiglu_backward<T: Real>(
    da: ArrayView2<T>,
    gate: &mut Array2<T>,
    up: &mut Array2<T>,
    cost: &mut Cost,
) -> Result<()> {
    require_shape("swiglu_backward", "da", &da, gate.dim())?;
    require_shape("swiglu_backward", "up", &up.view(), gate.dim())?;
    cost.exponentials += gate.len() as u64;
    cost.elementwise += 9 * gate.len() as u64;
    let task = ROWS_PER_TASK * gate.ncols().max(1);
    let da = da.as_standard_layout();
    let (Some(gate), Some(up)) = (gate.as_slice_mut(), up.as_slice_mut()) else {
        return Err(Error::invalid("gate", "strided", "swiglu_backward works in place on contiguous arrays"));
    };
    gate.par_chunks_mut(task).zip(up.par_chunks_mut(task)).zip(numbers(&da).par_chunks(task)).for_each(
        |((gate, up), da)| {
            vectorized_closure(
                #[inline(always)]
                || {
                    for ((g, u), &d) in gate.iter_mut().zip(up).zip(da) {
                        let s = sigmoid(*g);
                        let silu = *g * s;
                        *g = d * *u * (s + silu * (T::one() - s));
                        *u = d * silu;
                    }
                },
            );
        },
    );
    Ok(())
}
