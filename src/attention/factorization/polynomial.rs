//! Polynomials that approximate exp on [-b, b]: coefficients and error bounds.

use crate::error::{Error, Result};

/// p(s) = sum_n c_n (s / scale)^n, c_n the coefficients.
///
/// The variable is scaled so that coefficients stay within double precision for any b.
#[derive(Debug, Clone, PartialEq)]
pub struct Polynomial {
    /// Coefficients of the powers of s / scale, lowest first.
    pub coefficients: Vec<f64>,
    /// Scale of the variable.
    pub scale: f64,
}

impl Polynomial {
    /// p(s) by Horner's rule.
    pub fn evaluate(&self, s: f64) -> f64 {
        let x = s / self.scale;
        self.coefficients.iter().rev().fold(0.0, |acc, &c| acc * x + c)
    }

    /// Degree.
    pub fn degree(&self) -> usize {
        self.coefficients.len().saturating_sub(1)
    }

    /// Bound on max |p(s) - exp(s)| over [-b, b], rigorous up to rounding.
    ///
    /// A grid with spacing h gives the maximum at its points; between them the error moves by at
    /// most h/2 times the bound of |p'| + exp' on the interval.
    pub fn uniform_error(&self, b: f64) -> f64 {
        const POINTS: u32 = 20_000;
        let h = 2.0 * b / f64::from(POINTS);
        let on_grid = (0..=POINTS).map(|i| {
            let s = -b + h * f64::from(i);
            (self.evaluate(s) - s.exp()).abs()
        });
        let largest = on_grid.fold(0.0f64, f64::max);
        let x = b / self.scale;
        let slope: f64 = self
            .coefficients
            .iter()
            .enumerate()
            .skip(1)
            .map(|(n, c)| c.abs() * n as f64 * x.powi(n as i32 - 1) / self.scale)
            .sum::<f64>()
            + b.exp();
        largest + 0.5 * h * slope
    }
}

/// The Taylor polynomial of exp at 0.
pub fn taylor(degree: usize) -> Polynomial {
    let mut coefficients = vec![1.0; degree + 1];
    for n in 1..=degree {
        coefficients[n] = coefficients[n - 1] / n as f64;
    }
    Polynomial { coefficients, scale: 1.0 }
}

/// Remainder of the Taylor polynomial on [-b, b]: sum_{n > g} b^n / n!, attained at s = b.
///
/// ```
/// use peft_limits::attention::factorization::polynomial::{taylor, taylor_error};
/// let at_b = 2f64.exp() - taylor(3).evaluate(2.0);
/// assert!((taylor_error(3, 2.0) - at_b).abs() < 1e-14);
/// ```
pub fn taylor_error(degree: usize, b: f64) -> f64 {
    let mut term = 1.0;
    let mut sum = 0.0;
    for n in 1.. {
        term *= b / n as f64;
        if n > degree {
            sum += term;
            if term <= sum * f64::EPSILON * 0.25 && n as f64 > b {
                break;
            }
        }
        if !sum.is_finite() || term == 0.0 {
            break;
        }
    }
    sum
}

/// Modified Bessel functions I_0(b), ..., I_n(b) by their power series, whose terms are all
/// positive.
pub fn bessel_i(n: usize, b: f64) -> Vec<f64> {
    let half = b / 2.0;
    let mut lead = 1.0; // (b/2)^n / n!
    (0..=n)
        .map(|order| {
            if order > 0 {
                lead *= half / order as f64;
            }
            let (mut term, mut sum) = (lead, lead);
            for m in 1.. {
                term *= half * half / (m as f64 * (m + order) as f64);
                sum += term;
                // Written so that NaN and infinity end the loop too.
                if !(term > sum * f64::EPSILON * 0.25) || !sum.is_finite() {
                    break;
                }
            }
            sum
        })
        .collect()
}

/// The truncated Chebyshev series of exp on [-b, b]: I_0(b) + 2 sum_{n <= g} I_n(b) T_n(s / b).
///
/// # Errors
/// [`Error::InvalidParam`] if exp(b) overflows.
pub fn chebyshev(degree: usize, b: f64) -> Result<Polynomial> {
    let bessel = bessel_i(degree, b);
    if bessel.iter().any(|x| !x.is_finite()) {
        return Err(Error::invalid("b", b, "exp(b) must not overflow"));
    }
    let series: Vec<f64> =
        bessel.iter().enumerate().map(|(n, i)| if n == 0 { *i } else { 2.0 * i }).collect();
    Ok(Polynomial { coefficients: chebyshev_to_powers(&series), scale: b })
}

/// Error of [`chebyshev`] on [-b, b]: exactly 2 sum_{n > g} I_n(b), attained at s = b, where every
/// T_n is 1.
///
/// ```
/// use peft_limits::attention::factorization::polynomial::{chebyshev, chebyshev_error};
/// let at_b = 3f64.exp() - chebyshev(4, 3.0)?.evaluate(3.0);
/// assert!((chebyshev_error(4, 3.0) / at_b - 1.0).abs() < 1e-12);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn chebyshev_error(degree: usize, b: f64) -> f64 {
    // Beyond n = g + 1 the ratio I_{n+1}/I_n is below b / (2 n), so terms soon vanish.
    let last = degree + 40 + (4.0 * b) as usize;
    bessel_i(last, b)[degree + 1..].iter().rev().map(|i| 2.0 * i).sum()
}

/// Coefficients of powers from coefficients of Chebyshev polynomials.
///
/// Cancellation costs a factor of up to (1 + sqrt 2)^g in relative precision: 4e-8 at degree 20 in
/// doubles in the worst case, far less for exp, whose series falls faster than that.
pub fn chebyshev_to_powers(series: &[f64]) -> Vec<f64> {
    let n = series.len();
    let mut powers = vec![0.0; n];
    let (mut previous, mut current) = (vec![0.0; n], vec![0.0; n]);
    for (order, &coefficient) in series.iter().enumerate() {
        match order {
            0 => current[0] = 1.0,
            1 => {
                previous = current;
                current = vec![0.0; n];
                current[1] = 1.0;
            }
            _ => {
                // T_{n+1} = 2 x T_n - T_{n-1}
                let mut next = vec![0.0; n];
                for i in 0..n {
                    next[i] = if i > 0 { 2.0 * current[i - 1] } else { 0.0 } - previous[i];
                }
                previous = current;
                current = next;
            }
        }
        for (p, c) in powers.iter_mut().zip(&current) {
            *p += coefficient * c;
        }
    }
    powers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bessel_values_from_their_integral() {
        // I_n(b) = (1/pi) int_0^pi exp(b cos t) cos(n t) dt, by the trapezoidal rule, which
        // converges geometrically for periodic integrands.
        for b in [0.1, 1.0, 5.0, 20.0] {
            let values = bessel_i(6, b);
            for (n, value) in values.iter().enumerate() {
                let points = 400;
                let integral: f64 = (0..points)
                    .map(|i| {
                        let t = std::f64::consts::TAU * f64::from(i) / f64::from(points);
                        (b * t.cos()).exp() * (n as f64 * t).cos()
                    })
                    .sum::<f64>()
                    / f64::from(points);
                assert!(
                    (value - integral).abs() < 1e-13 * b.exp(),
                    "I_{n}({b}) = {value}, integral {integral}"
                );
            }
        }
    }

    #[test]
    fn stated_errors_hold_at_every_degree_and_are_attained() {
        for b in [0.5, 2.0, 6.0] {
            for degree in 1..=16 {
                let rounding = 1e-13 * f64::exp(b);
                let measured = |p: &Polynomial| {
                    (0..=4000)
                        .map(|i| -b + b * f64::from(i) / 2000.0)
                        .fold(0.0f64, |m, s| m.max((p.evaluate(s) - s.exp()).abs()))
                };
                let c = chebyshev(degree, b).unwrap();
                let (c_error, c_measured) = (chebyshev_error(degree, b), measured(&c));
                assert!(
                    (c_measured - c_error).abs() <= 1e-9 * c_error + rounding,
                    "chebyshev {degree} on {b}"
                );
                let (t_error, t_measured) = (taylor_error(degree, b), measured(&taylor(degree)));
                assert!(
                    (t_measured - t_error).abs() <= 1e-9 * t_error + rounding,
                    "taylor {degree} on {b}"
                );
                assert!(c_error < t_error, "the Chebyshev series is the better one");
                let rigorous = c.uniform_error(b);
                assert!(rigorous >= c_measured && rigorous <= 1.1 * c_error + 1e-3 * b.exp());
            }
        }
    }
}
