//! What a gradient routine is asked for and what it returns.

use super::problem::Qkv;
use crate::cost::Cost;
use crate::linalg::Real;
use ndarray::Array2;

/// Which gradients to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Only dA and dB of the adapted projections: every product has r columns, never d_h.
    Adapters,
    /// dQ, dK, dV and, where hidden states are given, dW, dA and dB.
    All,
}

/// Gradients of one head with its output.
#[derive(Debug, Clone)]
pub struct Gradients<T> {
    /// O, `L_q x d_v`.
    pub output: Array2<T>,
    /// 1/2 ||O - Y||_F^2, if the objective is a target.
    pub loss: Option<f64>,
    /// dQ, dK, dV (`L x d_h`), for [`Request::All`].
    pub projected: Qkv<Option<Array2<T>>>,
    /// dW_p (`d_in x d_h`), for [`Request::All`] with hidden states.
    pub weight: Qkv<Option<Array2<T>>>,
    /// dA_p (`r x d_h`) of adapted projections.
    pub lora_a: Qkv<Option<Array2<T>>>,
    /// dB_p (`d_in x r`) of adapted projections.
    pub lora_b: Qkv<Option<Array2<T>>>,
    /// Operations and memory used.
    pub cost: Cost,
}

impl<T: Real> Gradients<T> {
    /// Every gradient that is present, under its name in files: dQ, dWQ, dAQ, dBQ, ...
    ///
    /// dQ, dK, dV are named only when no dW is present (that is, when Q, K, V were the inputs).
    pub fn named(&self) -> Vec<(String, &Array2<T>)> {
        let mut all = Vec::new();
        let has_weights = self.weight.named().iter().any(|(_, w)| w.is_some());
        for (letter, d) in self.projected.named() {
            if let (Some(d), false) = (d, has_weights) {
                all.push((format!("d{letter}"), d));
            }
        }
        for (kind, set) in [("W", &self.weight), ("A", &self.lora_a), ("B", &self.lora_b)] {
            for (letter, d) in set.named() {
                if let Some(d) = d {
                    all.push((format!("d{kind}{letter}"), d));
                }
            }
        }
        all
    }

    /// Relative Frobenius gap over the gradients that both sides hold, taken together.
    ///
    /// Prefers dA and dB (what LoRA trains); without adapters uses dQ, dK, dV. Infinite if nothing
    /// is shared.
    pub fn relative_gap<U: Real>(&self, reference: &Gradients<U>) -> f64 {
        let (mut gap, mut norm) = (0.0f64, 0.0f64);
        let mut visit = |ours: &Qkv<Option<Array2<T>>>, theirs: &Qkv<Option<Array2<U>>>| {
            let mut shared = false;
            for ((_, a), (_, b)) in ours.named().into_iter().zip(theirs.named()) {
                if let (Some(a), Some(b)) = (a, b) {
                    shared = true;
                    for (x, y) in a.iter().zip(b.iter()) {
                        gap += (x.widen() - y.widen()).powi(2);
                        norm += y.widen().powi(2);
                    }
                }
            }
            shared
        };
        let adapters =
            visit(&self.lora_a, &reference.lora_a) | visit(&self.lora_b, &reference.lora_b);
        let shared = adapters || visit(&self.projected, &reference.projected);
        match shared {
            false => f64::INFINITY,
            true if norm > 0.0 => (gap / norm).sqrt(),
            true => gap.sqrt(),
        }
    }
}
