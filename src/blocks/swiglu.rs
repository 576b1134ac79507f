//! The gated unit a = act(gate) o up, and act alone for an MLP without gate.

use super::{ROWS_PER_TASK, numbers, numbers_mut, require_shape};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::elementwise::vectorized_closure;
use crate::linalg::{Real, Scratch};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

/// The activation of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Activation {
    /// g sigmoid(g).
    #[default]
    Silu,
    /// The tanh form of gelu: g sigmoid(z) with z = sqrt(8 / pi) (g + 0.044715 g^3).
    GeluTanh,
    /// g Phi(g), with the normal distribution function.
    Gelu,
    /// max(g, 0).
    Relu,
    /// g sigmoid(alpha g) with g clamped from above; up is clamped on both sides and one is added
    /// to it.
    ClampedSwish {
        /// Factor inside the sigmoid.
        alpha: f64,
        /// Where gate and up are clamped.
        limit: f64,
    },
}

impl Activation {
    /// act(g) and its derivative.
    #[inline(always)]
    fn at<T: Real>(self, g: T) -> (T, T) {
        match self {
            Self::Silu => {
                let s = sigmoid(g);
                (g * s, s + g * s * (T::one() - s))
            }
            Self::GeluTanh => {
                let (z, slope) = gelu_argument(g);
                let s = sigmoid(z);
                (g * s, s + g * s * (T::one() - s) * slope)
            }
            Self::Gelu => {
                let x = g.widen();
                let phi = 0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2));
                let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                (T::of(x * phi), T::of(phi + x * density))
            }
            Self::Relu => {
                let on = if g > T::zero() { T::one() } else { T::zero() };
                (g * on, on)
            }
            Self::ClampedSwish { alpha, limit } => {
                let (alpha, limit) = (T::of(alpha), T::of(limit));
                let (g, on) = if g > limit { (limit, T::zero()) } else { (g, T::one()) };
                let s = sigmoid(alpha * g);
                (g * s, on * (s + alpha * g * s * (T::one() - s)))
            }
        }
    }

    /// What multiplies act(g), and its derivative: u itself, but for a clamped unit.
    #[inline(always)]
    fn of_up<T: Real>(self, u: T) -> (T, T) {
        match self {
            Self::ClampedSwish { limit, .. } => {
                let limit = T::of(limit);
                let on = if u < -limit || u > limit { T::zero() } else { T::one() };
                (u.max(-limit).min(limit) + T::one(), on)
            }
            _ => (u, T::one()),
        }
    }
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
                        other => {
                            each.for_each(|((a, &g), &u)| *a = other.at(g).0 * other.of_up(u).0)
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

/// As [`swiglu_backward`] for an activation: dgate = da o up o (s + gate s (1 - s) dz/dgate) with
/// s = sigmoid(z).
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
        return Err(Error::invalid(
            "gate",
            "strided",
            "swiglu_backward works in place on contiguous arrays",
        ));
    };
    gate.par_chunks_mut(task)
        .zip(up.par_chunks_mut(task))
        .zip(numbers(&da).par_chunks(task))
        .for_each(|((gate, up), da)| {
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
                        other => each.for_each(|((g, u), &d)| {
                            let ((act, slope), (factor, on)) = (other.at(*g), other.of_up(*u));
                            *g = d * factor * slope;
                            *u = d * act * on;
                        }),
                    }
                },
            );
        });
    Ok(())
}

/// a = act(x).
pub fn activation_forward<T: Real>(
    activation: Activation,
    x: ArrayView2<T>,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Array2<T> {
    cost.exponentials += x.len() as u64;
    cost.elementwise += 4 * x.len() as u64;
    let x = x.as_standard_layout();
    let mut a = scratch.array(x.dim());
    let task = ROWS_PER_TASK * x.ncols().max(1);
    numbers_mut(&mut a).par_chunks_mut(task).zip(numbers(&x).par_chunks(task)).for_each(
        |(a, x)| {
            a.iter_mut().zip(x).for_each(|(a, &x)| *a = activation.at(x).0);
        },
    );
    a
}

/// dx = da act'(x), in place: on entry `x` holds the forward's input.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn activation_backward<T: Real>(
    activation: Activation,
    da: ArrayView2<T>,
    x: &mut Array2<T>,
    cost: &mut Cost,
) -> Result<()> {
    require_shape("activation_backward", "da", &da, x.dim())?;
    cost.exponentials += x.len() as u64;
    cost.elementwise += 5 * x.len() as u64;
    let da = da.as_standard_layout();
    let task = ROWS_PER_TASK * x.ncols().max(1);
    numbers_mut(x).par_chunks_mut(task).zip(numbers(&da).par_chunks(task)).for_each(|(x, da)| {
        x.iter_mut().zip(da).for_each(|(x, &d)| *x = d * activation.at(*x).1);
    });
    Ok(())
}
