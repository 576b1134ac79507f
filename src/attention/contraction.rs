//! The products with dS and P that a request needs, and the gradients made from them.
//!
//! LoRA makes every one of them r columns wide (design 2.2): with s = alpha / r,
//!
//! ```text
//! dB_Q = beta s X_Q^T [dS (K A_Q^T)]       dA_Q = beta s [dS^T (X_Q B_Q)]^T K
//! dB_K = beta s X_K^T [dS^T (Q A_K^T)]     dA_K = beta s [dS (X_K B_K)]^T Q
//! dB_V =      s X_V^T [P^T (G A_V^T)]      dA_V =      s [P (X_V B_V)]^T G
//! ```
//!
//! For [`Request::All`] the brackets are dS K, dS^T Q and P^T G, that is dQ, dK and dV up to beta.
//! The streaming and the chained gradients differ only in how they multiply by dS and P.

use super::gradients::{Gradients, Request};
use super::problem::{AttentionProblem, Objective, Projected, Qkv};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::gemm::{parallel_product, parallel_transposed_product};
use ndarray::{Array2, ArrayView2, s};

/// Right and left factors that do not depend on the upstream gradient.
#[derive(Debug)]
pub struct Contraction<T> {
    request: Request,
    /// Z of dS Z, `L_k x m`: K, or the needed ones of K A_Q^T and X_K B_K side by side.
    pub score_right: Array2<T>,
    /// W of dS^T W, `L_q x m`: Q, or the needed ones of X_Q B_Q and Q A_K^T side by side.
    pub score_left: Array2<T>,
    /// R of P R, `L_k x m`: X_V B_V, or no column.
    pub value_right: Array2<T>,
    /// Columns of `score_right` and `score_left` that belong to the query adapter.
    query_rank: usize,
    key_rank: usize,
}

/// The products themselves.
#[derive(Debug)]
pub struct Products<T> {
    /// O = P V.
    pub output: Array2<T>,
    /// P R.
    pub value_right: Array2<T>,
    /// dS Z.
    pub score_right: Array2<T>,
    /// dS^T W.
    pub score_left: Array2<T>,
    /// P^T N with N from [`Contraction::value_left`].
    pub value_left: Array2<T>,
}

impl<T: Real> Contraction<T> {
    /// Chooses and forms the factors.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for [`Request::Adapters`] on a problem without adapters.
    pub fn new(
        problem: &AttentionProblem<T>,
        projected: &Projected<T>,
        request: Request,
        cost: &mut Cost,
    ) -> Result<Self> {
        let Qkv { query, key, value } = &projected.qkv;
        let none = |rows: usize| Array2::zeros((rows, 0));
        if request == Request::All {
            return Ok(Self {
                request,
                score_right: key.clone(),
                score_left: query.clone(),
                value_right: none(value.nrows()),
                query_rank: 0,
                key_rank: 0,
            });
        }
        let adapters = problem.adapters();
        if adapters.query.is_none() && adapters.key.is_none() && adapters.value.is_none() {
            return Err(Error::invalid(
                "request",
                "Adapters",
                "the head has no adapter; ask for all gradients",
            ));
        }
        let low_rank = |p: &Option<Array2<T>>, rows: usize| p.clone().unwrap_or_else(|| none(rows));
        let mut times_a = |x: &Array2<T>, a: Option<&super::problem::Adapter<T>>| match a {
            Some(a) => parallel_product(x.view(), a.lora_a.t(), cost),
            None => none(x.nrows()),
        };
        let key_by_a = times_a(key, adapters.query);
        let query_by_a = times_a(query, adapters.key);
        let xb_q = low_rank(&projected.low_rank_input.query, query.nrows());
        let xb_k = low_rank(&projected.low_rank_input.key, key.nrows());
        let contraction = Self {
            request,
            query_rank: key_by_a.ncols(),
            key_rank: query_by_a.ncols(),
            score_right: side_by_side(key_by_a.view(), xb_k.view()),
            score_left: side_by_side(xb_q.view(), query_by_a.view()),
            value_right: low_rank(&projected.low_rank_input.value, value.nrows()),
        };
        cost.hold(contraction.score_right.len() + contraction.score_left.len());
        Ok(contraction)
    }

    /// Columns of N in P^T N.
    pub fn value_left_width(&self, problem: &AttentionProblem<T>) -> usize {
        match self.request {
            Request::All => problem.value_dim(),
            Request::Adapters => problem.adapters().value.map_or(0, |a| a.lora_a.nrows()),
        }
    }

    /// N of P^T N for rows of the upstream gradient: G itself, or G A_V^T.
    pub fn value_left(
        &self,
        problem: &AttentionProblem<T>,
        upstream: ArrayView2<T>,
        cost: &mut Cost,
    ) -> Array2<T> {
        match (self.request, problem.adapters().value) {
            (Request::All, _) => upstream.to_owned(),
            (Request::Adapters, Some(a)) => parallel_product(upstream, a.lora_a.t(), cost),
            (Request::Adapters, None) => Array2::zeros((upstream.nrows(), 0)),
        }
    }

    /// The gradients from the products; `cost` is everything counted so far.
    pub fn finish(
        &self,
        problem: &AttentionProblem<T>,
        projected: &Projected<T>,
        upstream: &Array2<T>,
        mut products: Products<T>,
        mut cost: Cost,
    ) -> Gradients<T> {
        let beta = T::of(problem.beta());
        let loss = match problem.objective() {
            Objective::Target(_) => Some(half_square(upstream)),
            Objective::UpstreamGradient(_) => None,
        };
        let mut gradients = Gradients {
            output: products.output,
            loss,
            projected: Qkv::default(),
            weight: Qkv::default(),
            lora_a: Qkv::default(),
            lora_b: Qkv::default(),
            cost: Cost::default(),
        };
        products.score_right.mapv_inplace(|x| x * beta);
        products.score_left.mapv_inplace(|x| x * beta);
        let adapters = problem.adapters();
        match (self.request, problem.hidden()) {
            (Request::All, hidden) => {
                if let Some(h) = hidden {
                    let scaling = T::of(h.scaling);
                    let mut one =
                        |x: ArrayView2<T>,
                         d: &Array2<T>,
                         a: Option<&super::problem::Adapter<T>>| {
                            let dw = parallel_transposed_product(x, d.view(), &mut cost);
                            let factors = a.map(|a| {
                                let da =
                                    parallel_product(a.lora_b.t(), dw.view(), &mut cost) * scaling;
                                let db =
                                    parallel_product(dw.view(), a.lora_a.t(), &mut cost) * scaling;
                                (da, db)
                            });
                            let (da, db) = factors.unzip();
                            (Some(dw), da, db)
                        };
                    let q = one(h.inputs.query.view(), &products.score_right, adapters.query);
                    let k = one(h.inputs.key.view(), &products.score_left, adapters.key);
                    let v = one(h.inputs.value.view(), &products.value_left, adapters.value);
                    gradients.weight = Qkv { query: q.0, key: k.0, value: v.0 };
                    gradients.lora_a = Qkv { query: q.1, key: k.1, value: v.1 };
                    gradients.lora_b = Qkv { query: q.2, key: k.2, value: v.2 };
                }
                gradients.projected = Qkv {
                    query: Some(products.score_right),
                    key: Some(products.score_left),
                    value: Some(products.value_left),
                };
            }
            (Request::Adapters, Some(h)) => {
                let scaling = T::of(h.scaling);
                let mut transposed = |a: ArrayView2<T>, b: ArrayView2<T>| {
                    parallel_transposed_product(a, b, &mut cost) * scaling
                };
                let (rq, rk) = (self.query_rank, self.key_rank);
                let Qkv { query, key, .. } = &projected.qkv;
                if adapters.query.is_some() {
                    gradients.lora_b.query = Some(transposed(
                        h.inputs.query.view(),
                        products.score_right.slice(s![.., ..rq]),
                    ));
                    gradients.lora_a.query =
                        Some(transposed(products.score_left.slice(s![.., ..rq]), key.view()));
                }
                if adapters.key.is_some() {
                    gradients.lora_b.key = Some(transposed(
                        h.inputs.key.view(),
                        products.score_left.slice(s![.., rq..rq + rk]),
                    ));
                    gradients.lora_a.key = Some(transposed(
                        products.score_right.slice(s![.., rq..rq + rk]),
                        query.view(),
                    ));
                }
                if adapters.value.is_some() {
                    gradients.lora_b.value =
                        Some(transposed(h.inputs.value.view(), products.value_left.view()));
                    gradients.lora_a.value =
                        Some(transposed(products.value_right.view(), upstream.view()));
                }
            }
            (Request::Adapters, None) => {}
        }
        gradients.cost = cost;
        gradients
    }
}

/// [a | b], row-major (ndarray's `concatenate` would lay the columns out one after the other).
pub fn side_by_side<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>) -> Array2<T> {
    let mut out = Array2::zeros((a.nrows(), a.ncols() + b.ncols()));
    out.slice_mut(s![.., ..a.ncols()]).assign(&a);
    out.slice_mut(s![.., a.ncols()..]).assign(&b);
    out
}

/// Upstream gradient G: O - Y for a target, or the one given.
pub fn upstream_gradient<T: Real>(problem: &AttentionProblem<T>, output: &Array2<T>) -> Array2<T> {
    match problem.objective() {
        Objective::Target(y) => output - y,
        Objective::UpstreamGradient(g) => g.clone(),
    }
}

/// 1/2 ||a||_F^2 in double precision.
pub fn half_square<T: Real>(a: &Array2<T>) -> f64 {
    0.5 * a.iter().map(|x| x.widen() * x.widen()).sum::<f64>()
}
