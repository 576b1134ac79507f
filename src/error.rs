//! The crate's one error type. Variants carry data; the text is written once, here.

use std::path::{Path, PathBuf};

/// Result of every fallible routine of the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with an input, a file or an assumption.
///
/// The message of each variant names the operation or the file, the argument or the tensor,
/// what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An array argument has the wrong shape.
    #[error("{op}: {arg} has shape {got}, expected {expected}")]
    ShapeMismatch {
        /// The routine that refused.
        op: &'static str,
        /// Public name of the argument or tensor.
        arg: String,
        /// What was required.
        expected: String,
        /// What arrived.
        got: String,
    },
    /// A scalar parameter is out of its range.
    #[error("{name} = {value}: {requirement}")]
    InvalidParam {
        /// Public name of the parameter.
        name: String,
        /// The value as given.
        value: String,
        /// The range or rule it breaks.
        requirement: String,
    },
    /// A NaN or an infinity where a finite number is required.
    #[error("{op}: {tensor} holds {value} at {index:?}; every entry must be finite")]
    NonFinite {
        /// The routine that refused.
        op: &'static str,
        /// Public name of the tensor.
        tensor: String,
        /// Position of the first such entry.
        index: Vec<usize>,
        /// The entry itself.
        value: f64,
    },
    /// An iteration ended without reaching its tolerance.
    #[error(
        "{op}: no convergence after {iterations} iterations (residual {residual:e}, tolerance \
         {tolerance:e})"
    )]
    NotConverged {
        /// The routine that gave up.
        op: &'static str,
        /// Iterations done.
        iterations: usize,
        /// Last residual.
        residual: f64,
        /// Required residual.
        tolerance: f64,
    },
    /// Logits may leave the interval on which an approximation of exp is valid.
    #[error(
        "{factorization}: logits reach {found:.6} in magnitude ({evidence}) but the approximation \
         assumes [-{assumed:.6}, {assumed:.6}]; raise b, or pass check=off to accept an unbounded \
         error"
    )]
    LogitOutsideInterval {
        /// Spec of the factorization.
        factorization: String,
        /// Half-width of the assumed interval.
        assumed: f64,
        /// Largest magnitude found, or its upper bound.
        found: f64,
        /// How `found` was obtained.
        evidence: &'static str,
    },
    /// An approximate softmax denominator is zero, negative or not finite.
    #[error(
        "{factorization}: the approximate softmax denominator of query row {row} is {value:.3e}; \
         it must be positive (raise the degree or the rank)"
    )]
    NonPositiveDenominator {
        /// Spec of the factorization.
        factorization: String,
        /// Query row.
        row: usize,
        /// The denominator.
        value: f64,
    },
    /// A computation would need more than its stated limit.
    #[error("{what} needs {needed} {unit}, the limit is {limit} {unit}")]
    TooLarge {
        /// What would be computed or stored.
        what: String,
        /// Amount needed.
        needed: u128,
        /// Amount allowed.
        limit: u128,
        /// Unit of both.
        unit: &'static str,
    },
    /// A tensor that the computation needs is absent from a file.
    #[error("{}: no tensor named {name} ({reason}); the file holds {found}", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The missing name.
        name: String,
        /// Why it is needed.
        reason: String,
        /// Names that are there.
        found: String,
    },
    /// A file's content does not have the required form.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Tensor, key or part of the file.
        field: String,
        /// What the format requires.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A chart could not be drawn.
    #[error("drawing {}: {reason}", path.display())]
    Draw {
        /// The figure.
        path: PathBuf,
        /// What the drawing library said.
        reason: String,
    },
    /// The chosen computing device is not there.
    #[error("--device {wanted}: {found}")]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// What there is instead, and what to do.
        found: String,
    },
    /// A device failed while it worked: lost, out of memory, a kernel that does not compile.
    #[error("{op} on {device} failed: {reason}")]
    Device {
        /// What was being computed.
        op: &'static str,
        /// The device.
        device: String,
        /// What the driver or the engine said.
        reason: String,
    },
    /// The user asked the job to stop; what was finished is kept.
    #[error("interrupted; finished points are kept, continue with --resume")]
    Interrupted,
    /// Another process of the job failed, so that this one cannot go on.
    #[error("{op}: rank {rank} failed; its own message says why")]
    OtherRank {
        /// What the ranks were doing.
        op: &'static str,
        /// The first rank that failed.
        rank: usize,
    },
    /// The message-passing library refused.
    #[error("{op} over MPI failed: {reason}")]
    Mpi {
        /// What was asked of it.
        op: &'static str,
        /// What it said.
        reason: String,
    },
    /// A decomposition failed inside the linear algebra library.
    #[error("{op} failed: {reason}")]
    Decomposition {
        /// Which decomposition.
        op: &'static str,
        /// What the library said.
        reason: String,
    },
}

/// Exit code of every program after Ctrl-C, as shells have it: 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

impl Error {
    /// Exit code of a program that this error ends: [`INTERRUPTED`], or 2.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Error::Interrupted) { INTERRUPTED } else { 2 }
    }

    /// Attaches a path to an input/output error.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A parameter outside its range.
    pub fn invalid(
        name: impl Into<String>,
        value: impl ToString,
        requirement: impl Into<String>,
    ) -> Self {
        Error::InvalidParam {
            name: name.into(),
            value: value.to_string(),
            requirement: requirement.into(),
        }
    }

    /// A two-dimensional shape that differs from the required one.
    pub fn shape(
        op: &'static str,
        arg: impl Into<String>,
        expected: (usize, usize),
        got: (usize, usize),
    ) -> Self {
        Error::ShapeMismatch {
            op,
            arg: arg.into(),
            expected: format!("{expected:?}"),
            got: format!("{got:?}"),
        }
    }

    /// A malformed file.
    pub fn format(
        path: impl AsRef<Path>,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Error::Format {
            path: path.as_ref().to_path_buf(),
            field: field.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}
