//! Claim (\[CL-LoRA\]): below the norm threshold the chained gradient is almost linear in L, so
//! from some L on it beats the exact one; here on a GPU, whose hardware suits the quadratic
//! gradient.
//!
//! Measured on the best device that this build finds (CUDA's first, else wgpu's), f32, c = 0.4:
//! seconds and counted operations of the exact streaming gradient and of the chained `taylor` ones
//! against L, for narrow and wide heads; the gradient error, at the smallest L against the
//! processor's f64 streaming, at the others against the device's streaming; and the same of the
//! exact gradient with operands rounded to every other precision that the device multiplies in.
//!
//! Refuted if the chained operations have another slope than 1, or no chained gradient overtakes
//! the exact one at any length that both reach.
//!
//! `cargo run --release --features cuda --bin gpu_crossover [-- --profile full]`. A software device
//! is accepted only with an --out folder outside `figures/`, since its times say nothing about
//! GPUs.

use crate::harness::{Experiment, Point, Profile, best_device, repeated_seconds, seed_stream};
use peft_limits::attention::exact::streaming as processor;
use peft_limits::attention::factorization::build;
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Gradients, Request};
use peft_limits::error::{Error, Result};
use peft_limits::gpu::Precision;
use peft_limits::gpu::attention::{chained, streaming};
use peft_limits::limits::exponent::{Exponent, fit_exponent};
use peft_limits::report::{Axis, Cell, Figure, LineChart, NamedFigure, Row, Series, Table};
use rand::Rng;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "gpu_crossover",
    title: "Where the chained gradient overtakes the exact one on a GPU",
    claim: "CL-LoRA: below the threshold a chained gradient costs almost linear time, so from some \
            L on it beats the exact gradient, also on a device that is good at the exact one.",
    refuted_by: "a slope of the chained operations that is not 1, or no length at which a chained \
                 gradient is faster",
    doubt: "Not measured on a real card yet; the exact gradient is built from many small kernels \
            where a fused one would be faster, so the crossing found here is a lower bound of that \
            against a fused kernel.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(checks),
};

const RATIO: f64 = 0.4;
const RANK: usize = 4;
const EXACT: &str = "streaming";
const CHAINED: [&str; 2] = ["taylor:degree=1", "taylor:degree=2"];
/// Largest error of the device's exact gradient against the processor's f64.
const ROUNDING: f64 = 1e-4;

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let device = best_device().map_or("none".to_string(), |d| d.info().to_string());
    let widths: &[u64] = profile.pick(&[8], &[8, 64]);
    let powers = profile.pick(8..=12, 10..=20);
    // Beyond it the exact gradient takes seconds for each repeat even on a large card.
    let longest_exact = profile.pick(1 << 12, 1 << 17);
    let mut points = Vec::new();
    // In the order of their cost, so that a run that is cut short has the cheap ones.
    for power in powers.clone() {
        for &width in widths {
            let tokens = 1u64 << power;
            let reference = match power == *powers.start() {
                true => "processor f64",
                false if tokens <= longest_exact => "device streaming f32",
                false => "none",
            };
            let repeats = profile.pick(3u64, if tokens > 1 << 15 { 3 } else { 10 });
            let point = Point::new(format!("d = {width}, L = {tokens}")).with("head_dim", width);
            let point = point
                .with("tokens", tokens)
                .with("c", RATIO)
                .with("exact", tokens <= longest_exact);
            let point = point.with("reference", reference).with("repeats", repeats);
            points.push(point.with("seed", seed).with("device", device.clone()));
        }
    }
    points
}

/// Seconds of one method and its last gradient; no gradient where the device refuses or fails, or a
/// denominator is not positive, with the reason in the row.
fn timed(
    method: &str,
    repeats: usize,
    mut compute: impl FnMut() -> Result<Gradients<f32>>,
) -> Result<(Row, Option<Gradients<f32>>)> {
    let row = Row::new().with("method", method);
    let mut last = None;
    let outcome = repeated_seconds(repeats, || {
        last = Some(compute()?);
        Ok(())
    });
    let seconds = match outcome {
        Ok(seconds) => seconds,
        Err(
            error @ (Error::Device { .. }
            | Error::TooLarge { .. }
            | Error::NonPositiveDenominator { .. }),
        ) => {
            return Ok((row.with("runs", false).with("reason", error.to_string()), None));
        }
        Err(error) => return Err(error),
    };
    let flops = last.as_ref().map_or(f64::NAN, |g| g.cost.flops() as f64);
    let row =
        row.with("runs", true).with("operations (flops)", flops).with("time (s)", seconds.median);
    let row = row
        .with("time, first quartile (s)", seconds.low)
        .with("time, third quartile (s)", seconds.high);
    Ok((row, last))
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let device = best_device()?;
    let (tokens, width, repeats) =
        (point.usize("tokens")?, point.usize("head_dim")?, point.usize("repeats")?);
    let seed = seed_stream(point.u64("seed")?, &format!("head {tokens} {width}")).next_u64();
    let head = SyntheticHead { rank: RANK, seed, ..SyntheticHead::new(tokens, width) };
    let head = head.at_threshold_ratio(point.f64("c")?);
    let problem: AttentionProblem<f32> = head.draw()?;
    let options = streaming::Options::default();
    let mut rows = Vec::new();
    let mut exact = None;
    let mut rounded = Vec::new();
    if point.bool("exact")? {
        let compute = || streaming::gradients(&device, &problem, Request::Adapters, &options);
        let (row, gradients) = timed(EXACT, repeats, compute)?;
        rows.push(row);
        exact = gradients;
        for precision in device.precisions().into_iter().filter(|&p| p != Precision::F32) {
            let options = streaming::Options { precision, ..options };
            let compute = || streaming::gradients(&device, &problem, Request::Adapters, &options);
            rounded.push(timed(&format!("{EXACT}, {precision}"), repeats, compute)?);
        }
    }
    let reference: Option<Gradients<f64>> = match point.text("reference")? {
        "processor f64" => Some(processor::gradients(&head.draw::<f64>()?, Request::Adapters)?),
        _ => None,
    };
    if let (Some(row), Some(ours), Some(reference)) = (rows.first_mut(), &exact, &reference) {
        row.set("gradient error", ours.relative_gap(reference));
    }
    for spec in CHAINED {
        let factorization = build::<f32>(spec)?;
        let compute = || {
            let result = chained::gradients(
                &device,
                &problem,
                factorization.as_ref(),
                Request::Adapters,
                &options,
            )?;
            Ok(result.gradients)
        };
        rounded.push(timed(spec, repeats, compute)?);
    }
    for (mut row, gradients) in rounded {
        let error = gradients.and_then(|g| match &reference {
            Some(reference) => Some(g.relative_gap(reference)),
            None => exact.as_ref().map(|exact| g.relative_gap(exact)),
        });
        if let Some(error) = error {
            row.set("gradient error", error);
        }
        rows.push(row);
    }
    Ok(rows)
}

fn ran(table: &Table, width: i128, method: &str) -> Table {
    table.filter_eq("head_dim", width).filter_eq("method", method).filter_eq("runs", true)
}

fn law(table: &Table, width: i128, method: &str, column: &str) -> Result<Exponent> {
    let rows = ran(table, width, method);
    let points: Vec<(f64, f64)> = rows.rows().map(|r| (r.f64("tokens"), r.f64(column))).collect();
    fit_exponent(&points, 0.95)
}

/// The methods in the order of the table: exact in f32, exact with rounded operands, chained.
fn methods(table: &Table) -> Result<Vec<String>> {
    Ok(table.distinct("method")?.iter().map(Cell::to_field).collect())
}

fn widths(table: &Table) -> Result<Vec<i128>> {
    Ok(table
        .distinct("head_dim")?
        .iter()
        .filter_map(|cell| cell.as_f64())
        .map(|w| w as i128)
        .collect())
}

/// First length from which `method` is faster than the exact gradient at every longer one that the
/// latter reaches.
fn wins_from(table: &Table, width: i128, method: &str) -> Option<f64> {
    let chained = ran(table, width, method);
    let mut first = None;
    for exact in ran(table, width, EXACT).rows().collect::<Vec<_>>().iter().rev() {
        let same = chained.filter_eq("tokens", exact.get("tokens").cloned());
        let Some(seconds) = same.rows().map(|r| r.f64("time (s)")).next() else { break };
        // Written so that NaN is not a win.
        if !(seconds < exact.f64("time (s)")) {
            break;
        }
        first = Some(exact.f64("tokens"));
    }
    first
}

fn device_name(table: &Table) -> Result<String> {
    Ok(table.texts("device")?.first().cloned().unwrap_or_default())
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let mut panels = Vec::new();
    for column in ["time (s)", "gradient error"] {
        for width in widths(table)? {
            let series = methods(table)?.into_iter().map(|method| {
                let rows = ran(table, width, &method);
                let points = rows.rows().filter(|r| r.f64(column).is_finite()).map(|r| {
                    let y = r.f64(column);
                    let (low, high) = match column {
                        "time (s)" => {
                            (r.f64("time, first quartile (s)"), r.f64("time, third quartile (s)"))
                        }
                        _ => (y, y),
                    };
                    (r.f64("tokens"), y, low, high)
                });
                Series::new(method, points.collect::<Vec<_>>())
            });
            panels.push(LineChart {
                title: format!("d = {width}"),
                x: Axis::log2("sequence length L (tokens)"),
                y: Axis::log10(column),
                series: series.collect(),
                ..LineChart::default()
            });
        }
    }
    let mut figure = Figure::new(
        "One LoRA gradient on a GPU: exact against \
                                  chained",
        panels,
    )
    .caption(format!(
        "{}, f32, r = {RANK}, c = {RATIO}, uniform entries, adapters of Q, K and V. Medians with \
         quartiles, the head sent and the gradients fetched each time. Errors: at the smallest L \
         against the processor's f64, then against the device's streaming.",
        device_name(table)?
    ));
    figure.share_y = false;
    Ok(vec![NamedFigure::new("gpu_crossover", figure)])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut all = vec![format!("Device: {}.", device_name(table)?)];
    let slope = |law: Result<Exponent>| match law {
        Ok(e) => format!("{:.2} [{:.2}, {:.2}]", e.slope, e.low, e.high),
        Err(_) => "unknown (too few lengths)".into(),
    };
    for width in widths(table)? {
        let exact = slope(law(table, width, EXACT, "time (s)"));
        let rows = ran(table, width, EXACT);
        let rounding = rows
            .rows()
            .map(|r| r.f64("gradient error"))
            .find(|e| e.is_finite())
            .unwrap_or(f64::NAN);
        all.push(format!(
            "d = {width}, {EXACT}: slope of time {exact}; error against the processor's f64 \
             {rounding:.1e}."
        ));
        for method in methods(table)?.iter().filter(|m| m.starts_with(EXACT) && *m != EXACT) {
            let rows = ran(table, width, method);
            let error = rows
                .rows()
                .map(|r| r.f64("gradient error"))
                .find(|e| e.is_finite())
                .unwrap_or(f64::NAN);
            let f32_rows = ran(table, width, EXACT);
            let last = |t: &Table| t.rows().last().map_or(f64::NAN, |r| r.f64("time (s)"));
            let ratio = last(&f32_rows) / last(&rows);
            all.push(format!(
                "d = {width}, {method} operands: {ratio:.2} times the speed of f32 at the longest \
                 length; error against the processor's f64 {error:.1e}."
            ));
        }
        for method in CHAINED {
            let errors = ran(table, width, method).floats("gradient error")?;
            let worst = errors.into_iter().filter(|e| e.is_finite()).fold(0.0, f64::max);
            let wins = match wins_from(table, width, method) {
                Some(tokens) => format!("faster than exact from L = {tokens} on"),
                None => "not faster at the longest length of the exact one".into(),
            };
            all.push(format!(
                "d = {width}, {method}: {wins}; slope of time {}, of operations {}; largest \
                 gradient error {worst:.1e}.",
                slope(law(table, width, method, "time (s)")),
                slope(law(table, width, method, "operations (flops)")),
            ));
        }
    }
    for row in table.filter_eq("runs", false).rows() {
        let (method, tokens, width) =
            (row.text("method"), row.text("tokens"), row.text("head_dim"));
        all.push(format!(
            "d = {width}, {method} does not run at L = {tokens}: {}.",
            row.text("reason")
        ));
    }
    Ok(all)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let (mut linear, mut exact, mut better, mut wins) = (true, true, true, false);
    for width in widths(table)? {
        let error = |method: &str| -> f64 {
            let rows = ran(table, width, method);
            rows.rows().map(|r| r.f64("gradient error")).next().unwrap_or(f64::NAN)
        };
        exact &= error(EXACT) < ROUNDING;
        better &= error(CHAINED[1]) < error(CHAINED[0]);
        for method in CHAINED {
            linear &= (law(table, width, method, "operations (flops)")?.slope - 1.0).abs() < 0.05;
            wins |= wins_from(table, width, method).is_some();
        }
    }
    Ok(vec![
        ("chained operations have slope 1 within 0.05".into(), linear),
        (
            format!(
                "the device's exact gradient misses the processor's f64 by less than \
                  {ROUNDING:e}"
            ),
            exact,
        ),
        ("at the smallest L degree 2 is nearer to the exact gradient than degree 1".into(), better),
        (
            "a chained gradient is faster than the exact one at the longest length of the exact \
          one"
            .into(),
            wins,
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exact gradient takes L^2; chained ones `start` L^power, with errors of the exact one and
    /// of both degrees.
    fn made_up(power: f64, start: f64, errors: [f64; 3]) -> Vec<bool> {
        let mut table = Table::default();
        for tokens in [256.0f64, 512.0, 1024.0, 2048.0] {
            let chained = start * tokens.powf(power);
            for ((method, cost), error) in
                [(EXACT, tokens.powi(2)), (CHAINED[0], chained), (CHAINED[1], chained)]
                    .into_iter()
                    .zip(errors)
            {
                let row =
                    Row::new().with("head_dim", 8i64).with("tokens", tokens).with("method", method);
                let row =
                    row.with("runs", true).with("time (s)", cost).with("operations (flops)", cost);
                table.push(&row.with("gradient error", error));
            }
        }
        checks(&table).unwrap().into_iter().map(|c| c.1).collect()
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        assert_eq!(made_up(1.0, 10.0, [1e-6, 0.1, 0.01]), [true; 4]);
        assert_eq!(made_up(1.2, 10.0, [1e-6, 0.1, 0.01]), [false, true, true, true]);
        assert_eq!(made_up(1.0, 10.0, [1e-3, 0.1, 0.01]), [true, false, true, true]);
        assert_eq!(made_up(1.0, 10.0, [1e-6, 0.01, 0.1]), [true, true, false, true]);
        assert_eq!(made_up(1.0, 1e5, [1e-6, 0.1, 0.01]), [true, true, true, false]);
    }
}
