//! eps-rank: how many columns the best approximation needs.

use crate::error::{Error, Result};
use crate::linalg::decompositions::{Svd, singular_values};
use crate::linalg::norms;
use ndarray::{ArrayView2, Axis};

/// Smallest k with ||A - A_k||_F <= eps ||A||_F, from descending singular values; A_k is the best
/// rank-k approximation (Eckart-Young). 0 for a zero matrix.
///
/// ```
/// use peft_limits::limits::rank::frobenius_rank;
/// // Tail norms of (4, 3) are 5, 3, 0.
/// assert_eq!(frobenius_rank(&[4.0, 3.0], 0.61), 1);
/// assert_eq!(frobenius_rank(&[4.0, 3.0], 0.59), 2);
/// ```
pub fn frobenius_rank(singular_values: &[f64], eps: f64) -> usize {
    let total: f64 = singular_values.iter().map(|s| s * s).sum();
    let allowed = eps * eps * total;
    let mut tail = 0.0;
    for (k, s) in singular_values.iter().enumerate().rev() {
        tail += s * s;
        if tail > allowed {
            return k + 1;
        }
    }
    0
}

/// [`frobenius_rank`] with the last value taken in part: the real number k at which the held energy
/// is 1 - eps^2, for comparison with a predicted count. 0 for a zero matrix.
///
/// ```
/// use peft_limits::limits::rank::interpolated_rank;
/// // The energies are 16 and 9 of 25: half of the second is needed to hold 20.5.
/// assert!((interpolated_rank(&[4.0, 3.0], (4.5f64 / 25.0).sqrt()) - 1.5).abs() < 1e-12);
/// ```
pub fn interpolated_rank(singular_values: &[f64], eps: f64) -> f64 {
    let total: f64 = singular_values.iter().map(|s| s * s).sum();
    interpolated_rank_of(singular_values, eps, total).unwrap_or(0.0)
}

/// [`interpolated_rank`] from the leading singular values and the energy of all; `None` if they do
/// not reach it.
pub fn interpolated_rank_of(leading: &[f64], eps: f64, total_energy: f64) -> Option<f64> {
    let wanted = (1.0 - eps * eps) * total_energy;
    let mut held = 0.0;
    for (k, s) in leading.iter().enumerate() {
        let energy = s * s;
        if energy > 0.0 && held + energy >= wanted {
            return Some(k as f64 + (wanted - held) / energy);
        }
        held += energy;
    }
    None
}

/// [`frobenius_rank`] of a matrix for several eps, by one decomposition.
///
/// # Errors
/// Those of [`singular_values`]; [`Error::InvalidParam`] for an eps that is not positive.
pub fn frobenius_ranks(a: ArrayView2<f64>, eps: &[f64]) -> Result<Vec<usize>> {
    check(eps)?;
    let s = singular_values(a)?.to_vec();
    Ok(eps.iter().map(|&e| frobenius_rank(&s, e)).collect())
}

/// Smallest k with max |A - A_k| <= eps max |A|, for each eps; A_k is the best rank-k approximation
/// in the Frobenius norm (a best one in the max-norm is hard to find, so this is an upper bound on
/// that rank).
///
/// # Errors
/// [`Error::InvalidParam`] for an eps that is not positive.
pub fn max_norm_ranks(a: ArrayView2<f64>, svd: &Svd, eps: &[f64]) -> Result<Vec<usize>> {
    check(eps)?;
    let largest = norms::max_abs(&a);
    let mut residual = a.to_owned();
    let mut found = vec![None; eps.len()];
    for k in 0..=svd.s.len() {
        let gap = norms::max_abs(&residual.view());
        for (slot, &e) in found.iter_mut().zip(eps) {
            if slot.is_none() && gap <= e * largest {
                *slot = Some(k);
            }
        }
        if k == svd.s.len() || found.iter().all(Option::is_some) {
            break;
        }
        let column = svd.u.column(k).insert_axis(Axis(1)).to_owned() * svd.s[k];
        residual -= &column.dot(&svd.vt.row(k).insert_axis(Axis(0)));
    }
    Ok(found.into_iter().map(|k| k.unwrap_or(svd.s.len())).collect())
}

fn check(eps: &[f64]) -> Result<()> {
    match eps.iter().find(|e| !(**e > 0.0)) {
        Some(bad) => Err(Error::invalid("eps", bad, "must be positive")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::decompositions::svd;
    use ndarray::Array2;

    #[test]
    fn ranks_of_matrices_with_known_answers() {
        assert_eq!(frobenius_rank(&[0.0, 0.0], 0.1), 0);
        // A uniform attention matrix has rank 1, the identity full rank.
        let uniform = Array2::from_elem((9, 7), 1.0 / 7.0);
        assert_eq!(frobenius_ranks(uniform.view(), &[0.5, 1e-9]).unwrap(), [1, 1]);
        let identity = Array2::<f64>::eye(8);
        // Dropping j of 8 unit values leaves sqrt(j/8): eps = 0.4 allows one, 0.51 two.
        assert_eq!(frobenius_ranks(identity.view(), &[0.34, 0.4, 0.51]).unwrap(), [8, 7, 6]);
        assert_eq!(
            max_norm_ranks(identity.view(), &svd(identity.view()).unwrap(), &[0.5]).unwrap(),
            [8]
        );
        assert!(matches!(
            frobenius_ranks(identity.view(), &[f64::NAN]),
            Err(Error::InvalidParam { .. })
        ));
    }

    #[test]
    fn the_measured_rank_is_the_smallest_that_meets_its_error() {
        let a = Array2::from_shape_fn((30, 21), |(i, j)| {
            (-((i as f64) / 7.0 - (j as f64) / 5.0).powi(2)).exp()
        });
        let d = svd(a.view()).unwrap();
        for eps in [0.3, 0.03, 1e-4] {
            let truncate = |k: usize| {
                let scaled = &d.u.slice(ndarray::s![.., ..k]) * &d.s.slice(ndarray::s![..k]);
                scaled.dot(&d.vt.slice(ndarray::s![..k, ..]))
            };
            let relative = |k: usize| norms::relative_frobenius(&truncate(k).view(), &a.view());
            let k = frobenius_ranks(a.view(), &[eps]).unwrap()[0];
            assert!(relative(k) <= eps && relative(k - 1) > eps);
            let max_gap =
                |k: usize| norms::max_abs(&(&truncate(k) - &a).view()) / norms::max_abs(&a.view());
            let k = max_norm_ranks(a.view(), &d, &[eps]).unwrap()[0];
            assert!(
                max_gap(k) <= eps * (1.0 + 1e-9) && (0..k).all(|j| max_gap(j) > eps * (1.0 - 1e-9))
            );
        }
    }
}
