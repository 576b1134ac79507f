//! The fine-tuning study that several experiments share: one small pretrained model, one new task, three accuracies.
//!
//! The model is pretrained by the run itself on lists of up to nine digits (largest, smallest, first, last, length,
//! backwards) and on facts, and then learns to **sort** lists of up to six. Measured are
//!
//! - *in-domain*: sorting unseen lists of up to six digits;
//! - *shifted*: sorting lists of seven to nine, lengths that only pretraining has seen;
//! - *retained*: the pretraining tasks, unseen problems, mean of the two.
//!
//! Everything is a function of the seeds. The pretrained model is made once per process and shared.

use super::Point;
use peft_limits::error::{Error, Result};
use peft_limits::model::Model;
use peft_limits::report::Row;
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
/// LoRA's rank that sets the budget.
pub const BUDGET_RANK: usize = 4;
/// Seed of pretraining; fine-tuning seeds start elsewhere.
const PRETRAINING_SEED: u64 = 1;

/// Size and length of the study.
#[derive(Debug, Clone, PartialEq)]
pub struct Study {
    /// Size of the model ([`peft_limits::train::preset`]).
    pub preset: String,
    /// Updates of pretraining, 48 rows each.
    pub pretraining_steps: u64,
    /// Updates of fine-tuning, 24 rows each.
    pub steps: u64,
    /// Rows per task and split in an evaluation.
    pub rows: usize,
}

/// The three accuracies (shares of rows with every token right, and of tokens right), and the losses in nats.
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
            row.set(format!("{task} exact"), scores.exact);
        }
        row.with("in-domain loss (nats)", self.in_domain.loss).with("shifted loss (nats)", self.shifted.loss)
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

impl Study {
    /// Minutes on two cores: a model of 0.2 M parameters.
    pub fn quick() -> Self {
        Self { preset: "pico".into(), pretraining_steps: 600, steps: 120, rows: 128 }
    }

    /// An hour: a model of 1 M parameters.
    pub fn full() -> Self {
        Self { preset: "nano".into(), pretraining_steps: 3000, steps: 400, rows: 512 }
    }

    /// Writes the study into a grid point.
    pub fn point(&self, label: impl Into<String>) -> Point {
        Point::new(label)
            .with("model", self.preset.as_str())
            .with("pretraining steps", self.pretraining_steps)
            .with("steps", self.steps)
            .with("test rows", self.rows)
    }

    /// Reads it back.
    ///
    /// # Errors
    /// As [`Point::u64`].
    pub fn of(point: &Point) -> Result<Self> {
        Ok(Self {
            preset: point.text("model")?.into(),
            pretraining_steps: point.u64("pretraining steps")?,
            steps: point.u64("steps")?,
            rows: point.usize("test rows")?,
        })
    }

    /// Peak learning rate of a method.
    ///
    /// For `pico`: chosen for full, LoRA, PaCA and S2FT among a few rates, factors of two, on one or two seeds that no
    /// experiment reports. Full fine-tuning was still improving at the highest rate tried; twice the adapters' rate makes
    /// LoRA unstable. DoRA, MosLoRA and the packed methods take LoRA's or PaCA's rate unswept. Wider models get half,
    /// also unswept: only the full profile of `peft_accuracy` sweeps around it.
    pub fn learning_rate(&self, name: MethodName) -> f64 {
        let lr = if name == MethodName::Full { 4e-3 } else { 2e-2 };
        if self.preset == "pico" { lr } else { lr / 2.0 }
    }

    /// Learning rate of a method that a smaller and a larger one bracket, for [`Study::full`]; else [`Self::learning_rate`].
    ///
    /// Column `lr` of the full run of `peft_accuracy`, which sweeps rates by factors of two on seeds that it does not report.
    pub fn swept_rate(&self, name: MethodName) -> f64 {
        if *self != Self::full() {
            return self.learning_rate(name);
        }
        match name {
            MethodName::Full => 2e-3,
            MethodName::Moslora => 5e-3,
            MethodName::Lora | MethodName::Qlora => 1e-2,
            MethodName::Dora => 2e-2,
            MethodName::Paca | MethodName::Qpaca => 4e-2,
            MethodName::S2ft => 8e-2,
        }
    }

    /// A method at the study's budget: the trained numbers of LoRA with rank 4.
    ///
    /// # Errors
    /// As [`with_budget`].
    pub fn method(&self, name: MethodName) -> Result<MethodParams> {
        let config = preset(&self.preset)?;
        let lora = MethodParams { rank: BUDGET_RANK, ..MethodParams::named(MethodName::Lora) };
        with_budget(name, &config, trained_numbers(&config, &lora)?)
    }

    fn pretraining_data() -> Vec<Part> {
        use Operation::{First, Last, Length, Max, Min, Reverse};
        let lists = ListsParams { length: READ, operations: vec![Max, Min, First, Last, Length, Reverse] };
        let facts = FactsParams { entities: 16, ..FactsParams::default() };
        // Fact rows are twice as long, so the model sees as many tokens of each.
        vec![Part { weight: 2.0, task: TaskParams::Lists(lists) }, Part { weight: 1.0, task: TaskParams::Facts(facts) }]
    }

    /// The configuration of pretraining.
    pub fn pretraining(&self) -> TrainConfig {
        let mut config = TrainConfig {
            seed: PRETRAINING_SEED,
            model: ModelSource::Preset(self.preset.clone()),
            optimizer: OptimizerParams { lr: 5e-3, beta2: 0.99, clip: 1.0, ..OptimizerParams::default() },
            schedule: ScheduleParams { decay: Decay::Linear, warmup: 30.min(self.pretraining_steps), floor: 0.0 },
            data: Self::pretraining_data(),
            ..TrainConfig::default()
        };
        if self.preset != "pico" {
            // Wider models want a smaller step.
            config.optimizer.lr = 3e-3;
        }
        (config.train.steps, config.train.batch, config.train.length) = (self.pretraining_steps, 48, 96);
        config
    }

    /// The configuration of one fine-tuning. `seed` orders its rows and starts its adapters.
    pub fn fine_tuning(&self, method: MethodParams, lr: f64, seed: u64) -> TrainConfig {
        let sort = ListsParams { length: SORTED, operations: vec![Operation::Sort] };
        let mut config = TrainConfig {
            seed: seed + 1000 * PRETRAINING_SEED,
            model: ModelSource::Path("pretrained".into()),
            method,
            optimizer: OptimizerParams { lr, clip: 1.0, ..OptimizerParams::default() },
            schedule: ScheduleParams { decay: Decay::Linear, warmup: 10.min(self.steps), floor: 0.0 },
            data: vec![Part { weight: 1.0, task: TaskParams::Lists(sort) }],
            retain: Self::pretraining_data(),
            ..TrainConfig::default()
        };
        (config.train.steps, config.train.batch, config.train.length) = (self.steps, 24, 96);
        config.train.eval_rows = self.rows;
        config
    }

    /// The pretrained model: made on the first call in a process, shared afterwards.
    ///
    /// # Errors
    /// As [`train`].
    pub fn pretrained(&self) -> Result<Arc<Model<f32>>> {
        static MODELS: OnceLock<Mutex<HashMap<String, Arc<Model<f32>>>>> = OnceLock::new();
        let config = self.pretraining();
        let key = config.to_toml()?;
        let models = MODELS.get_or_init(Mutex::default);
        // Held while training: points that want the same model wait for it. The threads that wait do nothing else,
        // because the training has its own.
        let mut models = models.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = models.get(&key) {
            return Ok(Arc::clone(model));
        }
        let model = on_own_threads(rayon::current_num_threads(), || {
            let mut trainer = Trainer::<f32>::new(config)?;
            train(&mut trainer, |_| Ok(()))?;
            let mut model = trainer.model;
            model.freeze();
            Ok(model)
        })?;
        let model = Arc::new(model);
        models.insert(key, Arc::clone(&model));
        Ok(model)
    }

    /// A run that fine-tunes the pretrained model.
    ///
    /// # Errors
    /// As [`Trainer::with_model`].
    pub fn trainer(&self, base: &Model<f32>, method: MethodParams, lr: f64, seed: u64) -> Result<Trainer<f32>> {
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
/// As [`Trainer::step`]; [`Error::NonFinite`] if NaN or infinity stops the run; [`Error::Interrupted`].
pub fn train(trainer: &mut Trainer<f32>, mut each: impl FnMut((&Trainer<f32>, f64)) -> Result<()>) -> Result<()> {
    while trainer.steps_done() < trainer.config.train.steps {
        if super::interrupted() {
            return Err(Error::Interrupted);
        }
        match trainer.step()? {
            StepOutcome::Done(record) => each((trainer, record.loss))?,
            StepOutcome::NonFinite { tensor } => {
                let index = vec![trainer.steps_done() as usize];
                return Err(Error::NonFinite { op: "training step", tensor, index, value: f64::NAN });
            }
        }
    }
    Ok(())
}

/// Learning rates that were tried with their losses, the best of them, and whether it lies between worse ones.
#[derive(Clone, Debug, PartialEq)]
pub struct RateSweep {
    /// Rate and loss (nats), by rising rate.
    pub tried: Vec<(f64, f64)>,
    /// The rate with the least loss.
    pub best: f64,
    /// A smaller and a larger rate were tried and both are worse.
    pub bracketed: bool,
}

impl RateSweep {
    /// Of rates and losses in any order; without any, the best is NaN.
    pub fn of(mut tried: Vec<(f64, f64)>) -> Self {
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
        let best = (0..tried.len()).min_by(|&a, &b| tried[a].1.total_cmp(&tried[b].1)).unwrap_or(0);
        let bracketed = best > 0 && best + 1 < tried.len();
        Self { best: tried.get(best).map_or(f64::NAN, |t| t.0), tried, bracketed }
    }
}

/// Tries half, once and twice `start`, then further factors of two on the better side until both neighbours of the best are
/// worse, at most [`SWEEP_DOUBLINGS`] from `start`.
///
/// A loss that is NaN counts as infinite.
///
/// # Errors
/// Those of `loss_at`.
pub fn sweep_rates(start: f64, mut loss_at: impl FnMut(f64) -> Result<f64>) -> Result<RateSweep> {
    let (mut low, mut high) = (-1, 1);
    let mut sweep =
        RateSweep::of((low..=high).map(|power| attempt(start, power, &mut loss_at)).collect::<Result<_>>()?);
    loop {
        let power = if sweep.bracketed {
            return Ok(sweep);
        } else if sweep.best < start && low > -SWEEP_DOUBLINGS {
            low -= 1;
            low
        } else if sweep.best > start && high < SWEEP_DOUBLINGS {
            high += 1;
            high
        } else {
            return Ok(sweep);
        };
        sweep.tried.push(attempt(start, power, &mut loss_at)?);
        sweep = RateSweep::of(sweep.tried);
    }
}

fn attempt(start: f64, power: i32, loss_at: &mut impl FnMut(f64) -> Result<f64>) -> Result<(f64, f64)> {
    let rate = start * 2f64.powi(power);
    let loss = loss_at(rate)?;
    Ok((rate, if loss.is_nan() { f64::INFINITY } else { loss }))
}

/// Furthest rate of [`sweep_rates`]: this many factors of two from the start.
pub const SWEEP_DOUBLINGS: i32 = 5;

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
/// Points that are measured at the same time, each with parallel products inside, would otherwise steal one
/// another: a thread that waits for a product would begin another point on the same stack.
///
/// # Errors
/// Those of `work`; [`Error::InvalidParam`] if the system gives no threads.
pub fn on_own_threads<R: Send>(threads: usize, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| Error::invalid("threads", threads, e.to_string()))?;
    let outcome = std::thread::scope(|scope| scope.spawn(|| pool.install(work)).join());
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Study {
        Study { preset: "pico".into(), pretraining_steps: 2, steps: 2, rows: 4 }
    }

    #[test]
    fn swept_rates_are_those_of_the_committed_figure() {
        let table = concat!(env!("CARGO_MANIFEST_DIR"), "/../figures/peft_accuracy/table.csv");
        let table = peft_limits::report::Table::read_csv(std::path::Path::new(table)).unwrap();
        for method in MethodName::ALL {
            let rates = table.filter_eq("method", method.name()).floats("lr").unwrap();
            assert_eq!(rates.len(), 5, "{method:?}");
            let swept = Study::full().swept_rate(method);
            assert!(rates.iter().all(|lr| lr.to_bits() == swept.to_bits()), "{method:?}: {rates:?} against {swept}");
        }
    }

    #[test]
    fn a_sweep_of_rates_ends_between_two_worse_ones() {
        // Least at 8: up from 1, past 8, to 16.
        let up = sweep_rates(1.0, |lr| Ok((lr.log2() - 3.0).powi(2))).unwrap();
        assert_eq!(up.tried.iter().map(|t| t.0).collect::<Vec<_>>(), [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]);
        assert!(up.bracketed && up.best.to_bits() == 8f64.to_bits());
        // Down, where the start breaks down.
        let down = sweep_rates(1.0, |lr| Ok(if lr > 0.3 { f64::NAN } else { 1.0 - lr })).unwrap();
        assert!(down.bracketed && down.best.to_bits() == 0.25f64.to_bits(), "{down:?}");
        assert!(down.tried.last().unwrap().1.is_infinite());
        // Better without end: stops, and says so.
        let open = sweep_rates(1.0, |lr| Ok(-lr)).unwrap();
        assert!(!open.bracketed && open.best.to_bits() == 2f64.powi(SWEEP_DOUBLINGS).to_bits());
        assert!(matches!(sweep_rates(1.0, |_| Err(Error::Interrupted)), Err(Error::Interrupted)));
    }

    #[test]
    fn points_carry_the_study_and_the_model_is_made_once() {
        let study = tiny();
        assert_eq!(Study::of(&study.point("x")).unwrap(), study);
        let (a, b) = (study.pretrained().unwrap(), study.pretrained().unwrap());
        assert!(Arc::ptr_eq(&a, &b));
        let other = Study { pretraining_steps: 1, ..study }.pretrained().unwrap();
        assert_ne!(other.embedding, a.embedding);
    }

    #[test]
    fn accuracies_have_all_parts_and_a_run_is_reproducible() {
        let study = tiny();
        let base = study.pretrained().unwrap();
        let run = || {
            let mut trainer = study.trainer(&base, MethodParams::named(MethodName::Paca), 1e-3, 3).unwrap();
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
        assert_eq!(found.retained.iter().map(|r| r.0.as_str()).collect::<Vec<_>>(), ["lists", "facts"]);
        assert!(
            (found.retained_tokens() - (found.retained[0].1.tokens + found.retained[1].1.tokens) / 2.0).abs() < 1e-15
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
