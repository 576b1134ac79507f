//! The commands of the README and of the notes work as they stand, and what is shown of their
//! output is what comes out.

use crate::pages::{files, page, root};
use std::path::Path;
use std::process::{Command, Output};

/// Pages whose commands are run.
const PAGES: [&str; 3] =
    ["README.md", "paper-notes/measurements.md", "paper-notes/cost-and-memory.md"];

/// Fenced blocks of a language.
fn fenced(text: &str, language: &str) -> Vec<Vec<String>> {
    let mut blocks: Vec<Vec<String>> = Vec::new();
    let mut inside: Option<bool> = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(named), None) => {
                inside = Some(named == language);
                if named == language {
                    blocks.push(Vec::new());
                }
            }
            (Some(_), Some(_)) => inside = None,
            (None, Some(true)) => blocks.last_mut().expect("begun").push(line.to_string()),
            (None, _) => {}
        }
    }
    blocks
}

/// The arguments after the program's name, comments cut, files of the repository found from any
/// folder.
fn arguments(line: &str) -> Option<Vec<String>> {
    let line = line.split('#').next().unwrap_or(line).trim();
    let line = line
        .strip_prefix("cargo run --release --bin peft-limits -- ")
        .or(line.strip_prefix("peft-limits "))?;
    let found =
        |word: &str| match ["tests/", "examples/"].iter().any(|folder| word.starts_with(folder)) {
            true => root().join(word).to_str().unwrap().to_string(),
            false => word.to_string(),
        };
    Some(line.split_whitespace().map(found).collect())
}

fn run(arguments: &[String], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peft-limits"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

#[test]
fn every_command_works() {
    let folder = tempfile::tempdir().unwrap();
    let blocks = PAGES.iter().flat_map(|name| fenced(&page(name), "sh")).flatten();
    let commands: Vec<Vec<String>> = blocks.filter_map(|line| arguments(&line)).collect();
    for wanted in ["probe", "gradient", "validate", "train", "memory"] {
        assert!(commands.iter().any(|c| c[0] == wanted), "no {wanted} in the pages");
    }
    for mut command in commands {
        if command[0] == "train" {
            // Minutes as written; the same runs, one update long.
            command.extend(
                ["--steps", "1", "--batch", "2", "--eval-rows", "4", "--warmup", "0"]
                    .map(String::from),
            );
        }
        let output = run(&command, folder.path());
        // A fault that a page shows is found: exit code 1, and nothing went wrong in finding it.
        let fault = command.iter().any(|a| a.contains("/dumps/faults/"));
        let expected = if fault { 1 } else { 0 };
        assert_eq!(
            output.status.code(),
            Some(expected),
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // What the commands say they write is there.
    for file in [
        "runs/chained.safetensors",
        "runs/base/model/config.json",
        "runs/paca/adapter",
        "runs/lora/adapter",
    ] {
        assert!(folder.path().join(file).exists(), "{file}");
    }
}

/// Every page's commands, in blocks and in the text, name targets and files that exist.
#[test]
fn every_named_target_exists() {
    let manifest = page("Cargo.toml") + &page("experiments/Cargo.toml");
    let exists = |flag: &str, name: &str| match flag {
        "--bin" | "--bench" => manifest.contains(&format!("name = \"{name}\"")),
        "--test" => {
            let single = root().join(format!("tests/{name}.rs")).exists();
            single
                || root().join("tests").join(name).join("main.rs").exists()
                || manifest.contains(&format!("name = \"{name}\""))
        }
        _ => root().join(format!("examples/{name}.rs")).exists(),
    };
    let mut count = 0;
    for path in files(".", "md") {
        let text = std::fs::read_to_string(&path).unwrap();
        for line in text.lines() {
            let words: Vec<&str> =
                line.split(|c: char| c.is_whitespace() || "`(),;".contains(c)).collect();
            // `<name>` stands for many.
            for pair in words
                .windows(2)
                .filter(|p| ["--bin", "--bench", "--test", "--example"].contains(&p[0]))
            {
                count += 1;
                assert!(
                    pair[1].starts_with('<') || exists(pair[0], pair[1].trim_end_matches('.')),
                    "{}: {line}",
                    path.display()
                );
            }
        }
        for line in fenced(&text, "sh").into_iter().flatten() {
            for file in line
                .split_whitespace()
                .filter(|w| ["python/", "benches/", "notebooks/"].iter().any(|f| w.starts_with(f)))
            {
                count += 1;
                assert!(root().join(file).exists(), "{}: {line}", path.display());
            }
        }
        let package = page("python/peft_limits/__init__.py");
        let (_, public) = package.split_once("__all__ = [").expect("__all__");
        let (public, _) = public.split_once(']').expect("the end of __all__");
        let python =
            ["python", "py"].into_iter().flat_map(|language| fenced(&text, language)).flatten();
        for names in python
            .filter_map(|line| line.strip_prefix("from peft_limits import ").map(String::from))
        {
            for name in names.split(", ") {
                count += 1;
                assert!(public.contains(&format!("\"{name}\"")), "{}: {name}", path.display());
            }
        }
    }
    assert!(count > 25, "{count} targets were looked at");
}

/// Whether a shown line is a line of the output; `~` at the start of a word stands for a word that
/// differs between machines.
fn shown_in(line: &str, output: &str) -> bool {
    let words = |l: &str| l.split_whitespace().map(String::from).collect::<Vec<_>>();
    let want = words(line);
    output.lines().map(words).any(|got| {
        got.len() == want.len() && got.iter().zip(&want).all(|(g, w)| g == w || w.starts_with('~'))
    })
}

/// Blocks that begin with `$ peft-limits ...` are run; every other line of them, but for `...`, is
/// in the output.
#[test]
fn what_is_shown_is_what_comes_out() {
    assert!(
        shown_in("a 1.5 ~2", "x\n a  1.5 7\n")
            && !shown_in("a 1.5 ~2", "a 1.4 7")
            && !shown_in("a ~1", "a")
    );
    let mut compared = 0;
    for name in PAGES {
        for block in fenced(&page(name), "text") {
            let Some(command) = block[0].strip_prefix("$ ").and_then(arguments) else { continue };
            let output = run(&command, root());
            assert!(output.status.code().is_some_and(|code| code < 2), "{name}: {}", block[0]);
            let text = String::from_utf8(output.stdout).unwrap();
            for line in block[1..].iter().filter(|l| !l.trim().is_empty() && *l != "...") {
                assert!(shown_in(line, &text), "{name}: not in the output: {line}\n{text}");
                compared += 1;
            }
        }
    }
    assert!(compared > 20, "{compared} lines were compared");
}

/// The numbers of dumps that the README boasts of.
#[test]
fn the_counts_of_dumps_are_true() {
    let readme = page("README.md");
    for (kind, text) in [("faults", "planted faults"), ("clean", "right steps")] {
        let folders =
            std::fs::read_dir(root().join("tests/data/dumps").join(kind)).unwrap().count();
        assert!(readme.contains(&format!("{folders} {text}")), "{folders} {text}");
    }
}

/// The README's example is that of the crate's front page, where it is compiled and run.
#[test]
fn the_example_is_the_doctest() {
    let readme = fenced(&page("README.md"), "rust");
    let front: Vec<String> =
        page("src/lib.rs").lines().map_while(|l| l.strip_prefix("//!")).map(trimmed).collect();
    let doctest = fenced(&front.join("\n"), "");
    assert_eq!(readme.len(), 1);
    assert_eq!(readme[0], doctest[0]);
}

fn trimmed(line: &str) -> String {
    line.strip_prefix(' ').unwrap_or(line).to_string()
}
