//! Updates apart from their model: extraction, fusion, switching, mixed batches, folders,
//! checkpoints on disk.

use crate::common::*;
use ndarray::{Array2, s};
use peft_limits::Error;
use peft_limits::adapters::paca::PacaSpec;
use peft_limits::adapters::update::WeightUpdate;
use peft_limits::check::compare::assert_close;
use peft_limits::cost::Cost;
use peft_limits::linalg::Real;
use peft_limits::model::update::{
    KEPT, ModelUpdate, Switchable, switch_off_on_disk, switch_on_on_disk,
};
use peft_limits::model::{AdapterPlan, MethodSpec, Model, Projection};
use peft_limits::tensor_file::{TensorFile, TensorWriter, float_bytes, write_float};
use peft_limits::train::checkpoint::fingerprint;
use proptest::prelude::*;
use safetensors::Dtype;
use std::path::Path;

/// Trained models of one base (`model(3)`) with the methods that leave projections only, moved off
/// their start.
fn trained<T: Real>() -> Vec<(&'static str, Model<T>)> {
    let mut all = every_method::<T>();
    all.retain(|(name, _)| !matches!(*name, "full" | "everything"));
    for (name, model) in &mut all {
        if !name.contains("lora") && !name.contains("dora") {
            leave_the_start(model);
        }
    }
    all
}

fn updates<T: Real>() -> Vec<(&'static str, ModelUpdate<T>)> {
    trained::<T>()
        .iter()
        .map(|(name, model)| (*name, ModelUpdate::of_adapters(model).unwrap()))
        .collect()
}

fn switched<T: Real>(update: &ModelUpdate<T>) -> Model<T> {
    let mut switchable = Switchable::new(model::<T>(3)).unwrap();
    switchable.switch(Some(update)).unwrap();
    switchable.model().clone()
}

#[test]
fn an_update_on_the_base_is_the_trained_model() {
    for (name, trained) in trained::<f64>() {
        let update = ModelUpdate::of_adapters(&trained).unwrap();
        let got = logits(&switched(&update));
        assert_close(name, &got.view(), &logits(&trained).view(), 1e-12);
        assert!(
            peft_limits::check::compare::gap(&got.view(), &logits(&model::<f64>(3)).view())
                .relative_frobenius
                > 1e-3
        );
        // As factors, and found again by comparing two plain models.
        let factors = update.to_low_rank().unwrap();
        assert_close(name, &logits(&switched(&factors)).view(), &got.view(), 1e-12);
        let folder = tempfile::tempdir().unwrap();
        trained.write(folder.path()).unwrap();
        let merged = Model::<f64>::read(folder.path()).unwrap();
        let compared = ModelUpdate::between(&model::<f64>(3), &merged).unwrap();
        assert_close(name, &logits(&switched(&compared)).view(), &got.view(), 1e-12);
        if name == "s2ft" || name.starts_with("paca") {
            assert_eq!(
                compared.elements(),
                update.elements(),
                "{name}: nothing but the slices changed"
            );
            for (place, entry) in &compared.entries {
                let (WeightUpdate::Slice(a), WeightUpdate::Slice(b)) =
                    (entry, &update.entries[place])
                else {
                    panic!("{name}: slices")
                };
                assert_eq!((a.place(), a.delta()), (b.place(), b.delta()), "{name} at {place:?}");
            }
            // Sterbenz: a difference is exact, and adding it back too, within a factor of two.
            let (base, again) = (model::<f64>(3), switched(&compared));
            let mut safe = 0;
            for &(l, p) in compared.entries.keys() {
                let weight =
                    |model: &Model<f64>| model.layers[l].projection(p).base.dense().into_owned();
                for ((b, t), got) in weight(&base).iter().zip(&weight(&merged)).zip(&weight(&again))
                {
                    if b.to_bits() != t.to_bits() && (0.5..=2.0).contains(&(t / b)) {
                        safe += 1;
                        assert_eq!(got.to_bits(), t.to_bits(), "{name}: {b} trained to {t}");
                    }
                }
            }
            let (exact, all) = update.exact_numbers(&base, &merged).unwrap();
            assert!(
                safe > 100 && (safe..=all).contains(&exact),
                "{name}: {safe} safe, {exact} of {all} exact"
            );
        }
    }
}

#[test]
fn an_unmerged_sparse_adapter_gives_the_same_update() {
    for (name, mut trained) in
        trained::<f64>().into_iter().filter(|(name, _)| !name.contains("lora"))
    {
        let here = ModelUpdate::of_adapters(&trained).unwrap();
        trained.unmerge().unwrap();
        let away = ModelUpdate::of_adapters(&trained).unwrap();
        for (place, entry) in &here.entries {
            assert_eq!(entry.dense(), away.entries[place].dense(), "{name} at {place:?}");
        }
    }
}

/// Every method's update under random weights, fused, is the weighted sum of the dense updates.
#[test]
fn fused_models_are_sums() {
    let all = updates::<f64>();
    for (i, (name, a)) in all.iter().enumerate() {
        let (other, b) = &all[(i + 3) % all.len()];
        let fused = ModelUpdate::fuse(&[(0.75, a), (-0.5, b)]).unwrap();
        for (place, entry) in &fused.entries {
            let mut want = Array2::<f64>::zeros(entry.shape());
            for (weight, part) in [(0.75, a), (-0.5, b)] {
                if let Some(part) = part.entries.get(place) {
                    want.scaled_add(weight, &part.dense());
                }
            }
            assert_close(
                &format!("{name} and {other} at {place:?}"),
                &entry.dense().view(),
                &want.view(),
                1e-12,
            );
        }
    }
    assert!(matches!(ModelUpdate::<f64>::fuse(&[]), Err(Error::InvalidParam { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Any sequence of switches ends, after a switch to nothing, at every bit of the base.
    #[test]
    fn switching_restores_every_bit(sequence in prop::collection::vec(prop::option::of(0usize..7), 1..8)) {
        let all = updates::<f32>();
        let base = model::<f32>(3);
        let before = fingerprint(&base);
        let mut switchable = Switchable::new(base).unwrap();
        for choice in &sequence {
            switchable.switch(choice.map(|i| &all[i].1)).unwrap();
            prop_assert_eq!(choice.is_none(), fingerprint(switchable.model()) == before);
            if let Some(i) = choice {
                prop_assert_eq!(switchable.kept_bytes(), 4 * all[*i].1.touched_elements());
            }
        }
        prop_assert_eq!(fingerprint(&switchable.into_base().unwrap()), before);
    }

    /// Each sequence of a mixed batch gets the logits that its own merged model gives it.
    #[test]
    fn a_mixed_batch_is_each_model_on_its_own_rows(choices in prop::collection::vec(prop::option::of(0usize..8), 1..7), seed: u64) {
        let all = updates::<f64>();
        let given: Vec<_> = all.iter().map(|(_, u)| u).collect();
        let mut rng = rng(seed);
        let ids = Array2::from_shape_simple_fn((choices.len(), 5), || rand::RngExt::random_range(&mut rng, 0..31u32));
        let base = model::<f64>(3);
        let got = base.logits_mixed(ids.view(), &given, &choices, &mut Cost::default()).unwrap();
        for (i, choice) in choices.iter().enumerate() {
            let own = choice.map_or_else(|| base.clone(), |u| switched(given[u]));
            let want = own.logits(ids.slice(s![i..=i, ..]), &mut Cost::default()).unwrap();
            let rows = got.slice(s![5 * i..5 * (i + 1), ..]);
            assert_close(&format!("sequence {i} under {choice:?}"), &rows, &want.view(), 1e-11);
        }
    }
}

#[test]
fn a_mixed_batch_costs_what_its_slices_cost() {
    let all = updates::<f64>();
    let base = model::<f64>(3);
    let ids = Array2::from_elem((4, 5), 7u32);
    let mut plain = Cost::default();
    base.logits(ids.view(), &mut plain).unwrap();
    for (name, update) in &all {
        let mut cost = Cost::default();
        base.logits_mixed(ids.view(), &[update], &[Some(0), None, Some(0), None], &mut cost)
            .unwrap();
        // Half of the tokens pay the update's numbers, once each.
        assert_eq!(
            cost.multiply_adds - plain.multiply_adds,
            10 * update.elements() as u64,
            "{name}"
        );
    }
}

#[test]
fn folders_come_back_and_serve_as_lora() {
    for (name, trained) in trained::<f64>() {
        let base = model::<f64>(3);
        let update = ModelUpdate::of_adapters(&trained).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (plain, factors, own) =
            (folder.path().join("a"), folder.path().join("b"), folder.path().join("c"));
        update.write(&plain, &base.config, None).unwrap();
        let again = ModelUpdate::read(&plain, &base).unwrap();
        assert_eq!(logits(&switched(&again)), logits(&switched(&update)), "{name}: bit for bit");
        update.to_low_rank().unwrap().write(&factors, &base.config, None).unwrap();
        let mut lora = base.clone();
        lora.read_adapter(&factors).unwrap();
        assert_close(name, &logits(&lora).view(), &logits(&trained).view(), 1e-12);
        // The method's own folder reads as the same update.
        trained.write_adapter(&own).unwrap();
        let own = ModelUpdate::read(&own, &base).unwrap();
        assert_close(name, &logits(&switched(&own)).view(), &logits(&trained).view(), 1e-12);
    }
}

#[test]
fn peft_folders_keep_their_config_to_the_byte() {
    for fixture in ["llama_lora", "llama_dora"] {
        let root = Path::new("tests/data").join(fixture);
        let mut model: Model<f64> = Model::read(&root).unwrap();
        model.read_adapter(&root.join("adapter")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        model.write_adapter_like(folder.path(), Some(&root.join("adapter"))).unwrap();
        let read = |folder: &Path, name: &str| std::fs::read(folder.join(name)).unwrap();
        let name = "adapter_config.json";
        assert_eq!(read(folder.path(), name), read(&root.join("adapter"), name), "{fixture}");
        let name = "adapter_model.safetensors";
        let (ours, theirs) = (folder.path().join(name), root.join("adapter").join(name));
        let (ours, theirs) = (TensorFile::open(ours).unwrap(), TensorFile::open(theirs).unwrap());
        assert_eq!(
            ours.names().collect::<Vec<_>>(),
            theirs.names().collect::<Vec<_>>(),
            "{fixture}"
        );
        for name in theirs.names() {
            assert_eq!(
                ours.bytes(name, "test").unwrap(),
                theirs.bytes(name, "test").unwrap(),
                "{name}"
            );
        }
    }
}

#[test]
fn changed_settings_are_written_and_other_keys_kept() {
    let root = Path::new("tests/data/llama_lora");
    let base: Model<f64> = Model::read(root).unwrap();
    let update = ModelUpdate::read(&root.join("adapter"), &base).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let like = folder.path().join("like");
    std::fs::create_dir(&like).unwrap();
    let config = "adapter_config.json";
    let text = std::fs::read_to_string(root.join("adapter").join(config)).unwrap();
    let text =
        text.replacen("\"auto_mapping\": null", "\"auto_mapping\": {\"kept\": [1, 2.50]}", 1);
    std::fs::write(like.join(config), &text).unwrap();
    let (same, doubled) = (folder.path().join("same"), folder.path().join("doubled"));
    update.write(&same, &base.config, Some(&like)).unwrap();
    assert_eq!(std::fs::read_to_string(same.join(config)).unwrap(), text);
    let sum = ModelUpdate::fuse(&[(0.5, &update), (0.25, &update)]).unwrap();
    sum.write(&doubled, &base.config, Some(&like)).unwrap();
    let value: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(doubled.join(config)).unwrap()).unwrap();
    assert_eq!(value["auto_mapping"], serde_json::json!({"kept": [1, 2.5]}));
    assert_eq!(
        (value["r"].as_u64(), value["lora_alpha"].as_f64()),
        (Some(8), Some(8.0)),
        "rank 4 twice"
    );
    assert_eq!(value["peft_version"], "0.21.2");
    // Factors that were subtracted from the base are no update of it.
    let moved =
        text.replacen("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa_niter_4\"", 1);
    assert_ne!(moved, text);
    for (file, content) in [
        (config, moved.as_bytes()),
        (
            "adapter_model.safetensors",
            &std::fs::read(root.join("adapter/adapter_model.safetensors")).unwrap(),
        ),
    ] {
        std::fs::write(like.join(file), content).unwrap();
    }
    let message = ModelUpdate::read(&like, &base).unwrap_err().to_string();
    assert!(
        message.contains("key init_lora_weights") && message.contains("pissa_niter_4"),
        "{message}"
    );
    let again = ModelUpdate::read(&doubled, &base).unwrap();
    for (place, entry) in &again.entries {
        let want = update.entries[place].dense() * 0.75;
        assert_close(&format!("{place:?}"), &entry.dense().view(), &want.view(), 1e-14);
    }
}

/// Rewrites a checkpoint in another precision, in one file or two shards.
fn rewrite(folder: &Path, dtype: Dtype, shards: bool) {
    let path = folder.join("model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let names = ["model-1.safetensors", "model-2.safetensors"];
    let (mut writers, mut map) =
        ([TensorWriter::new(), TensorWriter::new()], serde_json::Map::new());
    for (i, name) in file.names().enumerate() {
        let (shape, values) = file.tensor::<f64>(name, "test").unwrap();
        let mut bytes = vec![0; values.len() * float_bytes(dtype)];
        bytes
            .chunks_exact_mut(float_bytes(dtype))
            .zip(&values)
            .for_each(|(to, &x)| write_float(dtype, x, to));
        writers[i % 2 * usize::from(shards)].raw(name, dtype, &shape, bytes);
        map.insert(name.into(), names[i % 2].into());
    }
    std::fs::remove_file(&path).unwrap();
    if shards {
        writers.iter().zip(names).for_each(|(w, name)| w.write(&folder.join(name)).unwrap());
        let index = serde_json::json!({ "weight_map": map }).to_string();
        std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    } else {
        writers[0].write(&path).unwrap();
    }
}

fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn a_checkpoint_on_disk_is_switched_and_comes_back_byte_for_byte() {
    for (dtype, shards) in [
        (Dtype::F64, false),
        (Dtype::F32, true),
        (Dtype::F16, false),
        (Dtype::BF16, true),
        (Dtype::BF16, false),
    ] {
        for (name, trained) in
            trained::<f64>().into_iter().filter(|(n, _)| ["s2ft", "paca", "lora"].contains(n))
        {
            let folder = tempfile::tempdir().unwrap();
            let (model, adapter) = (folder.path().join("model"), folder.path().join("adapter"));
            self::model::<f64>(3).write(&model).unwrap();
            rewrite(&model, dtype, shards);
            let update = ModelUpdate::of_adapters(&trained).unwrap();
            update.write(&adapter, &trained.config, None).unwrap();
            let before = contents(&model);
            let base = Model::<f64>::read(&model).unwrap();
            let done = switch_on_on_disk(&model, &adapter).unwrap();
            assert_eq!(done.bytes, update.touched_elements() * float_bytes(dtype), "{name}");
            let now = Model::<f64>::read(&model).unwrap();
            for (&(l, p), entry) in &update.entries {
                let mut want = base.layers[l].projection(p).base.dense().into_owned();
                entry.add_to(&mut want.view_mut(), &mut Cost::default());
                let mut bytes = [0; 8];
                want.mapv_inplace(|x| {
                    write_float(dtype, x, &mut bytes[..float_bytes(dtype)]);
                    match dtype {
                        Dtype::F64 => x,
                        Dtype::F32 => f64::from(x as f32),
                        Dtype::F16 => half::f16::from_f64(x).to_f64(),
                        _ => half::bf16::from_f64(x).to_f64(),
                    }
                });
                assert_eq!(
                    now.layers[l].projection(p).base.dense(),
                    want,
                    "{name} {dtype:?} at {l} {p:?}"
                );
            }
            let message = switch_on_on_disk(&model, &adapter).unwrap_err().to_string();
            assert!(message.contains("in effect") && message.contains(KEPT), "{message}");
            assert_eq!(switch_off_on_disk(&model).unwrap().unwrap().bytes, done.bytes);
            assert!(contents(&model) == before, "{name} {dtype:?}: every byte");
            assert_eq!(switch_off_on_disk(&model).unwrap(), None);
        }
    }
}

#[test]
fn an_interrupted_switch_is_undone() {
    let folder = tempfile::tempdir().unwrap();
    let (model, adapter) = (folder.path().join("model"), folder.path().join("adapter"));
    self::model::<f32>(3).write(&model).unwrap();
    rewrite(&model, Dtype::F32, true);
    updates::<f32>()[6].1.write(&adapter, &self::model::<f32>(3).config, None).unwrap();
    let before = contents(&model);
    switch_on_on_disk(&model, &adapter).unwrap();
    // As if the power had failed between the two shards.
    std::fs::write(
        model.join("model-2.safetensors"),
        &before.iter().find(|f| f.0 == "model-2.safetensors").unwrap().1,
    )
    .unwrap();
    switch_off_on_disk(&model).unwrap().unwrap();
    assert!(contents(&model) == before);
    // Kept values of another model are refused and nothing changes.
    let mut writer = TensorWriter::new();
    writer.raw("model.layers.0.mlp.up_proj.weight.values", Dtype::F32, &[1], vec![0; 4]);
    writer.tensor("model.layers.0.mlp.up_proj.weight.rows", &[1], [3.0f64]);
    writer.write(&model.join(KEPT)).unwrap();
    let message = switch_off_on_disk(&model).unwrap_err().to_string();
    assert!(message.contains(KEPT) && message.contains("up_proj.weight.values"), "{message}");
    std::fs::remove_file(model.join(KEPT)).unwrap();
    assert!(contents(&model) == before);
}

#[test]
fn what_does_not_fit_is_refused() {
    let base = model::<f64>(3);
    let all = updates::<f64>();
    let mut small = base.clone();
    small.layers.pop();
    let mut switchable = Switchable::new(small).unwrap();
    let before = fingerprint(switchable.model());
    assert!(switchable.switch(Some(&all[0].1)).unwrap_err().to_string().contains("2 layers"));
    assert_eq!(fingerprint(switchable.model()), before);
    let mut adapted = base.clone();
    let plan = AdapterPlan::everywhere(&[Projection::Up], MethodSpec::Paca(PacaSpec::default()));
    adapted.attach(&plan, &mut rng(1)).unwrap();
    assert!(Switchable::new(adapted).unwrap_err().to_string().contains("layers.0.mlp.up_proj"));
    assert!(
        ModelUpdate::of_adapters(&base).unwrap_err().to_string().contains("no projection carries")
    );
    let mut full = base.clone();
    full.attach(&AdapterPlan::everywhere(&[Projection::Up], MethodSpec::Full), &mut rng(1))
        .unwrap();
    assert!(
        ModelUpdate::of_adapters(&full).unwrap_err().to_string().contains("compare with the base")
    );
    let mut other = base.clone();
    other.embedding[[0, 0]] += 1.0;
    assert!(ModelUpdate::between(&base, &other).unwrap_err().to_string().contains("embed_tokens"));
    assert!(
        ModelUpdate::between(&base, &base).unwrap_err().to_string().contains("equal to the base")
    );
    let ids = Array2::from_elem((2, 3), 1u32);
    let mixed = |of: &[Option<usize>]| {
        base.logits_mixed(ids.view(), &[&all[0].1], of, &mut Cost::default())
    };
    assert!(mixed(&[None]).unwrap_err().to_string().contains("2 choices"));
    assert!(mixed(&[Some(1), None]).unwrap_err().to_string().contains("only 1 updates"));
}

#[test]
fn broken_slice_folders_are_refused_with_file_and_tensor() {
    let base = model::<f64>(3);
    let (_, update) = updates::<f64>().into_iter().find(|(name, _)| *name == "paca").unwrap();
    let prefix = "base_model.model.model.layers.1.mlp.up_proj";
    let broken = |edit: &dyn Fn(&mut TensorWriter)| {
        let folder = tempfile::tempdir().unwrap();
        update.write(folder.path(), &base.config, None).unwrap();
        let path = folder.path().join("adapter_model.safetensors");
        let file = TensorFile::open(&path).unwrap();
        let mut writer = TensorWriter::new();
        for name in file.names() {
            let (shape, values) = file.tensor::<f64>(name, "test").unwrap();
            writer.tensor(name, &shape, values);
        }
        edit(&mut writer);
        writer.write(&path).unwrap();
        let message = ModelUpdate::read(folder.path(), &base).unwrap_err().to_string();
        assert!(
            message.contains("adapter_model.safetensors") && message.contains(prefix),
            "{message}"
        );
        message
    };
    let columns = format!("{prefix}.slice_columns");
    let set = |values: [f64; 5]| {
        broken(&|w| {
            w.tensor(&columns, &[5], values);
        })
    };
    assert!(set([0.0, 1.0, 2.0, 3.0, 3.0]).contains("twice"));
    assert!(set([0.0, 1.0, 2.0, 3.0, 24.0]).contains("below 24"));
    assert!(set([0.0, 1.0, 2.0, 3.0, 4.5]).contains("integers"));
    assert!(
        broken(&|w| {
            w.tensor(&columns, &[2], [0.0, 1.0]);
        })
        .contains("(34, 2)")
    );
    let rows = format!("{prefix}.slice_rows");
    assert!(
        broken(&|w| {
            w.tensor(&rows, &[1], [0.0]);
        })
        .contains("both")
    );
    assert!(
        broken(&|w| {
            w.tensor(&format!("{prefix}.extra"), &[1], [0.0]);
        })
        .contains("leave over")
    );
}

/// Folders made by PEFT, or by a script in this crate's formats, with logits of PEFT and
/// Transformers in f64 (`python/adapter_round_trip.py`): read, extracted, as factors, fused.
#[test]
fn logits_are_those_of_peft() {
    let root = Path::new("tests/data/adapters");
    let base: Model<f64> = Model::read(Path::new("tests/data/llama_lora")).unwrap();
    let file = TensorFile::open(root.join("logits.safetensors")).unwrap();
    let ids = file.matrix::<f64>("input_ids", "test").unwrap().mapv(|x| x as u32);
    let run = |model: &Model<f64>| model.logits(ids.view(), &mut Cost::default()).unwrap();
    let with = |update: &ModelUpdate<f64>| {
        let mut switchable = Switchable::new(base.clone()).unwrap();
        switchable.switch(Some(update)).unwrap();
        run(switchable.model())
    };
    let check = |name: &str, of: &str, got: Array2<f64>| {
        let (shape, values) = file.tensor::<f64>(of, "test").unwrap();
        let want = Array2::from_shape_vec((shape[0] * shape[1], shape[2]), values).unwrap();
        assert_close(name, &got.view(), &want.view(), 1e-12);
    };
    let mut updates = std::collections::BTreeMap::new();
    for name in ["lora", "dora", "paca", "s2ft"] {
        let mut model = base.clone();
        model.read_adapter(&root.join(name)).unwrap();
        check(&format!("{name} attached"), name, run(&model));
        let update = ModelUpdate::read(&root.join(name), &base).unwrap();
        check(&format!("{name} as an update"), name, with(&update));
        check(&format!("{name} as factors"), name, with(&update.to_low_rank().unwrap()));
        updates.insert(name, update);
    }
    let fused = ModelUpdate::fuse(&[(0.5, &updates["lora"]), (-0.25, &updates["s2ft"])]).unwrap();
    check("0.5 lora - 0.25 s2ft", "fused", with(&fused));

    // Modules that are trained whole: read, written again as the same folder, merged into a
    // checkpoint.
    let folder = tempfile::tempdir().unwrap();
    let (again, merged) = (folder.path().join("again"), folder.path().join("merged"));
    let mut model = base.clone();
    model.read_adapter(&root.join("saved")).unwrap();
    check("saved", "saved", run(&model));
    let trained = model.trainable_names();
    for name in
        ["layers.0.input_layernorm.weight", "layers.1.self_attn.o_proj.weight", "norm.weight"]
    {
        assert!(trained.contains(&format!("model.{name}")), "{trained:?}");
    }
    assert!(
        trained.contains(&"lm_head.weight".to_string()) && trained.len() == 5 + 2 + 8,
        "{trained:?}"
    );
    model.write_adapter_like(&again, Some(&root.join("saved"))).unwrap();
    let files = [root.join("saved"), again].map(|folder| {
        let file = TensorFile::open(folder.join("adapter_model.safetensors")).unwrap();
        let all = file
            .names()
            .map(|name| (name.to_string(), file.raw_tensor::<f64>(name, "test").unwrap()));
        (std::fs::read(folder.join("adapter_config.json")).unwrap(), all.collect::<Vec<_>>())
    });
    assert!(files[0] == files[1]);
    base.clone().with_folder(&root.join("saved")).unwrap().write(&merged).unwrap();
    check("saved, merged", "saved", run(&Model::read(&merged).unwrap()));
    let refusal = ModelUpdate::read(&root.join("saved"), &base).unwrap_err().to_string();
    assert!(refusal.contains("modules_to_save") && refusal.contains("adapter merge"), "{refusal}");
}
