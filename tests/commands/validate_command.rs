//! `peft-limits validate` through the built command: verdicts, exit codes, JSON, heat map,
//! refusals.

use ndarray::Array2;
use peft_limits::attention::{Request, exact::dense, file};
use peft_limits::tensor_file::{TensorFile, TensorWriter};
use peft_limits::validate::head::validate_head;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peft-limits"))
        .arg("validate")
        .args(arguments)
        .output()
        .unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_right_dump_passes_and_a_wrong_one_is_named() {
    let right = run(&[text(&data("dumps/clean/lora-autocast-bf16"))]);
    assert_eq!(right.status.code(), Some(0), "{}", stdout(&right));
    for part in ["bf16 over f32", "update             pass", "PASS"] {
        assert!(stdout(&right).contains(part), "{part}: {}", stdout(&right));
    }
    let folder = tempfile::tempdir().unwrap();
    let map = folder.path().join("shares");
    let wrong = data("dumps/faults/graph-cut");
    let verdict = run(&[text(&wrong), "--heat-map", text(&map)]);
    assert_eq!(verdict.status.code(), Some(1));
    for part in [
        "graph-cut: the gradient stops at the input of layer 1",
        "absent, though the parameter is trained",
    ] {
        assert!(stdout(&verdict).contains(part), "{part}: {}", stdout(&verdict));
    }
    let svg = std::fs::read_to_string(map.with_extension("svg")).unwrap();
    assert!(svg.contains("share of the tolerance") && map.with_extension("png").exists());
    let json = run(&[text(&wrong), "--json"]);
    assert_eq!(json.status.code(), Some(1));
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(value["diagnoses"][0]["fault"], "graph-cut");
    assert_eq!(value["rungs"][4]["status"], "fail");
    assert_eq!(value["rungs"][4]["tensors"].as_array().unwrap().len(), 28);
}

/// One page with the whole report, and a table of planted faults.
#[test]
fn a_report_is_a_page_and_a_dump_tests_itself() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("verdict.html");
    let wrong = data("dumps/faults/half-precision-rotary-backward");
    let verdict = run(&[text(&wrong), "--html", text(&page)]);
    assert_eq!(verdict.status.code(), Some(1));
    let html = std::fs::read_to_string(&page).unwrap();
    for part in ["FAIL", "rotary-backward-missing", "v_proj", "no padding", "2 layers", "</html>"] {
        assert!(html.to_lowercase().contains(&part.to_lowercase()), "{part}");
    }
    for outside in ["http:", "https:", "<script", "<link", "<img"] {
        assert!(!html.contains(outside), "{outside}");
    }
    let right = data("dumps/clean/lora-f32");
    let own = run(&[text(&right), "--selftest"]);
    assert_eq!(own.status.code(), Some(0), "{}", stdout(&own));
    assert!(
        stdout(&own).contains("rotary-backward-missing") && stdout(&own).contains("faults planted")
    );
    let json = run(&[text(&right), "--selftest", "--json"]);
    let planted: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(
        planted.as_array().unwrap().iter().any(|p| p["fault"] == "sign" && p["named"][0] == "sign")
    );
    let refused = run(&[text(&wrong), "--selftest"]);
    assert_eq!(refused.status.code(), Some(2));
}

/// Fixtures of another framework's double precision, without a manifest.
#[test]
fn model_adapter_and_reference_without_a_manifest() {
    for (name, adapter) in [
        ("llama_lora", true),
        ("llama_dora", true),
        ("llama_full", false),
        ("llama_full_mha_tied", false),
    ] {
        let folder = data(name);
        let (adapter_folder, reference) =
            (folder.join("adapter"), folder.join("reference.safetensors"));
        let mut arguments = vec!["--model", text(&folder), "--reference", text(&reference)];
        if adapter {
            arguments.extend(["--adapter", text(&adapter_folder)]);
        }
        let verdict = run(&arguments);
        assert_eq!(verdict.status.code(), Some(0), "{name}: {}", stdout(&verdict));
    }
    // The base model without its adapter is another model.
    let folder = data("llama_lora");
    let reference = folder.join("reference.safetensors");
    let verdict = run(&["--model", text(&folder), "--reference", text(&reference)]);
    assert_eq!(verdict.status.code(), Some(1), "{}", stdout(&verdict));
    assert!(
        stdout(&verdict).contains("the reference trains no such tensor"),
        "{}",
        stdout(&verdict)
    );
}

#[test]
fn bad_input_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str, change: &dyn Fn(&mut serde_json::Value)| -> PathBuf {
        let to = folder.path().join(name);
        std::fs::create_dir_all(&to).unwrap();
        let from = data("dumps/clean/lora-f32");
        let mut manifest: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(from.join("manifest.json")).unwrap())
                .unwrap();
        manifest["model"] = text(&data("dumps/models/f32")).into();
        manifest["adapter"] = text(&from.join("adapter")).into();
        change(&mut manifest);
        std::fs::write(to.join("manifest.json"), manifest.to_string()).unwrap();
        std::fs::copy(from.join("step.safetensors"), to.join("step.safetensors")).unwrap();
        to
    };
    let refused = |arguments: &[&str], parts: &[&str]| {
        let outcome = run(arguments);
        let stderr = String::from_utf8_lossy(&outcome.stderr).into_owned();
        assert_eq!(outcome.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        parts.iter().for_each(|part| {
            assert!(stderr.contains(part), "{arguments:?}: {stderr} lacks {part}")
        });
    };
    assert_eq!(run(&[text(&copy("fine", &|_| ()))]).status.code(), Some(0));
    refused(
        &[text(&copy("version", &|m| m["version"] = 2.into()))],
        &["manifest.json", "key version", "found 2"],
    );
    refused(
        &[text(&copy("format", &|m| m["format"] = "other".into()))],
        &["key format", "peft-limits-dump"],
    );
    refused(&[text(&copy("key", &|m| m["colour"] = 1.into()))], &["manifest.json", "colour"]);
    refused(
        &[text(&copy("dtype", &|m| m["compute"]["weights"] = "int4".into()))],
        &["compute.weights", "int4"],
    );
    refused(
        &[text(&copy("scale", &|m| m["loss"]["scale"] = 0.into()))],
        &["loss.scale", "positive"],
    );
    let rows = copy("rows", &|m| m["loss"]["micro_batch_rows"] = serde_json::json!([2, 2]));
    refused(&[text(&rows)], &["step.safetensors", "input_ids", "4 rows", "found 3"]);
    refused(&[text(&copy("model", &|m| m["model"] = "nowhere".into()))], &["nowhere/config.json"]);
    let cut = copy("cut", &|_| ());
    let bytes = std::fs::read(cut.join("step.safetensors")).unwrap();
    std::fs::write(cut.join("step.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    refused(&[text(&cut)], &["step.safetensors", "complete safetensors file"]);
    let dump = data("dumps/clean/lora-f32");
    refused(
        &[text(&dump), "--memory", "100kB"],
        &["models/f32", "f64 reference", "the limit is 97 KiB"],
    );
    let what = [
        "a dump: a folder with manifest.json and step.safetensors",
        "dump_step(model",
        "validate --help",
    ];
    let not_a_dump =
        |path: &Path, found: &str| refused(&[text(path)], &[&what[..], &[found]].concat());
    not_a_dump(folder.path(), "found a folder without manifest.json");
    not_a_dump(&folder.path().join("absent"), "found nothing of that name");
    not_a_dump(&data("dumps/models/f32"), "found a checkpoint folder (it goes to --model");
    not_a_dump(&data("dumps/clean/lora-f32/adapter"), "found an adapter folder");
    not_a_dump(&data("dumps/clean/lora-f32/step.safetensors"), "found a file");
    refused(&[text(&dump), "--memory", "24"], &["did you mean 24GiB?"]);
    // Refused before the reference is run.
    refused(
        &[text(&dump), "--heat-map", text(&dump.join("manifest.json/map"))],
        &["manifest.json"],
    );
    let deep = folder.path().join("deep");
    std::fs::create_dir_all(&deep).unwrap();
    let config = std::fs::read_to_string(data("dumps/models/f32/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["num_hidden_layers"] = 99_999_999.into();
    std::fs::write(deep.join("config.json"), config.to_string()).unwrap();
    let parts =
        ["deep/config.json", "key num_hidden_layers", "at most 1024 layers", "found 99999999"];
    refused(&[text(&copy("deep-dump", &|m| m["model"] = text(&deep).into()))], &parts);
    refused(&[], &["required"]);
    refused(&["--model", text(&dump)], &["--reference"]);
}

/// Heads: the fixtures' own gradients pass in double precision, the reference rounded to a half
/// format passes as such, faults are named.
#[test]
fn kernels_are_validated() {
    for name in ["small", "medium", "causal", "softmax_one", "large_logits"] {
        let path = data(&format!("attention_{name}.safetensors"));
        let outcome = run(&["--head", text(&path), "--reference", text(&path)]);
        assert_eq!(outcome.status.code(), Some(0), "{name}: {}", stdout(&outcome));
    }
    let folder = tempfile::tempdir().unwrap();
    let input = data("attention_causal.safetensors");
    let problem = file::read_problem::<f64>(&input).unwrap();
    let right = dense::gradients(&problem, Request::All).unwrap();
    let written = |edit: &dyn Fn(&str, &mut Array2<f64>)| {
        let path = folder.path().join("out.safetensors");
        let mut writer = TensorWriter::new();
        let mut output = right.output.clone();
        edit("O", &mut output);
        writer.matrix("O", output.view());
        for (name, g) in right.named() {
            let mut g = g.clone();
            edit(&name, &mut g);
            writer.matrix(&name, g.view());
        }
        writer.write(&path).unwrap();
        path
    };
    let verdict = |path: &Path| validate_head(&input, path, None).unwrap();
    assert!(verdict(&written(&|_, _| ())).passed);
    let named =
        |path: &Path| verdict(path).diagnoses.iter().map(|d| d.fault.clone()).collect::<Vec<_>>();
    let factor = written(&|name, g| {
        if name.starts_with("dA") || name.starts_with("dB") {
            *g *= 0.5;
        }
    });
    assert_eq!(named(&factor), ["constant-factor"]);
    // Other kernels: computed with the fault, by the crate's own dense routine on a changed
    // problem.
    use peft_limits::attention::problem::{AttentionProblem, Mask};
    let source = problem.source().clone();
    let leaky = AttentionProblem::new(
        source.clone(),
        problem.objective().clone(),
        Mask::Full,
        problem.softmax(),
        problem.beta(),
    );
    let leaky = dense::gradients(&leaky.unwrap(), Request::All).unwrap();
    let path = written(&|name, g| match leaky.named().into_iter().find(|(n, _)| n == name) {
        Some((_, other)) => *g = other.clone(),
        None => *g = leaky.output.clone(),
    });
    assert_eq!(named(&path), ["mask"]);
    let unscaled = AttentionProblem::new(
        source,
        problem.objective().clone(),
        problem.mask(),
        problem.softmax(),
        1.0,
    );
    let unscaled = dense::gradients(&unscaled.unwrap(), Request::All).unwrap();
    let path = written(&|name, g| match unscaled.named().into_iter().find(|(n, _)| n == name) {
        Some((_, other)) => *g = other.clone(),
        None => *g = unscaled.output.clone(),
    });
    assert_eq!(named(&path), ["attention-scale"]);
    // A backward that forgets the row sums of the softmax.
    let projected = problem.project(&mut Default::default()).qkv;
    let all = dense::matrices(&problem, &projected);
    let wrong = &all.P * &all.G.dot(&projected.value.t());
    let hidden = problem.hidden().unwrap();
    let (dq, dk) = (
        wrong.dot(&projected.key) * problem.beta(),
        wrong.t().dot(&projected.query) * problem.beta(),
    );
    let path = written(&|name, g| {
        let (dp, p, x) = match name.chars().last() {
            Some('Q') => (&dq, &hidden.projections.query, &hidden.inputs.query),
            Some('K') => (&dk, &hidden.projections.key, &hidden.inputs.key),
            _ => return,
        };
        let weight = x.t().dot(dp);
        let adapter = p.adapter.as_ref().unwrap();
        *g = match &name[..2] {
            "dA" => adapter.lora_b.t().dot(&weight) * hidden.scaling,
            "dB" => weight.dot(&adapter.lora_a.t()) * hidden.scaling,
            _ => weight,
        };
    });
    assert_eq!(named(&path), ["softmax-backward"]);
    let outcome = run(&["--head", text(&input), "--reference", text(&path)]);
    assert_eq!(outcome.status.code(), Some(1));
    assert!(stdout(&outcome).contains("lacks the row sum"), "{}", stdout(&outcome));
    let outcome = run(&[
        "--head",
        text(&input),
        "--reference",
        text(&data("dumps/models/f32/model.safetensors")),
    ]);
    assert_eq!(outcome.status.code(), Some(2));
    assert!(TensorFile::open(&input).is_ok());
}
