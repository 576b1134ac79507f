//! Repeated timing, for the experiments that measure seconds.

use super::interrupted;
use peft_limits::error::{Error, Result};
use peft_limits::report::Summary;
use std::time::Instant;

/// Median and quartiles of seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Seconds {
    /// Median.
    pub median: f64,
    /// First quartile.
    pub low: f64,
    /// Third quartile.
    pub high: f64,
    /// Runs measured.
    pub repeats: usize,
}

/// Runs `work` once to warm up and `repeats` times on the clock.
///
/// # Errors
/// Those of `work`; [`Error::Interrupted`] after Ctrl-C.
///
/// ```
/// let mut runs = 0;
/// let seconds = peft_limits_experiments::harness::repeated_seconds(4, || {
///     runs += 1;
///     Ok(())
/// })?;
/// assert_eq!((runs, seconds.repeats), (5, 4));
/// assert!(0.0 <= seconds.low && seconds.low <= seconds.median && seconds.median <= seconds.high);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn repeated_seconds(repeats: usize, mut work: impl FnMut() -> Result<()>) -> Result<Seconds> {
    work()?;
    let mut seconds = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let summary = Summary::of(&seconds);
    let (low, high) = summary.quartiles().unwrap_or((f64::NAN, f64::NAN));
    Ok(Seconds { median: summary.median, low, high, repeats })
}
