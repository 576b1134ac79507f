//! The steps of CONTRIBUTING.md, where a test can see whether they were taken.

use crate::pages::{code_spans, files, page, root, section};
use peft_limits::attention::factorization::spec::METHODS;
use peft_limits::train::method::MethodName;
use std::collections::BTreeSet;
use std::path::Path;

/// Asserts all at once, so that a newcomer sees everything that is still to do.
#[derive(Default)]
struct Todo(Vec<String>);

impl Todo {
    fn require(&mut self, done: bool, what: impl Into<String>) {
        if !done {
            self.0.push(what.into());
        }
    }
}

impl Drop for Todo {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.0.is_empty(), "see CONTRIBUTING.md:\n{}", self.0.join("\n"));
        }
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_string()
}

fn source(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
#[should_panic(expected = "a step")]
fn a_forgotten_step_fails() {
    Todo::default().require(false, "a step");
}

#[test]
fn a_factorization() {
    let mut todo = Todo::default();
    let tests = page("tests/attention/chained.rs") + &page("tests/attention/factorizations.rs");
    let (bench, experiment) =
        (page("benches/attention.rs"), page("experiments/src/factorizations.rs"));
    let (index, costs) = (page("paper-notes/README.md"), page("paper-notes/cost-and-memory.md"));
    let derivations = page("paper-notes/factorizations-and-bounds.md")
        + &page("paper-notes/attention-gradients.md");
    for (name, keys) in METHODS {
        let file = format!("src/attention/factorization/{}.rs", name.replace('-', "_"));
        todo.require(root().join(&file).exists(), format!("{name}: no {file}"));
        todo.require(!keys.is_empty(), format!("{name}: its keys for the help pages"));
        todo.require(
            tests.contains(&format!("\"{name}:")),
            format!("{name}: tests in chained.rs or factorizations.rs"),
        );
        // auto makes none of its own columns; the oracle is measured in another way, being cubic.
        let chooses = name == "auto";
        let oracle = name == "truncated-svd";
        let benched = bench.contains(&format!("\"{name}:"));
        todo.require(
            benched || chooses || oracle,
            format!("{name}: a line in factorization_cases of the bench"),
        );
        todo.require(
            experiment.contains(&format!("\"{name}\"")) || chooses,
            format!("{name}: FAMILIES of the experiment"),
        );
        let derived = derivations.contains(&format!("`{name}`"))
            || derivations.to_lowercase().contains(&format!("**{}", name.replace('-', " ")))
            || derivations.contains(&format!("**{name}"));
        todo.require(derived, format!("{name}: a derivation in the notes"));
        let row = index.lines().any(|l| l.starts_with('|') && l.contains(&stem(Path::new(&file))));
        // taylor and chebyshev share the file of polynomials.
        let shared =
            index.lines().any(|l| l.contains("polynomial.rs") && l.contains(&format!("`{name}`")));
        todo.require(row || shared, format!("{name}: a row in the index of paper-notes/README.md"));
        todo.require(
            costs.contains(&format!("`{name}`")),
            format!("{name}: a row in cost-and-memory.md"),
        );
    }
    for path in files("src/attention/factorization", "rs") {
        let implements = source(&path).contains(" SoftmaxFactorization<T> for ");
        let named = METHODS.iter().any(|(name, _)| name.replace('-', "_") == stem(&path));
        todo.require(!implements || named, format!("{}: a line of METHODS", path.display()));
    }
}

#[test]
fn a_method() {
    let mut todo = Todo::default();
    let (params, bench, common) =
        (page("src/train/method.rs"), page("benches/train_step.rs"), page("tests/common/mod.rs"));
    let (fine_tuning, transformer) =
        (page("paper-notes/fine-tuning.md"), page("paper-notes/transformer.md"));
    let costs = page("paper-notes/cost-and-memory.md");
    let documented =
        params.lines().find(|l| l.starts_with("/// | `name`")).expect("the table of MethodParams");
    for method in MethodName::ALL {
        let name = method.name();
        todo.require(
            documented.contains(&format!("`{name}`")),
            format!("{name}: the table of MethodParams"),
        );
        let (low, notes) =
            (name.to_lowercase(), (fine_tuning.to_lowercase(), costs.to_lowercase()));
        todo.require(notes.0.contains(&low), format!("{name}: a row in fine-tuning.md"));
        todo.require(notes.1.contains(&low), format!("{name}: a row in cost-and-memory.md"));
        if method.quantized() {
            continue;
        }
        todo.require(
            common.contains(&format!("\"{name}\"")),
            format!("{name}: an entry of every_method in tests/common"),
        );
        todo.require(
            bench.contains(&format!("\"{name}\"")),
            format!("{name}: a case of benches/train_step.rs"),
        );
        // No other trainer writes single entries, so there is no dump to compare with.
        for precision in ["f32", "bf16", "f16"].into_iter().filter(|_| method != MethodName::Spft) {
            let folder = format!("tests/data/dumps/clean/{name}-{precision}");
            todo.require(root().join(&folder).is_dir(), format!("{name}: a right dump {folder}"));
        }
        if method != MethodName::Full {
            let file = format!("adapters/{name}.rs");
            todo.require(root().join("src").join(&file).exists(), format!("{name}: no src/{file}"));
            todo.require(
                transformer.contains(&format!("`{file}`")),
                format!("{name}: a derivation in transformer.md"),
            );
        }
    }
}

/// Words joined by hyphens that stand as whole string literals in a source.
fn hyphenated_literals(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
    let literals = code.flat_map(|l| l.split('"').skip(1).step_by(2));
    let name = |s: &&str| {
        s.contains('-')
            && s.split('-').all(|w| w.len() > 1 && w.chars().all(|c| c.is_ascii_lowercase()))
    };
    literals.filter(name).map(String::from).collect()
}

#[test]
fn a_fault() {
    let mut todo = Todo::default();
    let sources: String = ["src/validate/diagnosis", "src/validate/ranks"]
        .iter()
        .flat_map(|folder| files(folder, "rs"))
        .map(|p| source(&p))
        .collect();
    let format = page("paper-notes/dump-format.md");
    let faults = section(&format, "## Faults").expect("the section of faults");
    let listed: BTreeSet<String> = faults.lines().flat_map(code_spans).map(String::from).collect();
    assert!(listed.len() > 40, "{} faults were found", listed.len());
    for name in &listed {
        todo.require(
            sources.contains(&format!("\"{name}\"")),
            format!("{name}: listed, but nothing recognises it"),
        );
    }
    for name in hyphenated_literals(&sources) {
        todo.require(listed.contains(&name), format!("{name}: its name in dump-format.md"));
    }
    let test = page("tests/validation.rs");
    let table =
        test.split("const FAULTS").nth(1).and_then(|t| t.split("];").next()).expect("FAULTS");
    for entry in std::fs::read_dir(root().join("tests/data/dumps/faults")).expect("the faults") {
        let name = stem(&entry.expect("an entry").path());
        let row = table.lines().find(|l| l.trim().starts_with(&format!("(\"{name}\",")));
        todo.require(row.is_some(), format!("{name}: a row of FAULTS in tests/validation.rs"));
        let fault = row.and_then(|l| l.split('"').nth(3)).unwrap_or_default();
        todo.require(
            row.is_none() || listed.contains(fault),
            format!("{fault}: its name in dump-format.md"),
        );
    }
}

/// The table of modules on the crate's front page is the order in which they may use each other.
#[test]
fn modules_use_those_above_them() {
    let mut todo = Todo::default();
    let front = page("src/lib.rs");
    let after = front.split("# Where things are").nth(1).expect("the table of modules");
    let rows = after
        .lines()
        .skip_while(|l| !l.starts_with("//! |"))
        .take_while(|l| l.starts_with("//! |"));
    let order: Vec<String> = rows
        .flat_map(|row| {
            code_spans(row.split('|').nth(1).unwrap_or_default())
                .map(String::from)
                .collect::<Vec<_>>()
        })
        .collect();
    assert!(order.len() > 10, "{order:?}");
    let rank = |module: &str| order.iter().position(|m| m == module);
    let mut uses = 0;
    for path in files("src", "rs") {
        let below = path.strip_prefix(root().join("src")).expect("below src");
        let module = below
            .components()
            .next()
            .and_then(|c| Path::new(c.as_os_str()).file_stem()?.to_str())
            .unwrap_or_default();
        let Some(own) = rank(module) else { continue };
        let text = source(&path);
        for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
            for (at, found) in line.match_indices("crate::") {
                let rest = &line[at + found.len()..];
                let used = rest
                    .split(|c: char| !(c.is_alphanumeric() || c == '_'))
                    .next()
                    .unwrap_or_default();
                let Some(other) = rank(used) else { continue };
                uses += 1;
                todo.require(
                    other <= own,
                    format!("{}: {module} uses {used}, which stands below it", path.display()),
                );
            }
        }
    }
    assert!(uses > 200, "{uses} uses were found");
}

/// A release changes three files: Cargo.toml, CHANGELOG.md and CITATION.cff.
#[test]
fn a_release() {
    let mut todo = Todo::default();
    let version = env!("CARGO_PKG_VERSION");
    let newest = page("CHANGELOG.md")
        .lines()
        .find(|l| l.starts_with("## "))
        .map(String::from)
        .unwrap_or_default();
    todo.require(
        newest.starts_with(&format!("## {version} ")),
        format!("CHANGELOG.md begins with {newest}, not {version}"),
    );
    let cited = page("CITATION.cff").lines().any(|l| l == format!("version: {version}"));
    todo.require(cited, format!("CITATION.cff: version: {version}"));
    // The papers that the notes cite by their own page are cited there too.
    let citation = page("CITATION.cff");
    for number in ["2406.03136", "2503.01905", "2412.06289"] {
        todo.require(citation.contains(number), format!("CITATION.cff: arXiv {number}"));
    }
}
