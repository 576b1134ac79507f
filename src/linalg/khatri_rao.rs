//! The row-wise Khatri-Rao (face-splitting) product and its adjoint, with one appended column.

use super::Real;
use super::elementwise::{Kernel, vectorized};
use ndarray::{ArrayView2, ArrayViewMut2};

/// Row i of `out` becomes the Kronecker product of the row [a_i | last_i] and b_i:
/// `out[i, p * b.ncols() + q] = a'[i, p] * b[i, q]`.
///
/// Shapes: a `n x p`, last `n`, b `n x q`, out `n x ((p + 1) q)`; the rows of all must be
/// contiguous. It turns an element-wise product of two low-rank matrices into one: (A B^T) o (C
/// D^T) = (A * C)(B * D)^T.
///
/// ```
/// use ndarray::{array, Array2};
/// use peft_limits::linalg::khatri_rao::face_splitting_into;
/// let mut out = Array2::zeros((1, 6));
/// face_splitting_into(array![[2.0, 3.0]].view(), &[1.0], array![[5.0, 7.0]].view(), out.view_mut());
/// assert_eq!(out, array![[10.0, 14.0, 15.0, 21.0, 5.0, 7.0]]);
/// ```
///
/// # Panics
/// If shapes disagree or a row is not contiguous: an internal error.
pub fn face_splitting_into<T: Real>(
    a: ArrayView2<T>,
    last: &[T],
    b: ArrayView2<T>,
    out: ArrayViewMut2<T>,
) {
    assert_eq!(out.dim(), (a.nrows(), (a.ncols() + 1) * b.ncols()));
    assert!(last.len() == a.nrows() && b.nrows() == a.nrows());
    if !out.is_empty() {
        vectorized(FaceSplitting { a, last, b, out });
    }
}

struct FaceSplitting<'a, T> {
    a: ArrayView2<'a, T>,
    last: &'a [T],
    b: ArrayView2<'a, T>,
    out: ArrayViewMut2<'a, T>,
}

impl<T: Real> Kernel for FaceSplitting<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(mut self) {
        let width = self.b.ncols();
        for i in 0..self.a.nrows() {
            let (a, b, mut out) = (self.a.row(i), self.b.row(i), self.out.row_mut(i));
            let (a, b) = (contiguous(a.to_slice()), contiguous(b.to_slice()));
            let out = out.as_slice_mut().unwrap_or_else(|| panic!("rows must be contiguous"));
            for (p, block) in out.chunks_exact_mut(width).enumerate() {
                let factor = if p < a.len() { a[p] } else { self.last[i] };
                for (o, &x) in block.iter_mut().zip(b) {
                    *o = factor * x;
                }
            }
        }
    }
}

/// The adjoint: `out[i, q] += sum_p a'[i, p] sums[i, p * q_count + q]` with a' = [a | last].
///
/// # Panics
/// As [`face_splitting_into`].
pub fn contract_into<T: Real>(
    a: ArrayView2<T>,
    last: &[T],
    sums: ArrayView2<T>,
    out: ArrayViewMut2<T>,
) {
    assert_eq!(sums.dim(), (a.nrows(), (a.ncols() + 1) * out.ncols()));
    assert!(last.len() == a.nrows() && out.nrows() == a.nrows());
    if !out.is_empty() {
        vectorized(Contract { a, last, sums, out });
    }
}

struct Contract<'a, T> {
    a: ArrayView2<'a, T>,
    last: &'a [T],
    sums: ArrayView2<'a, T>,
    out: ArrayViewMut2<'a, T>,
}

impl<T: Real> Kernel for Contract<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(mut self) {
        let width = self.out.ncols();
        for i in 0..self.a.nrows() {
            let (a, sums, mut out) = (self.a.row(i), self.sums.row(i), self.out.row_mut(i));
            let (a, sums) = (contiguous(a.to_slice()), contiguous(sums.to_slice()));
            let out = out.as_slice_mut().unwrap_or_else(|| panic!("rows must be contiguous"));
            for (p, block) in sums.chunks_exact(width).enumerate() {
                let factor = if p < a.len() { a[p] } else { self.last[i] };
                for (o, &x) in out.iter_mut().zip(block) {
                    *o += factor * x;
                }
            }
        }
    }
}

#[inline(always)]
fn contiguous<T>(row: Option<&[T]>) -> &[T] {
    row.unwrap_or_else(|| panic!("rows must be contiguous"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    /// (A B^T) o (C D^T) = (A * C)(B * D)^T on distinct sizes.
    #[test]
    fn hadamard_of_low_rank_matrices() {
        let make = |n: usize, m: usize, s: usize| {
            Array2::from_shape_fn((n, m), |(i, j)| ((i * 7 + j * 3 + s) % 13) as f64 - 6.0)
        };
        let (a, c) = (make(11, 2, 0), make(11, 3, 1));
        let (b, d) = (make(9, 2, 2), make(9, 3, 5));
        let want = a.dot(&b.t()) * c.dot(&d.t());
        let mut left = Array2::zeros((11, 9));
        let mut right = Array2::zeros((9, 9));
        // The appended columns 3 and 2 add 6 (C D^T).
        face_splitting_into(a.view(), &[3.0; 11], c.view(), left.view_mut());
        face_splitting_into(b.view(), &[2.0; 9], d.view(), right.view_mut());
        assert_eq!(left.dot(&right.t()), want + c.dot(&d.t()) * 6.0, "integers, so exact");
    }

    /// <face_splitting(a, b), s> = <b, contract(a, s)> row by row.
    #[test]
    fn the_contraction_is_the_adjoint() {
        let make = |n: usize, m: usize, s: usize| {
            Array2::from_shape_fn((n, m), |(i, j)| ((i * 5 + j * 11 + s) % 7) as f64 - 3.0)
        };
        let (a, b, sums) = (make(6, 3, 0), make(6, 2, 1), make(6, 8, 2));
        let last = [1.0, -2.0, 0.0, 4.0, 5.0, -6.0];
        let mut product = Array2::zeros((6, 8));
        face_splitting_into(a.view(), &last, b.view(), product.view_mut());
        let mut contracted = Array2::zeros((6, 2));
        contract_into(a.view(), &last, sums.view(), contracted.view_mut());
        assert_eq!(
            (product * &sums).sum_axis(ndarray::Axis(1)),
            (contracted * &b).sum_axis(ndarray::Axis(1))
        );
    }
}
