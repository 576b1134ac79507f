//! Training runs whose steps are computed on a device.

use super::{DeviceGradients, DeviceModel, DeviceOptimizer};
use crate::error::{Error, Result};
use crate::gpu::guard::guarded;
use crate::gpu::{Device, Engine, Opened, Precision, Work};
use crate::linalg::Real;
use crate::model::{Batch, Model, StepOptions};
use crate::train::engine::StepEngine;
use crate::train::optimizer::Optimizer;
use crate::train::trainer::Trainer;

/// A model and its optimizer on a device.
struct DeviceEngine<B: Engine> {
    on: Opened<B>,
    model: DeviceModel<B>,
    optimizer: DeviceOptimizer<B>,
    gradients: Option<DeviceGradients<B>>,
}

impl<B: Engine, T: Real> StepEngine<T> for DeviceEngine<B> {
    fn gradients(&mut self, batches: &[Batch], options: &StepOptions) -> Result<(f64, f64)> {
        // The last step's are freed first.
        self.gradients = None;
        guarded(&self.on.info.to_string(), "training step", || {
            let mut gradients = self.model.zero_gradients();
            let mut loss = 0.0;
            for batch in batches {
                loss += self
                    .model
                    .loss_and_gradients(batch, options, &mut gradients, None)?
                    .read(&self.on)?;
            }
            let norm = gradients.norm(&self.on)?;
            self.gradients = Some(gradients);
            Ok((loss, norm))
        })
    }

    fn update(&mut self, lr: f64, scale: f64) -> Result<()> {
        let absent = || Error::invalid("gradients", "absent", "are computed before an update");
        let gradients = self.gradients.take().ok_or_else(absent)?;
        guarded(&self.on.info.to_string(), "optimizer update", || {
            self.optimizer.update(&mut self.model, gradients, lr, scale)
        })
    }

    fn download(&self, model: &mut Model<T>, optimizer: &mut Optimizer<T>) -> Result<()> {
        guarded(&self.on.info.to_string(), "reading the trained values", || {
            self.model.download(model)?;
            self.optimizer.download(&self.on, optimizer)
        })
    }
}

struct Attach<'a, T: Real>(&'a mut Trainer<T>, Precision);

impl<T: Real> Work for Attach<'_, T> {
    type Output = ();

    fn run<B: Engine>(self, on: &Opened<B>) -> Result<()> {
        let trainer = self.0;
        let model = DeviceModel::upload(&trainer.model, on)?.with_products(self.1)?;
        let optimizer = DeviceOptimizer::upload(&trainer.optimizer);
        trainer.attach(Box::new(DeviceEngine {
            on: on.clone(),
            model,
            optimizer,
            gradients: None,
        }));
        Ok(())
    }
}

/// Moves the steps of a run to a device, from the state in which the run is (so after a resume).
/// Data, logs, evaluation and checkpoints stay where they are. Products round their operands to
/// `products`; the rest is f32.
///
/// # Errors
/// [`Error::InvalidParam`] for double precision, emulated bf16 storage and packed weights, which
/// stay with the processor, and for a precision that the device lacks; [`Error::Device`],
/// [`Error::TooLarge`].
pub fn train_on<T: Real>(
    trainer: &mut Trainer<T>,
    device: &Device,
    products: Precision,
) -> Result<()> {
    let wanted = device.info().choice;
    if T::NAME != "f32" {
        return Err(Error::invalid(
            "--device",
            wanted,
            "computes in f32; f64 runs on --device cpu",
        ));
    }
    if trainer.config.train.bf16_storage {
        return Err(Error::invalid(
            "--device",
            wanted,
            "does not emulate bf16_storage; use --device cpu",
        ));
    }
    device.run("uploading the model", Attach(trainer, products))
}
