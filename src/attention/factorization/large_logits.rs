//! Finding the pairs whose logit exceeds a threshold in magnitude.
//!
//! Keys are put in a tree of balls (centre c, radius rho). |q.k| <= |q.c| + |q| rho for every key of a ball, so whole balls
//! are passed over: exact, and sub-quadratic when queries are long only towards few balls. In many dimensions, or with a
//! low threshold, little is passed over; a sample of queries tells, and all pairs are then computed by matrix
//! products. Either way the operations are counted, so the cost is the one paid.

use super::Scores;
use crate::attention::problem::Mask;
use crate::cost::Cost;
use crate::linalg::{Real, norms, product_into};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, parallel::prelude::*, s};

/// (key, logit) of the large logits of each query, by rising key.
pub type LargeLogits<T> = Vec<Vec<(u32, T)>>;

/// Keys of a ball that is not split.
const LEAF: usize = 32;
/// Queries tried to see how much the tree passes over.
const TRIED: usize = 32;
/// Above this share of keys left, products of all pairs are faster than the tree (about ten times the speed a pair).
const WORTHWHILE: f64 = 0.1;

/// Visible pairs with |beta q.k| > threshold.
pub fn large_logits<T: Real>(scores: &Scores<T>, threshold: f64, cost: &mut Cost) -> LargeLogits<T> {
    let tree = BallTree::new(scores.key);
    cost.elementwise += (scores.key.len() * scores.key.nrows().max(2).ilog2() as usize) as u64;
    let queries = scores.query.nrows();
    let step = queries.div_ceil(TRIED).max(1);
    let mut tried = Cost::default();
    let (mut left, mut count) = (0u64, 0u64);
    for i in (0..queries).step_by(step) {
        left += tree.search(scores, i, threshold, &mut tried).1;
        count += 1;
    }
    cost.add_operations(&tried);
    if left as f64 > WORTHWHILE * (count * scores.key.nrows() as u64) as f64 {
        return scan(scores, threshold, cost);
    }
    let (found, costs): (LargeLogits<T>, Vec<Cost>) = (0..queries)
        .into_par_iter()
        .map(|i| {
            let mut cost = Cost::default();
            (tree.search(scores, i, threshold, &mut cost).0, cost)
        })
        .unzip();
    costs.iter().for_each(|part| cost.add_operations(part));
    found
}

fn visible(mask: Mask, query: usize, key: usize) -> bool {
    mask == Mask::Full || key <= query
}

/// Every visible pair, by tiles.
fn scan<T: Real>(scores: &Scores<T>, threshold: f64, cost: &mut Cost) -> LargeLogits<T> {
    const ROWS: usize = 64;
    let keys = scores.key.nrows();
    let (beta, threshold) = (T::of(scores.beta), T::of(threshold));
    let (found, costs): (Vec<LargeLogits<T>>, Vec<Cost>) = scores
        .query
        .axis_chunks_iter(Axis(0), ROWS)
        .into_par_iter()
        .enumerate()
        .map(|(tile, query)| {
            let mut cost = Cost::default();
            let first = tile * ROWS;
            let last = if scores.mask == Mask::Causal { (first + query.nrows()).min(keys) } else { keys };
            let mut products = Array2::zeros((query.nrows(), last));
            let key = scores.key.slice(s![..last, ..]);
            product_into(query, key.t(), T::zero(), &mut products.view_mut(), &mut cost);
            let rows = products.rows().into_iter().enumerate().map(|(i, row)| {
                let large = |(j, &x): (usize, &T)| {
                    let logit = beta * x;
                    (logit.abs() > threshold && visible(scores.mask, first + i, j)).then_some((j as u32, logit))
                };
                row.iter().enumerate().filter_map(large).collect()
            });
            (rows.collect(), cost)
        })
        .unzip();
    costs.iter().for_each(|part| cost.add_operations(part));
    found.into_iter().flatten().collect()
}

/// Balls over keys that were put in the order of the tree.
struct BallTree<T> {
    /// Keys in tree order.
    keys: Array2<T>,
    /// Where each came from.
    origin: Vec<u32>,
    /// Depth first: the left child of node n is n + 1.
    nodes: Vec<Ball<T>>,
}

struct Ball<T> {
    centre: Array1<T>,
    radius: f64,
    range: std::ops::Range<usize>,
    /// The right child; none for a leaf.
    right: Option<usize>,
}

impl<T: Real> BallTree<T> {
    fn new(key: ArrayView2<T>) -> Self {
        let mut origin: Vec<u32> = (0..key.nrows() as u32).collect();
        let mut nodes = Vec::new();
        split(key, &mut origin, 0, &mut nodes);
        let order: Vec<usize> = origin.iter().map(|&j| j as usize).collect();
        Self { keys: key.select(Axis(0), &order), origin, nodes }
    }

    /// Large logits of one query, and the number of keys that were looked at.
    fn search(&self, scores: &Scores<T>, i: usize, threshold: f64, cost: &mut Cost) -> (Vec<(u32, T)>, u64) {
        let query: ArrayView1<T> = scores.query.row(i);
        let length = norms::frobenius(&query);
        // Room for the roundings of a product of this width.
        let slack = 1.0 + 4.0 * T::epsilon().widen() * query.len() as f64;
        let beta = T::of(scores.beta);
        let mut found = Vec::new();
        let mut looked = 0;
        let mut stack = vec![0];
        while let Some(n) = stack.pop() {
            let Some(ball) = self.nodes.get(n) else { break };
            cost.multiply_adds += query.len() as u64;
            let largest = query.dot(&ball.centre).widen().abs() + length * ball.radius;
            if scores.beta * largest * slack <= threshold {
                continue;
            }
            if let Some(right) = ball.right {
                stack.extend([n + 1, right]);
                continue;
            }
            looked += ball.range.len() as u64;
            cost.multiply_adds += (ball.range.len() * query.len()) as u64;
            for t in ball.range.clone() {
                let logit = beta * query.dot(&self.keys.row(t));
                if logit.abs() > T::of(threshold) && visible(scores.mask, i, self.origin[t] as usize) {
                    found.push((self.origin[t], logit));
                }
            }
        }
        found.sort_unstable_by_key(|f| f.0);
        (found, looked)
    }
}

/// Adds the ball of `origin` (whose first key is number `start` in tree order) and, unless small, its halves, split at
/// the median of the coordinate of widest spread.
fn split<T: Real>(key: ArrayView2<T>, origin: &mut [u32], start: usize, nodes: &mut Vec<Ball<T>>) {
    if origin.is_empty() {
        return;
    }
    let rows = |origin: &[u32]| origin.iter().map(|&j| key.row(j as usize)).collect::<Vec<_>>();
    let mut centre = Array1::<T>::zeros(key.ncols());
    rows(origin).iter().for_each(|row| centre += row);
    centre.mapv_inplace(|x| x / T::of(origin.len() as f64));
    let radius = rows(origin).iter().map(|row| norms::frobenius(&(row - &centre).view())).fold(0.0, f64::max);
    let node = nodes.len();
    nodes.push(Ball { centre, radius, range: start..start + origin.len(), right: None });
    if origin.len() <= LEAF || !(radius > 0.0) {
        return;
    }
    let spread = |c: usize| {
        let (low, high) = rows(origin)
            .iter()
            .fold((T::infinity(), T::neg_infinity()), |(low, high), row| (low.min(row[c]), high.max(row[c])));
        high - low
    };
    let (mut widest, mut most) = (0, T::neg_infinity());
    for c in 0..key.ncols() {
        let s = spread(c);
        if s > most {
            (widest, most) = (c, s);
        }
    }
    let half = origin.len() / 2;
    let at = |j: u32| key[[j as usize, widest]].widen();
    origin.select_nth_unstable_by(half, |&a, &b| at(a).total_cmp(&at(b)).then(a.cmp(&b)));
    let (low, high) = origin.split_at_mut(half);
    split(key, low, start, nodes);
    nodes[node].right = Some(nodes.len());
    split(key, high, start + half, nodes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::AttentionProblem;
    use crate::attention::synthetic::{Entries, SyntheticHead};

    #[test]
    fn every_large_pair_is_found_by_either_way_and_no_other() {
        for (tokens, head_dim, threshold) in [(300, 2, 3.0), (300, 2, 0.2), (257, 9, 1.5), (5, 3, 0.1)] {
            for mask in [Mask::Full, Mask::Causal] {
                let head = SyntheticHead {
                    entries: Entries::Normal,
                    gamma: 3.0,
                    rank: 1,
                    ..SyntheticHead::new(tokens, head_dim)
                };
                let problem: AttentionProblem<f64> = head.draw().unwrap();
                let qkv = problem.project(&mut Cost::default()).qkv;
                let scores = Scores { query: qkv.query.view(), key: qkv.key.view(), beta: problem.beta(), mask };
                let dense = qkv.query.dot(&qkv.key.t()) * problem.beta();
                let want: Vec<Vec<u32>> = dense
                    .rows()
                    .into_iter()
                    .enumerate()
                    .map(|(i, row)| {
                        let large = |(j, s): (usize, &f64)| s.abs() > threshold && visible(mask, i, j);
                        row.iter().enumerate().filter(|&x| large(x)).map(|(j, _)| j as u32).collect()
                    })
                    .collect();
                let tree = BallTree::new(scores.key);
                let by_tree: LargeLogits<f64> =
                    (0..tokens).map(|i| tree.search(&scores, i, threshold, &mut Cost::default()).0).collect();
                let mut cost = Cost::default();
                for found in [by_tree, scan(&scores, threshold, &mut cost), large_logits(&scores, threshold, &mut cost)]
                {
                    let keys: Vec<Vec<u32>> = found.iter().map(|row| row.iter().map(|f| f.0).collect()).collect();
                    assert_eq!(keys, want, "L {tokens} threshold {threshold} {mask:?}");
                    for (i, row) in found.iter().enumerate() {
                        assert!(row.iter().all(|&(j, s)| (s - dense[[i, j as usize]]).abs() < 1e-12));
                    }
                }
            }
        }
    }

    /// Points on a line with a high threshold: most balls are passed over.
    #[test]
    fn few_long_keys_cost_less_than_all_pairs() {
        let n = 4096;
        let points = Array2::from_shape_fn((n, 2), |(i, c)| if c == 0 { 1.0 } else { (i as f64 * 0.37).sin() });
        let mut key = points.clone();
        (0..n).step_by(500).for_each(|j| key.row_mut(j).mapv_inplace(|x| 8.0 * x));
        let scores = Scores { query: points.view(), key: key.view(), beta: 1.0, mask: Mask::Full };
        let mut cost = Cost::default();
        let found: usize = large_logits(&scores, 4.0, &mut cost).iter().map(Vec::len).sum();
        assert!(found > n && found < 9 * n, "{found}");
        assert!(cost.multiply_adds < (n * n / 4) as u64, "{}", cost.multiply_adds);
    }
}
