//! The one step that several processes made, as a dump of one process: rows put together, parts of
//! tensors joined.
//!
//! Where copies of a tensor differ there is a view of the step for each: what the step would be if
//! all held what this process holds. Processes whose copies agree to the bit share one.

use super::batch::Division;
use super::divisors::nearer;
use super::layout::{Across, Part};
use super::read::{Rank, Ranks};
use crate::error::{Error, Result};
use crate::tensor_file::{TensorFile, TensorWriter, write_float};
use crate::validate::dump::DumpPaths;
use crate::validate::manifest::Manifest;
use crate::validate::names::canonical_name;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Groups of tensors that belong to a parameter.
const OF_PARAMETERS: [&str; 7] =
    ["grad", "applied", "after", "previous", "exp_avg", "exp_avg_sq", "momentum_buffer"];
/// Of those, what only one of several copies may hold: optimizers divide their state.
const STATE: [&str; 3] = ["exp_avg", "exp_avg_sq", "momentum_buffer"];

/// A step of several processes as one of them sees it.
#[derive(Debug)]
pub struct View {
    /// The processes that see it so.
    pub ranks: Vec<usize>,
    /// Where the merged dump is.
    pub paths: DumpPaths,
    /// Its manifest.
    pub manifest: Manifest,
    /// Rows (or positions, where sequences are cut) of the merged batch that each part of the data
    /// has.
    pub spans: Vec<Range<usize>>,
    /// By which tokens the loss is divided, and whether the gradient of the loss says so.
    pub across: (Across, Told),
    /// Divisors of the micro-batches' losses under the other way.
    pub(super) otherwise: Vec<f64>,
}

/// How the division of the loss is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// The trainer declares it.
    Declared,
    /// The gradient of the loss at the logits is that.
    Recorded,
    /// Nothing says so; it is the habit.
    Assumed,
    /// Both are the same here.
    Same,
}

/// The merged dumps, in a folder that goes with this value.
#[derive(Debug)]
pub struct Views {
    _folder: tempfile::TempDir,
    /// The views; one where all copies agree.
    pub views: Vec<View>,
}

/// A file of each process.
type FileOf = fn(&Rank) -> Option<&TensorFile>;

impl Ranks {
    /// The views of the step, written as dumps of one process into a temporary folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming file and tensor: parts that do not add up to the
    /// tensor, a tensor that some processes lack, batches that do not fit each other.
    pub fn views(&self) -> Result<Views> {
        let folder = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        let mut seen: BTreeMap<Vec<u64>, usize> = BTreeMap::new();
        let mut views: Vec<View> = Vec::new();
        let mut hashes = HashMap::new();
        let model = self.write_model(folder.path())?;
        for rank in 0..self.size() {
            let key = self.key(rank, &mut hashes)?;
            if let Some(&at) = seen.get(&key) {
                views[at].ranks.push(rank);
                continue;
            }
            seen.insert(key, views.len());
            views.push(self.write_view(
                rank,
                &folder.path().join(format!("view-{rank}")),
                model.as_deref(),
            )?);
        }
        Ok(Views { _folder: folder, views })
    }

    /// Processes with the parts of a tensor as one of them sees it: for each part that process
    /// itself if it holds it, else the one that stands where it does among the part's copies. Empty
    /// if it should hold the tensor and does not.
    pub(super) fn holders(&self, rank: usize, name: &str, of: FileOf) -> Vec<usize> {
        let mut parts: BTreeMap<Option<&Part>, Vec<usize>> = BTreeMap::new();
        for (number, other) in self.ranks.iter().enumerate() {
            let part = other.part(name);
            if part.is_none_or(|p| p.entries() > 0)
                && of(other).is_some_and(|file| file.contains(name))
            {
                parts.entry(part).or_default().push(number);
            }
        }
        let mine = self.ranks[rank].part(name);
        let place = parts.get(&mine).and_then(|all| all.iter().position(|n| *n == rank));
        let state = name.split_once('.').is_some_and(|(group, _)| STATE.contains(&group));
        if mine.is_none_or(|p| p.entries() > 0) && place.is_none() && !state {
            return Vec::new();
        }
        parts.into_values().map(|all| all[place.unwrap_or(0).min(all.len() - 1)]).collect()
    }

    fn names(&self, of: FileOf) -> BTreeSet<String> {
        self.ranks.iter().filter_map(of).flat_map(|file| file.names().map(str::to_string)).collect()
    }

    /// What a process sees, as numbers: equal for processes that see the same bits.
    fn key(
        &self,
        rank: usize,
        hashes: &mut HashMap<(usize, usize, String), u64>,
    ) -> Result<Vec<u64>> {
        let mut key = Vec::new();
        let files: [FileOf; 2] = [|r| Some(&r.step), |r| r.adapter.as_ref()];
        for (number, of) in files.into_iter().enumerate() {
            for name in self.names(of) {
                let chosen = if number == 1 || is_of_parameter(&name) {
                    self.holders(rank, &name, of)
                } else {
                    self.speakers(rank)
                };
                key.push(chosen.len() as u64);
                for holder in chosen {
                    let place = (number, holder, name.clone());
                    let hash = match (hashes.get(&place), of(&self.ranks[holder])) {
                        (Some(&hash), _) => hash,
                        (None, Some(file)) if file.contains(&name) => {
                            let mut hasher = DefaultHasher::new();
                            file.bytes(&name, "listed in the file")?.1.hash(&mut hasher);
                            hasher.finish()
                        }
                        _ => 0,
                    };
                    hashes.insert(place, hash);
                    key.push(hash);
                }
            }
        }
        // Groups of an optimizer belong to what a process sees as well.
        let mut hasher = DefaultHasher::new();
        self.ranks[rank].json.get("optimizer").map(Value::to_string).hash(&mut hasher);
        key.push(hasher.finish());
        Ok(key)
    }

    /// For each part of the data the process that speaks for it, as seen by one of them.
    pub(super) fn speakers(&self, rank: usize) -> Vec<usize> {
        let of = self.ranks[rank].parallel.data.of;
        let tensor = |n: usize| self.ranks[n].parallel.tensor.map_or(0, |place| place.index);
        let speaks = |part: usize| {
            let all = || (0..self.size()).filter(|&n| self.ranks[n].parallel.data.index == part);
            let near =
                all().find(|&n| n == rank).or_else(|| all().find(|&n| tensor(n) == tensor(rank)));
            near.or_else(|| all().next()).unwrap_or(rank)
        };
        (0..of).map(speaks).collect()
    }

    /// A tensor put together from its parts.
    fn assemble(
        &self,
        name: &str,
        of: FileOf,
        chosen: &[usize],
    ) -> Result<(Dtype, Vec<usize>, Vec<u8>)> {
        let (mut whole, mut filled, mut unit) = (Vec::new(), Vec::new(), 0);
        let summands = chosen
            .iter()
            .filter_map(|&n| self.ranks[n].part(name))
            .map(Part::summands)
            .max()
            .unwrap_or(1);
        let mut sum: Vec<f64> = Vec::new();
        let mut first: Option<(Dtype, Vec<usize>)> = None;
        for &number in chosen {
            let rank = &self.ranks[number];
            let Some(file) = of(rank) else { continue };
            let (dtype, bytes) = file.bytes(name, "the part of this process")?;
            let held = file.shape(name).unwrap_or_default();
            let part = rank.part(name);
            let shape = part.map_or(held, Part::shape);
            let fits = match part {
                Some(Part::Block { size, .. }) => size == held,
                Some(part) => part.entries() == held.iter().product::<usize>(),
                None => true,
            };
            let tensor = || format!("tensor {name}");
            if !fits {
                let expected = format!(
                    "{} entries, those of its part: {part:?}",
                    part.map_or(0, Part::entries)
                );
                return Err(file.malformed(tensor(), expected, format!("shape {held:?}")));
            }
            let (dtype_0, shape_0) = first.get_or_insert_with(|| (dtype, shape.to_vec()));
            if *dtype_0 != dtype || shape_0 != shape {
                let expected = format!("{dtype_0:?} {shape_0:?}, as in rank {}", chosen[0]);
                return Err(file.malformed(tensor(), expected, format!("{dtype:?} {shape:?}")));
            }
            let entries: usize = shape.iter().product();
            if whole.is_empty() {
                unit = bytes.len().checked_div(held.iter().product()).unwrap_or(1);
                (whole, filled) = (vec![0u8; entries * unit], vec![0; entries]);
            }
            for (there, here, n) in part.map_or_else(|| vec![(0, 0, entries)], Part::runs) {
                if filled[there..there + n].iter().any(|f| *f >= summands) {
                    let found = format!("entries {there}..{} a second time", there + n);
                    return Err(file.malformed(tensor(), "parts that do not overlap", found));
                }
                filled[there..there + n].iter_mut().for_each(|f| *f += 1);
                if summands > 1 {
                    sum.resize(entries, 0.0);
                    let values = file.raw_tensor::<f64>(name, "the summand of this process")?.1;
                    sum[there..there + n]
                        .iter_mut()
                        .zip(&values[here..here + n])
                        .for_each(|(a, b)| *a += b);
                    continue;
                }
                whole[there * unit..(there + n) * unit]
                    .copy_from_slice(&bytes[here * unit..(here + n) * unit]);
            }
        }
        let Some((dtype, shape)) = first else {
            return Err(Error::format(
                &self.folder,
                format!("tensor {name}"),
                "a part of it on some rank",
                "none",
            ));
        };
        let there = filled.iter().filter(|f| **f == summands).count();
        if there < filled.len() {
            let held = |n: &usize| {
                format!("rank {n}: {}", self.ranks[*n].part(name).map_or(0, Part::entries))
            };
            let found =
                format!("{there} ({})", chosen.iter().map(held).collect::<Vec<_>>().join(", "));
            let expected =
                format!("{} entries (shape {shape:?}) in all ranks' parts together", filled.len());
            return Err(Error::format(&self.folder, format!("tensor {name}"), expected, found));
        }
        for (x, to) in sum.iter().zip(whole.chunks_exact_mut(unit.max(1))) {
            write_float(dtype, *x, to);
        }
        Ok((dtype, shape, whole))
    }

    /// The base model where it is divided: written whole, once.
    fn write_model(&self, folder: &Path) -> Result<Option<PathBuf>> {
        let of: FileOf = |r| r.model.as_ref();
        if self.ranks.iter().all(|r| r.model.is_none()) {
            return Ok(None);
        }
        let folder = folder.join("model");
        self.write_joined(of, &folder.join("model.safetensors"), 0)?;
        copy(&self.ranks[0].folder.join("model/config.json"), &folder.join("config.json"))?;
        Ok(Some(folder))
    }

    /// A file with every tensor of the processes' files whole, as one of them sees it.
    fn write_joined(&self, of: FileOf, to: &Path, rank: usize) -> Result<()> {
        let mut writer = TensorWriter::new();
        writer.metadata("format", "pt");
        for name in self.names(of) {
            let mut chosen = self.holders(rank, &name, of);
            if chosen.is_empty() {
                // Whole elsewhere.
                chosen.extend(
                    (0..self.size())
                        .find(|&n| of(&self.ranks[n]).is_some_and(|file| file.contains(&name))),
                );
            }
            let (dtype, shape, bytes) = self.assemble(&name, of, &chosen)?;
            writer.raw(&name, dtype, &shape, bytes);
        }
        writer.write(to)
    }

    fn write_view(&self, rank: usize, folder: &Path, model: Option<&Path>) -> Result<View> {
        let own = &self.ranks[rank];
        let speakers = self.speakers(rank);
        let mut writer = TensorWriter::new();
        for name in self.names(|r| Some(&r.step)).into_iter().filter(|name| is_of_parameter(name)) {
            let chosen = self.holders(rank, &name, |r| Some(&r.step));
            if !chosen.is_empty() {
                let (dtype, shape, bytes) = self.assemble(&name, |r| Some(&r.step), &chosen)?;
                writer.raw(&name, dtype, &shape, bytes);
            }
        }
        let Division { counted, spans } = self.write_batch(&speakers, &mut writer)?;
        let mut json = own.json.clone();
        let adapter = match &own.manifest.adapter {
            Some(place) if own.adapter.is_some() && self.is_divided(|r| r.adapter.as_ref()) => {
                let to = folder.join("adapter");
                self.write_joined(
                    |r| r.adapter.as_ref(),
                    &to.join("adapter_model.safetensors"),
                    rank,
                )?;
                copy(
                    &own.folder.join(place).join("adapter_config.json"),
                    &to.join("adapter_config.json"),
                )?;
                Some(to)
            }
            place => place.as_ref().map(|place| own.folder.join(place)),
        };
        let model = model.map_or_else(|| own.folder.join(&own.manifest.model), Path::to_path_buf);
        let [means, global] =
            [Across::RankMean, Across::GlobalMean].map(|a| self.divisors(&speakers, &counted, a));
        let same = means.iter().zip(&global).all(|(a, b)| (a / b - 1.0).abs() < 1e-9);
        let observed =
            || self.observed_divisors(&speakers).map(|seen| nearer(&seen, [&means, &global]));
        let across = match (own.parallel.loss, same) {
            (Some(declared), _) => (declared, Told::Declared),
            (None, true) => (Across::RankMean, Told::Same),
            (None, false) => {
                observed().map_or((Across::RankMean, Told::Assumed), |a| (a, Told::Recorded))
            }
        };
        let (divisors, otherwise) =
            if across.0 == Across::RankMean { (means, global) } else { (global, means) };
        let micro: Vec<usize> = counted.iter().flatten().map(|(rows, _)| *rows).collect();
        if let Some(map) = json.as_object_mut() {
            map.remove("parallel");
            map.remove("check");
            map.insert("model".into(), json!(absolute(&model)?));
            map.insert(
                "adapter".into(),
                adapter.as_deref().map_or(Ok(Value::Null), |a| absolute(a).map(Value::from))?,
            );
            if let Some(loss) = map.get_mut("loss").and_then(Value::as_object_mut) {
                loss.insert("micro_batch_rows".into(), json!(micro));
                loss.insert("micro_batch_divisors".into(), json!(divisors));
            }
        }
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        writer.write(&folder.join("step.safetensors"))?;
        let text = serde_json::to_string_pretty(&json).unwrap_or_default();
        crate::atomic_file::write_bytes(&folder.join("manifest.json"), text.as_bytes())?;
        let (paths, manifest) = DumpPaths::of_folder(folder)?;
        Ok(View { ranks: vec![rank], paths, manifest, spans, across, otherwise })
    }

    fn is_divided(&self, of: FileOf) -> bool {
        let names = self.names(of);
        names
            .iter()
            .any(|name| self.ranks.iter().any(|r| r.parts.contains_key(&canonical_name(name))))
    }
}

/// The parameter's name in that of a tensor of the step; a name of another file is that already.
pub(super) fn parameter(name: &str) -> &str {
    match name.split_once('.') {
        Some((group, rest)) if OF_PARAMETERS.contains(&group) => rest,
        _ => name,
    }
}

pub(super) fn is_of_parameter(name: &str) -> bool {
    parameter(name).len() < name.len()
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = std::fs::read(from).map_err(|e| Error::io(from, e))?;
    crate::atomic_file::write_bytes(to, &bytes)
}

/// A path as a manifest elsewhere can name it.
fn absolute(path: &Path) -> Result<String> {
    let whole = std::path::absolute(path).map_err(|e| Error::io(path, e))?;
    Ok(whole.display().to_string())
}
