//! Matrix products: the one place that calls a GEMM kernel, single-threaded and counted.

use super::Real;
use super::product_kernels::{Summation, kernels_run};
use super::small_product::{SMALL, small_product};
use crate::cost::Cost;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, linalg::general_mat_mul};

pub use super::product_kernels::{Multiply, Product};

/// c = alpha a b + beta c on the calling thread; with beta = 0, c is not read.
///
/// An entry of c has the same bits whichever rows and columns are computed with it, so a product
/// may be cut among threads. Where ndarray multiplies, that holds for pieces of at least two
/// columns.
///
/// Shapes: a `m x k`, b `k x n`, c `m x n`. Disagreeing shapes are an internal error and panic.
pub fn multiply<T: Real>(
    alpha: T,
    a: &ArrayView2<T>,
    b: &ArrayView2<T>,
    beta: T,
    c: &mut ArrayViewMut2<T>,
) {
    let shapes_agree = b.nrows() == a.ncols() && c.dim() == (a.nrows(), b.ncols());
    assert!(shapes_agree, "shapes of a product");
    multiply_product(Product { alpha, a: a.view(), b: b.view(), beta, c: c.view_mut() });
}

/// As [`multiply`].
fn multiply_product<T: Real>(product: Product<'_, T>) {
    let (m, n) = product.c.dim();
    if product.a.ncols() == 0 || !kernels_run() {
        let Product { alpha, a, b, beta, mut c } = product;
        general_mat_mul(alpha, &a, &b, beta, &mut c);
        return;
    }
    let summation = Summation::of(&product.a);
    if m * n * summation.least_terms() <= SMALL {
        small_product(product, &|| summation.ranges());
    } else if m > 1 && n > 1 {
        T::multiply_by_kernel(product, summation);
    } else {
        multiply_widened(product, summation);
    }
}

/// A single row or column of c, computed twice: the kernels sum a matrix-vector product in an order
/// that depends on where the numbers lie in memory.
fn multiply_widened<T: Real>(product: Product<'_, T>, summation: Summation) {
    let Product { alpha, a, b, beta, mut c } = product;
    let (m, k, n) = (a.nrows(), a.ncols(), b.ncols());
    let (rows, columns) = (m.max(2), n.max(2));
    let repeated =
        (a.broadcast((rows, k)), b.broadcast((k, columns)), c.broadcast((rows, columns)));
    let (Some(a), Some(b), Some(start)) = repeated else {
        panic!("a single row or column is repeated")
    };
    let mut wide =
        if beta == T::zero() { Array2::zeros((rows, columns)) } else { start.to_owned() };
    T::multiply_by_kernel(Product { alpha, a, b, beta, c: wide.view_mut() }, summation);
    c.assign(&wide.slice(ndarray::s![..m, ..n]));
}

/// c = a b + beta c, with the multiply-adds added to `cost`.
///
/// Shapes: a `m x k`, b `k x n`, c `m x n`. Disagreeing shapes are an internal error and panic.
pub fn product_into<T: Real>(
    a: ArrayView2<T>,
    b: ArrayView2<T>,
    beta: T,
    c: &mut ArrayViewMut2<T>,
    cost: &mut Cost,
) {
    cost.product(a.nrows(), a.ncols(), b.ncols());
    multiply(T::one(), &a, &b, beta, c);
}

/// a b as a fresh row-major array.
pub fn product<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>, cost: &mut Cost) -> Array2<T> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    product_into(a, b, T::zero(), &mut c.view_mut(), cost);
    c
}

/// a b by row tiles on rayon's threads; the result does not depend on their number.
pub fn parallel_product<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>, cost: &mut Cost) -> Array2<T> {
    use ndarray::{Axis, parallel::prelude::*};
    cost.product(a.nrows(), a.ncols(), b.ncols());
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    c.axis_chunks_iter_mut(Axis(0), ROW_TILE)
        .into_par_iter()
        .zip(a.axis_chunks_iter(Axis(0), ROW_TILE))
        .for_each(|(mut c, a)| multiply(T::one(), &a, &b, T::zero(), &mut c));
    c
}

/// a^T b, with the sum over rows taken in fixed groups added in order, so that the result does not
/// depend on the number of threads.
pub fn parallel_transposed_product<T: Real>(
    a: ArrayView2<T>,
    b: ArrayView2<T>,
    cost: &mut Cost,
) -> Array2<T> {
    use ndarray::{Axis, parallel::prelude::*};
    cost.product(a.ncols(), a.nrows(), b.ncols());
    let shape = (a.ncols(), b.ncols());
    let group = ROW_TILE.max(a.nrows().div_ceil(REDUCTION_GROUPS));
    let parts: Vec<Array2<T>> = a
        .axis_chunks_iter(Axis(0), group)
        .into_par_iter()
        .zip(b.axis_chunks_iter(Axis(0), group))
        .map(|(a, b)| {
            let mut c = Array2::zeros(shape);
            multiply(T::one(), &a.t(), &b, T::zero(), &mut c.view_mut());
            c
        })
        .collect();
    let mut parts = parts.into_iter();
    let mut sum = parts.next().unwrap_or_else(|| Array2::zeros(shape));
    parts.for_each(|part| sum += &part);
    sum
}

/// c = alpha a b + beta c on rayon's threads.
///
/// The longer side of c is cut into tasks, never the sum: every entry adds its terms in the same
/// order whatever the number of threads, so the result is bit-identical. Transposed views are
/// passed as they are (the kernel packs its operands), so no transposed copy is made.
///
/// Shapes: a `m x k`, b `k x n`, c `m x n`. Disagreeing shapes are an internal error and panic.
pub fn parallel_product_into<T: Real>(
    alpha: T,
    a: ArrayView2<T>,
    b: ArrayView2<T>,
    beta: T,
    c: &mut ArrayViewMut2<T>,
    cost: &mut Cost,
) {
    let (m, k, n) = (a.nrows(), a.ncols(), b.ncols());
    assert!(b.nrows() == k && c.dim() == (m, n), "shapes of a product");
    cost.product(m, k, n);
    let threads = rayon::current_num_threads();
    let threads = if threads == 1 || m * k * n < SERIAL_MULTIPLY_ADDS { 0 } else { threads };
    let by_rows = m >= n || m > 2 * TASK_TILE;
    multiply_in_shares(Product { alpha, a, b, beta, c: c.view_mut() }, by_rows, threads);
}

/// The product in equal shares for that many threads; 0 is one task.
///
/// The last quarter of a large share is a task of its own, for whoever is free first: a thread that
/// other programs slow down then keeps the rest waiting for less (up to 3% of X W^T and dY W). Not
/// so in dY^T X, where each task packs X again.
fn multiply_in_shares<T: Real>(product: Product<'_, T>, by_rows: bool, threads: usize) {
    let extent = if by_rows { product.c.nrows() } else { product.c.ncols() };
    let terms_lie_together = product.a.strides()[1] == 1;
    let (at, shares) = match threads {
        2.. if extent > TASK_TILE => {
            ((extent * (threads / 2)).div_ceil(threads), [threads / 2, threads.div_ceil(2)])
        }
        1.. if terms_lie_together && extent >= 4 * TASK_TILE => (extent - extent / 4, [0, 0]),
        _ => return multiply_product(product),
    };
    let (first, second) = product.split(by_rows, at.next_multiple_of(16).max(TASK_TILE));
    rayon::join(
        || multiply_in_shares(first, by_rows, shares[0]),
        || multiply_in_shares(second, by_rows, shares[1]),
    );
}

/// Products below this many multiply-adds run on the calling thread.
const SERIAL_MULTIPLY_ADDS: usize = 1 << 17;
/// Least extent of one task of [`parallel_product_into`].
const TASK_TILE: usize = 128;
/// Rows of one task of [`parallel_product`].
const ROW_TILE: usize = 256;
/// Fixed number of partial sums of [`parallel_transposed_product`].
const REDUCTION_GROUPS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    /// Bit-identical for one, three and four threads, on shapes that take each way of cutting.
    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let value = |i: usize, j: usize| ((i * 131 + j * 37) as f32 * 0.7131).sin();
        for (m, k, n) in [
            (401, 300, 37),
            (9, 513, 407),
            (300, 45, 300),
            (5, 6, 7),
            (2100, 40, 24),
            (40, 24, 1700),
        ] {
            let a = Array2::from_shape_fn((k, m), |(i, j)| value(i, j));
            let rows = a.t().as_standard_layout().into_owned();
            let b = Array2::from_shape_fn((k, n), |(i, j)| value(j, i + 3));
            for a in [a.t(), rows.view()] {
                let run = |threads: usize| {
                    let pool =
                        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let mut c = Array2::from_shape_fn((m, n), |(i, j)| value(i + 1, j));
                    let mut cost = Cost::default();
                    pool.install(|| {
                        parallel_product_into(0.5, a, b.view(), 1.0, &mut c.view_mut(), &mut cost)
                    });
                    assert_eq!(cost.multiply_adds, (m * k * n) as u64);
                    c
                };
                let one = run(1);
                for several in [run(3), run(4)] {
                    let same = one.iter().zip(&several).all(|(x, y)| x.to_bits() == y.to_bits());
                    assert!(same, "{m} x {k} x {n}");
                }
                let want: f32 =
                    value(1, 0) + (0..k).map(|l| 0.5 * a[[0, l]] * b[[l, 0]]).sum::<f32>();
                assert!((one[[0, 0]] - want).abs() < 1e-4, "{} against {want}", one[[0, 0]]);
            }
        }
    }

    /// Whole, in pieces down to single rows and columns, and elsewhere in memory.
    fn pieces_have_the_bits_of_the_whole<T: Real>() {
        let value = |i: usize, j: usize| T::of(((i * 131 + j * 37) as f64 * 0.7131).sin());
        for (m, k, n, transposed) in [
            (49, 1100, 33, false),
            (70, 257, 144, false),
            (130, 700, 70, true),
            (130, 700, 272, true),
            (49, 64, 32, true),
            (150, 150, 112, false),
            (400, 140, 80, false),
            (300, 128, 12, true),
            (97, 513, 5, true),
            (5, 7, 130, false),
            (1, 300, 4, true),
            (6, 300, 1, false),
            (1, 40, 1, true),
        ] {
            let stored =
                Array2::from_shape_fn(if transposed { (k, m) } else { (m, k) }, |(i, j)| {
                    value(i, j)
                });
            let a = if transposed { stored.t() } else { stored.view() };
            let b = Array2::from_shape_fn((k, n), |(i, j)| value(j, i + 3));
            // The same numbers with rows or columns in one piece.
            let across = b.t().as_standard_layout().into_owned().reversed_axes();
            let start = Array2::from_shape_fn((m, n), |(i, j)| value(i + 1, j));
            for (b, alpha, beta) in [
                (&b, 0.7, 0.0),
                (&b, 0.7, 1.0),
                (&b, 0.7, 0.3),
                (&b, 1.0, 0.0),
                (&b, 1.0, 1.0),
                (&b, 1.0, 0.3),
                (&across, 0.7, 1.0),
                (&across, 1.0, 0.0),
                (&across, 1.0, 1.0),
            ] {
                let [alpha, beta] = [alpha, beta].map(T::of);
                let mut whole = start.clone();
                multiply(alpha, &a, &b.view(), beta, &mut whole.view_mut());
                for size in [1, 2, 7, 48] {
                    let mut pieces = Array2::zeros((m + 1, n + 3));
                    let mut pieces = pieces.slice_mut(ndarray::s![1.., 2..n + 2]);
                    pieces.assign(&start);
                    for (mut c, a) in pieces
                        .axis_chunks_iter_mut(ndarray::Axis(0), size)
                        .zip(a.axis_chunks_iter(ndarray::Axis(0), size))
                    {
                        let columns = c.axis_chunks_iter_mut(ndarray::Axis(1), size);
                        for (mut c, b) in columns.zip(b.axis_chunks_iter(ndarray::Axis(1), size)) {
                            multiply(alpha, &a, &b, beta, &mut c);
                        }
                    }
                    let same = pieces
                        .iter()
                        .zip(&whole)
                        .all(|(x, y)| x.widen().to_bits() == y.widen().to_bits());
                    assert!(same, "{} {m} x {k} x {n} in pieces of {size}", T::NAME);
                }
                let want =
                    (0..k).map(|l| (alpha * a[[m - 1, l]] * b[[l, n - 1]]).widen()).sum::<f64>()
                        + (beta * start[[m - 1, n - 1]]).widen();
                assert!((whole[[m - 1, n - 1]].widen() - want).abs() < 1e-4, "{want}");
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_product_in_pieces_has_the_bits_of_the_whole() {
        // Elsewhere, and without AVX2, single columns go through another routine of ndarray.
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            pieces_have_the_bits_of_the_whole::<f32>();
            pieces_have_the_bits_of_the_whole::<f64>();
        }
    }

    #[test]
    fn a_sum_of_no_terms_scales_what_is_there() {
        let mut c = Array2::<f64>::ones((2, 3));
        multiply(
            1.0,
            &Array2::zeros((2, 0)).view(),
            &Array2::zeros((0, 3)).view(),
            0.5,
            &mut c.view_mut(),
        );
        assert!(c.iter().all(|x| x.to_bits() == 0.5f64.to_bits()));
    }

    #[test]
    fn parallel_products_agree_with_naive_loops_and_are_counted() {
        let a = Array2::from_shape_fn((701, 7), |(i, j)| ((i * 13 + j * 5) % 11) as f64 - 5.0);
        let b = Array2::from_shape_fn((7, 3), |(i, j)| ((i * 3 + j) % 5) as f64 - 2.0);
        let c = Array2::from_shape_fn((701, 3), |(i, j)| ((i + 2 * j) % 7) as f64);
        let mut cost = Cost::default();
        let got = parallel_product(a.view(), b.view(), &mut cost);
        let reduced = parallel_transposed_product(a.view(), c.view(), &mut cost);
        assert_eq!(cost.multiply_adds, 2 * 701 * 7 * 3);
        // Small integers: every partial sum is exact, so equality is exact too.
        for i in 0..701 {
            for j in 0..3 {
                let want: f64 = (0..7).map(|k| a[[i, k]] * b[[k, j]]).sum();
                assert_eq!(got[[i, j]].to_bits(), want.to_bits());
            }
        }
        for i in 0..7 {
            for j in 0..3 {
                let want: f64 = (0..701).map(|k| a[[k, i]] * c[[k, j]]).sum();
                assert_eq!(reduced[[i, j]].to_bits(), want.to_bits());
            }
        }
    }
}
