//! The folders of all processes, checked against each other.

use super::layout::{Parallel, Part};
use super::merge::parameter;
use crate::error::{Error, Result};
use crate::tensor_file::TensorFile;
use crate::validate::manifest::Manifest;
use crate::validate::names::canonical_name;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What one process recorded.
#[derive(Debug)]
pub struct Rank {
    /// Its folder.
    pub folder: PathBuf,
    /// Its manifest, and the same as JSON.
    pub manifest: Manifest,
    pub(super) json: Value,
    /// What it held.
    pub parallel: Parallel,
    /// Parts of tensors by the reference's names.
    pub(super) parts: BTreeMap<String, Part>,
    /// Its tensors of the step.
    pub(super) step: TensorFile,
    /// Its adapter.
    pub(super) adapter: Option<TensorFile>,
    /// Its part of the base model, where that is divided.
    pub(super) model: Option<TensorFile>,
}

/// A step of several processes.
#[derive(Debug)]
pub struct Ranks {
    /// The dump.
    pub folder: PathBuf,
    /// The processes, by number.
    pub ranks: Vec<Rank>,
}

/// Numbers of the folders `rank-N` (and what follows that name) in a folder.
fn numbers(folder: &Path, end: &str) -> BTreeSet<usize> {
    let names = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.strip_prefix("rank-")?.strip_suffix(end)?.parse().ok()).collect()
}

/// Whether a folder holds a step of several processes.
pub fn is_of_ranks(folder: &Path) -> bool {
    let any = |end: &str| !numbers(folder, end).is_empty();
    !folder.join("manifest.json").exists() && (any("") || any(".failed") || any(".writing"))
}

impl Ranks {
    /// Reads what every process recorded.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the process's file and key: a process that is
    /// missing, did not finish or says why it could not record, numbers of processes, settings or
    /// parts of tensors that do not agree.
    pub fn read(folder: &Path) -> Result<Self> {
        let there = numbers(folder, "");
        let Some(&first) = there.first() else {
            return Err(unfinished(folder, 0, "rank-0"));
        };
        let first = Rank::read(folder, first)?;
        let size = first.parallel.world_size;
        if let Some(extra) = there.iter().find(|n| **n >= size) {
            let found = format!("rank-{extra}");
            return Err(Error::format(
                folder,
                "folders of ranks",
                format!("{size}, as rank 0 counts"),
                found,
            ));
        }
        let mut ranks = Vec::with_capacity(size);
        for number in 0..size {
            if !there.contains(&number) {
                let expected = format!(
                    "rank-{number} (the manifest of rank-{} counts {size})",
                    first.parallel.rank
                );
                return Err(unfinished(folder, number, &expected));
            }
            ranks.push(Rank::read(folder, number)?);
        }
        let all = Self { folder: folder.to_path_buf(), ranks };
        all.agree()?;
        Ok(all)
    }

    /// Refuses settings that differ.
    fn agree(&self) -> Result<()> {
        let first = &self.ranks[0];
        let keys: [(&str, &[&str]); 14] = [
            ("parallel.world_size", &["parallel", "world_size"]),
            ("parallel.data.cut", &["parallel", "data", "cut"]),
            ("parallel.data.of", &["parallel", "data", "of"]),
            ("parallel.tensor.of", &["parallel", "tensor", "of"]),
            ("parallel.reduce", &["parallel", "reduce"]),
            ("parallel.loss", &["parallel", "loss"]),
            ("compute", &["compute"]),
            ("loss.reduction", &["loss", "reduction"]),
            ("loss.scale", &["loss", "scale"]),
            ("loss.kind", &["loss", "kind"]),
            ("loss.divisor", &["loss", "divisor"]),
            ("loss.label_smoothing", &["loss", "label_smoothing"]),
            ("optimizer.kind", &["optimizer", "kind"]),
            ("optimizer.steps_before", &["optimizer", "steps_before"]),
        ];
        let at = |rank: &Rank, path: &[&str]| {
            path.iter()
                .try_fold(&rank.json, |value, key| value.get(key))
                .cloned()
                .unwrap_or(Value::Null)
        };
        for rank in &self.ranks[1..] {
            for (name, path) in keys {
                let (want, got) = (at(first, path), at(rank, path));
                if want != got {
                    return Err(rank.wrong(
                        format!("key {name}"),
                        format!("{want}, as in rank 0"),
                        got.to_string(),
                    ));
                }
            }
            let names = |rank: &Rank| {
                rank.manifest.trained.iter().flatten().cloned().collect::<BTreeSet<String>>()
            };
            if let Some(other) = names(first).symmetric_difference(&names(rank)).next() {
                let found = if names(first).contains(other) { "not trained" } else { "trained" };
                return Err(rank.wrong(
                    "key trained",
                    format!("the tensors of rank 0 (see {other})"),
                    found,
                ));
            }
            for (file, key) in [("config.json", "model"), ("adapter_config.json", "adapter")] {
                let read = |rank: &Rank| {
                    let place = rank.json.get(key)?.as_str()?;
                    let text = std::fs::read_to_string(rank.folder.join(place).join(file)).ok()?;
                    serde_json::from_str::<Value>(&text).ok()
                };
                if read(first) != read(rank) {
                    let found = "other settings, or no such file";
                    return Err(rank.wrong(format!("{key}'s {file}"), "that of rank 0", found));
                }
            }
        }
        let of = first.parallel.data.of;
        let missing = (0..of).find(|i| !self.ranks.iter().any(|r| r.parallel.data.index == *i));
        if let Some(index) = missing {
            let expected = format!("every part of the data, 0..{of}, on some rank");
            return Err(first.wrong(
                "key parallel.data",
                expected,
                format!("nobody has part {index}"),
            ));
        }
        Ok(())
    }

    /// Numbers of the processes.
    pub fn size(&self) -> usize {
        self.ranks.len()
    }
}

/// The error of a process that left no folder.
fn unfinished(folder: &Path, number: usize, expected: &str) -> Error {
    let name = format!("rank-{number}");
    if let Ok(why) = std::fs::read_to_string(folder.join(format!("{name}.failed"))) {
        return Error::format(
            folder,
            &name,
            "what the process recorded",
            format!("its reason why not: {}", why.trim()),
        );
    }
    if folder.join(format!("{name}.writing")).exists() {
        return Error::format(
            folder,
            &name,
            expected,
            format!("{name}.writing: the process did not finish recording"),
        );
    }
    Error::format(folder, &name, expected, "nothing of that name")
}

impl Rank {
    fn read(folder: &Path, number: usize) -> Result<Self> {
        let folder = folder.join(format!("rank-{number}"));
        let path = folder.join("manifest.json");
        let manifest = Manifest::read(&path)?;
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let json = serde_json::from_str(&text)
            .map_err(|e| Error::format(&path, "file", "a JSON object", e.to_string()))?;
        let wrong = |key: &str, expected: String, found: String| {
            Err(Error::format(&path, key, expected, found))
        };
        let Some(parallel) = manifest.parallel.clone() else {
            return wrong(
                "key parallel",
                "the place of this process among the others".into(),
                "nothing".into(),
            );
        };
        if parallel.rank != number {
            return wrong(
                "key parallel.rank",
                format!("{number}, as the folder's name"),
                parallel.rank.to_string(),
            );
        }
        let data = parallel.data;
        if parallel.world_size <= number || data.index >= data.of.min(parallel.world_size) {
            let found = format!(
                "world_size {}, data part {} of {}",
                parallel.world_size, data.index, data.of
            );
            return wrong(
                "key parallel",
                format!("numbers below those of all, for rank {number}"),
                found,
            );
        }
        for (name, part) in &parallel.shards {
            if let Some(defect) = part.defect() {
                return wrong(
                    &format!("key parallel.shards, {name}"),
                    "a part inside the tensor".into(),
                    defect,
                );
            }
        }
        let step = TensorFile::open_on_disk(folder.join("step.safetensors"))?;
        let own = |place: Option<&str>, file: &str| {
            place.map(|place| TensorFile::open_on_disk(folder.join(place).join(file))).transpose()
        };
        let adapter = own(manifest.adapter.as_deref(), "adapter_model.safetensors")?;
        let model = own((manifest.model == "model").then_some("model"), "model.safetensors")?;
        let parts = parallel.parts();
        Ok(Self { folder, manifest, json, parallel, parts, step, adapter, model })
    }

    /// Its part of a tensor; `None` for all of it.
    pub(super) fn part(&self, name: &str) -> Option<&Part> {
        let parameter = parameter(name);
        let (group, own) = (&name[..name.len() - parameter.len()], canonical_name(parameter));
        self.parts.get(&format!("{group}{own}")).or_else(|| self.parts.get(&own))
    }

    /// An error of this process's manifest.
    pub(super) fn wrong(
        &self,
        key: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::format(self.folder.join("manifest.json"), key, expected, found)
    }
}
