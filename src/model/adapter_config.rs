//! `adapter_config.json`: which method, rank and scaling each projection has.

use super::parameters::Projection;
use crate::adapters::lora::LoraSpec;
pub use crate::adapters::stored::AdapterKind;
use crate::error::{Error, Result};
use regex::Regex;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Which modules are adapted.
#[derive(Debug, Clone)]
enum Targets {
    All,
    Names(Vec<String>),
    /// Matched against a module's whole name.
    Pattern(Regex),
}

impl Targets {
    fn name(&self, module: &str) -> bool {
        match self {
            Targets::All => true,
            Targets::Names(names) => names.iter().any(|target| matches(module, target)),
            Targets::Pattern(pattern) => pattern.is_match(module),
        }
    }
}

/// A parsed `adapter_config.json`.
#[derive(Debug, Clone)]
pub(super) struct AdapterConfig {
    pub path: PathBuf,
    pub kind: AdapterKind,
    pub spec: LoraSpec,
    pub true_derivative: bool,
    ranks: BTreeMap<String, f64>,
    alphas: BTreeMap<String, f64>,
    targets: Targets,
    layers: Option<Vec<usize>>,
}

/// Full module name, as PEFT matches its patterns against.
pub(super) fn module_name(layer: usize, p: Projection) -> String {
    format!("model.layers.{layer}.{}", p.path())
}

/// PEFT's rule for a pattern without wildcards: the whole name or its end after a dot.
fn matches(name: &str, key: &str) -> bool {
    let key = key.strip_prefix('^').unwrap_or(key).replace("\\.", ".");
    name == key || name.strip_suffix(key.as_str()).is_some_and(|head| head.ends_with('.'))
}

/// Keys that change what the adapter computes and are not implemented: they must be absent, null, false or empty.
const UNSUPPORTED: [&str; 12] = [
    "fan_in_fan_out",
    "modules_to_save",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",
    "layers_pattern",
];

/// The object in a JSON file.
pub(super) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    parse_object(path, &text)
}

fn parse_object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::format(path, "file", "a JSON object", "another JSON value")),
        Err(e) => Err(Error::format(path, "file", "a JSON object", e.to_string())),
    }
}

/// An `adapter_config.json` whose keys another one keeps.
pub(super) struct Template {
    config: AdapterConfig,
    text: String,
    keys: Map<String, Value>,
}

impl AdapterConfig {
    pub fn read(path: &Path) -> Result<Self> {
        Self::of_object(path, &read_object(path)?)
    }

    /// With the file's text and keys, to write another one like it.
    pub fn read_with_text(path: &Path) -> Result<Template> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let keys = parse_object(path, &text)?;
        Ok(Template { config: Self::of_object(path, &keys)?, text, keys })
    }

    fn of_object(path: &Path, map: &Map<String, Value>) -> Result<Self> {
        let wrong = |field: String, expected: &str, found: String| Error::format(path, field, expected, found);
        let key = |key: &str, expected: &str| {
            let found = map.get(key).map_or("nothing".into(), Value::to_string);
            wrong(format!("key {key}"), expected, found)
        };
        let flag = |name: &str| map.get(name).and_then(Value::as_bool).unwrap_or(false);
        let kind = map.get("peft_type").and_then(Value::as_str).and_then(|t| AdapterKind::of(t, flag("use_dora")));
        let known = "LORA, MOSLORA, PACA or S2FT (SLICE is an update: see `peft-limits adapter`)";
        let kind = kind.ok_or_else(|| key("peft_type", known))?;
        for name in UNSUPPORTED {
            let plain = match map.get(name) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::Array(list)) => list.is_empty(),
                Some(_) => false,
            };
            if !plain {
                return Err(key(name, "null or false (not implemented)"));
            }
        }
        if map.get("bias").and_then(Value::as_str).unwrap_or("none") != "none" {
            return Err(key("bias", "\"none\""));
        }
        let mut spec = LoraSpec { rank_stabilized: flag("use_rslora"), ..LoraSpec::default() };
        if kind.has_factors() {
            spec.rank = match map.get("r").and_then(Value::as_u64) {
                Some(rank) if rank > 0 => rank as usize,
                _ => return Err(key("r", "a positive integer")),
            };
            spec.alpha = map.get("lora_alpha").and_then(Value::as_f64).ok_or_else(|| key("lora_alpha", "a number"))?;
        }
        let pattern = |name: &str| -> Result<BTreeMap<String, f64>> {
            let Some(Value::Object(patterns)) = map.get(name) else { return Ok(BTreeMap::new()) };
            let entry = |(k, v): (&String, &Value)| v.as_f64().map(|v| (k.clone(), v));
            patterns.iter().map(|e| entry(e).ok_or_else(|| key(name, "numbers by module name"))).collect()
        };
        let targets = match map.get("target_modules") {
            Some(Value::Array(list)) => {
                let names: Option<Vec<String>> = list.iter().map(|name| name.as_str().map(String::from)).collect();
                Targets::Names(names.ok_or_else(|| key("target_modules", "a list of module names"))?)
            }
            // PEFT's word for every linear layer but the output head.
            Some(Value::String(word)) if word == "all-linear" => Targets::All,
            Some(Value::String(pattern)) => {
                let whole = Regex::new(&format!("^(?:{pattern})$"));
                Targets::Pattern(whole.map_err(|e| key("target_modules", &format!("a regular expression ({e})")))?)
            }
            _ => return Err(key("target_modules", "a list of module names, a regular expression or all-linear")),
        };
        if let Targets::Names(names) = &targets {
            for target in names {
                target.rsplit('.').next().unwrap_or("").parse::<Projection>().map_err(|_| {
                    let known = Projection::ALL.map(Projection::module).join(", ");
                    wrong("key target_modules".into(), &format!("modules among {known}"), target.clone())
                })?;
            }
        }
        let layers =
            match map.get("layers_to_transform") {
                None | Some(Value::Null) => None,
                Some(Value::Array(list)) => {
                    let layers: Option<Vec<usize>> = list.iter().map(|v| v.as_u64().map(|l| l as usize)).collect();
                    Some(layers.ok_or_else(|| key("layers_to_transform", "a list of layer numbers"))?)
                }
                Some(value) => Some(vec![
                    value.as_u64().ok_or_else(|| key("layers_to_transform", "a list of layer numbers"))? as usize,
                ]),
            };
        let (ranks, alphas) = (pattern("rank_pattern")?, pattern("alpha_pattern")?);
        if ranks.values().any(|r| !(*r >= 1.0) || r.fract().abs() > 0.0) {
            return Err(key("rank_pattern", "positive integers by module name"));
        }
        let path = path.to_path_buf();
        let true_derivative = flag("dora_true_derivative");
        Ok(Self { path, kind, spec, true_derivative, ranks, alphas, targets, layers })
    }

    /// Settings of one projection, or `None` if it is not adapted.
    pub fn spec_of(&self, layer: usize, p: Projection) -> Option<LoraSpec> {
        let name = module_name(layer, p);
        if self.layers.as_ref().is_some_and(|layers| !layers.contains(&layer)) {
            return None;
        }
        if !self.targets.name(&name) {
            return None;
        }
        let find = |patterns: &BTreeMap<String, f64>| patterns.iter().find(|(k, _)| matches(&name, k)).map(|(_, &v)| v);
        Some(LoraSpec {
            rank: find(&self.ranks).map_or(self.spec.rank, |r| r as usize),
            alpha: find(&self.alphas).unwrap_or(self.spec.alpha),
            rank_stabilized: self.spec.rank_stabilized,
        })
    }
}

impl Template {
    /// Whether it describes exactly these adapters.
    fn describes(
        &self,
        kind: AdapterKind,
        entries: &[(usize, Projection, LoraSpec)],
        layers: usize,
        dora: bool,
    ) -> bool {
        let config = &self.config;
        let settings = kind == config.kind && (kind != AdapterKind::Dora || config.true_derivative == dora);
        let mut places = (0..layers).flat_map(|l| Projection::ALL.map(|p| (l, p)));
        let given: BTreeMap<_, _> = entries.iter().map(|&(l, p, spec)| ((l, p), spec)).collect();
        settings && places.all(|(l, p)| config.spec_of(l, p) == given.get(&(l, p)).copied())
    }
}

/// The text of an `adapter_config.json`; `entries` are the adapted projections. Keys of `like` that are not set
/// here are kept; its text is returned as it is if it says the same.
pub(super) fn compose(
    kind: AdapterKind,
    entries: &[(usize, Projection, LoraSpec)],
    layers: usize,
    true_derivative: bool,
    like: Option<&Template>,
) -> String {
    if let Some(like) = like
        && like.describes(kind, entries, layers, true_derivative)
    {
        return like.text.clone();
    }
    let modules: BTreeSet<Projection> = entries.iter().map(|&(_, p, _)| p).collect();
    let everywhere = entries.len() == modules.len() * layers;
    let targets: Vec<String> = if everywhere {
        modules.iter().map(|p| p.module().to_string()).collect()
    } else {
        entries.iter().map(|&(l, p, _)| module_name(l, p)).collect()
    };
    let main = entries.first().map(|&(_, _, spec)| spec).unwrap_or_default();
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for &(l, p, spec) in entries {
        if spec.rank != main.rank {
            ranks.insert(module_name(l, p), json!(spec.rank));
        }
        if spec.alpha.to_bits() != main.alpha.to_bits() {
            alphas.insert(module_name(l, p), json!(spec.alpha));
        }
    }
    let mut value = json!({
        "peft_type": kind.peft_type(),
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "bias": "none",
        "inference_mode": true,
    });
    if let (Some(map), true) = (value.as_object_mut(), kind.has_factors()) {
        map.insert("r".into(), json!(main.rank));
        map.insert("lora_alpha".into(), json!(main.alpha));
        map.insert("lora_dropout".into(), json!(0.0));
        map.insert("use_rslora".into(), json!(main.rank_stabilized));
        map.insert("use_dora".into(), json!(kind == AdapterKind::Dora));
        map.insert("rank_pattern".into(), Value::Object(ranks));
        map.insert("alpha_pattern".into(), Value::Object(alphas));
        if true_derivative {
            map.insert("dora_true_derivative".into(), json!(true));
        }
    }
    if let (Some(like), Some(map)) = (like, value.as_object()) {
        let mut keys = like.keys.clone();
        keys.extend(map.clone());
        // The targets above name every layer that they mean.
        keys.entry("layers_to_transform").and_modify(|layers| *layers = Value::Null);
        value = Value::Object(keys);
    }
    format!("{value:#}\n")
}
