//! The description of an experiment.

use peft_limits::error::{Error, Result};
use peft_limits::report::{NamedFigure, Row, Table};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// How much is measured.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
pub enum Profile {
    /// About a minute on two cores; written under `figures/quick`, never over a full result.
    Quick,
    /// The published figures; written under `figures`.
    Full,
}

impl Profile {
    /// `quick` or `full`.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Quick => "quick",
            Profile::Full => "full",
        }
    }

    /// `quick` or `full` as the profile says.
    pub fn pick<T>(self, quick: T, full: T) -> T {
        match self {
            Profile::Quick => quick,
            Profile::Full => full,
        }
    }

    /// The folder of this profile's results, relative to the current one.
    pub(super) fn root(self) -> PathBuf {
        self.pick("figures/quick", "figures").into()
    }
}

/// One point of an experiment's grid: a label for people and the configuration measured.
///
/// The scalars of the configuration become the first columns of the point's rows. A key named
/// `seed` is listed in the manifest.
///
/// ```
/// use peft_limits_experiments::harness::Point;
/// let point = Point::new("taylor, L = 128").with("method", "taylor:degree=4").with("tokens", 128);
/// assert_eq!(point.usize("tokens").unwrap(), 128);
/// assert!(point.f64("method").is_err());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Shown by the progress bar and in failures.
    pub label: String,
    /// Everything that determines the measurement, in column order.
    pub config: Map<String, Value>,
}

impl Point {
    /// A point without configuration.
    pub fn new(label: impl Into<String>) -> Self {
        Self { label: label.into(), config: Map::new() }
    }

    /// Adds a key. Non-finite floats cannot be configured: they become null.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.config.insert(key.into(), value.into());
        self
    }

    /// A non-negative integer of the configuration.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] when the key is absent or of another type; so do the others below.
    pub fn u64(&self, key: &str) -> Result<u64> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    /// A size of the configuration.
    ///
    /// # Errors
    /// As [`Point::u64`].
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.typed(key, "a size", |v| usize::try_from(v.as_u64()?).ok())
    }

    /// A number of the configuration.
    ///
    /// # Errors
    /// As [`Point::u64`].
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A text of the configuration.
    ///
    /// # Errors
    /// As [`Point::u64`].
    pub fn text(&self, key: &str) -> Result<&str> {
        self.typed(key, "a text", Value::as_str)
    }

    /// A truth value of the configuration.
    ///
    /// # Errors
    /// As [`Point::u64`].
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T> {
        let value = self.config.get(key);
        value.and_then(read).ok_or_else(|| {
            let found = value.map_or("nothing".into(), Value::to_string);
            Error::invalid(
                key,
                found,
                format!("the grid point \"{}\" must hold {kind} here", self.label),
            )
        })
    }
}

/// Statements about a table and whether each holds.
pub type Checks = fn(&Table) -> Result<Vec<(String, bool)>>;

/// An experiment: what is claimed, what is measured, and how the numbers are shown and judged.
///
/// Figures, findings and checks see the saved table only, so `--plot-only` needs no measurement.
#[derive(Clone, Copy)]
pub struct Experiment {
    /// Name of the binary and of the output folder: lower case, digits and hyphens.
    pub name: &'static str,
    /// Title of the result page.
    pub title: &'static str,
    /// The claim under test, with the paper's statement.
    pub claim: &'static str,
    /// What result would refute it.
    pub refuted_by: &'static str,
    /// The strongest reason not to trust the result beyond what was measured: one sentence.
    pub doubt: &'static str,
    /// The points of a profile; `seed` is the `--seed` flag from which the points' seeds follow.
    pub grid: fn(profile: Profile, seed: u64) -> Vec<Point>,
    /// Measures one point. Rows need not repeat the configuration; the runner puts it first.
    pub measure: fn(&Point) -> Result<Vec<Row>>,
    /// Whether points may be measured at the same time; false for anything timed.
    pub parallel: bool,
    /// Figures; the first one stands on the index page.
    pub plot: fn(&Table) -> Result<Vec<NamedFigure>>,
    /// Sentences with numbers: what agrees, and where theory and measurement differ.
    pub findings: fn(&Table) -> Result<Vec<String>>,
    /// Statements that must hold; a false one makes the exit code 1.
    pub checks: Option<Checks>,
}
