//! Families of decoders against float64 references of PyTorch autograd, Transformers and PEFT
//! (`tests/data/families`): logits, loss, gradients of every base parameter and of LoRA on every
//! linear layer, two AdamW steps; and finite differences.

use ndarray::{Array2, ArrayView2, Axis};
use peft_limits::adapters::Method;
use peft_limits::adapters::lora::LoraSpec;
use peft_limits::blocks::swiglu::Activation;
use peft_limits::check::compare::assert_close;
use peft_limits::check::finite_differences::{central_differences, observed_order};
use peft_limits::cost::Cost;
use peft_limits::linalg::Real;
use peft_limits::model::options::Family;
use peft_limits::model::s2ft::S2ftSpec;
use peft_limits::model::{
    AdapterPlan, Batch, Gradients, Instruments, MethodSpec, Model, Projection, StepOptions,
};
use peft_limits::tensor_file::{TensorFile, TensorWriter};
use peft_limits::train::optimizer::{OptimizerParams, update_model};
use peft_limits::validate::dump::{Case, DumpPaths, PlainSettings, Trainer};
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
    assert!(names.len() >= 22, "{names:?}");
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
    let out = model
        .loss_and_gradients(batch, &StepOptions::default(), &mut gradients, &mut Cost::default())
        .unwrap();
    (out.loss, gradients)
}

fn expected<T: Real>(file: &TensorFile, tensor: &str, like: (usize, usize)) -> Array2<f64> {
    let (_, values) = file.tensor::<f64>(tensor, "test").unwrap();
    Array2::from_shape_vec(like, values)
        .unwrap_or_else(|_| panic!("{tensor} is not {like:?} ({})", T::NAME))
}

/// The reference's gradients, and with the adapter values after two steps, by this library's names:
/// experts by number, weights out x in.
fn theirs(name: &str, full: bool) -> Option<Trainer> {
    let dump = crate::common::family_dump(&root().join(name), full, false)?;
    let (paths, manifest) = DumpPaths::of_folder(dump.path()).unwrap();
    Some(Case::read(name, &paths, Some(&manifest), &PlainSettings::default()).unwrap().trainer)
}

/// Every gradient of the reference is met, and there are at least as many of ours.
fn check_gradients<T: Real>(
    name: &str,
    trainer: &Trainer,
    gradients: &Gradients<T>,
    tolerance: f64,
) {
    let named: HashMap<String, ArrayView2<'_, T>> = gradients.named().into_iter().collect();
    assert!(trainer.gradients.len() >= 4 && named.len() >= trainer.gradients.len(), "{name}");
    let typical = trainer
        .gradients
        .values()
        .map(|g| g.values.iter().map(|x| x * x).sum::<f64>())
        .fold(0.0, f64::max);
    for (tensor, want) in &trainer.gradients {
        let got = named.get(tensor).unwrap_or_else(|| panic!("{name}: no {tensor}"));
        // A key bias without rotary embedding has no gradient: what is there is rounding.
        if want.values.iter().map(|x| x * x).sum::<f64>() < 1e-24 * typical {
            assert!(
                got.iter().all(|x| x.widen().abs() < tolerance * typical.sqrt()),
                "{name}: {tensor}"
            );
            continue;
        }
        assert_close(&format!("{name}: {tensor}"), got, &want.values.view(), tolerance);
    }
}

fn check_case<T: Real>(name: &str, tolerance: f64) {
    let (file, batch) = reference(name);
    let base: Model<T> = Model::read(&root().join(name)).unwrap();
    let rows: Vec<usize> = match &batch.attention_mask {
        Some(mask) => {
            mask.iter().enumerate().filter(|(_, real)| **real).map(|(row, _)| row).collect()
        }
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
        assert_eq!(full.trainable_elements(), full.config.parameters(), "{name}");
        check_gradients(name, &theirs(name, true).unwrap(), &gradients, tolerance);
    }

    let mut adapted = base;
    adapted.read_adapter(&root().join(name).join("adapter")).unwrap();
    let (loss, gradients) = step(&adapted, &batch);
    let want = file.vector::<f64>("lora.loss", "test").unwrap()[0];
    assert!((loss - want).abs() <= tolerance * want, "{name}: loss {loss} against {want}");
    let trainer = theirs(name, false).unwrap();
    check_gradients(name, &trainer, &gradients, tolerance);
    if T::NAME == "f64" && !trainer.after.is_empty() {
        two_steps(name, &trainer, &batch, adapted, tolerance);
    }
}

/// The recorded run: lr 1e-2, betas 0.9 and 0.999, eps 1e-8, decoupled decay 0.01.
fn two_steps<T: Real>(
    name: &str,
    trainer: &Trainer,
    batch: &Batch,
    mut model: Model<T>,
    tolerance: f64,
) {
    let params = OptimizerParams { lr: 1e-2, weight_decay: 0.01, ..OptimizerParams::default() };
    let mut adamw = params.check().unwrap();
    for _ in 0..2 {
        let (_, gradients) = step(&model, batch);
        update_model(&mut adamw, &mut model, &gradients, 1e-2, 1.0, |_| ()).unwrap();
    }
    let values: HashMap<String, Array2<T>> = model.trainable_values().into_iter().collect();
    for (tensor, want) in &trainer.after {
        // The update divides by a root of the gradient's square: it keeps fewer digits than the
        // gradient.
        let what = format!("{name}: {tensor} after two steps");
        assert_close(&what, &values[tensor].view(), &want.values.view(), 1e3 * tolerance);
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
        for method in [
            None,
            Some(MethodSpec::Dora { spec, true_derivative: true }),
            Some(MethodSpec::Paca(Default::default())),
        ] {
            let mut model = base.clone();
            let mut rng = crate::common::rng(5);
            match method {
                None => model.train_fully(),
                Some(method) => model
                    .attach(
                        &AdapterPlan::everywhere(&model.config.all_projections(), method),
                        &mut rng,
                    )
                    .unwrap(),
            }
            let (_, gradients) = step(&model, &batch);
            let directions: HashMap<String, Array2<f64>> = gradients
                .named()
                .into_iter()
                .map(|(n, g)| (n, g.mapv(|_| rng.random::<f64>() - 0.5)))
                .collect();
            let exact: f64 =
                gradients.named().iter().map(|(n, g)| (&directions[n] * g).sum()).sum();
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
                // With a kink in relu the order shows only where no unit crosses it.
                match &base.config.options {
                    options if options.activation == Activation::Relu => 1e-7,
                    // A step that is small enough leaves every token with its experts.
                    options if options.experts.is_some() => 2e-4,
                    _ => 1e-3,
                },
            );
            if base.config.options.activation == Activation::Relu {
                let gap = (estimates.last().unwrap() / exact - 1.0).abs();
                assert!(gap < 1e-5, "{name} {method:?}: {estimates:?} against {exact}");
                continue;
            }
            let order = observed_order(&estimates, exact);
            assert!(
                (order - 2.0).abs() < 0.2,
                "{name} {method:?}: order {order}, {estimates:?} against {exact}"
            );
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
        let logits = |m: &Model<f32>| {
            m.batch_logits(&batch, &Instruments::default(), &mut Cost::default()).unwrap()
        };
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

/// S2FT's co-permutation moves norms, biases and grouped heads with their weights: the function
/// does not change.
#[test]
fn s2ft_changes_no_function_where_it_can_be_attached() {
    for name in cases() {
        let base: Model<f64> = Model::read(&root().join(&name)).unwrap();
        let (_, batch) = reference(&name);
        let mut model = base.clone();
        let attached =
            model.attach_s2ft(&crate::common::s2ft_everywhere(), None, &mut crate::common::rng(5));
        if matches!(
            base.config.options.family,
            Family::Phi3 | Family::Gpt2 | Family::GptNeoX | Family::Opt
        ) || base.config.options.experts.is_some()
        {
            let text = attached.unwrap_err().to_string();
            assert!(
                text.contains("_proj") && text.contains(base.config.options.family.model_type()),
                "{text}"
            );
            // The default slices o and down only, which every family but a mixture has as weights
            // of their own.
            model = base.clone();
            let spec = S2ftSpec {
                ratios: S2ftSpec::default().ratios.map(|r| if r > 0.0 { 0.5 } else { 0.0 }),
                ..S2ftSpec::default()
            };
            let mut spec = spec;
            if base.config.options.experts.is_some() {
                spec.set_ratio(Projection::Down, 0.0).unwrap();
            }
            model
                .attach_s2ft(&spec, None, &mut crate::common::rng(5))
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            let logits = |m: &Model<f64>| {
                m.batch_logits(&batch, &Instruments::default(), &mut Cost::default()).unwrap()
            };
            assert_close(&name, &logits(&model).view(), &logits(&base).view(), 1e-12);
            continue;
        }
        attached.unwrap_or_else(|e| panic!("{name}: {e}"));
        let logits = |m: &Model<f64>| {
            m.batch_logits(&batch, &Instruments::default(), &mut Cost::default()).unwrap()
        };
        assert_close(&name, &logits(&model).view(), &logits(&base).view(), 1e-12);
    }
}

/// Row norms of `W + s B A`.
fn norms(weight: ArrayView2<'_, f64>, a: &Array2<f64>, b: &Array2<f64>, s: f64) -> Array2<f64> {
    let merged = &weight + &(b.dot(a) * s);
    merged.map_axis(Axis(1), |row| row.dot(&row).sqrt()).insert_axis(Axis(0))
}

/// Makes DoRA's norms the constants that PEFT takes them for in backward: magnitudes change as
/// norms do.
fn keep_norms(moved: &mut Model<f64>, start: &Model<f64>) {
    let (embedding, head) =
        (start.embedding.t(), start.lm_head.as_ref().unwrap_or(&start.embedding).view());
    let outside = [
        (&mut moved.adapters.embedding, &start.adapters.embedding, embedding),
        (&mut moved.adapters.head, &start.adapters.head, head),
    ];
    for (new, old, table) in outside {
        let (Some(new), Some(old)) = (new, old) else { continue };
        if let Some(magnitude) = &mut new.magnitude {
            *magnitude *= &norms(table, &new.lora.a, &new.lora.b, new.lora.scaling);
            *magnitude /= &norms(table, &old.lora.a, &old.lora.b, old.lora.scaling);
        }
    }
    for (new, old) in moved.layers.iter_mut().zip(&start.layers) {
        for (p, new) in new.projections_mut() {
            let base = new.base.dense().to_owned();
            if let (Method::Dora(new), Method::Dora(old)) =
                (&mut new.method, &old.projection(p).method)
            {
                new.magnitude *= &norms(base.view(), &new.a, &new.b, new.scaling);
                new.magnitude /= &norms(base.view(), &old.a, &old.b, old.scaling);
            }
        }
    }
}

/// PEFT's adapters of experts, of the output projection, of the embedding, with biases and with
/// modules trained whole: written and read again they are the same, under the same names, and their
/// gradients are derivatives of the loss.
#[test]
fn adapters_go_round_and_their_gradients_are_derivatives() {
    for name in cases() {
        let base: Model<f64> = Model::read(&root().join(&name)).unwrap();
        let mut adapted = base.clone();
        adapted.read_adapter(&root().join(&name).join("adapter")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        adapted.write_adapter(folder.path()).unwrap();
        let mut again = base.clone();
        again.read_adapter(folder.path()).unwrap();
        let (_, batch) = reference(&name);
        let logits = |m: &Model<f64>| {
            m.batch_logits(&batch, &Instruments::default(), &mut Cost::default()).unwrap()
        };
        assert_eq!(logits(&again), logits(&adapted), "{name}");
        let names = |folder: &std::path::Path| {
            let file = TensorFile::open(folder.join("adapter_model.safetensors")).unwrap();
            // PEFT writes tables under their factors as well.
            let own = file.names().filter(|name| !name.ends_with(".base_layer.weight"));
            own.map(String::from).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(names(folder.path()), names(&root().join(&name).join("adapter")), "{name}");
        if base.config.options.activation == Activation::Relu {
            continue;
        }
        let mut rng = crate::common::rng(11);
        let (_, gradients) = step(&adapted, &batch);
        let directions: HashMap<String, Array2<f64>> = gradients
            .named()
            .into_iter()
            .map(|(n, g)| (n, g.mapv(|_| rng.random::<f64>() - 0.5)))
            .collect();
        let exact: f64 = gradients.named().iter().map(|(n, g)| (&directions[n] * g).sum()).sum();
        let moved = |t: f64| {
            let mut moved = adapted.clone();
            moved
                .for_each_trainable(&mut |n, values| {
                    values.scaled_add(t, &directions[n]);
                    Ok(())
                })
                .unwrap();
            keep_norms(&mut moved, &adapted);
            moved.loss(&batch, &mut Cost::default()).unwrap()
        };
        if base.config.options.experts.is_some() {
            // Experts change hands at some steps, so that no order shows; a small one leaves every
            // token where it is.
            let estimates = central_differences(moved, 1e-6);
            assert!(
                (estimates[0] / exact - 1.0).abs() < 1e-6,
                "{name}: {estimates:?} against {exact}"
            );
            continue;
        }
        let order = observed_order(&central_differences(moved, 2e-4), exact);
        assert!((order - 2.0).abs() < 0.3, "{name}: order {order}");
    }
}

/// Modules that an adapter trains whole: their gradients are those of full fine-tuning, their
/// values those of the folder, and merging puts them into the checkpoint.
#[test]
fn modules_that_an_adapter_trains_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (mut families, mut compared) = (0, 0);
    for name in cases() {
        let Some(full) = theirs(&name, true).filter(|full| !full.gradients.is_empty()) else {
            continue;
        };
        let (_, batch) = reference(&name);
        let base: Model<f64> = Model::read(&root().join(&name)).unwrap();
        let mut lora = base.clone();
        let spec = MethodSpec::Lora(LoraSpec { rank: 2, alpha: 4.0, rank_stabilized: false });
        lora.attach(
            &AdapterPlan::everywhere(&[Projection::Output], spec),
            &mut crate::common::rng(3),
        )
        .unwrap();
        let adapted = lora.config.options.module_kind(Projection::Output);
        let checkpoint = TensorFile::open(root().join(&name).join("model.safetensors")).unwrap();
        let left = ["embed", ".wte.", ".wpe.", "lm_head", ".sinks", "block_sparse_moe", &adapted];
        let saved: Vec<&str> = checkpoint
            .names()
            .filter(|name| {
                !left.iter().any(|part| name.contains(part)) && !name.contains(".experts.0")
            })
            .filter(|name| name.contains("norm") || name.contains("ln_") || name.contains(".0."))
            .filter(|name| !name.split('.').any(|part| part == "experts") || name.contains("_proj"))
            .filter(|name| {
                name.split(".experts.")
                    .nth(1)
                    .is_none_or(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
            })
            .collect();
        let write = |factor: f64| {
            let at = folder.path().join(&name);
            lora.write_adapter(&at).unwrap();
            let plain = TensorFile::open(at.join("adapter_model.safetensors")).unwrap();
            let mut writer = TensorWriter::new();
            for tensor in plain.names() {
                let (shape, values) = plain.raw_tensor::<f64>(tensor, "test").unwrap();
                writer.tensor(tensor, &shape, values);
            }
            let mut modules: Vec<&str> = Vec::new();
            for tensor in &saved {
                let (shape, values) = checkpoint.raw_tensor::<f64>(tensor, "test").unwrap();
                writer.tensor(
                    &format!("base_model.model.{tensor}"),
                    &shape,
                    values.into_iter().map(|x| factor * x),
                );
                modules.push(tensor.rsplit_once('.').unwrap().0);
            }
            modules.dedup();
            writer.write(&at.join("adapter_model.safetensors")).unwrap();
            let path = at.join("adapter_config.json");
            let mut config: serde_json::Value =
                serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            config["modules_to_save"] = serde_json::json!(modules);
            std::fs::write(&path, config.to_string()).unwrap();
            at
        };
        let mut model = base.clone();
        model.read_adapter(&write(1.0)).unwrap();
        let (loss, gradients) = step(&model, &batch);
        let trained = model.trainable_names();
        assert!(trained.len() > 2 * model.layers.len() + 3, "{name}: {trained:?}");
        assert_eq!(gradients.named().len(), trained.len(), "{name}");
        for (tensor, got) in gradients.named() {
            if let Some(want) =
                full.gradients.get(&tensor).filter(|g| g.values.iter().any(|x| x.abs() > 1e-12))
            {
                assert_close(&format!("{name}: {tensor}"), &got, &want.values.view(), TOLERANCE);
                compared += 1;
            }
        }
        let mut other = base.clone();
        let at = write(1.25);
        other.read_adapter(&at).unwrap();
        let changed = step(&other, &batch).0;
        assert!((changed / loss - 1.0).abs() > 1e-4, "{name}: {changed} {loss}");
        let merged = folder.path().join(format!("{name}-merged"));
        base.with_folder(&at).unwrap().write(&merged).unwrap();
        let again =
            Model::<f64>::read(&merged).unwrap().loss(&batch, &mut Cost::default()).unwrap();
        assert!((again / changed - 1.0).abs() < TOLERANCE, "{name}: {again} {changed}");
        families += 1;
    }
    assert!(families >= 14 && compared >= 150, "{families} {compared}");
}
