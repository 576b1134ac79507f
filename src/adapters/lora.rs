//! LoRA: y = x W^T + s (x A^T) B^T, s = alpha / r, or alpha / sqrt(r) when rank-stabilized (\[LoRA\]).

use super::InputSink;
use super::low_rank::LowRank;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::gemm::parallel_product_into;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rand::{Rng, RngExt};

/// Settings of a low-rank update.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `rank` | 8 | r | 1 to min(in, out) |
/// | `alpha` | 16 | numerator of the scaling | finite |
/// | `rank_stabilized` | false | alpha / sqrt(r) in place of alpha / r | |
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraSpec {
    /// r.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// rsLoRA scaling.
    pub rank_stabilized: bool,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, rank_stabilized: false }
    }
}

impl LoraSpec {
    /// The factor s, after checking the settings against the shape (out, in).
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a rank outside 1..=min(out, in) or an alpha that is not finite.
    pub fn scaling(&self, shape: (usize, usize)) -> Result<f64> {
        let largest = shape.0.min(shape.1);
        if self.rank == 0 || self.rank > largest {
            return Err(Error::invalid("rank", self.rank, format!("must be in 1..={largest} for shape {shape:?}")));
        }
        if !self.alpha.is_finite() {
            return Err(Error::invalid("alpha", self.alpha, "must be finite"));
        }
        let rank = self.rank as f64;
        Ok(if self.rank_stabilized { self.alpha / rank.sqrt() } else { self.alpha / rank })
    }
}

/// Entries uniform on (-1/sqrt(columns), 1/sqrt(columns)): PEFT's initial A (Kaiming uniform with a = sqrt 5).
pub(crate) fn kaiming_uniform<T: Real>(rows: usize, columns: usize, rng: &mut impl Rng) -> Array2<T> {
    let bound = 1.0 / (columns.max(1) as f64).sqrt();
    Array2::from_shape_simple_fn((rows, columns), || T::of((2.0 * rng.random::<f64>() - 1.0) * bound))
}

/// The factors of a low-rank update.
#[derive(Debug, Clone)]
pub struct Lora<T> {
    /// A, `r x in`.
    pub a: Array2<T>,
    /// B, `out x r`.
    pub b: Array2<T>,
    /// Settings.
    pub spec: LoraSpec,
    /// s.
    pub scaling: f64,
}

impl<T: Real> Lora<T> {
    /// A Kaiming-uniform, B zero: the update starts at zero.
    ///
    /// # Errors
    /// As [`LoraSpec::scaling`].
    pub fn init(spec: LoraSpec, shape: (usize, usize), rng: &mut impl Rng) -> Result<Self> {
        let scaling = spec.scaling(shape)?;
        let (out, width) = shape;
        Ok(Self { a: kaiming_uniform(spec.rank, width, rng), b: Array2::zeros((out, spec.rank)), spec, scaling })
    }

    /// From given factors, for instance of a file.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; as [`LoraSpec::scaling`].
    pub fn from_factors(spec: LoraSpec, shape: (usize, usize), a: Array2<T>, b: Array2<T>) -> Result<Self> {
        let scaling = spec.scaling(shape)?;
        crate::blocks::require_shape("lora", "lora_A", &a.view(), (spec.rank, shape.1))?;
        crate::blocks::require_shape("lora", "lora_B", &b.view(), (shape.0, spec.rank))?;
        Ok(Self { a, b, spec, scaling })
    }

    /// y += s (x A^T) B^T, without the weight under it.
    pub fn forward_add(&self, x: ArrayView2<T>, y: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        let mut projected = Array2::zeros((x.nrows(), self.a.nrows()));
        parallel_product_into(T::one(), x, self.a.t(), T::zero(), &mut projected.view_mut(), cost);
        parallel_product_into(T::of(self.scaling), projected.view(), self.b.t(), T::one(), y, cost);
    }

    /// The update beside the weight under it.
    pub(super) fn beside<'a>(&'a self, weight: ArrayView2<'a, T>) -> LowRank<'a, T> {
        LowRank { weight, a: self.a.view(), b: self.b.view(), scaling: T::of(self.scaling) }
    }

    /// With z = xA^T and dz = s dy B: dB += s dy^T z, dA += dz^T x, dx = beta dx + dy W + dz A. Sinks: dA, dB.
    pub(super) fn backward(
        &self,
        weight: ArrayView2<T>,
        dy: ArrayView2<T>,
        x: ArrayView2<T>,
        projected: ArrayView2<T>,
        sinks: &mut [Array2<T>],
        dx: Option<InputSink<'_, '_, T>>,
        cost: &mut Cost,
    ) {
        let (product, da) = self.beside(weight).backward(dy, x, projected, dx, cost);
        sinks[0] += &da;
        sinks[1].scaled_add(T::of(self.scaling), &product);
    }

    /// weight += s B A.
    pub fn add_delta(&self, weight: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        parallel_product_into(T::of(self.scaling), self.b.view(), self.a.view(), T::one(), weight, cost);
    }
}
