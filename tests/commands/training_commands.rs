//! `peft-limits train` and `peft-limits memory` through the binary: outputs, resuming, exit codes,
//! bad input, failing saves.
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn peft_limits(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peft-limits")).args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn stderr(outcome: &Output) -> String {
    String::from_utf8_lossy(&outcome.stderr).into_owned()
}

fn stdout(outcome: &Output) -> String {
    String::from_utf8_lossy(&outcome.stdout).into_owned()
}

const TINY: &str = r#"{"vocab_size": 259, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "rms_norm_eps": 1e-5}"#;

/// A folder with `tiny.json` and a `run.toml` that trains it for six steps.
fn workspace(extra: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tiny.json"), TINY).unwrap();
    let run = folder.path().join("run.toml");
    let base = format!(
        "[model]\nconfig = \"{}\"\n[train]\nsteps = 6\nbatch = 5\nlength = 64\neval_rows = \
         4\nsave_every = 2\n[[data]]\ntask = \"lists\"\n",
        text(&folder.path().join("tiny.json"))
    );
    std::fs::write(&run, format!("{extra}\n{base}")).unwrap();
    (folder, run)
}

fn train(run: &Path, out: &Path, more: &[&str]) -> Output {
    let mut arguments = vec!["train", text(run), "-o", text(out)];
    arguments.extend_from_slice(more);
    peft_limits(&arguments)
}

fn succeeded(outcome: &Output) {
    assert!(outcome.status.success(), "{}", stderr(outcome));
}

/// Exit code 2, the fragments on stderr, no panic, no checkpoint.
fn refused(outcome: &Output, out: &Path, fragments: &[&str]) {
    let message = stderr(outcome);
    assert_eq!(outcome.status.code(), Some(2), "{message}");
    for fragment in fragments {
        assert!(message.contains(fragment), "{message:?} lacks {fragment:?}");
    }
    assert!(!message.contains("panicked"), "{message}");
    assert!(checkpoints(out).is_empty(), "a refused run left a checkpoint");
}

fn checkpoints(out: &Path) -> Vec<String> {
    let entries =
        std::fs::read_dir(out).map(|all| all.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let mut names: Vec<String> =
        entries.iter().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name.starts_with("step-") || name.starts_with(".saving"));
    names.sort();
    names
}

fn model_bytes(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model/model.safetensors")).unwrap()
}

#[test]
fn pretraining_then_fine_tuning_writes_models_adapters_and_logs() {
    let (folder, run) = workspace("");
    let base = folder.path().join("base");
    let outcome = train(&run, &base, &[]);
    succeeded(&outcome);
    assert!(stdout(&outcome).contains("all steps done"), "{}", stdout(&outcome));
    assert_eq!(checkpoints(&base), ["step-00000004", "step-00000006"]);
    let steps = std::fs::read_to_string(base.join("steps.csv")).unwrap();
    assert_eq!(steps.lines().count(), 7, "a header and six steps");
    assert!(
        std::fs::read_to_string(base.join("evaluations.csv"))
            .unwrap()
            .contains(",lists,shifted,4,")
    );
    assert!(base.join("model/config.json").exists() && !base.join("adapter").exists());

    for method in ["lora", "dora", "paca", "s2ft", "qlora"] {
        let out = folder.path().join(method);
        let model = base.join("model");
        let arguments = [
            "train",
            "--model",
            text(&model),
            "--method",
            method,
            "--rank",
            "3",
            "--task",
            "lists",
            "--steps",
            "2",
            "--batch",
            "3",
            "--eval-rows",
            "2",
            "--length",
            "128",
            "-o",
            text(&out),
        ];
        let outcome = peft_limits(&arguments);
        succeeded(&outcome);
        assert!(
            stdout(&outcome).contains("retain"),
            "forgetting is measured: {}",
            stdout(&outcome)
        );
        assert!(out.join("adapter/adapter_config.json").exists(), "{method}");
        assert_ne!(model_bytes(&out), model_bytes(&base), "{method} trains");
    }
}

#[test]
fn a_run_that_is_continued_equals_one_that_was_not_stopped() {
    let (folder, run) = workspace("");
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    succeeded(&train(&run, &whole, &[]));
    succeeded(&train(&run, &parts, &[]));
    // Back to step 4, as after a crash between the last two saves.
    std::fs::remove_dir_all(parts.join("step-00000006")).unwrap();
    std::fs::remove_dir_all(parts.join("model")).unwrap();
    let again = train(&run, &parts, &[]);
    assert_eq!(again.status.code(), Some(2));
    assert!(stderr(&again).contains("--resume"), "{}", stderr(&again));
    succeeded(&train(&run, &parts, &["--resume"]));
    assert_eq!(model_bytes(&parts), model_bytes(&whole));
    let losses = |out: &Path| -> Vec<String> {
        let steps = std::fs::read_to_string(out.join("steps.csv")).unwrap();
        steps.lines().map(|l| l.split(',').take(2).collect::<Vec<_>>().join(",")).collect()
    };
    assert_eq!(losses(&parts), losses(&whole));
    // Other settings do not continue it.
    let other = train(&run, &parts, &["--resume", "--lr", "0.5"]);
    assert_eq!(other.status.code(), Some(2));
    assert!(stderr(&other).contains("optimizer.lr"), "{}", stderr(&other));
    let nothing = train(&run, &folder.path().join("new"), &["--resume"]);
    refused(&nothing, &folder.path().join("new"), &["without --resume"]);
}

#[test]
fn contradictory_and_impossible_settings_are_refused_before_anything_is_written() {
    let cases: [(&str, &[&str], &[&str]); 9] = [
        ("", &["--preset", "nano", "--model", "x"], &["--preset", "--model"]),
        ("", &["--method", "lora"], &["method.name", "model.path"]),
        (
            "[method]\nname = \"s2ft\"\ntargets = [\"q_proj\"]",
            &[],
            &["method.targets", "method.ratios"],
        ),
        ("[method]\nname = \"lora\"\neach_layer = true", &[], &["each_layer", "s2ft"]),
        ("[method]\nname = \"full\"\ntargets = [\"w_proj\"]", &[], &["w_proj", "down_proj"]),
        (
            "[method]\nname = \"full\"\ntargets = [\"q_proj\", \"q_proj\"]",
            &[],
            &["method.targets", "distinct"],
        ),
        ("[schedule]\nwarmup = 7", &[], &["schedule.warmup", "6"]),
        ("[optimizer]\nmomentum = 1.5", &[], &["optimizer.momentum", "below 1"]),
        ("seeds = 3", &[], &["run.toml", "line 1", "seeds"]),
    ];
    for (extra, flags, fragments) in cases {
        let (folder, run) = workspace(extra);
        let out = folder.path().join("out");
        refused(&train(&run, &out, flags), &out, fragments);
        assert!(!out.exists(), "{extra} {flags:?} left a folder");
    }
}

#[test]
fn heads_that_do_not_divide_the_width_name_the_file_and_the_key() {
    let (folder, run) = workspace("");
    let json = TINY
        .replace("\"num_attention_heads\": 6", "\"num_attention_heads\": 5")
        .replace("\"head_dim\": 4, ", "");
    std::fs::write(folder.path().join("tiny.json"), &json).unwrap();
    let out = folder.path().join("out");
    refused(&train(&run, &out, &[]), &out, &["tiny.json", "num_attention_heads"]);
    let groups = TINY.replace("\"num_key_value_heads\": 3", "\"num_key_value_heads\": 4");
    std::fs::write(folder.path().join("tiny.json"), groups).unwrap();
    refused(&train(&run, &out, &[]), &out, &["tiny.json", "num_key_value_heads"]);
}

#[test]
fn ranks_that_do_not_fit_are_refused() {
    let (folder, run) = workspace("");
    let base = folder.path().join("base");
    succeeded(&train(&run, &base, &["--steps", "1", "--eval-rows", "0"]));
    let model = base.join("model");
    for (method, rank) in [("lora", "65537"), ("paca", "25"), ("lora", "0")] {
        let out = folder.path().join("out");
        let arguments = [
            "train",
            "--model",
            text(&model),
            "--method",
            method,
            "--rank",
            rank,
            "--task",
            "lists",
            "-o",
            text(&out),
        ];
        refused(&peft_limits(&arguments), &out, &[rank]);
    }
}

/// The first step has learning rate 0, the second one overflows the weights.
#[test]
fn nan_stops_the_run_names_step_and_tensor_and_keeps_the_last_good_checkpoint() {
    let (folder, run) =
        workspace("[optimizer]\nlr = 1e30\nweight_decay = 1e30\n[schedule]\nwarmup = 2");
    let out = folder.path().join("out");
    let outcome = train(&run, &out, &["--save-every", "1"]);
    assert_eq!(outcome.status.code(), Some(1), "{}", stderr(&outcome));
    let message = stderr(&outcome);
    for fragment in ["model.embed_tokens.weight", "at step 2", "last good checkpoint"] {
        assert!(message.contains(fragment), "{message:?} lacks {fragment:?}");
    }
    assert_eq!(checkpoints(&out), ["step-00000001"]);
    assert!(!out.join("model").exists());
}

#[test]
fn an_output_folder_that_cannot_be_made_is_an_error_that_names_it() {
    let (folder, run) = workspace("");
    let out = folder.path().join("tiny.json/out");
    let outcome = train(&run, &out, &[]);
    refused(&outcome, &out, &["tiny.json"]);
}

/// A disk that fills up during the run, emulated by the process's limit on file sizes.
#[cfg(unix)]
#[test]
fn a_save_that_fails_loses_nothing() {
    let (folder, run) = workspace("");
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    succeeded(&train(&run, &whole, &[]));
    // Steps 1 and 2, and a checkpoint, without a limit.
    succeeded(&train(&run, &out, &[]));
    std::fs::remove_dir_all(out.join("model")).unwrap();
    std::fs::remove_dir_all(out.join("step-00000006")).unwrap();
    let logs = std::fs::metadata(out.join("steps.csv")).unwrap().len();
    let state = std::fs::metadata(out.join("step-00000004/state.safetensors")).unwrap().len();
    // ulimit counts blocks of 512 or 1024 bytes: between the logs and the state either way.
    let blocks = (state / 1024) / 2;
    assert!(
        blocks * 512 > 2 * logs,
        "the limit must let the logs grow: {blocks} blocks, {logs} bytes"
    );
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let binary = env!("CARGO_BIN_EXE_peft-limits");
    let arguments = [script.as_str(), binary, "train", text(&run), "-o", text(&out), "--resume"];
    let outcome = Command::new("sh").arg("-c").args(arguments).output().unwrap();
    let message = stderr(&outcome);
    assert_eq!(outcome.status.code(), Some(2), "{message}");
    assert!(message.contains("state.safetensors") || message.contains(text(&out)), "{message}");
    assert_eq!(
        checkpoints(&out),
        ["step-00000004"],
        "the good one is whole, nothing is left of the bad one"
    );
    assert!(!out.join("model").exists());
    // With room again the run goes on and ends as if nothing had happened.
    succeeded(&train(&run, &out, &["--resume"]));
    assert_eq!(model_bytes(&out), model_bytes(&whole));
}

/// The public sizes of LLaMA-2-7B.
const LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "tie_word_embeddings": false,
    "torch_dtype": "float16", "vocab_size": 32000}"#;

#[test]
fn memory_of_a_7b_model_is_predicted_from_its_config() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), LLAMA).unwrap();
    let arguments = [
        "memory",
        "--config",
        text(folder.path()),
        "--batch",
        "1",
        "--length",
        "512",
        "--bytes",
        "2",
    ];
    let outcome = peft_limits(&[&arguments[..], &["--json", "--fits", "80GiB"]].concat());
    succeeded(&outcome);
    let out = stdout(&outcome);
    let rows: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 9);
    let of = |method: &str, key: &str| {
        let row = rows.iter().find(|r| r["method"] == method).unwrap();
        row[key].as_u64().unwrap_or_else(|| panic!("{method} {key}: {row}"))
    };
    // 6,738,415,616 parameters; LoRA of rank 8 on seven projections: 8 x sum(in + out) x 32 layers.
    assert_eq!(
        (of("full", "trained"), of("full", "weights_bytes")),
        (6_738_415_616, 13_476_831_232)
    );
    assert_eq!(of("lora", "trained"), 8 * 32 * (4 * 8192 + 3 * 15104));
    assert_eq!(of("paca", "trained"), 8 * 32 * (5 * 4096 + 2 * 11008));
    assert_eq!(of("lora", "optimizer_bytes"), 2 * 2 * of("lora", "trained"));
    // NF4: a seventh of the projections' bytes are left and the embeddings stay.
    assert!(of("qpaca", "weights_bytes") * 3 < of("paca", "weights_bytes"));
    assert!(
        of("paca", "peak_bytes") < of("lora", "peak_bytes")
            && of("lora", "peak_bytes") < of("full", "peak_bytes")
    );
    assert!(of("paca", "longest_length") > of("lora", "longest_length"));

    let table = peft_limits(&[&arguments[..], &["--method", "paca"]].concat());
    succeeded(&table);
    assert!(
        stdout(&table).contains("12.55 GiB") && stdout(&table).contains("activations by tensor"),
        "{}",
        stdout(&table)
    );
}

/// PEFT's file says the same as flags, to `train` and to `memory`.
#[test]
fn a_method_may_come_from_pefts_file() {
    let (folder, run) = workspace("");
    let peft = folder.path().join("adapter_config.json");
    let settings = r#"{"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}"#;
    std::fs::write(&peft, settings).unwrap();
    let [base, by_file, by_flags, out] =
        ["base", "file", "flags", "refused"].map(|name| folder.path().join(name));
    succeeded(&train(&run, &base, &[]));
    let base = base.join("model");
    let tune =
        |out: &Path, more: &[&str]| train(&run, out, &[&["--model", text(&base)], more].concat());
    succeeded(&tune(&by_file, &["--peft", text(&peft)]));
    let flags =
        ["--method", "lora", "--rank", "3", "--alpha", "5", "--targets", "q_proj,down_proj"];
    succeeded(&tune(&by_flags, &flags));
    let [ours, theirs] = [&by_file, &by_flags]
        .map(|out| std::fs::read(out.join("adapter").join("adapter_model.safetensors")).unwrap());
    assert!(ours == theirs, "one seed and one method give one adapter");
    let config = folder.path().join("tiny.json");
    let memory = |more: &[&str]| {
        let outcome =
            peft_limits(&[&["memory", "--config", text(&config), "--json"], more].concat());
        succeeded(&outcome);
        stdout(&outcome)
    };
    let flags = ["--method", "lora", "--rank", "3", "--targets", "q_proj,down_proj"];
    assert_eq!(memory(&["--peft", text(folder.path())]), memory(&flags));
    std::fs::write(&peft, settings.replace("\"r\"", "\"lora_dropout\": 0.1, \"r\"")).unwrap();
    refused(
        &tune(&out, &["--peft", text(&peft)]),
        &out,
        &["adapter_config.json", "lora_dropout", "0.1"],
    );
}

#[test]
fn memory_refuses_what_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    std::fs::write(&config, LLAMA.replace("\"hidden_size\": 4096", "\"hidden_size\": 4100"))
        .unwrap();
    let none = folder.path().join("none");
    let (deep, wide) = (folder.path().join("deep.json"), folder.path().join("wide.json"));
    std::fs::write(
        &deep,
        TINY.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 99999999"),
    )
    .unwrap();
    std::fs::write(&wide, TINY.replace("\"vocab_size\": 259", "\"vocab_size\": 549755813888"))
        .unwrap();
    let cases: [(&[&str], &[&str]); 13] = [
        (
            &["--config", text(&deep)],
            &["deep.json", "key num_hidden_layers", "at most 1024 layers", "99999999"],
        ),
        (&["--config", text(&wide)], &["wide.json", "vocab_size", "weights"]),
        (&["--preset", "nano", "--fits", "80"], &["did you mean 80GiB?"]),
        (
            &["--preset", "nano", "--bytes", "3"],
            &["--bytes", "2 (half precision), 4 (f32) or 8 (f64)"],
        ),
        (&["--preset", "nano", "--state", "4000000000"], &["--state", "0 to 8"]),
        (
            &["--preset", "nano", "--batch", "1048576", "--length", "4294967296"],
            &["activations", "limit"],
        ),
        (&["--preset", "nano", "--targets", "all-linear,q_proj"], &["all-linear"]),
        (&["--config", text(&config)], &["config.json", "num_attention_heads"]),
        (&["--config", text(&none)], &["none"]),
        (&["--preset", "giant"], &["giant", "pico, nano, micro, mini"]),
        (&["--preset", "nano", "--method", "lora", "--rank", "65537"], &["method.rank", "65536"]),
        (&["--preset", "nano", "--fits", "3 furlongs"], &["furlongs"]),
        (&["--preset", "nano", "--length", "0"], &["length"]),
    ];
    for (arguments, fragments) in cases {
        let outcome = peft_limits(&[&["memory"], arguments].concat());
        refused(&outcome, folder.path(), fragments);
        assert_eq!(stdout(&outcome), "", "{arguments:?}: a refusal comes alone");
    }
}

#[test]
fn sizes_and_targets_mean_what_a_person_thinks() {
    let of = |more: &[&str]| {
        let outcome = peft_limits(
            &[&["memory", "--preset", "micro", "--method", "lora", "--json"], more].concat(),
        );
        succeeded(&outcome);
        serde_json::from_str::<serde_json::Value>(&stdout(&outcome)).unwrap()
    };
    let longest = |size: &str| of(&["--fits", size])["longest_length"].as_u64().unwrap();
    assert_eq!(longest("1G"), longest("1GiB"));
    assert_eq!(longest("1024MiB"), longest("1GiB"));
    assert!(longest("1GB") < longest("1GiB"), "GB is 10^9");
    assert_eq!(of(&["--targets", "all-linear"]), of(&[]));
    assert!(of(&["--targets", "q_proj"])["trained"].as_u64() < of(&[])["trained"].as_u64());
}

#[test]
fn a_run_saves_every_hundred_steps_unless_told_otherwise() {
    let (folder, run) = workspace("");
    let toml = std::fs::read_to_string(&run)
        .unwrap()
        .replace("save_every = 2\n", "")
        .replace("batch = 5", "batch = 1");
    std::fs::write(&run, toml).unwrap();
    for (more, want) in [
        (&[][..], &["step-00000100", "step-00000101"][..]),
        (&["--save-every", "0"], &["step-00000101"]),
    ] {
        let out = folder.path().join(format!("out{}", more.len()));
        succeeded(&train(&run, &out, &[&["--steps", "101", "--eval-rows", "0"], more].concat()));
        assert_eq!(checkpoints(&out), want);
    }
}

#[test]
fn a_text_file_is_a_task_of_the_command_line() {
    let (folder, run) = workspace("");
    let (out, book) = (folder.path().join("out"), folder.path().join("book.txt"));
    std::fs::write(&book, (0..3000).map(|i| format!("{i} ")).collect::<String>()).unwrap();
    refused(&train(&run, &out, &["--task", "text"]), &out, &["text", "give text=FILE"]);
    refused(&train(&run, &out, &["--task", "prose"]), &out, &["prose", "text=FILE"]);
    refused(&train(&run, &out, &["--task", "text=/none"]), &out, &["/none"]);
    assert!(!out.exists());
    let task = format!("text={}", text(&book));
    succeeded(&train(&run, &out, &["--task", &task, "--targets", "all-linear", "--length", "256"]));
    let config = std::fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(config.contains("task = \"text\"") && config.contains("book.txt"), "{config}");
}

#[test]
fn an_output_folder_that_is_the_model_is_refused() {
    let (folder, run) = workspace("");
    let base = folder.path().join("base");
    succeeded(&train(&run, &base, &["--steps", "1", "--eval-rows", "0"]));
    let model = text(&base.join("model")).to_string();
    let same = ["train", "--model", &model, "--method", "lora", "--task", "lists", "-o", &model];
    refused(&peft_limits(&same), Path::new(&model), &["--out", "input"]);
    assert!(!base.join("model/config.toml").exists());
}

/// The same code from every command, whoever waits for it: 130, as shells have it.
#[cfg(unix)]
#[test]
fn an_interrupted_command_ends_with_130() {
    let (folder, run) = workspace("");
    let fifo = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let output = folder.path().join("out.safetensors");
    let long = folder.path().join("long");
    // Reading a pipe that nobody writes waits for ever.
    let cases: [&[&str]; 3] = [
        &["train", text(&run), "--steps", "1000000", "-o", text(&long)],
        &["validate", "--head", text(&fifo), "--reference", text(&fifo)],
        &["gradient", text(&fifo), "-o", text(&output)],
    ];
    for arguments in cases {
        let child = Command::new(env!("CARGO_BIN_EXE_peft-limits"))
            .args(arguments)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Training writes its settings once its handler is about to be there; the others install it
        // first of all.
        let started = std::time::Instant::now();
        while arguments[0] == "train"
            && !long.join("steps.csv").exists()
            && started.elapsed().as_secs() < 60
        {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert!(
            Command::new("kill")
                .args(["-INT", &child.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        let outcome = child.wait_with_output().unwrap();
        assert_eq!(outcome.status.code(), Some(130), "{arguments:?}: {}", stderr(&outcome));
        assert!(stderr(&outcome).contains("interrupted"), "{}", stderr(&outcome));
    }
    assert_eq!(checkpoints(&long).len().min(1), 1, "training saved first");
}
