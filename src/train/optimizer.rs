//! AdamW and SGD as pure updates of named parameters, and clipping by the global norm.
//!
//! ```text
//! AdamW   p <- p - lr wd p                               decoupled decay, before the update
//!         m <- m + (1 - b1) (g - m)      v <- b2 v + (1 - b2) g^2
//!         p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)      t = 1, 2, ...
//! SGD     g <- g + wd p         m <- mu m + g  (m = g at t = 1)         p <- p - lr m
//! ```
//!
//! The order of operations and the place of eps (outside the root, after the bias correction) are
//! those of the common trainers, so that three steps agree to roundoff with a recorded run.

use crate::error::{Error, Result};
use crate::limits::descent::UpdateRule;
use crate::linalg::elementwise::{Kernel, vectorized};
use crate::linalg::{Real, on_workers};
use crate::model::{Gradients, Model, Trainable};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Which update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[default]
    AdamW,
    /// Stochastic gradient descent with momentum.
    Sgd,
}

/// Parameters of an optimizer.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `kind` | `adamw` | the update | `adamw`, `sgd` |
/// | `lr` | 1e-3 | peak learning rate | > 0 |
/// | `beta1`, `beta2` | 0.9, 0.999 | decay of the moments (AdamW) | 0 to below 1 |
/// | `eps` | 1e-8 | added to the root of the second moment (AdamW) | > 0 |
/// | `weight_decay` | 0 | decoupled (AdamW) or added to the gradient (SGD) | >= 0 |
/// | `momentum` | 0 | SGD | 0 to below 1 |
/// | `clip` | 0 | largest global gradient norm; 0 turns clipping off | >= 0 |
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerParams {
    /// The update.
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Largest global gradient norm; 0 is off.
    pub clip: f64,
}

impl Default for OptimizerParams {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            momentum: 0.0,
            clip: 0.0,
        }
    }
}

impl OptimizerParams {
    /// Checks every range of the table.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key and its range.
    pub fn check<T: Real>(self) -> Result<Optimizer<T>> {
        let ranges = [
            ("lr", self.lr, self.lr > 0.0, "must be positive"),
            (
                "beta1",
                self.beta1,
                (0.0..1.0).contains(&self.beta1),
                "must be at least 0 and below 1",
            ),
            (
                "beta2",
                self.beta2,
                (0.0..1.0).contains(&self.beta2),
                "must be at least 0 and below 1",
            ),
            ("eps", self.eps, self.eps > 0.0, "must be positive"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0, "must be at least 0"),
            (
                "momentum",
                self.momentum,
                (0.0..1.0).contains(&self.momentum),
                "must be at least 0 and below 1",
            ),
            ("clip", self.clip, self.clip >= 0.0, "must be at least 0 (0 turns clipping off)"),
        ];
        for (name, value, fine, requirement) in ranges {
            if !(fine && value.is_finite()) {
                return Err(Error::invalid(format!("optimizer.{name}"), value, requirement));
            }
        }
        Ok(Optimizer { params: self, steps: 0, state: BTreeMap::new() })
    }

    /// Numbers of state kept per trained number.
    pub fn state_per_parameter(&self) -> usize {
        match self.kind {
            OptimizerKind::AdamW => 2,
            OptimizerKind::Sgd => usize::from(self.momentum > 0.0),
        }
    }
}

/// Moments of one parameter: (first, second) for AdamW, (momentum,) for SGD.
#[derive(Debug, Clone, PartialEq)]
struct Moments<T> {
    first: Vec<T>,
    second: Vec<T>,
}

/// A checked optimizer with its state, keyed by parameter name.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer<T> {
    params: OptimizerParams,
    steps: u64,
    state: BTreeMap<String, Moments<T>>,
}

impl<T: Real> Optimizer<T> {
    /// The parameters it was made from.
    pub fn params(&self) -> &OptimizerParams {
        &self.params
    }

    /// Updates done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Starts the next update: every trained parameter then gets one [`Optimizer::update`].
    pub fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// Bytes of state.
    pub fn bytes(&self) -> usize {
        self.state.values().map(|m| (m.first.len() + m.second.len()) * size_of::<T>()).sum()
    }

    /// Updates one parameter in place from its gradient times `gradient_scale` (1, or the clipping
    /// factor).
    ///
    /// State is made at the first call for a name. Cost O(entries).
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if parameter, gradient and state differ in length.
    ///
    /// ```
    /// use peft_limits::train::optimizer::OptimizerParams;
    /// // At the first step AdamW moves every entry by lr in the gradient's sign, whatever its size.
    /// let mut adam = OptimizerParams { lr: 0.5, eps: 1e-30, ..Default::default() }.check::<f64>()?;
    /// let mut p = [1.0, 2.0];
    /// adam.begin_step();
    /// adam.update("p", &mut p, &[1e-3, -1e6], 0.5, 1.0)?;
    /// assert!((p[0] - 0.5).abs() < 1e-12 && (p[1] - 2.5).abs() < 1e-12);
    /// # Ok::<(), peft_limits::Error>(())
    /// ```
    pub fn update(
        &mut self,
        name: &str,
        parameter: &mut [T],
        gradient: &[T],
        lr: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        let n = parameter.len();
        if gradient.len() != n {
            return Err(length_mismatch(format!("gradient of {name}"), n, gradient.len()));
        }
        if !self.state.contains_key(name) {
            let [first, second] = self.state_lengths(n).map(|n| vec![T::zero(); n]);
            self.state.insert(name.to_string(), Moments { first, second });
        }
        let Some(moments) = self.state.get_mut(name) else { return Ok(()) };
        let expected = if moments.first.is_empty() { n } else { moments.first.len() };
        if expected != n {
            return Err(length_mismatch(format!("parameter {name}"), expected, n));
        }
        let scale = T::of(gradient_scale);
        let p = self.params;
        match p.kind {
            OptimizerKind::AdamW => {
                let t = self.steps.max(1) as f64;
                let factors = AdamFactors {
                    keep: T::of(1.0 - lr * p.weight_decay),
                    gradient_scale: scale,
                    first: T::of(1.0 - p.beta1),
                    second: [T::of(p.beta2), T::of(1.0 - p.beta2)],
                    step: T::of(lr / (1.0 - p.beta1.powf(t))),
                    root: T::of((1.0 - p.beta2.powf(t)).sqrt()),
                    eps: T::of(p.eps),
                };
                let moments =
                    moments.first.par_chunks_mut(PART).zip(moments.second.par_chunks_mut(PART));
                let parts =
                    parameter.par_chunks_mut(PART).zip(gradient.par_chunks(PART)).zip(moments);
                parts.for_each(|((parameter, gradient), (first, second))| {
                    vectorized(AdamW { parameter, gradient, first, second, factors });
                });
            }
            OptimizerKind::Sgd => {
                let (lr, decay, momentum) = (T::of(lr), T::of(p.weight_decay), T::of(p.momentum));
                if moments.first.is_empty() {
                    for (x, &g) in parameter.iter_mut().zip(gradient) {
                        let g = g * scale + decay * *x;
                        *x -= lr * g;
                    }
                } else {
                    // Momentum starts at zero, so the first step is m = g.
                    for ((x, &g), m) in parameter.iter_mut().zip(gradient).zip(&mut moments.first) {
                        *m = momentum * *m + g * scale + decay * *x;
                        *x -= lr * *m;
                    }
                }
            }
        }
        Ok(())
    }

    fn state_lengths(&self, n: usize) -> [usize; 2] {
        match self.params.state_per_parameter() {
            2 => [n, n],
            1 => [n, 0],
            _ => [0, 0],
        }
    }

    /// State tensors by name (`first.<parameter>`, `second.<parameter>`), for checkpoints.
    pub fn state(&self) -> impl Iterator<Item = (String, &[T])> {
        self.state.iter().flat_map(|(name, moments)| {
            let parts = [("first", &moments.first), ("second", &moments.second)];
            parts
                .into_iter()
                .filter(|p| !p.1.is_empty())
                .map(move |(part, x)| (format!("{part}.{name}"), x.as_slice()))
        })
    }

    /// Restores what [`Optimizer::state`] and [`Optimizer::steps`] gave.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a name without `first.` or `second.`, or a part that this kind
    /// does not keep; [`Error::ShapeMismatch`] if the two moments differ in length.
    pub fn restore(
        &mut self,
        steps: u64,
        state: impl IntoIterator<Item = (String, Vec<T>)>,
    ) -> Result<()> {
        let mut restored: BTreeMap<String, Moments<T>> = BTreeMap::new();
        let parts = self.params.state_per_parameter();
        for (key, values) in state {
            let (part, name) = key.split_once('.').unwrap_or(("", &key));
            let entry = restored
                .entry(name.to_string())
                .or_insert(Moments { first: vec![], second: vec![] });
            match part {
                "first" if parts >= 1 => entry.first = values,
                "second" if parts == 2 => entry.second = values,
                _ => {
                    return Err(Error::invalid(
                        "optimizer state",
                        &key,
                        format!("not kept by {:?}", self.params.kind),
                    ));
                }
            }
        }
        for (name, moments) in &restored {
            let second = if parts == 2 { moments.first.len() } else { 0 };
            if moments.second.len() != second {
                return Err(length_mismatch(
                    format!("second.{name}"),
                    second,
                    moments.second.len(),
                ));
            }
        }
        self.steps = steps;
        self.state = restored;
        Ok(())
    }
}

/// What an update by AdamW multiplies by; the same for every entry of a step.
#[derive(Clone, Copy)]
struct AdamFactors<T> {
    /// 1 - lr weight_decay.
    keep: T,
    gradient_scale: T,
    /// 1 - beta1.
    first: T,
    /// beta2 and 1 - beta2.
    second: [T; 2],
    /// lr / (1 - beta1^t).
    step: T,
    /// sqrt(1 - beta2^t).
    root: T,
    eps: T,
}

/// AdamW on a part of a tensor. As a loop in a closure over captured factors it took five times as
/// long (`cargo bench --bench step_parts`: 18 ms a step for 3.6).
struct AdamW<'a, T> {
    parameter: &'a mut [T],
    gradient: &'a [T],
    first: &'a mut [T],
    second: &'a mut [T],
    factors: AdamFactors<T>,
}

/// At the learning rate of the settings.
impl<T: Real> UpdateRule<T> for Optimizer<T> {
    fn begin_step(&mut self) {
        Optimizer::begin_step(self);
    }

    fn update(&mut self, name: &str, values: &mut [T], gradient: &[T]) -> Result<()> {
        Optimizer::update(self, name, values, gradient, self.params().lr, 1.0)
    }
}

impl<T: Real> Kernel for AdamW<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let AdamFactors { keep, gradient_scale, first, second: [b2, w2], step, root, eps } =
            self.factors;
        let moments = self.first.iter_mut().zip(self.second);
        for ((x, &g), (m, v)) in self.parameter.iter_mut().zip(self.gradient).zip(moments) {
            let g = g * gradient_scale;
            *m += first * (g - *m);
            *v = b2 * *v + w2 * g * g;
            *x = keep * *x - step * *m / (v.sqrt() / root + eps);
        }
    }
}

/// Entries that one task of an update takes.
const PART: usize = 1 << 15;

fn length_mismatch(arg: String, expected: usize, got: usize) -> Error {
    Error::ShapeMismatch {
        op: "Optimizer::update",
        arg,
        expected: format!("[{expected}]"),
        got: format!("[{got}]"),
    }
}

/// One update of everything that a model trains; `after` sees each tensor's new values.
///
/// # Errors
/// As [`Model::update`] and [`Optimizer::update`].
pub fn update_model<T: Real>(
    optimizer: &mut Optimizer<T>,
    model: &mut Model<T>,
    gradients: &Gradients<T>,
    lr: f64,
    scale: f64,
    mut after: impl FnMut(&mut [T]) + Send,
) -> Result<()> {
    optimizer.begin_step();
    let mut change = |tensor: Trainable<'_, T>| {
        let contiguous = || Error::invalid("tensor", tensor.name, "must be contiguous");
        let gradient = tensor.gradient.as_slice().ok_or_else(contiguous)?;
        let values = tensor.values.as_slice_mut().ok_or_else(contiguous)?;
        optimizer.update(tensor.name, values, gradient, lr, scale)?;
        after(values);
        Ok(())
    };
    on_workers(move || model.update(gradients, &mut change))
}

/// Sum of squares of a gradient in double precision; the global norm is the root of the sum over
/// parameters.
pub fn squared_norm<T: Real>(gradient: &[T]) -> f64 {
    gradient.iter().map(|g| g.widen() * g.widen()).sum()
}

/// Factor that brings a gradient of global norm `norm` to at most `clip`: min(1, clip / (norm +
/// 1e-6)).
///
/// The 1e-6 is that of the common trainers. `clip = 0` turns clipping off.
///
/// ```
/// use peft_limits::train::optimizer::clip_factor;
/// assert_eq!(clip_factor(0.5, 1.0), 1.0);
/// assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
/// assert_eq!(clip_factor(4.0, 0.0), 1.0);
/// ```
pub fn clip_factor(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

#[cfg(test)]
#[path = "optimizer_tests.rs"]
mod tests;
