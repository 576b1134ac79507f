//! A projection with its adaptation method on a device: [`crate::adapters::AdaptedLinear`]'s forward, backward, update.

use super::blocks::linear::{linear_backward_input, linear_backward_weight, linear_forward};
use super::blocks::{Matrix, Sink, accumulate, index_tensor, product};
use crate::adapters::s2ft::Side;
use crate::adapters::{AdaptedLinear, BaseWeight, Method};
use crate::error::{Error, Result};
use crate::gpu::{Engine, Opened};
use crate::linalg::Real;
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use std::ops::Range;

/// [`Method`] with its tensors on a device.
#[derive(Debug, Clone)]
pub(super) enum DeviceMethod<B: Engine> {
    Frozen,
    Full,
    Lora { a: Matrix<B>, b: Matrix<B>, scaling: f64 },
    Dora { a: Matrix<B>, b: Matrix<B>, magnitude: Matrix<B>, scaling: f64, true_derivative: bool },
    Moslora { a: Matrix<B>, b: Matrix<B>, mixer: Matrix<B>, scaling: f64 },
    Paca { index: Tensor<B, 1, Int>, scaling: f64 },
    S2ftRows { range: Range<usize> },
    S2ftColumns { range: Range<usize>, index: Tensor<B, 1, Int> },
}

/// What forward leaves for backward, beyond the shared input.
#[derive(Debug, Clone)]
pub(super) struct Saved<B: Engine> {
    /// xA^T, `N x r` (LoRA, MosLoRA).
    pub projected: Option<Matrix<B>>,
    /// Selected columns of x (PaCA, input-side S2FT): a copy of their own, so that x can be freed.
    pub columns: Option<Matrix<B>>,
}

impl<B: Engine> Default for Saved<B> {
    fn default() -> Self {
        Self { projected: None, columns: None }
    }
}

/// DoRA's weight with what its backward reads.
struct Normalised<B: Engine> {
    /// W'_j / ||W'_j||.
    direction: Matrix<B>,
    /// m_j, `out x 1`.
    magnitude: Matrix<B>,
    /// ||W'_j||, `out x 1`.
    norm: Matrix<B>,
}

/// Puts what `change` makes of a tensor in its place. The tensor is moved out meanwhile, so that its buffer can be
/// reused.
///
/// # Errors
/// What `change` returns; the tensor is then empty and its model of no further use.
pub(super) fn replace<B: Engine>(
    tensor: &mut Matrix<B>,
    change: impl FnOnce(Matrix<B>) -> Result<Matrix<B>>,
) -> Result<()> {
    let empty = Tensor::empty([0, 0], &tensor.device());
    *tensor = change(std::mem::replace(tensor, empty))?;
    Ok(())
}

/// A projection on a device.
#[derive(Debug, Clone)]
pub(super) struct DeviceLinear<B: Engine> {
    pub weight: Matrix<B>,
    pub method: DeviceMethod<B>,
    pub names: &'static [&'static str],
    pub whole_input: bool,
}

impl<B: Engine> DeviceLinear<B> {
    /// Copies a projection to the device.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed weight or a merged method; as [`Opened::upload`].
    pub fn upload<T: Real>(projection: &AdaptedLinear<T>, name: &str, on: &Opened<B>) -> Result<Self> {
        let BaseWeight::Dense(weight) = &projection.base else {
            let requirement = "is packed (quantized): training on a device holds dense weights only";
            return Err(Error::invalid(name, projection.method.name(), requirement));
        };
        if projection.is_merged() {
            return Err(Error::invalid(
                name,
                projection.method.name(),
                "is merged into the base weight; unmerge to train",
            ));
        }
        let names = projection.method.trainable_names();
        let put = |tensor: &str, values: &ndarray::Array2<T>| on.upload(&format!("{name}.{tensor}"), values.view());
        let columns = |range: Range<usize>| index_tensor(range, &on.device);
        let method = match &projection.method {
            Method::Frozen => DeviceMethod::Frozen,
            Method::Full => DeviceMethod::Full,
            Method::Lora(m) => {
                DeviceMethod::Lora { a: put("lora_A", &m.a)?, b: put("lora_B", &m.b)?, scaling: m.scaling }
            }
            Method::Dora(m) => DeviceMethod::Dora {
                a: put("lora_A", &m.a)?,
                b: put("lora_B", &m.b)?,
                magnitude: put("lora_magnitude_vector", &m.magnitude)?,
                scaling: m.scaling,
                true_derivative: m.true_derivative,
            },
            Method::Moslora(m) => DeviceMethod::Moslora {
                a: put("lora_A", &m.a)?,
                b: put("lora_B", &m.b)?,
                mixer: put("lora_mixer", &m.mixer)?,
                scaling: m.scaling,
            },
            Method::Paca(m) => {
                DeviceMethod::Paca { index: index_tensor(m.index.iter().copied(), &on.device), scaling: m.scaling }
            }
            Method::S2ft(slice) => match slice.side {
                Side::Output => DeviceMethod::S2ftRows { range: slice.range.clone() },
                Side::Input => {
                    DeviceMethod::S2ftColumns { range: slice.range.clone(), index: columns(slice.range.clone()) }
                }
            },
        };
        let whole_input = projection.method.input_need() == crate::adapters::InputNeed::Whole;
        Ok(Self { weight: on.upload(&format!("{name}.weight"), weight.view())?, method, names, whole_input })
    }

    /// The adapted projection of x; `save` asks for what backward needs.
    pub fn forward(&self, x: &Matrix<B>, save: bool) -> (Matrix<B>, Saved<B>) {
        let mut saved = Saved::default();
        if let DeviceMethod::Dora { .. } = self.method {
            let normalised = self.normalised();
            return (linear_forward(x, &(normalised.direction * normalised.magnitude)), saved);
        }
        let mut y = linear_forward(x, &self.weight);
        match &self.method {
            DeviceMethod::Lora { a, b, scaling } => {
                let projected = linear_forward(x, a);
                y = y + linear_forward(&projected, b).mul_scalar(*scaling);
                saved.projected = save.then_some(projected);
            }
            DeviceMethod::Moslora { a, b, mixer, scaling } => {
                let projected = linear_forward(x, a);
                y = y + linear_forward(&linear_forward(&projected, mixer), b).mul_scalar(*scaling);
                saved.projected = save.then_some(projected);
            }
            // `select` copies. A slice could be a view, which keeps all of x alive.
            DeviceMethod::Paca { index, .. } | DeviceMethod::S2ftColumns { index, .. } if save => {
                saved.columns = Some(x.clone().select(1, index.clone()));
            }
            _ => {}
        }
        (y, saved)
    }

    fn normalised(&self) -> Normalised<B> {
        let DeviceMethod::Dora { a, b, magnitude, scaling, .. } = &self.method else {
            unreachable!("only DoRA normalises its weight")
        };
        let merged = self.weight.clone() + product(b.clone(), a.clone()).mul_scalar(*scaling);
        let norm = (merged.clone() * merged.clone()).sum_dim(1).sqrt();
        let out = norm.dims()[0];
        Normalised { direction: merged / norm.clone(), magnitude: magnitude.clone().reshape([out, 1]), norm }
    }

    /// Adds the gradients of the trainable tensors to `sinks`; returns that of the input if `wanted`.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if what forward should have saved is absent.
    pub fn backward(
        &self,
        dy: &Matrix<B>,
        x: Option<&Matrix<B>>,
        saved: Saved<B>,
        sinks: &mut [Sink<B>],
        wanted: bool,
    ) -> Result<Option<Matrix<B>>> {
        let absent = |what: &str| Error::invalid(what, "absent", "forward must save it for this method");
        let whole = || x.ok_or_else(|| absent("input"));
        if let DeviceMethod::Dora { a, b, scaling, true_derivative, .. } = &self.method {
            let Normalised { direction, magnitude, norm } = self.normalised();
            let dx = wanted.then(|| linear_backward_input(dy, &(direction.clone() * magnitude.clone())));
            let whole_gradient = linear_backward_weight(dy, whole()?);
            let along = (whole_gradient.clone() * direction.clone()).sum_dim(1);
            let out = along.dims()[0];
            accumulate(&mut sinks[2], along.clone().reshape([1, out]));
            let turned = if *true_derivative { whole_gradient - direction * along } else { whole_gradient };
            let dweight = turned * (magnitude / norm).mul_scalar(*scaling);
            accumulate(&mut sinks[0], product(b.clone().transpose(), dweight.clone()));
            accumulate(&mut sinks[1], product(dweight, a.clone().transpose()));
            return Ok(dx);
        }
        let mut dx = wanted.then(|| linear_backward_input(dy, &self.weight));
        match &self.method {
            DeviceMethod::Frozen | DeviceMethod::Dora { .. } => {}
            DeviceMethod::Full => accumulate(&mut sinks[0], linear_backward_weight(dy, whole()?)),
            DeviceMethod::Lora { a, b, scaling } => {
                let projected = saved.projected.ok_or_else(|| absent("xA^T"))?;
                let dprojected = linear_backward_input(dy, b).mul_scalar(*scaling);
                accumulate(&mut sinks[1], linear_backward_weight(dy, &projected).mul_scalar(*scaling));
                accumulate(&mut sinks[0], linear_backward_weight(&dprojected, whole()?));
                dx = dx.map(|dx| dx + linear_backward_input(&dprojected, a));
            }
            DeviceMethod::Moslora { a, b, mixer, scaling } => {
                let projected = saved.projected.ok_or_else(|| absent("xA^T"))?;
                let mixed = linear_forward(&projected, mixer);
                accumulate(&mut sinks[1], linear_backward_weight(dy, &mixed).mul_scalar(*scaling));
                let dmixed = linear_backward_input(dy, b).mul_scalar(*scaling);
                accumulate(&mut sinks[2], linear_backward_weight(&dmixed, &projected));
                let dprojected = linear_backward_input(&dmixed, mixer);
                accumulate(&mut sinks[0], linear_backward_weight(&dprojected, whole()?));
                dx = dx.map(|dx| dx + linear_backward_input(&dprojected, a));
            }
            DeviceMethod::Paca { scaling, .. } => {
                let columns = saved.columns.ok_or_else(|| absent("selected columns of the input"))?;
                accumulate(&mut sinks[0], linear_backward_weight(dy, &columns).mul_scalar(*scaling));
            }
            DeviceMethod::S2ftRows { range } => {
                let dy = dy.clone().narrow(1, range.start, range.len());
                accumulate(&mut sinks[0], linear_backward_weight(&dy, whole()?));
            }
            DeviceMethod::S2ftColumns { .. } => {
                let columns = saved.columns.ok_or_else(|| absent("slice of the input"))?;
                accumulate(&mut sinks[0], linear_backward_weight(dy, &columns));
            }
        }
        Ok(dx)
    }

    /// The trained values as they act, ordered as the names.
    pub fn values(&self) -> Vec<Matrix<B>> {
        match &self.method {
            DeviceMethod::Frozen => vec![],
            DeviceMethod::Full => vec![self.weight.clone()],
            DeviceMethod::Lora { a, b, .. } => vec![a.clone(), b.clone()],
            DeviceMethod::Dora { a, b, magnitude, .. } => vec![a.clone(), b.clone(), magnitude.clone()],
            DeviceMethod::Moslora { a, b, mixer, .. } => vec![a.clone(), b.clone(), mixer.clone()],
            DeviceMethod::Paca { index, .. } => vec![self.weight.clone().select(1, index.clone())],
            DeviceMethod::S2ftRows { range } => vec![self.weight.clone().narrow(0, range.start, range.len())],
            DeviceMethod::S2ftColumns { range, .. } => vec![self.weight.clone().narrow(1, range.start, range.len())],
        }
    }

    /// Replaces each trained tensor by what `change` makes of it. PaCA's is its columns over the scaling.
    ///
    /// # Errors
    /// What `change` returns.
    pub fn update(&mut self, change: &mut dyn FnMut(&'static str, Matrix<B>) -> Result<Matrix<B>>) -> Result<()> {
        let names = self.names;
        let [rows, width] = self.weight.dims();
        let mut replace = |tensor: &mut Matrix<B>, name: &'static str| replace(tensor, |values| change(name, values));
        match &mut self.method {
            DeviceMethod::Frozen => Ok(()),
            DeviceMethod::Full => replace(&mut self.weight, names[0]),
            DeviceMethod::Lora { a, b, .. } => {
                replace(a, names[0])?;
                replace(b, names[1])
            }
            DeviceMethod::Dora { a, b, magnitude: third, .. } | DeviceMethod::Moslora { a, b, mixer: third, .. } => {
                replace(a, names[0])?;
                replace(b, names[1])?;
                replace(third, names[2])
            }
            DeviceMethod::Paca { index, scaling } => {
                let stored = self.weight.clone().select(1, index.clone()).div_scalar(*scaling);
                let moved = (change(names[0], stored.clone())? - stored).mul_scalar(*scaling);
                // Columns can only be added to; the sum rounds once more than an assignment would.
                self.weight.inplace(|weight| weight.select_assign(1, index.clone(), moved, IndexingUpdateOp::Add));
                Ok(())
            }
            DeviceMethod::S2ftRows { range } => {
                let values = change(names[0], self.weight.clone().narrow(0, range.start, range.len()))?;
                self.weight.inplace(|weight| weight.slice_assign([range.clone(), 0..width], values));
                Ok(())
            }
            DeviceMethod::S2ftColumns { range, .. } => {
                let values = change(names[0], self.weight.clone().narrow(1, range.start, range.len()))?;
                self.weight.inplace(|weight| weight.slice_assign([0..rows, range.clone()], values));
                Ok(())
            }
        }
    }
}
