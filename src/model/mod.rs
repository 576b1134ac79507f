//! Decoders with hand-written backward, built from [`crate::blocks`] and [`crate::adapters`]. What
//! a family computes is a row of [`options`]; the step is one.
//!
//! # One training step
//!
//! ```
//! use ndarray::array;
//! use peft_limits::cost::Cost;
//! use peft_limits::model::{Batch, Model, ModelConfig, StepOptions, TrainableParts};
//! use rand::SeedableRng;
//!
//! let config = ModelConfig {
//!     vocab_size: 13, hidden_size: 8, intermediate_size: 12, num_hidden_layers: 2, num_attention_heads: 2,
//!     num_key_value_heads: 1, head_dim: 4, max_position_embeddings: 32, rms_norm_eps: 1e-5,
//!     rope_theta: 1e4, tie_word_embeddings: false, options: Default::default(),
//! };
//! let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
//! let mut model: Model<f32> = Model::random(config, &mut rng)?;
//! model.train_fully();                                   // or attach adapters with `model.attach`
//! let batch = Batch::new(array![[1, 2, 3, 4], [5, 6, 7, 8]], array![[-100, 2, 3, 4], [5, 6, 7, -100]])?;
//! let mut gradients = model.zero_gradients();            // sinks exist for trainable tensors only
//! let mut cost = Cost::default();
//! let first = model.loss_and_gradients(&batch, &StepOptions::default(), &mut gradients, &mut cost)?;
//! model.update(&gradients, &mut |tensor| {               // any optimizer; here one step of descent
//!     tensor.values.scaled_add(-0.1, tensor.gradient);
//!     Ok(())
//! })?;
//! gradients.fill_zero();
//! assert!(model.loss(&batch, &mut cost)? < first.loss);
//! # Ok::<(), peft_limits::Error>(())
//! ```
//!
//! Gradients accumulate until [`Gradients::fill_zero`]. For gradient accumulation over
//! micro-batches set [`StepOptions::divisor`] to the number of counted positions of the whole batch
//! (each micro-batch's own is [`Batch::counted`]): the sums then equal those of one large batch.
//! [`Model::forward`] and [`Model::backward`] are the two halves, for a caller that wants to look
//! at [`Pass::saved_bytes_by_name`].
//!
//! Nothing is saved and no backward runs below the first trainable tensor; inside a layer each
//! tensor is kept only if some trainable tensor's gradient needs it.

mod adapter_config;
mod adapter_experts;
pub mod adapter_folder;
mod adapter_outside;
mod adapter_saved;
mod adapter_targets;
mod attach;
mod batch;
mod calibration;
pub mod checkpoint;
mod config;
mod experts;
mod families;
mod gradients;
mod instruments;
mod layer;
mod layout;
mod mlp;
mod names;
mod norm;
pub mod options;
mod outside_adapters;
mod parameters;
mod peft_settings;
mod projecting;
mod projection;
mod quantized;
pub mod s2ft;
mod step;
mod tables;
pub mod update;

pub use attach::{AdapterPlan, MethodSpec};
pub use batch::{Batch, StepOptions, StepOutput};
pub use calibration::{Calibration, ProjectionStatistics};
pub use config::ModelConfig;
pub use experts::ExpertsCacheOn;
pub use gradients::{Gradients, GradientsOn, LayerGradients, LayerGradientsOn};
pub use instruments::{
    AddToOutput, Instruments, InstrumentsOn, MaskOn, Masked, Place, Point, Tap, TapOn,
};
pub use layer::{Layer, LayerCache, LayerCacheOn, LayerOn};
pub use mlp::MlpCacheOn;
pub use names::Outside;
pub use norm::{NormOn, NormSinks};
pub use outside_adapters::{OutsideAdapter, OutsideAdapters, OutsideSinks};
pub use parameters::{Model, ModelOn, ReadValues, Trainable, TrainableParts};
pub use peft_settings::PeftSettings;
pub use projection::{Input, Projection};
pub use quantized::Quantization;
pub(crate) use step::attention_shape;
pub use step::{Pass, PassOn};
#[cfg(feature = "gpu")]
pub(crate) use step::{divisor, rope_tables};
pub use tables::Tables;
