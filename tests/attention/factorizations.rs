//! Every practical factorization against closed forms: unbiasedness, variance, exactness in the
//! limit, bounds.

use ndarray::{Array1, Array2, Axis};
use peft_limits::attention::factorization::polynomial::taylor;
use peft_limits::attention::factorization::tensor_sketch::CountSketch;
use peft_limits::attention::factorization::{FeatureMap, Scores, approximation, build};
use peft_limits::attention::problem::{Objective, SoftmaxKind, Source};
use peft_limits::attention::synthetic::{Entries, SyntheticHead};
use peft_limits::attention::{AttentionProblem, Mask, Qkv, Request, chained, exact::dense};
use peft_limits::cost::Cost;
use peft_limits::streams::seed_stream;
use peft_limits::{Error, Result};

fn head(tokens: usize, head_dim: usize, gamma: f64, seed: u64) -> AttentionProblem<f64> {
    SyntheticHead {
        rank: 2,
        gamma,
        seed,
        entries: Entries::Normal,
        ..SyntheticHead::new(tokens, head_dim)
    }
    .draw()
    .unwrap()
}

fn scores<'a>(problem: &AttentionProblem<f64>, qkv: &'a Qkv<Array2<f64>>) -> Scores<'a, f64> {
    Scores { query: qkv.query.view(), key: qkv.key.view(), beta: problem.beta(), mask: Mask::Full }
}

fn prepare(spec: &str, s: &Scores<f64>) -> Result<Box<dyn FeatureMap<f64>>> {
    build::<f64>(spec)?.prepare(s, &mut Cost::default())
}

/// The approximation of exp(S) itself, shift put back.
fn of_exp(spec: &str, s: &Scores<f64>) -> Array2<f64> {
    let map = prepare(spec, s).unwrap();
    let mut e = approximation(map.as_ref(), s);
    if let Some(shift) = map.row_shift() {
        e *= &Array1::from_iter(shift.iter().map(|x| x.exp())).insert_axis(Axis(1));
    }
    e
}

/// Mean and sample variance of every entry over seeds.
fn moments(
    spec: impl Fn(u64) -> String,
    seeds: u64,
    s: &Scores<f64>,
) -> (Array2<f64>, Array2<f64>) {
    let (mut sum, mut squares) = (
        Array2::zeros((s.query.nrows(), s.key.nrows())),
        Array2::zeros((s.query.nrows(), s.key.nrows())),
    );
    for seed in 0..seeds {
        let e = of_exp(&spec(seed), s);
        squares += &(&e * &e);
        sum += &e;
    }
    let mean = sum / seeds as f64;
    let variance = (squares / seeds as f64 - &mean * &mean) * (seeds as f64 / (seeds - 1) as f64);
    (mean, variance)
}

#[test]
fn positive_features_are_unbiased_with_the_variance_of_the_closed_form() {
    let problem = head(5, 3, 1.2, 4);
    let qkv = problem.project(&mut Cost::default()).qkv;
    let s = scores(&problem, &qkv);
    let exact = (qkv.query.dot(&qkv.key.t()) * problem.beta()).mapv(f64::exp);
    let seeds = 4000;
    let mut variances = Vec::new();
    for directions in ["iid", "orthogonal"] {
        for center in ["none", "keys", "both"] {
            let spec = |seed| {
                format!(
                    "positive-features:rank=6,seed={seed},directions={directions},center={center}"
                )
            };
            let (mean, variance) = moments(spec, seeds, &s);
            for ((m, v), e) in mean.iter().zip(&variance).zip(&exact) {
                let z = (m - e) / (v / seeds as f64).sqrt();
                // 15 entries in 6 settings: beyond 4.5 deviations once in 1600 test runs, heavy
                // tails allowed for.
                assert!(z.abs() < 4.5, "{directions} {center}: mean {m} against {e}, z {z}");
            }
            if center == "none" {
                variances.push(variance);
            }
        }
    }
    // Balanced x = sqrt(beta) t q, y = sqrt(beta) k / t.
    let square = |a: &Array2<f64>| a.iter().map(|x| x * x).sum::<f64>();
    let t2 = (square(&qkv.key) / square(&qkv.query)).sqrt();
    for ((i, j), &v) in variances[0].indexed_iter() {
        let (q, k) = (qkv.query.row(i), qkv.key.row(j));
        let (xx, yy, xy) = (
            problem.beta() * t2 * q.dot(&q),
            problem.beta() / t2 * k.dot(&k),
            problem.beta() * q.dot(&k),
        );
        let want = ((xx + yy + 4.0 * xy).exp() - (2.0 * xy).exp()) / 6.0;
        assert!((v / want - 1.0).abs() < 0.5, "({i}, {j}): variance {v} against {want}");
    }
    assert!(variances[1].sum() < 0.9 * variances[0].sum(), "orthogonal directions vary less");
}

#[test]
fn tensor_sketches_are_unbiased_for_the_taylor_polynomial() {
    let problem = head(5, 3, 1.5, 7);
    let qkv = problem.project(&mut Cost::default()).qkv;
    let s = scores(&problem, &qkv);
    let logits = qkv.query.dot(&qkv.key.t()) * problem.beta();
    let seeds = 3000;
    for (degree, rank) in [(2, 9), (3, 14), (4, 13)] {
        let exact = logits.mapv(|x| taylor(degree).evaluate(x));
        let spec =
            |seed| format!("tensor-sketch:degree={degree},rank={rank},seed={seed},center=none");
        let (mean, variance) = moments(spec, seeds, &s);
        for ((m, v), e) in mean.iter().zip(&variance).zip(&exact) {
            assert!(
                (m - e).abs() < 4.5 * (v / seeds as f64).sqrt(),
                "degree {degree}: {m} against {e}"
            );
        }
        // Wider sketches vary less, in proportion.
        let wide = |seed| {
            format!(
                "tensor-sketch:degree={degree},rank={},seed={seed},center=none",
                4 + 16 * (rank - 4)
            )
        };
        let (_, narrow_by_16) = moments(wide, 400, &s);
        let ratio = variance.sum() / narrow_by_16.sum();
        assert!((8.0..32.0).contains(&ratio), "degree {degree}: variance ratio {ratio}");
    }
}

#[test]
fn nonnegative_sketches_have_no_negative_entry_and_square_the_sketch_of_half_the_scores() {
    let problem = head(40, 3, 6.0, 2);
    let qkv = problem.project(&mut Cost::default()).qkv;
    let s = scores(&problem, &qkv);
    // 12 columns inside, 78 products of two.
    let square = of_exp("tensor-sketch:degree=6,rank=78,seed=5,nonnegative=true,center=none", &s);
    let half = of_exp(
        "tensor-sketch:degree=3,rank=12,seed=5,center=none",
        &Scores { beta: 0.5 * s.beta, ..s },
    );
    assert!(half.iter().any(|x| *x < 0.0), "the plain sketch does have negative entries here");
    for (x, y) in square.iter().zip(&half) {
        assert!(*x >= -1e-12 && (x - y * y).abs() < 1e-10 * (1.0 + x), "{x} against {}", y * y);
    }
}

/// The product with the transform's matrix is the Fourier transform of the count sketch, for odd
/// and even lengths.
#[test]
fn transforms_of_count_sketches_are_values_at_the_roots_of_unity() {
    for length in [1usize, 2, 7, 12, 33] {
        let sketch = CountSketch::draw(5, length, &mut seed_stream(1, "test"));
        let x = [0.3, -1.2, 2.0, 0.7, -0.4];
        let mut counts = vec![0.0; length];
        for (l, value) in x.iter().enumerate() {
            counts[sketch.buckets[l]] += sketch.signs[l] * value;
        }
        // The sketch as a polynomial, at the roots of unity, by Horner's rule.
        let at_root = |f: usize| {
            let (im, re) = (-std::f64::consts::TAU * f as f64 / length as f64).sin_cos();
            counts.iter().rev().fold((0.0, 0.0), |(a, b), c| (a * re - b * im + c, a * im + b * re))
        };
        let got = sketch.transform().dot(&Array1::from(x.to_vec()));
        let real = if length % 2 == 0 { 2 } else { 1 };
        let mut want = vec![at_root(0).0];
        if real == 2 {
            want.push(at_root(length / 2).0);
        }
        want.extend((1..=(length - real) / 2).flat_map(|f| <[f64; 2]>::from(at_root(f))));
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(&want) {
            assert!((g - w).abs() < 1e-13, "length {length}: {g} against {w}");
        }
    }
}

#[test]
fn nystrom_is_exact_on_all_distinct_keys_and_within_its_bound_before() {
    for (gamma, center) in [(1.0, "both"), (3.0, "none"), (3.0, "keys")] {
        let problem = head(60, 5, gamma, 3);
        let mut qkv = problem.project(&mut Cost::default()).qkv;
        // Every key three times: 20 distinct ones.
        for j in 20..60 {
            let row = qkv.key.row(j % 20).to_owned();
            qkv.key.row_mut(j).assign(&row);
        }
        let s = scores(&problem, &qkv);
        let exact = (qkv.query.dot(&qkv.key.t()) * problem.beta()).mapv(f64::exp);
        for rank in [1, 5, 12, 20, 35] {
            for options in ["", ",temperature=0.4", ",temperature=2"] {
                let spec = format!("nystrom:rank={rank},seed=2,center={center}{options}");
                let map = prepare(&spec, &s).unwrap();
                let shift: Array1<f64> =
                    map.row_shift().unwrap().iter().map(|x| (-x).exp()).collect();
                let want = &exact * &shift.insert_axis(Axis(1));
                let error = (approximation(map.as_ref(), &s) - &want)
                    .iter()
                    .fold(0.0f64, |m, x| m.max(x.abs()));
                let bound = map.certificate().exp_error_bound.unwrap();
                assert!(error <= bound + 1e-10, "{spec}: {error:e} above {bound:e}");
                if rank >= 20 {
                    assert_eq!(map.rank(), 20, "{spec}: duplicates are not chosen");
                    assert!(error < 1e-8, "{spec}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn the_support_basis_is_within_its_bound_and_exact_when_it_keeps_every_pair() {
    let problem = head(70, 4, 3.0, 9);
    let qkv = problem.project(&mut Cost::default()).qkv;
    let s = scores(&problem, &qkv);
    let exact = (qkv.query.dot(&qkv.key.t()) * problem.beta()).mapv(f64::exp);
    for center in ["none", "keys", "both"] {
        let mut pairs = Vec::new();
        for threshold in [3.0, 1.0, 0.3, 1e-9] {
            for degree in [1, 3] {
                let spec =
                    format!("support-basis:degree={degree},threshold={threshold},center={center}");
                let map = prepare(&spec, &s).unwrap();
                let shift: Array1<f64> = map
                    .row_shift()
                    .map_or_else(|| Array1::ones(70), |r| r.iter().map(|x| (-x).exp()).collect());
                let want = &exact * &shift.insert_axis(Axis(1));
                let error = (approximation(map.as_ref(), &s) - &want)
                    .iter()
                    .fold(0.0f64, |m, x| m.max(x.abs()));
                let bound = map.certificate().exp_error_bound.unwrap();
                assert!(error <= bound + 1e-11, "{spec}: {error:e} above {bound:e}");
                pairs.push(map.certificate().corrected_pairs);
            }
        }
        assert!(pairs.windows(2).all(|w| w[0] <= w[1]) && pairs[0] < pairs[7]);
        assert!(pairs[7] > 4800, "all but the tiniest of 4900 pairs: {}", pairs[7]);
    }
}

/// The kept entries of a row by their definition, on sorted logits: the most that satisfy e_m >=
/// share (e_1 + ... + e_m), m <= most.
fn largest_by_sorting(row: &[f64], share: f64, most: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for &j in order.iter().take(most) {
        let e = (row[j] - row[order[0]]).exp();
        sum += e;
        if !kept.is_empty() && e < share * sum {
            break;
        }
        kept.push(j);
    }
    kept.sort_unstable();
    kept
}

#[test]
fn every_search_keeps_the_largest_entries_and_dropped_ones_are_within_the_bound() {
    for (tokens, head_dim, gamma) in
        [(300, 2, 5.0), (523, 8, 4.0), (130, 24, 3.0), (17, 3, 2.0), (1, 3, 2.0)]
    {
        for mask in [Mask::Full, Mask::Causal] {
            let mut problem = head(tokens, head_dim, gamma, 6);
            let mut qkv = problem.project(&mut Cost::default()).qkv;
            // Queries in a cone, as trained ones are, and a direction that they hardly use.
            qkv.query.column_mut(0).mapv_inplace(|x| x + 2.0);
            qkv.query.column_mut(1).mapv_inplace(|x| 1e-4 * x);
            problem = AttentionProblem::new(
                Source::Projected(qkv.clone()),
                Objective::UpstreamGradient(qkv.value.clone()),
                mask,
                SoftmaxKind::Standard,
                problem.beta(),
            )
            .unwrap();
            let s = Scores { mask, ..scores(&problem, &qkv) };
            let logits = qkv.query.dot(&qkv.key.t()) * problem.beta();
            for (options, share, most) in [
                ("threshold=0.002", 0.002, usize::MAX),
                ("threshold=0.2", 0.2, usize::MAX),
                ("keys=1", 0.0, 1),
                ("keys=30", 0.0, 30),
                ("threshold=0.01,keys=12", 0.01, 12),
            ] {
                for search in ["exact", "tree", "oracle"] {
                    let spec = format!("sparse:{options},search={search}");
                    let map = prepare(&spec, &s).unwrap();
                    let (kept, shift) = (map.sparse().unwrap(), map.row_shift().unwrap());
                    let bound = map.certificate().exp_error_bound.unwrap();
                    for i in 0..tokens {
                        let end = if mask == Mask::Causal { i + 1 } else { tokens };
                        let row: Vec<f64> = logits.row(i).iter().take(end).copied().collect();
                        let found: Vec<usize> = kept.row(i).map(|(j, _)| j).collect();
                        assert_eq!(
                            found,
                            largest_by_sorting(&row, share, most),
                            "{spec} {mask:?} L {tokens} row {i}"
                        );
                        assert!((kept.row(i).map(|(_, p)| p).sum::<f64>() - 1.0).abs() < 1e-12);
                        for (j, logit) in row.iter().enumerate() {
                            let exact = (logit - shift[i]).exp();
                            let got = kept.row(i).find(|(k, _)| *k == j).map_or(0.0, |(_, p)| p);
                            assert!(
                                (exact - got).abs() <= bound + 1e-12,
                                "{spec}: {exact:e} {got:e} {bound:e}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// One key far ahead of the others for each query: the row is that key, O its value, and dS
/// vanishes.
#[test]
fn a_row_with_one_key_copies_its_value() {
    let n = 40;
    let key =
        Array2::from_shape_fn((n, 2), |(j, c)| [(j as f64 * 0.7).cos(), (j as f64 * 0.7).sin()][c]);
    let qkv = Qkv {
        query: &key * 90.0,
        key: key.clone(),
        value: Array2::from_shape_fn((n, 3), |(j, c)| (j * 3 + c) as f64),
    };
    let upstream = Array2::from_shape_fn((n, 3), |(i, c)| (i as f64 + c as f64).sin());
    let problem = AttentionProblem::new(
        Source::Projected(qkv.clone()),
        Objective::UpstreamGradient(upstream.clone()),
        Mask::Full,
        SoftmaxKind::Standard,
        1.0,
    )
    .unwrap();
    let method = build::<f64>("sparse:keys=1,search=tree").unwrap();
    let g = chained::gradients(&problem, method.as_ref(), Request::All).unwrap().gradients;
    assert_eq!(g.output, qkv.value);
    assert!(
        g.projected
            .query
            .unwrap()
            .iter()
            .chain(g.projected.key.unwrap().iter())
            .all(|x| x.abs() < 1e-12)
    );
    assert_eq!(g.projected.value.unwrap(), upstream);
}

#[test]
fn every_method_converges_to_the_exact_gradient() {
    let problem = head(200, 3, 1.0, 5);
    let exact = dense::gradients(&problem, Request::Adapters).unwrap();
    for (coarse, fine, tolerance) in [
        ("positive-features:rank=16", "positive-features:rank=16384", 0.05),
        ("tensor-sketch:degree=8,rank=40", "tensor-sketch:degree=8,rank=20000", 0.02),
        (
            "tensor-sketch:degree=8,rank=120,nonnegative=true",
            "tensor-sketch:degree=12,rank=80000,nonnegative=true",
            0.05,
        ),
        ("nystrom:rank=4", "nystrom:rank=60", 1e-5),
        ("support-basis:degree=1,threshold=1", "support-basis:degree=9,threshold=0.5", 1e-8),
        ("sparse:keys=150", "sparse:keys=200", 1e-12),
        ("sparse:threshold=0.005", "sparse:threshold=0.00001", 1e-12),
    ] {
        let error = |spec: &str| {
            let method = build::<f64>(spec).unwrap();
            chained::gradients(&problem, method.as_ref(), Request::Adapters)
                .map_or(f64::INFINITY, |g| g.gradients.relative_gap(&exact))
        };
        let (first, last) = (error(coarse), error(fine));
        assert!(
            last < tolerance && last < 0.3 * first,
            "{fine}: {last:e} after {coarse}: {first:e}"
        );
    }
}

#[test]
fn single_precision_follows_double_precision() {
    let head = SyntheticHead { rank: 2, gamma: 1.5, seed: 6, ..SyntheticHead::new(300, 4) };
    let (double, single): (AttentionProblem<f64>, AttentionProblem<f32>) =
        (head.draw().unwrap(), head.draw().unwrap());
    for (spec, tolerance) in [
        ("positive-features:rank=64", 1e-4),
        ("tensor-sketch:degree=3,rank=64", 1e-4),
        ("tensor-sketch:degree=4,rank=300,nonnegative=true", 1e-4),
        ("nystrom:rank=20,tolerance=0.000001", 1e-3),
        ("support-basis:degree=2,threshold=0.5", 1e-4),
        ("sparse:keys=20", 1e-4),
        ("sparse:threshold=0.0035,search=tree,remainder=1", 1e-4),
    ] {
        let reference = chained::gradients(&double, build(spec).unwrap().as_ref(), Request::All)
            .unwrap()
            .gradients;
        let ours = chained::gradients(&single, build(spec).unwrap().as_ref(), Request::All)
            .unwrap()
            .gradients;
        let gap = ours.relative_gap(&reference);
        assert!(gap < tolerance, "{spec}: {gap:e}");
    }
}

/// Norms far above the threshold: exponents of hundreds must neither overflow nor divide by zero.
#[test]
fn huge_logits_give_finite_gradients_or_a_typed_error() {
    let problem = head(120, 4, 40.0, 1);
    for spec in [
        "positive-features:rank=64",
        "nystrom:rank=120",
        "support-basis:degree=1,threshold=1",
        "sparse:threshold=0.01",
        "sparse:keys=3,search=tree",
    ] {
        match chained::gradients(&problem, build(spec).unwrap().as_ref(), Request::Adapters) {
            Ok(g) => assert!(
                g.gradients.named().iter().all(|(_, a)| a.iter().all(|x| x.is_finite())),
                "{spec}"
            ),
            Err(Error::NonPositiveDenominator { .. } | Error::InvalidParam { .. }) => {}
            Err(other) => panic!("{spec}: {other}"),
        }
    }
}

#[test]
fn parameters_that_do_not_fit_the_head_are_refused() {
    let problem = head(30, 4, 1.0, 1);
    let qkv = problem.project(&mut Cost::default()).qkv;
    let s = scores(&problem, &qkv);
    for (spec, why) in [
        ("nystrom:rank=31", "number of keys"),
        ("nystrom:rank=3,tolerance=1", "below 1"),
        ("tensor-sketch:degree=3,rank=6", "at least 7"),
        ("tensor-sketch:degree=3,rank=60,nonnegative=true", "even"),
        ("tensor-sketch:degree=1,rank=60", "at least 2"),
        ("positive-features:rank=1000000", "between 1 and"),
        ("support-basis:degree=2,threshold=1000", "must not overflow"),
    ] {
        let text =
            prepare(spec, &s).err().unwrap_or_else(|| panic!("{spec} was accepted")).to_string();
        assert!(text.contains(why), "{spec}: {text}");
    }
}

#[test]
fn auto_meets_its_target_and_reports_prediction_and_measurement() {
    for (gamma, eps, mask) in [
        (0.6, 0.01, Mask::Full),
        (1.2, 0.05, Mask::Full),
        (2.0, 0.02, Mask::Full),
        (1.2, 0.05, Mask::Causal),
    ] {
        let head = SyntheticHead { mask, rank: 2, gamma, seed: 8, ..SyntheticHead::new(900, 4) };
        let problem: AttentionProblem<f64> = head.draw().unwrap();
        let method = build::<f64>(&format!("auto:eps={eps}")).unwrap();
        let chained = chained::gradients(&problem, method.as_ref(), Request::Adapters).unwrap();
        let selection = chained.certificate.selection.unwrap();
        assert!(selection.measured_error <= eps && selection.chosen.predicted_error <= eps);
        let cheapest = &selection.candidates[0];
        assert!(
            selection
                .candidates
                .iter()
                .all(|c| c.predicted_multiply_adds >= cheapest.predicted_multiply_adds)
        );
        // Prediction within a factor of five of measurement, and the cost within two of the counted
        // one.
        let ratio = selection.measured_error / selection.chosen.predicted_error;
        assert!((0.05..5.0).contains(&ratio), "gamma {gamma}: {selection:?}");
        let exact = dense::gradients(&problem, Request::Adapters).unwrap();
        let error = chained.gradients.relative_gap(&exact);
        assert!(
            error < 5.0 * eps,
            "gamma {gamma} {mask:?}: gradient error {error:e} at eps {eps} by {}",
            selection.chosen.spec
        );
    }
}

/// On trained heads the choice must cost less than the exact gradient, counted; a target that only
/// costlier methods reach is refused.
#[test]
fn auto_weighs_the_exact_gradient_on_trained_heads() {
    for name in ["minilm_l0_h7", "minilm_l3_h10"] {
        let path = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join(format!("tests/data/heads/{name}.safetensors"));
        let problem: AttentionProblem<f64> =
            peft_limits::attention::file::read_problem(&path).unwrap();
        let exact =
            peft_limits::attention::exact::streaming::gradients(&problem, Request::Adapters)
                .unwrap()
                .cost;
        for eps in [0.1, 0.01] {
            let method = build::<f64>(&format!("auto:eps={eps}")).unwrap();
            let chained = chained::gradients(&problem, method.as_ref(), Request::Adapters).unwrap();
            let selection = chained.certificate.selection.unwrap();
            let chosen = build::<f64>(&selection.chosen.spec).unwrap();
            let cost = chained::gradients(&problem, chosen.as_ref(), Request::Adapters)
                .unwrap()
                .gradients
                .cost;
            let ratio = cost.flops() as f64 / exact.flops() as f64;
            assert!(
                ratio < 1.0,
                "{name} at {eps}: {} costs {ratio} times the exact gradient",
                selection.chosen.spec
            );
            assert!(selection.chosen.predicted_multiply_adds < selection.exact_multiply_adds);
        }
        // Every entry is needed for ten digits.
        let method = build::<f64>("auto:eps=1e-10").unwrap();
        let text = chained::gradients(&problem, method.as_ref(), Request::Adapters)
            .unwrap_err()
            .to_string();
        assert!(text.contains("take the exact gradient"), "{text}");
    }
}
