//! What `check_step` of the Python package found: backward against central differences of the
//! trainer's own forward.
//!
//! It knows no architecture, so its verdict also stands for models that the reference refuses.

use serde::{Deserialize, Serialize};

/// How it came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckStatus {
    /// Every gradient that could be seen is the derivative of the forward.
    Passed,
    /// Some are not.
    Failed,
    /// Nothing could be said.
    NotChecked,
}

/// One tensor of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckedTensor {
    /// The trainer's name.
    pub name: String,
    /// `right`, `wrong`, or `blind` where rounding hides it.
    pub status: String,
    /// Error as a share of the gradient's norm; none where it is infinite.
    pub error: Option<f64>,
    /// Smallest error that would have been seen.
    pub resolution: Option<f64>,
    /// What is wrong.
    pub what: String,
}

/// The verdict, as the recorder writes it into the manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnForward {
    /// Outcome.
    pub status: CheckStatus,
    /// In a sentence.
    pub why: String,
    /// Tensors that were looked at.
    #[serde(default)]
    pub tensors: Vec<CheckedTensor>,
    /// Forward passes that it took.
    #[serde(default)]
    pub forwards: u64,
    /// Seconds that it took.
    #[serde(default)]
    pub seconds: f64,
    /// Rounding noise of the step's outputs.
    #[serde(default)]
    pub noise: f64,
}

impl OwnForward {
    /// Whether some gradient is not the derivative of the forward.
    pub fn failed(&self) -> bool {
        self.status == CheckStatus::Failed
    }

    /// The verdict in one line.
    pub fn line(&self) -> String {
        let status = match self.status {
            CheckStatus::Passed => "pass",
            CheckStatus::Failed => "FAIL",
            CheckStatus::NotChecked => "-",
        };
        format!(
            "  {:<18} {status:<8} {:>9} {:>9}  {}",
            "own forward",
            self.tensors.len(),
            "",
            self.why
        )
    }
}
