//! The gated unit a = act(gate) o up, where act is silu(g) = g / (1 + e^(-g)) or the tanh form of gelu.

use super::{ROWS_PER_TASK, numbers, numbers_mut, require_shape};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::elementwise::vectorized_closure;
use crate::linalg::{Real, Scratch};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

/// Of the gate. Both are g sigmoid(z) with z a function of g.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// z = g.
    #[default]
    Silu,
    /// z = sqrt(8 / pi) (g + 0.044715 g^3): 0.5 g (1 + tanh(z / 2)).
    GeluTanh,
}

/// sqrt(8 / pi) and the cubic term of the tanh form of gelu.
pub(crate) const GELU: (f64, f64) = (1.595_769_121_605_730_7, 0.044_715);

/// z and dz/dg of gelu.
#[inline(always)]
fn gelu_argument<T: Real>(g: T) -> (T, T) {
    let (root, cubic) = (T::of(GELU.0), T::of(GELU.1));
    let square = cubic * g * g;
    (root * g * (T::one() + square), root * (T::one() + T::of(3.0) * square))
}

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
    gated_forward(Activation::Silu, gate, up, scratch, cost)
}

/// As [`swiglu_forward`] for an activation.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn gated_forward<T: Real>(
    activation: Activation,
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
                    let each = a.iter_mut().zip(gate).zip(up);
                    match activation {
                        Activation::Silu => each.for_each(|((a, &g), &u)| *a = g * sigmoid(g) * u),
                        Activation::GeluTanh => {
                            each.for_each(|((a, &g), &u)| *a = g * sigmoid(gelu_argument(g).0) * u);
                        }
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
    gated_backward(Activation::Silu, da, gate, up, cost)
}

/// As [`swiglu_backward`] for an activation: dgate = da o up o (s + gate s (1 - s) dz/dgate) with s = sigmoid(z).
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn gated_backward<T: Real>(
    activation: Activation,
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
                    let each = gate.iter_mut().zip(up).zip(da);
                    match activation {
                        Activation::Silu => each.for_each(|((g, u), &d)| {
                            let s = sigmoid(*g);
                            let silu = *g * s;
                            *g = d * *u * (s + silu * (T::one() - s));
                            *u = d * silu;
                        }),
                        Activation::GeluTanh => each.for_each(|((g, u), &d)| {
                            let (z, slope) = gelu_argument(*g);
                            let s = sigmoid(z);
                            let gelu = *g * s;
                            *g = d * *u * (s + gelu * (T::one() - s) * slope);
                            *u = d * gelu;
                        }),
                    }
                },
            );
        },
    );
    Ok(())
}
