//! The whole decoder: embedding, layers, last norm, loss; forward and backward.

use super::batch::{Batch, StepOptions, StepOutput};
use super::config::ModelConfig;
use super::gradients::Gradients;
use super::instruments::{Instruments, Point};
use super::layer::{AddToOutput, Context, LayerCache, LayerNeeds, layer_backward, layer_forward};
use super::parameters::Model;
use crate::blocks::causal_attention::{AttentionShape, Visibility};
use crate::blocks::cross_entropy::{CrossEntropySinks, cross_entropy, cross_entropy_observed, prediction_targets};
use crate::blocks::embedding::{embedding_backward, embedding_forward};
use crate::blocks::linear::linear_forward;
use crate::blocks::rms_norm::{rms_norm_backward, rms_norm_forward};
use crate::blocks::rope::RopeTable;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::{Real, Scratch, on_workers};
use ndarray::{Array2, ArrayView2};

/// What is kept of one layer between forward and backward.
enum Kept<T> {
    Nothing,
    /// Activation checkpointing: the layer's input, from which its forward runs again.
    Input(Array2<T>),
    Cache(Box<LayerCache<T>>),
}

/// A forward pass waiting for its backward.
pub struct Pass<T> {
    /// Loss and number of counted positions.
    pub output: StepOutput,
    layers: Vec<Kept<T>>,
    rope: RopeTable<T>,
    /// Input of the last norm and 1 / rms of its rows.
    last: Option<(Array2<T>, Vec<T>)>,
    /// Gradient of the last norm's output, formed together with the loss.
    dnormed: Option<Array2<T>>,
}

impl<T: Real> Pass<T> {
    /// What layer `index` keeps, if anything (nothing under activation checkpointing).
    pub fn layer_cache(&self, index: usize) -> Option<&LayerCache<T>> {
        match self.layers.get(index) {
            Some(Kept::Cache(cache)) => Some(cache),
            _ => None,
        }
    }

    /// (name, bytes) of every tensor kept for backward, for a memory ledger.
    pub fn saved_bytes_by_name(&self) -> Vec<(String, usize)> {
        let single = size_of::<T>();
        let mut all = vec![("rope".to_string(), self.rope.bytes())];
        for (l, kept) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            match kept {
                Kept::Nothing => {}
                Kept::Input(x) => all.push((format!("{prefix}.checkpoint"), x.len() * single)),
                Kept::Cache(cache) => {
                    let named = cache.saved_bytes_by_name().into_iter();
                    all.extend(named.map(|(name, bytes)| (format!("{prefix}.{name}"), bytes)));
                }
            }
        }
        if let Some((x, inverse_rms)) = &self.last {
            all.push(("model.norm.input".into(), x.len() * single));
            all.push(("model.norm.inverse_rms".into(), inverse_rms.len() * single));
        }
        all.extend(self.dnormed.as_ref().map(|d| ("loss.dhidden".to_string(), d.len() * single)));
        all
    }
}

impl<T: Real> Model<T> {
    fn attention_shape(&self, (batch, length): (usize, usize)) -> AttentionShape {
        AttentionShape {
            batch,
            length,
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
        }
    }

    /// Embedding and layers without saving anything, then the last norm: `N x D`.
    /// `extra`, if any, is added to every projection's output.
    pub(super) fn hidden(
        &self,
        batch: &Batch,
        instruments: &Instruments<'_, T>,
        extra: Option<&AddToOutput<'_, T>>,
        cost: &mut Cost,
    ) -> Result<Array2<T>> {
        let rope = rope_table(&self.config, batch)?;
        let mut context = Context { extra, ..self.context(batch, &rope, instruments) };
        let mut x = embedding_forward(batch.input_ids.as_slice().unwrap_or(&[]), self.embedding.view())?;
        instruments.tap(None, Point::Embedded, false, &mut x);
        let scratch = &mut Scratch::default();
        for (l, layer) in self.layers.iter().enumerate() {
            context.layer = l;
            x = layer_forward(layer, x, &context, None, scratch, cost)?.0;
        }
        let gain = self.final_norm.to_vec();
        let mut normed = rms_norm_forward(x.view(), &gain, self.config.rms_norm_eps, scratch, cost)?.0;
        instruments.tap(None, Point::FinalNorm, false, &mut normed);
        Ok(normed)
    }

    fn context<'a>(
        &self,
        batch: &'a Batch,
        rope: &'a RopeTable<T>,
        instruments: &Instruments<'a, T>,
    ) -> Context<'a, T> {
        Context {
            layer: 0,
            attention: self.attention_shape(batch.input_ids.dim()),
            visible: Visibility {
                keys: batch.attention_mask.as_ref().map(|mask| mask.view()),
                ahead: instruments.ahead,
            },
            rope,
            eps: self.config.rms_norm_eps,
            instruments: *instruments,
            extra: None,
        }
    }

    /// Logits of every position of unpadded sequences, `(B T) x V`.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an id outside the vocabulary.
    pub fn logits(&self, ids: ArrayView2<u32>, cost: &mut Cost) -> Result<Array2<T>> {
        let batch = Batch::new(ids.to_owned(), Array2::zeros(ids.dim()))?;
        on_workers(|| self.batch_logits(&batch, &Instruments::default(), cost))
    }

    /// Logits of every position of a batch, `(B T) x V`; those of padding mean nothing.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an id outside the vocabulary.
    pub fn batch_logits(&self, batch: &Batch, instruments: &Instruments<'_, T>, cost: &mut Cost) -> Result<Array2<T>> {
        let mut logits = linear_forward(self.hidden(batch, instruments, None, cost)?.view(), self.head().view(), cost)?;
        instruments.tap(None, Point::Logits, false, &mut logits);
        Ok(logits)
    }

    /// Mean loss of a batch in nats, saving nothing.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn loss(&self, batch: &Batch, cost: &mut Cost) -> Result<f64> {
        let targets = prediction_targets(batch.labels.view(), self.config.vocab_size)?;
        let divisor = divisor(&StepOptions::default(), targets.len())?;
        on_workers(|| {
            let hidden = self.hidden(batch, &Instruments::default(), None, cost)?;
            cross_entropy(hidden.view(), self.head().view(), &targets, divisor, None, cost)
        })
    }

    /// The forward half of a step. The loss and the gradient of its logits are formed together, chunk by chunk,
    /// so the output projection's sink is filled here.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an id or a label outside the vocabulary, or a batch in which no position
    /// counts; [`Error::NonFinite`] if the loss is NaN or infinite.
    pub fn forward(
        &self,
        batch: &Batch,
        options: &StepOptions,
        gradients: &mut Gradients<T>,
        cost: &mut Cost,
    ) -> Result<Pass<T>> {
        on_workers(|| self.forward_with(batch, options, &Instruments::default(), gradients, cost))
    }

    /// As [`Model::forward`], with instruments.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn forward_with(
        &self,
        batch: &Batch,
        options: &StepOptions,
        instruments: &Instruments<'_, T>,
        gradients: &mut Gradients<T>,
        cost: &mut Cost,
    ) -> Result<Pass<T>> {
        let targets = match instruments.targets {
            Some(targets) => targets.to_vec(),
            None => prediction_targets(batch.labels.view(), self.config.vocab_size)?,
        };
        let divisor = divisor(options, targets.len())?;
        let rope = rope_table(&self.config, batch)?;
        let mut context = self.context(batch, &rope, instruments);
        let mut x = embedding_forward(batch.input_ids.as_slice().unwrap_or(&[]), self.embedding.view())?;
        instruments.tap(None, Point::Embedded, false, &mut x);
        let mut layers = Vec::with_capacity(self.layers.len());
        let scratch = &mut gradients.scratch;
        scratch.next_step();
        for (l, layer) in self.layers.iter().enumerate() {
            let needs = LayerNeeds::of(self, l);
            context.layer = l;
            let kept = if !needs.any {
                x = layer_forward(layer, x, &context, None, scratch, cost)?.0;
                Kept::Nothing
            } else if options.checkpointing {
                let input = scratch.copy(&x);
                x = layer_forward(layer, x, &context, None, scratch, cost)?.0;
                Kept::Input(input)
            } else {
                let (out, cache) = layer_forward(layer, x, &context, Some(needs), scratch, cost)?;
                x = out;
                cache.map_or(Kept::Nothing, |cache| Kept::Cache(Box::new(cache)))
            };
            layers.push(kept);
        }
        let gain = self.final_norm.to_vec();
        let (mut normed, inverse_rms) = rms_norm_forward(x.view(), &gain, self.config.rms_norm_eps, scratch, cost)?;
        instruments.tap(None, Point::FinalNorm, false, &mut normed);
        let wanted = self.trained_below(self.layers.len()) || self.trainable.norms;
        let mut dnormed = scratch.zeros(normed.dim());
        let dweight = match &self.lm_head {
            Some(_) => gradients.lm_head.as_mut(),
            None => gradients.embedding.as_mut(),
        };
        let mut view = dnormed.view_mut();
        let sinks = CrossEntropySinks { dhidden: &mut view, dweight: dweight.map(|d| d.view_mut()) };
        let observe = |gradient: bool, logits: &mut Array2<T>| instruments.tap(None, Point::Logits, gradient, logits);
        let head = self.head().view();
        let loss = cross_entropy_observed(normed.view(), head, &targets, divisor, Some(sinks), &observe, cost)?;
        instruments.tap(None, Point::FinalNorm, true, &mut dnormed);
        let output = StepOutput { loss, counted: targets.len() };
        gradients.scratch.keep(normed);
        let last = wanted.then_some((x, inverse_rms));
        Ok(Pass { output, layers, rope, last, dnormed: wanted.then_some(dnormed) })
    }

    /// The backward half: consumes the pass, releasing each saved tensor after its last use.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the gradients were made for other trainable tensors than the pass.
    pub fn backward(
        &self,
        batch: &Batch,
        pass: Pass<T>,
        gradients: &mut Gradients<T>,
        cost: &mut Cost,
    ) -> Result<StepOutput> {
        on_workers(|| self.backward_with(batch, pass, &Instruments::default(), gradients, cost))
    }

    /// As [`Model::backward`], with the instruments of the forward.
    ///
    /// # Errors
    /// As [`Model::backward`].
    pub fn backward_with(
        &self,
        batch: &Batch,
        pass: Pass<T>,
        instruments: &Instruments<'_, T>,
        gradients: &mut Gradients<T>,
        cost: &mut Cost,
    ) -> Result<StepOutput> {
        let Pass { output, layers, rope, last, dnormed } = pass;
        let (Some((x, inverse_rms)), Some(dnormed)) = (last, dnormed) else { return Ok(output) };
        if gradients.layers.len() != self.layers.len() {
            return Err(Error::invalid("gradients", gradients.layers.len(), "made for another number of layers"));
        }
        let mut context = self.context(batch, &rope, instruments);
        let scratch = &mut gradients.scratch;
        let mut dx = scratch.zeros(x.dim());
        let gain = self.final_norm.to_vec();
        let sink = gradients.final_norm.as_mut().and_then(Array2::as_slice_mut);
        rms_norm_backward(dnormed.view(), x.view(), &inverse_rms, &gain, sink, Some(&mut dx.view_mut()), cost)?;
        scratch.keep(x);
        scratch.keep(dnormed);
        let mut upstream = Some(dx);
        for (l, kept) in layers.into_iter().enumerate().rev() {
            let Some(mut dout) = upstream.take() else { break };
            context.layer = l;
            instruments.tap(Some(l), Point::Output, true, &mut dout);
            let (layer, needs) = (&self.layers[l], LayerNeeds::of(self, l));
            let cache = match kept {
                Kept::Nothing => break,
                Kept::Cache(cache) => *cache,
                Kept::Input(input) => {
                    let (out, cache) = layer_forward(layer, input, &context, Some(needs), scratch, cost)?;
                    scratch.keep(out);
                    match cache {
                        Some(cache) => cache,
                        None => break,
                    }
                }
            };
            let sinks = &mut gradients.layers[l];
            upstream = layer_backward(layer, cache, dout, &context, needs, sinks, scratch, cost)?;
        }
        if let (Some(mut dx), Some(sink)) = (upstream, &mut gradients.embedding) {
            instruments.tap(None, Point::Embedded, true, &mut dx);
            embedding_backward(batch.input_ids.as_slice().unwrap_or(&[]), dx.view(), &mut sink.view_mut())?;
        }
        Ok(output)
    }

    /// Loss of a batch, its gradients added to the sinks.
    ///
    /// # Errors
    /// As [`Model::forward`] and [`Model::backward`].
    pub fn loss_and_gradients(
        &self,
        batch: &Batch,
        options: &StepOptions,
        gradients: &mut Gradients<T>,
        cost: &mut Cost,
    ) -> Result<StepOutput> {
        let pass = self.forward(batch, options, gradients, cost)?;
        self.backward(batch, pass, gradients, cost)
    }
}

/// Angles of a batch's positions.
pub(crate) fn rope_table<T: Real>(config: &ModelConfig, batch: &Batch) -> Result<RopeTable<T>> {
    match batch.position_ids.as_ref().and_then(|p| p.as_slice()) {
        Some(positions) => RopeTable::at(positions, config.head_dim, config.rope_theta),
        None => RopeTable::new(batch.input_ids.ncols(), config.head_dim, config.rope_theta),
    }
}

/// What the sum of losses is divided by.
pub(crate) fn divisor(options: &StepOptions, counted: usize) -> Result<f64> {
    let divisor = options.divisor.unwrap_or(counted as f64);
    if counted == 0 && options.divisor.is_none() {
        return Err(Error::invalid("labels", "all ignored", "at least one position must count"));
    }
    if !(divisor > 0.0) || !divisor.is_finite() {
        return Err(Error::invalid("divisor", divisor, "must be positive and finite"));
    }
    Ok(divisor)
}
