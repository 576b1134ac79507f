//! A training step on random rows, for the experiments that time it or read its memory.

use ndarray::Array2;
use peft_limits::cost::Cost;
use peft_limits::error::Result;
use peft_limits::model::{Batch, Gradients, Model, ModelConfig, StepOptions};
use peft_limits::streams::generator;
use peft_limits::train::memory::{Memory, StepShape, ledger};
use peft_limits::train::method::MethodParams;
use peft_limits::train::optimizer::{Optimizer, OptimizerParams, update_model};
use rand::RngExt;
use std::time::Instant;

/// Seconds of the parts of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSeconds {
    /// Forward pass.
    pub forward: f64,
    /// Backward pass.
    pub backward: f64,
    /// AdamW.
    pub update: f64,
}

impl StepSeconds {
    /// Of the whole step.
    pub fn total(&self) -> f64 {
        self.forward + self.backward + self.update
    }
}

/// A model with a method, one batch, and what a step needs besides.
pub struct TimedStep {
    /// The adapted model.
    pub model: Model<f32>,
    gradients: Gradients<f32>,
    optimizer: Optimizer<f32>,
    batch: Batch,
    options: StepOptions,
    /// Operations of the last forward and backward pass.
    pub cost: Cost,
}

impl TimedStep {
    /// Random weights and `shape.batch` random rows of `shape.length` tokens, the same for every
    /// method.
    ///
    /// # Errors
    /// As [`MethodParams::apply`] and [`Batch::new`].
    pub fn new(
        config: &ModelConfig,
        method: &MethodParams,
        shape: &StepShape,
        seed: u64,
    ) -> Result<Self> {
        let mut rng = generator(seed, "timed_step", 0);
        let mut model: Model<f32> = Model::random(config.clone(), &mut rng)?;
        let vocabulary = config.vocab_size as u32;
        let ids = Array2::from_shape_simple_fn((shape.batch, shape.length), || {
            rng.random_range(0..vocabulary)
        });
        method.apply(&mut model, None, seed)?;
        Ok(Self {
            gradients: model.zero_gradients(),
            optimizer: OptimizerParams::default().check()?,
            batch: Batch::new(ids.clone(), ids.mapv(i64::from))?,
            options: StepOptions { checkpointing: shape.checkpointing, ..StepOptions::default() },
            cost: Cost::default(),
            model,
        })
    }

    /// One step: forward, backward, update.
    ///
    /// # Errors
    /// As [`Model::forward`], [`Model::backward`] and [`update_model`].
    pub fn run(&mut self) -> Result<StepSeconds> {
        self.cost = Cost::default();
        let start = Instant::now();
        self.gradients.fill_zero();
        let pass =
            self.model.forward(&self.batch, &self.options, &mut self.gradients, &mut self.cost)?;
        let forward = start.elapsed().as_secs_f64();
        self.model.backward(pass, &mut self.gradients, &mut self.cost)?;
        let backward = start.elapsed().as_secs_f64();
        update_model(&mut self.optimizer, &mut self.model, &self.gradients, 1e-4, 1.0, |_| ())?;
        let all = start.elapsed().as_secs_f64();
        Ok(StepSeconds { forward, backward: backward - forward, update: all - backward })
    }

    /// Bytes held at the peak of a step, read off the live objects; call it after a few steps.
    ///
    /// # Errors
    /// As [`ledger::measure`].
    pub fn memory(&mut self) -> Result<Memory> {
        ledger::measure(
            &self.model,
            &self.optimizer,
            &mut self.gradients,
            &self.batch,
            &self.options,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_limits::train::memory::predict;
    use peft_limits::train::method::MethodName;
    use peft_limits::train::preset::preset;

    #[test]
    fn a_step_is_timed_counted_and_read() {
        let config = preset("pico").unwrap();
        let method = MethodParams::named(MethodName::Paca);
        let shape = StepShape { batch: 2, length: 64, bytes: 4, state: 2, checkpointing: false };
        let mut step = TimedStep::new(&config, &method, &shape, 3).unwrap();
        for _ in 0..3 {
            let seconds = step.run().unwrap();
            assert!(seconds.forward > 0.0 && seconds.backward > 0.0 && seconds.update > 0.0);
            assert!(step.cost.flops() > 0);
        }
        let (live, predicted) =
            (step.memory().unwrap(), predict(&config, &method, &shape).unwrap());
        assert_eq!(live.activation_bytes(), predicted.activation_bytes());
        assert_eq!((live.weights, live.optimizer), (predicted.weights, predicted.optimizer));
    }
}
