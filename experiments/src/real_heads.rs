//! Claim under test: trained heads live on some side of the norm threshold of \[CL-LoRA\], and that decides whether a chained
//! gradient can serve them.
//!
//! Measured on each head file of a folder (`--heads DIR`, made by python/dump_heads.py; two heads come with the project):
//! Gamma / sqrt(ln L), the largest logit, and for each factorization the fewest columns k and the time that reach 10%, 1% and
//! 0.1% gradient error (f64, against dense).
//!
//! Refuted if heads with c well above 1 had accurate gradients from few columns.
//!
//! `cargo run --release --bin real_heads [-- --heads DIR] [-- --profile full]`; about 15 seconds for two heads. Timed: run it alone.

use crate::harness::{Experiment, Point, Profile, head_files, heads_folder};
use peft_limits::attention::contraction::upstream_gradient;
use peft_limits::attention::exact::streaming;
use peft_limits::attention::factorization::build;
use peft_limits::attention::factorization::monomials::count;
use peft_limits::attention::{AttentionProblem, Gradients, file};
use peft_limits::cost::Cost;
use peft_limits::limits::oracle::OracleTrials;
use peft_limits::limits::threshold::Threshold;
use peft_limits::limits::trial::{natural_request, reference, trial};
use peft_limits::linalg::norms;
use peft_limits::report::{
    Axis, BarChart, BarSeries, Cell, Figure, LineChart, NamedFigure, Reference, Row, Series, Table,
};
use peft_limits::streams::sha256_hex;
use peft_limits::{Error, Result};
use std::time::Instant;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "real_heads",
    title: "Trained heads against the threshold, and what 1% gradient error costs on them",
    claim: "The threshold of CL-LoRA separates heads whose LoRA gradient has a cheap chained approximation from those that need the exact one. \
            Trained heads are expected above it in Gamma, far less so in their logits.",
    refuted_by: "heads with c well above 1 whose gradient a low-degree factorization reaches to 1%",
    doubt: "Six heads of one small encoder, with random adapters and a target near the output: another model, task or length may lie elsewhere.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(checks),
};

const TARGETS: [f64; 3] = [0.1, 0.01, 0.001];
const FAMILIES: [&str; 4] = ["taylor", "chebyshev", "fitted", "truncated-svd"];

fn grid(_: Profile, _: u64) -> Vec<Point> {
    let points: Vec<Point> = head_files()
        .into_iter()
        .map(|(name, path)| {
            // The content is part of what affects the result.
            let sum = std::fs::read(path).map(|bytes| sha256_hex(&bytes)[..16].to_string()).unwrap_or_default();
            Point::new(name.clone()).with("head", name).with("sha256", sum)
        })
        .collect();
    if points.is_empty() {
        // A grid cannot fail; measuring this point says what is missing.
        return vec![Point::new("no head file").with("head", "").with("sha256", "")];
    }
    points
}

/// (k, gradient error, seconds) of one family by rising k; stops once the smallest target is reached. The error is
/// infinite where an approximate denominator is not positive.
fn sweep(family: &str, problem: &AttentionProblem<f64>, exact: &Gradients<f64>) -> Result<Vec<(usize, f64, f64)>> {
    let request = natural_request(problem);
    let mut found = Vec::new();
    if family == "truncated-svd" {
        let oracle = OracleTrials::new(problem, request)?;
        let mut error_at = |rank: usize| -> Result<f64> {
            let (error, seconds) = oracle.trial(rank, exact)?;
            found.push((rank, error, seconds));
            Ok(error)
        };
        let full = oracle.full_rank();
        let mut rank = 1;
        while rank <= full {
            error_at(rank)?;
            rank *= 2;
        }
        // Bisection for each target: errors fall with the rank, up to small ripples.
        for target in TARGETS {
            let (mut low, mut high) = (0, full);
            while high - low > 1 {
                let middle = (low + high) / 2;
                if error_at(middle)? <= target { high = middle } else { low = middle }
            }
            error_at(high)?;
        }
        found.sort_by_key(|f| f.0);
        found.dedup_by_key(|f| f.0);
        return Ok(found);
    }
    for degree in 1.. {
        // More than 32 columns a token have lost to the exact gradient many times over.
        if count(problem.head_dim(), degree) > 32 * problem.num_keys() as u128 {
            break;
        }
        let options = if family == "chebyshev" { ",check=scan,center=both" } else { "" };
        let method = build::<f64>(&format!("{family}:degree={degree}{options}"))?;
        let k = count(problem.head_dim(), degree) as usize;
        match trial(problem, exact, method.as_ref(), request) {
            Ok(t) => {
                found.push((k, t.gradient_error, t.seconds));
                if t.gradient_error <= TARGETS[2] {
                    break;
                }
            }
            Err(Error::NonPositiveDenominator { .. }) => found.push((k, f64::INFINITY, f64::NAN)),
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let name = point.text("head")?;
    let (_, path) = head_files().into_iter().find(|(n, _)| n == name && !name.is_empty()).ok_or_else(|| {
        let folder = heads_folder();
        Error::io(
            &folder,
            std::io::Error::new(std::io::ErrorKind::NotFound, "no *.safetensors head file here; pass --heads DIR"),
        )
    })?;
    let problem: AttentionProblem<f64> = file::read_problem(&path)?;
    let projected = problem.project(&mut Cost::default());
    let threshold = Threshold::measure(&problem, &projected, &mut Cost::default());
    let exact = reference(&problem, natural_request(&problem))?;
    let start = Instant::now();
    let streamed = streaming::gradients(&problem, natural_request(&problem))?;
    let exact_seconds = start.elapsed().as_secs_f64();
    // Where the target is close to the output, G = O - Y is small and an error of O is a larger one of G.
    let upstream = upstream_gradient(&problem, &streamed.output);
    let amplification = norms::frobenius(&upstream.view()) / norms::frobenius(&streamed.output.view());
    let mut rows = Vec::new();
    for family in FAMILIES {
        for (k, error, seconds) in sweep(family, &problem, &exact)? {
            rows.push(
                Row::new()
                    .with("tokens", threshold.tokens)
                    .with("head_dim", threshold.head_dim)
                    .with("Gamma", threshold.gamma)
                    .with("c", threshold.ratio)
                    .with("largest logit", threshold.largest_logit)
                    .with(
                        "sqrt(largest logit / ln L)",
                        (threshold.largest_logit / (threshold.tokens as f64).ln()).sqrt(),
                    )
                    .with("||G|| / ||O||", amplification)
                    .with("family", family)
                    .with("columns k", k)
                    .with("gradient error", error)
                    .with("time (s)", if seconds.is_finite() { Cell::Float(seconds) } else { Cell::Missing })
                    .with("exact time (s)", exact_seconds),
            );
        }
    }
    Ok(rows)
}

/// Fewest columns of a family that reach a target on one head, with seconds; else the least error.
fn needed(head: &Table, family: &str, target: f64) -> std::result::Result<(f64, f64), f64> {
    let rows = head.filter_eq("family", family);
    let hit = rows.rows().find(|r| r.f64("gradient error") <= target).map(|r| (r.f64("columns k"), r.f64("time (s)")));
    hit.ok_or_else(|| rows.rows().map(|r| r.f64("gradient error")).fold(f64::INFINITY, f64::min))
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let heads = table.texts("head")?.into_iter().fold(Vec::new(), |mut seen: Vec<String>, h| {
        if !seen.contains(&h) {
            seen.push(h);
        }
        seen
    });
    let short: Vec<String> = heads.iter().map(|h| h.trim_start_matches("minilm_").to_string()).collect();
    let of = |head: &str, column: &str| {
        table.filter_eq("head", head).floats(column).ok().and_then(|v| v.first().copied()).unwrap_or(f64::NAN)
    };
    let norms = BarChart {
        title: "norm over threshold".into(),
        group_label: "head".into(),
        groups: short.clone(),
        y: Axis::linear("value / √ln L"),
        series: vec![
            BarSeries::new("Γ (bounds every logit by Γ²)", heads.iter().map(|h| of(h, "c"))),
            BarSeries::new("√(largest logit)", heads.iter().map(|h| of(h, "sqrt(largest logit / ln L)"))),
        ],
        values: true,
        ..Default::default()
    };
    let first = Figure::new("Trained heads against the norm threshold", [norms])
        .caption("c = Γ / √ln L with Γ = √(β d_h max|Q| max|K|); 1 is the threshold's scale. The largest logit is far below its bound Γ².");
    let mut panels = Vec::new();
    for (head, title) in heads.iter().zip(&short) {
        let rows = table.filter_eq("head", head.as_str());
        let series = FAMILIES.iter().map(|&family| {
            let of = rows.filter_eq("family", family);
            Series::new(family, of.rows().map(|r| (r.f64("columns k"), r.f64("gradient error"))).collect::<Vec<_>>())
        });
        let value = |column: &str| rows.floats(column).ok().and_then(|v| v.first().copied()).unwrap_or(f64::NAN);
        panels.push(LineChart {
            title: format!("{title}: c = {:.1}, largest logit {:.1}", value("c"), value("largest logit")),
            x: Axis::log10("feature columns k"),
            y: Axis::log10("relative gradient error").range(1e-4, 1e3),
            series: series.collect(),
            references: vec![Reference::Vertical(value("tokens"), "k = L".into())],
        });
    }
    let mut second = Figure::new("Gradient error against columns on trained heads", panels)
        .caption("f64 against dense. Arrows at the border: an approximate softmax denominator is not positive, so there is no gradient. The truncated SVD is the oracle, not a fast method.");
    second.share_x = true;
    Ok(vec![NamedFigure::new("threshold", first), NamedFigure::new("columns", second)])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (key, head) in table.group_by(&["head"])? {
        let value = |column: &str| head.floats(column).ok().and_then(|v| v.first().copied()).unwrap_or(f64::NAN);
        let mut reached = Vec::new();
        for target in TARGETS {
            let words: Vec<String> = FAMILIES
                .iter()
                .map(|&family| match needed(&head, family, target) {
                    Ok((k, seconds)) => format!("{family} k = {k} ({seconds:.3} s)"),
                    Err(least) if least.is_finite() => format!("{family} no (least {least:.1e})"),
                    Err(_) => format!("{family} no (no positive denominators)"),
                })
                .collect();
            reached.push(format!("{}%: {}", target * 100.0, words.join(", ")));
        }
        lines.push(format!(
            "{}: c = {:.2}, largest logit {:.2} ({:.0}% of Gamma^2), ||G|| = {:.2} ||O||. Gradient error of {}. Exact streaming takes {:.4} s.",
            key[0].to_field(),
            value("c"),
            value("largest logit"),
            100.0 * value("largest logit") / value("Gamma").powi(2),
            value("||G|| / ||O||"),
            reached.join("; "),
            value("exact time (s)")
        ));
    }
    let polynomials = &FAMILIES[..3];
    let heads = table.group_by(&["head"])?;
    let reached =
        heads.iter().filter(|(_, head)| polynomials.iter().any(|f| needed(head, f, TARGETS[0]).is_ok())).count();
    let all = format!(
        "{reached} of {} heads have a polynomial with at most 32 columns a token that reaches 10%. At head width d, degree g costs C(d + g, g) columns, and where the \
         target is near the output (||G|| small against ||O||) an error of O weighs ||O|| / ||G|| times as much in G.",
        heads.len()
    );
    lines.insert(0, all);
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let bounded = table.rows().all(|r| r.f64("largest logit") <= r.f64("Gamma").powi(2) * (1.0 + 1e-9));
    Ok(vec![("every logit is within Gamma^2".into(), bounded && !table.is_empty())])
}
