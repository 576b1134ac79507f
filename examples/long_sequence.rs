//! The LoRA gradient of one head over as many tokens as the ranks hold: rows are drawn by seed
//! where they are needed, so that nothing is read, sent or gathered but sums.
//!
//! `mpirun -n 2 target/release/examples/long_sequence --tokens 10000000`
//!
//! Any number of ranks draws the same head, so the printed norms agree. One line of `key=value`
//! pairs a repetition, on rank 0: seconds of the slowest rank, memory of the largest, bytes of
//! rank 0.

use clap::{Parser, ValueEnum};
use ndarray::{Array2, s};
use peft_limits::attention::chained::CHUNK;
use peft_limits::attention::factorization::build;
use peft_limits::attention::problem::{
    Adapter, AttentionProblem, Hidden, Mask, Objective, Projection, Qkv,
};
use peft_limits::attention::problem::{SoftmaxKind, Source};
use peft_limits::attention::shards::{RowShards, together};
use peft_limits::attention::{Gradients, Request};
use peft_limits::distributed::rows::rows_of;
use peft_limits::distributed::{Job, Ranks, Scalar, chained, ring};
use peft_limits::linalg::norms::frobenius;
use peft_limits::streams::seed_stream;
use peft_limits::{Error, Result};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Parser)]
struct Arguments {
    /// L, over all ranks
    #[arg(long, default_value_t = 1_000_000)]
    tokens: usize,
    /// d_in = d_h = d_v
    #[arg(long, default_value_t = 8)]
    head_dim: usize,
    /// r of the adapters of Q, K and V
    #[arg(long, default_value_t = 2)]
    rank: usize,
    #[arg(long, value_enum, default_value_t = Method::Chained)]
    method: Method,
    /// Factorization of exp(S), for chained
    #[arg(long, default_value = "chebyshev:degree=2")]
    features: String,
    #[arg(long)]
    causal: bool,
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Gradients to time; the first warms up when there are several
    #[arg(long, default_value_t = 1)]
    repeats: usize,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Method {
    Chained,
    Streaming,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = Job::launched().and_then(|job| match job {
        Some(job) => match arguments.dtype {
            Dtype::F32 => run::<f32>(&arguments, job.ranks()),
            Dtype::F64 => run::<f64>(&arguments, job.ranks()),
        },
        None => {
            Err(Error::invalid("launcher", "none", "start with mpirun -n N, also for one rank"))
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("long_sequence: {error}");
            ExitCode::from(2)
        }
    }
}

fn run<T: Scalar>(arguments: &Arguments, ranks: &Ranks) -> Result<()> {
    let drawn = rows_of(arguments.tokens, ranks.rank(), ranks.size())
        .and_then(|rows| draw::<T>(arguments, rows));
    let problem = together::<T, _>(ranks, drawn)?;
    let factorization = build::<T>(&arguments.features)?;
    for _ in 0..arguments.repeats {
        let before = ranks.traffic();
        ranks.barrier();
        let start = Instant::now();
        let gradients = match arguments.method {
            Method::Chained => {
                chained::gradients(ranks, &problem, factorization.as_ref(), Request::Adapters)?
                    .gradients
            }
            Method::Streaming => ring::gradients(ranks, &problem, Request::Adapters)?,
        };
        let seconds = RowShards::<T>::largest(ranks, start.elapsed().as_secs_f64())?;
        let memory = RowShards::<T>::largest(ranks, peak_memory().unwrap_or(f64::NAN))?;
        let after = ranks.traffic();
        if ranks.is_first() {
            println!(
                "ranks={} threads={} tokens={} causal={} seconds={seconds:.4} peak_mib={:.0} \
                 reduced={} scanned={} sent={} control={} messages={} gflop={:.3} {}",
                ranks.size(),
                rayon::current_num_threads(),
                arguments.tokens,
                arguments.causal,
                memory / f64::from(1 << 20),
                after.reduced - before.reduced,
                after.scanned - before.scanned,
                after.sent - before.sent,
                after.control - before.control,
                after.messages - before.messages,
                gradients.cost.flops() as f64 / 1e9,
                norms(&gradients),
            );
        }
    }
    Ok(())
}

fn norms<T: Scalar>(gradients: &Gradients<T>) -> String {
    let words = gradients
        .named()
        .into_iter()
        .map(|(name, a)| format!("{name}={:.6e}", frobenius(&a.view())));
    words.collect::<Vec<_>>().join(" ")
}

/// This rank's rows of a head that the seed determines.
fn draw<T: Scalar>(arguments: &Arguments, rows: Range<usize>) -> Result<AttentionProblem<T>> {
    let (d, r) = (arguments.head_dim, arguments.rank);
    let x = rows_by_seed::<T>(arguments.seed, "hidden states", rows.clone(), d).into_shared();
    let target = rows_by_seed::<T>(arguments.seed, "target", rows, d);
    let mut rng = seed_stream(arguments.seed, "weights");
    // Entries of Q and K are then below 1 in size, typically a third of it.
    let mut matrix =
        |rows: usize, columns: usize, size: f64| uniform(&mut rng, rows, columns, size);
    let mut projection = || Projection {
        weight: matrix(d, d, 1.0 / (d as f64).sqrt()),
        adapter: Some(Adapter { lora_a: matrix(r, d, 0.1), lora_b: matrix(d, r, 1.0) }),
    };
    let projections = Qkv { query: projection(), key: projection(), value: projection() };
    let inputs = Qkv { query: x.clone(), key: x.clone(), value: x };
    let source = Source::Hidden(Box::new(Hidden { inputs, projections, scaling: 2.0 }));
    let mask = if arguments.causal { Mask::Causal } else { Mask::Full };
    AttentionProblem::new(
        source,
        Objective::Target(target),
        mask,
        SoftmaxKind::Standard,
        1.0 / (d as f64).sqrt(),
    )
}

/// Rows of a matrix whose blocks of [`CHUNK`] rows have streams of their own.
fn rows_by_seed<T: Scalar>(seed: u64, what: &str, rows: Range<usize>, columns: usize) -> Array2<T> {
    let mut out = Array2::zeros((rows.len(), columns));
    for block in rows.start / CHUNK..rows.end.div_ceil(CHUNK) {
        let all: Array2<T> =
            uniform(&mut seed_stream(seed, &format!("{what} {block}")), CHUNK, columns, 1.0);
        let (from, to) = (rows.start.max(block * CHUNK), rows.end.min((block + 1) * CHUNK));
        let here = s![from - block * CHUNK..to - block * CHUNK, ..];
        out.slice_mut(s![from - rows.start..to - rows.start, ..]).assign(&all.slice(here));
    }
    out
}

fn uniform<T: Scalar>(rng: &mut ChaCha8Rng, rows: usize, columns: usize, size: f64) -> Array2<T> {
    Array2::from_shape_simple_fn((rows, columns), || {
        T::of(size * (2.0 * rng.random::<f64>() - 1.0))
    })
}

/// The largest memory that this process has held, in bytes, where the system tells.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0)
}
