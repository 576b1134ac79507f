//! The `peft-limits` binary itself: outputs, exit codes, and what it says about bad input.
use peft_limits::check::compare::assert_close;
use peft_limits::tensor_file::{TensorFile, TensorWriter};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn peft_limits(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peft-limits")).args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Exit code 2, the fragments on stderr, no panic, and no output file.
fn refused(arguments: &[&str], output: &Path, fragments: &[&str]) {
    let outcome = peft_limits(arguments);
    let stderr = String::from_utf8_lossy(&outcome.stderr);
    assert_eq!(outcome.status.code(), Some(2), "{arguments:?}: {stderr}");
    for fragment in fragments {
        assert!(stderr.contains(fragment), "{arguments:?}: {stderr:?} lacks {fragment:?}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(!output.exists(), "{arguments:?} left an output file");
    let leftovers = std::fs::read_dir(output.parent().unwrap()).unwrap().flatten();
    assert!(
        !leftovers.into_iter().any(|f| f.file_name().to_string_lossy().starts_with(".writing")),
        "half a file"
    );
}

#[test]
fn gradients_written_by_every_method_match_the_fixture() {
    let folder = tempfile::tempdir().unwrap();
    for case in ["small", "medium", "causal", "softmax_one"] {
        let input = data(&format!("attention_{case}.safetensors"));
        let reference = TensorFile::open(&input).unwrap();
        let full_rank = format!("truncated-svd:rank={}", reference.shape("X").unwrap()[0]);
        let methods: [(&[&str], f64); 4] = [
            (&["--method", "dense"], 1e-12),
            (&["--method", "streaming"], 1e-10),
            (&["--dtype", "f32"], 1e-5),
            (&["--method", "chained", "--features", &full_rank], 1e-9),
        ];
        for (method, tolerance) in methods {
            let output = folder.path().join("out.safetensors");
            let mut arguments = vec!["gradient", text(&input), "-o", text(&output)];
            arguments.extend_from_slice(method);
            let outcome = peft_limits(&arguments);
            assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
            let got = TensorFile::open(&output).unwrap();
            for name in ["O", "dWQ", "dWK", "dWV", "dAQ", "dAK", "dAV", "dBQ", "dBK", "dBV"] {
                let ours = got.matrix::<f64>(name, "written").unwrap();
                let want = reference.matrix::<f64>(name, "reference").unwrap();
                assert_close(
                    &format!("{case} {method:?} {name}"),
                    &ours.view(),
                    &want.view(),
                    tolerance,
                );
            }
            let (ours, want) = (
                got.vector::<f64>("loss", "written").unwrap()[0],
                reference.vector::<f64>("loss", "reference").unwrap()[0],
            );
            assert!((ours / want - 1.0).abs() < tolerance);
            std::fs::remove_file(&output).unwrap();
        }
    }
}

/// A file with Q, K, V in place of X and W gives dQ, dK, dV.
#[test]
fn projected_files_give_projected_gradients() {
    use peft_limits::attention::{Qkv, Request, exact::dense, file};
    let folder = tempfile::tempdir().unwrap();
    let problem = file::read_problem::<f64>(&data("attention_causal.safetensors")).unwrap();
    let Qkv { query, key, value } = problem.project(&mut Default::default()).qkv;
    let expected = dense::gradients(&problem, Request::All).unwrap();
    let input = folder.path().join("qkv.safetensors");
    let mut writer = TensorWriter::new();
    writer.matrix("Q", query.view()).matrix("K", key.view()).matrix("V", value.view());
    writer.matrix("Y", problem.objective().tensor().view());
    writer.metadata("beta", problem.beta()).metadata("causal", "True");
    writer.write(&input).unwrap();
    let output = folder.path().join("out.safetensors");
    assert!(peft_limits(&["gradient", text(&input), "-o", text(&output)]).status.success());
    let got = TensorFile::open(&output).unwrap();
    assert_eq!(got.names().collect::<Vec<_>>(), ["O", "dK", "dQ", "dV", "loss"]);
    for (letter, want) in expected.projected.named() {
        let ours = got.matrix::<f64>(&format!("d{letter}"), "written").unwrap();
        assert_close(&format!("d{letter}"), &ours.view(), &want.as_ref().unwrap().view(), 1e-10);
    }
    assert!(peft_limits(&["probe", text(&input)]).status.success());
}

/// Shape and entries put in a tensor's place; None leaves the tensor out.
type Replacement = Option<(Vec<usize>, Vec<f64>)>;

#[test]
fn bad_input_is_refused_with_exit_code_2_and_no_output() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let good = data("attention_small.safetensors");
    let bad = folder.path().join("bad.safetensors");
    let run = |fragments: &[&str]| {
        refused(&["gradient", text(&bad), "-o", text(&output)], &output, fragments);
        refused(&["probe", text(&bad)], &output, fragments);
    };
    let file = TensorFile::open(&good).unwrap();
    // The good file with one tensor replaced (None: left out) and metadata changed.
    let write = |replace: &[(&str, Replacement)], metadata: &[(&str, Option<&str>)]| {
        let mut writer = TensorWriter::new();
        for name in ["X", "WQ", "WK", "WV", "AQ", "BQ", "AK", "BK", "AV", "BV", "Y"] {
            match replace.iter().find(|(n, _)| *n == name) {
                Some((_, None)) => {}
                Some((_, Some((shape, values)))) => {
                    writer.tensor(name, shape, values.iter().copied());
                }
                None => {
                    let (shape, values) = file.tensor::<f64>(name, "good").unwrap();
                    writer.tensor(name, &shape, values);
                }
            }
        }
        for (key, value) in [("alpha", "3.0"), ("beta", "0.4"), ("r", "2")] {
            let value = metadata.iter().find(|(k, _)| *k == key).map_or(Some(value), |(_, v)| *v);
            if let Some(value) = value {
                writer.metadata(key, value);
            }
        }
        writer.write(&bad).unwrap();
    };

    std::fs::write(&bad, &std::fs::read(&good).unwrap()[..500]).unwrap();
    run(&["bad.safetensors", "complete safetensors file", "500 bytes"]);
    write(&[("WK", None)], &[]);
    run(&["bad.safetensors", "no tensor named WK"]);
    write(&[("WQ", Some((vec![4, 5], vec![0.5; 20])))], &[]);
    run(&["bad.safetensors", "WQ", "(5, 5)", "(4, 5)"]);
    write(
        &[("AQ", Some((vec![0, 5], vec![]))), ("BQ", Some((vec![5, 0], vec![])))],
        &[("r", Some("0"))],
    );
    run(&["bad.safetensors", "r"]);
    let wide = |shape: [usize; 2]| Some((shape.to_vec(), vec![0.1; shape[0] * shape[1]]));
    let letters = [
        ("AQ", [6, 5]),
        ("BQ", [5, 6]),
        ("AK", [6, 5]),
        ("BK", [5, 6]),
        ("AV", [6, 5]),
        ("BV", [5, 6]),
    ];
    write(&letters.map(|(n, s)| (n, wide(s))), &[("r", Some("6"))]);
    run(&["bad.safetensors", "between 1 and 5", "6"]);
    write(
        &[(
            "X",
            Some((vec![12, 5], (0..60).map(|i| if i == 17 { f64::NAN } else { 0.1 }).collect())),
        )],
        &[],
    );
    run(&["bad.safetensors", "tensor X", "NaN", "[3, 2]"]);
    write(&[("Y", Some((vec![12, 5], vec![f64::INFINITY; 60])))], &[]);
    run(&["bad.safetensors", "tensor Y", "inf"]);
    write(&[], &[("alpha", None)]);
    run(&["bad.safetensors", "metadata alpha", "nothing"]);
    write(&[("X", Some((vec![0, 5], vec![]))), ("Y", Some((vec![0, 5], vec![])))], &[]);
    run(&["bad.safetensors", "at least 1"]);
    let missing = folder.path().join("none.safetensors");
    refused(
        &["gradient", text(&missing), "-o", text(&output)],
        &output,
        &["none.safetensors", "No such file"],
    );

    // One token is no special case.
    let one = |n: usize| Some((vec![1, 5], vec![0.1 * n as f64; 5]));
    write(&[("X", one(1)), ("Y", one(2))], &[]);
    let outcome = peft_limits(&["gradient", text(&bad), "-o", text(&output)]);
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    std::fs::remove_file(&output).unwrap();
}

#[test]
fn bad_usage_is_refused_with_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let good = data("attention_small.safetensors");
    let with = |extra: &[&str], fragments: &[&str]| {
        let mut arguments = vec!["gradient", text(&good), "-o", text(&output)];
        arguments.extend_from_slice(extra);
        refused(&arguments, &output, fragments);
    };
    with(&["--method", "dense", "--dtype", "f32"], &["f64"]);
    with(&["--method", "chained"], &["--features"]);
    with(&["--features", "taylor:degree=2"], &["--method chained"]);
    with(&["--method", "chained", "--features", "taylor:degre=2"], &["degree is missing"]);
    with(&["--method", "chained", "--features", "chebyshev:degree=3,b=0.1"], &["logits reach"]);
    with(&["--method", "sideways"], &["sideways"]);
    refused(&["gradient", text(&good)], &output, &["--output"]);
    let nowhere = Path::new("/proc/no-such-folder/out.safetensors");
    let outcome = peft_limits(&["gradient", text(&good), "-o", text(nowhere)]);
    assert_eq!(outcome.status.code(), Some(2));
    let copy = folder.path().join("head.safetensors");
    std::fs::copy(&good, &copy).unwrap();
    let kept = std::fs::read(&copy).unwrap();
    let round = folder.path().join("./head.safetensors");
    refused(&["gradient", text(&copy), "-o", text(&round)], &output, &["--output", "is the input"]);
    assert_eq!(std::fs::read(&copy).unwrap(), kept);
    refused(
        &["gradient", text(&good), "-o", text(folder.path())],
        &output,
        &["--output", "folder"],
    );
}

/// Token ids or masks under a head's names are no numbers to take gradients of.
#[test]
fn integers_are_no_head() {
    use safetensors::tensor::Dtype;
    let folder = tempfile::tempdir().unwrap();
    let (path, output) =
        (folder.path().join("ids.safetensors"), folder.path().join("out.safetensors"));
    let good = TensorFile::open(data("attention_small.safetensors")).unwrap();
    let shape = good.shape("X").unwrap().to_vec();
    for (dtype, width) in [(Dtype::I64, 8), (Dtype::I32, 4), (Dtype::U8, 1)] {
        let mut writer = TensorWriter::new();
        for name in good.names() {
            let (dtype, bytes) = good.bytes(name, "copied").unwrap();
            writer.raw(name, dtype, good.shape(name).unwrap(), bytes.to_vec());
        }
        writer
            .metadata("alpha", good.metadata("alpha").unwrap())
            .metadata("beta", good.metadata("beta").unwrap());
        writer.raw("X", dtype, &shape, vec![1; shape.iter().product::<usize>() * width]);
        writer.write(&path).unwrap();
        let found = format!("found {dtype:?}");
        let parts = ["ids.safetensors", "tensor X", "expected real numbers", &found];
        refused(&["gradient", text(&path), "-o", text(&output)], &output, &parts);
        refused(&["probe", text(&path)], &output, &parts);
        match peft_limits::attention::file::read_problem::<f64>(&path) {
            Err(peft_limits::Error::Format { field, found, .. }) => {
                assert_eq!((field, found), ("tensor X".to_string(), format!("{dtype:?}")))
            }
            other => panic!("{:?}", other.map(drop)),
        }
    }
}

#[test]
fn a_device_that_no_command_has_is_refused_with_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let good = data("attention_small.safetensors");
    let gradient = |extra: &[&str], fragments: &[&str]| {
        let mut arguments = vec!["gradient", text(&good), "-o", text(&output)];
        arguments.extend_from_slice(extra);
        refused(&arguments, &output, fragments);
    };
    gradient(&["--device", "tpu"], &["tpu", "cpu, gpu, gpu:N, cuda or cuda:N"]);
    gradient(&["--device", "gpu", "--method", "dense"], &["dense", "--device cpu"]);
    gradient(&["--device", "gpu", "--dtype", "f64"], &["f64", "f32"]);
    gradient(&["--products", "bf16"], &["--products", "bf16", "--device gpu"]);
    gradient(&["--device", "gpu", "--products", "int8"], &["int8", "f32, tf32, bf16 or f16"]);
    refused(
        &["probe", text(&good), "--products", "f16"],
        &output,
        &["--products", "f16", "--device gpu"],
    );
    refused(&["probe", text(&good), "--device", "gpu:x"], &output, &["gpu:x"]);
}

#[cfg(not(feature = "gpu"))]
#[test]
fn without_the_feature_a_gpu_is_refused_with_the_build_that_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let good = data("attention_small.safetensors");
    for (device, name, build) in [
        ("gpu", "gpu:0", "--features gpu"),
        ("gpu:2", "gpu:2", "--features gpu"),
        ("cuda:1", "cuda:1", "--features cuda"),
    ] {
        let fragments = [name, "built without it", build];
        refused(
            &["gradient", text(&good), "-o", text(&output), "--device", device],
            &output,
            &fragments,
        );
        refused(&["probe", text(&good), "--device", device], &output, &fragments);
    }
    let outcome = peft_limits(&["devices"]);
    assert!(outcome.status.success());
    let said = String::from_utf8_lossy(&outcome.stdout).into_owned();
    assert!(said.contains("--features gpu") && said.contains("--features cuda"), "{said}");
}

#[test]
fn probe_as_json_holds_the_norms_and_every_method() {
    let head = data("heads/minilm_l0_h7.safetensors");
    let outcome = peft_limits(&[
        "probe",
        text(&head),
        "--json",
        "--features",
        "taylor:degree=2",
        "--features",
        "truncated-svd:rank=64",
    ]);
    assert!(outcome.status.success());
    let value: serde_json::Value = serde_json::from_slice(&outcome.stdout).unwrap();
    let number = |key: &str| value[key].as_f64().unwrap();
    assert!(
        number("largest_logit") <= number("norm_bound")
            && number("norm_bound") <= number("gamma").powi(2)
    );
    assert!((number("ratio") - number("gamma") / 512f64.ln().sqrt()).abs() < 1e-12);
    let methods = value["methods"].as_array().unwrap();
    assert_eq!(methods.len(), 2);
    assert_eq!(methods[0]["rank"], 561);
    assert!(methods[1]["gradient_error"].as_f64().unwrap() < 0.1);
    assert_eq!(value["eps_rank"]["probabilities"].as_array().unwrap().len(), 3);
}

/// The exponent of a trained head over its beginnings: printed, drawn, in the JSON.
#[test]
fn probe_plots_the_cost_over_prefixes() {
    let folder = tempfile::tempdir().unwrap();
    let head = data("heads/minilm_l0_h7.safetensors");
    let at = |name: &str| folder.path().join(name);
    let arguments = ["probe", text(&head), "--features", "taylor:degree=1", "--plot"];
    let probe =
        |file: &Path, more: &[&str]| peft_limits(&[&arguments[..], &[text(file)], more].concat());
    let told = |outcome: Output| {
        assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
        String::from_utf8(outcome.stdout).unwrap()
    };
    let table = told(probe(&at("cost.png"), &[]));
    assert!(table.contains("cost exponent") && table.contains("truncated SVD"), "{table}");
    assert!(
        std::fs::read(at("cost.png")).unwrap().starts_with(b"\x89PNG") && !at("cost.svg").exists()
    );
    let json: serde_json::Value =
        serde_json::from_str(&told(probe(&at("cost.svg"), &["--json"]))).unwrap();
    assert!(std::fs::read_to_string(at("cost.svg")).unwrap().contains("<svg"));
    let fits = json["prefixes"].as_array().unwrap();
    assert_eq!(fits.len(), 6);
    for fit in fits {
        let (slope, points) =
            (fit["exponent"].as_f64().unwrap(), fit["points"].as_array().unwrap());
        assert!(points.len() == 5 && points[4]["tokens"] == 512, "{fit}");
        assert!(
            fit["interval"][0].as_f64().unwrap() <= slope
                && slope <= fit["interval"][1].as_f64().unwrap()
        );
    }
    let pdf = at("cost.pdf");
    refused(&[&arguments[..], &[text(&pdf)]].concat(), &pdf, &["--plot", ".svg or .png"]);
    let outcome = probe(&head.join("cost.png"), &[]);
    assert_eq!(
        (outcome.status.code(), outcome.stdout.len()),
        (Some(2), 0),
        "refused before anything is printed"
    );
}

/// The object that scripts read, against a copy of the reference numbers.
#[test]
fn phase_as_json_holds_exponents_and_ranks() {
    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&succeeds(arguments)).unwrap()
    };
    let path = data("phase_diagram.json");
    let reference: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let found = json(&["phase", "--law", "sign", "--kappa", "1", "--c", "0.25,0.5", "--json"]);
    assert_eq!(found.as_object().unwrap().keys().collect::<Vec<_>>(), ["exponents", "finite"]);
    assert_eq!(found["finite"], serde_json::json!([]));
    let rows = reference["exponents"].as_array().unwrap();
    for ours in found["exponents"].as_array().unwrap() {
        let theirs = rows
            .iter()
            .find(|r| r["law"] == "sign" && r["kappa"] == 1.0 && r["c"] == ours["c"])
            .unwrap();
        for (key, value) in ours.as_object().unwrap() {
            match (value.as_f64(), theirs[key].as_f64()) {
                (Some(a), Some(b)) => assert!((a - b).abs() < 1e-6, "{key}: {a} {b}"),
                (a, b) => assert_eq!(a, b, "{key}"),
            }
        }
    }
    // Null where the reference has it: no rank of signs reaches 1/L at c = 0.5.
    assert!(found["exponents"][1]["rank_error_1_over_L"].is_null());
    let found = json(&["phase", "--c", "1", "--length", "2^20", "--eps", "0.1", "--json"]);
    let finite = &found["finite"][0];
    let theirs = reference["finite"].as_array().unwrap();
    let theirs =
        theirs.iter().find(|r| r["L"] == finite["L"] && r["c"] == 1.0 && r["eps"] == 0.1).unwrap();
    assert_eq!(finite["d"], theirs["d"]);
    assert!((finite["k"].as_f64().unwrap() / theirs["k"].as_f64().unwrap() - 1.0).abs() < 1e-6);
}

#[test]
fn phase_reads_laws_draws_and_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let (law, plot) = (folder.path().join("law.txt"), folder.path().join("phases.svg"));
    std::fs::write(&law, "1 -1\n").unwrap();
    let sampled =
        succeeds(&["phase", "--law", text(&law), "--c", "0.7,2", "--json", "--plot", text(&plot)]);
    let number = |text: &str, key: &str| {
        serde_json::from_str::<serde_json::Value>(text).unwrap()["exponents"][0][key]
            .as_f64()
            .unwrap()
    };
    let sign = succeeds(&["phase", "--law", "sign", "--c", "0.7,2", "--json"]);
    for key in ["rank", "support", "certified"] {
        assert!((number(&sampled, key) - number(&sign, key)).abs() < 1e-12, "{key}");
    }
    assert!(std::fs::read_to_string(&plot).unwrap().contains("best rank"));
    assert!(succeeds(&["phase"]).contains("condenses on O(1) keys"));
    std::fs::write(&law, "1 -1\n0.5 two\n").unwrap();
    let other = folder.path().join("other.svg");
    for (arguments, fragments) in [
        (vec!["phase", "--law", text(&law)], vec!["law.txt", "line 2", "two"]),
        (vec!["phase", "--law", "gaussian"], vec!["gaussian"]),
        (vec!["phase", "--c", "0"], vec!["c = 0", "positive"]),
        (vec!["phase", "--c", "1e3"], vec!["c = 1000", "at most"]),
        (vec!["phase", "--kappa", "nan"], vec!["kappa"]),
        (vec!["phase", "--length", "1"], vec!["from 2"]),
        (vec!["phase", "--length", "512", "--eps", "1"], vec!["eps = 1"]),
        (vec!["phase", "--plot", "a.pdf"], vec!["--plot"]),
    ] {
        refused(&arguments, &other, &fragments);
    }
}

#[test]
fn help_shows_examples() {
    let commands = ["gradient", "probe", "memory", "train", "validate", "adapter", "completions"];
    let adapter = ["export", "fuse", "switch", "evaluate"];
    let pages = commands.iter().map(|c| vec![*c]).chain(adapter.iter().map(|c| vec!["adapter", c]));
    for mut page in pages {
        let example = format!("  peft-limits {}", page.join(" "));
        page.push("--help");
        let help = succeeds(&page);
        assert!(help.contains("Example") && help.contains(&example), "{page:?}: {help}");
        // What an example reads from the repository is there.
        for word in help
            .split_whitespace()
            .filter(|w| w.starts_with("tests/data/") || w.starts_with("examples/"))
        {
            assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(word).exists(), "{page:?}: {word}");
        }
    }
    for page in ["gradient", "probe"] {
        assert!(succeeds(&[page, "--help"]).contains("truncated-svd:rank=K"));
    }
}

#[test]
fn completions_of_every_shell_know_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = succeeds(&["completions", shell]);
        for word in ["peft-limits", "gradient", "validate", "evaluate", "heat-map"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    assert_eq!(peft_limits(&["completions", "tcsh"]).status.code(), Some(2));
}

fn succeeds(arguments: &[&str]) -> String {
    let outcome = peft_limits(arguments);
    assert!(
        outcome.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&outcome.stderr)
    );
    String::from_utf8(outcome.stdout).unwrap()
}

/// Pretrain, fine-tune, export in every way, fuse, switch, serve: the whole life of an adapter.
#[test]
fn adapters_are_exported_fused_switched_and_served() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let sizes = r#"{"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}"#;
    std::fs::write(at("sizes.json"), sizes).unwrap();
    let train = |text: String, out: &str| {
        std::fs::write(at("run.toml"), text).unwrap();
        succeeds(&["train", &at("run.toml"), "-o", &at(out)]);
    };
    let data = "[train]\nsteps = 3\nbatch = 2\neval_rows = 0\n[[data]]\ntask = \"lists\"\n";
    train(format!("[model]\nconfig = {:?}\n{data}", at("sizes.json")), "base");
    let base = at("base/model");
    for (method, more) in [
        ("s2ft", "ratios = { o_proj = 0.5, down_proj = 0.2 }"),
        ("paca", "rank = 3"),
        ("lora", "rank = 2"),
    ] {
        let text = format!("[model]\npath = {base:?}\n[method]\nname = {method:?}\n{more}\n{data}");
        train(text, method);
        for (source, path) in [("--adapter", "adapter"), ("--trained", "model"), ("--run", "")] {
            let out = at(&format!("{method}{source}"));
            succeeds(&[
                "adapter",
                "export",
                "--model",
                &base,
                source,
                &at(&format!("{method}/{path}")),
                "-o",
                &out,
            ]);
        }
        // Three ways to the same update (a merged LoRA model gives a dense one).
        let read = |source: &str| {
            TensorFile::open(at(&format!("{method}{source}/adapter_model.safetensors"))).unwrap()
        };
        let (adapter, run) = (read("--adapter"), read("--run"));
        for name in adapter.names() {
            assert_eq!(
                adapter.bytes(name, "test").unwrap(),
                run.bytes(name, "test").unwrap(),
                "{method} {name}"
            );
        }
        if method != "lora" {
            let trained = read("--trained");
            for name in trained.names().filter(|name| name.ends_with("slice_delta")) {
                assert_eq!(
                    trained.bytes(name, "test").unwrap(),
                    adapter.bytes(name, "test").unwrap(),
                    "{method} {name}"
                );
            }
        }
    }
    let parts = [format!("{}=0.5", at("s2ft--adapter")), format!("{}=-1", at("lora/adapter"))];
    let told =
        succeeds(&["adapter", "fuse", "--model", &base, &parts[0], &parts[1], "-o", &at("fused")]);
    assert!(told.contains("low-rank"), "{told}");
    let config = std::fs::read_to_string(at("fused/adapter_config.json")).unwrap();
    assert!(config.contains("\"LORA\""), "{config}");
    let weights = Path::new(&base).join("model.safetensors");
    let before = std::fs::read(&weights).unwrap();
    succeeds(&["adapter", "switch", "--model", &base, &at("s2ft--run")]);
    let with = std::fs::read(&weights).unwrap();
    assert_ne!(with, before);
    succeeds(&["adapter", "switch", "--model", &base, &at("fused")]);
    assert_ne!(std::fs::read(&weights).unwrap(), with);
    succeeds(&["adapter", "switch", "--model", &base, "--off"]);
    assert_eq!(std::fs::read(&weights).unwrap(), before);
    let table = succeeds(&[
        "adapter",
        "evaluate",
        "--model",
        &base,
        &at("s2ft/adapter"),
        &at("fused"),
        "--task",
        "lists",
        "--rows",
        "4",
    ]);
    assert_eq!(table.lines().count(), 1 + 2 * 3, "{table}");
    let none = folder.path().join("none");
    // Refusals come before anything is printed, written or switched.
    let unknown =
        peft_limits(&["adapter", "evaluate", "--model", &base, &at("fused"), "--task", "prose"]);
    assert_eq!((unknown.status.code(), unknown.stdout.len()), (Some(2), 0));
    for out in [&base, &at("fused")] {
        let outcome = peft_limits(&["adapter", "fuse", "--model", &base, &at("fused"), "-o", out]);
        assert_eq!(outcome.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&outcome.stderr).contains("--out"), "{outcome:?}");
    }
    succeeds(&["adapter", "switch", "--model", &base, &at("fused")]);
    let switched = std::fs::read(&weights).unwrap();
    let outcome = peft_limits(&["adapter", "switch", "--model", &base, &at("nowhere")]);
    assert_eq!((outcome.status.code(), outcome.stdout.len()), (Some(2), 0));
    assert_eq!(std::fs::read(&weights).unwrap(), switched, "the adapter in effect stays");
    succeeds(&["adapter", "switch", "--model", &base, "--off"]);
    refused(
        &["adapter", "export", "--model", &base, "--trained", &base, "-o", text(&none)],
        &none,
        &["equal to the base"],
    );
    refused(
        &["adapter", "fuse", "--model", &base, &at("nowhere"), "-o", text(&none)],
        &none,
        &["nowhere/adapter_config.json"],
    );
}
