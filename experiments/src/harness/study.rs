//! The fine-tuning study that several experiments share: small pretrained models, one new task,
//! three accuracies.
//!
//! A model is pretrained by the run itself on lists of up to nine digits (largest, smallest, first,
//! last, length, backwards) and on facts, and then learns to **sort** lists of up to six. Measured
//! are
//!
//! - *in-domain*: sorting unseen lists of up to six digits;
//! - *shifted* (near): sorting lists of seven to nine, lengths that only pretraining has seen;
//! - *retained*: the pretraining tasks, unseen problems: the lists (far: the same form, other
//!   questions) and the facts (forgotten: another language), and their mean.
//!
//! Everything is a function of the seeds. **A base is one pretrained model**: its number seeds its
//! weights and its data, and what is independent is bases (`harness::over_bases`). Each is made
//! once per process and shared.

use super::{Point, Profile};
use peft_limits::error::{Error, Result};
use peft_limits::model::{Model, ModelConfig};
use peft_limits::report::Row;
use peft_limits::streams::generator;
use peft_limits::train::budget::with_budget;
use peft_limits::train::config::{ModelSource, TrainConfig};
use peft_limits::train::evaluate::Scores;
use peft_limits::train::memory::trained_numbers;
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::observe::EvaluationRecord;
use peft_limits::train::optimizer::OptimizerParams;
use peft_limits::train::preset::preset;
use peft_limits::train::schedule::{Decay, ScheduleParams};
use peft_limits::train::tasks::Split;
use peft_limits::train::tasks::facts::FactsParams;
use peft_limits::train::tasks::lists::{ListsParams, Operation};
use peft_limits::train::tasks::mixture::{Part, TaskParams};
use peft_limits::train::trainer::{StepOutcome, Trainer};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Longest list whose sorting is trained.
const SORTED: usize = 6;
/// Longest list of pretraining, and of the shifted test.
const READ: usize = 9;
/// The methods that the papers compare with one another.
pub const PAPERS: [MethodName; 8] = [
    MethodName::Full,
    MethodName::Lora,
    MethodName::Dora,
    MethodName::Moslora,
    MethodName::Paca,
    MethodName::S2ft,
    MethodName::Qlora,
    MethodName::Qpaca,
];
/// LoRA's rank that sets the budget.
pub const BUDGET_RANK: usize = 4;
/// Seed of the first base's pretraining.
const PRETRAINING_SEED: u64 = 1;
/// What the names of our own bases begin with; a number follows.
pub const OURS: &str = "ours ";

/// Bases of the quick profile: a later seed uses an earlier base again.
pub const QUICK_BASES: u64 = 3;
/// Number of the base on which learning rates are tuned; no experiment reports it.
pub const TUNING_BASE: u64 = 1000;

/// Length of the study.
#[derive(Debug, Clone, PartialEq)]
pub struct Study {
    /// Updates of pretraining, 48 rows each.
    pub pretraining_steps: u64,
    /// Updates of fine-tuning, 24 rows each.
    pub steps: u64,
    /// Rows per task and split in an evaluation.
    pub rows: usize,
}

/// The three accuracies (shares of rows with every token right, and of tokens right), and the
/// losses in nats.
#[derive(Debug, Clone, PartialEq)]
pub struct Accuracies {
    /// Sorting up to six digits.
    pub in_domain: Scores,
    /// Sorting seven to nine.
    pub shifted: Scores,
    /// Each pretraining task.
    pub retained: Vec<(String, Scores)>,
}

impl Accuracies {
    /// Mean over the pretraining tasks of the share of exactly right rows.
    pub fn retained_exact(&self) -> f64 {
        mean(self.retained.iter().map(|(_, s)| s.exact))
    }

    /// Mean over the pretraining tasks of the share of right tokens.
    pub fn retained_tokens(&self) -> f64 {
        mean(self.retained.iter().map(|(_, s)| s.tokens))
    }

    /// The columns that tables share.
    pub fn row(&self) -> Row {
        let mut row = Row::new()
            .with("in-domain exact", self.in_domain.exact)
            .with("in-domain tokens", self.in_domain.tokens)
            .with("shifted exact", self.shifted.exact)
            .with("shifted tokens", self.shifted.tokens)
            .with("retained exact", self.retained_exact())
            .with("retained tokens", self.retained_tokens());
        for (task, scores) in &self.retained {
            row.set(format!("{task} tokens"), scores.tokens);
            row.set(format!("{task} loss (nats)"), scores.loss);
        }
        row.with("in-domain loss (nats)", self.in_domain.loss)
            .with("shifted loss (nats)", self.shifted.loss)
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

impl Study {
    /// Minutes on two cores.
    pub fn quick() -> Self {
        Self { pretraining_steps: 500, steps: 120, rows: 128 }
    }

    /// Longer pretraining and fine-tuning of the same model.
    pub fn full() -> Self {
        Self { pretraining_steps: 800, steps: 120, rows: 192 }
    }

    /// Sizes of the model: `pico` (0.2 M parameters) with eight heads of eight, so that selections
    /// of heads can differ.
    ///
    /// # Errors
    /// As [`preset`].
    pub fn sizes() -> Result<ModelConfig> {
        let (heads, head_dim) = (8, 8);
        Ok(ModelConfig {
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim,
            ..preset("pico")?
        })
    }

    /// Writes the study into a grid point.
    pub fn point(&self, label: impl Into<String>) -> Point {
        Point::new(label)
            .with("pretraining steps", self.pretraining_steps)
            .with("steps", self.steps)
            .with("test rows", self.rows)
    }

    /// As [`Study::point`], of a seed and its base: its own in the full profile, one of
    /// [`QUICK_BASES`] in the quick one.
    pub fn seeded(&self, label: impl Into<String>, profile: Profile, seed: u64) -> Point {
        let base = profile.pick(seed % QUICK_BASES, seed);
        self.point(label).with("base", format!("{OURS}{base}")).with("seed", seed)
    }

    /// Reads it back.
    ///
    /// # Errors
    /// As [`Point::u64`].
    pub fn of(point: &Point) -> Result<Self> {
        Ok(Self {
            pretraining_steps: point.u64("pretraining steps")?,
            steps: point.u64("steps")?,
            rows: point.usize("test rows")?,
        })
    }

    /// Peak learning rate of a method at the study's budget.
    ///
    /// Chosen for full, LoRA, PaCA and S2FT among a few rates, factors of two, on one or two seeds
    /// that no experiment reports. DoRA, MosLoRA and the packed methods take LoRA's or PaCA's rate
    /// unswept: the full profile of `peft_accuracy` sweeps around it.
    pub fn learning_rate(&self, name: MethodName) -> f64 {
        if name == MethodName::Full { 4e-3 } else { 2e-2 }
    }

    /// A method at the study's budget: the trained numbers of LoRA with rank 4.
    ///
    /// # Errors
    /// As [`with_budget`].
    pub fn method(&self, name: MethodName) -> Result<MethodParams> {
        let config = Self::sizes()?;
        let lora = MethodParams { rank: BUDGET_RANK, ..MethodParams::named(MethodName::Lora) };
        with_budget(name, &config, trained_numbers(&config, &lora)?)
    }

    fn pretraining_data() -> Vec<Part> {
        use Operation::{First, Last, Length, Max, Min, Reverse};
        let lists =
            ListsParams { length: READ, operations: vec![Max, Min, First, Last, Length, Reverse] };
        let facts = FactsParams { entities: 16, ..FactsParams::default() };
        // Fact rows are twice as long, so the model sees as many tokens of each.
        vec![
            Part { weight: 2.0, task: TaskParams::Lists(lists) },
            Part { weight: 1.0, task: TaskParams::Facts(facts) },
        ]
    }

    /// The configuration of pretraining.
    pub fn pretraining(&self, base: u64) -> TrainConfig {
        let mut config = TrainConfig {
            seed: PRETRAINING_SEED + base,
            optimizer: OptimizerParams {
                lr: 5e-3,
                beta2: 0.99,
                clip: 1.0,
                ..OptimizerParams::default()
            },
            schedule: ScheduleParams {
                decay: Decay::Linear,
                warmup: 30.min(self.pretraining_steps),
                floor: 0.0,
            },
            data: Self::pretraining_data(),
            ..TrainConfig::default()
        };
        (config.train.steps, config.train.batch, config.train.length) =
            (self.pretraining_steps, 48, 96);
        config
    }

    /// The configuration of one fine-tuning. `seed` orders its rows and starts its adapters.
    pub fn fine_tuning(&self, method: MethodParams, lr: f64, seed: u64) -> TrainConfig {
        let sort = ListsParams { length: SORTED, operations: vec![Operation::Sort] };
        let mut config = TrainConfig {
            seed: seed + 1000,
            model: ModelSource::Path("pretrained".into()),
            method,
            optimizer: OptimizerParams { lr, clip: 1.0, ..OptimizerParams::default() },
            schedule: ScheduleParams {
                decay: Decay::Linear,
                warmup: 10.min(self.steps),
                floor: 0.0,
            },
            data: vec![Part { weight: 1.0, task: TaskParams::Lists(sort) }],
            retain: Self::pretraining_data(),
            ..TrainConfig::default()
        };
        (config.train.steps, config.train.batch, config.train.length) = (self.steps, 24, 96);
        config.train.eval_rows = self.rows;
        config
    }

    /// A pretrained model: made on the first call in a process, shared afterwards.
    ///
    /// # Errors
    /// As [`train`].
    pub fn pretrained(&self, base: u64) -> Result<Arc<Model<f32>>> {
        type Slot = Arc<Mutex<Option<Arc<Model<f32>>>>>;
        static MODELS: OnceLock<Mutex<HashMap<String, Slot>>> = OnceLock::new();
        let config = self.pretraining(base);
        let key = config.to_toml()?;
        let slot = {
            let mut models =
                MODELS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(models.entry(key).or_default())
        };
        // Held while training: points that want the same model wait for it, others make theirs.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = slot.as_ref() {
            return Ok(Arc::clone(model));
        }
        let model = on_own_threads(1, || {
            let weights =
                Model::random(Self::sizes()?, &mut generator(config.seed, "init/model", 0))?;
            let mut trainer = Trainer::<f32>::with_model(config, weights)?;
            train(&mut trainer, |_| Ok(()))?;
            let mut model = trainer.model;
            model.freeze();
            Ok(model)
        })?;
        Ok(Arc::clone(slot.insert(Arc::new(model))))
    }

    /// The pretrained model that a point names.
    ///
    /// # Errors
    /// As [`Study::pretrained`]; [`Error::InvalidParam`] unless it is one of ours.
    pub fn base_of(&self, point: &Point) -> Result<Arc<Model<f32>>> {
        let name = point.text("base")?;
        let number = name.strip_prefix(OURS).and_then(|number| number.parse().ok());
        let missing = || Error::invalid("base", name, format!("must be {OURS}N"));
        self.pretrained(number.ok_or_else(missing)?)
    }

    /// A run that fine-tunes the pretrained model.
    ///
    /// # Errors
    /// As [`Trainer::with_model`].
    pub fn trainer(
        &self,
        base: &Model<f32>,
        method: MethodParams,
        lr: f64,
        seed: u64,
    ) -> Result<Trainer<f32>> {
        Trainer::with_model(self.fine_tuning(method, lr, seed), base.clone())
    }

    /// Accuracies of the pretrained model itself.
    ///
    /// # Errors
    /// As [`accuracies`].
    pub fn before(&self, base: &Model<f32>) -> Result<Accuracies> {
        accuracies(&self.trainer(base, MethodParams::named(MethodName::Full), 1e-3, 0)?)
    }
}

/// Runs the steps that are left; `each` sees the trainer after every step and the step's loss.
///
/// # Errors
/// As [`Trainer::step`]; [`Error::NonFinite`] if NaN or infinity stops the run;
/// [`Error::Interrupted`].
pub fn train(
    trainer: &mut Trainer<f32>,
    mut each: impl FnMut((&Trainer<f32>, f64)) -> Result<()>,
) -> Result<()> {
    while trainer.steps_done() < trainer.config.train.steps {
        if super::interrupted() {
            return Err(Error::Interrupted);
        }
        match trainer.step()? {
            StepOutcome::Done(record) => each((trainer, record.loss))?,
            StepOutcome::NonFinite { tensor } => {
                let index = vec![trainer.steps_done() as usize];
                return Err(Error::NonFinite {
                    op: "training step",
                    tensor,
                    index,
                    value: f64::NAN,
                });
            }
        }
    }
    Ok(())
}

/// In-domain, shifted and retained accuracy of a run's model as it is now.
///
/// # Errors
/// As [`Trainer::evaluate`].
pub fn accuracies(trainer: &Trainer<f32>) -> Result<Accuracies> {
    let records = trainer.evaluate()?;
    let is = |r: &EvaluationRecord, set: &str, split: Split| r.set == set && r.split == split;
    let one = |split: Split| {
        let found = records.iter().find(|r| is(r, "data", split)).map(|r| r.scores);
        found.ok_or_else(|| Error::invalid("train.eval_rows", 0, "must be at least 1"))
    };
    let retained = records.iter().filter(|r| is(r, "retain", Split::Test));
    Ok(Accuracies {
        in_domain: one(Split::Test)?,
        shifted: one(Split::Shifted)?,
        retained: retained.map(|r| (r.task.clone(), r.scores)).collect(),
    })
}

/// Runs `work` in a thread pool of its own while the calling thread sleeps.
///
/// Points that are measured at the same time, each with parallel products inside, would otherwise
/// steal one another: a thread that waits for a product would begin another point on the same
/// stack.
///
/// # Errors
/// Those of `work`; [`Error::InvalidParam`] if the system gives no threads.
pub fn on_own_threads<R: Send>(
    threads: usize,
    work: impl FnOnce() -> Result<R> + Send,
) -> Result<R> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| Error::invalid("threads", threads, e.to_string()))?;
    let outcome = std::thread::scope(|scope| scope.spawn(|| pool.install(work)).join());
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Study {
        Study { pretraining_steps: 2, steps: 2, rows: 4 }
    }

    #[test]
    fn points_carry_the_study_and_the_model_is_made_once() {
        let study = tiny();
        assert_eq!(Study::of(&study.point("x")).unwrap(), study);
        let (a, b) = (study.pretrained(0).unwrap(), study.pretrained(0).unwrap());
        assert!(Arc::ptr_eq(&a, &b));
        // Another base has other weights, and so has another length of pretraining.
        let other = study.pretrained(1).unwrap();
        assert_ne!(other.embedding, a.embedding);
        let shorter = Study { pretraining_steps: 1, ..study.clone() }.pretrained(0).unwrap();
        assert_ne!(shorter.embedding, a.embedding);
        let bases = |profile| {
            [0, 3].map(|seed| study.seeded("x", profile, seed).text("base").unwrap().to_string())
        };
        assert_eq!(
            (bases(Profile::Quick), bases(Profile::Full)),
            (["ours 0"; 2].map(String::from), ["ours 0".into(), "ours 3".into()])
        );
        assert!(Arc::ptr_eq(&study.base_of(&study.seeded("x", Profile::Quick, 3)).unwrap(), &a));
        assert!(study.base_of(&study.point("x").with("base", "theirs")).is_err());
    }

    #[test]
    fn accuracies_have_all_parts_and_a_run_is_reproducible() {
        let study = tiny();
        let base = study.pretrained(0).unwrap();
        let run = || {
            let mut trainer =
                study.trainer(&base, MethodParams::named(MethodName::Paca), 1e-3, 3).unwrap();
            let mut losses = Vec::new();
            train(&mut trainer, |(_, loss)| {
                losses.push(loss.to_bits());
                Ok(())
            })
            .unwrap();
            (losses, accuracies(&trainer).unwrap())
        };
        let (losses, found) = run();
        assert_eq!(losses.len(), 2);
        assert_eq!(
            found.retained.iter().map(|r| r.0.as_str()).collect::<Vec<_>>(),
            ["lists", "facts"]
        );
        assert!(
            (found.retained_tokens()
                - (found.retained[0].1.tokens + found.retained[1].1.tokens) / 2.0)
                .abs()
                < 1e-15
        );
        assert_eq!(run().0, losses);
        assert_eq!(run().1.row(), found.row());
    }

    #[test]
    fn work_runs_on_as_many_threads_as_asked_and_errors_come_back() {
        assert_eq!(on_own_threads(3, || Ok(rayon::current_num_threads())).unwrap(), 3);
        let error = on_own_threads::<()>(1, || Err(Error::Interrupted)).unwrap_err();
        assert!(matches!(error, Error::Interrupted));
    }
}
