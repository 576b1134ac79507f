//! Claim (\[S2FT\], study of components and selection): down and o are the best components to train, and choosing the
//! heads and channels at random is about as good as choosing them by weights, activations or gradients.
//!
//! Measured: a small pretrained model learns one new task (`harness::study`) by training the same number of numbers, 2%
//! of the model, in one projection, chosen by each strategy; five seeds; in-domain and retained accuracy. Calibration
//! uses rows of the new task. Strategies are compared with random selection by paired differences over seeds, at 95%
//! after Bonferroni's correction.
//!
//! Refuted if down or o were not the best component, or if some strategy were separated from random in most components.
//!
//! `cargo run --release --bin s2ft_selection [-- --profile full]`; about a minute, of which a third pretrains; in full 25 minutes on a machine that
//! built something else half the time.

use crate::harness::study::{Study, accuracies, on_own_threads, train};
use crate::harness::{Experiment, Point, Profile};
use peft_limits::Result;
use peft_limits::report::{Figure, HeatAxis, HeatMap, NamedFigure, Row, Summary, Table};
use peft_limits::train::budget::s2ft_share;
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::preset::preset;
use std::collections::BTreeMap;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "s2ft_selection",
    title: "S2FT: which component, which selection",
    claim: "Training down and o serves best, and random selection is about as good as any other (S2FT).",
    refuted_by: "another component better than both, or a strategy separated from random in most components",
    doubt: "Calibrated on one small model that learns one task, whose heads and channels may be more alike than those of a large model.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: None,
};

const SEEDS: u64 = 5;
const RULES: [&str; 9] = [
    "random",
    "weight",
    "weight, smallest",
    "activation",
    "activation, smallest",
    "weight-activation",
    "weight-activation, smallest",
    "gradient",
    "gradient, smallest",
];
const COMPONENTS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const METRICS: [&str; 2] = ["in-domain tokens", "retained tokens"];

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    // In full every component and rule, 315 runs: more of them on the small model say more than fewer on a larger one.
    let study = profile.pick(Study { steps: 80, ..Study::quick() }, Study { steps: 200, rows: 256, ..Study::quick() });
    let components = profile.pick(&["o_proj", "up_proj", "down_proj"][..], &COMPONENTS);
    let rules = profile.pick(&["random", "weight", "activation", "activation, smallest", "gradient"][..], &RULES);
    let mut points = Vec::new();
    for component in components {
        for rule in rules {
            for seed in seed..seed + SEEDS {
                let point = study.point(format!("{component}, {rule}, seed {seed}"));
                points.push(point.with("component", *component).with("selection", *rule).with("seed", seed));
            }
        }
    }
    points
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let study = Study::of(point)?;
    let base = study.pretrained()?;
    let config = preset(&study.preset)?;
    let (component, rule) = (point.text("component")?, point.text("selection")?);
    // Two head groups' worth of o: a multiple of every component's unit.
    let group = config.num_attention_heads / config.num_key_value_heads * config.head_dim;
    let (share, _) = s2ft_share(&config, component.parse()?, 2 * group * config.hidden_size);
    let method = MethodParams {
        ratios: Some(BTreeMap::from([(component.to_string(), share)])),
        selection: rule.trim_end_matches(", smallest").into(),
        smallest: rule.ends_with(", smallest"),
        ..MethodParams::named(MethodName::S2ft)
    };
    let seed = point.u64("seed")?;
    on_own_threads(1, || {
        let mut trainer = study.trainer(&base, method, study.learning_rate(MethodName::S2ft), seed)?;
        train(&mut trainer, |_| Ok(()))?;
        let trained = trainer.model.trainable_elements();
        Ok(vec![accuracies(&trainer)?.row().with("trained", trained)])
    })
}

fn values(table: &Table, component: &str, rule: &str, column: &str) -> Result<Vec<f64>> {
    table.filter_eq("component", component).filter_eq("selection", rule).sorted_by("seed")?.floats(column)
}

/// Those of `all` that the table has, in that order.
fn present(table: &Table, column: &str, all: &[&'static str]) -> Result<Vec<&'static str>> {
    let found = table.distinct(column)?;
    Ok(all.iter().copied().filter(|name| found.iter().any(|c| c.to_field() == *name)).collect())
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let (components, rules) = (present(table, "component", &COMPONENTS)?, present(table, "selection", &RULES)?);
    let mut panels = Vec::new();
    for metric in METRICS {
        let mut cells = Vec::new();
        for rule in rules.iter().rev() {
            let mean = |c: &&str| Ok(Summary::of(&values(table, c, rule, metric)?).mean);
            cells.push(components.iter().map(mean).collect::<Result<Vec<f64>>>()?);
        }
        let x = HeatAxis::categories("component", components.iter().copied());
        let y = HeatAxis::categories("selection", rules.iter().rev().copied());
        let mut map = HeatMap::new(metric.trim_end_matches(" tokens"), x, y, cells, "share of answer tokens right");
        map.annotate = true;
        panels.push(map);
    }
    let caption = format!(
        "The same number of numbers trained in each component (2% of the model); means over {SEEDS} seeds. Largest scores first \
         unless said; scores of activations and gradients from rows of the new task."
    );
    let mut figure = Figure::new("S2FT: component and selection", panels).caption(caption);
    figure.panel_size = (600.0, 430.0);
    Ok(vec![NamedFigure::new("s2ft_selection", figure)])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let (components, rules) = (present(table, "component", &COMPONENTS)?, present(table, "selection", &RULES)?);
    let mut lines = Vec::new();
    for metric in METRICS {
        let mut means = Vec::new();
        for component in &components {
            let s = Summary::of(&table.filter_eq("component", *component).floats(metric)?);
            let (low, high) = s.t_interval(0.95).unwrap_or((f64::NAN, f64::NAN));
            means.push((s.mean, format!("{component} {:.3} ({low:.3} to {high:.3})", s.mean)));
        }
        means.sort_by(|a, b| b.0.total_cmp(&a.0));
        if metric == METRICS[0] {
            let best = means.first().map_or("", |m| m.1.split(' ').next().unwrap_or_default());
            let agrees = if ["o_proj", "down_proj"].contains(&best) { "agrees" } else { "does not agree" };
            lines.push(format!("Best component in-domain: {best}; this {agrees} with the claim."));
        }
        let text: Vec<String> = means.into_iter().map(|m| m.1).collect();
        lines.push(format!("{metric}, components over all selections and seeds, best first: {}.", text.join(", ")));
        let comparisons = (components.len() * (rules.len() - 1)) as f64;
        let (mut separated, mut affected) = (Vec::new(), 0);
        for component in &components {
            let before = separated.len();
            let random = values(table, component, "random", metric)?;
            for rule in rules.iter().filter(|r| **r != "random") {
                let other = values(table, component, rule, metric)?;
                let gaps = Summary::of(&other.iter().zip(&random).map(|(a, b)| a - b).collect::<Vec<_>>());
                if let Some((low, high)) = gaps.t_interval(1.0 - 0.05 / comparisons)
                    && low * high > 0.0
                {
                    separated.push(format!("{component} by {rule} {:+.3} ({low:+.3} to {high:+.3})", gaps.mean));
                }
            }
            affected += usize::from(separated.len() > before);
        }
        lines.push(if separated.is_empty() {
            format!("{metric}: {SEEDS} seeds separate no selection from random in any component.")
        } else {
            let verdict = if 2 * affected > components.len() { "refuted at this scale" } else { "not refuted" };
            format!(
                "{metric}: separated from random in {affected} of {} components, so that random selection is as good as any other is {verdict}: {}.",
                components.len(),
                separated.join("; ")
            )
        });
    }
    Ok(lines)
}
