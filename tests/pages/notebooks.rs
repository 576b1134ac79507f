//! The notebooks are whole: format 4, no outputs in git, tables and columns that exist, and Rust
//! cells that the tests run. `.ci/notebooks` executes them.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn notebooks() -> Vec<(PathBuf, Value)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root().join("notebooks")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "ipynb") {
            let value = serde_json::from_slice(&std::fs::read(&path).unwrap());
            found.push((path.clone(), value.unwrap_or_else(|e| panic!("{}: {e}", path.display()))));
        }
    }
    assert!(found.len() >= 4, "{} notebooks", found.len());
    found
}

fn language(notebook: &Value) -> &str {
    notebook["metadata"]["kernelspec"]["language"].as_str().expect("the language of the kernel")
}

/// The texts of the code cells.
fn code(notebook: &Value) -> Vec<String> {
    let cells = notebook["cells"].as_array().unwrap().iter().filter(|c| c["cell_type"] == "code");
    cells
        .map(|c| c["source"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect())
        .collect()
}

/// Plain string literals ("...") of a text, up to `end` outside of any.
fn literals(text: &str, end: Option<char>) -> Vec<String> {
    let (mut found, mut inside): (Vec<String>, _) = (Vec::new(), false);
    for c in text.chars() {
        match c {
            '"' => {
                inside = !inside;
                if inside {
                    found.push(String::new());
                }
            }
            _ if inside => found.last_mut().unwrap().push(c),
            _ if Some(c) == end => break,
            _ => {}
        }
    }
    found
}

/// Experiment and columns of every `tables.read("EXPERIMENT", ["COLUMN", ...])`.
fn tables_read(cells: &[String]) -> Vec<(String, Vec<String>)> {
    let calls = cells.iter().flat_map(|cell| cell.split("tables.read(").skip(1));
    calls
        .map(|call| {
            let mut words = literals(call, Some(')'));
            let experiment = words.remove(0);
            (experiment, words)
        })
        .collect()
}

/// Every string literal of an experiment's source.
fn words_of_source(experiment: &str) -> BTreeSet<String> {
    let path = root().join("experiments/src").join(format!("{experiment}.rs"));
    let source =
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let harness = std::fs::read_to_string(root().join("experiments/src/harness/study.rs")).unwrap();
    source.lines().chain(harness.lines()).flat_map(|line| literals(line, None)).collect()
}

#[test]
fn format_4_without_outputs() {
    for (path, notebook) in notebooks() {
        let name = path.display();
        assert_eq!(notebook["nbformat"], 4, "{name}");
        assert!(
            notebook["nbformat_minor"].as_u64().is_some_and(|minor| minor >= 5),
            "{name}: cells have ids from 4.5 on"
        );
        let cells = notebook["cells"].as_array().unwrap();
        let ids: BTreeSet<&str> =
            cells.iter().map(|c| c["id"].as_str().expect("a cell's id")).collect();
        assert_eq!(ids.len(), cells.len(), "{name}: ids repeat");
        for cell in cells {
            let id = &cell["id"];
            match cell["cell_type"].as_str() {
                Some("markdown") => assert!(cell.get("outputs").is_none(), "{name}, {id}"),
                Some("code") => {
                    assert_eq!(
                        cell["outputs"],
                        serde_json::json!([]),
                        "{name}, {id}: outputs are not committed"
                    );
                    assert!(
                        cell["execution_count"].is_null(),
                        "{name}, {id}: execution counts are not committed"
                    );
                }
                other => panic!("{name}, {id}: a cell of type {other:?}"),
            }
        }
    }
}

#[test]
fn every_column_read_is_in_the_committed_table() {
    let (mut compared, mut of_source) = (0, 0);
    for (path, notebook) in notebooks().iter().filter(|(_, n)| language(n) == "python") {
        let reads = tables_read(&code(notebook));
        for (experiment, columns) in &reads {
            assert!(!columns.is_empty(), "{}: {experiment} without columns", path.display());
            let table = root().join("figures").join(experiment).join("table.csv");
            let has: BTreeSet<String> = if table.exists() {
                compared += columns.len();
                let mut reader = csv::Reader::from_path(&table).unwrap();
                reader.headers().unwrap().iter().map(str::to_string).collect()
            } else {
                // Not published yet: the column must at least be one that the experiment writes.
                of_source += columns.len();
                words_of_source(experiment)
            };
            for column in columns {
                assert!(
                    has.contains(column),
                    "{}: {experiment} has no column {column:?}",
                    path.display()
                );
            }
        }
    }
    assert!(compared > 30, "{compared} columns compared with tables, {of_source} with sources");
}

#[test]
fn files_named_by_cells_exist() {
    let mut found = 0;
    for (path, notebook) in notebooks() {
        for cell in code(&notebook) {
            // ROOT / "tests" / "data" / ...
            for chain in cell.split("ROOT / ").skip(1) {
                let line = chain.lines().next().unwrap();
                let parts = line.split(" / ").take_while(|part| part.starts_with('"'));
                let file =
                    parts.fold(root().to_path_buf(), |p, part| p.join(&literals(part, None)[0]));
                if file.starts_with(root().join("target")) {
                    continue;
                }
                assert!(file.exists(), "{}: {}", path.display(), file.display());
                found += 1;
            }
        }
    }
    assert!(found >= 4, "{found} files");
}

#[test]
fn rust_cells_are_the_example_that_runs() {
    let example = std::fs::read_to_string(root().join("examples/notebook_gradients.rs")).unwrap();
    // Between the first cell's mark and the last one, without marks and indentation.
    let body = example.split_once("// cell: ").unwrap().1.split_once('\n').unwrap().1;
    let body = body.split_once("    // end").unwrap().0;
    let plain = |text: &str| -> Vec<String> {
        let lines =
            text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("// cell: "));
        lines.map(str::to_string).collect()
    };
    let all = notebooks();
    let (_, notebook) = all.iter().find(|(_, n)| language(n) == "rust").expect("a Rust notebook");
    let cells = code(notebook);
    let (commands, rust): (Vec<&String>, Vec<&String>) =
        cells.iter().partition(|c| c.starts_with(':'));
    assert_eq!(commands, [r#":dep peft-limits = { path = "..", default-features = false }"#]);
    let rust: Vec<String> = rust.iter().flat_map(|cell| plain(cell)).collect();
    assert_eq!(
        rust,
        plain(body),
        "notebooks/rust_gradients.ipynb and examples/notebook_gradients.rs differ"
    );
    assert!(rust.len() > 30);
}
