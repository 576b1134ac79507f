//! Figures, findings and checks of the table.

use super::{ALL, METHODS, SHARES, linear};
use crate::harness::over_bases::{by_base, difference, interval, over_bases, word};
use peft_limits::Result;
use peft_limits::report::{
    Axis, Figure, LineChart, NamedFigure, Reference, Series, Summary, Table,
};
use peft_limits::train::method::MethodName;

pub(super) const IN_DOMAIN: &str = "in-domain loss (nats)";
const TRAINING: &str = "training loss (nats)";
/// (kind, panels of it: title, column, whether more is better).
const OURS: &str = "ours";
const DECODER: &str = "decoder";
const OUR_PANELS: [(&str, &str, bool); 5] = [
    ("memorized: training loss", TRAINING, false),
    ("in-domain", "in-domain tokens", true),
    ("near: longer lists", "shifted tokens", true),
    ("far: other questions of lists", "lists tokens", true),
    ("forgotten: facts", "facts tokens", true),
];
const DECODER_PANELS: [(&str, &str, bool); 5] = [
    ("memorized: training loss", TRAINING, false),
    ("in-domain", IN_DOMAIN, false),
    ("near: later text", "near loss (nats)", false),
    ("far: stories", "far loss (nats)", false),
    ("forgotten: KL from the base", "forgotten, KL (nats)", false),
];
/// What the claim compares: far out of distribution.
const FAR: &str = "lists tokens";

fn runs(table: &Table, kind: &str, method: &str, share: &str) -> Table {
    table.filter_eq("kind", kind).filter_eq("method", method).filter_eq("share", share)
}

/// The runs at the best rate.
fn at_best(runs: &Table) -> Table {
    runs.filter(|r| (r.f64("factor") - 1.0).abs() < 1e-9)
}

/// Shares that the table has of a kind, smallest first.
fn shares(table: &Table, kind: &str) -> Result<Vec<&'static str>> {
    let found = table.filter_eq("kind", kind).distinct("share")?;
    Ok(SHARES.iter().map(|s| s.0).filter(|s| found.iter().any(|c| c.to_field() == *s)).collect())
}

/// (mean, low, high): over bases, or over the seeds of a single one.
fn spread(rows: &Table, column: &str) -> Result<(f64, f64, f64)> {
    let bases = over_bases(rows, column)?;
    let summary = if bases.n > 1 { bases } else { Summary::of(&rows.floats(column)?) };
    Ok(if summary.n > 1 {
        interval(&summary, 0.95)
    } else {
        (summary.mean, summary.mean, summary.mean)
    })
}

fn against_budget(
    table: &Table,
    kind: &str,
    panels: &[(&str, &str, bool)],
) -> Result<Vec<LineChart>> {
    let mut charts = Vec::new();
    let before = table.filter_eq("kind", kind).filter_eq("method", "none");
    for (title, column, _) in panels {
        let mut series = Vec::new();
        for method in METHODS.map(MethodName::name) {
            let mut points = Vec::new();
            for share in shares(table, kind)?.into_iter().chain([ALL]) {
                let rows = at_best(&runs(table, kind, method, share));
                if rows.is_empty() {
                    continue;
                }
                let (mean, low, high) = spread(&rows, column)?;
                let trained = Summary::of(&rows.floats("trained share")?).mean;
                points.push((100.0 * trained, mean, low, high));
            }
            series.push(Series::new(method, points));
        }
        let start = over_bases(&before, column)?.mean;
        let references = if start.is_finite() && *column != TRAINING {
            vec![Reference::Horizontal(start, "before".into())]
        } else {
            Vec::new()
        };
        let label = if column.ends_with("tokens") { "answer tokens right" } else { "nats a token" };
        charts.push(LineChart {
            title: (*title).into(),
            x: Axis::log10("trained share of the parameters (%)"),
            y: Axis::linear(label),
            series,
            references,
        });
    }
    Ok(charts)
}

/// What is kept against what is learned, a line through the rates of each method at 1%.
fn against_rate(table: &Table, kind: &str, x: (&str, &str), y: (&str, &str)) -> Result<LineChart> {
    let mut series = Vec::new();
    for method in METHODS.map(MethodName::name) {
        let share = if method == "full" { ALL } else { "1%" };
        let all = runs(table, kind, method, share);
        let mut points = Vec::new();
        for factor in all.distinct("factor")?.iter().filter_map(|f| f.as_f64()) {
            let rows = all.filter(|r| (r.f64("factor") - factor).abs() < 1e-9);
            points.push((over_bases(&rows, x.1)?.mean, over_bases(&rows, y.1)?.mean));
        }
        series.push(Series::new(method, points));
    }
    Ok(LineChart {
        title: if kind == OURS { "our bases".into() } else { "the trained decoder".into() },
        x: Axis::linear(x.0),
        y: Axis::linear(y.0),
        series,
        references: Vec::new(),
    })
}

fn of_world(
    table: &Table,
    world: &str,
    method: &str,
    column: &str,
) -> Result<Vec<(f64, f64, f64, f64)>> {
    let rows =
        table.filter_eq("kind", "linear").filter_eq("world", world).filter_eq("method", method);
    let mut points = Vec::new();
    for (t, s) in rows.sorted_by("t")?.summarise(&["t"], column)? {
        let (mean, low, high) = interval(&s, 0.95);
        points.push((t[0].as_f64().unwrap_or(f64::NAN), mean, low, high));
    }
    Ok(points)
}

const LINEAR: [&str; 4] = [linear::S2FT, linear::S2FT_RANDOM, linear::LORA, "full"];

fn linear_figure(table: &Table) -> Result<Figure> {
    let mut panels = Vec::new();
    for (column, what) in [(linear::OTHER, "the other task"), (linear::NEW, "the new task")] {
        for world in linear::WORLDS {
            let mut series = Vec::new();
            for method in LINEAR {
                series.push(Series::new(method, of_world(table, world, method, column)?));
            }
            if column == linear::OTHER {
                for (method, name) in [
                    (linear::S2FT, "above s2ft: (1 + ε²) and noise"),
                    (linear::LORA, "below lora: distance of the tasks"),
                ] {
                    let points = of_world(table, world, method, linear::LIMIT)?
                        .into_iter()
                        .map(|p| (p.0, p.1));
                    series.push(Series::prediction(name, points.collect::<Vec<_>>()).like(method));
                }
            }
            let shared = if world == "sparse" {
                "shared shift in few channels (F.4)"
            } else {
                "shared shift in no channels"
            };
            panels.push(LineChart {
                title: format!("{what}; {shared}"),
                x: Axis::linear("t, shift of the new task alone"),
                y: Axis::linear("risk, share of the pretrained one"),
                series,
                references: vec![Reference::Horizontal(1.0, "pretrained".into())],
            });
        }
    }
    let caption = format!(
        "32 x 32 layers, 256 samples with noise; {} channels against LoRA of rank {} (as many \
         numbers). Means over {} instances with 95% intervals. Dashed: the theorem's two sides, in \
         expectation.",
        linear::CHANNELS,
        linear::RANK,
        linear::INSTANCES
    );
    Ok(Figure::new("The two-layer linear model: both sides of the theorem", panels)
        .columns(2)
        .caption(caption))
}

pub(super) fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let bases = by_base(&table.filter_eq("kind", OURS), IN_DOMAIN)?.len();
    let caption = format!(
        "Each method at its best rate by in-domain loss on a base of its own. Means over {bases} \
         pretrained models of ours with 95% intervals; a quick run has one budget and a rate that \
         nobody chose."
    );
    let ours = Figure::new(
        "Memorized and generalized at equal budgets",
        against_budget(table, OURS, &OUR_PANELS)?,
    );
    let mut figures = vec![NamedFigure::new("generalization", ours.columns(3).caption(caption))];
    let mut rates = vec![against_rate(
        table,
        OURS,
        ("in-domain tokens right", "in-domain tokens"),
        ("far tokens right", FAR),
    )?];
    if !table.filter_eq("kind", DECODER).is_empty() {
        let caption = "A trained decoder of 260,000 parameters that is not ours (stories260K) \
                       learns Shakespeare. Losses in nats a token; means over 3 seeds with 95% \
                       intervals, one base; each method at its best rate.";
        let figure = Figure::new(
            "The same on a trained decoder",
            against_budget(table, DECODER, &DECODER_PANELS)?,
        );
        figures
            .push(NamedFigure::new("generalization_decoder", figure.columns(3).caption(caption)));
        rates.push(against_rate(
            table,
            DECODER,
            ("in-domain loss (nats)", IN_DOMAIN),
            ("KL from the base (nats)", "forgotten, KL (nats)"),
        )?);
    }
    let mut figure = Figure::new("Best rate and a quarter of it: learned against kept", rates)
        .caption(
            "Trained numbers: 1% of the parameters (full: all). A line joins the rates of a \
                  method, means over bases and seeds.",
        );
    figure.share_y = false;
    figure.share_x = false;
    figures.push(NamedFigure::new("generalization_rates", figure));
    figures.push(NamedFigure::new("generalization_linear", linear_figure(table)?));
    Ok(figures)
}

/// A difference of two methods at one share over our bases, each at its best rate, with its
/// interval at a level.
pub(crate) fn compared(
    table: &Table,
    (a, b): (&str, &str),
    share: &str,
    column: &str,
    level: f64,
) -> Result<(f64, f64, f64)> {
    let of = |method: &str| {
        at_best(&runs(table, OURS, method, if method == "full" { ALL } else { share }))
    };
    Ok(interval(&difference(&of(a), &of(b), column)?, level))
}

pub(super) fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (kind, panels) in [(OURS, &OUR_PANELS), (DECODER, &DECODER_PANELS)] {
        let before = table.filter_eq("kind", kind).filter_eq("method", "none");
        if before.is_empty() {
            lines.push(
                "Left out: the trained decoder; give --base DIR and --text FILE in the full \
                        profile."
                    .into(),
            );
            continue;
        }
        let name =
            if kind == OURS { "Our bases".to_string() } else { before.texts("base")?.remove(0) };
        for (title, column, _) in panels {
            let start = over_bases(&before, column)?.mean;
            let mut parts = Vec::new();
            let full = spread(&at_best(&runs(table, kind, "full", ALL)), column)?;
            parts.push(format!("full {:.3}", full.0));
            for share in shares(table, kind)?.into_iter().rev() {
                let mut means = Vec::new();
                for method in &METHODS[1..] {
                    let rows = at_best(&runs(table, kind, method.name(), share));
                    means.push(format!("{} {:.3}", method.name(), spread(&rows, column)?.0));
                }
                parts.push(format!("{share}: {}", means.join(", ")));
            }
            let start =
                if start.is_finite() { format!(" (before {start:.3})") } else { String::new() };
            lines.push(format!("{name}, {title}{start}: {}.", parts.join("; ")));
        }
        let rates = table.filter_eq("kind", kind).filter(|r| !r.f64("lr").is_nan());
        let mut low_rate = Vec::new();
        for (_, column, _) in &panels[3..] {
            let mut parts = Vec::new();
            for method in METHODS.map(MethodName::name) {
                let all = runs(table, kind, method, if method == "full" { ALL } else { "1%" });
                let quarter = all.filter(|r| r.f64("factor") < 0.5);
                if !quarter.is_empty() {
                    parts.push(format!("{method} {:.3}", over_bases(&quarter, column)?.mean));
                }
            }
            if !parts.is_empty() {
                low_rate.push(format!("{column} {}", parts.join(", ")));
            }
        }
        if !low_rate.is_empty() {
            lines.push(format!(
                "{name}, at a quarter of the best rate, 1%: {}.",
                low_rate.join("; ")
            ));
        }
        let mut best = Vec::new();
        for share in shares(table, kind)?.into_iter().chain([ALL]) {
            let of = |method: &str| {
                at_best(&runs(table, kind, method, share)).rows().next().map(|r| r.f64("lr"))
            };
            let found =
                METHODS.iter().filter_map(|m| Some(format!("{} {}", m.name(), of(m.name())?)));
            best.push(format!("{share}: {}", found.collect::<Vec<_>>().join(", ")));
        }
        lines.push(format!("{name}, rates: {}.", best.join("; ")));
        let open = rates.rows().filter(|r| r.text("bracketed") == "false").count();
        lines.push(format!(
            "{name}: {open} of {} runs have a best rate that no worse ones bracket.",
            rates.len()
        ));
    }
    let pairs = [
        ("s2ft", "lora"),
        ("spft", "lora"),
        ("paca", "lora"),
        ("s2ft", "full"),
        ("spft", "full"),
        ("s2ft", "spft"),
    ];
    for (name, column) in [("near", "shifted tokens"), ("far", FAR), ("facts", "facts tokens")] {
        let mut parts = Vec::new();
        for pair in pairs {
            let d = compared(table, pair, "1%", column, 0.95)?;
            // Of five methods there are ten pairs.
            let corrected = word(compared(table, pair, "1%", column, 1.0 - 0.05 / 10.0)?);
            parts.push(format!(
                "{} - {} {:+.3} ({:+.3} to {:+.3}): {}, corrected {corrected}",
                pair.0,
                pair.1,
                d.0,
                d.1,
                d.2,
                word(d)
            ));
        }
        lines.push(format!(
            "Our bases at 1%, {name}, 95% and corrected for ten pairs: {}.",
            parts.join("; ")
        ));
    }
    for world in linear::WORLDS {
        let mut parts = Vec::new();
        for method in LINEAR {
            let at = |column| of_world(table, world, method, column);
            let (other, new) = (at(linear::OTHER)?, at(linear::NEW)?);
            if let (Some(a), Some(z), Some(n)) = (other.first(), other.last(), new.last()) {
                parts.push(format!("{method} {:.2} to {:.2} (new {:.2})", a.1, z.1, n.1));
            }
        }
        lines.push(format!(
            "Linear model, shared shift {world}: risk on the other task for t = 0 to 2, share of \
             the pretrained one (new task at 2): {}.",
            parts.join("; ")
        ));
    }
    Ok(lines)
}

pub(super) fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let (mut above, mut below) = (true, true);
    for world in linear::WORLDS {
        for method in [linear::S2FT, linear::S2FT_RANDOM] {
            let pairs = of_world(table, world, method, linear::OTHER)?.into_iter().zip(of_world(
                table,
                world,
                method,
                linear::LIMIT,
            )?);
            above &= pairs.fold(true, |holds, (risk, bound)| holds && risk.1 <= bound.1);
        }
    }
    // LoRA's side is stated where its rank reaches the shift's: both worlds here.
    for world in linear::WORLDS {
        let pairs = of_world(table, world, linear::LORA, linear::OTHER)?.into_iter().zip(of_world(
            table,
            world,
            linear::LORA,
            linear::LIMIT,
        )?);
        below &= pairs.fold(true, |holds, (risk, bound)| holds && risk.3 >= bound.1);
    }
    Ok(vec![
        (
            "linear model: a slice's risk on the other task is at most its bound, on average"
                .into(),
            above,
        ),
        ("linear model: LoRA's is not below the distance of the tasks".into(), below),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_limits::report::{Cell, Row};

    /// Three bases; two rates; far accuracy by method.
    fn made_up(far: &[(&str, f64)]) -> Table {
        let mut table = Table::default();
        for base in 0..3 {
            for (method, right) in far {
                for (factor, better) in [(0.25, 0.2), (1.0, 0.0)] {
                    let row = Row::new()
                        .with("kind", OURS)
                        .with("method", *method)
                        .with("share", if *method == "full" { ALL } else { "1%" })
                        .with("base", format!("ours {base}"))
                        .with("factor", factor)
                        .with(FAR, right + better + 0.001 * f64::from(base * base) * right);
                    table.push(&row);
                }
            }
        }
        table
    }

    #[test]
    fn made_up_data_turn_the_comparison() {
        let agrees = made_up(&[("s2ft", 0.6), ("lora", 0.4), ("full", 0.5)]);
        assert_eq!(word(compared(&agrees, ("s2ft", "lora"), "1%", FAR, 0.95).unwrap()), "more");
        let refuted = made_up(&[("s2ft", 0.4), ("lora", 0.6), ("full", 0.5)]);
        assert_eq!(word(compared(&refuted, ("s2ft", "lora"), "1%", FAR, 0.95).unwrap()), "less");
        assert_eq!(word(compared(&refuted, ("s2ft", "full"), "1%", FAR, 0.95).unwrap()), "less");
        // A lower rate that keeps more is not the one that counts.
        assert_eq!(at_best(&runs(&agrees, OURS, "lora", "1%")).len(), 3);
    }

    /// The checks of the linear model fail where a slice is above its bound, or LoRA below its own.
    #[test]
    fn made_up_data_break_the_bounds() {
        let rows = |slice: f64, lora: f64| {
            let mut table = Table::default();
            for world in linear::WORLDS {
                for (method, risk, bound) in [
                    (linear::S2FT, slice, 1.2),
                    (linear::S2FT_RANDOM, 1.0, 1.2),
                    (linear::LORA, lora, 1.0),
                ] {
                    for seed in 0..3 {
                        let row = Row::new()
                            .with("kind", "linear")
                            .with("world", world)
                            .with("t", 0.0)
                            .with("method", method);
                        let row = row
                            .with(linear::OTHER, risk + 0.01 * f64::from(seed))
                            .with(linear::LIMIT, bound);
                        table.push(&row.with("base", Cell::Missing).with("share", Cell::Missing));
                    }
                }
            }
            table
        };
        let held = |slice, lora| {
            checks(&rows(slice, lora)).unwrap().into_iter().map(|c| c.1).collect::<Vec<_>>()
        };
        assert_eq!(held(1.1, 1.1), [true, true]);
        assert_eq!(held(1.3, 1.1), [false, true]);
        assert_eq!(held(1.1, 0.8), [true, false]);
    }
}
