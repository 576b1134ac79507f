//! A trainer's tensors as the reference model holds them: experts that stand in one tensor are
//! taken apart, weights that are stored transposed are turned.

use super::dump::Observed;
use super::names::canonical_name;
use crate::adapters::Method;
use crate::error::Result;
use crate::model::{Model, Outside, Projection};
use ndarray::{Array2, s};

/// How the tensors of a model's experts stand in a trainer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stack {
    /// Weights, experts x out x in, or experts x in x out.
    Weight { turned: bool },
    /// Biases, experts x out.
    Bias,
    /// A of low-rank updates, one expert after the other.
    A,
    /// B, the expert being the fastest index of a column.
    B,
}

/// A stacked tensor: the layer, whether it belongs to down, and what it holds.
struct Stacked {
    layer: usize,
    down: bool,
    stack: Stack,
}

impl Stacked {
    /// What a trainer's name means, if it is the name of a stack.
    fn of(raw: &str, model: &Model<f64>) -> Option<Self> {
        let name = canonical_name(raw);
        let config = &model.config;
        let layer = (0..config.num_hidden_layers)
            .find(|&l| name.starts_with(&format!("{}.mlp.experts.", config.options.layer(l))))?;
        let turned = config.options.experts_of(layer)?.input_first;
        let tensor = name.rsplit('.').next()?;
        let (down, stack) = match tensor {
            "gate_up_proj" => (false, Stack::Weight { turned }),
            "down_proj" => (true, Stack::Weight { turned }),
            "gate_up_proj_bias" => (false, Stack::Bias),
            "down_proj_bias" => (true, Stack::Bias),
            "lora_A" | "lora_B" => {
                let adapted = |p: Projection| {
                    model.layers[layer]
                        .get(p)
                        .is_some_and(|projection| matches!(projection.method, Method::Lora(_)))
                };
                let both =
                    adapted(Projection::ExpertGateUp(0)) && adapted(Projection::ExpertDown(0));
                // PEFT wraps the module once for each parameter; the first is the innermost.
                let inner = raw.contains(".base_layer.");
                let down = if both { !inner } else { adapted(Projection::ExpertDown(0)) };
                (down, if tensor == "lora_A" { Stack::A } else { Stack::B })
            }
            _ => return None,
        };
        Some(Self { layer, down, stack })
    }

    fn projection(&self, expert: usize) -> Projection {
        if self.down {
            Projection::ExpertDown(expert as u16)
        } else {
            Projection::ExpertGateUp(expert as u16)
        }
    }

    fn names(&self, model: &Model<f64>) -> Vec<String> {
        let options = &model.config.options;
        let tensor = match self.stack {
            Stack::Weight { .. } => "weight",
            Stack::Bias => "bias",
            Stack::A => "lora_A",
            Stack::B => "lora_B",
        };
        let count = options.experts_of(self.layer).map_or(0, |experts| experts.count);
        (0..count)
            .map(|e| format!("{}.{tensor}", options.module(self.layer, self.projection(e))))
            .collect()
    }
}

/// The reference model's names of a trainer's tensor.
pub(super) fn names_of(raw: &str, model: &Model<f64>) -> Vec<String> {
    match Stacked::of(raw, model) {
        Some(stacked) => stacked.names(model),
        None => vec![own_name(raw, model)],
    }
}

/// The name of a tensor that is not a stack; a tied head is the embedding.
fn own_name(raw: &str, model: &Model<f64>) -> String {
    let (mut name, options) = (canonical_name(raw), &model.config.options);
    // Transformers' name of every output projection in memory, whatever files call it.
    if let Some(tensor) = name.strip_prefix("lm_head.") {
        name = options.outside_tensor(Outside::Head, tensor);
    }
    let tied =
        model.config.tie_word_embeddings && name == options.outside_tensor(Outside::Head, "weight");
    if tied { options.outside_tensor(Outside::Embedding, "weight") } else { name }
}

/// A trainer's tensor by the reference model's names. One whose shape does not fit keeps its own
/// name, under which the shape is reported.
pub(super) fn placed(
    raw: &str,
    tensor: Observed,
    model: &Model<f64>,
) -> Result<Vec<(String, Observed)>> {
    let Some(stacked) = Stacked::of(raw, model) else {
        let name = own_name(raw, model);
        let turned = model.config.options.transposed
            && name.strip_suffix(".weight").is_some_and(|module| is_projection(module, model));
        return Ok(vec![(name, if turned { turn(tensor) } else { tensor })]);
    };
    let names = stacked.names(model);
    let experts = names.len();
    let (rows, columns) = tensor.values.dim();
    let fits = match stacked.stack {
        Stack::B => columns.is_multiple_of(experts),
        _ => rows.is_multiple_of(experts),
    };
    if !fits {
        return Ok(vec![(canonical_name(raw), tensor)]);
    }
    let each = rows / experts;
    let part = |e: usize| {
        let own = |values: Array2<f64>| {
            let shape = vec![values.nrows(), values.ncols()];
            Observed { values, precision: tensor.precision, shape }
        };
        let block = || tensor.values.slice(s![e * each..(e + 1) * each, ..]).to_owned();
        match stacked.stack {
            Stack::Weight { turned: true } => {
                own(block().reversed_axes().as_standard_layout().into_owned())
            }
            Stack::Weight { turned: false } | Stack::A | Stack::Bias => own(block()),
            Stack::B => own(tensor.values.slice(s![.., e..; experts]).to_owned()),
        }
    };
    Ok(names.into_iter().enumerate().map(|(e, name)| (name, part(e))).collect())
}

fn is_projection(module: &str, model: &Model<f64>) -> bool {
    let config = &model.config;
    (0..config.num_hidden_layers).any(|l| {
        module.starts_with(&config.options.layer(l))
            && config.projections(l).into_iter().any(|p| config.options.module(l, p) == module)
    })
}

fn turn(tensor: Observed) -> Observed {
    let values = tensor.values.reversed_axes().as_standard_layout().into_owned();
    let shape = tensor.shape.into_iter().rev().collect();
    Observed { values, shape, ..tensor }
}
