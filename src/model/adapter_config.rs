//! `adapter_config.json`: which method, rank and scaling each projection has.

use super::adapter_folder::PREFIX;
use super::adapter_saved::all_modules;
use super::adapter_targets::{ByPattern, Names, Targets, ends_with, layer_patterns, whole};
use super::config::ModelConfig;
use super::names::{HEAD_IN_MEMORY, Outside};
use super::projection::Projection;
use crate::adapters::lora::LoraSpec;
pub use crate::adapters::stored::AdapterKind;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A parsed `adapter_config.json`.
#[derive(Debug, Clone)]
pub(super) struct AdapterConfig {
    pub path: PathBuf,
    pub kind: AdapterKind,
    pub spec: LoraSpec,
    pub true_derivative: bool,
    ranks: ByPattern,
    alphas: ByPattern,
    targets: Targets,
    /// Whether the factors were initialised by changing the base: the weights beside which they act
    /// are no checkpoint's.
    pub moves_base: Option<String>,
    /// `modules_to_save`: modules that are trained whole.
    pub saved: Vec<String>,
    /// `bias`: which biases of the model are trained.
    pub biases: Biases,
    /// `lora_bias`: each update has a bias of its own.
    pub own_bias: bool,
    /// `ensure_weight_tying`: what is trained of a tied table stays tied.
    pub keeps_tied: bool,
}

/// Biases of the model that an adapter trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Biases {
    #[default]
    None,
    /// Those of adapted modules.
    Adapted,
    All,
}

impl Biases {
    const ALL: [(Self, &'static str); 3] =
        [(Self::None, "none"), (Self::Adapted, "lora_only"), (Self::All, "all")];

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known)| *known == name).map(|(biases, _)| biases)
    }

    fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(biases, _)| *biases == self).map_or("none", |(_, name)| name)
    }
}

/// Keys that are read here.
const READ: [&str; 19] = [
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "dora_true_derivative",
    "bias",
    "lora_bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "lora_dropout",
    "fan_in_fan_out",
];

/// Keys that change nothing about a step once the adapter's tensors are there: where things come
/// from, how factors were initialised, settings of what [`UNSUPPORTED`] refuses.
const PASSED: [&str; 16] = [
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "ensure_weight_tying",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "ephemeral_gpu_offload",
    "scaling",
];

/// Keys that change what the adapter computes and are not implemented, with what they are.
const UNSUPPORTED: [(&str, &str); 10] = [
    ("use_qalora", "QA-LoRA"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("trainable_token_indices", "training single rows of the embedding"),
    ("layer_replication", "layers that share weights"),
    ("alora_invocation_tokens", "activated LoRA"),
    ("arrow_config", "Arrow routing"),
    ("kasa_config", "KaSA"),
    ("velora_config", "VeLoRA"),
    ("monteclora_config", "Monte Carlo LoRA"),
    ("megatron_config", "Megatron's parallel layers"),
];

/// Whether a value says that something is off.
fn is_off(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(_) => false,
    }
}

/// Initialisations that subtract the factors from the base weights.
fn moves_base(init: &str) -> bool {
    init.starts_with("pissa") || ["olora", "corda", "loftq", "lora_ga"].contains(&init)
}

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
        let wrong = |field: String, expected: &str, found: String| {
            Error::format(path, field, expected, found)
        };
        let key = |key: &str, expected: &str| {
            let found = map.get(key).map_or("nothing".into(), Value::to_string);
            wrong(format!("key {key}"), expected, found)
        };
        let flag = |name: &str| map.get(name).and_then(Value::as_bool).unwrap_or(false);
        let kind = map
            .get("peft_type")
            .and_then(Value::as_str)
            .and_then(|t| AdapterKind::of(t, flag("use_dora")));
        let known = "LORA, MOSLORA, PACA or S2FT (SLICE is an update: see `peft-limits adapter`)";
        let kind = kind.ok_or_else(|| key("peft_type", known))?;
        for (name, what) in UNSUPPORTED {
            if !is_off(map.get(name)) {
                return Err(key(name, &format!("null or false ({what} is not implemented)")));
            }
        }
        let known = |name: &str| READ.contains(&name) || PASSED.contains(&name);
        if let Some((name, _)) =
            map.iter().find(|(name, value)| !known(name) && !is_off(Some(value)))
        {
            return Err(key(name, "no such key, or null: what it would change is not known"));
        }
        let biases = match map.get("bias") {
            None | Some(Value::Null) => Some(Biases::None),
            Some(value) => value.as_str().and_then(Biases::named),
        };
        let biases =
            biases.filter(|&biases| kind.is_peft() || biases == Biases::None).ok_or_else(|| {
                key("bias", "\"none\" or, for LoRA and DoRA, \"lora_only\" or \"all\"")
            })?;
        let names = |name: &str| match map.get(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                let names: Option<Vec<String>> =
                    list.iter().map(|name| name.as_str().map(String::from)).collect();
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
            spec.alpha = map
                .get("lora_alpha")
                .and_then(Value::as_f64)
                .ok_or_else(|| key("lora_alpha", "a number"))?;
        }
        let by_pattern = |name: &str| -> Result<ByPattern> {
            let entries = match map.get(name) {
                None | Some(Value::Null) => return Ok(ByPattern::default()),
                Some(Value::Object(entries)) => entries,
                Some(_) => return Err(key(name, "numbers by module name")),
            };
            let numbers = entries
                .iter()
                .map(|(k, v)| v.as_f64().map(|v| (k.as_str(), v)))
                .collect::<Option<Vec<_>>>();
            let numbers = numbers.ok_or_else(|| key(name, "numbers by module name"))?;
            ByPattern::new(numbers.into_iter())
                .map_err(|e| key(name, &format!("regular expressions ({e})")))
        };
        let modules = |name: &str, text: &str| match text {
            // PEFT's word for every linear layer but the output projection.
            "all-linear" => Ok(Names::AllLinear),
            _ => whole(text)
                .map(Names::Pattern)
                .map_err(|e| key(name, &format!("a regular expression ({e})"))),
        };
        let parameters = names("target_parameters")?;
        let targets = match map.get("target_modules") {
            Some(Value::Array(_)) => Names::List(names("target_modules")?),
            Some(Value::String(text)) => modules("target_modules", text)?,
            None | Some(Value::Null) if !parameters.is_empty() => Names::List(Vec::new()),
            _ => {
                return Err(key(
                    "target_modules",
                    "a list of module names, a regular expression or all-linear",
                ));
            }
        };
        let excluded = match map.get("exclude_modules") {
            Some(Value::String(text)) if !text.is_empty() => {
                Some(modules("exclude_modules", text)?)
            }
            Some(Value::String(_)) => None,
            _ => Some(Names::List(names("exclude_modules")?)),
        };
        if !parameters.is_empty() && kind != AdapterKind::Lora {
            return Err(key("target_parameters", "null: only plain LoRA acts on them"));
        }
        let number = |v: &Value| v.as_u64().map(|l| l as usize);
        let layers = match map.get("layers_to_transform") {
            None | Some(Value::Null) => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(number).collect(),
            Some(value) => number(value).map(|layer| vec![layer]),
        };
        let layers = layers.ok_or_else(|| key("layers_to_transform", "a list of layer numbers"))?;
        let layer_names = match map.get("layers_pattern") {
            Some(Value::String(name)) if name.is_empty() => Vec::new(),
            Some(Value::String(name)) => vec![name.clone()],
            _ => names("layers_pattern")?,
        };
        let regular =
            |name: &'static str| move |e| key(name, &format!("regular expressions ({e})"));
        let targets = Targets {
            modules: targets,
            excluded,
            saved: saved
                .iter()
                .map(|name| whole(&format!(r"(?:.*\.)?{name}(?:\..*)?")))
                .collect::<std::result::Result<_, _>>()
                .map_err(regular("modules_to_save"))?,
            layers: Some(layers).filter(|layers| !layers.is_empty()),
            layer_patterns: layer_patterns(&layer_names).map_err(regular("layers_pattern"))?,
            parameters,
        };
        let (ranks, alphas) = (by_pattern("rank_pattern")?, by_pattern("alpha_pattern")?);
        if ranks.values().any(|r| !(r >= 1.0) || r.fract().abs() > 0.0) {
            return Err(key("rank_pattern", "positive integers by module name"));
        }
        let init = map.get("init_lora_weights").and_then(Value::as_str);
        let moves_base = init.filter(|init| moves_base(init)).map(String::from);
        let path = path.to_path_buf();
        let true_derivative = flag("dora_true_derivative");
        let keeps_tied = flag("ensure_weight_tying");
        Ok(Self {
            path,
            kind,
            spec,
            true_derivative,
            ranks,
            alphas,
            targets,
            moves_base,
            saved,
            biases,
            own_bias,
            keeps_tied,
        })
    }

    /// Settings of one projection, or `None` if it is not adapted.
    pub fn spec_of(&self, config: &ModelConfig, layer: usize, p: Projection) -> Option<LoraSpec> {
        let name = peft_name(config, layer, p);
        let wanted = if p.of_experts() && self.kind.is_peft() {
            self.targets.parameter(&name)
        } else {
            !(p.of_experts() && matches!(self.targets.modules, Names::AllLinear))
                && self.targets.module(&name)
        };
        wanted.then(|| self.settings(&name))
    }

    /// Settings of a module outside the layers, or `None` if it is not adapted.
    pub fn spec_outside(&self, name: &str) -> Option<LoraSpec> {
        self.targets.outside(name).then(|| self.settings(name))
    }

    /// Rank and alpha of a module by its name.
    fn settings(&self, name: &str) -> LoraSpec {
        LoraSpec {
            rank: self.ranks.of(name).map_or(self.spec.rank, |r| r as usize),
            alpha: self.alphas.of(name).unwrap_or(self.spec.alpha),
            rank_stabilized: self.spec.rank_stabilized,
        }
    }

    /// Whether `modules_to_save` names a module or one that it is in.
    pub fn saves(&self, module: &str) -> bool {
        self.saved.iter().any(|saved| self.saves_by(saved, module))
    }

    /// Whether one of its names does: PEFT takes any end of a module's name for it, `norm` for
    /// `q_norm` too.
    pub fn saves_by(&self, saved: &str, module: &str) -> bool {
        let full = format!("{PREFIX}.{module}");
        let ends = full.match_indices('.').map(|(at, _)| at).chain([full.len()]);
        ends.into_iter().any(|end| full[..end].ends_with(saved))
    }

    /// A target that nothing of the model has, if there is one, and the key that names it.
    pub fn unknown_target(&self, config: &ModelConfig) -> Option<(&'static str, String)> {
        let all: Vec<(bool, String)> = (0..config.num_hidden_layers)
            .flat_map(|l| {
                config
                    .projections(l)
                    .into_iter()
                    .map(move |p| (p.of_experts(), peft_name(config, l, p)))
            })
            .collect();
        let [embedding, head] =
            [Outside::Embedding, Outside::Head].map(|module| config.options.outside(module));
        let outside = [embedding, head, HEAD_IN_MEMORY];
        let unknown = |names: &[String], of_modules: bool| {
            let known = |target: &String| {
                all.iter()
                    .any(|(experts, name)| (of_modules || *experts) && ends_with(name, target))
                    || of_modules && outside.iter().any(|name| ends_with(name, target))
            };
            names.iter().find(|target| !known(target)).cloned()
        };
        let modules = match &self.targets.modules {
            Names::List(names) => unknown(names, true).map(|name| ("target_modules", name)),
            _ => None,
        };
        modules.or_else(|| {
            unknown(&self.targets.parameters, false).map(|name| ("target_parameters", name))
        })
    }
}

/// The name under which PEFT knows a projection: a module's, or a parameter's where experts stand
/// in one tensor.
pub(super) fn peft_name(config: &ModelConfig, layer: usize, p: Projection) -> String {
    let options = &config.options;
    match p {
        Projection::ExpertGateUp(_) | Projection::ExpertDown(_) => {
            format!("{}.{}", options.layer(layer), p.path())
        }
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
        let settings =
            kind == config.kind && (kind != AdapterKind::Dora || config.true_derivative == dora);
        let mut places = (0..model.num_hidden_layers)
            .flat_map(|l| model.projections(l).into_iter().map(move |p| (l, p)));
        let given: BTreeMap<_, _> = entries.iter().map(|&(l, p, spec)| ((l, p), spec)).collect();
        let outside = [model.options.outside(Outside::Embedding), HEAD_IN_MEMORY];
        let same_outside = outside
            .iter()
            .all(|name| config.spec_outside(name) == beside.adapted.get(*name).copied());
        let saved = |name: &String| config.saves(name) == beside.saved.contains(name);
        let same_outside = same_outside && all_modules(model).iter().all(saved);
        let same =
            config.biases == beside.biases && config.own_bias == beside.own_bias && same_outside;
        settings
            && same
            && places.all(|(l, p)| config.spec_of(model, l, p) == given.get(&(l, p)).copied())
    }
}

/// What an adapter trains beside the projections of layers.
#[derive(Debug, Clone, Default)]
pub(super) struct Beside {
    /// Modules outside the layers with low-rank updates.
    pub adapted: BTreeMap<String, LoraSpec>,
    /// Whether these have DoRA's magnitudes.
    pub dora: bool,
    /// Modules that are trained whole.
    pub saved: Vec<String>,
    /// Which biases are trained.
    pub biases: Biases,
    /// Whether updates have a bias of their own.
    pub own_bias: bool,
}

/// The text of an `adapter_config.json`; `entries` are the adapted projections. Keys of `like` that
/// are not set here are kept; its text is returned as it is if it says the same.
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
    let (own, linear): (Vec<_>, Vec<_>) =
        entries.iter().partition(|(_, p, _)| kind.is_peft() && p.of_experts());
    let modules: BTreeSet<Projection> = linear.iter().map(|&(_, p, _)| p).collect();
    let kinds: BTreeSet<String> = modules.iter().map(|&p| model.options.module_kind(p)).collect();
    // A short name must mean nothing else.
    let named = |p: Projection| kinds.contains(&model.options.module_kind(p));
    let meant = (0..model.num_hidden_layers)
        .flat_map(|l| model.projections(l))
        .filter(|&p| !p.of_experts() && named(p));
    let mut targets: Vec<String> = if linear.len() == meant.count() {
        kinds.into_iter().collect()
    } else {
        linear.iter().map(|&(l, p, _)| module_name(l, p)).collect()
    };
    targets.extend(beside.adapted.keys().cloned());
    let parameters: BTreeSet<String> = own.iter().map(|&(l, p, _)| module_name(l, p)).collect();
    let main = entries
        .first()
        .map(|&(_, _, spec)| spec)
        .or(beside.adapted.values().next().copied())
        .unwrap_or_default();
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    let named = entries.iter().map(|&(l, p, spec)| (module_name(l, p), spec));
    for (name, spec) in named.chain(beside.adapted.iter().map(|(name, spec)| (name.clone(), *spec)))
    {
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
        "bias": beside.biases.name(),
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
        for key in ["layers_to_transform", "layers_pattern", "exclude_modules"] {
            keys.entry(key).and_modify(|layers| *layers = Value::Null);
        }
        value = Value::Object(keys);
    }
    format!("{value:#}\n")
}
