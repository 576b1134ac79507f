//! The smallest degree of a polynomial that approximates exp to a given error.

use super::polynomial::{bessel_i, chebyshev_error};
use crate::error::{Error, Result};

/// Largest degree searched.
pub const MAX_DEGREE: usize = 4096;

/// Smallest degree whose truncated Chebyshev series has uniform error at most `eps` on [-b, b].
///
/// Computed from the exact error 2 sum_{n > g} I_n(b), not from an asymptotic formula (\[AA22\]
/// gives Theta(b + log(1/eps) / log(log(1/eps) / b)) for the optimal degree). The best polynomial
/// of any kind needs at least [`lower_bound`], which is at most a few below.
///
/// # Errors
/// [`Error::InvalidParam`] unless b and eps are positive and finite, or if no degree up to
/// [`MAX_DEGREE`] suffices.
///
/// ```
/// use peft_limits::limits::degree::degree;
/// assert_eq!(degree(1.0, 1e-3)?, 4);
/// assert!(degree(4.0, 1e-3)? > degree(1.0, 1e-3)?);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn degree(b: f64, eps: f64) -> Result<usize> {
    search(b, eps, |g| chebyshev_error(g, b))
}

/// A degree that no polynomial of uniform error `eps` can go below.
///
/// The Chebyshev coefficient a_{g+1} = 2 I_{g+1}(b) of exp is that of exp - p for every p of degree
/// g, and it is 2/pi times an integral of (exp - p) T_{g+1} against the Chebyshev weight, of which
/// |T_{g+1}| has integral 2: so the best error is at least pi/4 a_{g+1}.
///
/// # Errors
/// As [`degree`].
pub fn lower_bound(b: f64, eps: f64) -> Result<usize> {
    let bessel = |g: usize| {
        let values = bessel_i(g + 1, b);
        std::f64::consts::FRAC_PI_4 * 2.0 * values[g + 1]
    };
    search(b, eps, bessel)
}

fn search(b: f64, eps: f64, error: impl Fn(usize) -> f64) -> Result<usize> {
    for (name, value) in [("b", b), ("eps", eps)] {
        if !(value > 0.0 && value.is_finite()) {
            return Err(Error::invalid(name, value, "must be positive and finite"));
        }
    }
    if !b.exp().is_finite() {
        return Err(Error::invalid("b", b, "exp(b) must not overflow"));
    }
    // The error falls with the degree: bisection between a failing and a sufficient degree.
    if error(0) <= eps {
        return Ok(0);
    }
    let (mut low, mut high) = (0, 1);
    while error(high) > eps {
        low = high;
        high *= 2;
        if high > MAX_DEGREE {
            return Err(Error::invalid(
                "eps",
                eps,
                format!("no degree up to {MAX_DEGREE} suffices on [-{b}, {b}]"),
            ));
        }
    }
    while high - low > 1 {
        let middle = (low + high) / 2;
        if error(middle) <= eps { high = middle } else { low = middle }
    }
    Ok(high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_degree_is_the_smallest_and_not_far_above_the_lower_bound() {
        for b in [0.01, 0.3, 1.0, 5.0, 30.0] {
            for eps in [1.0, 1e-2, 1e-6, 1e-10] {
                let g = degree(b, eps).unwrap();
                assert!(chebyshev_error(g, b) <= eps);
                assert!(g == 0 || chebyshev_error(g - 1, b) > eps);
                let low = lower_bound(b, eps).unwrap();
                assert!(
                    low <= g && g <= low + 4 + (b.sqrt() as usize),
                    "b {b} eps {eps}: {low} {g}"
                );
            }
        }
    }

    #[test]
    fn bad_arguments_are_refused() {
        for (b, eps) in
            [(0.0, 0.1), (f64::NAN, 0.1), (1.0, 0.0), (1.0, f64::INFINITY), (800.0, 0.1)]
        {
            assert!(matches!(degree(b, eps), Err(Error::InvalidParam { .. })), "{b} {eps}");
        }
    }
}
