//! Claim (\[CL-LoRA\], \[AS23\], \[AS24\], made exact on random heads;
//! paper-notes/phase-diagram.md): the cost exponent of a LoRA gradient has three phases in c =
//! Gamma / sqrt(ln L). At small norms low rank is cheap, at large ones few keys hold a query's
//! weight, and in between both are dear. The theorems speak of c -> 0 and of c large enough; the
//! closed forms of all c.
//!
//! Measured: slopes of the eps-rank of P and of the effective keys over drawn heads with d = kappa
//! ln L whole, against the closed forms at the same lengths, which tend to the curves as L grows.
//!
//! Refuted if more than one in ten of the intervals of measured slopes miss the closed form by more
//! than 0.05, or low rank were not cheapest at the smallest c and sparsity at the largest.
//!
//! `cargo run --release --bin phase_diagram [-- --profile full]`; about 10 seconds, 7 minutes in
//! full.

use crate::harness::{Experiment, Point, Profile, seed_stream};
use crate::random_head::{Leading, RandomHead};
use peft_limits::Result;
use peft_limits::limits::degree::degree;
use peft_limits::limits::exponent::{Exponent, fit_exponent};
use peft_limits::limits::phase_diagram::rank::Levels;
use peft_limits::limits::phase_diagram::sample::Sample;
use peft_limits::limits::phase_diagram::{Exponents, Law, Model, energies, polynomials, sparsity};
use peft_limits::report::{
    Axis, Figure, LegendPlace, LineChart, LineStyle, NamedFigure, Reference, Row, Series, Table,
};

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "phase_diagram",
    title: "The phase diagram of a LoRA gradient: cost exponent against the norm of a random head",
    claim: "The cost exponent of a random head has three phases in c = Gamma / sqrt(ln L): low \
            rank is cheap at small norms, few keys hold a query's weight at large ones, and \
            between them both are dear.",
    refuted_by: "more than one in ten intervals of measured slopes that miss the closed form at \
                 their lengths by more than 0.05, low rank that is not cheapest at the smallest c, \
                 or sparsity at the largest",
    doubt: "Sparsity's curve is an oracle's, which is told the large entries: finding them is the \
            problem that the lower bound rests on.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

const KAPPAS: [f64; 3] = [0.5, 1.0, 2.0];
/// Error of the measured ranks.
const EPS: f64 = 0.3;
/// Both phases are called dear where neither costs less than L^1.5.
const DEAR: f64 = 0.5;
/// sqrt(16/3): from this c on the project's reduction proves hardness (paper-notes/hardness.md).
const HARD_FROM: f64 = 2.309_401_076_758_503;
/// Largest c drawn.
const LARGEST: f64 = 3.0;

/// Head widths; L = e^(d / kappa).
fn widths(kappa: f64, profile: Profile) -> Vec<u64> {
    match (kappa, profile) {
        (k, Profile::Quick) if k < 0.75 => vec![2, 3],
        (k, Profile::Full) if k < 0.75 => vec![2, 3, 4],
        (k, Profile::Quick) if k < 1.5 => vec![5, 6, 7],
        (k, Profile::Full) if k < 1.5 => vec![5, 6, 7, 8, 9],
        (_, Profile::Quick) => vec![10, 12, 14],
        (_, Profile::Full) => vec![10, 12, 14, 16, 18],
    }
}

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let ratios = profile
        .pick(vec![0.5, 1.0, 1.5, 2.0], vec![0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0]);
    let mut points = Vec::new();
    for kappa in KAPPAS {
        for d in widths(kappa, profile).into_iter().rev() {
            let tokens = (d as f64 / kappa).exp().round() as u64;
            for &c in &ratios {
                // The longest take most of the time.
                for s in seed..seed + if tokens > 5000 { 3 } else { 5 } {
                    let label = format!("kappa = {kappa}, L = {tokens}, c = {c}, seed {s}");
                    let point =
                        Point::new(label).with("kappa", kappa).with("d", d).with("tokens", tokens);
                    points.push(point.with("c", c).with("seed", s));
                }
            }
        }
    }
    points
}

/// Predicted eps-rank of a head of L tokens; none where it is too large a share of L to be measured
/// cheaply.
fn predicted_rank(d: usize, tokens: f64, c: f64) -> Result<Option<f64>> {
    let p = energies(&Law::Uniform, c * c * tokens.ln() / d as f64)?;
    let levels = Levels::new(&p, d, EPS)?;
    if levels.ln_rank(EPS)?.exp() > tokens / 8.0 {
        return Ok(None);
    }
    Ok(Some(Sample::of_probabilities(&levels, tokens)?.rank(EPS)?))
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let (kappa, c) = (point.f64("kappa")?, point.f64("c")?);
    let (d, tokens) = (point.usize("d")?, point.usize("tokens")?);
    let length = tokens as f64;
    let model = Model::new(Law::Uniform, kappa)?;
    let mut rng = seed_stream(point.u64("seed")?, "head");
    // The width is d itself: rounding L to a whole number must not add a coordinate.
    let head =
        RandomHead::draw_wide("uniform", tokens, d, c * c * length.ln() / d as f64, &mut rng);
    let (p, entropy, _) = head.probabilities();
    let theta = c * c * length.ln() / d as f64;
    let keys =
        (length.ln() + d as f64 * sparsity::entropy_of_coordinate(model.law(), theta, 1.0)).exp();
    let row = |quantity: &str, measured: f64, predicted: f64| {
        Row::new()
            .with("quantity", quantity)
            .with("measured", measured)
            .with("predicted", predicted)
    };
    let mut rows = vec![row("keys", entropy.exp(), keys)];
    if let Some(k) = predicted_rank(d, length, c)? {
        let leading = Leading::of(&p, (1.25 * k) as usize + 4, &mut rng)?;
        rows.push(row("rank", leading.rank(EPS).unwrap_or(f64::INFINITY), k));
    }
    Ok(rows)
}

/// Slope over the drawn heads, and over the closed form at the same lengths.
struct Slope {
    kappa: f64,
    c: f64,
    quantity: String,
    measured: Exponent,
    predicted: f64,
}

fn slopes(table: &Table) -> Result<Vec<Slope>> {
    let mut found = Vec::new();
    for (key, t) in table.group_by(&["kappa", "c", "quantity"])? {
        let points = |column: &str| -> Vec<(f64, f64)> {
            t.rows().map(|r| (r.f64("tokens"), r.f64(column))).collect()
        };
        // Where large k were not measured, what is left may be a single length.
        if t.distinct("tokens")?.len() < lengths(table, &key[0])? {
            continue;
        }
        let measured = points("measured");
        // A rank beyond what was looked for is no slope, but no success either.
        let lost = Exponent {
            slope: f64::INFINITY,
            low: f64::INFINITY,
            high: f64::INFINITY,
            ..fit_exponent(&points("predicted"), 0.95)?
        };
        found.push(Slope {
            kappa: key[0].as_f64().unwrap_or(f64::NAN),
            c: key[1].as_f64().unwrap_or(f64::NAN),
            quantity: key[2].to_short(),
            measured: if measured.iter().all(|p| p.1.is_finite()) {
                fit_exponent(&measured, 0.95)?
            } else {
                lost
            },
            predicted: fit_exponent(&points("predicted"), 0.95)?.slope,
        });
    }
    Ok(found)
}

/// Lengths measured at a kappa.
fn lengths(table: &Table, kappa: &peft_limits::report::Cell) -> Result<usize> {
    let kappa = kappa.as_f64().unwrap_or(f64::NAN);
    Ok(table.filter(|r| (r.f64("kappa") - kappa).abs() < 1e-9).distinct("tokens")?.len())
}

fn curves(kappa: f64) -> Result<Vec<Exponents>> {
    const POINTS: u32 = 75;
    let model = Model::new(Law::Uniform, kappa)?;
    (1..=POINTS).map(|i| model.exponents(LARGEST * f64::from(i) / f64::from(POINTS))).collect()
}

/// Slope of the count of monomials of computed degrees (not their limit) over the measured lengths.
fn computed_certified(kappa: f64, widths: &[f64], c: f64) -> Result<f64> {
    let points = widths.iter().map(|&d| {
        let length = (d / kappa).exp();
        let b = c * c * length.ln();
        Ok((length, polynomials::ln_monomials(degree(b, 0.1 * (-b).exp())? as f64, d).exp()))
    });
    Ok(fit_exponent(&points.collect::<Result<Vec<_>>>()?, 0.95)?.slope)
}

const RANK: &str = "best rank (low-rank factors)";
const CERTIFIED: &str = "certified polynomial";
const KEYS: &str = "keys that hold the weight (sparse, oracle)";

fn panel(kappa: f64, slopes: &[Slope], title: String) -> Result<LineChart> {
    let curves = curves(kappa)?;
    let line = |name: &str, f: fn(&Exponents) -> f64| Series {
        markers: false,
        ..Series::new(name, curves.iter().map(|e| (e.c, 1.0 + f(e))))
    };
    let dashed = |name: &str, like: &str, f: fn(&Exponents) -> f64| Series {
        line: LineStyle::Dashed,
        ..line(name, f).like(like)
    };
    let measured = |name: &str, like: &str, quantity: &str| {
        let of = slopes.iter().filter(|s| s.quantity == quantity && (s.kappa - kappa).abs() < 1e-9);
        let points =
            of.map(|s| (s.c, 1.0 + s.measured.slope, 1.0 + s.measured.low, 1.0 + s.measured.high));
        Series { line: LineStyle::None, ..Series::new(name, points) }.like(like)
    };
    // Which of the two is cheap: shaded under L^1.5, the height at which both are called dear.
    let region = |name: &str, like: &str, inside: &dyn Fn(&Exponents) -> bool| {
        let points = curves.iter().map(|e| {
            let low = if inside(e) { 1.0 } else { f64::NAN };
            (e.c, low, low, 2.0)
        });
        Series { markers: false, ..Series::new(name, points) }.like(like)
    };
    let finite = |name: &str, like: &str, quantity: &str| {
        let of = slopes.iter().filter(|s| s.quantity == quantity && (s.kappa - kappa).abs() < 1e-9);
        Series {
            line: LineStyle::Dotted,
            markers: false,
            ..Series::new(name, of.map(|s| (s.c, 1.0 + s.predicted)))
        }
        .like(like)
    };
    let series = vec![
        region("", RANK, &|e| e.rank < DEAR),
        region("", KEYS, &|e| e.support < DEAR && e.rank >= DEAR),
        line(CERTIFIED, |e| e.certified),
        dashed("", CERTIFIED, |e| e.certified_error_1_over_l),
        line("all monomials to the typical degree", |e| e.all_monomials),
        line(RANK, |e| e.rank),
        dashed("dashed: error 1/L", RANK, |e| e.rank_error_1_over_l.unwrap_or(f64::NAN)),
        line(KEYS, |e| e.support),
        finite("dotted: closed form at the measured lengths", RANK, "rank"),
        finite("", KEYS, "keys"),
        measured("measured rank", RANK, "rank"),
        measured("measured keys", KEYS, "keys"),
    ];
    let references = vec![
        Reference::Horizontal(2.0, "exact: 2".into()),
        Reference::Vertical(HARD_FROM, "worst case proved hard: c ≥ 2.31".into()),
    ];
    Ok(LineChart {
        title,
        x: Axis::linear("c = Γ / √(ln L)").range(0.0, LARGEST + 0.05),
        y: Axis::linear("cost exponent: L to the power of").range(0.95, 2.55),
        series,
        references,
    })
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let slopes = slopes(table)?;
    let mut main = Figure::new(
        "Three phases of a LoRA gradient on a random head",
        [panel(
            1.0,
            &slopes,
            "Blue: low rank is cheap. White: nothing is. Orange: sparsity is, for \
                              an oracle."
                .into(),
        )?],
    )
    .caption(format!(
        "d = ln L, uniform entries. Solid: closed forms for L to infinity at a fixed error; cheap \
         means below L^1.5. Points: slopes over drawn heads, 3 to 5 a length, 95% t intervals \
         (rank at error {EPS}); they follow the dotted closed form of their lengths, which tends \
         to the solid line. The reduction (SETH) is about the worst head."
    ));
    main.legend = LegendPlace::Shared;
    main.panel_size = (1000.0, 620.0);
    let mut panels = Vec::new();
    for (kappa, title) in KAPPAS.into_iter().zip(["d = ½ ln L", "d = ln L", "d = 2 ln L"]) {
        panels.push(panel(kappa, &slopes, title.into())?);
    }
    let mut three = Figure::new("The phase diagram at three head widths", panels).caption(
        "As in the first figure. The wider the head, the lower the norm at which certified \
         polynomials stop paying, and the wider the hard middle.",
    );
    three.share_y = true;
    let mut panels = Vec::new();
    for (kappa, title) in KAPPAS.into_iter().zip(["d = ½ ln L", "d = ln L", "d = 2 ln L"]) {
        let at = table.filter(|r| (r.f64("kappa") - kappa).abs() < 1e-9);
        let mut widths: Vec<f64> = at.distinct("d")?.iter().filter_map(|c| c.as_f64()).collect();
        widths.sort_by(f64::total_cmp);
        let of = |quantity: &'static str| {
            slopes.iter().filter(move |s| s.quantity == quantity && (s.kappa - kappa).abs() < 1e-9)
        };
        let closed = |quantity: &'static str, name: &str| Series {
            markers: false,
            ..Series::new(name, of(quantity).map(|s| (s.c, s.predicted)))
        };
        let drawn = |quantity: &'static str, like: &str| {
            let points =
                of(quantity).map(|s| (s.c, s.measured.slope, s.measured.low, s.measured.high));
            Series { line: LineStyle::None, ..Series::new("measured", points) }.like(like)
        };
        let mut series = vec![
            closed("rank", RANK),
            closed("keys", KEYS),
            drawn("rank", RANK),
            drawn("keys", KEYS),
        ];
        if widths.len() > 2 {
            let ratios = [0.25, 0.5, 0.75, 1.0, 1.25];
            let points = ratios
                .iter()
                .map(|&c| Ok((c, computed_certified(kappa, &widths, c)?)))
                .collect::<Result<Vec<_>>>()?;
            series.push(Series {
                markers: false,
                ..Series::new("certified polynomial, computed degrees", points)
            });
        }
        panels.push(LineChart {
            title: title.into(),
            x: Axis::linear("c = Γ / √(ln L)"),
            y: Axis::linear("slope over the measured lengths").range(-0.1, 2.0),
            series,
            ..LineChart::default()
        });
    }
    let mut finite = Figure::new(
        "Slopes at the measured lengths: closed form and drawn \
                                  heads",
        panels,
    )
    .caption(
        "Lines: the closed forms for these L and d, a sample of L tokens; points: drawn \
                  heads with 95% t intervals. Nothing is fitted to the points.",
    );
    finite.share_y = true;
    Ok(vec![
        NamedFigure::new("phase_diagram", main),
        NamedFigure::new("widths", three),
        NamedFigure::new("finite", finite),
    ])
}

/// Intervals of measured slopes that miss the closed form by more than 0.05, and how many there
/// are.
fn misses(slopes: &[Slope]) -> (usize, usize) {
    let missed = slopes.iter().filter(|s| {
        !(s.measured.low - 0.05 <= s.predicted && s.predicted <= s.measured.high + 0.05)
    });
    (missed.count(), slopes.len())
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let slopes = slopes(table)?;
    let mut lines = Vec::new();
    for kappa in KAPPAS {
        let model = Model::new(Law::Uniform, kappa)?;
        let number = |c: Option<f64>| c.map_or("never".to_string(), |c| format!("c = {c:.2}"));
        let middle = model.middle().map_or("nowhere".to_string(), |(c, e)| {
            format!("c = {c:.2} (exponent {:.2})", 1.0 + e)
        });
        lines.push(format!(
            "d = {kappa} ln L: certified polynomials pass 2 at {} (error 1/L: {}); the best rank \
             at error 1/L passes 2 at {}, at a fixed error {}; low rank and sparsity cost the same \
             at {middle}; the softmax condenses at {}.",
            number(model.certified_is_quadratic_from(0.0)),
            number(model.certified_is_quadratic_from(1.0)),
            number(model.rank_is_quadratic_from(1.0)),
            number(model.rank_is_quadratic_from(0.0)),
            number(model.condensation()),
        ));
    }
    let (missed, all) = misses(&slopes);
    let worst = slopes.iter().map(|s| (s.measured.slope - s.predicted).abs()).fold(0.0, f64::max);
    lines.push(format!(
        "{missed} of {all} measured slopes have an interval that misses the closed form at their \
         lengths by more than 0.05; the largest difference is {worst:.3}."
    ));
    for s in slopes.iter().filter(|s| (s.kappa - 1.0).abs() < 1e-9) {
        lines.push(format!(
            "d = ln L, c = {}, {}: slope {:.2} [{:.2}, {:.2}], closed form at these lengths {:.2}.",
            s.c, s.quantity, s.measured.slope, s.measured.low, s.measured.high, s.predicted
        ));
    }
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let slopes = slopes(table)?;
    let (missed, all) = misses(&slopes);
    // Measured costs at d = ln L: low rank needs few columns at the smallest c, sparsity few keys
    // at the largest.
    let at = |quantity: &str, last: bool| {
        let mut of: Vec<&Slope> = slopes
            .iter()
            .filter(|s| s.quantity == quantity && (s.kappa - 1.0).abs() < 1e-9)
            .collect();
        of.sort_by(|a, b| a.c.total_cmp(&b.c));
        if last { of.last().copied() } else { of.first().copied() }
            .map_or(f64::NAN, |s| s.measured.slope)
    };
    Ok(vec![
        (
            format!(
                "at most one in ten of {all} intervals misses the closed form by more than 0.05"
            ),
            all > 0 && missed * 10 <= all,
        ),
        (
            "d = ln L: low rank is cheaper than sparsity at the smallest c".into(),
            at("rank", false) < at("keys", false) - 0.3,
        ),
        (
            "d = ln L: keys fall with c while the rank rises".into(),
            at("keys", true) < at("keys", false) - 0.3
                && at("rank", true) > at("rank", false) + 0.1,
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made-up heads whose rank and keys have the given exponents at c = 0.5 and at c = 1.
    fn made_up(rank: [f64; 2], keys: [f64; 2], predicted: [f64; 2]) -> Table {
        let mut table = Table::default();
        for tokens in [100.0f64, 300.0, 1000.0] {
            for (i, c) in [0.5, 1.0].into_iter().enumerate() {
                for seed in 0..2 {
                    for (quantity, power, closed) in [
                        ("rank", rank[i], predicted[0] * (1 + i) as f64),
                        ("keys", keys[i], predicted[1] / (1 + i) as f64),
                    ] {
                        let row = Row::new()
                            .with("kappa", 1.0)
                            .with("d", 6)
                            .with("tokens", tokens)
                            .with("c", c)
                            .with("seed", seed);
                        let noise = 1.0 + 0.001 * f64::from(seed);
                        let row = row
                            .with("quantity", quantity)
                            .with("measured", noise * tokens.powf(power));
                        table.push(&row.with("predicted", tokens.powf(closed)));
                    }
                }
            }
        }
        table
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        let outcome =
            |table: Table| checks(&table).unwrap().iter().map(|c| c.1).collect::<Vec<_>>();
        assert_eq!(outcome(made_up([0.2, 0.4], [1.0, 0.5], [0.2, 1.0])), [true, true, true]);
        // The closed form is wrong; low rank is not cheaper; nothing changes with c.
        assert_eq!(outcome(made_up([0.2, 0.4], [1.0, 0.5], [0.5, 0.6])), [false, true, true]);
        assert_eq!(outcome(made_up([0.9, 1.2], [1.0, 0.5], [0.6, 1.0]))[1..], [false, true]);
        assert_eq!(outcome(made_up([0.2, 0.2], [0.9, 0.9], [0.2, 0.9]))[1..], [true, false]);
        assert_eq!(
            outcome(made_up([f64::INFINITY; 2], [1.0, 0.5], [0.2, 1.0]))[..2],
            [false, false]
        );
    }

    #[test]
    fn lengths_have_whole_widths() {
        for point in grid(Profile::Full, 0) {
            let (d, kappa) = (point.f64("d").unwrap(), point.f64("kappa").unwrap());
            assert!((kappa * (point.f64("tokens").unwrap()).ln() - d).abs() < 0.01);
        }
    }
}
