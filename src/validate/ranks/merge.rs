//! The one step that several processes made, as a dump of one process: rows put together, parts of tensors joined.
//!
//! Where copies of a tensor differ there is a view of the step for each: what the step would be if all held what this
//! process holds. Processes whose copies agree to the bit share one.

use super::layout::{Across, Cut, Part, Reduce};
use super::read::{Rank, Ranks};
use crate::error::{Error, Result};
use crate::tensor_file::{TensorFile, TensorWriter};
use crate::validate::dump::DumpPaths;
use crate::validate::manifest::{Manifest, Reduction};
use crate::validate::names::canonical_name;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Groups of tensors that belong to a parameter.
const OF_PARAMETERS: [&str; 7] = ["grad", "applied", "after", "previous", "exp_avg", "exp_avg_sq", "momentum_buffer"];
/// Of those, what only one of several copies may hold: optimizers divide their state.
const STATE: [&str; 3] = ["exp_avg", "exp_avg_sq", "momentum_buffer"];
/// Predictions of a label are told from padding by this label.
const IGNORED: i64 = crate::blocks::cross_entropy::IGNORED_LABEL;

/// A step of several processes as one of them sees it.
#[derive(Debug)]
pub struct View {
    /// The processes that see it so.
    pub ranks: Vec<usize>,
    /// Where the merged dump is.
    pub paths: DumpPaths,
    /// Its manifest.
    pub manifest: Manifest,
    /// Rows (or positions, where sequences are cut) of the merged batch that each part of the data has.
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

/// Rows of a tensor of the batch.
struct Rows {
    shape: Vec<usize>,
    dtype: Dtype,
    bytes: Vec<u8>,
}

impl Rows {
    fn unit(&self) -> usize {
        self.bytes.len().checked_div(self.shape.iter().product()).unwrap_or(1)
    }

    /// Bytes of one position of one row.
    fn position(&self) -> usize {
        self.unit() * self.shape[2..].iter().product::<usize>()
    }

    fn integers(shape: [usize; 2], of: impl Fn(usize) -> i64) -> Self {
        let bytes = (0..shape[0] * shape[1]).flat_map(|i| of(i % shape[1]).to_le_bytes()).collect();
        Self { shape: shape.to_vec(), dtype: Dtype::I64, bytes }
    }

    /// Padded on the right to another length.
    fn padded(self, length: usize, fill: i64) -> Self {
        let (rows, old, position) = (self.shape[0], self.shape[1], self.position());
        if old == length {
            return self;
        }
        // Only labels are filled with anything but zeros, and they are integers.
        let fill = if self.dtype == Dtype::I64 { fill.to_le_bytes().to_vec() } else { vec![0; position] };
        let mut bytes = Vec::with_capacity(rows * length * position);
        for row in 0..rows {
            bytes.extend_from_slice(&self.bytes[row * old * position..(row + 1) * old * position]);
            (old..length).for_each(|_| bytes.extend_from_slice(&fill));
        }
        let shape = [&[rows, length], &self.shape[2..]].concat();
        Self { shape, dtype: self.dtype, bytes }
    }
}

impl Ranks {
    /// The views of the step, written as dumps of one process into a temporary folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming file and tensor: parts that do not add up to the tensor, a tensor that some
    /// processes lack, batches that do not fit each other.
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
            views.push(self.write_view(rank, &folder.path().join(format!("view-{rank}")), model.as_deref())?);
        }
        Ok(Views { _folder: folder, views })
    }

    /// Processes with the parts of a tensor as one of them sees it: for each part that process itself if it holds it, else
    /// the one that stands where it does among the part's copies. Empty if it should hold the tensor and does not.
    pub(super) fn holders(&self, rank: usize, name: &str, of: FileOf) -> Vec<usize> {
        let own = canonical_name(parameter(name));
        let mut parts: BTreeMap<Option<&Part>, Vec<usize>> = BTreeMap::new();
        for (number, other) in self.ranks.iter().enumerate() {
            let part = other.parts.get(&own);
            if part.is_none_or(|p| p.entries() > 0) && of(other).is_some_and(|file| file.contains(name)) {
                parts.entry(part).or_default().push(number);
            }
        }
        let mine = self.ranks[rank].parts.get(&own);
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
    fn key(&self, rank: usize, hashes: &mut HashMap<(usize, usize, String), u64>) -> Result<Vec<u64>> {
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
            let near = all().find(|&n| n == rank).or_else(|| all().find(|&n| tensor(n) == tensor(rank)));
            near.or_else(|| all().next()).unwrap_or(rank)
        };
        (0..of).map(speaks).collect()
    }

    /// A tensor put together from its parts.
    fn assemble(&self, name: &str, of: FileOf, chosen: &[usize]) -> Result<(Dtype, Vec<usize>, Vec<u8>)> {
        let own = canonical_name(parameter(name));
        let (mut whole, mut filled, mut unit) = (Vec::new(), Vec::new(), 0);
        let mut first: Option<(Dtype, Vec<usize>)> = None;
        for &number in chosen {
            let rank = &self.ranks[number];
            let Some(file) = of(rank) else { continue };
            let (dtype, bytes) = file.bytes(name, "the part of this process")?;
            let held = file.shape(name).unwrap_or_default();
            let part = rank.parts.get(&own);
            let shape = part.map_or(held, Part::shape);
            let fits = match part {
                Some(Part::Block { size, .. }) => size == held,
                Some(part) => part.entries() == held.iter().product::<usize>(),
                None => true,
            };
            let tensor = || format!("tensor {name}");
            if !fits {
                let expected = format!("{} entries, those of its part: {part:?}", part.map_or(0, Part::entries));
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
                (whole, filled) = (vec![0u8; entries * unit], vec![false; entries]);
            }
            for (there, here, n) in part.map_or_else(|| vec![(0, 0, entries)], Part::runs) {
                if filled[there..there + n].iter().any(|f| *f) {
                    let found = format!("entries {there}..{} a second time", there + n);
                    return Err(file.malformed(tensor(), "parts that do not overlap", found));
                }
                filled[there..there + n].fill(true);
                whole[there * unit..(there + n) * unit].copy_from_slice(&bytes[here * unit..(here + n) * unit]);
            }
        }
        let Some((dtype, shape)) = first else {
            return Err(Error::format(&self.folder, format!("tensor {name}"), "a part of it on some rank", "none"));
        };
        let there = filled.iter().filter(|f| **f).count();
        if there < filled.len() {
            let held = |n: &usize| format!("rank {n}: {}", self.ranks[*n].parts.get(&own).map_or(0, Part::entries));
            let found = format!("{there} ({})", chosen.iter().map(held).collect::<Vec<_>>().join(", "));
            let expected = format!("{} entries (shape {shape:?}) in all ranks' parts together", filled.len());
            return Err(Error::format(&self.folder, format!("tensor {name}"), expected, found));
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
                chosen.extend((0..self.size()).find(|&n| of(&self.ranks[n]).is_some_and(|file| file.contains(&name))));
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
        let (counted, spans) = self.write_batch(&speakers, &mut writer)?;
        let mut json = own.json.clone();
        let adapter = match &own.manifest.adapter {
            Some(place) if own.adapter.is_some() && self.is_divided(|r| r.adapter.as_ref()) => {
                let to = folder.join("adapter");
                self.write_joined(|r| r.adapter.as_ref(), &to.join("adapter_model.safetensors"), rank)?;
                copy(&own.folder.join(place).join("adapter_config.json"), &to.join("adapter_config.json"))?;
                Some(to)
            }
            place => place.as_ref().map(|place| own.folder.join(place)),
        };
        let model = model.map_or_else(|| own.folder.join(&own.manifest.model), Path::to_path_buf);
        let [means, global] = [Across::RankMean, Across::GlobalMean].map(|a| self.divisors(&speakers, &counted, a));
        let same = means.iter().zip(&global).all(|(a, b)| (a / b - 1.0).abs() < 1e-9);
        let observed = || self.observed_divisors(&speakers).map(|seen| nearer(&seen, [&means, &global]));
        let across = match (own.parallel.loss, same) {
            (Some(declared), _) => (declared, Told::Declared),
            (None, true) => (Across::RankMean, Told::Same),
            (None, false) => observed().map_or((Across::RankMean, Told::Assumed), |a| (a, Told::Recorded)),
        };
        let (divisors, otherwise) = if across.0 == Across::RankMean { (means, global) } else { (global, means) };
        let micro: Vec<usize> = counted.iter().flatten().map(|(rows, _)| *rows).collect();
        if let Some(map) = json.as_object_mut() {
            map.remove("parallel");
            map.remove("check");
            map.insert("model".into(), json!(absolute(&model)?));
            map.insert("adapter".into(), adapter.as_deref().map_or(Ok(Value::Null), |a| absolute(a).map(Value::from))?);
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
        names.iter().any(|name| self.ranks.iter().any(|r| r.parts.contains_key(&canonical_name(name))))
    }

    /// Writes the batch; returns rows and counted labels of each micro-batch of each part of the data, and its rows or positions.
    #[allow(clippy::type_complexity)]
    fn write_batch(
        &self,
        speakers: &[usize],
        writer: &mut TensorWriter,
    ) -> Result<(Vec<Vec<(usize, usize)>>, Vec<Range<usize>>)> {
        let cut = self.ranks[0].parallel.data.cut;
        let axis = usize::from(cut == Cut::Sequence);
        let step = |n: &usize| &self.ranks[*n].step;
        let mut shapes = Vec::new();
        for number in speakers {
            match step(number).shape("input_ids") {
                Some(&[rows, length]) => shapes.push([rows, length]),
                Some(shape) => {
                    let found = format!("shape {shape:?}");
                    return Err(step(number).malformed("tensor input_ids", "rows of tokens (2 axes)", found));
                }
                None => return Err(step(number).missing("input_ids", "the rows of this process")),
            }
        }
        let rest = |shape: &[usize; 2]| shape[1 - axis];
        if axis == 1 && shapes.iter().any(|s| rest(s) != rest(&shapes[0])) {
            let found = format!("{shapes:?}");
            return Err(Error::format(&self.folder, "tensor input_ids", "as many rows in every rank", found));
        }
        let length = shapes.iter().map(|s| s[1]).max().unwrap_or(0);
        let ragged = axis == 0 && shapes.iter().any(|s| s[1] != length);
        let any = |name: &str| speakers.iter().any(|n| step(n).contains(name));
        let packed = any("position_ids") && !any("attention_mask");
        let mut names: BTreeSet<String> = speakers.iter().flat_map(|n| step(n).names().map(str::to_string)).collect();
        names.retain(|name| name != "loss" && !is_of_parameter(name));
        if ragged {
            names.insert(if packed { "row_lengths" } else { "attention_mask" }.into());
        }
        let weight = self.weight(speakers.len());
        let mut spans = Vec::new();
        let mut counted: Vec<Vec<(usize, usize)>> = Vec::new();
        for name in &names {
            let mut parts = Vec::new();
            for (i, number) in speakers.iter().enumerate() {
                let (file, shape) = (step(number), shapes[i]);
                let rows = match file.shape(name) {
                    Some(held)
                        if held.len() < 2
                            || (held[0] != shape[0])
                            || (name != "row_lengths" && held[1] != shape[1]) =>
                    {
                        let expected = format!("{} rows of {} tokens", shape[0], shape[1]);
                        return Err(file.malformed(format!("tensor {name}"), expected, format!("shape {held:?}")));
                    }
                    Some(held) if name == "dlogits" || name == "dfinal" => {
                        // Each process's loss counts by the same part in the step's.
                        let (_, values) = file.raw_tensor::<f64>(name, "the gradient of the loss")?;
                        let bytes = values.iter().flat_map(|x| (x * weight).to_le_bytes()).collect();
                        Rows { shape: held.to_vec(), dtype: Dtype::F64, bytes }
                    }
                    Some(held) => {
                        let (dtype, bytes) = file.bytes(name, "the rows of this process")?;
                        Rows { shape: held.to_vec(), dtype, bytes: bytes.into_owned() }
                    }
                    None if name == "attention_mask" => Rows::integers(shape, |_| 1),
                    None if name == "position_ids" => Rows::integers(shape, |t| t as i64),
                    None if name == "row_lengths" => Rows::integers([shape[0], 1], |_| shape[1] as i64),
                    None => return Err(file.missing(name, "other ranks have it")),
                };
                parts.push(rows);
            }
            let whole = match (axis, name.as_str()) {
                (_, "row_lengths") => stacked(parts),
                (1, _) => beside(parts),
                _ => stacked(
                    parts.into_iter().map(|p| p.padded(length, if name == "labels" { IGNORED } else { 0 })).collect(),
                ),
            };
            let Some(whole) = whole else {
                let found = "tensors of different kinds or widths";
                return Err(Error::format(
                    &self.folder,
                    format!("tensor {name}"),
                    "the same kind in every rank",
                    found,
                ));
            };
            writer.raw(name, whole.dtype, &whole.shape, whole.bytes);
        }
        let mut start = 0;
        for (i, (number, shape)) in speakers.iter().zip(&shapes).enumerate() {
            spans.push(start..start + shape[axis]);
            start += shape[axis];
            let rank = &self.ranks[*number];
            let micro = &rank.manifest.loss.micro_batch_rows;
            let micro = if micro.is_empty() { vec![shape[0]] } else { micro.clone() };
            if micro.iter().sum::<usize>() != shape[0] {
                let expected = format!("{} rows, those of input_ids", shape[0]);
                return Err(rank.wrong("key loss.micro_batch_rows", expected, format!("{micro:?}")));
            }
            // The first label of a row is nobody's prediction; a later part's first is that of the part before.
            counted.push(counted_labels(rank, &micro, shape[1], axis == 0 || i == 0)?);
        }
        if axis == 1 {
            // The same rows in every part.
            let merged = counted.iter().skip(1).fold(counted[0].clone(), |mut sum, other| {
                sum.iter_mut().zip(other).for_each(|(a, b)| a.1 += b.1);
                sum
            });
            counted = vec![merged];
        }
        if let Some(losses) = speakers.iter().map(|n| scalar(step(n), "loss")).collect::<Option<Vec<f64>>>() {
            writer.tensor("loss", &[1], [losses.iter().sum::<f64>() * weight]);
        }
        Ok((counted, spans))
    }

    /// By how much the loss of one of `parts` parts of the data counts in the step's.
    fn weight(&self, parts: usize) -> f64 {
        if self.ranks[0].parallel.reduce == Reduce::Mean { 1.0 / parts as f64 } else { 1.0 }
    }

    /// Divisors of the micro-batches' losses in the merged step.
    fn divisors(&self, speakers: &[usize], counted: &[Vec<(usize, usize)>], across: Across) -> Vec<f64> {
        let loss = &self.ranks[0].manifest.loss;
        let ranks = 1.0 / self.weight(speakers.len());
        let of = |part: &[(usize, usize)]| part.iter().map(|m| m.1).sum::<usize>() as f64;
        let total: f64 = counted.iter().map(|part| of(part)).sum();
        let micros: usize = counted.iter().map(Vec::len).sum();
        let cut = self.ranks[0].parallel.data.cut == Cut::Sequence;
        let divisor = |part: &Vec<(usize, usize)>, tokens: usize| match (loss.reduction, across) {
            (Reduction::Sum, Across::RankMean) => ranks,
            (Reduction::Sum, Across::GlobalMean) => 1.0,
            (Reduction::Mean, _) if let Some(divisor) = loss.divisor => {
                divisor * if across == Across::RankMean { ranks } else { 1.0 }
            }
            (Reduction::Mean, _) if cut => total,
            (Reduction::Mean, Across::RankMean) => of(part) * ranks,
            (Reduction::Mean, Across::GlobalMean) => total,
            (Reduction::MicroMean, Across::RankMean) => (tokens * part.len()) as f64 * if cut { 1.0 } else { ranks },
            (Reduction::MicroMean, Across::GlobalMean) => (tokens * micros) as f64,
        };
        counted.iter().flat_map(|part| part.iter().map(|m| divisor(part, m.1))).collect()
    }

    /// Divisors as the gradient of the loss at the logits tells them: 1 - p of the label over minus its entry.
    fn observed_divisors(&self, speakers: &[usize]) -> Option<Vec<f64>> {
        let mut all = Vec::new();
        let weight = self.weight(speakers.len());
        for number in speakers {
            let rank = &self.ranks[*number];
            let read = |name: &str| {
                let (shape, values) = rank.step.raw_tensor::<f64>(name, "the gradient of the loss").ok()?;
                (shape.len() == 3).then_some((shape, values))
            };
            let loss = &rank.manifest.loss;
            if !rank.step.contains("logits") || !rank.step.contains("dlogits") || loss.label_smoothing > 0.0 {
                return None;
            }
            let (shape, logits) = read("logits")?;
            let (other, gradient) = read("dlogits")?;
            let (_, labels) = rank.step.raw_tensor::<f64>("labels", "what this process predicts").ok()?;
            let (length, width) = (shape[1], shape[2]);
            if shape != other || labels.len() != shape[0] * length || length == 0 {
                return None;
            }
            let micro = &loss.micro_batch_rows;
            let micro = if micro.is_empty() { vec![shape[0]] } else { micro.clone() };
            let mut row = 0;
            for rows in micro {
                let (mut want, mut got) = (0.0, 0.0);
                for b in row..row + rows {
                    for t in 0..length - 1 {
                        let label = labels[b * length + t + 1];
                        if label < 0.0 || label as usize >= width {
                            continue;
                        }
                        let line = (b * length + t) * width;
                        let z = &logits[line..line + width];
                        let most = z.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
                        let sum: f64 = z.iter().map(|x| (x - most).exp()).sum();
                        want += 1.0 - (z[label as usize] - most).exp() / sum;
                        got -= gradient[line + label as usize] / loss.scale * weight;
                    }
                }
                row += rows;
                all.push(want / got);
            }
        }
        all.iter().all(|d| d.is_finite() && *d > 0.0).then_some(all)
    }
}

/// Rows and labels that count, by micro-batch.
fn counted_labels(rank: &Rank, micro: &[usize], length: usize, shifted: bool) -> Result<Vec<(usize, usize)>> {
    if !rank.step.contains("labels") {
        return Ok(micro.iter().map(|&rows| (rows, 0)).collect());
    }
    let (_, labels) = rank.step.raw_tensor::<f64>("labels", "what this process predicts")?;
    let mut rows = labels.chunks(length.max(1));
    let from = usize::from(shifted).min(length);
    let count = |row: &[f64]| row[from..].iter().filter(|l| (**l - IGNORED as f64).abs() > 0.5).count();
    Ok(micro.iter().map(|&n| (n, rows.by_ref().take(n).map(count).sum())).collect())
}

/// Which of two lists of divisors the observed ones are nearer to.
fn nearer(seen: &[f64], of: [&Vec<f64>; 2]) -> Across {
    let far = |want: &Vec<f64>| seen.iter().zip(want).map(|(a, b)| (a / b).ln().abs()).sum::<f64>();
    if far(of[0]) <= far(of[1]) { Across::RankMean } else { Across::GlobalMean }
}

/// The parameter's name in that of a tensor of the step; a name of another file is that already.
fn parameter(name: &str) -> &str {
    match name.split_once('.') {
        Some((group, rest)) if OF_PARAMETERS.contains(&group) => rest,
        _ => name,
    }
}

fn is_of_parameter(name: &str) -> bool {
    parameter(name).len() < name.len()
}

/// Rows one after the other.
fn stacked(parts: Vec<Rows>) -> Option<Rows> {
    let mut parts = parts.into_iter();
    let mut whole = parts.next()?;
    for part in parts {
        if part.dtype != whole.dtype || part.shape[1..] != whole.shape[1..] {
            return None;
        }
        whole.shape[0] += part.shape[0];
        whole.bytes.extend(part.bytes);
    }
    Some(whole)
}

/// Parts of the same rows.
fn beside(parts: Vec<Rows>) -> Option<Rows> {
    let first = parts.first()?;
    let (dtype, rows, rest) = (first.dtype, first.shape[0], first.shape[2..].to_vec());
    if parts.iter().any(|p| p.dtype != dtype || p.shape[0] != rows || p.shape[2..] != rest) {
        return None;
    }
    let mut bytes = Vec::with_capacity(parts.iter().map(|p| p.bytes.len()).sum());
    for row in 0..rows {
        for part in &parts {
            let line = part.shape[1] * part.position();
            bytes.extend_from_slice(&part.bytes[row * line..(row + 1) * line]);
        }
    }
    let length = parts.iter().map(|p| p.shape[1]).sum();
    Some(Rows { shape: [&[rows, length][..], &rest].concat(), dtype, bytes })
}

fn scalar(file: &TensorFile, name: &str) -> Option<f64> {
    file.contains(name).then(|| file.raw_tensor::<f64>(name, "the loss").ok()?.1.first().copied())?
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
