//! One head on a device: what is uploaded, its projections, and the gradients made from products
//! with dS and P.
//!
//! The device's counterpart of [`crate::attention::contraction`], with the same factors and
//! equations: with s = alpha / r,
//!
//! ```text
//! dB_Q = beta s X_Q^T [dS (K A_Q^T)]       dA_Q = beta s [dS^T (X_Q B_Q)]^T K
//! dB_K = beta s X_K^T [dS^T (Q A_K^T)]     dA_K = beta s [dS (X_K B_K)]^T Q
//! dB_V =      s X_V^T [P^T (G A_V^T)]      dA_V =      s [P (X_V B_V)]^T G
//! ```

use crate::attention::contraction::half_square;
use crate::attention::problem::{Objective, Source};
use crate::attention::{AttentionProblem, Gradients, Qkv, Request};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::gpu::{Engine, Opened, Precision};
use crate::linalg::Real;
use burn::tensor::Tensor;
use ndarray::Array2;

/// A matrix on the device.
pub(super) type Matrix<B> = Tensor<B, 2>;

/// Products that count themselves.
pub(super) struct Counted {
    pub precision: Precision,
    pub cost: Cost,
}

impl Counted {
    /// `a b`.
    pub fn product<B: Engine>(&mut self, a: Matrix<B>, b: Matrix<B>) -> Matrix<B> {
        let ([m, k], [_, n]) = (a.dims(), b.dims());
        self.cost.product(m, k, n);
        B::product(a, b, self.precision)
    }

    /// `a^T b`.
    pub fn transposed_product<B: Engine>(&mut self, a: Matrix<B>, b: Matrix<B>) -> Matrix<B> {
        self.product(a.transpose(), b)
    }
}

/// A and B of one projection, and X B.
#[derive(Clone)]
struct LowRank<B: Engine> {
    lora_a: Matrix<B>,
    lora_b: Matrix<B>,
    input: Matrix<B>,
}

/// A head with Q, K, V made on the device.
pub(super) struct Head<B: Engine> {
    pub query: Matrix<B>,
    pub key: Matrix<B>,
    pub value: Matrix<B>,
    /// Y or G.
    pub objective: Matrix<B>,
    pub is_target: bool,
    pub beta: f64,
    scaling: f64,
    inputs: Option<Qkv<Matrix<B>>>,
    low_rank: Qkv<Option<LowRank<B>>>,
    /// A_V is wanted only for adapters, all of dV otherwise.
    request: Request,
}

/// Factors that do not depend on the upstream gradient; `None` where a request needs no column.
pub(super) struct Factors<B: Engine> {
    /// Z of dS Z, `L_k x m`.
    pub score_right: Option<Matrix<B>>,
    /// W of dS^T W, `L_q x m`.
    pub score_left: Option<Matrix<B>>,
    /// R of P R, `L_k x r`.
    pub value_right: Option<Matrix<B>>,
}

/// The products themselves.
pub(super) struct Products<B: Engine> {
    pub output: Matrix<B>,
    pub upstream: Matrix<B>,
    pub value_right: Option<Matrix<B>>,
    pub score_right: Option<Matrix<B>>,
    pub score_left: Option<Matrix<B>>,
    pub value_left: Option<Matrix<B>>,
}

impl<B: Engine> Head<B> {
    /// Uploads a head and projects it.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for [`Request::Adapters`] without adapters; [`Error::TooLarge`].
    pub fn new<T: Real>(
        on: &Opened<B>,
        problem: &AttentionProblem<T>,
        request: Request,
        count: &mut Counted,
    ) -> Result<Self> {
        let adapters = problem.adapters();
        let any = adapters.query.is_some() || adapters.key.is_some() || adapters.value.is_some();
        if request == Request::Adapters && !any {
            return Err(Error::invalid(
                "request",
                "Adapters",
                "the head has no adapter; ask for all gradients",
            ));
        }
        let objective = problem.objective();
        let head = |query, key, value, inputs, low_rank, scaling| -> Result<Self> {
            Ok(Self {
                query,
                key,
                value,
                objective: on.upload(objective.tensor_name(), objective.tensor().view())?,
                is_target: matches!(objective, Objective::Target(_)),
                beta: problem.beta(),
                scaling,
                inputs,
                low_rank,
                request,
            })
        };
        let hidden = match problem.source() {
            Source::Projected(qkv) => {
                let sent = qkv.try_map(|letter, a| on.upload(&letter.to_string(), a.view()))?;
                return head(sent.query, sent.key, sent.value, None, Qkv::default(), 1.0);
            }
            Source::Hidden(hidden) => hidden,
        };
        // Self-attention sends its hidden states once.
        let query = on.upload("XQ", hidden.inputs.query.view())?;
        let inputs = hidden.inputs.try_map(|letter, x| {
            match x.as_ptr() == hidden.inputs.query.as_ptr() {
                true => Ok(query.clone()),
                false => on.upload(&format!("X{letter}"), x.view()),
            }
        })?;
        let low_rank = hidden.projections.try_map(|letter, p| {
            let Some(adapter) = &p.adapter else { return Ok(None) };
            let lora_a = on.upload(&format!("A{letter}"), adapter.lora_a.view())?;
            let lora_b = on.upload(&format!("B{letter}"), adapter.lora_b.view())?;
            let input = count.product(inputs.letter(letter).clone(), lora_b.clone());
            Ok(Some(LowRank { lora_a, lora_b, input }))
        })?;
        let projected = hidden.projections.try_map(|letter, p| {
            let weight = on.upload(&format!("W{letter}"), p.weight.view())?;
            let frozen = count.product(inputs.letter(letter).clone(), weight);
            Ok(match low_rank.letter(letter) {
                Some(a) => {
                    frozen + count.product(a.input.clone(), a.lora_a.clone()) * hidden.scaling
                }
                None => frozen,
            })
        })?;
        head(
            projected.query,
            projected.key,
            projected.value,
            Some(inputs),
            low_rank,
            hidden.scaling,
        )
    }

    /// Chooses and forms the factors.
    pub fn factors(&self, count: &mut Counted) -> Factors<B> {
        if self.request == Request::All {
            return Factors {
                score_right: Some(self.key.clone()),
                score_left: Some(self.query.clone()),
                value_right: None,
            };
        }
        let Qkv { query, key, value } = &self.low_rank;
        let mut times_a = |x: &Matrix<B>, a: &Option<LowRank<B>>| {
            a.as_ref().map(|a| count.product(x.clone(), a.lora_a.clone().transpose()))
        };
        let (key_by_a, query_by_a) = (times_a(&self.key, query), times_a(&self.query, key));
        let input = |a: &Option<LowRank<B>>| a.as_ref().map(|a| a.input.clone());
        Factors {
            score_right: side_by_side([key_by_a, input(key)]),
            score_left: side_by_side([input(query), query_by_a]),
            value_right: input(value),
        }
    }

    /// Columns of N.
    pub fn value_left_width(&self) -> usize {
        match (self.request, &self.low_rank.value) {
            (Request::All, _) => self.value.dims()[1],
            (Request::Adapters, adapter) => adapter.as_ref().map_or(0, |a| a.lora_a.dims()[0]),
        }
    }

    /// N of P^T N: G itself, or G A_V^T.
    pub fn value_left(&self, upstream: &Matrix<B>, count: &mut Counted) -> Option<Matrix<B>> {
        match (self.request, &self.low_rank.value) {
            (Request::All, _) => Some(upstream.clone()),
            (Request::Adapters, Some(a)) => {
                Some(count.product(upstream.clone(), a.lora_a.clone().transpose()))
            }
            (Request::Adapters, None) => None,
        }
    }

    /// G for rows of the output: O - Y, or the rows of the G that was given.
    pub fn upstream(&self, output: &Matrix<B>, rows: std::ops::Range<usize>) -> Matrix<B> {
        let given = rows_of(&self.objective, rows);
        if self.is_target { output.clone() - given } else { given }
    }

    /// The gradients from the products, copied back.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn finish(
        &self,
        on: &Opened<B>,
        products: Products<B>,
        mut count: Counted,
    ) -> Result<Gradients<f32>> {
        let Products { output, upstream, value_right, score_right, score_left, value_left } =
            products;
        let scaled = |t: Option<Matrix<B>>| t.map(|t| t * self.beta);
        let (score_right, score_left) = (scaled(score_right), scaled(score_left));
        let (mut weight, mut lora_a, mut lora_b) = (Qkv::default(), Qkv::default(), Qkv::default());
        let mut projected = Qkv::default();
        let Qkv { query, key, value } = &self.low_rank;
        match (self.request, &self.inputs) {
            (Request::All, inputs) => {
                let all = Qkv { query: score_right, key: score_left, value: value_left };
                if let Some(inputs) = inputs {
                    weight = all.try_map(|letter, d| {
                        let x = inputs.letter(letter).clone();
                        Ok(d.clone().map(|d| count.transposed_product(x, d)))
                    })?;
                    let mut factor = |letter: char, of_a: bool| {
                        let (Some(a), Some(dw)) =
                            (self.low_rank.letter(letter), weight.letter(letter))
                        else {
                            return None;
                        };
                        Some(match of_a {
                            true => {
                                count.transposed_product(a.lora_b.clone(), dw.clone())
                                    * self.scaling
                            }
                            false => {
                                count.product(dw.clone(), a.lora_a.clone().transpose())
                                    * self.scaling
                            }
                        })
                    };
                    lora_a = Qkv {
                        query: factor('Q', true),
                        key: factor('K', true),
                        value: factor('V', true),
                    };
                    lora_b = Qkv {
                        query: factor('Q', false),
                        key: factor('K', false),
                        value: factor('V', false),
                    };
                }
                projected = all;
            }
            (Request::Adapters, Some(x)) => {
                let rank = |a: &Option<LowRank<B>>| a.as_ref().map_or(0, |a| a.lora_a.dims()[0]);
                let (rq, rk) = (rank(query), rank(key));
                let mut of =
                    |a: Matrix<B>, b: Matrix<B>| count.transposed_product(a, b) * self.scaling;
                if let (Some(right), Some(left)) = (&score_right, &score_left) {
                    if rq > 0 {
                        lora_b.query = Some(of(x.query.clone(), right.clone().narrow(1, 0, rq)));
                        lora_a.query = Some(of(left.clone().narrow(1, 0, rq), self.key.clone()));
                    }
                    if rk > 0 {
                        lora_b.key = Some(of(x.key.clone(), left.clone().narrow(1, rq, rk)));
                        lora_a.key = Some(of(right.clone().narrow(1, rq, rk), self.query.clone()));
                    }
                }
                if let (Some(left), Some(right), Some(_)) = (value_left, value_right, value) {
                    lora_b.value = Some(of(x.value.clone(), left));
                    lora_a.value = Some(of(right, upstream.clone()));
                }
            }
            (Request::Adapters, None) => {}
        }
        let back = |set: Qkv<Option<Matrix<B>>>| -> Result<Qkv<Option<Array2<f32>>>> {
            set.try_map(|_, t| t.clone().map(|t| on.download(t)).transpose())
        };
        let loss = if self.is_target { Some(half_square(&on.download(upstream)?)) } else { None };
        Ok(Gradients {
            output: on.download(output)?,
            loss,
            projected: back(projected)?,
            weight: back(weight)?,
            lora_a: back(lora_a)?,
            lora_b: back(lora_b)?,
            cost: count.cost,
        })
    }
}

/// Rows of a matrix.
pub(super) fn rows_of<B: Engine>(a: &Matrix<B>, rows: std::ops::Range<usize>) -> Matrix<B> {
    a.clone().narrow(0, rows.start, rows.len())
}

/// Those that are there, beside one another.
pub(super) fn side_by_side<B: Engine>(
    parts: impl IntoIterator<Item = Option<Matrix<B>>>,
) -> Option<Matrix<B>> {
    let mut parts: Vec<Matrix<B>> = parts.into_iter().flatten().collect();
    match parts.len() {
        0 | 1 => parts.pop(),
        _ => Some(Tensor::cat(parts, 1)),
    }
}

/// Those that are there, below one another; all are there or none.
pub(super) fn stacked<B: Engine>(parts: Vec<Option<Matrix<B>>>) -> Option<Matrix<B>> {
    let mut parts: Vec<Matrix<B>> = parts.into_iter().flatten().collect();
    match parts.len() {
        0 | 1 => parts.pop(),
        _ => Some(Tensor::cat(parts, 0)),
    }
}
