//! Element-wise kernels, compiled for the widest vectors the machine has.
//!
//! Each public function picks the instruction set at run time once per call, so a call should cover
//! a whole tile. Sums and maxima run in [`LANES`] independent lanes: the result depends on the data
//! alone, not on the instruction set's width or the number of threads.

use super::Real;
use ndarray::ArrayViewMut2;

/// Independent partial results of a reduction over a row.
pub const LANES: usize = 32;

/// An element-wise loop that [`vectorized`] compiles for several instruction sets.
///
/// Implementations must mark `run`, and every function it calls in its loop, `#[inline(always)]`:
/// only what is inlined is compiled for the wide instructions. A closure would not do, since a
/// closure called from several places is not inlined (measured: 12 times slower).
pub trait Kernel {
    /// What the loop returns.
    type Output;
    /// The loop.
    fn run(self) -> Self::Output;
}

/// Runs a kernel with the widest vector instructions of the machine.
#[inline(always)]
pub fn vectorized<K: Kernel>(kernel: K) -> K::Output {
    struct Compiled<K>(K);
    impl<K: Kernel> pulp::WithSimd for Compiled<K> {
        type Output = K::Output;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _simd: S) -> K::Output {
            self.0.run()
        }
    }
    pulp::Arch::new().dispatch(Compiled(kernel))
}

/// [`vectorized`] for a closure, which the caller must mark `#[inline(always)]`.
#[inline(always)]
pub(crate) fn vectorized_closure<R>(closure: impl FnOnce() -> R) -> R {
    struct Inlined<F>(F);
    impl<R, F: FnOnce() -> R> Kernel for Inlined<F> {
        type Output = R;
        #[inline(always)]
        fn run(self) -> R {
            (self.0)()
        }
    }
    vectorized(Inlined(closure))
}

/// Largest entry of a row (negative infinity for an empty one).
#[inline(always)]
pub(crate) fn row_max<T: Real>(row: &[T]) -> T {
    let mut lanes = [T::neg_infinity(); LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = if x > *lane { x } else { *lane };
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
        width /= 2;
    }
    lanes[0]
}

/// Replaces a row by exp(row - shift) and returns its sum; `shift` is at least the largest entry.
#[inline(always)]
pub(crate) fn row_exp_sum<T: Real>(row: &mut [T], shift: T) -> T {
    let mut lanes = [T::zero(); LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            let e = (*x - shift).exp_nonpositive_lane();
            *x = e;
            *lane += e;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(chunks.into_remainder()) {
        let e = (*x - shift).exp_nonpositive_lane();
        *x = e;
        *lane += e;
    }
    lane_total(lanes)
}

/// Sum of a power of two of lanes; halving keeps it in vector registers.
#[inline(always)]
pub(crate) fn lane_total<T: Real, const N: usize>(mut lanes: [T; N]) -> T {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The entries of a row-major tile; a tile that is not contiguous is an internal error.
#[track_caller]
pub(super) fn contiguous<'a, T>(tile: &'a mut ArrayViewMut2<T>) -> &'a mut [T] {
    match tile.as_slice_mut() {
        Some(entries) => entries,
        None => panic!("element-wise kernels work on row-major tiles"),
    }
}

/// Replaces every entry of a contiguous tile by exp(entry - shift of its row).
pub fn exp_rows<T: Real>(mut tile: ArrayViewMut2<T>, shift: &[T]) {
    vectorized(ExpRows { width: tile.ncols(), tile: contiguous(&mut tile), shift });
}

struct ExpRows<'a, T> {
    width: usize,
    tile: &'a mut [T],
    shift: &'a [T],
}

impl<T: Real> Kernel for ExpRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (row, &s) in self.tile.chunks_exact_mut(self.width.max(1)).zip(self.shift) {
            for x in row {
                *x = (*x - s).exp_lane();
            }
        }
    }
}

/// Replaces every entry of a contiguous tile by exp(entry - shift of its column).
pub fn exp_columns<T: Real>(mut tile: ArrayViewMut2<T>, shift: &[T]) {
    assert_eq!(tile.ncols(), shift.len(), "one shift a column");
    vectorized(ExpColumns { tile: contiguous(&mut tile), shift });
}

struct ExpColumns<'a, T> {
    tile: &'a mut [T],
    shift: &'a [T],
}

impl<T: Real> Kernel for ExpColumns<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for row in self.tile.chunks_exact_mut(self.shift.len().max(1)) {
            for (x, &s) in row.iter_mut().zip(self.shift) {
                *x = (*x - s).exp_lane();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst32 = 0.0f64;
        let mut worst64 = 0.0f64;
        for i in 0..=2_000_000 {
            let x = -87.0 + 175.0 * f64::from(i) / 2e6;
            let x32 = x as f32;
            let want = f64::from(x32).exp();
            worst32 = worst32
                .max(((f64::from(x32.exp_lane()) - want) / want).abs() / f64::from(f32::EPSILON));
            assert!(x > 0.0 || x32.exp_nonpositive_lane().to_bits() == x32.exp_lane().to_bits());
            let x64 = -708.0 + 1417.0 * f64::from(i) / 2e6;
            worst64 = worst64.max(((x64.exp_lane() - x64.exp()) / x64.exp()).abs() / f64::EPSILON);
        }
        assert!(worst32 < 2.0, "f32: {worst32} units");
        assert!(worst64 < 2.0, "f64: {worst64} units");
    }

    #[test]
    fn exp_at_the_ends_of_its_range() {
        assert!(f32::NAN.exp_lane().is_nan() && f64::NAN.exp_lane().is_nan());
        assert_eq!(f32::NEG_INFINITY.exp_lane().to_bits(), 0.0f32.to_bits());
        assert_eq!(f64::NEG_INFINITY.exp_lane().to_bits(), 0.0f64.to_bits());
        assert!(
            f32::NAN.exp_nonpositive_lane().is_nan() && f64::NAN.exp_nonpositive_lane().is_nan()
        );
        assert_eq!(f32::NEG_INFINITY.exp_nonpositive_lane().to_bits(), 0.0f32.to_bits());
        assert_eq!(f64::NEG_INFINITY.exp_nonpositive_lane().to_bits(), 0.0f64.to_bits());
        assert_eq!((-1e4f64).exp_lane().to_bits(), 0.0f64.to_bits());
        assert!(1e3f64.exp_lane().is_infinite() && 89f32.exp_lane().is_infinite());
        assert_eq!(0f32.exp_lane().to_bits(), 1f32.to_bits());
        assert_eq!(0f64.exp_lane().to_bits(), 1f64.to_bits());
    }

    #[test]
    fn columns_and_rows_shift_alike() {
        let tile =
            ndarray::Array2::from_shape_fn((5, 37), |(i, j)| ((i * 7 + j) % 11) as f64 * 0.3 - 1.0);
        let shift: Vec<f64> = (0..37).map(|j| j as f64 * 0.1).collect();
        let (mut columns, mut rows) = (tile.clone(), tile.t().as_standard_layout().into_owned());
        exp_columns(columns.view_mut(), &shift);
        exp_rows(rows.view_mut(), &shift);
        assert_eq!(columns, rows.t());
        assert!((columns[[1, 3]] - (tile[[1, 3]] - shift[3]).exp()).abs() < 1e-15);
    }

    #[test]
    fn reductions_agree_with_naive_loops_at_every_length() {
        for n in [1usize, 2, 31, 32, 33, 63, 64, 65, 200] {
            let row: Vec<f64> = (0..n).map(|i| ((i * 37 % 19) as f64 - 9.0) * 0.37).collect();
            let want_max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(row_max(&row).to_bits(), want_max.to_bits());
            let want: f64 = row.iter().map(|x| (x - want_max).exp()).sum();
            let mut got = row.clone();
            assert!(
                (row_exp_sum(&mut got, want_max) - want).abs()
                    <= 4.0 * f64::EPSILON * want * (n as f64)
            );
        }
    }
}
