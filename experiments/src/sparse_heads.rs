//! Claim: the heads of a trained decoder lie far above the threshold of \[CL-LoRA\] (c = 5 to 21)
//! and are sparse, so that a gradient from the largest probabilities alone beats the exact
//! streaming one at 1% gradient error, in counted operations and in time, with the search for those
//! entries paid for. Encoder heads (c = 3 to 6) are measured beside them. How much of an oracle's
//! gain a search leaves is the question that the lower bound (\[AS23\], \[CL-LoRA\] section 5)
//! poses.
//!
//! Measured on the first L/8, L/4, L/2 and L tokens of each head file of a folder (`--heads DIR`,
//! made by python/dump_heads.py): the threshold of `sparse` that reaches 10% and 1% gradient error
//! (f64 against dense), the entries it keeps, the fewest that an oracle needs for the error of dS,
//! effective keys, and operations and seconds of three searches relative to streaming. Times are
//! f32 by turns: one run of each way after the other, medians of the ratios.
//!
//! Refuted if the median causal head's sparse gradient with a search that is paid for does not cost
//! less than the exact one, counted or timed, at the longest L.
//!
//! `cargo run --release --bin sparse_heads [-- --heads DIR] [-- --profile full]`; about 10 seconds
//! for two heads, 10 minutes for forty of 2,048 tokens. Timed: run it alone.

use crate::harness::{Experiment, Point, Profile, head_files, heads_folder, interrupted};
use crate::real_heads::model_of;
use peft_limits::attention::exact::{dense, streaming};
use peft_limits::attention::factorization::{Scores, build};
use peft_limits::attention::{AttentionProblem, Gradients, Mask, Request, chained, file};
use peft_limits::cost::Cost;
use peft_limits::limits::exponent::fit_exponent;
use peft_limits::limits::head_phase::{effective_keys, oracle_entries};
use peft_limits::limits::prefixes::prefix;
use peft_limits::limits::threshold::{Threshold, visible_pairs};
use peft_limits::limits::trial::{natural_request, reference, trial};
use peft_limits::report::{
    Axis, Cell, Figure, LineChart, NamedFigure, PlotPoint, Reference, Row, Series, Summary, Table,
};
use peft_limits::streams::sha256_hex;
use peft_limits::{Error, Result};
use std::time::Instant;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "sparse_heads",
    title: "Trained heads on the sparse side: what the largest entries cost, and what finding them \
            costs",
    claim: "On the heads of a trained decoder a gradient from the largest probabilities alone \
            beats the exact streaming gradient at 1% error, counted and timed, with the search for \
            them paid for.",
    refuted_by: "a median decoder head whose sparse gradient with its search costs at least as \
                 much as the exact one at the longest length",
    doubt: "One small decoder on one text (positions beyond the 512 that it was trained with), or \
            two heads of one encoder; the threshold that meets the error is given, as a degree is \
            elsewhere.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(checks),
};

const TARGETS: [f64; 2] = [0.1, 0.01];
const SEARCHES: [&str; 3] = ["oracle", "exact", "tree"];
/// Shortest beginning of a head.
const SHORTEST: usize = 64;
/// Thresholds by a tenth of a decade.
const STEPS: std::ops::RangeInclusive<i32> = 2..=70;
const COUNTED: &str = "operations / exact";
const TIMED: &str = "time / exact";

fn grid(profile: Profile, _: u64) -> Vec<Point> {
    let halvings: &[u32] = profile.pick(&[2, 1, 0], &[3, 2, 1, 0]);
    let mut points = Vec::new();
    for (name, path) in head_files() {
        // The content is part of what affects the result.
        let sum = std::fs::read(path)
            .map(|bytes| sha256_hex(&bytes)[..16].to_string())
            .unwrap_or_default();
        for &halvings in halvings {
            let label = format!("{name}, L / {}", 1 << halvings);
            let point = Point::new(label).with("head", name.as_str()).with("sha256", sum.as_str());
            points.push(
                point.with("halvings", u64::from(halvings)).with("turns", profile.pick(5u64, 15)),
            );
        }
    }
    if points.is_empty() {
        // A grid cannot fail; measuring this point says what is missing.
        let none = Point::new("no head file").with("head", "").with("sha256", "");
        return vec![none.with("halvings", 0u64).with("turns", 1u64)];
    }
    points
}

fn spec(step: i32, search: &str) -> String {
    format!("sparse:threshold={:.3e},search={search}", 10f64.powf(-0.1 * f64::from(step)))
}

/// The largest threshold that reaches a gradient error, as its step.
fn smallest_step(
    problem: &AttentionProblem<f64>,
    exact: &Gradients<f64>,
    target: f64,
) -> Result<Option<i32>> {
    let reaches = |step: i32| -> Result<bool> {
        let method = build::<f64>(&spec(step, "oracle"))?;
        Ok(trial(problem, exact, method.as_ref(), natural_request(problem))?.gradient_error
            <= target)
    };
    let (mut low, mut high) = (*STEPS.start(), *STEPS.end());
    if !reaches(high)? {
        return Ok(None);
    }
    while low < high {
        let middle = (low + high) / 2;
        if reaches(middle)? { high = middle } else { low = middle + 1 }
    }
    Ok(Some(high))
}

/// Seconds of one run.
fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds of streaming, and of each spec relative to it, by turns: medians.
fn by_turns(
    problem: &AttentionProblem<f32>,
    specs: &[String],
    request: Request,
    turns: u64,
) -> Result<(f64, Vec<f64>)> {
    let methods = specs.iter().map(|s| build::<f32>(s)).collect::<Result<Vec<_>>>()?;
    let projected = problem.project(&mut Cost::default());
    let scores = Scores::of(problem, &projected);
    // An oracle is told its entries: they are found before the clock starts.
    let told = methods
        .iter()
        .zip(specs)
        .map(|(method, spec)| {
            let known = spec.ends_with("oracle");
            if known { method.prepare(&scores, &mut Cost::default()).map(Some) } else { Ok(None) }
        })
        .collect::<Result<Vec<_>>>()?;
    let mut exact = Vec::new();
    let mut ratios = vec![Vec::new(); specs.len()];
    for turn in 0..=turns {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        let whole = seconds(|| streaming::gradients(problem, request).map(drop))?;
        let mut each = Vec::new();
        for (method, map) in methods.iter().zip(&told) {
            each.push(seconds(|| match map {
                Some(map) => {
                    // Projections are part of every way's time.
                    let mut cost = Cost::default();
                    let projected = problem.project(&mut cost);
                    chained::with_map(problem, &projected, map.as_ref(), request, cost).map(drop)
                }
                None => chained::gradients(problem, method.as_ref(), request).map(drop),
            })?);
        }
        // The first turn warms up.
        if turn > 0 {
            exact.push(whole);
            ratios.iter_mut().zip(each).for_each(|(all, x)| all.push(x / whole));
        }
    }
    Ok((Summary::of(&exact).median, ratios.iter().map(|r| Summary::of(r).median).collect()))
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let name = point.text("head")?;
    let (_, path) =
        head_files().into_iter().find(|(n, _)| n == name && !name.is_empty()).ok_or_else(|| {
            let folder = heads_folder();
            let why = "no *.safetensors head file here; pass --heads DIR";
            Error::io(&folder, std::io::Error::new(std::io::ErrorKind::NotFound, why))
        })?;
    let whole: AttentionProblem<f64> = file::read_problem(&path)?;
    let problem = prefix(&whole, 0.5f64.powi(point.u64("halvings")? as i32))?;
    if problem.num_queries() < SHORTEST {
        return Ok(Vec::new());
    }
    let request = natural_request(&problem);
    let projected = problem.project(&mut Cost::default());
    let threshold = Threshold::measure(&problem, &projected, &mut Cost::default());
    let exact = reference(&problem, request)?;
    let streamed = streaming::gradients(&problem, request)?.cost;
    let pairs = visible_pairs(problem.num_queries(), problem.num_keys(), problem.mask());
    let keys = effective_keys(&problem, &projected);
    let matrices = dense::matrices(&problem, &projected.qkv);
    let upstream_values = matrices.G.dot(&projected.qkv.value.t());
    let oracle =
        oracle_entries(matrices.P.view(), matrices.dS.view(), upstream_values.view(), &TARGETS)?;
    drop((matrices, upstream_values));
    let single: AttentionProblem<f32> = problem.cast();
    let mut rows = Vec::new();
    for (target, oracle) in TARGETS.into_iter().zip(oracle) {
        let Some(step) = smallest_step(&problem, &exact, target)? else { continue };
        let specs: Vec<String> = SEARCHES.iter().map(|search| spec(step, search)).collect();
        let (exact_seconds, ratios) = by_turns(&single, &specs, request, point.u64("turns")?)?;
        for ((search, spec), time) in SEARCHES.iter().zip(&specs).zip(ratios) {
            let done = trial(&problem, &exact, build::<f64>(spec)?.as_ref(), request)?;
            let rounded =
                chained::gradients(&single, build::<f32>(spec)?.as_ref(), request)?.gradients;
            let found = done.certificate.search.unwrap_or_default();
            rows.push(
                Row::new()
                    .with("model", model_of(name))
                    .with("tokens", threshold.tokens)
                    .with("head_dim", threshold.head_dim)
                    .with("c", threshold.ratio)
                    .with("causal", problem.mask() == Mask::Causal)
                    .with("effective keys", keys)
                    .with("target", target)
                    .with("search", *search)
                    .with("features", spec.as_str())
                    .with("gradient error", done.gradient_error)
                    .with("gradient error, f32", rounded.relative_gap(&exact))
                    .with(
                        "entries a query",
                        done.certificate.corrected_pairs as f64 / problem.num_queries() as f64,
                    )
                    .with(
                        "share of entries",
                        done.certificate.corrected_pairs as f64 / pairs as f64,
                    )
                    .with(
                        "oracle entries a query, dS",
                        oracle as f64 / problem.num_queries() as f64,
                    )
                    .with("search operations", found.flops() as f64)
                    .with(COUNTED, done.cost.flops() as f64 / streamed.flops() as f64)
                    .with(TIMED, time)
                    .with("exact time (s)", exact_seconds),
            );
        }
    }
    Ok(rows)
}

/// Rows of one way.
fn way(table: &Table, model: &str, target: f64, search: &str) -> Table {
    table.filter_eq("model", model).filter_eq("target", target).filter_eq("search", search)
}

/// Median and quartiles of a column over heads, by length.
fn over_heads(rows: &Table, column: &str) -> Result<Vec<(f64, Summary)>> {
    let by_length = rows.summarise(&["tokens"], column)?;
    Ok(by_length
        .into_iter()
        .map(|(key, summary)| (key[0].to_field().parse().unwrap_or(f64::NAN), summary))
        .collect())
}

fn series(name: &str, rows: &Table, column: &str) -> Result<Series> {
    let points = over_heads(rows, column)?.into_iter().map(|(x, s)| PlotPoint {
        x,
        y: s.median,
        interval: s.quartiles(),
    });
    Ok(Series::new(name, points.collect::<Vec<_>>()))
}

fn models(table: &Table) -> Result<Vec<String>> {
    Ok(table.distinct("model")?.iter().map(Cell::to_field).collect())
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let names = [
        ("oracle", "oracle (search not counted)"),
        ("exact", "every pair looked at"),
        ("tree", "tree of boxes"),
    ];
    let mut figures = Vec::new();
    for (name, column, title, axis) in [
        (
            "counted",
            COUNTED,
            "Operations of a sparse gradient, relative to the exact one",
            "operations / exact",
        ),
        ("timed", TIMED, "Time of a sparse gradient, relative to the exact one", "time / exact"),
    ] {
        let mut panels = Vec::new();
        for model in models(table)? {
            for target in TARGETS {
                let lines = names.iter().map(|(search, name)| {
                    series(name, &way(table, &model, target, search), column)
                });
                panels.push(LineChart {
                    title: format!("{model}, {}% gradient error", 100.0 * target),
                    x: Axis::log2("tokens L"),
                    y: Axis::log10(axis),
                    series: lines.collect::<Result<_>>()?,
                    references: vec![Reference::Horizontal(1.0, "exact".into())],
                });
            }
        }
        let mut figure = Figure::new(title, panels).columns(2).caption(
            "Median and quartiles over heads. Below 1 the approximate gradient wins; the oracle is \
             told which entries are large.",
        );
        figure.share_y = true;
        figures.push(NamedFigure::new(name, figure));
    }
    let mut panels = Vec::new();
    for model in models(table)? {
        let one =
            |target, name: &str, column| series(name, &way(table, &model, target, "exact"), column);
        panels.push(LineChart {
            title: model.clone(),
            x: Axis::log2("tokens L"),
            y: Axis::log10("keys a query"),
            series: vec![
                one(0.01, "kept for 1% of the gradient", "entries a query")?,
                one(0.01, "fewest for 1% of dS (oracle)", "oracle entries a query, dS")?,
                one(0.1, "kept for 10% of the gradient", "entries a query")?,
                one(0.01, "effective keys", "effective keys")?,
            ],
            references: Vec::new(),
        });
    }
    let figure = Figure::new("Entries that a trained head needs", panels).caption(
        "Median and quartiles over heads. A need that grows more slowly than L is what \
                  sparsity can use.",
    );
    figures.push(NamedFigure::new("entries", figure));
    Ok(figures)
}

/// Median over heads of the exponent of a column against L, with quartiles and the number of heads.
fn exponent(rows: &Table, column: &str) -> Result<Summary> {
    let mut slopes = Vec::new();
    for (_, head) in rows.group_by(&["head"])? {
        let points: Vec<(f64, f64)> =
            head.rows().map(|r| (r.f64("tokens"), r.f64(column))).collect();
        if let Ok(fit) = fit_exponent(&points, 0.95) {
            slopes.push(fit.slope);
        }
    }
    Ok(Summary::of(&slopes))
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for model in models(table)? {
        let rows = table.filter_eq("model", model.as_str());
        let longest = rows.floats("tokens")?.into_iter().fold(0.0, f64::max);
        for target in TARGETS {
            let at_longest = |search: &str| {
                way(table, &model, target, search).filter(|r| r.f64("tokens") >= longest)
            };
            let heads = at_longest("exact").len();
            let ways: Vec<String> = SEARCHES
                .iter()
                .map(|&search| {
                    let all = at_longest(search);
                    let (counted, timed) =
                        (Summary::of(&all.floats(COUNTED)?), Summary::of(&all.floats(TIMED)?));
                    let wins = |column: &str| all.rows().filter(|r| r.f64(column) < 1.0).count();
                    Ok(format!(
                        "{search} {:.3} of the operations and {:.3} of the time (wins on {} and {} \
                         heads)",
                        counted.median,
                        timed.median,
                        wins(COUNTED),
                        wins(TIMED)
                    ))
                })
                .collect::<Result<_>>()?;
            lines.push(format!(
                "{model}, L = {longest}, {heads} heads, {}% gradient error, medians relative to \
                 exact streaming: {}.",
                100.0 * target,
                ways.join("; ")
            ));
        }
        let exact = way(table, &model, 0.01, "exact");
        let by_length = |column: &str| -> Result<String> {
            let medians: Vec<String> = over_heads(&exact, column)?
                .iter()
                .map(|(l, s)| format!("{:.1} at {l:.0}", s.median))
                .collect();
            Ok(medians.join(", "))
        };
        let slope = |rows: &Table, column: &str| -> Result<String> {
            let s = exponent(rows, column)?;
            Ok(format!(
                "{:.2} ({:.2} to {:.2}, n = {})",
                s.median, s.lower_quartile, s.upper_quartile, s.n
            ))
        };
        lines.push(format!(
            "{model}: for 1% of the gradient the median head keeps {} entries a query; the fewest \
             for 1% of dS are {}; effective keys {}. Exponent of entries a query in L: {} (median \
             and quartiles of the heads' own slopes).",
            by_length("entries a query")?,
            by_length("oracle entries a query, dS")?,
            by_length("effective keys")?,
            slope(&exact, "entries a query")?
        ));
        let tree = way(table, &model, 0.01, "tree");
        let ratio = |l: f64| -> Result<f64> {
            let of = |rows: &Table| {
                rows.filter(|r| r.f64("tokens").to_bits() == l.to_bits())
                    .floats("search operations")
            };
            let ratios: Vec<f64> = of(&tree)?.iter().zip(of(&exact)?).map(|(t, e)| t / e).collect();
            Ok(Summary::of(&ratios).median)
        };
        let lengths: Vec<f64> =
            over_heads(&exact, "entries a query")?.iter().map(|x| x.0).collect();
        let ratios: Vec<String> = lengths
            .iter()
            .map(|&l| Ok(format!("{:.2} at {l:.0}", ratio(l)?)))
            .collect::<Result<_>>()?;
        lines.push(format!(
            "{model}: the tree's search takes {} of the operations of looking at every pair (1%, \
             medians). Exponents in L: tree {}, every pair {}.",
            ratios.join(", "),
            slope(&tree, "search operations")?,
            slope(&exact, "search operations")?
        ));
    }
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let decoder = table.filter_eq("causal", true);
    let longest = decoder.floats("tokens").unwrap_or_default().into_iter().fold(0.0, f64::max);
    let at = |search: &str, column: &str| -> Result<f64> {
        let rows = decoder.filter_eq("target", 0.01).filter_eq("search", search);
        Ok(Summary::of(&rows.filter(|r| r.f64("tokens") >= longest).floats(column)?).median)
    };
    let mut checks = Vec::new();
    // Without a decoder's head there is nothing to refute.
    for (column, how) in
        [(COUNTED, "counted"), (TIMED, "timed")].into_iter().filter(|_| !decoder.is_empty())
    {
        let best = at("exact", column)?.min(at("tree", column)?);
        checks.push((
            format!(
                "at the longest L the median decoder head's sparse gradient at 1% with a paid \
                 search beats the exact one, {how}"
            ),
            best < 1.0,
        ));
    }
    // In f64 it does so by the search for its threshold.
    let reached = table.rows().all(|r| r.f64("gradient error, f32") <= r.f64("target") * 1.01);
    checks.push((
        "every kept set reaches its gradient error in f32 too (1% of it allowed)".into(),
        reached && !table.is_empty(),
    ));
    Ok(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_up(causal: bool, counted: f64, timed: f64, rounded: f64) -> Table {
        let mut table = Table::default();
        for head in ["m_l0_h0", "m_l0_h1", "m_l1_h0"] {
            for tokens in [512u64, 1024] {
                for target in TARGETS {
                    for search in SEARCHES {
                        table.push(
                            &Row::new()
                                .with("head", head)
                                .with("model", "m")
                                .with("causal", causal)
                                .with("tokens", tokens)
                                .with("target", target)
                                .with("search", search)
                                .with("gradient error, f32", rounded * target)
                                // An oracle, or a short head, that wins proves nothing.
                                .with(
                                    COUNTED,
                                    if search == "oracle" || tokens == 512 { 0.1 } else { counted },
                                )
                                .with(
                                    TIMED,
                                    if search == "oracle" || tokens == 512 { 0.1 } else { timed },
                                ),
                        );
                    }
                }
            }
        }
        table
    }

    #[test]
    fn a_search_that_eats_the_gain_refutes_the_claim() {
        let passed = |causal, counted, timed| -> Vec<bool> {
            checks(&made_up(causal, counted, timed, 0.9))
                .unwrap()
                .into_iter()
                .map(|c| c.1)
                .collect()
        };
        assert_eq!(passed(true, 0.4, 0.6), [true, true, true]);
        assert_eq!(passed(true, 1.02, 0.6), [false, true, true]);
        assert_eq!(passed(true, 0.4, 1.2), [true, false, true]);
        assert_eq!(passed(false, 1.4, 1.2), [true], "the claim is about decoders");
        let rounded = checks(&made_up(true, 0.4, 0.6, 1.1)).unwrap();
        assert!(!rounded[2].1, "rounding that costs the accuracy");
    }
}
