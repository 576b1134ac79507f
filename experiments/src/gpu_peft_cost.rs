//! Claims (\[PaCA\]: 22% less time, 16% less memory, 23% longer sequences and 16% more throughput
//! than LoRA on a GPU; \[S2FT\]: about 10% better than LoRA on both): the training step of every
//! method on a GPU.
//!
//! Measured on the best device that this build finds (CUDA's first, else wgpu's): seconds of whole
//! steps (methods interleaved point by point; medians) of models of 25 M, 125 M and 1.1 B
//! parameters, what the device's allocator holds between forward and backward beside what is
//! predicted, tokens a second against batch and length, and the largest batch that still runs.
//! Points stand in the order of their cost, so that a run that is cut short has the cheap ones.
//!
//! Refuted if PaCA at LoRA's rank held more between forward and backward than LoRA; times are
//! reported.
//!
//! `cargo run --release --features cuda --bin gpu_peft_cost [-- --profile full]`. A software device
//! is accepted only with an --out folder outside `figures/`, since its times say nothing about
//! GPUs.

use crate::harness::{Experiment, Point, Profile, best_device};
use ndarray::Array2;
use peft_limits::error::{Error, Result};
use peft_limits::gpu::train::memory::resident_bytes;
use peft_limits::gpu::train::{DeviceModel, DeviceOptimizer};
use peft_limits::gpu::{Device, Engine, Opened, Precision, Work};
use peft_limits::model::{Batch, Model, ModelConfig, StepOptions};
use peft_limits::report::{
    Axis, Cell, Figure, LineChart, NamedFigure, Row, Series, Summary, Table,
};
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
    claim: "PaCA needs less time and memory than LoRA of the same rank, so that it trains longer \
            sequences and more tokens a second (PaCA); S2FT likewise (S2FT).",
    refuted_by: "PaCA holding more than LoRA between forward and backward",
    doubt: "Not measured on a real card yet; the steps are built from many small kernels, so their \
            times are an upper bound of what a fused trainer takes.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(checks),
};

const RANK: usize = 8;
const WARM_UP: usize = 2;
const METHODS: [MethodName; 6] = [
    MethodName::Full,
    MethodName::Lora,
    MethodName::Dora,
    MethodName::Moslora,
    MethodName::Paca,
    MethodName::S2ft,
];

/// Methods of the series that goes to the largest batch: one that does not run says all.
const LIMIT_METHODS: [MethodName; 3] = [MethodName::Lora, MethodName::Paca, MethodName::S2ft];

/// Methods whose steps are also timed with products on tensor cores, operands rounded to TF32 and
/// bf16 where the device has them.
const ROUNDED: [MethodName; 2] = [MethodName::Full, MethodName::Lora];

/// A preset, or one of the larger sizes with the vocabulary of LLaMA: 125 M (heads as GPT-2's
/// smallest) and 1.1 B (widths as TinyLlama's).
fn sizes(name: &str) -> Result<ModelConfig> {
    let (hidden_size, num_hidden_layers, intermediate_size, heads, num_key_value_heads) = match name
    {
        "125m" => (768, 12, 2048, 12, 4),
        "1.1b" => (2048, 22, 5632, 32, 4),
        _ => return preset(name),
    };
    Ok(ModelConfig {
        vocab_size: 32_000,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads: heads,
        num_key_value_heads,
        head_dim: hidden_size / heads,
        ..preset("mini")?
    })
}

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let name = best_device().map_or("none".to_string(), |d| d.info().to_string());
    let point = |model: &str, kind: &str, batch: u64, length: u64, repeats: u64| {
        let point = Point::new(format!("{kind}: {model}, {batch} x {length}")).with("model", model);
        let point = point.with("kind", kind).with("batch", batch).with("length", length);
        point.with("repeats", repeats).with("seed", seed).with("device", name.clone())
    };
    match profile {
        Profile::Quick => {
            let sizes = [point("pico", "size", 2, 32, 2), point("nano", "size", 2, 32, 2)];
            let batches = [1, 2].map(|batch| point("pico", "batch", batch, 32, 2));
            sizes.into_iter().chain(batches).collect()
        }
        Profile::Full => {
            let sizes = [("mini", 8, 10), ("125m", 8, 10), ("1.1b", 4, 5)];
            let sizes =
                sizes.map(|(model, batch, repeats)| point(model, "size", batch, 512, repeats));
            let batches = [1, 4, 16, 64].map(|batch| point("mini", "batch", batch, 512, 5));
            // A step's attention is quadratic: each doubling costs four times as much.
            let lengths =
                [1024, 2048, 4096, 8192].map(|length| point("mini", "length", 1, length, 3));
            let limits = [64, 96, 128, 160, 192, 224, 256, 320, 384]
                .map(|batch| point("125m", "limit", batch, 512, 1));
            sizes.into_iter().chain(batches).chain(lengths).chain(limits).collect()
        }
    }
}

/// One method's steps on the device.
struct Steps<'a> {
    device: &'a Device,
    model: &'a Model<f32>,
    batch: &'a Batch,
    products: Precision,
    repeats: usize,
}

/// What the steps of one method show.
struct Measured {
    seconds: Vec<f64>,
    /// Bytes between forward and backward, by the allocator and as predicted.
    held: u64,
    predicted: u64,
    /// Bytes that the allocator has taken from the driver and keeps, those of earlier methods too.
    reserved: u64,
}

impl Work for Steps<'_> {
    type Output = Measured;

    fn run<B: Engine>(self, on: &Opened<B>) -> Result<Self::Output> {
        let wait = || B::sync(&on.device).map_err(|e| on.failure("training step", &e));
        let before = self.device.memory()?.in_use_bytes;
        let mut there = DeviceModel::upload(self.model, on)?.with_products(self.products)?;
        let mut optimizer = DeviceOptimizer::upload(&OptimizerParams::default().check::<f32>()?);
        let (mut seconds, mut held, mut predicted) = (Vec::with_capacity(self.repeats), 0, 0);
        for repeat in 0..WARM_UP + self.repeats {
            let start = Instant::now();
            let mut gradients = there.zero_gradients();
            let pass = there.forward(self.batch, &StepOptions::default(), &mut gradients, None)?;
            if repeat + 1 == WARM_UP {
                wait()?;
                held = self.device.memory()?.in_use_bytes.saturating_sub(before);
                let saved: usize = pass.saved_bytes_by_name().iter().map(|(_, bytes)| bytes).sum();
                let rest = resident_bytes(self.model) + optimizer.bytes();
                predicted = (rest + saved + pass.batch_bytes() + gradients.bytes()) as u64;
            }
            there.backward(pass, &mut gradients, None)?.read(on)?;
            optimizer.update(&mut there, gradients, 1e-4, 1.0)?;
            wait()?;
            if repeat >= WARM_UP {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        let reserved = self.device.memory()?.reserved_bytes;
        Ok(Measured { seconds, held, predicted, reserved })
    }
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let device = best_device()?;
    let config = sizes(point.text("model")?)?;
    let (rows, length, seed) = (point.usize("batch")?, point.usize("length")?, point.u64("seed")?);
    let repeats = point.usize("repeats")?;
    let mut rng = generator(seed, "gpu_peft_cost", 0);
    let base: Model<f32> = Model::random(config.clone(), &mut rng)?;
    let ids = Array2::from_shape_simple_fn((rows, length), || {
        rng.random_range(0..config.vocab_size as u32)
    });
    let batch = Batch::new(ids.clone(), ids.mapv(i64::from))?;
    let mut all = Vec::new();
    let kind = point.text("kind")?;
    let mut series: Vec<(MethodName, Precision)> = match kind {
        "limit" => LIMIT_METHODS.map(|name| (name, Precision::F32)).into(),
        _ => METHODS.map(|name| (name, Precision::F32)).into(),
    };
    if kind == "size" {
        let rounded = device.precisions().into_iter().filter(|&p| p != Precision::F32).take(2);
        series.extend(rounded.flat_map(|p| ROUNDED.map(|name| (name, p))));
    }
    for (name, products) in series {
        let mut model = base.clone();
        MethodParams { rank: RANK, ..MethodParams::named(name) }.apply(&mut model, None, seed)?;
        let row = Row::new().with("method", name.name()).with("products", products.to_string());
        let mut row = row.with("trained", model.trainable_elements());
        let steps = Steps { device: &device, model: &model, batch: &batch, products, repeats };
        match device.run("training step", steps) {
            Ok(Measured { seconds, held, predicted, reserved }) => {
                let step = Summary::of(&seconds);
                row.set("step (ms)", 1e3 * step.median);
                row.set("step lower quartile (ms)", 1e3 * step.lower_quartile);
                row.set("step upper quartile (ms)", 1e3 * step.upper_quartile);
                row.set("tokens per second", (rows * length) as f64 / step.median);
                row.set("held after forward (MiB)", held as f64 / 1_048_576.0);
                row.set("predicted (MiB)", predicted as f64 / 1_048_576.0);
                row.set("reserved so far (MiB)", reserved as f64 / 1_048_576.0);
                row.set("runs", true);
            }
            // Out of memory, or a buffer beyond the device's limit, is what the series of lengths
            // looks for.
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
    for (kind, x) in [("batch", "batch"), ("length", "length"), ("limit", "batch")] {
        if table.filter_eq("kind", kind).rows().next().is_none() {
            continue;
        }
        for y in ["tokens per second", "held after forward (MiB)"] {
            let series = lines(table, kind, x, y);
            let title =
                if kind == "limit" { "to the largest batch".into() } else { format!("by {x}") };
            panels.push(LineChart {
                title,
                x: Axis::log2(x),
                y: Axis::log10(y),
                series,
                ..LineChart::default()
            });
        }
    }
    let device = table.texts("device")?.first().cloned().unwrap_or_default();
    let caption = format!("{device}, f32, rank {RANK}, AdamW; medians.");
    Ok(vec![NamedFigure::new(
        "gpu_peft_cost",
        Figure::new("Training steps on a GPU", panels).caption(caption),
    )])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let device = table.texts("device")?.first().cloned().unwrap_or_default();
    let mut all = vec![format!("Device: {device}.")];
    let runs = table.filter_eq("runs", true);
    for model in table.filter_eq("kind", "size").distinct("model")?.iter().map(Cell::to_field) {
        let of_model = runs.filter_eq("kind", "size").filter_eq("model", model.as_str());
        let rows = of_model.filter_eq("products", "f32");
        let of = |name: MethodName, column: &str| {
            rows.filter_eq("method", name.name()).rows().map(|r| r.f64(column)).next()
        };
        let against = |name: MethodName, column: &str| {
            Some(of(name, column)? / of(MethodName::Lora, column)?)
        };
        for name in METHODS {
            let (time, memory) =
                (against(name, "step (ms)"), against(name, "held after forward (MiB)"));
            if let (Some(time), Some(memory), Some(ms)) = (time, memory, of(name, "step (ms)")) {
                let name = name.name();
                all.push(format!(
                    "{model}, {name}: {ms:.1} ms a step; {time:.2} of LoRA's time, {memory:.2} of \
                     its memory."
                ));
            }
        }
        for row in of_model.rows().filter(|row| row.text("products") != "f32") {
            let (name, products, ms) =
                (row.text("method"), row.text("products"), row.f64("step (ms)"));
            all.push(format!("{model}, {name}, {products} products: {ms:.1} ms a step."));
        }
    }
    for name in METHODS {
        let rows = runs.filter_eq("method", name.name());
        let largest =
            rows.filter_eq("kind", "limit").rows().map(|r| r.f64("batch")).fold(0.0, f64::max);
        let fastest = rows
            .filter_eq("kind", "batch")
            .rows()
            .map(|r| r.f64("tokens per second"))
            .fold(0.0, f64::max);
        let largest = if largest > 0.0 {
            format!(", largest batch of the 125m series {largest}")
        } else {
            String::new()
        };
        all.push(format!(
            "{}: at most {fastest:.0} tokens a second in the series of batches{largest}.",
            name.name()
        ));
    }
    Ok(all)
}

fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let held = |method: &str| -> Vec<f64> {
        let rows = table.filter_eq("kind", "batch").filter_eq("method", method);
        rows.rows().map(|r| r.f64("held after forward (MiB)")).collect()
    };
    let (paca, lora) = (held("paca"), held("lora"));
    let less = !paca.is_empty()
        && paca.len() == lora.len()
        && paca.iter().zip(lora).all(|(paca, lora)| *paca < lora);
    let ran = table.filter_eq("runs", true);
    let near = |ratio: f64| (0.95..1.05).contains(&ratio);
    let predicted = !ran.is_empty()
        && ran.rows().all(|r| near(r.f64("held after forward (MiB)") / r.f64("predicted (MiB)")));
    Ok(vec![
        ("PaCA holds less than LoRA at the same rank between forward and backward".into(), less),
        ("the allocator holds what was predicted to 5%".into(), predicted),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What PaCA holds of 100 MiB that LoRA holds, and the prediction over what is held.
    fn made_up(methods: &[(&str, f64)], predicted: f64) -> Vec<bool> {
        let mut table = Table::new(&["kind", "runs", "method"]);
        for &(method, held) in methods {
            let row = Row::new().with("kind", "batch").with("runs", true).with("method", method);
            table.push(
                &row.with("held after forward (MiB)", held)
                    .with("predicted (MiB)", held * predicted),
            );
        }
        checks(&table).unwrap().into_iter().map(|c| c.1).collect()
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        assert_eq!(made_up(&[("paca", 80.0), ("lora", 100.0)], 1.01), [true, true]);
        assert_eq!(made_up(&[("paca", 100.0), ("lora", 100.0)], 1.01), [false, true]);
        assert_eq!(made_up(&[("paca", 80.0), ("lora", 100.0)], 1.2), [true, false]);
        assert_eq!(made_up(&[("lora", 100.0)], 1.0), [false, true], "nothing to compare with");
        assert_eq!(made_up(&[], 1.0), [false, false]);
    }
}
