//! Rotary position embedding in the Hugging Face half-split layout.

use super::{ROWS_PER_TASK, numbers};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::elementwise::vectorized_closure;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// How the frequencies of a rotary embedding are changed for sequences longer than those of
/// pretraining.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Scaling {
    /// Not.
    #[default]
    None,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with the sequence once it is longer than `original`.
    Dynamic {
        /// The factor.
        factor: f64,
        /// Longest sequence of pretraining.
        original: usize,
    },
    /// Low frequencies divided by a factor, high ones kept, those between interpolated (LLaMA 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// `original` over the longest wavelength that is interpolated.
        low: f64,
        /// `original` over the longest wavelength that is kept.
        high: f64,
        /// Longest sequence of pretraining.
        original: usize,
    },
    /// As LLaMA 3.1's with a ramp over the dimensions, and a factor of cos and sin (arXiv
    /// 2309.00071).
    Yarn {
        /// The factor.
        factor: f64,
        /// Longest sequence of pretraining.
        original: usize,
        /// Rotations over `original` above which a frequency is kept.
        fast: f64,
        /// Rotations below which it is divided.
        slow: f64,
        /// Factor of cos and sin; 0.1 ln(factor) + 1 when absent.
        attention: Option<f64>,
        /// Whether the ends of the ramp are whole dimensions.
        truncate: bool,
    },
    /// Each frequency divided by a factor of its own (arXiv 2402.13753).
    LongRope {
        /// Factors up to `original` tokens.
        short: Vec<f64>,
        /// Factors beyond.
        long: Vec<f64>,
        /// Longest sequence of pretraining.
        original: usize,
        /// Longest sequence over `original`.
        factor: f64,
        /// Factor of cos and sin; sqrt(1 + ln(factor) / ln(original)) when absent.
        attention: Option<f64>,
    },
}

/// A rotary embedding.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rotary {
    /// Base of the angles; the model's own when absent.
    pub theta: Option<f64>,
    /// Change of the frequencies.
    pub scaling: Scaling,
    /// Share of a head, from its first entry on, that is rotated; all of it when absent.
    pub share: Option<f64>,
}

impl Rotary {
    /// Entries of a head that are rotated: pairs, so one more than the share gives where that is
    /// odd, as Transformers has it.
    pub fn width(&self, head_dim: usize) -> usize {
        self.part(head_dim).next_multiple_of(2)
    }

    /// The share of a head in entries, of which the frequencies are those.
    fn part(&self, head_dim: usize) -> usize {
        self.share.map_or(head_dim, |share| (share * head_dim as f64) as usize)
    }

    /// (frequencies of the pairs of d entries, factor of cos and sin) for positions below `length`.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a base that is not positive or a number of factors that is not
    /// that of the pairs.
    fn frequencies(&self, head_dim: usize, base: f64, length: usize) -> Result<(Vec<f64>, f64)> {
        let theta = self.theta.unwrap_or(base);
        if !(theta > 0.0) || !theta.is_finite() {
            return Err(Error::invalid("rope_theta", theta, "must be positive and finite"));
        }
        let d = head_dim as f64;
        let of =
            |theta: f64| (0..head_dim.div_ceil(2)).map(move |j| theta.powf(-2.0 * j as f64 / d));
        let turn = 2.0 * std::f64::consts::PI;
        Ok(match &self.scaling {
            Scaling::None => (of(theta).collect(), 1.0),
            Scaling::Linear { factor } => (of(theta).map(|f| f / factor).collect(), 1.0),
            Scaling::Dynamic { factor, original } => {
                let ratio = length.max(*original) as f64 / *original as f64;
                (of(theta * (factor * ratio - (factor - 1.0)).powf(d / (d - 2.0))).collect(), 1.0)
            }
            Scaling::Llama3 { factor, low, high, original } => {
                let change = |f: f64| {
                    let turns = *original as f64 * f / turn;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                };
                (of(theta).map(change).collect(), 1.0)
            }
            Scaling::Yarn { factor, original, fast, slow, attention, truncate } => {
                let place =
                    |turns: f64| d * (*original as f64 / (turns * turn)).ln() / (2.0 * theta.ln());
                let (mut first, mut last) = (place(*fast), place(*slow));
                if *truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                (first, last) = (first.max(0.0), last.min(d - 1.0));
                if !(last > first) {
                    last = first + 0.001;
                }
                let change = |(j, f): (usize, f64)| {
                    let kept = 1.0 - ((j as f64 - first) / (last - first)).clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                };
                let scale =
                    attention.unwrap_or(if *factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 });
                (of(theta).enumerate().map(change).collect(), scale)
            }
            Scaling::LongRope { short, long, original, factor, attention } => {
                let factors = if length > *original { long } else { short };
                let pairs = head_dim.div_ceil(2);
                if factors.len() != pairs {
                    let requirement =
                        format!("must hold {pairs} factors, one for each pair of a head");
                    return Err(Error::invalid(
                        "short_factor, long_factor",
                        factors.len(),
                        requirement,
                    ));
                }
                let grown = || (1.0 + factor.ln() / (*original as f64).ln()).sqrt();
                let scale = attention.unwrap_or(if *factor > 1.0 { grown() } else { 1.0 });
                (of(theta).zip(factors).map(|(f, factor)| f / factor).collect(), scale)
            }
        })
    }
}

/// cos and sin of the angles t theta^(-2j/d), for t < T and j < d/2 with d the rotated part of a
/// head, computed in double precision.
#[derive(Debug, Clone)]
pub struct RopeTable<T> {
    head_dim: usize,
    cos: Array2<T>,
    sin: Array2<T>,
}

impl<T: Real> RopeTable<T> {
    /// Angles for positions 0..length and heads of width `head_dim`.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an odd or zero head width or a base that is not positive.
    pub fn new(length: usize, head_dim: usize, theta: f64) -> Result<Self> {
        let positions: Vec<u32> = (0..length as u32).collect();
        Self::at(&positions, head_dim, theta)
    }

    /// Angles for given positions, one per row of what is to be rotated.
    ///
    /// # Errors
    /// As [`RopeTable::new`].
    pub fn at(positions: &[u32], head_dim: usize, theta: f64) -> Result<Self> {
        Self::of(&Rotary::default(), positions, head_dim, theta)
    }

    /// Angles of a rotary embedding for given positions; `theta` is the base where it has none of
    /// its own.
    ///
    /// # Errors
    /// As [`RopeTable::new`]; [`Error::InvalidParam`] for a scaling that does not fit the head.
    pub fn of(rotary: &Rotary, positions: &[u32], head_dim: usize, theta: f64) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::invalid(
                "head_dim",
                head_dim,
                "rotary embedding needs a positive even head width",
            ));
        }
        let width = rotary.width(head_dim);
        if width == 0 || width > head_dim {
            let requirement =
                format!("must rotate a part of a head of {head_dim} entries, and some of it");
            return Err(Error::invalid(
                "partial_rotary_factor",
                rotary.share.unwrap_or(1.0),
                requirement,
            ));
        }
        let length = positions.iter().max().map_or(0, |last| *last as usize + 1);
        let (frequencies, scale) = rotary.frequencies(rotary.part(head_dim), theta, length)?;
        let angle = |(t, j): (usize, usize)| f64::from(positions[t]) * frequencies[j];
        let shape = (positions.len(), width / 2);
        Ok(Self {
            head_dim,
            cos: Array2::from_shape_fn(shape, |i| T::of(scale * angle(i).cos())),
            sin: Array2::from_shape_fn(shape, |i| T::of(scale * angle(i).sin())),
        })
    }

    /// Number of positions.
    pub fn length(&self) -> usize {
        self.cos.nrows()
    }

    /// Cosines, `T x d/2`.
    pub fn cos(&self) -> ArrayView2<'_, T> {
        self.cos.view()
    }

    /// Sines, `T x d/2`.
    pub fn sin(&self) -> ArrayView2<'_, T> {
        self.sin.view()
    }

    /// Bytes of both tables.
    pub fn bytes(&self) -> usize {
        2 * self.cos.len() * size_of::<T>()
    }
}

/// Rotates every head of every row in place: with a = `x[j]`, b = `x[j + d/2]`,
/// (a, b) -> (a cos - b sin, b cos + a sin).
///
/// Shapes: x `(B T) x (H d)`; row i has position i mod T with T the table's length.
///
/// # Errors
/// [`Error::ShapeMismatch`] if the rows are not whole sequences or the width not whole heads.
pub fn rope_forward<T: Real>(
    x: &mut ArrayViewMut2<T>,
    table: &RopeTable<T>,
    cost: &mut Cost,
) -> Result<()> {
    rotate(x, table, T::one(), cost)
}

/// The transpose of [`rope_forward`], hence its inverse: rotation by the opposite angle.
///
/// # Errors
/// As [`rope_forward`].
pub fn rope_backward<T: Real>(
    dx: &mut ArrayViewMut2<T>,
    table: &RopeTable<T>,
    cost: &mut Cost,
) -> Result<()> {
    rotate(dx, table, -T::one(), cost)
}

fn rotate<T: Real>(
    x: &mut ArrayViewMut2<T>,
    table: &RopeTable<T>,
    direction: T,
    cost: &mut Cost,
) -> Result<()> {
    let (rows, width) = x.dim();
    let ((length, half), head_dim) = (table.cos.dim(), table.head_dim);
    if length == 0 || !rows.is_multiple_of(length) || !width.is_multiple_of(head_dim) {
        return Err(Error::ShapeMismatch {
            op: "rope",
            arg: "x".into(),
            expected: format!("(multiple of {length}, multiple of {head_dim})"),
            got: format!("({rows}, {width})"),
        });
    }
    cost.elementwise += 3 * (rows * width) as u64;
    let Some(x) = x.as_slice_mut() else {
        return Err(Error::invalid("x", "strided", "rope rotates a contiguous array in place"));
    };
    let (cos, sin) = (numbers(&table.cos), numbers(&table.sin));
    x.par_chunks_mut(ROWS_PER_TASK * width).enumerate().for_each(|(task, rows)| {
        vectorized_closure(
            #[inline(always)]
            || {
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    let t = (task * ROWS_PER_TASK + i) % length;
                    let (cos, sin) =
                        (&cos[t * half..(t + 1) * half], &sin[t * half..(t + 1) * half]);
                    for head in row.chunks_exact_mut(head_dim) {
                        let (first, second) = head[..2 * half].split_at_mut(half);
                        for (((a, b), &c), &s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                            let s = direction * s;
                            let rotated = *a * c - *b * s;
                            *b = *b * c + *a * s;
                            *a = rotated;
                        }
                    }
                }
            },
        );
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_odd_share_of_a_head_rotates_one_entry_more() {
        let rotary = Rotary { share: Some(0.25), ..Rotary::default() };
        // 3 of 12 entries: two pairs, their angles those of three.
        assert_eq!(rotary.width(12), 4);
        let table = RopeTable::<f64>::of(&rotary, &[0, 1], 12, 1e4).unwrap();
        assert_eq!(table.cos().dim(), (2, 2));
        assert!((table.cos()[[1, 0]] - 1f64.cos()).abs() < 1e-15);
        assert!((table.sin()[[1, 1]] - 1e4f64.powf(-2.0 / 3.0).sin()).abs() < 1e-15);
        let none = Rotary { share: Some(0.05), ..Rotary::default() };
        assert!(RopeTable::<f64>::of(&none, &[0], 12, 1e4).is_err(), "nothing is rotated");
    }
}
