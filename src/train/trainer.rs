//! The training loop.
//!
//! ```text
//! update t:  rows t B A .. (t + 1) B A of the training stream, in A micro-batches of B rows
//!            g = gradient of (sum of losses over all counted positions) / (their number)
//!            g <- g min(1, clip / (||g|| + 1e-6)),   lr_t = lr f(t),   optimizer update
//! ```
//!
//! Every random choice is a function of the seed and t, so the state of a run is the step count,
//! the trained values and the optimizer's moments; a continued run equals an uninterrupted one bit
//! for bit.

use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::model::{Batch, Gradients, Model, StepOptions};
use crate::streams::{fnv1a, generator};
use crate::train::checkpoint;
use crate::train::config::{ModelSource, TrainConfig};
use crate::train::data::Encoder;
use crate::train::engine::StepEngine;
use crate::train::evaluate::evaluate;
use crate::train::observe::{EvaluationRecord, Event, Observe, StepRecord, StopReason};
use crate::train::optimizer::{Optimizer, clip_factor, update_model};
use crate::train::schedule::Schedule;
use crate::train::storage::{round_bf16, round_gradients, round_model};
use crate::train::tasks::{Mixture, Split};
use crate::train::tokenizer::Tokenizer;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Stream seed offset of evaluation rows: they are the same for every seed of a run, so that runs
/// compare.
const EVALUATION_SEED: u64 = 0;

/// Training batches on which activation and gradient selection measure.
const CALIBRATION_BATCHES: usize = 4;

/// A run between two steps.
pub struct Trainer<T: Real> {
    /// The resolved configuration.
    pub config: TrainConfig,
    /// The model with its adapters.
    pub model: Model<T>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The optimizer with its state.
    pub optimizer: Optimizer<T>,
    pub(crate) step: u64,
    /// Hash of the weights before adaptation, to recognise a changed base on resume.
    pub(crate) fingerprint: u64,
    schedule: Schedule,
    data: Mixture,
    retain: Option<Mixture>,
    gradients: Gradients<T>,
    /// Computes the steps in place of the model, if any.
    engine: Option<Box<dyn StepEngine<T>>>,
    /// Whether the engine has made updates that the model does not have.
    behind: bool,
    /// Operations of the model's own steps so far (since the start or the resume).
    pub cost: Cost,
}

/// What one step came to.
#[derive(Debug, Clone, PartialEq)]
pub enum StepOutcome {
    /// An update was made.
    Done(StepRecord),
    /// A NaN or an infinity appeared, and no update was made.
    NonFinite {
        /// Where it was seen.
        tensor: String,
    },
}

impl<T: Real> Trainer<T> {
    /// Reads or makes the model, attaches the method, opens the data.
    ///
    /// # Errors
    /// As [`TrainConfig::check`], [`Model::read`], [`crate::train::method::MethodParams::apply`],
    /// [`Mixture::open`] and [`Tokenizer::of_model`].
    pub fn new(config: TrainConfig) -> Result<Self> {
        config.check()?;
        let model: Model<T> = match &config.model {
            ModelSource::Path(folder) => Model::read(folder)?,
            random => Model::random(random.sizes()?, &mut generator(config.seed, "init/model", 0))?,
        };
        Self::with_model(config, model)
    }

    /// As [`Trainer::new`] with a model already in memory, not yet adapted, in place of the one
    /// that `config.model` names.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn with_model(config: TrainConfig, mut model: Model<T>) -> Result<Self> {
        let tokenizer = match &config.model {
            ModelSource::Path(folder) => Tokenizer::of_model(folder, model.config.vocab_size)?,
            _ => Tokenizer::bytes(),
        };
        if tokenizer.vocabulary() > model.config.vocab_size {
            let requirement = format!("must hold the tokenizer's {} ids", tokenizer.vocabulary());
            return Err(Error::invalid("vocab_size", model.config.vocab_size, requirement));
        }
        let fingerprint = checkpoint::fingerprint(&model);
        let data = Mixture::open(&config.data)?;
        let calibration = if config.method.needs_calibration() {
            let run = &config.train;
            let encoder =
                Encoder { tokenizer: &tokenizer, length: run.length, truncate: run.truncate };
            // Rows of their own stream, so that selection does not look at the first training rows
            // twice.
            let seed = config.seed ^ fnv1a("calibration");
            let batches = (0..CALIBRATION_BATCHES as u64)
                .map(|i| {
                    encoder.draw(&data, seed, Split::Train, i * run.batch as u64, run.batch, None)
                })
                .collect::<Result<Vec<_>>>()?;
            Some(model.calibrate(&batches, &mut Cost::default())?)
        } else {
            None
        };
        config.method.apply(&mut model, calibration.as_ref(), config.seed)?;
        if config.train.bf16_storage {
            round_model(&mut model)?;
        }
        let retain =
            if config.retain.is_empty() { None } else { Some(Mixture::open(&config.retain)?) };
        Ok(Self {
            optimizer: config.optimizer.check()?,
            schedule: config.schedule.check(config.train.steps)?,
            data,
            retain,
            gradients: model.zero_gradients(),
            engine: None,
            behind: false,
            tokenizer,
            model,
            fingerprint,
            step: 0,
            cost: Cost::default(),
            config,
        })
    }

    /// Updates done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// [`checkpoint::fingerprint`] of the weights before adaptation.
    pub fn base_fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The gradient sinks (zero between steps).
    pub fn gradients(&self) -> &Gradients<T> {
        &self.gradients
    }

    /// The encoder of this run's rows.
    pub fn encoder(&self) -> Encoder<'_> {
        let run = &self.config.train;
        Encoder { tokenizer: &self.tokenizer, length: run.length, truncate: run.truncate }
    }

    /// One update.
    ///
    /// # Errors
    /// As [`Encoder::draw`] and [`Model::loss_and_gradients`], except that NaN and infinity are an
    /// outcome.
    pub fn step(&mut self) -> Result<StepOutcome> {
        let start = Instant::now();
        let run = self.config.train.clone();
        let width = run.fixed_width.then_some(run.length);
        let first = self.step * (run.batch * run.accumulation) as u64;
        let encoder =
            Encoder { tokenizer: &self.tokenizer, length: run.length, truncate: run.truncate };
        let batches = (0..run.accumulation)
            .map(|micro| {
                let first = first + (micro * run.batch) as u64;
                encoder.draw(&self.data, self.config.seed, Split::Train, first, run.batch, width)
            })
            .collect::<Result<Vec<_>>>()?;
        let counted: usize = batches.iter().map(|b| b.counted()).sum();
        let options =
            StepOptions { divisor: Some(counted as f64), checkpointing: run.checkpointing };
        let gradients = match &mut self.engine {
            Some(engine) => engine.gradients(&batches, &options),
            None => self.own_gradients(&batches, &options),
        };
        let (loss, norm) = match gradients {
            Ok(found) => found,
            Err(Error::NonFinite { tensor, .. }) => return Ok(StepOutcome::NonFinite { tensor }),
            Err(other) => return Err(other),
        };
        let lr = self.config.optimizer.lr * self.schedule.factor(self.step);
        let scale = clip_factor(norm, self.config.optimizer.clip);
        if let Some(engine) = &mut self.engine {
            engine.update(lr, scale)?;
            self.behind = true;
        } else {
            update_model(
                &mut self.optimizer,
                &mut self.model,
                &self.gradients,
                lr,
                scale,
                |values| {
                    if run.bf16_storage {
                        values.iter_mut().for_each(|x| *x = round_bf16(*x));
                    }
                },
            )?;
        }
        self.step += 1;
        Ok(StepOutcome::Done(StepRecord {
            step: self.step,
            loss,
            lr,
            gradient_norm: norm,
            counted,
            tokens: batches.iter().map(|b| b.tokens()).sum(),
            seconds: start.elapsed().as_secs_f64(),
        }))
    }

    /// Gradients of the batches in the sinks, by the model itself: (loss, norm).
    fn own_gradients(&mut self, batches: &[Batch], options: &StepOptions) -> Result<(f64, f64)> {
        self.gradients.fill_zero();
        let mut loss = 0.0;
        for batch in batches {
            loss += self
                .model
                .loss_and_gradients(batch, options, &mut self.gradients, &mut self.cost)?
                .loss;
        }
        if self.config.train.bf16_storage {
            round_gradients(&mut self.gradients);
        }
        let norm = self.gradients.norm();
        if !norm.is_finite() {
            let bad =
                self.gradients.named().into_iter().find(|(_, g)| g.iter().any(|x| !x.is_finite()));
            // Each entry may be finite and the norm overflow: report the norm itself then.
            let tensor =
                bad.map_or("gradient norm".to_string(), |(name, _)| format!("gradient of {name}"));
            return Err(Error::NonFinite {
                op: "gradient norm",
                tensor,
                index: vec![],
                value: norm,
            });
        }
        Ok((loss, norm))
    }

    /// Lets an engine, made from this run's model and optimizer as they are now, compute the steps
    /// from here on.
    pub fn attach(&mut self, engine: Box<dyn StepEngine<T>>) {
        self.engine = Some(engine);
    }

    /// Brings the model and the optimizer up to the engine's state, if there is an engine.
    ///
    /// # Errors
    /// What the engine fails with.
    pub fn synchronize(&mut self) -> Result<()> {
        if let (Some(engine), true) = (&self.engine, self.behind) {
            engine.download(&mut self.model, &mut self.optimizer)?;
            self.behind = false;
        }
        Ok(())
    }

    /// Scores on every task and split that there is: the data's, then the retained ones'.
    ///
    /// # Errors
    /// As [`evaluate`].
    pub fn evaluate(&self) -> Result<Vec<EvaluationRecord>> {
        let mut all = Vec::new();
        let rows = self.config.train.eval_rows;
        if rows == 0 {
            return Ok(all);
        }
        let sets = [("data", Some(&self.data)), ("retain", self.retain.as_ref())];
        for (set, mixture) in sets.into_iter().filter_map(|(set, mixture)| Some((set, mixture?))) {
            for task in mixture.tasks() {
                for split in [Split::Test, Split::Shifted].into_iter().filter(|&s| task.has(s)) {
                    let encoder = self.encoder();
                    let batch = self.config.train.batch;
                    let scores =
                        evaluate(&self.model, &encoder, task, EVALUATION_SEED, split, rows, batch)?;
                    all.push(EvaluationRecord {
                        step: self.step,
                        set,
                        task: task.name().into(),
                        split,
                        scores,
                    });
                }
            }
        }
        Ok(all)
    }

    /// Trains until a reason to stop. With a folder, checkpoints go to `step-*` folders in it.
    ///
    /// `stop` is looked at between steps: set it (from a signal handler, say) to stop with the
    /// state saved.
    ///
    /// # Errors
    /// What a step, an evaluation, a save or an observer gives. The last checkpoint stays whole.
    pub fn run(
        &mut self,
        folder: Option<&Path>,
        observers: &mut [&mut dyn Observe],
        stop: &AtomicBool,
    ) -> Result<StopReason> {
        let mut tell = |event: &Event<'_>| observers.iter_mut().try_for_each(|o| o.observe(event));
        let run = self.config.train.clone();
        let trainable = self.model.trainable_elements();
        tell(&Event::Started { step: self.step, steps: run.steps, trainable })?;
        let mut evaluated = None;
        let reason = loop {
            if self.step >= run.steps {
                break StopReason::StepsDone;
            }
            if stop.load(Ordering::Relaxed) {
                break StopReason::Interrupted { step: self.step };
            }
            let record = match self.step()? {
                StepOutcome::Done(record) => record,
                StepOutcome::NonFinite { tensor } => {
                    break StopReason::NonFinite { step: self.step + 1, tensor };
                }
            };
            tell(&Event::Step(&record))?;
            if run.eval_every > 0 && self.step.is_multiple_of(run.eval_every) {
                self.synchronize()?;
                for record in self.evaluate()? {
                    tell(&Event::Evaluated(&record))?;
                }
                evaluated = Some(self.step);
            }
            if run.target_loss > 0.0 && record.loss <= run.target_loss {
                break StopReason::TargetLoss { step: self.step, loss: record.loss };
            }
            if run.save_every > 0
                && self.step.is_multiple_of(run.save_every)
                && self.step < run.steps
            {
                self.synchronize()?;
                if let Some(tensor) = self.non_finite_parameter() {
                    break StopReason::NonFinite { step: self.step, tensor };
                }
                if let Some(folder) = folder {
                    tell(&Event::Saved(&checkpoint::save(self, folder)?))?;
                }
            }
        };
        self.synchronize()?;
        let reason = match (&reason, self.non_finite_parameter()) {
            (StopReason::NonFinite { .. }, _) | (_, None) => reason,
            (_, Some(tensor)) => StopReason::NonFinite { step: self.step, tensor },
        };
        if !matches!(reason, StopReason::NonFinite { .. }) {
            let done = !matches!(reason, StopReason::Interrupted { .. });
            if done && evaluated != Some(self.step) {
                for record in self.evaluate()? {
                    tell(&Event::Evaluated(&record))?;
                }
            }
            if let Some(folder) = folder {
                tell(&Event::Saved(&checkpoint::save(self, folder)?))?;
            }
        }
        tell(&Event::Stopped(&reason))?;
        Ok(reason)
    }

    fn non_finite_parameter(&self) -> Option<String> {
        let bad =
            |(_, values): &(String, ndarray::Array2<T>)| values.iter().any(|x| !x.is_finite());
        self.model.trainable_values().into_iter().find(bad).map(|(name, _)| name)
    }
}
