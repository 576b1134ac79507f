//! Hostile files: every reader, given mutated valid files and random bytes, returns a value or a
//! typed error. It never panics, and its peak of allocated bytes stays below `FACTOR` times the
//! bytes of the file plus a constant.
//!
//! `PROPTEST_CASES=20000 cargo test --test hostile_files` is the long run (the default is 256 files
//! per reader).

mod common;

use common::*;
use peak_alloc::PeakAlloc;
use peft_limits::attention::file::problem_from;
use peft_limits::model::update::{KEPT, ModelUpdate, switch_off_on_disk};
use peft_limits::model::{Model, ModelConfig};
use peft_limits::tensor_file::TensorFile;
use peft_limits::train::config::TrainConfig;
use peft_limits::train::tasks::jsonl::parse_line;
use peft_limits::train::tokenizer::Tokenizer;
use peft_limits::train::trainer::Trainer;
use peft_limits::train::{checkpoint, method::MethodName};
use peft_limits::validate::dump::{Case, DumpPaths, PlainSettings};
use peft_limits::validate::memory::plan;
use peft_limits::validate::reference::Variant;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Allocated bytes per byte of the file under test. A JSON value of two characters (`0,`) becomes a
/// 32-byte `Value`, in a vector that may have doubled and still hold its old half.
const FACTOR: usize = 64;
/// Allocated bytes whatever the file: messages, parsers' tables, the small models that adapters go
/// onto.
const CONSTANT: usize = 1 << 20;

/// One test at a time: what one prepares would be counted in another's measurement.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What may happen to a valid file.
#[derive(Debug, Clone)]
enum Mutation {
    /// Flip one bit.
    Flip(prop::sample::Index, u8),
    /// Drop the end.
    Truncate(prop::sample::Index),
    /// Replace the n-th number of the text part by another token.
    Number(prop::sample::Index, usize),
    /// Replace the n-th value of the JSON text by another, remove it, or put a copy of another in
    /// its place.
    Value(prop::sample::Index, prop::sample::Index),
    /// Insert text.
    Insert(prop::sample::Index, usize),
    /// Remove a stretch.
    Remove(prop::sample::Index, u8),
    /// Overwrite the first eight bytes: a safetensors header length.
    HeaderLength(u64),
    /// Make the header length fit its text again, so that later checks are reached.
    Repair,
}

const TOKENS: [&str; 18] = [
    "1e400",
    "-1",
    "NaN",
    "18446744073709551615",
    "9223372036854775807",
    "4294967296",
    "1099511627775",
    "0",
    "-0.0",
    "null",
    "[]",
    "{}",
    "\"x\"",
    "1e18",
    "0.5",
    "true",
    "1e-320",
    "16777216",
];

const SNIPPETS: [&str; 8] =
    ["\u{0}", "{", "]", "\"", ",", "é", "__metadata__", "\n[train]\nsteps = 1e99\n"];

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        3 => (at(), 0u8..8).prop_map(|(i, bit)| Mutation::Flip(i, bit)),
        1 => at().prop_map(Mutation::Truncate),
        6 => (at(), 0..TOKENS.len()).prop_map(|(i, t)| Mutation::Number(i, t)),
        4 => (at(), at()).prop_map(|(i, j)| Mutation::Value(i, j)),
        1 => (at(), 0..SNIPPETS.len()).prop_map(|(i, s)| Mutation::Insert(i, s)),
        1 => (at(), any::<u8>()).prop_map(|(i, n)| Mutation::Remove(i, n)),
        1 => prop_oneof![any::<u64>(), 0u64..200_000_000].prop_map(Mutation::HeaderLength),
        3 => Just(Mutation::Repair),
    ]
}

/// (start, end) of the text part: a safetensors header, or the whole file.
fn text_part(bytes: &[u8]) -> (usize, usize) {
    match bytes.get(8) {
        Some(b'{') => (8, 8 + bytes[8..].iter().take_while(|b| matches!(b, 0x20..=0x7e)).count()),
        _ => (0, bytes.len()),
    }
}

fn numbers(bytes: &[u8]) -> Vec<(usize, usize)> {
    let (start, end) = text_part(bytes);
    let mut all: Vec<(usize, usize)> = Vec::new();
    for i in start..end {
        if bytes[i].is_ascii_digit() {
            match all.last_mut() {
                Some(last) if last.1 == i => last.1 = i + 1,
                _ => all.push((i, i + 1)),
            }
        }
    }
    all
}

/// Paths of all values of a document, at most 40 entries of a list.
fn paths(value: &Value, here: String, all: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                paths(inner, format!("{here}/{}", key.replace('~', "~0").replace('/', "~1")), all);
            }
        }
        Value::Array(list) => {
            for (i, inner) in list.iter().enumerate().take(40) {
                paths(inner, format!("{here}/{i}"), all);
            }
        }
        _ => {}
    }
    all.push(here);
}

/// What a value may become: other types, sizes that overflow, names of formats, patterns that go
/// back on themselves.
fn nasty_values() -> Vec<Value> {
    let numbers = [0i64, -1, 1, 3, 99_999_999, 1 << 31, 1 << 53, i64::MAX].map(Value::from);
    let floats = [0.5, -0.0, 1e18, 1e308, 1e-320].map(Value::from);
    let texts =
        ["", "x", "0", "F16", "I64", "BF16", "U8", "(", "(a+)+$", "(.*)*.*x", "../..", "\u{0}"]
            .map(Value::from);
    let mut all: Vec<Value> = numbers.into_iter().chain(floats).chain(texts).collect();
    all.extend([
        json!(u64::MAX),
        json!(null),
        json!(true),
        json!([]),
        json!({}),
        json!([[]]),
        json!([1, 2]),
        json!(vec![0; 300]),
    ]);
    all.extend([
        json!({"a": 1}),
        json!("a".repeat(10_000)),
        json!([1u64 << 32, 1u64 << 32]),
        json!([u64::MAX]),
    ]);
    all
}

fn mutate_value(text: &str, at: &prop::sample::Index, by: &prop::sample::Index) -> Option<String> {
    let mut document: Value = serde_json::from_str(text.trim_end()).ok()?;
    let mut all = Vec::new();
    paths(&document, String::new(), &mut all);
    let path = &all[at.index(all.len())];
    let values = nasty_values();
    match by.index(values.len() + all.len()) {
        chosen if chosen < values.len() => *document.pointer_mut(path)? = values[chosen].clone(),
        chosen => {
            let other = &all[chosen - values.len()];
            if other == path {
                let (parent, key) = path.rsplit_once('/')?;
                document.pointer_mut(parent)?.as_object_mut()?.remove(key);
            } else {
                *document.pointer_mut(path)? = document.pointer(other)?.clone();
            }
        }
    }
    Some(document.to_string())
}

fn mutate(mut bytes: Vec<u8>, mutations: &[Mutation]) -> Vec<u8> {
    for mutation in mutations {
        if bytes.is_empty() {
            break;
        }
        match mutation {
            Mutation::Flip(i, bit) => {
                let i = i.index(bytes.len());
                bytes[i] ^= 1 << bit;
            }
            Mutation::Truncate(i) => bytes.truncate(i.index(bytes.len())),
            Mutation::Number(i, token) => {
                let all = numbers(&bytes);
                if !all.is_empty() {
                    let (a, b) = all[i.index(all.len())];
                    bytes.splice(a..b, TOKENS[*token].bytes());
                }
            }
            Mutation::Value(i, j) => {
                let (start, end) = text_part(&bytes);
                let text = String::from_utf8_lossy(&bytes[start..end]).into_owned();
                if let Some(text) = mutate_value(&text, i, j) {
                    bytes.splice(start..end, text.bytes());
                    if start == 8 {
                        bytes[..8].copy_from_slice(&(text.len() as u64).to_le_bytes());
                    }
                }
            }
            Mutation::Insert(i, snippet) => {
                let i = i.index(bytes.len());
                bytes.splice(i..i, SNIPPETS[*snippet].bytes());
            }
            Mutation::Remove(i, n) => {
                let i = i.index(bytes.len());
                let end = (i + *n as usize).min(bytes.len());
                bytes.drain(i..end);
            }
            Mutation::HeaderLength(n) => {
                let n = n.to_le_bytes();
                let end = bytes.len().min(8);
                bytes[..end].copy_from_slice(&n[..end]);
            }
            Mutation::Repair => {
                if let (8, end) = text_part(&bytes) {
                    bytes[..8].copy_from_slice(&(end as u64 - 8).to_le_bytes());
                }
            }
        }
    }
    bytes
}

/// Runs a reader on mutations of a valid file and on random bytes; returns how many files it
/// accepted.
fn attack(name: &str, valid: &[u8], read: impl FnMut(&[u8]) -> peft_limits::Result<()>) -> usize {
    attack_beside(name, valid, CONSTANT, read)
}

/// As [`attack`], of a reader that holds `constant` bytes whatever the file is.
fn attack_beside(
    name: &str,
    valid: &[u8],
    constant: usize,
    mut read: impl FnMut(&[u8]) -> peft_limits::Result<()>,
) -> usize {
    // A library's panic that a reader turns into an error is no failure; resolving a backtrace
    // would be measured.
    std::panic::set_hook(Box::new(|info| eprintln!("{info}")));
    read(valid).unwrap_or_else(|e| panic!("{name}: the valid file is refused: {e}"));
    let mut measured = |bytes: &[u8]| {
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let outcome = read(bytes);
        let peak = ALLOCATOR.peak_usage().saturating_sub(before);
        let limit = FACTOR * bytes.len() + constant;
        assert!(
            peak <= limit,
            "{name}: {peak} bytes allocated for a file of {} (limit {limit})",
            bytes.len()
        );
        if let Err(error) = &outcome {
            assert!(!error.to_string().is_empty());
        }
        outcome.is_ok()
    };
    let files = prop_oneof![
        8 => prop::collection::vec(mutation(), 1..5).prop_map(|m| mutate(valid.to_vec(), &m)),
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ];
    let accepted = std::cell::Cell::new(0usize);
    let measured = std::cell::RefCell::new(&mut measured);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&files, |bytes| {
            accepted.set(accepted.get() + usize::from(measured.borrow_mut()(&bytes)));
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    // Every number of the text part (of long ones, a spread) replaced by every token.
    let places = numbers(valid);
    for (a, b) in places.iter().step_by(places.len().div_ceil(60).max(1)) {
        for token in TOKENS {
            let mut bytes = valid.to_vec();
            bytes.splice(*a..*b, token.bytes());
            measured.borrow_mut()(&mutate(bytes, &[Mutation::Repair]));
        }
    }
    // Nesting far beyond any parser's stack.
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
        for text in [deep.clone(), format!("x = {deep}"), format!("{{\"r\": {deep}}}")] {
            measured.borrow_mut()(text.as_bytes());
            let mut file = (text.len() as u64).to_le_bytes().to_vec();
            file.extend_from_slice(text.as_bytes());
            measured.borrow_mut()(&file);
        }
    }
    println!("{name}: {} accepted", accepted.get());
    accepted.get()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn tensor_files_and_attention_heads() {
    let _alone = alone();
    let valid = std::fs::read("tests/data/attention_small.safetensors").unwrap();
    attack("tensor file", &valid, |bytes| {
        let file = TensorFile::from_bytes("a.safetensors", bytes.to_vec())?;
        for name in file.names() {
            let _ = file.tensor::<f32>(name, "test");
            let _ = file.matrix::<f64>(name, "test");
            let _ = file.vector::<f64>(name, "test");
        }
        Ok(())
    });
    attack("attention head", &valid, |bytes| {
        problem_from::<f32>(&TensorFile::from_bytes("a.safetensors", bytes.to_vec())?).map(drop)
    });
}

#[test]
fn configurations() {
    let _alone = alone();
    let valid = config().to_json("float32");
    attack("config.json", valid.as_bytes(), |bytes| {
        let config = ModelConfig::from_json(Path::new("config.json"), &text(bytes))?;
        // Sizes that are accepted can be computed with.
        config.parameters();
        Ok(())
    });
    let valid = "seed = 1\n[model]\npreset = \"nano\"\n[method]\nname = \"full\"\n[optimizer]\nlr \
                 = 1e-3\n[schedule]\nwarmup = 50\n[train]\nsteps = 100\nbatch = 4\nlength = \
                 64\ntarget_loss = 0.5\n[[data]]\ntask = \"lists\"\nweight = 2.0\nlength = \
                 5\n[[data]]\ntask = \"arithmetic\"\ndigits = 3\n";
    attack("train TOML", valid.as_bytes(), |bytes| {
        TrainConfig::from_toml("c.toml", &text(bytes)).map(drop)
    });
    let line = r#"{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], "id": 17}"#;
    attack("jsonl line", line.as_bytes(), |bytes| {
        let wrong = |b: peft_limits::train::tasks::jsonl::BadLine| {
            peft_limits::Error::format("x", b.field, b.expected, b.found)
        };
        parse_line(&text(bytes)).map(drop).map_err(wrong)
    });
}

/// A reader of a folder, attacked through one of its files.
fn attack_file(
    name: &str,
    folder: &Path,
    file: &str,
    mut read: impl FnMut(&Path) -> peft_limits::Result<()>,
) {
    let path = folder.join(file);
    let valid = std::fs::read(&path).unwrap();
    // A pattern of modules takes some 400 bytes a character, up to a limit of its own.
    let constant = if file.ends_with("adapter_config.json") { 24 << 20 } else { CONSTANT };
    attack_beside(name, &valid, constant, |bytes| {
        std::fs::write(&path, bytes).unwrap();
        read(folder)
    });
    std::fs::write(&path, valid).unwrap();
}

#[test]
fn checkpoint_folders() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    model::<f32>(3).write(root).unwrap();
    let read = |folder: &Path| Model::<f32>::read(folder).map(drop);
    attack_file("config.json of a checkpoint", root, "config.json", read);
    attack_file("model.safetensors", root, "model.safetensors", read);
    std::fs::rename(root.join("model.safetensors"), root.join("a.safetensors")).unwrap();
    let file = TensorFile::open(root.join("a.safetensors")).unwrap();
    let map: serde_json::Map<_, _> =
        file.names().map(|n| (n.to_string(), "a.safetensors".into())).collect();
    let index = "model.safetensors.index.json";
    std::fs::write(
        root.join(index),
        serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string(),
    )
    .unwrap();
    attack_file("safetensors index", root, index, read);
    for name in ["qlora-bf16", "int8-f32"] {
        for file in ["config.json", "model.safetensors"] {
            let source = format!("tests/data/quantized/clean/{name}/model/{file}");
            std::fs::copy(source, root.join(file)).unwrap();
        }
        attack_file(&format!("model.safetensors of {name}"), root, "model.safetensors", read);
    }
}

#[test]
fn adapter_folders() {
    let _alone = alone();
    let base = model::<f32>(3);
    for (name, mut adapted) in
        every_method::<f32>().into_iter().filter(|(n, _)| ["dora", "paca", "s2ft"].contains(n))
    {
        leave_the_start(&mut adapted);
        let folder = tempfile::tempdir().unwrap();
        adapted.write_adapter(folder.path()).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            attack_file(&format!("{name} {file}"), folder.path(), file, |folder| {
                base.clone().read_adapter(folder).map(drop)
            });
        }
        let update = ModelUpdate::of_adapters(&adapted).unwrap();
        update.write(folder.path(), &base.config, None).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let read = |folder: &Path| ModelUpdate::read(folder, &base).map(drop);
            attack_file(&format!("{name} update {file}"), folder.path(), file, read);
        }
    }
}

#[test]
fn kept_slices() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let (root, adapter) = (folder.path().join("model"), folder.path().join("adapter"));
    model::<f32>(3).write(&root).unwrap();
    let (_, mut adapted) = every_method::<f32>().into_iter().find(|(n, _)| *n == "paca").unwrap();
    leave_the_start(&mut adapted);
    ModelUpdate::of_adapters(&adapted).unwrap().write(&adapter, &adapted.config, None).unwrap();
    peft_limits::model::update::switch_on_on_disk(&root, &adapter).unwrap();
    attack_file("kept slices", &root, KEPT, |root| switch_off_on_disk(root).map(drop));
}

#[cfg(feature = "hf-tokenizer")]
#[test]
fn tokenizers() {
    let _alone = alone();
    let json = r###"{"version": "1.0", "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": [{"id": 5, "content": "<s>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true}], "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, "merges": [["a", "b"], ["ab", "c"]]}}"###;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
    let config = r#"{"eos_token_id": [7, 8], "bos_token_id": 6, "pad_token_id": 3}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let read = |folder: &Path| {
        let tokenizer = Tokenizer::of_model(folder, 9)?;
        tokenizer.decode(&tokenizer.encode("abcab")?).map(drop)
    };
    attack_file("tokenizer.json", folder.path(), "tokenizer.json", read);
    attack_file("config.json of a tokenizer", folder.path(), "config.json", read);
}

#[test]
fn training_checkpoints() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    let sizes = ModelConfig {
        vocab_size: 259,
        hidden_size: 8,
        intermediate_size: 10,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        ..config()
    };
    Model::<f32>::random(sizes, &mut rng(1)).unwrap().write(&base).unwrap();
    for method in [MethodName::Lora, MethodName::Paca] {
        let text = format!(
            "[model]\npath = {:?}\n[method]\nname = {:?}\nrank = 2\n[train]\nsteps = 9\nbatch = \
             1\n[[data]]\ntask = \"lists\"\n",
            base.display().to_string(),
            method.name()
        );
        let config = TrainConfig::from_toml("run.toml", &text).unwrap();
        let mut trainer = Trainer::<f32>::new(config.clone()).unwrap();
        trainer.step().unwrap();
        let run = folder.path().join(method.name());
        let saved = checkpoint::save(&trainer, &run).unwrap();
        for file in ["state.safetensors", "config.toml"] {
            attack_file(&format!("{} {file}", method.name()), &saved, file, |_| {
                let mut trainer = Trainer::<f32>::new(config.clone())?;
                checkpoint::resume(&mut trainer, &run).map(drop)
            });
        }
    }
}

/// A recorded step, read and run once; what the model, the batch and a step hold stays small.
#[test]
fn recorded_steps() {
    let _alone = alone();
    for family in ["llama_packed", "gpt_oss", "dora_embed"] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families").join(family);
        let dump = family_dump(&source, false, false).unwrap();
        let root = dump.path();
        let manifest = std::fs::read_to_string(root.join("manifest.json")).unwrap();
        for part in [
            "config.json",
            "model.safetensors",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        ] {
            let copy = root.join("model").join(part);
            std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
            std::fs::copy(source.join(part), copy).unwrap();
        }
        let mut manifest: Value = serde_json::from_str(&manifest).unwrap();
        manifest["model"] = json!("model");
        manifest["adapter"] = json!("model/adapter");
        manifest["optimizer"] = json!({"kind": "adamw", "steps_before": 1, "groups": [{"lr": 1e-3, "betas": [0.9, 0.999]}]});
        manifest["loss"] =
            json!({"reduction": "mean", "micro_batch_rows": [], "scale": 1.0, "divisor": null});
        std::fs::write(root.join("manifest.json"), manifest.to_string()).unwrap();
        let files = [
            "manifest.json",
            "step.safetensors",
            "model/config.json",
            "model/model.safetensors",
            "model/adapter/adapter_config.json",
            "model/adapter/adapter_model.safetensors",
        ];
        for file in files {
            let path = root.join(file);
            let valid = std::fs::read(&path).unwrap();
            attack_beside(&format!("{family} {file}"), &valid, 64 << 20, |bytes| {
                std::fs::write(&path, bytes).unwrap();
                let (paths, manifest) = DumpPaths::of_folder(root)?;
                plan(&paths, Some(&manifest), 1 << 30)?;
                let case =
                    Case::read("mutated", &paths, Some(&manifest), &PlainSettings::default())?;
                case.run(&Variant::default()).map(drop)
            });
            std::fs::write(&path, valid).unwrap();
        }
    }
}

/// What an experiment draws its figures from again.
#[cfg(feature = "cli")]
#[test]
fn tables_of_experiments() {
    use peft_limits::report::{Manifest, Table};
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut manifest = Manifest::start("bounds", "quick");
    manifest.config = json!({"seed": 0, "points": [{"tokens": 64, "c": 0.1}]});
    manifest.write(folder.path()).unwrap();
    let table =
        "tokens,c,features,error\n64,0.1,\"taylor:degree=4,check=off\",1e-3\n128,0.2,nystrom,NaN\n";
    std::fs::write(folder.path().join("table.csv"), table).unwrap();
    attack_file("manifest of an experiment", folder.path(), "manifest.json", |folder| {
        Manifest::read(folder).map(drop)
    });
    attack_file("table of an experiment", folder.path(), "table.csv", |folder| {
        let table = Table::read_csv(&folder.join("table.csv"))?;
        table.to_text(5);
        table.summarise(&["tokens"], "error").map(drop)
    });
}
