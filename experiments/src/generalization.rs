//! Claim (\[S2FT\], theory and its table after instruction tuning): training a sparse slice forgets less, and generalizes
//! better to shifted data, than LoRA and full fine-tuning do.
//!
//! Measured, 1: a small pretrained model learns one new task (`harness::study`) by full fine-tuning, LoRA, PaCA and S2FT;
//! retained and shifted accuracy at several points of the run, five seeds. Since a method that learns less also forgets
//! less, methods are compared where each has reached the same in-domain accuracy (0.75, between two measured points by
//! a straight line). In full each method has the learning rate that the sweep of `peft_accuracy` found for it, and runs at a
//! quarter of it too, because what is forgotten depends on it.
//! Computed, 2: the two-layer linear model of the theory in closed form (`two_layer`): risk on the new task and on
//! the old one against the number of trained numbers, five random instances with a shift of rank 2.
//!
//! Refuted if, at equal in-domain accuracy, S2FT retained no more than LoRA; or if in the linear model LoRA at the rank
//! of the shift did not lose the old task entirely while S2FT at its budget loses only a part.
//!
//! `cargo run --release --bin generalization [-- --profile full]`; under a minute, of which half pretrains; in full 40 minutes to an hour.

use crate::harness::study::{Study, accuracies, on_own_threads, train};
use crate::harness::{Experiment, Point, Profile};
use crate::two_layer::{Task, TwoLayer, Update};
use ndarray::Array2;
use peft_limits::Result;
use peft_limits::report::{Axis, Figure, LineChart, NamedFigure, Reference, Row, Series, Summary, Table};
use peft_limits::streams::generator;
use peft_limits::train::method::MethodName;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, StandardNormal};

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "generalization",
    title: "Forgetting and shifted accuracy; the two-layer linear model",
    claim: "Sparse slices forget less and generalize better than LoRA and full fine-tuning (S2FT).",
    refuted_by: "S2FT retaining no more than LoRA at equal in-domain accuracy; LoRA keeping the old task in the linear model",
    doubt: "Forgetting is compared at one level of accuracy on one task and one pretrained model, which the seeds do not vary, at two learning rates for each method; the linear model's instances are drawn to fit the theory's assumptions.",
    grid,
    measure,
    parallel: true,
    plot,
    findings,
    checks: Some(checks),
};

/// (x, mean, low, high) along a line.
type Points = Vec<(f64, f64, f64, f64)>;

const METHODS: [MethodName; 4] = [MethodName::Full, MethodName::Lora, MethodName::Paca, MethodName::S2ft];
/// Behind the name of a method that runs at [`LOWER`] times its best learning rate.
const LOW_RATE: &str = ", low rate";
const LOWER: f64 = 0.25;
const SEEDS: u64 = 5;
/// In-domain accuracy at which methods are compared.
const LEVEL: f64 = 0.75;
/// Points of a run at which accuracy is measured.
const STOPS: u64 = 6;
const IN_DOMAIN: &str = "in-domain tokens";
const KEPT: [(&str, &str); 2] = [("retained", "retained tokens"), ("shifted", "shifted tokens")];

/// Sizes of the linear model: inputs, hidden units, outputs; rank of the shift.
const SIZES: (usize, usize, usize) = (32, 32, 32);
const SHIFT_RANK: usize = 2;

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let study = profile.pick(Study::quick(), Study::full());
    let mut points = Vec::new();
    for seed in seed..seed + SEEDS {
        let mut add = |method: String, lr: f64| {
            let point = study.point(format!("{method}, seed {seed}")).with("kind", "model");
            points.push(point.with("method", method).with("lr", lr).with("seed", seed));
        };
        for method in METHODS {
            let lr = study.swept_rate(method);
            add(method.name().into(), lr);
            if profile == Profile::Full {
                add(low_rate(method.name()), LOWER * lr);
            }
        }
        points.push(Point::new(format!("linear model, seed {seed}")).with("kind", "linear").with("seed", seed));
    }
    points
}

fn low_rate(method: &str) -> String {
    format!("{method}{LOW_RATE}")
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let seed = point.u64("seed")?;
    if point.text("kind")? == "linear" {
        return linear_model(seed);
    }
    let study = Study::of(point)?;
    let base = study.pretrained()?;
    let name: MethodName = point.text("method")?.trim_end_matches(LOW_RATE).parse()?;
    let lr = point.f64("lr")?;
    on_own_threads(1, || {
        let mut trainer = study.trainer(&base, study.method(name)?, lr, seed)?;
        let mut rows = vec![accuracies(&trainer)?.row().with("step", 0u64)];
        // Most is learned early: stops at equal ratios.
        let stops: Vec<u64> = (0..STOPS).map(|i| study.steps >> (STOPS - 1 - i)).collect();
        train(&mut trainer, |(trainer, _)| {
            if stops.contains(&trainer.steps_done()) {
                rows.push(accuracies(trainer)?.row().with("step", trainer.steps_done()));
            }
            Ok(())
        })?;
        Ok(rows)
    })
}

fn linear_model(seed: u64) -> Result<Vec<Row>> {
    let (d, h, p) = SIZES;
    let mut rng = generator(seed, "generalization/linear", 0);
    let mut normal = |rows: usize, columns: usize, deviation: f64| {
        Array2::from_shape_simple_fn((rows, columns), || {
            let x: f64 = StandardNormal.sample(&mut rng);
            deviation * x
        })
    };
    let scale = |n: usize| 1.0 / (n as f64).sqrt();
    let model = TwoLayer { first: normal(h, d, scale(d)), second: normal(p, h, scale(h)) };
    let shift = normal(p, SHIFT_RANK, scale(p)).dot(&normal(SHIFT_RANK, d, scale(SHIFT_RANK)));
    // The new task sees correlated inputs; the old one is what the pretrained model computes.
    let mix = normal(d, 2 * d, scale(2 * d));
    let new = Task { target: model.product() + shift, second_moment: mix.dot(&mix.t()) };
    let old = Task { target: model.product(), second_moment: Array2::eye(d) };
    let mut units: Vec<usize> = (0..h).collect();
    units.shuffle(&mut generator(seed, "generalization/units", 0));
    let (worst_new, lost) = (new.risk(&model.product())?, old.risk(&new.target)?);
    let mut rows = Vec::new();
    let mut add = |method: &str, update: Update| -> Result<()> {
        let tuned = model.fine_tune(&new, &update)?;
        rows.push(
            Row::new()
                .with("method", method)
                .with("trained", update.trained(&model))
                .with("new risk (share)", new.risk(&tuned)? / worst_new)
                .with("old risk (share)", old.risk(&tuned)? / lost),
        );
        Ok(())
    };
    for rank in [1, 2, 3, 4, 6, 8] {
        // Square layers of full rank: a low rank on the one reaches what a low rank on the other does.
        add("LoRA, either layer", Update::FirstLowRank(rank))?;
        // Two units have as many numbers as one rank when all sides are equal.
        let chosen = || units[..2 * rank].to_vec();
        add("S2FT, rows of W1", Update::FirstRows(chosen()))?;
        add("S2FT / PaCA, columns of W2", Update::SecondColumns(chosen()))?;
    }
    add("full, either layer", Update::FirstFull)?;
    Ok(rows)
}

/// The runs of the model, by method and, if there are two, learning rate.
fn methods(table: &Table) -> Result<Vec<String>> {
    let runs = table.filter_eq("kind", "model").group_by(&["method"])?;
    Ok(runs.into_iter().map(|(method, _)| method[0].to_field()).collect())
}

/// Means over seeds with 95% intervals, by step: (step, in-domain mean, mean, low, high).
fn trajectory(table: &Table, method: &str, column: &str) -> Result<Points> {
    let rows = table.filter_eq("kind", "model").filter_eq("method", method);
    let mut points = Vec::new();
    for (_, rows) in rows.sorted_by("step")?.group_by(&["step"])? {
        let kept = Summary::of(&rows.floats(column)?);
        let (low, high) = kept.t_interval(0.95).unwrap_or((kept.mean, kept.mean));
        points.push((Summary::of(&rows.floats(IN_DOMAIN)?).mean, kept.mean, low, high));
    }
    Ok(points)
}

/// `column` of each seed's run where its in-domain accuracy first reaches [`LEVEL`]; NaN where it never does.
fn at_level(table: &Table, method: &str, column: &str) -> Result<Vec<f64>> {
    let rows = table.filter_eq("kind", "model").filter_eq("method", method);
    let mut found = Vec::new();
    for (_, run) in rows.sorted_by("seed")?.group_by(&["seed"])? {
        let run = run.sorted_by("step")?;
        let (x, y) = (run.floats(IN_DOMAIN)?, run.floats(column)?);
        let crossing = (1..x.len()).find(|&i| x[i - 1] < LEVEL && x[i] >= LEVEL);
        found.push(crossing.map_or(f64::NAN, |i| {
            let share = (LEVEL - x[i - 1]) / (x[i] - x[i - 1]);
            y[i - 1] + share * (y[i] - y[i - 1])
        }));
    }
    Ok(found)
}

fn linear_means(table: &Table, column: &str) -> Result<Vec<(String, Points)>> {
    let rows = table.filter_eq("kind", "linear");
    let mut series = Vec::new();
    for (method, rows) in rows.group_by(&["method"])? {
        let mut points = Vec::new();
        for (trained, s) in rows.sorted_by("trained")?.summarise(&["trained"], column)? {
            points.push((trained[0].as_f64().unwrap_or(f64::NAN), s.mean, s.min, s.max));
        }
        series.push((method[0].to_field(), points));
    }
    Ok(series)
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let mut panels = Vec::new();
    for (name, column) in KEPT {
        let mut series = Vec::new();
        for method in methods(table)? {
            let points = trajectory(table, &method, column)?;
            series.push(Series::new(method, points));
        }
        panels.push(LineChart {
            title: format!("{name} against in-domain, along the run"),
            x: Axis::linear("in-domain tokens right"),
            y: Axis::linear(format!("{name} tokens right")),
            series,
            references: vec![Reference::Vertical(LEVEL, "compared here".into())],
        });
    }
    let caption = format!(
        "Means over {SEEDS} seeds with 95% intervals, from before fine-tuning (left) to its end, at the budget of LoRA rank 4 (full: everything)."
    );
    let model = Figure::new("What is kept while a new task is learned", panels).caption(caption);
    let mut panels = Vec::new();
    for (title, column) in [("risk on the new task", "new risk (share)"), ("risk on the old task", "old risk (share)")]
    {
        let series = linear_means(table, column)?.into_iter().map(|(name, points)| Series::new(name, points));
        panels.push(LineChart {
            title: title.into(),
            x: Axis::log2("trained numbers"),
            y: Axis::linear("share of the largest").range(-0.05, 1.2),
            series: series.collect(),
            references: Vec::new(),
        });
    }
    let caption = format!(
        "{} x {} layers, shift of rank {SHIFT_RANK}, closed forms; means over {SEEDS} instances, shaded from smallest to largest. New: 1 before \
         fine-tuning. Old: 1 where the new task's own map is used for the old one.",
        SIZES.1, SIZES.0
    );
    let linear = Figure::new("The two-layer linear model", panels).caption(caption);
    Ok(vec![NamedFigure::new("generalization", model), NamedFigure::new("generalization_linear", linear)])
}

/// Paired difference of two methods over the seeds in which both reach the level, with its 95% interval.
fn difference(table: &Table, a: &str, b: &str, column: &str) -> Result<(Summary, Option<(f64, f64)>)> {
    let (a, b) = (at_level(table, a, column)?, at_level(table, b, column)?);
    let gaps = Summary::of(&a.iter().zip(&b).map(|(a, b)| a - b).collect::<Vec<_>>());
    Ok((gaps, gaps.t_interval(0.95)))
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let (methods, mut lines) = (methods(table)?, Vec::new());
    let own = |(a, b): (&str, &str)| (a.to_string(), b.to_string());
    let pairs = [("s2ft", "lora"), ("paca", "lora"), ("s2ft", "full"), ("paca", "full"), ("lora", "full")];
    let mut compared: Vec<_> = pairs.map(own).into();
    if methods.iter().any(|m| m.ends_with(LOW_RATE)) {
        compared.extend(pairs.map(|(a, b)| (low_rate(a), low_rate(b))));
        compared.extend(METHODS.map(|m| (low_rate(m.name()), m.name().to_string())));
    }
    for (name, column) in KEPT {
        let mut means = Vec::new();
        for method in &methods {
            let s = Summary::of(&at_level(table, method, column)?);
            means.push(format!("{method} {:.3} ({} of {SEEDS} seeds)", s.mean, s.n));
        }
        lines.push(format!("{name} where in-domain reaches {LEVEL}: {}.", means.join(", ")));
        for (a, b) in &compared {
            let (gap, interval) = difference(table, a, b, column)?;
            let (low, high) = interval.unwrap_or((f64::NAN, f64::NAN));
            let verdict = match (low > 0.0, high < 0.0) {
                (true, _) => "more",
                (_, true) => "less",
                _ => "not separated",
            };
            lines
                .push(format!("{name}, {a} - {b}: {:+.3}, 95% interval {low:+.3} to {high:+.3}: {verdict}.", gap.mean));
        }
    }
    for (method, points) in linear_means(table, "old risk (share)")? {
        let new = linear_means(table, "new risk (share)")?.into_iter().find(|(m, _)| *m == method);
        let at = |points: &Points| points.get(1).or(points.last()).copied();
        if let (Some((n, old, ..)), Some((_, new, ..))) = (at(&points), new.as_ref().and_then(|(_, p)| at(p))) {
            lines.push(format!(
                "Linear model, {method} with {n} numbers: new risk {new:.3}, old risk {old:.3} of the largest."
            ));
        }
    }
    let linear = table.filter_eq("kind", "linear");
    let sums = linear.rows().map(|r| r.f64("new risk (share)") + r.f64("old risk (share)"));
    let sums = Summary::of(&sums.collect::<Vec<_>>());
    lines.push(format!(
        "Linear model, new risk + old risk over all methods, budgets and instances: median {:.2}, {:.2} to {:.2}. Where it is near 1, what is \
         kept is what is not learned.",
        sums.median, sums.min, sums.max
    ));
    Ok(lines)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let rows = table.filter_eq("kind", "linear");
    // The budget of LoRA at the rank of the shift.
    let budget = (SHIFT_RANK * (SIZES.0 + SIZES.1)) as f64;
    let of = |method: &str, column: &str| -> Result<Vec<f64>> {
        rows.filter_eq("method", method).filter(|r| (r.f64("trained") - budget).abs() < 0.5).floats(column)
    };
    let lora = (of("LoRA, either layer", "new risk (share)")?, of("LoRA, either layer", "old risk (share)")?);
    let sparse = of("S2FT, rows of W1", "old risk (share)")?;
    let fits = lora.0.iter().all(|&x| x < 1e-12) && lora.1.iter().all(|&x| (x - 1.0).abs() < 1e-6);
    Ok(vec![
        ("linear model: LoRA at the rank of the shift fits the new task and loses the old one entirely".into(), fits),
        (
            "linear model: S2FT at that budget keeps more than half of the old task".into(),
            sparse.iter().all(|&x| x < 0.5),
        ),
    ])
}
