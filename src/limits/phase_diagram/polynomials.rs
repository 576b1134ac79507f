//! Exponents of polynomial features: all monomials up to a degree.

use statrs::function::gamma::ln_gamma;

/// ln C(degree + d, d) for real arguments: monomials of d variables up to a degree.
pub fn ln_monomials(degree: f64, d: f64) -> f64 {
    ln_gamma(degree + d + 1.0) - ln_gamma(degree + 1.0) - ln_gamma(d + 1.0)
}

/// lim ln C((a + kappa) ln L, kappa ln L) / ln L = (kappa + a) ln(kappa + a) - a ln a - kappa ln
/// kappa.
pub fn monomials_exponent(a: f64, kappa: f64) -> f64 {
    if a > 0.0 { kappa * (a / kappa).ln_1p() + a * (kappa / a).ln_1p() } else { 0.0 }
}

/// Every monomial up to the typical total degree d E_p\[n\], n counting energies from the largest.
pub fn all_monomials_exponent(p: &[f64], kappa: f64) -> f64 {
    let mean: f64 = p.iter().enumerate().rev().map(|(n, p)| n as f64 * p).sum();
    monomials_exponent(kappa * mean, kappa)
}

/// Energy of d coordinates by total degree, mode n of one counted as degree n; degrees that hold
/// nothing are left out.
pub fn energy_by_degree(p: &[f64], d: usize) -> Vec<f64> {
    let mut law = vec![1.0];
    for _ in 0..d {
        let mut next = vec![0.0; law.len() + p.len() - 1];
        for (i, a) in law.iter().enumerate() {
            next[i..].iter_mut().zip(p).for_each(|(n, p)| *n += a * p);
        }
        let used = next.iter().rposition(|e| *e > 1e-30).unwrap_or(0);
        next.truncate(used + 1);
        law = next;
    }
    law
}

/// Every monomial up to the degree whose Chebyshev error on \[-Gamma^2, Gamma^2\] is L^-q
/// e^(-Gamma^2).
pub fn certified_exponent(c: f64, kappa: f64, q: f64) -> f64 {
    monomials_exponent(certified_degree(c * c, q), kappa)
}

/// Largest q at which [`certified_exponent`] stays below 1; negative if it does at no q.
pub fn largest_power(c: f64, kappa: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while monomials_exponent(high, kappa) < 1.0 {
        high *= 2.0;
    }
    for _ in 0..100 {
        let middle = (low + high) / 2.0;
        if monomials_exponent(middle, kappa) < 1.0 { low = middle } else { high = middle }
    }
    let b = c * c;
    low * (low / b).asinh() - low.hypot(b) - b
}

/// a with sqrt(a^2 + b^2) - a asinh(a / b) = -(error + b): the degree whose Chebyshev error for exp
/// on \[-b, b\] is e^(-error - b), all in one unit (of ln L, or of 1) and to leading order in it.
pub fn certified_degree(b: f64, error: f64) -> f64 {
    // In units of b, so that a small interval keeps its digits.
    let excess = |x: f64| x.hypot(1.0) - x * x.asinh() + 1.0 + error / b;
    let mut high = 1.0;
    while excess(high) > 0.0 {
        high *= 2.0;
    }
    let mut low = 0.0;
    for _ in 0..200 {
        let middle = (low + high) / 2.0;
        if excess(middle) > 0.0 { low = middle } else { high = middle }
    }
    b * high
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::factorization::degree::degree;

    #[test]
    fn counts_of_monomials() {
        assert!((ln_monomials(3.0, 4.0) - 35f64.ln()).abs() < 1e-12);
        // C(2n, n)^(1/n) approaches 4.
        let n = 1e6;
        assert!((ln_monomials(n, n) / n - monomials_exponent(1.0, 1.0)).abs() < 1e-4);
        assert!(monomials_exponent(0.0, 2.0).abs() < 1e-300);
    }

    #[test]
    fn degrees_of_signs_are_binomial() {
        let law = energy_by_degree(&[0.9, 0.1], 20);
        let mut expected = 0.9f64.powi(20);
        for (n, found) in law.iter().enumerate() {
            assert!((found / expected - 1.0).abs() < 1e-12, "{n}");
            expected *= (20 - n) as f64 / (n + 1) as f64 / 9.0;
        }
        assert_eq!(law.len(), 21);
        assert_eq!(energy_by_degree(&[1.0], 9), [1.0]);
    }

    /// The computed degree of an interval and the leading order approach each other.
    #[test]
    fn the_degree_is_the_computed_one_to_leading_order() {
        for (b, error) in [(3.0, 0.0), (3.0, 10.0), (40.0, 0.0), (40.0, 60.0)] {
            let computed = degree(b, (-error - b).exp()).unwrap() as f64;
            let leading = certified_degree(b, error);
            assert!(
                (computed - leading).abs() < 0.5 * (leading + 2.0).ln() + 1.0,
                "{b} {error}: {computed} {leading}"
            );
        }
    }

    #[test]
    fn the_largest_power_is_where_the_exponent_passes_one() {
        for (c, kappa) in [(0.1, 1.0), (0.3, 0.5), (0.2, 2.0)] {
            let q = largest_power(c, kappa);
            assert!((certified_exponent(c, kappa, q) - 1.0).abs() < 1e-9, "{c} {kappa} {q}");
        }
        assert!(largest_power(1.0, 1.0) < 0.0);
    }

    #[test]
    fn limits_in_c() {
        // c -> 0 at fixed error: a = x c^2 with x fixed, so the exponent is of order c^2 ln(1/c).
        let x = certified_degree(1e-12, 0.0) / 1e-12;
        assert!((certified_degree(1.0, 0.0) - x).abs() < 1e-9);
        // c -> infinity: the degree grows like c^2 and the exponent like kappa ln of it.
        let e = certified_exponent(1e3, 1.0, 0.0);
        assert!((e - (x * 1e6).ln() - 1.0).abs() < 1e-5, "{e}");
    }
}
