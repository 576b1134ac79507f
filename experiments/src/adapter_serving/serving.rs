//! Switching one adapter for another, and one batch under many.

use super::{BATCH, DRIFT_SWITCHES, REPEATS, SERVED, SWITCHES, TARGETS, sizes};
use crate::harness::{Point, Seconds, repeated_seconds};
use ndarray::Array2;
use peft_limits::Result;
use peft_limits::adapters::lora::{Lora, LoraSpec};
use peft_limits::adapters::update::WeightUpdate;
use peft_limits::cost::Cost;
use peft_limits::model::s2ft::{S2ftSpec, Scope};
use peft_limits::model::update::{ModelUpdate, Switchable};
use peft_limits::model::{AdapterPlan, MethodSpec, Model};
use peft_limits::report::Row;
use peft_limits::streams::generator;
use peft_limits::train::checkpoint::fingerprint;
use peft_limits::train::tokenizer::BYTE_VOCABULARY;
use rand::RngExt;

/// An update of o and down as after training: S2FT on 1/16 of the heads and channels.
fn slice_update(base: &Model<f32>, seed: u64) -> Result<ModelUpdate<f32>> {
    let mut spec = S2ftSpec { ratios: [0.0; 7], scope: Scope::EachLayer, ..S2ftSpec::default() };
    TARGETS.iter().try_for_each(|&p| spec.set_ratio(p, 1.0 / 16.0))?;
    let mut rng = generator(seed, "adapter/s2ft", 0);
    let mut model = base.clone();
    model.attach_s2ft(&spec, None, &mut rng)?;
    model.for_each_trainable(&mut |_, v| {
        v.mapv_inplace(|x| x + rng.random_range(-0.01..0.01));
        Ok(())
    })?;
    ModelUpdate::of_adapters(&model)
}

/// A LoRA update of the same projections with about as many numbers.
fn lora_update(base: &Model<f32>, numbers: usize, seed: u64) -> Result<ModelUpdate<f32>> {
    let per_rank: usize = base.layers.len()
        * TARGETS
            .iter()
            .map(|&p| base.config.projection_shape(p))
            .map(|(out, width)| out + width)
            .sum::<usize>();
    let rank = (numbers as f64 / per_rank as f64).round().max(1.0) as usize;
    let mut rng = generator(seed, "adapter/lora", 0);
    let mut model = base.clone();
    let spec = MethodSpec::Lora(LoraSpec { rank, ..LoraSpec::default() });
    model.attach(&AdapterPlan::everywhere(&TARGETS, spec), &mut rng)?;
    model.for_each_trainable(&mut |_, v| {
        v.mapv_inplace(|x| x + rng.random_range(-0.01..0.01));
        Ok(())
    })?;
    ModelUpdate::of_adapters(&model)
}

fn timed(row: Row, seconds: &Seconds) -> Row {
    row.with("time (ms)", 1e3 * seconds.median)
        .with("time, first quartile (ms)", 1e3 * seconds.low)
        .with("time, third quartile (ms)", 1e3 * seconds.high)
}

/// Adds a low-rank update with its scaling times `sign` to the weights themselves, keeping nothing.
fn add_in_place(model: &mut Model<f32>, update: &ModelUpdate<f32>, sign: f64) -> Result<()> {
    for (&(l, p), entry) in &update.entries {
        let WeightUpdate::LowRank(lora) = entry else { continue };
        let signed = Lora { scaling: sign * lora.scaling, ..lora.clone() };
        let weight = model.layers[l].projection_mut(p).base.dense_mut("lora")?;
        signed.add_delta(&mut weight.view_mut(), &mut Cost::default());
    }
    Ok(())
}

fn distance(a: &Model<f32>, b: &Model<f32>) -> f64 {
    let (mut squares, mut norm) = (0.0, 0.0);
    for p in TARGETS {
        let (a, b) =
            (a.layers[0].projection(p).base.dense(), b.layers[0].projection(p).base.dense());
        for (x, y) in a.iter().zip(&b) {
            squares += f64::from(x - y).powi(2);
            norm += f64::from(*y).powi(2);
        }
    }
    (squares / norm).sqrt()
}

pub(super) fn switch(point: &Point) -> Result<Vec<Row>> {
    let (width, seed) = (point.usize("width")?, point.u64("seed")?);
    let base: Model<f32> =
        Model::random(sizes(width, 1, 16), &mut generator(seed, "init/model", 0))?;
    let slices = [slice_update(&base, seed)?, slice_update(&base, seed + 1000)?];
    let factors = [
        lora_update(&base, slices[0].elements(), seed)?,
        lora_update(&base, slices[0].elements(), seed + 1000)?,
    ];
    let before = fingerprint(&base);
    let mut rows = Vec::new();
    for (method, updates) in [(SWITCHES[0], &slices), (SWITCHES[1], &factors)] {
        let mut model = Switchable::new(base.clone())?;
        let mut next = 0;
        let time = repeated_seconds(REPEATS, || {
            next += 1;
            model.switch(Some(&updates[next % 2]))
        })?;
        let kept = model.kept_bytes();
        for i in 0..DRIFT_SWITCHES {
            model.switch(Some(&updates[i % 2]))?;
        }
        let base_again = model.into_base()?;
        let row = Row::new()
            .with("method", method)
            .with("numbers", updates[0].elements())
            .with("adapter (bytes)", updates[0].bytes())
            .with("overwritten (bytes)", 4 * updates[0].touched_elements())
            .with("kept (bytes)", kept)
            .with("base restored", fingerprint(&base_again) == before)
            .with("drift after switches", distance(&base_again, &base));
        rows.push(timed(row, &time));
    }
    let mut model = base.clone();
    let mut present = 0;
    add_in_place(&mut model, &factors[present], 1.0)?;
    let mut one = |model: &mut Model<f32>| {
        add_in_place(model, &factors[present], -1.0)?;
        present = 1 - present;
        add_in_place(model, &factors[present], 1.0)
    };
    let time = repeated_seconds(REPEATS, || one(&mut model))?;
    for _ in REPEATS + 1..DRIFT_SWITCHES {
        one(&mut model)?;
    }
    add_in_place(&mut model, &factors[present], -1.0)?;
    let row = Row::new()
        .with("method", SWITCHES[2])
        .with("numbers", factors[0].elements())
        .with("adapter (bytes)", factors[0].bytes())
        .with("overwritten (bytes)", 4 * factors[0].touched_elements())
        .with("kept (bytes)", 0)
        .with("base restored", fingerprint(&model) == before)
        .with("drift after switches", distance(&model, &base));
    rows.push(timed(row, &time));
    Ok(rows)
}

pub(super) fn mixed(point: &Point) -> Result<Vec<Row>> {
    let (width, adapters, seed) =
        (point.usize("width")?, point.usize("adapters")?, point.u64("seed")?);
    let base: Model<f32> =
        Model::random(sizes(width, 2, 16), &mut generator(seed, "init/model", 0))?;
    let mut rng = generator(seed, "tokens", 0);
    let ids = Array2::from_shape_simple_fn(BATCH, || rng.random_range(0..BYTE_VOCABULARY as u32));
    let of_sequence: Vec<Option<usize>> =
        (0..BATCH.0).map(|i| Some(i * adapters / BATCH.0)).collect();
    let slices = (0..adapters as u64)
        .map(|i| slice_update(&base, seed + 1000 * i))
        .collect::<Result<Vec<ModelUpdate<f32>>>>()?;
    let numbers = slices[0].elements();
    let factors = (0..adapters as u64)
        .map(|i| lora_update(&base, numbers, seed + 1000 * i))
        .collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    let mut cost = Cost::default();
    let time = repeated_seconds(REPEATS, || {
        cost = Cost::default();
        base.logits(ids.view(), &mut cost).map(drop)
    })?;
    rows.push(timed(
        Row::new().with("method", SERVED[0]).with("multiply-adds", cost.multiply_adds),
        &time,
    ));
    for (method, one_by_one, updates) in
        [(SERVED[1], SERVED[3], &slices), (SERVED[2], SERVED[4], &factors)]
    {
        let given: Vec<&ModelUpdate<f32>> = updates.iter().collect();
        let mut together = Array2::zeros((0, 0));
        let time = repeated_seconds(REPEATS, || {
            cost = Cost::default();
            together = base.logits_mixed(ids.view(), &given, &of_sequence, &mut cost)?;
            Ok(())
        })?;
        let mixed_cost = cost.multiply_adds;
        let mut model = Switchable::new(base.clone())?;
        let mut apart = Array2::<f32>::zeros(together.dim());
        let share = BATCH.0 / adapters;
        let alone = repeated_seconds(REPEATS, || {
            cost = Cost::default();
            for (i, update) in given.iter().enumerate() {
                model.switch(Some(update))?;
                let ids = ids.slice(ndarray::s![i * share..(i + 1) * share, ..]);
                let logits = model.model().logits(ids, &mut cost)?;
                apart
                    .slice_mut(ndarray::s![i * share * BATCH.1..(i + 1) * share * BATCH.1, ..])
                    .assign(&logits);
            }
            model.switch(None)
        })?;
        let difference =
            (&together - &apart).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let norm = apart.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let gap = difference / norm;
        let row = |method: &str, cost: u64| {
            Row::new()
                .with("method", method)
                .with("numbers", updates[0].elements())
                .with("multiply-adds", cost)
                .with("gap of logits, mixed against one by one", gap)
        };
        rows.push(timed(row(method, mixed_cost), &time));
        rows.push(timed(row(one_by_one, cost.multiply_adds), &alone));
    }
    Ok(rows)
}
