//! The scalar types of the crate: `f32` and `f64`.

use ndarray::NdFloat;
use num_traits::FromPrimitive;
use std::iter::Sum;

/// A floating-point scalar. Every routine that is not a reference is generic over it.
///
/// ```
/// use peft_limits::linalg::Real;
/// fn exact_eighth<T: Real>() -> bool { (T::of(0.125)).widen().to_bits() == 0.125f64.to_bits() }
/// assert!(exact_eighth::<f32>() && exact_eighth::<f64>());
/// ```
pub trait Real:
    NdFloat + FromPrimitive + Sum + Default + super::lanes::Lanes + super::gemm::Multiply
{
    /// Name used in files, tables and command lines.
    const NAME: &'static str;

    /// Nearest value of this type.
    fn of(value: f64) -> Self;

    /// Exact value in double precision.
    fn widen(self) -> f64;

    /// Exponential written so that a loop over a slice becomes vector instructions.
    ///
    /// Below -87 (f32) or -708 (f64) the result is 0, above 88 or 709 it is infinity; NaN stays
    /// NaN. Between, the relative error is below 2 units in the last place (tested against the
    /// standard library on a dense grid).
    fn exp_lane(self) -> Self;

    /// [`Real::exp_lane`] for arguments that are at most a rounding error above 0, where it needs
    /// fewer instructions (the scores of a softmax less their maximum or log-sum-exp).
    fn exp_nonpositive_lane(self) -> Self;
}

/// Coefficients 1/n! of the Taylor series of exp, used on |r| <= ln 2 / 2.
///
/// Degree 13 leaves 0.3466^14 / 14! = 4e-18 of f64's 1.1e-16.
const INVERSE_FACTORIAL: [f64; 14] = {
    let mut table = [1.0; 14];
    let mut n = 1;
    while n < 14 {
        table[n] = table[n - 1] / n as f64;
        n += 1;
    }
    table
};

impl Real for f32 {
    const NAME: &'static str = "f32";

    fn of(value: f64) -> Self {
        value as f32
    }

    fn widen(self) -> f64 {
        self as f64
    }

    #[inline(always)]
    fn exp_lane(self) -> Self {
        // Neither bound swallows a NaN: `a > b ? a : b` is b when either is NaN, as in the vector
        // instruction.
        let x = if LOWEST_F32 > self { LOWEST_F32 } else { self };
        let x = if HIGHEST_F32 < x { HIGHEST_F32 } else { x };
        let y = exp_inside_f32(x);
        let y = if self < LOWEST_F32 { 0.0 } else { y };
        if self > HIGHEST_F32 { f32::INFINITY } else { y }
    }

    #[inline(always)]
    fn exp_nonpositive_lane(self) -> Self {
        let y = exp_inside_f32(if LOWEST_F32 > self { LOWEST_F32 } else { self });
        if self < LOWEST_F32 { 0.0 } else { y }
    }
}

const LOWEST_F32: f32 = -87.0;
const HIGHEST_F32: f32 = 88.0;

/// e^x for |x| <= 88; NaN stays NaN.
#[inline(always)]
fn exp_inside_f32(x: f32) -> f32 {
    // x = n ln 2 + r. Adding 1.5 * 2^23, whose unit in the last place is 1, rounds to the integer
    // n; the further 127 leaves n + 127, the exponent field of 2^n, in the low bits.
    const SHIFT: f32 = 12_582_912.0 + 127.0;
    // ln 2 split so that n * LN2_HIGH is exact for |n| < 2^9.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = (-n).mul_add(LN2_LOW, (-n).mul_add(LN2_HIGH, x));
    // 1 + r + r^2 q(r), with q of degree 4 through the Chebyshev nodes of |r| <= ln 2 / 2 for
    // (e^r - 1 - r) / r^2: relative error 1.1e-8 of f32's 6e-8, one multiply-add less than Taylor's
    // series.
    let mut p = 1.392_621_3e-3;
    p = r.mul_add(p, 8.363_203e-3);
    p = r.mul_add(p, 4.166_655_6e-2);
    p = r.mul_add(p, 0.166_665_76);
    p = r.mul_add(p, 0.5);
    p = r.mul_add(p, 1.0);
    p = r.mul_add(p, 1.0);
    p * f32::from_bits(shifted.to_bits().wrapping_shl(23))
}

impl Real for f64 {
    const NAME: &'static str = "f64";

    fn of(value: f64) -> Self {
        value
    }

    fn widen(self) -> f64 {
        self
    }

    #[inline(always)]
    fn exp_lane(self) -> Self {
        let x = if LOWEST_F64 > self { LOWEST_F64 } else { self };
        let x = if HIGHEST_F64 < x { HIGHEST_F64 } else { x };
        let y = exp_inside_f64(x);
        let y = if self < LOWEST_F64 { 0.0 } else { y };
        if self > HIGHEST_F64 { f64::INFINITY } else { y }
    }

    #[inline(always)]
    fn exp_nonpositive_lane(self) -> Self {
        let y = exp_inside_f64(if LOWEST_F64 > self { LOWEST_F64 } else { self });
        if self < LOWEST_F64 { 0.0 } else { y }
    }
}

const LOWEST_F64: f64 = -708.0;
const HIGHEST_F64: f64 = 709.0;

/// e^x for |x| <= 709, as [`exp_inside_f32`]; the Taylor series to degree 13.
#[inline(always)]
fn exp_inside_f64(x: f64) -> f64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0 + 1023.0; // 1.5 * 2^52 + bias
    const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let shifted = x.mul_add(std::f64::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = (-n).mul_add(LN2_LOW, (-n).mul_add(LN2_HIGH, x));
    let mut p = INVERSE_FACTORIAL[13];
    let mut i = 12;
    while i > 0 {
        p = p.mul_add(r, INVERSE_FACTORIAL[i]);
        i -= 1;
    }
    p = p.mul_add(r, 1.0);
    p * f64::from_bits(shifted.to_bits().wrapping_shl(52))
}

/// Converts between the scalar types through double precision, elementwise.
pub fn cast<T: Real, U: Real>(a: ndarray::ArrayView2<T>) -> ndarray::Array2<U> {
    a.mapv(|x| U::of(x.widen()))
}
