//! Claim (\[S2FT\]: updates decouple into adapters for fast switch and parallel serving): slice
//! adapters of as many numbers as a LoRA adapter switch faster, touch less memory, and are served
//! side by side at no higher cost. Fusing them is `adapter_fusion`.
//!
//! Measured: (switch) seconds, bytes overwritten and kept, and the weights' drift after many
//! switches, over the model's width; (mixed) time and multiply-adds of one batch whose sequences
//! use n different adapters, over n, against switching and running them one by one. S2FT against
//! LoRA of the same size.
//!
//! Refuted if LoRA switches as fast, or if a batch of S2FT adapters takes separably longer than one
//! of LoRA's.
//!
//! `cargo run --release --bin adapter_serving [-- --profile full]`; about half a minute, some 3
//! minutes in full. Timed: run it alone.

mod results;
mod serving;

use crate::harness::{Experiment, Point, Profile};
use peft_limits::Result;
use peft_limits::model::{ModelConfig, Projection};
use peft_limits::report::Row;
use peft_limits::train::tokenizer::BYTE_VOCABULARY;
use results::{checks, findings, plot};

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "adapter_serving",
    title: "Adapters after training: switching, serving together",
    claim: "S2FT: its updates decouple into adapters that switch faster than LoRA's and serve in \
            one batch as cheaply.",
    refuted_by: "LoRA switching as fast at equal size, or a batch of S2FT adapters taking longer \
                 than one of LoRA's",
    doubt: "Models of a few million parameters on a processor: what a switch or a batch costs on a \
            GPU depends on its memory and its kernels.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(checks),
};

const TARGETS: [Projection; 2] = [Projection::Output, Projection::Down];
const REPEATS: usize = 10;
const SEEDS: u64 = 5;
const SWITCHES: [&str; 3] = ["S2FT", "LoRA", "LoRA, subtracted"];
const SERVED: [&str; 5] = ["base alone", "S2FT", "LoRA", "S2FT, one by one", "LoRA, one by one"];
/// Sequences and tokens of the mixed batch.
const BATCH: (usize, usize) = (32, 8);
/// Switches after which the drift is measured.
const DRIFT_SWITCHES: usize = 50;
fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let point = |part: &str, s: u64, label: String| {
        Point::new(label).with("part", part).with("seed", seed + s)
    };
    let mut points = Vec::new();
    for s in 0..SEEDS {
        for width in profile.pick(vec![256u64, 512, 1024], vec![256, 512, 1024, 2048]) {
            let label = format!("switch, width {width}, seed {}", seed + s);
            points.push(point("switch", s, label).with("width", width));
        }
        for adapters in profile.pick(vec![1u64, 4, 16], vec![1, 2, 4, 8, 16, 32]) {
            let label = format!("mixed, {adapters} adapters, seed {}", seed + s);
            let width = profile.pick(256u64, 512);
            points.push(point("mixed", s, label).with("width", width).with("adapters", adapters));
        }
    }
    points
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    if point.text("part")? == "switch" { serving::switch(point) } else { serving::mixed(point) }
}

fn sizes(width: usize, layers: usize, head_dim: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: BYTE_VOCABULARY,
        hidden_size: width,
        intermediate_size: width * 43 / 16,
        num_hidden_layers: layers,
        num_attention_heads: width / head_dim,
        num_key_value_heads: width / head_dim,
        head_dim,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        options: Default::default(),
    }
}
