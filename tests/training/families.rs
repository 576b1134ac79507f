//! Families of decoders against float64 references of PyTorch autograd, Transformers and PEFT (`tests/data/families`): logits,
//! loss, gradients of every base parameter and of LoRA on every linear layer, two AdamW steps; and finite differences.

use ndarray::{Array2, Axis};
use peft_limits::adapters::lora::LoraSpec;
use peft_limits::check::compare::assert_close;
use peft_limits::check::finite_differences::{central_differences, observed_order};
use peft_limits::cost::Cost;
use peft_limits::linalg::Real;
use peft_limits::model::options::Family;
use peft_limits::model::{AdapterPlan, Batch, Gradients, Instruments, MethodSpec, Model, Projection, StepOptions};
use peft_limits::tensor_file::TensorFile;
use peft_limits::train::optimizer::{OptimizerParams, update_model};
use rand::RngExt;
use std::collections::HashMap;
use std::path::PathBuf;

/// Largest relative gap (Frobenius) to a float64 reference; seen: 2e-14.
const TOLERANCE: f64 = 1e-12;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/families")
}

fn cases() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| root().join(name).join("config.json").exists())
        .collect();
    names.sort();
    assert!(names.len() >= 16, "{names:?}");
    names
}

fn reference(name: &str) -> (TensorFile, Batch) {
    let file = TensorFile::open(root().join(name).join("reference.safetensors")).unwrap();
    let integers = |tensor: &str| file.matrix::<f64>(tensor, "test").unwrap();
    let ids = integers("input_ids").mapv(|x| x as u32);
    let mut batch = Batch::new(ids, integers("labels").mapv(|x| x as i64)).unwrap();
    if file.contains("attention_mask") {
        batch = batch.with_attention_mask(integers("attention_mask").mapv(|x| x > 0.0)).unwrap();
    }
    if file.contains("position_ids") {
        let positions = integers("position_ids").mapv(|x| x as u32);
        let documents = Batch::documents_of_positions(&positions).unwrap();
        batch = batch.with_position_ids(positions).unwrap().with_documents(documents).unwrap();
    }
    (file, batch)
}

fn step<T: Real>(model: &Model<T>, batch: &Batch) -> (f64, Gradients<T>) {
    let mut gradients = model.zero_gradients();
    let out = model.loss_and_gradients(batch, &StepOptions::default(), &mut gradients, &mut Cost::default()).unwrap();
    (out.loss, gradients)
}

fn expected<T: Real>(file: &TensorFile, tensor: &str, like: (usize, usize)) -> Array2<f64> {
    let (_, values) = file.tensor::<f64>(tensor, "test").unwrap();
    Array2::from_shape_vec(like, values).unwrap_or_else(|_| panic!("{tensor} is not {like:?} ({})", T::NAME))
}

/// PEFT's name of an adapter tensor of ours.
fn peft_name(ours: &str) -> String {
    format!("base_model.model.{ours}.default.weight")
}

fn check_case<T: Real>(name: &str, tolerance: f64) {
    let (file, batch) = reference(name);
    let base: Model<T> = Model::read(&root().join(name)).unwrap();
    let rows: Vec<usize> = match &batch.attention_mask {
        Some(mask) => mask.iter().enumerate().filter(|(_, real)| **real).map(|(row, _)| row).collect(),
        None => (0..batch.tokens()).collect(),
    };
    let logits = base.batch_logits(&batch, &Instruments::default(), &mut Cost::default()).unwrap();
    if file.contains("logits") {
        let want = expected::<T>(&file, "logits", logits.dim());
        let (got, want) = (logits.select(Axis(0), &rows), want.select(Axis(0), &rows));
        assert_close(&format!("{name}: logits"), &got.view(), &want.view(), tolerance);
    }

    if file.names().any(|n| n.starts_with("grad.")) {
        let mut full = base.clone();
        full.train_fully();
        let (loss, gradients) = step(&full, &batch);
        let want = file.vector::<f64>("loss", "test").unwrap()[0];
        assert!((loss - want).abs() <= tolerance * want, "{name}: loss {loss} against {want}");
        let named = gradients.named();
        assert_eq!(named.len(), file.names().filter(|n| n.starts_with("grad.")).count(), "{name}");
        assert_eq!(full.trainable_elements(), full.config.parameters(), "{name}");
        for (tensor, gradient) in &named {
            let want = expected::<T>(&file, &format!("grad.{tensor}"), gradient.dim());
            assert_close(&format!("{name}: {tensor}"), gradient, &want.view(), tolerance);
        }
    }

    let mut adapted = base;
    adapted.read_adapter(&root().join(name).join("adapter")).unwrap();
    let (loss, gradients) = step(&adapted, &batch);
    let want = file.vector::<f64>("lora.loss", "test").unwrap()[0];
    assert!((loss - want).abs() <= tolerance * want, "{name}: loss {loss} against {want}");
    let named = gradients.named();
    assert_eq!(named.len(), file.names().filter(|n| n.starts_with("lora.grad.")).count(), "{name}");
    for (tensor, gradient) in &named {
        let want = expected::<T>(&file, &format!("lora.grad.{}", peft_name(tensor)), gradient.dim());
        assert_close(&format!("{name}: {tensor}"), gradient, &want.view(), tolerance);
    }
    if T::NAME == "f64" && file.names().any(|n| n.starts_with("lora.after.")) {
        two_steps(name, &file, &batch, adapted, tolerance);
    }
}

/// The recorded run: lr 1e-2, betas 0.9 and 0.999, eps 1e-8, decoupled decay 0.01.
fn two_steps<T: Real>(name: &str, file: &TensorFile, batch: &Batch, mut model: Model<T>, tolerance: f64) {
    let params = OptimizerParams { lr: 1e-2, weight_decay: 0.01, ..OptimizerParams::default() };
    let mut adamw = params.check().unwrap();
    for _ in 0..2 {
        let (_, gradients) = step(&model, batch);
        update_model(&mut adamw, &mut model, &gradients, 1e-2, 1.0, |_| ()).unwrap();
    }
    for (tensor, values) in &model.trainable_values() {
        let want = expected::<T>(file, &format!("lora.after.{}", peft_name(tensor)), values.dim());
        // The update divides by a root of the gradient's square: it keeps fewer digits than the gradient.
        assert_close(&format!("{name}: {tensor} after two steps"), &values.view(), &want.view(), 1e3 * tolerance);
    }
}

#[test]
fn every_family_in_double_precision() {
    cases().iter().for_each(|name| check_case::<f64>(name, TOLERANCE));
}

#[test]
fn every_family_in_single_precision() {
    cases().iter().for_each(|name| check_case::<f32>(name, 1e-4));
}

/// Every method on every family: the gradients are derivatives of the loss.
#[test]
fn gradients_of_every_method_are_derivatives_in_every_family() {
    let spec = LoraSpec { rank: 3, alpha: 5.0, rank_stabilized: false };
    for name in cases() {
        let (_, batch) = reference(&name);
        let base: Model<f64> = Model::read(&root().join(&name)).unwrap();
        for method in
            [None, Some(MethodSpec::Dora { spec, true_derivative: true }), Some(MethodSpec::Paca(Default::default()))]
        {
            let mut model = base.clone();
            let mut rng = crate::common::rng(5);
            match method {
                None => model.train_fully(),
                Some(method) => model.attach(&AdapterPlan::everywhere(&Projection::ALL, method), &mut rng).unwrap(),
            }
            let (_, gradients) = step(&model, &batch);
            let directions: HashMap<String, Array2<f64>> =
                gradients.named().into_iter().map(|(n, g)| (n, g.mapv(|_| rng.random::<f64>() - 0.5))).collect();
            let exact: f64 = gradients.named().iter().map(|(n, g)| (&directions[n] * g).sum()).sum();
            let estimates = central_differences(
                |t| {
                    let mut moved = model.clone();
                    moved
                        .for_each_trainable(&mut |n, values| {
                            values.scaled_add(t, &directions[n]);
                            Ok(())
                        })
                        .unwrap();
                    moved.loss(&batch, &mut Cost::default()).unwrap()
                },
                1e-3,
            );
            let order = observed_order(&estimates, exact);
            assert!((order - 2.0).abs() < 0.2, "{name} {method:?}: order {order}, {estimates:?} against {exact}");
        }
    }
}

/// Written and read again a model is the same, under its family's own names.
#[test]
fn checkpoints_go_round_under_their_own_names() {
    for name in cases() {
        let model: Model<f32> = Model::read(&root().join(&name)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        model.write(folder.path()).unwrap();
        let again: Model<f32> = Model::read(folder.path()).unwrap();
        assert_eq!(again.config, model.config, "{name}");
        let (_, batch) = reference(&name);
        let logits = |m: &Model<f32>| m.batch_logits(&batch, &Instruments::default(), &mut Cost::default()).unwrap();
        assert_eq!(logits(&again), logits(&model), "{name}");
        let theirs = TensorFile::open(root().join(&name).join("model.safetensors")).unwrap();
        let ours = TensorFile::open(folder.path().join("model.safetensors")).unwrap();
        let names = |file: &TensorFile| {
            let mut names: Vec<String> = file.names().map(String::from).collect();
            names.sort();
            names
        };
        assert_eq!(names(&ours), names(&theirs), "{name}");
    }
}

/// S2FT's co-permutation moves norms, biases and grouped heads with their weights: the function does not change.
#[test]
fn s2ft_changes_no_function_where_it_can_be_attached() {
    for name in cases() {
        let base: Model<f64> = Model::read(&root().join(&name)).unwrap();
        let (_, batch) = reference(&name);
        let mut model = base.clone();
        let attached = model.attach_s2ft(&crate::common::s2ft_everywhere(), None, &mut crate::common::rng(5));
        if base.config.options.family == Family::Olmo2 {
            let text = attached.unwrap_err().to_string();
            assert!(text.contains("olmo2") && text.contains("norm"), "{text}");
            continue;
        }
        attached.unwrap_or_else(|e| panic!("{name}: {e}"));
        let logits = |m: &Model<f64>| m.batch_logits(&batch, &Instruments::default(), &mut Cost::default()).unwrap();
        assert_close(&name, &logits(&model).view(), &logits(&base).view(), 1e-12);
    }
}
