//! Checkpoint and adapter folders: round trips, shards, half precisions, and every refusal.

use crate::common::*;
use ndarray::Array2;
use peft_limits::Error;
use peft_limits::check::compare::assert_close;
use peft_limits::linalg::Real;
use peft_limits::model::adapter_folder::AdapterKind;
use peft_limits::model::{AdapterPlan, MethodSpec, Model, Projection};
use peft_limits::tensor_file::{TensorFile, TensorWriter};
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

fn round_trip<T: Real>() {
    let folder = tempfile::tempdir().unwrap();
    let model: Model<T> = model(3);
    model.write(folder.path()).unwrap();
    let again: Model<T> = Model::read(folder.path()).unwrap();
    assert_eq!(logits(&again), logits(&model), "bit for bit in the same precision");
    assert_eq!(again.config, model.config);
}

#[test]
fn a_checkpoint_comes_back_bit_for_bit() {
    round_trip::<f64>();
    round_trip::<f32>();
}

/// Rewrites a checkpoint folder through `edit`, which sees every tensor.
fn rewrite(folder: &Path, mut edit: impl FnMut(&mut TensorWriter, &str, &[usize], Vec<f64>)) {
    let path = folder.join("model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let mut writer = TensorWriter::new();
    for name in file.names() {
        let (shape, values) = file.tensor::<f64>(name, "test").unwrap();
        edit(&mut writer, name, &shape, values);
    }
    writer.write(&path).unwrap();
}

#[test]
fn a_tied_head_that_differs_from_the_embedding_is_a_table_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/llama_full_mha_tied");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    let tied: Model<f64> = Model::read(folder.path()).unwrap();
    assert!(tied.is_tied());
    let with_head = |change: f64| {
        rewrite(folder.path(), |writer, name, shape, values| {
            if name == "model.embed_tokens.weight" {
                writer.tensor("lm_head.weight", shape, values.iter().map(|v| v + change));
            }
            if name != "lm_head.weight" {
                writer.tensor(name, shape, values);
            }
        });
        [Model::<f64>::read(folder.path()).unwrap(), Model::<f64>::open(folder.path()).unwrap()]
    };
    for again in with_head(0.0) {
        assert!(again.is_tied(), "a copy that is the same");
    }
    for again in with_head(0.25) {
        assert!(!again.is_tied() && !again.config.tie_word_embeddings);
    }
    // The head alone moved, by the same in every entry: every logit by a quarter of the sum of the
    // last hidden state.
    let [moved, _] = with_head(0.25);
    let (before, after) = (logits(&tied), logits(&moved));
    for (before, after) in before.rows().into_iter().zip(after.rows()) {
        let shift = after[0] - before[0];
        assert!(shift.abs() > 1e-6);
        assert!(
            (&after - &before).iter().all(|d| (d - shift).abs() < 1e-12),
            "a softmax does not see it"
        );
    }
}

#[test]
fn shards_are_read_through_their_index() {
    let folder = tempfile::tempdir().unwrap();
    let model: Model<f64> = model(3);
    model.write(folder.path()).unwrap();
    let file = TensorFile::open(folder.path().join("model.safetensors")).unwrap();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut writers = [TensorWriter::new(), TensorWriter::new()];
    let mut map = serde_json::Map::new();
    for (i, name) in file.names().enumerate() {
        let (shape, values) = file.tensor::<f64>(name, "test").unwrap();
        writers[i % 2].tensor(name, &shape, values);
        map.insert(name.into(), names[i % 2].into());
    }
    for (writer, name) in writers.iter().zip(names) {
        writer.write(&folder.path().join(name)).unwrap();
    }
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    let write_index = |map: &serde_json::Map<String, serde_json::Value>| {
        std::fs::write(&index, serde_json::json!({"weight_map": map}).to_string()).unwrap();
    };
    write_index(&map);
    assert_eq!(logits(&Model::<f64>::read(folder.path()).unwrap()), logits(&model));
    // An index that points to the wrong shard.
    let mut wrong = map.clone();
    wrong.insert(
        "model.norm.weight".into(),
        names[usize::from(map["model.norm.weight"] == names[0])].into(),
    );
    write_index(&wrong);
    match Model::<f64>::read(folder.path()) {
        Err(Error::MissingTensor { name, reason, .. }) => {
            assert!(name == "model.norm.weight" && reason.contains("index.json"), "{reason}");
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
    for absent in ["../elsewhere.safetensors", "gone.safetensors"] {
        wrong.insert("model.norm.weight".into(), absent.into());
        write_index(&wrong);
        let refused = Model::<f64>::read(folder.path()).map(|_| ()).unwrap_err().to_string();
        for fragment in ["index.json", "weight_map.model.norm.weight", absent] {
            assert!(refused.contains(fragment), "{refused}");
        }
    }
}

#[test]
fn half_precisions_are_widened_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let model: Model<f32> = model(3);
    model.write(folder.path()).unwrap();
    let path = folder.path().join("model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    for dtype in [Dtype::F16, Dtype::BF16] {
        let mut stored = Vec::new();
        for name in file.names() {
            let (shape, values) = file.tensor::<f32>(name, "test").unwrap();
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|&x| match dtype {
                    Dtype::F16 => half::f16::from_f32(x).to_le_bytes(),
                    _ => half::bf16::from_f32(x).to_le_bytes(),
                })
                .collect();
            stored.push((name.to_string(), shape, bytes));
        }
        let views = stored
            .iter()
            .map(|(n, s, b)| (n.as_str(), TensorView::new(dtype, s.clone(), b).unwrap()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let read: Model<f32> = Model::read(folder.path()).unwrap();
        for (got, want) in read.embedding.iter().zip(&model.embedding) {
            let rounded = if dtype == Dtype::F16 {
                half::f16::from_f32(*want).to_f32()
            } else {
                half::bf16::from_f32(*want).to_f32()
            };
            assert_eq!(got.to_bits(), rounded.to_bits());
        }
        assert_ne!(read.embedding, model.embedding);
    }
}

#[test]
fn broken_checkpoints_are_refused_with_file_and_tensor() {
    let broken = |edit: &dyn Fn(&Path)| -> String {
        let folder = tempfile::tempdir().unwrap();
        model::<f64>(3).write(folder.path()).unwrap();
        edit(folder.path());
        let message = Model::<f64>::read(folder.path()).unwrap_err().to_string();
        assert!(message.contains(&*folder.path().to_string_lossy()), "{message}");
        message
    };
    let name = "model.layers.1.mlp.up_proj.weight";
    let message = broken(&|folder| {
        rewrite(folder, |w, n, s, v| {
            let shape = if n == name { vec![s[1], s[0]] } else { s.to_vec() };
            w.tensor(n, &shape, v);
        })
    });
    assert!(
        message.contains(name) && message.contains("(34, 24)") && message.contains("(24, 34)"),
        "{message}"
    );
    let message = broken(&|folder| {
        rewrite(folder, |w, n, s, v| {
            if n != name {
                w.tensor(n, s, v);
            }
        })
    });
    assert!(message.contains(&format!("no tensor named {name}")), "{message}");
    let message = broken(&|folder| {
        rewrite(folder, |w, n, s, v| {
            w.tensor(n, s, v.clone());
            if n == name {
                w.tensor("model.layers.3.mlp.up_proj.weight", s, v);
            }
        })
    });
    assert!(
        message.contains("model.layers.3.mlp.up_proj.weight") && message.contains("unknown name"),
        "{message}"
    );
    let message = broken(&|folder| {
        rewrite(folder, |w, n, s, mut v| {
            if n == name {
                v[24] = f64::NAN;
            }
            w.tensor(n, s, v);
        })
    });
    assert!(message.contains(name) && message.contains("NaN at [1, 0]"), "{message}");
    let message = broken(&|folder| {
        let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
        std::fs::write(
            folder.join("config.json"),
            text.replace("\"num_attention_heads\": 6", "\"num_attention_heads\": 7"),
        )
        .unwrap();
    });
    assert!(
        message.contains("config.json") && message.contains("num_attention_heads"),
        "{message}"
    );
    let message = broken(&|folder| std::fs::remove_file(folder.join("model.safetensors")).unwrap());
    assert!(message.contains("model.safetensors"), "{message}");
}

/// Ranks and alphas by layer and projection survive the round trip through PEFT's patterns.
#[test]
fn patterns_of_rank_and_alpha_round_trip() {
    let mut adapted: Model<f64> = model(3);
    let spec = |rank, alpha| {
        MethodSpec::Lora(peft_limits::adapters::lora::LoraSpec { alpha, ..lora(rank) })
    };
    let plan = AdapterPlan::everywhere(&[Projection::Query, Projection::Down], spec(4, 8.0))
        .and(1..2, &[Projection::Down], spec(7, 3.0))
        .and(2..3, &[Projection::Key], spec(2, 8.0));
    adapted.attach(&plan, &mut rng(1)).unwrap();
    leave_the_start(&mut adapted);
    let folder = tempfile::tempdir().unwrap();
    adapted.write_adapter(folder.path()).unwrap();
    let mut again: Model<f64> = model(3);
    assert_eq!(again.read_adapter(folder.path()).unwrap(), AdapterKind::Lora);
    assert_eq!(logits(&again), logits(&adapted));
    let twice = again.read_adapter(folder.path()).unwrap_err().to_string();
    assert!(twice.contains("already adapted"), "{twice}");
}

#[test]
fn broken_adapters_are_refused_with_file_and_key() {
    let broken = |spec: MethodSpec, edit: &dyn Fn(&Path)| -> String {
        let folder = tempfile::tempdir().unwrap();
        let mut adapted: Model<f64> = model(3);
        adapted
            .attach(
                &AdapterPlan::everywhere(&[Projection::Query, Projection::Down], spec),
                &mut rng(1),
            )
            .unwrap();
        adapted.write_adapter(folder.path()).unwrap();
        edit(folder.path());
        model::<f64>(3).read_adapter(folder.path()).unwrap_err().to_string()
    };
    let replace = |from: &'static str, to: &'static str| {
        move |folder: &Path| {
            let path = folder.join("adapter_config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{text}");
            std::fs::write(&path, text.replace(from, to)).unwrap();
        }
    };
    let spec = MethodSpec::Lora(lora(5));
    let message = broken(spec, &replace("\"q_proj\"", "\"w_proj\""));
    assert!(message.contains("adapter_config.json") && message.contains("w_proj"), "{message}");
    let message = broken(spec, &replace("\"q_proj\"", "\"k_proj\""));
    assert!(message.contains("no tensor named") && message.contains("k_proj.lora_A"), "{message}");
    let message = broken(spec, &replace("\"q_proj\"", "\"down_proj\""));
    assert!(
        message.contains("q_proj.lora_A.weight") && message.contains("leave over"),
        "{message}"
    );
    let message = broken(spec, &replace("\"r\": 5", "\"r\": 4"));
    assert!(message.contains("shape (4, 24)") && message.contains("(5, 24)"), "{message}");
    let message = broken(spec, &replace("\"LORA\"", "\"IA3\""));
    assert!(message.contains("peft_type") && message.contains("IA3"), "{message}");
    let message = broken(spec, &replace("\"bias\": \"none\"", "\"bias\": \"some\""));
    assert!(message.contains("key bias"), "{message}");
    let message = broken(spec, &replace("\"bias\"", "\"use_qalora\": true, \"bias\""));
    assert!(message.contains("use_qalora") && message.contains("not implemented"), "{message}");
    let message = broken(spec, &replace("\"bias\"", "\"new_config\": {\"on\": 1}, \"bias\""));
    assert!(message.contains("key new_config") && message.contains("not known"), "{message}");
    let message =
        broken(spec, &replace("\"bias\"", "\"target_parameters\": [\"q_proj.weight\"], \"bias\""));
    assert!(
        message.contains("key target_parameters") && message.contains("no experts"),
        "{message}"
    );

    let paca =
        MethodSpec::Paca(peft_limits::adapters::paca::PacaSpec { rank: 3, ..Default::default() });
    for (index, expected) in [
        ([1.0, 1.0, 2.0], "appears twice"),
        ([0.0, 1.0, 24.0], "below 24"),
        ([0.5, 1.0, 2.0], "integers"),
    ] {
        let message = broken(paca, &|folder| {
            let path = folder.join("adapter_model.safetensors");
            let file = TensorFile::open(&path).unwrap();
            let mut writer = TensorWriter::new();
            for name in file.names() {
                let (shape, mut values) = file.tensor::<f64>(name, "test").unwrap();
                if name.ends_with("layers.1.self_attn.q_proj.paca_index") {
                    values = index.to_vec();
                }
                writer.tensor(name, &shape, values);
            }
            writer.write(&path).unwrap();
        });
        assert!(
            message.contains("layers.1.self_attn.q_proj") && message.contains(expected),
            "{message}"
        );
    }
    let mut mixed: Model<f64> = model(3);
    let plan =
        AdapterPlan::everywhere(&[Projection::Query], spec).and(0..1, &[Projection::Up], paca);
    mixed.attach(&plan, &mut rng(1)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let message = mixed.write_adapter(folder.path()).unwrap_err().to_string();
    assert!(message.contains("up_proj") && message.contains("one method"), "{message}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was written");
    // It still trains and exports as a whole checkpoint.
    mixed.write(folder.path()).unwrap();
    let whole: Model<f64> = Model::read(folder.path()).unwrap();
    assert_close("mixed", &logits(&whole).view(), &logits(&mixed).view(), 1e-13);
    let _: Array2<f64> = whole.embedding;
}

/// A checkpoint of Transformers in bitsandbytes' NF4 or int8 stays packed; written, it is dense and
/// computes the same.
#[test]
fn quantized_checkpoints_are_read_as_they_are() {
    for (name, share) in [("qlora-bf16", 0.15), ("qlora-f32-single", 0.16), ("int8-bf16", 0.31)] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data/quantized/clean")
            .join(name)
            .join("model");
        let model = Model::<f32>::read(&source).unwrap();
        let of_projections = || model.layers.iter().flat_map(|layer| layer.projections());
        let entries: usize = of_projections().map(|(_, p)| p.shape().0 * p.shape().1).sum();
        let bytes: usize = of_projections().map(|(_, p)| p.base.bytes()).sum();
        assert!(of_projections().all(|(_, p)| p.base.is_packed()), "{name}");
        assert!(
            (bytes as f64) < share * (4 * entries) as f64,
            "{name}: {bytes} bytes for {entries} entries"
        );
        let folder = tempfile::tempdir().unwrap();
        model.write(folder.path()).unwrap();
        let dense = Model::<f32>::read(folder.path()).unwrap();
        assert_eq!(logits(&dense), logits(&model), "{name}");

        // Parts that are missing or contradict each other are named.
        let copy = |config: &dyn Fn(String) -> String, without: &str, cut: &str| -> String {
            let folder = tempfile::tempdir().unwrap();
            let text = std::fs::read_to_string(source.join("config.json")).unwrap();
            std::fs::write(folder.path().join("config.json"), config(text)).unwrap();
            let file = TensorFile::open(source.join("model.safetensors")).unwrap();
            let mut writer = TensorWriter::new();
            for tensor in file.names().filter(|n| *n != without) {
                let (dtype, bytes) = file.bytes(tensor, "test").unwrap();
                let (mut shape, mut bytes) = (file.shape(tensor).unwrap().to_vec(), bytes.to_vec());
                if tensor == cut {
                    bytes.truncate(bytes.len() / shape[0] * (shape[0] - 1));
                    shape[0] -= 1;
                }
                writer.raw(tensor, dtype, &shape, bytes);
            }
            writer.write(&folder.path().join("model.safetensors")).unwrap();
            Model::<f32>::read(folder.path()).map(drop).unwrap_err().to_string()
        };
        let weight = "model.layers.1.mlp.up_proj.weight";
        let scales = if name == "int8-bf16" {
            "model.layers.1.mlp.up_proj.SCB".to_string()
        } else {
            format!("{weight}.absmax")
        };
        let text = copy(&|text| text, &scales, "");
        assert!(text.contains(&scales) && text.contains("bitsandbytes"), "{text}");
        let text = copy(&|text| text, "", &scales);
        assert!(text.contains(weight) && text.contains("scales"), "{text}");
        let text = copy(&|text| text, "", weight);
        assert!(text.contains(weight), "{text}");
        let text = copy(&|text| text.replace("quantization_config", "other"), "", "");
        assert!(
            text.contains("quantization_config") && text.contains("quantized weights"),
            "{text}"
        );
        let text = copy(&|text| text.replace("\"bitsandbytes\"", "\"gptq\""), "", "");
        assert!(text.contains("quant_method") && text.contains("gptq"), "{text}");
    }
}

/// A tensor's new name and number of rows; `None` leaves it out.
type Edit<'a> = &'a dyn Fn(&str) -> Option<(String, Option<usize>)>;

/// A folder with modules that are trained whole, damaged: errors that name what is wrong.
#[test]
fn saved_modules_that_do_not_fit_are_refused_by_name() {
    let base: Model<f64> = Model::read(Path::new("tests/data/llama_lora")).unwrap();
    let saved = Path::new("tests/data/adapters/saved");
    let refusal = |modules: &[&str], edit: Edit<'_>| {
        let folder = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(saved.join("adapter_config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["modules_to_save"] = serde_json::json!(modules);
        std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let file = TensorFile::open(saved.join("adapter_model.safetensors")).unwrap();
        let mut writer = TensorWriter::new();
        for name in file.names() {
            let (mut shape, mut values) = file.raw_tensor::<f64>(name, "test").unwrap();
            let Some((name, rows)) = edit(name) else { continue };
            if let Some(rows) = rows {
                values.truncate(values.len() / shape[0] * rows);
                shape[0] = rows;
            }
            writer.tensor(&name, &shape, values);
        }
        writer.write(&folder.path().join("adapter_model.safetensors")).unwrap();
        base.clone().read_adapter(folder.path()).unwrap_err().to_string()
    };
    let all = ["norm", "layers.1.self_attn.o_proj", "lm_head"];
    let says = |text: String, words: &[&str]| {
        assert!(words.iter().all(|word| text.contains(word)), "{text}")
    };
    let gone = |name: &str| (!name.contains("model.norm")).then(|| (name.to_string(), None));
    says(refusal(&all, &gone), &["adapter_model.safetensors", "model.norm.weight"]);
    let short = |name: &str| Some((name.to_string(), name.contains("model.norm").then_some(31)));
    says(refusal(&all, &short), &["model.norm.weight", "32 entries", "31"]);
    let narrow = |name: &str| Some((name.to_string(), name.contains("o_proj").then_some(8)));
    says(refusal(&all, &narrow), &["o_proj.weight", "(32, 32)", "(8, 32)"]);
    let same = |name: &str| Some((name.to_string(), None));
    says(refusal(&["norm", "lm_head"], &same), &["o_proj.weight", "leave over"]);
    let score = |name: &str| Some((name.replace("lm_head", "score"), None));
    says(
        refusal(&["norm", "layers.1.self_attn.o_proj", "score"], &score),
        &["modules_to_save", "score"],
    );
}
