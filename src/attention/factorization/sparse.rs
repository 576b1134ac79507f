//! `sparse:threshold=E[,keys=K][,search=exact|tree|oracle][,remainder=dropped|G]`: of each query
//! the largest probabilities, exactly.
//!
//! A softmax that condenses on few keys is a sparse matrix. Of each query the largest entries are
//! kept: at most K, each at least E times the sum of those kept. The rest is dropped, or carried by
//! a polynomial of degree G as in [`super::support_basis`]. Dropped entries are below E of the kept
//! sum, which is the certificate. Derivation: paper-notes/factorizations-and-bounds.md, section 1.
//!
//! Finding the entries is the cost: every pair is looked at (`exact`), or only the keys of boxes
//! that can hold one (`tree`, the same result); `oracle` is told them, and its search is not
//! counted.

use super::centering::{Center, Centered};
use super::fitted::fit;
use super::interval::{Check, settle};
use super::key_tree::{Collector, Index};
use super::support_basis::corrected;
use super::{Certificate, FeatureMap, Scores, SoftmaxFactorization, SparseCorrection};
use crate::attention::problem::Mask;
use crate::attention::shards::WholeHead;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::elementwise::{Kernel, row_exp_sum, vectorized};
use ndarray::{ArrayView2, ArrayViewMut2};
use std::fmt;

/// How the largest entries are found; all three find the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Search {
    /// Every visible pair is looked at: L^2 d_h multiply-adds (half of it with a causal mask), no
    /// exponential for what is not kept.
    #[default]
    Exact,
    /// Boxes over keys are passed over where they cannot matter: sub-quadratic on heads whose keys
    /// cluster, never much above `exact`.
    Tree,
    /// The entries are known: their search is reported in [`Certificate::search`] and left out of
    /// the cost.
    Oracle,
}

impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Search::Exact => "exact",
            Search::Tree => "tree",
            Search::Oracle => "oracle",
        })
    }
}

/// The largest entries of each row of P.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `threshold` | 0 | E: an entry is kept if it is at least E times the sum of the kept ones | 0 to 1 |
/// | `keys` | all | K: most entries of a query | >= 1 |
/// | `search` | exact | how the entries are found | |
/// | `remainder` | dropped | degree of the polynomial that carries the others; k = C(d + g, g) columns | >= 1 |
///
/// At least one of `threshold` and `keys` is needed. The same E for all rows keeps the largest
/// entries of P as a whole, which is the best choice for a Frobenius error; a fixed number of keys
/// a row needs two to four times as many on trained heads.
///
/// The gradient with a dropped remainder is the exact gradient of the sparse softmax with its
/// pattern held fixed; with a polynomial it is the chain's, dS^ = P^ o (G V^T - delta).
#[derive(Debug, Clone, PartialEq)]
pub struct Sparse {
    /// E.
    pub threshold: f64,
    /// K.
    pub keys: Option<usize>,
    /// How entries are found.
    pub search: Search,
    /// Degree of the remainder's polynomial; dropped if none.
    pub remainder: Option<usize>,
}

/// Sampled pairs that a remainder's polynomial is fitted to.
const SAMPLES: usize = 4096;

impl<T: Real> SoftmaxFactorization<T> for Sparse {
    fn spec(&self) -> String {
        let mut parts = Vec::new();
        if self.threshold > 0.0 {
            parts.push(format!("threshold={}", self.threshold));
        }
        parts.extend(self.keys.map(|k| format!("keys={k}")));
        if self.search != Search::Exact {
            parts.push(format!("search={}", self.search));
        }
        parts.extend(self.remainder.map(|g| format!("remainder={g}")));
        format!("sparse:{}", parts.join(","))
    }

    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        if !(0.0..1.0).contains(&self.threshold) || (self.threshold == 0.0 && self.keys.is_none()) {
            return Err(Error::invalid(
                "threshold",
                self.threshold,
                "must be above 0 and below 1, or keys be given",
            ));
        }
        if self.keys == Some(0) {
            return Err(Error::invalid("keys", 0, "must be at least 1"));
        }
        let mut search = Cost::default();
        let rows = self.largest(scores, &mut search)?;
        if self.search != Search::Oracle {
            cost.add_operations(&search);
            cost.hold(search.peak_live_elements as usize);
            cost.release(search.peak_live_elements as usize);
        }
        let dropped = rows.iter().enumerate().map(|(i, row)| {
            let hidden = visible(scores, i) > row.pairs.len();
            if hidden { row.largest_dropped.widen() } else { 0.0 }
        });
        let certificate = Certificate {
            spec: SoftmaxFactorization::<T>::spec(self),
            degree: self.remainder,
            exp_error_bound: Some(dropped.fold(0.0, f64::max)),
            search: Some(search),
            ..Certificate::default()
        };
        match self.remainder {
            Some(degree) => remainder(scores, &rows, degree, certificate, cost),
            None => {
                let row_shift: Vec<T> = rows.iter().map(|row| row.log_sum).collect();
                let values: Vec<Vec<(u32, T)>> = rows.into_iter().map(|row| row.pairs).collect();
                let sparse = SparseCorrection::from_rows(&values, scores.key.nrows())?;
                cost.hold(2 * sparse.len() + row_shift.len());
                let certificate =
                    Certificate { corrected_pairs: sparse.len() as u64, ..certificate };
                Ok(Box::new(SparseMap { sparse, row_shift, certificate }))
            }
        }
    }
}

impl Sparse {
    /// The kept entries of every query.
    fn largest<T: Real>(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Vec<Row<T>>> {
        let index = match self.search {
            Search::Tree => Index::tree(scores, cost)?,
            Search::Exact | Search::Oracle => Index::scan(scores),
        };
        cost.hold(index.len());
        let all: Vec<usize> = (0..scores.query.nrows()).collect();
        let collector = || Largest::new(self.threshold, self.keys.unwrap_or(usize::MAX));
        Ok(index.collect(scores, &all, collector, cost).0)
    }
}

/// Number of keys that a query sees.
fn visible<T>(scores: &Scores<T>, query: usize) -> usize {
    if scores.mask == Mask::Causal { query + 1 } else { scores.key.nrows() }
}

/// The kept entries of one query.
struct Row<T> {
    /// (key, probability), by rising key.
    pairs: Vec<(u32, T)>,
    /// Logarithm of the sum of the kept exponentials.
    log_sum: T,
    /// Bound on every dropped exponential, relative to that sum.
    largest_dropped: T,
}

/// Collects the largest entries e^s of a row: the most that satisfy, in falling order, e_m >= E
/// (e_1 + ... + e_m) and m <= K.
///
/// The condition holds for a first stretch and fails from there on. An entry that fails among some
/// of a row's entries fails among all of them, since more entries are then above it: so the order
/// in which they come does not matter.
struct Largest<T> {
    share: T,
    log_share: T,
    most: usize,
    /// What was found: keys, logits, and e^(s - top), which a cut fills.
    keys: Vec<u32>,
    logits: Vec<T>,
    weights: Vec<T>,
    top: T,
    threshold: T,
    /// Number of entries at which the list is cut to what may still be kept.
    cut_at: usize,
    exponentials: u64,
}

impl<T: Real> Collector<T> for Largest<T> {
    type Found = Row<T>;
    const BOTH_SIGNS: bool = false;

    #[inline(always)]
    fn threshold(&self) -> T {
        self.threshold
    }

    #[inline(always)]
    fn offer(&mut self, key: u32, logit: T) {
        self.keys.push(key);
        self.logits.push(logit);
        self.seed(logit);
        if self.keys.len() >= self.cut_at {
            self.cut();
            self.cut_at = (2 * self.keys.len()).max(FIRST_CUT);
        }
    }

    #[inline(always)]
    fn seed(&mut self, logit: T) {
        if logit > self.top {
            self.top = logit;
            self.threshold = self.threshold.max(self.lowered(logit + self.log_share));
        }
    }

    fn finish(&mut self, cost: &mut Cost) -> Row<T> {
        let sum = self.cut();
        // Dropped for the share: below it times the sum with itself, so below E / (1 - E) of the
        // kept sum. Dropped for the number: at most the last kept one.
        let mut largest_dropped = self.share / (T::one() - self.share);
        if self.keys.len() == self.most {
            let last = self.weights.iter().fold(T::one(), |low, &e| low.min(e));
            largest_dropped = largest_dropped.max(last / sum);
        }
        let inverse = T::one() / sum;
        let mut pairs: Vec<(u32, T)> =
            self.keys.iter().zip(&self.weights).map(|(&key, &e)| (key, e * inverse)).collect();
        if !pairs.is_sorted_by_key(|f| f.0) {
            pairs.sort_unstable_by_key(|f| f.0);
        }
        cost.exponentials += self.exponentials;
        cost.elementwise += 6 * self.exponentials;
        let row = Row { log_sum: self.top + sum.ln(), pairs, largest_dropped };
        self.keys.clear();
        self.logits.clear();
        self.exponentials = 0;
        (self.top, self.threshold, self.cut_at) = (T::neg_infinity(), T::neg_infinity(), FIRST_CUT);
        row
    }
}

/// Entries that are collected before the first cut.
const FIRST_CUT: usize = 128;

impl<T: Real> Largest<T> {
    fn new(share: f64, most: usize) -> Self {
        let share = T::of(share);
        Self {
            share,
            log_share: share.ln(),
            most,
            keys: Vec::with_capacity(FIRST_CUT),
            logits: Vec::with_capacity(FIRST_CUT),
            weights: Vec::new(),
            top: T::neg_infinity(),
            threshold: T::neg_infinity(),
            cut_at: FIRST_CUT,
            exponentials: 0,
        }
    }

    /// A logarithm with room for the roundings of logits and logarithms.
    #[inline(always)]
    fn lowered(&self, logit: T) -> T {
        logit - T::of(16.0) * T::epsilon() * (T::one() + self.top.abs())
    }

    /// Cuts the list to the stretch that is kept, raises the threshold, and returns the sum of
    /// e^(s - top).
    #[inline(never)]
    fn cut(&mut self) -> T {
        self.weights.clear();
        self.weights.extend_from_slice(&self.logits);
        self.exponentials += self.weights.len() as u64;
        // Sure to be kept: at least E of everything. Sure to be dropped: below E of those.
        let (all, mut sum) =
            vectorized(Weights { entries: &mut self.weights, top: self.top, share: self.share });
        let (low, high) = (self.share * sum, self.share * all);
        let mut between: Vec<(T, u32)> = Vec::new();
        for (&key, &e) in self.keys.iter().zip(&self.weights) {
            if e >= low && e < high {
                between.push((e, key));
            }
        }
        between.sort_unstable_by(|a, b| falling(a.0, b.0).then(a.1.cmp(&b.1)));
        let mut last = (high, u32::MAX);
        for &(e, key) in &between {
            if e < self.share * (sum + e) {
                break;
            }
            sum += e;
            last = (e, key);
        }
        self.keep_up_to(last);
        let mut threshold = self.lowered(self.top + self.log_share + sum.ln());
        if self.keys.len() > self.most {
            let mut all: Vec<(T, u32)> =
                self.weights.iter().copied().zip(self.keys.iter().copied()).collect();
            let order = |a: &(T, u32), b: &(T, u32)| falling(a.0, b.0).then(a.1.cmp(&b.1));
            let last = *all.select_nth_unstable_by(self.most - 1, order).1;
            self.keep_up_to(last);
            sum = self.weights.iter().fold(T::zero(), |sum, &e| sum + e);
            // An entry equal to the last one may still replace it, by its lower key.
            threshold = threshold.max(self.lowered(self.top + last.0.ln()));
        }
        self.threshold = self.threshold.max(threshold);
        sum
    }

    /// Leaves out what comes after `last` (weight, key) in falling order.
    fn keep_up_to(&mut self, last: (T, u32)) {
        let mut count = 0;
        for i in 0..self.keys.len() {
            let (key, e) = (self.keys[i], self.weights[i]);
            (self.keys[count], self.logits[count], self.weights[count]) = (key, self.logits[i], e);
            count += usize::from(e > last.0 || (e == last.0 && key <= last.1));
        }
        self.keys.truncate(count);
        self.logits.truncate(count);
        self.weights.truncate(count);
    }
}

fn falling<T: Real>(a: T, b: T) -> std::cmp::Ordering {
    b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal)
}

/// Replaces logits by e^(s - top); returns their sum, and the sum of those that are at least
/// `share` of it.
struct Weights<'a, T> {
    entries: &'a mut [T],
    top: T,
    share: T,
}

impl<T: Real> Kernel for Weights<'_, T> {
    type Output = (T, T);

    #[inline(always)]
    fn run(self) -> (T, T) {
        let all = row_exp_sum(self.entries, self.top);
        let high = self.share * all;
        let mut lanes = [T::zero(); 8];
        let add = |lane: &mut T, e: T| *lane += if e >= high { e } else { T::zero() };
        let mut chunks = self.entries.chunks_exact(8);
        for chunk in &mut chunks {
            lanes.iter_mut().zip(chunk).for_each(|(lane, &e)| add(lane, e));
        }
        lanes.iter_mut().zip(chunks.remainder()).for_each(|(lane, &e)| add(lane, e));
        let [a, b, c, d, e, f, g, h] = lanes;
        (all, ((a + e) + (b + f)) + ((c + g) + (d + h)))
    }
}

/// The kept pairs exact, the others by a polynomial fitted to a sample of them.
fn remainder<T: Real>(
    scores: &Scores<T>,
    rows: &[Row<T>],
    degree: usize,
    certificate: Certificate,
    cost: &mut Cost,
) -> Result<Box<dyn FeatureMap<T>>> {
    let centered = Centered::new(scores, Center::Both, cost)?;
    let left = centered.scores(scores);
    let beta = T::of(scores.beta);
    let logit = |i: usize, j: usize| beta * left.query.row(i).dot(&left.key.row(j));
    let pairs: Vec<Vec<(u32, T)>> = rows
        .iter()
        .enumerate()
        .map(|(i, row)| row.pairs.iter().map(|&(j, _)| (j, logit(i, j as usize))).collect())
        .collect();
    let kept: usize = pairs.iter().map(Vec::len).sum();
    cost.product(kept + SAMPLES, left.query.ncols(), 1);
    let sample = dropped_logits(scores, rows, logit);
    let (polynomial, _) = fit(degree, &sample)?;
    let (b, evidence) = settle(&certificate.spec, &left, None, Check::Norms, &WholeHead, cost)?;
    let certificate = Certificate {
        interval: Some((b, evidence)),
        exp_error_bound: Some(polynomial.uniform_error(b)),
        ..certificate
    };
    corrected(scores, centered, &polynomial, &pairs, certificate, cost)
}

/// Logits of about [`SAMPLES`] evenly spaced visible pairs that are not kept; a zero if there are
/// none.
fn dropped_logits<T: Real>(
    scores: &Scores<T>,
    rows: &[Row<T>],
    logit: impl Fn(usize, usize) -> T,
) -> Vec<f64> {
    let total: usize =
        rows.iter().enumerate().map(|(i, row)| visible(scores, i) - row.pairs.len()).sum();
    let step = total.div_ceil(SAMPLES).max(1);
    let mut sample = Vec::new();
    let mut skip = step / 2;
    for (i, row) in rows.iter().enumerate() {
        let mut kept = row.pairs.iter().map(|f| f.0 as usize).peekable();
        for j in 0..visible(scores, i) {
            if kept.next_if_eq(&j).is_some() {
                continue;
            }
            if skip == 0 {
                sample.push(logit(i, j).widen());
                skip = step;
            }
            skip -= 1;
        }
    }
    if sample.is_empty() {
        sample.push(0.0);
    }
    sample
}

/// Kept entries alone: no column, P^ itself.
struct SparseMap<T> {
    sparse: SparseCorrection<T>,
    /// Log-sum-exp of each row's kept logits.
    row_shift: Vec<T>,
    certificate: Certificate,
}

impl<T: Real> FeatureMap<T> for SparseMap<T> {
    fn rank(&self) -> usize {
        0
    }

    fn query_features(&self, _first_row: usize, _rows: ArrayView2<T>, _out: ArrayViewMut2<T>) {}

    fn key_features(&self, _first_row: usize, _rows: ArrayView2<T>, _out: ArrayViewMut2<T>) {}

    fn row_shift(&self) -> Option<&[T]> {
        Some(&self.row_shift)
    }

    fn sparse(&self) -> Option<&SparseCorrection<T>> {
        Some(&self.sparse)
    }

    fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}
