//! Norms and finiteness checks.

use super::Real;
use crate::error::{Error, Result};
use ndarray::{ArrayView, ArrayView1, ArrayView2, Dimension, NdIndex};

/// Largest magnitude of the entries (0 for an empty array).
pub fn max_abs<T: Real, D: Dimension>(a: &ArrayView<T, D>) -> f64 {
    a.iter().fold(0.0f64, |m, x| m.max(x.widen().abs()))
}

/// Frobenius norm in double precision, scaled so that it neither overflows nor underflows.
///
/// ```
/// use ndarray::array;
/// use peft_limits::linalg::norms::frobenius;
/// assert_eq!(frobenius(&array![[3.0, 4.0]].view()), 5.0);
/// assert!((frobenius(&array![[3e200, 4e200]].view()) / 5e200 - 1.0).abs() < 1e-15);
/// ```
pub fn frobenius<T: Real, D: Dimension>(a: &ArrayView<T, D>) -> f64 {
    let scale = max_abs(a);
    if scale == 0.0 || !scale.is_finite() {
        return scale;
    }
    // The squares that count are normal numbers: no need to scale.
    if (1e-140..1e140).contains(&scale) {
        return a.iter().map(|x| x.widen() * x.widen()).sum::<f64>().sqrt();
    }
    let sum: f64 = a.iter().map(|x| (x.widen() / scale) * (x.widen() / scale)).sum();
    scale * sum.sqrt()
}

/// ||got - want||_F / ||want||_F; if `want` is zero, ||got||_F.
pub fn relative_frobenius<T: Real, U: Real, D: Dimension>(
    got: &ArrayView<T, D>,
    want: &ArrayView<U, D>,
) -> f64 {
    let gap = ndarray::Zip::from(got).and(want).map_collect(|g, w| g.widen() - w.widen());
    let reference = frobenius(want);
    let gap = frobenius(&gap.view());
    if reference > 0.0 { gap / reference } else { gap }
}

/// Largest Euclidean norm of a row, as safe from overflow and underflow as [`frobenius`].
pub fn max_row_norm<T: Real>(a: ArrayView2<T>) -> f64 {
    if !(1e-140..1e140).contains(&max_abs(&a)) {
        return a.rows().into_iter().map(|row| frobenius(&row)).fold(0.0, f64::max);
    }
    // The squares that count are normal numbers; a row too small for that is not the largest.
    let square = |row: ArrayView1<T>| row.iter().map(|x| x.widen() * x.widen()).sum::<f64>();
    a.rows().into_iter().map(square).fold(0.0, f64::max).sqrt()
}

/// Refuses NaN and infinity, naming the tensor and the first bad position.
pub fn require_finite<T: Real, D: Dimension>(
    op: &'static str,
    tensor: &str,
    a: &ArrayView<T, D>,
) -> Result<()>
where
    D::Pattern: NdIndex<D>,
{
    if a.iter().all(|x| x.is_finite()) {
        return Ok(());
    }
    let position = a.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let mut rest = position;
    let mut index: Vec<usize> = Vec::new();
    for &size in a.shape().iter().rev() {
        index.push(rest % size.max(1));
        rest /= size.max(1);
    }
    index.reverse();
    let value = a.iter().nth(position).map_or(f64::NAN, |x| x.widen());
    Err(Error::NonFinite { op, tensor: tensor.to_string(), index, value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn the_first_bad_entry_is_named() {
        let a = array![[1.0f32, 2.0], [3.0, f32::NAN], [f32::INFINITY, 0.0]];
        match require_finite("test", "XQ", &a.view()) {
            Err(Error::NonFinite { tensor, index, value, .. }) => {
                assert_eq!((tensor.as_str(), index), ("XQ", vec![1, 1]));
                assert!(value.is_nan());
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn frobenius_at_extreme_magnitudes() {
        for scale in [1e-300, 1e-20, 1.0, 1e20, 1e300] {
            let a = array![[scale * 2.0, scale], [scale * 2.0, 0.0]];
            assert!((frobenius(&a.view()) / scale - 3.0).abs() < 1e-14);
            assert!((max_row_norm(a.view()) / scale - 5f64.sqrt()).abs() < 1e-14);
        }
    }
}
