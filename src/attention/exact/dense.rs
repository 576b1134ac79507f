//! The readable reference: concrete double precision, textbook order, L x L matrices formed.

use crate::attention::contraction::{half_square, upstream_gradient};
use crate::attention::gradients::{Gradients, Request};
use crate::attention::problem::{AttentionProblem, Mask, Objective, Qkv, SoftmaxKind};
use crate::cost::Cost;
use crate::error::Result;
use ndarray::{Array1, Array2, ArrayView2, Axis};

/// The attention probabilities and every matrix of the backward pass (design 2.1).
#[derive(Debug, Clone)]
#[allow(non_snake_case)] // Names of the equations.
pub struct DenseAttention {
    /// S = beta Q K^T, negative infinity where masked.
    pub S: Array2<f64>,
    /// P = softmax(S).
    pub P: Array2<f64>,
    /// O = P V.
    pub O: Array2<f64>,
    /// G = dL/dO.
    pub G: Array2<f64>,
    /// dS = P o (G V^T - delta).
    pub dS: Array2<f64>,
}

/// P = softmax(S) by rows; `S` may hold negative infinity.
///
/// ```
/// use ndarray::array;
/// use peft_limits::attention::{SoftmaxKind, exact::dense::softmax};
/// let scores = array![[1f64.ln(), 2f64.ln(), 5f64.ln()]];
/// let standard = softmax(&scores, SoftmaxKind::Standard);
/// assert!((standard[[0, 1]] - 2.0 / 8.0).abs() < 1e-15);
/// let one = softmax(&scores, SoftmaxKind::One);
/// assert!((one[[0, 1]] - 2.0 / 9.0).abs() < 1e-15);
/// ```
#[allow(non_snake_case)]
pub fn softmax(S: &Array2<f64>, kind: SoftmaxKind) -> Array2<f64> {
    let mut P = S.clone();
    for mut row in P.rows_mut() {
        // `One` is `Standard` with one more score, 0, whose probability is dropped.
        let floor = if kind == SoftmaxKind::One { 0.0 } else { f64::NEG_INFINITY };
        let m = row.fold(floor, |m, &x| m.max(x));
        row.mapv_inplace(|x| (x - m).exp());
        let extra = if kind == SoftmaxKind::One { (-m).exp() } else { 0.0 };
        let sum = row.sum() + extra;
        row.mapv_inplace(|x| x / sum);
    }
    P
}

/// Every matrix of the forward and backward pass, from Q, K, V.
#[allow(non_snake_case)]
pub fn matrices(problem: &AttentionProblem<f64>, qkv: &Qkv<Array2<f64>>) -> DenseAttention {
    let Qkv { query: Q, key: K, value: V } = qkv;
    let mut S = Q.dot(&K.t()) * problem.beta();
    if problem.mask() == Mask::Causal {
        for i in 0..S.nrows() {
            for j in i + 1..S.ncols() {
                S[[i, j]] = f64::NEG_INFINITY;
            }
        }
    }
    let P = softmax(&S, problem.softmax());
    let O = P.dot(V);
    let G = upstream_gradient(problem, &O);
    let T = &P * &G.dot(&V.t());
    let delta: Array1<f64> = (&G * &O).sum_axis(Axis(1));
    let dS = &T - &(&P * &delta.insert_axis(Axis(1)));
    DenseAttention { S, P, O, G, dS }
}

/// Exact gradients, textbook order. O(L_q L_k d) operations, O(L_q L_k) memory.
///
/// # Errors
/// None today: a checked problem always has a gradient. `Result` is the shared signature.
#[allow(non_snake_case)]
pub fn gradients(problem: &AttentionProblem<f64>, request: Request) -> Result<Gradients<f64>> {
    let mut cost = Cost::default();
    let projected = problem.project(&mut cost);
    let Qkv { query: Q, key: K, value: V } = &projected.qkv;
    let (L_q, L_k, d, d_v) = (Q.nrows(), K.nrows(), Q.ncols(), V.ncols());
    let beta = problem.beta();
    let all = matrices(problem, &projected.qkv);
    for _ in 0..5 {
        cost.hold(L_q * L_k); // S, P, G V^T, T, dS
    }
    for (m, k, n) in [
        (L_q, d, L_k),
        (L_q, L_k, d_v),
        (L_q, d_v, L_k),
        (L_q, L_k, d),
        (L_k, L_q, d),
        (L_k, L_q, d_v),
    ] {
        cost.product(m, k, n);
    }
    cost.exponentials += (L_q * L_k) as u64;
    cost.elementwise += 5 * (L_q * L_k) as u64;
    let DenseAttention { P, O, G, dS, .. } = all;
    let dQ = dS.dot(K) * beta;
    let dK = dS.t().dot(Q) * beta;
    let dV = P.t().dot(&G);
    let loss = matches!(problem.objective(), Objective::Target(_)).then(|| half_square(&G));
    let mut gradients = Gradients {
        output: O,
        loss,
        projected: Qkv::default(),
        weight: Qkv::default(),
        lora_a: Qkv::default(),
        lora_b: Qkv::default(),
        cost: Cost::default(),
    };
    if let Some(hidden) = problem.hidden() {
        let mut one = |X: ArrayView2<f64>,
                       dP: &Array2<f64>,
                       p: &crate::attention::problem::Projection<f64>| {
            let dW = X.t().dot(dP);
            cost.product(X.ncols(), X.nrows(), dP.ncols());
            let (dA, dB) = p
                .adapter
                .as_ref()
                .map(|a| {
                    (a.lora_b.t().dot(&dW) * hidden.scaling, dW.dot(&a.lora_a.t()) * hidden.scaling)
                })
                .unzip();
            ((request == Request::All).then_some(dW), dA, dB)
        };
        let q = one(hidden.inputs.query.view(), &dQ, &hidden.projections.query);
        let k = one(hidden.inputs.key.view(), &dK, &hidden.projections.key);
        let v = one(hidden.inputs.value.view(), &dV, &hidden.projections.value);
        gradients.weight = Qkv { query: q.0, key: k.0, value: v.0 };
        gradients.lora_a = Qkv { query: q.1, key: k.1, value: v.1 };
        gradients.lora_b = Qkv { query: q.2, key: k.2, value: v.2 };
    }
    if request == Request::All {
        gradients.projected = Qkv { query: Some(dQ), key: Some(dK), value: Some(dV) };
    }
    gradients.cost = cost;
    Ok(gradients)
}
