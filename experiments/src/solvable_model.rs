//! Claim (ours; paper-notes/phase-diagram.md): a random head is a solvable model. The eps-ranks of
//! P and of dS, the keys that hold a query's weight and the error of all monomials up to a degree
//! follow from its law, L, d and c with nothing fitted.
//!
//! Measured: drawn heads of three laws (uniform, signs, a skewed sample) against the closed forms.
//!
//! Refuted if, where k < L / 30, an eps-rank lies more than 10% (of P) or 15% (of dS) from the
//! prediction, on average over the seeds, or the exponent of the effective keys more than 0.05.
//!
//! `cargo run --release --bin solvable_model [-- --profile full]`; about 5 seconds, 8 minutes in
//! full.

use crate::harness::{Experiment, Point, Profile, seed_stream};
use crate::random_head::{LAWS, Leading, RandomHead, law, score_gradient};
use ndarray::Array2;
use peft_limits::Result;
use peft_limits::cost::Cost;
use peft_limits::limits::phase_diagram::polynomials::energy_by_degree;
use peft_limits::limits::phase_diagram::rank::Levels;
use peft_limits::limits::phase_diagram::sample::Sample;
use peft_limits::limits::phase_diagram::{Model, energies, sparsity};
use peft_limits::linalg::decompositions::orthonormal_columns;
use peft_limits::linalg::gemm::{parallel_product, parallel_transposed_product};
use peft_limits::report::{
    Axis, Figure, LineChart, LineStyle, NamedFigure, Row, Series, Summary, Table, short_float,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "solvable_model",
    title: "A random head is a solvable model: prediction against measurement",
    claim: "The eps-ranks of P and dS, the effective keys and the error of all monomials up to a \
            degree of a random head follow in closed form, with nothing fitted.",
    refuted_by: "where k < L / 30, a mean eps-rank more than 10% (P) or 15% (dS) from its \
                 prediction; or an exponent of effective keys more than 0.05 off",
    doubt: "Coordinates are independent here; those of a trained head are not, and the closed \
            forms say nothing about it.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

const EPS: [f64; 3] = [0.3, 0.1, 0.03];
const VALUE_DIM: usize = 2;
/// Ranks are judged where the predicted k is below L over this.
const FRACTION: f64 = 30.0;

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let sizes: Vec<u64> = profile.pick(vec![1024, 512, 256], vec![8192, 4096, 2048, 1024, 512]);
    let ratios: Vec<f64> = profile.pick(vec![0.5, 1.0, 2.0], vec![0.25, 0.5, 0.75, 1.0, 1.5, 2.0]);
    let mut points = Vec::new();
    for tokens in sizes {
        for name in LAWS {
            // The longest take most of the time; the spread between heads falls with L.
            let seeds = if tokens > 4096 { 3 } else { 5 };
            for &c in ratios.iter().filter(|c| tokens <= 4096 || ((**c * 2.0).fract()).abs() < 1e-9)
            {
                for s in seed..seed + seeds {
                    let point = Point::new(format!("{name}, L = {tokens}, c = {c}, seed {s}"));
                    points.push(
                        point.with("law", name).with("tokens", tokens).with("c", c).with("seed", s),
                    );
                }
            }
        }
    }
    points
}

/// One predicted quantity.
#[derive(Clone)]
struct Prediction {
    quantity: &'static str,
    /// eps of a rank, degree of an error, 0 for keys.
    parameter: f64,
    /// For this L.
    value: f64,
    /// For tokens without end at the same d.
    endless: f64,
}

/// Of one law, L and c; the seeds share it.
fn predictions(name: &str, tokens: usize, c: f64) -> Result<Arc<Vec<Prediction>>> {
    type Known = Mutex<HashMap<String, Arc<Vec<Prediction>>>>;
    static KNOWN: OnceLock<Known> = OnceLock::new();
    let key = format!("{name} {tokens} {c}");
    let known = KNOWN.get_or_init(Mutex::default);
    if let Some(found) = known.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
        return Ok(Arc::clone(found));
    }
    let model = Model::new(law(name)?, 1.0)?;
    let length = tokens as f64;
    let (d, theta) = (model.head_dim(length), model.finite_theta(c, length));
    let p = energies(model.law(), theta)?;
    let levels = Levels::new(&p, d, EPS[EPS.len() - 1])?;
    let (of_p, of_ds) = (
        Sample::of_probabilities(&levels, length)?,
        Sample::of_score_gradient(&levels, length, VALUE_DIM)?,
    );
    let mut found = Vec::new();
    for eps in EPS {
        let count = levels.ln_rank(eps)?.exp();
        for (quantity, sample, copies) in
            [("rank of P", &of_p, 1.0), ("rank of dS", &of_ds, VALUE_DIM as f64)]
        {
            // Below a third of L the equation of the sample is solved; beyond, no rank is measured
            // either.
            if copies * count < length / 3.0 {
                found.push(Prediction {
                    quantity,
                    parameter: eps,
                    value: sample.rank(eps)?,
                    endless: copies * count,
                });
            }
        }
    }
    for (quantity, tilt) in [("keys", 1.0), ("keys of squares", 2.0)] {
        let ln = length.ln() + d as f64 * sparsity::entropy_of_coordinate(model.law(), theta, tilt);
        found.push(Prediction { quantity, parameter: 0.0, value: ln.exp(), endless: ln.exp() });
    }
    let by_degree = energy_by_degree(&p, d);
    for degree in 0..=DEGREES {
        let error = by_degree.iter().skip(degree + 1).rev().sum::<f64>().sqrt();
        let quantity = "error of monomials";
        found.push(Prediction { quantity, parameter: degree as f64, value: error, endless: error });
    }
    let found = Arc::new(found);
    known.lock().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::clone(&found));
    Ok(found)
}

/// Degrees of the measured monomials, and the longest head that they are measured on.
const DEGREES: usize = 3;
const MONOMIAL_TOKENS: usize = 1024;

fn measure(point: &Point) -> Result<Vec<Row>> {
    let (name, tokens, c) = (point.text("law")?, point.usize("tokens")?, point.f64("c")?);
    let predictions = predictions(name, tokens, c)?;
    let model = Model::new(law(name)?, 1.0)?;
    let mut rng = seed_stream(point.u64("seed")?, "head");
    let head = RandomHead::draw(&model, name, tokens, c, &mut rng);
    let (p, entropy, entropy_of_squares) = head.probabilities();
    let judged = |quantity: &str| {
        let within = predictions
            .iter()
            .filter(|x| x.quantity == quantity && x.value < tokens as f64 / FRACTION);
        within.map(|x| x.value).fold(None, |a: Option<f64>, b| Some(a.map_or(b, |a| a.max(b))))
    };
    // A quarter more than predicted: a rank beyond is no less a refutation for being unknown.
    let leading = |matrix: &Array2<f32>, quantity: &str, rng: &mut _| -> Result<Option<Leading>> {
        judged(quantity).map(|k| Leading::of(matrix, (1.25 * k) as usize + 4, rng)).transpose()
    };
    let of_p = leading(&p, "rank of P", &mut rng)?;
    let of_ds = match judged("rank of dS") {
        Some(_) => leading(&score_gradient(&p, VALUE_DIM, &mut rng), "rank of dS", &mut rng)?,
        None => None,
    };
    let errors = if tokens <= MONOMIAL_TOKENS { monomial_errors(&head, &p)? } else { Vec::new() };
    let mut rows = Vec::new();
    for x in predictions.iter() {
        let measured = match x.quantity {
            "rank of P" if x.value < tokens as f64 / FRACTION => {
                of_p.as_ref().map(|l| l.rank(x.parameter))
            }
            "rank of dS" if x.value < tokens as f64 / FRACTION => {
                of_ds.as_ref().map(|l| l.rank(x.parameter))
            }
            "keys" => Some(Some(entropy.exp())),
            "keys of squares" => Some(Some(entropy_of_squares.exp())),
            "error of monomials" => errors.get(x.parameter as usize).map(|e| Some(*e)),
            _ => None,
        };
        let Some(measured) = measured else { continue };
        rows.push(
            Row::new()
                .with("head_dim", model.head_dim(tokens as f64))
                .with("quantity", x.quantity)
                .with("eps or degree", x.parameter)
                .with("measured", measured.unwrap_or(f64::INFINITY))
                .with("predicted", x.value)
                .with("predicted, endless tokens", x.endless),
        );
    }
    Ok(rows)
}

/// Relative error of P when queries and keys are seen through all monomials up to each degree.
fn monomial_errors(head: &RandomHead, p: &Array2<f32>) -> Result<Vec<f64>> {
    let cost = &mut Cost::default();
    let p = p.mapv(f64::from);
    let total: f64 = p.iter().map(|x| x * x).sum();
    let mut errors = Vec::new();
    for degree in 0..=DEGREES {
        let sides =
            [&head.queries, &head.keys].map(|x| orthonormal_columns(monomials(x, degree).view()));
        let [left, right] = sides;
        let inner = parallel_transposed_product(
            left?.view(),
            parallel_product(p.view(), right?.view(), cost).view(),
            cost,
        );
        errors.push((1.0 - inner.iter().map(|x| x * x).sum::<f64>() / total).max(0.0).sqrt());
    }
    Ok(errors)
}

/// Every monomial up to a degree without squares of signs, whose columns would repeat.
fn monomials(x: &Array2<f32>, degree: usize) -> Array2<f64> {
    let signs = x.iter().all(|v| v.abs() > 0.999);
    let mut columns = vec![(vec![1.0; x.nrows()], 0)];
    let mut begin = 0;
    for _ in 0..degree {
        let end = columns.len();
        for i in begin..end {
            // Variables in rising order, so that each product is made once.
            for variable in columns[i].1..x.ncols() {
                let product = columns[i]
                    .0
                    .iter()
                    .zip(x.column(variable))
                    .map(|(a, b)| a * f64::from(*b))
                    .collect();
                columns.push((product, variable + usize::from(signs)));
            }
        }
        begin = end;
    }
    Array2::from_shape_fn((x.nrows(), columns.len()), |(i, j)| columns[j].0[i])
}

/// Mean of measured over predicted of every cell of the grid where the prediction may be judged.
struct Judged {
    law: String,
    quantity: String,
    tokens: f64,
    c: f64,
    parameter: f64,
    predicted: f64,
    endless: f64,
    measured: Summary,
}

fn judged(table: &Table) -> Result<Vec<Judged>> {
    let groups = table.group_by(&[
        "law",
        "quantity",
        "tokens",
        "c",
        "eps or degree",
        "predicted",
        "predicted, endless tokens",
    ])?;
    let number = |cell: &peft_limits::report::Cell| cell.as_f64().unwrap_or(f64::NAN);
    groups
        .into_iter()
        .map(|(key, t)| {
            Ok(Judged {
                law: key[0].to_short(),
                quantity: key[1].to_short(),
                tokens: number(&key[2]),
                c: number(&key[3]),
                parameter: number(&key[4]),
                predicted: number(&key[5]),
                endless: number(&key[6]),
                measured: Summary::of(&t.floats("measured")?),
            })
        })
        .collect()
}

/// Largest |measured / predicted - 1| of a quantity, with the endless count's beside it, and how
/// many cells.
fn largest_gap(cells: &[Judged], quantity: &str) -> (f64, f64, usize) {
    let of = cells.iter().filter(|x| x.quantity == quantity);
    of.fold((0.0, 0.0, 0), |(gap, endless, n), x| {
        let off = |predicted: f64| (x.measured.mean / predicted - 1.0).abs();
        // A NaN or an infinite measurement is a gap.
        let worse = |a: f64, b: f64| if b <= a { a } else { b };
        (worse(gap, off(x.predicted)), worse(endless, off(x.endless)), n + 1)
    })
}

/// Largest difference between measured and predicted exponents of keys over the lengths, and how
/// many.
fn key_exponents(cells: &[Judged]) -> (f64, usize) {
    let mut worst = (0.0f64, 0);
    for name in LAWS {
        let of = |c: f64| {
            cells
                .iter()
                .filter(move |x| x.quantity == "keys" && x.law == name && (x.c - c).abs() < 1e-9)
        };
        let mut ratios: Vec<f64> = cells.iter().map(|x| x.c).collect();
        ratios.sort_by(f64::total_cmp);
        ratios.dedup();
        for c in ratios {
            let slope = |value: fn(&Judged) -> f64| {
                let points: Vec<(f64, f64)> =
                    of(c).map(|x| (x.tokens.ln(), value(x).ln())).collect();
                let n = points.len() as f64;
                let (mx, my) = (
                    points.iter().map(|p| p.0).sum::<f64>() / n,
                    points.iter().map(|p| p.1).sum::<f64>() / n,
                );
                points.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum::<f64>()
                    / points.iter().map(|p| (p.0 - mx).powi(2)).sum::<f64>()
            };
            let gap = (slope(|x| x.measured.mean) - slope(|x| x.predicted)).abs();
            worst = (if gap <= worst.0 { worst.0 } else { gap }, worst.1 + 1);
        }
    }
    worst
}

const QUANTITIES: [(&str, &str); 4] = [
    ("rank of P", "eps-rank of P (k < L / 30)"),
    ("rank of dS", "eps-rank of dS, two value columns (k < L / 30)"),
    ("keys", "effective keys, exp(mean entropy)"),
    ("error of monomials", "error of all monomials of degree 0 to 3"),
];

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let cells = judged(table)?;
    let panels = QUANTITIES.map(|(quantity, title)| {
        let of = |name: &str| -> Vec<&Judged> {
            cells.iter().filter(|x| x.quantity == quantity && x.law == name).collect()
        };
        let mut series: Vec<Series> = LAWS
            .iter()
            .map(|name| {
                let points = of(name).into_iter().map(|x| (x.predicted, x.measured.mean));
                Series { line: LineStyle::None, ..Series::new(*name, points) }
            })
            .collect();
        let all: Vec<f64> = cells
            .iter()
            .filter(|x| x.quantity == quantity)
            .map(|x| x.predicted)
            .filter(|x| *x > 1e-4)
            .collect();
        let ends = (
            all.iter().copied().fold(f64::INFINITY, f64::min),
            all.iter().copied().fold(0.0, f64::max),
        );
        let equal = Series {
            line: LineStyle::Solid,
            markers: false,
            ..Series::new("measured = predicted", [(ends.0, ends.0), (ends.1, ends.1)])
        };
        series.push(equal);
        LineChart {
            title: title.into(),
            x: Axis::log10("predicted"),
            y: Axis::log10("measured"),
            series,
            ..LineChart::default()
        }
    });
    let sizes: Vec<f64> = table.floats("tokens")?;
    let (least, most) =
        sizes.iter().fold((f64::INFINITY, 0.0f64), |(a, b), &x| (a.min(x), b.max(x)));
    let figure = Figure::new(
        "A random head, predicted and measured: nothing is \
                              fitted",
        panels,
    )
    .columns(2)
    .caption(format!(
        "Each point is the mean of 3 to 5 drawn heads at one L ({least} to {most}), c (0.25 to 2) \
         and eps (0.3, 0.1, 0.03) or degree; d = ceil(ln L)."
    ));
    // How far off, against k / L: what the correction for a sample of L tokens is worth.
    let gaps = |name: &str, value: fn(&Judged) -> f64| -> Vec<(f64, f64)> {
        let mut points: Vec<(f64, f64)> = cells
            .iter()
            .filter(|x| x.quantity == name)
            .map(|x| (x.predicted / x.tokens, 100.0 * (x.measured.mean / value(x) - 1.0)))
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let panels = [("rank of P", "eps-rank of P"), ("rank of dS", "eps-rank of dS")].map(
        |(quantity, title)| {
            let scattered = |label: &str, points: Vec<(f64, f64)>| Series {
                line: LineStyle::None,
                ..Series::new(label, points)
            };
            LineChart {
                title: title.into(),
                x: Axis::log10("predicted k / L"),
                y: Axis::linear("measured against predicted (%)").range(-40.0, 20.0),
                series: vec![
                    scattered("endless tokens", gaps(quantity, |x| x.endless)),
                    scattered("a sample of L tokens", gaps(quantity, |x| x.predicted)),
                ],
                references: vec![
                    peft_limits::report::Reference::Horizontal(10.0, "+10%".into()),
                    peft_limits::report::Reference::Horizontal(0.0, "exact".into()),
                    peft_limits::report::Reference::Horizontal(-10.0, "-10%".into()),
                ],
            }
        },
    );
    let second = Figure::new("What L tokens see of the operator", panels).columns(2).caption(
        "Counting products of energies gives the rank for tokens without end at this d; the \
         prediction for L tokens corrects it without a fitted number. All laws, means over seeds.",
    );
    Ok(vec![NamedFigure::new("solvable_model", figure), NamedFigure::new("gaps", second)])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let cells = judged(table)?;
    let mut lines = Vec::new();
    for quantity in ["rank of P", "rank of dS"] {
        let (gap, endless, n) = largest_gap(&cells, quantity);
        lines.push(format!(
            "eps-{quantity}: over {n} cells with k < L / 30 the mean over seeds is at most {:.1}% \
             from the prediction for L tokens; from the count for tokens without end, {:.1}%.",
            100.0 * gap,
            100.0 * endless
        ));
    }
    let (gap, n) = key_exponents(&cells);
    lines.push(format!(
        "Exponents of effective keys over the lengths: at most {gap:.3} from the \
                        prediction ({n} pairs of law and c, none condensed)."
    ));
    for (quantity, what) in [
        ("keys", "Effective keys"),
        ("keys of squares", "Keys of squared weights"),
        ("error of monomials", "Errors of all monomials up to a degree"),
    ] {
        let (gap, _, n) = largest_gap(&cells, quantity);
        let worst = cells.iter().filter(|x| x.quantity == quantity).max_by(|a, b| {
            let off = |x: &Judged| (x.measured.mean / x.predicted - 1.0).abs();
            off(a).total_cmp(&off(b))
        });
        let Some(worst) = worst else { continue };
        let parameter = if quantity == "error of monomials" {
            format!(", degree {}", worst.parameter)
        } else {
            String::new()
        };
        lines.push(format!(
            "{what}: at most {:.1}% from the prediction over {n} cells, at {}, L = {}, c = \
             {}{parameter} ({} measured, {} predicted).",
            100.0 * gap,
            worst.law,
            worst.tokens,
            worst.c,
            short_float(worst.measured.mean),
            short_float(worst.predicted)
        ));
    }
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let cells = judged(table)?;
    let mut checks = Vec::new();
    // The rows of dS differ more in length than the prediction's weights say.
    for (quantity, percent) in [("rank of P", 10.0), ("rank of dS", 15.0)] {
        let (gap, _, n) = largest_gap(&cells, quantity);
        let statement =
            format!("{quantity}: every mean with k < L / 30 within {percent}% of the prediction");
        checks.push((statement, n > 0 && 100.0 * gap < percent));
    }
    let (gap, n) = key_exponents(&cells);
    checks.push((
        "exponents of effective keys within 0.05 of the prediction".into(),
        n > 0 && gap < 0.05,
    ));
    Ok(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made-up measurements: `rank` and `keys` are multiples of the predictions, the latter growing
    /// with L.
    fn made_up(rank: f64, power: f64) -> Table {
        let mut table = Table::default();
        for (tokens, seed) in [(512u64, 0u64), (512, 1), (1024, 0), (1024, 1)] {
            for name in LAWS {
                for (quantity, eps, predicted) in
                    [("rank of P", 0.1, 12.0), ("rank of dS", 0.1, 24.0), ("keys", 0.0, 80.0)]
                {
                    let factor =
                        if quantity == "keys" { (tokens as f64).powf(power) } else { rank };
                    let row = Row::new()
                        .with("law", name)
                        .with("tokens", tokens)
                        .with("c", 0.5)
                        .with("seed", seed);
                    let row = row
                        .with("quantity", quantity)
                        .with("eps or degree", eps)
                        .with("measured", predicted * factor);
                    table.push(
                        &row.with("predicted", predicted)
                            .with("predicted, endless tokens", predicted),
                    );
                }
            }
        }
        table
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        let outcome =
            |table: &Table| checks(table).unwrap().iter().map(|c| c.1).collect::<Vec<_>>();
        assert_eq!(outcome(&made_up(1.05, 0.01)), [true, true, true]);
        assert_eq!(outcome(&made_up(0.84, 0.0)), [false, false, true]);
        assert_eq!(outcome(&made_up(1.16, 0.0)), [false, false, true]);
        assert_eq!(outcome(&made_up(f64::INFINITY, 0.0)), [false, false, true]);
        assert_eq!(outcome(&made_up(1.0, 0.07)), [true, true, false]);
    }

    #[test]
    fn every_monomial_is_made_once() {
        let x = Array2::from_shape_fn((4, 3), |(i, j)| 0.1 * (1 + i + 4 * j) as f32);
        assert_eq!(monomials(&x, 2).ncols(), 10);
        assert_eq!(monomials(&x.mapv(f32::signum), 2).ncols(), 1 + 3 + 3);
    }
}
