//! DoRA: y = x W''^T with W''_j = m_j W'_j / ||W'_j||, W' = W + s B A, row by row (\[DoRA\]).
//!
//! The normalised weight is formed once per product (out in r multiply-adds, small beside N out in), so the
//! method saves nothing but its input. Backward forms dW'' = dy^T x once and reads every gradient off it.

use super::InputSink;
use super::lora::{LoraSpec, kaiming_uniform};
use crate::blocks::linear::linear_backward_weight;
use crate::blocks::require_shape;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::elementwise::vectorized_closure;
use crate::linalg::gemm::parallel_product_into;
use ndarray::{Array2, ArrayView2, Zip};
use rand::Rng;

/// Factors and row magnitudes.
#[derive(Debug, Clone)]
pub struct Dora<T> {
    /// A, `r x in`.
    pub a: Array2<T>,
    /// B, `out x r`.
    pub b: Array2<T>,
    /// m, `1 x out`.
    pub magnitude: Array2<T>,
    /// Settings.
    pub spec: LoraSpec,
    /// s.
    pub scaling: f64,
    /// Differentiate through ||W'_j|| too. PEFT, and the default here, treat it as a constant.
    pub true_derivative: bool,
}

/// W'' with the parts that backward needs again.
pub struct MergedDora<T> {
    /// W''.
    pub weight: Array2<T>,
    /// ||W'_j||.
    pub norms: Vec<T>,
}

impl<T: Real> Dora<T> {
    /// A Kaiming-uniform, B zero, m the row norms of W: the output starts unchanged.
    ///
    /// # Errors
    /// As [`LoraSpec::scaling`]; [`Error::InvalidParam`] for a row of norm zero.
    pub fn init(spec: LoraSpec, true_derivative: bool, base: ArrayView2<T>, rng: &mut impl Rng) -> Result<Self> {
        let scaling = spec.scaling(base.dim())?;
        let (out, width) = base.dim();
        let a = kaiming_uniform(spec.rank, width, rng);
        let b = Array2::zeros((out, spec.rank));
        let magnitude = Array2::ones((1, out));
        let mut dora = Self { a, b, magnitude, spec, scaling, true_derivative };
        let norms = dora.merged_weight(base, &mut Cost::default())?.norms;
        dora.magnitude.iter_mut().zip(norms).for_each(|(m, n)| *m = n);
        Ok(dora)
    }

    /// From given A, B and magnitude (`1 x out`), for instance of a file.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; as [`LoraSpec::scaling`].
    pub fn from_factors(
        spec: LoraSpec,
        true_derivative: bool,
        shape: (usize, usize),
        factors: [Array2<T>; 3],
    ) -> Result<Self> {
        let scaling = spec.scaling(shape)?;
        let [a, b, magnitude] = factors;
        require_shape("dora", "lora_A", &a.view(), (spec.rank, shape.1))?;
        require_shape("dora", "lora_B", &b.view(), (shape.0, spec.rank))?;
        require_shape("dora", "lora_magnitude_vector", &magnitude.view(), (1, shape.0))?;
        Ok(Self { a, b, magnitude, spec, scaling, true_derivative })
    }

    /// W'' and the norms of W'.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if a row of W' has norm zero, where the direction is undefined.
    pub fn merged_weight(&self, base: ArrayView2<T>, cost: &mut Cost) -> Result<MergedDora<T>> {
        let mut weight = base.to_owned();
        parallel_product_into(
            T::of(self.scaling),
            self.b.view(),
            self.a.view(),
            T::one(),
            &mut weight.view_mut(),
            cost,
        );
        cost.elementwise += 3 * weight.len() as u64;
        let mut norms = vec![T::zero(); weight.nrows()];
        vectorized_closure(
            #[inline(always)]
            || {
                for ((mut row, norm), &m) in weight.rows_mut().into_iter().zip(&mut norms).zip(&self.magnitude) {
                    *norm = row.dot(&row).sqrt();
                    let g = m / *norm;
                    row.mapv_inplace(|w| w * g);
                }
            },
        );
        match norms.iter().position(|n| !(*n > T::zero())) {
            Some(row) => Err(Error::invalid(format!("norm of row {row}"), norms[row], "DoRA needs nonzero rows")),
            None => Ok(MergedDora { weight, norms }),
        }
    }

    /// With P = dy^T x, g_j = m_j / ||W'_j|| and c_j = P_j . W''_j:
    /// dm_j += c_j / m_j, dW'_j = g_j P_j (constant norm) or g_j P_j - c_j / ||W'_j||^2 W'_j (true derivative),
    /// dB += s dW' A^T, dA += s B^T dW', dx = dy W''. Sinks: dA, dB, dm.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; as [`Dora::merged_weight`].
    pub fn backward(
        &self,
        dy: ArrayView2<T>,
        x: ArrayView2<T>,
        base: ArrayView2<T>,
        sinks: &mut [Array2<T>],
        dx: Option<InputSink<'_, '_, T>>,
        cost: &mut Cost,
    ) -> Result<()> {
        let merged = self.merged_weight(base, cost)?;
        if let Some(InputSink { dx, beta }) = dx {
            require_shape("dora", "dx", &dx.view(), (dy.nrows(), base.ncols()))?;
            parallel_product_into(T::one(), dy, merged.weight.view(), beta, dx, cost);
        }
        let mut product = Array2::zeros(base.dim());
        cost.hold(2 * product.len());
        linear_backward_weight(T::one(), dy, x, &mut product.view_mut(), cost)?;
        cost.elementwise += 5 * product.len() as u64;
        let true_derivative = self.true_derivative;
        for (j, mut p) in product.rows_mut().into_iter().enumerate() {
            let (w, norm, m) = (merged.weight.row(j), merged.norms[j], self.magnitude[[0, j]]);
            // P_j . W'_j / ||W'_j||, without dividing by a magnitude that may be zero.
            let direction = if m.is_zero() { self.direction(base, j) } else { w.mapv(|x| x / m) };
            let along = p.dot(&direction);
            sinks[2][[0, j]] += along;
            let g = m / norm;
            if true_derivative {
                Zip::from(&mut p).and(&direction).for_each(|p, &d| *p = g * (*p - along * d));
            } else {
                p.mapv_inplace(|p| g * p);
            }
        }
        let scaling = T::of(self.scaling);
        parallel_product_into(scaling, self.b.t(), product.view(), T::one(), &mut sinks[0].view_mut(), cost);
        parallel_product_into(scaling, product.view(), self.a.t(), T::one(), &mut sinks[1].view_mut(), cost);
        cost.release(2 * product.len());
        Ok(())
    }

    /// W'_j / ||W'_j|| computed from the factors.
    fn direction(&self, base: ArrayView2<T>, row: usize) -> ndarray::Array1<T> {
        let mut w = base.row(row).to_owned();
        w.scaled_add(T::of(self.scaling), &self.b.row(row).dot(&self.a));
        let norm = w.dot(&w).sqrt();
        w.mapv(|x| x / norm)
    }
}
