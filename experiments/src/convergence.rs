//! Claim (\[PaCA\], convergence theorem): with a Lipschitz gradient and a step eta <= 1 / L,
//! gradient descent on the selected connections satisfies mean over t < T of ||g_t||^2 <= 2
//! (loss_0 - loss_T) / (eta T), g being their gradient: the loss falls at the order of full
//! fine-tuning, 1 / T in the mean squared gradient.
//!
//! Measured, 1: plain gradient descent on one fixed batch of the new task of `harness::study`, in
//! f64, for every method; eta is the largest power of two (at most 1/2) with which the descent
//! inequality loss_{t+1} <= loss_t - eta / 2 ||g_t||^2, all that the proof uses, holds at every
//! step. Mean squared gradient against T, the slope of its logarithms with an interval over five
//! runs (in full each on a pretrained model of its own), and the theorem's bound. Measured, 2:
//! training loss of AdamW on fresh rows against the step, with the slope of logarithms over the
//! second half.
//!
//! The theorem's bound holds for every such eta (sum the inequality), so that it is below the
//! theorem's bound is no finding.
//!
//! Refuted if PaCA's slope in 1 were separated above full fine-tuning's by more than 0.25.
//!
//! `cargo run --release --bin convergence [-- --profile full]`; about a minute, of which a third
//! pretrains; in full about 15 minutes on one core.

use crate::harness::study::{Study, on_own_threads, train};
use crate::harness::{Experiment, Point, Profile, interrupted};
use peft_limits::cost::Cost;
use peft_limits::limits::exponent::fit_exponent;
use peft_limits::model::{Batch, Model, StepOptions};
use peft_limits::report::{Axis, Figure, LineChart, NamedFigure, Row, Series, Summary, Table};
use peft_limits::train::method::MethodName;
use peft_limits::train::optimizer::{OptimizerKind, OptimizerParams, update_model};
use peft_limits::train::tasks::{Mixture, Split};
use peft_limits::{Error, Result};

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "convergence",
    title: "Order at which the loss falls, by method",
    claim: "Gradient descent on a subset of connections converges at the order of full \
            fine-tuning, 1 / T in the mean squared gradient (PaCA).",
    refuted_by: "a slope of PaCA's mean squared gradient separated above full fine-tuning's by \
                 more than 0.25",
    doubt: "Full-batch descent in double precision for a few hundred steps: the slope of a finite \
            run is not the order of the limit.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

const METHODS: [MethodName; 5] =
    [MethodName::Full, MethodName::Lora, MethodName::Dora, MethodName::Paca, MethodName::S2ft];
const SEEDS: u64 = 5;
/// Rows of the fixed batch.
const ROWS: usize = 16;
/// Steps eta that are tried.
const LARGEST_STEP: f64 = 0.5;
const SMALLEST_STEP: f64 = 1e-6;
/// Rounding of a loss of a few nats, relative.
const ROUNDING: f64 = 1e-12;
const DESCENT: &str = "gradient descent";
const ADAMW: &str = "AdamW";

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let study = profile.pick(Study::quick(), Study::full());
    let mut points = Vec::new();
    for seed in seed..seed + SEEDS {
        for method in METHODS.map(MethodName::name) {
            for (kind, steps) in [(DESCENT, profile.pick(64u64, 256)), (ADAMW, study.steps)] {
                let label = format!("{kind}, {method}, seed {seed}");
                let point = Study { steps, ..study.clone() }.seeded(label, profile, seed);
                points.push(point.with("kind", kind).with("method", method));
            }
        }
    }
    points
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let study = Study::of(point)?;
    let base = study.base_of(point)?;
    let name: MethodName = point.text("method")?.parse()?;
    let (seed, kind) = (point.u64("seed")?, point.text("kind")?);
    on_own_threads(1, || {
        let mut trainer =
            study.trainer(&base, study.method(name)?, study.learning_rate(name), seed)?;
        if kind == ADAMW {
            let mut losses = Vec::new();
            train(&mut trainer, |(_, loss)| {
                losses.push(loss);
                Ok(())
            })?;
            return Ok(windows(&losses));
        }
        let data = Mixture::open(&trainer.config.data)?;
        let batch = trainer.encoder().draw(&data, seed, Split::Train, 0, ROWS, None)?;
        descend(&widened(&base, &study, name, seed)?, &batch, study.steps as usize)
    })
}

/// The pretrained model in f64 with its method: the descent inequality needs losses without
/// rounding.
fn widened(base: &Model<f32>, study: &Study, name: MethodName, seed: u64) -> Result<Model<f64>> {
    let folder =
        tempfile::tempdir().map_err(|e| Error::Io { path: std::env::temp_dir(), source: e })?;
    base.write(folder.path())?;
    let mut model = Model::<f64>::read(folder.path())?;
    study.method(name)?.apply(&mut model, None, seed)?;
    Ok(model)
}

/// Losses before each step and after the last, and squared gradient norms, of gradient descent;
/// `None` if a step breaks the descent inequality (or overflows).
fn run(
    model: &Model<f64>,
    batch: &Batch,
    eta: f64,
    steps: usize,
) -> Result<Option<(Vec<f64>, Vec<f64>)>> {
    let mut model = model.clone();
    let mut gradients = model.zero_gradients();
    let mut optimizer =
        OptimizerParams { kind: OptimizerKind::Sgd, lr: eta, ..OptimizerParams::default() }
            .check()?;
    let (mut losses, mut squares) = (Vec::with_capacity(steps + 1), Vec::with_capacity(steps + 1));
    for t in 0..=steps {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        gradients.fill_zero();
        let options = StepOptions::default();
        match model.loss_and_gradients(batch, &options, &mut gradients, &mut Cost::default()) {
            Ok(output) => losses.push(output.loss),
            Err(Error::NonFinite { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        if t > 0
            && losses[t] > losses[t - 1] - eta / 2.0 * squares[t - 1] + ROUNDING * losses[t - 1]
        {
            return Ok(None);
        }
        squares.push(gradients.norm().powi(2));
        update_model(&mut optimizer, &mut model, &gradients, eta, 1.0, |_| ())?;
    }
    Ok(Some((losses, squares)))
}

fn descend(model: &Model<f64>, batch: &Batch, steps: usize) -> Result<Vec<Row>> {
    let mut eta = LARGEST_STEP;
    let (losses, squares) = loop {
        if let Some(found) = run(model, batch, eta, steps)? {
            break found;
        }
        eta /= 2.0;
        if eta < SMALLEST_STEP {
            return Err(Error::NotConverged {
                op: "step size",
                iterations: steps,
                residual: eta,
                tolerance: SMALLEST_STEP,
            });
        }
    };
    let mut rows = Vec::new();
    let mut t = 1;
    while t <= steps {
        let mean = squares[..t].iter().sum::<f64>() / t as f64;
        rows.push(
            Row::new()
                .with("step", t)
                .with("loss (nats)", losses[t])
                .with("mean squared gradient", mean)
                .with("bound", 2.0 * (losses[0] - losses[t]) / (eta * t as f64))
                .with("eta", eta),
        );
        t *= 2;
    }
    Ok(rows)
}

/// Mean loss of windows of equal ratio: steps 1, 2 to 3, 4 to 7, ...
fn windows(losses: &[f64]) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut first = 1.0f64;
    while (first as usize) <= losses.len() {
        let next = (first * std::f64::consts::SQRT_2).max(first + 1.0);
        let range = first as usize - 1..(next as usize - 1).min(losses.len());
        let mean = losses[range.clone()].iter().sum::<f64>() / range.len() as f64;
        rows.push(
            Row::new()
                .with("step", (range.start + 1 + range.end) as f64 / 2.0)
                .with("loss (nats)", mean),
        );
        first = next;
    }
    rows
}

/// Each seed's slope of log `column` against log step, over steps from `from` on.
fn slopes(table: &Table, kind: &str, method: &str, column: &str, from: f64) -> Result<Vec<f64>> {
    let rows =
        table.filter_eq("kind", kind).filter_eq("method", method).filter(|r| r.f64("step") >= from);
    let mut all = Vec::new();
    for (_, run) in rows.sorted_by("seed")?.group_by(&["seed"])? {
        let points: Vec<(f64, f64)> =
            run.floats("step")?.into_iter().zip(run.floats(column)?).collect();
        all.push(fit_exponent(&points, 0.95)?.slope);
    }
    Ok(all)
}

/// Step from which slopes are fitted: the last three doublings of gradient descent, the second half
/// of AdamW's logarithmic axis.
fn fitted_from(table: &Table, kind: &str) -> Result<f64> {
    let last = Summary::of(&table.filter_eq("kind", kind).floats("step")?).max;
    Ok(if kind == DESCENT { last / 8.0 } else { last.sqrt() })
}

const PANELS: [(&str, &str, &str); 2] = [
    (DESCENT, "mean squared gradient", "mean squared gradient up to step T"),
    (ADAMW, "loss (nats)", "training loss (nats)"),
];

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let mut panels = Vec::new();
    for (kind, column, label) in PANELS {
        let mut series = Vec::new();
        for method in METHODS.map(MethodName::name) {
            let rows =
                table.filter_eq("kind", kind).filter_eq("method", method).sorted_by("step")?;
            let mut points = Vec::new();
            for (step, s) in rows.summarise(&["step"], column)? {
                points.push((step[0].as_f64().unwrap_or(f64::NAN), s.mean, s.min, s.max));
            }
            series.push(Series::new(method, points));
        }
        if kind == DESCENT {
            // Slope -1 through full fine-tuning's first mean.
            let start = series[0].points.first().map_or(f64::NAN, |p| p.y);
            let last = series[0].points.last().map_or(1.0, |p| p.x);
            series.push(Series::prediction("slope -1", vec![(1.0, start), (last, start / last)]));
        }
        panels.push(LineChart {
            title: kind.into(),
            x: Axis::log2("step T"),
            y: Axis::log10(label),
            series,
            references: Vec::new(),
        });
    }
    let caption = format!(
        "Left: plain gradient descent on one batch of {ROWS} rows, f64. Right: AdamW on fresh \
         rows, means over windows of equal ratio. Means over {SEEDS} seeds, shaded from smallest \
         to largest; budget of LoRA rank 4 (full: everything)."
    );
    Ok(vec![NamedFigure::new(
        "convergence",
        Figure::new("How fast the loss falls", panels).caption(caption),
    )])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (kind, column, label) in PANELS {
        let from = fitted_from(table, kind)?;
        let mut fits = Vec::new();
        for method in METHODS.map(MethodName::name) {
            let s = Summary::of(&slopes(table, kind, method, column, from)?);
            let (low, high) = s.t_interval(0.95).unwrap_or((f64::NAN, f64::NAN));
            fits.push(format!("{method} {:.2} ({low:.2} to {high:.2})", s.mean));
        }
        lines.push(format!(
            "{kind}, slope of {label} from step {from:.0} on (95% over seeds): {}.",
            fits.join(", ")
        ));
    }
    let (mean, low, high) = gap(table)?;
    lines.push(format!(
        "{DESCENT}: slope of paca - slope of full {mean:+.2}, 95% interval {low:+.2} to {high:+.2}."
    ));
    let descent = table.filter_eq("kind", DESCENT);
    let last = Summary::of(&descent.floats("step")?).max;
    for method in METHODS.map(MethodName::name) {
        let rows = descent.filter_eq("method", method).filter(|r| r.f64("step") >= last);
        let of = |column: &str| Ok::<_, Error>(Summary::of(&rows.floats(column)?));
        let (eta, loss) = (of("eta")?, of("loss (nats)")?);
        lines.push(format!(
            "{DESCENT}, {method}: eta from {} to {} over seeds; loss after {last} steps {:.3}.",
            eta.min, eta.max, loss.mean
        ));
    }
    Ok(lines)
}

/// Paired difference of slopes, PaCA less full fine-tuning.
pub(crate) fn gap(table: &Table) -> Result<(f64, f64, f64)> {
    let from = fitted_from(table, DESCENT)?;
    let of = |method: &str| slopes(table, DESCENT, method, PANELS[0].1, from);
    let gaps: Vec<f64> = of("paca")?.iter().zip(of("full")?).map(|(a, b)| a - b).collect();
    let s = Summary::of(&gaps);
    let (low, high) = s.t_interval(0.95).unwrap_or((f64::NEG_INFINITY, f64::INFINITY));
    Ok((s.mean, low, high))
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let (_, low, _) = gap(table)?;
    Ok(vec![(
        "PaCA's slope is not separated above full fine-tuning's by more than 0.25".into(),
        low <= 0.25,
    )])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made-up descents with mean squared gradients that fall like a power of T.
    fn made_up(paca: f64, full: f64) -> Table {
        let mut table = Table::default();
        for (method, power) in [("paca", paca), ("full", full)] {
            for seed in 0..SEEDS {
                for step in [1u64, 2, 4, 8, 16, 32, 64] {
                    let square = (step as f64).powf(power + 0.01 * seed as f64);
                    let row =
                        Row::new().with("kind", DESCENT).with("method", method).with("seed", seed);
                    table
                        .push(&row.with("step", step as f64).with("mean squared gradient", square));
                }
            }
        }
        table
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        assert!(checks(&made_up(-0.9, -1.0)).unwrap().iter().all(|c| c.1));
        assert!(!checks(&made_up(-0.5, -1.0)).unwrap()[0].1);
    }
}
