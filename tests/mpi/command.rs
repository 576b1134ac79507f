//! `peft-limits gradient` under mpirun writes what it writes alone.

use super::launch;
use peft_limits::tensor_file::TensorFile;
use std::path::Path;
use std::process::Command;

pub fn same_file() {
    let program = Path::new(env!("CARGO_BIN_EXE_peft-limits"));
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let chained =
        ["--method", "chained", "--features", "positive-features:rank=64", "--only-adapters"];
    for (input, flags) in [
        ("tests/data/attention_medium.safetensors", &["--method", "streaming"][..]),
        ("tests/data/attention_medium.safetensors", &chained[..]),
        (
            "tests/data/attention_causal.safetensors",
            &["--method", "streaming", "--only-adapters"][..],
        ),
    ] {
        let (alone, shared) = (path("alone.safetensors"), path("shared.safetensors"));
        let arguments = |output: &str| -> Vec<String> {
            let all =
                ["gradient", input].into_iter().chain(flags.iter().copied()).chain(["-o", output]);
            all.map(String::from).collect()
        };
        let status = Command::new(program).args(arguments(&alone)).output().unwrap();
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
        let words = arguments(&shared);
        let out = launch::succeeds(launch::mpirun(
            2,
            program,
            &words.iter().map(String::as_str).collect::<Vec<_>>(),
        ));
        assert_eq!(out.matches("written").count(), 1, "one rank speaks:\n{out}");
        let (alone, shared) = (TensorFile::open(alone).unwrap(), TensorFile::open(shared).unwrap());
        assert_eq!(alone.names().collect::<Vec<_>>(), shared.names().collect::<Vec<_>>());
        for name in alone.names() {
            let (shape, a) = alone.tensor::<f64>(name, "written").unwrap();
            let (other, b) = shared.tensor::<f64>(name, "written").unwrap();
            assert_eq!(shape, other, "{name}");
            let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
            let gap =
                square(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / square(&mut a.iter().copied());
            assert!(gap.sqrt() <= 1e-12, "{input} {flags:?}: {name} differs by {:e}", gap.sqrt());
        }
    }
    // What no rank can do ends the job with the usual exit code and one message.
    for flags in [
        &["gradient", "tests/data/none.safetensors", "-o", "x"][..],
        &["gradient", "tests/data/attention_medium.safetensors", "--method", "dense", "-o", "x"][..],
        &[
            "gradient",
            "tests/data/attention_medium.safetensors",
            "--method",
            "chained",
            "--features",
            "nystrom:rank=4",
            "-o",
            "x",
        ][..],
    ] {
        let output = launch::finish(launch::start(launch::mpirun(2, program, flags)));
        assert_eq!(
            output.status.code(),
            Some(2),
            "{flags:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(text.matches("peft-limits:").count(), 1, "{text}");
    }
}
