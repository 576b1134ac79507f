//! Emulation of bf16 storage: values that a GPU trainer would keep in bf16 are rounded to it at
//! named points.
//!
//! Rounded: every dense weight and adapter tensor at the start, trained tensors after each update,
//! gradients before it. Not rounded: activations, optimizer state, NF4 codes.

use crate::adapters::BaseWeight;
use crate::error::Result;
use crate::linalg::Real;
use crate::model::{Gradients, Model};

/// The nearest bf16 value, ties to even.
///
/// ```
/// use peft_limits::train::storage::round_bf16;
/// assert_eq!(round_bf16(1.0f32 + 1.0 / 256.0), 1.0);          // half an ulp: ties to even
/// assert_eq!(round_bf16(1.0f64 + 3.0 / 256.0), 1.0 + 1.0 / 64.0);
/// ```
pub fn round_bf16<T: Real>(x: T) -> T {
    T::of(half::bf16::from_f64(x.widen()).to_f64())
}

/// Rounds every dense weight and every trained tensor.
///
/// # Errors
/// As [`Model::for_each_trainable`].
pub fn round_model<T: Real>(model: &mut Model<T>) -> Result<()> {
    let round = |x: &mut T| *x = round_bf16(*x);
    model.embedding.mapv_inplace(round_bf16);
    model
        .positions
        .iter_mut()
        .chain(&mut model.lm_head)
        .for_each(|table| table.mapv_inplace(round_bf16));
    model.final_norm.numbers_mut().for_each(round);
    for layer in &mut model.layers {
        layer.norms.iter_mut().flatten().flat_map(|norm| norm.numbers_mut()).for_each(round);
        layer.sinks.iter_mut().flatten().for_each(round);
        for (_, projection) in layer.projections_mut() {
            if let Some(bias) = &mut projection.bias {
                bias.mapv_inplace(round_bf16);
            }
            if let BaseWeight::Dense(weight) = &mut projection.base {
                weight.mapv_inplace(round_bf16);
            }
        }
    }
    model.for_each_trainable(&mut |_, values| {
        values.mapv_inplace(round_bf16);
        Ok(())
    })
}

/// Rounds every gradient.
pub fn round_gradients<T: Real>(gradients: &mut Gradients<T>) {
    gradients.for_each_mut(|g| g.mapv_inplace(round_bf16));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::generator;
    use crate::train::method::{MethodName, MethodParams};
    use crate::train::preset::preset;

    #[test]
    fn rounding_is_idempotent_and_reaches_every_tensor() {
        let mut config = preset("nano").unwrap();
        config.num_hidden_layers = 1;
        let mut model: Model<f32> =
            Model::random(config, &mut generator(1, "init/model", 0)).unwrap();
        MethodParams { rank: 3, ..MethodParams::named(MethodName::Lora) }
            .apply(&mut model, None, 1)
            .unwrap();
        let before = model.embedding[[3, 4]];
        round_model(&mut model).unwrap();
        assert_ne!(before.to_bits(), model.embedding[[3, 4]].to_bits());
        let bf16 = |x: &f32| x.to_bits().trailing_zeros() >= 16;
        assert!(
            model.layers[0].projection(crate::model::Projection::Up).base.dense().iter().all(bf16)
        );
        assert!(model.trainable_values().iter().all(|(_, v)| v.iter().all(bf16)));
        let once = model.trainable_values();
        round_model(&mut model).unwrap();
        assert_eq!(once, model.trainable_values());
    }
}
