//! The ladder: shapes and names, loss, logits, hidden states, gradients, parameters after the step.

use super::diagnosis::applied;
use super::dump::{Case, Observed};
use super::measure::{Measure, floor, measure};
use super::reference::{Evidence, hidden_name, select_rows};
use super::update;
use crate::linalg::norms::frobenius;
use serde::Serialize;
use std::collections::BTreeMap;

/// How a rung came out.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "status", content = "why")]
pub enum Outcome {
    /// Within tolerance.
    Pass,
    /// Beyond it.
    Fail,
    /// Not checked, with the reason.
    Skipped(String),
}

/// The rungs, in the order in which they are climbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RungName {
    /// What several processes have in common.
    Ranks,
    /// Names and shapes of the gradients.
    Names,
    /// The loss.
    Loss,
    /// The logits.
    Logits,
    /// Output of every layer.
    Hidden,
    /// Output of one attention kernel, which has no other forward results.
    Output,
    /// Every gradient by itself.
    Gradients,
    /// The factor common to all gradients.
    Scale,
    /// The gradients that the optimizer saw, from those that backward left.
    Applied,
    /// Parameters after the optimizer's step.
    Update,
    /// Faults that no tensor shows by itself.
    Faint,
}

impl RungName {
    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ranks => "ranks",
            Self::Names => "names and shapes",
            Self::Loss => "loss",
            Self::Logits => "logits",
            Self::Hidden => "hidden states",
            Self::Output => "output",
            Self::Gradients => "gradients",
            Self::Scale => "gradient scale",
            Self::Applied => "applied gradients",
            Self::Update => "update",
            Self::Faint => "faint faults",
        }
    }

    /// Whether rerunning the step with a fault in it predicts this rung: what the step computes,
    /// before the optimizer.
    pub(super) fn is_of_the_step(self) -> bool {
        (Self::Loss..Self::Applied).contains(&self)
    }
}

impl Serialize for RungName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// The rung of that name, if it was climbed.
pub(super) fn rung_of(rungs: &[Rung], name: RungName) -> Option<&Rung> {
    rungs.iter().find(|r| r.name == name)
}

/// One rung.
#[derive(Debug, Clone, Serialize)]
pub struct Rung {
    /// Its name.
    pub name: RungName,
    /// How it came out.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What was wrong beyond numbers: missing and unknown tensors, shapes. Where the rung passed,
    /// what should be known of it.
    pub problems: Vec<String>,
    /// Measured tensors.
    pub tensors: Vec<Measure>,
}

impl Rung {
    pub(super) fn of(name: RungName, tensors: Vec<Measure>) -> Self {
        let outcome =
            if tensors.iter().all(Measure::passes) { Outcome::Pass } else { Outcome::Fail };
        Self { name, outcome, problems: Vec::new(), tensors }
    }

    pub(super) fn skipped(name: RungName, why: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Skipped(why.into()),
            problems: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// Whether it failed.
    pub fn failed(&self) -> bool {
        self.outcome == Outcome::Fail
    }

    /// Whether a tensor is outside its tolerance.
    pub(super) fn fails(&self, tensor: &str) -> bool {
        self.tensors.iter().any(|m| m.name == tensor && !m.passes())
    }

    /// Largest share of a tolerance.
    pub fn share(&self) -> f64 {
        self.tensors.iter().map(|m| m.share).fold(0.0, f64::max)
    }
}

/// How many times the root mean square of the rounded reference's own factors the mean factor may
/// be off. Clean dumps reach a third of this.
pub const SCALE_MULTIPLE: f64 = 6.0;

/// Climbs every rung of a case.
pub fn climb(case: &Case, exact: &Evidence, rounded: &Evidence) -> Vec<Rung> {
    let mut rungs = climb_of_step(case, exact, rounded);
    rungs.extend([applied::rung(case), update::rung(case)]);
    rungs
}

/// Without the optimizer's rungs, which no reference changes.
pub(super) fn climb_of_step(case: &Case, exact: &Evidence, rounded: &Evidence) -> Vec<Rung> {
    let gradients = gradients(case, exact, rounded);
    let scale = gradient_factor(case, &gradients);
    vec![
        names(case, exact),
        loss(case, exact, rounded),
        logits(case, exact, rounded),
        hidden(case, exact, rounded),
        gradients,
        scale,
    ]
}

fn unit(case: &Case) -> f64 {
    floor(case.rounding.coarsest())
}

fn names(case: &Case, exact: &Evidence) -> Rung {
    let mut rung = Rung::of(RungName::Names, Vec::new());
    for (name, observed) in &case.trainer.gradients {
        match exact.gradients.get(name) {
            None => rung
                .problems
                .push(format!("gradient of {name}: the reference trains no such tensor")),
            Some(want) if want.dim() != observed.values.dim() => {
                let (rows, columns) = want.dim();
                rung.problems.push(format!(
                    "gradient of {name}: shape {:?}, expected [{rows}, {columns}]",
                    observed.shape
                ));
            }
            Some(_) => {}
        }
    }
    for name in &case.trained {
        if !case.trainer.gradients.contains_key(name) {
            rung.problems
                .push(format!("gradient of {name}: absent, though the parameter is trained"));
        }
    }
    if !rung.problems.is_empty() {
        rung.outcome = Outcome::Fail;
    }
    rung
}

fn loss(case: &Case, exact: &Evidence, rounded: &Evidence) -> Rung {
    if case.given().is_some() {
        return Rung::skipped(
            RungName::Loss,
            "everything below is judged from the recorded gradient of the loss on",
        );
    }
    if case.forward_only {
        return Rung::skipped(RungName::Loss, OF_ALL);
    }
    let Some(got) = case.trainer.loss else {
        return Rung::skipped(RungName::Loss, "the dump holds no loss");
    };
    let of = |x: f64| ndarray::arr2(&[[x]]);
    // Rounding errors of the positions cancel in the mean, by chance sometimes wholly: one unit of
    // the format is allowed.
    let allowed = unit(case).max(case.rounding.coarsest().epsilon().min(1e-2));
    let allowed = if case.rounding.coarsest() == super::Precision::F64 {
        unit(case)
    } else {
        allowed.max(4e-6)
    };
    Rung::of(
        RungName::Loss,
        vec![measure("loss", &of(got), &of(exact.loss), &of(rounded.loss), allowed, 1.0)],
    )
}

fn rows_measure(
    case: &Case,
    name: &str,
    got: &Observed,
    exact: &ndarray::Array2<f64>,
    rounded: &ndarray::Array2<f64>,
) -> Measure {
    let rows = case.real_rows();
    if got.values.dim() != exact.dim() || rows.len() == exact.nrows() {
        return measure(name, &got.values, exact, rounded, unit(case), 1.0);
    }
    let of = |a| select_rows(a, &rows);
    measure(name, &of(&got.values), &of(exact), &of(rounded), unit(case), 1.0)
}

fn logits(case: &Case, exact: &Evidence, rounded: &Evidence) -> Rung {
    match (&case.trainer.logits, &exact.logits, &rounded.logits) {
        (Some(got), Some(exact), Some(rounded)) => {
            Rung::of(RungName::Logits, vec![rows_measure(case, "logits", got, exact, rounded)])
        }
        _ => Rung::skipped(RungName::Logits, "the dump holds no logits"),
    }
}

fn hidden(case: &Case, exact: &Evidence, rounded: &Evidence) -> Rung {
    if case.trainer.hidden.is_empty() {
        return Rung::skipped(RungName::Hidden, "the dump holds no hidden states");
    }
    let mut measures = Vec::new();
    let mut problems = Vec::new();
    for (layer, got) in &case.trainer.hidden {
        match (exact.hidden.get(layer), rounded.hidden.get(layer)) {
            (Some(exact), Some(rounded)) => {
                measures.push(rows_measure(case, &hidden_name(*layer), got, exact, rounded));
            }
            _ => problems
                .push(format!("hidden.{layer}: the model has {} layers", case.model.layers.len())),
        }
    }
    let mut rung = Rung::of(RungName::Hidden, measures);
    if !problems.is_empty() {
        (rung.outcome, rung.problems) = (Outcome::Fail, problems);
    }
    rung
}

/// Typical norm of a gradient, which stands in for that of one that is zero.
pub(super) fn gradient_scale(gradients: &BTreeMap<String, ndarray::Array2<f64>>) -> f64 {
    let norms: Vec<f64> =
        gradients.values().map(|g| frobenius(&g.view())).filter(|n| *n > 0.0).collect();
    let squares: f64 = norms.iter().map(|n| n * n).sum();
    (squares / norms.len().max(1) as f64).sqrt().max(f64::MIN_POSITIVE)
}

/// Why a part of the batch has none, where the rest of it counts too.
const OF_ALL: &str = "a sum over the whole batch, of which a part is judged";

fn gradients(case: &Case, exact: &Evidence, rounded: &Evidence) -> Rung {
    if case.forward_only {
        return Rung::skipped(RungName::Gradients, OF_ALL);
    }
    if case.trainer.gradients.is_empty() && case.trained.is_empty() {
        return Rung::skipped(RungName::Gradients, "the dump holds no gradients");
    }
    Rung::of(RungName::Gradients, gradient_measures(case, exact, rounded))
}

/// One factor common to all gradients, which shows long before single tensors leave their
/// tolerance: the mean over tensors of G . R / ||R||^2 - 1, against the root mean square of the
/// same for the rounded reference.
fn gradient_factor(case: &Case, gradients: &Rung) -> Rung {
    let along: Vec<(f64, f64)> = gradients
        .tensors
        .iter()
        .filter(|m| m.along.is_finite())
        .map(|m| (m.along, m.rounding_along))
        .collect();
    // A few tensors do not average their rounding out.
    if along.len() < 4 {
        return Rung::skipped(RungName::Scale, "fewer than four gradients");
    }
    let n = along.len() as f64;
    let mean = along.iter().map(|a| a.0).sum::<f64>() / n;
    let noise = (along.iter().map(|a| a.1 * a.1).sum::<f64>() / n).sqrt();
    let tolerance = SCALE_MULTIPLE * noise + unit(case);
    let measure = Measure {
        name: "mean factor of the gradients".into(),
        relative: mean.abs(),
        rounding: noise,
        tolerance,
        along: mean,
        rounding_along: noise,
        cosine: 1.0,
        norm_ratio: 1.0 + mean,
        worst: None,
        share: mean.abs() / tolerance,
    };
    Rung::of(RungName::Scale, vec![measure])
}

/// Every trained tensor against the reference.
fn gradient_measures(case: &Case, exact: &Evidence, rounded: &Evidence) -> Vec<Measure> {
    let scale = gradient_scale(&exact.gradients);
    let mut all: Vec<Measure> = Vec::new();
    for name in &case.trained {
        let (Some(exact), Some(rounded)) = (exact.gradients.get(name), rounded.gradients.get(name))
        else {
            continue;
        };
        // A tensor that is absent counts as zero: no gradient reached it.
        let zero = || ndarray::Array2::zeros(exact.dim());
        let got = case.trainer.gradients.get(name).map_or_else(zero, |o| o.values.clone());
        all.push(measure(name, &got, exact, rounded, unit(case), scale));
    }
    all
}
