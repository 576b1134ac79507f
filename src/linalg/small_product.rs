//! Matrix products of a few thousand multiply-adds, with the bits of [`super::gemm::multiply`]'s large ones.
//!
//! faer hands such products to another kernel, whose sums have other bits; a piece at the edge of a large product would then
//! differ from the whole.

use super::Real;
use super::elementwise::{Kernel, vectorized};
use ndarray::{ArrayView2, ArrayViewMut2};
use std::ops::Range;

/// Most multiply-adds of a product that is computed here: those for which faer leaves its own kernel.
pub(super) const SMALL: usize = 16 * 16 * 16;
/// Columns whose sums are kept in registers.
const COLUMNS: usize = 16;

/// c = alpha a b + beta c; with beta = 0, c is not read. The sums of the `ranges` of terms are added to c one after the other.
pub(super) fn small_product<T: Real, R: Iterator<Item = Range<usize>>>(
    alpha: T,
    a: &ArrayView2<T>,
    b: &ArrayView2<T>,
    beta: T,
    c: &mut ArrayViewMut2<T>,
    ranges: &impl Fn() -> R,
) {
    vectorized(Product { alpha, a, b, beta, c, ranges });
}

struct Product<'a, 'b, 'c, T, F> {
    alpha: T,
    a: &'a ArrayView2<'b, T>,
    b: &'a ArrayView2<'b, T>,
    beta: T,
    c: &'a mut ArrayViewMut2<'c, T>,
    ranges: &'a F,
}

impl<T: Real, R: Iterator<Item = Range<usize>>, F: Fn() -> R> Kernel for Product<'_, '_, '_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { alpha, a, b, beta, c, ranges } = self;
        let (m, n) = c.dim();
        for first in (0..n).step_by(COLUMNS) {
            let columns = COLUMNS.min(n - first);
            for i in 0..m {
                for range in ranges() {
                    let first_range = range.start == 0;
                    let mut sums = [T::zero(); COLUMNS];
                    for l in range {
                        let x = a[[i, l]];
                        for j in 0..columns {
                            sums[j] = x.mul_add(b[[l, first + j]], sums[j]);
                        }
                    }
                    for j in 0..columns {
                        let entry = &mut c[[i, first + j]];
                        // Two roundings, as in faer's kernel.
                        *entry = match (first_range, beta == T::zero()) {
                            (true, true) => alpha * sums[j],
                            (true, false) => alpha * sums[j] + beta * *entry,
                            (false, _) => alpha * sums[j] + *entry,
                        };
                    }
                }
            }
        }
    }
}
