//! Steps of several processes (tests/data/ranks, made by torch.distributed): right ones pass, each
//! fault between the processes is named, folders that do not fit each other are refused by name.

use super::folders_in;
use peft_limits::tensor_file::{TensorFile, TensorWriter};
use peft_limits::validate::dump::{Case, DumpPaths, PlainSettings};
use peft_limits::validate::ranks::{Ranks, is_of_ranks, validate_ranks};
use peft_limits::validate::{Report, Silent};
use peft_limits::{Error, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/ranks")
}

fn judge(folder: &Path) -> Result<Report> {
    assert!(is_of_ranks(folder), "{}", folder.display());
    let read = |paths: &_, manifest: &_| {
        Case::read("ranks", paths, Some(manifest), &PlainSettings::default())
    };
    validate_ranks(&Ranks::read(folder)?, &read, &Silent)
}

#[test]
fn right_steps_of_several_processes_pass() {
    let all = folders_in(&root().join("clean"));
    assert!(all.len() >= 12, "{}", all.len());
    for path in all {
        let report = judge(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let shares: Vec<f64> = report.rungs.iter().map(|r| r.share()).collect();
        assert!(
            report.passed && report.diagnoses.is_empty(),
            "{name}: {shares:?} {:?}",
            report.diagnoses
        );
        assert!(shares.iter().all(|s| *s < 0.8), "{name}: {shares:?}");
        let checked = report.rungs.iter().filter(|r| !r.tensors.is_empty()).count();
        assert!(checked >= 4, "{name}: {checked} rungs");
        let ranks: Vec<usize> = report.ranks.iter().map(|r| r.rank).collect();
        assert_eq!(ranks, (0..Ranks::read(&path).unwrap().size()).collect::<Vec<_>>(), "{name}");
        assert!(report.ranks.iter().all(|r| r.wrong == 0), "{name}: {:?}", report.ranks);
        // Parts of some tensors on every rank of FullyShardedDataParallel; some part everywhere.
        assert!(report.ranks.iter().all(|r| r.tensors > 0), "{name}: {:?}", report.ranks);
        // What is the same on all ranks is judged once.
        assert_eq!(Ranks::read(&path).unwrap().views().unwrap().views.len(), 1, "{name}");
    }
    let global = judge(&root().join("clean/ddp-global-f32")).unwrap();
    assert!(
        global.rungs[0].problems[0].contains("tokens of all ranks, as recorded"),
        "{:?}",
        global.rungs[0].problems
    );
}

#[test]
fn faults_between_processes_are_named() {
    let all = folders_in(&root().join("faults"));
    assert!(all.len() >= 10, "{}", all.len());
    for path in all {
        let report = judge(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let fault = ["-f32", "-bf16", "-replicas"]
            .iter()
            .fold(name, |name, end| name.strip_suffix(end).unwrap_or(name));
        let named: Vec<&str> = report.diagnoses.iter().map(|d| d.fault.as_str()).collect();
        assert!(!report.passed && named == [fault], "{name}: {:#?}", report.diagnoses);
        let first = &report.diagnoses[0];
        assert!(
            first.complete && first.what.contains("rank") && !first.fix.is_empty(),
            "{name}: {first:?}"
        );
    }
}

/// One process's folder is not a step.
#[test]
fn a_part_alone_is_refused() {
    let (paths, manifest) = DumpPaths::of_folder(&root().join("clean/ddp-f32/rank-0")).unwrap();
    let refused = Case::read("part", &paths, Some(&manifest), &PlainSettings::default())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("rank 0 of 2") && refused.contains("folder above"), "{refused}");
}

/// Parts put together are the whole: the base of a model that three processes divide is the
/// checkpoint that they read.
#[test]
fn parts_are_put_together() {
    let views = Ranks::read(&root().join("clean/fsdp-base-f32")).unwrap().views().unwrap();
    let merged = TensorFile::open(views.views[0].paths.model.join("model.safetensors")).unwrap();
    let whole = root().join("../dumps/models/f32/model.safetensors");
    let whole = TensorFile::open(whole).unwrap();
    let names: Vec<&str> = whole.names().collect();
    assert_eq!(merged.names().collect::<Vec<_>>(), names);
    for name in names {
        assert_eq!(merged.shape(name), whole.shape(name), "{name}");
        assert_eq!(
            merged.bytes(name, "test").unwrap(),
            whole.bytes(name, "test").unwrap(),
            "{name}"
        );
    }
}

/// A copy of a dump that may be changed.
fn copy(name: &str) -> (tempfile::TempDir, PathBuf) {
    fn folder(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let (path, to) = {
                let e = entry.unwrap();
                (e.path(), to.join(e.file_name()))
            };
            if path.is_dir() {
                folder(&path, &to)
            } else {
                std::fs::copy(&path, &to).map(drop).unwrap()
            }
        }
    }
    let temporary = tempfile::tempdir().unwrap();
    let to = temporary.path().join("dump");
    folder(&root().join(name), &to);
    // The base model is beside the repository's other dumps.
    for rank in 0..Ranks::read(&root().join(name)).unwrap().size() {
        change(&to, rank, |manifest| {
            if manifest["model"].as_str() != Some("model") {
                manifest["model"] = json!(root().join("../dumps/models/f32"));
            }
        });
    }
    (temporary, to)
}

fn change(dump: &Path, rank: usize, edit: impl Fn(&mut Value)) {
    let path = dump.join(format!("rank-{rank}/manifest.json"));
    let mut manifest: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut manifest);
    std::fs::write(&path, manifest.to_string()).unwrap();
}

/// Changes bytes and shape of one tensor of a file.
fn change_tensor(path: &Path, name: &str, edit: impl Fn(&mut Vec<usize>, &mut Vec<u8>)) {
    let file = TensorFile::open(path).unwrap();
    let mut writer = TensorWriter::new();
    for own in file.names() {
        let (dtype, bytes) = file.bytes(own, "test").unwrap();
        let (mut shape, mut bytes) = (file.shape(own).unwrap().to_vec(), bytes.into_owned());
        if own == name {
            edit(&mut shape, &mut bytes);
        }
        writer.raw(own, dtype, &shape, bytes);
    }
    writer.write(path).unwrap();
}

fn first_gradient(dump: &Path, rank: usize) -> (PathBuf, String) {
    let path = dump.join(format!("rank-{rank}/step.safetensors"));
    let name = TensorFile::open(&path)
        .unwrap()
        .names()
        .find(|n| n.starts_with("grad."))
        .unwrap()
        .to_string();
    (path, name)
}

#[test]
fn folders_that_do_not_fit_are_refused_by_name() {
    type Break = fn(&Path);
    let cases: [(&str, Break, &[&str]); 14] = [
        (
            "clean/ddp-f32",
            |d| std::fs::remove_dir_all(d.join("rank-1")).unwrap(),
            &["rank-1", "nothing of that name"],
        ),
        (
            "clean/ddp-f32",
            |d| std::fs::remove_dir_all(d.join("rank-0")).unwrap(),
            &["rank-0", "nothing of that name"],
        ),
        (
            "clean/ddp-f32",
            |d| std::fs::rename(d.join("rank-1"), d.join("rank-1.writing")).unwrap(),
            &["rank-1.writing", "did not finish"],
        ),
        (
            "clean/ddp-f32",
            |d| {
                std::fs::remove_dir_all(d.join("rank-1")).unwrap();
                std::fs::write(d.join("rank-1.failed"), "ValueError: no input_ids").unwrap();
            },
            &["rank-1", "no input_ids"],
        ),
        (
            "clean/ddp-f32",
            |d| change(d, 1, |m| m["parallel"]["world_size"] = json!(3)),
            &["rank-1", "world_size", "2", "3"],
        ),
        (
            "clean/ddp-f32",
            |d| change(d, 0, |m| m["parallel"]["world_size"] = json!(1)),
            &["rank-1", "1, as rank 0 counts"],
        ),
        (
            "clean/ddp-f32",
            |d| change(d, 1, |m| m["parallel"]["rank"] = json!(0)),
            &["rank-1", "parallel.rank", "found 0"],
        ),
        (
            "clean/ddp-f32",
            |d| change(d, 1, |m| m["optimizer"]["steps_before"] = json!(5)),
            &["rank-1", "optimizer.steps_before", "0, as in rank 0", "5"],
        ),
        (
            "clean/ddp-f32",
            |d| change(d, 1, |m| drop(m["trained"].as_array_mut().unwrap().pop())),
            &["rank-1", "key trained"],
        ),
        (
            "clean/ddp-f32",
            |d| {
                let path = d.join("rank-1/adapter/adapter_config.json");
                let text = std::fs::read_to_string(&path).unwrap().replace("\"r\": 2", "\"r\": 3");
                std::fs::write(&path, text).unwrap();
            },
            &["rank-1", "adapter_config.json", "rank 0"],
        ),
        (
            "clean/fsdp-f32",
            |d| {
                let (path, name) = first_gradient(d, 1);
                change_tensor(&path, &name, |shape, bytes| {
                    shape[0] += 1;
                    let row = bytes.len() / (shape[0] - 1);
                    bytes.extend(vec![0; row]);
                });
            },
            &["rank-1/step.safetensors", "tensor grad.", "those of its part"],
        ),
        (
            "clean/fsdp-f32",
            |d| {
                change(d, 1, |m| {
                    let shards = m["parallel"]["shards"].as_object_mut().unwrap();
                    let factors = shards.iter_mut().filter(|(name, _)| name.contains("lora_B"));
                    factors.for_each(|(_, part)| part["offset"][0] = json!(1));
                })
            },
            &["rank-1/step.safetensors", "a second time", "do not overlap"],
        ),
        (
            "clean/fsdp-f32",
            |d| {
                for rank in 0..2 {
                    change(d, rank, |m| {
                        let shards = m["parallel"]["shards"].as_object_mut().unwrap();
                        shards.values_mut().for_each(|part| {
                            part["shape"][0] = json!(part["shape"][0].as_u64().unwrap() + 1);
                        });
                    });
                }
            },
            &["entries", "in all ranks' parts together", "rank 0: ", "rank 1: "],
        ),
        (
            "clean/fsdp-f32",
            |d| {
                change(d, 1, |m| {
                    let shards = m["parallel"]["shards"].as_object_mut().unwrap();
                    shards.values_mut().for_each(|part| part["size"][0] = json!(1000));
                })
            },
            &["rank-1", "parallel.shards", "a part inside the tensor"],
        ),
    ];
    for (name, damage, words) in cases {
        let (_folder, dump) = copy(name);
        damage(&dump);
        match judge(&dump) {
            Err(error @ Error::Format { .. }) => {
                let text = error.to_string();
                assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
            }
            other => panic!("{words:?}: {:?}", other.map(|r| r.passed)),
        }
    }
    let (_folder, dump) = copy("clean/ddp-f32");
    let path = dump.join("rank-1/step.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(judge(&dump).unwrap_err().to_string().contains("rank-1/step.safetensors"));
}

/// The loss divided otherwise than declared is named, also where logits of padding are recorded.
#[test]
fn the_other_divisor_is_named() {
    let (_folder, dump) = copy("clean/ddp-global-f32");
    (0..2).for_each(|rank| change(&dump, rank, |m| m["parallel"]["loss"] = json!("rank_mean")));
    let report = judge(&dump).unwrap();
    let named: Vec<&str> = report.diagnoses.iter().map(|d| d.fault.as_str()).collect();
    assert!(!report.passed && named == ["global-mean"], "{:?}", report.diagnoses);
    // Undeclared and without the gradient of the logits, what explains the step is taken to be
    // meant.
    (0..2).for_each(|rank| {
        change(&dump, rank, |m| m["parallel"]["loss"] = Value::Null);
        let path = dump.join(format!("rank-{rank}/step.safetensors"));
        let file = TensorFile::open(&path).unwrap();
        let mut writer = TensorWriter::new();
        for name in file.names().filter(|name| !["dlogits", "dfinal"].contains(name)) {
            let (dtype, bytes) = file.bytes(name, "test").unwrap();
            writer.raw(name, dtype, file.shape(name).unwrap(), bytes.into_owned());
        }
        writer.write(&path).unwrap();
    });
    let report = judge(&dump).unwrap();
    let layout = &report.rungs[0].problems[0];
    assert!(
        report.passed && layout.contains("tokens of all ranks, as recorded"),
        "{layout} {:?}",
        report.diagnoses
    );
}

/// One process's gradients are disturbed in a way that no fault makes: it fails, by name, and
/// nothing is named for it.
#[test]
fn an_unknown_fault_of_one_process_is_not_given_a_name() {
    let (_folder, dump) = copy("clean/ddp-f32");
    let (path, name) = first_gradient(&dump, 1);
    change_tensor(&path, &name, |_, bytes| {
        for (i, x) in bytes.chunks_mut(4).enumerate() {
            let value = f32::from_le_bytes(x.try_into().unwrap()) * (1.0 + 0.3 * (i as f32).sin());
            x.copy_from_slice(&value.to_le_bytes());
        }
    });
    let report = judge(&dump).unwrap();
    assert!(
        !report.passed && report.diagnoses.iter().all(|d| !d.complete),
        "{:?}",
        report.diagnoses
    );
    let wrong: Vec<(usize, usize)> = report.ranks.iter().map(|r| (r.rank, r.wrong)).collect();
    assert_eq!(wrong, [(0, 0), (1, 1)]);
}
