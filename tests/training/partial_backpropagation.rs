//! What is frozen costs nothing: operations, saved tensors and buffers are counted exactly.

use crate::common::*;
use ndarray::Array2;
use peft_limits::adapters::lora::LoraSpec;
use peft_limits::adapters::paca::PacaSpec;
use peft_limits::check::compare::assert_close;
use peft_limits::cost::Cost;
use peft_limits::model::s2ft::{S2ftSpec, Scope};
use peft_limits::model::{AdapterPlan, Batch, MethodSpec, Model, Projection, StepOptions};

const TOKENS: usize = 26;

fn forward_cost(model: &Model<f64>) -> Cost {
    let mut cost = Cost::default();
    model.loss(&batch(), &mut cost).unwrap();
    cost
}

/// Names kept for backward, without the parts that every step has.
fn saved(model: &Model<f64>) -> Vec<(String, usize)> {
    let (mut gradients, mut cost) = (model.zero_gradients(), Cost::default());
    let pass = model.forward(&batch(), &StepOptions::default(), &mut gradients, &mut cost).unwrap();
    let named = pass.saved_bytes_by_name();
    named
        .into_iter()
        .filter(|(name, _)| name.contains("layers."))
        .map(|(name, bytes)| (name, bytes / 8))
        .collect()
}

fn only(
    layers: std::ops::Range<usize>,
    projections: &[Projection],
    spec: MethodSpec,
) -> Model<f64> {
    let mut model: Model<f64> = model(3);
    model.attach(&AdapterPlan::default().and(layers, projections, spec), &mut rng(6)).unwrap();
    model
}

#[test]
fn one_paca_projection_at_the_top_saves_and_computes_its_columns_alone() {
    let model = only(
        2..3,
        &[Projection::Down],
        MethodSpec::Paca(PacaSpec { rank: 5, ..PacaSpec::default() }),
    );
    assert_eq!(saved(&model), [("model.layers.2.down_proj.columns".to_string(), TOKENS * 5)]);
    let (_, gradients, cost) = step(&model, &batch(), &StepOptions::default());
    assert_eq!(
        gradients.bytes_by_name(),
        [("model.layers.2.mlp.down_proj.paca_columns".to_string(), 24 * 5 * 8)]
    );
    // Beyond the forward: the hidden gradient of the counted rows, and dy^T x[:, idx].
    let head = batch().counted() * 31 * 24;
    let columns = TOKENS * 24 * 5;
    assert_eq!(cost.multiply_adds - forward_cost(&model).multiply_adds, (head + columns) as u64);
    assert_eq!(
        cost.exponentials,
        forward_cost(&model).exponentials,
        "no softmax or silu is differentiated"
    );
}

#[test]
fn s2ft_on_o_and_down_of_the_first_layer_runs_no_attention_backward() {
    let mut model: Model<f64> = model(3);
    let spec = S2ftSpec {
        ratios: [0.0, 0.0, 0.0, 0.34, 0.0, 0.0, 0.1],
        scope: Scope::EachLayer,
        ..S2ftSpec::default()
    };
    model.attach_s2ft(&spec, None, &mut rng(1)).unwrap();
    for layer in 1..3 {
        let plan =
            AdapterPlan::default().and(layer..layer + 1, &Projection::ALL, MethodSpec::Frozen);
        model.attach(&plan, &mut rng(1)).unwrap();
    }
    let names: Vec<String> =
        saved(&model).into_iter().map(|(n, _)| n).filter(|n| n.contains("layers.0")).collect();
    let want =
        ["middle", "gate", "up", "middle_inverse_rms", "o_proj.columns", "down_proj.columns"];
    assert_eq!(names, want.map(|n| format!("model.layers.0.{n}")));
    // Frozen layers above pass the gradient on; they keep no input of any projection.
    let above: Vec<String> =
        saved(&model).into_iter().map(|(n, _)| n).filter(|n| n.contains("layers.1")).collect();
    assert!(!above.iter().any(|n| n.ends_with("normed_input")
        || n.ends_with("normed_middle")
        || n.ends_with(".gated")));
    assert!(above.iter().any(|n| n.ends_with("query")));
}

#[test]
fn saved_inputs_by_method() {
    let sizes = |spec| {
        let named = saved(&only(0..3, &Projection::ALL, spec));
        let of = |name: &str| {
            named
                .iter()
                .find(|(n, _)| *n == format!("model.layers.1.{name}"))
                .map_or(0, |(_, elements)| *elements)
        };
        ["normed_input", "normed_middle", "gated", "q_proj.projected", "q_proj.columns"].map(of)
    };
    assert_eq!(sizes(MethodSpec::Full), [TOKENS * 24, TOKENS * 24, TOKENS * 34, 0, 0]);
    assert_eq!(
        sizes(MethodSpec::Lora(lora(5))),
        [TOKENS * 24, TOKENS * 24, TOKENS * 34, TOKENS * 5, 0]
    );
    assert_eq!(
        sizes(MethodSpec::Dora { spec: lora(5), true_derivative: false }),
        [TOKENS * 24, TOKENS * 24, TOKENS * 34, 0, 0]
    );
    assert_eq!(
        sizes(MethodSpec::Paca(PacaSpec { rank: 5, ..PacaSpec::default() })),
        [0, 0, 0, 0, TOKENS * 5]
    );
}

/// PaCA adds nothing to the forward; LoRA adds N r (in + out) per projection.
#[test]
fn operations_of_lora_and_paca_differ_by_their_definition() {
    let base = forward_cost(&model(3)).multiply_adds;
    let rank = 5;
    let paca =
        only(0..3, &Projection::ALL, MethodSpec::Paca(PacaSpec { rank, ..PacaSpec::default() }));
    assert_eq!(forward_cost(&paca).multiply_adds, base);
    let spec = LoraSpec { rank, ..LoraSpec::default() };
    let lora = only(0..3, &Projection::ALL, MethodSpec::Lora(spec));
    let extents: usize = [(24, 24), (12, 24), (12, 24), (24, 24), (34, 24), (34, 24), (24, 34)]
        .map(|(o, i)| o + i)
        .iter()
        .sum();
    assert_eq!(forward_cost(&lora).multiply_adds - base, (3 * TOKENS * rank * extents) as u64);
    let cost = |m: &Model<f64>| step(m, &batch(), &StepOptions::default()).2.multiply_adds;
    let outs: usize = [24, 12, 12, 24, 34, 34, 24].iter().sum();
    let measured = cost(&lora) - cost(&paca);
    // LoRA: xA^T and dA and dx through A cost in each, times B^T and dxA^T and dB cost out each;
    // the first layer's q, k, v need no dx. PaCA: out.
    let want = 3 * TOKENS * rank * (3 * extents - outs) - TOKENS * rank * 3 * 24;
    assert_eq!(measured, want as u64);
}

#[test]
fn checkpointing_changes_nothing_but_what_is_kept() {
    for (name, model) in every_method::<f64>() {
        let (want_loss, want, _) = step(&model, &batch(), &StepOptions::default());
        let options = StepOptions { checkpointing: true, ..StepOptions::default() };
        let (loss, got, _) = step(&model, &batch(), &options);
        assert_eq!(loss.loss.to_bits(), want_loss.loss.to_bits(), "{name}");
        for ((tensor, got), (_, want)) in got.named().iter().zip(want.named()) {
            assert_eq!(got, &want, "{name}: {tensor}");
        }
        let (mut gradients, mut cost) = (model.zero_gradients(), Cost::default());
        let pass = model.forward(&batch(), &options, &mut gradients, &mut cost).unwrap();
        let names = pass.saved_bytes_by_name();
        let layers: Vec<_> = names.iter().filter(|(n, _)| n.contains("layers.")).collect();
        assert!(
            layers.iter().all(|(n, bytes)| n.ends_with(".checkpoint") && *bytes == TOKENS * 24 * 8),
            "{layers:?}"
        );
        assert_eq!(layers.len(), 3);
    }
}

#[test]
fn accumulated_micro_batches_equal_one_batch() {
    let whole = batch();
    let parts = [0, 1].map(|b| {
        let row = |a: &Array2<i64>| a.slice(ndarray::s![b..b + 1, ..]).to_owned();
        let ids = whole.input_ids.slice(ndarray::s![b..b + 1, ..]).to_owned();
        Batch::new(ids, row(&whole.labels)).unwrap()
    });
    assert_ne!(parts[0].counted(), parts[1].counted(), "else a mean of means would pass");
    let options = StepOptions { divisor: Some(whole.counted() as f64), ..StepOptions::default() };
    for (name, model) in every_method::<f64>() {
        let (out, want, _) = step(&model, &whole, &StepOptions::default());
        let (mut got, mut cost, mut loss) = (model.zero_gradients(), Cost::default(), 0.0);
        for part in &parts {
            loss += model.loss_and_gradients(part, &options, &mut got, &mut cost).unwrap().loss;
        }
        assert!((loss - out.loss).abs() < 1e-13 * out.loss, "{name}");
        for ((tensor, got), (_, want)) in got.named().iter().zip(want.named()) {
            assert_close(&format!("{name}: {tensor}"), got, &want, 1e-12);
        }
    }
}

/// The loss of one position: tokens after it that occur nowhere before have a gradient of exactly
/// zero.
#[test]
fn later_tokens_do_not_matter() {
    let mut model: Model<f64> = model(3);
    model.train_fully();
    let ids = Array2::from_shape_fn((1, 11), |(_, t)| t as u32 + 4);
    let predicted = 6;
    let mut labels = Array2::from_elem((1, 11), -100i64);
    labels[[0, predicted]] = 2;
    let (_, gradients, _) =
        step(&model, &Batch::new(ids, labels).unwrap(), &StepOptions::default());
    let embedding = gradients.embedding.as_ref().unwrap();
    for t in 0..11 {
        let silent = embedding.row(t + 4).iter().all(|x| x.to_bits() << 1 == 0);
        assert_eq!(silent, t >= predicted, "token at {t}");
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let model =
        every_method::<f32>().into_iter().find(|(name, _)| *name == "everything").unwrap().1;
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| step(&model, &batch(), &StepOptions::default()))
    };
    let ((one, first, _), (four, second, _)) = (run(1), run(4));
    assert_eq!(one.loss.to_bits(), four.loss.to_bits());
    for ((name, a), (_, b)) in first.named().iter().zip(second.named()) {
        assert_eq!(a, &b, "{name}");
    }
}
