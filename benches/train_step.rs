//! Time of one training step (forward, backward, AdamW) per adaptation method, with operations and
//! saved bytes.
//!
//! `cargo bench --bench train_step [-- --batch 8 --length 256 --width 256 --layers 6 --inner 688
//! --vocab 256 --rank 8 --heads 8 --repeats 15 --checkpointing --only lora,full --on-request]`
//!
//! Methods are interleaved, so a change of the machine's speed meets all of them; the table shows
//! the median and quartiles of the repeats and ratios of medians to LoRA's. With `--on-request` a
//! step is done for each line of the standard input that names a method, and answered by its
//! seconds: so another trainer takes turns with this one, step by step
//! (`benches/peers/torch_train_step.py --with-rust`). The table follows at the end of the input.

use ndarray::Array2;
use peft_limits::adapters::lora::LoraSpec;
use peft_limits::adapters::moslora::MixerInit;
use peft_limits::adapters::paca::PacaSpec;
use peft_limits::adapters::spft::SpftSpec;
use peft_limits::cost::Cost;
use peft_limits::linalg::gemm::parallel_product_into;
use peft_limits::model::s2ft::S2ftSpec;
use peft_limits::model::{
    AdapterPlan, Batch, Gradients, MethodSpec, Model, ModelConfig, Projection, StepOptions,
};
use peft_limits::train::optimizer::{Optimizer, OptimizerParams, update_model};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Instant;

/// Steps of a method before the first that counts.
const WARM_UP: usize = 2;

struct Contender {
    name: &'static str,
    model: Model<f32>,
    gradients: Gradients<f32>,
    optimizer: Optimizer<f32>,
    seconds: Vec<f64>,
    /// Steps that are still to be done before one counts.
    warm_up: usize,
    flops: u64,
    saved_bytes: usize,
    loss: f64,
}

impl Contender {
    /// One step; returns its seconds, which count after the warm-up.
    fn step(&mut self, data: &Batch, options: &StepOptions) -> f64 {
        let mut cost = Cost::default();
        let first = self.flops == 0;
        let start = Instant::now();
        let gradients = &mut self.gradients;
        gradients.fill_zero();
        let pass = self.model.forward(data, options, gradients, &mut cost).expect("forward");
        if first {
            self.saved_bytes = pass.saved_bytes_by_name().iter().map(|(_, bytes)| bytes).sum();
        }
        self.loss = self.model.backward(pass, gradients, &mut cost).expect("backward").loss;
        update_model(&mut self.optimizer, &mut self.model, gradients, 1e-4, 1.0, |_| ())
            .expect("gradients fit the model");
        let seconds = start.elapsed().as_secs_f64();
        self.flops = cost.flops();
        match self.warm_up {
            0 => self.seconds.push(seconds),
            _ => self.warm_up -= 1,
        }
        seconds
    }
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    let position = q * (sorted.len() - 1) as f64;
    let (low, rest) = (position.floor() as usize, position.fract());
    sorted[low] + rest * (sorted[(low + 1).min(sorted.len() - 1)] - sorted[low])
}

/// GFLOP/s of a product of the step's own shape, on all threads.
fn gemm_rate(rows: usize, width: usize, inner: usize) -> f64 {
    let (a, b) = (Array2::<f32>::ones((rows, width)), Array2::<f32>::ones((inner, width)));
    let mut c = Array2::<f32>::zeros((rows, inner));
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let start = Instant::now();
        parallel_product_into(1.0, a.view(), b.t(), 0.0, &mut c.view_mut(), &mut Cost::default());
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (rows * width * inner) as f64 / best / 1e9
}

fn main() {
    peft_limits::linalg::workers::keep_awake();
    let arguments: Vec<String> = std::env::args().collect();
    let flag = |name: &str, default: usize| -> usize {
        let at = arguments.iter().position(|a| a == name);
        at.map_or(default, |i| arguments[i + 1].parse().expect("a number after the flag"))
    };
    let (batch, length, rank) = (flag("--batch", 8), flag("--length", 256), flag("--rank", 8));
    let (width, heads, repeats) = (flag("--width", 256), flag("--heads", 8), flag("--repeats", 15));
    let options = StepOptions {
        checkpointing: arguments.iter().any(|a| a == "--checkpointing"),
        ..StepOptions::default()
    };
    let config = ModelConfig {
        vocab_size: flag("--vocab", 256),
        hidden_size: width,
        intermediate_size: flag("--inner", 688),
        num_hidden_layers: flag("--layers", 6),
        num_attention_heads: heads,
        num_key_value_heads: flag("--kv-heads", heads),
        head_dim: width / heads,
        max_position_embeddings: length,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        options: Default::default(),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let base: Model<f32> = Model::random(config.clone(), &mut rng).expect("sizes are consistent");
    let ids = Array2::from_shape_simple_fn((batch, length), || {
        rng.random_range(0..config.vocab_size as u32)
    });
    let data = Batch::new(ids.clone(), ids.mapv(i64::from)).expect("not empty");
    let lora = LoraSpec { rank, alpha: 2.0 * rank as f64, rank_stabilized: false };
    let all = &Projection::ALL;
    let specs = [
        ("lora", MethodSpec::Lora(lora)),
        (
            "paca",
            MethodSpec::Paca(PacaSpec {
                rank,
                alpha: Some(2.0 * rank as f64),
                ..PacaSpec::default()
            }),
        ),
        (
            "paca 2r",
            MethodSpec::Paca(PacaSpec { rank: 2 * rank, alpha: None, ..PacaSpec::default() }),
        ),
        ("dora", MethodSpec::Dora { spec: lora, true_derivative: false }),
        ("moslora", MethodSpec::Moslora { spec: lora, mixer: MixerInit::Orthogonal }),
        ("spft", MethodSpec::Spft(SpftSpec::default())),
        ("full", MethodSpec::Full),
    ];
    let mut contenders: Vec<Contender> = Vec::new();
    let only = arguments.iter().position(|a| a == "--only").map(|i| arguments[i + 1].clone());
    let mut enter = |name: &'static str, model: Model<f32>| {
        if only.as_ref().is_some_and(|only| only.split(',').all(|o| o != name)) {
            return;
        }
        contenders.push(Contender {
            name,
            gradients: model.zero_gradients(),
            model,
            optimizer: OptimizerParams { weight_decay: 0.01, ..OptimizerParams::default() }
                .check()
                .expect("in range"),
            seconds: vec![],
            warm_up: WARM_UP,
            flops: 0,
            saved_bytes: 0,
            loss: 0.0,
        });
    };
    for (name, spec) in specs {
        let mut model = base.clone();
        model.attach(&AdapterPlan::everywhere(all, spec), &mut rng).expect("the rank fits");
        if name == "full" {
            model.train_fully();
        }
        enter(name, model);
    }
    let mut model = base.clone();
    model.attach_s2ft(&S2ftSpec::default(), None, &mut rng).expect("the ratios fit");
    enter("s2ft", model);

    if arguments.iter().any(|a| a == "--on-request") {
        for line in std::io::stdin().lines() {
            let name = line.expect("a line of text");
            let asked = contenders.iter_mut().find(|c| c.name == name);
            println!("{}", asked.expect("the name of a method").step(&data, &options));
        }
    } else {
        for _ in 0..WARM_UP + repeats {
            for c in &mut contenders {
                c.step(&data, &options);
            }
        }
    }
    // A method that was not asked for has no row.
    contenders.retain(|c| !c.seconds.is_empty());
    if contenders.is_empty() {
        return;
    }
    let rate = gemm_rate(batch * length, width, config.intermediate_size);
    println!(
        "batch {batch}, length {length}, width {width}, inner {}, layers {}, vocabulary {}, rank \
         {rank}, f32, {} threads; GEMM of this run {rate:.0} GFLOP/s",
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
        rayon::current_num_threads()
    );
    println!(
        "| method | trainable | ms (median) | quartiles | ms / LoRA | GFLOP | GFLOP / LoRA | \
         GFLOP/s | saved MB | held MB | held / LoRA |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for c in &mut contenders {
        c.seconds.sort_by(f64::total_cmp);
    }
    let held = |c: &Contender| {
        let (weights, adapters) = c.model.weight_bytes();
        (c.saved_bytes + weights + adapters + 12 * c.model.trainable_elements()) as f64
    };
    let lora =
        (quantile(&contenders[0].seconds, 0.5), contenders[0].flops as f64, held(&contenders[0]));
    for c in &contenders {
        assert!(c.loss.is_finite() && c.loss > 0.0, "{}: loss {}", c.name, c.loss);
        let q = [0.25, 0.5, 0.75].map(|q| quantile(&c.seconds, q));
        println!(
            "| {} | {} | {:.1} | {:.1} to {:.1} | {:.3} | {:.1} | {:.3} | {:.0} | {:.1} | {:.1} | \
             {:.3} |",
            c.name,
            c.model.trainable_elements(),
            1e3 * q[1],
            1e3 * q[0],
            1e3 * q[2],
            q[1] / lora.0,
            c.flops as f64 / 1e9,
            c.flops as f64 / lora.1,
            c.flops as f64 / q[1] / 1e9,
            c.saved_bytes as f64 / 1e6,
            held(c) / 1e6,
            held(c) / lora.2,
        );
    }
}
