//! Claim (\[CL-LoRA\], the hierarchical low-rank structure of the gradient): below the threshold P
//! and dS are numerically of low rank; above it their rank grows in proportion to L.
//!
//! Measured: eps-rank over L of P and of dS (relative Frobenius, eps = 1%) over (c, L), for entries
//! that fill the box (uniform) and for normal entries with the same largest entry, whose logits are
//! far smaller than Gamma^2.
//!
//! Refuted if below c = 1 a rank fraction does not at least halve from the shortest L to the
//! longest, or at the longest L does not grow with c.
//!
//! `cargo run --release --bin rank_map [-- --profile full]`; about 20 seconds, 20 minutes in full.

use crate::harness::{Experiment, Point, Profile, seed_stream};
use peft_limits::Result;
use peft_limits::attention::AttentionProblem;
use peft_limits::attention::exact::dense;
use peft_limits::attention::synthetic::{Entries, SyntheticHead};
use peft_limits::cost::Cost;
use peft_limits::limits::rank::frobenius_ranks;
use peft_limits::limits::threshold::Threshold;
use peft_limits::report::{
    Axis, Figure, HeatAxis, HeatMap, LineStyle, NamedFigure, Row, Series, Table,
};
use rand::Rng;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "rank_map",
    title: "The numerical rank of P and dS over norm and length",
    claim: "CL-LoRA: below the norm threshold the matrices of the gradient are numerically of low \
            rank (k = L^o(1)); above it they are not.",
    refuted_by: "a rank fraction below c = 1 that does not at least halve from the shortest L to \
                 the longest, or one that does not grow with c",
    doubt: "The rank is that of P and dS alone at L <= 2048 and head widths up to 8; what a method \
            that never sees P can reach may lie well above it.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

const EPS: f64 = 0.01;
const KINDS: [(&str, Entries); 2] = [("uniform", Entries::Uniform), ("normal", Entries::Normal)];

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let sizes: Vec<u64> =
        profile.pick(vec![512, 256, 128, 64, 32], vec![2048, 1024, 512, 256, 128, 64, 32]);
    let ratios = profile.pick(
        vec![0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0],
        vec![0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.5],
    );
    let mut points = Vec::new();
    for tokens in sizes {
        for &c in &ratios {
            for (kind, _) in KINDS {
                for s in 0..5 {
                    let label = format!("{kind}, L = {tokens}, c = {c}, seed {}", seed + s);
                    points.push(
                        Point::new(label)
                            .with("entries", kind)
                            .with("tokens", tokens)
                            .with("c", c)
                            .with("seed", seed + s),
                    );
                }
            }
        }
    }
    points
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let (tokens, c, kind) = (point.usize("tokens")?, point.f64("c")?, point.text("entries")?);
    let d = (tokens as f64).ln().ceil() as usize;
    let entries = if kind == "normal" { Entries::Normal } else { Entries::Uniform };
    let seed = seed_stream(point.u64("seed")?, "head").next_u64();
    let head = SyntheticHead {
        rank: 2,
        seed,
        entries,
        ..SyntheticHead::new(tokens, d).at_threshold_ratio(c)
    };
    let problem: AttentionProblem<f64> = head.draw()?;
    let projected = problem.project(&mut Cost::default());
    let threshold = Threshold::measure(&problem, &projected, &mut Cost::default());
    let matrices = dense::matrices(&problem, &projected.qkv);
    let p = frobenius_ranks(matrices.P.view(), &[EPS])?[0];
    let ds = frobenius_ranks(matrices.dS.view(), &[EPS])?[0];
    Ok(vec![
        Row::new()
            .with("head_dim", d)
            .with("largest logit", threshold.largest_logit)
            .with("largest logit / Gamma^2", threshold.concentration())
            .with("eps-rank of P", p)
            .with("eps-rank of dS", ds)
            .with("eps-rank of P / L", p as f64 / tokens as f64)
            .with("eps-rank of dS / L", ds as f64 / tokens as f64),
    ])
}

fn numbers(table: &Table, column: &str) -> Result<Vec<f64>> {
    let mut values: Vec<f64> = table.distinct(column)?.iter().filter_map(|c| c.as_f64()).collect();
    values.sort_by(f64::total_cmp);
    Ok(values)
}

/// Median of a column at one kind, c and length.
fn median(table: &Table, kind: &str, c: f64, tokens: f64, column: &str) -> Result<f64> {
    let chosen = table.filter(|r| {
        r.text("entries") == kind
            && (r.f64("c") - c).abs() < 1e-9
            && (r.f64("tokens") - tokens).abs() < 0.5
    });
    let mut v = chosen.floats(column)?;
    v.sort_by(f64::total_cmp);
    Ok(v.get(v.len() / 2).copied().unwrap_or(f64::NAN))
}

/// Shares of L whose contours are drawn.
const CONTOURS: [(f64, &str, LineStyle); 2] =
    [(0.1, "k = L / 10", LineStyle::Solid), (0.5, "k = L / 2", LineStyle::Dashed)];

/// c at which a rising row passes a share, between measured c on their logarithms; NaN if it does
/// not.
fn reached(ratios: &[f64], row: &[f64], share: f64) -> f64 {
    let pairs = ratios.windows(2).zip(row.windows(2));
    let crossing = pairs.into_iter().find_map(|(c, v)| {
        let part = (share - v[0]) / (v[1] - v[0]);
        (v[0] < share && v[1] >= share).then(|| c[0] * (c[1] / c[0]).powf(part))
    });
    crossing.unwrap_or(f64::NAN)
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let (ratios, sizes) = (numbers(table, "c")?, numbers(table, "tokens")?);
    let mut panels = Vec::new();
    for (matrix, column) in [("P", "eps-rank of P / L"), ("dS", "eps-rank of dS / L")] {
        for (kind, _) in KINDS {
            let mut values = Vec::new();
            for &tokens in &sizes {
                values.push(
                    ratios
                        .iter()
                        .map(|&c| median(table, kind, c, tokens, column))
                        .collect::<Result<Vec<f64>>>()?,
                );
            }
            let x = HeatAxis::numbers(
                Axis::log10("c = Γ / √ln L")
                    .ticks([0.25, 0.5, 1.0, 2.0, 4.0].map(|c| (c, format!("{c}")))),
                ratios.clone(),
            );
            let y = HeatAxis::numbers(Axis::log2("L (tokens)"), sizes.clone());
            let contours = CONTOURS.map(|(share, name, line)| {
                let points =
                    sizes.iter().zip(&values).map(|(&l, row)| (reached(&ratios, row, share), l));
                Series { line, markers: false, ..Series::new(name, points) }
            });
            let mut map =
                HeatMap::new(format!("{matrix}, {kind} entries"), x, y, values, "eps-rank / L");
            map.range = Some((0.0, 1.0));
            map.curves = contours.into();
            panels.push(map);
        }
    }
    let figure = Figure::new(
        "Rank fraction of the attention probabilities and of the score \
                              gradient",
        panels,
    )
    .columns(2)
    .caption(
        "Smallest rank with 1% relative Frobenius error, divided by L; medians of 5 \
                  seeds; d = ceil(ln L), beta = 1/d. Right of the solid contour the rank exceeds a \
                  tenth of L, right of the dashed one half of it: both move right as L grows.",
    );
    Ok(vec![NamedFigure::new("rank_map", figure)])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let (ratios, sizes) = (numbers(table, "c")?, numbers(table, "tokens")?);
    let (short, long) = (sizes[0], sizes[sizes.len() - 1]);
    let mut lines = Vec::new();
    for (kind, _) in KINDS {
        for (matrix, column) in [("P", "eps-rank of P / L"), ("dS", "eps-rank of dS / L")] {
            let mut falling = Vec::new();
            for &c in &ratios {
                if median(table, kind, c, long, column)?
                    < 0.5 * median(table, kind, c, short, column)?
                {
                    falling.push(c);
                }
            }
            let up_to = falling.last().map_or("at no c".to_string(), |c| format!("up to c = {c}"));
            let at_one = median(table, kind, 1.0, long, column)?;
            lines.push(format!(
                "{kind} entries, {matrix}: the rank fraction at least halves from L = {short} to \
                 {long} {up_to}; at c = 1 and L = {long} it is {at_one:.2}."
            ));
        }
        let concentration = median(table, kind, 1.0, long, "largest logit / Gamma^2")?;
        lines.push(format!(
            "{kind} entries: at L = {long} the largest logit is {:.0}% of Gamma^2.",
            100.0 * concentration
        ));
    }
    let at_one = |kind: &str| median(table, kind, 1.0, long, "eps-rank of P / L");
    lines.push(format!(
        "With the same Gamma (c = 1, L = {long}) the rank fraction of P is {:.3} for uniform and \
         {:.3} for normal entries: Gamma bounds the logits, it does not determine the rank.",
        at_one("uniform")?,
        at_one("normal")?
    ));
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let (ratios, sizes) = (numbers(table, "c")?, numbers(table, "tokens")?);
    let (short, long) = (sizes[0], sizes[sizes.len() - 1]);
    let fraction = |c: f64, l: f64| median(table, "uniform", c, l, "eps-rank of P / L");
    let mut halves = true;
    for &c in ratios.iter().filter(|&&c| c < 0.9) {
        for (kind, _) in KINDS {
            for column in ["eps-rank of P / L", "eps-rank of dS / L"] {
                halves &= median(table, kind, c, long, column)?
                    < 0.5 * median(table, kind, c, short, column)?;
            }
        }
    }
    Ok(vec![
        (
            "below c = 0.9 every rank fraction at least halves from the shortest L to the \
          longest"
                .into(),
            halves,
        ),
        (
            "uniform entries, c = 0.5: the rank fraction of P falls at least fourfold".into(),
            fraction(0.5, long)? < 0.25 * fraction(0.5, short)?,
        ),
        (
            "uniform entries, longest L: the rank fraction of P grows at least fivefold from c = \
             0.5 to c = 2"
                .into(),
            fraction(2.0, long)? > 5.0 * fraction(0.5, long)?,
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fractions that are 0.5 c at L = 32 and fall to `long` of it below c = 1 at L = 512.
    fn made_up(long: f64, high: f64) -> Table {
        let mut table = Table::default();
        for (tokens, part) in [(32u64, 1.0), (512, long)] {
            for c in [0.5, 0.75, 2.0] {
                for (kind, _) in KINDS {
                    let share = if c < 1.0 { 0.5 * c * part } else { high };
                    let row = Row::new().with("entries", kind).with("tokens", tokens).with("c", c);
                    table.push(
                        &row.with("eps-rank of P / L", share).with("eps-rank of dS / L", share),
                    );
                }
            }
        }
        table
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        let outcome =
            |table: Table| checks(&table).unwrap().iter().map(|c| c.1).collect::<Vec<_>>();
        assert_eq!(outcome(made_up(0.2, 0.8)), [true; 3]);
        // Ranks in proportion to L; ranks that fall, but slowly; ranks that do not care about c.
        assert_eq!(outcome(made_up(1.0, 0.8)), [false, false, false]);
        assert_eq!(outcome(made_up(0.4, 0.8)), [true, false, true]);
        assert_eq!(outcome(made_up(0.2, 0.06)), [true, true, false]);
        assert_eq!(outcome(made_up(f64::NAN, 0.8)), [false; 3]);
    }
}
