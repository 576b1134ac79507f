//! Ctrl-C: the first asks runs to stop between points, the second ends the process.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Whether the user asked to stop. A point that takes minutes should look at this now and then and
/// return [`Error::Interrupted`](peft_limits::Error::Interrupted); it is then measured again by
/// `--resume`.
pub fn interrupted() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Installs the process's one handler; later calls do nothing.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let handler = || {
            if ASKED.swap(true, Ordering::Relaxed) {
                std::process::exit(peft_limits::error::INTERRUPTED.into());
            }
            eprintln!("stopping after the points in progress; press Ctrl-C again to stop at once");
        };
        if let Err(error) = ctrlc::set_handler(handler) {
            eprintln!("Ctrl-C will end the run at once: {error}");
        }
    });
}
