//! Finished points of a run in progress, kept in `rows.partial.jsonl` until the run ends; a rank of
//! an MPI job other than the first keeps its own in `rows.partial.rank-N.jsonl`.

use super::experiment::{Experiment, Point};
use peft_limits::atomic_file::write_bytes;
use peft_limits::error::{Error, Result};
use peft_limits::report::Row;
use peft_limits::streams::sha256_hex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// File name inside an experiment's folder.
pub(super) const PARTIAL: &str = "rows.partial.jsonl";

/// Finished points that a resumed run could not use, in the same format.
pub(super) const SET_ASIDE: &str = "rows.set-aside.jsonl";

/// What the file names of other ranks begin with; the number follows.
const RANK_PREFIX: &str = "rows.partial.rank-";

/// The key under which a point's rows may be reused: SHA-256 of everything that affects them -
/// experiment, package version, build, seed, configuration, and the threads when points are timed.
pub(super) fn run_key(experiment: &Experiment, seed: u64, point: &Point) -> String {
    let threads = (!experiment.parallel).then(rayon::current_num_threads);
    let everything = serde_json::json!([
        experiment.name,
        env!("CARGO_PKG_VERSION"),
        cfg!(debug_assertions),
        cfg!(feature = "lapack"),
        threads,
        seed,
        point.config,
    ]);
    sha256_hex(everything.to_string().as_bytes())
}

/// First line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    experiment: String,
    profile: String,
}

/// One finished point.
#[derive(Debug, Serialize, Deserialize)]
struct Finished {
    key: String,
    label: String,
    rows: Vec<Row>,
}

/// The file, open for appending.
#[derive(Debug)]
pub(super) struct Partial {
    path: PathBuf,
    file: File,
}

impl Partial {
    /// Profile of the unfinished run in `folder`, if there is one.
    pub fn profile_in(folder: &Path) -> Result<Option<String>> {
        let path = folder.join(PARTIAL);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let header: Option<Header> =
            bytes.split(|&b| b == b'\n').next().and_then(|line| serde_json::from_slice(line).ok());
        // A file cut in its first line holds no point.
        Ok(header.map(|h| h.profile))
    }

    /// Starts the file of a run, keeping the points of an earlier one whose keys are in `keep`,
    /// whichever rank measured them; returns their rows and how many others were moved to
    /// [`SET_ASIDE`] (with an empty `keep` none: the earlier points are to be discarded). Files of
    /// other ranks are gone afterwards.
    pub fn open(
        folder: &Path,
        experiment: &Experiment,
        profile: &str,
        keep: &[String],
    ) -> Result<(Self, HashMap<String, Vec<Row>>, usize)> {
        let path = folder.join(PARTIAL);
        let others = files_of_ranks(folder)?;
        let mut done = HashMap::new();
        let mut aside: Vec<Finished> = Vec::new();
        let header = Header { experiment: experiment.name.into(), profile: profile.into() };
        let mut text = line(&path, &header)?;
        if !keep.is_empty() {
            // A line that a crash cut short, or that is damaged, is dropped; its point is measured
            // again.
            for earlier in std::iter::once(&path)
                .chain(&others)
                .map(|path| std::fs::read(path).unwrap_or_default())
            {
                let lines = earlier.split(|&b| b == b'\n').skip(1);
                for finished in lines.filter_map(|l| serde_json::from_slice::<Finished>(l).ok()) {
                    if !keep.contains(&finished.key) {
                        aside.push(finished);
                        continue;
                    }
                    if let Entry::Vacant(place) = done.entry(finished.key.clone()) {
                        text += &line(&path, &finished)?;
                        place.insert(finished.rows);
                    }
                }
            }
        }
        set_aside(folder, &header, &aside)?;
        let partial = Self::start(path, &text)?;
        // Only now: what they held is in the new file.
        remove_all(&others)?;
        Ok((partial, done, aside.len()))
    }

    /// Starts the file of a rank other than the first.
    #[cfg(feature = "mpi")]
    pub fn of_rank(
        folder: &Path,
        experiment: &Experiment,
        profile: &str,
        rank: usize,
    ) -> Result<Self> {
        let path = folder.join(format!("{RANK_PREFIX}{rank}.jsonl"));
        let header =
            line(&path, &Header { experiment: experiment.name.into(), profile: profile.into() })?;
        Self::start(path, &header)
    }

    fn start(path: PathBuf, text: &str) -> Result<Self> {
        write_bytes(&path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, file })
    }

    /// Appends a finished point, on disk when this returns.
    pub fn append(&mut self, key: &str, label: &str, rows: &[Row]) -> Result<()> {
        let finished = Finished { key: key.into(), label: label.into(), rows: rows.to_vec() };
        let text = line(&self.path, &finished)?;
        self.file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(|e| Error::io(&self.path, e))
    }

    /// Removes the file and those of other ranks: the run is complete.
    pub fn remove(self) -> Result<()> {
        drop(self.file);
        let others = self.path.parent().map_or(Ok(Vec::new()), files_of_ranks)?;
        remove_all(&others)?;
        std::fs::remove_file(&self.path).map_err(|e| Error::io(&self.path, e))
    }
}

/// Adds points to [`SET_ASIDE`].
fn set_aside(folder: &Path, header: &Header, points: &[Finished]) -> Result<()> {
    if points.is_empty() {
        return Ok(());
    }
    let path = folder.join(SET_ASIDE);
    let mut text = if path.exists() { String::new() } else { line(&path, header)? };
    for point in points {
        text += &line(&path, point)?;
    }
    let file = OpenOptions::new().append(true).create(true).open(&path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|e| Error::io(&path, e))
}

/// Files of finished points of ranks other than the first, in the order of their names.
fn files_of_ranks(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(folder, e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let name =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with(RANK_PREFIX) && name.ends_with(".jsonl") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn remove_all(files: &[PathBuf]) -> Result<()> {
    files.iter().try_for_each(|path| std::fs::remove_file(path).map_err(|e| Error::io(path, e)))
}

fn line(path: &Path, value: &impl Serialize) -> Result<String> {
    let json = serde_json::to_string(value)
        .map_err(|e| Error::format(path, "row", "JSON", e.to_string()))?;
    Ok(json + "\n")
}

#[cfg(test)]
mod tests {
    use super::super::experiment::Profile;
    use super::*;
    use proptest::prelude::*;

    fn experiment() -> Experiment {
        Experiment {
            name: "hostile",
            title: "",
            claim: "",
            refuted_by: "",
            doubt: "",
            grid: |_: Profile, _| vec![],
            measure: |_| Ok(vec![]),
            parallel: false,
            plot: |_| Ok(vec![]),
            findings: |_| Ok(vec![]),
            checks: None,
        }
    }

    proptest! {
        /// A damaged file of finished points loses points, at worst all; it never panics and never
        /// invents one.
        #[test]
        fn damaged_rows_are_dropped(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(), deep in 0usize..2,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let keep: Vec<String> = (0..4).map(|i| format!("key {i}")).collect();
            let (mut partial, ..) = Partial::open(folder.path(), &experiment(), "quick", &[]).unwrap();
            for key in &keep {
                partial.append(key, "label", &[Row::new().with("x", 1.5).with("y", "z")]).unwrap();
            }
            let path = folder.path().join(PARTIAL);
            let mut bytes = std::fs::read(&path).unwrap();
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(cut.index(bytes.len() + 1));
            bytes.extend("[".repeat(deep * 100_000).into_bytes());
            std::fs::write(&path, &bytes).unwrap();
            let (_, done, _) = Partial::open(folder.path(), &experiment(), "quick", &keep).unwrap();
            prop_assert!(done.keys().all(|key| keep.contains(key)));
            Partial::profile_in(folder.path()).unwrap();
        }
    }
}
