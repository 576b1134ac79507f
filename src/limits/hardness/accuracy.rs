//! Intervals for a share of right answers.

use crate::error::{Error, Result};
use statrs::distribution::{Beta, ContinuousCDF};

/// The Clopper-Pearson interval of a probability from `right` successes in `trials`, at `level`
/// (for instance 0.95).
///
/// Covers with at least the level: its ends are quantiles of Beta(right, trials - right + 1) and
/// Beta(right + 1, trials - right).
///
/// # Errors
/// [`Error::InvalidParam`] for no trial, more successes than trials, or a level outside (0, 1).
///
/// ```
/// use peft_limits::limits::hardness::accuracy::clopper_pearson;
/// let (low, high) = clopper_pearson(20, 20, 0.95)?;
/// // All right: the lower end solves p^20 = 0.025.
/// assert!((low.powi(20) - 0.025).abs() < 1e-9 && (high - 1.0).abs() < 1e-12);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn clopper_pearson(right: u64, trials: u64, level: f64) -> Result<(f64, f64)> {
    if trials == 0 || right > trials {
        return Err(Error::invalid(
            "right",
            format!("{right} of {trials}"),
            "must be at most the trials, of which one or more",
        ));
    }
    if !(level > 0.0 && level < 1.0) {
        return Err(Error::invalid("level", level, "must lie between 0 and 1"));
    }
    let tail = (1.0 - level) / 2.0;
    let quantile = |a: u64, b: u64, p: f64| match Beta::new(a as f64, b as f64) {
        Ok(beta) => Ok(beta.inverse_cdf(p)),
        Err(e) => Err(Error::invalid("right", right, e.to_string())),
    };
    let low = if right == 0 { 0.0 } else { quantile(right, trials - right + 1, tail)? };
    let high = if right == trials { 1.0 } else { quantile(right + 1, trials - right, 1.0 - tail)? };
    Ok((low, high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use statrs::distribution::{Binomial, DiscreteCDF};

    #[test]
    fn the_ends_put_the_tails_where_they_belong() {
        for (right, trials) in [(3, 11), (7, 20), (19, 20)] {
            let (low, high) = clopper_pearson(right, trials, 0.9).unwrap();
            let at_most = Binomial::new(high, trials).unwrap().cdf(right);
            let at_least = 1.0 - Binomial::new(low, trials).unwrap().cdf(right - 1);
            assert!(
                (at_most - 0.05).abs() < 1e-6 && (at_least - 0.05).abs() < 1e-6,
                "{right} of {trials}"
            );
        }
    }

    #[test]
    fn bad_counts_are_refused() {
        for (right, trials, level) in [(0, 0, 0.9), (3, 2, 0.9), (1, 2, 1.0), (1, 2, f64::NAN)] {
            assert!(matches!(
                clopper_pearson(right, trials, level),
                Err(Error::InvalidParam { .. })
            ));
        }
    }
}
