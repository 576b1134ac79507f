//! One tensor of the trainer against the reference, in units of what rounding explains.
//!
//! With R the exact reference, R~ the reference with the trainer's rounding and G the trainer's tensor:
//!
//! ```text
//! tolerance  = M ||R~ - R|| / ||R|| + floor            (relative Frobenius)
//! worst      = M_w max(max |R~ - R|, 4 rms(R~ - R)) + floor max |R|     (single entries)
//! share      = max(||G - R|| / ||R|| / tolerance, max |G - R| / worst)
//! ```
//!
//! A tensor passes when its share is at most 1. `tests/validation.rs` records the shares of clean dumps.

use super::precision::Precision;
use crate::linalg::norms::frobenius;
use ndarray::Array2;
use serde::Serialize;

/// M: how many times the rounding gap a trainer may be off. Another order of the same sums, and rounding inside fused
/// kernels that is not imitated, make gaps of the same size; clean dumps of PyTorch reach half of this.
pub const MULTIPLE: f64 = 8.0;
/// M_w, for single entries, whose largest fluctuates more than a norm.
pub const WORST_MULTIPLE: f64 = 12.0;
/// Beyond this the format itself loses the tensor, and nothing can be said for the trainer.
pub const LARGEST_TOLERANCE: f64 = 0.5;

/// Relative gap that sums in this format make besides the imitated rounding.
pub fn floor(precision: Precision) -> f64 {
    match precision {
        // Fixtures of several frameworks agree to 1e-10.
        Precision::F64 => 1e-10,
        // Half formats accumulate in single. 64 units cover sums of a few thousand terms, and the differences of nearly
        // equal sums in the softmax's backward.
        _ => 64.0 * Precision::F32.epsilon(),
    }
}

/// Gaps of one tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measure {
    /// The tensor.
    pub name: String,
    /// ||G - R|| / ||R||.
    pub relative: f64,
    /// ||R~ - R|| / ||R||.
    pub rounding: f64,
    /// What `relative` may be.
    pub tolerance: f64,
    /// G . R / ||R||^2 - 1: how much longer G is along R.
    pub along: f64,
    /// The same of the rounded reference.
    pub rounding_along: f64,
    /// G . R / (||G|| ||R||).
    pub cosine: f64,
    /// ||G|| / ||R||.
    pub norm_ratio: f64,
    /// Position (row, column), value and reference of the entry with the largest difference.
    pub worst: Option<(usize, usize, f64, f64)>,
    /// Share of the tolerance that is used; infinite for NaN, a missing tensor or another shape.
    pub share: f64,
}

impl Measure {
    /// Whether the tensor is within its tolerance.
    pub fn passes(&self) -> bool {
        self.share <= 1.0
    }
}

/// Inner product, norms in double precision.
pub(super) fn dot(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    ndarray::Zip::from(a).and(b).fold(0.0, |sum, x, y| sum + x * y)
}

/// Below this share of the other gradients a tensor of the reference is zero up to the reference's own rounding: a key
/// bias without rotary embedding, which the softmax cannot see.
const ZERO: f64 = 1e-13;

/// Compares a tensor; `scale` stands in for the norm of a reference that is zero.
pub fn measure(
    name: &str,
    got: &Array2<f64>,
    exact: &Array2<f64>,
    rounded: &Array2<f64>,
    floor: f64,
    scale: f64,
) -> Measure {
    let mut m = Measure {
        name: name.to_string(),
        relative: f64::INFINITY,
        rounding: 0.0,
        tolerance: floor,
        along: f64::NAN,
        rounding_along: 0.0,
        cosine: 0.0,
        norm_ratio: 0.0,
        worst: None,
        share: f64::INFINITY,
    };
    if got.dim() != exact.dim() || rounded.dim() != exact.dim() {
        return m;
    }
    let norm = frobenius(&exact.view());
    let norm = if norm > ZERO * scale { norm } else { 0.0 };
    let unit = if norm > 0.0 { norm } else { scale };
    let noise = rounded - exact;
    let noise_norm = frobenius(&noise.view());
    let noise_rms = noise_norm / (noise.len().max(1) as f64).sqrt();
    m.rounding = noise_norm / unit;
    m.tolerance = (MULTIPLE * m.rounding + floor).min(LARGEST_TOLERANCE);
    let mut worst = -1.0;
    for ((i, j), &g) in got.indexed_iter() {
        let r = exact[[i, j]];
        let gap = (g - r).abs();
        if !gap.is_finite() {
            m.worst = Some((i, j, g, r));
            return m;
        }
        if gap > worst {
            worst = gap;
            m.worst = Some((i, j, g, r));
        }
    }
    let (got_norm, gap_norm) = (frobenius(&got.view()), frobenius(&(got - exact).view()));
    m.relative = gap_norm / unit;
    m.norm_ratio = got_norm / unit;
    if norm > 0.0 {
        m.along = dot(got, exact) / norm / norm - 1.0;
        m.rounding_along = dot(&noise, exact) / norm / norm;
    }
    m.cosine = if got_norm > 0.0 && norm > 0.0 { dot(got, exact) / got_norm / norm } else { 0.0 };
    let largest = |a: &Array2<f64>| a.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let entry_unit = if norm > 0.0 { largest(exact) } else { scale };
    let worst_allowed = WORST_MULTIPLE * largest(&noise).max(4.0 * noise_rms) + floor * entry_unit;
    m.share = (m.relative / m.tolerance).max(if worst > 0.0 { worst / worst_allowed } else { 0.0 });
    m
}
