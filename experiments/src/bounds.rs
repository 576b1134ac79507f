//! Claim (\[CL-LoRA\], section 4): the error of the chained gradient is controlled term by term,
//! from the uniform error of exp to the adapters.
//!
//! Measured: the certified bound of every link (paper-notes/factorizations-and-bounds.md, section
//! 3) against the error of that link, for several factorizations and norms; and how much each link
//! loses when it is given the true error of the link before. Beside the gradient's Frobenius error
//! the parts that the theorems treat apart: p1 = P o (G V^T) and p2 = diag(delta) P, whose
//! difference is dS; adapters on Q and V alone (their special case) against Q, K and V; and the
//! largest entry's error, in which they are stated.
//!
//! Refuted if an error exceeded its bound, or no certificate promised 10% at the smallest norm,
//! where a bound that is never broken would say nothing, or if p1, p2, an entry or the special case
//! missed 10% where a certificate promises 10% of the gradient. How loose the bound is decides
//! whether it can guard a training step.
//!
//! `cargo run --release --bin bounds [-- --profile full]`; about 10 seconds, a minute in full.

use crate::harness::{Experiment, Point, Profile, seed_stream};
use ndarray::{Array1, Array2, Axis as Along};
use peft_limits::attention::contraction::upstream_gradient;
use peft_limits::attention::exact::dense;
use peft_limits::attention::factorization::{Scores, approximation, build};
use peft_limits::attention::problem::Source;
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Gradients, Request, chained};
use peft_limits::cost::Cost;
use peft_limits::limits::bounds::BoundInputs;
use peft_limits::linalg::norms::{frobenius, max_abs, relative_frobenius};
use peft_limits::report::{
    Axis, Bar, BarChart, BarSeries, Figure, LineChart, NamedFigure, Row, Series, Summary, Table,
};
use peft_limits::{Error, Result};
use rand::Rng;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "bounds",
    title: "Certified gradient error, link by link",
    claim: "The error of a chained LoRA gradient is controlled term by term (CL-LoRA, section 4): \
            from the uniform error of exp to P, O, dS and the adapters.",
    refuted_by: "an error above its bound, or polynomials whose certificates promise nothing even \
                 at the smallest norm; p1, p2, an entry of the gradient or the adapters of Q and V \
                 alone above 10% where the gradient is certified to 10%",
    doubt: "Uniform synthetic heads only, and a bound that holds there by a factor of hundreds \
            says little about how tight a better proof could be.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

const HEAD_DIM: usize = 4;
const RATIOS: [f64; 6] = [0.1, 0.2, 0.35, 0.5, 0.7, 1.0];
const SPECS: [&str; 5] = [
    "chebyshev:degree=4,check=scan",
    "chebyshev:degree=8,check=scan",
    "chebyshev:degree=8",
    "nystrom:rank=64",
    "support-basis:degree=6,threshold=0.5",
];
const LINKS: [&str; 5] = ["exp", "exp to P", "P to O", "O to dS", "dS to gradient"];

/// Columns with the errors of the parts, and their names.
const PARTS: [(&str, &str); 6] = [
    ("error of p1", "p1"),
    ("error of p2", "p2"),
    ("error of dS", "dS"),
    ("gradient error", "gradient"),
    ("gradient error, Q and V", "gradient, Q and V alone"),
    ("largest entry's error", "gradient, largest entry"),
];

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let tokens = profile.pick(256, 1024);
    let mut points = Vec::new();
    for c in RATIOS {
        for s in seed..seed + 5 {
            let label = format!("c = {c}, seed {s}");
            points.push(Point::new(label).with("tokens", tokens).with("c", c).with("seed", s));
        }
    }
    points
}

fn root_mean_square(x: &[f64]) -> f64 {
    (x.iter().map(|v| v * v).sum::<f64>() / x.len().max(1) as f64).sqrt()
}

/// 1-norms (or 2-norms) of the rows of a difference.
fn rows(a: &Array2<f64>, b: &Array2<f64>, one: bool) -> Vec<f64> {
    (a - b)
        .rows()
        .into_iter()
        .map(|r| if one { r.iter().map(|x| x.abs()).sum() } else { frobenius(&r) })
        .collect()
}

/// Largest error of an entry over the largest entry, all adapters together.
fn largest_entry_gap(ours: &Gradients<f64>, exact: &Gradients<f64>) -> f64 {
    let (mut gap, mut largest) = (0.0f64, 0.0f64);
    for ((_, a), (_, b)) in ours.named().into_iter().zip(exact.named()) {
        gap = a.iter().zip(b).fold(gap, |m, (x, y)| m.max((x - y).abs()));
        largest = largest.max(max_abs(&b.view()));
    }
    gap / largest
}

/// The same head with K's adapter merged into its weight: adapters on Q and V alone.
fn special_case(problem: &AttentionProblem<f64>) -> Result<AttentionProblem<f64>> {
    let Source::Hidden(hidden) = problem.source() else {
        return Err(Error::invalid("head", "Q, K, V", "must hold hidden states and adapters"));
    };
    let mut hidden = hidden.clone();
    if let Some(adapter) = hidden.projections.key.adapter.take() {
        hidden
            .projections
            .key
            .weight
            .scaled_add(hidden.scaling, &adapter.lora_b.dot(&adapter.lora_a));
    }
    let source = Source::Hidden(hidden);
    AttentionProblem::new(
        source,
        problem.objective().clone(),
        problem.mask(),
        problem.softmax(),
        problem.beta(),
    )
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let seed = seed_stream(point.u64("seed")?, "head").next_u64();
    let head = SyntheticHead {
        seed,
        ..SyntheticHead::new(point.usize("tokens")?, HEAD_DIM).at_threshold_ratio(point.f64("c")?)
    };
    let problem: AttentionProblem<f64> = head.draw()?;
    let projected = problem.project(&mut Cost::default());
    let exact = dense::matrices(&problem, &projected.qkv);
    let gradients = dense::gradients(&problem, Request::Adapters)?;
    let inputs = BoundInputs::new(&problem, &projected)?;
    let scores = Scores::of(&problem, &projected);
    let special = special_case(&problem)?;
    let mut found = Vec::new();
    for spec in SPECS {
        let map = build::<f64>(spec)?.prepare(&scores, &mut Cost::default())?;
        let ours = match chained::with_map(
            &problem,
            &projected,
            map.as_ref(),
            Request::Adapters,
            Cost::default(),
        ) {
            Ok(ours) => ours,
            Err(Error::NonPositiveDenominator { .. }) => continue,
            Err(error) => return Err(error),
        };
        let Some(eta) = map.certificate().exp_error_bound else { continue };
        let bound = inputs.propagate(&problem, &ours, eta);
        // The matrices of the approximation.
        let approximate = approximation(map.as_ref(), &scores);
        let shift = |i: usize| map.row_shift().map_or(0.0, |s| s[i]);
        let exp_error = approximate
            .indexed_iter()
            .fold(0.0f64, |m, ((i, j), x)| m.max((x - (exact.S[[i, j]] - shift(i)).exp()).abs()));
        let inverse = Array1::from(ours.inverse_denominators.clone()).insert_axis(Along(1));
        let p = &approximate * &inverse;
        let upstream = upstream_gradient(&problem, &ours.gradients.output);
        let delta = (&upstream * &ours.gradients.output).sum_axis(Along(1)).insert_axis(Along(1));
        let first = &p * &upstream.dot(&projected.qkv.value.t());
        let second = &p * &delta;
        let ds = &first - &second;
        let exact_first = &exact.P * &exact.G.dot(&projected.qkv.value.t());
        let exact_second = &exact_first - &exact.dS;
        let special = chained::with_map(
            &special,
            &projected,
            map.as_ref(),
            Request::Adapters,
            Cost::default(),
        )?;
        let probability_errors = rows(&p, &exact.P, true);
        let output_errors = rows(&ours.gradients.output, &exact.O, false);
        let score_errors = rows(&ds, &exact.dS, true);
        let upstream_errors = rows(&upstream, &exact.G, false);
        let relative = ours.gradients.relative_gap(&gradients);
        let norm: f64 =
            gradients.named().iter().map(|(_, a)| frobenius(&a.view()).powi(2)).sum::<f64>().sqrt();
        let gradient_error = relative * norm;
        // Each link given the true error of the one before.
        let given_exp = inputs.probability_errors(exp_error, &ours.inverse_denominators);
        let given_probabilities = inputs.output_errors(&probability_errors);
        let given_output = inputs.score_errors(
            &probability_errors,
            &upstream_errors,
            &output_errors,
            ours.gradients.output.view(),
            upstream.view(),
        );
        let given_scores = inputs.gradient_errors(
            &score_errors,
            &probability_errors,
            &upstream_errors,
            upstream.view(),
        );
        let total = given_scores.iter().map(|(_, e)| e * e).sum::<f64>().sqrt();
        let links = [
            eta / exp_error,
            root_mean_square(&given_exp) / root_mean_square(&probability_errors),
            root_mean_square(&given_probabilities) / root_mean_square(&output_errors),
            root_mean_square(&given_output) / root_mean_square(&score_errors),
            total / gradient_error,
        ];
        let mut row = Row::new()
            .with("features", spec)
            .with("columns k", map.rank())
            .with("certified eta", eta)
            .with("achieved eta", exp_error)
            .with("certified relative error", bound.relative)
            .with("certified error / norm", bound.total / norm)
            .with("gradient error", relative)
            .with("largest entry's error", largest_entry_gap(&ours.gradients, &gradients))
            .with("gradient error, Q and V", special.gradients.relative_gap(&gradients))
            .with(
                "operations, Q and V / all",
                special.gradients.cost.flops() as f64 / ours.gradients.cost.flops() as f64,
            )
            .with("error of p1", relative_frobenius(&first.view(), &exact_first.view()))
            .with("error of p2", relative_frobenius(&second.view(), &exact_second.view()))
            .with("error of dS", relative_frobenius(&ds.view(), &exact.dS.view()));
        for (name, value) in LINKS.iter().zip(links) {
            row.set(format!("looseness {name}"), value);
        }
        found.push(row);
    }
    Ok(found)
}

/// A configuration in words.
fn title(spec: &str) -> &str {
    match spec {
        "chebyshev:degree=4,check=scan" => "Chebyshev, degree 4, interval of the logits",
        "chebyshev:degree=8,check=scan" => "Chebyshev, degree 8, interval of the logits",
        "chebyshev:degree=8" => "Chebyshev, degree 8, interval Γ²",
        "nystrom:rank=64" => "coreset of 64 keys",
        "support-basis:degree=6,threshold=0.5" => "logits above 0.5 exact, degree 6",
        other => other,
    }
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let mut panels = Vec::new();
    for spec in SPECS {
        let of = table.filter_eq("features", spec);
        let line = |column: &str| -> Result<Vec<(f64, f64, f64, f64)>> {
            Ok(of
                .summarise(&["c"], column)?
                .into_iter()
                .map(|(key, s)| {
                    (
                        key[0].as_f64().unwrap_or(f64::NAN),
                        s.median,
                        s.lower_quartile,
                        s.upper_quartile,
                    )
                })
                .collect())
        };
        panels.push(LineChart {
            title: title(spec).into(),
            x: Axis::log10("c = Γ / √ln L"),
            y: Axis::log10("relative gradient error").range(1e-12, 1e6),
            series: vec![
                Series::new("certified", line("certified error / norm")?),
                Series::new("achieved", line("gradient error")?),
            ],
            references: Vec::new(),
        });
    }
    let mut first =
        Figure::new("Certified and achieved error of the gradient", panels).columns(3).caption(
            "Medians and quartiles over five heads; certified bound over the exact gradient's \
                  norm. Below 1e-13 rounding, which the bound leaves out, is all there is.",
        );
    first.share_y = true;
    let series = SPECS
        .iter()
        .map(|&spec| {
            let of = table.filter_eq("features", spec).filter(|r| r.f64("gradient error") > 1e-11);
            let bars = LINKS.iter().map(|link| {
                let s = Summary::of(&of.floats(&format!("looseness {link}")).unwrap_or_default());
                Bar { value: s.median, interval: s.quartiles() }
            });
            BarSeries { name: title(spec).into(), bars: bars.collect() }
        })
        .collect();
    let chart = BarChart {
        title: "bound over error of each link, given the true error of the link before".into(),
        group_label: "link".into(),
        groups: LINKS.iter().map(|l| l.to_string()).collect(),
        y: Axis::log10("bound / error"),
        series,
        ..Default::default()
    };
    let mut second = Figure::new("Where the certificate is loose", [chart]).caption(
        "Medians and quartiles over norms and heads whose gradient error is above 1e-11; rows in \
         root mean square.",
    );
    second.panel_size = (760.0, 360.0);
    let parts = SPECS.iter().filter(|s| !s.ends_with("degree=8")).map(|&spec| {
        let of = table.filter_eq("features", spec);
        let series = PARTS.map(|(column, name)| {
            let medians = of.summarise(&["c"], column)?.into_iter();
            let points = medians.map(|(key, s)| (key[0].as_f64().unwrap_or(f64::NAN), s.median));
            Ok(Series::new(name, points.collect::<Vec<_>>()))
        });
        Ok(LineChart {
            title: title(spec).into(),
            x: Axis::log10("c = Γ / √ln L"),
            y: Axis::log10("relative error").range(1e-12, 1e2),
            series: series.into_iter().collect::<Result<_>>()?,
            references: Vec::new(),
        })
    });
    let mut third = Figure::new("The parts of a gradient", parts.collect::<Result<Vec<_>>>()?)
        .columns(2)
        .caption(
            "Medians over five heads. p1 = P o (G V^T), p2 = diag(delta) P, dS = p1 - p2; the \
         gradient's largest error of an entry over its largest entry; the rest in the Frobenius \
         norm.",
        );
    third.share_y = true;
    Ok(vec![
        NamedFigure::new("bounds", first),
        NamedFigure::new("links", second),
        NamedFigure::new("parts", third),
    ])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for spec in SPECS {
        let of = table.filter_eq("features", spec).filter(|r| r.f64("gradient error") > 1e-11);
        if of.is_empty() {
            continue;
        }
        let median = |column: &str| -> Result<f64> { Ok(Summary::of(&of.floats(column)?).median) };
        let links: Vec<String> = LINKS
            .iter()
            .map(|link| Ok(format!("{link} {:.1}x", median(&format!("looseness {link}"))?)))
            .collect::<Result<_>>()?;
        let ratio: Vec<f64> =
            of.rows().map(|r| r.f64("certified error / norm") / r.f64("gradient error")).collect();
        let useful = of.filter(|r| r.f64("certified relative error") < 0.1);
        let largest = useful.floats("c")?.into_iter().reduce(f64::max);
        let promise = match largest {
            Some(c) => format!("It promises less than 10% up to c = {c}."),
            None => "It promises less than 10% at no c.".into(),
        };
        lines.push(format!(
            "{spec}: the certificate is {:.0} times the error (median). Link by link: {}. \
             {promise}",
            Summary::of(&ratio).median,
            links.join(", ")
        ));
    }
    for spec in SPECS {
        let of = table.filter_eq("features", spec).filter(|r| r.f64("gradient error") > 1e-11);
        let ratio = |a: &str, b: &str| {
            Summary::of(&of.rows().map(|r| r.f64(a) / r.f64(b)).collect::<Vec<_>>())
        };
        let (entry, special) = (
            ratio(PARTS[5].0, "gradient error"),
            ratio("gradient error, Q and V", "gradient error"),
        );
        let (first, second) =
            (ratio("error of p1", "gradient error"), ratio("error of p2", "gradient error"));
        lines.push(format!(
            "{spec}, over the gradient's Frobenius error (medians): the largest entry's error \
             {:.2} (at most {:.2}), p1 {:.2}, p2 {:.2}, adapters of Q and V alone {:.2} at {:.2} \
             of the operations.",
            entry.median,
            entry.max,
            first.median,
            second.median,
            special.median,
            Summary::of(&of.floats("operations, Q and V / all")?).median
        ));
    }
    lines.push(
        "The largest losses are cancellation that a worst case cannot see: errors of single pairs \
         have both signs, so rows of P and sums over tokens err far less than the sum of \
         magnitudes."
            .into(),
    );
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let holds = table.rows().all(|r| {
        r.f64("achieved eta") <= r.f64("certified eta") * (1.0 + 1e-9) + 1e-12
            && r.f64("gradient error") <= r.f64("certified error / norm") * (1.0 + 1e-9) + 1e-11
    });
    let smallest =
        table.filter(|r| r.text("features").starts_with("chebyshev") && r.f64("c") <= RATIOS[0]);
    let promises = smallest.rows().all(|r| r.f64("certified relative error") < 0.1);
    let certified = table.filter(|r| r.f64("certified relative error") < 0.1);
    let parts = certified.rows().all(|r| PARTS.iter().all(|(column, _)| r.f64(column) < 0.1));
    Ok(vec![
        (
            "no error exceeds its bound (rounding of 1e-11 \
          allowed)"
                .into(),
            holds && !table.is_empty(),
        ),
        (
            format!(
                "at c = {} the certificate of every polynomial promises less than \
                     10%",
                RATIOS[0]
            ),
            promises && !smallest.is_empty(),
        ),
        (
            "where a certificate promises 10%, so do p1, p2, dS, every entry, and the adapters of \
             Q and V alone"
                .into(),
            parts && !certified.is_empty(),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors of exp and of the gradient against bounds of 1e-3 and 1e-2, what the certificate
    /// promises, and the error of a part.
    fn made_up(exp: f64, gradient: f64, promise: f64, part: (&str, f64)) -> Vec<bool> {
        let mut table = Table::default();
        for c in RATIOS {
            for spec in SPECS {
                let row =
                    Row::new().with("c", c).with("features", spec).with("certified eta", 1e-3);
                let mut row = row.with("achieved eta", exp).with("certified error / norm", 1e-2);
                PARTS.iter().for_each(|(column, _)| row.set(*column, gradient));
                row.set(part.0, part.1);
                // A certificate may promise nothing at large norms.
                table.push(&row.with(
                    "certified relative error",
                    if c > 0.5 { f64::INFINITY } else { promise },
                ));
            }
        }
        checks(&table).unwrap().into_iter().map(|c| c.1).collect()
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        let part = ("error of p1", 0.05);
        assert_eq!(made_up(9e-4, 9e-3, 0.05, part), [true, true, true]);
        assert_eq!(made_up(1.1e-3, 9e-3, 0.05, part), [false, true, true]);
        assert_eq!(made_up(9e-4, 1.1e-2, 0.05, part), [false, true, true]);
        assert_eq!(made_up(9e-4, f64::NAN, 0.05, part), [false, true, false]);
        // Bounds that hold because they are infinite.
        assert_eq!(made_up(9e-4, 9e-3, f64::INFINITY, part), [true, false, false]);
        for (column, _) in PARTS.into_iter().filter(|(column, _)| *column != "gradient error") {
            assert_eq!(made_up(9e-4, 9e-3, 0.05, (column, 0.2)), [true, true, false], "{column}");
        }
    }
}
