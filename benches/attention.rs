//! Gradient speed as ratios to the counted floor: GEMM operations over the GEMM rate of the same run.
//!
//! `cargo bench --bench attention [-- FILTER]` with the threads of RAYON_NUM_THREADS (all by default).

use ndarray::{Array2, parallel::prelude::*};
use peft_limits::attention::chained;
use peft_limits::attention::exact::streaming;
use peft_limits::attention::factorization::build;
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Mask, Request};
use peft_limits::linalg::Real;
use std::time::Instant;

/// First quartile, median, third quartile of seconds over repeats, after one warm-up.
fn time(repeats: usize, mut work: impl FnMut()) -> [f64; 3] {
    work();
    let mut seconds: Vec<f64> = (0..repeats)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    [seconds[repeats / 4], seconds[repeats / 2], seconds[repeats * 3 / 4]]
}

/// Multiply-adds per second of one 512^3 product on every thread at once.
fn gemm_rate<T: Real>() -> f64 {
    const N: usize = 512;
    let threads = rayon::current_num_threads();
    let a = Array2::<T>::from_elem((N, N), T::of(0.5));
    let mut c: Vec<Array2<T>> = vec![Array2::zeros((N, N)); threads];
    let [_, median, _] = time(15, || {
        c.par_iter_mut().for_each(|c| ndarray::linalg::general_mat_mul(T::one(), &a, &a, T::zero(), c));
    });
    (N * N * N * threads) as f64 / median
}

fn streaming_case<T: Real>(tokens: usize, head_dim: usize, rank: usize, request: Request, repeats: usize) {
    let head = SyntheticHead { rank, ..SyntheticHead::new(tokens, head_dim) };
    let problem: AttentionProblem<T> = head.draw().expect("valid head");
    let rate = gemm_rate::<T>();
    let mut cost = Default::default();
    let [low, median, high] = time(repeats, || {
        cost = streaming::gradients(&problem, request).expect("valid head").cost;
    });
    let floor = cost.multiply_adds as f64 / rate;
    println!(
        "streaming {:3} L={tokens:6} d={head_dim:3} r={rank} {request:?}: {:8.1} ms [{:.1}, {:.1}]  floor {:8.1} ms  ratio {:.2}  \
         GEMM {:.0} GFLOP/s  peak extra {:.1} MiB  largest buffer {:.1} MiB",
        T::NAME,
        1e3 * median,
        1e3 * low,
        1e3 * high,
        1e3 * floor,
        median / floor,
        2e-9 * rate,
        cost.peak_live_elements as f64 * std::mem::size_of::<T>() as f64 / (1 << 20) as f64,
        cost.largest_buffer as f64 * std::mem::size_of::<T>() as f64 / (1 << 20) as f64,
    );
}

/// Chained against streaming on the same head, with the relative error of the gradient.
fn chained_case(tokens: usize, mask: Mask, spec: &str, repeats: usize) {
    let head = SyntheticHead { mask, rank: 4, ..SyntheticHead::new(tokens, 8).at_threshold_ratio(0.5) };
    let problem: AttentionProblem<f32> = head.draw().expect("valid head");
    let method = build::<f32>(spec).expect("valid spec");
    let rate = gemm_rate::<f32>();
    let mut result = None;
    let chained = time(repeats, || {
        result = Some(chained::gradients(&problem, method.as_ref(), Request::Adapters).expect("inside the interval"));
    });
    let mut exact = None;
    let streaming = time(1, || exact = Some(streaming::gradients(&problem, Request::Adapters).expect("valid head")));
    let (Some(result), Some(exact)) = (result, exact) else { return };
    let floor = result.gradients.cost.multiply_adds as f64 / rate;
    println!(
        "chained   f32 L={tokens:6} d=  8 r=4 {mask:?} {spec}: {:8.1} ms [{:.1}, {:.1}]  floor {:6.1} ms  ratio {:.2}  \
         streaming {:.0} ms, {:.1}x  relative error {:.1e}",
        1e3 * chained[1],
        1e3 * chained[0],
        1e3 * chained[2],
        1e3 * floor,
        chained[1] / floor,
        1e3 * streaming[1],
        streaming[1] / chained[1],
        result.gradients.relative_gap(&exact),
    );
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    println!("{} threads; median [quartiles]", rayon::current_num_threads());
    if "streaming".contains(&filter) || filter.is_empty() {
        streaming_case::<f32>(4096, 64, 8, Request::Adapters, 21);
        streaming_case::<f32>(4096, 64, 8, Request::All, 21);
        streaming_case::<f64>(4096, 64, 8, Request::Adapters, 11);
        streaming_case::<f32>(16384, 64, 8, Request::Adapters, 7);
        streaming_case::<f32>(16384, 8, 4, Request::Adapters, 7);
    }
    if "chained".contains(&filter) || filter.is_empty() {
        chained_case(65536, Mask::Full, "taylor:degree=3", 11);
        chained_case(65536, Mask::Causal, "taylor:degree=3", 11);
    }
}
