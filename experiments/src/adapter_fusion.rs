//! Claim (\[S2FT\], its table of fused adapters): two tasks' adapters added to one another lose
//! less where they are slices on different channels (-2.6 and -4.3 points) than where they are
//! low-rank (-3.3, -5.6), and more where the slices overlap (-4.6, -7.4).
//!
//! Measured: three pretrained models of ours (`harness::study`) learn two tasks that pretraining
//! lacks, sorting lists and associative recall, as separate adapters of down: LoRA of rank 8, S2FT
//! with as many numbers on the same 30 of 176 channels, and on 30 others. Every adapter is trained
//! to the same training loss, at the rate that reaches it in the fewest steps on the *other* bases.
//! The two are then added, or averaged. Intervals are over bases.
//!
//! Refuted if slices on different channels lost separably more than LoRA, or overlapping ones
//! separably less than those on different channels.
//!
//! `cargo run --release --bin adapter_fusion [-- --profile full]`; half a minute after pretraining;
//! in full about 5 minutes on one core.

use crate::harness::over_bases::{
    at_best_rate, difference, interval, not_bracketed, over_bases, word,
};
use crate::harness::study::{Study, on_own_threads};
use crate::harness::{Experiment, Point, Profile, interrupted};
use peft_limits::adapters::lora::LoraSpec;
use peft_limits::adapters::selection::{ColumnRule, Order, Score};
use peft_limits::cost::Cost;
use peft_limits::model::s2ft::{S2ftSpec, Scope};
use peft_limits::model::update::ModelUpdate;
use peft_limits::model::{
    AdapterPlan, Calibration, MethodSpec, Model, Projection, ProjectionStatistics, StepOptions,
};
use peft_limits::report::{Axis, BarChart, BarSeries, Figure, NamedFigure, Row, Table};
use peft_limits::streams::generator;
use peft_limits::train::data::Encoder;
use peft_limits::train::evaluate_mixed::evaluate_mixed;
use peft_limits::train::optimizer::{OptimizerParams, clip_factor, update_model};
use peft_limits::train::tasks::mixture::Part;
use peft_limits::train::tasks::{Mixture, Split, TaskParams, lists, recall};
use peft_limits::train::tokenizer::Tokenizer;
use peft_limits::{Error, Result};
use rand::seq::SliceRandom;
use std::collections::BTreeMap;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "adapter_fusion",
    title: "Two adapters in one: slices apart, slices that overlap, LoRA",
    claim: "Fused slices on different channels lose less than fused LoRA adapters, overlapping \
            slices more (S2FT).",
    refuted_by: "slices on different channels losing separably more than LoRA, or overlapping ones \
                 less than those apart",
    doubt: "Two artificial tasks that adapters of down learn in part; their prompts differ from \
            the first letter on, and adapters of tasks that look alike may disturb each other \
            more.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

const SEEDS: u64 = 5;
/// Bases of the full profile.
const BASES: u64 = 3;
pub(crate) const APART: &str = "s2ft, different channels";
pub(crate) const SAME: &str = "s2ft, the same channels";
pub(crate) const LORA: &str = "lora";
/// Methods with the paper's losses of points when fused, commonsense and arithmetic.
const METHODS: [(&str, [f64; 2]); 3] =
    [(APART, [-2.6, -4.3]), (SAME, [-4.6, -7.4]), (LORA, [-3.3, -5.6])];
/// LoRA's rank on down and the channels with as many numbers: 8 (64 + 176) = 30 x 64.
const RANK: usize = 8;
const CHANNELS: usize = 30;
/// Mean training loss of the last [`WINDOW`] steps at which an adapter is done, by task, nats: what
/// every method reaches.
const TASKS: [(&str, f64); 2] = [("sort", 0.8), ("recall", 1.65)];
const WINDOW: usize = 10;
const BATCH: usize = 24;
const LENGTH: usize = 96;
const FUSED: [(&str, f64); 2] = [("sum", 1.0), ("mean", 0.5)];

/// Rates that are tried: a slice wants a larger step than factors whose product moves the weight.
fn rates(method: &str) -> [f64; 3] {
    if method == LORA { [5e-3, 1e-2, 2e-2] } else { [4e-2, 8e-2, 0.16] }
}

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let study =
        profile.pick(Study { steps: 200, ..Study::quick() }, Study { steps: 300, ..Study::full() });
    let mut points = Vec::new();
    for seed in seed..seed + profile.pick(SEEDS, BASES) {
        for (method, _) in METHODS {
            let rates = rates(method);
            for lr in profile.pick(&rates[1..2], &rates[..]) {
                let point = study.seeded(format!("{method} at {lr}, seed {seed}"), profile, seed);
                points.push(point.with("method", method).with("lr", *lr));
            }
        }
    }
    points
}

fn task(index: usize) -> Part {
    let task = match index {
        0 => TaskParams::Lists(lists::ListsParams {
            length: 6,
            operations: vec![lists::Operation::Sort],
        }),
        _ => TaskParams::Recall(recall::RecallParams { pairs: 3 }),
    };
    Part { weight: 1.0, task }
}

/// An adapter ready to train: LoRA, or the given channels of down in each layer.
fn adapted(base: &Model<f32>, channels: Option<&[Vec<usize>]>, seed: u64) -> Result<Model<f32>> {
    let mut model = base.clone();
    let mut rng = generator(seed, "init/adapter", 0);
    let Some(channels) = channels else {
        let spec = MethodSpec::Lora(LoraSpec {
            rank: RANK,
            alpha: 2.0 * RANK as f64,
            rank_stabilized: false,
        });
        model.attach(&AdapterPlan::everywhere(&[Projection::Down], spec), &mut rng)?;
        return Ok(model);
    };
    let width = base.config.intermediate_size;
    // A selection takes the largest scores: one for the channels that are given, zero for the
    // others.
    let layers = channels.iter().map(|given| {
        let mut input = vec![0.0; width];
        given.iter().for_each(|&channel| input[channel] = 1.0);
        let scores =
            ProjectionStatistics { input, gradient_rows: vec![], gradient_columns: vec![] };
        BTreeMap::from([(Projection::Down, scores)])
    });
    let mut spec = S2ftSpec {
        ratios: [0.0; 7],
        rule: ColumnRule { score: Score::Activation, order: Order::Largest },
        scope: Scope::EachLayer,
    };
    spec.set_ratio(Projection::Down, CHANNELS as f64 / width as f64)?;
    model.attach_s2ft(&spec, Some(&Calibration { layers: layers.collect() }), &mut rng)?;
    Ok(model)
}

/// The first and the next [`CHANNELS`] channels of a random order in each layer.
fn drawn_channels(base: &Model<f32>, seed: u64) -> [Vec<Vec<usize>>; 2] {
    let mut rng = generator(seed, "adapter_fusion/channels", 0);
    let mut parts = [Vec::new(), Vec::new()];
    for _ in &base.layers {
        let mut order: Vec<usize> = (0..base.config.intermediate_size).collect();
        order.shuffle(&mut rng);
        for (part, chosen) in parts.iter_mut().zip(order.chunks(CHANNELS)) {
            part.push(chosen.to_vec());
        }
    }
    parts
}

/// Trains until the loss is down to `target` or the steps are used up; the adapter and the steps
/// taken.
fn trained(
    mut model: Model<f32>,
    part: &Part,
    lr: f64,
    seed: u64,
    steps: u64,
    target: f64,
) -> Result<(ModelUpdate<f32>, u64, f64)> {
    let data = Mixture::open(std::slice::from_ref(part))?;
    let tokenizer = Tokenizer::bytes();
    let encoder = Encoder { tokenizer: &tokenizer, length: LENGTH, truncate: false };
    let mut optimizer = OptimizerParams { lr, clip: 1.0, ..OptimizerParams::default() }.check()?;
    let (mut gradients, mut cost) = (model.zero_gradients(), Cost::default());
    let mut losses: Vec<f64> = Vec::new();
    let recent = |losses: &[f64]| {
        let last = &losses[losses.len().saturating_sub(WINDOW)..];
        last.iter().sum::<f64>() / last.len() as f64
    };
    for step in 0..steps {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        let batch = encoder.draw(&data, seed, Split::Train, step * BATCH as u64, BATCH, None)?;
        gradients.fill_zero();
        losses.push(
            model
                .loss_and_gradients(&batch, &StepOptions::default(), &mut gradients, &mut cost)?
                .loss,
        );
        let scale = clip_factor(gradients.norm(), 1.0);
        let warm = ((step + 1) as f64 / 10.0).min(1.0);
        update_model(&mut optimizer, &mut model, &gradients, lr * warm, scale, |_| ())?;
        if losses.len() >= WINDOW && recent(&losses) <= target {
            break;
        }
    }
    Ok((ModelUpdate::of_adapters(&model)?, losses.len() as u64, recent(&losses)))
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let study = Study::of(point)?;
    let base = study.base_of(point)?;
    let (method, seed, lr) = (point.text("method")?, point.u64("seed")?, point.f64("lr")?);
    on_own_threads(1, || fuse(&base, &study, method, seed, lr))
}

fn fuse(base: &Model<f32>, study: &Study, method: &str, seed: u64, lr: f64) -> Result<Vec<Row>> {
    let [first, next] = drawn_channels(base, seed);
    let channels = match method {
        APART => [Some(&first[..]), Some(&next[..])],
        SAME => [Some(&first[..]), Some(&first[..])],
        _ => [None, None],
    };
    let mut adapters = Vec::new();
    for (i, channels) in channels.into_iter().enumerate() {
        let start = adapted(base, channels, seed + 1000 * i as u64)?;
        adapters.push(trained(start, &task(i), lr, seed, study.steps, TASKS[i].1)?);
    }
    let tokenizer = Tokenizer::bytes();
    let encoder = Encoder { tokenizer: &tokenizer, length: LENGTH, truncate: false };
    let (a, b) = (&adapters[0].0, &adapters[1].0);
    let fused = FUSED.map(|(_, w)| ModelUpdate::fuse(&[(w, a), (w, b)]));
    let [sum, mean] = fused;
    let (sum, mean) = (sum?, mean?);
    let overlap = (a.elements() + b.elements()) as f64 / sum.elements() as f64 - 1.0;
    let mut rows = Vec::new();
    for (i, (name, target)) in TASKS.into_iter().enumerate() {
        let opened = task(i).task.open()?;
        let scores = evaluate_mixed(
            base,
            &[a, b, &sum, &mean],
            &encoder,
            opened.as_ref(),
            (0, Split::Test),
            study.rows,
            64,
        )?;
        let (plain, own, (_, steps, loss)) = (scores[0], scores[1 + i], &adapters[i]);
        for ((how, _), fused) in FUSED.into_iter().zip(&scores[3..]) {
            rows.push(
                Row::new()
                    .with("task", name)
                    .with("fused by", how)
                    .with("numbers", a.elements())
                    .with("overlap", overlap)
                    .with("steps taken", *steps)
                    .with("training loss (nats)", *loss)
                    .with("reached", u64::from(*loss <= target))
                    .with("loss, base (nats)", plain.loss)
                    .with("loss, own adapter (nats)", own.loss)
                    .with("loss, other adapter (nats)", scores[2 - i].loss)
                    .with("loss, fused (nats)", fused.loss)
                    .with("tokens right, base", plain.tokens)
                    .with("tokens right, own adapter", own.tokens)
                    .with("tokens right, fused", fused.tokens)
                    .with(ADDED, fused.loss - own.loss)
                    .with(LOST, 100.0 * (fused.tokens - own.tokens)),
            );
        }
    }
    Ok(rows)
}

const ADDED: &str = "loss added by fusing (nats)";
pub(crate) const LOST: &str = "points changed by fusing";

/// The runs of a method at the rate that reaches the losses in the fewest steps on the other bases.
fn runs(table: &Table, method: &str, how: &str) -> Result<Table> {
    let rows = table.filter_eq("method", method).filter_eq("fused by", how);
    at_best_rate(&rows, "steps taken")
}

/// Mean of a column over tasks, with its interval over bases.
fn mean(table: &Table, method: &str, how: &str, column: &str) -> Result<(f64, f64, f64)> {
    Ok(interval(&over_bases(&runs(table, method, how)?, column)?, 0.95))
}

/// Difference of two methods in points changed, mean of both tasks.
pub(crate) fn compared(
    table: &Table,
    a: &str,
    b: &str,
    how: &str,
    column: &str,
) -> Result<(f64, f64, f64)> {
    Ok(interval(&difference(&runs(table, a, how)?, &runs(table, b, how)?, column)?, 0.95))
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let groups = METHODS.map(|m| m.0.to_string());
    let mut panels = Vec::new();
    let mut series = Vec::new();
    for (how, _) in FUSED {
        let values =
            METHODS.iter().map(|(m, _)| mean(table, m, how, LOST)).collect::<Result<Vec<_>>>()?;
        series.push(BarSeries::new(format!("fused by {how}"), values));
    }
    for (i, paper) in ["paper, commonsense", "paper, arithmetic"].into_iter().enumerate() {
        series.push(BarSeries::new(paper, METHODS.map(|m| m.1[i])));
    }
    panels.push(BarChart {
        title: "points changed by fusing".into(),
        group_label: "adapters".into(),
        groups: groups.to_vec(),
        y: Axis::linear("points"),
        series,
        ..BarChart::default()
    });
    let mut series = Vec::new();
    for (name, column, how) in [
        ("base", "loss, base (nats)", "sum"),
        ("own adapter", "loss, own adapter (nats)", "sum"),
        ("the other task's", "loss, other adapter (nats)", "sum"),
        ("fused by sum", "loss, fused (nats)", "sum"),
        ("fused by mean", "loss, fused (nats)", "mean"),
    ] {
        let values =
            METHODS.iter().map(|(m, _)| mean(table, m, how, column)).collect::<Result<Vec<_>>>()?;
        series.push(BarSeries::new(name, values));
    }
    panels.push(BarChart {
        title: "losses themselves".into(),
        group_label: "adapters".into(),
        groups: groups.to_vec(),
        y: Axis::linear("nats a token"),
        series,
        ..BarChart::default()
    });
    let caption = "Adapters of down with 1,920 numbers a layer, each trained to the same training \
                   loss at its fastest rate, chosen on other bases. Means over both tasks and over \
                   bases, with 95% intervals. The paper's values are on its own tasks.";
    let mut figure = Figure::new("Two tasks' adapters in one", panels).caption(caption);
    figure.panel_size = (640.0, 400.0);
    figure.share_y = false;
    Ok(vec![NamedFigure::new("adapter_fusion", figure)])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (how, _) in FUSED {
        let mut parts = Vec::new();
        for (method, paper) in METHODS {
            let (lost, added) = (mean(table, method, how, LOST)?, mean(table, method, how, ADDED)?);
            let own = mean(table, method, how, "tokens right, own adapter")?.0;
            parts.push(format!(
                "{method} {:+.1} ({:+.1} to {:+.1}) of {:.1}, loss {:+.2} nats (paper {:+.1} and \
                 {:+.1})",
                lost.0,
                lost.1,
                lost.2,
                100.0 * own,
                added.0,
                paper[0],
                paper[1]
            ));
        }
        lines.push(format!("Points changed by fusing, {how}: {}.", parts.join("; ")));
        for (a, b) in [(APART, LORA), (SAME, LORA), (APART, SAME)] {
            let d = compared(table, a, b, how, LOST)?;
            lines.push(format!(
                "{how}: {a} - {b} {:+.1} points ({:+.1} to {:+.1}): {}.",
                d.0,
                d.1,
                d.2,
                word(d)
            ));
        }
    }
    let mut parts = Vec::new();
    for (method, _) in METHODS {
        let rows = runs(table, method, "sum")?;
        let of = |column: &str| Ok::<_, Error>(over_bases(&rows, column)?.mean);
        let rate = if not_bracketed(&table.filter_eq("method", method), "steps taken")?.is_some() {
            ", at the end of those tried"
        } else {
            ""
        };
        parts.push(format!(
            "{method} {:.0} steps, training loss {:.2}, {:.0}% of adapters at the target{rate}",
            of("steps taken")?,
            of("training loss (nats)")?,
            100.0 * of("reached")?
        ));
    }
    lines.push(format!("At the rate that is fastest on other bases: {}.", parts.join("; ")));
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let overlap = |method: &str, wanted: f64| -> Result<bool> {
        Ok(table
            .filter_eq("method", method)
            .floats("overlap")?
            .iter()
            .all(|x| (x - wanted).abs() < 1e-9))
    };
    Ok(vec![
        (
            "channels are the same, or different, as the method says".into(),
            overlap(APART, 0.0)? && overlap(SAME, 1.0)?,
        ),
        ("every method trains as many numbers".into(), table.distinct("numbers")?.len() == 1),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fused_run_has_the_channels_that_were_asked_for() {
        let study = Study { pretraining_steps: 2, steps: 12, rows: 4 };
        let base = study.pretrained(0).unwrap();
        let mut table = Table::default();
        for (method, _) in METHODS {
            for row in fuse(&base, &study, method, 0, 1e-2).unwrap() {
                let mut whole =
                    Row::new().with("method", method).with("base", "ours 0").with("lr", 1e-2);
                row.cells().iter().for_each(|(name, cell)| whole.set(name.clone(), cell.clone()));
                table.push(&whole);
            }
        }
        assert!(checks(&table).unwrap().iter().all(|c| c.1), "{:?}", checks(&table).unwrap());
        let [first, next] = drawn_channels(&base, 0);
        assert!(first.iter().zip(&next).all(|(a, b)| a.len() == CHANNELS
            && b.len() == CHANNELS
            && a.iter().all(|c| !b.contains(c))));
    }

    #[test]
    fn made_up_data_turn_the_findings() {
        let made_up = |apart: f64, lora: f64| {
            let mut table = Table::default();
            for base in 0..4 {
                for (method, lost) in [(APART, apart), (SAME, -6.0), (LORA, lora)] {
                    for (how, _) in FUSED {
                        let row = Row::new()
                            .with("base", format!("ours {base}"))
                            .with("method", method)
                            .with("fused by", how);
                        table.push(
                            &row.with("lr", 1e-2)
                                .with("steps taken", 9u64)
                                .with(LOST, lost + 0.1 * f64::from(base)),
                        );
                    }
                }
            }
            table
        };
        let says = |table: &Table| word(compared(table, APART, LORA, "sum", LOST).unwrap());
        assert_eq!((says(&made_up(-2.0, -4.0)), says(&made_up(-4.0, -2.0))), ("more", "less"));
    }
}
