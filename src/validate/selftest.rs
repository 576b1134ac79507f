//! Every known fault planted into a right dump, to show which this dump can reveal.
//!
//! A fault that is found by running the step is planted as what it changes: G + (F - R), G the
//! trainer's tensors, R the exact step and F the same with the fault. The trainer's own rounding
//! stays.

use super::diagnosis::{self, Context};
use super::dump::{Case, Observed};
use super::ladder::{Rung, climb};
use super::reference::{Evidence, Variant};
use super::report::{Report, Watch, validate};
use crate::error::{Error, Result};
use ndarray::Array2;
use serde::Serialize;
use std::cell::RefCell;

/// A planted fault and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct Planted {
    /// Its name.
    pub fault: String,
    /// What is wrong, in a sentence.
    pub what: String,
    /// Largest gap that it makes, in shares of the tolerances.
    pub share: f64,
    /// Whether the dump with it fails.
    pub failed: bool,
    /// Names that were given, the best explanation first.
    pub named: Vec<String>,
}

impl Planted {
    /// Whether the fault is the first name given.
    pub fn named_first(&self) -> bool {
        self.named.first() == Some(&self.fault)
    }

    /// Whether some tensor is outside its tolerance, so that the dump has to fail.
    pub fn shows(&self) -> bool {
        self.share > 1.0
    }
}

/// Plants each fault that the step can have, and validates.
///
/// # Errors
/// As [`validate`]; [`Error::InvalidParam`] if the dump does not pass as it is, or holds no labels.
pub fn selftest(case: &Case, watch: &dyn Watch) -> Result<Vec<Planted>> {
    let report = validate(case, watch)?;
    if !report.passed {
        return Err(Error::invalid(
            "--selftest",
            "a dump that fails",
            "faults can be planted into a right step only",
        ));
    }
    if case.batch.counted() == 0 {
        return Err(Error::invalid(
            "--selftest",
            "a dump without labels",
            "the loss must be that of labels",
        ));
    }
    let mut clean = case.clone();
    // The update follows from the gradients, which change; a recorded gradient of the loss would,
    // too.
    clean.trainer.after.clear();
    clean.trainer.applied.clear();
    clean.trainer.upstream = None;
    let exact = clean.run(&Variant::default())?;
    let rounded = clean.run(&Variant { rounding: Some(clean.rounding), ..Variant::default() })?;
    let rungs = climb(&clean, &exact, &rounded);
    let context = Context::new(&clean, &exact, &rounded, &rungs);
    let all: RefCell<Vec<Planted>> = RefCell::default();
    let judge = |fault: &str, what: &str, planted: &Case| -> Result<()> {
        watch.begins(&format!("planted: {fault}"));
        let share = climb(planted, &exact, &rounded).iter().map(Rung::share).fold(0.0, f64::max);
        // What cannot be judged any more has not passed.
        let (failed, named) = match validate(planted, watch) {
            Ok(Report { passed, diagnoses, .. }) => {
                (!passed, diagnoses.into_iter().map(|d| d.fault).collect())
            }
            Err(_) => (true, Vec::new()),
        };
        all.borrow_mut().push(Planted {
            fault: fault.into(),
            what: what.into(),
            share,
            failed,
            named,
        });
        Ok(())
    };
    diagnosis::list(&context, watch, &|fault, predicted| {
        judge(fault.name, &fault.what, &with_fault(&clean, &exact, predicted))
    })?;
    for (name, what, edit) in EDITS {
        let mut planted = clean.clone();
        if edit(&mut planted) {
            judge(name, what, &planted)?;
        }
    }
    Ok(all.into_inner())
}

/// The case with what a fault changes added to the trainer's tensors.
fn with_fault(case: &Case, exact: &Evidence, predicted: &Evidence) -> Case {
    let mut planted = case.clone();
    let add = |to: &mut Observed, right: Option<&Array2<f64>>, faulty: Option<&Array2<f64>>| {
        if let (Some(right), Some(faulty)) = (right, faulty)
            && to.values.dim() == right.dim()
            && to.values.dim() == faulty.dim()
        {
            to.values += &(faulty - right);
            to.precision.round_array(&mut to.values);
            // What a fault makes zero has no rounding.
            to.values.zip_mut_with(faulty, |x, f| *x = if f.abs() > 0.0 { *x } else { 0.0 });
        }
    };
    let trainer = &mut planted.trainer;
    if let Some(loss) = &mut trainer.loss {
        *loss += predicted.loss - exact.loss;
    }
    if let Some(logits) = &mut trainer.logits {
        add(logits, exact.logits.as_ref(), predicted.logits.as_ref());
    }
    for (layer, hidden) in &mut trainer.hidden {
        add(hidden, exact.hidden.get(layer), predicted.hidden.get(layer));
    }
    for (name, gradient) in &mut trainer.gradients {
        add(gradient, exact.gradients.get(name), predicted.gradients.get(name));
    }
    planted
}

/// Changes the trainer's gradients; says whether there was something to change.
type Edit = fn(&mut Case) -> bool;

/// (name, what, edit): faults that are recognised by algebra on the gradients.
const EDITS: [(&str, &str, Edit); 6] = [
    ("sign", "all gradients have the other sign", |case| times(case, -1.0)),
    ("loss-scale", "the gradients carry a loss scale of 1024", |case| times(case, 1024.0)),
    ("not-finite", "one entry of a gradient is not a number", |case| {
        case.trainer
            .gradients
            .values_mut()
            .next()
            .and_then(|g| g.values.first_mut())
            .map(|x| *x = f64::NAN)
            .is_some()
    }),
    ("outside-graph", "one gradient is zero", |case| {
        let first =
            case.trainer.gradients.values_mut().find(|g| g.values.iter().any(|x| x.abs() > 0.0));
        first.map(|g| g.values.fill(0.0)).is_some()
    }),
    ("layer-dropped", "a layer between others has no gradient", |case| {
        let middle = format!(".layers.{}.", case.model.layers.len() / 2);
        let gradients =
            case.trainer.gradients.iter_mut().filter(|(name, _)| name.contains(&middle));
        case.model.layers.len() > 2 && gradients.map(|(_, g)| g.values.fill(0.0)).count() > 0
    }),
    ("exchanged", "two gradients of one shape are exchanged", |case| {
        let large = |g: &Observed| g.values.iter().any(|x| x.abs() > 0.0);
        let names: Vec<String> = case
            .trainer
            .gradients
            .iter()
            .filter(|(_, g)| large(g))
            .map(|(n, _)| n.clone())
            .collect();
        let shape = |name: &String| case.trainer.gradients[name].values.dim();
        let pair = names.iter().enumerate().find_map(|(i, a)| {
            names[i + 1..].iter().find(|b| shape(a) == shape(b)).map(|b| (a.clone(), b.clone()))
        });
        let Some((a, b)) = pair else { return false };
        let (one, other) = (case.trainer.gradients[&a].clone(), case.trainer.gradients[&b].clone());
        case.trainer.gradients.insert(a, other);
        case.trainer.gradients.insert(b, one);
        true
    }),
];

fn times(case: &mut Case, factor: f64) -> bool {
    case.trainer.gradients.values_mut().for_each(|g| g.values.mapv_inplace(|x| x * factor));
    !case.trainer.gradients.is_empty()
}
