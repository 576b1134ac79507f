//! `manifest.json`: how a result was made, and the checksums of its files.

use super::machine::{Machine, Sources, portable_command_line};
use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use crate::streams::sha256_hex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// Every point was measured and every check held.
    Completed,
    /// Every point was measured, but a stated check failed.
    CheckFailed,
    /// Some grid points failed; the others are in the table.
    PointsFailed,
}

/// A grid point that could not be measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// Label of the point.
    pub point: String,
    /// The error's message.
    pub error: String,
}

/// A stated check and whether it held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckOutcome {
    /// What was checked.
    pub check: String,
    /// Whether it held.
    pub passed: bool,
}

/// The content of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Name of the experiment.
    pub experiment: String,
    /// `quick` or `full`.
    pub profile: String,
    /// Program name and arguments, without machine paths.
    pub command_line: Vec<String>,
    /// The resolved configuration: every grid point.
    pub config: serde_json::Value,
    /// Seeds that entered the results.
    pub seeds: Vec<u64>,
    /// Versions and source state.
    pub sources: Sources,
    /// Machine.
    pub machine: Machine,
    /// Start, UTC, `YYYY-MM-DDTHH:MM:SSZ`.
    pub started_at: String,
    /// Wall time of this run in seconds; points reused by `--resume` are not in it.
    pub wall_seconds: f64,
    /// Points taken from an interrupted run rather than measured in this one.
    pub resumed_points: usize,
    /// Why the run ended.
    pub stop_reason: StopReason,
    /// Grid points that failed.
    pub failures: Vec<Failure>,
    /// Stated checks.
    pub checks: Vec<CheckOutcome>,
    /// Sentences with numbers, computed from the table.
    pub findings: Vec<String>,
    /// Stems of the figures' file names.
    pub figures: Vec<String>,
    /// SHA-256 of every output file by its name in this folder.
    pub files: BTreeMap<String, String>,
}

impl Manifest {
    /// A manifest of a run that starts now in this process; results are filled in at the end.
    pub fn start(experiment: &str, profile: &str) -> Self {
        Self {
            experiment: experiment.into(),
            profile: profile.into(),
            command_line: portable_command_line(std::env::args()),
            config: serde_json::Value::Null,
            seeds: Vec::new(),
            sources: Sources::here(),
            machine: Machine::here(),
            started_at: utc_text(SystemTime::now()),
            wall_seconds: 0.0,
            resumed_points: 0,
            stop_reason: StopReason::Completed,
            failures: Vec::new(),
            checks: Vec::new(),
            findings: Vec::new(),
            figures: Vec::new(),
            files: BTreeMap::new(),
        }
    }

    /// Records the checksum of `folder/name`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add_file(&mut self, folder: &Path, name: &str) -> Result<()> {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        self.files.insert(name.to_string(), sha256_hex(&bytes));
        Ok(())
    }

    /// Writes `folder/manifest.json`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("manifest.json");
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::format(&path, "manifest", "JSON", e.to_string()))?;
        text.push('\n');
        write_bytes(&path, text.as_bytes())
    }

    /// Reads `folder/manifest.json`; `None` when there is none.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] when it is not a manifest.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("manifest.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path, e)),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| {
            Error::format(&path, "manifest", "a manifest of this package's version", e.to_string())
        })
    }
}

/// A time as `YYYY-MM-DDTHH:MM:SSZ`; times before 1970 are shown as its start.
pub fn utc_text(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (h, m, s) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{:02}-{:02}T{h:02}:{m:02}:{s:02}Z", month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utc_of_known_instants() {
        let at = |s| utc_text(UNIX_EPOCH + Duration::from_secs(s));
        // `date -u -d @N`
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
    }

    #[test]
    fn reads_back_what_it_wrote() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Manifest::read(folder.path()).unwrap().is_none());
        std::fs::write(folder.path().join("table.csv"), "abc").unwrap();
        let mut manifest = Manifest::start("demo", "quick");
        manifest.seeds = vec![0, u64::MAX];
        manifest.add_file(folder.path(), "table.csv").unwrap();
        manifest.write(folder.path()).unwrap();
        let back = Manifest::read(folder.path()).unwrap().unwrap();
        assert_eq!(back, manifest);
        assert!(back.files["table.csv"].starts_with("ba7816bf"));
        let text = std::fs::read_to_string(folder.path().join("manifest.json")).unwrap();
        let here = std::env::current_dir().unwrap();
        assert!(!text.contains(&*here.to_string_lossy()), "{text}");
    }

    #[test]
    fn something_else_named_manifest_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("manifest.json"), "{\"profile\": 3}").unwrap();
        assert!(matches!(Manifest::read(folder.path()), Err(Error::Format { .. })));
    }
}
