//! Attaching adaptation methods to a model's projections.

use super::parameters::Model;
use super::projection::Projection;
use crate::adapters::dora::Dora;
use crate::adapters::lora::{Lora, LoraSpec};
use crate::adapters::moslora::{MixerInit, Moslora};
use crate::adapters::paca::{Paca, PacaSpec};
use crate::adapters::selection::ColumnScores;
use crate::adapters::spft::{Spft, SpftSpec};
use crate::adapters::{AdaptedLinear, Method};
use crate::error::{Error, Result};
use crate::linalg::Real;
use rand::Rng;
use std::collections::BTreeSet;

/// A method with its settings, before it meets a weight. S2FT ties projections together and is
/// attached by [`Model::attach_s2ft`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MethodSpec {
    /// Not trained.
    Frozen,
    /// The whole weight.
    Full,
    /// Low-rank update.
    Lora(LoraSpec),
    /// Low-rank update with magnitudes; `true_derivative` differentiates the norm, unlike PEFT.
    Dora {
        /// Rank, alpha, scaling.
        spec: LoraSpec,
        /// Differentiate through the row norms.
        true_derivative: bool,
    },
    /// Low-rank update with a mixer.
    Moslora {
        /// Rank, alpha, scaling.
        spec: LoraSpec,
        /// How the mixer starts.
        mixer: MixerInit,
    },
    /// Partial connections.
    Paca(PacaSpec),
    /// Single entries.
    Spft(SpftSpec),
}

/// Which projections of which layers get which method; a later entry overrides an earlier one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterPlan {
    /// (layers, or all; projections; method).
    pub entries: Vec<(Option<std::ops::Range<usize>>, Vec<Projection>, MethodSpec)>,
}

impl AdapterPlan {
    /// One method on the same projections of every layer.
    pub fn everywhere(projections: &[Projection], method: MethodSpec) -> Self {
        Self { entries: vec![(None, projections.to_vec(), method)] }
    }

    /// Adds an entry for some layers.
    pub fn and(
        mut self,
        layers: std::ops::Range<usize>,
        projections: &[Projection],
        method: MethodSpec,
    ) -> Self {
        self.entries.push((Some(layers), projections.to_vec(), method));
        self
    }
}

impl<T: Real> Model<T> {
    /// Attaches methods; projections that no entry names keep theirs.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for layers that do not exist, a merged projection, a selection rule
    /// that needs calibration (see [`Model::attach_with_scores`]), or settings that do not fit a
    /// weight.
    pub fn attach(&mut self, plan: &AdapterPlan, rng: &mut impl Rng) -> Result<()> {
        self.attach_with_scores(plan, None, rng)
    }

    /// As [`Model::attach`], with the measurements that activation and gradient selection need.
    ///
    /// # Errors
    /// As [`Model::attach`].
    pub fn attach_with_scores(
        &mut self,
        plan: &AdapterPlan,
        calibration: Option<&super::Calibration<T>>,
        rng: &mut impl Rng,
    ) -> Result<()> {
        for (layers, projections, spec) in &plan.entries {
            let all = 0..self.layers.len();
            let layers = layers.clone().unwrap_or(all.clone());
            if layers.end > all.end {
                let requirement = format!("the model has {} layers", all.end);
                return Err(Error::invalid("layers", format!("{layers:?}"), requirement));
            }
            let mut placed = BTreeSet::new();
            for l in layers.clone() {
                let statistics = calibration.and_then(|c| c.layers.get(l));
                for &p in projections {
                    let found = statistics.and_then(|s| s.get(&p));
                    let scores = found.map_or_else(ColumnScores::default, |s| s.column_scores());
                    if let Some(projection) = self.layers[l].get_mut(p) {
                        attach_one(projection, *spec, &scores, rng)?;
                        placed.insert(p);
                    }
                }
            }
            // A mixture may have a projection in some layers only; one that no layer has is a
            // mistake.
            if let Some(&p) = projections.iter().find(|p| !layers.is_empty() && !placed.contains(p))
            {
                let known = self.config.all_projections();
                let known: BTreeSet<String> =
                    known.iter().map(|&p| self.config.options.module_kind(p)).collect();
                let known: Vec<String> = known.into_iter().collect();
                let requirement = format!("the layers of this model have {}", known.join(", "));
                return Err(Error::invalid("target module", p.module(), requirement));
            }
        }
        Ok(())
    }
}

/// Puts a method on one projection.
pub(super) fn attach_one<T: Real>(
    projection: &mut AdaptedLinear<T>,
    spec: MethodSpec,
    scores: &ColumnScores<'_, T>,
    rng: &mut impl Rng,
) -> Result<()> {
    if projection.is_merged() {
        return Err(Error::invalid(
            "projection",
            "merged",
            "unmerge before attaching another method",
        ));
    }
    let shape = projection.shape();
    projection.method = match spec {
        MethodSpec::Frozen => Method::Frozen,
        MethodSpec::Full => {
            projection.base.dense_mut("full")?;
            Method::Full
        }
        MethodSpec::Lora(spec) => Method::Lora(Lora::init(spec, shape, rng)?),
        MethodSpec::Dora { spec, true_derivative } => {
            Method::Dora(Dora::init(spec, true_derivative, projection.base.dense().view(), rng)?)
        }
        MethodSpec::Moslora { spec, mixer } => {
            Method::Moslora(Moslora::init(spec, mixer, shape, rng)?)
        }
        MethodSpec::Paca(spec) => {
            Method::Paca(Paca::init(spec, &mut projection.base, scores, rng)?)
        }
        MethodSpec::Spft(spec) => Method::Spft(Spft::init(spec, &mut projection.base, rng)?),
    };
    Ok(())
}
