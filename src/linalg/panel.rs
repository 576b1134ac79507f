//! Products of small tiles without packing: the tiles of attention fit in the cache as they are.

use super::Real;

/// c = alpha a b (+ c), with c `m x n` contiguous, b `k x n` in rows `b_stride` apart, and a `m x k` at any strides.
///
/// Each entry adds its k terms in order, fused, and is scaled once. A general GEMM copies both operands into
/// panels first, which for the tiles of attention (inner size d or 64) costs about as much as the product.
///
/// # Panics
/// If a slice is shorter than its shape and strides say; the callers are in this crate.
pub struct PanelProduct<'a, T> {
    /// Factor of the product.
    pub alpha: T,
    /// First operand.
    pub a: &'a [T],
    /// Distance of its rows and of its columns.
    pub a_strides: (usize, usize),
    /// Second operand.
    pub b: &'a [T],
    /// Distance of its rows; its columns are adjacent.
    pub b_stride: usize,
    /// Result, row-major.
    pub c: &'a mut [T],
    /// Add to c instead of overwriting it.
    pub add: bool,
    /// (m, k, n).
    pub shape: (usize, usize, usize),
}

/// Runs the product with the machine's widest vectors.
pub fn panel_product<T: Real>(task: PanelProduct<'_, T>) {
    T::panel_product(task);
}

macro_rules! panel_kernel {
    ($name:ident, $real:ty, $lanes:ident, $splat:ident, $fma:ident, $load:ident) => {
        /// The kernel for one scalar type; called through [`panel_product`].
        pub(super) fn $name(task: PanelProduct<'_, $real>) {
            struct Run<'a>(PanelProduct<'a, $real>);
            impl pulp::WithSimd for Run<'_> {
                type Output = ();
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, simd: S) {
                    run(simd, self.0);
                }
            }

            #[inline(always)]
            fn run<S: pulp::Simd>(simd: S, mut task: PanelProduct<'_, $real>) {
                let (m, _, n) = task.shape;
                let wide = 2 * S::$lanes;
                let vectors = n / wide * wide;
                for j in (0..vectors).step_by(wide) {
                    let mut i = 0;
                    while i + ROWS <= m {
                        block::<S, ROWS>(simd, &mut task, i, j);
                        i += ROWS;
                    }
                    while i < m {
                        block::<S, 1>(simd, &mut task, i, j);
                        i += 1;
                    }
                }
                for i in 0..m {
                    for j in vectors..n {
                        single(&mut task, i, j);
                    }
                }
            }

            /// R rows by two vectors of columns, accumulated in registers.
            #[inline(always)]
            fn block<S: pulp::Simd, const R: usize>(simd: S, task: &mut PanelProduct<'_, $real>, i: usize, j: usize) {
                let ((_, k, n), (rows, columns), lanes) = (task.shape, task.a_strides, S::$lanes);
                let mut sum = [[simd.$splat(0.0); 2]; R];
                for l in 0..k {
                    let start = l * task.b_stride + j;
                    let (b, _) = S::$load(&task.b[start..start + 2 * lanes]);
                    let (b0, b1) = (b[0], b[1]);
                    let start = i * rows + l * columns;
                    for r in 0..R {
                        let a = simd.$splat(task.a[start + r * rows]);
                        sum[r][0] = simd.$fma(a, b0, sum[r][0]);
                        sum[r][1] = simd.$fma(a, b1, sum[r][1]);
                    }
                }
                let (alpha, add) = (task.alpha, task.add);
                for r in 0..R {
                    let start = (i + r) * n + j;
                    let row = &mut task.c[start..start + 2 * lanes];
                    let sums: &[$real] = pulp::bytemuck::cast_slice(&sum[r]);
                    for (c, &s) in row.iter_mut().zip(sums) {
                        *c = if add { alpha.mul_add(s, *c) } else { alpha * s };
                    }
                }
            }

            fn single(task: &mut PanelProduct<'_, $real>, i: usize, j: usize) {
                let ((_, k, n), (rows, columns)) = (task.shape, task.a_strides);
                let mut sum = 0.0;
                for l in 0..k {
                    sum = <$real>::mul_add(task.a[i * rows + l * columns], task.b[l * task.b_stride + j], sum);
                }
                let c = &mut task.c[i * n + j];
                *c = if task.add { task.alpha.mul_add(sum, *c) } else { task.alpha * sum };
            }

            pulp::Arch::new().dispatch(Run(task));
        }
    };
}

panel_kernel!(panel_f32, f32, F32_LANES, splat_f32s, mul_add_e_f32s, as_simd_f32s);
panel_kernel!(panel_f64, f64, F64_LANES, splat_f64s, mul_add_e_f64s, as_simd_f64s);

/// Rows of a register block: with two vectors of columns, 16 accumulators and the operands fit in 32 registers.
const ROWS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f64 {
        ((i * 7919 % 1013) as f64 - 506.0) / 311.0
    }

    fn check<T: Real>(tolerance: f64) {
        for (m, k, n) in [(1, 1, 1), (8, 5, 32), (9, 32, 64), (17, 3, 37), (64, 65, 33), (5, 0, 4), (3, 40, 16)] {
            for (transposed, add) in [(false, false), (true, true), (false, true)] {
                let (b_stride, alpha) = (n + 3, T::of(0.7));
                let a: Vec<T> = (0..m * k + 2).map(|i| T::of(value(i))).collect();
                let b: Vec<T> = (0..k * b_stride + n).map(|i| T::of(value(i + 5))).collect();
                let start: Vec<T> = (0..m * n).map(|i| T::of(value(i + 9))).collect();
                let a_strides = if transposed { (1, m) } else { (k, 1) };
                let mut c = start.clone();
                let shape = (m, k, n);
                panel_product(PanelProduct { alpha, a: &a, a_strides, b: &b, b_stride, c: &mut c, add, shape });
                for i in 0..m {
                    for j in 0..n {
                        let term =
                            |l: usize| a[i * a_strides.0 + l * a_strides.1].widen() * b[l * b_stride + j].widen();
                        let sum: f64 = (0..k).map(term).sum();
                        let size: f64 = (0..k).map(|l| term(l).abs()).sum::<f64>() + 2.0;
                        let want = 0.7 * sum + if add { start[i * n + j].widen() } else { 0.0 };
                        let gap = (c[i * n + j].widen() - want).abs();
                        assert!(gap <= tolerance * size, "{m} x {k} x {n} at ({i}, {j}): gap {gap}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_agree_with_loops_at_every_remainder() {
        check::<f64>(64.0 * f64::EPSILON);
        check::<f32>(64.0 * f64::from(f32::EPSILON));
    }
}
