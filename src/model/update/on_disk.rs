//! Switching a checkpoint folder in place.
//!
//! Only the bytes of the slices change; header, order of tensors, precision and every other byte of
//! the checkpoint stay. The overwritten bytes are kept in `adapter_kept.safetensors` beside it,
//! written before the checkpoint is, so after an interruption at any moment switching off still
//! gives the original files, byte for byte.

use super::super::checkpoint::Shards;
use super::super::layout::own_tensor;
use super::super::parameters::Model;
use super::ModelUpdate;
use crate::adapters::s2ft::Side;
use crate::adapters::update::{SlicePlace, WeightUpdate};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::tensor_file::{TensorFile, TensorWriter, float_bytes, write_float};
use std::path::{Path, PathBuf};

/// File beside a checkpoint that holds what an adapter in effect has overwritten.
pub const KEPT: &str = "adapter_kept.safetensors";

/// What a switch did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnDisk {
    /// Tensors changed.
    pub tensors: usize,
    /// Bytes of them overwritten.
    pub bytes: usize,
    /// The kept bytes' file.
    pub kept: PathBuf,
}

fn kept_path(folder: &Path) -> PathBuf {
    folder.join(KEPT)
}

/// Puts the update of an adapter folder (any kind) into a checkpoint folder.
///
/// Values are added in f64 and rounded once to the checkpoint's precision.
///
/// # Errors
/// [`Error::InvalidParam`] if an adapter is in effect already; as [`Model::read`] and
/// [`ModelUpdate::read`]; [`Error::Io`]. On an error the checkpoint is as it was, or
/// [`switch_off_on_disk`] makes it so.
pub fn switch_on_on_disk(folder: &Path, adapter: &Path) -> Result<OnDisk> {
    let kept = kept_path(folder);
    if kept.exists() {
        let requirement = format!("an adapter is in effect ({KEPT} is there); switch it off first");
        return Err(Error::invalid("model", folder.display(), requirement));
    }
    let base = Model::<f64>::read(folder)?;
    let update = ModelUpdate::read(adapter, &base)?;
    let config = base.config.clone();
    drop(base);
    let mut shards = Shards::open(folder)?;
    let mut writer = TensorWriter::new();
    writer.metadata("adapter", adapter.display());
    let mut done = OnDisk { tensors: 0, bytes: 0, kept };
    for (&(l, p), entry) in &update.entries {
        let Some(name) = own_tensor(&config, l, p) else {
            let requirement = "is not stored out x in as a tensor of its own; merge into a new \
                               checkpoint instead (peft-limits adapter merge)";
            return Err(Error::invalid(
                config.options.module(l, p),
                "stored otherwise",
                requirement,
            ));
        };
        let file = shards.file_mut(&name);
        let mut weight = file.matrix::<f64>(&name, "the adapter changes it")?;
        entry.add_to(&mut weight.view_mut(), &mut Cost::default());
        let place = match entry {
            WeightUpdate::Slice(slice) => slice.place().clone(),
            WeightUpdate::LowRank(_) => {
                SlicePlace { side: Side::Output, index: (0..weight.nrows()).collect() }
            }
        };
        let (dtype, bytes) = file.bytes_mut(&name)?;
        let width = float_bytes(dtype);
        let mut old = Vec::new();
        for_each_number(&place, weight.dim(), |i, j| {
            let at = (i * weight.ncols() + j) * width;
            old.extend_from_slice(&bytes[at..at + width]);
            write_float(dtype, weight[[i, j]], &mut bytes[at..at + width]);
        });
        done.tensors += 1;
        done.bytes += old.len();
        let (rows, columns) = place.shape_in(weight.dim());
        writer.raw(&format!("{name}.values"), dtype, &[rows, columns], old);
        let side = if place.side == Side::Output { "rows" } else { "columns" };
        let places = place.index.iter().map(|&i| i as f64);
        writer.tensor(&format!("{name}.{side}"), &[place.index.len()], places);
    }
    writer.write(&done.kept)?;
    shards.write_changed()?;
    Ok(done)
}

/// Calls `visit(row, column)` for each number of a slice, row by row.
fn for_each_number(
    place: &SlicePlace,
    (out, width): (usize, usize),
    mut visit: impl FnMut(usize, usize),
) {
    match place.side {
        Side::Output => place.index.iter().for_each(|&i| (0..width).for_each(|j| visit(i, j))),
        Side::Input => (0..out).for_each(|i| place.index.iter().for_each(|&j| visit(i, j))),
    }
}

/// Puts the kept bytes back and removes their file; `None` if no adapter is in effect.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] if the kept bytes do not belong to this checkpoint.
pub fn switch_off_on_disk(folder: &Path) -> Result<Option<OnDisk>> {
    let kept = kept_path(folder);
    if !kept.exists() {
        return Ok(None);
    }
    let file = TensorFile::open(&kept)?;
    let mut shards = Shards::open(folder)?;
    let mut done = OnDisk { tensors: 0, bytes: 0, kept };
    let names: Vec<&str> = file.names().filter_map(|name| name.strip_suffix(".values")).collect();
    for name in names {
        let target = shards.file_mut(name);
        let shape = match target.shape(name) {
            Some(&[out, width]) => (out, width),
            _ => {
                return Err(
                    target.missing(name, format!("{} holds a slice of it", done.kept.display()))
                );
            }
        };
        let rows = format!("{name}.rows");
        let (side, place) = if file.contains(&rows) {
            (Side::Output, rows)
        } else {
            (Side::Input, format!("{name}.columns"))
        };
        let index = file.vector::<f64>(&place, "where the kept values belong")?;
        let index: Vec<usize> = index.iter().map(|&i| i as usize).collect();
        let extent = if side == Side::Output { shape.0 } else { shape.1 };
        crate::adapters::paca::check_index(&index, extent).map_err(|e| {
            file.malformed(format!("tensor {place}"), "places of the weight", e.to_string())
        })?;
        let place = SlicePlace { side, index };
        let (dtype, values) = file.bytes(&format!("{name}.values"), "the kept values")?;
        let (found, bytes) = target.bytes_mut(name)?;
        let width = float_bytes(dtype);
        let (rows, columns) = place.shape_in(shape);
        if found != dtype || rows * columns * width != values.len() {
            let expected = format!("{rows} x {columns} numbers of {found:?}, as the checkpoint");
            let got = format!("{} bytes of {dtype:?}", values.len());
            return Err(file.malformed(format!("tensor {name}.values"), expected, got));
        }
        let mut old = values.chunks_exact(width);
        for_each_number(&place, shape, |i, j| {
            if let Some(old) = old.next() {
                let at = (i * shape.1 + j) * width;
                bytes[at..at + width].copy_from_slice(old);
            }
        });
        done.tensors += 1;
        done.bytes += values.len();
    }
    shards.write_changed()?;
    std::fs::remove_file(&done.kept).map_err(|e| Error::io(&done.kept, e))?;
    Ok(Some(done))
}
