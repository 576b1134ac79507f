//! Properties that hold for every head: invariances, linearity, causality, closed forms, agreement
//! of the paths.

use crate::naive::{
    BOTH_MASKS, BOTH_SOFTMAX, Head, LETTERS, Sizes, all_within, find, normal, results, within,
};
use ndarray::{Array2, ArrayView1, Axis, array, s};
use peft_limits::attention::exact::{dense, streaming};
use peft_limits::attention::problem::{AttentionProblem, Source};
use peft_limits::attention::{Gradients, Mask, Objective, Qkv, Request, SoftmaxKind};
use peft_limits::cost::Cost;
use peft_limits::linalg::norms;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CASES: u32 = 48;

/// Failing seeds are kept beside this file, to be committed.
fn config() -> ProptestConfig {
    let kept = FileFailurePersistence::WithSource("regressions");
    ProptestConfig {
        cases: CASES,
        failure_persistence: Some(Box::new(kept)),
        ..ProptestConfig::default()
    }
}

/// Pairwise distinct sizes, in an order that the seed chooses; a causal mask has as many keys as
/// queries.
fn sizes(mask: Mask, seed: u64) -> Sizes {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x51CE5);
    let mut pool: Vec<usize> = (3..=12).collect();
    pool.shuffle(&mut rng);
    let keys = pool[1] + rng.random_range(0..2) * 17;
    Sizes {
        queries: if mask == Mask::Causal { keys } else { pool[0] },
        keys,
        inputs: [pool[2], pool[3], pool[4]],
        head_dim: pool[5],
        value_dim: pool[6],
        rank: 2,
    }
}

/// Sizes of self-attention: one input for Q, K and V.
fn self_attention(mask: Mask, softmax: SoftmaxKind, target: bool, seed: u64) -> Head {
    let mut s = sizes(mask, seed);
    s.queries = s.keys;
    s.inputs = [s.inputs[0]; 3];
    let mut head = Head::draw(s, mask, softmax, target, seed);
    head.x = [head.x[0].clone(), head.x[0].clone(), head.x[0].clone()];
    head
}

fn masks() -> impl Strategy<Value = Mask> {
    prop_oneof![Just(Mask::Full), Just(Mask::Causal)]
}

fn softmaxes() -> impl Strategy<Value = SoftmaxKind> {
    prop_oneof![Just(SoftmaxKind::Standard), Just(SoftmaxKind::One)]
}

fn heads() -> impl Strategy<Value = Head> {
    (masks(), softmaxes(), any::<bool>(), any::<u64>()).prop_map(|(mask, softmax, target, seed)| {
        Head::draw(sizes(mask, seed), mask, softmax, target, seed)
    })
}

/// Small tiles, so that every head has several.
const TILE: streaming::Tile = streaming::Tile { queries: 4, keys: 5 };

/// Both exact paths.
fn both(problem: &AttentionProblem<f64>) -> [Gradients<f64>; 2] {
    [
        dense::gradients(problem, Request::All).unwrap(),
        streaming::gradients_with_tile(problem, Request::All, TILE).unwrap(),
    ]
}

fn ok(outcome: Result<(), String>) -> Result<(), TestCaseError> {
    outcome.map_err(TestCaseError::fail)
}

/// A head whose Q, K and V are given.
fn projected(
    [query, key, value]: [&Array2<f64>; 3],
    upstream: &Array2<f64>,
    mask: Mask,
    softmax: SoftmaxKind,
    beta: f64,
) -> AttentionProblem<f64> {
    let source =
        Source::Projected(Qkv { query: query.clone(), key: key.clone(), value: value.clone() });
    AttentionProblem::new(
        source,
        Objective::UpstreamGradient(upstream.clone()),
        mask,
        softmax,
        beta,
    )
    .unwrap()
}

fn flat(problem: &AttentionProblem<f64>) -> Qkv<Array2<f64>> {
    problem.project(&mut Cost::default()).qkv
}

proptest! {
    #![proptest_config(config())]

    /// Forward and backward against the loops, and each other, for random tiles.
    #[test]
    fn streaming_equals_dense_for_every_tile(head in heads(), queries in 1usize..40, keys in 1usize..40) {
        let problem = head.problem();
        let tolerance = head.tolerance(f64::EPSILON);
        let reference = dense::gradients(&problem, Request::All).unwrap();
        ok(within("O", &reference.output, &head.output(), find(&head.magnitudes(), "O"), tolerance))?;
        let tile = streaming::Tile { queries, keys };
        let streamed = streaming::gradients_with_tile(&problem, Request::All, tile).unwrap();
        ok(all_within(&head, &streamed, &reference, tolerance))?;
        prop_assert_eq!(streamed.loss.is_some(), reference.loss.is_some());
        prop_assert_eq!(results(&streamed).len(), 13);
    }

    /// Asking for the adapters alone gives the same dA and dB, and nothing else.
    #[test]
    fn adapters_alone_equal_those_of_all(head in heads(), subset in 1u32..8) {
        let problem = head.problem();
        let source = match problem.source() {
            Source::Hidden(hidden) => {
                let mut hidden = hidden.clone();
                let Qkv { query, key, value } = &mut hidden.projections;
                for (bit, p) in [query, key, value].into_iter().enumerate() {
                    if subset >> bit & 1 == 0 {
                        // The update of a frozen projection is merged, so that the head stays the
                        // same.
                        if let Some(adapter) = p.adapter.take() {
                            p.weight += &(adapter.lora_b.dot(&adapter.lora_a) * head.scaling);
                        }
                    }
                }
                Source::Hidden(hidden)
            }
            Source::Projected(_) => unreachable!("heads have hidden states"),
        };
        let some =
            AttentionProblem::new(source, head.objective.clone(), head.mask, head.softmax, head.beta).unwrap();
        let reference = dense::gradients(&problem, Request::All).unwrap();
        for got in [
            dense::gradients(&some, Request::Adapters).unwrap(),
            streaming::gradients_with_tile(&some, Request::Adapters, TILE).unwrap(),
        ] {
            ok(all_within(&head, &got, &reference, head.tolerance(f64::EPSILON)))?;
            let names: Vec<String> = got.named().into_iter().map(|(name, _)| name).collect();
            let of = |kind: &'static str| {
                LETTERS.iter().enumerate().filter(move |(p, _)| subset >> p & 1 == 1).map(move |(_, l)| format!("d{kind}{l}"))
            };
            prop_assert_eq!(names, of("A").chain(of("B")).collect::<Vec<_>>());
        }
    }

    #[test]
    fn f32_is_within_its_rounding_of_f64(head in heads()) {
        let reference = dense::gradients(&head.problem(), Request::All).unwrap();
        let single = streaming::gradients_with_tile(&head.problem().cast::<f32>(), Request::All, TILE).unwrap();
        // The inputs are rounded too: as many roundings again as there are factors, all below the
        // sums' terms.
        ok(all_within(&head, &single, &reference, 2.0 * head.tolerance(f64::from(f32::EPSILON))))?;
    }

    /// Rows of the score gradient sum to delta (1 - sum of the row of P): to zero for the standard
    /// softmax.
    #[test]
    fn rows_of_the_score_gradient(head in heads()) {
        let problem = head.problem();
        let qkv = flat(&problem);
        let all = dense::matrices(&problem, &qkv);
        for i in 0..all.dS.nrows() {
            let delta = all.G.row(i).dot(&all.O.row(i));
            let visible = all.P.row(i).sum();
            // G V^T and delta are sums that may cancel: their errors go with the terms' magnitudes.
            let terms = |row: ArrayView1<f64>| all.G.row(i).iter().zip(row).map(|(g, x)| (g * x).abs()).sum::<f64>();
            let scores: f64 = all.P.row(i).iter().zip(qkv.value.rows()).map(|(p, value)| p * terms(value)).sum();
            let magnitude = scores + terms(all.O.row(i));
            let want = delta * (1.0 - visible);
            prop_assert!((all.dS.row(i).sum() - want).abs() <= 50.0 * f64::EPSILON * magnitude);
            match head.softmax {
                SoftmaxKind::Standard => prop_assert!((visible - 1.0).abs() <= 20.0 * f64::EPSILON),
                SoftmaxKind::One => prop_assert!(visible < 1.0),
            }
        }
    }

    /// The same vector added to every key moves each row of scores by a constant: O, dK, dV and dQ
    /// stay.
    #[test]
    fn the_standard_softmax_ignores_a_shift(head in heads(), seed in any::<u64>()) {
        let head = Head { softmax: SoftmaxKind::Standard, ..head };
        let problem = head.problem();
        let Qkv { query, key, value } = flat(&problem);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let shift = normal(&mut rng, 1, key.ncols(), 2.0);
        let moved = &key + &shift;
        let g = head.objective.tensor();
        let before = both(&projected([&query, &key, &value], g, head.mask, head.softmax, head.beta));
        let after = both(&projected([&query, &moved, &value], g, head.mask, head.softmax, head.beta));
        let largest = 1.0 + norms::max_abs(&query.view()) * norms::max_abs(&moved.view()) * key.ncols() as f64;
        for (before, after) in before.iter().zip(&after) {
            let (before, after) = (results(before), results(after));
            for ((name, want), (_, got)) in before.iter().zip(&after) {
                // Sums over tokens of terms of at most about |G| |V| |K + c|, logits rounded at
                // their size.
                let magnitude = norms::max_abs(&g.view()) * (1.0 + norms::max_abs(&value.view())) * largest;
                let allowed = 20.0 * f64::EPSILON * largest * magnitude * (key.nrows() + query.nrows()) as f64;
                let off = norms::max_abs(&(got - want).view());
                prop_assert!(off <= allowed, "{}: {:e} above {:e}", name, off, allowed);
            }
        }
    }

    /// With equal keys the scores do not depend on anything: dQ is zero, each row of P uniform.
    #[test]
    fn equal_keys_leave_no_query_gradient(head in heads()) {
        let problem = head.problem();
        let Qkv { query, key, value } = flat(&problem);
        let key = Array2::from_shape_fn(key.dim(), |(_, c)| key[[0, c]]);
        let g = head.objective.tensor();
        let p = projected([&query, &key, &value], g, head.mask, SoftmaxKind::Standard, head.beta);
        let scale = norms::max_abs(&g.view()) * norms::max_abs(&value.view()) * norms::max_abs(&key.view());
        for gradients in both(&p) {
            let dq = gradients.projected.query.unwrap();
            prop_assert!(norms::max_abs(&dq.view()) <= 1e3 * f64::EPSILON * scale);
            for i in 0..query.nrows() {
                let n = if head.mask == Mask::Causal { i + 1 } else { key.nrows() };
                let mean = value.slice(s![..n, ..]).mean_axis(Axis(0)).unwrap();
                let off = norms::max_abs(&(&gradients.output.row(i) - &mean).view());
                prop_assert!(off <= 100.0 * f64::EPSILON * (1.0 + norms::max_abs(&value.view())));
            }
        }
    }

    /// The gradient is linear in the upstream gradient, entry by entry within rounding.
    #[test]
    fn backward_is_linear_in_the_upstream_gradient(head in heads(), factor in -3.0f64..3.0, seed in any::<u64>()) {
        let (rows, columns) = head.objective.tensor().dim();
        let first = normal(&mut ChaCha8Rng::seed_from_u64(seed), rows, columns, 1.0);
        let second = normal(&mut ChaCha8Rng::seed_from_u64(!seed), rows, columns, 1.0);
        let with = |g: Array2<f64>| Head { objective: Objective::UpstreamGradient(g), ..head.clone() };
        let sum = with(&first + &(&second * factor));
        let magnitudes: Vec<_> = with(first.mapv(f64::abs) + second.mapv(|x| (x * factor).abs())).magnitudes();
        let runs = [sum, with(first), with(second)].map(|h| both(&h.problem()));
        for path in 0..2 {
            let [sum, one, two] = [0, 1, 2].map(|i| results(&runs[i][path]));
            for (name, got) in sum.iter().filter(|(name, _)| name != "O") {
                let want = find(&one, name) + &(find(&two, name) * factor);
                ok(within(name, got, &want, find(&magnitudes, name), 3.0 * head.tolerance(f64::EPSILON)))?;
            }
        }
    }

    /// B = 0: the output of the base model to the bit, dA exactly zero, dB not.
    #[test]
    fn zero_b_changes_nothing_and_gives_zero_da(head in heads()) {
        let zero = Head { b: head.b.clone().map(|b| b * 0.0), ..head.clone() };
        let problem = zero.problem();
        let mut base = problem.hidden().unwrap().clone();
        for p in [&mut base.projections.query, &mut base.projections.key, &mut base.projections.value] {
            p.adapter = None;
        }
        let source = Source::Hidden(Box::new(base));
        let base = AttentionProblem::new(source, head.objective.clone(), head.mask, head.softmax, head.beta).unwrap();
        let adapters = streaming::gradients_with_tile(&problem, Request::Adapters, TILE).unwrap();
        for (adapted, base) in both(&problem).into_iter().zip(both(&base)) {
            prop_assert_eq!(&adapted.output, &base.output);
            prop_assert_eq!(&adapted.weight.query, &base.weight.query);
            for set in [&adapted, &adapters] {
                for (letter, da) in set.lora_a.named() {
                    prop_assert!(da.as_ref().unwrap().iter().all(|x| x.to_bits() << 1 == 0), "dA{}", letter);
                    let db = set.lora_b.letter(letter).as_ref().unwrap();
                    prop_assert!(norms::max_abs(&db.view()) > 0.0, "dB{}", letter);
                }
            }
        }
    }

    /// (alpha/r) moved into B: O, dA and dW stay, dB is divided by it.
    #[test]
    fn the_scaling_multiplies_b(head in heads(), scaling in prop_oneof![0.01f64..8.0, -8.0f64..-0.01]) {
        let scaled = Head { scaling, ..head.clone() };
        let moved = Head { scaling: 1.0, b: head.b.clone().map(|b| b * scaling), ..head };
        let (magnitudes, tolerance) = (scaled.magnitudes(), 2.0 * scaled.tolerance(f64::EPSILON));
        for (scaled, moved) in both(&scaled.problem()).iter().zip(&both(&moved.problem())) {
            let moved = results(moved);
            for (name, got) in results(scaled) {
                let factor = if name.starts_with("dB") { scaling } else { 1.0 };
                ok(within(&name, &got, &(find(&moved, &name) * factor), find(&magnitudes, &name), tolerance))?;
            }
        }
    }

    /// Full mask: tokens in another order give outputs in that order, and the same adapter
    /// gradients.
    #[test]
    fn a_permutation_of_tokens_permutes_the_output(softmax in softmaxes(), target in any::<bool>(), seed in any::<u64>()) {
        let head = self_attention(Mask::Full, softmax, target, seed);
        let mut order: Vec<usize> = (0..head.x[0].nrows()).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let permute = |a: &Array2<f64>| a.select(Axis(0), &order);
        let objective = match &head.objective {
            Objective::Target(y) => Objective::Target(permute(y)),
            Objective::UpstreamGradient(g) => Objective::UpstreamGradient(permute(g)),
        };
        let other = Head { x: head.x.clone().map(|x| permute(&x)), objective, ..head.clone() };
        let (magnitudes, tolerance) = (head.magnitudes(), head.tolerance(f64::EPSILON));
        for (got, want) in both(&other.problem()).iter().zip(&both(&head.problem())) {
            let want = results(want);
            for (name, got) in results(got) {
                let by_token = name.len() == 2 || name == "O"; // O, dQ, dK, dV
                let want = if by_token { permute(find(&want, &name)) } else { find(&want, &name).clone() };
                let magnitude = find(&magnitudes, &name);
                ok(within(&name, &got, &want, magnitude, tolerance))?;
            }
        }
    }

    /// Causal: what happens after token t changes neither outputs nor gradients of losses up to t,
    /// not by a bit.
    #[test]
    fn earlier_rows_do_not_see_later_tokens(softmax in softmaxes(), seed in any::<u64>(), at in 0.0f64..1.0) {
        let head = self_attention(Mask::Causal, softmax, false, seed);
        let tokens = head.x[0].nrows();
        let t = (at * (tokens - 1) as f64) as usize; // at least one later token
        // A loss on tokens up to t only.
        let g = Array2::from_shape_fn(head.objective.tensor().dim(), |(i, c)| {
            if i <= t { head.objective.tensor()[[i, c]] } else { 0.0 }
        });
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 1);
        let later = normal(&mut rng, tokens, head.x[0].ncols(), 3.0);
        let x = Array2::from_shape_fn(later.dim(), |(i, c)| if i <= t { head.x[0][[i, c]] } else { later[[i, c]] });
        let head = Head { objective: Objective::UpstreamGradient(g), ..head };
        let other = Head { x: [x.clone(), x.clone(), x], ..head.clone() };
        for (one, two) in both(&head.problem()).iter().zip(&both(&other.problem())) {
            let seen = s![..=t, ..];
            prop_assert_eq!(one.output.slice(seen), two.output.slice(seen));
            for ((letter, a), (_, b)) in one.projected.named().into_iter().zip(two.projected.named()) {
                let (a, b) = (a.as_ref().unwrap(), b.as_ref().unwrap());
                prop_assert_eq!(a.slice(seen), b.slice(seen), "d{}", letter);
                // Exactly zero in later tokens.
                prop_assert!(a.slice(s![t + 1.., ..]).iter().all(|x| x.to_bits() << 1 == 0), "d{}", letter);
            }
        }
        prop_assert!(one_changes(&head, &other, t), "the later tokens matter to later outputs");
    }

    /// Logits of about +-1e3: finite, and the paths agree within the rounding of such logits.
    #[test]
    fn huge_logits(head in heads(), size in 300.0f64..3e3) {
        let beta = head.beta * size / head.largest_logit();
        let head = Head { beta, ..head };
        let reference = dense::gradients(&head.problem(), Request::All).unwrap();
        for (name, a) in results(&reference) {
            prop_assert!(a.iter().all(|x| x.is_finite()), "{}", name);
        }
        // Agreement, scaled by a head in which no probability is negligible: errors of P are
        // absolute here.
        let flat = Head { beta: head.beta * 1e-6, ..head.clone() };
        let mut magnitudes = head.magnitudes();
        for ((name, m), (_, f)) in magnitudes.iter_mut().zip(flat.magnitudes()) {
            let factor = if "QK".contains(&name[name.len() - 1..]) { 1e6 } else { 1.0 };
            *m += &(f * factor);
        }
        let streamed = streaming::gradients_with_tile(&head.problem(), Request::All, TILE).unwrap();
        let reference = results(&reference);
        for (name, got) in results(&streamed) {
            let tolerance = head.tolerance(f64::EPSILON);
            ok(within(&name, &got, find(&reference, &name), find(&magnitudes, &name), tolerance))?;
        }
        let single = streaming::gradients_with_tile(&head.problem().cast::<f32>(), Request::All, TILE).unwrap();
        for (name, a) in results(&single) {
            prop_assert!(a.iter().all(|x| x.is_finite()), "{} in f32", name);
        }
    }

    /// One token: P = 1 (or the sigmoid of the score), so O = p V and the gradients are one line
    /// each.
    #[test]
    fn a_single_token(mask in masks(), softmax in softmaxes(), seed in any::<u64>()) {
        let mut s = sizes(mask, seed);
        (s.queries, s.keys) = (1, 1);
        let head = Head::draw(s, mask, softmax, false, seed);
        let problem = head.problem();
        let Qkv { query: q, key: k, value: v } = flat(&problem);
        let g = head.objective.tensor();
        let score = head.beta * q.row(0).dot(&k.row(0));
        let p = if softmax == SoftmaxKind::One { 1.0 / (1.0 + (-score).exp()) } else { 1.0 };
        let ds = p * (1.0 - p) * g.row(0).dot(&v.row(0));
        let magnitudes = head.magnitudes();
        for gradients in both(&problem) {
            let d = results(&gradients);
            for (name, want) in
                [("O", &v * p), ("dQ", &k * (head.beta * ds)), ("dK", &q * (head.beta * ds)), ("dV", g * p)]
            {
                ok(within(name, find(&d, name), &want, find(&magnitudes, name), head.tolerance(f64::EPSILON)))?;
            }
        }
    }
}

/// Whether some output after token t differs.
fn one_changes(head: &Head, other: &Head, t: usize) -> bool {
    let later = s![t + 1.., ..];
    head.output().slice(later) != other.output().slice(later)
}

/// Uniform attention: with Q = 0, P = 1/n (1/(n+1) for `One`), dK = 0 and dQ = beta cov(K, V) G up
/// to its mean.
#[test]
fn uniform_attention() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (k, v, g) =
        (normal(&mut rng, 6, 4, 1.0), normal(&mut rng, 6, 3, 1.0), normal(&mut rng, 6, 3, 1.0));
    let q = Array2::zeros((6, 4));
    for mask in BOTH_MASKS {
        for softmax in BOTH_SOFTMAX {
            for gradients in both(&projected([&q, &k, &v], &g, mask, softmax, 0.7)) {
                let dk = gradients.projected.key.as_ref().unwrap();
                assert!(
                    dk.iter().all(|x| x.to_bits() << 1 == 0),
                    "dK = beta dS^T Q is exactly zero"
                );
                for i in 0..6 {
                    let n = if mask == Mask::Causal { i + 1 } else { 6 };
                    let total = n as f64 + if softmax == SoftmaxKind::One { 1.0 } else { 0.0 };
                    for c in 0..3 {
                        let want: f64 = (0..n).map(|j| v[[j, c]]).sum::<f64>() / total;
                        assert!((gradients.output[[i, c]] - want).abs() < 1e-15 * 20.0);
                    }
                    let out: Vec<f64> =
                        (0..3).map(|c| (0..n).map(|j| v[[j, c]]).sum::<f64>() / total).collect();
                    for e in 0..4 {
                        let want: f64 = (0..n)
                            .map(|j| {
                                let inner: f64 =
                                    (0..3).map(|c| g[[i, c]] * (v[[j, c]] - out[c])).sum();
                                0.7 * inner * k[[j, e]] / total
                            })
                            .sum();
                        assert!(
                            (gradients.projected.query.as_ref().unwrap()[[i, e]] - want).abs()
                                < 1e-15 * 40.0
                        );
                    }
                }
                for j in 0..6 {
                    for c in 0..3 {
                        let rows = if mask == Mask::Causal { j..6 } else { 0..6 };
                        let extra = if softmax == SoftmaxKind::One { 1.0 } else { 0.0 };
                        let want: f64 = rows
                            .map(|i| {
                                g[[i, c]]
                                    / (if mask == Mask::Causal { (i + 1) as f64 } else { 6.0 }
                                        + extra)
                            })
                            .sum();
                        assert!(
                            (gradients.projected.value.as_ref().unwrap()[[j, c]] - want).abs()
                                < 1e-15 * 20.0
                        );
                    }
                }
            }
        }
    }
}

/// One-hot attention: orthogonal keys a thousand long; each query takes its key's value and nothing
/// else.
#[test]
fn one_hot_attention() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (v, g) = (normal(&mut rng, 5, 3, 1.0), normal(&mut rng, 5, 3, 1.0));
    let k = Array2::<f64>::eye(5) * 1e3;
    // Query i points at key pi(i); exp(-1000) is 0.
    for (mask, pi) in [(Mask::Full, [3, 0, 4, 1, 2]), (Mask::Causal, [0, 0, 1, 3, 2])] {
        let q = Array2::from_shape_fn((5, 5), |(i, j)| if pi[i] == j { 1.0 } else { 0.0 });
        for softmax in BOTH_SOFTMAX {
            for gradients in both(&projected([&q, &k, &v], &g, mask, softmax, 1.0)) {
                assert_eq!(gradients.output, v.select(Axis(0), &pi));
                let mut dv = Array2::<f64>::zeros((5, 3));
                for (i, &j) in pi.iter().enumerate() {
                    dv.row_mut(j).zip_mut_with(&g.row(i), |d, g| *d += g);
                }
                let gap = norms::max_abs(&(gradients.projected.value.unwrap() - dv).view());
                assert!(gap < 1e-15, "{mask:?} {softmax:?}: {gap:e}");
                // dS = P o (g.v - delta) with delta = g.v: roundoff of a dot product of 3, times
                // |K| = 1e3.
                let dq = norms::max_abs(&gradients.projected.query.unwrap().view());
                assert!(dq <= 1e3 * 16.0 * f64::EPSILON, "{dq:e}");
            }
        }
    }
}

/// Rank-1 attention: S_ij = ln w_j for every i, so each row of P is w / sum w (softmax of
/// log-integers).
#[test]
fn rank_one_attention() {
    let w = [1.0, 2.0, 5.0, 8.0f64];
    let q = Array2::ones((3, 1));
    let k = Array2::from_shape_fn((4, 1), |(j, _)| w[j].ln());
    let v = array![[3.0, 1.0], [-1.0, 4.0], [2.0, 0.5], [-2.0, 6.0]];
    let g = array![[1.0, 2.0], [-1.0, 0.5], [4.0, -3.0]];
    for (softmax, total) in [(SoftmaxKind::Standard, 16.0), (SoftmaxKind::One, 17.0)] {
        for gradients in both(&projected([&q, &k, &v], &g, Mask::Full, softmax, 1.0)) {
            let mean = [0, 1].map(|c| (0..4).map(|j| w[j] * v[[j, c]]).sum::<f64>() / total);
            let ds = |i: usize, j: usize| {
                w[j] / total * (0..2).map(|c| g[[i, c]] * (v[[j, c]] - mean[c])).sum::<f64>()
            };
            let projected = gradients.projected;
            let (dq, dk, dv) =
                (projected.query.unwrap(), projected.key.unwrap(), projected.value.unwrap());
            for i in 0..3 {
                for c in 0..2 {
                    assert!((gradients.output[[i, c]] - mean[c]).abs() < 1e-14);
                }
                assert!(
                    (dq[[i, 0]] - (0..4).map(|j| ds(i, j) * w[j].ln()).sum::<f64>()).abs() < 1e-13
                );
            }
            for j in 0..4 {
                assert!((dk[[j, 0]] - (0..3).map(|i| ds(i, j)).sum::<f64>()).abs() < 1e-13);
                for c in 0..2 {
                    assert!((dv[[j, c]] - w[j] / total * g.column(c).sum()).abs() < 1e-14);
                }
            }
        }
    }
}

/// All logits at -1e3: `One` attends to nothing, `Standard` uniformly; at +1e3 they agree.
#[test]
fn the_extra_score_of_one_at_both_ends() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (v, g) = (normal(&mut rng, 4, 3, 1.0), normal(&mut rng, 5, 3, 1.0));
    let (q, k) = (Array2::ones((5, 2)), Array2::from_elem((4, 2), 500.0));
    let run =
        |sign: f64, softmax| both(&projected([&(&q * sign), &k, &v], &g, Mask::Full, softmax, 1.0));
    for gradients in run(-1.0, SoftmaxKind::One) {
        for (name, a) in results(&gradients) {
            assert!(a.iter().all(|x| x.to_bits() << 1 == 0), "{name} is exactly zero");
        }
    }
    for sign in [-1.0, 1.0] {
        for gradients in run(sign, SoftmaxKind::Standard) {
            let mean = v.mean_axis(Axis(0)).unwrap();
            assert!(
                gradients
                    .output
                    .rows()
                    .into_iter()
                    .all(|o| norms::max_abs(&(&o - &mean).view()) < 1e-15)
            );
        }
    }
    for (one, standard) in run(1.0, SoftmaxKind::One).iter().zip(&run(1.0, SoftmaxKind::Standard)) {
        assert_eq!(results(one), results(standard));
    }
}
