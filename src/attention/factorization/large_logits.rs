//! Finding the pairs whose logit exceeds a threshold in magnitude.
//!
//! Exact, by a tree of boxes over the keys (module `key_tree`): sub-quadratic when queries are long
//! only towards few boxes. In many dimensions, or with a low threshold, little is passed over; a
//! sample of queries tells, and every pair is then looked at. Either way the operations are
//! counted, so the cost is the one paid.

use super::Scores;
use super::key_tree::{Collector, Index};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;

/// (key, logit) of the large logits of each query, by rising key.
pub type LargeLogits<T> = Vec<Vec<(u32, T)>>;

/// Queries tried to see how much the tree passes over.
const TRIED: usize = 32;
/// Above this share of keys left, looking at every pair is faster than the tree.
const WORTHWHILE: f64 = 0.3;

/// Visible pairs with |beta q.k| > threshold.
///
/// # Errors
/// Those of the decomposition of `d x d` matrices.
pub fn large_logits<T: Real>(
    scores: &Scores<T>,
    threshold: f64,
    cost: &mut Cost,
) -> Result<LargeLogits<T>> {
    let tree = Index::tree(scores, cost)?;
    let queries = scores.query.nrows();
    let tried: Vec<usize> = (0..queries).step_by(queries.div_ceil(TRIED).max(1)).collect();
    let (_, looked) = search(&tree, scores, &tried, threshold, cost);
    let index = if looked > WORTHWHILE { Index::scan(scores) } else { tree };
    let all: Vec<usize> = (0..queries).collect();
    Ok(search(&index, scores, &all, threshold, cost).0)
}

fn search<T: Real>(
    index: &Index<T>,
    scores: &Scores<T>,
    queries: &[usize],
    threshold: f64,
    cost: &mut Cost,
) -> (LargeLogits<T>, f64) {
    let collector = || Above { threshold: T::of(threshold), found: Vec::new() };
    index.collect(scores, queries, collector, cost)
}

/// Keeps what is above a fixed threshold in magnitude.
struct Above<T> {
    threshold: T,
    found: Vec<(u32, T)>,
}

impl<T: Real> Collector<T> for Above<T> {
    type Found = Vec<(u32, T)>;
    const BOTH_SIGNS: bool = true;

    #[inline(always)]
    fn threshold(&self) -> T {
        self.threshold
    }

    #[inline(always)]
    fn offer(&mut self, key: u32, logit: T) {
        if logit.abs() > self.threshold {
            self.found.push((key, logit));
        }
    }

    fn finish(&mut self, _: &mut Cost) -> Self::Found {
        self.found.sort_unstable_by_key(|f| f.0);
        std::mem::take(&mut self.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::AttentionProblem;
    use crate::attention::problem::Mask;
    use crate::attention::synthetic::{Entries, SyntheticHead};
    use ndarray::Array2;

    #[test]
    fn every_large_pair_is_found_by_either_way_and_no_other() {
        for (tokens, head_dim, threshold) in
            [(300, 2, 3.0), (300, 2, 0.2), (257, 9, 1.5), (5, 3, 0.1)]
        {
            for mask in [Mask::Full, Mask::Causal] {
                let head = SyntheticHead {
                    entries: Entries::Normal,
                    gamma: 3.0,
                    rank: 1,
                    ..SyntheticHead::new(tokens, head_dim)
                };
                let problem: AttentionProblem<f64> = head.draw().unwrap();
                let qkv = problem.project(&mut Cost::default()).qkv;
                let scores = Scores {
                    query: qkv.query.view(),
                    key: qkv.key.view(),
                    beta: problem.beta(),
                    mask,
                };
                let dense = qkv.query.dot(&qkv.key.t()) * problem.beta();
                let want: Vec<Vec<u32>> = dense
                    .rows()
                    .into_iter()
                    .enumerate()
                    .map(|(i, row)| {
                        let large = |(j, s): (usize, &f64)| {
                            s.abs() > threshold && (mask == Mask::Full || j <= i)
                        };
                        row.iter()
                            .enumerate()
                            .filter(|&x| large(x))
                            .map(|(j, _)| j as u32)
                            .collect()
                    })
                    .collect();
                let all: Vec<usize> = (0..tokens).collect();
                let mut cost = Cost::default();
                let tree = Index::tree(&scores, &mut cost).unwrap();
                let by_tree = search(&tree, &scores, &all, threshold, &mut cost).0;
                let by_scan = search(&Index::scan(&scores), &scores, &all, threshold, &mut cost).0;
                for found in
                    [by_tree, by_scan, large_logits(&scores, threshold, &mut cost).unwrap()]
                {
                    let keys: Vec<Vec<u32>> =
                        found.iter().map(|row| row.iter().map(|f| f.0).collect()).collect();
                    assert_eq!(keys, want, "L {tokens} threshold {threshold} {mask:?}");
                    for (i, row) in found.iter().enumerate() {
                        assert!(
                            row.iter().all(|&(j, s)| (s - dense[[i, j as usize]]).abs() < 1e-12)
                        );
                    }
                }
            }
        }
    }

    /// Points on a line with a high threshold: most balls are passed over.
    #[test]
    fn few_long_keys_cost_less_than_all_pairs() {
        let n = 4096;
        let points =
            Array2::from_shape_fn(
                (n, 2),
                |(i, c)| if c == 0 { 1.0 } else { (i as f64 * 0.37).sin() },
            );
        let mut key = points.clone();
        (0..n).step_by(500).for_each(|j| key.row_mut(j).mapv_inplace(|x| 8.0 * x));
        let scores = Scores { query: points.view(), key: key.view(), beta: 1.0, mask: Mask::Full };
        let mut cost = Cost::default();
        let found: usize =
            large_logits(&scores, 4.0, &mut cost).unwrap().iter().map(Vec::len).sum();
        assert!(found > n && found < 9 * n, "{found}");
        assert!(cost.multiply_adds < (n * n / 4) as u64, "{}", cost.multiply_adds);
    }
}
