//! MosLoRA: y = x W^T + s ((x A^T) M^T) B^T, an r x r mixer between the factors of LoRA
//! (\[MosLoRA\]).

use super::lora::{LoraSpec, kaiming_uniform, read_factors};
use super::stored::{ReadTensors, Settings, Stored, WriteTensors};
use super::{Adaptation, BaseWeight, Change, InputNeed};
use crate::blocks::require_shape;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::linalg::gemm::parallel_product_into;
use crate::ops::{BesideWeight, Cpu, InputGradient, Ops};
use ndarray::{Array2, ArrayViewMut2};
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

/// Factors and mixer, on some engine.
#[derive(Debug, Clone)]
pub struct MosloraOn<E: Ops> {
    /// A, `r x in`.
    pub a: E::Matrix,
    /// B, `out x r`.
    pub b: E::Matrix,
    /// M, `r x r`; the update is s B M A.
    pub mixer: E::Matrix,
    /// Settings.
    pub spec: LoraSpec,
    /// s.
    pub scaling: f64,
}

/// Factors and mixer on the processor.
pub type Moslora<T> = MosloraOn<Cpu<T>>;

impl<E: Ops> Adaptation<E> for MosloraOn<E> {
    fn name(&self) -> &'static str {
        "moslora"
    }

    fn trained_names(&self) -> &'static [&'static str] {
        &["lora_A", "lora_B", "lora_mixer"]
    }

    fn trained_shapes(&self, _: (usize, usize)) -> Vec<(usize, usize)> {
        [&self.a, &self.b, &self.mixer].map(E::shape).to_vec()
    }

    fn input_need(&self) -> InputNeed {
        InputNeed::Whole
    }

    fn saved_name(&self) -> &'static str {
        "projected"
    }

    /// LoRA's forward with B M in place of B.
    fn forward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        save: bool,
    ) -> Result<(E::Matrix, Option<E::Matrix>)> {
        let mixed = e.small_product((&self.b, false), (&self.mixer, false));
        let beside = BesideWeight { weight, a: &self.a, b: &mixed, scaling: self.scaling };
        let (y, z) = e.low_rank(&beside, x, add_to);
        Ok((y, save.then_some(z)))
    }

    /// With z = xA^T, dz = s dy B M and P = dy^T z: dB += s P M^T, dM += s B^T P, dA += dz^T x,
    /// dx = dy W + dz A.
    fn backward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        saved: Option<E::Matrix>,
        sinks: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>> {
        let (x, z) = (super::whole(x)?, super::kept(saved, "xA^T")?);
        let mixed = e.small_product((&self.b, false), (&self.mixer, false));
        let beside = BesideWeight { weight, a: &self.a, b: &mixed, scaling: self.scaling };
        let (outer, da, dx) = e.low_rank_backward(&beside, dy, x, &z, dx);
        e.accumulate(&mut sinks[0], 1.0, &da);
        let db = e.small_product((&outer, false), (&self.mixer, true));
        e.accumulate(&mut sinks[1], self.scaling, &db);
        let dmixer = e.small_product((&self.b, true), (&outer, false));
        e.accumulate(&mut sinks[2], self.scaling, &dmixer);
        Ok(dx)
    }

    fn values(&self, _: &mut E, _: &E::Weight) -> Vec<E::Matrix> {
        [&self.a, &self.b, &self.mixer].map(Clone::clone).to_vec()
    }

    fn update(&mut self, _: &mut E, _: &mut E::Weight, change: Change<'_, E>) -> Result<()> {
        change("lora_A", &mut self.a)?;
        change("lora_B", &mut self.b)?;
        change("lora_mixer", &mut self.mixer)
    }
}

impl<T: Real> Moslora<T> {
    /// A Kaiming-uniform, B zero, the mixer as asked.
    ///
    /// # Errors
    /// As [`LoraSpec::scaling`].
    pub fn init(
        spec: LoraSpec,
        mixer: MixerInit,
        shape: (usize, usize),
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let scaling = spec.scaling()?;
        let a = kaiming_uniform(spec.rank, shape.1, rng);
        Ok(Self {
            a,
            b: Array2::zeros((shape.0, spec.rank)),
            mixer: mixer.sample(spec.rank, rng),
            spec,
            scaling,
        })
    }

    /// From given factors, for instance of a file.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`]; as [`LoraSpec::scaling`].
    pub fn from_factors(
        spec: LoraSpec,
        shape: (usize, usize),
        factors: [Array2<T>; 3],
    ) -> Result<Self> {
        let scaling = spec.scaling()?;
        let [a, b, mixer] = factors;
        require_shape("moslora", "lora_A", &a.view(), (spec.rank, shape.1))?;
        require_shape("moslora", "lora_B", &b.view(), (shape.0, spec.rank))?;
        require_shape("moslora", "lora_mixer", &mixer.view(), (spec.rank, spec.rank))?;
        Ok(Self { a, b, mixer, spec, scaling })
    }

    /// weight += s B M A.
    pub fn add_delta(&self, weight: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        let mut mixed = Array2::zeros(self.a.dim());
        parallel_product_into(
            T::one(),
            self.mixer.view(),
            self.a.view(),
            T::zero(),
            &mut mixed.view_mut(),
            cost,
        );
        parallel_product_into(
            T::of(self.scaling),
            self.b.view(),
            mixed.view(),
            T::one(),
            weight,
            cost,
        );
    }
}

impl<T: Real> Stored<T> for Moslora<T> {
    fn save(&self, _: &BaseWeight<T>, to: &mut dyn WriteTensors<T>) {
        to.matrix("lora_A.weight", self.a.view());
        to.matrix("lora_B.weight", self.b.view());
        to.matrix("lora_mixer.weight", self.mixer.view());
    }

    fn load(
        settings: &Settings,
        base: &mut BaseWeight<T>,
        from: &mut dyn ReadTensors<T>,
    ) -> Result<Self> {
        let (spec, shape) = (settings.spec, base.shape());
        let (a, b) = read_factors(&spec, shape, from)?;
        let mixer = from.matrix("lora_mixer.weight", (spec.rank, spec.rank))?;
        Self::from_factors(spec, shape, [a, b, mixer])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn the_orthogonal_mixer_is_orthogonal() {
        let m: Array2<f64> =
            MixerInit::Orthogonal.sample(7, &mut rand_chacha::ChaCha8Rng::seed_from_u64(3));
        let gap =
            (m.dot(&m.t()) - Array2::<f64>::eye(7)).iter().fold(0.0f64, |g, x| g.max(x.abs()));
        assert!(gap < 1e-14, "{gap}");
    }
}
