//! The interval [-b, b] that holds every visible logit: where b comes from and whether it was
//! checked.

use super::Scores;
use crate::attention::shards::RowShards;
use crate::attention::synthetic::largest_logit;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::{Real, norms};
use std::fmt;

/// How to make sure that logits lie inside the assumed interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Check {
    /// By Cauchy-Schwarz, |s_ij| <= beta max|q| max|k|: linear time, sufficient, not necessary.
    #[default]
    Norms,
    /// By computing every visible logit: quadratic, exact; its operations are counted.
    Scan,
    /// Not at all: the caller accepts that the error is unbounded outside.
    Off,
}

/// How the half-width of an interval was established.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// Cauchy-Schwarz over row norms.
    Norms,
    /// Every visible logit was computed.
    Scan,
    /// The caller's word, unchecked.
    Assumed,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Evidence::Norms => "norms",
            Evidence::Scan => "scan",
            Evidence::Assumed => "assumed",
        })
    }
}

/// Settles b: the given one, checked, or else the smallest that the check proves.
///
/// # Errors
/// [`Error::LogitOutsideInterval`] if the check does not prove a given b, [`Error::InvalidParam`]
/// for a b that is not positive and finite, for `check=off` without b, or for `check=scan` on one
/// of several shards.
pub fn settle<T: Real>(
    spec: &str,
    scores: &Scores<T>,
    b: Option<f64>,
    check: Check,
    shards: &dyn RowShards<T>,
    cost: &mut Cost,
) -> Result<(f64, Evidence)> {
    if let Some(b) = b
        && !(b > 0.0 && b.is_finite())
    {
        return Err(Error::invalid("b", b, "must be positive and finite"));
    }
    let (found, evidence, words) = match check {
        Check::Norms => {
            cost.elementwise += 2 * (scores.query.len() + scores.key.len()) as u64;
            let query = shards.largest(norms::max_row_norm(scores.query))?;
            let bound = scores.beta * query * shards.largest(norms::max_row_norm(scores.key))?;
            (
                bound,
                Evidence::Norms,
                "bound by the norms of Q and K; check=scan computes the largest logit itself",
            )
        }
        Check::Scan if shards.count() > 1 => {
            let why = "sees every pair of tokens, which no rank holds; use norms, or off with an \
                       explicit b";
            return Err(Error::invalid("check", "scan", why));
        }
        Check::Scan => {
            let largest = largest_logit(scores.query, scores.key, scores.beta, scores.mask, cost);
            // The scan and a later evaluation round differently: leave room for d_h roundings.
            let slack = 1.0 + 4.0 * T::epsilon().widen() * scores.query.ncols() as f64;
            (largest * slack, Evidence::Scan, "largest logit")
        }
        Check::Off => {
            let b = b.ok_or_else(|| Error::invalid("check", "off", "needs an explicit b"))?;
            return Ok((b, Evidence::Assumed));
        }
    };
    match b {
        None => Ok((found.max(f64::MIN_POSITIVE), evidence)),
        Some(b) if found <= b => Ok((b, evidence)),
        Some(b) => Err(Error::LogitOutsideInterval {
            factorization: spec.to_string(),
            assumed: b,
            found,
            evidence: words,
        }),
    }
}
