//! Matrix products of a few thousand multiply-adds, with the bits of [`super::gemm::multiply`]'s
//! large ones.
//!
//! faer hands such products to another kernel, whose sums have other bits; a piece at the edge of a
//! large product would then differ from the whole.

use super::Real;
use super::elementwise::{Kernel, vectorized};
use super::product_kernels::Product;
use std::ops::Range;

/// Most multiply-adds of a product that is computed here: those for which faer leaves its own
/// kernel.
pub(super) const SMALL: usize = 16 * 16 * 16;

/// The product; the sums of the `ranges` of terms are added to c one after the other.
pub(super) fn small_product<T: Real, R: Iterator<Item = Range<usize>>>(
    product: Product<'_, T>,
    ranges: &impl Fn() -> R,
) {
    let Product { alpha, a, b, beta, c } = product;
    // The longer side of c along registers, c^T = b^T a^T, where a lies in memory for it or the
    // other fills none.
    let product = if c.ncols() < c.nrows() && (a.strides()[0] == 1 || c.ncols() < 4) {
        Product { alpha, a: b.reversed_axes(), b: a.reversed_axes(), beta, c: c.reversed_axes() }
    } else {
        Product { alpha, a, b, beta, c }
    };
    vectorized(Small { product, ranges });
}

struct Small<'a, 'f, T, F> {
    product: Product<'a, T>,
    ranges: &'f F,
}

impl<T: Real, R: Iterator<Item = Range<usize>>, F: Fn() -> R> Kernel for Small<'_, '_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let columns = self.product.c.ncols();
        let mut first = 0;
        // Sums of whole registers where columns are left for them; how many are summed together
        // changes no bit.
        while first < columns {
            first += match columns - first {
                16.. => self.columns::<16>(first),
                8.. => self.columns::<8>(first),
                4.. => self.columns::<4>(first),
                _ => self.columns::<1>(first),
            };
        }
    }
}

impl<T: Real, R: Iterator<Item = Range<usize>>, F: Fn() -> R> Small<'_, '_, T, F> {
    /// W columns of c, from `first` on; returns W.
    #[inline(always)]
    fn columns<const W: usize>(&mut self, first: usize) -> usize {
        let Self { product: Product { alpha, a, b, beta, c }, ranges } = self;
        let (alpha, beta) = (*alpha, *beta);
        for (i, mut out) in c.rows_mut().into_iter().enumerate() {
            let a = a.row(i);
            for range in ranges() {
                let first_range = range.start == 0;
                let mut sums = [T::zero(); W];
                for l in range {
                    let (x, row) = (a[l], b.row(l));
                    // A whole row in memory is read by registers.
                    match row.to_slice().and_then(|row| row[first..].first_chunk::<W>()) {
                        Some(row) => {
                            for (sum, &y) in sums.iter_mut().zip(row) {
                                *sum = x.mul_add(y, *sum);
                            }
                        }
                        None => {
                            for (j, sum) in sums.iter_mut().enumerate() {
                                *sum = x.mul_add(row[first + j], *sum);
                            }
                        }
                    }
                }
                for (entry, sum) in out.iter_mut().skip(first).zip(sums) {
                    // Two roundings, as in faer's kernel.
                    *entry = match (first_range, beta == T::zero()) {
                        (true, true) => alpha * sum,
                        (true, false) => alpha * sum + beta * *entry,
                        (false, _) => alpha * sum + *entry,
                    };
                }
            }
        }
        W
    }
}
