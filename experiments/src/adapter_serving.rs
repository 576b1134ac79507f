//! Claim (\[S2FT\]: updates decouple into adapters for fusion, fast switch and parallel serving): slice adapters of as many
//! numbers as a LoRA adapter switch faster, touch less memory, are served side by side at no higher cost, and lose less when
//! two of them are summed.
//!
//! Measured: (switch) seconds, bytes overwritten and kept, and the weights' drift after many switches, over the model's
//! width; (mixed) time and multiply-adds of one batch whose sequences use n different adapters, over n, against switching
//! and running them one by one; (fusion) two tasks trained as separate adapters of one pretrained model: the share of each
//! adapter's own gain in loss that the fused adapter keeps. S2FT with independently drawn and with the same channels,
//! LoRA of the same size.
//!
//! Refuted if LoRA switches as fast, or if fused S2FT adapters on independent slices keep no more of their gains than LoRA's.
//!
//! `cargo run --release --bin adapter_serving [-- --profile full]`; about 50 seconds, some 6 minutes in full
//! (estimated from the counts of steps and widths). Timed: run it alone.

mod fusion;
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
    title: "Adapters after training: switching, serving together, fusing",
    claim: "S2FT: its updates decouple into adapters that switch faster than LoRA's, serve in one batch as cheaply, and fuse with less loss.",
    refuted_by: "LoRA switching as fast at equal size, or fused S2FT adapters on independent slices keeping no more of their gains than LoRA's",
    doubt: "Two tasks on one small model whose tasks hardly share inputs: fused adapters of related tasks may disturb each other more.",
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
const FUSED: [&str; 3] = ["S2FT, independent channels", "S2FT, same channels", "LoRA"];
/// Sequences and tokens of the mixed batch.
const BATCH: (usize, usize) = (32, 8);
/// Switches after which the drift is measured.
const DRIFT_SWITCHES: usize = 50;
/// Share of channels that S2FT trains for the fusion, and LoRA's rank with as many numbers: r (64 + 172) = 64 * 28.
const CHANNELS: f64 = 28.0 / 172.0;
const RANK: usize = 8;

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let point = |part: &str, s: u64, label: String| Point::new(label).with("part", part).with("seed", seed + s);
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
        let (base_steps, steps) = profile.pick((500u64, 150u64), (2000, 500));
        let label = format!("fusion, seed {}", seed + s);
        points.push(point("fusion", s, label).with("width", 64).with("base steps", base_steps).with("steps", steps));
    }
    points
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    match point.text("part")? {
        "switch" => serving::switch(point),
        "mixed" => serving::mixed(point),
        _ => fusion::fusion(point),
    }
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
