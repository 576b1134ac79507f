//! Rotary position embedding in the Hugging Face half-split layout.

use super::{ROWS_PER_TASK, numbers};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::elementwise::vectorized_closure;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// cos and sin of the angles t theta^(-2j/d), for t < T and j < d/2, computed in double precision.
#[derive(Debug, Clone)]
pub struct RopeTable<T> {
    cos: Array2<T>,
    sin: Array2<T>,
}

impl<T: Real> RopeTable<T> {
    /// Angles for positions 0..length and heads of width `head_dim`.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an odd or zero head width or a base that is not positive.
    pub fn new(length: usize, head_dim: usize, theta: f64) -> Result<Self> {
        let positions: Vec<u32> = (0..length as u32).collect();
        Self::at(&positions, head_dim, theta)
    }

    /// Angles for given positions, one per row of what is to be rotated.
    ///
    /// # Errors
    /// As [`RopeTable::new`].
    pub fn at(positions: &[u32], head_dim: usize, theta: f64) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::invalid("head_dim", head_dim, "rotary embedding needs a positive even head width"));
        }
        if !(theta > 0.0) || !theta.is_finite() {
            return Err(Error::invalid("rope_theta", theta, "must be positive and finite"));
        }
        let angle = |(t, j): (usize, usize)| f64::from(positions[t]) * theta.powf(-2.0 * j as f64 / head_dim as f64);
        let shape = (positions.len(), head_dim / 2);
        Ok(Self {
            cos: Array2::from_shape_fn(shape, |i| T::of(angle(i).cos())),
            sin: Array2::from_shape_fn(shape, |i| T::of(angle(i).sin())),
        })
    }

    /// Number of positions.
    pub fn length(&self) -> usize {
        self.cos.nrows()
    }

    /// Cosines, `T x d/2`.
    pub fn cos(&self) -> ArrayView2<'_, T> {
        self.cos.view()
    }

    /// Sines, `T x d/2`.
    pub fn sin(&self) -> ArrayView2<'_, T> {
        self.sin.view()
    }

    /// Bytes of both tables.
    pub fn bytes(&self) -> usize {
        2 * self.cos.len() * size_of::<T>()
    }
}

/// Rotates every head of every row in place: with a = `x[j]`, b = `x[j + d/2]`,
/// (a, b) -> (a cos - b sin, b cos + a sin).
///
/// Shapes: x `(B T) x (H d)`; row i has position i mod T with T the table's length.
///
/// # Errors
/// [`Error::ShapeMismatch`] if the rows are not whole sequences or the width not whole heads.
pub fn rope_forward<T: Real>(x: &mut ArrayViewMut2<T>, table: &RopeTable<T>, cost: &mut Cost) -> Result<()> {
    rotate(x, table, T::one(), cost)
}

/// The transpose of [`rope_forward`], hence its inverse: rotation by the opposite angle.
///
/// # Errors
/// As [`rope_forward`].
pub fn rope_backward<T: Real>(dx: &mut ArrayViewMut2<T>, table: &RopeTable<T>, cost: &mut Cost) -> Result<()> {
    rotate(dx, table, -T::one(), cost)
}

fn rotate<T: Real>(x: &mut ArrayViewMut2<T>, table: &RopeTable<T>, direction: T, cost: &mut Cost) -> Result<()> {
    let (rows, width) = x.dim();
    let (length, half) = table.cos.dim();
    if length == 0 || !rows.is_multiple_of(length) || !width.is_multiple_of(2 * half) {
        return Err(Error::ShapeMismatch {
            op: "rope",
            arg: "x".into(),
            expected: format!("(multiple of {length}, multiple of {})", 2 * half),
            got: format!("({rows}, {width})"),
        });
    }
    cost.elementwise += 3 * (rows * width) as u64;
    let Some(x) = x.as_slice_mut() else {
        return Err(Error::invalid("x", "strided", "rope rotates a contiguous array in place"));
    };
    let (cos, sin) = (numbers(&table.cos), numbers(&table.sin));
    x.par_chunks_mut(ROWS_PER_TASK * width).enumerate().for_each(|(task, rows)| {
        vectorized_closure(
            #[inline(always)]
            || {
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    let t = (task * ROWS_PER_TASK + i) % length;
                    let (cos, sin) = (&cos[t * half..(t + 1) * half], &sin[t * half..(t + 1) * half]);
                    for head in row.chunks_exact_mut(2 * half) {
                        let (first, second) = head.split_at_mut(half);
                        for (((a, b), &c), &s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                            let s = direction * s;
                            let rotated = *a * c - *b * s;
                            *b = *b * c + *a * s;
                            *a = rotated;
                        }
                    }
                }
            },
        );
    });
    Ok(())
}
