//! DoRA: y = x W''^T with W''_j = m_j W'_j / ||W'_j||, W' = W + s B A, row by row (\[DoRA\]).
//!
//! The normalised weight is formed once per product (out in r multiply-adds, small beside N out
//! in), so the method saves nothing but its input. Backward forms dW'' = dy^T x once and reads
//! every gradient off it.

use super::lora::{LoraSpec, kaiming_uniform, read_factors};
use super::stored::{ReadTensors, Settings, Stored, WriteTensors};
use super::{Adaptation, BaseWeight, Change, InputNeed};
use crate::blocks::require_shape;
use crate::error::Result;
use crate::linalg::Real;
use crate::ops::{BesideWeight, Cpu, InputGradient, Ops};
use ndarray::{Array1, Array2, ArrayView2, Axis};
use rand::Rng;

/// Factors and row magnitudes, on some engine.
#[derive(Debug, Clone)]
pub struct DoraOn<E: Ops> {
    /// A, `r x in`.
    pub a: E::Matrix,
    /// B, `out x r`.
    pub b: E::Matrix,
    /// m, `1 x out`.
    pub magnitude: E::Matrix,
    /// Settings.
    pub spec: LoraSpec,
    /// s.
    pub scaling: f64,
    /// Differentiate through ||W'_j|| too. PEFT, and the default here, treat it as a constant.
    pub true_derivative: bool,
}

/// Factors and magnitudes on the processor.
pub type Dora<T> = DoraOn<Cpu<T>>;

impl<E: Ops> DoraOn<E> {
    /// W' and the norms of its rows, `1 x out`.
    fn merged(&self, e: &mut E, weight: &E::Weight) -> Result<(E::Matrix, E::Matrix)> {
        let merged =
            e.merged(&BesideWeight { weight, a: &self.a, b: &self.b, scaling: self.scaling });
        let norms = e.row_norms(&merged)?;
        Ok((merged, norms))
    }

    /// W''.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] if a row of W' has norm zero, where the direction is
    /// undefined.
    pub fn merged_weight(&self, e: &mut E, weight: &E::Weight) -> Result<E::Matrix> {
        let (merged, norms) = self.merged(e, weight)?;
        let factor = e.divided(&self.magnitude, &norms);
        Ok(e.scale_rows(merged, &factor, false))
    }
}

impl<E: Ops> Adaptation<E> for DoraOn<E> {
    fn name(&self) -> &'static str {
        "dora"
    }

    fn trained_names(&self) -> &'static [&'static str] {
        &["lora_A", "lora_B", "lora_magnitude_vector"]
    }

    fn trained_shapes(&self, _: (usize, usize)) -> Vec<(usize, usize)> {
        [&self.a, &self.b, &self.magnitude].map(E::shape).to_vec()
    }

    fn input_need(&self) -> InputNeed {
        InputNeed::Whole
    }

    fn forward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        _: bool,
    ) -> Result<(E::Matrix, Option<E::Matrix>)> {
        let merged = self.merged_weight(e, weight)?;
        Ok((e.product_with(x, &merged, add_to), None))
    }

    /// With D_j = W'_j / ||W'_j||, P = dy^T x and c_j = P_j . D_j: dm_j += c_j, dW'_j = m_j /
    /// ||W'_j|| P_j (constant norm) or m_j / ||W'_j|| (P_j - c_j D_j) (true derivative), dB += s
    /// dW' A^T, dA += s B^T dW', dx = dy W''.
    fn backward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        _: Option<E::Matrix>,
        sinks: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>> {
        let x = super::whole(x)?;
        let (merged, norms) = self.merged(e, weight)?;
        let direction = e.scale_rows(merged, &norms, true);
        let mut outer = e.outer(dy, x);
        let along = e.row_dots(&outer, &direction);
        e.accumulate(&mut sinks[2], 1.0, &along);
        if self.true_derivative {
            outer = e.subtract_rows(outer, &along, &direction);
        }
        let factor = e.divided(&self.magnitude, &norms);
        let dmerged = e.scale_rows(outer, &factor, false);
        let da = e.small_product((&self.b, true), (&dmerged, false));
        let db = e.small_product((&dmerged, false), (&self.a, true));
        drop(dmerged);
        e.accumulate(&mut sinks[0], self.scaling, &da);
        e.accumulate(&mut sinks[1], self.scaling, &db);
        let Some(add_to) = dx.wanted() else { return Ok(None) };
        let acting = e.scale_rows(direction, &self.magnitude, false);
        Ok(Some(e.product_with_backward(dy, &acting, add_to)))
    }

    fn values(&self, _: &mut E, _: &E::Weight) -> Vec<E::Matrix> {
        [&self.a, &self.b, &self.magnitude].map(Clone::clone).to_vec()
    }

    fn update(&mut self, _: &mut E, _: &mut E::Weight, change: Change<'_, E>) -> Result<()> {
        change("lora_A", &mut self.a)?;
        change("lora_B", &mut self.b)?;
        change("lora_magnitude_vector", &mut self.magnitude)
    }
}

impl<T: Real> Dora<T> {
    /// A Kaiming-uniform, B zero, m the row norms of W: the output starts unchanged.
    ///
    /// # Errors
    /// As [`LoraSpec::scaling`]; [`crate::Error::InvalidParam`] for a row of norm zero.
    pub fn init(
        spec: LoraSpec,
        true_derivative: bool,
        base: ArrayView2<T>,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let scaling = spec.scaling()?;
        let (out, width) = base.dim();
        let magnitude = Cpu::default().row_norms(&base.to_owned())?;
        let a = kaiming_uniform(spec.rank, width, rng);
        Ok(Self {
            a,
            b: Array2::zeros((out, spec.rank)),
            magnitude,
            spec,
            scaling,
            true_derivative,
        })
    }

    /// From given A, B and magnitude (`1 x out`), for instance of a file.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`]; as [`LoraSpec::scaling`].
    pub fn from_factors(
        spec: LoraSpec,
        true_derivative: bool,
        shape: (usize, usize),
        factors: [Array2<T>; 3],
    ) -> Result<Self> {
        let scaling = spec.scaling()?;
        let [a, b, magnitude] = factors;
        require_shape("dora", "lora_A", &a.view(), (spec.rank, shape.1))?;
        require_shape("dora", "lora_B", &b.view(), (shape.0, spec.rank))?;
        require_shape("dora", "lora_magnitude_vector", &magnitude.view(), (1, shape.0))?;
        Ok(Self { a, b, magnitude, spec, scaling, true_derivative })
    }
}

impl<T: Real> Stored<T> for Dora<T> {
    fn save(&self, _: &BaseWeight<T>, to: &mut dyn WriteTensors<T>) {
        to.matrix("lora_A.weight", self.a.view());
        to.matrix("lora_B.weight", self.b.view());
        to.vector("lora_magnitude_vector", &self.magnitude.iter().copied().collect::<Vec<_>>());
    }

    fn load(
        settings: &Settings,
        base: &mut BaseWeight<T>,
        from: &mut dyn ReadTensors<T>,
    ) -> Result<Self> {
        let shape = base.shape();
        let (a, b) = read_factors(&settings.spec, shape, from)?;
        let (plain, with_weight) = ("lora_magnitude_vector", "lora_magnitude_vector.weight");
        let name =
            if !from.contains(plain) && from.contains(with_weight) { with_weight } else { plain };
        let magnitude = Array1::from(from.vector(name, shape.0)?).insert_axis(Axis(0));
        Self::from_factors(settings.spec, settings.true_derivative, shape, [a, b, magnitude])
    }
}
