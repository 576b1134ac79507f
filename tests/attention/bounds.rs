//! The certified gradient bound holds: link by link and for every gradient, against dense matrices.

use ndarray::{Array1, Array2, Axis};
use peft_limits::attention::exact::dense;
use peft_limits::attention::factorization::{Scores, approximation, build};
use peft_limits::attention::problem::Source;
use peft_limits::attention::synthetic::{Entries, SyntheticHead};
use peft_limits::attention::{
    AttentionProblem, Mask, Objective, Qkv, Request, SoftmaxKind, chained,
};
use peft_limits::cost::Cost;
use peft_limits::limits::bounds::{BoundInputs, GradientBound, certified};
use peft_limits::linalg::norms::frobenius;
use proptest::prelude::*;

/// Room for the rounding of the chain, which the bound leaves out.
fn within(name: &str, error: f64, bound: f64, scale: f64) -> Result<(), TestCaseError> {
    prop_assert!(
        error <= bound * (1.0 + 1e-9) + 1e-11 * (1.0 + scale),
        "{name}: {error:e} above {bound:e}"
    );
    Ok(())
}

fn check_links(
    problem: &AttentionProblem<f64>,
    spec: &str,
    bound: &GradientBound,
) -> Result<(), TestCaseError> {
    let qkv = problem.project(&mut Cost::default()).qkv;
    let exact = dense::matrices(problem, &qkv);
    let s = Scores {
        query: qkv.query.view(),
        key: qkv.key.view(),
        beta: problem.beta(),
        mask: problem.mask(),
    };
    let map = build::<f64>(spec).unwrap().prepare(&s, &mut Cost::default()).unwrap();
    let mut e = approximation(map.as_ref(), &s);
    let shift = |i: usize| map.row_shift().map_or(0.0, |shift| shift[i]);
    let mut largest = 0.0f64;
    for ((i, j), x) in e.indexed_iter_mut() {
        let want = (exact.S[[i, j]] - shift(i)).exp();
        if problem.mask() == Mask::Causal && j > i {
            *x = 0.0;
            continue;
        }
        largest = largest.max((*x - want).abs());
        // The chain takes diagonal chunks of 256 exactly.
        if problem.mask() == Mask::Causal && i / 256 == j / 256 {
            *x = want;
        }
    }
    within("exp", largest, bound.exp_error, 1.0)?;
    let extra =
        |i: usize| if problem.softmax() == SoftmaxKind::One { (-shift(i)).exp() } else { 0.0 };
    let d: Array1<f64> =
        e.rows().into_iter().enumerate().map(|(i, row)| row.sum() + extra(i)).collect();
    let p = &e / &d.insert_axis(Axis(1));
    let output = p.dot(&qkv.value);
    let upstream = match problem.objective() {
        Objective::Target(y) => &output - y,
        Objective::UpstreamGradient(g) => g.clone(),
    };
    let delta = (&upstream * &output).sum_axis(Axis(1)).insert_axis(Axis(1));
    let ds = &p * &(upstream.dot(&qkv.value.t()) - &delta);
    for i in 0..p.nrows() {
        let one = |a: &Array2<f64>, b: &Array2<f64>| {
            (&a.row(i) - &b.row(i)).iter().map(|x| x.abs()).sum::<f64>()
        };
        let two = |a: &Array2<f64>, b: &Array2<f64>| frobenius(&(&a.row(i) - &b.row(i)).view());
        within("P", one(&p, &exact.P), bound.probabilities[i], 1.0)?;
        within("O", two(&output, &exact.O), bound.output[i], 1.0)?;
        within("G", two(&upstream, &exact.G), bound.upstream[i], 1.0)?;
        within("dS", one(&ds, &exact.dS), bound.scores[i], 1.0)?;
    }
    Ok(())
}

fn check(
    problem: &AttentionProblem<f64>,
    spec: &str,
    request: Request,
) -> Result<(), TestCaseError> {
    // A denominator that is not positive has no gradient and no bound.
    let Ok(chained) = chained::gradients(problem, build::<f64>(spec).unwrap().as_ref(), request)
    else {
        return Ok(());
    };
    let bound = certified(problem, &chained).unwrap().unwrap();
    check_links(problem, spec, &bound)?;
    let exact = dense::gradients(problem, request).unwrap();
    let (ours, theirs) = (chained.gradients.named(), exact.named());
    let mut squares = (0.0, 0.0);
    for (name, allowed) in &bound.gradients {
        let find =
            |all: &[(String, &Array2<f64>)]| all.iter().find(|(n, _)| n == name).unwrap().1.clone();
        let want = find(&theirs);
        let error = frobenius(&(find(&ours) - &want).view());
        within(name, error, *allowed, frobenius(&want.view()))?;
        squares.0 += error * error;
        squares.1 += frobenius(&want.view()).powi(2);
    }
    within("total", squares.0.sqrt(), bound.total, squares.1.sqrt())?;
    if bound.relative.is_finite() {
        within("relative", (squares.0 / squares.1).sqrt(), bound.relative, 1.0)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn the_bound_holds_at_every_link(
        tokens in 2usize..70,
        head_dim in 1usize..6,
        gamma in 0.05f64..2.5,
        seed in 0u64..1000,
        causal in any::<bool>(),
        one in any::<bool>(),
        entries in prop::sample::select(vec![Entries::Uniform, Entries::Normal, Entries::Sign]),
        spec in prop::sample::select(vec![
            "taylor:degree=3", "chebyshev:degree=6,center=keys", "chebyshev:degree=9,center=both", "taylor:degree=12",
            "nystrom:rank=2", "fitted:degree=5", "support-basis:degree=5,threshold=0.4", "truncated-svd:rank=2",
        ]),
    ) {
        let head = SyntheticHead {
            entries,
            gamma,
            seed,
            rank: 1,
            mask: if causal { Mask::Causal } else { Mask::Full },
            softmax: if one { SoftmaxKind::One } else { SoftmaxKind::Standard },
            ..SyntheticHead::new(tokens, head_dim)
        };
        check(&head.draw().unwrap(), spec, Request::Adapters)?;
    }
}

/// Given Q, K, V and an upstream gradient: dQ, dK, dV, and causal chunks beyond the first.
#[test]
fn the_bound_holds_for_projected_heads_and_long_causal_ones() {
    let head = SyntheticHead { gamma: 0.8, rank: 2, ..SyntheticHead::new(600, 3) };
    let drawn: AttentionProblem<f64> = head.draw().unwrap();
    let Qkv { query, key, value } = drawn.project(&mut Cost::default()).qkv;
    let upstream = Objective::UpstreamGradient(drawn.objective().tensor().clone());
    for mask in [Mask::Full, Mask::Causal] {
        let source =
            Source::Projected(Qkv { query: query.clone(), key: key.clone(), value: value.clone() });
        let problem = AttentionProblem::new(
            source,
            upstream.clone(),
            mask,
            SoftmaxKind::Standard,
            drawn.beta(),
        )
        .unwrap();
        for spec in
            ["chebyshev:degree=5", "support-basis:degree=4,threshold=0.2", "nystrom:rank=12"]
        {
            check(&problem, spec, Request::All).unwrap();
        }
    }
}

/// With a good approximation the certificate says something: below 1% where the achieved error is
/// 1e-5 or less.
#[test]
fn the_bound_is_useful_and_scales_with_the_error_of_exp() {
    let problem: AttentionProblem<f64> =
        SyntheticHead { gamma: 0.7, ..SyntheticHead::new(256, 4) }.draw().unwrap();
    let exact = dense::gradients(&problem, Request::Adapters).unwrap();
    let chained = chained::gradients(
        &problem,
        build("chebyshev:degree=6").unwrap().as_ref(),
        Request::Adapters,
    )
    .unwrap();
    let bound = certified(&problem, &chained).unwrap().unwrap();
    let achieved = chained.gradients.relative_gap(&exact);
    assert!(
        achieved < 1e-5 && bound.relative < 1e-2 && bound.relative > achieved,
        "{achieved:e} {:e}",
        bound.relative
    );
    let inputs = BoundInputs::new(&problem, &problem.project(&mut Cost::default())).unwrap();
    let half = inputs.propagate(&problem, &chained, 0.5 * bound.exp_error);
    assert!((half.total / bound.total - 0.5).abs() < 1e-12, "the bound is linear in eta");
    // A randomised method certifies nothing.
    let random = chained::gradients(
        &problem,
        build("positive-features:rank=64").unwrap().as_ref(),
        Request::Adapters,
    );
    assert!(certified(&problem, &random.unwrap()).unwrap().is_none());
}
