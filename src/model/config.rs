//! Model sizes: the keys of a Hugging Face `config.json`, resolved and checked.

use super::options::{Family, Norm, Options, QueryKeyNorm};
use super::projection::Projection;
use crate::blocks::rope::Scaling;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Sizes and constants of a decoder, and what its layers compute ([`Options`]). Defaults are
/// LLaMA's; a family's own are those of Transformers.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `vocab_size` | required | V | >= 1 |
/// | `hidden_size` | required | D | >= 1, a multiple of the heads |
/// | `intermediate_size` | required | F | >= 1 |
/// | `num_hidden_layers` | required | layers | 1 to 1024 |
/// | `num_attention_heads` | required | H | >= 1 |
/// | `num_key_value_heads` | H | key/value heads | divides H |
/// | `head_dim` | D / H | d | even |
/// | `max_position_embeddings` | 2048 | recorded, not enforced | |
/// | `rms_norm_eps` | 1e-6 | inside the root | > 0 |
/// | `rope_theta` | 10000 | base of the rotary angles | > 0 |
/// | `tie_word_embeddings` | false | output projection = embedding | |
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// V.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// H.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_key_value_heads: usize,
    /// d.
    pub head_dim: usize,
    /// Longest sequence the model was trained for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// What the layers compute; LLaMA's by default.
    pub options: Options,
}

/// Most weights of a model: 2^40, some 10^12. Beyond it sizes are taken for a damaged file, before
/// anything is allocated for them.
const MOST_PARAMETERS: u128 = 1 << 40;

/// Most layers. The deepest published decoders have some hundreds. Beyond this a small file could
/// ask for any amount of memory, since every layer has its own bookkeeping.
const MOST_LAYERS: usize = 1024;

/// The keys of a file, or of an object inside it.
pub(super) struct Keys<'a> {
    pub path: &'a Path,
    /// The object's own key, if it is inside another.
    pub inside: &'a str,
    pub map: &'a Map<String, Value>,
}

/// Sizes that options depend on.
pub(super) struct Sizes {
    pub hidden_size: usize,
    pub layers: usize,
    pub max_position_embeddings: usize,
}

impl<'a> Keys<'a> {
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// The keys of an object under a key.
    pub fn inside(&self, key: &'a str, map: &'a Map<String, Value>) -> Keys<'a> {
        Keys { path: self.path, inside: key, map }
    }

    pub fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.map.get(key).map_or("nothing".into(), Value::to_string);
        let dot = if self.inside.is_empty() { "" } else { "." };
        Error::format(self.path, format!("key {}{dot}{key}", self.inside), expected, found)
    }

    pub fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        match (self.value(key), default) {
            (None, Some(default)) => Ok(default),
            (value, _) => match value.and_then(Value::as_u64) {
                Some(n) if n > 0 && n < (1 << 40) => Ok(n as usize),
                _ => Err(self.wrong(key, "a positive integer")),
            },
        }
    }

    pub fn positive(&self, key: &str, default: f64) -> Result<f64> {
        match self.value(key) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(x) if x > 0.0 && x.is_finite() => Ok(x),
                _ => Err(self.wrong(key, "a positive number")),
            },
        }
    }

    /// A positive number that must be there.
    pub fn needed(&self, key: &str) -> Result<f64> {
        match self.value(key) {
            None => Err(self.wrong(key, "a positive number")),
            Some(_) => self.positive(key, 1.0),
        }
    }

    /// A positive number or null; the default is for a key that is absent.
    pub fn optional(&self, key: &str, default: Option<f64>) -> Result<Option<f64>> {
        match self.map.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.positive(key, 1.0).map(Some),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.value(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// Refuses a key that changes the computation in a way that is not known.
    pub fn refuse_unless(&self, key: &str, known: &[Value]) -> Result<()> {
        match self.value(key) {
            Some(value) if !known.contains(value) => Err(self.wrong(key, "null (not implemented)")),
            _ => Ok(()),
        }
    }

    fn factors(&self, key: &str) -> Result<Vec<f64>> {
        let wrong = || self.wrong(key, "a list of positive numbers");
        let Some(Value::Array(list)) = self.value(key) else { return Err(wrong()) };
        list.iter()
            .map(|v| v.as_f64().filter(|x| *x > 0.0 && x.is_finite()).ok_or_else(wrong))
            .collect()
    }

    /// The scaling of an object `rope_parameters` or `rope_scaling`, and its base.
    pub fn scaling(&self, theta: f64, sizes: &Sizes) -> Result<(Scaling, f64)> {
        let theta = self.positive("rope_theta", theta)?;
        let key = if self.value("rope_type").is_some() { "rope_type" } else { "type" };
        let original =
            || self.size("original_max_position_embeddings", Some(sizes.max_position_embeddings));
        let kind = self.value(key).and_then(Value::as_str).unwrap_or("default");
        let scaling = match kind {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: self.needed("factor")? },
            "dynamic" => Scaling::Dynamic {
                factor: self.needed("factor")?,
                original: sizes.max_position_embeddings,
            },
            "llama3" => {
                let (low, high) =
                    (self.needed("low_freq_factor")?, self.needed("high_freq_factor")?);
                if !(high > low) {
                    return Err(self.wrong("high_freq_factor", "more than low_freq_factor"));
                }
                Scaling::Llama3 { factor: self.needed("factor")?, low, high, original: original()? }
            }
            "yarn" => {
                for key in ["mscale", "mscale_all_dim"] {
                    self.refuse_unless(key, &[])?;
                }
                Scaling::Yarn {
                    factor: self.needed("factor")?,
                    original: original()?,
                    fast: self.positive("beta_fast", 32.0)?,
                    slow: self.positive("beta_slow", 1.0)?,
                    attention: self.optional("attention_factor", None)?,
                    truncate: self.flag("truncate", true)?,
                }
            }
            "longrope" => Scaling::LongRope {
                short: self.factors("short_factor")?,
                long: self.factors("long_factor")?,
                original: original()?,
                factor: self.positive(
                    "factor",
                    sizes.max_position_embeddings as f64 / original()? as f64,
                )?,
                attention: self.optional("attention_factor", None)?,
            },
            _ => return Err(self.wrong(key, "default, linear, dynamic, llama3, yarn or longrope")),
        };
        Ok((scaling, theta))
    }
}

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the file and the key for JSON that is broken, a key
    /// that is missing or out of range, an unknown family, heads that do not divide the width, and
    /// features that are not implemented (another activation, a rotary embedding of a part of the
    /// head, a quantization other than bitsandbytes' NF4 and int8).
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::from_json(path, &text)
    }

    /// As [`ModelConfig::read`] for text already in memory; `path` only serves messages.
    ///
    /// # Errors
    /// [`Error::Format`].
    pub fn from_json(path: &Path, text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|e| Error::format(path, "file", "a JSON object", e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(Error::format(path, "file", "a JSON object", "another JSON value"));
        };
        let keys = Keys { path, inside: "", map: &map };
        let family = match keys.value("model_type") {
            None => Family::Llama,
            Some(value) => {
                Family::ALL.into_iter().find(|f| value == f.model_type()).ok_or_else(|| {
                    keys.wrong(
                        "model_type",
                        &format!("one of {}", Family::ALL.map(Family::model_type).join(", ")),
                    )
                })?
            }
        };
        let size = |key: &'static str, default: Option<usize>| match (family.key(key), default) {
            (None, Some(default)) => Ok(default),
            (own, default) => keys.size(own.unwrap_or(key), default),
        };
        let (hidden_size, heads) = (size("hidden_size", None)?, size("num_attention_heads", None)?);
        let head_dim = match (
            keys.value("head_dim").filter(|_| family.key("head_dim").is_some()),
            family.default_head_dim(),
        ) {
            (Some(_), _) => keys.size("head_dim", None)?,
            (None, Some(width)) => width,
            (None, None) if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            (None, None) => {
                let expected = format!("a divisor of hidden_size = {hidden_size}");
                return Err(keys.wrong("num_attention_heads", &expected));
            }
        };
        let layers = size("num_hidden_layers", None)?;
        if layers > MOST_LAYERS {
            return Err(keys.wrong(
                family.key("num_hidden_layers").unwrap_or_default(),
                &format!("at most {MOST_LAYERS} layers"),
            ));
        }
        let max_position_embeddings = size(
            "max_position_embeddings",
            Some(if family == Family::Gpt2 { 1024 } else { 2048 }),
        )?;
        let sizes = Sizes { hidden_size, layers, max_position_embeddings };
        let (options, rope_theta) = Options::resolve(family, &keys, &sizes)?;
        let config = Self {
            vocab_size: keys.size("vocab_size", None)?,
            hidden_size,
            intermediate_size: size(
                "intermediate_size",
                (family == Family::Gpt2).then_some(4 * hidden_size),
            )?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: size("num_key_value_heads", Some(heads))?,
            head_dim,
            max_position_embeddings,
            rms_norm_eps: match family.key("rms_norm_eps") {
                Some(key) => keys.positive(key, family.default_eps())?,
                None => family.default_eps(),
            },
            rope_theta,
            tie_word_embeddings: keys.flag("tie_word_embeddings", family.tied_by_default())?,
            options,
        };
        if !heads.is_multiple_of(config.num_key_value_heads) {
            return Err(keys.wrong(
                "num_key_value_heads",
                &format!("a divisor of num_attention_heads = {heads}"),
            ));
        }
        if !config.head_dim.is_multiple_of(2) {
            let expected = "an even head width (hidden_size / num_attention_heads when absent)";
            return Err(Error::format(path, "key head_dim", expected, config.head_dim.to_string()));
        }
        match config.counted_parameters() {
            Some(n) if n <= MOST_PARAMETERS => Ok(config),
            n => {
                let found = n.map_or("more than 2^128".into(), |n| n.to_string());
                let expected = format!("sizes of at most {MOST_PARAMETERS} weights in all");
                Err(Error::format(
                    path,
                    "hidden_size, intermediate_size, vocab_size, ...",
                    expected,
                    found,
                ))
            }
        }
    }

    /// Refuses sizes that contradict each other, for a config made in code.
    ///
    /// # Errors
    /// [`Error::Format`] as [`ModelConfig::from_json`].
    pub fn check(&self) -> Result<()> {
        Self::from_json(Path::new("config"), &self.to_json("float32")).map(|_| ())
    }

    /// The `config.json` that Transformers reads; `dtype` is the precision of the tensors beside
    /// it.
    pub fn to_json(&self, dtype: &str) -> String {
        if let Some(source) = self.options.source() {
            let mut map = source.clone();
            let sizes = [
                ("vocab_size", self.vocab_size),
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("num_hidden_layers", self.num_hidden_layers),
                ("num_attention_heads", self.num_attention_heads),
                ("num_key_value_heads", self.num_key_value_heads),
                ("head_dim", self.head_dim),
                ("max_position_embeddings", self.max_position_embeddings),
            ];
            let own = |(key, size)| Some((self.options.family.key(key)?.to_string(), json!(size)));
            map.extend(sizes.into_iter().filter_map(own));
            // What is written is not quantized.
            map.remove("quantization_config");
            map.insert("tie_word_embeddings".into(), json!(self.tie_word_embeddings));
            for key in ["dtype", "torch_dtype"].into_iter().filter(|key| source.contains_key(*key))
            {
                map.insert(key.into(), json!(dtype));
            }
            return format!("{:#}\n", Value::Object(map));
        }
        let value = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "attention_dropout": 0.0,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
        });
        format!("{value:#}\n")
    }

    /// The projections of a layer, in the order in which they are updated.
    pub fn projections(&self, layer: usize) -> Vec<Projection> {
        self.options.projections(layer)
    }

    /// Every projection that some layer has.
    pub fn all_projections(&self) -> Vec<Projection> {
        let mut all: Vec<Projection> =
            (0..self.num_hidden_layers).flat_map(|l| self.projections(l)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Shape (out, in) of a projection.
    pub fn projection_shape(&self, projection: Projection) -> (usize, usize) {
        use Projection::*;
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (query, key) =
            (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let (experts, expert) =
            self.options.experts.as_ref().map_or((0, 0), |e| (e.count, e.inner));
        match projection {
            Query => (query, hidden),
            Key | Value => (key, hidden),
            QueryKeyValue => (query + 2 * key, hidden),
            Output => (hidden, query),
            Gate | Up => (inner, hidden),
            GateUp => (2 * inner, hidden),
            Down => (hidden, inner),
            Router => (experts, hidden),
            ExpertGateUp(_) => (2 * expert, hidden),
            ExpertDown(_) => (hidden, expert),
        }
    }

    /// Width of a norm of a layer; `None` if there is none.
    pub fn norm_width(&self, norm: Norm) -> Option<usize> {
        self.options.norm_name(norm)?;
        let heads = match (norm, self.options.query_key_norm) {
            (Norm::Query | Norm::Key, QueryKeyNorm::Head) => 1,
            (Norm::Query, _) => self.num_attention_heads,
            (Norm::Key, _) => self.num_key_value_heads,
            _ => return Some(self.hidden_size),
        };
        Some(heads * self.head_dim)
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        self.counted_parameters().and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX)
    }

    /// Number of weights; `None` if it overflows, which the sizes of an unchecked file may make it.
    fn counted_parameters(&self) -> Option<u128> {
        let [hidden, vocabulary] = [self.hidden_size, self.vocab_size].map(|n| n as u128);
        let product = |a: usize, b: usize| (a as u128).checked_mul(b as u128);
        // Sizes are below 2^40, so that sums of a few of them stay below 2^64.
        let mut total = hidden
            .checked_mul(vocabulary)?
            .checked_mul(if self.tie_word_embeddings { 1 } else { 2 })?;
        let norm = |width: usize| width as u128 * if self.options.layer_norm { 2 } else { 1 };
        total = total.checked_add(norm(self.hidden_size))?;
        if let Some(offset) = self.options.positions {
            total = total
                .checked_add(product(self.max_position_embeddings + offset, self.hidden_size)?)?;
        }
        let layer = |l: usize| -> Option<u128> {
            let mut sum: u128 =
                Norm::ALL.iter().filter_map(|&of| self.norm_width(of)).map(norm).sum();
            sum += if self.options.sinks { self.num_attention_heads as u128 } else { 0 };
            for p in self.projections(l) {
                let (out, input) = self.projection_shape(p);
                sum = sum.checked_add(product(out, input)?)?;
                sum += if self.options.has_bias(p) { out as u128 } else { 0 };
            }
            Some(sum)
        };
        // Layers are of at most two kinds: count one of each.
        for dense in [true, false] {
            let mut of_kind = (0..self.num_hidden_layers)
                .filter(|&l| self.options.experts_of(l).is_none() == dense);
            if let Some(first) = of_kind.next() {
                let times = 1 + of_kind.count() as u128;
                total = total.checked_add(layer(first)?.checked_mul(times)?)?;
            }
        }
        Some(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(edit: impl FnOnce(&mut Map<String, Value>)) -> String {
        let mut value = json!({"vocab_size": 61, "hidden_size": 32, "intermediate_size": 56,
            "num_hidden_layers": 2, "num_attention_heads": 4});
        edit(value.as_object_mut().unwrap());
        value.to_string()
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = ModelConfig::from_json(Path::new("c.json"), &text(|_| {})).unwrap();
        assert_eq!(
            (config.num_key_value_heads, config.head_dim, config.max_position_embeddings),
            (4, 8, 2048)
        );
        assert!(
            (config.rms_norm_eps - 1e-6).abs() < 1e-20 && (config.rope_theta - 1e4).abs() < 1e-9
        );
        assert!(!config.tie_word_embeddings);
        let again =
            ModelConfig::from_json(Path::new("d.json"), &config.to_json("float64")).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn every_bad_key_is_named_with_its_file() {
        let cases: [(&str, Value, &str); 24] = [
            ("vocab_size", Value::Null, "positive integer"),
            ("hidden_size", json!(0), "positive integer"),
            ("num_hidden_layers", json!("two"), "positive integer"),
            ("num_attention_heads", json!(5), "divisor of hidden_size = 32"),
            ("num_key_value_heads", json!(3), "divisor of num_attention_heads = 4"),
            ("head_dim", json!(7), "even"),
            ("rms_norm_eps", json!(-1e-5), "positive number"),
            ("rope_theta", json!("big"), "positive number"),
            ("rope_scaling", json!({"type": "yarn"}), "rope_parameters.factor"),
            ("rope_scaling", json!({"type": "spiral", "factor": 4.0}), "longrope"),
            (
                "rope_parameters",
                json!({"rope_type": "llama3", "factor": 8.0}),
                "rope_parameters.low_freq_factor",
            ),
            (
                "rope_parameters",
                json!({"rope_type": "longrope", "short_factor": [1.0]}),
                "long_factor",
            ),
            ("rope_parameters", json!({"partial_rotary_factor": 0.5}), "1 for this family"),
            ("rope_parameters", json!(3), "an object"),
            ("hidden_act", json!("gelu"), "silu"),
            ("attention_bias", json!("yes"), "true or false"),
            ("sliding_window", json!(6), "null for this family"),
            ("use_bidirectional_attention", json!(true), "not implemented"),
            ("quantization_config", json!({"bits": 4}), "load_in_4bit"),
            ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "quant_method"),
            ("quantization_config", json!({"load_in_4bit": true}), "bnb_4bit_quant_type"),
            (
                "quantization_config",
                json!({"load_in_8bit": true, "llm_int8_has_fp16_weight": true}),
                "fp16_weight",
            ),
            ("model_type", json!("bloom"), "gemma3_text, olmo2, granite, smollm3"),
            ("tie_word_embeddings", json!("yes"), "true or false"),
        ];
        for (key, value, expected) in cases {
            let broken = text(|map| {
                map.insert(key.into(), value);
            });
            let message = ModelConfig::from_json(Path::new("some/config.json"), &broken)
                .unwrap_err()
                .to_string();
            assert!(
                message.contains("some/config.json") && message.contains(expected),
                "{message}"
            );
            assert!(
                message.contains(key) || message.contains("rope_parameters"),
                "{key}: {message}"
            );
        }
        for (family, key, value, expected) in [
            ("mistral", "sliding_window", json!(0), "a positive integer"),
            ("gemma2", "layer_types", json!(["sliding_attention"]), "one for each of 2 layers"),
            ("gemma2", "attn_logit_softcapping", json!(-1), "a positive number"),
            ("smollm3", "no_rope_layers", json!([1, 2]), "0 or 1 for each layer"),
            ("gemma", "hidden_activation", json!("relu"), "gelu_pytorch_tanh"),
            ("granite", "residual_multiplier", json!(0), "a positive number"),
        ] {
            let broken = text(|map| {
                map.insert("model_type".into(), json!(family));
                map.insert(key.into(), value);
            });
            let message =
                ModelConfig::from_json(Path::new("c.json"), &broken).unwrap_err().to_string();
            assert!(message.contains(key) && message.contains(expected), "{message}");
        }
        let deep = text(|map| {
            map.insert("num_hidden_layers".into(), json!(99_999_999));
        });
        match ModelConfig::from_json(Path::new("c.json"), &deep) {
            Err(Error::Format { field, expected, found, .. }) => {
                let want = ("key num_hidden_layers", "at most 1024 layers", "99999999");
                assert_eq!((field.as_str(), expected.as_str(), found.as_str()), want);
            }
            other => panic!("{other:?}"),
        }
        let huge = text(|map| {
            map.insert("vocab_size".into(), json!(1u64 << 39));
        });
        let message = ModelConfig::from_json(Path::new("c.json"), &huge).unwrap_err().to_string();
        assert!(message.contains("1099511627776 weights"), "{message}");
        assert!(
            ModelConfig::from_json(Path::new("c.json"), "[1]")
                .unwrap_err()
                .to_string()
                .contains("JSON object")
        );
    }
}
