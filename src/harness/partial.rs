//! Finished points of a run in progress, kept in `rows.partial.jsonl` until the run ends.

use super::experiment::{Experiment, Point};
use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use crate::report::Row;
use crate::report::machine::sha256_hex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// File name inside an experiment's folder.
pub(super) const PARTIAL: &str = "rows.partial.jsonl";

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
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let header: Option<Header> = text.lines().next().and_then(|line| serde_json::from_str(line).ok());
        // A file cut in its first line holds no point.
        Ok(header.map(|h| h.profile))
    }

    /// Starts the file of a run, keeping the points of an earlier one whose keys are in `keep`;
    /// returns their rows.
    pub fn open(
        folder: &Path,
        experiment: &Experiment,
        profile: &str,
        keep: &[String],
    ) -> Result<(Self, HashMap<String, Vec<Row>>)> {
        let path = folder.join(PARTIAL);
        let mut done = HashMap::new();
        let header = Header { experiment: experiment.name.into(), profile: profile.into() };
        let mut text = line(&path, &header)?;
        if !keep.is_empty() {
            // A line that a crash cut short is dropped; its point is measured again.
            let earlier = std::fs::read_to_string(&path).unwrap_or_default();
            for finished in earlier.lines().skip(1).filter_map(|l| serde_json::from_str::<Finished>(l).ok()) {
                if keep.contains(&finished.key) {
                    text += &line(&path, &finished)?;
                    done.insert(finished.key, finished.rows);
                }
            }
        }
        write_bytes(&path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok((Self { path, file }, done))
    }

    /// Appends a finished point, on disk when this returns.
    pub fn append(&mut self, key: &str, label: &str, rows: &[Row]) -> Result<()> {
        let finished = Finished { key: key.into(), label: label.into(), rows: rows.to_vec() };
        let text = line(&self.path, &finished)?;
        self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data()).map_err(|e| Error::io(&self.path, e))
    }

    /// Removes the file: the run is complete.
    pub fn remove(self) -> Result<()> {
        drop(self.file);
        std::fs::remove_file(&self.path).map_err(|e| Error::io(&self.path, e))
    }
}

fn line(path: &Path, value: &impl Serialize) -> Result<String> {
    let json = serde_json::to_string(value).map_err(|e| Error::format(path, "row", "JSON", e.to_string()))?;
    Ok(json + "\n")
}
