//! `devices`, and `--device` of `gradient` and `probe`; a software device counts.
use crate::chosen::choice;
use peft_limits::check::compare::assert_close;
use peft_limits::device::DeviceChoice;
use peft_limits::tensor_file::TensorFile;
use std::path::Path;
use std::process::{Command, Output};

fn data(name: &str) -> String {
    crate::chosen::data(name).to_str().unwrap().to_string()
}

fn peft_limits(arguments: &[&str]) -> Output {
    let program =
        std::env::var_os("PEFT_LIMITS_PROGRAM").unwrap_or(env!("CARGO_BIN_EXE_peft-limits").into());
    Command::new(program).args(arguments).output().unwrap()
}

/// Standard output of a command that must succeed.
fn succeeds(arguments: &[&str]) -> String {
    let outcome = peft_limits(arguments);
    assert!(
        outcome.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&outcome.stderr)
    );
    String::from_utf8(outcome.stdout).unwrap()
}

/// One last line on stderr with the fragments (a driver may have warned before it), exit code 2, no
/// file.
fn refused(arguments: &[&str], output: &Path, fragments: &[&str]) {
    let outcome = peft_limits(arguments);
    let stderr = String::from_utf8_lossy(&outcome.stderr);
    assert_eq!(outcome.status.code(), Some(2), "{arguments:?}: {stderr}");
    let line = stderr.trim_end().lines().last().unwrap_or_default();
    assert!(line.starts_with("peft-limits: --device ") && !stderr.contains("panicked"), "{stderr}");
    for fragment in fragments {
        assert!(line.contains(fragment), "{arguments:?}: {line:?} lacks {fragment:?}");
    }
    assert!(!output.exists(), "{arguments:?} left a file");
}

#[test]
fn devices_are_listed_by_the_names_that_commands_take() {
    let said = succeeds(&["devices"]);
    assert!(
        said.contains(&choice().to_string()),
        "these tests need a device; Mesa's llvmpipe counts (see .ci/gpu): {said}"
    );
}

#[test]
fn gradients_are_written_from_a_device() {
    let folder = tempfile::tempdir().unwrap();
    let input = data("attention_small.safetensors");
    let reference = TensorFile::open(&input).unwrap();
    let output = folder.path().join("out.safetensors");
    let file = output.to_str().unwrap();
    let device = choice().to_string();
    let said = succeeds(&["gradient", &input, "--device", &device, "-o", file]);
    assert!(said.contains(&format!("s on {device}")), "{said}");
    let got = TensorFile::open(&output).unwrap();
    for name in ["O", "dWQ", "dWK", "dWV", "dAQ", "dAK", "dAV", "dBQ", "dBK", "dBV"] {
        let ours = got.matrix::<f64>(name, "written").unwrap();
        assert_close(
            name,
            &ours.view(),
            &reference.matrix::<f64>(name, "reference").unwrap().view(),
            1e-4,
        );
    }
    assert!(got.metadata("device").is_some_and(|d| d.starts_with(&device)));
}

#[test]
fn probe_measures_on_a_device() {
    let device = choice().to_string();
    let said = succeeds(&[
        "probe",
        &data("attention_small.safetensors"),
        "--device",
        &device,
        "--features",
        "taylor:degree=4",
        "--json",
    ]);
    let value: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(value["device"].as_str().unwrap().starts_with(&device), "{said}");
    let error = |v: &serde_json::Value| v["gradient_error"].as_f64().unwrap();
    // f32 against f64 for the exact gradient; the polynomial's own error for the other.
    assert!(error(&value["streaming"]) < 1e-4 && error(&value["streaming"]) > 0.0, "{said}");
    assert!(error(&value["methods"][0]) > error(&value["streaming"]), "{said}");
}

/// Every precision either gives a gradient, off by what its bits say and with its name in the file,
/// or is refused with those that the device has.
#[test]
fn operands_are_rounded_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let input = data("attention_small.safetensors");
    let reference = TensorFile::open(&input).unwrap();
    let want = reference.matrix::<f64>("dAQ", "reference").unwrap();
    let (listed, device) = (succeeds(&["devices"]), choice().to_string());
    let first = listed.lines().find(|line| line.contains(&device)).unwrap_or_default();
    for (precision, least, most) in
        [("f32", 0.0, 1e-4), ("tf32", 1e-5, 5e-2), ("f16", 1e-5, 5e-2), ("bf16", 1e-4, 3e-1)]
    {
        let output = folder.path().join(format!("{precision}.safetensors"));
        let arguments = [
            "gradient",
            &input,
            "--device",
            &device,
            "--products",
            precision,
            "-o",
            output.to_str().unwrap(),
        ];
        if !first.split_whitespace().any(|word| word == precision) {
            let outcome = peft_limits(&arguments);
            let stderr = String::from_utf8_lossy(&outcome.stderr);
            assert_eq!(outcome.status.code(), Some(2), "{precision}: {stderr}");
            assert!(
                stderr.contains(precision) && stderr.contains("f32") && !output.exists(),
                "{stderr}"
            );
            continue;
        }
        succeeds(&arguments);
        let got = TensorFile::open(&output).unwrap();
        assert_eq!(got.metadata("products"), Some(precision));
        let gap = peft_limits::linalg::norms::relative_frobenius(
            &got.matrix::<f64>("dAQ", "written").unwrap().view(),
            &want.view(),
        );
        assert!(gap >= least && gap <= most, "{precision}: {gap:e}");
    }
}

#[test]
fn a_device_that_is_not_there_is_refused_with_what_is() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let (input, file) = (data("attention_small.safetensors"), output.to_str().unwrap().to_string());
    // A machine with CUDA may have no other device to name.
    let there = if choice() == DeviceChoice::Gpu(0) { "gpu:0" } else { "device" };
    refused(&["gradient", &input, "--device", "gpu:99", "-o", &file], &output, &["gpu:99", there]);
    refused(&["probe", &input, "--device", "gpu:99"], &output, &["gpu:99", there]);
    // Numbered beyond any machine: without a driver, or without the feature, the message differs
    // but names the device.
    refused(&["gradient", &input, "--device", "cuda:99", "-o", &file], &output, &["cuda:99"]);
}
