//! `manifest.json` of a dump: what the tensors beside it are (format version 1).

use super::own_forward::OwnForward;
use super::precision::Precision;
use super::ranks::Parallel;
use super::reference::Restored;
use crate::error::{Error, Result};
use crate::train::optimizer::{OptimizerKind, OptimizerParams};
use serde::Deserialize;
use std::path::Path;

/// The format's name.
pub const FORMAT: &str = "peft-limits-dump";
/// The version that this crate reads.
pub const VERSION: u64 = 1;

/// How the loss was to be reduced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Mean over all counted positions of the step.
    #[default]
    Mean,
    /// Sum over them.
    Sum,
    /// Mean over micro-batches of each one's mean.
    MicroMean,
}

/// Precision of the trainer's computation.
#[derive(Debug, Clone, PartialEq, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Compute {
    /// Format of the base weights.
    pub weights: Option<String>,
    /// Format to which autocast casts the inputs of matrix products, if it is on.
    pub autocast: Option<String>,
    /// Format of norms, rotary angles, softmax and loss where it is not that of the weights.
    pub internals: Option<String>,
    /// Formats of the products with quantized weights, if the base has any.
    pub quantized: Option<Quantized>,
}

/// Formats of the products with quantized weights.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantized {
    /// Of their inputs and outputs.
    pub compute: String,
    /// Of the weights restored for the forward pass.
    pub forward: String,
    /// Of those restored for the backward pass.
    pub backward: String,
}

impl Quantized {
    /// The formats.
    ///
    /// # Errors
    /// As [`Precision::parse`].
    pub fn restored(&self) -> Result<Restored> {
        let [compute, forward, backward] =
            [&self.compute, &self.forward, &self.backward].map(|n| Precision::parse(n));
        Ok(Restored { compute: compute?, forward: forward?, backward: backward? })
    }
}

/// The loss of the step.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Loss {
    /// The reduction.
    pub reduction: Reduction,
    /// Rows of each micro-batch in order; one micro-batch when empty.
    pub micro_batch_rows: Vec<usize>,
    /// Factor that the gradients still carry (loss scaling).
    pub scale: f64,
    /// `cross_entropy` where the trainer differentiates the model's own loss with these labels;
    /// absent where the loss is made elsewhere and may be another one.
    pub kind: Option<String>,
    /// Part of each label that is spread over the vocabulary.
    pub label_smoothing: f64,
    /// Factor of the squared log-sum-exp.
    pub z_loss: f64,
    /// What the sum of a mean is divided by, where that is not the number of counted tokens.
    pub divisor: Option<f64>,
    /// What the sum of each micro-batch is divided by, where the reduction does not say it: in a
    /// step of several processes.
    pub micro_batch_divisors: Vec<f64>,
}

impl Default for Loss {
    fn default() -> Self {
        Self {
            reduction: Reduction::Mean,
            micro_batch_rows: Vec::new(),
            scale: 1.0,
            kind: None,
            label_smoothing: 0.0,
            z_loss: 0.0,
            divisor: None,
            micro_batch_divisors: Vec::new(),
        }
    }
}

/// Settings of some parameters.
#[derive(Debug, Clone, PartialEq, Deserialize, Default)]
#[serde(default)]
pub struct ParameterGroup {
    /// Their names; every parameter when empty.
    pub parameters: Vec<String>,
    /// Learning rate.
    pub lr: f64,
    /// Decay of AdamW's moments, likewise.
    #[serde(deserialize_with = "two_numbers")]
    pub betas: Option<(f64, f64)>,
    /// AdamW's eps; other optimizers' groups may hold something else under that name.
    #[serde(deserialize_with = "one_number")]
    pub eps: Option<f64>,
    /// Weight decay.
    pub weight_decay: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// The update ascends: the gradient is negated first.
    pub maximize: bool,
    /// Variants that are not implemented here.
    amsgrad: bool,
    nesterov: bool,
    dampening: f64,
}

fn one_number<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<f64>, D::Error> {
    Ok(serde_json::Value::deserialize(from)?.as_f64())
}

fn two_numbers<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<(f64, f64)>, D::Error> {
    Ok(serde_json::from_value(serde_json::Value::deserialize(from)?).ok())
}

/// The optimizer that made the parameters after the step.
#[derive(Debug, Clone, PartialEq, Deserialize, Default)]
#[serde(default)]
pub struct OptimizerRecord {
    /// `adamw`, `adam` (without weight decay) or `sgd`.
    pub kind: String,
    /// Updates before this step.
    pub steps_before: u64,
    /// Settings.
    pub groups: Vec<ParameterGroup>,
}

impl OptimizerRecord {
    /// The record of a first update with this crate's settings.
    pub fn of(params: &OptimizerParams) -> Self {
        let group = ParameterGroup {
            lr: params.lr,
            betas: Some((params.beta1, params.beta2)),
            eps: Some(params.eps),
            weight_decay: params.weight_decay,
            momentum: params.momentum,
            ..ParameterGroup::default()
        };
        let kind = match params.kind {
            OptimizerKind::AdamW => "adamw",
            OptimizerKind::Sgd => "sgd",
        };
        Self { kind: kind.into(), steps_before: 0, groups: vec![group] }
    }

    /// Whether every group ascends.
    pub fn maximizes(&self) -> bool {
        !self.groups.is_empty() && self.groups.iter().all(|group| group.maximize)
    }

    /// The settings of a group as this crate's optimizer takes them, or why it does not have them.
    pub fn params(&self, group: &ParameterGroup) -> std::result::Result<OptimizerParams, String> {
        let kind = match self.kind.as_str() {
            "adamw" => OptimizerKind::AdamW,
            "adam" if group.weight_decay.abs() < f64::MIN_POSITIVE => OptimizerKind::AdamW,
            "sgd" => OptimizerKind::Sgd,
            "adam" => return Err("Adam with coupled weight decay is not implemented".into()),
            other => {
                return Err(format!("optimizer {other} is not implemented (adamw, adam, sgd)"));
            }
        };
        for (name, on) in [
            ("amsgrad", group.amsgrad),
            ("nesterov", group.nesterov),
            ("dampening", group.dampening.abs() > 0.0),
        ] {
            if on {
                return Err(format!("{} with {name} is not implemented", self.kind));
            }
        }
        let (beta1, beta2) = group.betas.unwrap_or((0.9, 0.999));
        Ok(OptimizerParams {
            kind,
            lr: group.lr,
            beta1,
            beta2,
            eps: group.eps.unwrap_or(1e-8),
            weight_decay: group.weight_decay,
            momentum: group.momentum,
            clip: 0.0,
        })
    }
}

/// A parsed manifest.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u64,
    /// The program that wrote the dump.
    #[serde(default)]
    pub made_by: String,
    /// Folder of the base model, relative to the dump or absolute.
    pub model: String,
    /// Folder of the adapter, likewise.
    #[serde(default)]
    pub adapter: Option<String>,
    /// Names of the trained parameters; those that have a gradient, or the adapter's, when absent.
    #[serde(default)]
    pub trained: Option<Vec<String>>,
    /// Precision.
    #[serde(default)]
    pub compute: Compute,
    /// Loss.
    #[serde(default)]
    pub loss: Loss,
    /// Optimizer, if a step was made.
    #[serde(default)]
    pub optimizer: Option<OptimizerRecord>,
    /// Backward against differences of the trainer's own forward, if that was looked at.
    #[serde(default)]
    pub check: Option<OwnForward>,
    /// What this process held, of several that made the step.
    #[serde(default)]
    pub parallel: Option<Parallel>,
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the key: another format or version, an unknown key,
    /// a dtype that does not exist, a loss scale that is not positive.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let wrong = |field: &str, expected: &str, found: String| {
            Error::format(path, field, expected, found)
        };
        let value: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| wrong("file", "a JSON object", e.to_string()))?;
        let found = |key: &str| value.get(key).map_or("nothing".into(), ToString::to_string);
        if value.get("format").and_then(|v| v.as_str()) != Some(FORMAT) {
            return Err(wrong("key format", &format!("\"{FORMAT}\""), found("format")));
        }
        if value.get("version").and_then(serde_json::Value::as_u64) != Some(VERSION) {
            let fix = format!("{VERSION}; dump again with the Python package of this version");
            return Err(wrong("key version", &fix, found("version")));
        }
        let manifest: Self = serde_json::from_value(value)
            .map_err(|e| wrong("file", "a dump manifest of version 1", e.to_string()))?;
        let quantized = manifest.compute.quantized.clone();
        let [compute, forward, backward] = quantized
            .map_or([const { None }; 3], |q| [Some(q.compute), Some(q.forward), Some(q.backward)]);
        for (key, dtype) in [
            ("compute.quantized.compute", &compute),
            ("compute.quantized.forward", &forward),
            ("compute.quantized.backward", &backward),
            ("compute.weights", &manifest.compute.weights),
            ("compute.autocast", &manifest.compute.autocast),
            ("compute.internals", &manifest.compute.internals),
        ] {
            if let Some(dtype) = dtype {
                Precision::parse(dtype).map_err(|_| {
                    wrong(key, "float64, float32, bfloat16 or float16", dtype.clone())
                })?;
            }
        }
        if !(manifest.loss.scale > 0.0) || !manifest.loss.scale.is_finite() {
            return Err(wrong("loss.scale", "a positive number", manifest.loss.scale.to_string()));
        }
        let Loss { label_smoothing, z_loss, divisor, .. } = manifest.loss;
        if !(0.0..1.0).contains(&label_smoothing) {
            return Err(wrong(
                "loss.label_smoothing",
                "at least 0 and below 1",
                label_smoothing.to_string(),
            ));
        }
        if !z_loss.is_finite() {
            return Err(wrong("loss.z_loss", "a number", z_loss.to_string()));
        }
        if let Some(divisor) = divisor.filter(|d| !(*d > 0.0) || !d.is_finite()) {
            return Err(wrong("loss.divisor", "a positive number", divisor.to_string()));
        }
        Ok(manifest)
    }
}
