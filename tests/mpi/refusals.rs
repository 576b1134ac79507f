//! What cannot be done is a typed error on every rank, and no rank is left waiting.

use super::launch;
use ndarray::Array2;
use peft_limits::Error;
use peft_limits::attention::factorization::build;
use peft_limits::attention::problem::Source;
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Mask, Objective, Qkv, Request, SoftmaxKind};
use peft_limits::distributed::rows::shard;
use peft_limits::distributed::{Job, chained, ring};
use std::process::ExitCode;

pub fn on_three() {
    let out = launch::succeeds(launch::role(3, "refusals", &[]));
    assert_eq!(out.matches("all refused").count(), 3, "{out}");
}

pub fn rank() -> ExitCode {
    let job = Job::launched().unwrap().expect("under mpirun");
    let ranks = job.ranks();
    let whole: AttentionProblem<f64> = SyntheticHead::new(64, 4).draw().unwrap();
    let mine = shard(&whole, ranks.rank(), ranks.size()).unwrap();
    for spec in [
        "nystrom:rank=8,seed=1",
        "fitted:degree=2",
        "support-basis:degree=1,threshold=1",
        "truncated-svd:rank=3",
    ] {
        let method = build::<f64>(spec).unwrap();
        let error =
            chained::gradients(ranks, &mine, method.as_ref(), Request::Adapters).unwrap_err();
        assert!(matches!(error, Error::InvalidParam { .. }), "{spec}: {error}");
        assert!(error.to_string().contains("positive-features"), "{error}");
    }
    let scan = build::<f64>("taylor:degree=2,check=scan").unwrap();
    let error = chained::gradients(ranks, &mine, scan.as_ref(), Request::Adapters).unwrap_err();
    assert!(matches!(&error, Error::InvalidParam { name, .. } if name == "check"), "{error}");

    // More ranks than tokens.
    let short: AttentionProblem<f64> = SyntheticHead::new(2, 2).draw().unwrap();
    assert!(matches!(shard(&short, ranks.rank(), ranks.size()), Err(Error::InvalidParam { .. })));

    // Ranks that ask for different things.
    let request = if ranks.is_first() { Request::Adapters } else { Request::All };
    assert!(matches!(ring::gradients(ranks, &mine, request), Err(Error::Mpi { .. })));

    // A denominator that is not positive, in a row of the last rank only.
    let taylor = build::<f64>("taylor:degree=1,b=40,check=off").unwrap();
    let error = chained::gradients(
        ranks,
        &last_row_fails(ranks.rank(), ranks.size()),
        taylor.as_ref(),
        Request::All,
    );
    match error.unwrap_err() {
        Error::NonPositiveDenominator { row, .. } => assert_eq!((ranks.rank(), row), (2, 11)),
        Error::OtherRank { rank, .. } => assert!(ranks.rank() < 2 && rank == 2),
        other => panic!("{other}"),
    }
    // The ranks are still in step.
    let method = build::<f64>("taylor:degree=2").unwrap();
    chained::gradients(ranks, &mine, method.as_ref(), Request::Adapters).unwrap();
    println!("rank {}: all refused", ranks.rank());
    ExitCode::SUCCESS
}

/// Twelve tokens, the last query opposite to every key: 1 + s is negative there.
fn last_row_fails(rank: usize, ranks: usize) -> AttentionProblem<f64> {
    let key = Array2::from_elem((12, 2), 1.0);
    let mut query = Array2::from_elem((12, 2), 0.1);
    query.row_mut(11).fill(-5.0);
    let source = Source::Projected(Qkv { query, value: key.clone(), key });
    let objective = Objective::Target(Array2::zeros((12, 2)));
    let whole =
        AttentionProblem::new(source, objective, Mask::Full, SoftmaxKind::Standard, 1.0).unwrap();
    shard(&whole, rank, ranks).unwrap()
}
