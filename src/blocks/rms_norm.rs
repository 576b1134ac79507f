//! Root-mean-square normalisation y = gain o x / rms(x), row by row.

use super::{ROWS_PER_TASK, numbers, numbers_mut, require_shape};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::elementwise::{LANES, vectorized_closure};
use crate::linalg::{Real, Scratch};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// Sum of f(a_i, b_i, c_i) in independent lanes, so that the loop vectorises and its order is
/// fixed.
#[inline(always)]
fn lane_sum<T: Real>(a: &[T], b: &[T], c: &[T], term: impl Fn(T, T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (a_chunks, b_chunks, c_chunks) =
        (a.chunks_exact(LANES), b.chunks_exact(LANES), c.chunks_exact(LANES));
    let tails = a_chunks.remainder().iter().zip(b_chunks.remainder()).zip(c_chunks.remainder());
    let mut sum = T::zero();
    for ((&x, &y), &z) in tails {
        sum += term(x, y, z);
    }
    for ((x, y), z) in a_chunks.zip(b_chunks).zip(c_chunks) {
        for i in 0..LANES {
            lanes[i] += term(x[i], y[i], z[i]);
        }
    }
    for lane in lanes {
        sum += lane;
    }
    sum
}

fn check_gain<T: Real>(op: &'static str, gain: &[T], width: usize) -> Result<()> {
    if gain.len() == width {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        op,
        arg: "gain".into(),
        expected: format!("({width},)"),
        got: format!("({},)", gain.len()),
    })
}

/// y_ij = gain_j x_ij s_i with s_i = 1 / sqrt(mean_j x_ij^2 + eps); returns (y, s).
///
/// Shapes: x `N x D`, gain `D`, y `N x D`, s `N`. Backward needs x and s.
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] unless eps is positive.
///
/// ```
/// use ndarray::array;
/// use peft_limits::{blocks::rms_norm::rms_norm_forward, cost::Cost, linalg::Scratch};
/// // The root mean square of (1, 7) is 5.
/// let (scratch, cost) = (&mut Scratch::default(), &mut Cost::default());
/// let (y, s) = rms_norm_forward(array![[1.0, 7.0]].view(), &[5.0, 10.0], 1e-300, scratch, cost)?;
/// assert!((y[[0, 0]] - 1.0f64).abs() < 1e-15 && (y[[0, 1]] - 14.0).abs() < 1e-14 && (s[0] - 0.2).abs() < 1e-16);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn rms_norm_forward<T: Real>(
    x: ArrayView2<T>,
    gain: &[T],
    eps: f64,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Result<(Array2<T>, Vec<T>)> {
    let (rows, width) = x.dim();
    check_gain("rms_norm_forward", gain, width)?;
    if !(eps > 0.0) {
        return Err(Error::invalid("rms_norm_eps", eps, "must be positive"));
    }
    cost.elementwise += 4 * (rows * width) as u64;
    let x = x.as_standard_layout();
    let input = numbers(&x);
    let mut y = scratch.array((rows, width));
    let mut inverse_rms = vec![T::zero(); rows];
    let task = ROWS_PER_TASK * width.max(1);
    numbers_mut(&mut y)
        .par_chunks_mut(task)
        .zip(input.par_chunks(task))
        .zip(inverse_rms.par_chunks_mut(ROWS_PER_TASK))
        .for_each(|((y, x), inverse)| {
            vectorized_closure(
                #[inline(always)]
                || {
                    for ((y, x), inverse) in
                        y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(inverse)
                    {
                        let mean = lane_sum(x, x, x, |a, b, _| a * b) / T::of(width as f64);
                        let s = T::one() / (mean + T::of(eps)).sqrt();
                        *inverse = s;
                        for ((y, &x), &g) in y.iter_mut().zip(x).zip(gain) {
                            *y = g * x * s;
                        }
                    }
                },
            );
        });
    Ok((y, inverse_rms))
}

/// dx_ij += s_i (g_j dy_ij - x_ij (s_i^2 / D) sum_k g_k dy_ik x_ik),  dgain_j += sum_i dy_ij x_ij
/// s_i.
///
/// Shapes as in [`rms_norm_forward`]. The sums over rows are taken in fixed groups, so they do not
/// depend on the number of threads.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn rms_norm_backward<T: Real>(
    dy: ArrayView2<T>,
    x: ArrayView2<T>,
    inverse_rms: &[T],
    gain: &[T],
    dgain: Option<&mut [T]>,
    dx: Option<&mut ArrayViewMut2<T>>,
    cost: &mut Cost,
) -> Result<()> {
    let op = "rms_norm_backward";
    let (rows, width) = x.dim();
    check_gain(op, gain, width)?;
    require_shape(op, "dy", &dy, (rows, width))?;
    if inverse_rms.len() != rows {
        return Err(Error::shape(op, "inverse_rms", (rows, 1), (inverse_rms.len(), 1)));
    }
    let (dy, x) = (dy.as_standard_layout(), x.as_standard_layout());
    let (dy, x) = (numbers(&dy), numbers(&x));
    let task = ROWS_PER_TASK * width.max(1);
    if let Some(dgain) = dgain {
        check_gain(op, dgain, width)?;
        cost.elementwise += 3 * (rows * width) as u64;
        let parts: Vec<Vec<T>> = dy
            .par_chunks(task)
            .zip(x.par_chunks(task))
            .zip(inverse_rms.par_chunks(ROWS_PER_TASK))
            .map(|((dy, x), inverse)| {
                let mut part = vec![T::zero(); width];
                vectorized_closure(
                    #[inline(always)]
                    || {
                        for ((dy, x), &s) in
                            dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(inverse)
                        {
                            for ((p, &dy), &x) in part.iter_mut().zip(dy).zip(x) {
                                *p += dy * x * s;
                            }
                        }
                    },
                );
                part
            })
            .collect();
        for part in parts {
            for (d, p) in dgain.iter_mut().zip(part) {
                *d += p;
            }
        }
    }
    if let Some(dx) = dx {
        require_shape(op, "dx", &dx.view(), (rows, width))?;
        cost.elementwise += 8 * (rows * width) as u64;
        let Some(dx) = dx.as_slice_mut() else {
            return Err(Error::invalid(
                "dx",
                "strided",
                "rms_norm_backward accumulates into a contiguous array",
            ));
        };
        dx.par_chunks_mut(task)
            .zip(dy.par_chunks(task))
            .zip(x.par_chunks(task))
            .zip(inverse_rms.par_chunks(ROWS_PER_TASK))
            .for_each(|(((dx, dy), x), inverse)| {
                vectorized_closure(
                    #[inline(always)]
                    || {
                        let rows = dx
                            .chunks_exact_mut(width)
                            .zip(dy.chunks_exact(width))
                            .zip(x.chunks_exact(width));
                        for (((dx, dy), x), &s) in rows.zip(inverse) {
                            let dot = lane_sum(dy, x, gain, |dy, x, g| g * dy * x);
                            let c = dot * s * s / T::of(width as f64);
                            for (((dx, &dy), &x), &g) in dx.iter_mut().zip(dy).zip(x).zip(gain) {
                                *dx += s * (g * dy - c * x);
                            }
                        }
                    },
                );
            });
    }
    Ok(())
}
