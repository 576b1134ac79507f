//! The reduction from gap nearest neighbour: logits, gradient identity, and an exact oracle that is
//! never wrong.

use peft_limits::attention::exact::{dense, streaming};
use peft_limits::attention::{AttentionProblem, Request};
use peft_limits::cost::Cost;
use peft_limits::limits::hardness::decision::{Oracle, guaranteed, has_near_pair};
use peft_limits::limits::hardness::embedding::{Embedding, Form, HEAD_DIM};
use peft_limits::limits::hardness::instance::Instance;
use peft_limits::limits::hardness::row_sums::{distance_counts, outputs, query_adapter_gradient};
use peft_limits::limits::threshold::Threshold;
use peft_limits::linalg::norms::max_abs;

#[test]
fn the_head_has_bounded_entries_and_the_stated_logits() {
    let (instance, embedding) =
        (Instance::draw(40, true, 3).unwrap(), Embedding::at_threshold_ratio(40, 1.7).unwrap());
    let problem: AttentionProblem<f64> = embedding.head(&instance, Form::Given).unwrap();
    let qkv = problem.project(&mut Cost::default()).qkv;
    assert!(max_abs(&qkv.query.view()) <= embedding.gamma * (1.0 + 1e-12));
    assert!(max_abs(&qkv.key.view()) <= embedding.gamma * (1.0 + 1e-12));
    let scores = dense::matrices(&problem, &qkv).S;
    for i in 0..40 {
        for j in 0..40 {
            let distance = (instance.queries[i] ^ instance.keys[j]).count_ones();
            assert!((scores[[i, j]].exp() / embedding.pair(distance) - 1.0).abs() < 1e-10);
            assert!((scores[[i, 40 + j]] - embedding.dummy_logit).abs() < 1e-10);
        }
    }
    let measured =
        Threshold::measure(&problem, &problem.project(&mut Cost::default()), &mut Cost::default());
    assert!((measured.ratio - 1.7).abs() < 1e-9, "{}", measured.ratio);
}

const FORMS: [Form; 2] = [Form::Given, Form::Squared];

/// The last row of dB_Q is -beta Gamma sum O^p (1 - O), and all of it follows from the distances.
#[test]
fn the_gradient_is_a_sum_over_rows_of_the_output() {
    let (instance, embedding) =
        (Instance::draw(50, true, 5).unwrap(), Embedding::at_threshold_ratio(50, 1.2).unwrap());
    let from_distances = outputs(&embedding, &distance_counts(&instance));
    for form in FORMS {
        let problem: AttentionProblem<f64> = embedding.head(&instance, form).unwrap();
        let gradients = dense::gradients(&problem, Request::Adapters).unwrap();
        let want: f64 = gradients.output.iter().map(|o| o.powi(form.power()) * (1.0 - o)).sum();
        let db = gradients.lora_b.query.as_ref().unwrap();
        let got = -db[[HEAD_DIM - 1, 0]] * HEAD_DIM as f64 / embedding.gamma;
        assert!((got / want - 1.0).abs() < 1e-12);
        assert!(
            gradients.output.iter().zip(&from_distances).all(|(a, b)| (a / b - 1.0).abs() < 1e-12)
        );
        let own = query_adapter_gradient(&embedding, &instance, &from_distances, form);
        let largest = max_abs(&db.view());
        assert!(db.iter().zip(own).all(|(a, b)| (a - b).abs() < 1e-12 * largest), "{form:?}");
        assert!(
            (largest + db[[HEAD_DIM - 1, 0]]).abs() < 1e-12 * largest,
            "no entry is larger than the last"
        );
        // At a near pair O is about 1/2.
        let near = gradients.output[[instance.planted.unwrap().0, 0]];
        assert!((0.3..0.7).contains(&near), "{near}");
    }
}

#[test]
fn an_exact_oracle_is_right_on_every_instance_where_the_promise_decides() {
    let oracles =
        [Oracle::Output, Oracle::LoraGradient(Form::Given), Oracle::LoraGradient(Form::Squared)];
    let mut decided = [0u32; 3];
    for size in [16, 100] {
        for step in 4..18 {
            let embedding = Embedding::at_threshold_ratio(size, 0.25 * f64::from(step)).unwrap();
            for (which, oracle) in oracles.into_iter().enumerate() {
                if !guaranteed(&embedding, oracle) {
                    continue;
                }
                let form = if let Oracle::LoraGradient(form) = oracle { form } else { Form::Given };
                for seed in 0..12 {
                    let planted = seed % 2 == 0;
                    let instance = Instance::draw(size, planted, seed).unwrap();
                    let problem: AttentionProblem<f64> = embedding.head(&instance, form).unwrap();
                    let gradients = streaming::gradients(&problem, Request::Adapters).unwrap();
                    let answer = has_near_pair(&embedding, &gradients, oracle).unwrap();
                    assert_eq!(answer, planted, "{oracle:?} size {size} gamma {}", embedding.gamma);
                    decided[which] += 1;
                }
            }
        }
    }
    assert!(decided.iter().all(|d| *d >= 60), "{decided:?}");
    // The squared loss counts null rows less.
    assert!(decided[1] < decided[2] && decided[2] <= decided[0], "{decided:?}");
    assert!(
        !guaranteed(&Embedding::at_threshold_ratio(100, 0.5).unwrap(), Oracle::Output),
        "below, nothing is promised"
    );
}

#[test]
fn heads_of_another_size_or_shape_are_refused() {
    let embedding = Embedding::at_threshold_ratio(20, 2.0).unwrap();
    assert!(embedding.head::<f64>(&Instance::draw(21, true, 0).unwrap(), Form::Given).is_err());
    assert!(Embedding::new(20, f64::NAN).is_err() && Embedding::new(20, 100.0).is_err());
    let other: AttentionProblem<f64> =
        peft_limits::attention::synthetic::SyntheticHead::new(20, 4).draw().unwrap();
    let gradients = dense::gradients(&other, Request::Adapters).unwrap();
    for oracle in [Oracle::Output, Oracle::LoraGradient(Form::Given)] {
        assert!(has_near_pair(&embedding, &gradients, oracle).is_err());
    }
}
