//! One tensor of the trainer against the reference, in units of what rounding explains.
//!
//! With R the exact reference, R~ the reference with the trainer's rounding and G the trainer's
//! tensor:
//!
//! ```text
//! tolerance  = M ||R~ - R|| / ||R|| + floor            (relative Frobenius)
//! worst      = M_w max(max |R~ - R|, 4 rms(R~ - R)) + floor max |R|     (single entries)
//! share      = max(||G - R|| / ||R|| / tolerance, max |G - R| / worst)
//! ```
//!
//! A tensor passes when its share is at most 1. `tests/validation.rs` records the shares of clean
//! dumps.

use super::precision::Precision;
use ndarray::{Array2, s};
use rayon::prelude::*;
use serde::Serialize;

/// M: how many times the rounding gap a trainer may be off. Another order of the same sums, and
/// rounding inside fused kernels that is not imitated, make gaps of the same size; clean dumps of
/// PyTorch reach half of this.
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
        // Half formats accumulate in single. 64 units cover sums of a few thousand terms, and the
        // differences of nearly equal sums in the softmax's backward.
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

/// Below this share of the other gradients a tensor of the reference is zero up to the reference's
/// own rounding: a key bias without rotary embedding, which the softmax cannot see.
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
    let Sums {
        exact: norm,
        got: got_norm,
        noise: noise_norm,
        gap: gap_norm,
        along,
        noise_along,
        peaks,
    } = sums(got, exact, rounded);
    let norm = if norm > ZERO * scale { norm } else { 0.0 };
    let unit = if norm > 0.0 { norm } else { scale };
    let noise_rms = noise_norm / (exact.len().max(1) as f64).sqrt();
    m.rounding = noise_norm / unit;
    m.tolerance = (MULTIPLE * m.rounding + floor).min(LARGEST_TOLERANCE);
    m.worst = peaks.at.map(|(i, j)| (i, j, got[[i, j]], exact[[i, j]]));
    if !peaks.gap.is_finite() {
        return m;
    }
    m.relative = gap_norm / unit;
    m.norm_ratio = got_norm / unit;
    if norm > 0.0 {
        m.along = along / norm / norm - 1.0;
        m.rounding_along = noise_along / norm / norm;
    }
    m.cosine = if got_norm > 0.0 && norm > 0.0 { along / got_norm / norm } else { 0.0 };
    let entry_unit = if norm > 0.0 { peaks.exact } else { scale };
    let worst_allowed = WORST_MULTIPLE * peaks.noise.max(4.0 * noise_rms) + floor * entry_unit;
    m.share = (m.relative / m.tolerance).max(if peaks.gap > 0.0 {
        peaks.gap / worst_allowed
    } else {
        0.0
    });
    m
}

/// Largest magnitudes of G, R, R~ - R and G - R, and where the last one stands: the first that is
/// not finite, if any.
#[derive(Debug, Clone, Copy, Default)]
struct Peaks {
    got: f64,
    exact: f64,
    noise: f64,
    gap: f64,
    at: Option<(usize, usize)>,
}

impl Peaks {
    /// Takes a gap that comes after those seen: of equal ones, and of several that are not finite,
    /// the first counts.
    #[inline(always)]
    fn see(&mut self, gap: f64, at: (usize, usize)) {
        if self.at.is_none() || (self.gap.is_finite() && !(gap <= self.gap)) {
            (self.gap, self.at) = (gap, Some(at));
        }
    }

    /// With those of later rows.
    fn and(mut self, later: Self) -> Self {
        if let Some(at) = later.at {
            self.see(later.gap, at);
        }
        self.got = self.got.max(later.got);
        self.exact = self.exact.max(later.exact);
        self.noise = self.noise.max(later.noise);
        self
    }
}

/// Norms of G, R, R~ - R and G - R, and G . R, (R~ - R) . R.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    got: f64,
    exact: f64,
    noise: f64,
    gap: f64,
    along: f64,
    noise_along: f64,
    peaks: Peaks,
}

/// Entries that one thread takes; the sums of the parts are added in order.
const PART: usize = 1 << 16;

/// All sums of a comparison in one pass.
fn sums(got: &Array2<f64>, exact: &Array2<f64>, rounded: &Array2<f64>) -> Sums {
    let plain = summed(got, exact, rounded, 1.0);
    let largest = plain.peaks.got.max(plain.peaks.exact).max(plain.peaks.noise);
    let safe = largest == 0.0 || !largest.is_finite() || (1e-100..1e140).contains(&largest);
    let (scale, of) = if safe {
        (1.0, plain)
    } else {
        (1.0 / largest, summed(got, exact, rounded, 1.0 / largest))
    };
    Sums {
        got: of.got.sqrt() / scale,
        exact: of.exact.sqrt() / scale,
        noise: of.noise.sqrt() / scale,
        gap: of.gap.sqrt() / scale,
        along: of.along / scale / scale,
        noise_along: of.noise_along / scale / scale,
        peaks: plain.peaks,
    }
}

/// Squares and products of entries times `scale`; peaks as they are.
fn summed(got: &Array2<f64>, exact: &Array2<f64>, rounded: &Array2<f64>, scale: f64) -> Sums {
    let rows = (PART / exact.ncols().max(1)).max(1);
    let part = |index: usize| {
        let first = index * rows;
        let range = s![first..(first + rows).min(exact.nrows()), ..];
        let (got, exact, rounded) = (got.slice(range), exact.slice(range), rounded.slice(range));
        let mut all = Sums::default();
        for (i, ((got, exact), rounded)) in
            got.rows().into_iter().zip(exact.rows()).zip(rounded.rows()).enumerate()
        {
            for (j, ((&g, &r), &q)) in got.iter().zip(exact).zip(rounded).enumerate() {
                let (gap, noise) = ((g - r).abs(), q - r);
                let peaks = &mut all.peaks;
                peaks.see(gap, (first + i, j));
                peaks.got = peaks.got.max(g.abs());
                peaks.exact = peaks.exact.max(r.abs());
                peaks.noise = peaks.noise.max(noise.abs());
                let (g, r, gap, noise) = (g * scale, r * scale, gap * scale, noise * scale);
                all.got += g * g;
                all.exact += r * r;
                all.noise += noise * noise;
                all.gap += gap * gap;
                all.along += g * r;
                all.noise_along += noise * r;
            }
        }
        all
    };
    let parts = exact.nrows().div_ceil(rows);
    let parts: Vec<Sums> = if parts > 1 {
        (0..parts).into_par_iter().map(part).collect()
    } else {
        (0..parts).map(part).collect()
    };
    parts.into_iter().fold(Sums::default(), |a, b| Sums {
        got: a.got + b.got,
        exact: a.exact + b.exact,
        noise: a.noise + b.noise,
        gap: a.gap + b.gap,
        along: a.along + b.along,
        noise_along: a.noise_along + b.noise_along,
        peaks: a.peaks.and(b.peaks),
    })
}
