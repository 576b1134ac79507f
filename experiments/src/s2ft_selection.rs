//! Claim (\[S2FT\], its figure of components and its table of selections): at a fixed budget Query,
//! Key << Value, Up, Gate < Output, Down; and of the channels and heads those with the smallest
//! activations are better than random ones (+0.7 on commonsense, +0.4 on arithmetic), those with
//! the largest gradients worse (-1.2, -1.8), because what is large holds what was known.
//!
//! Measured: three pretrained models of ours (`harness::study`: 704 channels, 32 heads) learn one
//! new task by training 2% of the model in one projection, (1) down with each of nine selections, o
//! with three of them, (2) each of seven projections with a random one; at learning rates a factor
//! of four apart. In-domain and retained accuracy; scores of activations and gradients come from
//! rows of the new task. With `--base` and `--text` the selections of down also on a trained
//! decoder (`harness::decoder`). Each is taken at the rate that the *other* bases find best by
//! in-domain loss. A selection is compared with random by paired differences over bases; the
//! paper's two signs at 95%, all eight selections after Bonferroni's correction.
//!
//! Refuted if the smallest activations were separated below random in-domain, or the largest
//! gradients above; or if the best of q and k were above the worse of o and down.
//!
//! `cargo run --release --bin s2ft_selection [-- --profile full --base DIR --text FILE]`; about a
//! minute, of which a third pretrains; in full about 25 minutes on one core, the decoder's part
//! included.

use crate::harness::decoder::{decoder, decoder_name};
use crate::harness::over_bases::{
    at_best_rate, by_base, difference, interval, is_rate, not_bracketed, over_bases, word,
};
use crate::harness::study::{OURS, Study, accuracies, on_own_threads, train};
use crate::harness::{Experiment, Point, Profile};
use peft_limits::Result;
use peft_limits::model::ModelConfig;
use peft_limits::report::{Axis, BarChart, BarSeries, Figure, NamedFigure, Row, Summary, Table};
use peft_limits::train::budget::s2ft_share;
use peft_limits::train::method::{MethodName, MethodParams};
use std::collections::BTreeMap;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "s2ft_selection",
    title: "S2FT: which component, which selection",
    claim: "Training down and o serves best; smallest activations are a better selection than \
            random, largest gradients a worse one (S2FT).",
    refuted_by: "smallest activations separated below random in-domain, or largest gradients \
                 above; the best of q, k above the worse of o, down",
    doubt: "Models of 0.2 million parameters that learn one task: what their largest activations \
            hold is little compared with a large model's knowledge.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: None,
};

const SEEDS: u64 = 5;
/// Bases of the full profile.
const BASES: u64 = 3;
const RANDOM: &str = "random";
/// Selections with the paper's differences from random, commonsense and arithmetic (percentage
/// points).
const RULES: [(&str, [f64; 2]); 9] = [
    (RANDOM, [0.0, 0.0]),
    ("weight", [-0.7, -1.2]),
    ("weight, smallest", [-1.3, -1.2]),
    ("activation", [-1.9, -2.5]),
    ("activation, smallest", [0.7, 0.4]),
    ("weight-activation", [-1.5, -2.8]),
    ("weight-activation, smallest", [0.6, 0.2]),
    ("gradient", [-1.2, -1.8]),
    ("gradient, smallest", [-0.4, -0.1]),
];
/// The two that the paper's argument rests on.
const SIGNS: [&str; 2] = ["activation, smallest", "gradient"];
const COMPONENTS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"];
const SELECTED: [&str; 2] = ["down_proj", "o_proj"];
const IN_DOMAIN: &str = "in-domain loss (nats)";
const METRICS: [(&str, &str); 2] =
    [("in-domain", "in-domain tokens"), ("retained", "retained tokens")];
/// On the decoder less is better: losses.
const DECODER_METRICS: [(&str, &str); 2] =
    [("in-domain loss", IN_DOMAIN), ("KL from the base", "forgotten, KL (nats)")];
const RATES: [f64; 3] = [1e-2, 4e-2, 0.16];
/// Seeds, updates, rate on the decoder.
const DECODER: (u64, u64, f64) = (3, 80, 1e-2);
/// Share of the parameters that is trained.
const SHARE: f64 = 0.02;

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let study =
        profile.pick(Study { steps: 80, ..Study::quick() }, Study { steps: 100, ..Study::full() });
    let mut points = Vec::new();
    for seed in seed..seed + profile.pick(SEEDS, BASES) {
        let mut add = |component: &str, rule: &str, rates: &[f64]| {
            for lr in rates {
                let point = study.seeded(
                    format!("{component}, {rule} at {lr}, seed {seed}"),
                    profile,
                    seed,
                );
                points.push(
                    point.with("component", component).with("selection", rule).with("lr", *lr),
                );
            }
        };
        if profile == Profile::Quick {
            [RANDOM, SIGNS[0], SIGNS[1]]
                .iter()
                .for_each(|rule| add("down_proj", rule, &RATES[1..2]));
            ["q_proj", "o_proj"].iter().for_each(|component| add(component, RANDOM, &RATES[1..2]));
            continue;
        }
        RULES.iter().for_each(|(rule, _)| add("down_proj", rule, &RATES));
        add("o_proj", RANDOM, &RATES);
        // Heads are best at the second rate whatever the selection; channels of small activations
        // want more.
        SIGNS.iter().for_each(|rule| add("o_proj", rule, &RATES[..2]));
        COMPONENTS[..5].iter().for_each(|component| add(component, RANDOM, &RATES[1..]));
    }
    if let (Profile::Full, Some(name)) = (profile, decoder_name()) {
        for seed in seed..seed + DECODER.0 {
            for (rule, _) in RULES {
                let point =
                    Point::new(format!("decoder, {rule}, seed {seed}")).with("base", name.as_str());
                let point = point
                    .with("component", SELECTED[0])
                    .with("selection", rule)
                    .with("lr", DECODER.2);
                points.push(point.with("steps", DECODER.1).with("seed", seed));
            }
        }
    }
    points
}

fn method(config: &ModelConfig, component: &str, rule: &str) -> Result<MethodParams> {
    let (share, _) =
        s2ft_share(config, component.parse()?, (SHARE * config.parameters() as f64) as usize);
    Ok(MethodParams {
        ratios: Some(BTreeMap::from([(component.to_string(), share)])),
        selection: rule.trim_end_matches(", smallest").into(),
        smallest: rule.ends_with(", smallest"),
        ..MethodParams::named(MethodName::S2ft)
    })
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let (component, rule, seed, lr) =
        (point.text("component")?, point.text("selection")?, point.u64("seed")?, point.f64("lr")?);
    let ours = point.text("base")?.starts_with(OURS);
    let base = if ours { Some(Study::of(point)?.base_of(point)?) } else { None };
    on_own_threads(1, || {
        let mut trainer = match &base {
            Some(base) => {
                Study::of(point)?.trainer(base, method(&base.config, component, rule)?, lr, seed)?
            }
            None => {
                let decoder = decoder()?;
                decoder.trainer(
                    method(&decoder.model.config, component, rule)?,
                    lr,
                    seed,
                    point.u64("steps")?,
                )?
            }
        };
        train(&mut trainer, |_| Ok(()))?;
        let mut row =
            if ours { accuracies(&trainer)?.row() } else { decoder()?.measure(&trainer.model)? };
        if !ours {
            let loss = trainer.evaluate()?.first().map_or(f64::NAN, |r| r.scores.loss);
            row.set(IN_DOMAIN, loss);
        }
        Ok(vec![row.with("trained", trainer.model.trainable_elements())])
    })
}

fn runs(table: &Table, component: &str, rule: &str) -> Table {
    table.filter_eq("component", component).filter_eq("selection", rule)
}

fn our_rows(table: &Table) -> Table {
    table.filter(|r| r.text("base").starts_with(OURS))
}

fn decoder_rows(table: &Table) -> Table {
    table.filter(|r| !r.text("base").starts_with(OURS))
}

/// Those of `all` that the table has, in that order.
fn present(table: &Table, column: &str, all: &[&'static str]) -> Result<Vec<&'static str>> {
    let found = table.distinct(column)?;
    Ok(all.iter().copied().filter(|name| found.iter().any(|c| c.to_field() == *name)).collect())
}

fn rules(table: &Table) -> Result<Vec<&'static str>> {
    present(table, "selection", &RULES.map(|r| r.0))
}

/// Difference from random selection over our bases, each at its best rate of those that both were
/// run at.
pub(crate) fn from_random(
    table: &Table,
    component: &str,
    rule: &str,
    column: &str,
    level: f64,
) -> Result<(f64, f64, f64)> {
    let ours = our_rows(table);
    let (chosen, random) = (runs(&ours, component, rule), runs(&ours, component, RANDOM));
    let rates = if chosen.is_empty() { Vec::new() } else { chosen.floats("lr")? };
    let random = random.filter(|r| rates.iter().any(|&lr| is_rate(lr, r.f64("lr"))));
    let gap =
        difference(&at_best_rate(&chosen, IN_DOMAIN)?, &at_best_rate(&random, IN_DOMAIN)?, column)?;
    Ok(interval(&gap, level))
}

/// The same on the decoder, paired by seed: one base.
fn from_random_on_decoder(
    table: &Table,
    component: &str,
    rule: &str,
    column: &str,
) -> Result<Summary> {
    let rows = decoder_rows(table);
    let of = |rule: &str| runs(&rows, component, rule).sorted_by("seed")?.floats(column);
    Ok(Summary::of(&of(rule)?.iter().zip(of(RANDOM)?).map(|(a, b)| a - b).collect::<Vec<_>>()))
}

/// Mean of a component under random selection, with its interval over our bases.
pub(crate) fn of_component(
    table: &Table,
    component: &str,
    column: &str,
) -> Result<(f64, f64, f64)> {
    Ok(interval(
        &over_bases(&at_best_rate(&runs(&our_rows(table), component, RANDOM), IN_DOMAIN)?, column)?,
        0.95,
    ))
}

/// Groups of components from worst to best in the paper's Figure 4.
pub(crate) const PAPERS_ORDER: [&[&str]; 3] =
    [&["q_proj", "k_proj"], &["v_proj", "up_proj", "gate_proj"], &["o_proj", "down_proj"]];

/// Mean of some components less that of others under random selection, with its interval over our
/// bases.
pub(crate) fn groups_apart(
    table: &Table,
    (above, below): (&[&str], &[&str]),
    column: &str,
    level: f64,
) -> Result<(f64, f64, f64)> {
    let ours = our_rows(table);
    let of = |names: &[&str]| -> Result<BTreeMap<String, f64>> {
        let mut means = BTreeMap::new();
        for name in names {
            for (base, mean) in
                by_base(&at_best_rate(&runs(&ours, name, RANDOM), IN_DOMAIN)?, column)?
            {
                *means.entry(base).or_default() += mean / names.len() as f64;
            }
        }
        Ok(means)
    };
    let (above, below) = (of(above)?, of(below)?);
    let gaps: Vec<f64> =
        above.iter().filter_map(|(base, mean)| Some(mean - below.get(base)?)).collect();
    Ok(interval(&Summary::of(&gaps), level))
}

fn bars(
    title: &str,
    label: &str,
    group: &str,
    groups: Vec<String>,
    series: Vec<BarSeries>,
) -> BarChart {
    BarChart {
        title: title.into(),
        group_label: group.into(),
        groups,
        y: Axis::linear(label),
        series,
        ..BarChart::default()
    }
}

/// `W large` for the largest weights, and so on.
fn short(rule: &str) -> String {
    let (score, end) =
        rule.strip_suffix(", smallest").map_or((rule, "large"), |score| (score, "small"));
    let score = match score {
        "weight" => "W",
        "activation" => "A",
        "weight-activation" => "WA",
        _ => "G",
    };
    format!("{score} {end}")
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let (all, components) = (rules(table)?, present(table, "component", &COMPONENTS)?);
    let others: Vec<&str> = all.into_iter().filter(|r| *r != RANDOM).collect();
    let names = || others.iter().map(|r| short(r)).collect::<Vec<_>>();
    let mut panels = Vec::new();
    for (name, column) in METRICS {
        let mut series = Vec::new();
        for component in present(table, "component", &SELECTED)? {
            let mut values = Vec::new();
            for rule in &others {
                let (mean, low, high) = from_random(table, component, rule, column, 0.95)?;
                values.push((100.0 * mean, 100.0 * low, 100.0 * high));
            }
            series.push(BarSeries::new(component, values));
        }
        panels.push(bars(
            &format!("{name}: against random selection"),
            "points",
            "selection",
            names(),
            series,
        ));
    }
    let mut series = Vec::new();
    for (i, paper) in ["paper, commonsense", "paper, arithmetic"].into_iter().enumerate() {
        let of = |rule: &&str| RULES.iter().find(|r| r.0 == *rule).map_or(f64::NAN, |r| r.1[i]);
        series.push(BarSeries::new(paper, others.iter().map(of).collect::<Vec<_>>()));
    }
    panels.push(bars(
        "the paper's table 4, on its own tasks",
        "points",
        "selection",
        names(),
        series,
    ));
    let caption = "Channels (heads) by weight W, activation A, their product or gradient G. 2% of \
                   the model trained in one projection, each at its best rate (a factor of four \
                   apart), means over our bases with 95% intervals.";
    let mut selection =
        Figure::new("S2FT: selections against random", panels).caption(caption).columns(1);
    selection.panel_size = (900.0, 330.0);
    selection.share_y = false;
    let mut figures = vec![NamedFigure::new("s2ft_selection", selection)];
    let mut panels = Vec::new();
    for (name, column) in METRICS {
        let values = components
            .iter()
            .map(|c| of_component(table, c, column))
            .collect::<Result<Vec<_>>>()?;
        let groups = components.iter().map(ToString::to_string).collect();
        panels.push(bars(
            name,
            "answer tokens right",
            "component",
            groups,
            vec![BarSeries::new(RANDOM, values)],
        ));
    }
    let figure = Figure::new("S2FT: components at one budget, random selection", panels).caption(
        "Each at its best rate, means over our bases with 95% intervals; the paper's \
                  order is left to right: q, k, then v, gate, up, then o, down.",
    );
    figures.push(NamedFigure::new("s2ft_selection_components", figure));
    if !decoder_rows(table).is_empty() {
        let mut panels = Vec::new();
        for (name, column) in DECODER_METRICS {
            let mut series = Vec::new();
            for component in &SELECTED[..1] {
                let of = |rule: &&str| {
                    Ok(interval(&from_random_on_decoder(table, component, rule, column)?, 0.95))
                };
                series.push(BarSeries::new(
                    *component,
                    others.iter().map(of).collect::<Result<Vec<_>>>()?,
                ));
            }
            panels.push(bars(
                &format!("{name}, against random selection"),
                "nats",
                "selection",
                names(),
                series,
            ));
        }
        let mut figure = Figure::new(
            "The same on a trained decoder (stories260K on \
                                      Shakespeare)",
            panels,
        )
        .caption(
            "Below zero: less loss, less forgotten than under random selection. One base; \
                      95% intervals over seeds, paired.",
        )
        .columns(1);
        figure.panel_size = (900.0, 330.0);
        figure.share_y = false;
        figures.push(NamedFigure::new("s2ft_selection_decoder", figure));
    }
    Ok(figures)
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let (all, components) = (rules(table)?, present(table, "component", &COMPONENTS)?);
    let mut lines = Vec::new();
    for rule in SIGNS {
        let paper = RULES.iter().find(|r| r.0 == rule).map_or([0.0; 2], |r| r.1);
        let mut parts = Vec::new();
        for component in present(table, "component", &SELECTED)? {
            for (name, column) in METRICS {
                let d = from_random(table, component, rule, column, 0.95)?;
                if d.0.is_finite() {
                    parts.push(format!(
                        "{component} {name} {:+.3} ({:+.3} to {:+.3}): {}",
                        d.0,
                        d.1,
                        d.2,
                        word(d)
                    ));
                }
            }
        }
        let rule = if rule == "gradient" { "gradient, largest" } else { rule };
        lines.push(format!(
            "{rule}, against random (paper {:+.1} and {:+.1} points): {}.",
            paper[0],
            paper[1],
            parts.join("; ")
        ));
    }
    let others: Vec<&str> = all.iter().copied().filter(|r| *r != RANDOM).collect();
    for (name, column) in METRICS {
        for component in present(table, "component", &SELECTED)? {
            let mut separated = Vec::new();
            for rule in &others {
                let d =
                    from_random(table, component, rule, column, 1.0 - 0.05 / others.len() as f64)?;
                if word(d) != "not separated" {
                    separated.push(format!("{rule} {:+.3} ({:+.3} to {:+.3})", d.0, d.1, d.2));
                }
            }
            let what = if separated.is_empty() { "none".into() } else { separated.join("; ") };
            lines.push(format!(
                "{name}, {component}: separated from random after correction for {} selections: \
                 {what}.",
                others.len()
            ));
        }
        let mut means = components
            .iter()
            .map(|c| Ok((of_component(table, c, column)?, *c)))
            .collect::<Result<Vec<_>>>()?;
        means.sort_by(|a, b| b.0.0.total_cmp(&a.0.0));
        let text: Vec<String> =
            means.iter().map(|((m, l, h), c)| format!("{c} {m:.3} ({l:.3} to {h:.3})")).collect();
        lines.push(format!(
            "{name}, components under random selection, best first: {}.",
            text.join(", ")
        ));
        if PAPERS_ORDER
            .iter()
            .flat_map(|group| group.iter())
            .all(|c| components.iter().any(|there| there == c))
        {
            let [low, _, high] = PAPERS_ORDER;
            let (m, l, h) = groups_apart(table, (high, low), column, 0.95)?;
            lines.push(format!("{name}, o and down less q and k: {m:+.3} ({l:+.3} to {h:+.3})."));
        }
    }
    let mut open = Vec::new();
    for component in &components {
        for rule in &all {
            if let Some(lr) = not_bracketed(&runs(&our_rows(table), component, rule), IN_DOMAIN)? {
                open.push(format!("{component} {rule} ({lr})"));
            }
        }
    }
    if !open.is_empty() {
        lines.push(format!(
            "The best rate is the smallest or the largest tried, so that another may be better, \
             for {}.",
            open.join(", ")
        ));
    }
    // What is learned and what is kept together: at one rate a selection that learns less keeps
    // more.
    for lr in RATES {
        let mut parts = Vec::new();
        for rule in &all {
            let rows =
                runs(&our_rows(table), SELECTED[0], rule).filter(|r| is_rate(lr, r.f64("lr")));
            if !rows.is_empty() {
                let of =
                    |column: &str| Ok::<_, peft_limits::Error>(over_bases(&rows, column)?.mean);
                parts.push(format!("{rule} {:.3} and {:.3}", of(METRICS[0].1)?, of(METRICS[1].1)?));
            }
        }
        if !parts.is_empty() {
            lines.push(format!(
                "down_proj at the rate {lr}, in-domain and retained: {}.",
                parts.join(", ")
            ));
        }
    }
    let rows = decoder_rows(table);
    if rows.is_empty() {
        lines.push(
            "Left out: the trained decoder; give --base DIR and --text FILE in the full profile."
                .into(),
        );
        return Ok(lines);
    }
    let name = rows.texts("base")?.remove(0);
    for (metric, column) in DECODER_METRICS {
        for component in &SELECTED[..1] {
            let mut parts = Vec::new();
            for rule in &others {
                let d = interval(&from_random_on_decoder(table, component, rule, column)?, 0.95);
                parts.push(format!("{rule} {:+.3} ({:+.3} to {:+.3})", d.0, d.1, d.2));
            }
            lines.push(format!(
                "{name}, {component}, {metric} against random (less is better; over seeds, one \
                 base): {}.",
                parts.join(", ")
            ));
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_up(smallest: f64, q: f64) -> Table {
        let mut table = Table::default();
        for base in 0..4 {
            let runs = [
                ("down_proj", RANDOM, 0.5),
                ("down_proj", SIGNS[0], 0.5 + smallest),
                ("down_proj", SIGNS[1], 0.4),
                ("q_proj", RANDOM, q),
            ];
            for (component, rule, right) in runs {
                for lr in RATES {
                    let noise = 0.01 * f64::from(base) * right;
                    let row = Row::new()
                        .with("base", format!("{OURS}{base}"))
                        .with("component", component)
                        .with("selection", rule);
                    table.push(
                        &row.with("lr", lr)
                            .with(METRICS[0].1, right + noise)
                            .with(METRICS[1].1, 0.9 - right)
                            .with(IN_DOMAIN, 1.0 - right),
                    );
                }
            }
        }
        table
    }

    #[test]
    fn made_up_data_turn_the_findings() {
        let (agrees, refutes) =
            (findings(&made_up(0.1, 0.3)).unwrap(), findings(&made_up(-0.1, 0.7)).unwrap());
        assert!(
            agrees[0].contains("down_proj in-domain +0.1") && agrees[0].contains(": more;"),
            "{}",
            agrees[0]
        );
        assert!(refutes[0].contains(": less;"), "{}", refutes[0]);
        let order =
            |lines: &[String]| lines.iter().find(|l| l.contains("best first")).unwrap().clone();
        assert!(
            order(&agrees).contains("best first: down_proj")
                && order(&refutes).contains("best first: q_proj")
        );
        assert!(agrees.last().unwrap().starts_with("Left out"));
    }

    #[test]
    fn selections_differ_in_what_they_choose() {
        let config = Study::sizes().unwrap();
        let (share, _) = s2ft_share(
            &config,
            "o_proj".parse().unwrap(),
            (SHARE * config.parameters() as f64) as usize,
        );
        let heads = share * (config.num_key_value_heads * config.num_hidden_layers) as f64;
        assert!((4.0..16.0).contains(&heads), "{heads} of 32 heads");
    }
}
