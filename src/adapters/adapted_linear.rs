//! A projection with its adaptation method: forward, backward, update, merging.

use super::full::{Frozen, Full};
use super::{Adaptation, BaseWeight, Change, Method, MethodOn};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::{Cpu, InputGradient, Ops};
use ndarray::Array2;

/// A projection with its adaptation method, on some engine.
#[derive(Debug, Clone)]
pub struct LinearOn<E: Ops> {
    /// The weight under the method, `out x in`.
    pub base: E::Weight,
    /// The method with its parameters.
    pub method: MethodOn<E>,
    /// Added to the output.
    pub bias: Option<E::Vector>,
    /// Trained whole beside an adapter, its bias too (PEFT's `modules_to_save`).
    pub whole: bool,
    /// The base weight as it was, while an additive method is merged into it.
    unmerged: Option<E::Matrix>,
}

/// A projection on the processor.
pub type AdaptedLinear<T> = LinearOn<Cpu<T>>;

impl<E: Ops> LinearOn<E> {
    /// A weight and its method.
    pub fn new(base: E::Weight, method: MethodOn<E>) -> Self {
        Self { base, method, bias: None, whole: false, unmerged: None }
    }

    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        E::weight_shape(&self.base)
    }

    /// Whether anything is trained here.
    pub fn is_trainable(&self) -> bool {
        !matches!(self.method, MethodOn::Frozen)
    }

    /// Whether an additive method is currently folded into the base weight.
    pub fn is_merged(&self) -> bool {
        self.unmerged.is_some()
    }

    /// y = the adapted projection of x, or added to a matrix; and, if `save`, what backward needs.
    ///
    /// Shapes: x `N x in`, y `N x out`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`].
    pub fn forward(
        &self,
        e: &mut E,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        save: bool,
    ) -> Result<(E::Matrix, Option<E::Matrix>)> {
        let (y, saved) = self.forward_without_bias(e, x, add_to, save)?;
        Ok(match &self.bias {
            Some(bias) => (e.add_row(y, bias), saved),
            None => (y, saved),
        })
    }

    /// As [`LinearOn::forward`] without the bias.
    ///
    /// # Errors
    /// As there.
    pub fn forward_without_bias(
        &self,
        e: &mut E,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        save: bool,
    ) -> Result<(E::Matrix, Option<E::Matrix>)> {
        let (out, width) = self.shape();
        let rows = E::shape(x).0;
        require("x", E::shape(x), (rows, width))?;
        if let Some(y) = &add_to {
            require("y", E::shape(y), (rows, out))?;
        }
        let base = e.resident(&self.base)?;
        let outcome = if self.is_merged() {
            Ok((e.product(x, &base, add_to), None))
        } else {
            self.method.adaptation().forward(e, &base, x, add_to, save)
        };
        e.give_back(base);
        outcome
    }

    /// y = x W^T with the weight alone, added to a matrix.
    ///
    /// # Errors
    /// Those of reading a stored weight.
    pub(crate) fn base_forward(
        &self,
        e: &mut E,
        x: &E::Matrix,
        add_to: E::Matrix,
    ) -> Result<E::Matrix> {
        let base = e.resident(&self.base)?;
        let y = e.product(x, &base, Some(add_to));
        e.give_back(base);
        Ok(y)
    }

    /// dx = dy W with the weight alone.
    ///
    /// # Errors
    /// Those of reading a stored weight.
    pub(crate) fn base_backward(&self, e: &mut E, dy: &E::Matrix) -> Result<E::Matrix> {
        let base = e.resident(&self.base)?;
        let dx = e.product_backward(dy, &base, None);
        e.give_back(base);
        Ok(dx)
    }

    /// Adds the gradients of the trainable tensors to `sinks` (ordered as
    /// [`MethodOn::trainable_names`]) and returns that of the input if it is wanted.
    ///
    /// `x` is needed where [`MethodOn::input_need`] is `InputNeed::Whole`; `sinks` of a frozen
    /// projection are empty.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] if what forward should have saved is
    /// absent, the sinks do not fit, or the method is merged.
    pub fn backward(
        &self,
        e: &mut E,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        saved: Option<E::Matrix>,
        sinks: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>> {
        let names = self.method.trainable_names();
        if sinks.len() != names.len() {
            return Err(Error::invalid(
                "gradient sinks",
                sinks.len(),
                format!("{:?} needs {}", names, names.len()),
            ));
        }
        if self.is_merged() {
            let requirement = "is merged into the base weight; unmerge to train";
            return Err(Error::invalid("method", self.method.name(), requirement));
        }
        let (out, width) = self.shape();
        let rows = E::shape(dy).0;
        require("dy", E::shape(dy), (rows, out))?;
        if let Some(x) = x {
            require("x", E::shape(x), (rows, width))?;
        }
        if let InputGradient::AddTo(dx) = &dx {
            require("dx", E::shape(dx), (rows, width))?;
        }
        // A frozen weight below which nothing is trained is not looked at.
        if !self.is_trainable() && matches!(dx, InputGradient::Skip) {
            return Ok(None);
        }
        let base = e.resident(&self.base)?;
        let outcome = self.method.adaptation().backward(e, &base, dy, x, saved, sinks, dx);
        e.give_back(base);
        outcome
    }

    /// Shapes of the trainable tensors, ordered as [`MethodOn::trainable_names`].
    pub fn trainable_shapes(&self) -> Vec<(usize, usize)> {
        self.method.adaptation().trained_shapes(self.shape())
    }

    /// Numbers held beside the base weight: adapter tensors, or kept originals.
    pub fn held(&self) -> usize {
        self.method.adaptation().held(self.shape(), E::is_packed(&self.base))
    }

    /// Copies of the trainable tensors, ordered as [`MethodOn::trainable_names`].
    pub fn values(&self, e: &mut E) -> Vec<E::Matrix> {
        self.method.adaptation().values(e, &self.base)
    }

    /// Copies of the trained values as they act ([`Adaptation::acting_values`]).
    pub fn acting_values(&self, e: &mut E) -> Vec<E::Matrix> {
        self.method.adaptation().acting_values(e, &self.base)
    }

    /// The method, its weight, and the weight's own method where nothing stands beside it.
    fn with_method<R>(
        &mut self,
        act: impl FnOnce(&mut dyn Adaptation<E>, &mut E::Weight) -> R,
    ) -> R {
        let whole = matches!(self.method, MethodOn::Full);
        match self.method.adaptation_mut() {
            Some(method) => act(method, &mut self.base),
            None if whole => act(&mut Full, &mut self.base),
            None => act(&mut Frozen, &mut self.base),
        }
    }

    /// Puts values as [`LinearOn::acting_values`] gives them.
    ///
    /// # Errors
    /// As [`LinearOn::update_on`].
    pub fn put_acting(&mut self, e: &mut E, values: Vec<E::Matrix>) -> Result<()> {
        self.with_method(|method, base| method.put_acting(e, base, values))
    }

    /// Calls `change` on each trainable tensor and puts the result in effect.
    ///
    /// # Errors
    /// What `change` returns; [`Error::InvalidParam`] for a method that must write into a packed
    /// weight.
    pub fn update_on(&mut self, e: &mut E, change: Change<'_, E>) -> Result<()> {
        self.with_method(|method, base| method.update(e, base, change))
    }
}

fn require(arg: &str, got: (usize, usize), expected: (usize, usize)) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::shape("linear", arg, expected, got)) }
}

impl<T: Real> AdaptedLinear<T> {
    /// A frozen projection.
    pub fn frozen(weight: Array2<T>) -> Self {
        Self::new(BaseWeight::Dense(weight), Method::Frozen)
    }

    /// As [`LinearOn::update_on`], each tensor as a contiguous array.
    ///
    /// # Errors
    /// As there.
    pub fn update(
        &mut self,
        change: &mut dyn FnMut(&'static str, &mut Array2<T>) -> Result<()>,
    ) -> Result<()> {
        self.update_on(&mut Cpu::default(), change)
    }

    /// The dense weight that gives the same output without the method.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a DoRA row of norm zero.
    pub fn effective_weight(&self) -> Result<Array2<T>> {
        let mut cost = Cost::default();
        let mut weight = self.base.read()?.into_owned();
        if self.is_merged() {
            return Ok(weight);
        }
        match &self.method {
            Method::Lora(lora) if lora.bias.is_some() => {
                let requirement = "has a bias of its own (lora_bias), which a weight cannot hold: \
                                   keep the adapter apart";
                return Err(Error::invalid("method", "lora", requirement));
            }
            Method::Lora(lora) => lora.add_delta(&mut weight.view_mut(), &mut cost),
            Method::Moslora(moslora) => moslora.add_delta(&mut weight.view_mut(), &mut cost),
            Method::Dora(dora) => return dora.merged_weight(&mut Cpu::default(), &self.base),
            _ => {}
        }
        Ok(weight)
    }

    /// Adds `factor` times the low-rank update of `of` to the base weight, beside which the method
    /// stays; false where `of` has none that is a sum.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed base weight.
    pub fn add_update_to_base(&mut self, of: &Method<T>, factor: f64) -> Result<bool> {
        match of.clone() {
            Method::Lora(mut lora) => {
                lora.scaling *= factor;
                self.base.change("base", move |weight| {
                    lora.add_delta(&mut weight.view_mut(), &mut Cost::default())
                })?;
            }
            Method::Moslora(mut lora) => {
                lora.scaling *= factor;
                self.base.change("base", move |weight| {
                    lora.add_delta(&mut weight.view_mut(), &mut Cost::default())
                })?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Folds the method into the base weight: inference then costs nothing extra. The old weight is
    /// kept, so that [`AdaptedLinear::unmerge`] restores it bit for bit. PaCA, S2FT and SpFT put
    /// their trained values back.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a packed base weight under an additive method.
    pub fn merge(&mut self) -> Result<()> {
        let merged_already = self.is_merged();
        match &mut self.method {
            Method::Frozen | Method::Full => {}
            Method::Paca(paca) => paca.activate(&mut self.base, true),
            Method::S2ft(slice) => slice.activate(self.base.dense_mut("s2ft")?, true),
            Method::Spft(entries) => entries.activate(&mut self.base, true)?,
            Method::Lora(_) | Method::Dora(_) | Method::Moslora(_) if merged_already => {}
            Method::Lora(_) | Method::Dora(_) | Method::Moslora(_) => {
                let merged = self.effective_weight()?;
                let name = self.method.name();
                self.unmerged = Some(std::mem::replace(self.base.dense_mut(name)?, merged));
            }
        }
        Ok(())
    }

    /// Undoes [`AdaptedLinear::merge`]; for PaCA, S2FT and SpFT, whose values live in the base
    /// weight, puts the original values back (they stay away until merged again).
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for full fine-tuning, which keeps no original.
    pub fn unmerge(&mut self) -> Result<()> {
        match &mut self.method {
            Method::Frozen => {}
            Method::Full => {
                return Err(Error::invalid(
                    "method",
                    "full",
                    "keeps no original weight to return to",
                ));
            }
            Method::Paca(paca) => paca.activate(&mut self.base, false),
            Method::S2ft(slice) => slice.activate(self.base.dense_mut("s2ft")?, false),
            Method::Spft(entries) => entries.activate(&mut self.base, false)?,
            Method::Lora(_) | Method::Dora(_) | Method::Moslora(_) => {
                if let Some(original) = self.unmerged.take() {
                    *self.base.dense_mut("merged")? = original;
                }
            }
        }
        Ok(())
    }
}
