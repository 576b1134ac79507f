//! MosLoRA: y = x W^T + s ((x A^T) M^T) B^T, an r x r mixer between the factors of LoRA (\[MosLoRA\]).

use super::InputSink;
use super::lora::{LoraSpec, kaiming_uniform};
use super::low_rank::LowRank;
use crate::blocks::require_shape;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::linalg::gemm::{parallel_product_into, product};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

/// How the mixer starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MixerInit {
    /// Uniform on (-1/sqrt(r), 1/sqrt(r)).
    Kaiming,
    /// A random orthogonal matrix.
    #[default]
    Orthogonal,
    /// The identity: plain LoRA at the start.
    Identity,
}

impl MixerInit {
    fn sample<T: Real>(self, rank: usize, rng: &mut impl Rng) -> Array2<T> {
        match self {
            MixerInit::Kaiming => kaiming_uniform(rank, rank, rng),
            MixerInit::Identity => Array2::eye(rank),
            MixerInit::Orthogonal => orthogonal(rank, rng).mapv(T::of),
        }
    }
}

/// Gram-Schmidt, applied twice, on rows of independent normals.
fn orthogonal(rank: usize, rng: &mut impl Rng) -> Array2<f64> {
    let mut m = Array2::<f64>::from_shape_simple_fn((rank, rank), || StandardNormal.sample(rng));
    for i in 0..rank {
        for _ in 0..2 {
            for j in 0..i {
                let (done, mut rest) = m.view_mut().split_at(ndarray::Axis(0), i);
                let dot = rest.row(0).dot(&done.row(j));
                rest.row_mut(0).scaled_add(-dot, &done.row(j));
            }
        }
        let norm = m.row(i).dot(&m.row(i)).sqrt();
        m.row_mut(i).mapv_inplace(|x| x / norm);
    }
    m
}

/// Factors and mixer.
#[derive(Debug, Clone)]
pub struct Moslora<T> {
    /// A, `r x in`.
    pub a: Array2<T>,
    /// B, `out x r`.
    pub b: Array2<T>,
    /// M, `r x r`; the update is s B M A.
    pub mixer: Array2<T>,
    /// Settings.
    pub spec: LoraSpec,
    /// s.
    pub scaling: f64,
}

impl<T: Real> Moslora<T> {
    /// A Kaiming-uniform, B zero, the mixer as asked.
    ///
    /// # Errors
    /// As [`LoraSpec::scaling`].
    pub fn init(spec: LoraSpec, mixer: MixerInit, shape: (usize, usize), rng: &mut impl Rng) -> Result<Self> {
        let scaling = spec.scaling(shape)?;
        let a = kaiming_uniform(spec.rank, shape.1, rng);
        Ok(Self { a, b: Array2::zeros((shape.0, spec.rank)), mixer: mixer.sample(spec.rank, rng), spec, scaling })
    }

    /// From given factors, for instance of a file.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`]; as [`LoraSpec::scaling`].
    pub fn from_factors(spec: LoraSpec, shape: (usize, usize), factors: [Array2<T>; 3]) -> Result<Self> {
        let scaling = spec.scaling(shape)?;
        let [a, b, mixer] = factors;
        require_shape("moslora", "lora_A", &a.view(), (spec.rank, shape.1))?;
        require_shape("moslora", "lora_B", &b.view(), (shape.0, spec.rank))?;
        require_shape("moslora", "lora_mixer", &mixer.view(), (spec.rank, spec.rank))?;
        Ok(Self { a, b, mixer, spec, scaling })
    }

    /// B M, `out x r`: the update is that of LoRA with it in place of B.
    pub(super) fn mixed_up(&self, cost: &mut Cost) -> Array2<T> {
        product(self.b.view(), self.mixer.view(), cost)
    }

    /// The update beside the weight under it; `mixed` is [`Moslora::mixed_up`].
    pub(super) fn beside<'a>(&'a self, weight: ArrayView2<'a, T>, mixed: &'a Array2<T>) -> LowRank<'a, T> {
        LowRank { weight, a: self.a.view(), b: mixed.view(), scaling: T::of(self.scaling) }
    }

    /// With z = xA^T, dz = s dy B M and P = dy^T z: dB += s P M^T, dM += s B^T P, dA += dz^T x,
    /// dx = beta dx + dy W + dz A. Sinks: dA, dB, dM.
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
        let scaling = T::of(self.scaling);
        let mixed = self.mixed_up(cost);
        let (outer, da) = self.beside(weight, &mixed).backward(dy, x, projected, dx, cost);
        sinks[0] += &da;
        sinks[1].scaled_add(scaling, &product(outer.view(), self.mixer.t(), cost));
        sinks[2].scaled_add(scaling, &product(self.b.t(), outer.view(), cost));
    }

    /// weight += s B M A.
    pub fn add_delta(&self, weight: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        let mut mixed = Array2::zeros(self.a.dim());
        parallel_product_into(T::one(), self.mixer.view(), self.a.view(), T::zero(), &mut mixed.view_mut(), cost);
        parallel_product_into(T::of(self.scaling), self.b.view(), mixed.view(), T::one(), weight, cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn the_orthogonal_mixer_is_orthogonal() {
        let m: Array2<f64> = MixerInit::Orthogonal.sample(7, &mut rand_chacha::ChaCha8Rng::seed_from_u64(3));
        let gap = (m.dot(&m.t()) - Array2::<f64>::eye(7)).iter().fold(0.0f64, |g, x| g.max(x.abs()));
        assert!(gap < 1e-14, "{gap}");
    }
}
