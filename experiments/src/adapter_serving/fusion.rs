//! Two adapters trained apart, then summed or averaged.

use super::{CHANNELS, FUSED, RANK, sizes};
use crate::harness::Point;
use peft_limits::model::update::ModelUpdate;
use peft_limits::model::{AdapterPlan, MethodSpec, Model, Projection};
use peft_limits::report::Row;
use peft_limits::streams::generator;
use peft_limits::train::config::{ModelSource, RunParams, TrainConfig};
use peft_limits::train::data::Encoder;
use peft_limits::train::evaluate_mixed::evaluate_mixed;
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::optimizer::OptimizerParams;
use peft_limits::train::tasks::mixture::Part;
use peft_limits::train::tasks::{Split, TaskParams, lists, recall};
use peft_limits::train::tokenizer::Tokenizer;
use peft_limits::train::trainer::{StepOutcome, Trainer};
use peft_limits::{Error, Result};
use std::sync::OnceLock;

fn list_task(operations: &[lists::Operation]) -> Part {
    Part { weight: 1.0, task: TaskParams::Lists(lists::ListsParams { length: 5, operations: operations.to_vec() }) }
}

/// The tasks that the adapters learn.
fn tasks() -> [Part; 2] {
    use lists::Operation::{Last, Max, Min, Reverse};
    [list_task(&[Max, Min]), list_task(&[Last, Reverse])]
}

fn run_steps(config: TrainConfig, model: Model<f32>) -> Result<Model<f32>> {
    let steps = config.train.steps;
    let mut trainer = Trainer::with_model(config, model)?;
    for _ in 0..steps {
        if let StepOutcome::NonFinite { tensor } = trainer.step()? {
            return Err(Error::invalid(tensor, "NaN or infinite", "training must stay finite"));
        }
    }
    Ok(trainer.model)
}

fn config(seed: u64, steps: u64, method: MethodParams, lr: f64, data: Vec<Part>) -> TrainConfig {
    let adapted = method.name != MethodName::Full;
    TrainConfig {
        seed,
        // The model is handed over in memory; its tokenizer is the byte one, which a folder without a tokenizer has.
        model: if adapted { ModelSource::Path("in-memory".into()) } else { ModelSource::default() },
        method,
        optimizer: OptimizerParams { lr, ..OptimizerParams::default() },
        train: RunParams { steps, batch: 32, length: 64, eval_rows: 0, ..RunParams::default() },
        data,
        ..TrainConfig::default()
    }
}

/// One base for all seeds: what varies is the adapters.
fn pretrained(steps: u64) -> Result<Model<f32>> {
    static BASE: OnceLock<Model<f32>> = OnceLock::new();
    if let Some(base) = BASE.get() {
        return Ok(base.clone());
    }
    use lists::Operation::{First, Length, Sort};
    let recall = Part { weight: 1.0, task: TaskParams::Recall(recall::RecallParams { pairs: 3 }) };
    let data = vec![list_task(&[First, Length, Sort]), recall];
    let model = Model::random(sizes(64, 3, 16), &mut generator(0, "init/model", 0))?;
    let mut model = run_steps(config(0, steps, MethodParams::default(), 3e-3, data), model)?;
    model.trainable = Default::default();
    model.attach(&AdapterPlan::everywhere(&Projection::ALL, MethodSpec::Frozen), &mut generator(0, "none", 0))?;
    Ok(BASE.get_or_init(|| model).clone())
}

pub(super) fn fusion(point: &Point) -> Result<Vec<Row>> {
    let (seed, steps) = (point.u64("seed")?, point.u64("steps")?);
    let base = pretrained(point.u64("base steps")?)?;
    let tasks = tasks();
    let opened = tasks.iter().map(|part| part.task.open()).collect::<Result<Vec<_>>>()?;
    let tokenizer = Tokenizer::bytes();
    let encoder = Encoder { tokenizer: &tokenizer, length: 64, truncate: false };
    let s2ft = MethodParams {
        ratios: Some([("down_proj".to_string(), CHANNELS)].into()),
        each_layer: true,
        ..MethodParams::named(MethodName::S2ft)
    };
    let lora =
        MethodParams { rank: RANK, targets: Some(vec!["down_proj".into()]), ..MethodParams::named(MethodName::Lora) };
    // The seed chooses S2FT's channels (and the rows): the second adapter's decides whether they are the same.
    let methods = [(FUSED[0], s2ft.clone(), 1000), (FUSED[1], s2ft, 0), (FUSED[2], lora, 1000)];
    let mut rows = Vec::new();
    for (method, params, offset) in methods {
        let train = |i: usize| {
            let data = vec![tasks[i].clone()];
            let trained = run_steps(config(seed + offset * i as u64, steps, params.clone(), 3e-3, data), base.clone())?;
            ModelUpdate::of_adapters(&trained)
        };
        let (a, b) = (train(0)?, train(1)?);
        let sum = ModelUpdate::fuse(&[(1.0, &a), (1.0, &b)])?;
        let mean = ModelUpdate::fuse(&[(0.5, &a), (0.5, &b)])?;
        let overlap = (a.elements() + b.elements()) as f64 / sum.elements() as f64 - 1.0;
        for (i, task) in opened.iter().enumerate() {
            let given = [&a, &b, &sum, &mean];
            let scores = evaluate_mixed(&base, &given, &encoder, task.as_ref(), (0, Split::Test), 256, 64)?;
            let (plain, own) = (scores[0], scores[1 + i]);
            for (fused, s) in [("sum", scores[3]), ("mean", scores[4])] {
                rows.push(
                    Row::new()
                        .with("method", method)
                        .with("numbers", a.elements())
                        .with("task", if i == 0 { "max, min" } else { "last, reverse" })
                        .with("fused by", fused)
                        .with("overlap", overlap)
                        .with("loss, base (nats)", plain.loss)
                        .with("loss, own adapter (nats)", own.loss)
                        .with("loss, other adapter (nats)", scores[2 - i].loss)
                        .with("loss, fused (nats)", s.loss)
                        .with("tokens right, base", plain.tokens)
                        .with("tokens right, own adapter", own.tokens)
                        .with("tokens right, fused", s.tokens)
                        .with("share of the gain kept", (plain.loss - s.loss) / (plain.loss - own.loss)),
                );
            }
        }
    }
    Ok(rows)
}
