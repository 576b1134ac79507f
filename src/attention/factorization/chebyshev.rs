//! `chebyshev:degree=g|eps=E[,b=B][,check=norms|scan|off][,center=none|keys|both]`: near-best
//! polynomial on the interval of the logits \[AA22\].

use super::centering::{Center, Centered};
use super::degree::degree;
use super::interval::{Check, settle};
use super::monomials::MonomialMap;
use super::polynomial::{chebyshev, chebyshev_error};
use super::{Certificate, FeatureMap, Scores, SoftmaxFactorization};
use crate::attention::shards::{RowShards, WholeHead};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;

/// The truncated Chebyshev series of exp on [-b, b], in monomials.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `degree` | from `eps` | g; k = C(d + g, g) | >= 1 |
/// | `eps` | none | uniform error that chooses the degree | > 0 |
/// | `b` | proven by `check` | half-width of the interval | > 0, exp(b) finite |
/// | `check` | norms | how b is proven | |
/// | `center` | none | which means are taken out | |
///
/// Exactly one of `degree` and `eps` is given.
#[derive(Debug, Clone, PartialEq)]
pub struct Chebyshev {
    /// Degree g, if given.
    pub degree: Option<usize>,
    /// Uniform error, if given.
    pub eps: Option<f64>,
    /// Half-width of the interval, if given.
    pub b: Option<f64>,
    /// How the interval is proven.
    pub check: Check,
    /// Which means are taken out first.
    pub center: Center,
}

impl<T: Real> SoftmaxFactorization<T> for Chebyshev {
    fn spec(&self) -> String {
        super::spec::polynomial_spec(
            "chebyshev",
            self.degree,
            self.eps,
            self.b,
            self.check,
            self.center,
        )
    }

    fn prepare(&self, scores: &Scores<T>, cost: &mut Cost) -> Result<Box<dyn FeatureMap<T>>> {
        self.prepare_shard(scores, &WholeHead, cost)
    }

    fn prepare_shard(
        &self,
        scores: &Scores<T>,
        shards: &dyn RowShards<T>,
        cost: &mut Cost,
    ) -> Result<Box<dyn FeatureMap<T>>> {
        let spec = SoftmaxFactorization::<T>::spec(self);
        let centered = Centered::of_shard(scores, self.center, shards, cost)?;
        let (b, evidence) =
            settle(&spec, &centered.scores(scores), self.b, self.check, shards, cost)?;
        let degree = match (self.degree, self.eps) {
            (Some(g), None) => g,
            (None, Some(eps)) => degree(b, eps)?.max(1),
            _ => {
                return Err(Error::invalid(
                    "chebyshev",
                    &spec,
                    "give exactly one of degree and eps",
                ));
            }
        };
        let certificate = Certificate {
            spec,
            degree: Some(degree),
            interval: Some((b, evidence)),
            exp_error_bound: Some(chebyshev_error(degree, b)),
            ..Certificate::default()
        };
        Ok(Box::new(MonomialMap::new(centered, scores.beta, &chebyshev(degree, b)?, certificate)?))
    }
}
