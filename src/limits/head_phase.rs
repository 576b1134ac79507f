//! Which phase one head lies in: its probabilities are close to a matrix of low rank, close to a
//! sparse one, or neither.
//!
//! Both sides are judged by oracles, at a given error: the fewest columns (truncated SVD of P) and
//! the fewest entries (largest of P) that reach it, at what a gradient from them costs. Finding
//! columns or entries is not counted: where both oracles lose, no method can win.

use super::rank::frobenius_ranks;
use crate::attention::chained;
use crate::attention::exact::{dense, streaming};
use crate::attention::problem::Projected;
use crate::attention::{AttentionProblem, Mask, Request};
use crate::error::{Error, Result};
use crate::limits::threshold::visible_pairs;
use crate::linalg::norms;
use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use std::fmt;

/// Where a head lies for one error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The low-rank oracle costs less than [`WORTHWHILE`] of the exact gradient, and less than the
    /// sparse one.
    LowRank,
    /// Neither oracle costs less than [`WORTHWHILE`] of the exact gradient.
    Middle,
    /// The sparse oracle costs less than [`WORTHWHILE`] of the exact gradient, and less than the
    /// low-rank one.
    Sparse,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::LowRank => "low rank",
            Phase::Middle => "middle",
            Phase::Sparse => "sparse",
        })
    }
}

/// Share of the exact gradient's multiply-adds below which an oracle counts as winning.
pub const WORTHWHILE: f64 = 0.5;

/// Both oracles at one error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sides {
    /// Relative Frobenius error.
    pub eps: f64,
    /// eps-rank of P, without the mask: the chain applies a causal mask itself, and a masked P has
    /// nearly full rank.
    pub rank_probabilities: usize,
    /// eps-rank of dS.
    pub rank_scores: usize,
    /// Largest entries of P, in all rows together, that give dS to this error.
    pub entries: usize,
    /// Multiply-adds of a gradient from that many columns, relative to the exact one's.
    pub low_rank_cost: f64,
    /// The same from those entries.
    pub sparse_cost: f64,
}

impl Sides {
    /// The cheaper side, if it is worthwhile.
    pub fn phase(&self) -> Phase {
        match (self.low_rank_cost, self.sparse_cost) {
            (low, sparse) if low.min(sparse) >= WORTHWHILE => Phase::Middle,
            (low, sparse) if low <= sparse => Phase::LowRank,
            _ => Phase::Sparse,
        }
    }
}

/// Columns of Z or W, and of R and N together, that a request needs.
fn widths(problem: &AttentionProblem<f64>, request: Request) -> (usize, usize) {
    if request == Request::All {
        return (problem.head_dim(), problem.value_dim());
    }
    let adapters = problem.adapters();
    let rank =
        |a: Option<&crate::attention::problem::Adapter<f64>>| a.map_or(0, |a| a.lora_a.nrows());
    (rank(adapters.query) + rank(adapters.key), 2 * rank(adapters.value))
}

/// Measures both sides for several errors, from the full matrices: quadratic memory, cubic time.
///
/// # Errors
/// Those of the singular values; [`Error::InvalidParam`] for an eps that is not positive.
pub fn sides(
    problem: &AttentionProblem<f64>,
    projected: &Projected<f64>,
    request: Request,
    eps: &[f64],
) -> Result<Vec<Sides>> {
    let matrices = dense::matrices(problem, &projected.qkv);
    let (p, ds) = (matrices.P.view(), matrices.dS.view());
    let upstream_values = matrices.G.dot(&projected.qkv.value.t());
    let ranks_p = match problem.mask() {
        Mask::Full => frobenius_ranks(p, eps)?,
        Mask::Causal => {
            let scores = projected.qkv.query.dot(&projected.qkv.key.t()) * problem.beta();
            frobenius_ranks(dense::softmax(&scores, problem.softmax()).view(), eps)?
        }
    };
    let ranks_ds = frobenius_ranks(ds, eps)?;
    let entries = oracle_entries(p, ds, upstream_values.view(), eps)?;
    let (m, n) = widths(problem, request);
    let (d, d_v) = (problem.head_dim(), problem.value_dim());
    let pairs = visible_pairs(problem.num_queries(), problem.num_keys(), problem.mask());
    let exact = streaming::predicted_multiply_adds(pairs, d, d_v, m, n);
    // A causal chain passes over the columns three times in place of two.
    let passes = if problem.mask() == Mask::Causal { 1.5 } else { 1.0 };
    let tokens = (problem.num_queries() + problem.num_keys()).div_ceil(2);
    Ok((0..eps.len())
        .map(|e| Sides {
            eps: eps[e],
            rank_probabilities: ranks_p[e],
            rank_scores: ranks_ds[e],
            entries: entries[e],
            low_rank_cost: passes
                * chained::predicted_multiply_adds(tokens, ranks_p[e] as u128, d_v, m, n)
                / exact,
            sparse_cost: chained::predicted_pair_multiply_adds(entries[e] as u64, d_v, m, n)
                / exact,
        })
        .collect())
}

/// The fewest largest entries of P, over all rows, from which dS has each relative Frobenius error;
/// G is held fixed.
///
/// Rows of the rest are divided by what they keep (and the 1 of softmax One). `upstream_values` is
/// G V^T.
///
/// # Errors
/// [`Error::InvalidParam`] for an eps that is not positive.
pub fn oracle_entries(
    p: ArrayView2<f64>,
    ds: ArrayView2<f64>,
    upstream_values: ArrayView2<f64>,
    eps: &[f64],
) -> Result<Vec<usize>> {
    let mut sorted: Vec<f64> = p.iter().copied().filter(|&x| x > 0.0).collect();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let norm = norms::frobenius(&ds);
    let outside: Array1<f64> = p.sum_axis(Axis(1)).mapv(|sum| (1.0 - sum).max(0.0));
    let error_of = |entries: usize| {
        let least = sorted[entries - 1];
        let mut square = 0.0;
        for (i, row) in p.rows().into_iter().enumerate() {
            let h = upstream_values.row(i);
            let (mut sum, mut delta) = (outside[i], 0.0);
            for (&x, &h) in row.iter().zip(h) {
                if x >= least {
                    sum += x;
                    delta += x * h;
                }
            }
            let inverse = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            for ((&x, &h), &want) in row.iter().zip(h).zip(ds.row(i)) {
                let got = if x >= least { x * inverse * (h - delta * inverse) } else { 0.0 };
                square += (got - want) * (got - want);
            }
        }
        square.sqrt()
    };
    eps.iter()
        .map(|&e| {
            if !(e > 0.0) {
                return Err(Error::invalid("eps", e, "must be positive"));
            }
            let (mut low, mut high) = (0, sorted.len());
            while high - low > 1 + high / 500 {
                // The steps follow the orders of magnitude.
                let middle =
                    (((low.max(1) * high) as f64).sqrt() as usize).clamp(low + 1, high - 1);
                if error_of(middle) <= e * norm { high = middle } else { low = middle }
            }
            Ok(high)
        })
        .collect()
}

/// exp of the mean entropy of a query's probabilities over its keys: 1 for a copied key, L for even
/// weights.
///
/// With a causal mask over the second half of the queries, which see many keys. O(L^2 d_h)
/// operations, O(L) memory a row.
pub fn effective_keys(problem: &AttentionProblem<f64>, projected: &Projected<f64>) -> f64 {
    const ROWS: usize = 128;
    let (query, key) = (&projected.qkv.query, &projected.qkv.key);
    let causal = problem.mask() == Mask::Causal;
    let first = if causal { query.nrows() / 2 } else { 0 };
    let mut sum = 0.0;
    for start in (first..query.nrows()).step_by(ROWS) {
        let end = (start + ROWS).min(query.nrows());
        let visible = if causal { end } else { key.nrows() };
        let logits: Array2<f64> =
            query.slice(s![start..end, ..]).dot(&key.slice(s![..visible, ..]).t()) * problem.beta();
        for (local, row) in logits.rows().into_iter().enumerate() {
            let row = if causal { row.slice_move(s![..=start + local]) } else { row };
            let top = row.fold(f64::NEG_INFINITY, |m, &x| m.max(x));
            let (total, weighted) = row.iter().fold((0.0, 0.0), |(total, weighted), &x| {
                let e = (x - top).exp();
                (total + e, weighted + e * (x - top))
            });
            sum += (total.ln() - weighted / total).exp();
        }
    }
    sum / (query.nrows() - first) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::synthetic::{Entries, SyntheticHead};
    use crate::cost::Cost;

    fn measured(tokens: usize, gamma: f64, mask: Mask) -> (f64, Sides) {
        let head = SyntheticHead {
            entries: Entries::Uniform,
            gamma,
            mask,
            rank: 2,
            ..SyntheticHead::new(tokens, 10)
        };
        let problem = head.draw().unwrap();
        let projected = problem.project(&mut Cost::default());
        let sides = sides(&problem, &projected, Request::Adapters, &[0.05]).unwrap();
        (effective_keys(&problem, &projected), sides[0])
    }

    #[test]
    fn a_head_goes_from_low_rank_over_the_middle_to_sparse_as_its_norms_grow() {
        for mask in [Mask::Full, Mask::Causal] {
            let phases = [0.8, 2.5, 10.0].map(|gamma| measured(400, gamma, mask));
            assert_eq!(
                phases.map(|p| p.1.phase()),
                [Phase::LowRank, Phase::Middle, Phase::Sparse],
                "{phases:?}"
            );
            let keys = phases.map(|p| p.0);
            assert!(
                keys[0] > 250.0 && keys[0] > keys[1] && keys[1] > keys[2] && keys[2] < 60.0,
                "{keys:?}"
            );
        }
    }

    /// Even weights over L keys, and one key alone.
    #[test]
    fn effective_keys_of_the_extremes() {
        let head = |beta: f64| {
            let key =
                Array2::from_shape_fn((30, 2), |(j, c)| [(j as f64).cos(), (j as f64).sin()][c]);
            let qkv =
                crate::attention::Qkv { query: key.clone(), key: key.clone(), value: key.clone() };
            AttentionProblem::new(
                crate::attention::problem::Source::Projected(qkv),
                crate::attention::Objective::UpstreamGradient(key),
                Mask::Full,
                crate::attention::SoftmaxKind::Standard,
                beta,
            )
            .unwrap()
        };
        let keys = |beta: f64| {
            let problem = head(beta);
            effective_keys(&problem, &problem.project(&mut Cost::default()))
        };
        assert!((keys(1e-9) - 30.0).abs() < 1e-6 && (keys(1e6) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_oracle_needs_no_fewer_entries_than_reach_the_error() {
        let head = SyntheticHead { gamma: 5.0, rank: 1, ..SyntheticHead::new(120, 5) };
        let problem: AttentionProblem<f64> = head.draw().unwrap();
        let projected = problem.project(&mut Cost::default());
        let all = dense::matrices(&problem, &projected.qkv);
        let h = all.G.dot(&projected.qkv.value.t());
        let found = oracle_entries(all.P.view(), all.dS.view(), h.view(), &[0.2, 0.01]).unwrap();
        assert!(found[0] < found[1] && found[1] <= 120 * 120);
        for (&entries, eps) in found.iter().zip([0.2, 0.01]) {
            let mut sorted = all.P.iter().copied().collect::<Vec<_>>();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let gap = |count: usize| {
                let kept = all.P.mapv(|x| if x >= sorted[count - 1] { x } else { 0.0 });
                let sums = kept.sum_axis(Axis(1)).mapv(|x| x.max(1e-300)).insert_axis(Axis(1));
                let kept = kept / sums;
                let t = &kept * &h;
                let ds = &t - &(&kept * &t.sum_axis(Axis(1)).insert_axis(Axis(1)));
                norms::relative_frobenius(&ds.view(), &all.dS.view())
            };
            assert!(
                gap(entries) <= eps && gap(entries * 98 / 100) > 0.9 * eps,
                "{entries} at {eps}"
            );
        }
        assert!(oracle_entries(all.P.view(), all.dS.view(), h.view(), &[0.0]).is_err());
    }
}
