//! AdamW and SGD on a device: the equations, constants and order of operations of
//! [`crate::train::optimizer`].

use super::blocks::Matrix;
use super::gradients::DeviceGradients;
use super::model::DeviceModel;
use crate::error::{Error, Result};
use crate::gpu::{Engine, Opened};
use crate::linalg::Real;
use crate::train::optimizer::{Optimizer, OptimizerKind, OptimizerParams};
use burn::tensor::{Tensor, TensorData};
use std::collections::BTreeMap;

/// Moments of one parameter.
#[derive(Debug, Clone)]
struct Moments<B: Engine> {
    first: Matrix<B>,
    /// AdamW only.
    second: Option<Matrix<B>>,
}

/// An optimizer with its state on a device, keyed by parameter name.
#[derive(Debug, Clone)]
pub struct DeviceOptimizer<B: Engine> {
    params: OptimizerParams,
    steps: u64,
    state: BTreeMap<String, Moments<B>>,
    /// State that arrived as flat vectors; a parameter's shape is known at its next update.
    arrived: BTreeMap<String, Vec<f32>>,
}

impl<B: Engine> DeviceOptimizer<B> {
    /// Goes on where an optimizer on the CPU stands.
    pub fn upload<T: Real>(optimizer: &Optimizer<T>) -> Self {
        let flat = |values: &[T]| values.iter().map(|x| x.widen() as f32).collect();
        Self {
            params: *optimizer.params(),
            steps: optimizer.steps(),
            state: BTreeMap::new(),
            arrived: optimizer.state().map(|(name, values)| (name, flat(values))).collect(),
        }
    }

    /// Puts the state into the optimizer on the CPU.
    ///
    /// # Errors
    /// [`Error::Device`]; as [`Optimizer::restore`].
    pub fn download<T: Real>(&self, on: &Opened<B>, optimizer: &mut Optimizer<T>) -> Result<()> {
        let mut all: Vec<(String, Vec<T>)> = Vec::new();
        let widen = |x: &f32| T::of(f64::from(*x));
        all.extend(
            self.arrived
                .iter()
                .map(|(name, values)| (name.clone(), values.iter().map(widen).collect())),
        );
        for (name, moments) in &self.state {
            let parts = [("first", Some(&moments.first)), ("second", moments.second.as_ref())];
            for (part, tensor) in
                parts.into_iter().filter_map(|(part, tensor)| Some((part, tensor?)))
            {
                all.push((
                    format!("{part}.{name}"),
                    on.download(tensor.clone())?.iter().map(widen).collect(),
                ));
            }
        }
        optimizer.restore(self.steps, all)
    }

    /// Bytes of state on the device.
    pub fn bytes(&self) -> usize {
        let numbers = |x: &Matrix<B>| x.shape().num_elements();
        let of = |m: &Moments<B>| numbers(&m.first) + m.second.as_ref().map_or(0, numbers);
        self.state.values().map(of).sum::<usize>() * size_of::<f32>()
    }

    /// One update of everything that a model trains, from its gradients times `scale` (1, or the
    /// clipping factor).
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the gradients are those of other trainable tensors.
    pub fn update(
        &mut self,
        model: &mut DeviceModel<B>,
        gradients: DeviceGradients<B>,
        lr: f64,
        scale: f64,
    ) -> Result<()> {
        self.steps += 1;
        let mut sinks = gradients.into_named().into_iter();
        let mut engine = model.engine();
        model.model.for_each_trainable_on(&mut engine, &mut |name, values| match sinks.next() {
            Some((found, gradient)) if found == name && gradient.dims() == values.dims() => {
                // Moved out meanwhile, so that its buffer can be reused.
                let empty = Tensor::empty([0, 0], &values.device());
                *values =
                    self.change(name, std::mem::replace(values, empty), gradient, lr, scale)?;
                Ok(())
            }
            _ => Err(Error::invalid("gradients", name, "were made for other trainable tensors")),
        })
    }

    fn arrived_or_zero(&mut self, part: &str, name: &str, like: &Matrix<B>) -> Result<Matrix<B>> {
        let key = format!("{part}.{name}");
        let Some(values) = self.arrived.remove(&key) else { return Ok(like.zeros_like()) };
        let [rows, columns] = like.dims();
        if values.len() != rows * columns {
            let got = format!("[{}]", values.len());
            return Err(Error::ShapeMismatch {
                op: "DeviceOptimizer::update",
                arg: key,
                expected: format!("[{}]", rows * columns),
                got,
            });
        }
        Ok(Tensor::from_data(TensorData::new(values, [rows, columns]), &like.device()))
    }

    fn change(
        &mut self,
        name: &str,
        values: Matrix<B>,
        gradient: Matrix<B>,
        lr: f64,
        scale: f64,
    ) -> Result<Matrix<B>> {
        let p = self.params;
        let exactly_one = scale.to_bits() == 1f64.to_bits();
        let gradient = if exactly_one { gradient } else { gradient.mul_scalar(scale) };
        let kept = p.state_per_parameter();
        let moments = match self.state.remove(name) {
            Some(moments) => Some(moments),
            None if kept == 0 => None,
            None => {
                let first = self.arrived_or_zero("first", name, &values)?;
                let second = if kept == 2 {
                    Some(self.arrived_or_zero("second", name, &values)?)
                } else {
                    None
                };
                Some(Moments { first, second })
            }
        };
        match (p.kind, moments) {
            (OptimizerKind::AdamW, Some(Moments { first, second: Some(second) })) => {
                let t = self.steps as f64;
                let step = lr / (1.0 - p.beta1.powf(t));
                let root = (1.0 - p.beta2.powf(t)).sqrt();
                let first = first.clone() + (gradient.clone() - first).mul_scalar(1.0 - p.beta1);
                let square = (gradient.clone() * gradient).mul_scalar(1.0 - p.beta2);
                let second = second.mul_scalar(p.beta2) + square;
                let divisor = second.clone().sqrt().div_scalar(root).add_scalar(p.eps);
                let values = values.mul_scalar(1.0 - lr * p.weight_decay)
                    - first.clone().mul_scalar(step) / divisor;
                self.state.insert(name.into(), Moments { first, second: Some(second) });
                Ok(values)
            }
            (_, moments) => {
                let decayed = gradient + values.clone().mul_scalar(p.weight_decay);
                let Some(Moments { first, .. }) = moments else {
                    return Ok(values - decayed.mul_scalar(lr));
                };
                let first = first.mul_scalar(p.momentum) + decayed;
                let values = values - first.clone().mul_scalar(lr);
                self.state.insert(name.into(), Moments { first, second: None });
                Ok(values)
            }
        }
    }
}
