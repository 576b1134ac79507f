//! `auto:eps=E[,seed=S][,columns=W]`: the cheapest method that is predicted to reach an error,
//! checked afterwards.
//!
//! Every method is tried with rising parameters on a sample of queries and keys, where the relative
//! error of the probabilities is measured; the cost of each on the whole head is predicted from its
//! columns; the cheapest that reaches the target is prepared on the whole head and measured on a
//! sample of whole rows. If it misses, the next cheapest is taken. The exact gradient competes:
//! where it is predicted to be cheaper, there is no choice but an error that says so. Prediction
//! and measurement are reported in the certificate.

use super::large_logits::large_logits;
use super::monomials::{MonomialMap, count};
use super::{
    Certificate, FeatureMap, Scores, SoftmaxFactorization, SparseCorrection, approximation, build,
};
use crate::attention::problem::Mask;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::streams::seed_stream;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};
use rand::seq::SliceRandom;

/// Choice of a method by measured prediction.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `eps` | none | relative Frobenius error of P to reach; that of the gradient is of its size | > 0 |
/// | `seed` | 0 | of samples, and of the randomised methods | |
/// | `columns` | 16 d_h | columns of the chain's moments, which a feature column costs on either side | >= 1 |
#[derive(Debug, Clone, PartialEq)]
pub struct Auto {
    /// Target error.
    pub eps: f64,
    /// Seed.
    pub seed: u64,
    /// Moment columns, if given.
    pub columns: Option<usize>,
}

/// One method with parameters that were tried on the sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Its spec.
    pub spec: String,
    /// Columns k.
    pub rank: usize,
    /// Relative Frobenius error of P on the sample; infinite if a denominator was not positive.
    pub predicted_error: f64,
    /// Predicted multiply-adds of features and chain on the whole head.
    pub predicted_multiply_adds: f64,
}

/// How a choice was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// Target error.
    pub eps: f64,
    /// The method that was taken.
    pub chosen: Candidate,
    /// Its relative Frobenius error of P on whole rows of the head.
    pub measured_error: f64,
    /// Predicted multiply-adds of the exact streaming gradient, in the same terms.
    pub exact_multiply_adds: f64,
    /// The cheapest candidate of every family that reached the target on the sample, cheapest
    /// first.
    pub candidates: Vec<Candidate>,
}

const SAMPLE_QUERIES: usize = 96;
const SAMPLE_KEYS: usize = 512;
const MEASURED_ROWS: usize = 48;
/// Columns up to which methods are tried.
const MOST_COLUMNS: usize = 4096;
/// Parameters beyond the first sufficient one that a family may offer, should the first miss on the
/// whole head.
const RESERVES: usize = 3;

impl Auto {
    /// Every candidate with its prediction: for each family those from the first that reaches `eps`
    /// on the sample on.
    ///
    /// # Errors
    /// Those of preparing a method, apart from parameters that do not fit the head.
    pub fn predict<T: Real>(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Vec<Candidate>> {
        let queries = sample(self.seed, "auto-queries", scores.query.nrows(), SAMPLE_QUERIES);
        let keys = sample(self.seed, "auto-keys", scores.key.nrows(), SAMPLE_KEYS);
        let (query, key) =
            (scores.query.select(Axis(0), &queries), scores.key.select(Axis(0), &keys));
        let pilot =
            Scores { query: query.view(), key: key.view(), beta: scores.beta, mask: Mask::Full };
        let exact = probabilities(&pilot);
        cost.product(query.nrows(), query.ncols(), key.nrows());
        cost.exponentials += exact.len() as u64;
        let mut offered = Vec::new();
        let (pairs, most) = (visible_pairs(scores), self.exact_multiply_adds(scores));
        for family in self.families(&pilot, scores)? {
            let mut reached = 0;
            // What costs more than the exact gradient is not even tried.
            for step in family.into_iter().filter(|step| step.multiply_adds < most) {
                let Some((predicted_error, kept)) = error_of(&step.pilot, &pilot, &exact, cost)?
                else {
                    continue;
                };
                if predicted_error <= self.eps {
                    let predicted_multiply_adds =
                        step.multiply_adds + kept * pairs * step.for_each_pair;
                    let Step { spec, rank, .. } = step;
                    offered.push(Candidate {
                        spec,
                        rank,
                        predicted_error,
                        predicted_multiply_adds,
                    });
                    reached += 1;
                }
                if reached > RESERVES {
                    break;
                }
            }
        }
        offered.sort_by(|a, b| a.predicted_multiply_adds.total_cmp(&b.predicted_multiply_adds));
        Ok(offered)
    }

    /// Every family by rising cost.
    fn families<T: Real>(&self, pilot: &Scores<T>, scores: &Scores<T>) -> Result<Vec<Vec<Step>>> {
        let d = scores.query.ncols();
        let (lq, lk) = (scores.query.nrows() as f64, scores.key.nrows() as f64);
        let tokens = lq + lk;
        let w = self.moment_columns(d);
        let most = MOST_COLUMNS.min(scores.key.nrows());
        let ranks: Vec<usize> = (0..)
            .map(|i| (16.0 * 2f64.powf(f64::from(i) / 2.0)) as usize)
            .take_while(|&k| k <= most)
            .collect();
        let seed = self.seed;
        let mut families = Vec::new();
        for name in ["taylor", "chebyshev", "fitted"] {
            let options = if name == "fitted" { "" } else { ",center=both" };
            let degrees = (1..).map(|g| (g, count(d, g))).take_while(|&(_, k)| k <= most as u128);
            let step = |(g, k)| {
                Step::new(
                    format!("{name}:degree={g}{options}"),
                    k as usize,
                    tokens * k as f64 * (w + 1.0),
                )
            };
            families.push(degrees.map(step).collect());
        }
        // The largest exponents take a pass of their own.
        let positive = |&k: &usize| {
            let per_column = w + 2.5 * d as f64 + EXPONENTIAL;
            Step::new(
                format!("positive-features:rank={k},seed={seed}"),
                k,
                tokens * k as f64 * per_column,
            )
        };
        families.push(ranks.iter().map(positive).collect());
        for degree in [2usize, 3, 5] {
            let sketch = |&k: &usize| {
                let per_column = w + 1.5 * d as f64 * degree as f64 / (degree - 1) as f64 + 4.0;
                let spec = format!("tensor-sketch:degree={degree},rank={k},seed={seed}");
                Step::new(spec, k, tokens * k as f64 * per_column)
            };
            families.push(ranks.iter().filter(|&&k| k > d + degree).map(sketch).collect());
        }
        // A coreset larger than half of the sampled keys says nothing about more keys than those.
        let believable = if scores.key.nrows() > pilot.key.nrows() {
            pilot.key.nrows() / 2
        } else {
            pilot.key.nrows()
        };
        let nystrom = |&k: &usize| {
            let own = lk * (k + d) as f64 + lq * (k as f64 + 2.0 * d as f64 + EXPONENTIAL);
            Step::new(format!("nystrom:rank={k},seed={seed}"), k, k as f64 * (tokens * w + own))
        };
        families.push(ranks.iter().filter(|&&k| k <= believable).map(nystrom).collect());
        // Searches are predicted as if every pair were looked at.
        let search = visible_pairs(scores) * d as f64;
        let mut support: Vec<Step> = Vec::new();
        for degree in [1usize, 2] {
            let k = count(d, degree);
            if k > most as u128 {
                continue;
            }
            for threshold in thresholds(pilot)? {
                let spec = format!("support-basis:degree={degree},threshold={threshold}");
                let step = Step::new(spec, k as usize, tokens * k as f64 * (w + 1.0) + search);
                support.push(Step { for_each_pair: 3.0 * (d as f64 + 8.0), ..step });
            }
        }
        families.push(support);
        let sparse = |share: f64| {
            let spec = format!("sparse:threshold={share}");
            let step = Step::new(spec, 0, search);
            // Where weights are spread, an entry of P is as much larger on the sample as the sample
            // has fewer keys.
            let on_pilot = share * visible_pairs(scores) / (lq * pilot.key.nrows() as f64);
            let pilot = format!("sparse:threshold={}", on_pilot.min(0.5));
            Step { pilot, for_each_pair: self.for_each_pair(d) - 2.0 * d as f64, ..step }
        };
        families.push(SHARES.map(sparse).to_vec());
        Ok(families)
    }

    /// Columns of the chain's moments, both sides together.
    fn moment_columns(&self, d: usize) -> f64 {
        self.columns.unwrap_or(16 * d) as f64
    }

    /// Multiply-adds of the exact gradient for one pair, the exponentials' included.
    fn for_each_pair(&self, d: usize) -> f64 {
        4.0 * d as f64 + self.moment_columns(d) / (d + 1) as f64 + d as f64 + 2.0 * EXPONENTIAL
    }

    /// Multiply-adds that the exact streaming gradient is predicted to take.
    pub fn exact_multiply_adds<T: Real>(&self, scores: &Scores<T>) -> f64 {
        visible_pairs(scores) * self.for_each_pair(scores.query.ncols())
    }
}

/// Multiply-adds that an exponential costs about as much as.
const EXPONENTIAL: f64 = 10.0;

/// Thresholds of `sparse` that are tried.
const SHARES: [f64; 7] = [0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001];

/// Parameters of a family and what they cost on the whole head.
#[derive(Debug, Clone)]
struct Step {
    spec: String,
    /// The spec that stands for it on the sample.
    pilot: String,
    rank: usize,
    multiply_adds: f64,
    /// Multiply-adds for each pair that is treated one by one.
    for_each_pair: f64,
}

impl Step {
    fn new(spec: String, rank: usize, multiply_adds: f64) -> Self {
        Self { pilot: spec.clone(), spec, rank, multiply_adds, for_each_pair: 0.0 }
    }
}

fn visible_pairs<T>(scores: &Scores<T>) -> f64 {
    let (lq, lk) = (scores.query.nrows() as f64, scores.key.nrows() as f64);
    if scores.mask == Mask::Causal { lq * (lq + 1.0) / 2.0 } else { lq * lk }
}

/// Thresholds that leave out the largest 0.1%, 1%, 5% and 20% of the sampled centered logits,
/// falling.
fn thresholds<T: Real>(pilot: &Scores<T>) -> Result<Vec<f64>> {
    let centered = super::centering::Centered::new(
        pilot,
        super::centering::Center::Both,
        &mut Cost::default(),
    )?;
    let all = large_logits(&centered.scores(pilot), 0.0, &mut Cost::default())?;
    let mut logits: Vec<f64> = all.iter().flatten().map(|(_, s)| s.widen().abs()).collect();
    logits.sort_by(|a, b| b.total_cmp(a));
    let at = |share: f64| logits.get((share * logits.len() as f64) as usize).copied();
    Ok([0.001, 0.01, 0.05, 0.2].into_iter().filter_map(at).filter(|&t| t > 0.0).collect())
}

/// At most `size` distinct indices below `length`, sorted.
fn sample(seed: u64, name: &str, length: usize, size: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..length).collect();
    all.shuffle(&mut seed_stream(seed, name));
    all.truncate(size);
    all.sort_unstable();
    all
}

/// Unmasked softmax of the scores.
fn probabilities<T: Real>(scores: &Scores<T>) -> Array2<f64> {
    let mut p = scores.query.dot(&scores.key.t()).mapv(|x| x.widen() * scores.beta);
    for mut row in p.rows_mut() {
        let largest = row.fold(f64::NEG_INFINITY, |m, &x| m.max(x));
        row.mapv_inplace(|x| (x - largest).exp());
        let sum = row.sum();
        row /= sum;
    }
    p
}

/// Relative Frobenius error of P of a method on a sample, and the share of its pairs that are
/// treated one by one; `None` if its parameters do not fit it.
fn error_of<T: Real>(
    spec: &str,
    scores: &Scores<T>,
    exact: &Array2<f64>,
    cost: &mut Cost,
) -> Result<Option<(f64, f64)>> {
    match build::<T>(spec)?.prepare(scores, cost) {
        Ok(map) => {
            cost.product(scores.query.nrows(), map.rank(), scores.key.nrows());
            let kept = map.certificate().corrected_pairs as f64 / exact.len().max(1) as f64;
            Ok(Some((probability_error(&approximation(map.as_ref(), scores), exact), kept)))
        }
        Err(Error::InvalidParam { .. } | Error::TooLarge { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// ||P^ - P||_F / ||P||_F with P^ the row-normalised approximation; infinite if a row sum is not positive.
fn probability_error<T: Real>(approximation: &Array2<T>, exact: &Array2<f64>) -> f64 {
    let (mut gap, mut norm) = (0.0, 0.0);
    for (row, want) in approximation.rows().into_iter().zip(exact.rows()) {
        gap += square_gap(row, want);
        norm += want.dot(&want);
    }
    (gap / norm).sqrt()
}

/// Squared distance of a row, normalised, from probabilities; infinite if its sum is not positive.
fn square_gap<T: Real>(row: ArrayView1<T>, want: ArrayView1<f64>) -> f64 {
    let sum: f64 = row.iter().map(|x| x.widen()).sum();
    if !(sum > 0.0 && sum.is_finite()) {
        return f64::INFINITY;
    }
    row.iter().zip(want).map(|(x, p)| (x.widen() / sum - p).powi(2)).sum()
}

/// As [`probability_error`], on a sample of whole rows of the head, visible keys only.
fn measured_error<T: Real>(
    map: &dyn FeatureMap<T>,
    scores: &Scores<T>,
    seed: u64,
    cost: &mut Cost,
) -> f64 {
    let rows = sample(seed, "auto-measured", scores.query.nrows(), MEASURED_ROWS);
    let mut psi = Array2::zeros((map.rank(), scores.key.nrows()));
    map.key_features(0, scores.key, psi.view_mut());
    let (mut gap, mut norm) = (0.0, 0.0);
    for &i in &rows {
        let visible = if scores.mask == Mask::Causal { i + 1 } else { scores.key.nrows() };
        let query = scores.query.slice(s![i..=i, ..]);
        let exact =
            probabilities(&Scores { query, key: scores.key.slice(s![..visible, ..]), ..*scores });
        let mut phi = Array2::zeros((map.rank(), 1));
        map.query_features(i, query, phi.view_mut());
        let mut row = phi.column(0).dot(&psi.slice(s![.., ..visible]));
        if let Some(sparse) = map.sparse() {
            sparse.row(i).for_each(|(j, x)| row[j] += x);
        }
        gap += square_gap(row.view(), exact.row(0));
        norm += exact.row(0).dot(&exact.row(0));
    }
    cost.product(rows.len(), map.rank() + scores.query.ncols(), scores.key.nrows());
    (gap / norm).sqrt()
}

impl<T: Real> SoftmaxFactorization<T> for Auto {
    fn spec(&self) -> String {
        let columns = self.columns.map_or_else(String::new, |w| format!(",columns={w}"));
        format!("auto:eps={},seed={}{columns}", self.eps, self.seed)
    }

    /// # Errors
    /// [`Error::InvalidParam`] if no method with at most L columns reaches the target, or none at
    /// less than the exact gradient's cost.
    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        let candidates = self.predict(scores, cost)?;
        let exact_multiply_adds = self.exact_multiply_adds(scores);
        for chosen in candidates.iter().filter(|c| c.predicted_multiply_adds < exact_multiply_adds)
        {
            let map = build::<T>(&chosen.spec)?.prepare(scores, cost)?;
            let measured_error = measured_error(map.as_ref(), scores, self.seed, cost);
            if measured_error <= self.eps {
                let selection = Selection {
                    eps: self.eps,
                    chosen: chosen.clone(),
                    measured_error,
                    exact_multiply_adds,
                    candidates: candidates.clone(),
                };
                let certificate =
                    Certificate { selection: Some(selection), ..map.certificate().clone() };
                return Ok(Box::new(Chosen { map, certificate }));
            }
        }
        let why = format!(
            "no factorization is predicted to reach it on this head with fewer than the \
             {exact_multiply_adds:.1e} multiply-adds of the exact gradient; take the exact gradient"
        );
        Err(Error::invalid("eps", self.eps, why))
    }
}

/// The chosen map with the story of its choice.
struct Chosen<T> {
    map: Box<dyn FeatureMap<T>>,
    certificate: Certificate,
}

impl<T: Real> FeatureMap<T> for Chosen<T> {
    fn rank(&self) -> usize {
        self.map.rank()
    }

    fn query_features(&self, first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.map.query_features(first_row, rows, out);
    }

    fn key_features(&self, first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.map.key_features(first_row, rows, out);
    }

    fn count_query_features(&self, rows: usize, cost: &mut Cost) {
        self.map.count_query_features(rows, cost);
    }

    fn count_key_features(&self, rows: usize, cost: &mut Cost) {
        self.map.count_key_features(rows, cost);
    }

    fn row_shift(&self) -> Option<&[T]> {
        self.map.row_shift()
    }

    fn sparse(&self) -> Option<&SparseCorrection<T>> {
        self.map.sparse()
    }

    fn monomials(&self) -> Option<&MonomialMap<T>> {
        self.map.monomials()
    }

    fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}
