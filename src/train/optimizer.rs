//! AdamW and SGD as pure updates of named parameters, and clipping by the global norm.
//!
//! ```text
//! AdamW   p <- p - lr wd p                               decoupled decay, before the update
//!         m <- m + (1 - b1) (g - m)      v <- b2 v + (1 - b2) g^2
//!         p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)      t = 1, 2, ...
//! SGD     g <- g + wd p         m <- mu m + g  (m = g at t = 1)         p <- p - lr m
//! ```
//!
//! The order of operations and the place of eps (outside the root, after the bias correction) are those of
//! the common trainers, so that three steps agree to roundoff with a recorded run.

use crate::error::{Error, Result};
use crate::linalg::Real;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Which update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[default]
    AdamW,
    /// Stochastic gradient descent with momentum.
    Sgd,
}

/// Parameters of an optimizer.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `kind` | `adamw` | the update | `adamw`, `sgd` |
/// | `lr` | 1e-3 | peak learning rate | > 0 |
/// | `beta1`, `beta2` | 0.9, 0.999 | decay of the moments (AdamW) | 0 to below 1 |
/// | `eps` | 1e-8 | added to the root of the second moment (AdamW) | > 0 |
/// | `weight_decay` | 0 | decoupled (AdamW) or added to the gradient (SGD) | >= 0 |
/// | `momentum` | 0 | SGD | 0 to below 1 |
/// | `clip` | 0 | largest global gradient norm; 0 turns clipping off | >= 0 |
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerParams {
    /// The update.
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// Largest global gradient norm; 0 is off.
    pub clip: f64,
}

impl Default for OptimizerParams {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            momentum: 0.0,
            clip: 0.0,
        }
    }
}

impl OptimizerParams {
    /// Checks every range of the table.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key and its range.
    pub fn check<T: Real>(self) -> Result<Optimizer<T>> {
        let ranges = [
            ("lr", self.lr, self.lr > 0.0, "must be positive"),
            ("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "must be at least 0 and below 1"),
            ("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "must be at least 0 and below 1"),
            ("eps", self.eps, self.eps > 0.0, "must be positive"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0, "must be at least 0"),
            ("momentum", self.momentum, (0.0..1.0).contains(&self.momentum), "must be at least 0 and below 1"),
            ("clip", self.clip, self.clip >= 0.0, "must be at least 0 (0 turns clipping off)"),
        ];
        for (name, value, fine, requirement) in ranges {
            if !(fine && value.is_finite()) {
                return Err(Error::invalid(format!("optimizer.{name}"), value, requirement));
            }
        }
        Ok(Optimizer { params: self, steps: 0, state: BTreeMap::new() })
    }

    /// Numbers of state kept per trained number.
    pub fn state_per_parameter(&self) -> usize {
        match self.kind {
            OptimizerKind::AdamW => 2,
            OptimizerKind::Sgd => usize::from(self.momentum > 0.0),
        }
    }
}

/// Moments of one parameter: (first, second) for AdamW, (momentum,) for SGD.
#[derive(Debug, Clone, PartialEq)]
struct Moments<T> {
    first: Vec<T>,
    second: Vec<T>,
}

/// A checked optimizer with its state, keyed by parameter name.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer<T> {
    params: OptimizerParams,
    steps: u64,
    state: BTreeMap<String, Moments<T>>,
}

impl<T: Real> Optimizer<T> {
    /// The parameters it was made from.
    pub fn params(&self) -> &OptimizerParams {
        &self.params
    }

    /// Updates done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Starts the next update: every trained parameter then gets one [`Optimizer::update`].
    pub fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// Bytes of state.
    pub fn bytes(&self) -> usize {
        self.state.values().map(|m| (m.first.len() + m.second.len()) * size_of::<T>()).sum()
    }

    /// Updates one parameter in place from its gradient times `gradient_scale` (1, or the clipping factor).
    ///
    /// State is made at the first call for a name. Cost O(entries).
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if parameter, gradient and state differ in length.
    ///
    /// ```
    /// use peft_limits::train::optimizer::OptimizerParams;
    /// // At the first step AdamW moves every entry by lr in the gradient's sign, whatever its size.
    /// let mut adam = OptimizerParams { lr: 0.5, eps: 1e-30, ..Default::default() }.check::<f64>()?;
    /// let mut p = [1.0, 2.0];
    /// adam.begin_step();
    /// adam.update("p", &mut p, &[1e-3, -1e6], 0.5, 1.0)?;
    /// assert!((p[0] - 0.5).abs() < 1e-12 && (p[1] - 2.5).abs() < 1e-12);
    /// # Ok::<(), peft_limits::Error>(())
    /// ```
    pub fn update(
        &mut self,
        name: &str,
        parameter: &mut [T],
        gradient: &[T],
        lr: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        let n = parameter.len();
        if gradient.len() != n {
            return Err(length_mismatch(format!("gradient of {name}"), n, gradient.len()));
        }
        if !self.state.contains_key(name) {
            let [first, second] = self.state_lengths(n).map(|n| vec![T::zero(); n]);
            self.state.insert(name.to_string(), Moments { first, second });
        }
        let Some(moments) = self.state.get_mut(name) else { return Ok(()) };
        let expected = if moments.first.is_empty() { n } else { moments.first.len() };
        if expected != n {
            return Err(length_mismatch(format!("parameter {name}"), expected, n));
        }
        let scale = T::of(gradient_scale);
        let p = self.params;
        match p.kind {
            OptimizerKind::AdamW => {
                let t = self.steps.max(1) as f64;
                let keep = T::of(1.0 - lr * p.weight_decay);
                let (w1, b2, w2) = (T::of(1.0 - p.beta1), T::of(p.beta2), T::of(1.0 - p.beta2));
                let step = T::of(lr / (1.0 - p.beta1.powf(t)));
                let root = T::of((1.0 - p.beta2.powf(t)).sqrt());
                let eps = T::of(p.eps);
                let moments = moments.first.iter_mut().zip(&mut moments.second);
                for ((x, &g), (m, v)) in parameter.iter_mut().zip(gradient).zip(moments) {
                    let g = g * scale;
                    *m += w1 * (g - *m);
                    *v = b2 * *v + w2 * g * g;
                    *x = keep * *x - step * *m / (v.sqrt() / root + eps);
                }
            }
            OptimizerKind::Sgd => {
                let (lr, decay, momentum) = (T::of(lr), T::of(p.weight_decay), T::of(p.momentum));
                if moments.first.is_empty() {
                    for (x, &g) in parameter.iter_mut().zip(gradient) {
                        let g = g * scale + decay * *x;
                        *x -= lr * g;
                    }
                } else {
                    // Momentum starts at zero, so the first step is m = g.
                    for ((x, &g), m) in parameter.iter_mut().zip(gradient).zip(&mut moments.first) {
                        *m = momentum * *m + g * scale + decay * *x;
                        *x -= lr * *m;
                    }
                }
            }
        }
        Ok(())
    }

    fn state_lengths(&self, n: usize) -> [usize; 2] {
        match self.params.state_per_parameter() {
            2 => [n, n],
            1 => [n, 0],
            _ => [0, 0],
        }
    }

    /// State tensors by name (`first.<parameter>`, `second.<parameter>`), for checkpoints.
    pub fn state(&self) -> impl Iterator<Item = (String, &[T])> {
        self.state.iter().flat_map(|(name, moments)| {
            let parts = [("first", &moments.first), ("second", &moments.second)];
            parts.into_iter().filter(|p| !p.1.is_empty()).map(move |(part, x)| (format!("{part}.{name}"), x.as_slice()))
        })
    }

    /// Restores what [`Optimizer::state`] and [`Optimizer::steps`] gave.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a name without `first.` or `second.`, or a part that this kind does not keep;
    /// [`Error::ShapeMismatch`] if the two moments differ in length.
    pub fn restore(&mut self, steps: u64, state: impl IntoIterator<Item = (String, Vec<T>)>) -> Result<()> {
        let mut restored: BTreeMap<String, Moments<T>> = BTreeMap::new();
        let parts = self.params.state_per_parameter();
        for (key, values) in state {
            let (part, name) = key.split_once('.').unwrap_or(("", &key));
            let entry = restored.entry(name.to_string()).or_insert(Moments { first: vec![], second: vec![] });
            match part {
                "first" if parts >= 1 => entry.first = values,
                "second" if parts == 2 => entry.second = values,
                _ => {
                    return Err(Error::invalid("optimizer state", &key, format!("not kept by {:?}", self.params.kind)));
                }
            }
        }
        for (name, moments) in &restored {
            let second = if parts == 2 { moments.first.len() } else { 0 };
            if moments.second.len() != second {
                return Err(length_mismatch(format!("second.{name}"), second, moments.second.len()));
            }
        }
        self.steps = steps;
        self.state = restored;
        Ok(())
    }
}

fn length_mismatch(arg: String, expected: usize, got: usize) -> Error {
    Error::ShapeMismatch { op: "Optimizer::update", arg, expected: format!("[{expected}]"), got: format!("[{got}]") }
}

/// Sum of squares of a gradient in double precision; the global norm is the root of the sum over parameters.
pub fn squared_norm<T: Real>(gradient: &[T]) -> f64 {
    gradient.iter().map(|g| g.widen() * g.widen()).sum()
}

/// Factor that brings a gradient of global norm `norm` to at most `clip`: min(1, clip / (norm + 1e-6)).
///
/// The 1e-6 is that of the common trainers. `clip = 0` turns clipping off.
///
/// ```
/// use peft_limits::train::optimizer::clip_factor;
/// assert_eq!(clip_factor(0.5, 1.0), 1.0);
/// assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
/// assert_eq!(clip_factor(4.0, 0.0), 1.0);
/// ```
pub fn clip_factor(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The module's equations in exact textbook form, in f64, independent of the loop above.
    fn textbook_adamw(p: &mut f64, m: &mut f64, v: &mut f64, g: f64, t: i32, q: &OptimizerParams) {
        *p -= q.lr * q.weight_decay * *p;
        *m = q.beta1 * *m + (1.0 - q.beta1) * g;
        *v = q.beta2 * *v + (1.0 - q.beta2) * g.powi(2);
        let m_hat = *m / (1.0 - q.beta1.powi(t));
        let v_hat = *v / (1.0 - q.beta2.powi(t));
        *p -= q.lr * m_hat / (v_hat.sqrt() + q.eps);
    }

    #[test]
    fn adamw_follows_the_textbook_for_many_steps() {
        let q = OptimizerParams { lr: 0.03, weight_decay: 0.1, beta1: 0.8, beta2: 0.95, ..Default::default() };
        let mut adam = q.check::<f64>().unwrap();
        let mut p = [0.7, -1.3, 2.0];
        let mut want = p.map(|p| (p, 0.0, 0.0));
        for t in 1..=50 {
            let g: [f64; 3] = std::array::from_fn(|i| p[i] - [3.0, 0.1, -2.0][i] + (t as f64 * 0.7).sin());
            adam.begin_step();
            adam.update("p", &mut p, &g, q.lr, 1.0).unwrap();
            for i in 0..3 {
                let (x, m, v) = &mut want[i];
                textbook_adamw(x, m, v, g[i], t, &q);
                assert!((p[i] - *x).abs() < 1e-13, "step {t}");
            }
        }
        assert_eq!(adam.bytes(), 3 * 2 * 8);
    }

    /// One step from p = 1, g = 2, worked by hand: decay 1 - 0.1 * 0.5 = 0.95, then - 0.1 * 2 / (2 + 1).
    #[test]
    fn eps_is_outside_the_root_and_decay_is_decoupled() {
        let q = OptimizerParams { lr: 0.1, weight_decay: 0.5, eps: 1.0, ..Default::default() };
        let mut adam = q.check::<f64>().unwrap();
        let mut p = [1.0];
        adam.begin_step();
        adam.update("p", &mut p, &[2.0], 0.1, 1.0).unwrap();
        assert!((p[0] - (0.95 - 0.1 * 2.0 / 3.0)).abs() < 1e-14, "{}", p[0]);
    }

    /// SGD on 1/2 a x^2 with momentum: the recurrence x_{t+1} = (1 + mu - lr a) x_t - mu x_{t-1}.
    #[test]
    fn sgd_with_momentum_obeys_its_recurrence() {
        let (a, lr, mu) = (3.0, 0.05, 0.9);
        let mut sgd = OptimizerParams { kind: OptimizerKind::Sgd, lr, momentum: mu, ..Default::default() }
            .check::<f64>()
            .unwrap();
        let mut x = [1.0];
        let mut history = vec![1.0];
        for _ in 0..20 {
            let g = [a * x[0]];
            sgd.begin_step();
            sgd.update("x", &mut x, &g, lr, 1.0).unwrap();
            history.push(x[0]);
        }
        for t in 1..20 {
            let want = (1.0 + mu - lr * a) * history[t] - mu * history[t - 1];
            assert!((history[t + 1] - want).abs() < 1e-14);
        }
        let mut plain = OptimizerParams { kind: OptimizerKind::Sgd, lr, weight_decay: 0.5, ..Default::default() }
            .check::<f64>()
            .unwrap();
        let mut x = [2.0];
        plain.begin_step();
        plain.update("x", &mut x, &[4.0], 0.1, 0.5).unwrap();
        assert!((x[0] - (2.0 - 0.1 * (2.0 + 1.0))).abs() < 1e-15);
        assert_eq!(plain.bytes(), 0);
    }

    #[test]
    fn restored_state_continues_bit_exactly() {
        let q = OptimizerParams { weight_decay: 0.01, ..Default::default() };
        let gradient = |x: f32, t: u32| (x * 3.1 + t as f32).cos();
        let run = |adam: &mut Optimizer<f32>, p: &mut [f32; 2], steps: std::ops::Range<u32>| {
            for t in steps {
                let g = p.map(|x| gradient(x, t));
                adam.begin_step();
                adam.update("w", p, &g, 1e-2, 1.0).unwrap();
            }
        };
        let mut whole = q.check::<f32>().unwrap();
        let mut p = [0.3, -0.4];
        run(&mut whole, &mut p, 0..9);
        let mut first = q.check::<f32>().unwrap();
        let mut r = [0.3, -0.4];
        run(&mut first, &mut r, 0..4);
        let saved: Vec<(String, Vec<f32>)> = first.state().map(|(n, x)| (n, x.to_vec())).collect();
        let mut second = q.check::<f32>().unwrap();
        second.restore(first.steps(), saved).unwrap();
        run(&mut second, &mut r, 4..9);
        assert_eq!(p.map(f32::to_bits), r.map(f32::to_bits));
        assert_eq!(whole, second);
    }

    #[test]
    fn each_end_of_each_range_and_bad_lengths() {
        let ok = OptimizerParams::default();
        assert!(OptimizerParams { beta1: 0.0, clip: 0.0, ..ok }.check::<f32>().is_ok());
        let bad = [
            ("lr", OptimizerParams { lr: 0.0, ..ok }),
            ("lr", OptimizerParams { lr: f64::NAN, ..ok }),
            ("lr", OptimizerParams { lr: f64::INFINITY, ..ok }),
            ("beta1", OptimizerParams { beta1: 1.0, ..ok }),
            ("beta2", OptimizerParams { beta2: -0.1, ..ok }),
            ("eps", OptimizerParams { eps: 0.0, ..ok }),
            ("weight_decay", OptimizerParams { weight_decay: -1.0, ..ok }),
            ("momentum", OptimizerParams { momentum: 1.0, ..ok }),
            ("clip", OptimizerParams { clip: -1.0, ..ok }),
        ];
        for (key, params) in bad {
            match params.check::<f64>() {
                Err(Error::InvalidParam { name, .. }) => assert_eq!(name, format!("optimizer.{key}")),
                other => panic!("{other:?}"),
            }
        }
        let mut adam = ok.check::<f64>().unwrap();
        adam.begin_step();
        assert!(matches!(adam.update("w", &mut [0.0; 3], &[0.0; 2], 0.1, 1.0), Err(Error::ShapeMismatch { .. })));
        adam.update("w", &mut [0.0; 3], &[0.0; 3], 0.1, 1.0).unwrap();
        assert!(matches!(adam.update("w", &mut [0.0; 4], &[0.0; 4], 0.1, 1.0), Err(Error::ShapeMismatch { .. })));
        assert!(matches!(adam.restore(1, [("third.w".to_string(), vec![1.0])]), Err(Error::InvalidParam { .. })));
        assert!(matches!(adam.restore(1, [("first.w".to_string(), vec![1.0])]), Err(Error::ShapeMismatch { .. })));
    }

    #[test]
    fn clipped_gradient_has_the_requested_norm() {
        let g = [3.0f32, 4.0, 12.0];
        let norm = squared_norm(&g).sqrt();
        assert!((norm - 13.0).abs() < 1e-12);
        let clipped = g.map(|g| g * clip_factor(norm, 2.0) as f32);
        assert!((squared_norm(&clipped).sqrt() - 2.0).abs() < 1e-6);
    }
}
