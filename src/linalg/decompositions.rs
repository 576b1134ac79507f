//! Singular values, singular vectors and least squares, in double precision.
//!
//! nalgebra by default; the system's LAPACK with feature `lapack`. Both paths return the same
//! quantities (signs of singular vectors are arbitrary), which `tests/decompositions.rs` checks.
//! Single precision is widened first: these are measurements and small solves, not hot paths.

use crate::error::{Error, Result};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

/// A thin singular value decomposition a = u diag(s) vt, s descending.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Left singular vectors, `m x min(m, n)`.
    pub u: Array2<f64>,
    /// Singular values, descending.
    pub s: Array1<f64>,
    /// Right singular vectors as rows, `min(m, n) x n`.
    pub vt: Array2<f64>,
}

fn require_finite(op: &'static str, a: &ArrayView2<f64>) -> Result<()> {
    super::norms::require_finite(op, "matrix", a)
}

/// Singular values, descending. Cost O(m n min(m, n)).
///
/// # Errors
/// [`Error::NonFinite`] for NaN or infinity; [`Error::Decomposition`] if the library gives up.
///
/// ```
/// use ndarray::array;
/// use peft_limits::linalg::decompositions::singular_values;
/// let s = singular_values(array![[0.0, 3.0], [4.0, 0.0]].view())?;
/// assert!((s[0] - 4.0).abs() < 1e-15 && (s[1] - 3.0).abs() < 1e-15);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn singular_values(a: ArrayView2<f64>) -> Result<Array1<f64>> {
    require_finite("singular_values", &a)?;
    backend::singular_values(a)
}

/// Thin SVD, singular values descending. Cost O(m n min(m, n)).
///
/// # Errors
/// As [`singular_values`].
pub fn svd(a: ArrayView2<f64>) -> Result<Svd> {
    require_finite("svd", &a)?;
    backend::svd(a)
}

/// The x that minimises ||a x - b||_2, by QR; `a` is `m x n` with m >= n and full column rank.
///
/// # Errors
/// [`Error::ShapeMismatch`] if m < n or b has another length; [`Error::Decomposition`] if the columns of
/// `a` are linearly dependent to working precision.
pub fn least_squares(a: ArrayView2<f64>, b: ArrayView1<f64>) -> Result<Array1<f64>> {
    let (m, n) = a.dim();
    if m < n || b.len() != m {
        return Err(Error::ShapeMismatch {
            op: "least_squares",
            arg: "b".into(),
            expected: format!("length {m} >= {n} columns"),
            got: format!("length {}", b.len()),
        });
    }
    require_finite("least_squares", &a)?;
    let (q, r) = backend::qr(a)?;
    let mut x = q.t().dot(&b);
    let largest = r.diag().iter().fold(0.0f64, |m, d| m.max(d.abs()));
    for i in (0..n).rev() {
        let pivot = r[[i, i]];
        if !(pivot.abs() > largest * f64::EPSILON * m as f64) {
            return Err(Error::Decomposition {
                op: "least_squares",
                reason: format!("column {i} depends on the others (pivot {pivot:e})"),
            });
        }
        let tail: f64 = (i + 1..n).map(|j| r[[i, j]] * x[j]).sum();
        x[i] = (x[i] - tail) / pivot;
    }
    Ok(x)
}

#[cfg(not(feature = "lapack"))]
mod backend {
    use super::*;
    use nalgebra::DMatrix;

    fn to_nalgebra(a: ArrayView2<f64>) -> DMatrix<f64> {
        DMatrix::from_fn(a.nrows(), a.ncols(), |i, j| a[[i, j]])
    }

    fn from_nalgebra(a: &DMatrix<f64>) -> Array2<f64> {
        Array2::from_shape_fn(a.shape(), |(i, j)| a[(i, j)])
    }

    pub(super) fn singular_values(a: ArrayView2<f64>) -> Result<Array1<f64>> {
        let mut s: Vec<f64> = to_nalgebra(a).singular_values().iter().copied().collect();
        s.sort_by(|x, y| y.total_cmp(x));
        Ok(s.into())
    }

    pub(super) fn svd(a: ArrayView2<f64>) -> Result<Svd> {
        let gave_up = || Error::Decomposition { op: "svd", reason: "no convergence".into() };
        let svd = to_nalgebra(a).try_svd(true, true, f64::EPSILON, 0).ok_or_else(gave_up)?;
        let (u, vt) = (svd.u.ok_or_else(gave_up)?, svd.v_t.ok_or_else(gave_up)?);
        Ok(Svd { u: from_nalgebra(&u), s: svd.singular_values.iter().copied().collect(), vt: from_nalgebra(&vt) })
    }

    pub(super) fn qr(a: ArrayView2<f64>) -> Result<(Array2<f64>, Array2<f64>)> {
        let qr = to_nalgebra(a).qr();
        Ok((from_nalgebra(&qr.q()), from_nalgebra(&qr.r())))
    }
}

#[cfg(feature = "lapack")]
mod backend {
    use super::*;
    use ndarray_linalg::{JobSvd, QR, SVDDC};
    use std::sync::Once;

    /// Parallelism is rayon's: each LAPACK call runs on the thread that makes it.
    fn one_thread_per_call() {
        static ONCE: Once = Once::new();
        unsafe extern "C" {
            fn openblas_set_num_threads(threads: std::ffi::c_int);
        }
        // SAFETY: OpenBLAS exports this function with this signature; it only sets a process-wide
        // count, and `Once` keeps two threads from calling it together.
        #[allow(unsafe_code)]
        ONCE.call_once(|| unsafe { openblas_set_num_threads(1) });
    }

    fn failed(op: &'static str) -> impl Fn(ndarray_linalg::error::LinalgError) -> Error {
        move |e| Error::Decomposition { op, reason: e.to_string() }
    }

    pub(super) fn singular_values(a: ArrayView2<f64>) -> Result<Array1<f64>> {
        one_thread_per_call();
        let (_, s, _) = a.to_owned().svddc(JobSvd::None).map_err(failed("singular_values"))?;
        Ok(s)
    }

    pub(super) fn svd(a: ArrayView2<f64>) -> Result<Svd> {
        one_thread_per_call();
        let (u, s, vt) = a.to_owned().svddc(JobSvd::Some).map_err(failed("svd"))?;
        match (u, vt) {
            (Some(u), Some(vt)) => Ok(Svd { u, s, vt }),
            _ => Err(Error::Decomposition { op: "svd", reason: "vectors were not returned".into() }),
        }
    }

    pub(super) fn qr(a: ArrayView2<f64>) -> Result<(Array2<f64>, Array2<f64>)> {
        one_thread_per_call();
        a.to_owned().qr().map_err(failed("qr"))
    }
}
