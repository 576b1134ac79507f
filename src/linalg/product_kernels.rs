//! The libraries' kernels behind [`super::gemm::multiply`], and how the sum over terms is cut for them.
//!
//! On x86-64 with AVX2 or AVX-512 a product goes to faer, which takes the operands where they lie when it can and packs them
//! when it must, or, if its sum is long, to the gemm crate, which packs both for the caches; elsewhere to ndarray.
//! `cargo bench --bench products` compares them with ndarray's. Both kernels add the terms of a range one after the other with
//! one rounding each, so that where a product goes changes no bit of it.

use super::Real;
use ndarray::{ArrayView2, ArrayViewMut2};
use std::ops::Range;

/// Whether this processor has kernels whose bits are known.
///
/// Elsewhere faer calls another library, which cuts the sum in places that depend on all three extents, so that
/// parts of a product would not have the bits of the whole.
pub(super) fn kernels_run() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected;
        is_x86_feature_detected!("avx512f") || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// How the terms of a product are summed: the ranges that are added to c one after the other.
///
/// It follows from the terms and alpha, never from the rows and columns: so parts of a product have the bits of the whole.
#[derive(Debug, Clone, Copy)]
pub struct Summation {
    terms: usize,
    pieces: usize,
    /// Whether the sum is long enough for both operands to be packed.
    packed: bool,
}

impl Summation {
    /// Of alpha a b with at least one term.
    pub(super) fn of<T: Real>(alpha: T, a: &ArrayView2<T>) -> Self {
        let terms = a.ncols();
        // With another alpha the gemm crate rounds once where faer rounds twice.
        let packed = terms >= MANY_TERMS && alpha == T::one() && packing_pays();
        // Terms of a row of a that lie apart, as in a gradient dY^T X: faer walks down many rows of memory again and again.
        let apart = a.strides()[1] != 1;
        let most = match (packed, apart) {
            (true, _) => 384,
            (false, true) => 192,
            (false, false) => 512,
        };
        Self { terms, pieces: terms.div_ceil(most), packed }
    }

    /// Nearly equal ranges of terms.
    pub(super) fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.pieces).map(move |i| i * self.terms / self.pieces..(i + 1) * self.terms / self.pieces)
    }

    /// Terms of the shortest range.
    pub(super) fn least_terms(self) -> usize {
        self.terms / self.pieces
    }
}

/// Terms from which the gemm crate is faster in a training step.
const MANY_TERMS: usize = 128;

/// Whether the gemm crate's kernels have been found faster on such a processor: with AVX-512.
fn packing_pays() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A scalar that the kernels multiply; [`Real`] requires it.
pub trait Multiply: Sized {
    /// c = alpha a b + beta c for at least two rows and columns of c, at least one term and more than a few thousand
    /// multiply-adds a range: part of [`multiply`](super::gemm::multiply).
    fn multiply_by_kernel(
        alpha: Self,
        a: &ArrayView2<Self>,
        b: &ArrayView2<Self>,
        beta: Self,
        c: &mut ArrayViewMut2<Self>,
        summation: Summation,
    );
}

#[cfg(not(target_arch = "x86_64"))]
impl<T: ndarray::LinalgScalar> Multiply for T {
    fn multiply_by_kernel(
        alpha: T,
        a: &ArrayView2<T>,
        b: &ArrayView2<T>,
        beta: T,
        c: &mut ArrayViewMut2<T>,
        _: Summation,
    ) {
        ndarray::linalg::general_mat_mul(alpha, a, b, beta, c);
    }
}

#[cfg(target_arch = "x86_64")]
impl<T> Multiply for T
where
    T: 'static
        + ndarray::LinalgScalar
        + PartialEq
        + faer::traits::ComplexField
        + faer::traits::Conjugate<Canonical = T>,
{
    fn multiply_by_kernel(
        alpha: T,
        a: &ArrayView2<T>,
        b: &ArrayView2<T>,
        beta: T,
        c: &mut ArrayViewMut2<T>,
        summation: Summation,
    ) {
        let (zero, one) = (<T as num_traits::Zero>::zero(), <T as num_traits::One>::one());
        if beta != zero && beta != one {
            c.mapv_inplace(|x| beta * x);
        }
        let mut add = beta != zero;
        // The gemm crate sums smaller results in another order.
        let packed = summation.packed && c.len() > 16 * 16;
        for range in summation.ranges() {
            let a = a.slice(ndarray::s![.., range.clone()]);
            let b = b.slice(ndarray::s![range, ..]);
            if packed {
                add_packed(&a, &b, add, c);
            } else {
                add_by_faer(alpha, &a, &b, add, c);
            }
            add = true;
        }
    }
}

/// c = a b, or c + a b, by the gemm crate, which packs both operands.
#[cfg(target_arch = "x86_64")]
fn add_packed<T: ndarray::LinalgScalar>(a: &ArrayView2<T>, b: &ArrayView2<T>, add: bool, c: &mut ArrayViewMut2<T>) {
    let one = T::one();
    let (m, k, n) = (a.nrows(), a.ncols(), b.ncols());
    assert!(b.nrows() == k && c.dim() == (m, n), "shapes of a product");
    let ([a_row, a_column], [b_row, b_column]) = (strides(a), strides(b));
    let [c_row, c_column] = strides(&c.view());
    // Sound: pointers, shapes and strides are those of three views that agree (asserted above), whose entries are valid, c's
    // distinct and borrowed alone; no library's threads are started.
    #[allow(unsafe_code)]
    unsafe {
        let serial = gemm::Parallelism::None;
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c_column,
            c_row,
            add,
            a.as_ptr(),
            a_column,
            a_row,
            b.as_ptr(),
            b_column,
            b_row,
            one,
            one,
            false,
            false,
            false,
            serial,
        );
    }
}

/// c = alpha a b, or c + alpha a b, by faer.
#[cfg(target_arch = "x86_64")]
fn add_by_faer<T>(alpha: T, a: &ArrayView2<T>, b: &ArrayView2<T>, add: bool, c: &mut ArrayViewMut2<T>)
where
    T: ndarray::LinalgScalar + faer::traits::ComplexField + faer::traits::Conjugate<Canonical = T>,
{
    use faer::{Accum, MatMut, Par, linalg::matmul::matmul, reborrow::ReborrowMut};
    let accumulate = if add { Accum::Add } else { Accum::Replace };
    let ((rows, columns), [row, column]) = (c.dim(), strides(&c.view()));
    // Sound: pointer, shape and strides are those of a mutable view, whose entries are valid, distinct and borrowed for
    // longer than this call.
    #[allow(unsafe_code)]
    let mut target = unsafe { MatMut::from_raw_parts_mut(c.as_mut_ptr(), rows, columns, row, column) };
    // Of the columns of c faer holds a panel at a time, but walks through all panels for every four rows.
    let panel = if a.strides()[1] == 1 && column == 1 && rows >= MANY_ROWS { PANEL } else { columns };
    let (a, b) = (faer_view(a), faer_view(b));
    for start in (0..columns).step_by(panel) {
        let width = panel.min(columns - start);
        matmul(target.rb_mut().subcols_mut(start, width), accumulate, a, b.subcols(start, width), alpha, Par::Seq);
    }
}

/// Columns of c that faer's AVX-512 kernel for f32 holds at a time; a multiple of those of its other kernels.
#[cfg(target_arch = "x86_64")]
const PANEL: usize = 96;
/// Rows from which a call per panel is worth its start.
#[cfg(target_arch = "x86_64")]
const MANY_ROWS: usize = 128;

#[cfg(target_arch = "x86_64")]
fn strides<T>(a: &ArrayView2<T>) -> [isize; 2] {
    [a.strides()[0], a.strides()[1]]
}

#[cfg(target_arch = "x86_64")]
fn faer_view<'a, T>(a: &'a ArrayView2<'_, T>) -> faer::MatRef<'a, T> {
    let [row, column] = strides(a);
    // Sound: pointer, shape and strides are those of a view, whose entries are valid and borrowed for 'a.
    #[allow(unsafe_code)]
    unsafe {
        faer::MatRef::from_raw_parts(a.as_ptr(), a.nrows(), a.ncols(), row, column)
    }
}
