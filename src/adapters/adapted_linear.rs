//! A projection with its adaptation method: forward, backward, update, merging.

use super::{BaseWeight, InputSink, LinearSaved, Method};
use crate::blocks::linear::linear_backward_weight;
use crate::blocks::require_shape;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::gemm::parallel_product_into;
use crate::linalg::{Real, Scratch};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

/// A projection with its adaptation method.
#[derive(Debug, Clone)]
pub struct AdaptedLinear<T> {
    /// The weight under the method, `out x in`.
    pub base: BaseWeight<T>,
    /// The method with its parameters.
    pub method: Method<T>,
    /// The base weight as it was, while an additive method is merged into it.
    unmerged: Option<Array2<T>>,
}

impl<T: Real> AdaptedLinear<T> {
    /// A frozen projection.
    pub fn frozen(weight: Array2<T>) -> Self {
        Self { base: BaseWeight::Dense(weight), method: Method::Frozen, unmerged: None }
    }

    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        self.base.shape()
    }

    /// Whether anything is trained here.
    pub fn is_trainable(&self) -> bool {
        !matches!(self.method, Method::Frozen)
    }

    /// Whether an additive method is currently folded into the base weight.
    pub fn is_merged(&self) -> bool {
        self.unmerged.is_some()
    }

    /// y = beta y + (adapted projection of x); `save` asks for what backward needs.
    ///
    /// Shapes: x `N x in`, y `N x out`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`].
    pub fn forward_into(
        &self,
        x: ArrayView2<T>,
        beta: T,
        y: &mut ArrayViewMut2<T>,
        save: bool,
        cost: &mut Cost,
    ) -> Result<LinearSaved<T>> {
        let (out, width) = self.shape();
        require_shape("linear_forward", "x", &x, (x.nrows(), width))?;
        require_shape("linear_forward", "y", &y.view(), (x.nrows(), out))?;
        let mut saved = LinearSaved::default();
        if let (Method::Dora(dora), false) = (&self.method, self.is_merged()) {
            let merged = dora.merged_weight(self.base.dense().view(), cost)?;
            parallel_product_into(T::one(), x, merged.weight.t(), beta, y, cost);
            return Ok(saved);
        }
        let base = self.base.dense();
        match &self.method {
            Method::Lora(lora) if !self.is_merged() => {
                saved.projected = Some(lora.beside(base.view()).forward(x, beta, y, cost));
            }
            Method::Moslora(moslora) if !self.is_merged() => {
                let mixed = moslora.mixed_up(cost);
                saved.projected = Some(moslora.beside(base.view(), &mixed).forward(x, beta, y, cost));
            }
            Method::Paca(paca) if matches!(self.base, BaseWeight::Packed(_)) => {
                let mut dense = base.into_owned();
                paca.write_columns(&mut dense);
                parallel_product_into(T::one(), x, dense.t(), beta, y, cost);
            }
            _ => parallel_product_into(T::one(), x, base.t(), beta, y, cost),
        }
        if !save || self.is_merged() {
            return Ok(LinearSaved::default());
        }
        match &self.method {
            Method::Paca(paca) => saved.columns = Some(paca.select(x, cost)),
            Method::S2ft(slice) => saved.columns = slice.select(x),
            _ => {}
        }
        Ok(saved)
    }

    /// The adapted projection of x as a fresh array.
    ///
    /// # Errors
    /// As [`AdaptedLinear::forward_into`].
    pub fn forward(
        &self,
        x: ArrayView2<T>,
        save: bool,
        scratch: &mut Scratch<T>,
        cost: &mut Cost,
    ) -> Result<(Array2<T>, LinearSaved<T>)> {
        let mut y = scratch.array((x.nrows(), self.shape().0));
        let saved = self.forward_into(x, T::zero(), &mut y.view_mut(), save, cost)?;
        Ok((y, saved))
    }

    /// Adds the gradients of the trainable tensors to `sinks` (ordered as [`Method::trainable_names`]) and writes
    /// that of the input to `dx`.
    ///
    /// `x` is needed where [`Method::input_need`] is `InputNeed::Whole`; `sinks` of a frozen projection are
    /// empty; `dx = None` skips the input's gradient.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] if what forward should have saved is absent, the sinks
    /// do not fit, or the method is merged.
    pub fn backward(
        &self,
        dy: ArrayView2<T>,
        x: Option<ArrayView2<T>>,
        saved: &LinearSaved<T>,
        sinks: &mut [Array2<T>],
        mut dx: Option<InputSink<'_, '_, T>>,
        cost: &mut Cost,
    ) -> Result<()> {
        let names = self.method.trainable_names();
        if sinks.len() != names.len() {
            return Err(Error::invalid("gradient sinks", sinks.len(), format!("{:?} needs {}", names, names.len())));
        }
        if self.is_merged() {
            return Err(Error::invalid(
                "method",
                self.method.name(),
                "is merged into the base weight; unmerge to train",
            ));
        }
        require_shape("linear_backward", "dy", &dy, (dy.nrows(), self.shape().0))?;
        let absent = |what: &str| Error::invalid(what, "absent", "forward must save it for this method");
        let whole = || x.as_ref().ok_or_else(|| absent("input"));
        if let Some(InputSink { dx, .. }) = &dx {
            require_shape("linear_backward", "dx", &dx.view(), (dy.nrows(), self.shape().1))?;
        }
        if let Some(x) = &x {
            require_shape("linear_backward", "x", x, (dy.nrows(), self.shape().1))?;
        }
        let together = matches!(self.method, Method::Dora(_) | Method::Lora(_) | Method::Moslora(_));
        if let (Some(InputSink { dx, beta }), false) = (&mut dx, together) {
            let beta = *beta;
            match (&self.base, &self.method) {
                (BaseWeight::Packed(_), Method::Paca(paca)) => {
                    let mut dense = self.base.dense().into_owned();
                    paca.write_columns(&mut dense);
                    parallel_product_into(T::one(), dy, dense.view(), beta, dx, cost);
                }
                _ => parallel_product_into(T::one(), dy, self.base.dense().view(), beta, dx, cost),
            }
        }
        if let (Method::Dora(dora), Some(x)) = (&self.method, &x) {
            return dora.backward(dy, x.view(), self.base.dense().view(), sinks, dx, cost);
        }
        match &self.method {
            Method::Frozen => {}
            Method::Full => linear_backward_weight(T::one(), dy, whole()?.view(), &mut sinks[0].view_mut(), cost)?,
            Method::Lora(lora) => {
                let projected = saved.projected.as_ref().ok_or_else(|| absent("xA^T"))?;
                require_shape("linear_backward", "xA^T", &projected.view(), (dy.nrows(), lora.a.nrows()))?;
                let base = self.base.dense();
                lora.backward(base.view(), dy, whole()?.view(), projected.view(), sinks, dx, cost);
            }
            Method::Moslora(moslora) => {
                let projected = saved.projected.as_ref().ok_or_else(|| absent("xA^T"))?;
                require_shape("linear_backward", "xA^T", &projected.view(), (dy.nrows(), moslora.a.nrows()))?;
                let base = self.base.dense();
                moslora.backward(base.view(), dy, whole()?.view(), projected.view(), sinks, dx, cost);
            }
            // With its input it has returned above.
            Method::Dora(_) => return Err(absent("input")),
            Method::Paca(paca) => {
                let columns = saved.columns.as_ref().ok_or_else(|| absent("selected columns of the input"))?;
                linear_backward_weight(T::of(paca.scaling), dy, columns.view(), &mut sinks[0].view_mut(), cost)?;
            }
            Method::S2ft(slice) => slice.backward(dy, x, saved.columns.as_ref(), &mut sinks[0], cost)?,
        }
        Ok(())
    }

    /// Shapes of the trainable tensors, ordered as [`Method::trainable_names`].
    pub fn trainable_shapes(&self) -> Vec<(usize, usize)> {
        let (out, width) = self.shape();
        match &self.method {
            Method::Frozen => vec![],
            Method::Full => vec![(out, width)],
            Method::Lora(lora) => vec![lora.a.dim(), lora.b.dim()],
            Method::Dora(dora) => vec![dora.a.dim(), dora.b.dim(), (1, out)],
            Method::Moslora(moslora) => vec![moslora.a.dim(), moslora.b.dim(), moslora.mixer.dim()],
            Method::Paca(paca) => vec![(out, paca.index.len())],
            Method::S2ft(slice) => vec![slice.shape((out, width))],
        }
    }

    /// Copies of the trainable tensors, ordered as [`Method::trainable_names`].
    pub fn trainable_values(&self) -> Vec<Array2<T>> {
        match &self.method {
            Method::Frozen => vec![],
            Method::Full => vec![self.base.dense().into_owned()],
            Method::Lora(lora) => vec![lora.a.clone(), lora.b.clone()],
            Method::Dora(dora) => vec![dora.a.clone(), dora.b.clone(), dora.magnitude.clone()],
            Method::Moslora(moslora) => vec![moslora.a.clone(), moslora.b.clone(), moslora.mixer.clone()],
            Method::Paca(paca) => vec![paca.stored_columns(&self.base)],
            Method::S2ft(slice) => vec![slice.of(&self.base.dense().view()).to_owned()],
        }
    }

    /// Calls `change` on each trainable tensor as a contiguous array and writes the result back in place.
    ///
    /// # Errors
    /// What `change` returns; [`Error::InvalidParam`] for a method that must write into a packed weight.
    pub fn update(&mut self, change: &mut dyn FnMut(&'static str, &mut Array2<T>) -> Result<()>) -> Result<()> {
        match &mut self.method {
            Method::Frozen => Ok(()),
            Method::Full => change("weight", self.base.dense_mut("full")?),
            Method::Lora(lora) => {
                change("lora_A", &mut lora.a)?;
                change("lora_B", &mut lora.b)
            }
            Method::Dora(dora) => {
                change("lora_A", &mut dora.a)?;
                change("lora_B", &mut dora.b)?;
                change("lora_magnitude_vector", &mut dora.magnitude)
            }
            Method::Moslora(moslora) => {
                change("lora_A", &mut moslora.a)?;
                change("lora_B", &mut moslora.b)?;
                change("lora_mixer", &mut moslora.mixer)
            }
            Method::Paca(paca) => {
                let mut columns = paca.stored_columns(&self.base);
                change("paca_columns", &mut columns)?;
                paca.store_columns(&columns, &mut self.base);
                Ok(())
            }
            Method::S2ft(slice) => {
                let weight = self.base.dense_mut("s2ft")?;
                let mut values = slice.of(&weight.view()).as_standard_layout().into_owned();
                change("s2ft_slice", &mut values)?;
                slice.of_mut(weight).assign(&values);
                Ok(())
            }
        }
    }

    /// The dense weight that gives the same output without the method.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a DoRA row of norm zero.
    pub fn effective_weight(&self) -> Result<Array2<T>> {
        let mut cost = Cost::default();
        let mut weight = self.base.dense().into_owned();
        if self.is_merged() {
            return Ok(weight);
        }
        match &self.method {
            Method::Lora(lora) => lora.add_delta(&mut weight.view_mut(), &mut cost),
            Method::Moslora(moslora) => moslora.add_delta(&mut weight.view_mut(), &mut cost),
            Method::Dora(dora) => return Ok(dora.merged_weight(weight.view(), &mut cost)?.weight),
            Method::Paca(paca) if matches!(self.base, BaseWeight::Packed(_)) => paca.write_columns(&mut weight),
            _ => {}
        }
        Ok(weight)
    }

    /// Folds the method into the base weight: inference then costs nothing extra. The old weight is kept, so
    /// that [`AdaptedLinear::unmerge`] restores it bit for bit. PaCA and S2FT put their trained values back.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed base weight under an additive method.
    pub fn merge(&mut self) -> Result<()> {
        let merged_already = self.is_merged();
        match &mut self.method {
            Method::Frozen | Method::Full => Ok(()),
            Method::Paca(paca) => paca.activate(&mut self.base, true),
            Method::S2ft(slice) => slice.activate(self.base.dense_mut("s2ft")?, true),
            Method::Lora(_) | Method::Dora(_) | Method::Moslora(_) if merged_already => Ok(()),
            Method::Lora(_) | Method::Dora(_) | Method::Moslora(_) => {
                let merged = self.effective_weight()?;
                let name = self.method.name();
                self.unmerged = Some(std::mem::replace(self.base.dense_mut(name)?, merged));
                Ok(())
            }
        }
    }

    /// Undoes [`AdaptedLinear::merge`]; for PaCA and S2FT, whose values live in the base weight, puts the
    /// original values back (they stay away until merged again).
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for full fine-tuning, which keeps no original.
    pub fn unmerge(&mut self) -> Result<()> {
        match &mut self.method {
            Method::Frozen => Ok(()),
            Method::Full => Err(Error::invalid("method", "full", "keeps no original weight to return to")),
            Method::Paca(paca) => paca.activate(&mut self.base, false),
            Method::S2ft(slice) => slice.activate(self.base.dense_mut("s2ft")?, false),
            Method::Lora(_) | Method::Dora(_) | Method::Moslora(_) => {
                if let Some(original) = self.unmerged.take() {
                    *self.base.dense_mut("merged")? = original;
                }
                Ok(())
            }
        }
    }

    /// Bytes of adapter tensors held beside the base weight (trainable or kept originals).
    pub fn adapter_bytes(&self) -> usize {
        let held = match &self.method {
            Method::Frozen | Method::Full => 0,
            Method::Lora(lora) => lora.a.len() + lora.b.len(),
            Method::Dora(dora) => dora.a.len() + dora.b.len() + dora.magnitude.len(),
            Method::Moslora(moslora) => moslora.a.len() + moslora.b.len() + moslora.mixer.len(),
            Method::Paca(paca) => paca.held_elements(),
            Method::S2ft(slice) => slice.original.len(),
        };
        held * size_of::<T>()
    }
}
