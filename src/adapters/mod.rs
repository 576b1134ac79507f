//! Adaptation methods of one linear projection, and the interface by which a model uses them.
//!
//! A [`LinearOn`] is a base weight and a [`MethodOn`]. `forward` returns the output and what the
//! method needs for backward; the layer's input itself is kept by the caller, once per group of
//! projections that read it, and only if some method's [`Adaptation::input_need`] is
//! [`InputNeed::Whole`].
//!
//! | method | trains | needs of the input | module |
//! |---|---|---|---|
//! | `Frozen` | nothing | nothing | [`full`] |
//! | `Full` | W | whole | [`full`] |
//! | `Lora` | A, B | whole, and xA^T | [`lora`] |
//! | `Dora` | A, B, magnitude | whole | [`dora`] |
//! | `Moslora` | A, B, mixer | whole, and xA^T | [`moslora`] |
//! | `Paca` | r columns of W in place | x at r columns | [`paca`] |
//! | `Spft` | single entries of W in place | whole | [`spft`] |
//! | `S2ft` | a slice of rows or columns of W in place | whole (rows) or the slice (columns) | [`s2ft`] |
//!
//! A new method is a file that implements [`Adaptation`] and, to be kept in adapter files,
//! [`stored::Stored`]; and a line in [`MethodOn`], [`MethodOn::adaptation`] and
//! [`stored::AdapterKind`].

mod adapted_linear;
pub mod dora;
pub mod full;
pub mod int8;
pub mod lora;
pub mod moslora;
pub mod nf4;
pub mod paca;
pub mod s2ft;
pub mod selection;
pub mod spft;
pub mod stored;
pub mod update;

pub use crate::blocks::base_weight::{BaseWeight, PackedWeight};
use crate::error::{Error, Result};
use crate::ops::{Cpu, InputGradient, Ops};
pub use adapted_linear::{AdaptedLinear, LinearOn};

/// Changes a trained tensor in place, by name.
pub type Change<'a, E> = &'a mut dyn FnMut(&'static str, &mut <E as Ops>::Matrix) -> Result<()>;

/// How a projection is adapted.
#[derive(Debug, Clone)]
pub enum MethodOn<E: Ops> {
    /// Not at all.
    Frozen,
    /// The whole weight is trained.
    Full,
    /// Low-rank update.
    Lora(lora::LoraOn<E>),
    /// Low-rank update with trained row magnitudes.
    Dora(dora::DoraOn<E>),
    /// Low-rank update with a mixer between its factors.
    Moslora(moslora::MosloraOn<E>),
    /// Partial connections.
    Paca(paca::PacaOn<E>),
    /// A dense slice of a co-permuted weight.
    S2ft(s2ft::S2ftSliceOn<E>),
    /// Single entries, anywhere in the weight.
    Spft(spft::SpftOn<E>),
}

/// A method on the processor.
pub type Method<T> = MethodOn<Cpu<T>>;

/// How much of a projection's input its backward needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputNeed {
    /// Nothing: frozen.
    Nothing,
    /// Some columns, which forward copies.
    Columns,
    /// All of it, kept by the caller.
    Whole,
}

/// What a method does in a training step, on any engine.
pub trait Adaptation<E: Ops> {
    /// Name used in configuration files, tables and adapter files.
    fn name(&self) -> &'static str;
    /// Names of the trained tensors, in the order of the gradient sinks.
    fn trained_names(&self) -> &'static [&'static str];
    /// Their shapes, for a weight of shape (out, in).
    fn trained_shapes(&self, weight: (usize, usize)) -> Vec<(usize, usize)>;
    /// What backward needs of the input.
    fn input_need(&self) -> InputNeed;
    /// Numbers held beside the weight: the trained tensors, or the original values of what is
    /// trained in place.
    fn held(&self, weight: (usize, usize), _packed: bool) -> usize {
        self.trained_shapes(weight).iter().map(|(rows, columns)| rows * columns).sum()
    }
    /// Name of what forward saves.
    fn saved_name(&self) -> &'static str {
        ""
    }

    /// y = the adapted projection of x, or added to a matrix; and, if `save`, what backward needs.
    ///
    /// # Errors
    /// The engine's.
    fn forward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        _save: bool,
    ) -> Result<(E::Matrix, Option<E::Matrix>)> {
        Ok((e.product(x, weight, add_to), None))
    }

    /// Adds the gradients of the trained tensors to the sinks; returns that of the input if it is
    /// wanted.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if what forward should have saved is absent; the engine's.
    fn backward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        saved: Option<E::Matrix>,
        sinks: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>>;

    /// Copies of the trained tensors.
    fn values(&self, e: &mut E, weight: &E::Weight) -> Vec<E::Matrix>;

    /// Copies of the trained values as they act in the weight. They differ from
    /// [`Adaptation::values`] for a tensor that is stored divided by a scaling: dividing and
    /// multiplying again need not give the same bits.
    fn acting_values(&self, e: &mut E, weight: &E::Weight) -> Vec<E::Matrix> {
        self.values(e, weight)
    }

    /// Puts values as [`Adaptation::acting_values`] gives them.
    ///
    /// # Errors
    /// As [`Adaptation::update`].
    fn put_acting(
        &mut self,
        e: &mut E,
        weight: &mut E::Weight,
        values: Vec<E::Matrix>,
    ) -> Result<()> {
        let mut values = values.into_iter();
        self.update(e, weight, &mut |_, tensor| {
            if let Some(value) = values.next() {
                *tensor = value;
            }
            Ok(())
        })
    }

    /// Calls `change` on each trained tensor and puts the result in effect.
    ///
    /// # Errors
    /// What `change` returns; [`Error::InvalidParam`] for a method that must write into a packed
    /// weight.
    fn update(&mut self, e: &mut E, weight: &mut E::Weight, change: Change<'_, E>) -> Result<()>;
}

impl<E: Ops> MethodOn<E> {
    /// The method's part in a step.
    pub fn adaptation(&self) -> &dyn Adaptation<E> {
        match self {
            MethodOn::Frozen => &full::Frozen,
            MethodOn::Full => &full::Full,
            MethodOn::Lora(method) => method,
            MethodOn::Dora(method) => method,
            MethodOn::Moslora(method) => method,
            MethodOn::Paca(method) => method,
            MethodOn::S2ft(method) => method,
            MethodOn::Spft(method) => method,
        }
    }

    /// As [`MethodOn::adaptation`], to change the trained tensors; `None` if there are none beside
    /// the weight's own.
    pub fn adaptation_mut(&mut self) -> Option<&mut dyn Adaptation<E>> {
        match self {
            MethodOn::Frozen | MethodOn::Full => None,
            MethodOn::Lora(method) => Some(method),
            MethodOn::Dora(method) => Some(method),
            MethodOn::Moslora(method) => Some(method),
            MethodOn::Paca(method) => Some(method),
            MethodOn::S2ft(method) => Some(method),
            MethodOn::Spft(method) => Some(method),
        }
    }

    /// Name used in configuration files, tables and adapter files.
    pub fn name(&self) -> &'static str {
        self.adaptation().name()
    }

    /// What backward needs of the input.
    pub fn input_need(&self) -> InputNeed {
        self.adaptation().input_need()
    }

    /// Names of the trainable tensors, in the order of the gradient sinks.
    pub fn trainable_names(&self) -> &'static [&'static str] {
        self.adaptation().trained_names()
    }
}

/// The whole input, which the caller should have kept.
fn whole<M>(x: Option<&M>) -> Result<&M> {
    x.ok_or_else(|| Error::invalid("input", "absent", "forward must save it for this method"))
}

/// What the method's own forward should have saved.
fn kept<M>(saved: Option<M>, what: &str) -> Result<M> {
    saved.ok_or_else(|| Error::invalid(what, "absent", "forward must save it for this method"))
}
