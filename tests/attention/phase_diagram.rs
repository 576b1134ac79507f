//! The closed forms of the phase diagram: reference numbers, limits in c, and a head's own
//! matrices.

use peft_limits::limits::phase_diagram::{Law, Model, energies, rank, sparsity};
use serde_json::Value;

fn reference() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/phase_diagram.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn exponents_are_those_of_the_reference() {
    let reference = reference();
    let rows = reference["exponents"].as_array().unwrap();
    assert_eq!(rows.len(), 66);
    for row in rows {
        let number = |key: &str| row[key].as_f64();
        let law = if row["law"] == "sign" { Law::Sign } else { Law::Uniform };
        let (kappa, c) = (number("kappa").unwrap(), number("c").unwrap());
        let ours = Model::new(law, kappa).unwrap().exponents(c).unwrap();
        // The reference takes energies from a general decomposition, which shows rounding of 1e-33
        // in place of a hundred smaller ones. At an error of 1/L these matter: see the next test.
        let loose = if row["law"] == "uniform" { 1e-2 } else { 1e-6 };
        for (key, value, tolerance) in [
            ("theta", Some(ours.theta), 1e-12),
            ("rank", Some(ours.rank), 1e-9),
            ("rank_error_1_over_L", ours.rank_error_1_over_l, loose),
            ("all_monomials", Some(ours.all_monomials), 1e-9),
            ("certified", Some(ours.certified), 1e-9),
            ("certified_error_1_over_L", Some(ours.certified_error_1_over_l), 1e-9),
            ("support", Some(ours.support), 1e-9),
            ("support_squared", Some(ours.support_squared), 1e-9),
        ] {
            match (value, number(key)) {
                (Some(ours), Some(theirs)) => {
                    assert!((ours - theirs).abs() < tolerance, "{key} of {row}: {ours}")
                }
                (ours, theirs) => assert_eq!(ours, theirs, "{key} of {row}"),
            }
        }
    }
}

/// Against energies in 120 digits (mpmath, from the Gram matrix of the kernel's expansion in
/// Legendre polynomials).
#[test]
fn exponents_of_small_errors_have_their_digits() {
    for (kappa, c, expected) in [
        (0.5, 0.1, 0.455_289_837_785_942_06),
        (1.0, 0.1, 0.574_878_456_760_723_5),
        (2.0, 0.1, 0.688_323_314_387_468_2),
        (0.5, 0.25, 0.580_748_987_389_360_6),
        (1.0, 0.25, 0.752_552_934_905_625_7),
        (0.5, 1.0, 0.949_031_009_436_118_6),
        (1.0, 1.0, 1.366_921_232_053_43),
        (1.0, 3.0, 2.057_598_650_474_007),
    ] {
        let found = Model::new(Law::Uniform, kappa)
            .unwrap()
            .exponents(c)
            .unwrap()
            .rank_error_1_over_l
            .unwrap();
        assert!((found - expected).abs() < 1e-11, "{kappa} {c}: {found} {expected}");
    }
}

#[test]
fn finite_ranks_are_those_of_the_reference() {
    let reference = reference();
    let rows = reference["finite"].as_array().unwrap();
    assert_eq!(rows.len(), 84);
    let model = Model::new(Law::Uniform, 1.0).unwrap();
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap();
        assert_eq!(model.head_dim(number("L")), number("d") as usize);
        let k = model.finite_rank(number("c"), number("L"), number("eps")).unwrap();
        assert!((k / number("k") - 1.0).abs() < 1e-6, "{row}: {k}");
    }
}

/// c -> 0: kappa p_1 (1 + ln 1/p_1) with p_1 = (theta E w^2)^2, which is of order c^4 ln(1/c).
#[test]
fn the_rank_vanishes_like_the_theorem_says() {
    for (law, kappa) in [(Law::Uniform, 1.0), (Law::Uniform, 2.0), (Law::Sign, 0.5)] {
        let model = Model::new(law, kappa).unwrap();
        for c in [1e-2, 1e-3] {
            let e = model.exponents(c).unwrap();
            let p1 = (e.theta * model.law().second_moment()).powi(2);
            let expected = kappa * p1 * (1.0 - p1.ln());
            assert!((e.rank / expected - 1.0).abs() < 2.0 * e.theta, "{c}: {} {expected}", e.rank);
            assert!(e.rank < e.all_monomials && e.all_monomials < e.certified);
        }
        let (small, smaller) =
            (model.exponents(1e-2).unwrap().rank, model.exponents(1e-3).unwrap().rank);
        let law = |c: f64| c.powi(4) * (1.0 / c).ln();
        assert!((small / smaller / (law(1e-2) / law(1e-3)) - 1.0).abs() < 0.1);
    }
}

/// c -> infinity: each coordinate of a sign law has two modes, so kappa ln 2; a uniform one's
/// kernel tends to u^0 / M, whose energies do not depend on theta any more.
#[test]
fn the_rank_levels_off() {
    let sign = Model::new(Law::Sign, 1.5).unwrap().exponents(20.0).unwrap();
    assert!((sign.rank - 1.5 * std::f64::consts::LN_2).abs() < 1e-12);
    assert!((sign.support - (1.0 - 1.5 * std::f64::consts::LN_2).max(0.0)).abs() < 1e-12);
    let uniform = Model::new(Law::Uniform, 1.0).unwrap();
    let (near, far) = (uniform.exponents(10.0).unwrap(), uniform.exponents(20.0).unwrap());
    assert!((near.rank - far.rank).abs() < 0.02 && far.support < 1e-12, "{near:?} {far:?}");
}

#[test]
fn a_sample_of_a_law_has_its_exponents() {
    let n = 4001;
    let grid: Vec<f64> = (0..n).map(|i| (f64::from(i) + 0.5) * 2.0 / f64::from(n) - 1.0).collect();
    let (sampled, uniform) = (
        Model::new(Law::sampled(&grid).unwrap(), 1.0).unwrap(),
        Model::new(Law::Uniform, 1.0).unwrap(),
    );
    for c in [0.3, 1.0, 2.5] {
        let (a, b) = (sampled.exponents(c).unwrap(), uniform.exponents(c).unwrap());
        assert!(
            (a.rank - b.rank).abs() < 1e-6 && (a.support - b.support).abs() < 1e-6,
            "{a:?} {b:?}"
        );
        assert!((a.rank_error_1_over_l.unwrap() - b.rank_error_1_over_l.unwrap()).abs() < 1e-6);
    }
}

#[test]
fn curves_cross_where_the_notes_say() {
    let model = Model::new(Law::Uniform, 1.0).unwrap();
    let near = |found: Option<f64>, expected: f64| {
        let found = found.unwrap();
        assert!((found - expected).abs() < 1e-3, "{found} {expected}");
    };
    near(model.certified_is_quadratic_from(0.0), 0.4930);
    near(model.certified_is_quadratic_from(1.0), 0.2378);
    near(model.certified_is_quadratic_from(2.0), 0.0990);
    near(model.rank_is_quadratic_from(1.0), 0.5186);
    assert_eq!(model.rank_is_quadratic_from(0.0), None);
    let (c, exponent) = model.middle().unwrap();
    let e = model.exponents(c).unwrap();
    assert!(
        (1.5..1.7).contains(&c)
            && (e.rank - exponent).abs() < 1e-9
            && (e.support - exponent).abs() < 1e-9
    );
    let c = model.condensation().unwrap();
    assert!(
        model.exponents(c * 0.999).unwrap().support > 0.0
            && model.exponents(c * 1.001).unwrap().support < 1e-12
    );
    // Of 2^d different keys of signs, L^(1 - kappa ln 2) stay tied at any temperature.
    assert_eq!(Model::new(Law::Sign, 1.0).unwrap().condensation(), None);
}

/// Rows of a drawn head: the geometric mean of exp(entropy) is L^s with the d and theta of that
/// head.
#[test]
fn effective_keys_of_a_drawn_head() {
    use ndarray::Array2;
    use rand::{RngExt, SeedableRng};
    let (tokens, c) = (1024, 1.0);
    let model = Model::new(Law::Uniform, 1.0).unwrap();
    let (d, theta) = (model.head_dim(f64::from(tokens)), model.finite_theta(c, f64::from(tokens)));
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let mut draw =
        || Array2::from_shape_simple_fn((tokens as usize, d), || rng.random_range(-1.0..1.0));
    let logits = draw().dot(&draw().t()) * theta;
    let mean: f64 = logits
        .rows()
        .into_iter()
        .map(|row| {
            let total: f64 = row.iter().map(|s: &f64| s.exp()).sum();
            total.ln() - row.iter().map(|s| s * s.exp()).sum::<f64>() / total
        })
        .sum::<f64>()
        / f64::from(tokens);
    let predicted = f64::from(tokens).ln()
        + d as f64 * sparsity::entropy_of_coordinate(model.law(), theta, 1.0);
    assert!((mean - predicted).abs() < 0.05, "{mean} {predicted}");
    // And its eps-rank, which a head of L tokens approaches from below.
    let p = energies(model.law(), theta).unwrap();
    let predicted = rank::ln_finite_rank(&p, d, 0.3).unwrap().exp();
    let shifted = logits.mapv(f64::exp);
    let rows = shifted.sum_axis(ndarray::Axis(1));
    let probabilities = shifted / rows.insert_axis(ndarray::Axis(1));
    let measured =
        peft_limits::limits::rank::frobenius_ranks(probabilities.view(), &[0.3]).unwrap()[0] as f64;
    assert!((measured / predicted - 1.0).abs() < 0.25, "{measured} {predicted}");
}
