//! `tensor-sketch:degree=g,rank=k[,seed=S][,nonnegative=true][,center=both|keys|none]`: sketched
//! polynomial kernels \[PolySketch\].
//!
//! A count sketch C: R^d -> R^m sends coordinate l to bucket h(l) with sign s(l); the circular
//! convolution of n independent ones is a sketch of x (x) ... (x) x whose inner products are
//! unbiased: E <T_n x, T_n y> = (x.y)^n. A convolution is a product of discrete Fourier transforms,
//! and by Parseval's identity the inner product can be taken there too, so features are products of
//! transforms and no inverse transform is made. The transform of a count sketch is linear in x, m
//! real numbers from d: at head widths it is made as a product with a fixed `m x d` matrix, inside
//! GEMM (the FFT is the independent path of the tests).
//!
//! Features are those of the Taylor polynomial: degrees 0 and 1 exactly (1 + d_h columns), the
//! others sketched with equal shares of the rest, so Phi Psi^T is unbiased for that polynomial of
//! the (centered) scores.
//!
//! `nonnegative` sketches exp(s / 2) at degree g / 2 and squares: the features are all products of
//! two, so Phi Psi^T = (inner product)^2 >= 0 and no denominator is negative. The square is biased
//! upwards by the variance.

use super::centering::{Center, Centered};
use super::polynomial::taylor;
use super::{Certificate, FeatureMap, MAX_RANK, Scores, SoftmaxFactorization};
use crate::attention::shards::{RowShards, WholeHead};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::{Real, product_into};
use crate::streams::seed_stream;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Sketched Taylor polynomial.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `degree` | none | g | >= 2; even and >= 4 if `nonnegative` |
/// | `rank` | none | columns k, of which at most this many are used | at least 1 + d_h + (g - 1); squared if `nonnegative` |
/// | `seed` | 0 | of buckets and signs | |
/// | `nonnegative` | false | square of a sketch of exp(s / 2) | |
/// | `center` | both | which means are taken out | |
///
/// No bound on the error: the certificate has none.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSketch {
    /// Degree g.
    pub degree: usize,
    /// Columns k.
    pub rank: usize,
    /// Seed of buckets and signs.
    pub seed: u64,
    /// Whether to square a sketch of half the scores.
    pub nonnegative: bool,
    /// Which means are taken out first.
    pub center: Center,
}

impl<T: Real> SoftmaxFactorization<T> for TensorSketch {
    fn spec(&self) -> String {
        let sign = if self.nonnegative { ",nonnegative=true" } else { "" };
        let center = super::spec::center_suffix(self.center);
        format!(
            "tensor-sketch:degree={},rank={},seed={}{sign}{center}",
            self.degree, self.rank, self.seed
        )
    }

    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        self.prepare_shard(scores, &WholeHead, cost)
    }

    fn prepare_shard(
        &self,
        scores: &Scores<T>,
        shards: &dyn RowShards<T>,
        cost: &mut Cost,
    ) -> Result<Box<dyn FeatureMap<T>>> {
        let d = scores.query.ncols();
        if self.rank > MAX_RANK {
            return Err(Error::invalid("rank", self.rank, format!("must be at most {MAX_RANK}")));
        }
        if self.nonnegative && (!self.degree.is_multiple_of(2) || self.degree < 4) {
            return Err(Error::invalid(
                "degree",
                self.degree,
                "must be even and at least 4 with nonnegative=true",
            ));
        }
        if self.degree < 2 {
            return Err(Error::invalid(
                "degree",
                self.degree,
                "must be at least 2: degrees 0 and 1 are not sketched",
            ));
        }
        let degree = if self.nonnegative { self.degree / 2 } else { self.degree };
        // Products of two of w columns: w (w + 1) / 2.
        let inner = if self.nonnegative {
            ((8.0 * self.rank as f64 + 1.0).sqrt() as usize).saturating_sub(1) / 2
        } else {
            self.rank
        };
        let least = 1 + d + (degree - 1);
        if inner < least {
            let least = if self.nonnegative { least * (least + 1) / 2 } else { least };
            let why = format!("must be at least {least} at head_dim {d} and this degree");
            return Err(Error::invalid("rank", self.rank, why));
        }
        let length = (inner - 1 - d) / (degree - 1);
        let centered = Centered::of_shard(scores, self.center, shards, cost)?;
        let mut rng = seed_stream(self.seed, "tensor-sketch");
        let mut transforms = Array2::zeros((degree * length, d));
        for mut block in transforms.axis_chunks_iter_mut(Axis(0), length) {
            block.assign(&CountSketch::draw(d, length, &mut rng).transform().mapv(T::of));
        }
        let columns = 1 + d + (degree - 1) * length;
        let coefficients = taylor(degree).coefficients;
        let mut weights = vec![T::one(); columns];
        for (n, block) in (2..=degree).zip(weights[1 + d..].chunks_exact_mut(length)) {
            let parseval = parseval_weights(length);
            block.iter_mut().zip(parseval).for_each(|(w, p)| *w = T::of(coefficients[n] * p));
        }
        let share = if self.nonnegative { 0.5 } else { 1.0 };
        let rank = if self.nonnegative { columns * (columns + 1) / 2 } else { columns };
        let certificate = Certificate {
            spec: SoftmaxFactorization::<T>::spec(self),
            rank,
            degree: Some(self.degree),
            ..Certificate::default()
        };
        cost.hold(transforms.len());
        let input_scale = T::of((scores.beta * share).sqrt());
        let nonnegative = self.nonnegative;
        Ok(Box::new(SketchMap {
            transforms,
            length,
            degree,
            weights,
            input_scale,
            nonnegative,
            centered,
            certificate,
        }))
    }
}

/// Buckets and signs of one count sketch of R^d in R^m.
#[derive(Debug, Clone)]
pub struct CountSketch {
    /// h(l), below m.
    pub buckets: Vec<usize>,
    /// s(l), -1 or 1.
    pub signs: Vec<f64>,
    /// m.
    pub length: usize,
}

impl CountSketch {
    /// Draws independent buckets and signs.
    pub fn draw(dimension: usize, length: usize, rng: &mut ChaCha8Rng) -> Self {
        Self {
            buckets: (0..dimension).map(|_| rng.random_range(0..length)).collect(),
            signs: (0..dimension).map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 }).collect(),
            length,
        }
    }

    /// The matrix of the discrete Fourier transform of the sketch, `m x d`, as real rows: the real
    /// entry 0; for even m the real entry m/2; then real and imaginary part of entries 1, 2, ...
    /// below m/2.
    pub fn transform(&self) -> Array2<f64> {
        let m = self.length;
        let mut matrix = Array2::zeros((m, self.buckets.len()));
        for (l, (&bucket, &sign)) in self.buckets.iter().zip(&self.signs).enumerate() {
            // The phase is reduced before the sine: exact for any length.
            let wave = |f: usize| std::f64::consts::TAU * ((f * bucket) % m) as f64 / m as f64;
            let real = real_entries(m);
            for f in 0..real {
                matrix[[f, l]] = sign * wave(f * (m / 2)).cos();
            }
            for f in 1..=(m - real) / 2 {
                let row = real + 2 * (f - 1);
                matrix[[row, l]] = sign * wave(f).cos();
                matrix[[row + 1, l]] = -sign * wave(f).sin();
            }
        }
        matrix
    }
}

/// Entries of a transform of length m that are real: 0 and, for even m, m/2.
fn real_entries(m: usize) -> usize {
    if m.is_multiple_of(2) { 2 } else { 1 }
}

/// Weights w with <a, b> = sum_f w_f a_f b_f over the real rows of two transforms.
fn parseval_weights(m: usize) -> impl Iterator<Item = f64> {
    let real = real_entries(m);
    (0..m).map(move |row| if row < real { 1.0 / m as f64 } else { 2.0 / m as f64 })
}

struct SketchMap<T> {
    /// Transforms of the count sketches, one below the other, `g m x d`.
    transforms: Array2<T>,
    /// m.
    length: usize,
    /// Degree of the sketched polynomial: g, or g / 2 if squared.
    degree: usize,
    /// c_n times Parseval's weights, for the query side.
    weights: Vec<T>,
    input_scale: T,
    nonnegative: bool,
    centered: Centered<T>,
    certificate: Certificate,
}

impl<T: Real> SketchMap<T> {
    /// [1 | x | T_2 x | ... | T_g x], transposed.
    fn sketches(&self, rows: ArrayView2<T>, mean: &Array1<T>, mut out: ArrayViewMut2<T>) {
        let inputs = (&rows - mean) * self.input_scale;
        let (d, m) = (rows.ncols(), self.length);
        out.row_mut(0).fill(T::one());
        out.slice_mut(s![1..=d, ..]).assign(&inputs.t());
        let mut spectra = Array2::zeros((self.degree * m, rows.nrows()));
        product_into(
            self.transforms.view(),
            inputs.t(),
            T::zero(),
            &mut spectra.view_mut(),
            &mut Cost::default(),
        );
        for n in 2..=self.degree {
            let start = 1 + d + (n - 2) * m;
            let (before, mut block) = out.view_mut().split_at(Axis(0), start);
            let mut block = block.slice_mut(s![..m, ..]);
            let next = spectra.slice(s![(n - 1) * m..n * m, ..]);
            let left =
                if n == 2 { spectra.slice(s![..m, ..]) } else { before.slice(s![start - m.., ..]) };
            multiply_spectra(left, next, &mut block);
        }
    }

    fn fill(
        &self,
        rows: ArrayView2<T>,
        mean: &Array1<T>,
        mut out: ArrayViewMut2<T>,
        weighted: bool,
    ) {
        let weight_rows = |mut a: ArrayViewMut2<T>| {
            if weighted {
                a.rows_mut().into_iter().zip(&self.weights).for_each(|(mut row, &w)| row *= w);
            }
        };
        if !self.nonnegative {
            self.sketches(rows, mean, out.view_mut());
            weight_rows(out);
            return;
        }
        let mut inner = Array2::zeros((self.weights.len(), rows.nrows()));
        self.sketches(rows, mean, inner.view_mut());
        weight_rows(inner.view_mut());
        // (sum_a u_a v_a)^2 = sum_a u_a^2 v_a^2 + 2 sum_{a < b} u_a u_b v_a v_b.
        let mut products = out.rows_mut().into_iter();
        for a in 0..inner.nrows() {
            for b in a..inner.nrows() {
                let Some(mut row) = products.next() else { return };
                let twice = if weighted && b > a { T::of(2.0) } else { T::one() };
                ndarray::Zip::from(&mut row)
                    .and(inner.row(a))
                    .and(inner.row(b))
                    .for_each(|o, &x, &y| *o = twice * x * y);
            }
        }
    }

    fn count(&self, rows: usize, cost: &mut Cost) {
        cost.product(self.transforms.nrows(), self.transforms.ncols(), rows);
        // Four products and two sums for two real rows.
        cost.elementwise += (3 * (self.degree - 1) * self.length * rows) as u64;
    }
}

/// Entrywise product of complex spectra in the real layout of [`CountSketch::transform`].
fn multiply_spectra<T: Real>(a: ArrayView2<T>, b: ArrayView2<T>, out: &mut ArrayViewMut2<T>) {
    let real = real_entries(out.nrows());
    for f in 0..real {
        ndarray::Zip::from(out.row_mut(f))
            .and(a.row(f))
            .and(b.row(f))
            .for_each(|o, &x, &y| *o = x * y);
    }
    for re in (real..out.nrows()).step_by(2) {
        let im = re + 1;
        let (mut upper, mut lower) = out.multi_slice_mut((s![re, ..], s![im, ..]));
        ndarray::Zip::from(&mut upper)
            .and(a.row(re))
            .and(a.row(im))
            .and(b.row(re))
            .and(b.row(im))
            .for_each(|o, &ar, &ai, &br, &bi| *o = ar * br - ai * bi);
        ndarray::Zip::from(&mut lower)
            .and(a.row(re))
            .and(a.row(im))
            .and(b.row(re))
            .and(b.row(im))
            .for_each(|o, &ar, &ai, &br, &bi| *o = ar * bi + ai * br);
    }
}

impl<T: Real> FeatureMap<T> for SketchMap<T> {
    fn rank(&self) -> usize {
        self.certificate.rank
    }

    fn query_features(&self, _first_row: usize, rows: ArrayView2<T>, out: ArrayViewMut2<T>) {
        self.fill(rows, &self.centered.query_mean, out, true);
    }

    fn key_features(&self, first_row: usize, rows: ArrayView2<T>, mut out: ArrayViewMut2<T>) {
        self.fill(rows, &self.centered.key_mean, out.view_mut(), false);
        self.centered.scale_columns(first_row, out);
    }

    fn count_query_features(&self, rows: usize, cost: &mut Cost) {
        self.count(rows, cost);
    }

    fn count_key_features(&self, rows: usize, cost: &mut Cost) {
        self.count(rows, cost);
    }

    fn row_shift(&self) -> Option<&[T]> {
        self.centered.row_shift.as_deref()
    }

    fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}
