//! Writes figures, findings and the manifest of a measured table.

use super::experiment::Experiment;
use super::run::caught;
use peft_limits::atomic_file::write_bytes;
use peft_limits::error::{Error, Result};
use peft_limits::report::Table;
use peft_limits::report::manifest::{CheckOutcome, Failure, Manifest, StopReason};
use std::path::Path;

/// A run whose files are all written.
#[derive(Debug)]
pub(super) struct Finished {
    pub table: Table,
    pub manifest: Manifest,
}

impl Finished {
    /// The table (at most `rows` rows), findings, checks and failures for the terminal.
    pub fn to_text(&self, rows: usize) -> String {
        let mut text = format!("{}\n{}", self.manifest.experiment, self.table.to_text(rows));
        self.manifest.findings.iter().for_each(|f| text += &format!("\n{f}\n"));
        if !self.manifest.checks.is_empty() {
            text.push('\n');
        }
        for CheckOutcome { check, passed } in &self.manifest.checks {
            text += &format!("{} {check}\n", if *passed { "PASS" } else { "FAIL" });
        }
        self.manifest
            .failures
            .iter()
            .for_each(|f| text += &format!("FAILED {}: {}\n", f.point, f.error));
        text.push('\n');
        text
    }
}

const STEPS: [&str; 3] = ["(figures)", "(findings)", "(checks)"];

/// Whether a failure's point is one of the steps after measuring.
pub(super) fn is_output_step(point: &str) -> bool {
    STEPS.contains(&point)
}

/// Draws and judges `table`, and writes everything but `table.csv`, the manifest last.
///
/// An experiment's error in drawing or judging is listed among the failures; an error in writing is
/// returned.
pub(super) fn write_outputs(
    experiment: &Experiment,
    folder: &Path,
    table: Table,
    mut manifest: Manifest,
    earlier: Option<&Manifest>,
) -> Result<Finished> {
    manifest.files.clear();
    manifest.figures.clear();
    manifest.add_file(folder, "table.csv")?;
    let mut failures = Vec::new();
    let mut record = |step: &str, error: Error| {
        failures.push(Failure { point: step.into(), error: error.to_string() })
    };

    // A table that was changed by hand may hold what no measurement does.
    let path = folder.join("table.csv");
    let foreign = |text: String| {
        Error::format(&path, "rows", "those of this experiment", format!("others ({text})"))
    };
    match caught(|| (experiment.plot)(&table), foreign) {
        Ok(figures) => {
            for named in figures {
                match caught(|| named.figure.write(folder, &named.name), foreign) {
                    Ok(_) => {
                        manifest.add_file(folder, &format!("{}.svg", named.name))?;
                        manifest.add_file(folder, &format!("{}.png", named.name))?;
                        manifest.figures.push(named.name);
                    }
                    Err(error @ Error::Io { .. }) => return Err(error),
                    Err(error) => record(STEPS[0], error),
                }
            }
        }
        Err(error) => record(STEPS[0], error),
    }
    manifest.findings = caught(|| (experiment.findings)(&table), foreign).unwrap_or_else(|error| {
        record(STEPS[1], error);
        Vec::new()
    });
    let checks =
        caught(|| experiment.checks.map_or(Ok(Vec::new()), |checks| checks(&table)), foreign);
    let checks = checks.unwrap_or_else(|error| {
        record(STEPS[2], error);
        Vec::new()
    });
    manifest.checks =
        checks.into_iter().map(|(check, passed)| CheckOutcome { check, passed }).collect();
    manifest.failures.extend(failures);
    manifest.stop_reason = if !manifest.failures.is_empty() {
        StopReason::PointsFailed
    } else if manifest.checks.iter().any(|c| !c.passed) {
        StopReason::CheckFailed
    } else {
        StopReason::Completed
    };

    write_bytes(&folder.join("findings.md"), findings_page(experiment, &manifest).as_bytes())?;
    manifest.add_file(folder, "findings.md")?;
    manifest.write(folder)?;
    remove_stale_figures(folder, &manifest, earlier);
    Ok(Finished { table, manifest })
}

/// Figures of the earlier result that this one no longer has; best effort.
fn remove_stale_figures(folder: &Path, manifest: &Manifest, earlier: Option<&Manifest>) {
    for name in
        earlier.into_iter().flat_map(|m| &m.figures).filter(|n| !manifest.figures.contains(n))
    {
        if !name.contains(['/', '\\']) {
            let _ = std::fs::remove_file(folder.join(format!("{name}.svg")));
            let _ = std::fs::remove_file(folder.join(format!("{name}.png")));
        }
    }
}

fn findings_page(experiment: &Experiment, manifest: &Manifest) -> String {
    let mut page = format!("# {}\n\n", experiment.title);
    if manifest.profile == "quick" {
        page += "*Quick profile: a small grid, to be read as a check, not as a result.*\n\n";
    }
    page += &statements(experiment);
    page + &verdict(manifest, "##")
}

/// Claim, what would refute it, and doubt, as Markdown.
pub(super) fn statements(experiment: &Experiment) -> String {
    let Experiment { claim, refuted_by, doubt, .. } = experiment;
    format!("**Claim.** {claim}\n\n**Refuted by.** {refuted_by}\n\n**Doubt.** {doubt}\n\n")
}

/// Findings, checks and failures as Markdown under headings of this level.
pub(super) fn verdict(manifest: &Manifest, heading: &str) -> String {
    let mut text = format!("{heading} Findings\n\n");
    manifest.findings.iter().for_each(|f| text += &format!("- {f}\n"));
    if manifest.findings.is_empty() {
        text += "None.\n";
    }
    if !manifest.checks.is_empty() {
        text += &format!("\n{heading} Checks\n\n");
        for CheckOutcome { check, passed } in &manifest.checks {
            text += &format!("- {}: {check}\n", if *passed { "pass" } else { "**fail**" });
        }
    }
    if !manifest.failures.is_empty() {
        text += &format!("\n{heading} Failures\n\n");
        manifest.failures.iter().for_each(|f| text += &format!("- `{}`: {}\n", f.point, f.error));
    }
    text
}
