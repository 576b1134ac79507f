//! Claims (\[PaCA\]: 22% less time, 16% less memory, 23% longer sequences and 16% more throughput than LoRA on a GPU;
//! \[S2FT\]: about 10% better than LoRA on both): the training step of every method on a GPU.
//!
//! Measured on the best device that this build finds (CUDA's first, else wgpu's): seconds of whole steps (methods
//! interleaved point by point; medians), what the device's allocator holds between forward and backward, tokens a
//! second against the batch, and the longest sequence of a doubling series that still runs.
//!
//! Refuted if PaCA at LoRA's rank held more between forward and backward than LoRA; times are reported.
//!
//! `cargo run --release --features cuda --bin gpu_peft_cost [-- --profile full]`. A software device is accepted only
//! with an --out folder outside `figures/`, since its times say nothing about GPUs.

use crate::harness::{Experiment, Point, Profile, best_device};
use ndarray::Array2;
use peft_limits::error::{Error, Result};
use peft_limits::gpu::train::{DeviceModel, DeviceOptimizer};
use peft_limits::gpu::{Device, Engine, Opened, Work};
use peft_limits::model::{Batch, Model, StepOptions};
use peft_limits::report::{Axis, Figure, LineChart, NamedFigure, Row, Series, Summary, Table};
use peft_limits::streams::generator;
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::optimizer::OptimizerParams;
use peft_limits::train::preset::preset;
use rand::RngExt;
use std::time::Instant;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "gpu_peft_cost",
    title: "Training steps on a GPU by method",
    claim: "PaCA needs less time and memory than LoRA of the same rank, so that it trains longer sequences and more tokens a \
            second (PaCA); S2FT likewise (S2FT).",
    refuted_by: "PaCA holding more than LoRA between forward and backward",
    doubt: "Not measured on a real card yet; the steps are built from many small kernels, so their times are an upper bound of what a fused trainer takes.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(checks),
};

const RANK: usize = 8;
const WARM_UP: usize = 2;
const METHODS: [MethodName; 6] =
    [MethodName::Full, MethodName::Lora, MethodName::Dora, MethodName::Moslora, MethodName::Paca, MethodName::S2ft];

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let name = best_device().map_or("none".to_string(), |d| d.info().to_string());
    let point = |model: &str, kind: &str, batch: u64, length: u64, repeats: u64| {
        let point = Point::new(format!("{kind}: {model}, {batch} x {length}")).with("model", model);
        let point = point.with("kind", kind).with("batch", batch).with("length", length);
        point.with("repeats", repeats).with("seed", seed).with("device", name.clone())
    };
    match profile {
        Profile::Quick => vec![point("pico", "batch", 1, 32, 2), point("pico", "batch", 2, 32, 2)],
        Profile::Full => {
            let batches = [1, 2, 4, 8, 16, 32].map(|batch| point("mini", "batch", batch, 512, 10));
            let lengths = (10..=17).map(|power| point("mini", "length", 1, 1 << power, 3));
            batches.into_iter().chain(lengths).collect()
        }
    }
}

/// One method's steps on the device.
struct Steps<'a> {
    device: &'a Device,
    model: &'a Model<f32>,
    batch: &'a Batch,
    repeats: usize,
}

impl Work for Steps<'_> {
    /// Seconds of each step, and bytes held between forward and backward.
    type Output = (Vec<f64>, usize);

    fn run<B: Engine>(self, on: &Opened<B>) -> Result<Self::Output> {
        let wait = || B::sync(&on.device).map_err(|e| on.failure("training step", &e));
        let before = self.device.memory()?.in_use_bytes;
        let mut there = DeviceModel::upload(self.model, on)?;
        let mut optimizer = DeviceOptimizer::upload(&OptimizerParams::default().check::<f32>()?);
        let (mut seconds, mut held) = (Vec::with_capacity(self.repeats), 0);
        for repeat in 0..WARM_UP + self.repeats {
            let start = Instant::now();
            let mut gradients = there.zero_gradients();
            let pass = there.forward(self.batch, &StepOptions::default(), &mut gradients, None)?;
            if repeat + 1 == WARM_UP {
                wait()?;
                held = self.device.memory()?.in_use_bytes.saturating_sub(before) as usize;
            }
            there.backward(pass, &mut gradients, None)?.read(on)?;
            optimizer.update(&mut there, gradients, 1e-4, 1.0)?;
            wait()?;
            if repeat >= WARM_UP {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        Ok((seconds, held))
    }
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let device = best_device()?;
    let config = preset(point.text("model")?)?;
    let (rows, length, seed) = (point.usize("batch")?, point.usize("length")?, point.u64("seed")?);
    let repeats = point.usize("repeats")?;
    let mut rng = generator(seed, "gpu_peft_cost", 0);
    let base: Model<f32> = Model::random(config.clone(), &mut rng)?;
    let ids = Array2::from_shape_simple_fn((rows, length), || rng.random_range(0..config.vocab_size as u32));
    let batch = Batch::new(ids.clone(), ids.mapv(i64::from))?;
    let mut all = Vec::new();
    for name in METHODS {
        let mut model = base.clone();
        MethodParams { rank: RANK, ..MethodParams::named(name) }.apply(&mut model, None, seed)?;
        let mut row = Row::new().with("method", name.name()).with("trained", model.trainable_elements());
        let steps = Steps { device: &device, model: &model, batch: &batch, repeats };
        match device.run("training step", steps) {
            Ok((seconds, held)) => {
                let step = Summary::of(&seconds);
                row.set("step (ms)", 1e3 * step.median);
                row.set("step lower quartile (ms)", 1e3 * step.lower_quartile);
                row.set("step upper quartile (ms)", 1e3 * step.upper_quartile);
                row.set("tokens per second", (rows * length) as f64 / step.median);
                row.set("held after forward (MiB)", held as f64 / 1_048_576.0);
                row.set("runs", true);
            }
            // Out of memory, or a buffer beyond the device's limit, is what the series of lengths looks for.
            Err(Error::Device { reason, .. }) => {
                row.set("runs", false);
                row.set("reason", reason);
            }
            Err(error @ Error::TooLarge { .. }) => {
                row.set("runs", false);
                row.set("reason", error.to_string());
            }
            Err(other) => return Err(other),
        }
        all.push(row);
    }
    Ok(all)
}

fn lines(table: &Table, kind: &str, x: &str, y: &str) -> Vec<Series> {
    let rows = table.filter_eq("kind", kind).filter_eq("runs", true);
    let of = |name: MethodName| {
        let rows = rows.filter_eq("method", name.name());
        Series::new(name.name(), rows.rows().map(|r| (r.f64(x), r.f64(y))).collect::<Vec<_>>())
    };
    METHODS.map(of).into()
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let mut panels = Vec::new();
    for (kind, x) in [("batch", "batch"), ("length", "length")] {
        if table.filter_eq("kind", kind).rows().next().is_none() {
            continue;
        }
        for y in ["tokens per second", "held after forward (MiB)"] {
            let series = lines(table, kind, x, y);
            let title = format!("by {x}");
            panels.push(LineChart { title, x: Axis::log2(x), y: Axis::log10(y), series, ..LineChart::default() });
        }
    }
    let device = table.texts("device")?.first().cloned().unwrap_or_default();
    let caption = format!("{device}, f32, rank {RANK}, AdamW; medians.");
    Ok(vec![NamedFigure::new("gpu_peft_cost", Figure::new("Training steps on a GPU", panels).caption(caption))])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let device = table.texts("device")?.first().cloned().unwrap_or_default();
    let mut all = vec![format!("Device: {device}.")];
    let runs = table.filter_eq("runs", true);
    for name in METHODS {
        let rows = runs.filter_eq("method", name.name());
        let longest = rows.filter_eq("kind", "length").rows().map(|r| r.f64("length")).fold(0.0, f64::max);
        let fastest = rows.rows().map(|r| r.f64("tokens per second")).fold(0.0, f64::max);
        let longest = if longest > 0.0 { format!(", longest sequence {longest}") } else { String::new() };
        all.push(format!("{}: at most {fastest:.0} tokens a second{longest}.", name.name()));
    }
    Ok(all)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let held = |method: &str| -> Vec<f64> {
        let rows = table.filter_eq("kind", "batch").filter_eq("method", method);
        rows.rows().map(|r| r.f64("held after forward (MiB)")).collect()
    };
    let less = held("paca").iter().zip(held("lora")).all(|(paca, lora)| *paca < lora);
    Ok(vec![("PaCA holds less than LoRA at the same rank between forward and backward".into(), less)])
}
