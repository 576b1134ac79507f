//! The notes stay true: links resolve, the index from equation to function is complete and names
//! what exists, the glossary's names are public, and numbers quoted from a figure stand in that
//! figure's findings.

use crate::pages::{code_spans, files, page, prose, root, section};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn notes() -> Vec<PathBuf> {
    files("paper-notes", "md")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Whether `source` defines an item of that name, or implements a type of that name.
fn defines(source: &str, item: &str) -> bool {
    let whole = |at: usize, length: usize| {
        !source[at + length..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
    };
    let implements = |line: &str| {
        line.starts_with("impl") && line.split(|c: char| !c.is_alphanumeric()).any(|w| w == item)
    };
    if source.lines().any(implements) {
        return true;
    }
    ["fn ", "struct ", "enum ", "trait ", "const ", "type ", "mod "].iter().any(|keyword| {
        let pattern = format!("{keyword}{item}");
        source.match_indices(&pattern).any(|(at, found)| whole(at, found.len()))
    })
}

fn is_item(span: &str) -> bool {
    span.split("::").all(|part| {
        part.starts_with(|c: char| c.is_alphabetic() || c == '_')
            && part.chars().all(|c| c.is_alphanumeric() || c == '_')
    })
}

/// Items that a table row names in a file but that the file does not define. A row holds ``
/// `src/file.rs`: `item` `` one or more times; a later bare file name (`` `polynomial.rs` ``) lies
/// in the folder of the file before it.
fn missing(line: &str, names: &mut usize) -> Vec<String> {
    let mut missing = Vec::new();
    let mut file: Option<(PathBuf, String)> = None;
    for span in code_spans(line) {
        if span.ends_with(".rs") {
            let path = match (&file, span.contains('/')) {
                (Some((before, _)), false) => before.with_file_name(span),
                _ => root().join(span),
            };
            match std::fs::read_to_string(&path) {
                Ok(source) => file = Some((path, source)),
                Err(error) => missing.push(format!("{span}: {error}")),
            }
            continue;
        }
        if let (Some((path, source)), true) = (&file, is_item(span)) {
            *names += 1;
            for part in span.split("::") {
                if !defines(source, part) {
                    missing.push(format!("`{span}` in {}", path.display()));
                }
            }
        }
    }
    missing
}

#[test]
fn every_item_of_the_tables_exists() {
    let mut names = 0;
    let mut problems = Vec::new();
    for path in notes() {
        for (number, line) in
            read(&path).lines().enumerate().filter(|(_, line)| line.starts_with('|'))
        {
            for problem in missing(line, &mut names) {
                problems.push(format!("{}:{}: {problem}", path.display(), number + 1));
            }
        }
    }
    assert!(names > 120, "the tables were not read: {names} names");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn a_wrong_row_is_found() {
    let mut names = 0;
    assert!(missing("| (1) | `src/cost.rs`: `Cost` |", &mut names).is_empty());
    assert_eq!(missing("| (1) | `src/cost.rs`: `Cots` |", &mut names).len(), 1);
    assert_eq!(missing("| (1) | `src/lost.rs`: `Cost` |", &mut names).len(), 1);
}

/// Numbers in parentheses, ranges `(5) to (9)` filled in.
fn numbers(text: &str) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut before: Option<(u32, usize)> = None;
    for (at, _) in text.match_indices('(') {
        let Some(end) = text[at..].find(')') else { continue };
        let Ok(number) = text[at + 1..at + end].parse() else { continue };
        if let Some((first, end)) = before
            && text[end..at].trim() == "to"
        {
            found.extend(first..number);
        }
        found.insert(number);
        before = Some((number, at + end + 1));
    }
    found
}

#[test]
fn the_index_holds_every_numbered_equation() {
    assert_eq!(numbers("(2), f(x) and (5) to (7)"), BTreeSet::from([2, 5, 6, 7]));
    let index = page("paper-notes/README.md");
    let mut equations = 0;
    for path in notes() {
        let tagged: BTreeSet<u32> = read(&path)
            .split("\\tag{")
            .skip(1)
            .map(|rest| rest.split('}').next().unwrap_or_default().parse().expect("a numbered tag"))
            .collect();
        if tagged.is_empty() {
            continue;
        }
        let name = path.file_stem().and_then(|s| s.to_str()).expect("a name");
        let listed = section(&index, &format!("### {name}"))
            .unwrap_or_else(|| panic!("no index section for {name}"));
        let rows: String = listed
            .lines()
            .filter(|l| l.starts_with('|'))
            .flat_map(|l| l.split('|').nth(1))
            .collect();
        let lost: Vec<_> = tagged.difference(&numbers(&rows)).copied().collect();
        assert!(
            lost.is_empty(),
            "{name}: equations {lost:?} are not in the index of paper-notes/README.md"
        );
        equations += tagged.len();
    }
    assert!(equations > 20, "{equations} equations were found");
}

#[test]
fn every_note_is_linked_from_their_index() {
    let index = page("paper-notes/README.md");
    for path in notes() {
        let name = path.file_name().and_then(|n| n.to_str()).expect("a name");
        assert!(
            name == "README.md" || index.contains(&format!("]({name})")),
            "{name} is not linked"
        );
    }
}

/// GitHub's anchor of a heading.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars()
        .filter_map(|c| {
            if c == ' ' {
                Some('-')
            } else {
                (c.is_alphanumeric() || "-_".contains(c)).then_some(c)
            }
        })
        .collect()
}

/// Targets of the links and pictures of a line, code left out.
fn links(line: &str) -> Vec<&str> {
    let outside = |at: usize| line[..at].matches('`').count().is_multiple_of(2);
    let targets = line.match_indices("](").filter(|(at, _)| outside(*at));
    targets.filter_map(|(at, _)| line[at + 2..].split([')', ' ']).next()).collect()
}

/// Why a link of a page does not resolve.
fn broken(page: &Path, target: &str) -> Option<String> {
    if ["http://", "https://", "mailto:"].iter().any(|scheme| target.starts_with(scheme)) {
        return None;
    }
    let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
    let path = if file.is_empty() {
        page.to_path_buf()
    } else {
        page.parent().expect("a folder").join(file)
    };
    if !path.exists() {
        return Some("no such file".into());
    }
    if fragment.is_empty() || path.extension().is_none_or(|e| e != "md") {
        return None;
    }
    let text = read(&path);
    let headings: Vec<String> = prose(&text).filter(|l| l.starts_with('#')).map(anchor).collect();
    (!headings.iter().any(|h| h == fragment)).then(|| "no such heading".into())
}

#[test]
fn every_relative_link_resolves() {
    let (mut problems, mut count) = (Vec::new(), 0);
    for path in files(".", "md") {
        let text = read(&path);
        for target in prose(&text).flat_map(links) {
            count += 1;
            problems.extend(
                broken(&path, target).map(|why| format!("{}: {target}: {why}", path.display())),
            );
        }
    }
    assert!(count > 60, "{count} links were found");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let here = root().join("README.md");
    assert!(
        broken(&here, "paper-notes/lost.md").is_some()
            && broken(&here, "paper-notes/README.md#lost").is_some()
    );
}

#[test]
fn every_path_in_code_marks_exists() {
    const FOLDERS: [&str; 9] = [
        "src/",
        "tests/",
        "experiments/",
        "examples/",
        "benches/",
        "python/",
        "paper-notes/",
        "notebooks/",
        "figures/",
    ];
    let mut problems = Vec::new();
    for path in files(".", "md") {
        for span in prose(&read(&path)).flat_map(code_spans) {
            // A command's own arguments are looked at by the test of commands; `<name>` and `*`
            // stand for many.
            let named =
                FOLDERS.iter().any(|f| span.starts_with(f)) && !span.contains(['<', '*', ' ', '{']);
            // Not committed: made by a run.
            if named && !span.starts_with("figures/quick") && !root().join(span).exists() {
                problems.push(format!("{}: {span}", path.display()));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Sources refer to notes by path; a page that was moved or renamed leaves none behind.
#[test]
fn every_note_named_in_a_source_exists() {
    let sources =
        ["src", "tests", "experiments", "benches", "examples"].map(|f| files(f, "rs")).concat();
    let mut count = 0;
    for path in sources.into_iter().chain(files("python", "py")) {
        // This file's own examples of broken names are not meant.
        if path.ends_with("tests/pages/notes_index.rs") {
            continue;
        }
        for rest in read(&path).split("paper-notes/").skip(1) {
            let name = rest
                .split(|c: char| !(c.is_alphanumeric() || "-.".contains(c)))
                .next()
                .unwrap_or_default();
            let name = name.trim_end_matches('.');
            if name.ends_with(".md") {
                count += 1;
                assert!(
                    root().join("paper-notes").join(name).exists(),
                    "{}: paper-notes/{name}",
                    path.display()
                );
            }
        }
    }
    assert!(count > 20, "{count} names were found");
}

/// Names that the library and the experiments make public: items, fields, methods, variants of
/// enumerations, functions of traits.
fn public_names() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in [files("src", "rs"), files("experiments/src", "rs")].concat() {
        let (mut inside_enum, mut inside_trait) = (false, false);
        for line in read(&path).lines() {
            let indent = line.len() - line.trim_start().len();
            let text = line.trim();
            (inside_enum, inside_trait) = match (indent, text) {
                (0, t) if t.starts_with("pub enum ") => (true, false),
                (0, t) if t.starts_with("pub trait ") => (false, true),
                (0, "}") => (false, false),
                _ => (inside_enum, inside_trait),
            };
            let mut words =
                text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty());
            let first = words.next().unwrap_or_default();
            let variant =
                inside_enum && indent == 4 && first.starts_with(|c: char| c.is_uppercase());
            if variant {
                names.insert(first.to_string());
            } else if inside_trait && indent == 4 && first == "fn" || text.starts_with("pub ") {
                const KEYWORDS: [&str; 9] =
                    ["fn", "const", "struct", "enum", "trait", "mod", "type", "static", "use"];
                names.extend(words.find(|w| !KEYWORDS.contains(w)).map(String::from));
            }
        }
    }
    names
}

#[test]
fn every_name_of_the_glossary_is_public() {
    let public = public_names();
    assert!(
        !public.contains("packing") && public.contains("AttentionProblem"),
        "private names were taken for public"
    );
    let glossary = page("paper-notes/glossary.md");
    let mut count = 0;
    for row in glossary.lines().filter(|l| l.starts_with('|')) {
        let cell = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        for part in code_spans(cell).flat_map(|span| span.split("::")) {
            count += 1;
            assert!(public.contains(part), "{part} is not public: {row}");
        }
    }
    assert!(count > 60, "{count} names were found");
}

/// Table rows, list items and paragraphs of a page, each as one text.
fn pieces(page: &str) -> Vec<String> {
    let mut pieces: Vec<String> = vec![String::new()];
    for line in prose(page) {
        let own = line.starts_with(['|', '#']) || line.starts_with("- ") || line.trim().is_empty();
        if own {
            pieces.push(String::new());
        }
        if let Some(last) = pieces.last_mut() {
            last.push_str(line);
            last.push(' ');
        }
    }
    pieces
}

/// Experiments whose findings a text links to.
fn cited(text: &str) -> Vec<&str> {
    let targets = links(text).into_iter().map(|t| t.trim_start_matches("../"));
    targets.filter_map(|t| t.strip_prefix("figures/")?.strip_suffix("/findings.md")).collect()
}

/// A figure that was run again with other numbers shows up here: the page has to follow.
#[test]
fn numbers_quoted_from_a_figure_stand_in_its_findings() {
    let mut count = 0;
    let mut problems = Vec::new();
    for path in notes().into_iter().chain([root().join("README.md")]) {
        for text in pieces(&read(&path)) {
            let sources: String = cited(&text)
                .iter()
                .map(|name| page(&format!("figures/{name}/findings.md")))
                .collect();
            // Numbers as the findings print them, with or without a word of context; not names of
            // files, parameters or figures.
            let name = |s: &str| s.contains(".rs") || s.contains(':') || cited(&text).contains(&s);
            let number = |s: &str| s.contains(|c: char| c.is_ascii_digit()) && !name(s);
            for quoted in code_spans(&text).filter(|s| !sources.is_empty() && number(s)) {
                count += 1;
                if !sources.contains(quoted) {
                    problems.push(format!(
                        "{}: `{quoted}` is not in the findings of {:?}",
                        path.display(),
                        cited(&text)
                    ));
                }
            }
        }
    }
    assert!(count > 50, "{count} numbers were compared");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
