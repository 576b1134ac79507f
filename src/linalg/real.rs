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
pub trait Real: NdFloat + FromPrimitive + Sum + Default {
    /// Name used in files, tables and command lines.
    const NAME: &'static str;

    /// Nearest value of this type.
    fn of(value: f64) -> Self;

    /// Exact value in double precision.
    fn widen(self) -> f64;

    /// Exponential written so that a loop over a slice becomes vector instructions.
    ///
    /// Below -87 (f32) or -708 (f64) the result is 0, above 88 or 709 it is infinity; NaN stays NaN.
    /// Between, the relative error is below 2 units in the last place (tested against the standard
    /// library on a dense grid).
    fn exp_lane(self) -> Self;
}

/// Coefficients 1/n! of the Taylor series of exp, used on |r| <= ln 2 / 2.
///
/// Remainders at |r| = 0.3466: degree 7 leaves 0.3466^8 / 8! = 5e-9 of f32's 6e-8; degree 13
/// leaves 0.3466^14 / 14! = 4e-18 of f64's 1.1e-16.
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
        // x = n ln 2 + r with n found by adding 1.5 * 2^23, whose unit in the last place is 1.
        const SHIFT: f32 = 12_582_912.0;
        // ln 2 split so that n * LN2_HIGH is exact for |n| < 2^9.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let x = if self < -87.0 { -87.0 } else { self };
        let x = if x > 88.0 { 88.0 } else { x };
        let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
        let n = shifted - SHIFT;
        let r = (-n).mul_add(LN2_LOW, (-n).mul_add(LN2_HIGH, x));
        let mut p = INVERSE_FACTORIAL[7] as f32;
        p = p.mul_add(r, INVERSE_FACTORIAL[6] as f32);
        p = p.mul_add(r, INVERSE_FACTORIAL[5] as f32);
        p = p.mul_add(r, INVERSE_FACTORIAL[4] as f32);
        p = p.mul_add(r, INVERSE_FACTORIAL[3] as f32);
        p = p.mul_add(r, 0.5);
        p = p.mul_add(r, 1.0);
        p = p.mul_add(r, 1.0);
        // The low bits of `shifted` hold n: move them to the exponent field of 2^n.
        let power = f32::from_bits(shifted.to_bits().wrapping_add(127).wrapping_shl(23));
        let y = p * power;
        let y = if self < -87.0 { 0.0 } else { y };
        let y = if self > 88.0 { f32::INFINITY } else { y };
        if self.is_nan() { self } else { y }
    }
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
        const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
        const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
        const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
        let x = if self < -708.0 { -708.0 } else { self };
        let x = if x > 709.0 { 709.0 } else { x };
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
        let power = f64::from_bits(shifted.to_bits().wrapping_add(1023).wrapping_shl(52));
        let y = p * power;
        let y = if self < -708.0 { 0.0 } else { y };
        let y = if self > 709.0 { f64::INFINITY } else { y };
        if self.is_nan() { self } else { y }
    }
}

/// Converts between the scalar types through double precision, elementwise.
pub fn cast<T: Real, U: Real>(a: ndarray::ArrayView2<T>) -> ndarray::Array2<U> {
    a.mapv(|x| U::of(x.widen()))
}
