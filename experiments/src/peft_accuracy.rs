//! Claim (\[PaCA\], tables of accuracy; \[S2FT\], table of commonsense and arithmetic): at an equal
//! number of trained numbers PaCA and S2FT reach LoRA's accuracy or better.
//!
//! Measured: small pretrained models learn one new task (`harness::study`) by every method at the
//! budget of LoRA with rank 4 (full fine-tuning trains everything), with five seeds; accuracy
//! in-domain, on longer lists, and on what it knew before. Methods are compared by paired
//! differences over bases (five pretrained models in full, three in quick); a pair counts as
//! separated if its interval excludes zero at 95% after Bonferroni's correction over all pairs of
//! methods. In full, each method's learning rate is the best by the in-domain loss on a base and
//! seeds that are not reported, of rates a factor of two apart; the sweep goes on until a smaller
//! and a larger rate are both worse.
//!
//! Refuted if PaCA or S2FT were separated below LoRA in-domain.
//!
//! `cargo run --release --bin peft_accuracy [-- --profile full]`; about a minute, of which a third
//! pretrains; in full about 12 minutes on one core.

use crate::harness::over_bases::{difference as paired, drawn, interval, over_bases};
use crate::harness::rates::{RateSweep, sweep_rates};
use crate::harness::study::{
    BUDGET_RANK, PAPERS, Study, TUNING_BASE, accuracies, on_own_threads, train,
};
use crate::harness::{Experiment, Point, Profile};
use peft_limits::model::Model;
use peft_limits::report::{
    Axis, BarChart, BarSeries, Cell, Figure, NamedFigure, Row, ScatterChart, ScatterGroup, Summary,
    Table,
};
use peft_limits::train::method::MethodName;
use peft_limits::{Error, Result};
use std::sync::{Mutex, PoisonError};

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "peft_accuracy",
    title: "Accuracy of the methods at equal trainable budget",
    claim: "At an equal number of trained numbers PaCA and S2FT are as accurate as LoRA or better \
            (PaCA, S2FT).",
    refuted_by: "PaCA or S2FT separated below LoRA in-domain",
    doubt: "One artificial task and models of 0.2 million parameters: the papers' comparisons are \
            on models ten thousand times larger.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

const SEEDS: u64 = 5;
const TUNING_SEEDS: u64 = 1;
/// Start of the columns with the losses of the sweep; a factor follows.
const TUNING: &str = "tuning loss at ";
const METRICS: [(&str, &str); 3] = [
    ("in-domain", "in-domain tokens"),
    ("shifted", "shifted tokens"),
    ("retained", "retained tokens"),
];

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let study = profile.pick(Study::quick(), Study::full());
    let mut points = Vec::new();
    // Seeds outside: points measured side by side then tune different methods and do not wait for
    // one another.
    for seed in seed..seed + SEEDS {
        let point = study.seeded(format!("before fine-tuning, seed {seed}"), profile, seed);
        points.push(point.with("method", "none").with("tuned", false));
        for name in PAPERS {
            let point = study
                .seeded(format!("{}, seed {seed}", name.name()), profile, seed)
                .with("method", name.name());
            points.push(point.with("tuned", profile.pick(false, true)));
        }
    }
    points
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let study = Study::of(point)?;
    let base = study.base_of(point)?;
    let name = point.text("method")?;
    if name == "none" {
        return Ok(vec![on_own_threads(1, || study.before(&base))?.row().with("trained", 0u64)]);
    }
    let name: MethodName = name.parse()?;
    let tuned = if point.bool("tuned")? { Some(tuning(&study, name)?) } else { None };
    let lr = tuned.as_ref().map_or(study.learning_rate(name), |t| t.best);
    let mut row = fine_tuned(&study, &base, name, lr, point.u64("seed")?)?.with("lr", lr);
    if let Some(tuned) = tuned {
        for (lr, loss) in tuned.tried {
            row.set(
                format!("{TUNING}{} of the study's lr (nats)", lr / study.learning_rate(name)),
                loss,
            );
        }
    }
    Ok(vec![row])
}

/// Accuracies of one run, and its trained numbers.
fn fine_tuned(
    study: &Study,
    base: &Model<f32>,
    name: MethodName,
    lr: f64,
    seed: u64,
) -> Result<Row> {
    on_own_threads(1, || {
        let mut trainer = study.trainer(base, study.method(name)?, lr, seed)?;
        train(&mut trainer, |_| Ok(()))?;
        let trained = trainer.model.trainable_elements();
        Ok(accuracies(&trainer)?.row().with("trained", trained))
    })
}

/// The sweep of a method by mean in-domain loss over the tuning seeds, on a base of its own, made
/// once in a process.
fn tuning(study: &Study, name: MethodName) -> Result<RateSweep> {
    static DONE: [Mutex<Option<RateSweep>>; PAPERS.len()] =
        [const { Mutex::new(None) }; PAPERS.len()];
    let at = PAPERS.iter().position(|&n| n == name).unwrap_or(0);
    // Held meanwhile: another point of the same method waits for the result.
    let mut done = DONE[at].lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(sweep) = done.as_ref() {
        return Ok(sweep.clone());
    }
    let base = study.pretrained(TUNING_BASE)?;
    let sweep = sweep_rates(study.learning_rate(name), |lr| {
        let mut mean = 0.0;
        for seed in 500..500 + TUNING_SEEDS {
            let loss = match fine_tuned(study, &base, name, lr, seed) {
                Ok(row) => {
                    row.get("in-domain loss (nats)").and_then(Cell::as_f64).unwrap_or(f64::NAN)
                }
                // A rate at which training breaks down is a bad rate.
                Err(Error::NonFinite { .. }) => f64::INFINITY,
                Err(error) => return Err(error),
            };
            mean += loss / TUNING_SEEDS as f64;
        }
        Ok(mean)
    })?;
    *done = Some(sweep.clone());
    Ok(sweep)
}

fn methods() -> impl Iterator<Item = &'static str> {
    PAPERS.into_iter().map(MethodName::name)
}

/// A method's values, one a run.
fn values(table: &Table, method: &str, column: &str) -> Result<Vec<f64>> {
    table.filter_eq("method", method).sorted_by("seed")?.floats(column)
}

/// Its mean with the 95% interval over bases.
fn mean(table: &Table, method: &str, column: &str) -> Result<(f64, f64, f64)> {
    Ok(drawn(&over_bases(&table.filter_eq("method", method), column)?))
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let groups: Vec<&str> = ["none"].into_iter().chain(methods()).collect();
    let mut series = Vec::new();
    for (name, column) in METRICS {
        let mut bars = Vec::new();
        for method in &groups {
            bars.push(mean(table, method, column)?);
        }
        series.push(BarSeries::new(name, bars));
    }
    let bars = BarChart {
        group_label: "method (none: before fine-tuning)".into(),
        groups: groups.iter().map(ToString::to_string).collect(),
        y: Axis::linear("share of answer tokens right").range(0.0, 1.0),
        series,
        ..BarChart::default()
    };
    let caption = format!(
        "Sorting lists learned at the budget of LoRA rank {BUDGET_RANK} (full: everything). \
         In-domain: up to 6 digits; shifted: 7 to 9; retained: the pretraining tasks. Bars: means \
         over pretrained models with 95% intervals."
    );
    let mut scatter = Vec::new();
    for (name, column) in &METRICS[1..] {
        let groups = methods().map(|method| {
            let (x, y) = (values(table, method, METRICS[0].1)?, values(table, method, column)?);
            Ok(ScatterGroup { name: method.into(), points: x.into_iter().zip(y).collect() })
        });
        scatter.push(ScatterChart {
            title: format!("{name} against in-domain"),
            x: Axis::linear("in-domain tokens right"),
            y: Axis::linear(format!("{name} tokens right")),
            groups: groups.collect::<Result<Vec<_>>>()?,
            front: None,
            references: Vec::new(),
        });
    }
    let trade =
        Figure::new("What is learned against what is kept", scatter).caption("One point per seed.");
    Ok(vec![
        NamedFigure::new(
            "peft_accuracy",
            Figure::new("Accuracy at equal trainable budget", [bars]).caption(caption),
        ),
        NamedFigure::new("peft_accuracy_tradeoff", trade),
    ])
}

/// Paired difference a - b over bases with its corrected interval.
fn difference(table: &Table, a: &str, b: &str, column: &str) -> Result<(f64, f64, f64)> {
    let pairs = PAPERS.len() * (PAPERS.len() - 1) / 2;
    let of = |method: &str| table.filter_eq("method", method);
    Ok(interval(&paired(&of(a), &of(b), column)?, 1.0 - 0.05 / pairs as f64))
}

/// Methods whose best learning rate is the smallest or the largest one tried; none without a sweep.
fn not_bracketed(table: &Table) -> Result<Vec<&'static str>> {
    let mut found = Vec::new();
    for method in methods() {
        let of = table.filter_eq("method", method);
        let mut tried = Vec::new();
        for column in of.columns() {
            let factor = column
                .strip_prefix(TUNING)
                .and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
            let loss = of.column(column)?.first().and_then(|cell| cell.as_f64());
            tried.extend(factor.zip(loss));
        }
        if !tried.is_empty() && !RateSweep::of(tried).bracketed {
            found.push(method);
        }
    }
    Ok(found)
}

/// What a method separated below LoRA says of the claim.
fn verdict(below: bool, open: bool) -> &'static str {
    match (below, open) {
        (true, true) => "refuted for the learning rates tried, which do not bracket the best",
        (true, false) => "refuted at this scale",
        (false, _) => "not refuted",
    }
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (metric, column) in METRICS {
        let before = mean(table, "none", column)?.0;
        let means = methods()
            .map(|m| Ok(format!("{m} {:.3}", mean(table, m, column)?.0)))
            .collect::<Result<Vec<_>>>()?;
        let mut separated = Vec::new();
        for (i, a) in methods().enumerate() {
            for b in methods().skip(i + 1) {
                let (_, low, high) = difference(table, a, b, column)?;
                if low > 0.0 {
                    separated.push(format!("{a} > {b}"));
                } else if high < 0.0 {
                    separated.push(format!("{b} > {a}"));
                }
            }
        }
        let pairs = if separated.is_empty() {
            "no pair of methods is separated over bases".to_string()
        } else {
            format!("separated: {}; all other pairs are not", separated.join(", "))
        };
        lines.push(format!("{metric} (before {before:.3}): {}. {pairs}.", means.join(", ")));
    }
    for method in ["paca", "s2ft"] {
        let (mean, low, high) = difference(table, method, "lora", METRICS[0].1)?;
        let verdict = verdict(high < 0.0, not_bracketed(table)?.contains(&method));
        lines.push(format!(
            "{method} - lora in-domain: {mean:+.3}, corrected interval {low:+.3} to {high:+.3}: \
             the claim for {method} is {verdict}."
        ));
    }
    let trained = methods()
        .map(|m| Ok(format!("{m} {:.0}", Summary::of(&values(table, m, "trained")?).mean)));
    if table.column("tuned")?.iter().any(|cell| cell.to_field() == "true") {
        let rates =
            methods().map(|m| Ok(format!("{m} {}", table.filter_eq("method", m).texts("lr")?[0])));
        let rates = rates.collect::<Result<Vec<_>>>()?.join(", ");
        let open = not_bracketed(table)?;
        let bracket = if open.is_empty() {
            "a smaller and a larger one are both worse for every method".to_string()
        } else {
            format!("not bracketed for {}: another rate may be better still", open.join(", "))
        };
        lines.push(format!(
            "Learning rates, the best on {TUNING_SEEDS} seeds that are not reported: {rates}; \
             {bracket}."
        ));
    }
    lines.push(format!("Trained numbers: {}.", trained.collect::<Result<Vec<_>>>()?.join(", ")));
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let before = mean(table, "none", METRICS[0].1)?.0;
    let mut learned = true;
    for method in methods() {
        learned &= values(table, method, METRICS[0].1)?.iter().all(|&x| x > before);
    }
    Ok(vec![(
        "every method is better in-domain after fine-tuning than before, with every seed".into(),
        learned,
    )])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four bases; accuracy before, of PaCA and of every other method.
    fn made_up(before: f64, paca: f64, others: f64, spread: f64) -> Table {
        let mut table = Table::default();
        for seed in 0..4u64 {
            for method in ["none"].into_iter().chain(methods()) {
                let right = match method {
                    "none" => before,
                    "paca" => paca + spread * (seed as f64 - 1.5),
                    _ => others + 0.001 * seed as f64,
                };
                let mut row =
                    Row::new().with("method", method).with("base", format!("ours {seed}"));
                METRICS.iter().for_each(|(_, column)| row.set(*column, right));
                table.push(
                    &row.with("seed", seed)
                        .with("tuned", false)
                        .with("lr", 0.01)
                        .with("trained", 100u64),
                );
            }
        }
        table
    }

    #[test]
    fn made_up_data_turn_the_verdict() {
        let says = |table: Table| {
            let lines = findings(&table).unwrap();
            lines.into_iter().find(|l| l.starts_with("paca - lora")).unwrap()
        };
        assert!(says(made_up(0.1, 0.9, 0.8, 0.01)).ends_with("not refuted."));
        assert!(says(made_up(0.1, 0.7, 0.8, 0.001)).ends_with("refuted at this scale."));
        // Below on average and not separated.
        assert!(says(made_up(0.1, 0.78, 0.8, 0.05)).ends_with("not refuted."));
        assert!(verdict(true, true).contains("do not bracket"));
        let held = |table: Table| checks(&table).unwrap()[0].1;
        assert!(held(made_up(0.1, 0.7, 0.8, 0.0)) && !held(made_up(0.75, 0.7, 0.8, 0.0)));
    }
}
