//! `taylor:degree=g[,b=B][,check=norms|scan|off][,center=none|keys|both]`: the Taylor polynomial of
//! exp \[AS23\].

use super::centering::{Center, Centered};
use super::interval::{Check, settle};
use super::monomials::MonomialMap;
use super::polynomial::{taylor, taylor_error};
use super::{Certificate, FeatureMap, Scores, SoftmaxFactorization};
use crate::attention::shards::{RowShards, WholeHead};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;

/// All monomials of degree at most `degree`, coefficients beta^n / n! times multinomials.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `degree` | none | g; k = C(d + g, g) | >= 1 |
/// | `b` | proven by `check` | interval [-b, b] of the certificate | > 0 |
/// | `check` | norms | how b is proven | |
/// | `center` | none | which means are taken out | |
#[derive(Debug, Clone, PartialEq)]
pub struct Taylor {
    /// Degree g.
    pub degree: usize,
    /// Half-width of the interval, if given.
    pub b: Option<f64>,
    /// How the interval is proven.
    pub check: Check,
    /// Which means are taken out first.
    pub center: Center,
}

impl<T: Real> SoftmaxFactorization<T> for Taylor {
    fn spec(&self) -> String {
        super::spec::polynomial_spec(
            "taylor",
            Some(self.degree),
            None,
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
        let certificate = Certificate {
            spec,
            degree: Some(self.degree),
            interval: Some((b, evidence)),
            exp_error_bound: Some(taylor_error(self.degree, b)),
            ..Certificate::default()
        };
        Ok(Box::new(MonomialMap::new(centered, scores.beta, &taylor(self.degree), certificate)?))
    }
}
