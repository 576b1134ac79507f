//! The adaptation method of a run, as configuration files and flags name it.

use crate::adapters::lora::LoraSpec;
use crate::adapters::moslora::MixerInit;
use crate::adapters::nf4::Nf4Matrix;
use crate::adapters::paca::PacaSpec;
use crate::adapters::selection::{ColumnRule, Order, Score};
use crate::adapters::{BaseWeight, PackedWeight};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::model::{AdapterPlan, MethodSpec, Model, Projection};
use crate::train::stream::generator;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Names of the methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    /// Every weight.
    #[default]
    Full,
    /// Low-rank update.
    Lora,
    /// Low-rank update with magnitudes.
    Dora,
    /// Low-rank update with a mixer.
    Moslora,
    /// Partial connections.
    Paca,
    /// LoRA on a base in NF4.
    Qlora,
    /// PaCA on a base in NF4.
    Qpaca,
}

impl MethodName {
    /// All of them.
    pub const ALL: [MethodName; 7] =
        [Self::Full, Self::Lora, Self::Dora, Self::Moslora, Self::Paca, Self::Qlora, Self::Qpaca];

    /// Name in files, flags and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Lora => "lora",
            Self::Dora => "dora",
            Self::Moslora => "moslora",
            Self::Paca => "paca",
            Self::Qlora => "qlora",
            Self::Qpaca => "qpaca",
        }
    }

    /// Whether the base is kept in NF4.
    pub fn quantized(self) -> bool {
        matches!(self, Self::Qlora | Self::Qpaca)
    }
}

impl std::str::FromStr for MethodName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|m| m.name() == text).ok_or_else(|| {
            Error::invalid("method.name", text, format!("must be one of {}", Self::ALL.map(Self::name).join(", ")))
        })
    }
}

/// Settings of a method.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `name` | `full` | the method | `full`, `lora`, `dora`, `moslora`, `paca`, `qlora`, `qpaca` |
/// | `rank` | 8 | rank, or number of columns for PaCA | 1 to the smaller side of every target |
/// | `alpha` | 16; none for PaCA | scaling alpha / rank; without it PaCA's is 1 | finite |
/// | `rank_stabilized` | false | alpha / sqrt(rank) (LoRA family) | |
/// | `true_derivative` | false | DoRA: differentiate through the norm | |
/// | `selection` | `random` | PaCA's columns: `random` or `weight` | |
/// | `smallest` | false | take the smallest scores first | |
/// | `targets` | all seven | projections, by module name; for `full`: everything, if absent | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MethodParams {
    /// The method.
    pub name: MethodName,
    /// Rank or number of columns.
    pub rank: usize,
    /// Numerator of the scaling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// alpha / sqrt(rank).
    pub rank_stabilized: bool,
    /// DoRA's true derivative.
    pub true_derivative: bool,
    /// Rule for sparse methods.
    pub selection: String,
    /// Smallest scores first.
    pub smallest: bool,
    /// Projections, by module name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<String>>,
}

impl Default for MethodParams {
    fn default() -> Self {
        Self {
            name: MethodName::Full,
            rank: 8,
            alpha: None,
            rank_stabilized: false,
            true_derivative: false,
            selection: "random".into(),
            smallest: false,
            targets: None,
        }
    }
}

impl MethodParams {
    /// A method with default settings.
    pub fn named(name: MethodName) -> Self {
        Self { name, ..Self::default() }
    }

    /// The target projections, in the order of [`Projection::ALL`].
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an unknown or repeated name, or none.
    pub fn projections(&self) -> Result<Vec<Projection>> {
        let Some(names) = &self.targets else { return Ok(Projection::ALL.to_vec()) };
        let mut targets = names.iter().map(|n| n.parse()).collect::<Result<Vec<Projection>>>()?;
        targets.sort_unstable();
        if targets.is_empty() || targets.windows(2).any(|w| w[0] == w[1]) {
            return Err(Error::invalid("method.targets", names.join(", "), "must be distinct and not empty"));
        }
        Ok(targets)
    }

    /// What each target gets.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an unknown selection.
    pub fn spec(&self) -> Result<MethodSpec> {
        let lora =
            LoraSpec { rank: self.rank, alpha: self.alpha.unwrap_or(16.0), rank_stabilized: self.rank_stabilized };
        let order = if self.smallest { Order::Smallest } else { Order::Largest };
        let rule = ColumnRule { score: self.selection.parse::<Score>()?, order };
        Ok(match self.name {
            MethodName::Full => MethodSpec::Full,
            MethodName::Lora | MethodName::Qlora => MethodSpec::Lora(lora),
            MethodName::Dora => MethodSpec::Dora { spec: lora, true_derivative: self.true_derivative },
            MethodName::Moslora => MethodSpec::Moslora { spec: lora, mixer: MixerInit::default() },
            MethodName::Paca | MethodName::Qpaca => {
                MethodSpec::Paca(PacaSpec { rank: self.rank, alpha: self.alpha, rule })
            }
        })
    }

    /// Prepares a frozen model for training: packs the base if the method asks for it, then attaches.
    ///
    /// Random choices come from stream `init/adapter` of the seed.
    ///
    /// # Errors
    /// As [`MethodParams::projections`], [`MethodParams::spec`], [`Model::attach`] and [`Nf4Matrix::quantize`].
    pub fn apply<T: Real>(&self, model: &mut Model<T>, seed: u64) -> Result<()> {
        let targets = self.projections()?;
        let spec = self.spec()?;
        if self.name == MethodName::Full && self.targets.is_none() {
            model.train_fully();
            return Ok(());
        }
        if self.name.quantized() {
            quantize(model)?;
        }
        model.attach(&AdapterPlan::everywhere(&targets, spec), &mut generator(seed, "init/adapter", 0))
    }
}

/// Packs every projection of a model into NF4.
///
/// # Errors
/// As [`Nf4Matrix::quantize`].
pub fn quantize<T: Real>(model: &mut Model<T>) -> Result<()> {
    for layer in &mut model.layers {
        for p in Projection::ALL {
            let projection = layer.projection_mut(p);
            let packed: Arc<dyn PackedWeight<T>> = Arc::new(Nf4Matrix::quantize(projection.base.dense().view())?);
            projection.base = BaseWeight::Packed(packed);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::preset::preset;

    #[test]
    fn names_parse_and_unknown_ones_list_the_known() {
        for name in MethodName::ALL {
            assert_eq!(name.name().parse::<MethodName>().unwrap(), name);
        }
        let text = "adalora".parse::<MethodName>().unwrap_err().to_string();
        assert!(text.contains("adalora") && text.contains("qpaca"), "{text}");
        let bad = MethodParams { targets: Some(vec!["q_proj".into(), "q_proj".into()]), ..Default::default() };
        assert!(matches!(bad.projections(), Err(Error::InvalidParam { name, .. }) if name == "method.targets"));
        let bad = MethodParams { targets: Some(vec!["w_proj".into()]), ..Default::default() };
        assert!(bad.projections().unwrap_err().to_string().contains("down_proj"));
    }

    #[test]
    fn every_method_trains_the_numbers_it_should() {
        let config = preset("nano").unwrap();
        let base: Model<f32> = Model::random(config.clone(), &mut generator(1, "init/model", 0)).unwrap();
        let shapes = Projection::ALL.map(|p| config.projection_shape(p));
        let layers = config.num_hidden_layers;
        for name in MethodName::ALL {
            let mut model = base.clone();
            MethodParams { rank: 3, ..MethodParams::named(name) }.apply(&mut model, 1).unwrap();
            let each = |f: fn((usize, usize)) -> usize| layers * shapes.iter().map(|&s| f(s)).sum::<usize>();
            let want = match name {
                MethodName::Full => config.parameters(),
                MethodName::Lora | MethodName::Qlora => each(|(o, i)| 3 * (o + i)),
                MethodName::Dora => each(|(o, i)| 3 * (o + i) + o),
                MethodName::Moslora => each(|(o, i)| 3 * (o + i) + 9),
                MethodName::Paca | MethodName::Qpaca => each(|(o, _)| 3 * o),
            };
            assert_eq!(model.trainable_elements(), want, "{}", name.name());
            if name.quantized() {
                let (weights, _) = model.weight_bytes();
                assert!(weights * 5 < base.weight_bytes().0, "{weights} bytes packed");
            }
        }
    }
}
