//! Chained gradients against independent dense paths, bounds, exactness in the limit, and counted
//! cost.

use ndarray::{Array2, Axis};
use peft_limits::attention::chained;
use peft_limits::attention::exact::dense;
use peft_limits::attention::factorization::{Scores, approximation, build, materialize};
use peft_limits::attention::problem::{Hidden, Source};
use peft_limits::attention::synthetic::{Entries, SyntheticHead};
use peft_limits::attention::{AttentionProblem, Mask, Objective, Qkv, Request, SoftmaxKind, file};
use peft_limits::check::compare::assert_close;
use peft_limits::cost::Cost;
use std::path::PathBuf;

const BOTH_MASKS: [Mask; 2] = [Mask::Full, Mask::Causal];
const BOTH_SOFTMAX: [SoftmaxKind; 2] = [SoftmaxKind::Standard, SoftmaxKind::One];

fn scores<'a>(problem: &AttentionProblem<f64>, qkv: &'a Qkv<Array2<f64>>) -> Scores<'a, f64> {
    Scores {
        query: qkv.query.view(),
        key: qkv.key.view(),
        beta: problem.beta(),
        mask: problem.mask(),
    }
}

/// Textbook dense gradients of the *approximate* probabilities: P^ from Phi Psi^T, with the
/// diagonal chunks of 256 rows exact (where there are columns) and the rest of the upper triangle
/// zero under a causal mask.
#[allow(non_snake_case)]
fn dense_of_the_approximation(
    problem: &AttentionProblem<f64>,
    spec: &str,
) -> (Array2<f64>, Qkv<Array2<f64>>) {
    let projected = problem.project(&mut Cost::default());
    let Qkv { query: Q, key: K, value: V } = &projected.qkv;
    let s = scores(problem, &projected.qkv);
    let map = build::<f64>(spec).unwrap().prepare(&s, &mut Cost::default()).unwrap();
    let mut E = approximation(map.as_ref(), &s);
    let S = Q.dot(&K.t()) * problem.beta();
    if problem.mask() == Mask::Causal {
        for ((i, j), e) in E.indexed_iter_mut() {
            let shift = map.row_shift().map_or(0.0, |shift| shift[i]);
            if j > i {
                *e = 0.0;
            } else if i / 256 == j / 256 && map.rank() > 0 {
                *e = (S[[i, j]] - shift).exp();
            }
        }
    }
    let mut D = E.sum_axis(Axis(1));
    if problem.softmax() == SoftmaxKind::One {
        for (i, d) in D.iter_mut().enumerate() {
            *d += map.row_shift().map_or(1.0, |shift| (-shift[i]).exp());
        }
    }
    let P = E / &D.insert_axis(Axis(1));
    let O = P.dot(V);
    let G = match problem.objective() {
        Objective::Target(Y) => &O - Y,
        Objective::UpstreamGradient(G) => G.clone(),
    };
    let delta = (&G * &O).sum_axis(Axis(1)).insert_axis(Axis(1));
    let dS = &P * &(G.dot(&V.t()) - &delta);
    (
        O,
        Qkv {
            query: dS.dot(K) * problem.beta(),
            key: dS.t().dot(Q) * problem.beta(),
            value: P.t().dot(&G),
        },
    )
}

fn check_against_dense(problem: &AttentionProblem<f64>, spec: &str, tolerance: f64) {
    let (output, d) = dense_of_the_approximation(problem, spec);
    let method = build::<f64>(spec).unwrap();
    let all = chained::gradients(problem, method.as_ref(), Request::All).unwrap().gradients;
    assert_close(&format!("{spec}: O"), &all.output.view(), &output.view(), tolerance);
    for ((letter, got), (_, want)) in all.projected.named().into_iter().zip(d.named()) {
        assert_close(
            &format!("{spec}: d{letter}"),
            &got.as_ref().unwrap().view(),
            &want.view(),
            tolerance,
        );
    }
    let Some(hidden) = problem.hidden() else { return };
    let contracted =
        chained::gradients(problem, method.as_ref(), Request::Adapters).unwrap().gradients;
    for (letter, d) in d.named() {
        let Some(adapter) = &hidden.projections.letter(letter).adapter else {
            assert!(contracted.lora_a.letter(letter).is_none());
            continue;
        };
        let dw = hidden.inputs.letter(letter).t().dot(d);
        let (da, db) = (
            adapter.lora_b.t().dot(&dw) * hidden.scaling,
            dw.dot(&adapter.lora_a.t()) * hidden.scaling,
        );
        for set in [&all, &contracted] {
            assert_close(
                &format!("{spec}: dA{letter}"),
                &set.lora_a.letter(letter).as_ref().unwrap().view(),
                &da.view(),
                tolerance,
            );
            assert_close(
                &format!("{spec}: dB{letter}"),
                &set.lora_b.letter(letter).as_ref().unwrap().view(),
                &db.view(),
                tolerance,
            );
        }
    }
}

/// The chain computes the gradient of the approximation, at any degree, not merely near the exact
/// one.
#[test]
fn the_chain_equals_the_dense_gradient_of_the_approximation() {
    for mask in BOTH_MASKS {
        for softmax in BOTH_SOFTMAX {
            // 700 rows: two whole chunks and a part; sizes pairwise distinct.
            let head = SyntheticHead {
                mask,
                softmax,
                rank: 2,
                seed: 3,
                gamma: 0.9,
                ..SyntheticHead::new(700, 3)
            };
            let problem = head.draw().unwrap();
            for spec in [
                "taylor:degree=2",
                "chebyshev:degree=3,center=keys",
                "fitted:degree=1",
                "taylor:degree=1,center=both",
            ] {
                check_against_dense(&problem, spec, 1e-11);
            }
            // Randomised methods and the sparse part. Logits reach 0.27: a third of the pairs is
            // above 0.1.
            for spec in [
                "positive-features:rank=40",
                "tensor-sketch:degree=3,rank=41",
                "tensor-sketch:degree=4,rank=60,nonnegative=true",
                "nystrom:rank=9",
                "support-basis:degree=1,threshold=0.1",
                "sparse:threshold=0.0015",
                "sparse:keys=9,search=tree",
                "sparse:keys=40,search=oracle,remainder=1",
                "auto:eps=0.01",
            ] {
                check_against_dense(&problem, spec, 1e-10);
            }
        }
    }
    let head = SyntheticHead {
        rank: 2,
        seed: 4,
        gamma: 2.0,
        softmax: SoftmaxKind::One,
        ..SyntheticHead::new(60, 3)
    };
    check_against_dense(&head.draw().unwrap(), "truncated-svd:rank=7", 1e-10);
}

/// Cross-attention with different lengths and widths, and every subset of adapted projections.
#[test]
fn cross_attention_and_every_subset_of_adapters() {
    let one: AttentionProblem<f64> =
        SyntheticHead { rank: 2, ..SyntheticHead::new(53, 4) }.draw().unwrap();
    let two: AttentionProblem<f64> =
        SyntheticHead { rank: 2, seed: 9, ..SyntheticHead::new(37, 4) }.draw().unwrap();
    let (a, b) = (one.hidden().unwrap(), two.hidden().unwrap());
    for subset in 0..8u32 {
        let mut projections = a.projections.clone();
        // A value width that differs from the head's.
        projections.value.weight = projections.value.weight.slice(ndarray::s![.., ..3]).to_owned();
        if let Some(adapter) = &mut projections.value.adapter {
            adapter.lora_a = adapter.lora_a.slice(ndarray::s![.., ..3]).to_owned();
        }
        for (bit, p) in [&mut projections.query, &mut projections.key, &mut projections.value]
            .into_iter()
            .enumerate()
        {
            if subset >> bit & 1 == 0 {
                p.adapter = None;
            }
        }
        let inputs = Qkv {
            query: a.inputs.query.clone(),
            key: b.inputs.key.clone(),
            value: b.inputs.key.clone(),
        };
        let upstream = a.inputs.query.slice(ndarray::s![.., ..3]).to_owned();
        let source = Source::Hidden(Box::new(Hidden { inputs, projections, scaling: 1.5 }));
        let problem = AttentionProblem::new(
            source,
            Objective::UpstreamGradient(upstream),
            Mask::Full,
            SoftmaxKind::Standard,
            0.3,
        )
        .unwrap();
        if subset == 0 {
            let method = build::<f64>("taylor:degree=2").unwrap();
            let error =
                chained::gradients(&problem, method.as_ref(), Request::Adapters).unwrap_err();
            assert!(error.to_string().contains("no adapter"), "{error}");
            continue;
        }
        check_against_dense(&problem, "taylor:degree=3", 1e-11);
        check_against_dense(&problem, "sparse:keys=7,search=tree", 1e-11);
        // The exact paths on the same head.
        let reference = dense::gradients(&problem, Request::All).unwrap();
        for request in [Request::All, Request::Adapters] {
            let streaming =
                peft_limits::attention::exact::streaming::gradients(&problem, request).unwrap();
            assert!(streaming.relative_gap(&reference) < 1e-13);
            assert_eq!(streaming.lora_a.query.is_some(), subset & 1 == 1);
        }
    }
}

#[test]
fn high_degree_and_full_rank_reach_roundoff() {
    for mask in BOTH_MASKS {
        for softmax in BOTH_SOFTMAX {
            let head =
                SyntheticHead { mask, softmax, rank: 1, gamma: 1.4, ..SyntheticHead::new(300, 2) };
            let problem: AttentionProblem<f64> = head.draw().unwrap();
            let exact = dense::gradients(&problem, Request::Adapters).unwrap();
            for (spec, tolerance) in [
                ("taylor:degree=26", 1e-13),
                ("chebyshev:degree=22", 1e-10),
                ("truncated-svd:rank=300", 1e-11),
                ("sparse:keys=300", 1e-13),
            ] {
                let method = build::<f64>(spec).unwrap();
                let chained =
                    chained::gradients(&problem, method.as_ref(), Request::Adapters).unwrap();
                let gap = chained.gradients.relative_gap(&exact);
                assert!(gap < tolerance, "{spec} {mask:?} {softmax:?}: {gap:e}");
            }
        }
    }
    for case in ["small", "medium", "causal", "softmax_one"] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join(format!("tests/data/attention_{case}.safetensors"));
        let problem: AttentionProblem<f64> = file::read_problem(&path).unwrap();
        let exact = dense::gradients(&problem, Request::All).unwrap();
        let rank = problem.num_queries();
        let method = build::<f64>(&format!("truncated-svd:rank={rank}")).unwrap();
        let chained = chained::gradients(&problem, method.as_ref(), Request::All).unwrap();
        let gap = chained.gradients.relative_gap(&exact);
        assert!(gap < 1e-10, "{case}: {gap:e}");
    }
}

#[test]
fn the_error_of_exp_stays_under_the_stated_bound_at_every_degree() {
    for entries in [Entries::Uniform, Entries::Normal, Entries::Sign] {
        for gamma in [0.5, 1.5, 2.5] {
            let head = SyntheticHead { entries, gamma, rank: 2, ..SyntheticHead::new(80, 3) };
            let problem: AttentionProblem<f64> = head.draw().unwrap();
            let qkv = problem.project(&mut Cost::default()).qkv;
            let s = scores(&problem, &qkv);
            let exact = (qkv.query.dot(&qkv.key.t()) * problem.beta()).mapv(f64::exp);
            let largest = exact.iter().copied().fold(0.0f64, f64::max).powi(2);
            for degree in 1..=14 {
                for name in ["taylor", "chebyshev", "fitted"] {
                    for check in ["", ",check=scan", ",center=keys", ",center=both"] {
                        if name == "fitted" && check.contains("check") {
                            continue;
                        }
                        let spec = format!("{name}:degree={degree}{check}");
                        let map =
                            build::<f64>(&spec).unwrap().prepare(&s, &mut Cost::default()).unwrap();
                        let (phi, psi) = materialize(map.as_ref(), &s);
                        let shifted = match map.row_shift() {
                            Some(shift) => {
                                &exact
                                    / &ndarray::Array1::from_iter(shift.iter().map(|s| s.exp()))
                                        .insert_axis(Axis(1))
                            }
                            None => exact.clone(),
                        };
                        let error = (phi.dot(&psi.t()) - &shifted)
                            .iter()
                            .fold(0.0f64, |m, x| m.max(x.abs()));
                        let bound = map.certificate().exp_error_bound.unwrap();
                        // Rounding: k terms of at most about `largest` each.
                        let rounding = 64.0 * f64::EPSILON * largest * map.rank() as f64;
                        assert!(
                            error <= bound + rounding,
                            "{spec} gamma {gamma} {entries:?}: {error:e} above {bound:e}"
                        );
                        assert_eq!(map.certificate().rank, phi.ncols());
                    }
                }
            }
        }
    }
}

#[test]
fn a_logit_outside_the_interval_is_an_error_or_an_explicit_choice() {
    let problem: AttentionProblem<f64> =
        SyntheticHead { gamma: 2.0, ..SyntheticHead::new(64, 4) }.draw().unwrap();
    let run = |spec: &str| {
        chained::gradients(&problem, build::<f64>(spec).unwrap().as_ref(), Request::Adapters)
    };
    for spec in
        ["taylor:degree=3,b=0.5", "chebyshev:degree=3,b=0.5", "chebyshev:degree=3,b=0.5,check=scan"]
    {
        match run(spec) {
            Err(peft_limits::Error::LogitOutsideInterval { assumed, found, .. }) => {
                assert!((assumed - 0.5).abs() < 1e-15 && found > 0.5);
            }
            other => panic!("{spec}: {other:?}"),
        }
    }
    let accepted = run("chebyshev:degree=3,b=0.5,check=off").unwrap();
    assert_eq!(accepted.certificate.interval.unwrap().1.to_string(), "assumed");
    // Cauchy-Schwarz holds for every head: b = beta max|q| max|k| is accepted without a scan.
    assert!(run("chebyshev:degree=6").is_ok());
}

#[test]
fn a_denominator_that_is_not_positive_is_an_error() {
    // Degree 1 on large logits: 1 + s is negative for most pairs of some row.
    let problem: AttentionProblem<f64> =
        SyntheticHead { gamma: 12.0, entries: Entries::Normal, ..SyntheticHead::new(40, 2) }
            .draw()
            .unwrap();
    let outcome = chained::gradients(
        &problem,
        build::<f64>("taylor:degree=1").unwrap().as_ref(),
        Request::Adapters,
    );
    assert!(
        matches!(outcome, Err(peft_limits::Error::NonPositiveDenominator { value, .. }) if value <= 0.0)
    );
}

/// Counted operations double with L to within 1%, causal mask included.
#[test]
fn counted_operations_are_linear_in_length() {
    for mask in BOTH_MASKS {
        for request in [Request::Adapters, Request::All] {
            let flops = |tokens: usize| {
                let problem: AttentionProblem<f32> =
                    SyntheticHead { mask, gamma: 0.8, ..SyntheticHead::new(tokens, 4) }
                        .draw()
                        .unwrap();
                let method = build::<f32>("taylor:degree=2").unwrap();
                chained::gradients(&problem, method.as_ref(), request)
                    .unwrap()
                    .gradients
                    .cost
                    .flops() as f64
            };
            let (one, two, four) = (flops(4096), flops(8192), flops(16384));
            for ratio in [two / one, four / two] {
                assert!((ratio / 2.0 - 1.0).abs() < 0.01, "{mask:?} {request:?}: {ratio}");
            }
        }
    }
}

#[test]
fn no_buffer_grows_with_the_square_of_the_length() {
    let problem: AttentionProblem<f32> = SyntheticHead::new(8192, 8).draw().unwrap();
    let streaming =
        peft_limits::attention::exact::streaming::gradients(&problem, Request::All).unwrap();
    let method = build::<f32>("taylor:degree=2").unwrap();
    let chained = chained::gradients(&problem, method.as_ref(), Request::All).unwrap().gradients;
    for cost in [streaming.cost, chained.cost] {
        let square = 8192u64 * 8192;
        assert!(
            cost.largest_buffer > 0 && cost.largest_buffer < square / 100,
            "{}",
            cost.largest_buffer
        );
        assert!(cost.peak_live_elements < square / 10, "{}", cost.peak_live_elements);
    }
}

#[test]
fn the_same_bits_for_every_number_of_threads() {
    for mask in BOTH_MASKS {
        let problem: AttentionProblem<f32> =
            SyntheticHead { mask, ..SyntheticHead::new(1500, 4) }.draw().unwrap();
        let specs = [
            "fitted:degree=2",
            "positive-features:rank=33",
            "tensor-sketch:degree=3,rank=33",
            "nystrom:rank=40",
            "support-basis:degree=1,threshold=0.2",
            "sparse:threshold=0.0007,search=tree",
            "sparse:keys=5,remainder=1",
            "auto:eps=0.05",
        ];
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let chained = specs.map(|spec| {
                    let method = build::<f32>(spec).unwrap();
                    chained::gradients(&problem, method.as_ref(), Request::Adapters)
                        .unwrap()
                        .gradients
                });
                let exact = peft_limits::attention::exact::streaming::gradients(
                    &problem,
                    Request::Adapters,
                )
                .unwrap();
                let bits = |g: &peft_limits::attention::Gradients<f32>| -> Vec<u32> {
                    g.named().iter().flat_map(|(_, a)| a.iter().map(|x| x.to_bits())).collect()
                };
                (chained.each_ref().map(bits), bits(&exact))
            })
        };
        let one = run(1);
        for threads in [2, 5] {
            assert!(run(threads) == one, "{mask:?} with {threads} threads");
        }
    }
}

/// The predicted counts that the experiments extrapolate with are the counted ones.
#[test]
fn predicted_operations_are_the_counted_ones() {
    let (tokens, d, r) = (3000, 5, 2);
    let problem: AttentionProblem<f32> =
        SyntheticHead { rank: r, gamma: 0.8, ..SyntheticHead::new(tokens, d) }.draw().unwrap();
    let mut shared = Cost::default();
    problem.project(&mut shared);
    // Products of L x d with d x r: K A^T, Q A^T, G A^T, and the six final ones.
    let final_products = (9 * tokens * d * r) as f64;
    let method = build::<f32>("taylor:degree=3").unwrap();
    let counted = chained::gradients(&problem, method.as_ref(), Request::Adapters)
        .unwrap()
        .gradients
        .cost
        .multiply_adds as f64;
    let k = peft_limits::attention::factorization::monomials::count(d, 3);
    let predicted = chained::predicted_multiply_adds(tokens, k, d, 2 * r, 2 * r)
        + shared.multiply_adds as f64
        + final_products;
    assert!((counted / predicted - 1.0).abs() < 1e-3, "{counted} against {predicted}");
    let counted = peft_limits::attention::exact::streaming::gradients(&problem, Request::Adapters)
        .unwrap()
        .cost
        .multiply_adds as f64;
    let pairs = (tokens * tokens) as u64;
    let predicted = peft_limits::attention::exact::streaming::predicted_multiply_adds(
        pairs,
        d,
        d,
        2 * r,
        2 * r,
    ) + shared.multiply_adds as f64
        + final_products;
    assert!((counted / predicted - 1.0).abs() < 1e-6, "{counted} against {predicted}");
}

/// Without the search a sparse gradient is linear in L; the exact search adds d_h multiply-adds a
/// visible pair (of blocks of 16 keys), and the tree adds less than that where keys cluster.
#[test]
fn a_sparse_gradient_pays_for_its_pairs_and_its_search() {
    let cost = |tokens: usize, mask: Mask, spec: &str| {
        let head = SyntheticHead { mask, gamma: 6.0, rank: 2, ..SyntheticHead::new(tokens, 2) };
        let problem: AttentionProblem<f32> = head.draw().unwrap();
        let done =
            chained::gradients(&problem, build::<f32>(spec).unwrap().as_ref(), Request::Adapters)
                .unwrap();
        (done.gradients.cost, done.certificate)
    };
    for mask in BOTH_MASKS {
        let flops = |tokens| cost(tokens, mask, "sparse:keys=12,search=oracle").0.flops() as f64;
        let ratio = flops(4096) / flops(2048);
        assert!((ratio / 2.0 - 1.0).abs() < 0.02, "{mask:?}: {ratio}");
        let (oracle, known) = cost(2048, mask, "sparse:keys=12,search=oracle");
        let (exact, _) = cost(2048, mask, "sparse:keys=12");
        let search = known.search.unwrap();
        assert_eq!(exact.multiply_adds - oracle.multiply_adds, search.multiply_adds);
        // Each query's last block is looked at twice.
        let blocks: u64 =
            (1..=2048u64).map(|i| 1 + if mask == Mask::Full { 128 } else { i.div_ceil(16) }).sum();
        assert_eq!(search.multiply_adds, blocks * 16 * 2);
        assert!(
            exact.largest_buffer < 2048 * 2048 / 20 && exact.peak_live_elements < 2048 * 2048 / 10
        );
        // Per pair: 2 d_v, and 4 + 4 + 2 + 2 columns of Z, W, R and N for rank 2 on Q, K, V.
        let pairs = |certificate: &peft_limits::attention::factorization::Certificate| {
            certificate.corrected_pairs
        };
        let (more, certificate) = cost(2048, mask, "sparse:keys=13,search=oracle");
        let per_pair = (2 * 2 + 4 + 4 + 2 + 2) * (pairs(&certificate) - pairs(&known));
        assert_eq!(more.multiply_adds - oracle.multiply_adds, per_pair);
        let growth = |spec: &str| {
            let at = |tokens| cost(tokens, mask, spec).1.search.unwrap().multiply_adds as f64;
            at(8192) / at(4096)
        };
        let (tree, scan) = (growth("sparse:keys=12,search=tree"), growth("sparse:keys=12"));
        assert!(
            scan > 3.9 && tree < 3.0,
            "{mask:?}: the tree's search grows by {tree}, the scan's by {scan}"
        );
    }
}
