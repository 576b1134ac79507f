//! Randomly pivoted partial Cholesky factorization of a positive semidefinite matrix given by its
//! columns.

use super::gemm::parallel_product_into;
use crate::cost::Cost;
use ndarray::{Array2, ArrayView2, s};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// M ~= F F^T with as many columns as pivots.
#[derive(Debug, Clone)]
pub struct PivotedCholesky {
    /// F^T, `k x n`: row t is the column of the t-th pivot.
    pub transposed_factor: Array2<f64>,
    /// Rows of M that were chosen, in order; F restricted to them is lower triangular.
    pub pivots: Vec<usize>,
    /// Diagonal of M - F F^T, at least 0.
    pub residual: Vec<f64>,
}

/// Proposals of one round: enough for the products to be products of matrices.
const BLOCK: usize = 32;

/// At most `rank` pivots, each drawn with probability proportional to the diagonal of the residual
/// (RPCholesky, arXiv 2207.06503). O(n k^2) multiply-adds and n k numbers, without forming M.
///
/// A round proposes a block of pivots from the residual at its start and accepts each with the
/// ratio of its present to that residual, which leaves the distribution of one-by-one sampling
/// unchanged and makes nearly all work products of matrices. `columns` gives the rows of M with the
/// given indices, `b x n`. Ends early when every residual is at most `tolerance` times its own
/// diagonal entry. Double precision: the residual is a difference of near numbers.
pub fn randomly_pivoted_cholesky(
    diagonal: &[f64],
    columns: impl Fn(&[usize]) -> Array2<f64>,
    rank: usize,
    tolerance: f64,
    rng: &mut ChaCha8Rng,
    cost: &mut Cost,
) -> PivotedCholesky {
    let n = diagonal.len();
    let rank = rank.min(n);
    let mut residual = diagonal.to_vec();
    let mut factor = Array2::zeros((rank, n));
    let mut pivots = Vec::with_capacity(rank);
    cost.hold(rank * n);
    while pivots.len() < rank {
        let mut sums = Vec::with_capacity(n);
        let total = residual.iter().fold(0.0, |sum, r| {
            sums.push(sum + r);
            sum + r
        });
        if !(total > 0.0) {
            break;
        }
        let proposals: Vec<usize> = (0..BLOCK)
            .map(|_| {
                let u = rng.random::<f64>() * total;
                sums.partition_point(|&s| s <= u).min(n - 1)
            })
            .collect();
        let accept: Vec<f64> = (0..BLOCK).map(|_| rng.random()).collect();
        let proposed: Vec<f64> = proposals.iter().map(|&p| residual[p]).collect();
        // Rows of the residual matrix at the proposals.
        let mut rows = columns(&proposals);
        let done = pivots.len();
        let at_proposals = Array2::from_shape_fn((BLOCK, done), |(i, t)| factor[[t, proposals[i]]]);
        let before: ArrayView2<f64> = factor.slice(s![..done, ..]);
        parallel_product_into(-1.0, at_proposals.view(), before, 1.0, &mut rows.view_mut(), cost);
        for i in 0..BLOCK {
            let pivot = proposals[i];
            let height = rows[[i, pivot]];
            if !(height > tolerance * diagonal[pivot]) {
                residual[pivot] = 0.0;
                continue;
            }
            if accept[i] * proposed[i] >= height && i > 0 {
                continue;
            }
            let scale = 1.0 / height.sqrt();
            let mut column = rows.row(i).mapv(|x| x * scale);
            // Earlier pivots have no residual: what is left there is rounding.
            pivots.iter().for_each(|&p: &usize| column[p] = 0.0);
            for later in i + 1..BLOCK {
                let weight = column[proposals[later]];
                rows.row_mut(later).scaled_add(-weight, &column);
            }
            cost.multiply_adds += ((BLOCK - i) * n) as u64;
            for ((r, &x), &d) in residual.iter_mut().zip(&column).zip(diagonal) {
                *r -= x * x;
                *r = if *r > tolerance * d { *r } else { 0.0 };
            }
            residual[pivot] = 0.0;
            factor.row_mut(pivots.len()).assign(&column);
            pivots.push(pivot);
            if pivots.len() == rank {
                break;
            }
        }
    }
    // What was set to zero is at most this.
    for (r, &d) in residual.iter_mut().zip(diagonal) {
        *r = r.max(tolerance * d);
    }
    pivots.iter().for_each(|&p| residual[p] = 0.0);
    let kept = pivots.len();
    PivotedCholesky { transposed_factor: factor.slice(s![..kept, ..]).to_owned(), pivots, residual }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn kernel(n: usize) -> Array2<f64> {
        Array2::from_shape_fn((n, n), |(i, j)| {
            let (x, y) = (i as f64 / n as f64, j as f64 / n as f64);
            (-(x - y).powi(2) * 300.0).exp() * (1.0 + x) * (1.0 + y)
        })
    }

    fn factorize(m: &Array2<f64>, rank: usize, seed: u64) -> PivotedCholesky {
        let columns = |rows: &[usize]| m.select(ndarray::Axis(0), rows);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        randomly_pivoted_cholesky(
            &m.diag().to_vec(),
            columns,
            rank,
            1e-14,
            &mut rng,
            &mut Cost::default(),
        )
    }

    #[test]
    fn the_residual_is_that_of_the_factorization_and_the_pivots_are_exact() {
        let m = kernel(90);
        for rank in [1, 7, 40] {
            let c = factorize(&m, rank, 3);
            assert_eq!(c.pivots.len(), rank);
            let gap = &m - &c.transposed_factor.t().dot(&c.transposed_factor);
            for i in 0..90 {
                assert!((gap[[i, i]] - c.residual[i]).abs() < 1e-12, "diagonal {i}");
            }
            for (t, &p) in c.pivots.iter().enumerate() {
                assert!(gap.row(p).iter().all(|x| x.abs() < 1e-12));
                assert!(
                    c.pivots[..t].iter().all(|&q| c.transposed_factor[[t, q]].abs() < 1e-300),
                    "triangular"
                );
            }
        }
    }

    #[test]
    fn duplicates_are_chosen_once_and_end_the_factorization() {
        let base = Array2::from_shape_fn((5, 5), |(i, j)| if i == j { 2.0 } else { 0.5 });
        let m = Array2::from_shape_fn((20, 20), |(i, j)| base[[i % 5, j % 5]]);
        let c = factorize(&m, 20, 1);
        assert_eq!(c.pivots.len(), 5);
        let mut classes: Vec<usize> = c.pivots.iter().map(|p| p % 5).collect();
        classes.sort_unstable();
        assert_eq!(classes, [0, 1, 2, 3, 4]);
        let gap = &m - &c.transposed_factor.t().dot(&c.transposed_factor);
        assert!(gap.iter().all(|x| x.abs() < 1e-13));
    }

    /// The first two pivots of a diagonal matrix are drawn with the probabilities of one-by-one
    /// sampling.
    #[test]
    fn blocks_do_not_change_the_distribution() {
        let weights = [1.0, 2.0, 3.0, 4.0];
        let m = Array2::from_shape_fn((4, 4), |(i, j)| if i == j { weights[i] } else { 0.0 });
        let trials = 20_000u32;
        let mut seen = [[0u32; 4]; 4];
        for seed in 0..trials {
            let c = factorize(&m, 2, u64::from(seed));
            seen[c.pivots[0]][c.pivots[1]] += 1;
        }
        for i in 0..4 {
            for j in 0..4 {
                let p =
                    if i == j { 0.0 } else { weights[i] / 10.0 * weights[j] / (10.0 - weights[i]) };
                let deviation = (p * (1.0 - p) / f64::from(trials)).sqrt();
                let got = f64::from(seen[i][j]) / f64::from(trials);
                assert!((got - p).abs() <= 4.5 * deviation, "({i}, {j}): {got} against {p}");
            }
        }
    }
}
