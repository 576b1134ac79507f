//! The libraries' kernels behind [`super::gemm::multiply`], and how the sum over terms is cut for
//! them.
//!
//! On x86-64 with AVX2 or AVX-512 a product goes to faer, which takes the operands where they lie
//! when it can and packs them when it must, or, where it lies well for that, to the gemm crate,
//! which packs b for the caches; elsewhere to ndarray. `cargo bench --bench products` compares them
//! with ndarray's. Both kernels add the terms of a range one after the other with one rounding
//! each, so that where a product goes changes no bit of it.

use super::Real;
use ndarray::{ArrayView2, ArrayViewMut2, Axis};
use std::ops::Range;

/// Whether this processor has kernels whose bits are known.
///
/// Elsewhere faer calls another library, which cuts the sum in places that depend on all three
/// extents, so that parts of a product would not have the bits of the whole.
pub(super) fn kernels_run() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected;
        is_x86_feature_detected!("avx512f")
            || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// How the terms of a product are summed: the ranges that are added to c one after the other.
///
/// It follows from the terms, never from the rows and columns: so parts of a product have the bits
/// of the whole.
#[derive(Debug, Clone, Copy)]
pub struct Summation {
    terms: usize,
    pieces: usize,
}

impl Summation {
    /// Of a b with at least one term.
    pub(super) fn of<T: Real>(a: &ArrayView2<T>) -> Self {
        let terms = a.ncols();
        // faer sums 512 terms at a time by itself. Where terms lie apart in memory, as in a
        // gradient dY^T X, it walks down many rows again and again, and is faster with fewer.
        let most = if a.strides()[1] == 1 { 512 } else { 192 };
        Self { terms, pieces: terms.div_ceil(most) }
    }

    /// Nearly equal ranges of terms.
    pub(super) fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.pieces)
            .map(move |i| i * self.terms / self.pieces..(i + 1) * self.terms / self.pieces)
    }

    /// Terms of the shortest range.
    pub(super) fn least_terms(self) -> usize {
        self.terms / self.pieces
    }
}

/// c = alpha a b + beta c; with beta = 0, c is not read.
///
/// Shapes: a `m x k`, b `k x n`, c `m x n`.
#[derive(Debug)]
pub struct Product<'a, T> {
    /// Factor of the product.
    pub alpha: T,
    /// Left operand.
    pub a: ArrayView2<'a, T>,
    /// Right operand.
    pub b: ArrayView2<'a, T>,
    /// Factor of what c held.
    pub beta: T,
    /// The result.
    pub c: ArrayViewMut2<'a, T>,
}

impl<T: Copy> Product<'_, T> {
    /// The first `at` rows of c, or columns, and the rest.
    pub(super) fn split(self, by_rows: bool, at: usize) -> (Self, Self) {
        let Self { alpha, a, b, beta, c } = self;
        let ((a, a_rest), (b, b_rest), (c, c_rest)) = if by_rows {
            (a.split_at(Axis(0), at), (b, b), c.split_at(Axis(0), at))
        } else {
            ((a, a), b.split_at(Axis(1), at), c.split_at(Axis(1), at))
        };
        (Self { alpha, a, b, beta, c }, Self { alpha, a: a_rest, b: b_rest, beta, c: c_rest })
    }
}

/// A scalar that the kernels multiply; [`Real`] requires it.
pub trait Multiply: Sized {
    /// The product, for at least two rows and columns of c, at least one term and more than a few
    /// thousand multiply-adds a range: part of [`multiply`](super::gemm::multiply).
    fn multiply_by_kernel(product: Product<'_, Self>, summation: Summation);
}

#[cfg(not(target_arch = "x86_64"))]
impl<T: ndarray::LinalgScalar> Multiply for T {
    fn multiply_by_kernel(product: Product<'_, T>, _: Summation) {
        let Product { alpha, a, b, beta, mut c } = product;
        ndarray::linalg::general_mat_mul(alpha, &a, &b, beta, &mut c);
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
    fn multiply_by_kernel(product: Product<'_, T>, summation: Summation) {
        let (zero, one) = (<T as num_traits::Zero>::zero(), <T as num_traits::One>::one());
        let Product { alpha, a, b, beta, mut c } = product;
        if beta != zero && beta != one {
            c.mapv_inplace(|x| beta * x);
        }
        let mut add = beta != zero;
        let packed_columns = (alpha == one).then(|| packed_columns(&a, &b, &c)).flatten();
        for range in summation.ranges() {
            let a = a.slice(ndarray::s![.., range.clone()]);
            let b = b.slice(ndarray::s![range, ..]);
            if let Some(most) = packed_columns {
                let panels =
                    b.axis_chunks_iter(Axis(1), most).zip(c.axis_chunks_iter_mut(Axis(1), most));
                panels.for_each(|(b, mut c)| add_by_gemm(&a, &b, add, &mut c));
            } else {
                add_by_faer(alpha, &a, &b, add, &mut c);
            }
            add = true;
        }
    }
}

/// Columns of c in one call of the gemm crate, where it is faster, sums in faer's order and takes
/// next to no memory from the heap: with AVX-512 and enough terms, on arrays whose rows lie in one
/// piece, with whole registers of columns. Smaller results it sums in another order, and with alpha
/// it rounds once where faer rounds twice.
#[cfg(target_arch = "x86_64")]
fn packed_columns<T>(a: &ArrayView2<T>, b: &ArrayView2<T>, c: &ArrayViewMut2<T>) -> Option<usize> {
    let (terms, columns) = b.dim();
    let register = 64 / size_of::<T>();
    let [a_row, a_column] = strides(a);
    // With more columns a call would pack a as well, into a block of the heap; the crate's bounds
    // are 128 blocks of its kernel (four registers wide) where the terms of a row of a lie
    // together, and 2 where they lie apart, as in dY^T X.
    let (least_terms, most_columns) = match (a_row, a_column) {
        (_, 1) => (128, 64 * 4 * register),
        (1, _) => (64, 2 * 4 * register),
        _ => return None,
    };
    let last = (columns - 1) % most_columns + 1;
    let sizes_fit =
        terms >= least_terms && columns.is_multiple_of(register) && c.nrows() * last > 16 * 16;
    let rows_lie = b.strides()[1] == 1 && c.strides()[1] == 1;
    (rows_lie && sizes_fit && std::arch::is_x86_feature_detected!("avx512f"))
        .then_some(most_columns)
}

/// c = a b, or c + a b, by the gemm crate.
#[cfg(target_arch = "x86_64")]
fn add_by_gemm<T: ndarray::LinalgScalar>(
    a: &ArrayView2<T>,
    b: &ArrayView2<T>,
    add: bool,
    c: &mut ArrayViewMut2<T>,
) {
    let one = T::one();
    let (m, k, n) = (a.nrows(), a.ncols(), b.ncols());
    assert!(b.nrows() == k && c.dim() == (m, n), "shapes of a product");
    let ([a_row, a_column], [b_row, b_column]) = (strides(a), strides(b));
    let [c_row, c_column] = strides(&c.view());
    // Sound: pointers, shapes and strides are those of three views that agree (asserted above),
    // whose entries are valid, c's distinct and borrowed alone; no library's threads are started.
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
fn add_by_faer<T>(
    alpha: T,
    a: &ArrayView2<T>,
    b: &ArrayView2<T>,
    add: bool,
    c: &mut ArrayViewMut2<T>,
) where
    T: ndarray::LinalgScalar + faer::traits::ComplexField + faer::traits::Conjugate<Canonical = T>,
{
    use faer::{Accum, MatMut, Par, linalg::matmul::matmul, reborrow::ReborrowMut};
    let accumulate = if add { Accum::Add } else { Accum::Replace };
    let ((rows, columns), [row, column]) = (c.dim(), strides(&c.view()));
    // Sound: pointer, shape and strides are those of a mutable view, whose entries are valid,
    // distinct and borrowed for longer than this call.
    #[allow(unsafe_code)]
    let mut target =
        unsafe { MatMut::from_raw_parts_mut(c.as_mut_ptr(), rows, columns, row, column) };
    // Of the columns of c faer holds a panel at a time, but walks through all panels for every four
    // rows.
    let panel =
        if a.strides()[1] == 1 && column == 1 && rows >= MANY_ROWS { PANEL } else { columns };
    let (a, b) = (faer_view(a), faer_view(b));
    for start in (0..columns).step_by(panel) {
        let width = panel.min(columns - start);
        matmul(
            target.rb_mut().subcols_mut(start, width),
            accumulate,
            a,
            b.subcols(start, width),
            alpha,
            Par::Seq,
        );
    }
}

/// Columns of c that faer's AVX-512 kernel for f32 holds at a time; a multiple of those of its
/// other kernels.
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
    // Sound: pointer, shape and strides are those of a view, whose entries are valid and borrowed
    // for 'a.
    #[allow(unsafe_code)]
    unsafe {
        faer::MatRef::from_raw_parts(a.as_ptr(), a.nrows(), a.ncols(), row, column)
    }
}
