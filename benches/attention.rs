//! Gradient speed as ratios to the counted floor: GEMM operations over the GEMM rate of the same
//! run.
//!
//! `cargo bench --bench attention [-- FILTER]` with the threads of RAYON_NUM_THREADS (all by
//! default).

use ndarray::{Array2, parallel::prelude::*};
use peft_limits::attention::chained;
use peft_limits::attention::exact::streaming;
use peft_limits::attention::factorization::{Scores, build};
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Mask, Request};
use peft_limits::linalg::Real;
use peft_limits::linalg::gemm::multiply;
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
        c.par_iter_mut()
            .for_each(|c| multiply(T::one(), &a.view(), &a.view(), T::zero(), &mut c.view_mut()));
    });
    (N * N * N * threads) as f64 / median
}

fn streaming_case<T: Real>(
    tokens: usize,
    head_dim: usize,
    rank: usize,
    request: Request,
    repeats: usize,
) {
    let head = SyntheticHead { rank, ..SyntheticHead::new(tokens, head_dim) };
    let problem: AttentionProblem<T> = head.draw().expect("valid head");
    let rate = gemm_rate::<T>();
    let mut cost = Default::default();
    let [low, median, high] = time(repeats, || {
        cost = streaming::gradients(&problem, request).expect("valid head").cost;
    });
    let floor = cost.multiply_adds as f64 / rate;
    println!(
        "streaming {:3} L={tokens:6} d={head_dim:3} r={rank} {request:?}: {:8.1} ms [{:.1}, \
         {:.1}]  floor {:8.1} ms  ratio {:.2}  GEMM {:.0} GFLOP/s  peak extra {:.1} MiB  largest \
         buffer {:.1} MiB",
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
    let head =
        SyntheticHead { mask, rank: 4, ..SyntheticHead::new(tokens, 8).at_threshold_ratio(0.5) };
    let problem: AttentionProblem<f32> = head.draw().expect("valid head");
    let method = build::<f32>(spec).expect("valid spec");
    let rate = gemm_rate::<f32>();
    let mut result = None;
    let chained = time(repeats, || {
        result = Some(
            chained::gradients(&problem, method.as_ref(), Request::Adapters)
                .expect("inside the interval"),
        );
    });
    let mut exact = None;
    let streaming = time(1, || {
        exact = Some(streaming::gradients(&problem, Request::Adapters).expect("valid head"))
    });
    let (Some(result), Some(exact)) = (result, exact) else { return };
    let floor = result.gradients.cost.multiply_adds as f64 / rate;
    println!(
        "chained   f32 L={tokens:6} d=  8 r=4 {mask:?} {spec}: {:8.1} ms [{:.1}, {:.1}]  floor \
         {:6.1} ms  ratio {:.2}  streaming {:.0} ms, {:.1}x  relative error {:.1e}",
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

/// One factorization: the chain with its features against the chain's products alone at the GEMM
/// rate, for each column.
fn factorization_case(spec: &str, repeats: usize) {
    let head = SyntheticHead { rank: 4, ..SyntheticHead::new(8192, 16).at_threshold_ratio(0.4) };
    let problem: AttentionProblem<f32> = head.draw().expect("valid head");
    let projected = problem.project(&mut Default::default());
    let scores = Scores::of(&problem, &projected);
    let method = build::<f32>(spec).expect("valid spec");
    let rate = gemm_rate::<f32>();
    let mut map = None;
    let prepare = time(repeats, || {
        map = Some(method.prepare(&scores, &mut Default::default()).expect("fits the head"))
    });
    let Some(map) = map else { return };
    let mut counted = None;
    let chain = time(repeats, || {
        let done = chained::with_map(
            &problem,
            &projected,
            map.as_ref(),
            Request::Adapters,
            Default::default(),
        );
        counted = done.ok().map(|d| d.gradients.cost.multiply_adds as f64);
    });
    let failed = counted.is_none();
    let (r, d) = (4, 16);
    // Without columns the work is in the pairs: a column is then one pair a query.
    let (columns, floor) = match map.rank() {
        0 => {
            ((map.certificate().corrected_pairs / 8192) as f64, counted.unwrap_or(f64::NAN) / rate)
        }
        k => (k as f64, chained::predicted_multiply_adds(8192, k as u128, d, 2 * r, 2 * r) / rate),
    };
    println!(
        "features  f32 L=  8192 d= 16 r=4 {spec:44} k={:5}: chain {:6.2} us a column, ratio \
         {:.2}  prepare {:6.2} us a column  both {:.2}{}",
        map.rank(),
        1e6 * chain[1] / columns,
        chain[1] / floor,
        1e6 * prepare[1] / columns,
        (chain[1] + prepare[1]) / floor,
        if failed { "  (no positive denominators)" } else { "" },
    );
}

fn factorization_cases() {
    for spec in [
        "taylor:degree=2",
        "chebyshev:degree=2",
        "fitted:degree=2",
        "positive-features:rank=256",
        "tensor-sketch:degree=3,rank=256",
        "tensor-sketch:degree=4,rank=300,nonnegative=true",
        "nystrom:rank=256",
        "support-basis:degree=2,threshold=0.6",
        "sparse:keys=64",
        "sparse:keys=64,search=tree",
    ] {
        factorization_case(spec, 9);
    }
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    println!("{} threads; median [quartiles]", rayon::current_num_threads());
    let chosen = |name: &str| name.contains(&filter);
    let cases: [(&str, &dyn Fn()); 8] = [
        ("streaming f32 L=4096", &|| streaming_case::<f32>(4096, 64, 8, Request::Adapters, 21)),
        ("streaming f32 L=4096 all", &|| streaming_case::<f32>(4096, 64, 8, Request::All, 21)),
        ("streaming f64 L=4096", &|| streaming_case::<f64>(4096, 64, 8, Request::Adapters, 11)),
        ("streaming f32 L=16384", &|| streaming_case::<f32>(16384, 64, 8, Request::Adapters, 7)),
        ("streaming f32 L=16384 d=8", &|| streaming_case::<f32>(16384, 8, 4, Request::Adapters, 7)),
        ("chained full", &|| chained_case(65536, Mask::Full, "taylor:degree=3", 11)),
        ("chained causal", &|| chained_case(65536, Mask::Causal, "taylor:degree=3", 11)),
        ("features", &factorization_cases),
    ];
    cases.iter().filter(|(name, _)| chosen(name)).for_each(|(_, run)| run());
}
