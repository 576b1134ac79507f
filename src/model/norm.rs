//! The norms of a decoder on an engine: root-mean-square norms, and layer norms made of them.
//!
//! A layer norm is a root-mean-square norm of x less its mean, with a bias. Its backward passes
//! through the same subtraction, which is its own transpose.

use super::config::ModelConfig;
use crate::error::Result;
use crate::linalg::Real;
use crate::ops::{Cpu, Ops};

/// A norm's trained vectors.
#[derive(Debug, Clone)]
pub struct NormOn<E: Ops> {
    /// Gain.
    pub gain: E::Vector,
    /// Bias, of a layer norm.
    pub bias: Option<E::Vector>,
    /// Trained whole beside an adapter, whatever the other norms are (PEFT's `modules_to_save`).
    pub whole: bool,
}

impl<T: Real> PartialEq for NormOn<Cpu<T>> {
    fn eq(&self, other: &Self) -> bool {
        self.gain == other.gain && self.bias == other.bias
    }
}

impl<T: Real> NormOn<Cpu<T>> {
    /// Every number.
    pub fn numbers(&self) -> impl Iterator<Item = &T> {
        self.gain.iter().chain(self.bias.iter().flatten())
    }

    /// Every number, to be changed.
    pub fn numbers_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.gain.iter_mut().chain(self.bias.iter_mut().flatten())
    }
}

/// Where the gradients of a norm's vectors add up.
#[derive(Debug, Clone)]
pub struct NormSinks<E: Ops> {
    /// Of the gain.
    pub gain: Option<E::Sink>,
    /// Of the bias.
    pub bias: Option<E::Sink>,
}

/// A matrix with the statistics of its rows: what a norm's backward needs.
pub(super) type NormInput<E> = (<E as Ops>::Matrix, <E as Ops>::RowStats);

/// What is left of a norm when its output went its way.
pub(super) type Rest<E> = (<E as Ops>::RowStats, Option<<E as Ops>::Matrix>);

/// Normalises the rows of x.
pub(super) fn norm_forward<E: Ops>(
    x: &E::Matrix,
    norm: &NormOn<E>,
    config: &ModelConfig,
    e: &mut E,
) -> Result<(E::Matrix, Rest<E>)> {
    let options = &config.options;
    let centered = if options.layer_norm {
        let x = e.copy(x);
        Some(e.center(x)?)
    } else {
        None
    };
    let from = centered.as_ref().unwrap_or(x);
    let (y, stats) = if options.unit_gain {
        let gain = e.one_plus(&norm.gain);
        e.rms_norm(from, &gain, config.rms_norm_eps)?
    } else {
        e.rms_norm(from, &norm.gain, config.rms_norm_eps)?
    };
    let y = match &norm.bias {
        Some(bias) => e.add_row(y, bias),
        None => y,
    };
    Ok((y, (stats, centered)))
}

/// What backward needs if it is wanted, and x to be gone on with.
pub(super) fn fork<E: Ops>(
    wanted: bool,
    x: E::Matrix,
    rest: Option<Rest<E>>,
    e: &mut E,
) -> (Option<NormInput<E>>, E::Matrix) {
    match rest {
        Some((stats, Some(centered))) if wanted => (Some((centered, stats)), x),
        Some((_, Some(centered))) => {
            e.release(centered);
            (None, x)
        }
        Some((stats, None)) if wanted => {
            let next = e.copy(&x);
            (Some((x, stats)), next)
        }
        _ => (None, x),
    }
}

/// What backward needs if it is wanted; x is given up.
pub(super) fn keep<E: Ops>(
    wanted: bool,
    x: E::Matrix,
    (stats, centered): Rest<E>,
    e: &mut E,
) -> Option<NormInput<E>> {
    let input = match centered {
        Some(centered) => {
            e.release(x);
            centered
        }
        None => x,
    };
    if wanted {
        return Some((input, stats));
    }
    e.release(input);
    None
}

/// The backward of [`norm_forward`]: `dx` with the gradient of its input added, if that is wanted.
pub(super) fn norm_backward<E: Ops>(
    dy: E::Matrix,
    saved: NormInput<E>,
    norm: &NormOn<E>,
    config: &ModelConfig,
    sinks: &mut NormSinks<E>,
    mut dx: Option<E::Matrix>,
    e: &mut E,
) -> Result<Option<E::Matrix>> {
    if let Some(sink) = &mut sinks.bias {
        e.add_row_sums(&dy, sink);
    }
    let sink = sinks.gain.as_mut();
    if config.options.layer_norm {
        let mut own = dx.is_some().then(|| e.zeros(E::shape(&dy)));
        e.rms_norm_backward(dy, saved, &norm.gain, sink, own.as_mut())?;
        return match (dx, own) {
            (Some(dx), Some(own)) => {
                let own = e.center(own)?;
                Ok(Some(e.add(dx, own, 1.0)))
            }
            _ => Ok(None),
        };
    }
    if config.options.unit_gain {
        let gain = e.one_plus(&norm.gain);
        e.rms_norm_backward(dy, saved, &gain, sink, dx.as_mut())?;
    } else {
        e.rms_norm_backward(dy, saved, &norm.gain, sink, dx.as_mut())?;
    }
    Ok(dx)
}
