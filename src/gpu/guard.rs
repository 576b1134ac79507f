//! Panics inside the GPU engine become errors.
//!
//! Burn and CubeCL panic where a driver fails (out of memory, device lost, a kernel that does not
//! compile), some of them on a thread of their own. While guarded work runs, such a panic is not
//! printed; its message becomes the reason of [`Error::Device`]. Panics of code outside the engine
//! and its drivers are printed and passed on as ever.

use crate::error::{Error, Result};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, Once, PoisonError};

thread_local! {
    /// Guarded calls open on this thread.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// What the engine's threads and the driver reported since the last guarded call began.
static FAULTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Records a fault that the driver reported by a callback.
pub(super) fn report(fault: String) {
    FAULTS.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
}

fn take_faults() -> Vec<String> {
    std::mem::take(&mut *FAULTS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Whether a panic comes from the engine or a driver's binding.
fn from_engine(info: &PanicHookInfo<'_>) -> bool {
    let crates = ["cubecl", "burn-", "wgpu", "cudarc", "cubek", "naga"];
    info.location().is_some_and(|l| crates.iter().any(|name| l.file().contains(name)))
}

fn message(info: &PanicHookInfo<'_>) -> String {
    info.payload_as_str().unwrap_or("unknown panic").to_string()
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = take_hook();
        set_hook(Box::new(move |info| {
            if from_engine(info) || DEPTH.get() > 0 {
                report(message(info));
            } else {
                previous(info);
            }
        }));
    });
}

/// Runs `work`; a panic in it, or a fault reported meanwhile, becomes [`Error::Device`].
///
/// # Errors
/// Those of `work`; [`Error::Device`].
pub(super) fn guarded<T>(
    device: &str,
    op: &'static str,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    install();
    let nested = DEPTH.get() > 0;
    if !nested {
        take_faults();
    }
    DEPTH.set(DEPTH.get() + 1);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    DEPTH.set(DEPTH.get() - 1);
    let failed = |reasons: Vec<String>| Error::Device {
        op,
        device: device.to_string(),
        reason: one_line(&reasons),
    };
    match outcome {
        Ok(result) if nested => result,
        Ok(result) => match take_faults() {
            // The driver's own words say more than what followed from them.
            faults if !faults.is_empty() => Err(failed(faults)),
            _ => result,
        },
        Err(_) => Err(failed(take_faults())),
    }
}

/// The distinct reasons on one line, the first ones only.
fn one_line(reasons: &[String]) -> String {
    let mut distinct: Vec<String> = Vec::new();
    for reason in reasons {
        let flat = reason.split_whitespace().collect::<Vec<_>>().join(" ");
        if !distinct.contains(&flat) {
            distinct.push(flat);
        }
    }
    distinct.truncate(3);
    if distinct.is_empty() { "no reason was given".into() } else { distinct.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors_that_name_device_operation_and_reason() {
        let error =
            guarded::<()>("gpu:0 (test)", "streaming gradient", || panic!("out of\n memory"))
                .unwrap_err();
        assert_eq!(error.to_string(), "streaming gradient on gpu:0 (test) failed: out of memory");
        assert_eq!(guarded("gpu:0", "x", || Ok(3)).unwrap(), 3);
    }
}
