//! Learning rates: which were tried, which is best, and whether worse ones stand on both sides.

use peft_limits::error::Result;

/// Learning rates that were tried with their losses, the best of them, and whether it lies between
/// worse ones.
#[derive(Clone, Debug, PartialEq)]
pub struct RateSweep {
    /// Rate and loss (nats), by rising rate.
    pub tried: Vec<(f64, f64)>,
    /// The rate with the least loss.
    pub best: f64,
    /// A smaller and a larger rate were tried and both are worse.
    pub bracketed: bool,
}

impl RateSweep {
    /// Of rates and losses in any order; without any, the best is NaN.
    pub fn of(mut tried: Vec<(f64, f64)>) -> Self {
        tried.sort_by(|a, b| a.0.total_cmp(&b.0));
        let best = (0..tried.len()).min_by(|&a, &b| tried[a].1.total_cmp(&tried[b].1)).unwrap_or(0);
        let bracketed = best > 0 && best + 1 < tried.len();
        Self { best: tried.get(best).map_or(f64::NAN, |t| t.0), tried, bracketed }
    }
}

/// Tries half, once and twice `start`, then further factors of two on the better side until both
/// neighbours of the best are worse, at most [`SWEEP_DOUBLINGS`] from `start`.
///
/// A loss that is NaN counts as infinite.
///
/// # Errors
/// Those of `loss_at`.
pub fn sweep_rates(start: f64, mut loss_at: impl FnMut(f64) -> Result<f64>) -> Result<RateSweep> {
    let (mut low, mut high) = (-1, 1);
    let mut sweep = RateSweep::of(
        (low..=high).map(|power| attempt(start, power, &mut loss_at)).collect::<Result<_>>()?,
    );
    loop {
        let power = if sweep.bracketed {
            return Ok(sweep);
        } else if sweep.best < start && low > -SWEEP_DOUBLINGS {
            low -= 1;
            low
        } else if sweep.best > start && high < SWEEP_DOUBLINGS {
            high += 1;
            high
        } else {
            return Ok(sweep);
        };
        sweep.tried.push(attempt(start, power, &mut loss_at)?);
        sweep = RateSweep::of(sweep.tried);
    }
}

fn attempt(
    start: f64,
    power: i32,
    loss_at: &mut impl FnMut(f64) -> Result<f64>,
) -> Result<(f64, f64)> {
    let rate = start * 2f64.powi(power);
    let loss = loss_at(rate)?;
    Ok((rate, if loss.is_nan() { f64::INFINITY } else { loss }))
}

/// Furthest rate of [`sweep_rates`]: this many factors of two from the start.
pub const SWEEP_DOUBLINGS: i32 = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use peft_limits::Error;

    #[test]
    fn a_sweep_of_rates_ends_between_two_worse_ones() {
        // Least at 8: up from 1, past 8, to 16.
        let up = sweep_rates(1.0, |lr| Ok((lr.log2() - 3.0).powi(2))).unwrap();
        assert_eq!(
            up.tried.iter().map(|t| t.0).collect::<Vec<_>>(),
            [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
        );
        assert!(up.bracketed && up.best.to_bits() == 8f64.to_bits());
        // Down, where the start breaks down.
        let down = sweep_rates(1.0, |lr| Ok(if lr > 0.3 { f64::NAN } else { 1.0 - lr })).unwrap();
        assert!(down.bracketed && down.best.to_bits() == 0.25f64.to_bits(), "{down:?}");
        assert!(down.tried.last().unwrap().1.is_infinite());
        // Better without end: stops, and says so.
        let open = sweep_rates(1.0, |lr| Ok(-lr)).unwrap();
        assert!(!open.bracketed && open.best.to_bits() == 2f64.powi(SWEEP_DOUBLINGS).to_bits());
        assert!(matches!(sweep_rates(1.0, |_| Err(Error::Interrupted)), Err(Error::Interrupted)));
    }
}
