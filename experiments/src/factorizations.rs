//! Claim under test: which practical factorization of exp(S) gives an accurate LoRA *gradient* from
//! few columns depends on the norms. Polynomials need degrees that grow with the logits (\[AS23\],
//! \[CL-LoRA\]); positive random features (\[Performer\]) pay exp of the norms in variance; a
//! coreset of keys (\[WildCat\]) and exact large logits (\[SupportBasis\]) adapt to the head. No
//! method can be below the truncated SVD by much.
//!
//! Measured: gradient error (f64, against dense), columns k and seconds of every method over rising
//! parameters, on synthetic heads below, near and above the threshold and on every head file of
//! `--heads DIR`; at least five seeds for whatever is random.
//!
//! Refuted if random features beat the adaptive methods at large norms, or a fixed set of columns
//! were as good at every norm.
//!
//! `cargo run --release --bin factorizations [-- --profile full]`; about 30 seconds, 10 minutes in
//! full. Timed: run it alone.

use crate::harness::{
    Experiment, Point, Profile, head_files, heads_folder, interrupted, repeated_seconds,
    seed_stream,
};
use peft_limits::attention::exact::streaming;
use peft_limits::attention::factorization::build;
use peft_limits::attention::factorization::monomials::count;
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Gradients, file};
use peft_limits::cost::Cost;
use peft_limits::limits::oracle::OracleTrials;
use peft_limits::limits::threshold::Threshold;
use peft_limits::limits::trial::{natural_request, reference, trial};
use peft_limits::report::{
    Axis, Cell, Figure, LineChart, LineStyle, NamedFigure, PlotPoint, Reference, Row, Series,
    Summary, Table,
};
use peft_limits::{Error, Result};
use rand::Rng;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "factorizations",
    title: "Every practical factorization, judged on gradients",
    claim: "The columns that a LoRA gradient needs grow with the norms for every factorization. \
            Polynomials pay in degree (AS23, CL-LoRA), positive random features in variance \
            (Performer), while a coreset of keys (WildCat) and exact large logits (SupportBasis) \
            adapt; the truncated SVD is the floor.",
    refuted_by: "random features ahead of the coreset at large norms, or a method whose error does \
                 not grow with the norms",
    doubt: "At these lengths the exact gradient takes milliseconds, so that constants of the \
            implementation decide more races than the order of growth.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(checks),
};

const TOKENS: usize = 512;
const HEAD_DIM: usize = 8;
const RATIOS: [f64; 3] = [0.3, 0.8, 1.6];
const SEEDS: u64 = 5;
const TARGETS: [f64; 3] = [0.1, 0.01, 0.001];
/// Columns a token above which a method has lost to the exact gradient many times over.
const MOST_PER_TOKEN: usize = 8;
const FAMILIES: [&str; 11] = [
    "taylor",
    "chebyshev",
    "fitted",
    "positive-features",
    "positive-features (iid)",
    "tensor-sketch",
    "tensor-sketch (nonnegative)",
    "nystrom",
    "support-basis",
    "sparse",
    "truncated-svd",
];

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let tokens = profile.pick(TOKENS, 2 * TOKENS);
    let mut points = Vec::new();
    for s in seed..seed + SEEDS {
        for c in RATIOS {
            let label = format!("c = {c}, seed {s}");
            points.push(
                Point::new(label)
                    .with("head", format!("c = {c}"))
                    .with("c", c)
                    .with("tokens", tokens)
                    .with("seed", s),
            );
        }
        for (name, _) in head_files() {
            points.push(Point::new(format!("{name}, seed {s}")).with("head", name).with("seed", s));
        }
    }
    points
}

/// Specs of a family by rising cost; `random` ones take the seed.
fn ladder(family: &str, head_dim: usize, keys: usize, seed: u64) -> Vec<String> {
    let most = MOST_PER_TOKEN * keys;
    let ranks =
        |start: usize, most: usize| (0..).map(move |i| start << i).take_while(move |&k| k <= most);
    let degrees = || (1..).take_while(|&g| count(head_dim, g) <= most as u128);
    match family {
        "taylor" | "chebyshev" => {
            let check = if family == "chebyshev" { ",check=scan" } else { "" };
            degrees().map(|g| format!("{family}:degree={g},center=both{check}")).collect()
        }
        "fitted" => degrees().map(|g| format!("fitted:degree={g},seed={seed}")).collect(),
        "positive-features" => {
            ranks(16, most).map(|k| format!("{family}:rank={k},seed={seed}")).collect()
        }
        "positive-features (iid)" => ranks(16, most)
            .map(|k| format!("positive-features:rank={k},seed={seed},directions=iid"))
            .collect(),
        // The degree rises with the columns: more of them would otherwise only sharpen a biased
        // polynomial.
        "tensor-sketch" => ranks(64, most)
            .map(|k| {
                format!(
                    "{family}:degree={},rank={k},seed={seed}",
                    (k.ilog2() as usize).saturating_sub(3).clamp(2, 8)
                )
            })
            .collect(),
        "tensor-sketch (nonnegative)" => ranks((head_dim + 2) * (head_dim + 3), most)
            .enumerate()
            .map(|(i, k)| {
                format!(
                    "tensor-sketch:degree={},rank={k},seed={seed},nonnegative=true",
                    (4 + i / 2 * 2).min(8)
                )
            })
            .collect(),
        "nystrom" => ranks(8, keys).map(|k| format!("{family}:rank={k},seed={seed}")).collect(),
        "support-basis" => {
            [2.0, 1.0, 0.5, 0.25, 0.1].map(|t| format!("{family}:degree=1,threshold={t}")).to_vec()
        }
        "sparse" => [0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]
            .map(|e| format!("{family}:threshold={e}"))
            .to_vec(),
        _ => Vec::new(),
    }
}

fn read(point: &Point) -> Result<AttentionProblem<f64>> {
    if let Ok(c) = point.f64("c") {
        let seed = seed_stream(point.u64("seed")?, "head").next_u64();
        return SyntheticHead {
            seed,
            ..SyntheticHead::new(point.usize("tokens")?, HEAD_DIM).at_threshold_ratio(c)
        }
        .draw();
    }
    let name = point.text("head")?;
    match head_files().into_iter().find(|(n, _)| n == name) {
        Some((_, path)) => file::read_problem(&path),
        None => Err(Error::invalid(
            "head",
            name,
            format!("no such file in {}", heads_folder().display()),
        )),
    }
}

/// The SVD oracle over rising ranks; its decomposition is part of the time.
fn oracle(
    problem: &AttentionProblem<f64>,
    exact: &Gradients<f64>,
) -> Result<Vec<(String, usize, f64, f64)>> {
    let oracle = OracleTrials::new(problem, natural_request(problem))?;
    (0..)
        .map(|i| 4usize << i)
        .take_while(|&rank| rank <= oracle.full_rank())
        .map(|rank| {
            let (error, seconds) = oracle.trial(rank, exact)?;
            Ok((format!("truncated-svd:rank={rank}"), rank, error, seconds))
        })
        .collect()
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let problem = read(point)?;
    let request = natural_request(&problem);
    let exact = reference(&problem, request)?;
    let projected = problem.project(&mut Cost::default());
    let threshold = Threshold::measure(&problem, &projected, &mut Cost::default());
    let exact_seconds =
        repeated_seconds(5, || streaming::gradients(&problem, request).map(drop))?.median;
    let first_seed = point.u64("seed")? == 0;
    let mut rows = Vec::new();
    let mut push = |family: &str, spec: String, k: usize, pairs: u64, error: f64, seconds: f64| {
        rows.push(
            Row::new()
                .with("measured c", threshold.ratio)
                .with("largest logit", threshold.largest_logit)
                .with("family", family)
                .with("features", spec)
                .with("columns k", k)
                .with("corrected pairs", pairs as f64)
                .with("gradient error", error)
                .with(
                    "time (s)",
                    if seconds.is_finite() { Cell::Float(seconds) } else { Cell::Missing },
                )
                .with("exact time (s)", exact_seconds),
        );
    };
    for family in FAMILIES {
        // On a given head these are the same for every seed.
        let fixed =
            ["taylor", "chebyshev", "support-basis", "sparse", "truncated-svd"].contains(&family);
        if fixed && !first_seed && point.f64("c").is_err() {
            continue;
        }
        if family == "truncated-svd" {
            for (spec, k, error, seconds) in oracle(&problem, &exact)? {
                push(family, spec, k, 0, error, seconds);
            }
        }
        for spec in ladder(family, threshold.head_dim, problem.num_keys(), point.u64("seed")?) {
            if interrupted() {
                return Err(Error::Interrupted);
            }
            let k = spec
                .split([':', ','])
                .find_map(|p| p.strip_prefix("rank=")?.parse().ok())
                .unwrap_or(0);
            match trial(&problem, &exact, build(&spec)?.as_ref(), request) {
                Ok(t) => {
                    let done = t.gradient_error <= TARGETS[2];
                    push(
                        family,
                        spec,
                        t.certificate.rank,
                        t.certificate.corrected_pairs,
                        t.gradient_error,
                        t.seconds,
                    );
                    if done {
                        break;
                    }
                }
                Err(Error::NonPositiveDenominator { .. }) => {
                    let degree = spec
                        .split([':', ','])
                        .find_map(|p| p.strip_prefix("degree=")?.parse().ok())
                        .unwrap_or(1);
                    let k = if k > 0 { k } else { count(threshold.head_dim, degree) as usize };
                    push(family, spec, k, 0, f64::INFINITY, f64::NAN);
                }
                // Too few columns for this head.
                Err(Error::InvalidParam { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(rows)
}

/// Step of a ladder, seeds apart.
fn setting(spec: &str) -> String {
    spec.split(',').filter(|p| !p.starts_with("seed=")).collect::<Vec<_>>().join(",")
}

/// (columns, median error, quartiles, median seconds) of every setting of a family on one head, by
/// columns. Where at least half of the seeds had no gradient the median is infinite.
fn curve(head: &Table, family: &str) -> Vec<(f64, f64, (f64, f64), f64)> {
    let rows = head.filter_eq("family", family);
    let mut settings: Vec<(String, Vec<[f64; 3]>)> = Vec::new();
    for row in rows.rows() {
        let name = setting(&row.text("features"));
        let values = [row.f64("columns k"), row.f64("gradient error"), row.f64("time (s)")];
        match settings.iter_mut().find(|(n, _)| *n == name) {
            Some((_, all)) => all.push(values),
            None => settings.push((name, vec![values])),
        }
    }
    let mut curve: Vec<_> = settings
        .into_iter()
        .map(|(_, all)| {
            let mut errors: Vec<f64> = all.iter().map(|v| v[1]).collect();
            errors.sort_by(f64::total_cmp);
            let at = |q: f64| errors[((errors.len() - 1) as f64 * q).round() as usize];
            let seconds = Summary::of(&all.iter().map(|v| v[2]).collect::<Vec<_>>()).median;
            (all[0][0], at(0.5), (at(0.25), at(0.75)), seconds)
        })
        .collect();
    curve.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    curve
}

fn panels(table: &Table, synthetic: bool, against_time: bool) -> Result<Vec<LineChart>> {
    let mut panels = Vec::new();
    for (key, head) in table.group_by(&["head"])? {
        let name = key[0].to_field();
        if name.starts_with("c = ") != synthetic {
            continue;
        }
        let value = |column: &str| {
            head.floats(column).ok().and_then(|v| v.first().copied()).unwrap_or(f64::NAN)
        };
        // Independent directions lie on orthogonal ones; the findings give the ratio.
        let series = FAMILIES.iter().filter(|f| !f.ends_with("(iid)")).map(|&family| {
            let points =
                curve(&head, family).into_iter().map(|(k, error, (low, high), seconds)| {
                    PlotPoint {
                        x: if against_time { seconds } else { k },
                        y: error,
                        interval: (low.is_finite() && high.is_finite() && error.is_finite())
                            .then_some((low, high)),
                    }
                });
            // Seven colours for nine methods: the line tells those of one colour apart.
            let line = match family {
                "truncated-svd" => LineStyle::Dashed,
                "support-basis" => LineStyle::Dotted,
                _ => LineStyle::Solid,
            };
            Series { line, ..Series::new(family, points.collect::<Vec<_>>()) }
        });
        let (x, reference) = if against_time {
            (Axis::log10("time (s)"), Reference::Vertical(value("exact time (s)"), "exact".into()))
        } else {
            (Axis::log10("columns k"), Reference::Vertical(TOKENS as f64, "k = L".into()))
        };
        let title = if synthetic {
            format!("{name}, largest logit {:.1}", value("largest logit"))
        } else {
            format!(
                "{}: c = {:.1}, largest logit {:.1}",
                name.trim_start_matches("minilm_"),
                value("measured c"),
                value("largest logit")
            )
        };
        panels.push(LineChart {
            title,
            x,
            y: Axis::log10("relative gradient error").range(3e-4, 1e2),
            series: series.collect(),
            references: vec![reference],
        });
    }
    Ok(panels)
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let note = "Median and quartiles over five seeds; f64 against dense; arrows at the border: \
                beyond the axis, or at least half of the seeds have a denominator that is not \
                positive. support-basis has degree 1: its points differ in the threshold, so in \
                pairs corrected one by one.";
    let mut figures = Vec::new();
    for (name, title, synthetic, against_time) in [
        ("factorizations", "Gradient error against columns, synthetic heads", true, false),
        ("time", "Gradient error against time, synthetic heads", true, true),
        ("heads", "Gradient error against columns, trained heads", false, false),
        ("heads_time", "Gradient error against time, trained heads", false, true),
    ] {
        let panels = panels(table, synthetic, against_time)?;
        if !panels.is_empty() {
            let mut figure = Figure::new(title, panels).columns(3).caption(note);
            figure.share_y = true;
            figures.push(NamedFigure::new(name, figure));
        }
    }
    Ok(figures)
}

/// Fewest columns, with seconds, whose median error is within a target; by family.
fn needed(head: &Table, family: &str, target: f64) -> Option<(f64, f64)> {
    curve(head, family).into_iter().find(|p| p.1 <= target).map(|p| (p.0, p.3))
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (key, head) in table.group_by(&["head"])? {
        let exact = Summary::of(&head.floats("exact time (s)")?).median;
        for target in TARGETS {
            let mut reached: Vec<(&str, f64, f64)> = FAMILIES
                .iter()
                .filter_map(|&f| needed(&head, f, target).map(|(k, s)| (f, k, s)))
                .collect();
            reached.sort_by(|a, b| a.2.total_cmp(&b.2));
            let words: Vec<String> = reached
                .iter()
                .map(|(f, k, s)| format!("{f} k = {k} in {:.1} ms", 1e3 * s))
                .collect();
            let winner = match reached.iter().find(|r| r.0 != "truncated-svd") {
                Some((f, _, s)) if *s < exact => format!("{f} wins"),
                Some((f, ..)) => format!("exact wins ({:.1} ms), then {f}", 1e3 * exact),
                None => format!("no fast method reaches it, exact takes {:.1} ms", 1e3 * exact),
            };
            let list = if words.is_empty() { "none".to_string() } else { words.join("; ") };
            lines.push(format!(
                "{}, {}% gradient error: {winner}. Reached by: {list}.",
                key[0].to_field(),
                100.0 * target
            ));
        }
    }
    for c in RATIOS {
        let head = table.filter_eq("head", format!("c = {c}"));
        let (orthogonal, iid) =
            (curve(&head, "positive-features"), curve(&head, "positive-features (iid)"));
        let ratios: Vec<f64> = iid.iter().zip(&orthogonal).map(|(a, b)| a.1 / b.1).collect();
        lines.push(format!(
            "c = {c}: independent directions of positive features have {:.2} times the error of \
             orthogonal ones (median over k).",
            Summary::of(&ratios).median
        ));
    }
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let least = |c: f64, family: &str, most: f64| {
        let head = table.filter_eq("head", format!("c = {c}"));
        curve(&head, family)
            .into_iter()
            .filter(|p| p.0 <= most)
            .map(|p| p.1)
            .fold(f64::INFINITY, f64::min)
    };
    let grows = ["fitted", "positive-features", "tensor-sketch", "nystrom"]
        .iter()
        .all(|f| least(RATIOS[2], f, 256.0) > least(RATIOS[0], f, 256.0));
    Ok(vec![
        ("with 256 columns the error of fitted, random, sketched and coreset features is larger at \
          c = 1.6 than at c = 0.3".into(), grows),
        (
            "at c = 1.6 and 256 columns the coreset beats random features".into(),
            least(RATIOS[2], "nystrom", 256.0) < least(RATIOS[2], "positive-features", 256.0),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors of every family at the smallest and the largest c; of random features at the largest
    /// apart.
    fn made_up(low: f64, high: f64, random: f64) -> Vec<bool> {
        let mut table = Table::default();
        for (c, error) in [(RATIOS[0], low), (RATIOS[2], high)] {
            for family in FAMILIES {
                let error = if c > 1.0 && family == "positive-features" { random } else { error };
                // More columns than are judged prove nothing.
                for (k, error) in [(128u64, error), (4096, 1e-9)] {
                    let row = Row::new().with("head", format!("c = {c}")).with("family", family);
                    let row =
                        row.with("features", format!("{family}:rank={k}")).with("columns k", k);
                    table.push(&row.with("gradient error", error).with("time (s)", 1.0));
                }
            }
        }
        checks(&table).unwrap().into_iter().map(|c| c.1).collect()
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        assert_eq!(made_up(0.01, 0.3, 2.0), [true, true]);
        assert_eq!(made_up(0.01, 0.01, 2.0), [false, true], "as good at every norm");
        assert_eq!(made_up(0.01, 0.3, 0.1), [true, false], "random features ahead of the coreset");
    }
}
