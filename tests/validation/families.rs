//! Faults that only some families can have are named: the step of a model with the option changed,
//! judged as that of the model without.

use super::{case, common};
use peft_limits::blocks::rope::Scaling;
use peft_limits::blocks::swiglu::Activation;
use peft_limits::model::Model;
use peft_limits::model::options::{Norm, QueryKeyNorm};
use peft_limits::validate::dump::{Case, Observed};
use peft_limits::validate::reference::{Restored, Rounding, Variant};
use peft_limits::validate::{Precision, Report, Silent, validate};
use std::path::Path;

type Change = fn(&mut Model<f64>);

fn of_family(family: &str) -> Case {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families");
    let dump = common::family_dump(&families.join(family), false, false).unwrap();
    case(dump.path())
}

/// The verdict on a step of `wrong`, in a format.
fn judged(mut case: Case, wrong: &Variant<'_>, format: Precision) -> Report {
    let none: Option<Restored> = None;
    let internals = if format == Precision::F64 { format } else { Precision::F32 };
    case.rounding =
        Rounding { stream: format, products: format, autocast: false, internals, quantized: none };
    let rounding = (format != Precision::F64).then_some(case.rounding);
    let observed = |values: ndarray::Array2<f64>| {
        let shape = vec![values.nrows(), values.ncols()];
        Observed { values, precision: format, shape }
    };
    case.trainer.logits = Some(observed(ndarray::Array2::zeros((1, 1))));
    case.trainer.after.clear();
    let evidence = case.run(&Variant { rounding, ..wrong.clone() }).unwrap();
    case.trainer.loss = Some(evidence.loss);
    case.trainer.logits = evidence.logits.map(observed);
    for (name, gradient) in evidence.gradients {
        *case.trainer.gradients.get_mut(&name).unwrap() = observed(gradient);
    }
    validate(&case, &Silent).unwrap()
}

fn names(report: &Report) -> Vec<&str> {
    report.diagnoses.iter().map(|d| d.fault.as_str()).collect()
}

/// (family, fault, what the trainer's model has otherwise).
const FAULTS: [(&str, &str, Change); 32] = [
    ("gemma2", "window-missing", |m| m.config.options.windows.clear()),
    ("gemma3", "window-missing", |m| m.config.options.windows.clear()),
    ("gemma2", "window-off-by-one", |m| {
        m.config.options.windows.iter_mut().flatten().for_each(|w| *w += 1)
    }),
    ("gpt_oss", "window-off-by-one", |m| {
        m.config.options.windows.iter_mut().flatten().for_each(|w| *w -= 1)
    }),
    ("gemma3", "window-everywhere", |m| {
        m.config.options.windows.iter_mut().for_each(|w| *w = Some(6))
    }),
    ("gemma2", "attention-cap-missing", |m| m.config.options.attention_cap = None),
    ("gemma2", "logit-cap-missing", |m| m.config.options.logit_cap = None),
    ("gemma2", "norm-gain-without-one", |m| m.config.options.unit_gain = false),
    ("gemma3", "norm-gain-without-one", |m| m.config.options.unit_gain = false),
    ("gemma2", "embedding-multiplier-missing", |m| m.config.options.embedding_multiplier = 1.0),
    ("granite", "embedding-multiplier-missing", |m| m.config.options.embedding_multiplier = 1.0),
    ("granite", "residual-multiplier-missing", |m| m.config.options.residual_multiplier = 1.0),
    ("granite", "logit-multiplier-missing", |m| m.config.options.logit_multiplier = 1.0),
    ("granite", "attention-multiplier-missing", |m| m.config.options.attention_scale = None),
    ("gemma3", "attention-multiplier-missing", |m| m.config.options.attention_scale = None),
    ("qwen3", "query-key-norm-missing", without_query_key_norm),
    ("olmo2", "query-key-norm-missing", without_query_key_norm),
    ("llama3", "rotary-scaling-missing", |m| m.config.options.rotaries[0].scaling = Scaling::None),
    ("gpt_oss", "rotary-scaling-missing", |m| m.config.options.rotaries[0].scaling = Scaling::None),
    ("phi3", "rotary-share", |m| m.config.options.rotaries[0].share = None),
    ("gpt_neox", "rotary-share", |m| m.config.options.rotaries[0].share = None),
    ("smollm3", "rotary-everywhere", |m| m.config.options.rotary_of.clear()),
    ("gemma3", "rotary-local-base", |m| m.config.options.rotary_of.clear()),
    ("gpt_oss", "attention-sink-dropped", |m| {
        m.layers.iter_mut().for_each(|layer| layer.sinks = None)
    }),
    ("mixtral", "router-not-renormalised", |m| {
        m.config.options.experts.as_mut().unwrap().renormalise = false
    }),
    ("qwen3_moe", "router-not-renormalised", |m| {
        m.config.options.experts.as_mut().unwrap().renormalise = false
    }),
    ("gpt_oss", "expert-bias-dropped", |m| {
        let all = m
            .layers
            .iter_mut()
            .flat_map(|layer| layer.projections_mut())
            .filter(|(p, _)| p.is_expert());
        all.for_each(|(_, projection)| projection.bias.as_mut().unwrap().fill(0.0));
    }),
    ("gpt_oss", "gate-and-up-order", |m| {
        m.config.options.experts.as_mut().unwrap().interleaved = false
    }),
    ("opt", "position-offset", |m| m.config.options.positions = Some(0)),
    ("gpt_neox", "parallel-residual", |m| m.config.options.parallel = false),
    ("gpt2", "gelu-form", |m| m.config.options.activation = Activation::Gelu),
    ("gpt_neox", "gelu-form", |m| m.config.options.activation = Activation::GeluTanh),
];

fn without_query_key_norm(model: &mut Model<f64>) {
    model.config.options.query_key_norm = QueryKeyNorm::None;
    for layer in &mut model.layers {
        layer.norms[Norm::Query as usize] = None;
        layer.norms[Norm::Key as usize] = None;
    }
}

/// Faults of the table that bfloat16 hides: below its rounding, or (experts' biases) so near to it
/// that nothing accounts for what is left.
const HIDDEN: [(&str, &str); 3] =
    [("gpt2", "gelu-form"), ("gpt_neox", "gelu-form"), ("gpt_oss", "expert-bias-dropped")];

#[test]
fn a_changed_option_of_a_family_is_named() {
    for (family, fault, change) in FAULTS {
        for format in [Precision::F64, Precision::Bf16] {
            if format == Precision::Bf16 && HIDDEN.contains(&(family, fault)) {
                continue;
            }
            let case = of_family(family);
            let mut other = case.model.clone();
            change(&mut other);
            let report =
                judged(case, &Variant { forward: Some(&other), ..Variant::default() }, format);
            assert!(!report.passed, "{family} {fault} {format:?}");
            assert_eq!(names(&report).first(), Some(&fault), "{family} {format:?}");
        }
    }
}

/// Weights of experts that the family leaves as they are, divided by their sum.
#[test]
fn a_router_that_renormalises_is_named() {
    let mut case = of_family("qwen3_moe");
    let other = case.model.clone();
    case.model.config.options.experts.as_mut().unwrap().renormalise = false;
    let report =
        judged(case, &Variant { forward: Some(&other), ..Variant::default() }, Precision::F64);
    assert_eq!(names(&report), ["router-renormalised"]);
}

/// Unscaled scores in a half format, which in some families show in the gradients alone.
#[test]
fn unscaled_scores_are_named_in_every_family() {
    for family in [
        "gemma3", "gpt2", "gpt_neox", "llama3", "mixtral", "olmo2", "opt", "phi3", "qwen2", "qwen3",
    ] {
        let wrong = Variant { scale: Some(1.0), ..Variant::default() };
        let report = judged(of_family(family), &wrong, Precision::Bf16);
        assert_eq!(names(&report).first(), Some(&"attention-scale"), "{family} {}", report.passed);
    }
}

/// Two options at once: both are named.
#[test]
fn two_changed_options_are_named() {
    for (family, faults) in [
        ("gemma3", ["rotary-local-base", "window-missing"]),
        ("gemma2", ["attention-cap-missing", "window-off-by-one"]),
        ("granite", ["attention-multiplier-missing", "residual-multiplier-missing"]),
        ("gpt_oss", ["attention-sink-dropped", "gate-and-up-order"]),
    ] {
        for format in [Precision::F64, Precision::Bf16] {
            let case = of_family(family);
            let mut other = case.model.clone();
            for fault in faults {
                FAULTS.iter().find(|f| f.0 == family && f.1 == fault).unwrap().2(&mut other);
            }
            let report =
                judged(case, &Variant { forward: Some(&other), ..Variant::default() }, format);
            let mut named = names(&report);
            named.sort_unstable();
            assert_eq!(named, faults, "{family} {format:?}");
            assert!(
                report.diagnoses[0].what.contains("; and at once: "),
                "{:?}",
                report.diagnoses[0]
            );
        }
    }
}
