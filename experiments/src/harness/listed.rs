//! What CONTRIBUTING.md asks of an experiment, where a test can see it, and the commands that pages
//! show.

use super::flags::parse_single;
use crate::ALL;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn page(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn header(name: &str) -> String {
    page(&format!("experiments/src/{name}.rs"))
        .lines()
        .take_while(|l| l.starts_with("//!"))
        .collect()
}

/// Names of the sources of experiments: every file with a binary of its own name, `reproduce`
/// apart.
fn binaries() -> Vec<String> {
    let entries = std::fs::read_dir(root().join("experiments/src/bin")).unwrap();
    let stems =
        entries.map(|e| e.unwrap().path().file_stem().unwrap().to_str().unwrap().to_string());
    stems.filter(|name| name != "reproduce").collect()
}

#[test]
fn every_experiment_is_listed() {
    let manifest = page("experiments/Cargo.toml");
    for name in binaries() {
        let by_reproduce = ALL.iter().any(|e| e.name == name);
        assert!(
            by_reproduce != name.starts_with("gpu_"),
            "{name}: a line of ALL in experiments/src/lib.rs"
        );
        let entry =
            format!("[[bin]]\nname = \"{name}\"\npath = \"src/bin/{name}.rs\"\ntest = false\n");
        assert!(manifest.contains(&entry), "{name}: [[bin]] in experiments/Cargo.toml");
    }
    for experiment in ALL {
        let name = experiment.name;
        assert!(binaries().iter().any(|b| b == name), "{name}: experiments/src/bin/{name}.rs");
        let command = format!("cargo run --release --bin {name} ");
        assert!(header(name).contains(&command), "{name}: the header's command");
    }
}

#[test]
fn every_experiment_states_its_claim_and_is_in_the_list() {
    let list = page("paper-notes/experiments.md");
    for name in binaries() {
        let header = header(&name);
        assert!(
            header.contains("Claim") && header.contains("Refuted if"),
            "{name}: claim and refutation in the header"
        );
        let row = list.lines().find(|l| l.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("{name}: a row of paper-notes/experiments.md"));
        let published = root().join("figures").join(&name).join("manifest.json").exists();
        let says = if published {
            format!("(../figures/{name}/findings.md)")
        } else {
            "quick only".into()
        };
        assert!(
            row.contains(&says),
            "{name}: its row in paper-notes/experiments.md must say {says}"
        );
    }
    for line in list.lines().filter(|l| l.starts_with("| `") && l.contains("/findings.md")) {
        let name = line.split('`').nth(1).unwrap();
        assert!(binaries().iter().any(|b| b == name), "{name}: a row without an experiment");
    }
}

/// Flags of experiments that pages show are flags that they take.
#[test]
fn shown_flags_are_taken() {
    let mut count = 0;
    for name in [
        "paper-notes/experiments.md",
        "paper-notes/measurements.md",
        "paper-notes/cost-and-memory.md",
    ] {
        for line in page(name).lines() {
            let command = line.split('#').next().unwrap_or_default().trim();
            let Some(rest) = command.strip_prefix("cargo run --release --bin ") else { continue };
            let (name, flags) = rest.split_once(" -- ").unwrap_or((rest, ""));
            let Some(experiment) = ALL.iter().find(|e| e.name == name) else { continue };
            count += 1;
            let arguments =
                std::iter::once(name).chain(flags.split_whitespace()).map(OsString::from);
            assert!(parse_single(experiment, arguments).is_ok(), "{line}");
        }
    }
    assert!(count >= 3, "{count} experiments are shown");
}

/// A claim that nothing could refute is no claim: each experiment has a test with made-up data that
/// should refute it.
#[test]
fn every_experiment_is_refuted_by_made_up_data_in_a_test() {
    for name in binaries() {
        let mut sources = vec![page(&format!("experiments/src/{name}.rs"))];
        if let Ok(folder) = std::fs::read_dir(root().join("experiments/src").join(&name)) {
            sources.extend(
                folder.map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap()),
            );
        }
        let tests = sources
            .iter()
            .filter_map(|source| source.split_once("#[cfg(test)]").map(|(_, tests)| tests));
        let found =
            tests.into_iter().any(|tests| tests.contains("made_up") && tests.contains("#[test]"));
        assert!(found, "{name}: a test in which made_up data refute the claim");
    }
}
