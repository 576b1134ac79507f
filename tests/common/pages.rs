//! The project's Markdown pages, for the tests that keep them true.

// Every test binary uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A page below the project's root.
pub fn page(name: &str) -> String {
    let path = root().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every file of an extension below a folder; build outputs, hidden folders and results that are
/// not committed left out.
pub fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![root().join(folder)];
    while let Some(folder) = waiting.pop() {
        for entry in
            std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let skipped =
                name.starts_with('.') || ["target", "quick", "runs", "heads"].contains(&name);
            if path.is_dir() && !skipped {
                waiting.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Texts between backticks, in order.
pub fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Lines outside fenced blocks.
pub fn prose(page: &str) -> impl Iterator<Item = &str> {
    let mut inside = false;
    page.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        !inside && !fence
    })
}

/// The section under a heading line, up to the next heading of the same or a higher level.
pub fn section<'a>(page: &'a str, heading: &str) -> Option<&'a str> {
    let level = heading.chars().take_while(|c| *c == '#').count();
    let start = page.lines().position(|l| l == heading)?;
    let offset =
        |line: usize| page.lines().take(line).map(|l| l.len() + 1).sum::<usize>().min(page.len());
    let ends = |l: &str| {
        let n = l.chars().take_while(|c| *c == '#').count();
        n > 0 && n <= level && l[n..].starts_with(' ')
    };
    let end = page
        .lines()
        .enumerate()
        .skip(start + 1)
        .find(|(_, l)| ends(l))
        .map_or(page.len(), |(n, _)| offset(n));
    Some(&page[offset(start + 1)..end])
}
