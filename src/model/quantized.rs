//! Weights that a checkpoint holds quantized, as bitsandbytes and Transformers write them.
//!
//! | tensor beside `X.weight` | NF4 (`X.weight` is uint8) | int8 (`X.weight` is int8, out x in) |
//! |---|---|---|
//! | `X.weight.absmax` | scales of the blocks, f32, or uint8 when they are quantized again | |
//! | `X.weight.quant_map` | the sixteen levels | |
//! | `X.weight.nested_absmax`, `X.weight.nested_quant_map` | second-level scales and the values of their bytes | |
//! | `X.weight.quant_state.bitsandbytes__nf4` | a JSON object: blocksize, dtype, shape, nested_blocksize, nested_offset | |
//! | `X.SCB`, `X.weight_format` | | largest magnitude of each row; 0, row-major |

use super::checkpoint::Shards;
use super::config::Keys;
use crate::adapters::int8::Int8Matrix;
use crate::adapters::nf4::{LEVELS, Nf4Matrix, Scales};
use crate::adapters::{BaseWeight, PackedWeight};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::precision::Precision;
use crate::tensor_file::TensorFile;
use ndarray::Array2;
use safetensors::tensor::Dtype;
use serde::Deserialize;
use serde_json::Value;
use std::sync::Arc;

/// Format of a checkpoint's quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// NF4 with scales as they are, or quantized again.
    Nf4 {
        /// Whether the scales are quantized again.
        double: bool,
    },
    /// Eight bits a row.
    Int8,
}

impl Quantization {
    /// Name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 { .. } => "NF4",
            Self::Int8 => "int8",
        }
    }

    /// Bytes that a matrix takes.
    pub fn bytes_for(self, rows: usize, columns: usize) -> usize {
        match self {
            Self::Nf4 { double: true } => Nf4Matrix::bytes_for(rows, columns),
            Self::Nf4 { double: false } => {
                (rows * columns).div_ceil(2)
                    + 4 * (rows * columns).div_ceil(crate::adapters::nf4::BLOCK)
            }
            Self::Int8 => Int8Matrix::bytes_for(rows, columns),
        }
    }

    /// What `quantization_config` says, if it is there.
    pub(super) fn resolve(keys: &Keys<'_>) -> Result<Option<Self>> {
        let Some(value) = keys.value("quantization_config") else { return Ok(None) };
        let wrong = |what: &str| Err(keys.wrong("quantization_config", what));
        let Value::Object(map) = value else { return wrong("an object") };
        let inside = Keys { path: keys.path, inside: "quantization_config", map };
        let flag = |key: &str| inside.flag(key, false);
        if inside.value("quant_method").is_some_and(|method| method != "bitsandbytes") {
            return Err(inside.wrong(
                "quant_method",
                "bitsandbytes, in NF4 or int8; other methods are not implemented",
            ));
        }
        inside.refuse_unless("llm_int8_has_fp16_weight", &[Value::Bool(false)])?;
        match (flag("load_in_4bit")?, flag("load_in_8bit")?) {
            (true, false) => {
                if inside.value("bnb_4bit_quant_type").is_none_or(|kind| kind != "nf4") {
                    return Err(inside.wrong(
                        "bnb_4bit_quant_type",
                        "nf4; fp4, the default, is not implemented",
                    ));
                }
                inside.refuse_unless("bnb_4bit_quant_storage", &[Value::from("uint8")])?;
                Ok(Some(Self::Nf4 { double: flag("bnb_4bit_use_double_quant")? }))
            }
            (false, true) => Ok(Some(Self::Int8)),
            _ => wrong("one of load_in_4bit and load_in_8bit"),
        }
    }
}

/// What `quant_state.bitsandbytes__nf4` says.
#[derive(Deserialize)]
struct State {
    blocksize: usize,
    dtype: String,
    shape: (usize, usize),
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

const NF4_PARTS: [&str; 4] = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"];
const NF4_STATE: &str = "quant_state.bitsandbytes__nf4";

/// The weight that a tensor belongs to, where it is a part of a quantized one.
pub(super) fn weight_of(name: &str) -> Option<String> {
    if let Some((module, part)) = name.split_once(".weight.") {
        let known = NF4_PARTS.contains(&part) || part.starts_with("quant_state.");
        return known.then(|| format!("{module}.weight"));
    }
    let module = name.strip_suffix(".SCB").or_else(|| name.strip_suffix(".weight_format"))?;
    Some(format!("{module}.weight"))
}

/// Whether a tensor holds a quantized weight.
pub(super) fn is_packed(shards: &Shards, name: &str) -> bool {
    let name = shards.actual(name);
    matches!(
        shards.file(name).bytes(name, "config.json asks for it"),
        Ok((Dtype::U8 | Dtype::I8, _))
    )
}

/// A matrix of a checkpoint; packed where the file holds it so.
pub(super) fn read<T: Real>(
    shards: &Shards,
    name: &str,
    shape: (usize, usize),
) -> Result<BaseWeight<T>> {
    let actual = shards.actual(name);
    let file = shards.file(actual);
    let packed: Arc<dyn PackedWeight<T>> = match file.bytes(actual, "config.json asks for it") {
        Ok((Dtype::U8, _)) => Arc::new(nf4(shards, actual, shape)?),
        Ok((Dtype::I8, _)) => Arc::new(int8(shards, actual, shape)?),
        _ => return Ok(BaseWeight::Dense(shards.matrix(name, shape)?)),
    };
    Ok(BaseWeight::Packed(packed))
}

/// An error of a part in the file's terms.
fn in_file(file: &TensorFile, name: &str, error: Error) -> Error {
    match error {
        Error::ShapeMismatch { arg, expected, got, .. } => {
            file.malformed(format!("tensor {name}"), format!("{arg} of length {expected}"), got)
        }
        Error::NonFinite { tensor, index, value, .. } => file.malformed(
            format!("tensor {name}"),
            format!("finite {tensor}"),
            format!("{value} at {index:?}"),
        ),
        Error::InvalidParam { name: key, value, requirement } => {
            file.malformed(format!("tensor {name}, {key}"), requirement, value)
        }
        other => other,
    }
}

fn same_shape(
    file: &TensorFile,
    name: &str,
    expected: (usize, usize),
    found: (usize, usize),
) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let expected = format!("shape {expected:?} (from config.json)");
    Err(file.malformed(format!("tensor {name}"), expected, format!("{found:?}")))
}

fn nf4(shards: &Shards, name: &str, shape: (usize, usize)) -> Result<Nf4Matrix> {
    let part = |part: &str| format!("{name}.{part}");
    let file = |name: &str| shards.file(name);
    let reason = "the weight is stored as bytes: bitsandbytes keeps this beside it";
    let bytes = |name: &str| {
        let (dtype, bytes) = file(name).bytes(name, reason)?;
        match dtype {
            Dtype::U8 => Ok(bytes),
            other => Err(file(name).malformed(
                format!("tensor {name}"),
                "dtype U8",
                format!("{other:?}"),
            )),
        }
    };
    let floats = |part: String| Ok::<_, Error>(file(&part).vector::<f32>(&part, reason)?.to_vec());
    let state_name = part(NF4_STATE);
    let broken = |found: String| {
        let expected = "a JSON object with blocksize, dtype and shape, and nested_blocksize and \
                        nested_offset together";
        file(&state_name).malformed(format!("tensor {state_name}"), expected, found)
    };
    let state: State =
        serde_json::from_slice(&bytes(&state_name)?).map_err(|e| broken(e.to_string()))?;
    same_shape(file(name), name, shape, state.shape)?;
    let format = Precision::parse(&state.dtype).map_err(|_| broken(state.dtype.clone()))?;
    let map = part("quant_map");
    let levels = floats(map.clone())?;
    if levels.len() != LEVELS.len() || levels.iter().zip(LEVELS).any(|(a, b)| (a - b).abs() > 1e-6)
    {
        return Err(file(&map).malformed(
            format!("tensor {map}"),
            "the sixteen levels of NF4",
            "other values",
        ));
    }
    let absmax = part("absmax");
    let scales = match (state.nested_blocksize, state.nested_offset) {
        (None, None) => Scales::Single(floats(absmax)?),
        (Some(block), Some(mean)) => {
            let values_name = part("nested_quant_map");
            let values: Result<[f32; 256]> =
                floats(values_name.clone())?.try_into().map_err(|v: Vec<f32>| {
                    file(&values_name).malformed(
                        format!("tensor {values_name}"),
                        "256 values",
                        v.len().to_string(),
                    )
                });
            Scales::Double {
                bytes: bytes(&absmax)?.to_vec(),
                second: floats(part("nested_absmax"))?,
                values: Arc::new(values?),
                mean: mean as f32,
                block,
            }
        }
        _ => return Err(broken("only one of the two".into())),
    };
    let codes = bytes(name)?.to_vec();
    Nf4Matrix::from_parts(shape, codes, scales, state.blocksize, format)
        .map_err(|e| in_file(file(name), name, e))
}

fn int8(shards: &Shards, name: &str, shape: (usize, usize)) -> Result<Int8Matrix> {
    let reason = "the weight is stored in eight bits: bitsandbytes keeps this beside it";
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let layout = format!("{module}.weight_format");
    if let Ok((_, bytes)) = shards.file(&layout).bytes(&layout, reason)
        && *bytes != [0]
    {
        let found = format!("{bytes:?}, a layout of a GPU");
        return Err(shards.file(&layout).malformed(
            format!("tensor {layout}"),
            "0, row-major",
            found,
        ));
    }
    let file = shards.file(name);
    let found = file.shape(name).unwrap_or_default().to_vec();
    let [rows, columns] = found[..] else {
        return Err(file.malformed(
            format!("tensor {name}"),
            "two dimensions",
            format!("shape {found:?}"),
        ));
    };
    same_shape(file, name, shape, (rows, columns))?;
    let codes = file.bytes(name, reason)?.1.iter().map(|&b| b as i8).collect();
    let codes = Array2::from_shape_vec(shape, codes).map_err(|e| {
        file.malformed(format!("tensor {name}"), "data that fill its shape", e.to_string())
    })?;
    let scale_name = format!("{module}.SCB");
    let scales = shards.file(&scale_name).vector::<f32>(&scale_name, reason)?.to_vec();
    Int8Matrix::from_parts(codes, scales, Precision::F32).map_err(|e| in_file(file, name, e))
}
