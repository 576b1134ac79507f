//! Which columns, channels or heads a sparse method trains.

use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{ArrayView2, Axis};
use rand::{Rng, seq::SliceRandom};

/// What ranks the candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Score {
    /// A random permutation.
    #[default]
    Random,
    /// Euclidean norm of the weights.
    Weight,
    /// Root of the sum of squares of the activations on calibration data.
    Activation,
    /// Product of the two.
    WeightActivation,
    /// Norm of the gradient on calibration data.
    Gradient,
}

/// Which end of the ranking is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// Largest scores first.
    #[default]
    Largest,
    /// Smallest scores first.
    Smallest,
}

/// A selection rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ColumnRule {
    /// What ranks the candidates.
    pub score: Score,
    /// Which end is taken (of no effect for [`Score::Random`]).
    pub order: Order,
}

/// Calibration measurements of the input columns of a projection.
#[derive(Debug, Clone, Copy)]
pub struct ColumnScores<'a, T> {
    /// Norm of each input column over calibration tokens.
    pub activation: Option<&'a [T]>,
    /// Norm of each column of the weight's gradient.
    pub gradient: Option<&'a [T]>,
}

impl<T> Default for ColumnScores<'_, T> {
    fn default() -> Self {
        Self { activation: None, gradient: None }
    }
}

/// Names a score in configuration files.
impl std::str::FromStr for Score {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "random" => Ok(Score::Random),
            "weight" => Ok(Score::Weight),
            "activation" => Ok(Score::Activation),
            "weight-activation" => Ok(Score::WeightActivation),
            "gradient" => Ok(Score::Gradient),
            other => Err(Error::invalid(
                "selection",
                other,
                "must be random, weight, activation, weight-activation or gradient",
            )),
        }
    }
}

impl ColumnRule {
    /// Whether calibration data are needed.
    pub fn needs_calibration(&self) -> bool {
        matches!(self.score, Score::Activation | Score::WeightActivation | Score::Gradient)
    }

    /// `count` distinct columns of `weight`, best first.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the rule needs calibration measurements that are absent, or count
    /// exceeds the width.
    pub fn select<T: Real>(
        &self,
        weight: ArrayView2<T>,
        scores: &ColumnScores<'_, T>,
        count: usize,
        rng: &mut impl Rng,
    ) -> Result<Vec<usize>> {
        let width = weight.ncols();
        let norms = || {
            weight
                .axis_iter(Axis(1))
                .map(|c| c.iter().map(|x| x.widen() * x.widen()).sum::<f64>().sqrt())
        };
        let measured = |values: Option<&[T]>, name: &str| match values {
            Some(values) if values.len() == width => {
                Ok(values.iter().map(|x| x.widen()).collect::<Vec<_>>())
            }
            Some(values) => {
                Err(Error::invalid(name, values.len(), format!("must hold {width} columns")))
            }
            None => Err(Error::invalid(name, "absent", "this selection needs calibration data")),
        };
        let values = match self.score {
            Score::Random => None,
            Score::Weight => Some(norms().collect()),
            Score::Activation => Some(measured(scores.activation, "activation scores")?),
            Score::Gradient => Some(measured(scores.gradient, "gradient scores")?),
            Score::WeightActivation => {
                let activation = measured(scores.activation, "activation scores")?;
                Some(norms().zip(activation).map(|(w, a)| w * a).collect())
            }
        };
        rank(values, width, self.order, count, rng)
    }
}

/// The first `count` of `width` candidates: a random permutation without scores, otherwise by score
/// (ties by position, so that the result is reproducible).
///
/// # Errors
/// [`Error::InvalidParam`] if count exceeds the number of candidates; [`Error::NonFinite`] for a
/// NaN score.
pub fn rank(
    scores: Option<Vec<f64>>,
    width: usize,
    order: Order,
    count: usize,
    rng: &mut impl Rng,
) -> Result<Vec<usize>> {
    if count > width {
        return Err(Error::invalid("count", count, format!("only {width} candidates")));
    }
    let mut candidates: Vec<usize> = (0..width).collect();
    match scores {
        None => candidates.shuffle(rng),
        Some(scores) => {
            if let Some(bad) = scores.iter().position(|x| x.is_nan()) {
                return Err(Error::NonFinite {
                    op: "selection",
                    tensor: "scores".into(),
                    index: vec![bad],
                    value: scores[bad],
                });
            }
            candidates.sort_by(|&i, &j| {
                let by_score = scores[i].total_cmp(&scores[j]);
                if order == Order::Largest { by_score.reverse() } else { by_score }
            });
        }
    }
    candidates.truncate(count);
    Ok(candidates)
}
