//! Monomial features: any polynomial of beta q.k is Phi Psi^T with one column per monomial.
//!
//! (q.k)^n = sum over multi-indices a of size n of n!/(a_1! ... a_d!) q^a k^a, so with
//! p(s) = sum_n c_n s^n the columns are indexed by all a of size <= g: k = C(d + g, g).

use super::centering::Centered;
use super::polynomial::Polynomial;
use super::{Certificate, FeatureMap, MAX_RANK};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::elementwise::{Kernel, vectorized};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};

/// C(d + g, g), the number of monomials of degree at most g in d variables; saturates at
/// `u128::MAX`.
///
/// ```
/// use peft_limits::attention::factorization::monomials::count;
/// assert_eq!(count(8, 3), 165);
/// assert_eq!(count(2, 2), 6); // 1, x, y, x^2, xy, y^2
/// ```
pub fn count(dimension: usize, degree: usize) -> u128 {
    let mut c: u128 = 1;
    for i in 1..=degree as u128 {
        c = match c.checked_mul(dimension as u128 + i) {
            Some(x) => x / i,
            None => return u128::MAX,
        };
    }
    c
}

/// How each monomial is made from an earlier one by one more factor.
#[derive(Debug, Clone)]
struct Step {
    parent: u32,
    variable: u32,
}

/// Phi and Psi for a polynomial of the scores.
#[derive(Debug)]
pub struct MonomialMap<T> {
    steps: Vec<Step>,
    /// c_n n! / (a_1! ... a_d!) of each monomial; it goes to the query side, with its sign.
    weights: Vec<T>,
    /// sqrt(beta / scale), by which q and k are multiplied first.
    input_scale: T,
    /// What was taken out of queries and keys.
    centered: Centered<T>,
    certificate: Certificate,
}

impl<T: Real> MonomialMap<T> {
    /// Prepares the columns for p(beta q.k) of centered queries and keys; the error bound of the
    /// certificate is multiplied by the largest column factor of all shards.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if C(d + g, g) exceeds [`MAX_RANK`].
    pub fn new(
        centered: Centered<T>,
        beta: f64,
        polynomial: &Polynomial,
        mut certificate: Certificate,
    ) -> Result<Self> {
        let dimension = centered.query.ncols();
        let degree = polynomial.degree();
        let rank = count(dimension, degree);
        if rank > MAX_RANK as u128 {
            return Err(Error::TooLarge {
                what: format!("{} at head_dim {dimension}", certificate.spec),
                needed: rank,
                limit: MAX_RANK as u128,
                unit: "feature columns",
            });
        }
        certificate.rank = rank as usize;
        certificate.exp_error_bound =
            certificate.exp_error_bound.map(|e| e * centered.largest_factor);
        let mut steps = vec![Step { parent: 0, variable: 0 }];
        let mut multinomials = vec![1.0f64];
        let mut degrees = vec![0usize];
        // Exponent of the last variable: n!/(a!) gains the factor n / a_last with each step.
        let mut last_exponent = vec![0usize];
        let mut first_of_degree = 0;
        for n in 1..=degree {
            let end = steps.len();
            for parent in first_of_degree..end {
                let (start, run) = if n == 1 {
                    (0, 0)
                } else {
                    (steps[parent].variable as usize, last_exponent[parent])
                };
                for variable in start..dimension {
                    let exponent = if n > 1 && variable == start { run + 1 } else { 1 };
                    steps.push(Step { parent: parent as u32, variable: variable as u32 });
                    multinomials.push(multinomials[parent] * n as f64 / exponent as f64);
                    degrees.push(n);
                    last_exponent.push(exponent);
                }
            }
            first_of_degree = end;
        }
        debug_assert_eq!(steps.len(), certificate.rank);
        let weights = multinomials
            .iter()
            .zip(&degrees)
            .map(|(m, &n)| T::of(m * polynomial.coefficients[n]))
            .collect();
        Ok(Self {
            steps,
            weights,
            input_scale: T::of((beta / polynomial.scale).sqrt()),
            centered,
            certificate,
        })
    }

    /// Coefficient of each column, a factor of Phi.
    pub fn weights(&self) -> &[T] {
        &self.weights
    }

    /// Factor of each row of Psi, if keys and queries are centered.
    pub fn column_factor(&self) -> Option<&[T]> {
        self.centered.column_factor.as_deref()
    }

    /// Query rows as they enter the monomials.
    pub fn scaled_query(&self, rows: ArrayView2<T>) -> Array2<T> {
        (&rows - &self.centered.query_mean) * self.input_scale
    }

    /// Key rows as they enter the monomials.
    pub fn scaled_key(&self, rows: ArrayView2<T>) -> Array2<T> {
        (&rows - &self.centered.key_mean) * self.input_scale
    }

    /// For each degree from 1 on, in the order of the columns: the place of each monomial's parent
    /// among the monomials of one degree less, and the variable that it is multiplied with.
    pub fn by_degree(&self) -> Vec<(Vec<u32>, Vec<u32>)> {
        let mut degrees = Vec::new();
        // The columns of the degree below.
        let mut below = 0..1;
        while below.end < self.steps.len() {
            let children = self.steps[below.end..]
                .iter()
                .take_while(|step| (step.parent as usize) < below.end);
            let degree: (Vec<u32>, Vec<u32>) =
                children.map(|step| (step.parent - below.start as u32, step.variable)).unzip();
            below = below.end..below.end + degree.0.len();
            degrees.push(degree);
        }
        degrees
    }

    fn fill(
        &self,
        rows: ArrayView2<T>,
        mean: &Array1<T>,
        mut out: ArrayViewMut2<T>,
        weighted: bool,
    ) {
        let scaled = ((&rows - mean) * self.input_scale).t().as_standard_layout().into_owned();
        let width = rows.nrows();
        assert!(
            out.is_standard_layout() && out.dim() == (self.steps.len(), width),
            "a k x rows tile"
        );
        let (Some(out), Some(inputs)) = (out.as_slice_mut(), scaled.as_slice()) else { return };
        let weights = weighted.then_some(&self.weights[..]);
        vectorized(Fill { steps: &self.steps, weights, inputs, width, out });
    }
}

struct Fill<'a, T> {
    steps: &'a [Step],
    weights: Option<&'a [T]>,
    /// Transposed inputs, `d x width`.
    inputs: &'a [T],
    width: usize,
    /// `k x width`.
    out: &'a mut [T],
}

impl<T: Real> Kernel for Fill<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let width = self.width;
        self.out[..width].fill(T::one());
        for (j, step) in self.steps.iter().enumerate().skip(1) {
            let (before, after) = self.out.split_at_mut(j * width);
            let parent = &before[step.parent as usize * width..][..width];
            let input = &self.inputs[step.variable as usize * width..][..width];
            for ((o, &p), &x) in after[..width].iter_mut().zip(parent).zip(input) {
                *o = p * x;
            }
        }
        if let Some(weights) = self.weights {
            for (row, &w) in self.out.chunks_exact_mut(width.max(1)).zip(weights) {
                for o in row {
                    *o *= w;
                }
            }
        }
    }
}

impl<T: Real> FeatureMap<T> for MonomialMap<T> {
    fn rank(&self) -> usize {
        self.steps.len()
    }

    fn query_features(&self, _first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.fill(rows, &self.centered.query_mean, out, true);
    }

    fn key_features(&self, first_row: usize, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        self.fill(rows, &self.centered.key_mean, out.view_mut(), false);
        self.centered.scale_columns(first_row, out);
    }

    fn row_shift(&self) -> Option<&[T]> {
        self.centered.row_shift.as_deref()
    }

    fn monomials(&self) -> Option<&MonomialMap<T>> {
        Some(self)
    }

    fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}
