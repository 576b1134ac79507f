//! The index page of a figures folder.

use super::experiment::{Experiment, Profile};
use super::outputs::{statements, verdict};
use peft_limits::atomic_file::write_bytes;
use peft_limits::error::Result;
use peft_limits::report::manifest::Manifest;
use std::path::Path;

/// Writes `root/README.md` from the manifests of the experiments' folders under `root`.
///
/// # Errors
/// [`Error::Io`](peft_limits::Error::Io); [`Error::Format`](peft_limits::Error::Format) on a broken
/// manifest.
pub(super) fn write_index(root: &Path, profile: Profile, experiments: &[Experiment]) -> Result<()> {
    let mut page = format!("# Figures ({} profile)\n\n", profile.name());
    page += "Made by `cargo run --release`; do not edit. ";
    page += profile.pick(
        "This is the quick profile: small grids that show the shape of each result in about a \
         minute.\n\n",
        "Each folder holds `table.csv`, the figures drawn from it alone, `findings.md` and \
         `manifest.json`.\n\n",
    );
    let mut sections = String::new();
    for experiment in experiments {
        let manifest = Manifest::read(&root.join(experiment.name))?;
        page += &format!("- [{}](#{})\n", experiment.title, anchor(experiment.title));
        sections += &section(experiment, manifest.as_ref());
    }
    page += &sections;
    write_bytes(&root.join("README.md"), page.as_bytes())
}

fn section(experiment: &Experiment, manifest: Option<&Manifest>) -> String {
    let mut text = format!("\n## {}\n\n", experiment.title);
    let Some(manifest) = manifest else {
        return text + &format!("Not run yet: `cargo run --release --bin {}`.\n", experiment.name);
    };
    for figure in &manifest.figures {
        text += &format!("[![{figure}]({0}/{figure}.png)]({0}/{figure}.svg)\n\n", experiment.name);
    }
    text += &statements(experiment);
    let seed = manifest.config.get("seed").and_then(serde_json::Value::as_u64).unwrap_or(0);
    text += &format!(
        "**Command.** `cargo run --release --bin {} -- --profile {} --seed {seed}` ({:.0} s on {} \
         threads{})\n\n",
        experiment.name,
        manifest.profile,
        manifest.wall_seconds.ceil(),
        manifest.machine.threads,
        manifest.machine.cpu.as_ref().map(|c| format!(", {c}")).unwrap_or_default(),
    );
    text + &verdict(manifest, "###")
}

/// GitHub's anchor of a heading.
fn anchor(title: &str) -> String {
    let kept = title.to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || *c == '-' || *c == '_').collect()
}
