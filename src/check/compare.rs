//! Comparison of two tensors: relative Frobenius gap and worst element.

use crate::linalg::{Real, norms};
use ndarray::{ArrayView, Dimension};
use std::fmt;

/// The gap between a tensor and its reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Gap {
    /// ||got - want||_F / ||want||_F (absolute where the reference is zero).
    pub relative_frobenius: f64,
    /// Row-major position, value and reference of the entry with the largest difference.
    pub worst: Option<(usize, f64, f64)>,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "relative gap {:.3e}", self.relative_frobenius)?;
        match self.worst {
            Some((i, got, want)) => write!(f, ", worst at entry {i}: {got:.9e} against {want:.9e}"),
            None => Ok(()),
        }
    }
}

/// Measures the gap. A NaN or an infinity on one side only, or a shape that differs, gives an
/// infinite gap.
///
/// ```
/// use ndarray::array;
/// use peft_limits::check::compare::gap;
/// let g = gap(&array![3.0, 4.1].view(), &array![3.0, 4.0].view());
/// assert!((g.relative_frobenius - 0.02).abs() < 1e-12);
/// assert!(gap(&array![f64::NAN].view(), &array![1.0].view()).relative_frobenius.is_infinite());
/// assert!(gap(&array![f64::NAN].view(), &array![f64::NAN].view()).relative_frobenius.is_infinite());
/// ```
pub fn gap<T: Real, U: Real, D: Dimension>(got: &ArrayView<T, D>, want: &ArrayView<U, D>) -> Gap {
    if got.shape() != want.shape() {
        return Gap { relative_frobenius: f64::INFINITY, worst: None };
    }
    let mut worst: Option<(usize, f64, f64)> = None;
    let mut worst_gap = -1.0;
    for (i, (g, w)) in got.iter().zip(want.iter()).enumerate() {
        let (g, w) = (g.widen(), w.widen());
        if !g.is_finite() || !w.is_finite() {
            return Gap { relative_frobenius: f64::INFINITY, worst: Some((i, g, w)) };
        }
        if (g - w).abs() > worst_gap {
            worst_gap = (g - w).abs();
            worst = Some((i, g, w));
        }
    }
    Gap { relative_frobenius: norms::relative_frobenius(got, want), worst }
}

/// Panics with the tensor's name and the gap unless it is at most `tolerance`.
///
/// # Panics
/// As said; for tests.
#[track_caller]
pub fn assert_close<T: Real, U: Real, D: Dimension>(
    name: &str,
    got: &ArrayView<T, D>,
    want: &ArrayView<U, D>,
    tolerance: f64,
) {
    assert!(
        got.shape() == want.shape(),
        "{name}: shape {:?} against {:?}",
        got.shape(),
        want.shape()
    );
    let measured = gap(got, want);
    assert!(
        measured.relative_frobenius <= tolerance,
        "{name}: {measured}; tolerance {tolerance:.1e}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, Array2, array};

    #[test]
    fn refuses_what_it_must() {
        let one = array![1.0, 2.0];
        assert_eq!(gap(&one.view(), &one.view()).relative_frobenius.to_bits(), 0f64.to_bits());
        assert!(
            gap(&array![1.0, f64::INFINITY].view(), &one.view()).relative_frobenius.is_infinite()
        );
        assert!(gap(&Array1::<f64>::zeros(3).view(), &one.view()).relative_frobenius.is_infinite());
        assert!(
            std::panic::catch_unwind(|| {
                assert_close(
                    "x",
                    &Array2::<f64>::zeros((2, 3)).view(),
                    &Array2::<f64>::zeros((3, 2)).view(),
                    1.0,
                );
            })
            .is_err()
        );
        assert!(
            std::panic::catch_unwind(|| assert_close(
                "x",
                &array![1.0].view(),
                &array![1.1].view(),
                1e-3
            ))
            .is_err()
        );
    }
}
