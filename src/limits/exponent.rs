//! Fitted cost exponents: the slope of log(cost) against log(length), with a confidence interval.

use crate::error::{Error, Result};
use statrs::distribution::{ContinuousCDF, StudentsT};

/// A fitted power law cost = exp(intercept) length^slope.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exponent {
    /// The slope.
    pub slope: f64,
    /// Lower end of the confidence interval of the slope.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Intercept in logarithms.
    pub intercept: f64,
    /// Root mean square residual in natural logarithms: scatter and lack of fit together.
    pub residual: f64,
    /// Points fitted.
    pub points: usize,
}

/// Least squares on logarithms, with the Student-t interval of the given level (for instance 0.95).
///
/// The interval assumes independent residuals of equal variance. Where counts are free of noise it
/// measures how far the points are from a power law, not a sampling error.
///
/// # Errors
/// [`Error::InvalidParam`] for fewer than three points or two lengths, values that are not positive
/// and finite, or a level outside (0, 1).
///
/// ```
/// use peft_limits::limits::exponent::fit_exponent;
/// let square: Vec<(f64, f64)> = (1..=5).map(|i| (f64::from(i), 3.0 * f64::from(i * i))).collect();
/// let fit = fit_exponent(&square, 0.95)?;
/// assert!((fit.slope - 2.0).abs() < 1e-12 && fit.high - fit.low < 1e-9);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn fit_exponent(points: &[(f64, f64)], level: f64) -> Result<Exponent> {
    let n = points.len();
    if n < 3 {
        return Err(Error::invalid("points", n, "a slope with an interval needs at least three"));
    }
    if !(level > 0.0 && level < 1.0) {
        return Err(Error::invalid("level", level, "must lie between 0 and 1"));
    }
    if let Some((x, y)) =
        points.iter().find(|(x, y)| !(*x > 0.0 && *y > 0.0 && x.is_finite() && y.is_finite()))
    {
        return Err(Error::invalid(
            "points",
            format!("({x}, {y})"),
            "lengths and costs must be positive and finite",
        ));
    }
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let mean = |f: fn(&(f64, f64)) -> f64| logs.iter().map(f).sum::<f64>() / n as f64;
    let (mx, my) = (mean(|p| p.0), mean(|p| p.1));
    let sxx: f64 = logs.iter().map(|p| (p.0 - mx).powi(2)).sum();
    if !(sxx > 0.0) {
        return Err(Error::invalid("points", n, "at least two different lengths are needed"));
    }
    let slope = logs.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum::<f64>() / sxx;
    let intercept = my - slope * mx;
    let squares: f64 = logs.iter().map(|p| (p.1 - intercept - slope * p.0).powi(2)).sum();
    let freedom = (n - 2) as f64;
    let quantile = StudentsT::new(0.0, 1.0, freedom)
        .map_err(|e| Error::invalid("points", n, e.to_string()))?
        .inverse_cdf(0.5 + level / 2.0);
    let half = quantile * (squares / freedom / sxx).sqrt();
    Ok(Exponent {
        slope,
        low: slope - half,
        high: slope + half,
        intercept,
        residual: (squares / n as f64).sqrt(),
        points: n,
    })
}

/// Length at which two fitted laws cost the same, if they cross.
pub fn crossing(a: &Exponent, b: &Exponent) -> Option<f64> {
    let gap = a.slope - b.slope;
    (gap.abs() > 1e-9).then(|| ((b.intercept - a.intercept) / gap).exp()).filter(|x| x.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_distr::{Distribution, Normal};

    #[test]
    fn the_interval_covers_the_truth_as_often_as_it_says() {
        let noise = Normal::new(0.0, 0.2).unwrap();
        let mut covered = 0;
        for seed in 0..400 {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            let points: Vec<(f64, f64)> = (0..8)
                .map(|i| {
                    let x = 2f64.powi(i);
                    (x, 5.0 * x.powf(1.3) * f64::exp(noise.sample(&mut rng)))
                })
                .collect();
            let fit = fit_exponent(&points, 0.9).unwrap();
            covered += usize::from(fit.low <= 1.3 && 1.3 <= fit.high);
        }
        // 360 expected, standard deviation 6.
        assert!((336..=384).contains(&covered), "{covered} of 400");
    }

    #[test]
    fn laws_cross_where_they_should() {
        let law = |a: f64, p: f64| {
            let points: Vec<(f64, f64)> =
                (0..4).map(|i| (2f64.powi(i), a * 2f64.powi(i).powf(p))).collect();
            fit_exponent(&points, 0.95).unwrap()
        };
        assert!((crossing(&law(100.0, 1.0), &law(1.0, 2.0)).unwrap() - 100.0).abs() < 1e-9);
        assert!(crossing(&law(1.0, 1.0), &law(2.0, 1.0)).is_none());
    }

    #[test]
    fn bad_points_are_refused() {
        for points in [
            vec![(1.0, 1.0), (2.0, 2.0)],
            vec![(1.0, 1.0); 4],
            vec![(1.0, 1.0), (2.0, 0.0), (3.0, 1.0)],
            vec![(1.0, f64::NAN), (2.0, 1.0), (3.0, 1.0)],
        ] {
            assert!(matches!(fit_exponent(&points, 0.95), Err(Error::InvalidParam { .. })));
        }
    }
}
