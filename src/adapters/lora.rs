//! LoRA: y = x W^T + s (x A^T) B^T, s = alpha / r, or alpha / sqrt(r) when rank-stabilized
//! (\[LoRA\]).

use super::stored::{ReadTensors, Settings, Stored, WriteTensors};
use super::{Adaptation, BaseWeight, Change, InputNeed};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::gemm::parallel_product_into;
use crate::ops::{BesideWeight, Cpu, InputGradient, Ops};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rand::{Rng, RngExt};

/// Settings of a low-rank update.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `rank` | 8 | r; more than min(in, out) adds nothing, and PEFT lets it be | 1 to 65,536 |
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
    /// The factor s, after checking the settings.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a rank outside 1..=65,536 or an alpha that is not finite.
    pub fn scaling(&self) -> Result<f64> {
        // The router of a mixture has as many outputs as there are experts, often fewer than r.
        const LARGEST: usize = 1 << 16;
        if self.rank == 0 || self.rank > LARGEST {
            return Err(Error::invalid("rank", self.rank, format!("must be in 1..={LARGEST}")));
        }
        if !self.alpha.is_finite() {
            return Err(Error::invalid("alpha", self.alpha, "must be finite"));
        }
        let rank = self.rank as f64;
        Ok(if self.rank_stabilized { self.alpha / rank.sqrt() } else { self.alpha / rank })
    }
}

/// Entries uniform on (-1/sqrt(columns), 1/sqrt(columns)): PEFT's initial A (Kaiming uniform with
/// a = sqrt 5).
pub(crate) fn kaiming_uniform<T: Real>(
    rows: usize,
    columns: usize,
    rng: &mut impl Rng,
) -> Array2<T> {
    let bound = 1.0 / (columns.max(1) as f64).sqrt();
    Array2::from_shape_simple_fn((rows, columns), || {
        T::of((2.0 * rng.random::<f64>() - 1.0) * bound)
    })
}

/// The factors of a low-rank update, on some engine.
#[derive(Debug, Clone)]
pub struct LoraOn<E: Ops> {
    /// A, `r x in`.
    pub a: E::Matrix,
    /// B, `out x r`.
    pub b: E::Matrix,
    /// Bias of the update, `1 x out`, also times s (`lora_bias`).
    pub bias: Option<E::Matrix>,
    /// Settings.
    pub spec: LoraSpec,
    /// s.
    pub scaling: f64,
}

/// The factors on the processor.
pub type Lora<T> = LoraOn<Cpu<T>>;

impl<E: Ops> LoraOn<E> {
    /// The update beside the weight under it.
    fn beside<'a>(&'a self, weight: &'a E::Weight) -> BesideWeight<'a, E> {
        BesideWeight { weight, a: &self.a, b: &self.b, scaling: self.scaling }
    }
}

impl<E: Ops> Adaptation<E> for LoraOn<E> {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn trained_names(&self) -> &'static [&'static str] {
        if self.bias.is_some() {
            &["lora_A", "lora_B", "lora_B_bias"]
        } else {
            &["lora_A", "lora_B"]
        }
    }

    fn trained_shapes(&self, _: (usize, usize)) -> Vec<(usize, usize)> {
        let factors = [E::shape(&self.a), E::shape(&self.b)];
        factors.into_iter().chain(self.bias.as_ref().map(E::shape)).collect()
    }

    fn input_need(&self) -> InputNeed {
        InputNeed::Whole
    }

    fn saved_name(&self) -> &'static str {
        "projected"
    }

    fn forward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        save: bool,
    ) -> Result<(E::Matrix, Option<E::Matrix>)> {
        let (mut y, z) = e.low_rank(&self.beside(weight), x, add_to);
        if let Some(bias) = &self.bias {
            y = e.add_matrix_row(y, bias, self.scaling)?;
        }
        Ok((y, save.then_some(z)))
    }

    /// With z = xA^T and dz = s dy B: dB += s dy^T z, dA += dz^T x, dx = dy W + dz A.
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
        let (outer, da, dx) = e.low_rank_backward(&self.beside(weight), dy, x, &z, dx);
        e.accumulate(&mut sinks[0], 1.0, &da);
        e.accumulate(&mut sinks[1], self.scaling, &outer);
        if let Some(sink) = sinks.get_mut(2) {
            let sum = e.row_sum(dy)?;
            e.accumulate(sink, self.scaling, &sum);
        }
        Ok(dx)
    }

    fn values(&self, _: &mut E, _: &E::Weight) -> Vec<E::Matrix> {
        [&self.a, &self.b].into_iter().chain(&self.bias).cloned().collect()
    }

    fn update(&mut self, _: &mut E, _: &mut E::Weight, change: Change<'_, E>) -> Result<()> {
        change("lora_A", &mut self.a)?;
        change("lora_B", &mut self.b)?;
        match &mut self.bias {
            Some(bias) => change("lora_B_bias", bias),
            None => Ok(()),
        }
    }
}

impl<T: Real> Lora<T> {
    /// A Kaiming-uniform, B zero: the update starts at zero.
    ///
    /// # Errors
    /// As [`LoraSpec::scaling`].
    pub fn init(spec: LoraSpec, shape: (usize, usize), rng: &mut impl Rng) -> Result<Self> {
        let scaling = spec.scaling()?;
        let (out, width) = shape;
        Ok(Self {
            a: kaiming_uniform(spec.rank, width, rng),
            b: Array2::zeros((out, spec.rank)),
            bias: None,
            spec,
            scaling,
        })
    }

    /// From given factors, for instance of a file.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; as [`LoraSpec::scaling`].
    pub fn from_factors(
        spec: LoraSpec,
        shape: (usize, usize),
        a: Array2<T>,
        b: Array2<T>,
    ) -> Result<Self> {
        let scaling = spec.scaling()?;
        crate::blocks::require_shape("lora", "lora_A", &a.view(), (spec.rank, shape.1))?;
        crate::blocks::require_shape("lora", "lora_B", &b.view(), (shape.0, spec.rank))?;
        Ok(Self { a, b, bias: None, spec, scaling })
    }

    /// y += s (x A^T) B^T, without the weight under it.
    pub fn forward_add(&self, x: ArrayView2<T>, y: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        let mut projected = Array2::zeros((x.nrows(), self.a.nrows()));
        parallel_product_into(T::one(), x, self.a.t(), T::zero(), &mut projected.view_mut(), cost);
        parallel_product_into(T::of(self.scaling), projected.view(), self.b.t(), T::one(), y, cost);
    }

    /// weight += s B A.
    pub fn add_delta(&self, weight: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        parallel_product_into(
            T::of(self.scaling),
            self.b.view(),
            self.a.view(),
            T::one(),
            weight,
            cost,
        );
    }
}

impl<T: Real> Stored<T> for Lora<T> {
    fn save(&self, _: &BaseWeight<T>, to: &mut dyn WriteTensors<T>) {
        to.matrix("lora_A.weight", self.a.view());
        to.matrix("lora_B.weight", self.b.view());
        if let Some(bias) = self.bias.as_ref().and_then(|bias| bias.as_slice()) {
            to.vector("lora_B.bias", bias);
        }
    }

    fn load(
        settings: &Settings,
        base: &mut BaseWeight<T>,
        from: &mut dyn ReadTensors<T>,
    ) -> Result<Self> {
        let (a, b) = read_factors(&settings.spec, base.shape(), from)?;
        let mut lora = Self::from_factors(settings.spec, base.shape(), a, b)?;
        if settings.bias {
            let bias = from.vector("lora_B.bias", base.shape().0)?;
            lora.bias = Some(ndarray::Array1::from(bias).insert_axis(ndarray::Axis(0)));
        }
        Ok(lora)
    }
}

/// A and B of an adapter file.
pub(super) fn read_factors<T: Real>(
    spec: &LoraSpec,
    shape: (usize, usize),
    from: &mut dyn ReadTensors<T>,
) -> Result<(Array2<T>, Array2<T>)> {
    spec.scaling()?;
    let a = from.matrix("lora_A.weight", (spec.rank, shape.1))?;
    Ok((a, from.matrix("lora_B.weight", (shape.0, spec.rank))?))
}
