//! Matrix products: the one place that calls the GEMM kernel, single-threaded and counted.
//!
//! ndarray's kernel is used on every path. On the development machine it runs at 171 GFLOP/s (f32) and
//! 76 GFLOP/s (f64) per thread on AVX-512, above the `gemm` crate's 109 and 53 in the same run.

use super::Real;
use crate::cost::Cost;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, linalg::general_mat_mul};

/// c = a b + beta c, with the multiply-adds added to `cost`.
///
/// Shapes: a `m x k`, b `k x n`, c `m x n`. Disagreeing shapes are an internal error and panic.
pub fn product_into<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>, beta: T, c: &mut ArrayViewMut2<T>, cost: &mut Cost) {
    cost.product(a.nrows(), a.ncols(), b.ncols());
    general_mat_mul(T::one(), &a, &b, beta, c);
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
        .for_each(|(mut c, a)| general_mat_mul(T::one(), &a, &b, T::zero(), &mut c));
    c
}

/// a^T b, with the sum over rows taken in fixed groups added in order, so that the result does not depend
/// on the number of threads.
pub fn parallel_transposed_product<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>, cost: &mut Cost) -> Array2<T> {
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
            general_mat_mul(T::one(), &a.t(), &b, T::zero(), &mut c);
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
/// The longer side of c is cut into tasks, never the sum: every entry adds its terms in the same order
/// whatever the number of threads, so the result is bit-identical. Transposed views are passed as they are
/// (the kernel packs its operands), so no transposed copy is made.
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
    use ndarray::{Axis, parallel::prelude::*};
    let (m, k, n) = (a.nrows(), a.ncols(), b.ncols());
    cost.product(m, k, n);
    let threads = rayon::current_num_threads();
    if threads == 1 || m * k * n < SERIAL_MULTIPLY_ADDS {
        general_mat_mul(alpha, &a, &b, beta, c);
        return;
    }
    let tile = rows_per_task;
    if m >= n || m > 2 * TASK_TILE {
        c.axis_chunks_iter_mut(Axis(0), tile(m))
            .into_par_iter()
            .zip(a.axis_chunks_iter(Axis(0), tile(m)))
            .for_each(|(mut c, a)| general_mat_mul(alpha, &a, &b, beta, &mut c));
    } else {
        c.axis_chunks_iter_mut(Axis(1), tile(n))
            .into_par_iter()
            .zip(b.axis_chunks_iter(Axis(1), tile(n)))
            .for_each(|(mut c, b)| general_mat_mul(alpha, &a, &b, beta, &mut c));
    }
}

/// Rows of one task of a product with `rows` rows on rayon's threads.
///
/// Several tasks per thread even out other load; each packs the shared operand again, so not too many.
pub fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(16).max(TASK_TILE)
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

    /// Bit-identical for one and for three threads, on shapes that take each way of cutting.
    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let value = |i: usize, j: usize| ((i * 131 + j * 37) as f32 * 0.7131).sin();
        for (m, k, n) in [(401, 300, 37), (9, 513, 407), (300, 45, 300), (5, 6, 7)] {
            let a = Array2::from_shape_fn((k, m), |(i, j)| value(i, j));
            let b = Array2::from_shape_fn((k, n), |(i, j)| value(j, i + 3));
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut c = Array2::from_shape_fn((m, n), |(i, j)| value(i + 1, j));
                let mut cost = Cost::default();
                pool.install(|| parallel_product_into(0.5, a.t(), b.view(), 1.0, &mut c.view_mut(), &mut cost));
                assert_eq!(cost.multiply_adds, (m * k * n) as u64);
                c
            };
            let (one, three) = (run(1), run(3));
            assert!(one.iter().zip(&three).all(|(x, y)| x.to_bits() == y.to_bits()), "{m} x {k} x {n}");
            let want: f32 = value(1, 0) + (0..k).map(|l| 0.5 * a[[l, 0]] * b[[l, 0]]).sum::<f32>();
            assert!((one[[0, 0]] - want).abs() < 1e-4, "{} against {want}", one[[0, 0]]);
        }
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
