//! The whole decoder: embedding, layers, last norm, loss; forward and backward.

use super::batch::{Batch, StepOptions, StepOutput};
use super::config::ModelConfig;
use super::gradients::{Gradients, GradientsOn};
use super::instruments::{Instruments, InstrumentsOn, Point};
use super::layer::{Context, LayerCacheOn, LayerNeeds, layer_backward, layer_forward};
use super::norm::{NormInput, keep, norm_backward, norm_forward};
use super::options::Family;
use super::parameters::{Model, ModelOn};
use crate::blocks::causal_attention::AttentionShape;
use crate::blocks::cross_entropy::{Head, cross_entropy_through, prediction_targets};
use crate::blocks::rope::RopeTable;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::{Real, on_workers};
use crate::ops::{Cpu, CpuInputs, Ops};
use ndarray::{Array2, ArrayView2};

/// What is kept of one layer between forward and backward.
#[derive(Debug)]
enum Kept<E: Ops> {
    Nothing,
    /// Activation checkpointing: the layer's input, from which its forward runs again.
    Input(E::Matrix),
    Cache(Box<LayerCacheOn<E>>),
}

/// A forward pass waiting for its backward, on some engine.
#[derive(Debug)]
pub struct PassOn<E: Ops> {
    /// Loss of the batch.
    pub(crate) loss: E::Loss,
    /// The batch.
    pub(crate) inputs: E::Inputs,
    layers: Vec<Kept<E>>,
    /// Input of the last norm.
    last: Option<NormInput<E>>,
    /// Gradient of the last norm's output, formed together with the loss.
    dnormed: Option<E::Matrix>,
}

/// A forward pass on the processor.
pub type Pass<T> = PassOn<Cpu<T>>;

impl<E: Ops> PassOn<E> {
    /// What layer `index` keeps, if anything (nothing under activation checkpointing).
    pub fn layer_cache(&self, index: usize) -> Option<&LayerCacheOn<E>> {
        match self.layers.get(index) {
            Some(Kept::Cache(cache)) => Some(cache),
            _ => None,
        }
    }

    /// (name, numbers) of every tensor kept for backward, for a memory ledger.
    pub fn saved_by_name(&self) -> Vec<(String, usize)> {
        let size = |x: &E::Matrix| {
            let (rows, columns) = E::shape(x);
            rows * columns
        };
        let mut all = vec![("rope".to_string(), E::angle_elements(&self.inputs))];
        for (l, kept) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{l}");
            match kept {
                Kept::Nothing => {}
                Kept::Input(x) => all.push((format!("{prefix}.checkpoint"), size(x))),
                Kept::Cache(cache) => {
                    all.extend(
                        cache
                            .saved_by_name()
                            .into_iter()
                            .map(|(name, n)| (format!("{prefix}.{name}"), n)),
                    );
                }
            }
        }
        if let Some((x, stats)) = &self.last {
            all.push(("model.norm.input".into(), size(x)));
            all.push(("model.norm.inverse_rms".into(), E::stats_length(stats)));
        }
        all.extend(self.dnormed.as_ref().map(|d| ("loss.dhidden".to_string(), size(d))));
        all
    }
}

impl<E: Ops> ModelOn<E> {
    fn context<'a>(
        &'a self,
        inputs: &'a E::Inputs,
        instruments: &InstrumentsOn<'a, E>,
    ) -> Context<'a, E> {
        Context { layer: 0, config: &self.config, inputs, instruments: *instruments }
    }

    /// The input of the first layer that runs.
    fn start(
        &self,
        e: &mut E,
        inputs: &E::Inputs,
        instruments: &InstrumentsOn<'_, E>,
    ) -> Result<E::Matrix> {
        if let Some((layer, x)) = instruments.from {
            if layer > self.layers.len() {
                let requirement = format!("the model has {} layers", self.layers.len());
                return Err(Error::invalid("first layer", layer, requirement));
            }
            return Ok(e.copy(x));
        }
        let mut x = self.embedded(e, inputs)?;
        instruments.tap(None, Point::Embedded, false, &mut x);
        Ok(x)
    }

    /// The embedded tokens, with positions where they are learned.
    fn embedded(&self, e: &mut E, inputs: &E::Inputs) -> Result<E::Matrix> {
        let x = match &self.tables.embedding {
            Some(table) => e.embed_from(inputs, table)?,
            None => e.embed(inputs, &self.embedding)?,
        };
        let x = self.embedding_update(x, inputs, e)?;
        let x = self.multiplied(x, self.config.options.embedding_multiplier, e);
        let (Some(table), Some(offset)) = (&self.positions, self.config.options.positions) else {
            return Ok(x);
        };
        let positions = e.embed_positions(inputs, table, offset)?;
        Ok(e.add(x, positions, 1.0))
    }

    /// x times a factor that most families do not have.
    fn multiplied(&self, x: E::Matrix, factor: f64, e: &mut E) -> E::Matrix {
        if factor.to_bits() == 1f64.to_bits() { x } else { e.scale(x, factor) }
    }

    /// Embedding and layers without saving anything, then the last norm: `N x D`. The output of the
    /// layer after which the forward ends, if there is one.
    pub(crate) fn hidden_on(
        &self,
        e: &mut E,
        inputs: &E::Inputs,
        instruments: &InstrumentsOn<'_, E>,
    ) -> Result<E::Matrix> {
        let mut context = self.context(inputs, instruments);
        let mut x = self.start(e, inputs, instruments)?;
        for (l, layer) in self.layers.iter().enumerate().skip(instruments.first()) {
            context.layer = l;
            x = layer_forward(layer, x, &context, None, e)?.0;
            if instruments.until == Some(l) {
                return Ok(x);
            }
        }
        let normed = norm_forward(&x, &self.final_norm, &self.config, e)?.0;
        let mut normed = self.multiplied(normed, self.config.options.logit_multiplier, e);
        instruments.tap(None, Point::FinalNorm, false, &mut normed);
        Ok(normed)
    }

    /// The forward half of a step. The loss and the gradient of its logits are formed together,
    /// chunk by chunk, so the output projection's sink is filled here.
    ///
    /// # Errors
    /// The engine's; [`Error::InvalidParam`] for an id outside the vocabulary.
    pub(crate) fn forward_on(
        &self,
        inputs: E::Inputs,
        checkpointing: bool,
        instruments: &InstrumentsOn<'_, E>,
        gradients: &mut GradientsOn<E>,
    ) -> Result<PassOn<E>> {
        let GradientsOn { embedding, lm_head, engine: e, .. } = gradients;
        let mut context = self.context(&inputs, instruments);
        let options = &self.config.options;
        let mut x = self.start(e, &inputs, instruments)?;
        e.next_step();
        let (first, lowest) = (instruments.first(), instruments.lowest().min(self.layers.len()));
        let mut layers = Vec::with_capacity(self.layers.len());
        layers.extend((0..first).map(|_| Kept::Nothing));
        for (l, layer) in self.layers.iter().enumerate().skip(first) {
            context.layer = l;
            if l < lowest {
                x = layer_forward(layer, x, &context, None, e)?.0;
                layers.push(Kept::Nothing);
                continue;
            }
            let needs = LayerNeeds::of(self, l, lowest);
            let kept = if !needs.any {
                x = layer_forward(layer, x, &context, None, e)?.0;
                Kept::Nothing
            } else if checkpointing {
                let input = e.copy(&x);
                x = layer_forward(layer, x, &context, None, e)?.0;
                Kept::Input(input)
            } else {
                let (out, cache) = layer_forward(layer, x, &context, Some(needs), e)?;
                x = out;
                cache.map_or(Kept::Nothing, |cache| Kept::Cache(Box::new(cache)))
            };
            layers.push(kept);
        }
        let (normed, rest) = norm_forward(&x, &self.final_norm, &self.config, e)?;
        // A factor of the logits is one of the hidden rows.
        let mut normed = self.multiplied(normed, options.logit_multiplier, e);
        instruments.tap(None, Point::FinalNorm, false, &mut normed);
        let norm = self.trainable.of_norm(&self.final_norm).contains(&true);
        let wanted = self.trained_below(self.layers.len(), lowest) || norm;
        let cap = options.logit_cap;
        let head = self.head_with_update(e)?;
        let mut whole = head.as_ref().map(|head| e.sink(E::shape(head)));
        let own = if self.lm_head.is_some() { lm_head } else { embedding };
        let sink = whole.as_mut().or(own.as_mut());
        let observe = |gradient: bool, logits: &mut E::Matrix| {
            instruments.tap(None, Point::Logits, gradient, logits)
        };
        let (loss, mut dnormed) = match self.stored_head() {
            Some(head) => e.loss_through(&normed, head, &inputs, cap, wanted, &observe)?,
            None => e.loss(
                &normed,
                head.as_ref().unwrap_or(self.head()),
                &inputs,
                sink,
                cap,
                wanted,
                &observe,
            )?,
        };
        if let Some(dnormed) = &mut dnormed {
            instruments.tap(None, Point::FinalNorm, true, dnormed);
        }
        e.release(normed);
        let last = if wanted { keep(true, x, rest, e) } else { None };
        if let Some(whole) = whole {
            let whole = e.sunk(whole)?;
            if let Some(own) = own {
                e.accumulate(own, 1.0, &whole);
            }
            self.head_factors_backward(whole, gradients)?;
        }
        Ok(PassOn { loss, inputs, layers, last, dnormed })
    }

    /// The backward half: consumes the pass, releasing each saved tensor after its last use. Layers
    /// whose input alone was kept run again as in `forward`, the model of the pass.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the gradients were made for other trainable tensors than the
    /// pass.
    pub(crate) fn backward_on(
        &self,
        forward: &Self,
        pass: PassOn<E>,
        instruments: &InstrumentsOn<'_, E>,
        gradients: &mut GradientsOn<E>,
    ) -> Result<E::Loss> {
        let PassOn { loss, inputs, layers, last, dnormed } = pass;
        let (Some((x, stats)), Some(dnormed)) = (last, dnormed) else { return Ok(loss) };
        let GradientsOn {
            embedding,
            positions,
            layers: layer_sinks,
            final_norm,
            outside,
            engine: e,
            ..
        } = gradients;
        if layer_sinks.len() != self.layers.len() {
            return Err(Error::invalid(
                "gradients",
                layer_sinks.len(),
                "made for another number of layers",
            ));
        }
        let mut context = self.context(&inputs, instruments);
        let dnormed = self.multiplied(dnormed, self.config.options.logit_multiplier, e);
        let dx = e.zeros(E::shape(&x));
        let mut upstream = norm_backward(
            dnormed,
            (x, stats),
            &self.final_norm,
            &self.config,
            final_norm,
            Some(dx),
            e,
        )?;
        for (l, kept) in layers.into_iter().enumerate().rev() {
            let Some(mut dout) = upstream.take() else { break };
            context.layer = l;
            context.tap_gradient(Point::Output, &mut dout);
            let (layer, needs) = (&self.layers[l], LayerNeeds::of(self, l, instruments.lowest()));
            let cache = match kept {
                Kept::Nothing => break,
                Kept::Cache(cache) => *cache,
                Kept::Input(input) => {
                    let context = Context { config: &forward.config, ..context };
                    let (out, cache) =
                        layer_forward(&forward.layers[l], input, &context, Some(needs), e)?;
                    e.release(out);
                    match cache {
                        Some(cache) => cache,
                        None => break,
                    }
                }
            };
            upstream = layer_backward(layer, cache, dout, &context, needs, &mut layer_sinks[l], e)?;
        }
        let Some(mut dx) = upstream else { return Ok(loss) };
        instruments.tap(None, Point::Embedded, true, &mut dx);
        if let (Some(sink), Some(offset)) = (positions, self.config.options.positions) {
            e.embed_positions_backward(&inputs, &dx, offset, sink)?;
        }
        let dx = self.multiplied(dx, self.config.options.embedding_multiplier, e);
        self.embedding_factors_backward(&dx, &inputs, outside, e)?;
        if let Some(sink) = embedding {
            e.embed_backward(&inputs, &dx, (sink, E::shape(&self.embedding)))?;
        }
        Ok(loss)
    }
}

/// Runs `act` on an engine that adds to `cost`.
fn counted<T: Real, R>(e: &mut Cpu<T>, cost: &mut Cost, act: impl FnOnce(&mut Cpu<T>) -> R) -> R {
    std::mem::swap(&mut e.cost, cost);
    let result = act(e);
    std::mem::swap(&mut e.cost, cost);
    result
}

impl<T: Real> Pass<T> {
    /// Loss and number of counted positions.
    pub fn output(&self) -> StepOutput {
        StepOutput { loss: self.loss, counted: self.inputs.targets.len() }
    }

    /// (name, bytes) of every tensor kept for backward, for a memory ledger.
    pub fn saved_bytes_by_name(&self) -> Vec<(String, usize)> {
        self.saved_by_name().into_iter().map(|(name, n)| (name, n * size_of::<T>())).collect()
    }
}

impl<T: Real> Model<T> {
    /// The batch as the processor's operations read it.
    fn inputs(
        &self,
        batch: &Batch,
        targets: Vec<(usize, usize)>,
        divisor: f64,
    ) -> Result<CpuInputs<T>> {
        Ok(CpuInputs {
            ids: batch.input_ids.iter().copied().collect(),
            mask: batch.attention_mask.clone(),
            shape: attention_shape(&self.config, batch.input_ids.dim()),
            starts: batch.documents.clone(),
            positions: positions_of(&self.config, batch),
            angles: rope_tables(&self.config, batch)?,
            targets,
            divisor,
        })
    }

    /// Hidden rows after the last norm, or the output of the layer after which the instruments end
    /// the forward: `N x D`, saving nothing.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub(crate) fn hidden(
        &self,
        batch: &Batch,
        instruments: &Instruments<'_, T>,
        cost: &mut Cost,
    ) -> Result<Array2<T>> {
        let inputs = self.inputs(batch, Vec::new(), 1.0)?;
        counted(&mut Cpu::default(), cost, |e| self.hidden_on(e, &inputs, instruments))
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
    pub fn batch_logits(
        &self,
        batch: &Batch,
        instruments: &Instruments<'_, T>,
        cost: &mut Cost,
    ) -> Result<Array2<T>> {
        let mut logits = self.project(self.hidden(batch, instruments, cost)?.view(), cost)?;
        self.config.options.cap_logits(&mut logits);
        instruments.tap(None, Point::Logits, false, &mut logits);
        Ok(logits)
    }

    /// Mean loss of a batch in nats, saving nothing.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn loss(&self, batch: &Batch, cost: &mut Cost) -> Result<f64> {
        let loss = on_workers(|| {
            self.loss_with(batch, &StepOptions::default(), &Instruments::default(), cost)
        })?;
        loss.ok_or_else(|| Error::invalid("loss", "absent", "the forward ends before it"))
    }

    /// Loss of a batch without gradients, saving nothing; `None` where the instruments end the
    /// forward before it.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn loss_with(
        &self,
        batch: &Batch,
        options: &StepOptions,
        instruments: &Instruments<'_, T>,
        cost: &mut Cost,
    ) -> Result<Option<f64>> {
        let hidden = self.hidden(batch, instruments, cost)?;
        if instruments.until.is_some() {
            return Ok(None);
        }
        let targets = match instruments.targets {
            Some(targets) => targets.to_vec(),
            None => prediction_targets(batch.labels.view(), self.config.vocab_size)?,
        };
        let divisor = (divisor(options, targets.len())?, self.config.options.logit_cap);
        let own = self.acting_head()?;
        let head = self.stored_head().map_or_else(|| Head::Whole(own.view()), Head::of);
        let observe = |gradient: bool, logits: &mut Array2<T>| {
            instruments.tap(None, Point::Logits, gradient, logits)
        };
        cross_entropy_through(hidden.view(), &head, &targets, divisor, None, &observe, cost)
            .map(Some)
    }

    /// The forward half of a step. The loss and the gradient of its logits are formed together,
    /// chunk by chunk, so the output projection's sink is filled here.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an id or a label outside the vocabulary, or a batch in which no
    /// position counts; [`Error::NonFinite`] if the loss is NaN or infinite.
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
        let inputs = self.inputs(batch, targets, divisor)?;
        std::mem::swap(&mut gradients.engine.cost, cost);
        let pass = self.forward_on(inputs, options.checkpointing, instruments, gradients);
        std::mem::swap(&mut gradients.engine.cost, cost);
        pass
    }

    /// The backward half: consumes the pass, releasing each saved tensor after its last use.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the gradients were made for other trainable tensors than the
    /// pass.
    pub fn backward(
        &self,
        pass: Pass<T>,
        gradients: &mut Gradients<T>,
        cost: &mut Cost,
    ) -> Result<StepOutput> {
        on_workers(|| self.backward_with(self, pass, &Instruments::default(), gradients, cost))
    }

    /// As [`Model::backward`], with the instruments of the forward, and its model, from which
    /// layers that kept nothing but their input run again.
    ///
    /// # Errors
    /// As [`Model::backward`].
    pub fn backward_with(
        &self,
        forward: &Self,
        pass: Pass<T>,
        instruments: &Instruments<'_, T>,
        gradients: &mut Gradients<T>,
        cost: &mut Cost,
    ) -> Result<StepOutput> {
        let output = pass.output();
        std::mem::swap(&mut gradients.engine.cost, cost);
        let done = self.backward_on(forward, pass, instruments, gradients);
        std::mem::swap(&mut gradients.engine.cost, cost);
        done.map(|_| output)
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
        self.backward(pass, gradients, cost)
    }
}

/// Sequences, tokens and heads of a batch.
pub(crate) fn attention_shape(
    config: &ModelConfig,
    (batch, length): (usize, usize),
) -> AttentionShape {
    AttentionShape {
        batch,
        length,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}

/// Angles of a batch's positions, by kind of rotary embedding.
pub(crate) fn rope_tables<T: Real>(
    config: &ModelConfig,
    batch: &Batch,
) -> Result<Vec<RopeTable<T>>> {
    // Rows of the same positions share a table.
    let positions: Vec<u32> = match &batch.position_ids {
        Some(positions) => positions.iter().copied().collect(),
        None => (0..batch.input_ids.ncols() as u32).collect(),
    };
    let table = |rotary| RopeTable::of(rotary, &positions, config.head_dim, config.rope_theta);
    config.options.rotaries.iter().map(table).collect()
}

/// Position of every token. Where none are given they count from 0 in each row; OPT counts from the
/// first token that is not padding.
fn positions_of(config: &ModelConfig, batch: &Batch) -> Vec<u32> {
    let (rows, length) = batch.input_ids.dim();
    if let Some(positions) = &batch.position_ids {
        return positions.iter().copied().collect();
    }
    let Some(mask) = batch.attention_mask.as_ref().filter(|_| config.options.family == Family::Opt)
    else {
        return (0..rows).flat_map(|_| 0..length as u32).collect();
    };
    let mut all = Vec::with_capacity(rows * length);
    for row in mask.rows() {
        let mut seen = 0;
        all.extend(row.iter().map(|&real| {
            seen += u32::from(real);
            // Padding stands one row before position 0; nothing that counts reads it.
            if real { seen - 1 } else { 0 }
        }));
    }
    all
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
