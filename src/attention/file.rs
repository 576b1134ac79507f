//! Attention heads in safetensors files (design section 4).
//!
//! Input: X (or XQ, XK, XV), WQ, WK, WV, any pair of AQ, BQ, AK, BK, AV, BV, and Y or G; or Q, K, V
//! in place of inputs and weights. Metadata: `beta`, `alpha` (with adapters), optional `r`,
//! `causal`, `softmax_one`. Output: O, loss (with Y), and the gradients named dWQ, dAQ, dBQ, ... or
//! dQ, dK, dV.

use super::gradients::Gradients;
use super::problem::{
    Adapter, AttentionProblem, Hidden, Mask, Objective, Projection, Qkv, SoftmaxKind, Source,
};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::tensor_file::{TensorFile, TensorWriter};
use ndarray::{ArcArray2, Array2};
use std::path::Path;

/// Reads a head from a file.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`], [`Error::MissingTensor`] and the errors of
/// [`AttentionProblem::new`], the latter wrapped so that they name the file.
pub fn read_problem<T: Real>(path: &Path) -> Result<AttentionProblem<T>> {
    let file = TensorFile::open(path)?;
    problem_from(&file)
}

/// As [`read_problem`] for an opened file.
///
/// # Errors
/// As [`read_problem`].
pub fn problem_from<T: Real>(file: &TensorFile) -> Result<AttentionProblem<T>> {
    let projected = file.contains("Q") || file.contains("K") || file.contains("V");
    let source = if projected {
        projected_source(file)?
    } else {
        Source::Hidden(Box::new(hidden_source(file)?))
    };
    let objective = match (file.contains("Y"), file.contains("G")) {
        (true, false) => Objective::Target(real_matrix(file, "Y", "the target")?),
        (false, true) => {
            Objective::UpstreamGradient(real_matrix(file, "G", "the upstream gradient")?)
        }
        (true, true) => return Err(file.malformed("tensors", "either Y or G", "both")),
        (false, false) => {
            return Err(file.missing("Y", "a target Y or an upstream gradient G is needed"));
        }
    };
    let beta = number(file, "beta", "the factor of Q K^T")?;
    let mask = if flag(file, "causal")? { Mask::Causal } else { Mask::Full };
    let softmax = if flag(file, "softmax_one")? { SoftmaxKind::One } else { SoftmaxKind::Standard };
    AttentionProblem::new(source, objective, mask, softmax, beta).map_err(|e| in_file(file, e))
}

/// Turns an error about an argument into one that names the file and the file's own tensor.
fn in_file(file: &TensorFile, error: Error) -> Error {
    // Self-attention has one X for the three inputs.
    let own = |name: String| {
        if file.contains("X") { name.replace("XQ", "X").replace("XK", "X") } else { name }
    };
    match error {
        Error::ShapeMismatch { arg, expected, got, .. } => file.malformed(
            format!("tensor {}", own(arg)),
            format!("shape {expected}"),
            format!("shape {got}"),
        ),
        Error::InvalidParam { name, value, requirement } => {
            let expected = requirement.strip_prefix("must be ").unwrap_or(&requirement);
            file.malformed(own(name), expected, value)
        }
        Error::NonFinite { tensor, index, value, .. } => file.malformed(
            format!("tensor {tensor}"),
            "finite entries",
            format!("{value} at {index:?}"),
        ),
        other => other,
    }
}

/// A matrix of real numbers; integers are refused.
fn real_matrix<T: Real>(file: &TensorFile, name: &str, reason: &str) -> Result<Array2<T>> {
    file.require_real(name, reason)?;
    file.matrix(name, reason)
}

fn projected_source<T: Real>(file: &TensorFile) -> Result<Source<T>> {
    let of_hidden = ["X", "XQ", "XK", "XV", "WQ", "WK", "WV", "AQ", "BQ", "AK", "BK", "AV", "BV"];
    if let Some(extra) = of_hidden.iter().find(|name| file.contains(name)) {
        return Err(file.malformed(
            "tensors",
            "either Q, K, V or inputs with weights and adapters",
            format!("{extra} beside Q, K or V"),
        ));
    }
    let reason = "Q, K and V come together";
    Ok(Source::Projected(Qkv {
        query: real_matrix(file, "Q", reason)?,
        key: real_matrix(file, "K", reason)?,
        value: real_matrix(file, "V", reason)?,
    }))
}

fn hidden_source<T: Real>(file: &TensorFile) -> Result<Hidden<T>> {
    let separate = ["XQ", "XK", "XV"].into_iter().find(|name| file.contains(name));
    if let (true, Some(extra)) = (file.contains("X"), separate) {
        return Err(file.malformed(
            "tensors",
            "either X or XQ, XK, XV",
            format!("{extra} beside X"),
        ));
    }
    let inputs = if file.contains("X") {
        let x: ArcArray2<T> =
            real_matrix::<T>(file, "X", "the input of self-attention")?.into_shared();
        Qkv { query: x.clone(), key: x.clone(), value: x }
    } else if separate.is_some() {
        let reason = "XQ, XK and XV come together";
        Qkv {
            query: real_matrix::<T>(file, "XQ", reason)?.into_shared(),
            key: real_matrix::<T>(file, "XK", reason)?.into_shared(),
            value: real_matrix::<T>(file, "XV", reason)?.into_shared(),
        }
    } else {
        return Err(file.missing("X", "inputs X, or XQ, XK, XV, or Q, K, V are needed"));
    };
    let mut rank: Option<(usize, String)> = None;
    let mut projection = |letter: char| -> Result<Projection<T>> {
        let weight = real_matrix(file, &format!("W{letter}"), "the weight of this projection")?;
        let (a, b) = (format!("A{letter}"), format!("B{letter}"));
        let adapter = match (file.contains(&a), file.contains(&b)) {
            (false, false) => None,
            _ => {
                let lora_a: Array2<T> =
                    real_matrix(file, &a, &format!("{a} and {b} come together"))?;
                let lora_b: Array2<T> =
                    real_matrix(file, &b, &format!("{a} and {b} come together"))?;
                match &rank {
                    Some((r, other)) if *r != lora_a.nrows() => {
                        return Err(file.malformed(
                            format!("tensor {a}"),
                            format!("{r} rows, the rank of {other}"),
                            lora_a.nrows().to_string(),
                        ));
                    }
                    _ => rank = Some((lora_a.nrows(), a)),
                }
                Some(Adapter { lora_a, lora_b })
            }
        };
        Ok(Projection { weight, adapter })
    };
    let projections =
        Qkv { query: projection('Q')?, key: projection('K')?, value: projection('V')? };
    let scaling = match rank {
        None => 1.0,
        Some((0, name)) => {
            return Err(file.malformed(format!("tensor {name}"), "rank r of at least 1", "r = 0"));
        }
        Some((r, name)) => {
            if file.metadata("r").is_some() {
                let stated = number(file, "r", "the rank")?;
                if stated.to_bits() != (r as f64).to_bits() {
                    return Err(file.malformed(
                        "metadata r",
                        format!("{r}, the rows of {name}"),
                        stated.to_string(),
                    ));
                }
            }
            number(file, "alpha", "the file has adapters, whose scaling is alpha / r")? / r as f64
        }
    };
    Ok(Hidden { inputs, projections, scaling })
}

fn number(file: &TensorFile, key: &str, reason: &str) -> Result<f64> {
    let text = file.metadata(key).ok_or_else(|| {
        file.malformed(format!("metadata {key}"), format!("a number ({reason})"), "nothing")
    })?;
    match text.trim().parse::<f64>() {
        Ok(x) if x.is_finite() => Ok(x),
        _ => Err(file.malformed(format!("metadata {key}"), "a finite number", format!("{text:?}"))),
    }
}

fn flag(file: &TensorFile, key: &str) -> Result<bool> {
    match file.metadata(key).map(str::to_ascii_lowercase).as_deref() {
        None | Some("false" | "0") => Ok(false),
        Some("true" | "1") => Ok(true),
        Some(other) => {
            Err(file.malformed(format!("metadata {key}"), "True or False", format!("{other:?}")))
        }
    }
}

/// Writes O, the loss and every gradient present, whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write_gradients<T: Real>(
    path: &Path,
    gradients: &Gradients<T>,
    metadata: &[(&str, String)],
) -> Result<()> {
    let mut writer = TensorWriter::new();
    writer.matrix("O", gradients.output.view());
    if let Some(loss) = gradients.loss {
        writer.tensor("loss", &[1], [loss]);
    }
    for (name, a) in gradients.named() {
        writer.matrix(&name, a.view());
    }
    for (key, value) in metadata {
        writer.metadata(key, value);
    }
    writer.write(path)
}
