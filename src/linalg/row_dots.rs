//! Scalar products of the rows of two matrices.

use super::Real;
use super::elementwise::{Kernel, lane_total, vectorized};
use ndarray::ArrayView2;

/// `out[i]` = a_i . b_i, in independent lanes: the bits depend on the rows alone, where they lie in
/// one piece each.
///
/// Shapes: a and b `n x d`, out `n`. Disagreeing shapes are an internal error and panic. Of the
/// softmax's backward this is delta_i = G_i . O_i (design.md 2.1).
///
/// ```
/// use ndarray::array;
/// use peft_limits::linalg::row_dots::row_dots;
/// let (a, mut out) = (array![[1.0, 2.0], [3.0, 4.0]], [0.0; 2]);
/// row_dots(&a.view(), &array![[5.0, 6.0], [0.0, 0.5]].view(), &mut out);
/// assert_eq!(out, [17.0, 2.0]);
/// ```
pub fn row_dots<T: Real>(a: &ArrayView2<T>, b: &ArrayView2<T>, out: &mut [T]) {
    assert!(a.dim() == b.dim() && a.nrows() == out.len(), "shapes of scalar products of rows");
    vectorized(RowDots { a, b, out });
}

struct RowDots<'a, 'b, T> {
    a: &'a ArrayView2<'b, T>,
    b: &'a ArrayView2<'b, T>,
    out: &'a mut [T],
}

impl<T: Real> Kernel for RowDots<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((out, a), b) in self.out.iter_mut().zip(self.a.rows()).zip(self.b.rows()) {
            *out = match (a.to_slice(), b.to_slice()) {
                (Some(a), Some(b)) => dot(a, b),
                _ => a.dot(&b),
            };
        }
    }
}

/// Partial sums of a row.
const LANES: usize = 16;

#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::zero(); LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(a).zip(b) {
            *lane += x * y;
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(rest) {
        *lane += x * y;
    }
    lane_total(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, s};

    /// Small integers, whose sums are exact, in rows of every length around a register's, in one
    /// piece and strided.
    #[test]
    fn every_length_and_layout_agrees_with_plain_sums() {
        for columns in 0..70 {
            let a =
                Array2::from_shape_fn((3, columns), |(i, j)| ((i * 5 + j * 3) % 11) as f64 - 5.0);
            let wide = Array2::from_shape_fn((3, 2 * columns), |(i, j)| ((i + j) % 7) as f64 - 3.0);
            for b in [wide.slice(s![.., ..columns]), wide.slice(s![.., ..;2])] {
                let mut out = [f64::NAN; 3];
                row_dots(&a.view(), &b, &mut out);
                for (i, dot) in out.into_iter().enumerate() {
                    let want = (0..columns).fold(0.0, |sum, j| sum + a[[i, j]] * b[[i, j]]);
                    assert_eq!(dot.to_bits(), want.to_bits(), "row {i} of {columns} columns");
                }
            }
        }
    }
}
