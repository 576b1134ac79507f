//! The whole decoder on a device: uploaded from the CPU, trained, and brought back.

use super::blocks::causal_attention::Padding;
use super::blocks::cross_entropy::Targets;
use super::blocks::rope::RotaryAngles;
use super::blocks::{Matrix, index_tensor};
use super::gradients::DeviceGradients;
use super::ops::{DeviceInputs, Gpu};
use crate::adapters::dora::DoraOn;
use crate::adapters::lora::LoraOn;
use crate::adapters::moslora::MosloraOn;
use crate::adapters::paca::PacaOn;
use crate::adapters::s2ft::S2ftSliceOn;
use crate::adapters::{AdaptedLinear, BaseWeight, LinearOn, Method, MethodOn};
use crate::blocks::cross_entropy::prediction_targets;
use crate::error::{Error, Result};
use crate::gpu::{Engine, Opened, Precision};
use crate::linalg::Real;
use crate::model::options::{MlpKind, QkvStorage};
use crate::model::{
    Batch, InstrumentsOn, LayerOn, Model, ModelOn, NormOn, PassOn, Place, Projection, StepOptions,
};
use crate::model::{attention_shape, divisor, rope_tables};
use crate::ops::Cpu;
use ndarray::{Array2, Axis};
use std::collections::BTreeMap;

/// A function that sees each tensor of a step when it has just been computed, and gives what the
/// step goes on with.
///
/// Tests plant faults by it, and validation records hidden states.
pub type DeviceTap<'a, B> = &'a dyn Fn(Place, Matrix<B>) -> Matrix<B>;

/// A forward pass on a device, waiting for its backward.
pub type DevicePass<B> = PassOn<Gpu<B>>;

/// A decoder with its adapters on a device, in f32.
#[derive(Debug, Clone)]
pub struct DeviceModel<B: Engine> {
    on: Opened<B>,
    products: Precision,
    pub(super) model: ModelOn<Gpu<B>>,
}

impl<B: Engine> DevicePass<B> {
    /// Bytes of the batch: ids, padding, targets, losses.
    pub fn batch_bytes(&self) -> usize {
        let inputs = &self.inputs;
        let padding = inputs.padding.as_ref().map_or(0, Padding::elements);
        let numbers = inputs.ids.shape().num_elements() + padding + inputs.targets.elements();
        (numbers + self.loss.losses.shape().num_elements()) * size_of::<f32>()
    }

    /// (name, bytes) of every tensor kept for backward.
    pub fn saved_bytes_by_name(&self) -> Vec<(String, usize)> {
        self.saved_by_name().into_iter().map(|(name, n)| (name, n * size_of::<f32>())).collect()
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
            return Err(Error::NonFinite {
                op: "cross_entropy",
                tensor: "logits".into(),
                index: vec![row],
                value,
            });
        }
        Ok(losses.iter().map(|&x| f64::from(x)).sum::<f64>() / self.divisor)
    }
}

/// Copies a projection to a device.
fn upload_projection<T: Real, B: Engine>(
    projection: &AdaptedLinear<T>,
    name: &str,
    on: &Opened<B>,
) -> Result<LinearOn<Gpu<B>>> {
    let refuse = |requirement: &str| Error::invalid(name, projection.method.name(), requirement);
    let BaseWeight::Dense(weight) = &projection.base else {
        return Err(refuse("is packed (quantized): training on a device holds dense weights only"));
    };
    if projection.is_merged() {
        return Err(refuse("is merged into the base weight; unmerge to train"));
    }
    let put =
        |tensor: &str, values: &Array2<T>| on.upload(&format!("{name}.{tensor}"), values.view());
    let method = match &projection.method {
        Method::Frozen => MethodOn::Frozen,
        Method::Full => MethodOn::Full,
        Method::Lora(m) => {
            let (a, b) = (put("lora_A", &m.a)?, put("lora_B", &m.b)?);
            MethodOn::Lora(LoraOn { a, b, bias: None, spec: m.spec, scaling: m.scaling })
        }
        Method::Dora(m) => {
            let (a, b) = (put("lora_A", &m.a)?, put("lora_B", &m.b)?);
            let magnitude = put("lora_magnitude_vector", &m.magnitude)?;
            let (spec, scaling, true_derivative) = (m.spec, m.scaling, m.true_derivative);
            MethodOn::Dora(DoraOn { a, b, magnitude, spec, scaling, true_derivative })
        }
        Method::Moslora(m) => {
            let (a, b, mixer) =
                (put("lora_A", &m.a)?, put("lora_B", &m.b)?, put("lora_mixer", &m.mixer)?);
            MethodOn::Moslora(MosloraOn { a, b, mixer, spec: m.spec, scaling: m.scaling })
        }
        // The original values of what is trained in place stay with the CPU's model.
        Method::Paca(m) => {
            let index = index_tensor(m.index.iter().copied(), &on.device);
            MethodOn::Paca(PacaOn { index, scaling: m.scaling, inactive: None, active: true })
        }
        Method::Spft(_) => {
            return Err(refuse("writes single entries, which a device does not; use --device cpu"));
        }
        Method::S2ft(m) => MethodOn::S2ft(S2ftSliceOn {
            side: m.side,
            range: m.range.clone(),
            original: None,
            active: true,
        }),
    };
    let mut there = LinearOn::new(on.upload(&format!("{name}.weight"), weight.view())?, method);
    let bias = projection.bias.as_ref().map(|bias| bias.view().insert_axis(Axis(0)));
    there.whole = projection.whole;
    there.bias = bias.map(|bias| on.upload(&format!("{name}.bias"), bias)).transpose()?;
    Ok(there)
}

impl<B: Engine> DeviceModel<B> {
    /// Copies a model with its adapters to a device.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for packed or merged projections; as [`Opened::upload`].
    pub fn upload<T: Real>(model: &Model<T>, on: &Opened<B>) -> Result<Self> {
        let options = &model.config.options;
        let llama = [
            options.layer_norm,
            options.parallel,
            options.sinks,
            options.experts.is_some(),
            options.positions.is_some(),
        ];
        let llama = llama.iter().all(|other| !other)
            && options.query_key_value == QkvStorage::Separate
            && options.mlp == MlpKind::Gated
            && options.rotaries.iter().all(|rotary| rotary.share.is_none());
        let biased = |projection: &AdaptedLinear<T>| matches!(&projection.method, Method::Lora(m) if m.bias.is_some());
        let outside = model.adapters.head.is_some() || model.adapters.embedding.is_some();
        if outside || model.layers.iter().flat_map(|l| l.projections()).any(|(_, p)| biased(p)) {
            let requirement = "adapts the head or the embedding, or has lora_bias, which a device \
                               does not train yet; use --device cpu";
            return Err(Error::invalid("adapter", "lora", requirement));
        }
        if !llama {
            let requirement =
                "is not built of LLaMA's blocks, which are what a device has; use --device cpu";
            return Err(Error::invalid("model", options.family.model_type(), requirement));
        }
        if options.attention_cap.is_some()
            || options.logit_cap.is_some()
            || !options.windows.is_empty()
        {
            let requirement =
                "has windows or caps, which a device does not compute yet; use --device cpu";
            return Err(Error::invalid("model", options.family.model_type(), requirement));
        }
        let gain = |name: &str, norm: &NormOn<Cpu<T>>| {
            let gain = on.upload(name, norm.gain.view().insert_axis(Axis(0)))?;
            Ok(NormOn { gain, bias: None, whole: norm.whole })
        };
        let mut layers = Vec::with_capacity(model.layers.len());
        for (l, layer) in model.layers.iter().enumerate() {
            let upload = |(p, projection)| {
                Ok((p, upload_projection(projection, &options.module(l, p), on)?))
            };
            let projections = layer.projections().map(upload).collect::<Result<Vec<_>>>()?;
            let mut norms = [const { None }; 6];
            for (there, here) in norms.iter_mut().zip(&layer.norms) {
                *there = here
                    .as_ref()
                    .map(|here| gain(&format!("{}.norm", options.layer(l)), here))
                    .transpose()?;
            }
            layers.push(LayerOn::new(projections, norms, None));
        }
        let head = model.lm_head.as_ref().map(|head| on.upload("lm_head.weight", head.view()));
        let there = ModelOn {
            config: model.config.clone(),
            embedding: on.upload("model.embed_tokens.weight", model.embedding.view())?,
            positions: None,
            layers,
            final_norm: gain("model.norm.weight", &model.final_norm)?,
            lm_head: head.transpose()?,
            trainable: model.trainable,
            adapters: Default::default(),
            tables: Default::default(),
        };
        Ok(Self { on: on.clone(), products: Precision::F32, model: there })
    }

    /// The same model, its products' operands rounded to `products`. Weights, activations, sums and
    /// updates stay f32.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a precision that the device has no products of.
    pub fn with_products(self, products: Precision) -> Result<Self> {
        self.on.require(products)?;
        Ok(Self { products, ..self })
    }

    /// The device that holds it.
    pub fn on(&self) -> &Opened<B> {
        &self.on
    }

    /// Its operations.
    pub(super) fn engine(&self) -> Gpu<B> {
        Gpu { device: self.on.device.clone(), products: self.products }
    }

    /// Empty sinks.
    pub fn zero_gradients(&self) -> DeviceGradients<B> {
        DeviceGradients::zeros(&self.model, self.engine())
    }

    pub(super) fn head(&self) -> &Matrix<B> {
        self.model.head()
    }

    fn prepare(&self, batch: &Batch, options: &StepOptions) -> Result<DeviceInputs<B>> {
        let (rows, length) = batch.input_ids.dim();
        let config = &self.model.config;
        let shape = attention_shape(config, (rows, length));
        let ids: Vec<u32> = batch.input_ids.iter().copied().collect();
        // An id outside the table would read other memory.
        crate::blocks::embedding::check_ids(&ids, config.vocab_size)?;
        let widest = [config.intermediate_size, shape.heads * shape.head_dim, config.hidden_size]
            .into_iter()
            .max();
        self.on.check_buffer("the widest activation", rows * length * widest.unwrap_or(0))?;
        let targets = prediction_targets(batch.labels.view(), config.vocab_size)?;
        let device = &self.on.device;
        if batch.documents.is_some() {
            return Err(Error::invalid(
                "documents",
                "packed",
                "a device does not keep documents apart yet",
            ));
        }
        let tables = rope_tables::<f64>(config, batch)?;
        Ok(DeviceInputs {
            ids: index_tensor(ids.into_iter().map(|id| id as usize), device),
            padding: batch
                .attention_mask
                .as_ref()
                .map(|mask| Padding::upload(mask.view(), &shape, device)),
            angles: tables.iter().map(|table| RotaryAngles::upload(table, device)).collect(),
            divisor: divisor(options, targets.len())?,
            targets: Targets::upload(&targets, rows * length, config.vocab_size, device),
            shape,
        })
    }

    /// The forward half of a step.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an id or a label outside the vocabulary, or a batch in which no
    /// position counts.
    pub fn forward(
        &self,
        batch: &Batch,
        options: &StepOptions,
        gradients: &mut DeviceGradients<B>,
        tap: Option<DeviceTap<'_, B>>,
    ) -> Result<DevicePass<B>> {
        let inputs = self.prepare(batch, options)?;
        with_tap(tap, |instruments| {
            self.model.forward_on(inputs, options.checkpointing, instruments, gradients)
        })
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
        with_tap(tap, |instruments| {
            self.model.backward_on(&self.model, pass, instruments, gradients)
        })
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

    /// Puts the trained values into the model that this one was made from.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if `model` trains a tensor that this one does not;
    /// [`Error::Device`].
    pub fn download<T: Real>(&self, model: &mut Model<T>) -> Result<()> {
        let mut values: BTreeMap<_, _> =
            self.model.acting_values_on(&mut self.engine()).into_iter().collect();
        model.put_acting_values(&mut |name, expected| {
            let unknown = || Error::invalid("model", name, "is not trained on the device");
            let found = self.on.download(values.remove(name).ok_or_else(unknown)?)?;
            if found.dim() != expected {
                return Err(Error::shape("DeviceModel::download", name, expected, found.dim()));
            }
            Ok(found.mapv(|x| T::of(f64::from(x))))
        })
    }

    /// Every weight of a layer's projection as it is on the device, for tests of what must not
    /// change.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn projection_weight(&self, layer: usize, p: Projection) -> Result<Array2<f32>> {
        self.on.download(self.model.layers[layer].projection(p).base.clone())
    }
}

/// Runs `act` with instruments that show each tensor to a tap.
fn with_tap<B: Engine, R>(
    tap: Option<DeviceTap<'_, B>>,
    act: impl FnOnce(&InstrumentsOn<'_, Gpu<B>>) -> R,
) -> R {
    let Some(tap) = tap else { return act(&InstrumentsOn::default()) };
    let see = |place: Place, x: &mut Matrix<B>| x.inplace(|x| tap(place, x));
    act(&InstrumentsOn { tap: Some(&see), ..InstrumentsOn::default() })
}
