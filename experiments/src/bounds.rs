//! Claim (\[CL-LoRA\], section 4): the error of the chained gradient is controlled term by term, from the uniform error of exp to the adapters.
//!
//! Measured: the certified bound of every link (paper-notes/factorizations-and-bounds.md, section 3) against the error of that link, for
//! several factorizations and norms; and how much each link loses when it is given the true error of the link before.
//!
//! Refuted if an error exceeded its bound, or no certificate promised 10% at the smallest norm, where a bound that is never broken would
//! say nothing. How loose the bound is decides whether it can guard a training step.
//!
//! `cargo run --release --bin bounds [-- --profile full]`; about 10 seconds, a minute in full.

use crate::harness::{Experiment, Point, Profile, seed_stream};
use ndarray::{Array1, Array2, Axis as Along};
use peft_limits::attention::contraction::upstream_gradient;
use peft_limits::attention::exact::dense;
use peft_limits::attention::factorization::{Scores, approximation, build};
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Request, chained};
use peft_limits::cost::Cost;
use peft_limits::limits::bounds::BoundInputs;
use peft_limits::linalg::norms::frobenius;
use peft_limits::report::{
    Axis, Bar, BarChart, BarSeries, Figure, LineChart, NamedFigure, Row, Series, Summary, Table,
};
use peft_limits::{Error, Result};
use rand::Rng;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "bounds",
    title: "Certified gradient error, link by link",
    claim: "The error of a chained LoRA gradient is controlled term by term (CL-LoRA, section 4): from the uniform error of exp to P, O, dS and the adapters.",
    refuted_by: "an error above its bound, or polynomials whose certificates promise nothing even at the smallest norm",
    doubt: "Uniform synthetic heads only, and a bound that holds there by a factor of hundreds says little about how tight a better proof could be.",
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
    (a - b).rows().into_iter().map(|r| if one { r.iter().map(|x| x.abs()).sum() } else { frobenius(&r) }).collect()
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
    let mut found = Vec::new();
    for spec in SPECS {
        let map = build::<f64>(spec)?.prepare(&scores, &mut Cost::default())?;
        let ours = match chained::with_map(&problem, &projected, map.as_ref(), Request::Adapters, Cost::default()) {
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
        let ds = &p * &(upstream.dot(&projected.qkv.value.t()) - &delta);
        let probability_errors = rows(&p, &exact.P, true);
        let output_errors = rows(&ours.gradients.output, &exact.O, false);
        let score_errors = rows(&ds, &exact.dS, true);
        let upstream_errors = rows(&upstream, &exact.G, false);
        let relative = ours.gradients.relative_gap(&gradients);
        let norm: f64 = gradients.named().iter().map(|(_, a)| frobenius(&a.view()).powi(2)).sum::<f64>().sqrt();
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
        let given_scores =
            inputs.gradient_errors(&score_errors, &probability_errors, &upstream_errors, upstream.view());
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
            .with("gradient error", relative);
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
                .map(|(key, s)| (key[0].as_f64().unwrap_or(f64::NAN), s.median, s.lower_quartile, s.upper_quartile))
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
    let mut first = Figure::new("Certified and achieved error of the gradient", panels)
        .columns(3)
        .caption("Medians and quartiles over five heads; certified bound over the exact gradient's norm. Below 1e-13 rounding, which the bound leaves out, is all there is.");
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
        "Medians and quartiles over norms and heads whose gradient error is above 1e-11; rows in root mean square.",
    );
    second.panel_size = (760.0, 360.0);
    Ok(vec![NamedFigure::new("bounds", first), NamedFigure::new("links", second)])
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
        let ratio: Vec<f64> = of.rows().map(|r| r.f64("certified error / norm") / r.f64("gradient error")).collect();
        let useful = of.filter(|r| r.f64("certified relative error") < 0.1);
        let largest = useful.floats("c")?.into_iter().reduce(f64::max);
        let promise = match largest {
            Some(c) => format!("It promises less than 10% up to c = {c}."),
            None => "It promises less than 10% at no c.".into(),
        };
        lines.push(format!(
            "{spec}: the certificate is {:.0} times the error (median). Link by link: {}. {promise}",
            Summary::of(&ratio).median,
            links.join(", ")
        ));
    }
    lines.push(
        "The largest losses are cancellation that a worst case cannot see: errors of single pairs have both signs, so rows of P and sums over tokens err far less than the sum of magnitudes.".into(),
    );
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let holds = table.rows().all(|r| {
        r.f64("achieved eta") <= r.f64("certified eta") * (1.0 + 1e-9) + 1e-12
            && r.f64("gradient error") <= r.f64("certified error / norm") * (1.0 + 1e-9) + 1e-11
    });
    let smallest = table.filter(|r| r.text("features").starts_with("chebyshev") && r.f64("c") <= RATIOS[0]);
    let promises = smallest.rows().all(|r| r.f64("certified relative error") < 0.1);
    Ok(vec![
        ("no error exceeds its bound (rounding of 1e-11 allowed)".into(), holds && !table.is_empty()),
        (
            format!("at c = {} the certificate of every polynomial promises less than 10%", RATIOS[0]),
            promises && !smallest.is_empty(),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors of exp and of the gradient against bounds of 1e-3 and 1e-2, and what the certificate promises.
    fn made_up(exp: f64, gradient: f64, promise: f64) -> Vec<bool> {
        let mut table = Table::default();
        for c in RATIOS {
            for spec in SPECS {
                let row = Row::new().with("c", c).with("features", spec).with("certified eta", 1e-3);
                let row = row.with("achieved eta", exp).with("certified error / norm", 1e-2);
                let row = row.with("gradient error", gradient);
                // A certificate may promise nothing at large norms.
                table.push(&row.with("certified relative error", if c > 0.5 { f64::INFINITY } else { promise }));
            }
        }
        checks(&table).unwrap().into_iter().map(|c| c.1).collect()
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        assert_eq!(made_up(9e-4, 9e-3, 0.05), [true, true]);
        assert_eq!(made_up(1.1e-3, 9e-3, 0.05), [false, true]);
        assert_eq!(made_up(9e-4, 1.1e-2, 0.05), [false, true]);
        assert_eq!(made_up(9e-4, f64::NAN, 0.05), [false, true]);
        // Bounds that hold because they are infinite.
        assert_eq!(made_up(9e-4, 9e-3, f64::INFINITY), [true, false]);
    }
}
