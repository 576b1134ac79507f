//! The exact streaming gradient with the tokens divided among ranks: blocks of keys travel round a
//! ring.
//!
//! Forward, a rank attends to one block after the other and merges by log-sum-exps: with l =
//! log(e^l1 + e^l2), O = e^(l1 - l) O1 + e^(l2 - l) O2. Backward, the blocks travel again, and with
//! each the sums dS^T W and P^T N of its keys, to which every rank adds its queries' part; one more
//! step brings them home. Under a causal mask a rank passes on the blocks of later ranks unused.

use super::totals::{require_one_head, sum_over_ranks};
use super::{Ranks, Scalar};
use crate::attention::contraction::{Contraction, Products, side_by_side, upstream_gradient};
use crate::attention::exact::streaming::{Pass, Sides, Tile, backward, deltas, forward, key_rows};
use crate::attention::problem::{Mask, Qkv, SoftmaxKind};
use crate::attention::shards::together;
use crate::attention::{AttentionProblem, Gradients, Request};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::linalg::tile::Padded;
use ndarray::{Array1, Array2, ArrayView2, Zip, s};

/// Exact gradients of a head of which `problem` holds this rank's rows, in the order of the ranks.
///
/// dW, dA, dB, the loss and the counted operations are those of the whole head; O, dQ, dK, dV and
/// the counted memory are this rank's: its own rows and two blocks of keys.
///
/// # Errors
/// [`crate::Error::InvalidParam`] for [`Request::Adapters`] without adapters; [`crate::Error::Mpi`]
/// when the ranks' tasks differ.
pub fn gradients<T: Scalar>(
    ranks: &Ranks,
    problem: &AttentionProblem<T>,
    request: Request,
) -> Result<Gradients<T>> {
    require_one_head(ranks, "streaming gradient", problem, request, "streaming")?;
    let mut cost = Cost::default();
    let projected = problem.project(&mut cost);
    let contraction =
        together::<T, _>(ranks, Contraction::new(problem, &projected, request, &mut cost))?;
    let Qkv { query, key, value } = &projected.qkv;
    let scaled_query = query.mapv(|x| x * T::of(problem.beta()));
    let ring = Ring {
        ranks,
        rows: ranks.gather_counts(key.nrows()),
        problem,
        queries: scaled_query.view(),
    };
    let (output, value_right, log_sum_exp) =
        ring.forward(key, value, &contraction.value_right, &mut cost);
    let upstream = upstream_gradient(problem, &output);
    let value_left = contraction.value_left(problem, upstream.view(), &mut cost);
    let delta = deltas(upstream.view(), output.view());
    let here = QuerySide {
        upstream: upstream.view(),
        log_sum_exp: &log_sum_exp,
        delta: &delta,
        score_left: contraction.score_left.view(),
        value_left: value_left.view(),
    };
    // For all gradients Z is K itself, which travels anyway.
    let score_right = (request == Request::Adapters).then_some(&contraction.score_right);
    let (score_right, score_left, value_left) =
        ring.backward(key, value, score_right, &here, &mut cost);
    let products = Products { output, value_right, score_right, score_left, value_left };
    sum_over_ranks(ranks, contraction.finish(problem, &projected, &upstream, products, cost))
}

struct Ring<'a, T: Real> {
    ranks: &'a Ranks,
    /// Key rows of every rank.
    rows: Vec<usize>,
    problem: &'a AttentionProblem<T>,
    /// beta Q of this rank.
    queries: ArrayView2<'a, T>,
}

/// What the backward reads of this rank's queries.
struct QuerySide<'a, T> {
    upstream: ArrayView2<'a, T>,
    log_sum_exp: &'a Array1<T>,
    delta: &'a Array1<T>,
    score_left: ArrayView2<'a, T>,
    value_left: ArrayView2<'a, T>,
}

impl<T: Scalar> Ring<'_, T> {
    /// Whose block this rank holds after `steps` steps.
    fn owner(&self, steps: usize) -> usize {
        (self.ranks.rank() + self.ranks.size() - steps % self.ranks.size()) % self.ranks.size()
    }

    /// The mask between this rank's queries and the keys of `owner`; `None` when no pair is
    /// visible.
    fn mask(&self, owner: usize) -> Option<Mask> {
        match self.problem.mask() {
            Mask::Full => Some(Mask::Full),
            Mask::Causal if owner == self.ranks.rank() => Some(Mask::Causal),
            Mask::Causal => (owner < self.ranks.rank()).then_some(Mask::Full),
        }
    }

    fn pass<'b>(&'b self, key: ArrayView2<T>, value: ArrayView2<'b, T>, mask: Mask) -> Pass<'b, T> {
        let tile = Tile::for_queries(self.queries.nrows());
        // The extra score 0 of `One` belongs to the row, not to a block: it is merged once.
        Pass::new(self.queries, key, value, mask, SoftmaxKind::Standard, tile)
    }

    /// Moves the block one rank on.
    fn step(&self, block: &mut Array2<T>, steps: usize) {
        self.ranks.pass_round(block, (self.rows[self.owner(steps + 1)], block.ncols()));
    }

    /// O, P R and log-sum-exps of this rank's queries over all keys.
    fn forward(
        &self,
        key: &Array2<T>,
        value: &Array2<T>,
        right: &Array2<T>,
        cost: &mut Cost,
    ) -> (Array2<T>, Array2<T>, Array1<T>) {
        let (d, end) = (key.ncols(), key.ncols() + value.ncols());
        let queries = self.queries.nrows();
        let mut block = side_by_side(side_by_side(key.view(), value.view()).view(), right.view());
        let largest = self.rows.iter().max().copied().unwrap_or(0);
        cost.hold(2 * largest * block.ncols());
        let mut output = Array2::zeros((queries, value.ncols()));
        let mut value_right = Array2::zeros((queries, right.ncols()));
        let start =
            if self.problem.softmax() == SoftmaxKind::One { T::zero() } else { T::neg_infinity() };
        let mut log_sum_exp = Array1::from_elem(queries, start);
        for steps in 0..self.ranks.size() {
            if let Some(mask) = self.mask(self.owner(steps)) {
                let pass = self.pass(block.slice(s![.., ..d]), block.slice(s![.., d..end]), mask);
                let part = forward(&pass, block.slice(s![.., end..]), cost);
                for i in 0..queries {
                    let (old, new) = (log_sum_exp[i], part.log_sum_exp[i]);
                    let top = old.max(new);
                    let merged = top + ((old - top).exp() + (new - top).exp()).ln();
                    let (keep, take) = ((old - merged).exp(), (new - merged).exp());
                    log_sum_exp[i] = merged;
                    let blend = |out: &mut T, &x: &T| *out = *out * keep + x * take;
                    output.row_mut(i).zip_mut_with(&part.output.row(i), blend);
                    value_right.row_mut(i).zip_mut_with(&part.value_right.row(i), blend);
                }
                cost.exponentials += 5 * queries as u64;
                cost.elementwise += 3 * (output.len() + value_right.len()) as u64;
            }
            if steps + 1 < self.ranks.size() {
                self.step(&mut block, steps);
            }
        }
        cost.release(2 * largest * block.ncols());
        (output, value_right, log_sum_exp)
    }

    /// dS Z of this rank's queries, and dS^T W and P^T N of its keys. `right` is Z unless that is
    /// K.
    fn backward(
        &self,
        key: &Array2<T>,
        value: &Array2<T>,
        right: Option<&Array2<T>>,
        here: &QuerySide<T>,
        cost: &mut Cost,
    ) -> (Array2<T>, Array2<T>, Array2<T>) {
        let (d, end) = (key.ncols(), key.ncols() + value.ncols());
        let columns = right.map_or(d, Array2::ncols);
        let (m, sums) =
            (here.score_left.ncols(), here.score_left.ncols() + here.value_left.ncols());
        let mut block = side_by_side(key.view(), value.view());
        if let Some(right) = right {
            block = side_by_side(block.view(), right.view());
        }
        let mut key_side = Array2::<T>::zeros((key.nrows(), sums));
        let largest = self.rows.iter().max().copied().unwrap_or(0);
        cost.hold(2 * largest * (block.ncols() + sums));
        let mut score_right = Array2::<T>::zeros((self.queries.nrows(), columns));
        for steps in 0..self.ranks.size() {
            if let Some(mask) = self.mask(self.owner(steps)) {
                let pass = self.pass(block.slice(s![.., ..d]), block.slice(s![.., d..end]), mask);
                let right = if right.is_some() { s![.., end..] } else { s![.., ..d] };
                let sides = Sides {
                    upstream: here.upstream,
                    log_sum_exp: here.log_sum_exp.view(),
                    delta: here.delta.view(),
                    score_right: Padded::new(block.slice(right)),
                    score_left: here.score_left,
                    value_left: here.value_left,
                };
                let (rows, blocks) = backward(&pass, &sides, cost);
                score_right += &rows;
                Zip::from(&mut key_side)
                    .and(&key_rows(blocks.view(), block.nrows()))
                    .for_each(|a, &x| *a += x);
            }
            if steps + 1 < self.ranks.size() {
                self.step(&mut block, steps);
            }
            // Also after the last block: its sums then come home.
            self.step(&mut key_side, steps);
        }
        cost.release(2 * largest * (block.ncols() + sums));
        let (left, value_left) =
            (key_side.slice(s![.., ..m]).to_owned(), key_side.slice(s![.., m..]).to_owned());
        (score_right, left, value_left)
    }
}
