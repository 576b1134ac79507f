//! Progress on standard error: bars on a terminal, a line per experiment elsewhere.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// The process's one progress display.
pub(super) struct Progress {
    bars: MultiProgress,
    overall: Option<ProgressBar>,
    terminal: bool,
}

/// Progress of one experiment.
pub(super) struct ExperimentProgress<'a> {
    progress: &'a Progress,
    bar: ProgressBar,
    name: &'static str,
    started: Instant,
}

impl Progress {
    /// A display; `experiments` is their number when several run in this process.
    pub fn new(experiments: Option<usize>) -> Self {
        let bars = MultiProgress::new();
        let terminal = std::io::stderr().is_terminal();
        let overall = experiments.filter(|_| terminal).map(|n| {
            let bar = bars.add(ProgressBar::new(n as u64));
            bar.set_style(style("{prefix:>24} [{bar:30}] {pos}/{len} experiments  {elapsed}"));
            bar.set_prefix("all");
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { bars, overall, terminal }
    }

    /// Announces an experiment of `points` points, of which `reused` need no measurement.
    pub fn start(
        &self,
        name: &'static str,
        points: usize,
        reused: usize,
    ) -> ExperimentProgress<'_> {
        let bar = if self.terminal {
            let bar = self.bars.add(ProgressBar::new(points as u64));
            bar.set_style(style(
                "{prefix:>24} [{bar:30}] {pos}/{len}  {elapsed}, {eta} left  {wide_msg}",
            ));
            bar.set_prefix(name);
            bar.set_position(reused as u64);
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        } else {
            let kept = if reused > 0 {
                format!(", {reused} kept from an earlier run")
            } else {
                String::new()
            };
            eprintln!("{name}: {points} points{kept}");
            ProgressBar::hidden()
        };
        ExperimentProgress { progress: self, bar, name, started: Instant::now() }
    }

    /// Runs `write` (which may print) with the bars out of the way.
    pub fn suspend(&self, write: impl FnOnce()) {
        self.bars.suspend(write);
    }

    /// Counts an experiment as done.
    pub fn experiment_done(&self) {
        if let Some(bar) = &self.overall {
            bar.inc(1);
        }
    }

    /// Removes the bars.
    pub fn close(&self) {
        if let Some(bar) = &self.overall {
            bar.finish_and_clear();
        }
    }
}

impl ExperimentProgress<'_> {
    /// A point begins.
    pub fn point_begins(&self, label: &str) {
        self.bar.set_message(label.to_string());
    }

    /// A point is finished.
    pub fn point_done(&self) {
        self.bar.inc(1);
    }

    /// The experiment ends; `how` is one word or two.
    pub fn finish(self, how: &str) {
        self.bar.finish_and_clear();
        let text = format!("{}: {how} in {:.1} s", self.name, self.started.elapsed().as_secs_f64());
        self.progress.suspend(|| eprintln!("{text}"));
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}
