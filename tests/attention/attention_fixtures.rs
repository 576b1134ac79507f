//! Exact gradients against float64 references made by PyTorch autograd (`tests/data/attention_*`).

use ndarray::Array2;
use peft_limits::attention::exact::{dense, streaming};
use peft_limits::attention::{AttentionProblem, Gradients, Request, file};
use peft_limits::check::compare::assert_close;
use peft_limits::linalg::Real;
use peft_limits::tensor_file::TensorFile;
use std::path::PathBuf;

const CASES: [&str; 5] = ["small", "medium", "causal", "large_logits", "softmax_one"];

fn open(case: &str) -> TensorFile {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(format!("tests/data/attention_{case}.safetensors"));
    TensorFile::open(path).unwrap()
}

/// Checks O, loss, every dW, dA and dB that `gradients` holds, and how many there are.
fn check<T: Real>(
    case: &str,
    file: &TensorFile,
    gradients: &Gradients<T>,
    expected_count: usize,
    tolerance: f64,
) {
    let want: Array2<f64> = file.matrix("O", "reference").unwrap();
    assert_close(&format!("{case}: O"), &gradients.output.view(), &want.view(), tolerance);
    let loss = file.vector::<f64>("loss", "reference").unwrap()[0];
    let ours = gradients.loss.unwrap();
    assert!((ours - loss).abs() <= tolerance * loss, "{case}: loss {ours} against {loss}");
    let named = gradients.named();
    assert_eq!(named.len(), expected_count, "{case}");
    for (name, got) in named {
        let want: Array2<f64> = file.matrix(&name, "reference").unwrap();
        assert_close(&format!("{case}: {name}"), &got.view(), &want.view(), tolerance);
    }
}

#[test]
fn dense_agrees_to_1e_12() {
    for case in CASES {
        let file = open(case);
        let problem: AttentionProblem<f64> = file::problem_from(&file).unwrap();
        // The fixture of large logits itself differs from 80-bit arithmetic by 7e-14.
        check(case, &file, &dense::gradients(&problem, Request::All).unwrap(), 9, 1e-12);
        check(case, &file, &dense::gradients(&problem, Request::Adapters).unwrap(), 6, 1e-12);
    }
}

#[test]
fn streaming_f64_agrees_to_1e_10_for_every_tile() {
    for case in CASES {
        let file = open(case);
        let problem: AttentionProblem<f64> = file::problem_from(&file).unwrap();
        for (queries, keys) in [(128, 512), (1, 1), (7, 5), (5, 11), (64, 3)] {
            let tile = streaming::Tile { queries, keys };
            for (request, count) in [(Request::All, 9), (Request::Adapters, 6)] {
                let gradients = streaming::gradients_with_tile(&problem, request, tile).unwrap();
                check(case, &file, &gradients, count, 1e-10);
            }
        }
    }
}

/// In f32 a logit s carries a rounding error of about eps |s|, which the exponential turns into a
/// relative error of the same size: the tolerance is 1e-5 or 4 eps max|s|, whichever is larger.
#[test]
fn streaming_f32_agrees_within_rounding_of_the_logits() {
    for case in CASES {
        let file = open(case);
        let reference: AttentionProblem<f64> = file::problem_from(&file).unwrap();
        let projected = reference.project(&mut Default::default());
        let scores = dense::matrices(&reference, &projected.qkv).S;
        let largest = scores.iter().filter(|s| s.is_finite()).fold(0.0f64, |m, s| m.max(s.abs()));
        let tolerance = (4.0 * f64::from(f32::EPSILON) * largest).max(1e-5);
        let problem: AttentionProblem<f32> = file::problem_from(&file).unwrap();
        for (request, count) in [(Request::All, 9), (Request::Adapters, 6)] {
            check(case, &file, &streaming::gradients(&problem, request).unwrap(), count, tolerance);
        }
    }
}
