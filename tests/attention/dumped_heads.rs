//! Heads that `python/dump_heads.py` wrote from tiny random models: O as PyTorch's own attention
//! computed it inside the model, gradients by autograd (float64). `tests/data/README.md` says which
//! commands made them.

use ndarray::Array2;
use peft_limits::attention::exact::{dense, streaming};
use peft_limits::attention::{AttentionProblem, Gradients, Mask, Request, file};
use peft_limits::check::compare::assert_close;
use peft_limits::tensor_file::TensorFile;
use std::path::PathBuf;

/// Sums of at most 37 terms, logits below 20: 1e-13 is thousands of roundings of either side.
const TOLERANCE: f64 = 1e-13;

fn open(name: &str) -> (TensorFile, AttentionProblem<f64>) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/dumped")
        .join(format!("{name}.safetensors"));
    let file = TensorFile::open(&path).unwrap();
    (file, file::read_problem(&path).unwrap())
}

fn both(problem: &AttentionProblem<f64>) -> [Gradients<f64>; 2] {
    let tile = streaming::Tile { queries: 7, keys: 5 };
    [
        dense::gradients(problem, Request::All).unwrap(),
        streaming::gradients_with_tile(problem, Request::All, tile).unwrap(),
    ]
}

fn check(name: &str, names: &[&str]) {
    let (file, problem) = open(name);
    let output: Array2<f64> = file.matrix("O", "the model's output").unwrap();
    for gradients in both(&problem) {
        assert_close(&format!("{name}: O"), &gradients.output.view(), &output.view(), TOLERANCE);
        let named = gradients.named();
        assert_eq!(named.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(), names, "{name}");
        for (gradient, got) in named {
            let want: Array2<f64> = file.matrix(&gradient, "autograd").unwrap();
            assert_close(&format!("{name}: {gradient}"), &got.view(), &want.view(), TOLERANCE);
        }
        match gradients.loss {
            Some(loss) => {
                let want = file.vector::<f64>("loss", "autograd").unwrap()[0];
                assert!(
                    (loss - want).abs() <= TOLERANCE * want,
                    "{name}: loss {loss} against {want}"
                );
            }
            None => assert!(!file.contains("loss")),
        }
    }
}

/// Rotary, grouped-query attention: head 3 of 4 reads key group 1 of 2; G is that of the model's
/// next-token loss.
#[test]
fn a_rotary_decoder_gives_rotated_queries_and_keys() {
    let (_, problem) = open("tiny-llama_l1_h3");
    assert_eq!((problem.num_queries(), problem.num_keys(), problem.head_dim()), (23, 23, 12));
    assert_eq!(problem.mask(), Mask::Causal);
    assert!(problem.hidden().is_none());
    check("tiny-llama_l1_h3", &["dQ", "dK", "dV"]);
}

/// Biases are the last row of W, against the constant 1 appended to X.
#[test]
fn an_encoder_gives_hidden_states_with_a_constant_one() {
    let (_, problem) = open("tiny-bert_l1_h1");
    assert_eq!((problem.num_queries(), problem.head_dim(), problem.mask()), (11, 12, Mask::Full));
    let hidden = problem.hidden().unwrap();
    assert_eq!(hidden.inputs.query.ncols(), 37);
    assert!(hidden.inputs.query.column(36).iter().all(|x| x.to_bits() == 1f64.to_bits()));
    assert!(
        hidden.projections.key.weight.row(36).iter().all(|b| b.abs() > 0.0),
        "the biases are there"
    );
    check("tiny-bert_l1_h1", &["dWQ", "dWK", "dWV", "dAQ", "dAK", "dAV", "dBQ", "dBK", "dBV"]);
}
