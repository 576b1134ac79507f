//! One adapted attention head: inputs, weights, adapters, mask, softmax and objective, checked
//! once.

use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::gemm::{multiply, parallel_product};
use crate::linalg::{Real, norms};
use ndarray::{ArcArray2, Array2, ArrayView2};

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Every key.
    Full,
    /// Key j is visible to query i when j <= i; needs as many keys as queries.
    Causal,
}

/// How scores become probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SoftmaxKind {
    /// exp(s_ij) / sum_j exp(s_ij).
    Standard,
    /// exp(s_ij) / (1 + sum_j exp(s_ij)): the outlier-free variant of \[CL-LoRA\]'s experiments.
    One,
}

/// One value for each of query, key and value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Qkv<X> {
    /// For the query projection.
    pub query: X,
    /// For the key projection.
    pub key: X,
    /// For the value projection.
    pub value: X,
}

impl<X> Qkv<X> {
    /// The three values with the letters Q, K, V used in tensor names.
    pub fn named(&self) -> [(char, &X); 3] {
        [('Q', &self.query), ('K', &self.key), ('V', &self.value)]
    }

    /// The value of a letter Q, K or V.
    pub fn letter(&self, letter: char) -> &X {
        match letter {
            'Q' => &self.query,
            'K' => &self.key,
            _ => &self.value,
        }
    }

    /// Applies a fallible function to each with its letter.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<Y>(&self, mut f: impl FnMut(char, &X) -> Result<Y>) -> Result<Qkv<Y>> {
        Ok(Qkv {
            query: f('Q', &self.query)?,
            key: f('K', &self.key)?,
            value: f('V', &self.value)?,
        })
    }
}

/// What the gradient is taken of.
#[derive(Debug, Clone)]
pub enum Objective<T> {
    /// loss = 1/2 ||O - Y||_F^2 with this Y, `L_q x d_v`.
    Target(Array2<T>),
    /// A given upstream gradient G = dL/dO, `L_q x d_v`.
    UpstreamGradient(Array2<T>),
}

impl<T> Objective<T> {
    /// The name of its tensor in files and messages: Y or G.
    pub fn tensor_name(&self) -> &'static str {
        match self {
            Objective::Target(_) => "Y",
            Objective::UpstreamGradient(_) => "G",
        }
    }

    /// Its tensor.
    pub fn tensor(&self) -> &Array2<T> {
        match self {
            Objective::Target(a) | Objective::UpstreamGradient(a) => a,
        }
    }
}

/// LoRA factors of one projection: the update of W is (alpha / r) `lora_b` `lora_a`.
///
/// Row-vector convention (design 2.1): `lora_b` is `d_in x r`, `lora_a` is `r x d_h`.
#[derive(Debug, Clone)]
pub struct Adapter<T> {
    /// A, `r x d_h`.
    pub lora_a: Array2<T>,
    /// B, `d_in x r`.
    pub lora_b: Array2<T>,
}

/// One projection: W*, frozen or not, with an optional adapter.
#[derive(Debug, Clone)]
pub struct Projection<T> {
    /// W*, `d_in x d_h`.
    pub weight: Array2<T>,
    /// The adapter, if this projection has one.
    pub adapter: Option<Adapter<T>>,
}

/// Hidden states and projections that make Q, K and V.
#[derive(Debug, Clone)]
pub struct Hidden<T> {
    /// X_Q, X_K, X_V (`L x d_in`); the same array three times for self-attention.
    pub inputs: Qkv<ArcArray2<T>>,
    /// The three projections.
    pub projections: Qkv<Projection<T>>,
    /// alpha / r.
    pub scaling: f64,
}

/// Where Q, K and V come from.
#[derive(Debug, Clone)]
pub enum Source<T> {
    /// Given as they enter the softmax (for instance after rotary embedding).
    Projected(Qkv<Array2<T>>),
    /// Made from hidden states.
    Hidden(Box<Hidden<T>>),
}

/// A checked attention head with its objective (design 2.1).
#[derive(Debug, Clone)]
pub struct AttentionProblem<T> {
    source: Source<T>,
    objective: Objective<T>,
    mask: Mask,
    softmax: SoftmaxKind,
    beta: f64,
}

/// Q, K, V and, for adapted projections, X_p B_p.
#[derive(Debug, Clone)]
pub struct Projected<T> {
    /// Q, K, V.
    pub qkv: Qkv<Array2<T>>,
    /// X_p B_p, `L x r`, where p is adapted.
    pub low_rank_input: Qkv<Option<Array2<T>>>,
}

const OP: &str = "AttentionProblem::new";

impl<T: Real> AttentionProblem<T> {
    /// Checks every shape, range and entry once.
    ///
    /// `beta` multiplies Q K^T: 1/sqrt(d_h) in transformers, 1/d in the theory.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] naming the tensor (X, WQ, AQ, ..., Y or G), [`Error::InvalidParam`]
    /// for an empty sequence, rank 0, rank above the width, a beta or scaling that is not finite,
    /// or a causal mask with unequal lengths, [`Error::NonFinite`] for NaN or infinity.
    pub fn new(
        source: Source<T>,
        objective: Objective<T>,
        mask: Mask,
        softmax: SoftmaxKind,
        beta: f64,
    ) -> Result<Self> {
        if !(beta.is_finite() && beta > 0.0) {
            return Err(Error::invalid("beta", beta, "must be positive and finite"));
        }
        let (queries, keys, width_v) = match &source {
            Source::Projected(qkv) => check_projected(qkv)?,
            Source::Hidden(hidden) => check_hidden(hidden)?,
        };
        if queries == 0 || keys == 0 {
            let side = if queries == 0 { 'Q' } else { 'K' };
            let tensor = if matches!(source, Source::Projected(_)) { "" } else { "X" };
            return Err(Error::invalid(format!("rows of {tensor}{side}"), 0, "must be at least 1"));
        }
        if mask == Mask::Causal && queries != keys {
            return Err(Error::invalid(
                "causal",
                format!("{queries} queries, {keys} keys"),
                "a causal mask needs as many keys as queries",
            ));
        }
        let name = objective.tensor_name();
        let got = objective.tensor().dim();
        if got != (queries, width_v) {
            return Err(Error::shape(OP, name, (queries, width_v), got));
        }
        norms::require_finite(OP, name, &objective.tensor().view())?;
        Ok(Self { source, objective, mask, softmax, beta })
    }

    /// Where Q, K and V come from.
    pub fn source(&self) -> &Source<T> {
        &self.source
    }

    /// The hidden states and projections, unless Q, K, V were given.
    pub fn hidden(&self) -> Option<&Hidden<T>> {
        match &self.source {
            Source::Hidden(h) => Some(h),
            Source::Projected(_) => None,
        }
    }

    /// What the gradient is taken of.
    pub fn objective(&self) -> &Objective<T> {
        &self.objective
    }

    /// The mask.
    pub fn mask(&self) -> Mask {
        self.mask
    }

    /// The softmax kind.
    pub fn softmax(&self) -> SoftmaxKind {
        self.softmax
    }

    /// The factor of Q K^T.
    pub fn beta(&self) -> f64 {
        self.beta
    }

    /// Number of queries L_q.
    pub fn num_queries(&self) -> usize {
        self.objective.tensor().nrows()
    }

    /// Number of keys L_k.
    pub fn num_keys(&self) -> usize {
        match &self.source {
            Source::Projected(qkv) => qkv.key.nrows(),
            Source::Hidden(h) => h.inputs.key.nrows(),
        }
    }

    /// Width of a query and a key, d_h.
    pub fn head_dim(&self) -> usize {
        match &self.source {
            Source::Projected(qkv) => qkv.query.ncols(),
            Source::Hidden(h) => h.projections.query.weight.ncols(),
        }
    }

    /// Width of a value, d_v.
    pub fn value_dim(&self) -> usize {
        self.objective.tensor().ncols()
    }

    /// The adapter of each projection that has one.
    pub fn adapters(&self) -> Qkv<Option<&Adapter<T>>> {
        match self.hidden() {
            Some(h) => Qkv {
                query: h.projections.query.adapter.as_ref(),
                key: h.projections.key.adapter.as_ref(),
                value: h.projections.value.adapter.as_ref(),
            },
            None => Qkv::default(),
        }
    }

    /// Lets `update` change the entries of AQ, BQ, AK, ... in place, in row-major order.
    ///
    /// # Errors
    /// That of `update`; [`Error::NonFinite`] if an entry is no longer finite.
    pub fn update_adapters(
        &mut self,
        mut update: impl FnMut(&str, &mut [T]) -> Result<()>,
    ) -> Result<()> {
        let Source::Hidden(hidden) = &mut self.source else { return Ok(()) };
        let Qkv { query, key, value } = &mut hidden.projections;
        for (letter, projection) in [('Q', query), ('K', key), ('V', value)] {
            let Some(adapter) = &mut projection.adapter else { continue };
            for (factor, matrix) in [('A', &mut adapter.lora_a), ('B', &mut adapter.lora_b)] {
                let name = format!("{factor}{letter}");
                if !matrix.is_standard_layout() {
                    *matrix = matrix.as_standard_layout().into_owned();
                }
                let Some(entries) = matrix.as_slice_mut() else {
                    return Err(Error::invalid(
                        name,
                        "strided",
                        "an adapter is updated as a row-major matrix",
                    ));
                };
                update(&name, entries)?;
                norms::require_finite("update_adapters", &name, &matrix.view())?;
            }
        }
        Ok(())
    }

    /// Q, K, V by Q = X W* + (alpha/r) (X B) A, without forming B A.
    pub fn project(&self, cost: &mut Cost) -> Projected<T> {
        match &self.source {
            Source::Projected(qkv) => {
                Projected { qkv: qkv.clone(), low_rank_input: Qkv::default() }
            }
            Source::Hidden(h) => {
                let scaling = T::of(h.scaling);
                let mut one = |x: &ArcArray2<T>, p: &Projection<T>| {
                    let mut out = parallel_product(x.view(), p.weight.view(), cost);
                    cost.hold(out.len());
                    let low_rank = p.adapter.as_ref().map(|a| {
                        let xb = parallel_product(x.view(), a.lora_b.view(), cost);
                        cost.hold(xb.len());
                        cost.product(xb.nrows(), xb.ncols(), out.ncols());
                        multiply(
                            scaling,
                            &xb.view(),
                            &a.lora_a.view(),
                            T::one(),
                            &mut out.view_mut(),
                        );
                        xb
                    });
                    (out, low_rank)
                };
                let (query, xb_q) = one(&h.inputs.query, &h.projections.query);
                let (key, xb_k) = one(&h.inputs.key, &h.projections.key);
                let (value, xb_v) = one(&h.inputs.value, &h.projections.value);
                Projected {
                    qkv: Qkv { query, key, value },
                    low_rank_input: Qkv { query: xb_q, key: xb_k, value: xb_v },
                }
            }
        }
    }

    /// The same problem in another precision.
    pub fn cast<U: Real>(&self) -> AttentionProblem<U> {
        let m = |a: &Array2<T>| crate::linalg::real::cast::<T, U>(a.view());
        let source = match &self.source {
            Source::Projected(q) => {
                Source::Projected(Qkv { query: m(&q.query), key: m(&q.key), value: m(&q.value) })
            }
            Source::Hidden(h) => {
                let query = crate::linalg::real::cast::<T, U>(h.inputs.query.view()).into_shared();
                let shared = |other: &ArcArray2<T>| {
                    if other.as_ptr() == h.inputs.query.as_ptr() {
                        query.clone()
                    } else {
                        crate::linalg::real::cast::<T, U>(other.view()).into_shared()
                    }
                };
                let (key, value) = (shared(&h.inputs.key), shared(&h.inputs.value));
                let p = |p: &Projection<T>| Projection {
                    weight: m(&p.weight),
                    adapter: p
                        .adapter
                        .as_ref()
                        .map(|a| Adapter { lora_a: m(&a.lora_a), lora_b: m(&a.lora_b) }),
                };
                Source::Hidden(Box::new(Hidden {
                    inputs: Qkv { query: query.clone(), key, value },
                    projections: Qkv {
                        query: p(&h.projections.query),
                        key: p(&h.projections.key),
                        value: p(&h.projections.value),
                    },
                    scaling: h.scaling,
                }))
            }
        };
        let objective = match &self.objective {
            Objective::Target(y) => Objective::Target(m(y)),
            Objective::UpstreamGradient(g) => Objective::UpstreamGradient(m(g)),
        };
        AttentionProblem {
            source,
            objective,
            mask: self.mask,
            softmax: self.softmax,
            beta: self.beta,
        }
    }
}

/// Returns (queries, keys, value width).
fn check_projected<T: Real>(qkv: &Qkv<Array2<T>>) -> Result<(usize, usize, usize)> {
    let (queries, head_dim) = qkv.query.dim();
    let keys = qkv.key.nrows();
    if head_dim == 0 {
        return Err(Error::invalid("columns of Q", 0, "must be at least 1"));
    }
    if qkv.key.ncols() != head_dim {
        return Err(Error::shape(OP, "K", (keys, head_dim), qkv.key.dim()));
    }
    if qkv.value.nrows() != keys || qkv.value.ncols() == 0 {
        return Err(Error::shape(OP, "V", (keys, qkv.value.ncols().max(1)), qkv.value.dim()));
    }
    for (letter, a) in qkv.named() {
        norms::require_finite(OP, &letter.to_string(), &a.view())?;
    }
    Ok((queries, keys, qkv.value.ncols()))
}

fn check_hidden<T: Real>(h: &Hidden<T>) -> Result<(usize, usize, usize)> {
    let keys = h.inputs.key.nrows();
    if h.inputs.value.nrows() != keys {
        return Err(Error::shape(OP, "XV", (keys, h.inputs.value.ncols()), h.inputs.value.dim()));
    }
    let head_dim = h.projections.query.weight.ncols();
    for (letter, p) in h.projections.named() {
        let input = h.inputs.letter(letter);
        let width = input.ncols();
        norms::require_finite(OP, &format!("X{letter}"), &input.view())?;
        let columns = if letter == 'V' { p.weight.ncols() } else { head_dim };
        if p.weight.dim() != (width, columns) || columns == 0 {
            return Err(Error::shape(
                OP,
                format!("W{letter}"),
                (width, columns.max(1)),
                p.weight.dim(),
            ));
        }
        norms::require_finite(OP, &format!("W{letter}"), &p.weight.view())?;
        let Some(adapter) = &p.adapter else { continue };
        let rank = adapter.lora_a.nrows();
        if rank == 0 || rank > width.min(columns) {
            return Err(Error::invalid(
                format!("r of A{letter}, B{letter}"),
                rank,
                format!(
                    "must be between 1 and {}, the smaller side of W{letter}",
                    width.min(columns)
                ),
            ));
        }
        check_dim(&format!("A{letter}"), adapter.lora_a.view(), (rank, columns))?;
        check_dim(&format!("B{letter}"), adapter.lora_b.view(), (width, rank))?;
        if !h.scaling.is_finite() {
            return Err(Error::invalid("alpha / r", h.scaling, "must be finite"));
        }
    }
    Ok((h.inputs.query.nrows(), keys, h.projections.value.weight.ncols()))
}

fn check_dim<T: Real>(name: &str, a: ArrayView2<T>, expected: (usize, usize)) -> Result<()> {
    if a.dim() != expected {
        return Err(Error::shape(OP, name, expected, a.dim()));
    }
    norms::require_finite(OP, name, &a)
}
