//! Claim (\[AS23\], \[AS24\], \[CL-LoRA\] section 5): above the norm threshold a fast accurate attention, or a fast accurate LoRA gradient, would
//! decide gap nearest neighbour in Hamming distance, which no sub-quadratic algorithm does unless SETH fails.
//!
//! Measured: planted and null instances embedded at entries bounded by Gamma = c sqrt(ln L); the share that each factorization with
//! k = L^0.5 or L^0.75 columns decides rightly, from the output and from dB_Q alone, with 95% Clopper-Pearson intervals; the exact
//! gradient beside them. Shares are of the instances that a method answers: without a positive denominator it has no answer.
//!
//! Refuted if the exact oracle erred where the promise decides, or a method of linear cost were right at every c.
//!
//! `cargo run --release --bin hardness [-- --profile full]`; about 30 seconds, 15 minutes in full.

use crate::harness::{Experiment, Point, Profile, seed_stream};
use peft_limits::attention::exact::streaming;
use peft_limits::attention::factorization::build;
use peft_limits::attention::factorization::monomials::count;
use peft_limits::attention::{AttentionProblem, Request, chained};
use peft_limits::limits::hardness::accuracy::clopper_pearson;
use peft_limits::limits::hardness::decision::{Oracle, guaranteed, has_near_pair};
use peft_limits::limits::hardness::embedding::{Embedding, HEAD_DIM};
use peft_limits::limits::hardness::instance::Instance;
use peft_limits::report::{Axis, Cell, Figure, LineChart, NamedFigure, PlotPoint, Reference, Row, Series, Table};
use peft_limits::{Error, Result};
use rand::Rng;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "hardness",
    title: "Nearest neighbours decided by attention and by a LoRA gradient",
    claim: "Above the threshold an accurate LoRA gradient decides gap nearest neighbour (AS24, CL-LoRA section 5), so cheap factorizations must fail there.",
    refuted_by: "an exact oracle that errs where the promise decides, or a method of linear cost that is right at every norm",
    doubt: "Planted random instances are the easy kind, and failing methods only show that these methods fail: no experiment can show that none succeeds.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

const RATIOS: [f64; 9] = [0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5];
const EXPONENTS: [f64; 2] = [0.5, 0.75];
const FAMILIES: [&str; 6] = ["exact", "fitted", "positive-features", "tensor-sketch", "nystrom", "support-basis"];
const ORACLES: [(&str, Oracle); 2] = [("output", Oracle::Output), ("LoRA gradient", Oracle::LoraGradient)];

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let (size, instances) = profile.pick((256u64, 24u64), (1024, 40));
    let mut points = Vec::new();
    for c in RATIOS {
        for s in seed..seed + instances {
            let label = format!("c = {c}, instance {s}");
            points.push(Point::new(label).with("size", size).with("c", c).with("seed", s).with("planted", s % 2 == 0));
        }
    }
    points
}

/// The spec of a family within a budget of columns; `None` if no member is that small.
fn within(family: &str, columns: usize, embedding: &Embedding, seed: u64) -> Option<String> {
    let degree = (1..).take_while(|&g| count(HEAD_DIM, g) <= columns as u128).last();
    match family {
        "fitted" => degree.map(|g| format!("fitted:degree={g},seed={seed}")),
        "tensor-sketch" => {
            (columns > HEAD_DIM + 3).then(|| format!("tensor-sketch:degree=3,rank={columns},seed={seed}"))
        }
        // A threshold between the near pair's logit, 7/8 x, and the next possible one, 5/8 x, with x = Gamma^2 / 2.
        "support-basis" => degree.map(|g| {
            format!("support-basis:degree={g},threshold={},center=none", 0.375 * embedding.gamma * embedding.gamma)
        }),
        _ => Some(format!("{family}:rank={columns},seed={seed}")),
    }
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let (size, planted) = (point.usize("size")?, point.bool("planted")?);
    let seed = seed_stream(point.u64("seed")?, "instance").next_u64();
    let instance = Instance::draw(size, planted, seed)?;
    let embedding = Embedding::at_threshold_ratio(size, point.f64("c")?)?;
    let problem: AttentionProblem<f64> = embedding.head(&instance)?;
    let tokens = 2 * size;
    let exact = streaming::gradients(&problem, Request::Adapters)?;
    let mut rows = Vec::new();
    for exponent in EXPONENTS {
        let columns = (tokens as f64).powf(exponent).ceil() as usize;
        for family in FAMILIES {
            let (gradients, pairs) = if family == "exact" {
                (Some(exact.clone()), 0)
            } else {
                let Some(spec) = within(family, columns, &embedding, seed % 1000) else { continue };
                match chained::gradients(&problem, build::<f64>(&spec)?.as_ref(), Request::Adapters) {
                    Ok(c) => (Some(c.gradients), c.certificate.corrected_pairs),
                    Err(Error::NonPositiveDenominator { .. }) => (None, 0),
                    Err(error) => return Err(error),
                }
            };
            for (name, oracle) in ORACLES {
                let answer = match &gradients {
                    Some(g) => Some(has_near_pair(&embedding, g, oracle)?),
                    None => None,
                };
                rows.push(
                    Row::new()
                        .with("Gamma", embedding.gamma)
                        .with("exponent", exponent)
                        .with("columns k", columns)
                        .with("family", family)
                        .with("oracle", name)
                        .with("guaranteed", guaranteed(&embedding, oracle))
                        .with("answered", answer.is_some())
                        .with("right", answer == Some(planted))
                        .with("corrected pairs", pairs as f64)
                        .with(
                            "operations / exact",
                            gradients.as_ref().map_or(Cell::Missing, |g| {
                                Cell::Float(g.cost.flops() as f64 / exact.cost.flops() as f64)
                            }),
                        ),
                );
            }
        }
    }
    Ok(rows)
}

fn is_true(row: &peft_limits::report::RowView, column: &str) -> bool {
    row.text(column) == "true"
}

/// What a family answers at one c.
struct Answers {
    c: f64,
    /// Share right of those answered, with its interval.
    right: (f64, f64, f64),
    /// Share of the instances that have an answer.
    answered: f64,
    /// The same answer for every instance: right on half of them without having looked.
    constant: bool,
}

/// Answers of a family by c.
fn answers(table: &Table, exponent: f64, family: &str, oracle: &str) -> Result<Vec<Answers>> {
    let chosen = table.filter_eq("exponent", exponent).filter_eq("family", family).filter_eq("oracle", oracle);
    chosen
        .group_by(&["c"])?
        .into_iter()
        .map(|(key, rows)| {
            let answered = rows.filter(|r| is_true(&r, "answered"));
            let (right, n) = (answered.rows().filter(|r| is_true(r, "right")).count() as u64, answered.len() as u64);
            let (low, high) = if n > 0 { clopper_pearson(right, n, 0.95)? } else { (f64::NAN, f64::NAN) };
            let near = answered.rows().filter(|r| is_true(r, "right") == is_true(r, "planted")).count() as u64;
            Ok(Answers {
                c: key[0].as_f64().unwrap_or(f64::NAN),
                right: (right as f64 / n as f64, low, high),
                answered: n as f64 / rows.len() as f64,
                constant: n > 1 && (near == 0 || near == n),
            })
        })
        .collect()
}

/// Least c from which the promise decides.
fn guarantee(table: &Table, oracle: &str) -> f64 {
    let rows = table.filter_eq("oracle", oracle);
    rows.rows().filter(|r| is_true(r, "guaranteed")).map(|r| r.f64("c")).fold(f64::INFINITY, f64::min)
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let mut panels = Vec::new();
    for (oracle, _) in ORACLES {
        for exponent in EXPONENTS {
            let columns =
                table.filter_eq("exponent", exponent).floats("columns k")?.first().copied().unwrap_or(f64::NAN);
            let mut series = Vec::new();
            for family in FAMILIES {
                // Where fewer than half of the instances are answered the line ends; a constant answer has no interval.
                let points: Vec<PlotPoint> = answers(table, exponent, family, oracle)?
                    .into_iter()
                    .map(|a| PlotPoint {
                        x: a.c,
                        y: if a.answered >= 0.5 { a.right.0 } else { f64::NAN },
                        interval: (!a.constant).then_some((a.right.1, a.right.2)),
                    })
                    .collect();
                if !points.is_empty() {
                    series.push(Series::new(family, points));
                }
            }
            let c = guarantee(table, oracle);
            let mut references = vec![Reference::Horizontal(0.5, "guess".into())];
            if c.is_finite() {
                references.push(Reference::Vertical(c, "promise decides".into()));
            }
            panels.push(LineChart {
                title: format!("from the {oracle}, k = L^{exponent} = {columns}"),
                x: Axis::linear("c = Γ / √ln L"),
                y: Axis::linear("share decided rightly").range(0.0, 1.0),
                series,
                references,
            });
        }
    }
    let figure = Figure::new("Planted and null nearest-neighbour instances", panels).columns(2).caption(
        "Shares of the instances answered, 95% Clopper-Pearson intervals; no interval where a method gives every instance the same answer, no point where it answers fewer than half (denominators not positive). Right of \
         the dashed line an exact oracle is right whenever the promise holds. Methods whose smallest member exceeds the budget have no line; support-basis pays for its search (findings).",
    );
    Ok(vec![NamedFigure::new("hardness", figure)])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (oracle, _) in ORACLES {
        let c = guarantee(table, oracle);
        lines.push(format!("From the {oracle}: the promise alone decides from c = {c} on (of those measured)."));
        for exponent in EXPONENTS {
            let mut words = Vec::new();
            for family in FAMILIES {
                let above: Vec<_> =
                    answers(table, exponent, family, oracle)?.into_iter().filter(|a| a.c >= c).collect();
                if above.is_empty() {
                    words.push(format!("{family} has no member this small"));
                    continue;
                }
                let answering: Vec<f64> = above.iter().map(|a| a.right.0).filter(|x| x.is_finite()).collect();
                let share = answering.iter().sum::<f64>() / answering.len() as f64;
                let constant = above.iter().all(|a| a.constant || a.answered <= 0.0);
                let answered = above.iter().map(|a| a.answered).sum::<f64>() / above.len() as f64;
                let rows =
                    table.filter_eq("exponent", exponent).filter_eq("family", family).filter_eq("oracle", oracle);
                let rows = rows.filter(|r| r.f64("c") >= c);
                let cost: Vec<f64> =
                    rows.rows().map(|r| r.f64("operations / exact")).filter(|x| x.is_finite()).collect();
                let mean = cost.iter().sum::<f64>() / cost.len() as f64;
                words.push(if cost.is_empty() {
                    format!("{family} gives no answer (denominators are not positive)")
                } else {
                    let what = if constant { "by the same answer to every instance" } else { "of its answers" };
                    let silent = if answered < 1.0 {
                        format!(", {:.0}% without an answer", 100.0 * (1.0 - answered))
                    } else {
                        String::new()
                    };
                    format!("{family} {:.0}% right {what}{silent} at {mean:.2} of the exact operations", 100.0 * share)
                });
            }
            lines.push(format!("There, with k = L^{exponent}: {}.", words.join("; ")));
        }
    }
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let exact = table.filter_eq("family", "exact").filter(|r| is_true(&r, "guaranteed"));
    let mut cheap_fail = true;
    for (oracle, _) in ORACLES {
        let c = guarantee(table, oracle);
        for exponent in EXPONENTS {
            for family in ["fitted", "positive-features", "tensor-sketch"] {
                // No answer is no success either.
                let points = answers(table, exponent, family, oracle)?;
                cheap_fail &= points.iter().filter(|a| a.c >= c).all(|a| !(a.right.0 * a.answered >= 0.9));
            }
        }
    }
    Ok(vec![
        (
            "the exact oracle is right on every instance where the promise decides".into(),
            !exact.is_empty() && exact.rows().all(|r| is_true(&r, "right")),
        ),
        (
            "polynomials, sketches and random features within the budget are right on less than 90% there".into(),
            cheap_fail,
        ),
    ])
}
