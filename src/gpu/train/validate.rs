//! A device's training step as a case for validation: the same ladder that other trainers climb.

use super::blocks::Matrix;
use super::blocks::linear::linear_forward;
use super::model::DeviceTap;
use super::{DeviceModel, DeviceOptimizer};
use crate::error::Result;
use crate::gpu::{Engine, Opened, Precision as Products, Work};
use crate::model::adapter_folder::AdapterKind;
use crate::model::{Batch, Model, Place, Point, StepOptions};
use crate::train::optimizer::OptimizerParams;
use crate::validate::Precision;
use crate::validate::diagnosis::budget::Effort;
use crate::validate::dump::{Case, Observed, Trainer};
use crate::validate::manifest::{Loss, OptimizerRecord};
use crate::validate::reference::Rounding;
use ndarray::Array2;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// A model and a batch whose step a device is to compute.
#[derive(Debug, Clone)]
pub struct DeviceCase {
    /// Name in reports.
    pub name: String,
    /// The model with its adapter.
    pub model: Model<f64>,
    /// Kind of the adapter.
    pub kind: Option<AdapterKind>,
    /// The batch.
    pub batch: Batch,
}

impl Work for DeviceCase {
    type Output = Case;

    fn run<B: Engine>(self, on: &Opened<B>) -> Result<Case> {
        self.run_with(on, None)
    }
}

/// Rounds every weight to f32, which is what a device holds: the reference then has the same
/// weights.
fn round_weights(model: &mut Model<f64>) -> Result<()> {
    let round = |x: &mut f64| *x = Precision::F32.round(*x);
    model.embedding.iter_mut().for_each(round);
    model.final_norm.numbers_mut().for_each(round);
    model.lm_head.iter_mut().flatten().for_each(round);
    for layer in &mut model.layers {
        layer.norms.iter_mut().flatten().flat_map(|norm| norm.numbers_mut()).for_each(round);
        for (_, projection) in layer.projections_mut() {
            Precision::F32.round_array(projection.base.dense_mut("validation")?);
        }
    }
    let mut adapters = model.acting_values().into_iter().collect::<BTreeMap<_, _>>();
    model.put_acting_values(&mut |name, shape| {
        let mut values = adapters.remove(name).unwrap_or_else(|| Array2::zeros(shape));
        Precision::F32.round_array(&mut values);
        Ok(values)
    })
}

fn observed(values: Array2<f32>) -> Observed {
    let shape = values.shape().to_vec();
    Observed { values: values.mapv(f64::from), precision: Precision::F32, shape }
}

impl DeviceCase {
    /// Runs the step and one AdamW update on the device. `tap` may change tensors on their way: a
    /// planted fault.
    ///
    /// # Errors
    /// As [`DeviceModel::upload`] and [`DeviceModel::loss_and_gradients`].
    pub fn run_with<B: Engine>(
        mut self,
        on: &Opened<B>,
        tap: Option<DeviceTap<'_, B>>,
    ) -> Result<Case> {
        round_weights(&mut self.model)?;
        let mut there = DeviceModel::upload(&self.model, on)?;
        let hidden: RefCell<BTreeMap<usize, Matrix<B>>> = RefCell::default();
        let last: RefCell<Option<Matrix<B>>> = RefCell::default();
        let record = |place: Place, x: Matrix<B>| {
            let x = match tap {
                Some(tap) => tap(place, x),
                None => x,
            };
            match (place.point, place.layer, place.gradient) {
                (Point::Output, Some(layer), false) => {
                    hidden.borrow_mut().insert(layer, x.clone());
                }
                (Point::FinalNorm, None, false) => *last.borrow_mut() = Some(x.clone()),
                _ => {}
            }
            x
        };
        let mut gradients = there.zero_gradients();
        let loss = there.loss_and_gradients(
            &self.batch,
            &StepOptions::default(),
            &mut gradients,
            Some(&record),
        )?;
        let mut trainer = Trainer { loss: Some(loss.read(on)?), ..Trainer::default() };
        for (name, gradient) in gradients.download(on)? {
            trainer.gradients.insert(name, observed(gradient));
        }
        for (layer, x) in hidden.take() {
            trainer.hidden.insert(layer, observed(on.download(x)?));
        }
        let logits = self.batch.tokens() * self.model.config.vocab_size;
        if let (Some(x), Ok(())) = (last.take(), on.check_buffer("logits", logits)) {
            trainer.logits =
                Some(observed(on.download(linear_forward(&x, there.head(), Products::F32))?));
        }
        let params = OptimizerParams::default();
        DeviceOptimizer::upload(&params.check::<f64>()?)
            .update(&mut there, gradients, params.lr, 1.0)?;
        let mut after = self.model.clone();
        there.download(&mut after)?;
        for (name, values) in after.trainable_values() {
            let shape = values.shape().to_vec();
            trainer.after.insert(name, Observed { values, precision: Precision::F32, shape });
        }
        let single = Precision::F32;
        let rounding = Rounding {
            stream: single,
            products: single,
            autocast: false,
            internals: single,
            quantized: None,
        };
        Ok(Case {
            name: self.name,
            trained: self.model.trainable_values().into_iter().map(|(name, _)| name).collect(),
            model: self.model,
            kind: self.kind,
            batch: self.batch,
            loss: Loss::default(),
            objective: Default::default(),
            optimizer: Some(OptimizerRecord::of(&params)),
            rounding,
            quantized: Vec::new(),
            trainer,
            ties: Vec::new(),
            effort: Effort { steps: f64::INFINITY, parts_first: false },
            layers: None,
            input: None,
            recompute: false,
            forward_only: false,
            faint: None,
            distribution: None,
        })
    }
}
