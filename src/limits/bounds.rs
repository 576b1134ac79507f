//! Certified error of a chained gradient: from the uniform error of exp, link by link, to dA and
//! dB.
//!
//! Derivation: paper-notes/factorizations-and-bounds.md, section 3. With |E^_ij - E_ij| <= eta on
//! every visible pair and n_i visible keys,
//!
//! ```text
//! rho_i   = 2 n_i eta / D^_i                                       >= ||P^_i - P_i||_1
//! gamma_i = rho_i v  (target), 0 (given G)                         >= ||G^_i - G_i||
//! tau_i   = rho_i |G^_i| (2 v + |O^_i - v0|) + 2 v gamma_i         >= ||dS^_i - dS_i||_1
//! |L^T (dS^ - dS) R|_F <= min(sum_i |L_i| tau_i, |L|_2 (sum_i tau_i^2)^1/2) max_j |R_j - r0|
//! ```
//!
//! with v = max_j |V_j - v0|. Everything on the right is known after the chained gradient: no exact
//! quantity enters. v0 and r0 are the means for the standard softmax, whose rows of P and dS keep
//! their sums, and 0 for `One`.

use crate::attention::chained::ChainedGradients;
use crate::attention::contraction::upstream_gradient;
use crate::attention::problem::{Hidden, Projected};
use crate::attention::{AttentionProblem, Mask, Objective, Qkv, SoftmaxKind};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::decompositions::singular_values;
use crate::linalg::gemm::parallel_transposed_product;
use crate::linalg::{Real, norms, real::cast};
use ndarray::{Array1, Array2, ArrayView2, Axis};

/// Bounds on the error of every link of the chain, per query row, and of every gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct GradientBound {
    /// eta: uniform error of exp(S - shift) that was assumed.
    pub exp_error: f64,
    /// rho_i: error of row i of P in the 1-norm.
    pub probabilities: Vec<f64>,
    /// Error of row i of O in the 2-norm.
    pub output: Vec<f64>,
    /// gamma_i: error of row i of G in the 2-norm.
    pub upstream: Vec<f64>,
    /// tau_i: error of row i of dS in the 1-norm.
    pub scores: Vec<f64>,
    /// Frobenius error of each gradient (dAQ, dBQ, ...; dQ, dK, dV for heads without adapters).
    pub gradients: Vec<(String, f64)>,
    /// Frobenius error of all of them together.
    pub total: f64,
    /// `total` relative to the exact gradient's Frobenius norm, of which a lower bound is the
    /// approximate one less `total`; infinite when that is not positive.
    pub relative: f64,
}

/// Norms of a head that the propagation needs; they do not depend on the factorization.
#[derive(Debug, Clone)]
pub struct BoundInputs {
    /// v.
    value_radius: f64,
    /// v0.
    value_centre: Array1<f64>,
    /// n_i.
    visible: Vec<f64>,
    products: Vec<Product>,
}

/// One gradient that is linear in dS or P, up to transposition.
#[derive(Debug, Clone)]
struct Product {
    name: String,
    kind: Kind,
    factor: f64,
    /// |L_i|.
    row_lengths: Vec<f64>,
    /// |L|_2.
    spectral: f64,
    /// max_j |R_j - r0|.
    right_radius: f64,
    /// max_j |R_j|.
    right_length: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// factor L^T dS R.
    Scores,
    /// factor dS R.
    ScoreRows,
    /// factor N^T P R with N = G A^T; `spectral` is |A|_2.
    Values,
    /// factor (P R)^T G.
    ValuesByUpstream,
}

impl BoundInputs {
    /// Measures a head: O(L d^2) operations.
    ///
    /// # Errors
    /// Those of the singular values of small Gram matrices.
    pub fn new<T: Real>(problem: &AttentionProblem<T>, projected: &Projected<T>) -> Result<Self> {
        let centred = problem.softmax() == SoftmaxKind::Standard;
        let Qkv { query, key, value } = &projected.qkv;
        let value64: Array2<f64> = cast(value.view());
        let value_centre = centre(value64.view(), centred);
        let keys = key.nrows();
        let visible = (0..query.nrows())
            .map(|i| if problem.mask() == Mask::Causal { (i + 1) as f64 } else { keys as f64 })
            .collect();
        let mut products = Vec::new();
        let beta = problem.beta();
        match problem.hidden() {
            Some(h) if has_adapters(problem) => {
                adapter_products(problem, projected, h, centred, &mut products)?
            }
            _ => {
                products.push(Product::new(
                    "dQ",
                    Kind::ScoreRows,
                    beta,
                    None,
                    key.view(),
                    centred,
                )?);
                products.push(Product::new(
                    "dK",
                    Kind::Scores,
                    beta,
                    Some(query.view()),
                    identity(),
                    centred,
                )?);
                products.push(Product::new("dV", Kind::Values, 1.0, None, identity::<T>(), false)?);
            }
        }
        Ok(Self {
            value_radius: radius(value64.view(), &value_centre),
            value_centre,
            visible,
            products,
        })
    }

    /// rho from eta and 1 / D^.
    pub fn probability_errors(&self, exp_error: f64, inverse_denominators: &[f64]) -> Vec<f64> {
        self.visible
            .iter()
            .zip(inverse_denominators)
            .map(|(n, inverse)| 2.0 * n * exp_error * inverse)
            .collect()
    }

    /// Errors of the rows of O from those of P.
    pub fn output_errors(&self, probabilities: &[f64]) -> Vec<f64> {
        probabilities.iter().map(|rho| rho * self.value_radius).collect()
    }

    /// tau from rho, gamma, the errors of O, and the approximate O^ and G^.
    pub fn score_errors(
        &self,
        probabilities: &[f64],
        upstream_errors: &[f64],
        output_errors: &[f64],
        output: ArrayView2<f64>,
        upstream: ArrayView2<f64>,
    ) -> Vec<f64> {
        let v = self.value_radius;
        (0..probabilities.len())
            .map(|i| {
                let length = norms::frobenius(&upstream.row(i));
                let off_centre = norms::frobenius(&(&output.row(i) - &self.value_centre).view());
                // |(dS^ - dS)_i|_1 <= |P^ - P|_1 max |h^| + max |h^ - h|, h_ij = G_i.(V_j - O_i).
                probabilities[i] * length * (v + off_centre)
                    + upstream_errors[i] * 2.0 * v
                    + length * output_errors[i]
            })
            .collect()
    }

    /// Errors of the gradients from those of the rows of dS, P and G.
    pub fn gradient_errors(
        &self,
        scores: &[f64],
        probabilities: &[f64],
        upstream_errors: &[f64],
        upstream: ArrayView2<f64>,
    ) -> Vec<(String, f64)> {
        let root = |x: &[f64]| x.iter().map(|t| t * t).sum::<f64>().sqrt();
        let of = |p: &Product| {
            let weighted = |x: &[f64]| p.row_lengths.iter().zip(x).map(|(l, t)| l * t).sum::<f64>();
            let error = match p.kind {
                Kind::Scores => weighted(scores).min(p.spectral * root(scores)) * p.right_radius,
                Kind::ScoreRows => root(scores) * p.right_radius,
                Kind::Values => (0..probabilities.len())
                    .map(|i| {
                        let length = norms::frobenius(&upstream.row(i));
                        p.spectral
                            * (length * probabilities[i] * p.right_radius
                                + upstream_errors[i] * p.right_length)
                    })
                    .sum(),
                Kind::ValuesByUpstream => (0..probabilities.len())
                    .map(|i| {
                        let length = norms::frobenius(&upstream.row(i));
                        probabilities[i] * p.right_radius * length
                            + p.right_length * upstream_errors[i]
                    })
                    .sum(),
            };
            (p.name.clone(), p.factor.abs() * error)
        };
        self.products.iter().map(of).collect()
    }

    /// The whole chain for a chained gradient, from a uniform error of exp(S - shift) on the
    /// visible pairs.
    ///
    /// Under a causal mask the diagonal chunks are exact, which the bound does not use.
    pub fn propagate<T: Real>(
        &self,
        problem: &AttentionProblem<T>,
        chained: &ChainedGradients<T>,
        exp_error: f64,
    ) -> GradientBound {
        let upstream: Array2<f64> =
            cast(upstream_gradient(problem, &chained.gradients.output).view());
        let output: Array2<f64> = cast(chained.gradients.output.view());
        let inverse: Vec<f64> = chained.inverse_denominators.iter().map(|x| x.widen()).collect();
        let probabilities = self.probability_errors(exp_error, &inverse);
        let output_errors = self.output_errors(&probabilities);
        let upstream_errors = match problem.objective() {
            Objective::Target(_) => output_errors.clone(),
            Objective::UpstreamGradient(_) => vec![0.0; output_errors.len()],
        };
        let scores = self.score_errors(
            &probabilities,
            &upstream_errors,
            &output_errors,
            output.view(),
            upstream.view(),
        );
        let gradients =
            self.gradient_errors(&scores, &probabilities, &upstream_errors, upstream.view());
        let total = gradients.iter().map(|(_, e)| e * e).sum::<f64>().sqrt();
        let names: Vec<&String> = gradients.iter().map(|(n, _)| n).collect();
        let named = chained.gradients.named();
        let norm = named
            .iter()
            .filter(|(n, _)| names.contains(&n))
            .map(|(_, a)| norms::frobenius(&a.view()).powi(2))
            .sum::<f64>()
            .sqrt();
        let relative = if norm > total { total / (norm - total) } else { f64::INFINITY };
        GradientBound {
            exp_error,
            probabilities,
            output: output_errors,
            upstream: upstream_errors,
            scores,
            gradients,
            total,
            relative,
        }
    }
}

/// The certified error of a chained gradient, if its factorization states a bound for exp.
///
/// Holds in exact arithmetic; the rounding of the chain itself is not part of it.
///
/// # Errors
/// Those of [`BoundInputs::new`].
pub fn certified<T: Real>(
    problem: &AttentionProblem<T>,
    chained: &ChainedGradients<T>,
) -> Result<Option<GradientBound>> {
    let Some(exp_error) = chained.certificate.exp_error_bound else { return Ok(None) };
    let projected = problem.project(&mut Cost::default());
    Ok(Some(BoundInputs::new(problem, &projected)?.propagate(problem, chained, exp_error)))
}

fn has_adapters<T: Real>(problem: &AttentionProblem<T>) -> bool {
    problem.adapters().named().iter().any(|(_, a)| a.is_some())
}

/// A right factor that is not one: radius and length 1.
fn identity<T: Real>() -> ArrayView2<'static, T> {
    ArrayView2::from_shape((0, 0), &[]).unwrap_or_else(|_| unreachable!("an empty view"))
}

/// The six gradients of adapters as products (design 2.2, equation (5) of the notes).
fn adapter_products<T: Real>(
    problem: &AttentionProblem<T>,
    projected: &Projected<T>,
    h: &Hidden<T>,
    centred: bool,
    products: &mut Vec<Product>,
) -> Result<()> {
    let adapters = problem.adapters();
    let Qkv { query, key, .. } = &projected.qkv;
    let scaled = problem.beta() * h.scaling;
    let mut add = |name: &str,
                   kind,
                   factor,
                   left: Option<ArrayView2<T>>,
                   right: ArrayView2<T>|
     -> Result<()> {
        products.push(Product::new(name, kind, factor, left, right, centred)?);
        Ok(())
    };
    if let (Some(a), Some(xb)) = (adapters.query, &projected.low_rank_input.query) {
        let z = key.dot(&a.lora_a.t());
        add("dBQ", Kind::Scores, scaled, Some(h.inputs.query.view()), z.view())?;
        add("dAQ", Kind::Scores, scaled, Some(xb.view()), key.view())?;
    }
    if let (Some(a), Some(xb)) = (adapters.key, &projected.low_rank_input.key) {
        let w = query.dot(&a.lora_a.t());
        add("dBK", Kind::Scores, scaled, Some(w.view()), h.inputs.key.view())?;
        add("dAK", Kind::Scores, scaled, Some(query.view()), xb.view())?;
    }
    if let (Some(a), Some(xb)) = (adapters.value, &projected.low_rank_input.value) {
        add("dBV", Kind::Values, h.scaling, Some(a.lora_a.view()), h.inputs.value.view())?;
        add("dAV", Kind::ValuesByUpstream, h.scaling, None, xb.view())?;
    }
    Ok(())
}

impl Product {
    fn new<T: Real>(
        name: &str,
        kind: Kind,
        factor: f64,
        left: Option<ArrayView2<T>>,
        right: ArrayView2<T>,
        centred: bool,
    ) -> Result<Self> {
        let (mut row_lengths, mut spectral) = (Vec::new(), 1.0);
        if let Some(left) = left {
            row_lengths = left.rows().into_iter().map(|row| norms::frobenius(&row)).collect();
            let gram = parallel_transposed_product(left, left, &mut Cost::default());
            // The Gram matrix is rounded in T: room for it, so that the bound stays one.
            let slack = 1.0 + 4.0 * T::epsilon().widen() * left.nrows() as f64;
            let largest = singular_values(cast::<T, f64>(gram.view()).view())?
                .first()
                .copied()
                .unwrap_or(0.0);
            spectral = (largest * slack).sqrt();
        }
        let right: Array2<f64> = cast(right);
        let (right_radius, right_length) = if right.is_empty() {
            (1.0, 1.0)
        } else {
            let about = centre(right.view(), centred);
            (radius(right.view(), &about), norms::max_row_norm(right.view()))
        };
        Ok(Self {
            name: name.into(),
            kind,
            factor,
            row_lengths,
            spectral,
            right_radius,
            right_length,
        })
    }
}

/// The mean row, or zero.
fn centre(a: ArrayView2<f64>, mean: bool) -> Array1<f64> {
    let zero = Array1::zeros(a.ncols());
    if mean { a.mean_axis(Axis(0)).unwrap_or(zero) } else { zero }
}

fn radius(a: ArrayView2<f64>, centre: &Array1<f64>) -> f64 {
    a.rows().into_iter().map(|row| norms::frobenius(&(&row - centre).view())).fold(0.0, f64::max)
}
