//! What the results were made on: processor, memory, system, compiler and source state.
//!
//! Nothing here names a user or an absolute path.

use crate::streams::sha256_hex;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

/// The machine a program runs on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Processor model as the system names it, if it does.
    pub cpu: Option<String>,
    /// Logical cores available to the process.
    pub logical_cores: usize,
    /// Threads of the rayon pool.
    pub threads: usize,
    /// Processes of the MPI job that shared the work, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<usize>,
    /// Installed memory in bytes, if the system tells.
    pub memory_bytes: Option<u64>,
    /// Operating system and architecture, such as `linux x86_64`.
    pub system: String,
}

impl Machine {
    /// Describes this machine.
    pub fn here() -> Self {
        let kinds = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(kinds);
        let brand = system.cpus().first().map(|cpu| cpu.brand().trim().to_string());
        Self {
            cpu: brand.filter(|name| !name.is_empty()),
            logical_cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            threads: rayon::current_num_threads(),
            ranks: None,
            memory_bytes: Some(system.total_memory()).filter(|bytes| *bytes > 0),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}

/// The state of the sources the program is run from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sources {
    /// Version of the package, from the build.
    pub package_version: String,
    /// `HEAD` of the git checkout the program runs in; absent outside a checkout of this package.
    pub git_commit: Option<String>,
    /// Whether tracked or untracked files outside `figures/` differ from `HEAD`.
    pub git_dirty: Option<bool>,
    /// SHA-256 of the checkout's Cargo.lock.
    pub cargo_lock_sha256: Option<String>,
    /// `rustc -V` at run time.
    pub rustc: Option<String>,
    /// Whether the program was built with optimisation for release (no debug assertions).
    pub release_build: bool,
}

impl Sources {
    /// Reads the state of the checkout around the current folder.
    pub fn here() -> Self {
        let root = std::env::current_dir().ok().and_then(|here| checkout_root(&here));
        let git = |args: &[&str]| command_output("git", args, root.as_deref()?);
        let commit = git(&["rev-parse", "HEAD"]);
        Self {
            package_version: env!("CARGO_PKG_VERSION").into(),
            git_dirty: commit
                .as_ref()
                .and_then(|_| git(&["status", "--porcelain", "--", ".", ":(exclude)figures"]))
                .map(|s| !s.is_empty()),
            git_commit: commit,
            cargo_lock_sha256: root
                .as_ref()
                .and_then(|r| std::fs::read(r.join("Cargo.lock")).ok())
                .map(|b| sha256_hex(&b)),
            rustc: command_output("rustc", &["-V"], Path::new(".")),
            release_build: !cfg!(debug_assertions),
        }
    }
}

/// The nearest enclosing folder whose Cargo.toml is this package's.
fn checkout_root(from: &Path) -> Option<PathBuf> {
    let own = concat!("name = \"", env!("CARGO_PKG_NAME"), "\"");
    let is_own = |folder: &&Path| {
        std::fs::read_to_string(folder.join("Cargo.toml"))
            .is_ok_and(|text| text.lines().any(|l| l.trim() == own))
    };
    from.ancestors().find(is_own).map(Path::to_path_buf)
}

fn command_output(program: &str, args: &[&str], folder: &Path) -> Option<String> {
    let output = Command::new(program).args(args).current_dir(folder).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// The command line without machine paths: the program's file name, then the arguments, absolute
/// paths made relative to the current folder or cut to their last component.
pub fn portable_command_line(arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    let here = std::env::current_dir().unwrap_or_default();
    let file_name =
        |p: &Path| p.file_name().map_or_else(|| "/".into(), |n| n.to_string_lossy().into_owned());
    let portable = |value: &str| {
        let path = Path::new(value);
        if !path.is_absolute() {
            return value.to_string();
        }
        match path.strip_prefix(&here) {
            Ok(inside) if !inside.as_os_str().is_empty() => inside.to_string_lossy().into_owned(),
            _ => file_name(path),
        }
    };
    let one = |(i, argument): (usize, String)| match argument.split_once('=') {
        _ if i == 0 => file_name(Path::new(&argument)),
        Some((flag, value)) if flag.starts_with('-') => format!("{flag}={}", portable(value)),
        _ => portable(&argument),
    };
    arguments.into_iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_name_no_machine_path() {
        let here = std::env::current_dir().unwrap();
        let inside = here.join("figures/x").to_string_lossy().into_owned();
        let given = [
            "/a/b/target/release/prog",
            "--out",
            &inside,
            "--out=/secret/home/y",
            "--seed=3",
            "rel/z",
        ];
        let kept = portable_command_line(given.map(String::from));
        assert_eq!(kept, ["prog", "--out", "figures/x", "--out=y", "--seed=3", "rel/z"]);
    }

    #[test]
    fn the_checkout_is_found_from_inside_only() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(checkout_root(&here.join("src/report")).unwrap(), here);
        assert_eq!(checkout_root(tempfile::tempdir().unwrap().path()), None);
    }

    #[test]
    fn this_machine_has_cores() {
        let machine = Machine::here();
        assert!(machine.logical_cores > 0 && machine.threads > 0, "{machine:?}");
    }
}
