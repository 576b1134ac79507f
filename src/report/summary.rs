//! Summaries of repeated measurements over seeds or timing repeats.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// What a set of repeated measurements says; in the unit of the measurements.
///
/// NaN and infinite values are left out of every statistic and counted in `skipped`, so that a
/// caller can see (and report) that some runs gave none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Finite values.
    pub n: usize,
    /// Values left out because they are NaN or infinite.
    pub skipped: usize,
    /// Arithmetic mean; NaN when `n == 0`, like every other statistic.
    pub mean: f64,
    /// Sample standard deviation (divisor n - 1); NaN when `n < 2`.
    pub deviation: f64,
    /// Smallest value.
    pub min: f64,
    /// First quartile, linear interpolation between order statistics.
    pub lower_quartile: f64,
    /// Median.
    pub median: f64,
    /// Third quartile.
    pub upper_quartile: f64,
    /// Largest value.
    pub max: f64,
}

impl Summary {
    /// Summarises `values`.
    ///
    /// ```
    /// let s = peft_limits::report::Summary::of(&[1.0, 2.0, 3.0, 4.0, f64::NAN]);
    /// assert_eq!((s.n, s.skipped, s.mean, s.median), (4, 1, 2.5, 2.5));
    /// ```
    pub fn of(values: &[f64]) -> Self {
        let mut finite: Vec<f64> = values.iter().copied().filter(|x| x.is_finite()).collect();
        finite.sort_by(f64::total_cmp);
        let n = finite.len();
        let mean = if n == 0 { f64::NAN } else { finite.iter().sum::<f64>() / n as f64 };
        let squares: f64 = finite.iter().map(|x| (x - mean).powi(2)).sum();
        Self {
            n,
            skipped: values.len() - n,
            mean,
            deviation: if n < 2 { f64::NAN } else { (squares / (n - 1) as f64).sqrt() },
            min: quantile_sorted(&finite, 0.0),
            lower_quartile: quantile_sorted(&finite, 0.25),
            median: quantile_sorted(&finite, 0.5),
            upper_quartile: quantile_sorted(&finite, 0.75),
            max: quantile_sorted(&finite, 1.0),
        }
    }

    /// The two-sided Student t interval of the mean at `level` (0.95 for 95 %): mean -+ t_{n-1,
    /// (1 + level)/2} deviation / sqrt(n). `None` when `n < 2` or `level` is not in (0, 1).
    pub fn t_interval(&self, level: f64) -> Option<(f64, f64)> {
        if self.n < 2 || !(level > 0.0 && level < 1.0) {
            return None;
        }
        let t = StudentsT::new(0.0, 1.0, (self.n - 1) as f64).ok()?.inverse_cdf(0.5 + level / 2.0);
        let half = t * self.deviation / (self.n as f64).sqrt();
        Some((self.mean - half, self.mean + half))
    }

    /// The quartiles (first, third); `None` when there is no finite value.
    pub fn quartiles(&self) -> Option<(f64, f64)> {
        (self.n > 0).then_some((self.lower_quartile, self.upper_quartile))
    }
}

/// The `q`-quantile of ascending values by linear interpolation; NaN when there is none.
fn quantile_sorted(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn against_hand_computation() {
        let s = Summary::of(&[4.0, 1.0, 3.0, 2.0]);
        assert_eq!(
            (s.min, s.lower_quartile, s.median, s.upper_quartile, s.max),
            (1.0, 1.75, 2.5, 3.25, 4.0)
        );
        assert!((s.deviation - (5.0f64 / 3.0).sqrt()).abs() < 1e-15);
        // t_{3, 0.975} = 3.182446 (any table of Student's t).
        let (lo, hi) = s.t_interval(0.95).unwrap();
        assert!(((hi - lo) / 2.0 - 3.182446 * s.deviation / 2.0).abs() < 1e-6);
        assert!(((hi + lo) / 2.0 - 2.5).abs() < 1e-12);
    }

    #[test]
    fn too_few_values_give_no_interval() {
        assert_eq!(Summary::of(&[1.0]).t_interval(0.95), None);
        assert_eq!(Summary::of(&[1.0, 2.0]).t_interval(f64::NAN), None);
        let none = Summary::of(&[f64::NAN, f64::INFINITY]);
        assert_eq!((none.n, none.skipped), (0, 2));
        assert!(none.mean.is_nan() && none.median.is_nan() && none.quartiles().is_none());
    }
}
