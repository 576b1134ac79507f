//! The whole decoder on a device: embedding, layers, last norm, loss; forward, partial backward, and back to the CPU.

use super::blocks::causal_attention::Padding;
use super::blocks::cross_entropy::{Targets, cross_entropy};
use super::blocks::embedding::{embedding_backward, embedding_forward};
use super::blocks::rms_norm::{rms_norm_backward, rms_norm_forward};
use super::blocks::rope::RotaryAngles;
use super::blocks::{Matrix, index_tensor};
use super::gradients::DeviceGradients;
use super::layer::{Context, DeviceLayer, DeviceTap, LayerSaved, layer_backward, layer_forward};
use super::projection::replace;
use crate::blocks::causal_attention::AttentionShape;
use crate::blocks::cross_entropy::prediction_targets;
use crate::error::{Error, Result};
use crate::gpu::{Engine, Opened};
use crate::linalg::Real;
use crate::model::{Batch, LayerNeeds, Model, ModelConfig, Place, Point, Projection, StepOptions, TrainableParts};
use crate::model::{divisor, rope_table};
use burn::tensor::{Int, Tensor};
use ndarray::{Array2, Axis};
use std::collections::BTreeMap;

/// A decoder with its adapters on a device, in f32.
#[derive(Debug, Clone)]
pub struct DeviceModel<B: Engine> {
    on: Opened<B>,
    config: ModelConfig,
    embedding: Matrix<B>,
    pub(super) layers: Vec<DeviceLayer<B>>,
    final_norm: Matrix<B>,
    lm_head: Option<Matrix<B>>,
    trainable: TrainableParts,
    /// Whether the last norm's input needs a gradient.
    trained_below: bool,
}

/// `(name, values)`: what becomes of a trained tensor.
pub(super) type Change<'a, B> = &'a mut dyn FnMut(&str, Matrix<B>) -> Result<Matrix<B>>;

/// A batch on a device.
struct DeviceBatch<B: Engine> {
    ids: Tensor<B, 1, Int>,
    shape: AttentionShape,
    padding: Option<Padding<B>>,
    angles: RotaryAngles<B>,
    targets: Targets<B>,
    divisor: f64,
}

/// What is kept of one layer between forward and backward.
enum Kept<B: Engine> {
    Nothing,
    /// Activation checkpointing: the layer's input, from which its forward runs again.
    Input(Matrix<B>),
    Saved(Box<LayerSaved<B>>),
}

/// A forward pass waiting for its backward.
pub struct DevicePass<B: Engine> {
    batch: DeviceBatch<B>,
    layers: Vec<Kept<B>>,
    /// Input of the last norm and 1 / rms of its rows.
    last: Option<(Matrix<B>, Matrix<B>)>,
    dnormed: Option<Matrix<B>>,
    losses: Matrix<B>,
}

impl<B: Engine> DevicePass<B> {
    /// Bytes of the batch: ids, padding, targets, losses.
    pub fn batch_bytes(&self) -> usize {
        let batch = &self.batch;
        let padding = batch.padding.as_ref().map_or(0, Padding::elements);
        let numbers = batch.ids.shape().num_elements() + padding + batch.targets.elements();
        (numbers + self.losses.shape().num_elements()) * size_of::<f32>()
    }

    /// (name, bytes) of every tensor kept for backward, named as [`crate::model::Pass::saved_bytes_by_name`] does.
    pub fn saved_bytes_by_name(&self) -> Vec<(String, usize)> {
        let elements = |x: &Matrix<B>| x.shape().num_elements();
        let mut all = vec![("rope".to_string(), self.batch.angles.elements())];
        for (l, kept) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            match kept {
                Kept::Nothing => {}
                Kept::Input(x) => all.push((format!("{prefix}.checkpoint"), elements(x))),
                Kept::Saved(saved) => {
                    all.extend(saved.elements_by_name().into_iter().map(|(name, n)| (format!("{prefix}.{name}"), n)));
                }
            }
        }
        if let Some((x, inverse_rms)) = &self.last {
            all.push(("model.norm.input".into(), elements(x)));
            all.push(("model.norm.inverse_rms".into(), elements(inverse_rms)));
        }
        all.extend(self.dnormed.as_ref().map(|d| ("loss.dhidden".to_string(), elements(d))));
        all.into_iter().map(|(name, n)| (name, n * size_of::<f32>())).collect()
    }
}

/// What a step gives, still on the device: reading it waits for the step.
#[derive(Debug, Clone)]
pub struct DeviceLoss<B: Engine> {
    /// Loss of every counted position in nats, `n x 1`.
    pub losses: Matrix<B>,
    /// What their sum is divided by.
    pub divisor: f64,
}

impl<B: Engine> DeviceLoss<B> {
    /// The loss in nats, summed in double precision.
    ///
    /// # Errors
    /// [`Error::NonFinite`] naming the position's number; [`Error::Device`].
    pub fn read(self, on: &Opened<B>) -> Result<f64> {
        let losses = on.download(self.losses)?;
        if let Some(row) = losses.iter().position(|x| !x.is_finite()) {
            let value = f64::from(losses[[row, 0]]);
            return Err(Error::NonFinite { op: "cross_entropy", tensor: "logits".into(), index: vec![row], value });
        }
        Ok(losses.iter().map(|&x| f64::from(x)).sum::<f64>() / self.divisor)
    }
}

impl<B: Engine> DeviceModel<B> {
    /// Copies a model with its adapters to a device.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for packed or merged projections; as [`Opened::upload`].
    pub fn upload<T: Real>(model: &Model<T>, on: &Opened<B>) -> Result<Self> {
        let layers = model.layers.iter().enumerate();
        let layers = layers.map(|(l, layer)| DeviceLayer::upload(layer, LayerNeeds::of(model, l), l, on));
        let head = model.lm_head.as_ref().map(|head| on.upload("lm_head.weight", head.view()));
        let gain = model.final_norm.view().insert_axis(Axis(0));
        Ok(Self {
            config: model.config.clone(),
            embedding: on.upload("model.embed_tokens.weight", model.embedding.view())?,
            layers: layers.collect::<Result<_>>()?,
            final_norm: on.upload("model.norm.weight", gain)?,
            lm_head: head.transpose()?,
            trainable: model.trainable,
            trained_below: model.trained_below(model.layers.len()),
            on: on.clone(),
        })
    }

    /// The device that holds it.
    pub fn on(&self) -> &Opened<B> {
        &self.on
    }

    /// Empty sinks.
    pub fn zero_gradients(&self) -> DeviceGradients<B> {
        DeviceGradients::empty(&self.layers)
    }

    pub(super) fn head(&self) -> &Matrix<B> {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    fn prepare(&self, batch: &Batch, options: &StepOptions) -> Result<DeviceBatch<B>> {
        let (rows, length) = batch.input_ids.dim();
        let config = &self.config;
        let shape = AttentionShape {
            batch: rows,
            length,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        // An id outside the table would read other memory.
        crate::blocks::embedding::check_ids(batch.input_ids.as_slice().unwrap_or(&[]), config.vocab_size)?;
        let widest = [config.intermediate_size, shape.heads * shape.head_dim, config.hidden_size].into_iter().max();
        self.on.check_buffer("the widest activation", rows * length * widest.unwrap_or(0))?;
        let targets = prediction_targets(batch.labels.view(), config.vocab_size)?;
        let device = &self.on.device;
        let table = rope_table::<f64>(config, batch)?;
        Ok(DeviceBatch {
            ids: index_tensor(batch.input_ids.iter().map(|&id| id as usize), device),
            padding: batch.attention_mask.as_ref().map(|mask| Padding::upload(mask.view(), &shape, device)),
            angles: RotaryAngles::upload(&table, device),
            divisor: divisor(options, targets.len())?,
            targets: Targets::upload(&targets, rows * length, config.vocab_size, device),
            shape,
        })
    }

    fn context<'a>(&self, batch: &'a DeviceBatch<B>, layer: usize, tap: Option<DeviceTap<'a, B>>) -> Context<'a, B> {
        Context {
            layer,
            attention: batch.shape,
            padding: batch.padding.as_ref(),
            angles: &batch.angles,
            eps: self.config.rms_norm_eps,
            norms: self.trainable.norms,
            tap,
        }
    }

    /// The forward half of a step. The loss and the gradient of its logits are formed together, chunk by chunk, so
    /// the output projection's sink is filled here.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an id or a label outside the vocabulary, or a batch in which no position counts.
    pub fn forward(
        &self,
        batch: &Batch,
        options: &StepOptions,
        gradients: &mut DeviceGradients<B>,
        tap: Option<DeviceTap<'_, B>>,
    ) -> Result<DevicePass<B>> {
        let batch = self.prepare(batch, options)?;
        let show = |point: Point, gradient: bool, x: Matrix<B>| match tap {
            Some(tap) => tap(Place { layer: None, point, gradient }, x),
            None => x,
        };
        let mut x = show(Point::Embedded, false, embedding_forward(&batch.ids, &self.embedding));
        let mut layers = Vec::with_capacity(self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            let context = self.context(&batch, l, tap);
            let again = options.checkpointing.then(|| x.clone());
            let (out, saved) = layer_forward(layer, x, &context, layer.needs.any && !options.checkpointing);
            x = out;
            layers.push(match (layer.needs.any, again, saved) {
                (true, Some(input), _) => Kept::Input(input),
                (true, None, Some(saved)) => Kept::Saved(Box::new(saved)),
                _ => Kept::Nothing,
            });
        }
        let (normed, inverse_rms) = rms_norm_forward(&x, &self.final_norm, self.config.rms_norm_eps);
        let normed = show(Point::FinalNorm, false, normed);
        let wanted = self.trained_below || self.trainable.norms;
        let sink = match &self.lm_head {
            Some(_) => self.trainable.lm_head.then_some(&mut gradients.lm_head),
            None => self.trainable.embedding.then_some(&mut gradients.embedding),
        };
        let (losses, dnormed) = cross_entropy(&normed, self.head(), &batch.targets, batch.divisor, sink, wanted);
        let dnormed = dnormed.map(|d| show(Point::FinalNorm, true, d));
        Ok(DevicePass { batch, layers, last: wanted.then_some((x, inverse_rms)), dnormed, losses })
    }

    /// The backward half: consumes the pass, releasing each saved tensor after its last use.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the forward did not save what a backward reads.
    pub fn backward(
        &self,
        pass: DevicePass<B>,
        gradients: &mut DeviceGradients<B>,
        tap: Option<DeviceTap<'_, B>>,
    ) -> Result<DeviceLoss<B>> {
        let DevicePass { batch, layers, last, dnormed, losses } = pass;
        let loss = DeviceLoss { losses, divisor: batch.divisor };
        let (Some((x, inverse_rms)), Some(dnormed)) = (last, dnormed) else { return Ok(loss) };
        let sink = self.trainable.norms.then_some(&mut gradients.final_norm);
        let mut upstream = rms_norm_backward(dnormed, x, inverse_rms, &self.final_norm, sink, self.trained_below);
        for (l, kept) in layers.into_iter().enumerate().rev() {
            let Some(dout) = upstream.take() else { break };
            let context = self.context(&batch, l, tap);
            let dout = context.tap_gradient(Point::Output, dout);
            let layer = &self.layers[l];
            let saved = match kept {
                Kept::Nothing => break,
                Kept::Saved(saved) => *saved,
                Kept::Input(input) => match layer_forward(layer, input, &context, true).1 {
                    Some(saved) => saved,
                    None => break,
                },
            };
            upstream = layer_backward(layer, saved, dout, &context, &mut gradients.layers[l])?;
        }
        if let (Some(dx), true) = (upstream, self.trainable.embedding) {
            let dx = match tap {
                Some(tap) => tap(Place { layer: None, point: Point::Embedded, gradient: true }, dx),
                None => dx,
            };
            embedding_backward(&batch.ids, dx, self.config.vocab_size, &mut gradients.embedding);
        }
        Ok(loss)
    }

    /// Forward and backward; gradients are added to the sinks.
    ///
    /// # Errors
    /// As [`DeviceModel::forward`] and [`DeviceModel::backward`].
    pub fn loss_and_gradients(
        &self,
        batch: &Batch,
        options: &StepOptions,
        gradients: &mut DeviceGradients<B>,
        tap: Option<DeviceTap<'_, B>>,
    ) -> Result<DeviceLoss<B>> {
        let pass = self.forward(batch, options, gradients, tap)?;
        self.backward(pass, gradients, tap)
    }

    /// Replaces every trained tensor by what `change` makes of it, in the order of [`Model::update`].
    ///
    /// # Errors
    /// What `change` returns.
    pub(super) fn update(&mut self, change: Change<'_, B>) -> Result<()> {
        let parts = self.trainable;
        let whole =
            |name: &str, tensor: &mut Matrix<B>, change: Change<'_, B>| replace(tensor, |values| change(name, values));
        if parts.embedding {
            whole("model.embed_tokens.weight", &mut self.embedding, change)?;
        }
        for (l, layer) in self.layers.iter_mut().enumerate() {
            let prefix = format!("model.layers.{l}");
            if parts.norms {
                whole(&format!("{prefix}.input_layernorm.weight"), &mut layer.input_norm, change)?;
            }
            for (p, projection) in Projection::ALL.into_iter().zip(&mut layer.projections) {
                projection.update(&mut |tensor, values| change(&format!("{prefix}.{}.{tensor}", p.path()), values))?;
            }
            if parts.norms {
                let name = format!("{prefix}.post_attention_layernorm.weight");
                whole(&name, &mut layer.post_attention_norm, change)?;
            }
        }
        if parts.norms {
            whole("model.norm.weight", &mut self.final_norm, change)?;
        }
        if let (Some(head), true) = (&mut self.lm_head, parts.lm_head) {
            whole("lm_head.weight", head, change)?;
        }
        Ok(())
    }

    /// The trained tensors as they act, by name, on the device.
    fn values(&self) -> BTreeMap<String, Matrix<B>> {
        let parts = self.trainable;
        let mut all = BTreeMap::new();
        if parts.embedding {
            all.insert("model.embed_tokens.weight".to_string(), self.embedding.clone());
        }
        for (l, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            for (p, projection) in Projection::ALL.into_iter().zip(&layer.projections) {
                for (name, values) in projection.names.iter().zip(projection.values()) {
                    all.insert(format!("{prefix}.{}.{name}", p.path()), values);
                }
            }
            if parts.norms {
                all.insert(format!("{prefix}.input_layernorm.weight"), layer.input_norm.clone());
                all.insert(format!("{prefix}.post_attention_layernorm.weight"), layer.post_attention_norm.clone());
            }
        }
        if parts.norms {
            all.insert("model.norm.weight".into(), self.final_norm.clone());
        }
        if let (Some(head), true) = (&self.lm_head, parts.lm_head) {
            all.insert("lm_head.weight".into(), head.clone());
        }
        all
    }

    /// Puts the trained values into the model that this one was made from.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if `model` trains a tensor that this one does not; [`Error::Device`].
    pub fn download<T: Real>(&self, model: &mut Model<T>) -> Result<()> {
        let mut values = self.values();
        model.put_acting_values(&mut |name, expected| {
            let unknown = || Error::invalid("model", name, "is not trained on the device");
            let found = self.on.download(values.remove(name).ok_or_else(unknown)?)?;
            if found.dim() != expected {
                return Err(Error::shape("DeviceModel::download", name, expected, found.dim()));
            }
            Ok(found.mapv(|x| T::of(f64::from(x))))
        })
    }

    /// Every weight of a layer's projection as it is on the device, for tests of what must not change.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn projection_weight(&self, layer: usize, p: Projection) -> Result<Array2<f32>> {
        self.on.download(self.layers[layer].projections[p as usize].weight.clone())
    }
}
