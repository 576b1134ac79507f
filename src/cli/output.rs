//! Output files: whether they can be written, before anything is computed; what stands beside a model.

use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Refuses an output file that is a folder, that is one of the inputs, or that cannot be written.
pub(super) fn check_file(flag: &str, path: &Path, inputs: &[&Path]) -> Result<()> {
    if path.is_dir() || path.file_name().is_none() {
        return Err(Error::invalid(flag, path.display(), "must be a file; this is a folder"));
    }
    differs(flag, path, inputs)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    check_writable(folder)
}

/// Refuses an output folder that is a file, that is one of the inputs, or that cannot be written.
pub(super) fn check_folder(flag: &str, path: &Path, inputs: &[&Path]) -> Result<()> {
    if path.exists() && !path.is_dir() {
        return Err(Error::invalid(flag, path.display(), "must be a folder; this is a file"));
    }
    differs(flag, path, inputs)?;
    check_writable(path)
}

fn differs(flag: &str, path: &Path, inputs: &[&Path]) -> Result<()> {
    let Ok(real) = path.canonicalize() else { return Ok(()) };
    match inputs.iter().find(|input| input.canonicalize().is_ok_and(|input| input == real)) {
        Some(input) => {
            let why = format!(
                "is the input {} too; writing it would replace what is read",
                input.display()
            );
            Err(Error::invalid(flag, path.display(), why))
        }
        None => Ok(()),
    }
}

/// Tries a temporary file in the folder, or in the nearest one above it that is there.
fn check_writable(folder: &Path) -> Result<()> {
    let there: PathBuf = folder
        .ancestors()
        .map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p })
        .find(|p| p.exists())
        .unwrap_or(Path::new("."))
        .into();
    tempfile::Builder::new()
        .prefix(".writing-")
        .tempfile_in(&there)
        .map(drop)
        .map_err(|e| Error::io(folder, e))
}

/// What a checkpoint folder holds beside the model.
const OF_TOKENIZER: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// Copies what stands beside a model from one checkpoint folder to another; each file appears whole or not at all.
pub(super) fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    for name in OF_TOKENIZER {
        let source = from.join(name);
        if source.is_file() {
            let bytes = std::fs::read(&source).map_err(|e| Error::io(&source, e))?;
            write_bytes(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_refused_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        let (file, inner) = (folder.path().join("a"), folder.path().join("new/deep/b"));
        std::fs::write(&file, b"x").unwrap();
        check_file("-o", &inner, &[&file]).unwrap();
        check_folder("-o", &inner, &[folder.path()]).unwrap();
        assert!(!folder.path().join("new").exists(), "a check makes nothing");
        let name = |outcome: Result<()>| match outcome {
            Err(Error::InvalidParam { name, requirement, .. }) => (name, requirement),
            other => panic!("{other:?}"),
        };
        assert!(name(check_file("-o", folder.path(), &[])).1.contains("a folder"));
        assert!(name(check_folder("-o", &file, &[])).1.contains("a file"));
        let round = folder.path().join(".").join("a");
        assert_eq!(name(check_file("-o", &round, &[&file])).0, "-o");
        let below_a_file = file.join("b");
        assert!(matches!(check_file("-o", &below_a_file, &[]), Err(Error::Io { .. })));
    }
}
