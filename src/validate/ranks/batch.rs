//! The batch that several processes made together.

use super::layout::Cut;
use super::merge::is_of_parameter;
use super::read::{Rank, Ranks};
use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::error::{Error, Result};
use crate::tensor_file::{TensorFile, TensorWriter};
use crate::validate::recorded_batch::DOCUMENTS;
use safetensors::tensor::Dtype;
use std::collections::BTreeSet;
use std::ops::Range;

/// Rows and labels that count of a micro-batch.
pub(super) type Counted = (usize, usize);

/// How the merged batch is divided.
pub(super) struct Division {
    /// Micro-batches of each part of the data.
    pub counted: Vec<Vec<Counted>>,
    /// Rows or positions of each part.
    pub spans: Vec<Range<usize>>,
}

/// Rows of a tensor of the batch.
struct Rows {
    shape: Vec<usize>,
    dtype: Dtype,
    bytes: Vec<u8>,
}

impl Rows {
    fn unit(&self) -> usize {
        self.bytes.len().checked_div(self.shape.iter().product()).unwrap_or(1)
    }

    /// Bytes of one position of one row.
    fn position(&self) -> usize {
        self.unit() * self.shape[2..].iter().product::<usize>()
    }

    fn integers(shape: [usize; 2], of: impl Fn(usize) -> i64) -> Self {
        let bytes = (0..shape[0] * shape[1]).flat_map(|i| of(i % shape[1]).to_le_bytes()).collect();
        Self { shape: shape.to_vec(), dtype: Dtype::I64, bytes }
    }

    /// Padded on the right to another length.
    fn padded(self, length: usize, fill: i64) -> Self {
        let (rows, old, position) = (self.shape[0], self.shape[1], self.position());
        if old == length {
            return self;
        }
        // Only labels are filled with anything but zeros, and they are integers.
        let fill =
            if self.dtype == Dtype::I64 { fill.to_le_bytes().to_vec() } else { vec![0; position] };
        let mut bytes = Vec::with_capacity(rows * length * position);
        for row in 0..rows {
            bytes.extend_from_slice(&self.bytes[row * old * position..(row + 1) * old * position]);
            (old..length).for_each(|_| bytes.extend_from_slice(&fill));
        }
        let shape = [&[rows, length], &self.shape[2..]].concat();
        Self { shape, dtype: self.dtype, bytes }
    }
}

impl Ranks {
    /// Writes the batch; returns rows and counted labels of each micro-batch of each part of the
    /// data, and its rows or positions.
    pub(super) fn write_batch(
        &self,
        speakers: &[usize],
        writer: &mut TensorWriter,
    ) -> Result<Division> {
        let cut = self.ranks[0].parallel.data.cut;
        let axis = usize::from(cut == Cut::Sequence);
        let step = |n: &usize| &self.ranks[*n].step;
        let mut shapes = Vec::new();
        for number in speakers {
            match step(number).shape("input_ids") {
                Some(&[rows, length]) => shapes.push([rows, length]),
                Some(shape) => {
                    let found = format!("shape {shape:?}");
                    return Err(step(number).malformed(
                        "tensor input_ids",
                        "rows of tokens (2 axes)",
                        found,
                    ));
                }
                None => return Err(step(number).missing("input_ids", "the rows of this process")),
            }
        }
        let rest = |shape: &[usize; 2]| shape[1 - axis];
        if axis == 1 && shapes.iter().any(|s| rest(s) != rest(&shapes[0])) {
            let found = format!("{shapes:?}");
            return Err(Error::format(
                &self.folder,
                "tensor input_ids",
                "as many rows in every rank",
                found,
            ));
        }
        let length = shapes.iter().map(|s| s[1]).max().unwrap_or(0);
        let ragged = axis == 0 && shapes.iter().any(|s| s[1] != length);
        let any = |name: &str| speakers.iter().any(|n| step(n).contains(name));
        let packed = any("position_ids") && !any("attention_mask");
        let mut names: BTreeSet<String> =
            speakers.iter().flat_map(|n| step(n).names().map(str::to_string)).collect();
        names.retain(|name| name != "loss" && !is_of_parameter(name));
        if ragged {
            names.insert(if packed { "row_lengths" } else { "attention_mask" }.into());
        }
        // Beside rows with a mask, positions that start again would not say that documents are
        // apart.
        if axis == 0 && any("attention_mask") && !any(DOCUMENTS) {
            let mut apart = false;
            for (number, shape) in speakers.iter().zip(&shapes) {
                apart |= documents(step(number), *shape)?.bytes.iter().any(|b| *b != 0);
            }
            if apart {
                names.insert(DOCUMENTS.into());
            }
        }
        let weight = self.weight(speakers.len());
        let mut spans = Vec::new();
        let mut counted: Vec<Vec<Counted>> = Vec::new();
        for name in &names {
            let mut parts = Vec::new();
            for (i, number) in speakers.iter().enumerate() {
                let (file, shape) = (step(number), shapes[i]);
                let rows = match file.shape(name) {
                    Some(held)
                        if held.len() < 2
                            || (held[0] != shape[0])
                            || (name != "row_lengths" && held[1] != shape[1]) =>
                    {
                        let expected = format!("{} rows of {} tokens", shape[0], shape[1]);
                        return Err(file.malformed(
                            format!("tensor {name}"),
                            expected,
                            format!("shape {held:?}"),
                        ));
                    }
                    Some(held) if name == "dlogits" || name == "dfinal" => {
                        // Each process's loss counts by the same part in the step's.
                        let (_, values) =
                            file.raw_tensor::<f64>(name, "the gradient of the loss")?;
                        let bytes =
                            values.iter().flat_map(|x| (x * weight).to_le_bytes()).collect();
                        Rows { shape: held.to_vec(), dtype: Dtype::F64, bytes }
                    }
                    Some(held) => {
                        let (dtype, bytes) = file.bytes(name, "the rows of this process")?;
                        Rows { shape: held.to_vec(), dtype, bytes: bytes.into_owned() }
                    }
                    None if name == "attention_mask" => Rows::integers(shape, |_| 1),
                    None if name == "position_ids" => Rows::integers(shape, |t| t as i64),
                    None if name == DOCUMENTS && axis == 0 => documents(file, shape)?,
                    None if name == "row_lengths" => {
                        Rows::integers([shape[0], 1], |_| shape[1] as i64)
                    }
                    None => return Err(file.missing(name, "other ranks have it")),
                };
                parts.push(rows);
            }
            let whole = match (axis, name.as_str()) {
                (_, "row_lengths") => stacked(parts),
                (1, _) => beside(parts),
                _ => stacked(
                    parts
                        .into_iter()
                        .map(|p| p.padded(length, if name == "labels" { IGNORED_LABEL } else { 0 }))
                        .collect(),
                ),
            };
            let Some(whole) = whole else {
                let found = "tensors of different kinds or widths";
                return Err(Error::format(
                    &self.folder,
                    format!("tensor {name}"),
                    "the same kind in every rank",
                    found,
                ));
            };
            writer.raw(name, whole.dtype, &whole.shape, whole.bytes);
        }
        let mut start = 0;
        for (i, (number, shape)) in speakers.iter().zip(&shapes).enumerate() {
            spans.push(start..start + shape[axis]);
            start += shape[axis];
            let rank = &self.ranks[*number];
            let micro = &rank.manifest.loss.micro_batch_rows;
            let micro = if micro.is_empty() { vec![shape[0]] } else { micro.clone() };
            if micro.iter().sum::<usize>() != shape[0] {
                let expected = format!("{} rows, those of input_ids", shape[0]);
                return Err(rank.wrong(
                    "key loss.micro_batch_rows",
                    expected,
                    format!("{micro:?}"),
                ));
            }
            // The first label of a row is nobody's prediction; a later part's first is that of the
            // part before.
            counted.push(counted_labels(rank, &micro, shape[1], axis == 0 || i == 0)?);
        }
        if axis == 1 {
            // The same rows in every part.
            let merged = counted.iter().skip(1).fold(counted[0].clone(), |mut sum, other| {
                sum.iter_mut().zip(other).for_each(|(a, b)| a.1 += b.1);
                sum
            });
            counted = vec![merged];
        }
        if let Some(losses) =
            speakers.iter().map(|n| scalar(step(n), "loss")).collect::<Option<Vec<f64>>>()
        {
            writer.tensor("loss", &[1], [losses.iter().sum::<f64>() * weight]);
        }
        Ok(Division { counted, spans })
    }
}

/// Numbers of documents, where a process records none: its positions say where one begins, unless
/// it has a mask.
fn documents(file: &TensorFile, shape: [usize; 2]) -> Result<Rows> {
    let mut numbers = vec![0i64; shape[0] * shape[1]];
    if file.contains("position_ids") && !file.contains("attention_mask") {
        let (held, positions) = file.raw_tensor::<f64>("position_ids", "where documents begin")?;
        for i in (1..numbers.len()).filter(|i| held == shape && i % shape[1] > 0) {
            numbers[i] =
                numbers[i - 1] + i64::from((positions[i] - positions[i - 1] - 1.0).abs() > 0.5);
        }
    }
    let bytes = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    Ok(Rows { shape: shape.to_vec(), dtype: Dtype::I64, bytes })
}

/// Rows and labels that count, by micro-batch.
fn counted_labels(
    rank: &Rank,
    micro: &[usize],
    length: usize,
    shifted: bool,
) -> Result<Vec<Counted>> {
    if !rank.step.contains("labels") {
        return Ok(micro.iter().map(|&rows| (rows, 0)).collect());
    }
    let (_, labels) = rank.step.raw_tensor::<f64>("labels", "what this process predicts")?;
    let mut rows = labels.chunks(length.max(1));
    let from = usize::from(shifted).min(length);
    let count = |row: &[f64]| {
        row[from..].iter().filter(|l| (**l - IGNORED_LABEL as f64).abs() > 0.5).count()
    };
    Ok(micro.iter().map(|&n| (n, rows.by_ref().take(n).map(count).sum())).collect())
}

/// Rows one after the other.
fn stacked(parts: Vec<Rows>) -> Option<Rows> {
    let mut parts = parts.into_iter();
    let mut whole = parts.next()?;
    for part in parts {
        if part.dtype != whole.dtype || part.shape[1..] != whole.shape[1..] {
            return None;
        }
        whole.shape[0] += part.shape[0];
        whole.bytes.extend(part.bytes);
    }
    Some(whole)
}

/// Parts of the same rows.
fn beside(parts: Vec<Rows>) -> Option<Rows> {
    let first = parts.first()?;
    let (dtype, rows, rest) = (first.dtype, first.shape[0], first.shape[2..].to_vec());
    if parts.iter().any(|p| p.dtype != dtype || p.shape[0] != rows || p.shape[2..] != rest) {
        return None;
    }
    let mut bytes = Vec::with_capacity(parts.iter().map(|p| p.bytes.len()).sum());
    for row in 0..rows {
        for part in &parts {
            let line = part.shape[1] * part.position();
            bytes.extend_from_slice(&part.bytes[row * line..(row + 1) * line]);
        }
    }
    let length = parts.iter().map(|p| p.shape[1]).sum();
    Some(Rows { shape: [&[rows, length][..], &rest].concat(), dtype, bytes })
}

fn scalar(file: &TensorFile, name: &str) -> Option<f64> {
    file.contains(name)
        .then(|| file.raw_tensor::<f64>(name, "the loss").ok()?.1.first().copied())?
}
