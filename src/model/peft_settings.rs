//! The method of an adapter that is still to be trained, as PEFT writes it.

use super::adapter_config::{AdapterConfig, Biases, read_object};
use super::adapter_folder::CONFIG;
use super::config::ModelConfig;
use super::names::{HEAD_IN_MEMORY, Outside};
use super::projection::Projection;
use crate::adapters::lora::LoraSpec;
use crate::adapters::stored::AdapterKind;
use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A method that is the same in every layer, as an `adapter_config.json` asks for it.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftSettings {
    /// The method.
    pub kind: AdapterKind,
    /// Rank, alpha, scaling.
    pub spec: LoraSpec,
    /// DoRA's true derivative.
    pub true_derivative: bool,
    /// Adapted modules, by the end of their names or by their paths in a layer.
    pub targets: Vec<String>,
}

impl PeftSettings {
    /// Reads the configuration (the file or its folder) of an adapter that is still to be trained on a model of these sizes.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the key: as [`super::Model::read_adapter`], and
    /// whatever a new adapter cannot have here: dropout, another initialisation, ranks, scalings or
    /// targets that differ between layers, what is trained outside the projections of layers.
    pub fn read(path: &Path, model: &ModelConfig) -> Result<Self> {
        let file = if path.is_dir() { path.join(CONFIG) } else { path.to_path_buf() };
        let path = file.as_path();
        let (config, keys) = (AdapterConfig::read(path)?, read_object(path)?);
        let wrong = |name: &str, expected: &str| {
            let found = keys.get(name).map_or("nothing".into(), Value::to_string);
            Error::format(path, format!("key {name}"), expected, found)
        };
        if !config.kind.has_factors() {
            return Err(wrong("peft_type", "LORA or MOSLORA (train others by --method)"));
        }
        if let Some((key, _)) = config.unknown_target(model) {
            return Err(wrong(key, "modules of this model"));
        }
        let plain_start =
            matches!(keys.get("init_lora_weights"), None | Some(Value::Null | Value::Bool(true)));
        let dropout = keys.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0);
        let outside =
            [Outside::Embedding, Outside::Head].map(|module| model.options.outside(module));
        let outside = outside
            .into_iter()
            .chain([HEAD_IN_MEMORY])
            .any(|name| config.spec_outside(name).is_some());
        let refused = [
            (!plain_start, "init_lora_weights", "true: a new adapter starts with B = 0"),
            (dropout.abs() > 0.0, "lora_dropout", "0: training without dropout"),
            (outside, "target_modules", "projections of layers"),
            (!config.saved.is_empty(), "modules_to_save", "null"),
            (config.biases != Biases::None, "bias", "\"none\""),
            (config.own_bias, "lora_bias", "false"),
        ];
        if let Some((_, key, expected)) = refused.into_iter().find(|(refused, ..)| *refused) {
            return Err(wrong(key, expected));
        }
        let mut given: BTreeMap<Projection, BTreeSet<bool>> = BTreeMap::new();
        let mut spec = None;
        for l in 0..model.num_hidden_layers {
            for p in model.projections(l) {
                let own = config.spec_of(model, l, p);
                given.entry(p).or_default().insert(own.is_some());
                if own.is_some() && spec.is_some() && spec != own {
                    return Err(wrong("rank_pattern", "one rank and one alpha for all targets"));
                }
                spec = spec.or(own);
            }
        }
        if given.values().any(|there| there.len() > 1) {
            return Err(wrong("layers_to_transform", "null: the same targets in every layer"));
        }
        let Some(spec) = spec else { return Err(wrong("target_modules", "modules of this model")) };
        let wanted = |p: &Projection| given.get(p).is_some_and(|there| there.contains(&true));
        let options = &model.options;
        // A short name must mean nothing else.
        let whole =
            |kind: &str| given.keys().filter(|p| options.module_kind(**p) == kind).all(wanted);
        let name = |p: &Projection| match options.module_kind(*p) {
            kind if whole(&kind) => kind,
            _ => options.path(*p).to_string(),
        };
        let targets: BTreeSet<String> = given.keys().filter(|p| wanted(p)).map(name).collect();
        Ok(Self {
            kind: config.kind,
            spec,
            true_derivative: config.true_derivative,
            targets: targets.into_iter().collect(),
        })
    }
}
