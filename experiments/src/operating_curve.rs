//! Claim under test: in half formats a matched filter over all numbers of a training step finds
//! faults that every single tensor hides below rounding. How small a fault `peft-limits validate`
//! finds, by the trainer's number format.
//!
//! Measured on right steps of PyTorch in six methods (`--dumps DIR` for your own; those of the
//! project's tests otherwise): for every known fault of the step, which part of it makes a tensor
//! leave its tolerance, and which part is six deviations of the matched filter over all numbers.
//! The part times what the whole fault changes is the smallest change of the gradients that is
//! found. What the filter sees in the right step is chance: its amplitudes in deviations should be
//! a normal distribution's.
//!
//! Refuted if the filter found no smaller faults than the tolerances do in a half format, or if a
//! right step came near a name.
//!
//! `cargo run --release --bin operating_curve [-- --dumps DIR] [-- --profile full]`; a few seconds.

use crate::harness::{Experiment, Point, Profile, dump_folders, dumps_folder};
use peft_limits::report::{
    Axis, Figure, LineChart, LineStyle, NamedFigure, Reference, Row, Series, Summary, Table,
};
use peft_limits::streams::sha256_hex;
use peft_limits::validate::dump::{Case, DumpPaths, PlainSettings};
use peft_limits::validate::faint::{DEVIATIONS, MENTIONED, strengths};
use peft_limits::validate::{Precision, Silent};
use peft_limits::{Error, Result};
use statrs::distribution::{ContinuousCDF, Normal};

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "operating_curve",
    title: "How small a fault is found, by number format",
    claim: "In half formats a matched filter over all numbers of a step finds faults that every \
            single tensor hides below rounding, and chance alone does not move it.",
    refuted_by: "a half format in which the filter's median limit is above that of the tolerances, \
                 or amplitudes of right steps in half formats that spread over more than 1.3 \
                 deviations",
    doubt: "Steps of tiny models with random weights: with more numbers the filter finds less, \
            rounding of trained weights is larger. Faults are shrunk by a factor; a fault that \
            exists whole or not at all has its own size, not this limit.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

/// The filter is not used in single precision: sums in another order are not dithered roundings.
const SINGLE: &str = "f32";
const FORMATS: [&str; 5] = [SINGLE, "autocast-bf16", "autocast-f16", "bf16", "f16"];
const TOLERANCE: &str = "limit by tolerances";
const FILTER: &str = "limit by the filter";
const CHANCE: &str = "amplitude in deviations";

fn grid(_: Profile, _: u64) -> Vec<Point> {
    let points: Vec<Point> = dump_folders()
        .into_iter()
        .filter_map(|(name, path)| {
            let step = std::fs::read(path.join("step.safetensors")).ok()?;
            Some(
                Point::new(name.clone())
                    .with("dump", name)
                    .with("sha256", &sha256_hex(&step)[..16]),
            )
        })
        .collect();
    if points.is_empty() {
        // A grid cannot fail; measuring this point says what is missing.
        return vec![Point::new("no dump").with("dump", "").with("sha256", "")];
    }
    points
}

/// Name of a case's format; `None` in double precision, where nothing hides.
fn format_of(case: &Case) -> Option<String> {
    let format = case.rounding.coarsest();
    let name = match format {
        Precision::F64 => return None,
        Precision::F32 => "f32",
        Precision::F16 => "f16",
        Precision::Bf16 => "bf16",
    };
    Some(if case.rounding.autocast { format!("autocast-{name}") } else { name.into() })
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let name = point.text("dump")?;
    let (_, folder) = dump_folders()
        .into_iter()
        .find(|(n, _)| n == name && !name.is_empty())
        .ok_or_else(|| {
            let missing = std::io::Error::new(
                std::io::ErrorKind::NotFound,
                "no dump folder here; pass --dumps DIR",
            );
            Error::io(dumps_folder(), missing)
        })?;
    let (paths, manifest) = DumpPaths::of_folder(&folder)?;
    let case = Case::read(name, &paths, Some(&manifest), &PlainSettings::default())?;
    let Some(format) = format_of(&case) else { return Ok(Vec::new()) };
    let rows = strengths(&case, &Silent)?.into_iter().map(|s| {
        Row::new()
            .with("format", format.as_str())
            .with("fault", s.fault)
            .with("size", s.size)
            .with(TOLERANCE, s.by_tolerance * s.size)
            .with(FILTER, s.by_filter * s.size)
            .with(CHANCE, s.chance)
    });
    Ok(rows.collect())
}

fn formats(table: &Table) -> Vec<&'static str> {
    FORMATS.into_iter().filter(|f| !table.filter_eq("format", *f).is_empty()).collect()
}

/// Share of the values that are at most each of them.
fn steps(mut values: Vec<f64>) -> Vec<(f64, f64)> {
    values.sort_by(f64::total_cmp);
    let count = values.len() as f64;
    values
        .into_iter()
        .enumerate()
        .map(|(i, v)| (v, (i + 1) as f64 / count))
        .filter(|p| p.0.is_finite())
        .collect()
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let mut curves = Vec::new();
    for format in formats(table) {
        let rows = table.filter_eq("format", format);
        for (column, line) in [(TOLERANCE, LineStyle::Solid), (FILTER, LineStyle::Dashed)] {
            if format == SINGLE && column == FILTER {
                continue;
            }
            let name =
                if column == TOLERANCE { format.to_string() } else { format!("{format}, filter") };
            let series = Series::new(name, steps(rows.floats(column)?)).like(format);
            curves.push(Series { line, markers: false, ..series });
        }
    }
    let mut chance = Vec::new();
    for format in formats(table) {
        let amplitudes = steps(table.filter_eq("format", format).floats(CHANCE)?);
        chance.push(Series { markers: false, ..Series::new(format, amplitudes) });
    }
    let normal = Normal::standard();
    let curve = (-40..=40).map(|i| f64::from(i) / 10.0).map(|x| (x, normal.cdf(x)));
    chance.push(Series::prediction("normal distribution", curve));
    let panels = vec![
        LineChart {
            title: "faults found, of all that are known".into(),
            x: Axis::log10("change of the gradients |F - R| / |R|"),
            y: Axis::linear("share found"),
            series: curves,
            references: Vec::new(),
        },
        LineChart {
            title: "what the filter sees in right steps".into(),
            x: Axis::linear("amplitude (deviations)"),
            y: Axis::linear("share of amplitudes below"),
            series: chance,
            references: vec![
                Reference::Vertical(MENTIONED, "mentioned".into()),
                Reference::Vertical(DEVIATIONS, "named".into()),
            ],
        },
    ];
    let caption = "Left: for each known fault of each right step, the smallest change of the \
                   gradients that is found: solid where a tensor leaves its tolerance, dashed by \
                   the matched filter at six deviations (half formats only). Right: the filter's \
                   amplitudes where there is no fault.";
    let title = "How small a fault is found";
    Ok(vec![NamedFigure::new("operating_curve", Figure::new(title, panels).caption(caption))])
}

fn median(table: &Table, format: &str, column: &str) -> Result<f64> {
    Ok(Summary::of(&table.filter_eq("format", format).floats(column)?).median)
}

/// Root mean square of the amplitudes of right steps, in deviations, and the largest.
fn spread(table: &Table) -> Result<(f64, f64)> {
    let all = table.floats(CHANCE)?;
    let square = all.iter().map(|x| x * x).sum::<f64>() / all.len() as f64;
    Ok((square.sqrt(), all.iter().fold(0.0, |most, x| most.max(x.abs()))))
}

fn in_half_formats(table: &Table) -> Table {
    table.filter(|row| row.text("format") != SINGLE)
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for format in formats(table) {
        let rows = table.filter_eq("format", format);
        let by_tolerance = median(table, format, TOLERANCE)?;
        let found = format!(
            "{format}: half of the faults are found by a tensor's tolerance from \
             {by_tolerance:.1e} of the gradients on"
        );
        if format == SINGLE {
            lines.push(format!(
                "{found}; the filter is not used there (its amplitudes spread over {:.2} \
                 deviations).",
                spread(&rows)?.0
            ));
            continue;
        }
        let (limits, sizes) = (rows.floats(TOLERANCE)?, rows.floats("size")?);
        let hidden = limits.iter().zip(sizes).filter(|(limit, size)| *limit > size).count();
        lines.push(format!(
            "{found}, by the filter from {:.1e}; {hidden} of {} whole faults hide in every tensor.",
            median(table, format, FILTER)?,
            rows.len()
        ));
    }
    let half = in_half_formats(table);
    let (spread, largest) = spread(&half)?;
    lines.push(format!(
        "Right steps in half formats: {} amplitudes with a root mean square of {spread:.2} \
         deviations, the largest {largest:.1} (named from {DEVIATIONS} on).",
        half.len()
    ));
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let mut checks = Vec::new();
    for format in formats(table).into_iter().filter(|f| *f != SINGLE) {
        let finer = median(table, format, FILTER)? < median(table, format, TOLERANCE)?;
        checks.push((
            format!("{format}: the filter's median limit is below that of the tolerances"),
            finer,
        ));
    }
    let (spread, _) = spread(&in_half_formats(table))?;
    checks.push((
        "amplitudes of right steps in half formats spread over at most 1.3 deviations".into(),
        spread <= 1.3,
    ));
    Ok(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_up(filter: f64, spread: f64) -> Table {
        let mut table = Table::default();
        for format in FORMATS {
            for i in 0..20 {
                let sign = if i % 2 == 0 { spread } else { -spread };
                let row = Row::new().with("format", format).with("fault", "sign").with("size", 1.0);
                table.push(&row.with(TOLERANCE, 0.1).with(FILTER, filter).with(CHANCE, sign));
            }
        }
        table
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        assert!(checks(&made_up(0.01, 1.0)).unwrap().iter().all(|c| c.1));
        assert!(checks(&made_up(0.2, 1.0)).unwrap().iter().take(4).all(|c| !c.1), "no finer");
        assert!(!checks(&made_up(0.01, 2.0)).unwrap().last().unwrap().1, "spread too wide");
    }

    #[test]
    fn shares_count_what_is_never_found() {
        assert_eq!(
            steps(vec![f64::INFINITY, 2.0, 1.0, 3.0]),
            vec![(1.0, 0.25), (2.0, 0.5), (3.0, 0.75)]
        );
    }
}
