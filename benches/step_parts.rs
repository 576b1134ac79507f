//! Where a step of full fine-tuning spends its time: each kind of work of the step alone, on the
//! step's shapes and threads.
//!
//! `cargo bench --bench step_parts`: milliseconds of a step for each part, in the middle of the
//! repeats, the operations or bytes it must at least do, and their rate.

use ndarray::Array2;
use peft_limits::blocks::causal_attention::{
    AttentionCache, AttentionShape, Visibility, causal_attention_backward, causal_attention_forward,
};
use peft_limits::blocks::cross_entropy::{CrossEntropySinks, cross_entropy};
use peft_limits::blocks::rms_norm::{rms_norm_backward, rms_norm_forward};
use peft_limits::blocks::rope::{RopeTable, rope_forward};
use peft_limits::blocks::swiglu::{swiglu_backward, swiglu_forward};
use peft_limits::cost::Cost;
use peft_limits::linalg::gemm::parallel_product_into;
use peft_limits::linalg::{Scratch, on_workers};
use peft_limits::train::optimizer::OptimizerParams;
use std::sync::Arc;
use std::time::Instant;

/// The micro model and the batch of `train_step`.
const BATCH: usize = 8;
const LENGTH: usize = 256;
const WIDTH: usize = 256;
const HEADS: usize = 8;
const INNER: usize = 688;
const LAYERS: usize = 6;
const VOCABULARY: usize = 256;
const TOKENS: usize = BATCH * LENGTH;
const REPEATS: usize = 15;

fn filled(rows: usize, columns: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 7 + j * 3) % 13) as f32 * 0.1 - 0.6)
}

/// A part of the step.
struct Part {
    name: &'static str,
    /// How often the step does it.
    times: usize,
    /// Of one time, in units of 1e9: floating-point operations, or bytes that must move.
    giga: f64,
    unit: &'static str,
    work: Box<dyn FnMut() + Send>,
    seconds: Vec<f64>,
}

impl Part {
    fn new(
        name: &'static str,
        times: usize,
        amount: usize,
        unit: &'static str,
        work: impl FnMut() + Send + 'static,
    ) -> Self {
        Part {
            name,
            times,
            giga: amount as f64 * 1e-9,
            unit,
            work: Box::new(work),
            seconds: vec![],
        }
    }
}

/// A projection's three products.
fn projection(names: [&'static str; 3], times: usize, input: usize, output: usize) -> Vec<Part> {
    let operations = 2 * TOKENS * input * output;
    let (x, w) = (filled(TOKENS, input), filled(output, input));
    let (x2, w2) = (x.clone(), w.clone());
    let (mut y, dy) = (filled(TOKENS, output), filled(TOKENS, output));
    let (dy2, mut dx, mut dw) = (dy.clone(), x.clone(), w.clone());
    let forward = move || {
        parallel_product_into(1.0, x.view(), w.t(), 0.0, &mut y.view_mut(), &mut Cost::default());
    };
    let input = move || {
        parallel_product_into(
            1.0,
            dy.view(),
            w2.view(),
            0.0,
            &mut dx.view_mut(),
            &mut Cost::default(),
        );
    };
    let weight = move || {
        parallel_product_into(
            1.0,
            dy2.t(),
            x2.view(),
            1.0,
            &mut dw.view_mut(),
            &mut Cost::default(),
        );
    };
    vec![
        Part::new(names[0], times, operations, "GFLOP", forward),
        Part::new(names[1], times, operations, "GFLOP", input),
        Part::new(names[2], times, operations, "GFLOP", weight),
    ]
}

/// Both directions of attention.
fn attention(shape: AttentionShape) -> Vec<Part> {
    let (visible, scale) = (Visibility::default(), (shape.head_dim as f64).powf(-0.5));
    let inputs = Arc::new([(); 4].map(|()| filled(TOKENS, WIDTH)));
    let mut scratch = [(); 2].map(|()| Scratch::default());
    let mut cost = Cost::default();
    let forward = move |inputs: &[Array2<f32>; 4], scratch: &mut Scratch<f32>, cost: &mut Cost| {
        let [query, key, value, _] = inputs.each_ref().map(|a| a.view());
        causal_attention_forward(query, key, value, shape, visible, scale, scratch, cost)
            .expect("the shapes fit")
    };
    let (output, log_sum_exp) = forward(&inputs, &mut scratch[0], &mut cost);
    let operations = 2 * cost.multiply_adds as usize;
    let [mut first, mut second] = scratch;
    let same = inputs.clone();
    let forward = move || {
        let (output, log_sum_exp) = forward(&same, &mut first, &mut Cost::default());
        first.keep(output);
        first.keep(log_sum_exp);
    };
    let backward = move || {
        let [query, key, value, upstream] = inputs.each_ref().map(|a| a.view());
        let (output, log_sum_exp) = (output.view(), log_sum_exp.view());
        let cache = AttentionCache { query, key, value, output, log_sum_exp };
        let cost = &mut Cost::default();
        let (dquery, dkey, dvalue) =
            causal_attention_backward(upstream, &cache, shape, visible, scale, &mut second, cost)
                .expect("shapes fit");
        for gradient in [dquery, dkey, dvalue] {
            second.keep(gradient);
        }
    };
    vec![
        Part::new("attention: forward", LAYERS, operations, "GFLOP", forward),
        Part::new("attention: backward", LAYERS, operations / 2 * 5, "GFLOP", backward),
    ]
}

/// Everything between the products.
fn element_wise(head_dim: usize) -> Vec<Part> {
    let (narrow, wide) = (TOKENS * WIDTH * size_of::<f32>(), TOKENS * INNER * size_of::<f32>());
    let x = Arc::new(filled(TOKENS, WIDTH));
    let (gain, inverse, mut dgain, mut dx) =
        (vec![1f32; WIDTH], vec![1f32; TOKENS], vec![0f32; WIDTH], (*x).clone());
    let [mut for_norm, mut for_gated, mut for_copies] = [(); 3].map(|()| Scratch::default());
    let norm = {
        let (x, gain) = (x.clone(), gain.clone());
        move || {
            let (y, _) =
                rms_norm_forward(x.view(), &gain, 1e-5, &mut for_norm, &mut Cost::default())
                    .expect("fits");
            for_norm.keep(y);
        }
    };
    let dnorm = {
        let x = x.clone();
        move || {
            let (dgain, dx, cost) =
                (Some(&mut dgain[..]), Some(&mut dx.view_mut()), &mut Cost::default());
            rms_norm_backward(x.view(), x.view(), &inverse, &gain, dgain, dx, cost)
                .expect("the shapes fit");
        }
    };
    let (table, mut rotated) =
        (RopeTable::new(LENGTH, head_dim, 1e4).expect("the sizes fit"), (*x).clone());
    let rotate = move || {
        rope_forward(&mut rotated.view_mut(), &table, &mut Cost::default()).expect("the shapes fit")
    };
    let gate = Arc::new(filled(TOKENS, INNER));
    let swiglu = {
        let gate = gate.clone();
        move || {
            let cost = &mut Cost::default();
            let gated = swiglu_forward(gate.view(), gate.view(), &mut for_gated, cost)
                .expect("the shapes fit");
            for_gated.keep(gated);
        }
    };
    let (mut dgate, mut dup) = ((*gate).clone(), (*gate).clone());
    let dswiglu = move || {
        // Its results stand where its inputs were, and would soon be denormal.
        dgate.assign(&gate);
        dup.assign(&gate);
        swiglu_backward(gate.view(), &mut dgate, &mut dup, &mut Cost::default())
            .expect("the shapes fit");
    };
    let copy = move || {
        let copy = for_copies.copy(&x);
        for_copies.keep(copy);
    };
    vec![
        Part::new("norms: forward", 2 * LAYERS + 1, 2 * narrow, "GB", norm),
        Part::new("norms: backward", 2 * LAYERS + 1, 4 * narrow, "GB", dnorm),
        Part::new("rotary embedding", 4 * LAYERS, 2 * narrow, "GB", rotate),
        Part::new("SwiGLU: forward", LAYERS, 3 * wide, "GB", swiglu),
        Part::new("SwiGLU: backward, and copies", LAYERS, 9 * wide, "GB", dswiglu),
        Part::new("copies for the residual", 2 * LAYERS, 2 * narrow, "GB", copy),
    ]
}

/// The output projection with the loss and their backward.
fn head_and_loss() -> Part {
    let (hidden, head) = (filled(TOKENS, WIDTH), filled(VOCABULARY, WIDTH));
    let targets: Vec<(usize, usize)> = (0..TOKENS).map(|i| (i, i % VOCABULARY)).collect();
    let (mut dhidden, mut dhead) = (hidden.clone(), head.clone());
    Part::new("head and loss", 1, 6 * TOKENS * WIDTH * VOCABULARY, "GFLOP", move || {
        let mut dhidden = dhidden.view_mut();
        let sinks = CrossEntropySinks { dhidden: &mut dhidden, dweight: Some(dhead.view_mut()) };
        let (divisor, cost) = (TOKENS as f64, &mut Cost::default());
        cross_entropy(hidden.view(), head.view(), &targets, divisor, Some(sinks), cost)
            .expect("finite");
    })
}

/// One update of `weights` numbers in as many tensors as there are layers.
fn optimizer(name: &'static str, weights: usize) -> Part {
    let mut optimizer = OptimizerParams { weight_decay: 0.01, ..OptimizerParams::default() }
        .check()
        .expect("in range");
    let each = weights / LAYERS;
    let (mut tensors, gradient) = (vec![vec![0.5f32; each]; LAYERS], vec![0.1f32; each]);
    Part::new(name, 1, 7 * weights * size_of::<f32>(), "GB", move || {
        optimizer.begin_step();
        for (layer, tensor) in tensors.iter_mut().enumerate() {
            optimizer
                .update(&layer.to_string(), tensor, &gradient, 1e-4, 1.0)
                .expect("the lengths fit");
        }
    })
}

fn main() {
    peft_limits::linalg::workers::keep_awake();
    let mut parts = projection(
        ["q, k, v, o: forward", "q, k, v, o: input", "q, k, v, o: weight"],
        4 * LAYERS,
        WIDTH,
        WIDTH,
    );
    parts.extend(projection(
        ["gate, up: forward", "gate, up: input", "gate, up: weight"],
        2 * LAYERS,
        WIDTH,
        INNER,
    ));
    parts.extend(projection(
        ["down: forward", "down: input", "down: weight"],
        LAYERS,
        INNER,
        WIDTH,
    ));

    let shape = AttentionShape {
        batch: BATCH,
        length: LENGTH,
        heads: HEADS,
        kv_heads: HEADS,
        head_dim: WIDTH / HEADS,
    };
    parts.extend(attention(shape));
    parts.extend(element_wise(shape.head_dim));
    parts.push(head_and_loss());
    parts.push(optimizer("AdamW", LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)));
    on_workers(|| {
        for round in 0..REPEATS + 2 {
            for part in &mut parts {
                let start = Instant::now();
                for _ in 0..part.times {
                    (part.work)();
                }
                // Two rounds of warm-up.
                if round >= 2 {
                    part.seconds.push(start.elapsed().as_secs_f64());
                }
            }
        }
    });
    println!("| part | ms a step | amount | rate |");
    println!("|---|---|---|---|");
    let (mut total, mut products) = (0.0, 0.0);
    for part in &mut parts {
        part.seconds.sort_by(f64::total_cmp);
        let (seconds, amount) = (part.seconds[REPEATS / 2], part.giga * part.times as f64);
        total += seconds;
        if part.unit == "GFLOP" {
            products += amount;
        }
        println!(
            "| {} | {:.1} | {amount:.2} {} | {:.0} {}/s |",
            part.name,
            1e3 * seconds,
            part.unit,
            amount / seconds,
            part.unit
        );
    }
    println!(
        "| sum | {:.1} | {products:.2} GFLOP | {:.0} GFLOP/s |",
        1e3 * total,
        products / total
    );
}
