//! Learning-rate schedules.
//!
//! ```text
//! warm-up   f(t) = t / w                                           t < w
//! constant  f(t) = 1                                               t >= w
//! linear    f(t) = m + (1 - m) (1 - u),  u = (t - w) / (T - w)     t >= w
//! cosine    f(t) = m + (1 - m) (1 + cos(pi u)) / 2                 t >= w
//! ```
//!
//! Step t counts from 0, T is the length of the run, w the warm-up, m the floor; after T the value
//! stays at its end. These are the schedules of the common trainers, so runs can be compared step
//! by step.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// The form after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// No decay.
    #[default]
    Constant,
    /// A straight line to the floor.
    Linear,
    /// Half a cosine to the floor.
    Cosine,
}

/// Parameters of a schedule.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `decay` | `constant` | form after warm-up | `constant`, `linear`, `cosine` |
/// | `warmup` | 0 | steps of linear warm-up | 0 to the run's steps |
/// | `floor` | 0 | last factor, as a share of the peak | 0 to 1 |
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleParams {
    /// Form after warm-up.
    pub decay: Decay,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Last factor, as a share of the peak.
    pub floor: f64,
}

impl ScheduleParams {
    /// Checks the parameters against a run of `steps` steps.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key and its range.
    ///
    /// ```
    /// use peft_limits::train::schedule::{Decay, ScheduleParams};
    /// let s = ScheduleParams { decay: Decay::Cosine, warmup: 2, floor: 0.0 }.check(10)?;
    /// assert_eq!(s.factor(0), 0.0);
    /// assert_eq!(s.factor(1), 0.5);
    /// assert_eq!(s.factor(2), 1.0);
    /// assert!((s.factor(6) - 0.5).abs() < 1e-15);
    /// # Ok::<(), peft_limits::Error>(())
    /// ```
    pub fn check(self, steps: u64) -> Result<Schedule> {
        if self.warmup > steps {
            return Err(Error::invalid(
                "schedule.warmup",
                self.warmup,
                format!("must be at most train.steps = {steps}"),
            ));
        }
        if !(self.floor >= 0.0 && self.floor <= 1.0) {
            return Err(Error::invalid("schedule.floor", self.floor, "must be between 0 and 1"));
        }
        Ok(Schedule { params: self, steps })
    }
}

/// A checked schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    params: ScheduleParams,
    steps: u64,
}

impl Schedule {
    /// The factor on the learning rate at a step, in [0, 1].
    pub fn factor(&self, step: u64) -> f64 {
        let ScheduleParams { decay, warmup, floor } = self.params;
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let rest = self.steps - warmup;
        let u = if rest == 0 { 1.0 } else { ((step - warmup) as f64 / rest as f64).min(1.0) };
        match decay {
            Decay::Constant => 1.0,
            Decay::Linear => floor + (1.0 - floor) * (1.0 - u),
            Decay::Cosine => floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * u).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn closed_forms() {
        let linear =
            ScheduleParams { decay: Decay::Linear, warmup: 3, floor: 0.25 }.check(11).unwrap();
        for (step, want) in
            [(0, 0.0), (1, 1.0 / 3.0), (3, 1.0), (7, 0.625), (11, 0.25), (100, 0.25)]
        {
            assert!(
                (linear.factor(step) - want).abs() < 1e-15,
                "step {step}: {}",
                linear.factor(step)
            );
        }
        let cosine =
            ScheduleParams { decay: Decay::Cosine, warmup: 0, floor: 0.1 }.check(8).unwrap();
        for (step, want) in [(0, 1.0), (4, 0.55), (8, 0.1), (9, 0.1)] {
            assert!((cosine.factor(step) - want).abs() < 1e-15);
        }
        let all_warmup =
            ScheduleParams { decay: Decay::Cosine, warmup: 4, floor: 0.0 }.check(4).unwrap();
        assert!((all_warmup.factor(3) - 0.75).abs() < 1e-15);
    }

    #[test]
    fn each_end_of_each_range() {
        let make = |warmup, floor| ScheduleParams { decay: Decay::Linear, warmup, floor };
        assert!(make(5, 0.0).check(5).is_ok() && make(0, 1.0).check(5).is_ok());
        for (bad, key) in [
            (make(6, 0.0), "schedule.warmup"),
            (make(0, -1e-9), "schedule.floor"),
            (make(0, 1.001), "schedule.floor"),
            (make(0, f64::NAN), "schedule.floor"),
        ] {
            match bad.check(5) {
                Err(Error::InvalidParam { name, .. }) => assert_eq!(name, key),
                other => panic!("{other:?}"),
            }
        }
    }

    proptest! {
        /// Rises through the warm-up, never rises after, stays within [0, 1].
        #[test]
        fn monotone(warmup in 0u64..20, rest in 0u64..50, floor in 0.0f64..1.0, cosine: bool) {
            let decay = if cosine { Decay::Cosine } else { Decay::Linear };
            let schedule = ScheduleParams { decay, warmup, floor }.check(warmup + rest).unwrap();
            for t in 0..warmup + rest + 3 {
                let (a, b) = (schedule.factor(t), schedule.factor(t + 1));
                prop_assert!((0.0..=1.0).contains(&a));
                if t < warmup && rest > 0 { prop_assert!(b > a) } else if t >= warmup { prop_assert!(b <= a) }
            }
        }
    }
}
