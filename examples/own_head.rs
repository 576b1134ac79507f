//! The LoRA gradient of a head of your own: exact, chained, and how far apart they are.
//!
//! `cargo run --release --example own_head`

use ndarray::Array2;
use peft_limits::Error;
use peft_limits::attention::exact::streaming;
use peft_limits::attention::factorization::build;
use peft_limits::attention::problem::{
    Adapter, AttentionProblem, Hidden, Mask, Objective, Projection, Qkv,
};
use peft_limits::attention::problem::{SoftmaxKind, Source};
use peft_limits::attention::{Request, chained};
use peft_limits::cost::Cost;
use peft_limits::limits::threshold::Threshold;

pub(crate) fn main() -> Result<(), Error> {
    // Your tensors: hidden states X (tokens x width), weights (width x head_dim), adapters of rank
    // 2 on Q and V.
    let (tokens, width, head_dim, rank, alpha) = (1024, 16, 4, 2, 4.0);
    let wave = |rows: usize, columns: usize, frequency: f64| {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            0.4 * (frequency * (i * columns + j + 1) as f64).sin()
        })
    };
    let x = wave(tokens, width, 0.731).into_shared();
    let adapter = |f: f64| {
        Some(Adapter { lora_a: wave(rank, head_dim, f), lora_b: wave(width, rank, 2.0 * f) })
    };
    let hidden = Hidden {
        inputs: Qkv { query: x.clone(), key: x.clone(), value: x },
        projections: Qkv {
            query: Projection { weight: wave(width, head_dim, 0.377), adapter: adapter(0.191) },
            key: Projection { weight: wave(width, head_dim, 0.519), adapter: None },
            value: Projection { weight: wave(width, head_dim, 0.613), adapter: adapter(0.277) },
        },
        scaling: alpha / rank as f64,
    };
    // What comes back from the layers above; a target (`Objective::Target`) is the other choice.
    let upstream_gradient = wave(tokens, head_dim, 0.857);
    let beta = 1.0 / (head_dim as f64).sqrt();
    let problem = AttentionProblem::new(
        Source::Hidden(Box::new(hidden)),
        Objective::UpstreamGradient(upstream_gradient),
        Mask::Causal,
        SoftmaxKind::Standard,
        beta,
    )?;

    let mut cost = Cost::default();
    let projected = problem.project(&mut cost);
    println!("{:#?}", Threshold::measure(&problem, &projected, &mut cost));
    let exact = streaming::gradients(&problem, Request::Adapters)?;
    for spec in ["taylor:degree=2", "taylor:degree=4", "taylor:degree=8"] {
        let fast = chained::gradients(&problem, build(spec)?.as_ref(), Request::Adapters)?;
        println!(
            "{spec}: {} columns, relative gradient error {:.1e}, {:.2} times the operations of the \
             exact gradient",
            fast.certificate.rank,
            fast.gradients.relative_gap(&exact),
            fast.gradients.cost.flops() as f64 / exact.cost.flops() as f64,
        );
    }
    if let Some(gradient) = &exact.lora_a.query {
        println!(
            "dA_Q is {} x {}, its first entry {:+.6e}",
            gradient.nrows(),
            gradient.ncols(),
            gradient[[0, 0]]
        );
    }
    Ok(())
}
