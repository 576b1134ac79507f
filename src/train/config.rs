//! The configuration of a run: one TOML file, every key with a default, unknown keys refused.
//!
//! ```
//! use peft_limits::train::config::TrainConfig;
//! let config = TrainConfig::from_toml("quick.toml", r#"
//!     seed = 3
//!     [model]
//!     preset = "nano"
//!     [train]
//!     steps = 200
//!     batch = 16
//!     [optimizer]
//!     lr = 2e-3
//!     [[data]]
//!     task = "lists"
//!     length = 4
//! "#)?;
//! assert_eq!((config.seed, config.train.steps, config.train.accumulation), (3, 200, 1));
//! let text = TrainConfig::from_toml("quick.toml", "[train]\nstep = 5\n").unwrap_err().to_string();
//! assert!(text.contains("quick.toml") && text.contains("unknown field `step`"));
//! # Ok::<(), peft_limits::Error>(())
//! ```

use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::train::method::{MethodName, MethodParams};
use crate::train::optimizer::OptimizerParams;
use crate::train::preset::preset;
use crate::train::schedule::ScheduleParams;
use crate::train::tasks::mixture::{Part, TaskParams};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Precision of the arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Single.
    #[default]
    F32,
    /// Double.
    F64,
}

/// Where the model comes from: exactly one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum ModelSource {
    /// Random weights of a preset size ([`crate::train::preset`]).
    Preset(String),
    /// Random weights of the sizes in a Hugging Face `config.json`.
    Config(PathBuf),
    /// A Hugging Face checkpoint folder.
    Path(PathBuf),
}

impl Default for ModelSource {
    fn default() -> Self {
        Self::Preset("nano".into())
    }
}

impl ModelSource {
    /// The sizes.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key if nothing is there; as [`preset`] or
    /// [`ModelConfig::read`].
    pub fn sizes(&self) -> Result<ModelConfig> {
        let absent = |key: &str, path: &Path, what: &str| {
            Error::invalid(
                format!("model.{key}"),
                path.display(),
                format!("must be {what} that exists"),
            )
        };
        match self {
            Self::Preset(name) => preset(name),
            Self::Config(path) if !path.exists() => Err(absent("config", path, "a config.json")),
            Self::Config(path) => ModelConfig::read(path),
            Self::Path(folder) if !folder.exists() => {
                Err(absent("path", folder, "a checkpoint folder"))
            }
            Self::Path(folder) => ModelConfig::read(&folder.join("config.json")),
        }
    }
}

/// Length, batching, evaluation and saving of a run.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `steps` | 1000 | optimizer updates | 1 to 2^32 |
/// | `batch` | 32 | rows per forward pass | 1 to 2^16 |
/// | `accumulation` | 1 | forward passes per update | 1 to 2^15 |
/// | `length` | 256 | most tokens per row | 2 to 2^20 |
/// | `fixed_width` | false | pad every batch to `length` rather than to its longest row | |
/// | `truncate` | false | cut longer rows rather than refuse them | |
/// | `checkpointing` | false | activation checkpointing: less memory, one more forward | |
/// | `bf16_storage` | false | emulate bf16 storage ([`crate::train::storage`]) | |
/// | `dtype` | `f32` | arithmetic | `f32`, `f64` |
/// | `target_loss` | 0 | stop once the loss of a step is at most this; 0 is off | >= 0 |
/// | `eval_every` | 0 | steps between evaluations; 0: only at the end | |
/// | `eval_rows` | 256 | rows per task and split in an evaluation; 0 turns it off | |
/// | `save_every` | 100 | steps between checkpoints, the two latest of which are kept; 0: only at the end | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunParams {
    /// Optimizer updates.
    pub steps: u64,
    /// Rows per forward pass.
    pub batch: usize,
    /// Forward passes per update.
    pub accumulation: usize,
    /// Most tokens per row.
    pub length: usize,
    /// Pad every batch to `length`.
    pub fixed_width: bool,
    /// Cut longer rows.
    pub truncate: bool,
    /// Activation checkpointing.
    pub checkpointing: bool,
    /// Emulate bf16 storage.
    pub bf16_storage: bool,
    /// Arithmetic.
    pub dtype: Dtype,
    /// Loss at which to stop; 0 is off.
    pub target_loss: f64,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// Rows per task and split.
    pub eval_rows: usize,
    /// Steps between checkpoints; 0: only at the end.
    pub save_every: u64,
}

impl Default for RunParams {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch: 32,
            accumulation: 1,
            length: 256,
            fixed_width: false,
            truncate: false,
            checkpointing: false,
            bf16_storage: false,
            dtype: Dtype::F32,
            target_loss: 0.0,
            eval_every: 0,
            eval_rows: 256,
            save_every: 100,
        }
    }
}

/// A whole run.
///
/// | table | default | purpose |
/// |---|---|---|
/// | `seed` | 1 | every random choice is a function of it |
/// | `model` | `preset = "nano"` | one of `preset`, `config` (random weights), `path` (checkpoint) |
/// | `method` | full | [`MethodParams`] |
/// | `optimizer` | AdamW, lr 1e-3 | [`OptimizerParams`] |
/// | `schedule` | constant | [`ScheduleParams`] |
/// | `train` | | [`RunParams`] |
/// | `data` | the pretraining mixture | list of [`Part`]: what is trained on |
/// | `retain` | none | list of [`Part`]: what is only tested, to measure forgetting |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Every random choice is a function of it.
    pub seed: u64,
    /// Where the model comes from.
    pub model: ModelSource,
    /// How it is adapted.
    pub method: MethodParams,
    /// Update rule.
    pub optimizer: OptimizerParams,
    /// Learning-rate schedule.
    pub schedule: ScheduleParams,
    /// Length, batching, evaluation, saving.
    pub train: RunParams,
    /// What is trained on.
    pub data: Vec<Part>,
    /// What is only tested.
    pub retain: Vec<Part>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            model: ModelSource::default(),
            method: MethodParams::default(),
            optimizer: OptimizerParams::default(),
            schedule: ScheduleParams::default(),
            train: RunParams::default(),
            data: TaskParams::pretraining(),
            retain: Vec::new(),
        }
    }
}

/// Keys of `train` that may change between a run and its continuation.
const FREE_ON_RESUME: [&str; 3] = ["eval_every", "eval_rows", "save_every"];

impl TrainConfig {
    /// Reads and checks a TOML file.
    ///
    /// # Errors
    /// [`Error::Io`]; as [`TrainConfig::from_toml`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::from_toml(path, &text)
    }

    /// As [`TrainConfig::read`] for text in memory; `path` only serves messages.
    ///
    /// # Errors
    /// [`Error::Format`] with the parser's line and key; as [`TrainConfig::check`].
    pub fn from_toml(path: impl AsRef<Path>, text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
            let field = line.map_or("configuration".to_string(), |n| format!("line {n}"));
            Error::format(path, field, "a training configuration", e.message())
        })?;
        config.check()?;
        Ok(config)
    }

    /// The configuration as TOML, every default spelled out.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if a value has no TOML form (a path that is not UTF-8).
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self)
            .map_err(|e| Error::invalid("configuration", e, "must have a TOML form"))
    }

    /// Checks the ranges and what must fit together, before anything is computed.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key.
    pub fn check(&self) -> Result<()> {
        let run = &self.train;
        // The upper ends keep the number of every row below 2^64 and refuse a damaged file before
        // it allocates.
        let ranges = [
            ("steps", run.steps, 1, 1 << 32),
            ("batch", run.batch as u64, 1, 1 << 16),
            ("accumulation", run.accumulation as u64, 1, 1 << 15),
            ("length", run.length as u64, 2, 1 << 20),
        ];
        for (name, value, least, most) in ranges {
            if value < least || value > most {
                let requirement = format!("must be at least {least} and at most {most}");
                return Err(Error::invalid(format!("train.{name}"), value, requirement));
            }
        }
        if !(run.target_loss >= 0.0) {
            return Err(Error::invalid("train.target_loss", run.target_loss, "must be at least 0"));
        }
        self.optimizer.check::<f32>()?;
        self.schedule.check(run.steps)?;
        self.method.check()?;
        let random = !matches!(self.model, ModelSource::Path(_));
        if random && self.method.name != MethodName::Full {
            let requirement =
                "adapts a trained model: give model.path (pretrain one with method full first)";
            return Err(Error::invalid("method.name", self.method.name.name(), requirement));
        }
        Ok(())
    }

    /// The first key in which a continued run differs from the one that was saved, with both
    /// values.
    pub fn difference(&self, saved: &Self) -> Option<(String, String, String)> {
        let flat = |config: &Self| {
            let mut rows = Vec::new();
            if let Ok(value) = serde_json::to_value(config) {
                flatten("", &value, &mut rows);
            }
            rows.retain(|(key, _)| {
                !FREE_ON_RESUME.iter().any(|free| key == &format!("train.{free}"))
            });
            rows.retain(|(key, _)| !key.starts_with("retain"));
            rows
        };
        let (now, then) = (flat(self), flat(saved));
        let at = |rows: &[(String, String)], key: &str| {
            rows.iter().find(|(k, _)| k == key).map_or("absent".to_string(), |(_, v)| v.clone())
        };
        now.iter().chain(&then).find_map(|(key, _)| {
            let (a, b) = (at(&now, key), at(&then, key));
            (a != b).then(|| (key.clone(), a, b))
        })
    }
}

fn flatten(prefix: &str, value: &serde_json::Value, rows: &mut Vec<(String, String)>) {
    let join =
        |key: &str| if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
    match value {
        serde_json::Value::Object(map) => map.iter().for_each(|(k, v)| flatten(&join(k), v, rows)),
        serde_json::Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, v)| flatten(&join(&i.to_string()), v, rows))
        }
        other => rows.push((prefix.to_string(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<TrainConfig> {
        TrainConfig::from_toml("c.toml", text)
    }

    #[test]
    fn the_resolved_configuration_reads_back() {
        let config = parse(
            "[model]\npath = \"runs/base\"\n[method]\nname = \"lora\"\nrank = \
                            4\ntargets = [\"q_proj\"]\n[[data]]\ntask = \"facts\"\n",
        )
        .unwrap();
        assert_eq!(config.method.name, MethodName::Lora);
        let text = config.to_toml().unwrap();
        assert_eq!(parse(&text).unwrap(), config, "{text}");
        assert_eq!(parse("").unwrap(), TrainConfig::default());
    }

    #[test]
    fn errors_name_the_line_or_the_key() {
        for (text, words) in [
            ("seed = 1\n[train]\nsteps = \"x\"\n", ["line 3", "c.toml"]),
            ("\n[optimizer]\nlearning_rate = 1\n", ["learning_rate", "line 3"]),
            ("[model]\npreset = \"nano\"\npath = \"x\"\n", ["c.toml", "line"]),
            ("[train]\nsteps = 0\n", ["train.steps", "at least 1"]),
            ("[train]\nbatch = 65537\n", ["train.batch", "at most 65536"]),
            ("[train]\nlength = 1\n", ["train.length", "at least 2"]),
            ("[train]\ntarget_loss = nan\n", ["train.target_loss", "at least 0"]),
            ("[optimizer]\nlr = -1\n", ["optimizer.lr", "positive"]),
            ("[schedule]\nwarmup = 2000\n", ["schedule.warmup", "1000"]),
            ("[method]\nname = \"lora\"\n", ["method.name", "model.path"]),
            (
                "[model]\npath = \"x\"\n[method]\nname = \"paca\"\nselection = \"best\"\n",
                ["selection", "best"],
            ),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(words.iter().all(|w| message.contains(w)), "{message}");
        }
    }

    #[test]
    fn differences_are_found_except_where_free() {
        let a = TrainConfig::default();
        let mut b = a.clone();
        b.train.save_every = 7;
        b.train.eval_rows = 1;
        assert_eq!(b.difference(&a), None);
        b.optimizer.lr = 0.5;
        assert_eq!(b.difference(&a), Some(("optimizer.lr".into(), "0.5".into(), "0.001".into())));
        let mut c = a.clone();
        c.data.pop();
        assert_eq!(c.difference(&a).unwrap().1, "absent");
    }
}
