//! Exact gradients against central finite differences of a loss computed again by plain loops.
//!
//! Along a direction the error of a central difference is h^2 f'''/6 + O(h^4): three steps, each
//! half of the one before, must show order 2. Where the loss is a polynomial of degree at most 2 in
//! the step, f''' is zero and the difference is exact up to roundoff; that is W_V, A_V or B_V moved
//! alone.

use crate::naive::{BOTH_MASKS, BOTH_SOFTMAX, Head, LETTERS, Sizes, find, normal, results};
use ndarray::Array2;
use peft_limits::attention::exact::{dense, streaming};
use peft_limits::attention::{Mask, Objective, Request};
use peft_limits::check::finite_differences::{central_differences, observed_order};
use peft_limits::linalg::norms;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const STEP: f64 = 0.02;

/// One parameter tensor of a head.
type Parameter = (char, usize);

fn tensor(head: &mut Head, (kind, p): Parameter) -> &mut Array2<f64> {
    match kind {
        'A' => &mut head.a[p],
        'B' => &mut head.b[p],
        _ => &mut head.w[p],
    }
}

/// Unit direction in each of the parameters that move.
fn directions(head: &Head, moved: &[Parameter], seed: u64) -> Vec<(Parameter, Array2<f64>)> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    moved
        .iter()
        .map(|&parameter| {
            let (rows, columns) = tensor(&mut head.clone(), parameter).dim();
            let direction = normal(&mut rng, rows, columns, 1.0);
            let norm = norms::frobenius(&direction.view());
            (parameter, direction / norm)
        })
        .collect()
}

/// Checks the derivative along the direction for every method; `polynomial`: the loss has degree at
/// most 2.
fn check(head: &Head, moved: &[Parameter], polynomial: bool, seed: u64) {
    let directions = directions(head, moved, seed);
    let loss = |t: f64| {
        let mut head = head.clone();
        for (parameter, direction) in &directions {
            *tensor(&mut head, *parameter) += &(direction * t);
        }
        head.loss()
    };
    let estimates = central_differences(loss, STEP);
    // Each of the two losses is a sum of positive and negative terms, rounded: 100 eps of their
    // magnitude.
    let terms: f64 =
        head.output().iter().zip(head.objective.tensor()).map(|(o, y)| o * o + y * y).sum();
    let roundoff = 100.0 * f64::EPSILON * terms / (STEP / 4.0);
    let problem = head.problem();
    let tile = streaming::Tile { queries: 4, keys: 3 };
    for (method, gradients) in [
        ("dense", dense::gradients(&problem, Request::All).unwrap()),
        ("streaming", streaming::gradients_with_tile(&problem, Request::All, tile).unwrap()),
    ] {
        let all = results(&gradients);
        let derivative: f64 = directions
            .iter()
            .map(|((kind, p), direction)| {
                (find(&all, &format!("d{kind}{}", LETTERS[*p])) * direction).sum()
            })
            .sum();
        let label = format!(
            "{method} {:?} {:?} {} {moved:?}",
            head.mask,
            head.softmax,
            head.objective.tensor_name()
        );
        let gap = estimates.map(|e| (e - derivative).abs());
        if polynomial {
            assert!(
                gap.iter().all(|g| *g <= roundoff),
                "{label}: {gap:?} above roundoff {roundoff:.1e}"
            );
            continue;
        }
        assert!(
            gap[2] > 100.0 * roundoff,
            "{label}: the step is too small to see an order, {gap:?}"
        );
        let order = observed_order(&estimates, derivative);
        assert!(
            (order - 2.0).abs() <= 0.1,
            "{label}: order {order:.3}, gaps {gap:?}, derivative {derivative}"
        );
    }
    // The loss that the crate reports is the same one.
    if let Objective::Target(_) = head.objective {
        let reported = dense::gradients(&problem, Request::All).unwrap().loss.unwrap();
        assert!((reported - head.loss()).abs() <= 1e-13 * head.loss());
    }
}

fn heads() -> Vec<Head> {
    let mut heads = Vec::new();
    for mask in BOTH_MASKS {
        // Pairwise distinct; a causal mask needs as many keys as queries.
        let queries = if mask == Mask::Causal { 11 } else { 7 };
        let sizes =
            Sizes { queries, keys: 11, inputs: [5, 6, 8], head_dim: 4, value_dim: 3, rank: 2 };
        for softmax in BOTH_SOFTMAX {
            for target in [true, false] {
                heads.push(Head::draw(sizes, mask, softmax, target, 17));
            }
        }
    }
    heads
}

#[test]
fn every_adapter_and_weight_alone() {
    for (number, head) in heads().iter().enumerate() {
        for kind in ['A', 'B', 'W'] {
            for p in 0..3 {
                check(head, &[(kind, p)], p == 2, 100 + number as u64);
            }
        }
    }
}

/// All nine at once: the cross terms of A and B, and of Q, K and V.
#[test]
fn every_adapter_and_weight_together() {
    let moved: Vec<Parameter> =
        ['A', 'B', 'W'].into_iter().flat_map(|kind| (0..3).map(move |p| (kind, p))).collect();
    for (number, head) in heads().iter().enumerate() {
        for repeat in 0..3 {
            check(head, &moved, false, 1000 * repeat + number as u64);
        }
    }
}

/// A derivative that is off by one part in a thousand does not pass: the order falls to 0.
#[test]
fn a_wrong_gradient_has_another_order() {
    let head = &heads()[0];
    let mut directions = directions(head, &[('A', 0)], 5);
    let (parameter, direction) = directions.remove(0);
    let loss = |t: f64| {
        let mut head = head.clone();
        *tensor(&mut head, parameter) += &(&direction * t);
        head.loss()
    };
    let gradients = dense::gradients(&head.problem(), Request::All).unwrap();
    let right = (gradients.lora_a.query.unwrap() * &direction).sum();
    let estimates = central_differences(loss, STEP);
    assert!((observed_order(&estimates, right) - 2.0).abs() <= 0.1);
    assert!(observed_order(&estimates, right * 1.001) < 1.5);
}
