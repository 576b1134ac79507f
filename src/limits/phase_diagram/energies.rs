//! Energies of the kernel of one coordinate.

use super::law::{Law, Recurrence};
use super::one_sided_jacobi::squared_singular_values;
use crate::error::{Error, Result};
use statrs::function::gamma::ln_gamma;

/// Largest theta = c^2 / kappa for which energies are computed.
pub const MAX_THETA: f64 = 1000.0;

/// Energies below this share are left out.
const LEAST: f64 = 1e-300;

/// p_n = sigma_n^2 / sum sigma_m^2, descending, of the operator exp(theta u w) / E_w exp(theta u w)
/// on L^2 of the law.
///
/// The matrix has a row for each node u and a column for each orthonormal polynomial phi_n of the
/// law, with entries g_n(u) / g_0(u), g_n(u) = E_w exp(theta u w) phi_n(w). Each is a sum of
/// positive terms (see `Mixtures`) and its columns are graded, so every energy is accurate in
/// itself, not only relative to the largest.
///
/// # Errors
/// [`Error::InvalidParam`] unless theta lies in \[0, [`MAX_THETA`]\].
///
/// ```
/// use peft_limits::limits::phase_diagram::{Law, energies};
/// // Signs: singular values cosh and sinh of theta, over cosh.
/// let p = energies(&Law::Sign, 0.5)?;
/// let ratio = 0.5f64.tanh().powi(2);
/// assert!((p[1] / p[0] - ratio).abs() < 1e-14);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn energies(law: &Law, theta: f64) -> Result<Vec<f64>> {
    if !(0.0..=MAX_THETA).contains(&theta) {
        return Err(Error::invalid(
            "theta",
            theta,
            format!("c^2 / kappa must lie in [0, {MAX_THETA}]"),
        ));
    }
    // Beyond these columns the walk of `Mixtures`, of some 2 theta steps, does not come.
    let size = 60 + (8.0 * theta.sqrt()) as usize;
    let mixtures = Mixtures::new(&law.recurrence(size), theta);
    let rule = law.rule(theta);
    let mut columns = vec![Vec::with_capacity(rule.nodes.len()); mixtures.size];
    for (&u, w) in rule.nodes.iter().zip(&rule.weights) {
        let row = mixtures.at(u);
        for (column, g) in columns.iter_mut().zip(&row) {
            column.push(w.sqrt() * g / row[0]);
        }
    }
    // Entries whose squares underflow say nothing.
    let negligible = LEAST.sqrt();
    columns.retain(|column| column.iter().any(|x| x.abs() > negligible));
    let squares = squared_singular_values(columns);
    let total: f64 = squares.iter().rev().sum();
    Ok(squares.iter().map(|s| s / total).filter(|p| *p > LEAST).collect())
}

/// g_n(u) e^(-theta |u|) = (e^(theta u J - theta |u|))_0n as a mixture over Poisson counts k of
/// rate 2 theta |u| of the entries ((I + J)/2)^k_0n, or for negative u of ((I - J)/2)^k_0n. J, the
/// recurrence, has its spectrum in \[-1, 1\]; up to the sign (-1)^n in the second case all these
/// entries are positive.
struct Mixtures {
    theta: f64,
    size: usize,
    /// Row k holds the entries of power k, for u > 0 and for u < 0.
    powers: [Vec<Vec<f64>>; 2],
    ln_factorial: Vec<f64>,
}

impl Mixtures {
    fn new(recurrence: &Recurrence, theta: f64) -> Self {
        let size = recurrence.diagonal.len();
        let rate = 2.0 * theta;
        // Counts beyond have probability below 1e-30 each; the first entry of column n needs n
        // counts.
        let counts = (rate + 12.0 * rate.sqrt()) as usize + 60 + size;
        let powers = [1.0, -1.0].map(|sign| {
            let mut rows: Vec<Vec<f64>> = Vec::with_capacity(counts);
            let mut row = vec![0.0; size];
            row[0] = 1.0;
            for _ in 0..counts {
                let mut next: Vec<f64> = row
                    .iter()
                    .zip(&recurrence.diagonal)
                    .map(|(v, a)| v * (1.0 + sign * a).max(0.0) / 2.0)
                    .collect();
                for (n, b) in recurrence.beside.iter().enumerate() {
                    next[n] += row[n + 1] * b / 2.0;
                    next[n + 1] += row[n] * b / 2.0;
                }
                rows.push(std::mem::replace(&mut row, next));
            }
            rows
        });
        Self {
            theta,
            size,
            powers,
            ln_factorial: (0..counts).map(|k| ln_gamma(k as f64 + 1.0)).collect(),
        }
    }

    fn at(&self, u: f64) -> Vec<f64> {
        let rate = 2.0 * self.theta * u.abs();
        let mut row = vec![0.0; self.size];
        for (k, (power, ln_factorial)) in
            self.powers[usize::from(u < 0.0)].iter().zip(&self.ln_factorial).enumerate()
        {
            // 0 ln 0 = 0: at u = 0 only k = 0 counts.
            let share = if k == 0 { -rate } else { k as f64 * rate.ln() - rate - ln_factorial };
            let share = share.exp();
            row.iter_mut().zip(power).for_each(|(r, p)| *r += share * p);
        }
        if u < 0.0 {
            row.iter_mut().skip(1).step_by(2).for_each(|r| *r = -*r);
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::decompositions::singular_values;
    use ndarray::Array2;

    /// By a general decomposition of the discretised kernel, which knows large energies only.
    fn plainly(law: &Law, theta: f64) -> Vec<f64> {
        let rule = law.rule(theta);
        let n = rule.nodes.len();
        let kernel = Array2::from_shape_fn((n, n), |(i, j)| {
            let (u, w) = (rule.nodes[i], rule.nodes[j]);
            (theta * u * w - law.log_moment(theta * u).0).exp()
                * (rule.weights[i] * rule.weights[j]).sqrt()
        });
        let squares: Vec<f64> =
            singular_values(kernel.view()).unwrap().iter().map(|s| s * s).collect();
        let total: f64 = squares.iter().sum();
        squares.iter().map(|s| s / total).collect()
    }

    #[test]
    fn energies_are_those_of_the_kernel() {
        let skew: Vec<f64> =
            (0..150).map(|i| (f64::from(i) * 0.37).sin().powi(3) * 0.6 + 0.3).collect();
        let laws = [
            Law::Uniform,
            Law::Sign,
            Law::sampled(&skew).unwrap(),
            Law::sampled(&[0.2, 0.9, -0.4]).unwrap(),
        ];
        for law in &laws {
            for theta in [1e-4, 0.3, 2.0, 18.0, 60.0] {
                let (ours, theirs) = (energies(law, theta).unwrap(), plainly(law, theta));
                assert!((ours.iter().sum::<f64>() - 1.0).abs() < 1e-14);
                for (n, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                    assert!((a - b).abs() < 1e-13, "{theta} {n}: {a} {b}");
                }
            }
        }
    }

    /// From the Gram matrix of g_n / g_0 in 120 digits (mpmath), uniform law, theta = 0.01.
    #[test]
    fn small_energies_have_their_digits() {
        let expected = [
            1.11108988e-05,
            1.97525445e-11,
            1.45120682e-17,
            5.85016583e-24,
            1.49223698e-30,
            2.62704932e-37,
        ];
        let p = energies(&Law::Uniform, 0.01).unwrap();
        for (ours, expected) in p[1..].iter().zip(expected) {
            assert!((ours / expected - 1.0).abs() < 1e-8, "{ours} {expected}");
        }
    }

    #[test]
    fn a_constant_has_one_energy_and_theta_has_a_range() {
        assert_eq!(energies(&Law::sampled(&[0.5]).unwrap(), 3.0).unwrap(), [1.0]);
        assert_eq!(energies(&Law::Uniform, 0.0).unwrap(), [1.0]);
        for theta in [-1.0, f64::NAN, 2.0 * MAX_THETA] {
            assert!(matches!(energies(&Law::Uniform, theta), Err(Error::InvalidParam { .. })));
        }
    }
}
