//! `adapter_config.json`: which method, rank and scaling each projection has.

use super::config::ModelConfig;
use super::names::Outside;
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
            Targets::Names(names) => names.iter().any(|target| target_matches(module, target)),
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
    /// `target_parameters`: parameters that are not a module's weight, as experts are.
    parameters: Vec<String>,
    layers: Option<Vec<usize>>,
    /// `modules_to_save`: modules that are trained whole.
    pub saved: Vec<String>,
    /// `bias: all`: every bias of the model is trained.
    pub biases: bool,
    /// `lora_bias`: each update has a bias of its own.
    pub own_bias: bool,
}

/// PEFT's rule for a key of `rank_pattern` and `alpha_pattern`: a regular expression that matches the whole name or its end
/// after a dot.
fn pattern_matches(name: &str, key: &str) -> bool {
    Regex::new(&format!("^(?:.*\\.)?(?:{key})$")).is_ok_and(|pattern| pattern.is_match(name))
}

/// PEFT's rule for a target: the whole name or its end after a dot.
fn target_matches(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|head| head.ends_with('.'))
}

/// Keys that change what the adapter computes and are not implemented: they must be absent, null, false or empty.
const UNSUPPORTED: [&str; 8] = [
    "use_qalora",
    "use_bdlora",
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
        let biases = match map.get("bias").and_then(Value::as_str).unwrap_or("none") {
            "none" => false,
            "all" if kind.is_peft() => true,
            _ => return Err(key("bias", "\"none\" or, for LoRA and DoRA, \"all\"")),
        };
        let names = |name: &str| match map.get(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                let names: Option<Vec<String>> = list.iter().map(|name| name.as_str().map(String::from)).collect();
                names.ok_or_else(|| key(name, "a list of names"))
            }
            Some(_) => Err(key(name, "a list of names")),
        };
        let saved = names("modules_to_save")?;
        let own_bias = flag("lora_bias");
        if own_bias && kind != AdapterKind::Lora {
            return Err(key("lora_bias", "false: only plain LoRA has a bias of its own"));
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
            None | Some(Value::Null) if map.get("target_parameters").is_some_and(Value::is_array) => {
                Targets::Names(Vec::new())
            }
            _ => return Err(key("target_modules", "a list of module names, a regular expression or all-linear")),
        };
        let parameters = names("target_parameters")?;
        if !parameters.is_empty() && kind != AdapterKind::Lora {
            return Err(key("target_parameters", "null: only plain LoRA acts on them"));
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
        Ok(Self {
            path,
            kind,
            spec,
            true_derivative,
            ranks,
            alphas,
            targets,
            parameters,
            layers,
            saved,
            biases,
            own_bias,
        })
    }

    /// Settings of one projection, or `None` if it is not adapted.
    pub fn spec_of(&self, config: &ModelConfig, layer: usize, p: Projection) -> Option<LoraSpec> {
        if self.layers.as_ref().is_some_and(|layers| !layers.contains(&layer)) {
            return None;
        }
        let name = peft_name(config, layer, p);
        let wanted = match (p.of_experts(), &self.targets) {
            (true, _) if self.kind.is_peft() => self.parameters.iter().any(|target| target_matches(&name, target)),
            (true, Targets::All) => false,
            (_, targets) => targets.name(&name),
        };
        wanted.then(|| self.settings(&name))
    }

    /// Settings of a module outside the layers, or `None` if it is not adapted. PEFT's `all-linear` leaves the output
    /// projection out.
    pub fn spec_outside(&self, name: &str) -> Option<LoraSpec> {
        let wanted = self.layers.is_none() && !matches!(self.targets, Targets::All) && self.targets.name(name);
        wanted.then(|| self.settings(name))
    }

    /// Rank and alpha of a module by its name.
    fn settings(&self, name: &str) -> LoraSpec {
        let find =
            |patterns: &BTreeMap<String, f64>| patterns.iter().find(|(k, _)| pattern_matches(name, k)).map(|(_, &v)| v);
        LoraSpec {
            rank: find(&self.ranks).map_or(self.spec.rank, |r| r as usize),
            alpha: find(&self.alphas).unwrap_or(self.spec.alpha),
            rank_stabilized: self.spec.rank_stabilized,
        }
    }

    /// Whether `modules_to_save` names a module, by its name or the end of it.
    pub fn saves(&self, name: &str) -> bool {
        self.saved.iter().any(|saved| name.ends_with(saved.as_str()))
    }

    /// A target that no module of the model has, if there is one.
    pub fn unknown_target(&self, config: &ModelConfig) -> Option<String> {
        let Targets::Names(names) = &self.targets else { return None };
        let layers = 0..config.num_hidden_layers;
        let mut all: Vec<String> =
            layers.flat_map(|l| config.projections(l).into_iter().map(move |p| peft_name(config, l, p))).collect();
        all.extend([Outside::Embedding, Outside::Head].map(|module| config.options.outside(module).to_string()));
        names.iter().find(|target| !all.iter().any(|name| target_matches(name, target))).cloned()
    }
}

/// The name under which PEFT knows a projection: a module's, or a parameter's where experts stand in one tensor.
pub(super) fn peft_name(config: &ModelConfig, layer: usize, p: Projection) -> String {
    let options = &config.options;
    match p {
        Projection::ExpertGateUp(_) | Projection::ExpertDown(_) => format!("{}.{}", options.layer(layer), p.path()),
        Projection::Router => format!("{}.weight", options.module(layer, p)),
        _ => options.module(layer, p),
    }
}

impl Template {
    /// Whether it describes exactly these adapters.
    fn describes(
        &self,
        kind: AdapterKind,
        entries: &[(usize, Projection, LoraSpec)],
        model: &ModelConfig,
        dora: bool,
        beside: &Beside,
    ) -> bool {
        let config = &self.config;
        let settings = kind == config.kind && (kind != AdapterKind::Dora || config.true_derivative == dora);
        let mut places =
            (0..model.num_hidden_layers).flat_map(|l| model.projections(l).into_iter().map(move |p| (l, p)));
        let given: BTreeMap<_, _> = entries.iter().map(|&(l, p, spec)| ((l, p), spec)).collect();
        let outside = [Outside::Embedding, Outside::Head].map(|module| model.options.outside(module));
        let same_outside = outside.iter().all(|name| {
            config.spec_outside(name) == beside.adapted.get(*name).copied()
                && config.saves(name) == beside.saved.iter().any(|saved| saved == name)
        });
        let same = config.biases == beside.biases && config.own_bias == beside.own_bias && same_outside;
        settings && same && places.all(|(l, p)| config.spec_of(model, l, p) == given.get(&(l, p)).copied())
    }
}

/// What an adapter trains beside the projections of layers.
#[derive(Debug, Clone, Default)]
pub(super) struct Beside {
    /// Modules outside the layers with low-rank updates.
    pub adapted: BTreeMap<String, LoraSpec>,
    /// Modules that are trained whole.
    pub saved: Vec<String>,
    /// Whether every bias is trained.
    pub biases: bool,
    /// Whether updates have a bias of their own.
    pub own_bias: bool,
}

/// The text of an `adapter_config.json`; `entries` are the adapted projections. Keys of `like` that are not set
/// here are kept; its text is returned as it is if it says the same.
pub(super) fn compose(
    kind: AdapterKind,
    entries: &[(usize, Projection, LoraSpec)],
    model: &ModelConfig,
    true_derivative: bool,
    beside: &Beside,
    like: Option<&Template>,
) -> String {
    if let Some(like) = like
        && like.describes(kind, entries, model, true_derivative, beside)
    {
        return like.text.clone();
    }
    let module_name = |l, p| peft_name(model, l, p);
    let (own, linear): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, p, _)| kind.is_peft() && p.of_experts());
    let modules: BTreeSet<Projection> = linear.iter().map(|&(_, p, _)| p).collect();
    let kinds: BTreeSet<String> = modules.iter().map(|&p| model.options.module_kind(p)).collect();
    // A short name must mean nothing else.
    let named = |p: Projection| kinds.contains(&model.options.module_kind(p));
    let meant =
        (0..model.num_hidden_layers).flat_map(|l| model.projections(l)).filter(|&p| !p.of_experts() && named(p));
    let mut targets: Vec<String> = if linear.len() == meant.count() {
        kinds.into_iter().collect()
    } else {
        linear.iter().map(|&(l, p, _)| module_name(l, p)).collect()
    };
    targets.extend(beside.adapted.keys().cloned());
    let parameters: BTreeSet<String> = own.iter().map(|&(l, p, _)| module_name(l, p)).collect();
    let main =
        entries.first().map(|&(_, _, spec)| spec).or(beside.adapted.values().next().copied()).unwrap_or_default();
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    let named = entries.iter().map(|&(l, p, spec)| (module_name(l, p), spec));
    for (name, spec) in named.chain(beside.adapted.iter().map(|(name, spec)| (name.clone(), *spec))) {
        if spec.rank != main.rank {
            ranks.insert(name.clone(), json!(spec.rank));
        }
        if spec.alpha.to_bits() != main.alpha.to_bits() {
            alphas.insert(name, json!(spec.alpha));
        }
    }
    let mut value = json!({
        "peft_type": kind.peft_type(),
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "bias": if beside.biases { "all" } else { "none" },
        "inference_mode": true,
    });
    if let Some(map) = value.as_object_mut() {
        if !beside.saved.is_empty() {
            map.insert("modules_to_save".into(), json!(beside.saved));
        }
        if beside.own_bias {
            map.insert("lora_bias".into(), json!(true));
        }
    }
    if let (Some(map), false) = (value.as_object_mut(), parameters.is_empty()) {
        map.insert("target_parameters".into(), json!(parameters));
    }
    if let (Some(map), true) = (value.as_object_mut(), model.options.transposed) {
        map.insert("fan_in_fan_out".into(), json!(true));
    }
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
