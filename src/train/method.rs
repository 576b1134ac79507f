//! The adaptation method of a run, as configuration files and flags name it.

use crate::adapters::lora::LoraSpec;
use crate::adapters::moslora::MixerInit;
use crate::adapters::nf4::Nf4Matrix;
use crate::adapters::paca::PacaSpec;
use crate::adapters::selection::{ColumnRule, Order, Score};
use crate::adapters::spft::SpftSpec;
use crate::adapters::stored::AdapterKind;
use crate::adapters::{BaseWeight, PackedWeight};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::model::s2ft::{S2ftSpec, Scope};
use crate::model::{
    AdapterPlan, Calibration, MethodSpec, Model, ModelConfig, PeftSettings, Projection,
};
use crate::streams::generator;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
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
    /// Heads and channels, co-permuted to dense slices.
    S2ft,
    /// Single entries, anywhere.
    Spft,
    /// LoRA on a base in NF4.
    Qlora,
    /// PaCA on a base in NF4.
    Qpaca,
}

impl MethodName {
    /// All of them.
    pub const ALL: [MethodName; 9] = [
        Self::Full,
        Self::Lora,
        Self::Dora,
        Self::Moslora,
        Self::Paca,
        Self::S2ft,
        Self::Spft,
        Self::Qlora,
        Self::Qpaca,
    ];

    /// Name in files, flags and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Lora => "lora",
            Self::Dora => "dora",
            Self::Moslora => "moslora",
            Self::Paca => "paca",
            Self::S2ft => "s2ft",
            Self::Spft => "spft",
            Self::Qlora => "qlora",
            Self::Qpaca => "qpaca",
        }
    }

    /// Whether the base weights may be quantized: what is trained stands beside them.
    pub fn trains_beside_the_base(self) -> bool {
        !matches!(self, Self::Full | Self::S2ft)
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
            Error::invalid(
                "method.name",
                text,
                format!("must be one of {}", Self::ALL.map(Self::name).join(", ")),
            )
        })
    }
}

/// The target that stands for every linear layer but the head, as in PEFT.
pub const ALL_LINEAR: &str = "all-linear";

/// Settings of a method.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `name` | `full` | the method | `full`, `lora`, `dora`, `moslora`, `paca`, `s2ft`, `spft`, `qlora`, `qpaca` |
/// | `rank` | 8 | rank, or number of columns for PaCA | 1 to the smaller side of every target |
/// | `alpha` | 16; none for PaCA | scaling alpha / rank; without it PaCA's is 1 | finite |
/// | `rank_stabilized` | false | alpha / sqrt(rank) (LoRA family) | |
/// | `true_derivative` | false | DoRA: differentiate through the norm | |
/// | `selection` | `random` | columns (PaCA) or heads and channels (S2FT) by `random`, `weight`, `activation`, `weight-activation`, `gradient` | |
/// | `smallest` | false | take the smallest scores first | |
/// | `ratios` | o 0.052, down 0.02 | S2FT: share of heads or channels by module name | 0 to 1 |
/// | `share` | 0.01 | SpFT: share of each target's entries, drawn at random | above 0, at most 1 |
/// | `each_layer` | false | S2FT: the same number in every layer rather than the best of all layers | |
/// | `targets` | all seven | projections, by module name, or `all-linear` (not S2FT); for `full`: everything, if absent | |
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
    /// S2FT: shares by module name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratios: Option<BTreeMap<String, f64>>,
    /// SpFT: share of each target's entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// S2FT: the same number in every layer.
    pub each_layer: bool,
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
            ratios: None,
            share: None,
            each_layer: false,
            targets: None,
        }
    }
}

impl MethodParams {
    /// A method with default settings.
    pub fn named(name: MethodName) -> Self {
        Self { name, ..Self::default() }
    }

    /// What an `adapter_config.json` (the file or its folder) asks for: LoRA, DoRA or MosLoRA, the
    /// same in every layer.
    ///
    /// # Errors
    /// As [`PeftSettings::read`].
    pub fn of_peft(path: &Path, config: &ModelConfig) -> Result<Self> {
        let PeftSettings { kind, spec, true_derivative, targets } =
            PeftSettings::read(path, config)?;
        let name = match kind {
            AdapterKind::Dora => MethodName::Dora,
            AdapterKind::Moslora => MethodName::Moslora,
            _ => MethodName::Lora,
        };
        Ok(Self {
            rank: spec.rank,
            alpha: Some(spec.alpha),
            rank_stabilized: spec.rank_stabilized,
            true_derivative,
            targets: Some(targets),
            ..Self::named(name)
        })
    }

    /// The target projections of a model, in the order in which they are updated. By default all
    /// but experts and their routers, which PEFT does not take for linear layers either.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a name that the model does not have, or a repeated one, or none.
    pub fn projections(&self, config: &ModelConfig) -> Result<Vec<Projection>> {
        self.check_targets()?;
        let all = config.all_projections();
        let linear = || all.iter().copied().filter(|p| !p.of_experts()).collect();
        let Some(names) = &self.targets else { return Ok(linear()) };
        if names.iter().map(String::as_str).eq([ALL_LINEAR]) {
            return Ok(linear());
        }
        let options = &config.options;
        let is =
            |p: Projection, name: &str| options.module_kind(p) == name || options.path(p) == name;
        if let Some(unknown) = names.iter().find(|name| !all.iter().any(|&p| is(p, name))) {
            let known: BTreeSet<String> = all.iter().map(|&p| options.module_kind(p)).collect();
            let known: Vec<String> = known.into_iter().collect();
            let requirement = format!("must be one of {}", known.join(", "));
            return Err(Error::invalid("target module", unknown, requirement));
        }
        Ok(all.into_iter().filter(|&p| names.iter().any(|name| is(p, name))).collect())
    }

    fn check_targets(&self) -> Result<()> {
        let Some(names) = &self.targets else { return Ok(()) };
        let distinct: BTreeSet<&String> = names.iter().collect();
        if names.is_empty() || distinct.len() < names.len() {
            return Err(Error::invalid(
                "method.targets",
                names.join(", "),
                "must be distinct and not empty",
            ));
        }
        Ok(())
    }

    fn rule(&self) -> Result<ColumnRule> {
        let order = if self.smallest { Order::Smallest } else { Order::Largest };
        Ok(ColumnRule { score: self.selection.parse::<Score>()?, order })
    }

    /// Whether the selection needs gradients or activations on training rows.
    pub fn needs_calibration(&self) -> bool {
        matches!(self.name, MethodName::Paca | MethodName::Qpaca | MethodName::S2ft)
            && self.rule().is_ok_and(|rule| rule.needs_calibration())
    }

    /// Settings of S2FT.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an unknown module or selection.
    pub fn s2ft(&self) -> Result<S2ftSpec> {
        let mut spec = S2ftSpec { rule: self.rule()?, ..S2ftSpec::default() };
        if self.each_layer {
            spec.scope = Scope::EachLayer;
        }
        if let Some(ratios) = &self.ratios {
            spec.ratios = [0.0; 7];
            for (name, ratio) in ratios {
                spec.set_ratio(name.parse()?, *ratio)?;
            }
        }
        Ok(spec)
    }

    /// What each target gets; `None` for S2FT, which ties projections together.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for an unknown selection.
    pub fn spec(&self) -> Result<Option<MethodSpec>> {
        let lora = LoraSpec {
            rank: self.rank,
            alpha: self.alpha.unwrap_or(16.0),
            rank_stabilized: self.rank_stabilized,
        };
        let rule = self.rule()?;
        Ok(Some(match self.name {
            MethodName::Full => MethodSpec::Full,
            MethodName::Lora | MethodName::Qlora => MethodSpec::Lora(lora),
            MethodName::Dora => {
                MethodSpec::Dora { spec: lora, true_derivative: self.true_derivative }
            }
            MethodName::Moslora => MethodSpec::Moslora { spec: lora, mixer: MixerInit::default() },
            MethodName::Paca | MethodName::Qpaca => {
                MethodSpec::Paca(PacaSpec { rank: self.rank, alpha: self.alpha, rule })
            }
            MethodName::Spft => MethodSpec::Spft(SpftSpec {
                share: self.share.unwrap_or(SpftSpec::default().share),
            }),
            MethodName::S2ft => return Ok(None),
        }))
    }

    /// Refuses settings that contradict the method.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key.
    pub fn check(&self) -> Result<()> {
        self.check_targets()?;
        self.spec()?;
        self.s2ft()?;
        if self.name == MethodName::S2ft && self.targets.is_some() {
            return Err(Error::invalid(
                "method.targets",
                "set",
                "s2ft takes method.ratios by module instead",
            ));
        }
        if self.name != MethodName::S2ft && (self.ratios.is_some() || self.each_layer) {
            return Err(Error::invalid(
                "method.ratios",
                "set",
                "ratios and each_layer belong to method s2ft",
            ));
        }
        if self.name != MethodName::Spft && self.share.is_some() {
            return Err(Error::invalid("method.share", "set", "belongs to method spft"));
        }
        Ok(())
    }

    /// Prepares a frozen model for training: packs the base if the method asks for it, then
    /// attaches.
    ///
    /// Random choices come from stream `init/adapter` of the seed. `calibration` is needed where
    /// [`MethodParams::needs_calibration`] says so.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if the model trains something already ([`Model::freeze`] ends that);
    /// as [`MethodParams::check`], [`Model::attach_with_scores`], [`Model::attach_s2ft`] and
    /// [`Nf4Matrix::quantize`].
    pub fn apply<T: Real>(
        &self,
        model: &mut Model<T>,
        calibration: Option<&Calibration<T>>,
        seed: u64,
    ) -> Result<()> {
        self.check()?;
        if model.trainable_elements() > 0 {
            // Whatever is still trainable would be trained beside the method, unnoticed.
            return Err(Error::invalid(
                "model",
                "already trainable",
                "must be frozen before a method is attached",
            ));
        }
        let mut rng = generator(seed, "init/adapter", 0);
        if self.name == MethodName::Full && self.targets.is_none() {
            model.train_fully();
            return Ok(());
        }
        if self.name.quantized() {
            quantize(model)?;
        }
        match self.spec()? {
            Some(spec) => {
                let plan = AdapterPlan::everywhere(&self.projections(&model.config)?, spec);
                model.attach_with_scores(&plan, calibration, &mut rng)
            }
            None => model.attach_s2ft(&self.s2ft()?, calibration, &mut rng).map(|_| ()),
        }
    }
}

/// Packs every projection of a model into NF4; what a checkpoint holds packed stays as it is.
///
/// # Errors
/// As [`Nf4Matrix::quantize`].
pub fn quantize<T: Real>(model: &mut Model<T>) -> Result<()> {
    for layer in &mut model.layers {
        for (_, projection) in layer.projections_mut().filter(|(_, p)| !p.base.is_packed()) {
            let packed: Arc<dyn PackedWeight<T>> =
                Arc::new(Nf4Matrix::quantize(projection.base.dense().view())?);
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
        let config = preset("nano").unwrap();
        let bad = MethodParams {
            targets: Some(vec!["q_proj".into(), "q_proj".into()]),
            ..Default::default()
        };
        assert!(
            matches!(bad.projections(&config), Err(Error::InvalidParam { name, .. }) if name == "method.targets")
        );
        let every = MethodParams { targets: Some(vec!["all-linear".into()]), ..Default::default() };
        assert_eq!(every.projections(&config).unwrap(), Projection::ALL);
        let mixed = MethodParams {
            targets: Some(vec!["all-linear".into(), "q_proj".into()]),
            ..Default::default()
        };
        assert!(
            matches!(mixed.projections(&config), Err(Error::InvalidParam { value, .. }) if value == "all-linear")
        );
        let bad = MethodParams { targets: Some(vec!["w_proj".into()]), ..Default::default() };
        assert!(bad.projections(&config).unwrap_err().to_string().contains("down_proj"));
    }

    /// The same settings by PEFT's file and by hand; what a new adapter cannot have is refused by
    /// its key.
    #[test]
    fn a_method_as_peft_writes_it() {
        let folder = tempfile::tempdir().unwrap();
        let config = preset("nano").unwrap();
        let read = |text: &str| {
            std::fs::write(folder.path().join("adapter_config.json"), text).unwrap();
            MethodParams::of_peft(folder.path(), &config)
        };
        let text = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": true, "use_dora": true,
            "target_modules": ".*self_attn\\.[qv]_proj"}"#;
        let by_hand = MethodParams {
            rank: 4,
            alpha: Some(8.0),
            rank_stabilized: true,
            targets: Some(vec!["q_proj".into(), "v_proj".into()]),
            ..MethodParams::named(MethodName::Dora)
        };
        assert_eq!(read(text).unwrap(), by_hand);
        let all = read(
            r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}"#,
        )
        .unwrap();
        assert_eq!(all.projections(&config).unwrap(), Projection::ALL);
        for (key, value) in [
            ("lora_dropout", "0.1"),
            ("rank_pattern", r#"{"q_proj": 2}"#),
            ("layers_to_transform", "[0]"),
            ("modules_to_save", r#"["lm_head"]"#),
            ("init_lora_weights", r#""pissa""#),
            ("bias", r#""all""#),
        ] {
            let text = format!(
                r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "{key}": {value}}}"#
            );
            let error = read(&text).unwrap_err().to_string();
            assert!(error.contains(&format!("key {key}")), "{error}");
        }
    }

    #[test]
    fn every_method_trains_the_numbers_it_should() {
        let config = preset("nano").unwrap();
        let base: Model<f32> =
            Model::random(config.clone(), &mut generator(1, "init/model", 0)).unwrap();
        let shapes = Projection::ALL.map(|p| config.projection_shape(p));
        let layers = config.num_hidden_layers;
        for name in MethodName::ALL {
            let mut model = base.clone();
            MethodParams { rank: 3, ..MethodParams::named(name) }
                .apply(&mut model, None, 1)
                .unwrap();
            let each = |f: fn((usize, usize)) -> usize| {
                layers * shapes.iter().map(|&s| f(s)).sum::<usize>()
            };
            let want = match name {
                MethodName::Full => config.parameters(),
                MethodName::Lora | MethodName::Qlora => each(|(o, i)| 3 * (o + i)),
                MethodName::Dora => each(|(o, i)| 3 * (o + i) + o),
                MethodName::Moslora => each(|(o, i)| 3 * (o + i) + 9),
                MethodName::Paca | MethodName::Qpaca => each(|(o, _)| 3 * o),
                // Shares of all layers together: 10 groups of two 32-wide heads, 5 * 344 channels.
                MethodName::S2ft => config.hidden_size * (64 + 34),
                MethodName::Spft => each(|(o, i)| (0.01 * (o * i) as f64).round() as usize),
            };
            assert_eq!(model.trainable_elements(), want, "{}", name.name());
            let mut again = model.clone();
            let refused =
                MethodParams::named(MethodName::Lora).apply(&mut again, None, 1).unwrap_err();
            assert!(refused.to_string().contains("frozen"), "{refused}");
            if name == MethodName::Full {
                again.freeze();
                assert_eq!(again.trainable_elements(), 0);
                MethodParams { rank: 3, ..MethodParams::named(MethodName::Lora) }
                    .apply(&mut again, None, 1)
                    .unwrap();
                assert_eq!(again.trainable_elements(), each(|(o, i)| 3 * (o + i)));
            }
            if name.quantized() {
                let (weights, _) = model.weight_bytes();
                assert!(weights * 5 < base.weight_bytes().0, "{weights} bytes packed");
            }
        }
    }
}
