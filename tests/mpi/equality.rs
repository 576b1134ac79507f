//! Gradients over ranks against those of one process: to 1e-12 in f64, and the bytes that the
//! formulas give.

use super::launch;
use ndarray::Array2;
use peft_limits::attention::exact::streaming;
use peft_limits::attention::factorization::build;
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{
    AttentionProblem, Gradients, Mask, Objective, Qkv, Request, SoftmaxKind, chained,
};
use peft_limits::distributed::ranks::Traffic;
use peft_limits::distributed::rows::{rows_of, shard};
use peft_limits::distributed::traffic::Columns;
use peft_limits::distributed::{self, Job, Ranks, Scalar};
use std::process::ExitCode;

const METHODS: [&str; 8] = [
    "taylor:degree=2",
    "taylor:degree=3,center=both",
    "chebyshev:degree=3",
    "chebyshev:eps=0.01,center=keys",
    "positive-features:rank=40,seed=3",
    "positive-features:rank=24,directions=iid,center=none",
    "tensor-sketch:degree=4,rank=40,seed=5",
    "tensor-sketch:degree=4,rank=300,nonnegative=true,center=none",
];

pub fn on_one() {
    check(1);
}
pub fn on_two() {
    check(2);
}
pub fn on_three() {
    check(3);
}

fn check(ranks: usize) {
    let out = launch::succeeds(launch::role(ranks, "equality", &[]));
    // Every rank must have come to its end.
    let ends = out.matches("all equal").count();
    assert_eq!(ends, ranks, "{out}");
    println!("{}", out.lines().find(|line| line.contains("largest gap")).unwrap_or(""));
}

/// One rank: every method, mask, softmax, request and objective.
pub fn rank() -> ExitCode {
    let job = Job::launched().unwrap().expect("under mpirun");
    let ranks = job.ranks();
    let mut largest = 0.0f64;
    for mask in [Mask::Full, Mask::Causal] {
        for softmax in [SoftmaxKind::Standard, SoftmaxKind::One] {
            // Neither length is a multiple of the ranks; the second fills several chunks on every
            // rank.
            for tokens in [47, 1043] {
                let head = SyntheticHead {
                    mask,
                    softmax,
                    rank: 3,
                    seed: 11,
                    ..SyntheticHead::new(tokens, 5)
                };
                let problem: AttentionProblem<f64> = head.draw().unwrap();
                let given = given_upstream(&problem);
                for (problem, request) in [(&problem, Request::Adapters), (&given, Request::All)] {
                    largest = largest.max(streaming_gap(ranks, problem, request, 1e-12));
                    // Short causal heads have other exact chunks on several ranks: see `rows_of`.
                    if mask == Mask::Full || tokens > 3 * 256 || ranks.size() == 1 {
                        for spec in METHODS {
                            largest =
                                largest.max(chained_gap(ranks, problem, spec, request, 1e-12));
                        }
                    }
                }
                if tokens > 1000 {
                    let single = problem.cast::<f32>();
                    streaming_gap(ranks, &single, Request::Adapters, 1e-4);
                    chained_gap(ranks, &single, "chebyshev:degree=3", Request::Adapters, 1e-4);
                }
            }
        }
    }
    projected_inputs(ranks);
    println!("rank {} of {}: all equal, largest gap {largest:.1e}", ranks.rank(), ranks.size());
    ExitCode::SUCCESS
}

/// The same head with its upstream gradient in place of a target.
fn given_upstream(problem: &AttentionProblem<f64>) -> AttentionProblem<f64> {
    let g = problem.objective().tensor().mapv(|y| 0.3 - y);
    let (source, mask) = (problem.source().clone(), problem.mask());
    AttentionProblem::new(
        source,
        Objective::UpstreamGradient(g),
        mask,
        problem.softmax(),
        problem.beta(),
    )
    .unwrap()
}

fn streaming_gap<T: Scalar>(
    ranks: &Ranks,
    whole: &AttentionProblem<T>,
    request: Request,
    tolerance: f64,
) -> f64 {
    let before = ranks.traffic();
    let mine = shard(whole, ranks.rank(), ranks.size()).unwrap();
    let got = distributed::ring::gradients(ranks, &mine, request).unwrap();
    let rows: Vec<usize> = (0..ranks.size())
        .map(|r| rows_of(whole.num_keys(), r, ranks.size()).unwrap().len())
        .collect();
    let expected = Columns::of(whole, request).ring(&rows, ranks.rank(), size_of::<T>());
    assert_eq!(bytes(ranks.traffic(), before), (expected.reduced, expected.scanned, expected.sent));
    compare(ranks, "streaming", &got, &streaming::gradients(whole, request).unwrap(), tolerance)
}

fn chained_gap<T: Scalar>(
    ranks: &Ranks,
    whole: &AttentionProblem<T>,
    spec: &str,
    request: Request,
    tolerance: f64,
) -> f64 {
    let method = build::<T>(spec).unwrap();
    let before = ranks.traffic();
    let mine = shard(whole, ranks.rank(), ranks.size()).unwrap();
    let got = distributed::chained::gradients(ranks, &mine, method.as_ref(), request).unwrap();
    let expected = Columns::of(whole, request).chained(got.certificate.rank, size_of::<T>());
    assert_eq!(
        bytes(ranks.traffic(), before),
        (expected.reduced, expected.scanned, expected.sent),
        "{spec}"
    );
    let want = chained::gradients(whole, method.as_ref(), request).unwrap();
    // Bounds and intervals are of the whole head; a maximum is exact, means are sums.
    let (ours, theirs) = (&got.certificate, &want.certificate);
    assert_eq!((&ours.spec, ours.rank, ours.degree), (&theirs.spec, theirs.rank, theirs.degree));
    let b =
        |c: &peft_limits::attention::factorization::Certificate| c.interval.map_or(0.0, |(b, _)| b);
    assert!(
        (b(ours) - b(theirs)).abs() <= 1e-6 * b(theirs),
        "{spec}: {:?} {:?}",
        ours.interval,
        theirs.interval
    );
    compare(ranks, spec, &got.gradients, &want.gradients, tolerance)
}

fn bytes(after: Traffic, before: Traffic) -> (u64, u64, u64) {
    (after.reduced - before.reduced, after.scanned - before.scanned, after.sent - before.sent)
}

/// Largest relative gap of any tensor; panics above the tolerance.
fn compare<T: Scalar>(
    ranks: &Ranks,
    what: &str,
    got: &Gradients<T>,
    want: &Gradients<T>,
    tolerance: f64,
) -> f64 {
    let mut largest = 0.0f64;
    let mut judge = |name: &str, got: &Array2<T>, want: &Array2<T>| {
        assert_eq!(got.dim(), want.dim(), "{what}: {name}");
        let square = |a: &Array2<T>| a.iter().map(|x| x.widen() * x.widen()).sum::<f64>();
        let gap = (square(&(got - want)) / square(want)).sqrt();
        assert!(gap <= tolerance, "{what} on {} ranks: {name} differs by {gap:e}", ranks.size());
        largest = largest.max(gap);
    };
    let sums = |g: &Gradients<T>| [g.weight.clone(), g.lora_a.clone(), g.lora_b.clone()];
    for (name, (got, want)) in
        ["dW", "dA", "dB"].into_iter().zip(sums(got).into_iter().zip(sums(want)))
    {
        for ((_, got), (_, want)) in got.named().into_iter().zip(want.named()) {
            assert_eq!(got.is_some(), want.is_some(), "{what}: {name}");
            if let (Some(got), Some(want)) = (got, want) {
                judge(name, got, want);
            }
        }
    }
    // Rows stay with their rank; together they are the whole head's.
    if let Some(output) = ranks.gather_rows(&got.output) {
        judge("O", &output, &want.output);
    }
    for ((letter, got), (_, want)) in got.projected.named().into_iter().zip(want.projected.named())
    {
        if let (Some(got), Some(want)) = (got, want)
            && let Some(rows) = ranks.gather_rows(got)
        {
            judge(&format!("d{letter}"), &rows, want);
        }
    }
    assert_eq!(got.loss.is_some(), want.loss.is_some(), "{what}");
    if let (Some(got), Some(want)) = (got.loss, want.loss) {
        assert!((got / want - 1.0).abs() <= tolerance, "{what}: loss {got} and {want}");
    }
    largest
}

/// Queries and keys of different number, given as Q, K, V.
fn projected_inputs(ranks: &Ranks) {
    use peft_limits::attention::problem::Source;
    let matrix = |rows: usize, columns: usize, phase: f64| {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 7 + j * 3) as f64 * 0.37 + phase).sin()
        })
    };
    let qkv =
        Qkv { query: matrix(31, 4, 0.0), key: matrix(523, 4, 1.0), value: matrix(523, 6, 2.0) };
    let objective = Objective::Target(matrix(31, 6, 3.0));
    let whole =
        AttentionProblem::new(Source::Projected(qkv), objective, Mask::Full, SoftmaxKind::One, 0.5)
            .unwrap();
    streaming_gap(ranks, &whole, Request::All, 1e-12);
    chained_gap(ranks, &whole, "taylor:degree=4,center=both", Request::All, 1e-12);
}
