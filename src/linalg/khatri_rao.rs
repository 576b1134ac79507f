//! The row-wise Khatri-Rao (face-splitting) product.

use super::Real;
use ndarray::{ArrayView2, ArrayViewMut2};

/// Row i of `out` becomes the Kronecker product of row i of `a` and row i of `b`:
/// `out[i, p * b.ncols() + q] = a[i, p] * b[i, q]`.
///
/// Shapes: a `n x p`, b `n x q`, out `n x (p q)`. It turns an element-wise product of two low-rank
/// matrices into one: (A B^T) o (C D^T) = (A * C)(B * D)^T.
///
/// ```
/// use ndarray::{array, Array2};
/// use peft_limits::linalg::khatri_rao::face_splitting_into;
/// let mut out = Array2::zeros((1, 4));
/// face_splitting_into(array![[2.0, 3.0]].view(), array![[5.0, 7.0]].view(), &mut out.view_mut());
/// assert_eq!(out, array![[10.0, 14.0, 15.0, 21.0]]);
/// ```
pub fn face_splitting_into<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>, out: &mut ArrayViewMut2<T>) {
    let width = b.ncols();
    debug_assert_eq!(out.dim(), (a.nrows(), a.ncols() * width));
    for i in 0..a.nrows() {
        let (a_row, b_row) = (a.row(i), b.row(i));
        let mut out_row = out.row_mut(i);
        for (p, mut block) in out_row.exact_chunks_mut(width.max(1)).into_iter().enumerate() {
            let factor = a_row[p];
            block.zip_mut_with(&b_row, |o, &x| *o = factor * x);
        }
    }
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
        let mut left = Array2::zeros((11, 6));
        let mut right = Array2::zeros((9, 6));
        face_splitting_into(a.view(), c.view(), &mut left.view_mut());
        face_splitting_into(b.view(), d.view(), &mut right.view_mut());
        assert_eq!(left.dot(&right.t()), want, "integers, so exact");
    }
}
