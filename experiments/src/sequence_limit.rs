//! Claim (\[PaCA\], sequence length and throughput): in the same memory PaCA trains on longer
//! sequences than LoRA (23% longer there), and at the largest batch that fits it has more
//! throughput (16% there).
//!
//! Measured: the longest sequence whose predicted step fits a limit, checked by running a step of
//! that length and reading its bytes off the live objects; tokens per second against the batch.
//! Predicted only: LLaMA-2-7B in half precision in 80 GiB, the paper's case.
//!
//! Refuted if PaCA's longest sequence were not longer than LoRA's at the same rank.
//!
//! `cargo run --release --bin sequence_limit [-- --profile full]`; about 20 seconds, in full five
//! minutes. Timed: run it alone.

use crate::harness::study::PAPERS;
use crate::harness::timed_step::TimedStep;
use crate::harness::{Experiment, Point, Profile};
use peft_limits::Result;
use peft_limits::model::ModelConfig;
use peft_limits::report::{
    Axis, BarChart, BarSeries, Figure, LineChart, NamedFigure, Panel, Row, Series, Summary, Table,
};
use peft_limits::train::memory::{StepShape, longest, predict};
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::preset::{llama_2_7b, preset};

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "sequence_limit",
    title: "Longest sequence in a given memory, and throughput against batch",
    claim: "In the same memory PaCA trains on longer sequences than LoRA of the same rank, and its \
            throughput at a given batch is higher (PaCA).",
    refuted_by: "a longest sequence under PaCA not longer than under LoRA of the same rank",
    doubt: "The measured limits are of models of a few million numbers; the 7B model's are \
            predicted and assume half precision throughout, without fragmentation.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(checks),
};

const RANK: usize = 8;
const LLAMA: &str = "llama-2-7b";
const MIB: f64 = 1_048_576.0;
/// A step at the longest length may hold this share more than the limit: the prediction's own
/// error.
const SLACK: f64 = 0.02;

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let mut points = Vec::new();
    let model = profile.pick("nano", "micro");
    for (model, mebibytes) in [(model, profile.pick(28.0, 128.0)), (LLAMA, 80.0 * 1024.0)] {
        for checkpointing in [false, true] {
            let point = Point::new(format!("limit of {model}, checkpointing {checkpointing}"))
                .with("kind", "limit");
            let point = point
                .with("model", model)
                .with("checkpointing", checkpointing)
                .with("limit (MiB)", mebibytes);
            points.push(point.with("seed", seed));
        }
    }
    let (length, repeats) = profile.pick((64u64, 8u64), (256, 12));
    for batch in profile.pick(&[1u64, 2, 4, 8, 16][..], &[1, 2, 4, 8, 16, 32]) {
        let point =
            Point::new(format!("throughput of {model}, batch {batch}")).with("kind", "throughput");
        let point = point.with("model", model).with("batch", *batch).with("length", length);
        points.push(point.with("repeats", repeats).with("seed", seed));
    }
    points
}

fn method(name: MethodName) -> MethodParams {
    // S2FT with the same number in every layer, so that the prediction is exact.
    MethodParams { rank: RANK, each_layer: name == MethodName::S2ft, ..MethodParams::named(name) }
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let name = point.text("model")?;
    let seed = point.u64("seed")?;
    if point.text("kind")? == "throughput" {
        let (batch, length) = (point.usize("batch")?, point.usize("length")?);
        let shape = StepShape { batch, length, bytes: 4, state: 2, checkpointing: false };
        return throughput(&preset(name)?, &shape, point.usize("repeats")?, seed);
    }
    let limit = (point.f64("limit (MiB)")? * MIB) as usize;
    let real = name != LLAMA;
    let config = if real { preset(name)? } else { llama_2_7b() };
    let checkpointing = point.bool("checkpointing")?;
    let shape =
        StepShape { batch: 1, length: 1, bytes: if real { 4 } else { 2 }, state: 2, checkpointing };
    let mut rows = Vec::new();
    for name in PAPERS {
        let found = longest(&config, &method(name), &shape, limit)?;
        let mut row =
            Row::new().with("method", name.name()).with("longest (tokens)", found.unwrap_or(0));
        if let (Some(length), true) = (found, real) {
            let shape = StepShape { length, ..shape.clone() };
            let mut step = TimedStep::new(&config, &method(name), &shape, seed)?;
            (0..3).try_for_each(|_| step.run().map(drop))?;
            row.set("measured (MiB)", step.memory()?.total() as f64 / MIB);
            row.set(
                "predicted (MiB)",
                predict(&config, &method(name), &shape)?.total() as f64 / MIB,
            );
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Median tokens per second of every method, the methods interleaved.
fn throughput(
    config: &ModelConfig,
    shape: &StepShape,
    repeats: usize,
    seed: u64,
) -> Result<Vec<Row>> {
    let enter = |name| {
        Ok((name, TimedStep::new(config, &method(name), shape, seed)?, Vec::with_capacity(repeats)))
    };
    let mut runs = PAPERS.into_iter().map(enter).collect::<Result<Vec<_>>>()?;
    for repeat in 0..repeats + 2 {
        for (_, step, rates) in &mut runs {
            let elapsed = step.run()?.total();
            if repeat >= 2 {
                rates.push((shape.batch * shape.length) as f64 / elapsed);
            }
        }
    }
    let row = |(name, _, rates): &(MethodName, TimedStep, Vec<f64>)| {
        let s = Summary::of(rates);
        let row = Row::new().with("method", name.name()).with("tokens per second", s.median);
        row.with("lower quartile (tokens per second)", s.lower_quartile)
            .with("upper quartile (tokens per second)", s.upper_quartile)
    };
    Ok(runs.iter().map(row).collect())
}

fn names() -> impl Iterator<Item = &'static str> {
    PAPERS.into_iter().map(MethodName::name)
}

fn longest_of(rows: &Table, method: &str) -> f64 {
    rows.filter_eq("method", method).rows().next().map_or(f64::NAN, |r| r.f64("longest (tokens)"))
}

/// Limit rows by model, the predicted model last, without and with checkpointing.
fn limits(table: &Table) -> Result<Vec<(String, f64, [Table; 2])>> {
    let groups = table.filter_eq("kind", "limit").group_by(&["model", "limit (MiB)"])?;
    let split =
        |t: &Table| [false, true].map(|c| t.filter(|r| r.text("checkpointing") == c.to_string()));
    let mut all: Vec<_> = groups
        .into_iter()
        .map(|(key, t)| (key[0].to_field(), key[1].as_f64().unwrap_or(f64::NAN), split(&t)))
        .collect();
    all.sort_by_key(|(name, ..)| name == LLAMA);
    Ok(all)
}

/// Mebibytes as people say them.
fn size(mebibytes: f64) -> String {
    if mebibytes < 1024.0 {
        format!("{mebibytes} MiB")
    } else {
        format!("{} GiB", mebibytes / 1024.0)
    }
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let mut panels: Vec<Panel> = Vec::new();
    for (name, limit, rows) in limits(table)? {
        let large = name == LLAMA;
        let unit = if large { 1e-3 } else { 1.0 };
        let of = |rows: &Table| names().map(|m| unit * longest_of(rows, m)).collect::<Vec<_>>();
        let kind = if large { "predicted" } else { "run at that length" };
        let chart = BarChart {
            title: format!("{name} in {} ({kind})", size(limit)),
            groups: names().map(String::from).collect(),
            y: Axis::log10(if large {
                "longest sequence (thousand tokens)"
            } else {
                "longest sequence (tokens)"
            }),
            series: vec![
                BarSeries::new("activations kept", of(&rows[0])),
                BarSeries::new("activation checkpointing", of(&rows[1])),
            ],
            values: true,
            ..BarChart::default()
        };
        panels.push(chart.into());
    }
    let mut limits = Figure::new("Longest sequence in a given memory", panels).columns(1);
    limits.panel_size = (924.0, 400.0);
    let limits = limits.caption(format!(
        "Batch 1, rank {RANK} on all projections, AdamW; {LLAMA} in half precision throughout (its \
         sizes only, nothing run). No bar: the weights, gradients and optimizer state alone exceed \
         the limit."
    ));

    let runs = table.filter_eq("kind", "throughput");
    let mut series = Vec::new();
    for method in names() {
        let rows = runs.filter_eq("method", method).sorted_by("batch")?;
        let points = rows.rows().map(|r| (r.f64("batch"), r.f64("tokens per second")));
        series.push(Series::new(method, points.collect::<Vec<_>>()));
    }
    let length = Summary::of(&runs.floats("length")?).max;
    let chart = LineChart {
        x: Axis::log2("batch (rows)"),
        y: Axis::linear("tokens per second"),
        series,
        ..LineChart::default()
    };
    let caption = format!(
        "Rows of {length} tokens; medians of interleaved repeats (quartiles in the table)."
    );
    let throughput = Figure::new("Throughput of a training step", [chart]).caption(caption);
    Ok(vec![
        NamedFigure::new("sequence_limit", limits),
        NamedFigure::new("sequence_limit_throughput", throughput),
    ])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (name, limit, rows) in limits(table)? {
        for (rows, how) in rows.iter().zip(["activations kept", "checkpointing"]) {
            let lora = longest_of(rows, "lora");
            let of = |m| match longest_of(rows, m) {
                x if x > 0.0 => format!("{m} {x} ({:+.0}%)", 100.0 * (x / lora - 1.0)),
                _ => format!("{m} none"),
            };
            let all: Vec<String> = names().map(of).collect();
            lines.push(format!(
                "{name} in {}, {how}: {} (against LoRA).",
                size(limit),
                all.join(", ")
            ));
        }
    }
    let runs = table.filter_eq("kind", "throughput");
    for (batch, rows) in runs.group_by(&["batch"])? {
        let rate = |m: &str| {
            rows.filter_eq("method", m)
                .rows()
                .next()
                .map_or(f64::NAN, |r| r.f64("tokens per second"))
        };
        let of = |m: &str| format!("{m} {:.2}", rate(m) / rate("lora"));
        let all: Vec<String> = names().map(of).collect();
        lines.push(format!(
            "Throughput at batch {} over LoRA's: {}.",
            batch[0].to_field(),
            all.join(", ")
        ));
    }
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let (mut longer, mut fits, mut run) = (true, true, 0);
    for (_, limit, rows) in limits(table)? {
        for rows in rows {
            longer &= longest_of(&rows, "paca") > longest_of(&rows, "lora");
            for held in rows.rows().map(|r| r.f64("measured (MiB)")).filter(|m| m.is_finite()) {
                fits &= (held / limit - 1.0).abs() <= SLACK;
                run += 1;
            }
        }
    }
    Ok(vec![
        ("PaCA's longest sequence is longer than LoRA's under every limit".into(), longer),
        (
            "a step at the predicted longest length holds the limit within 2%".into(),
            fits && run > 0,
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PaCA's longest sequence over LoRA's, and the bytes held at that length over the limit.
    fn made_up(longer: f64, held: f64) -> Vec<bool> {
        let mut table = Table::default();
        for (model, limit) in [("nano", 28.0), (LLAMA, 81920.0)] {
            for checkpointing in [false, true] {
                for (method, tokens) in [("lora", 1000.0), ("paca", 1000.0 * longer)] {
                    let row = Row::new()
                        .with("kind", "limit")
                        .with("model", model)
                        .with("limit (MiB)", limit);
                    let row = row.with("checkpointing", checkpointing).with("method", method);
                    let row = row.with("longest (tokens)", tokens);
                    table.push(&if model == LLAMA {
                        row
                    } else {
                        row.with("measured (MiB)", held * limit)
                    });
                }
            }
        }
        checks(&table).unwrap().into_iter().map(|c| c.1).collect()
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        assert_eq!(made_up(1.2, 0.99), [true, true]);
        assert_eq!(made_up(1.0, 0.99), [false, true]);
        assert_eq!(made_up(1.2, 1.03), [true, false], "does not fit");
        assert_eq!(made_up(1.2, 0.9), [true, false], "could be longer");
        assert_eq!(made_up(1.2, f64::NAN), [true, false], "never run");
    }
}
