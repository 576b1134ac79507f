//! Singular values, singular vectors and least squares, in double precision.
//!
//! nalgebra by default; the system's LAPACK with feature `lapack`. Both paths return the same
//! quantities (signs of singular vectors are arbitrary), which `tests/attention/decompositions.rs`
//! checks. Single precision is widened first: these are measurements and small solves, not hot
//! paths.

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
    if a.is_empty() {
        return Ok(Array1::zeros(0));
    }
    backend::singular_values(a)
}

/// Thin SVD, singular values descending. Cost O(m n min(m, n)).
///
/// # Errors
/// As [`singular_values`].
pub fn svd(a: ArrayView2<f64>) -> Result<Svd> {
    require_finite("svd", &a)?;
    if a.is_empty() {
        let (m, n) = a.dim();
        return Ok(Svd {
            u: Array2::zeros((m, 0)),
            s: Array1::zeros(0),
            vt: Array2::zeros((0, n)),
        });
    }
    backend::svd(a)
}

/// The x that minimises ||a x - b||_2, by QR; `a` is `m x n` with m >= n and full column rank.
///
/// # Errors
/// [`Error::ShapeMismatch`] if m < n or b has another length; [`Error::Decomposition`] if the
/// columns of `a` are linearly dependent to working precision.
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
    super::norms::require_finite("least_squares", "b", &b)?;
    if n == 0 {
        return Ok(Array1::zeros(0));
    }
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

/// Q of a = Q R with the diagonal of R positive: the Gram-Schmidt basis of the columns of `a`, `m x
/// n` with m >= n.
///
/// For independent normal entries Q is then distributed by the Haar measure (with the signs that a
/// library leaves to R it is not).
///
/// # Errors
/// [`Error::ShapeMismatch`] if m < n, [`Error::NonFinite`], [`Error::Decomposition`].
///
/// ```
/// use ndarray::array;
/// use peft_limits::linalg::decompositions::orthonormal_columns;
/// let q = orthonormal_columns(array![[3.0, 1.0], [4.0, 0.0]].view())?;
/// assert!((q[[0, 0]] - 0.6).abs() < 1e-15 && (q[[1, 0]] - 0.8).abs() < 1e-15);
/// assert!((q[[0, 1]] - 0.8).abs() < 1e-15 && (q[[1, 1]] + 0.6).abs() < 1e-15);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn orthonormal_columns(a: ArrayView2<f64>) -> Result<Array2<f64>> {
    let (m, n) = a.dim();
    if m < n {
        return Err(Error::shape("orthonormal_columns", "a", (n, n), (m, n)));
    }
    require_finite("orthonormal_columns", &a)?;
    let (mut q, r) = backend::qr(a)?;
    for (mut column, &d) in q.columns_mut().into_iter().zip(r.diag()) {
        column *= if d < 0.0 { -1.0 } else { 1.0 };
    }
    Ok(q)
}

#[cfg(not(feature = "lapack"))]
mod backend {
    use super::*;
    use crate::linalg::norms;
    use nalgebra::DMatrix;
    use ndarray::Axis;

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
        if a.nrows() < a.ncols() {
            let Svd { u, s, vt } = svd(a.t())?;
            return Ok(Svd { u: vt.reversed_axes(), s, vt: u.reversed_axes() });
        }
        let gave_up = || Error::Decomposition { op: "svd", reason: "no convergence".into() };
        let svd = to_nalgebra(a).try_svd(false, true, f64::EPSILON, 0).ok_or_else(gave_up)?;
        Ok(polished(a, from_nalgebra(&svd.v_t.ok_or_else(gave_up)?)))
    }

    /// Sweeps of [`polished`]; from nalgebra's vectors one or two are enough.
    const SWEEPS: usize = 20;

    /// Ends the decomposition from approximate right singular vectors, `a` being at least as tall
    /// as wide.
    ///
    /// nalgebra's last 2 x 2 steps lose digits where singular values tie or vanish (measured: 1e-10
    /// relative), while its V stays orthogonal. So W = A V is formed; pairs of its columns that are
    /// further from orthogonal than backward stability allows, |w_i . w_j| > c eps ||A|| max(|w_i|,
    /// |w_j|), are rotated (one-sided Jacobi); and W, columns in descending order, is factorized as
    /// U diag(s) by QR, whose other entries are then roundoff. That gives an orthogonal U for
    /// vanishing singular values too.
    fn polished(a: ArrayView2<f64>, mut vt: Array2<f64>) -> Svd {
        let (m, n) = a.dim();
        // Squares of the entries must neither overflow nor underflow.
        let scale = norms::max_abs(&a).max(f64::MIN_POSITIVE);
        let mut wt = vt.dot(&a.t().mapv(|x| x / scale));
        let tolerance = f64::EPSILON * (m as f64).sqrt().max(8.0);
        for _ in 0..SWEEPS {
            let gram = wt.dot(&wt.t());
            let length: Vec<f64> = gram.diag().iter().map(|x| x.sqrt()).collect();
            let largest = length.iter().fold(0.0f64, |x, y| x.max(*y));
            let mut rotated = false;
            for i in 0..n {
                for j in i + 1..n {
                    let allowed = tolerance * largest * length[i].max(length[j]);
                    if gram[[i, j]].abs() <= allowed {
                        continue;
                    }
                    // Earlier rotations of this sweep have changed the columns.
                    let (x, y) = (wt.row(i), wt.row(j));
                    let (p, q, r) = (x.dot(&x), y.dot(&y), x.dot(&y));
                    if r.abs() <= allowed {
                        continue;
                    }
                    let zeta = (q - p) / (2.0 * r);
                    let t = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                    let c = 1.0 / t.hypot(1.0);
                    rotate(&mut wt, i, j, c, c * t);
                    rotate(&mut vt, i, j, c, c * t);
                    rotated = true;
                }
            }
            if !rotated {
                break;
            }
        }
        let order = descending(
            &wt.rows().into_iter().map(|row| norms::frobenius(&row)).collect::<Vec<_>>(),
        );
        let (wt, vt) = (wt.select(Axis(0), &order), vt.select(Axis(0), &order));
        let qr = to_nalgebra(wt.t()).qr();
        let mut u = from_nalgebra(&qr.q());
        let diagonal: Vec<f64> = qr.r().diagonal().iter().copied().collect();
        for (mut column, d) in u.columns_mut().into_iter().zip(&diagonal) {
            column *= if *d < 0.0 { -1.0 } else { 1.0 };
        }
        let s: Vec<f64> = diagonal.iter().map(|d| d.abs() * scale).collect();
        // Neighbours may have changed places by a rounding.
        let order = descending(&s);
        Svd {
            u: u.select(Axis(1), &order),
            s: order.iter().map(|&i| s[i]).collect(),
            vt: vt.select(Axis(0), &order),
        }
    }

    fn descending(values: &[f64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
        order
    }

    /// Rows i < j become c x - s y and s x + c y.
    fn rotate(a: &mut Array2<f64>, i: usize, j: usize, c: f64, s: f64) {
        let (mut above, mut below) = a.view_mut().split_at(Axis(0), j);
        ndarray::Zip::from(above.row_mut(i)).and(below.row_mut(0)).for_each(|x, y| {
            (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
        });
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
        #[allow(unsafe_code)]
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
            _ => {
                Err(Error::Decomposition { op: "svd", reason: "vectors were not returned".into() })
            }
        }
    }

    pub(super) fn qr(a: ArrayView2<f64>) -> Result<(Array2<f64>, Array2<f64>)> {
        one_thread_per_call();
        a.to_owned().qr().map_err(failed("qr"))
    }
}
