//! Checkpoints from which a run continues bit for bit.
//!
//! A run's folder holds `step-NNNNNNNN/` folders, each with
//!
//! | file | what |
//! |---|---|
//! | `config.toml` | the resolved configuration |
//! | `state.safetensors` | trained values (`value.*`), optimizer moments (`first.*`, `second.*`); metadata: step, fingerprint |
//!
//! A folder is written under a temporary name and renamed when complete, so an interrupted or
//! failed save leaves the earlier ones as they were; the two latest are kept. What is not trained
//! is not stored: it follows from the configuration (and is checked against the stored fingerprint
//! of the base weights).

use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::model::Model;
use crate::streams::mix;
use crate::tensor_file::{TensorFile, TensorWriter};
use crate::train::config::TrainConfig;
use crate::train::trainer::Trainer;
use std::path::{Path, PathBuf};

/// Checkpoints kept.
const KEEP: usize = 2;

/// A hash of every weight, in storage order.
pub fn fingerprint<T: Real>(model: &Model<T>) -> u64 {
    let mut hash = 0u64;
    let mut add =
        |x: &T| hash = mix(hash ^ x.widen().to_bits()).wrapping_add(0x9e37_79b9_7f4a_7c15);
    model.embedding.iter().chain(model.positions.iter().flatten()).for_each(&mut add);
    for layer in &model.layers {
        layer.norms.iter().flatten().flat_map(|norm| norm.numbers()).for_each(&mut add);
        layer.sinks.iter().flatten().for_each(&mut add);
        layer.projections().filter_map(|(_, p)| p.bias.as_ref()).flatten().for_each(&mut add);
        for (_, projection) in layer.projections() {
            projection.base.dense().iter().for_each(&mut add);
        }
    }
    model.final_norm.numbers().for_each(&mut add);
    model.lm_head.iter().flatten().for_each(&mut add);
    hash
}

fn restore<T: Real>(model: &mut Model<T>, file: &TensorFile) -> Result<()> {
    model.put_acting_values(&mut |name, expected| {
        let tensor = format!("value.{name}");
        let values = file.matrix::<T>(&tensor, "the configuration trains it")?;
        if values.dim() == expected {
            return Ok(values);
        }
        let (expected, found) = (format!("shape {expected:?}"), format!("{:?}", values.dim()));
        Err(file.malformed(format!("tensor {tensor}"), expected, found))
    })
}

/// Writes the state of a run and removes all but the latest checkpoints. Returns the checkpoint's
/// folder.
///
/// # Errors
/// [`Error::Io`]; nothing of a failed save remains, and earlier checkpoints are untouched.
pub fn save<T: Real>(trainer: &Trainer<T>, folder: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let target = folder.join(format!("step-{:08}", trainer.step));
    if target.exists() {
        return Ok(target); // the same state: nothing happens between two saves of one step
    }
    let temporary = tempfile::Builder::new()
        .prefix(".saving-")
        .tempdir_in(folder)
        .map_err(|e| Error::io(folder, e))?;
    let mut writer = TensorWriter::new();
    writer
        .metadata("step", trainer.step)
        .metadata("fingerprint", format!("{:016x}", trainer.fingerprint));
    for (name, values) in trainer.model.acting_values() {
        writer.matrix(&format!("value.{name}"), values.view());
    }
    for (name, values) in trainer.optimizer.state() {
        writer.tensor(&name, &[values.len()], values.iter().copied());
    }
    writer.write(&temporary.path().join("state.safetensors"))?;
    crate::atomic_file::write_bytes(
        &temporary.path().join("config.toml"),
        trainer.config.to_toml()?.as_bytes(),
    )?;
    // `tempfile` makes private folders; a checkpoint is for its owner's group and others to read as
    // usual.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode =
            std::fs::metadata(folder).map_err(|e| Error::io(folder, e))?.permissions().mode();
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(temporary.path(), permissions)
            .map_err(|e| Error::io(temporary.path(), e))?;
    }
    std::fs::rename(temporary.path(), &target).map_err(|e| Error::io(&target, e))?;
    // The folder no longer has its temporary name; nothing is left to remove.
    drop(temporary);
    let all = list(folder)?;
    for (_, old) in &all[..all.len().saturating_sub(KEEP)] {
        std::fs::remove_dir_all(old).map_err(|e| Error::io(old, e))?;
    }
    Ok(target)
}

/// Checkpoints of a folder, oldest first. A folder that does not exist has none.
///
/// # Errors
/// [`Error::Io`].
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(folder, e)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if let Some(step) = name.strip_prefix("step-").and_then(|s| s.parse().ok()) {
            all.push((step, path));
        }
    }
    all.sort();
    Ok(all)
}

/// Puts a new run into the state of the latest checkpoint in `folder`. Returns that checkpoint's
/// folder.
///
/// # Errors
/// [`Error::Format`] if there is no checkpoint, the stored configuration differs in a key that
/// matters, the base weights are not those of the saved run, or a tensor is missing or of another
/// shape; [`Error::Io`].
pub fn resume<T: Real>(trainer: &mut Trainer<T>, folder: &Path) -> Result<PathBuf> {
    let Some((step, path)) = list(folder)?.pop() else {
        return Err(Error::format(
            folder,
            "checkpoint",
            "a folder step-NNNNNNNN",
            "none; start without --resume",
        ));
    };
    let saved = TrainConfig::read(&path.join("config.toml"))?;
    if let Some((key, now, then)) = trainer.config.difference(&saved) {
        let expected = format!("{then}, as in the saved run");
        return Err(Error::format(path.join("config.toml"), format!("key {key}"), expected, now));
    }
    let file = TensorFile::open(path.join("state.safetensors"))?;
    let stored = |key: &str| {
        file.metadata(key)
            .ok_or_else(|| file.malformed(format!("metadata {key}"), "a value", "none"))
    };
    let fingerprint = format!("{:016x}", trainer.fingerprint);
    if stored("fingerprint")? != fingerprint {
        let expected = format!("{} (the base weights changed since)", stored("fingerprint")?);
        return Err(file.malformed("base weights", expected, fingerprint));
    }
    if stored("step")?.parse() != Ok(step) {
        return Err(file.malformed("metadata step", step.to_string(), stored("step")?));
    }
    restore(&mut trainer.model, &file)?;
    let moments = |name: &&str| name.starts_with("first.") || name.starts_with("second.");
    let state = file
        .names()
        .filter(moments)
        .map(|name| Ok((name.to_string(), file.tensor::<T>(name, "state of the optimizer")?.1)))
        .collect::<Result<Vec<_>>>()?;
    trainer.optimizer.restore(step, state)?;
    trainer.step = step;
    Ok(path)
}
