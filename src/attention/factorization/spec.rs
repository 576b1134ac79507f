//! Spec strings `name:key=value,...` and the table of methods.

use super::SoftmaxFactorization;
use super::auto::Auto;
use super::centering::Center;
use super::chebyshev::Chebyshev;
use super::fitted::Fitted;
use super::interval::Check;
use super::nystrom::Nystrom;
use super::positive_features::{Directions, PositiveFeatures};
use super::sparse::{Search, Sparse};
use super::support_basis::SupportBasis;
use super::taylor::Taylor;
use super::tensor_sketch::TensorSketch;
use super::truncated_svd::TruncatedSvd;
use crate::error::{Error, Result};
use crate::linalg::Real;
use std::collections::BTreeMap;
use std::str::FromStr;

/// Every method with its keys, for messages and help pages.
pub const METHODS: [(&str, &str); 10] = [
    ("taylor", "degree=G[,b=B][,check=norms|scan|off][,center=none|keys|both]"),
    ("chebyshev", "degree=G or eps=E[,b=B][,check=norms|scan|off][,center=none|keys|both]"),
    ("fitted", "degree=G[,samples=4096][,seed=0][,center=both|keys|none]"),
    ("positive-features", "rank=K[,seed=0][,directions=orthogonal|iid][,center=both|keys|none]"),
    ("tensor-sketch", "degree=G,rank=K[,seed=0][,nonnegative=true|false][,center=both|keys|none]"),
    ("nystrom", "rank=K[,seed=0][,temperature=T][,tolerance=E][,center=both|keys|none]"),
    ("support-basis", "degree=G,threshold=T[,center=both|keys|none]"),
    ("sparse", "threshold=E[,keys=K] or keys=K[,search=exact|tree|oracle][,remainder=dropped|G]"),
    ("auto", "eps=E[,seed=0][,columns=W]"),
    ("truncated-svd", "rank=K"),
];

/// Makes a factorization from its spec.
///
/// # Errors
/// [`Error::InvalidParam`] for an unknown method or key, a missing or repeated key, or a value out
/// of range.
///
/// ```
/// use peft_limits::attention::factorization::build;
/// assert_eq!(build::<f64>("taylor:degree=4")?.spec(), "taylor:degree=4");
/// let text = build::<f64>("tailor:degree=4").err().unwrap().to_string();
/// assert!(text.contains("taylor:degree=G"));
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn build<T: Real>(spec: &str) -> Result<Box<dyn SoftmaxFactorization<T>>> {
    let (name, rest) = spec.split_once(':').unwrap_or((spec, ""));
    let mut keys = Keys::parse(spec, rest)?;
    let made: Box<dyn SoftmaxFactorization<T>> = match name.trim() {
        "taylor" => Box::new(Taylor {
            degree: keys.degree()?,
            b: keys.take("b")?,
            check: keys.check()?,
            center: keys.center(Center::None)?,
        }),
        "chebyshev" => {
            let degree = keys.take::<usize>("degree")?;
            let eps = keys.take::<f64>("eps")?;
            if degree.is_some() == eps.is_some() {
                return Err(keys.error("chebyshev needs exactly one of degree and eps"));
            }
            if degree == Some(0) {
                return Err(keys.error("degree must be at least 1"));
            }
            if let Some(e) = eps
                && !(e > 0.0)
            {
                return Err(keys.error("eps must be positive"));
            }
            Box::new(Chebyshev {
                degree,
                eps,
                b: keys.take("b")?,
                check: keys.check()?,
                center: keys.center(Center::None)?,
            })
        }
        "fitted" => Box::new(Fitted {
            degree: keys.degree()?,
            samples: keys.take("samples")?.unwrap_or(4096),
            seed: keys.take("seed")?.unwrap_or(0),
            center: keys.center(Center::Both)?,
        }),
        "positive-features" => Box::new(PositiveFeatures {
            rank: keys.rank()?,
            seed: keys.take("seed")?.unwrap_or(0),
            directions: keys.directions()?,
            center: keys.center(Center::Both)?,
        }),
        "tensor-sketch" => Box::new(TensorSketch {
            degree: keys.degree()?,
            rank: keys.rank()?,
            seed: keys.take("seed")?.unwrap_or(0),
            nonnegative: keys.take("nonnegative")?.unwrap_or(false),
            center: keys.center(Center::Both)?,
        }),
        "nystrom" => Box::new(Nystrom {
            rank: keys.rank()?,
            seed: keys.take("seed")?.unwrap_or(0),
            temperature: keys.positive("temperature")?,
            tolerance: keys.take("tolerance")?,
            center: keys.center(Center::Both)?,
        }),
        "support-basis" => Box::new(SupportBasis {
            degree: keys.degree()?,
            threshold: keys
                .positive("threshold")?
                .ok_or_else(|| keys.error("threshold is missing"))?,
            center: keys.center(Center::Both)?,
        }),
        "sparse" => {
            let (threshold, count) = (keys.positive("threshold")?, keys.take::<usize>("keys")?);
            if threshold.is_none() && count.is_none() {
                return Err(keys.error("threshold is missing (or keys)"));
            }
            if threshold.is_some_and(|e| e >= 1.0) {
                return Err(keys.error("threshold must be below 1"));
            }
            if count == Some(0) {
                return Err(keys.error("keys must be at least 1"));
            }
            let (search, remainder) = (keys.search()?, keys.remainder()?);
            Box::new(Sparse { threshold: threshold.unwrap_or(0.0), keys: count, search, remainder })
        }
        "auto" => Box::new(Auto {
            eps: keys.positive("eps")?.ok_or_else(|| keys.error("eps is missing"))?,
            seed: keys.take("seed")?.unwrap_or(0),
            columns: keys.take("columns")?,
        }),
        "truncated-svd" => Box::new(TruncatedSvd { rank: keys.need("rank")? }),
        _ => {
            let known = METHODS.map(|(n, k)| format!("{n}:{k}")).join("; ");
            return Err(Error::invalid("features", spec, format!("must be one of {known}")));
        }
    };
    keys.finish()?;
    Ok(made)
}

/// The keys of one spec, taken one by one.
struct Keys<'a> {
    spec: &'a str,
    values: BTreeMap<&'a str, &'a str>,
}

impl<'a> Keys<'a> {
    fn parse(spec: &'a str, rest: &'a str) -> Result<Self> {
        let mut values = BTreeMap::new();
        for pair in rest.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(Error::invalid("features", spec, format!("{pair:?} is not key=value")));
            };
            if values.insert(key.trim(), value.trim()).is_some() {
                return Err(Error::invalid("features", spec, format!("{key} is given twice")));
            }
        }
        Ok(Self { spec, values })
    }

    fn error(&self, requirement: impl Into<String>) -> Error {
        Error::invalid("features", self.spec, requirement)
    }

    fn take<V: FromStr>(&mut self, key: &str) -> Result<Option<V>> {
        match self.values.remove(key) {
            None => Ok(None),
            Some(text) => match text.parse() {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(self.error(format!("{key} cannot be {text:?}"))),
            },
        }
    }

    fn need<V: FromStr>(&mut self, key: &str) -> Result<V> {
        self.take(key)?.ok_or_else(|| self.error(format!("{key} is missing")))
    }

    fn degree(&mut self) -> Result<usize> {
        match self.need("degree")? {
            0 => Err(self.error("degree must be at least 1")),
            g => Ok(g),
        }
    }

    fn rank(&mut self) -> Result<usize> {
        match self.need("rank")? {
            0 => Err(self.error("rank must be at least 1")),
            k => Ok(k),
        }
    }

    fn positive(&mut self, key: &str) -> Result<Option<f64>> {
        let value: Option<f64> = self.take(key)?;
        match value {
            Some(x) if !(x > 0.0 && x.is_finite()) => {
                Err(self.error(format!("{key} must be positive and finite")))
            }
            other => Ok(other),
        }
    }

    fn directions(&mut self) -> Result<Directions> {
        match self.values.remove("directions") {
            None | Some("orthogonal") => Ok(Directions::Orthogonal),
            Some("iid") => Ok(Directions::Iid),
            Some(other) => {
                Err(self.error(format!("directions cannot be {other:?}: orthogonal or iid")))
            }
        }
    }

    fn search(&mut self) -> Result<Search> {
        match self.values.remove("search") {
            None | Some("exact") => Ok(Search::Exact),
            Some("tree") => Ok(Search::Tree),
            Some("oracle") => Ok(Search::Oracle),
            Some(other) => {
                Err(self.error(format!("search cannot be {other:?}: exact, tree or oracle")))
            }
        }
    }

    fn remainder(&mut self) -> Result<Option<usize>> {
        match self.values.get("remainder").copied() {
            Some("dropped") => {
                self.values.remove("remainder");
                Ok(None)
            }
            Some("0") => Err(self.error("remainder must be dropped or a degree of at least 1")),
            _ => self.take("remainder"),
        }
    }

    fn check(&mut self) -> Result<Check> {
        match self.values.remove("check") {
            None | Some("norms") => Ok(Check::Norms),
            Some("scan") => Ok(Check::Scan),
            Some("off") => Ok(Check::Off),
            Some(other) => {
                Err(self.error(format!("check cannot be {other:?}: norms, scan or off")))
            }
        }
    }

    fn center(&mut self, default: Center) -> Result<Center> {
        match self.values.remove("center") {
            None => Ok(default),
            Some(text) => text
                .parse()
                .map_err(|()| self.error(format!("center cannot be {text:?}: none, keys or both"))),
        }
    }

    fn finish(self) -> Result<()> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(key) => Err(self.error(format!("unknown key {key}"))),
        }
    }
}

/// `,center=...` for methods whose default is both.
pub(super) fn center_suffix(center: Center) -> String {
    if center == Center::Both { String::new() } else { format!(",center={center}") }
}

/// The spec of a polynomial method.
pub(super) fn polynomial_spec(
    name: &str,
    degree: Option<usize>,
    eps: Option<f64>,
    b: Option<f64>,
    check: Check,
    center: Center,
) -> String {
    let mut parts = Vec::new();
    if let Some(g) = degree {
        parts.push(format!("degree={g}"));
    }
    if let Some(e) = eps {
        parts.push(format!("eps={e}"));
    }
    if let Some(b) = b {
        parts.push(format!("b={b}"));
    }
    match check {
        Check::Norms => {}
        Check::Scan => parts.push("check=scan".into()),
        Check::Off => parts.push("check=off".into()),
    }
    if center != Center::None {
        parts.push(format!("center={center}"));
    }
    format!("{name}:{}", parts.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_round_trip() {
        for spec in [
            "taylor:degree=4",
            "taylor:degree=2,b=3.5,check=scan",
            "chebyshev:degree=5,b=1,check=off",
            "chebyshev:eps=0.001",
            "taylor:degree=2,center=keys",
            "chebyshev:degree=2,check=scan,center=both",
            "fitted:degree=3,samples=100,seed=7,center=none",
            "fitted:degree=3,samples=100,seed=7",
            "truncated-svd:rank=12",
            "positive-features:rank=64,seed=3",
            "positive-features:rank=64,seed=3,directions=iid,center=none",
            "tensor-sketch:degree=4,rank=256,seed=0",
            "tensor-sketch:degree=4,rank=256,seed=1,nonnegative=true,center=keys",
            "nystrom:rank=32,seed=5",
            "nystrom:rank=32,seed=5,temperature=0.5,tolerance=0.001,center=none",
            "support-basis:degree=2,threshold=1.5",
            "support-basis:degree=2,threshold=1.5,center=none",
            "sparse:threshold=0.001",
            "sparse:keys=32",
            "sparse:threshold=0.001,keys=32,search=tree",
            "sparse:threshold=0.01,search=oracle,remainder=1",
            "auto:eps=0.01,seed=0",
            "auto:eps=0.01,seed=2,columns=100",
        ] {
            assert_eq!(build::<f32>(spec).unwrap().spec(), spec);
        }
        assert_eq!(
            build::<f64>("fitted:degree=3").unwrap().spec(),
            "fitted:degree=3,samples=4096,seed=0"
        );
    }

    #[test]
    fn bad_specs_say_why() {
        for (spec, why) in [
            ("taylor", "degree is missing"),
            ("taylor:degree=0", "at least 1"),
            ("taylor:degree=two", "degree cannot be \"two\""),
            ("taylor:degree=2,degree=3", "given twice"),
            ("taylor:degree=2,rank=3", "unknown key rank"),
            ("taylor:degree", "not key=value"),
            ("taylor:degree=2,check=maybe", "norms, scan or off"),
            ("chebyshev:degree=2,eps=0.1", "exactly one"),
            ("fitted:degree=2,center=rows", "none, keys or both"),
            ("chebyshev:eps=0", "eps must be positive"),
            ("chebyshev:degree=0", "at least 1"),
            ("truncated-svd:rank=-1", "rank cannot be"),
            ("positive-features:rank=0", "at least 1"),
            ("positive-features:rank=4,directions=some", "orthogonal or iid"),
            ("tensor-sketch:rank=4", "degree is missing"),
            ("nystrom:rank=4,temperature=-1", "temperature must be positive"),
            ("support-basis:degree=2", "threshold is missing"),
            ("support-basis:degree=0,threshold=1", "at least 1"),
            ("support-basis:degree=2,threshold=0", "threshold must be positive"),
            ("sparse:search=tree", "threshold is missing"),
            ("sparse:threshold=1", "below 1"),
            ("sparse:keys=0", "at least 1"),
            ("sparse:keys=2,search=luck", "exact, tree or oracle"),
            ("sparse:keys=2,remainder=0", "a degree of at least 1"),
            ("sparse:keys=2,remainder=some", "remainder cannot be"),
            ("auto:eps=nan", "eps must be positive"),
            ("nope:rank=1", "must be one of"),
        ] {
            let text = build::<f64>(spec).err().unwrap().to_string();
            assert!(text.contains(why) && text.contains(spec), "{spec}: {text}");
        }
    }
}
