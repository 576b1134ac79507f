//! Tokens of a mixture that stand between two experts: where their scores differ by less than the
//! trainer's rounding, either choice is right, and the reference must make the trainer's.

use super::dump::Case;
use super::ladder::climb;
use super::reference::{Part, Variant};
use super::report::Watch;
use crate::error::Result;
use crate::model::{Place, Point};
use ndarray::Array2;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// A token whose last chosen expert and the next one score alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tie {
    /// Layer.
    pub layer: usize,
    /// Row of the whole batch.
    pub row: usize,
    /// The expert that sees the token.
    pub chosen: usize,
    /// The one that does not.
    pub other: usize,
}

/// Scores within so many times their typical rounding are alike.
const ALIKE: f64 = 8.0;
/// Most tokens that are looked at.
const MOST: usize = 16;

/// Orders the scores of the ties in a part of the batch that begins at row `first`.
pub(super) fn settle_scores(ties: &[Tie], place: Place, first: usize, scores: &mut Array2<f64>) {
    if place.point != Point::Router {
        return;
    }
    for tie in ties.iter().filter(|tie| place.layer == Some(tie.layer)) {
        let Some(row) = tie.row.checked_sub(first).filter(|row| *row < scores.nrows()) else {
            continue;
        };
        let (a, b) = (scores[[row, tie.chosen]], scores[[row, tie.other]]);
        let (high, low) = (a.max(b), a.min(b));
        // Equal ones would fall to the first.
        scores[[row, tie.chosen]] = high + 1e-12 * (1.0 + high.abs());
        scores[[row, tie.other]] = low;
    }
}

/// The scores of every layer with experts, exact or rounded.
fn scores(case: &Case, rounded: bool) -> Result<BTreeMap<usize, Array2<f64>>> {
    let seen: RefCell<BTreeMap<usize, Vec<Array2<f64>>>> = RefCell::default();
    let tap = |place: Place, x: &mut Array2<f64>| {
        if let (Point::Router, Some(layer), false) = (place.point, place.layer, place.gradient) {
            seen.borrow_mut().entry(layer).or_default().push(x.clone());
        }
    };
    let rounding = rounded.then_some(case.rounding);
    let part = Part { forward_only: true, ..Part::default() };
    case.run(&Variant { tap: Some(&tap), rounding, part, ..Variant::default() })?;
    let joined = |parts: Vec<Array2<f64>>| {
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        ndarray::concatenate(ndarray::Axis(0), &views).unwrap_or_default()
    };
    Ok(seen.into_inner().into_iter().map(|(layer, parts)| (layer, joined(parts))).collect())
}

/// The case with its ties, each as the exact reference decides it, so that every run of the
/// reference does; `None` where there are none to look at.
///
/// # Errors
/// As [`Case::run`].
pub fn with_ties(case: &Case) -> Result<Option<Case>> {
    let Some(experts) = &case.model.config.options.experts else { return Ok(None) };
    if case.rounding.coarsest().epsilon() < 1e-4 || experts.per_token >= experts.count {
        return Ok(None);
    }
    let (exact, rounded) = (scores(case, false)?, scores(case, true)?);
    let mut ties: Vec<(f64, Tie)> = Vec::new();
    for (layer, exact) in &exact {
        let Some(rounded) = rounded.get(layer).filter(|r| r.dim() == exact.dim()) else { continue };
        // The median: a token that went elsewhere below has other scores altogether.
        let mut noise: Vec<f64> = (rounded - exact).iter().map(|x| x.abs()).collect();
        noise.sort_by(f64::total_cmp);
        let typical = noise.get(noise.len() / 2).copied().unwrap_or(0.0).max(f64::MIN_POSITIVE);
        for (row, scores) in exact.rows().into_iter().enumerate() {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            let (chosen, other) = (order[experts.per_token - 1], order[experts.per_token]);
            let apart = (scores[chosen] - scores[other]) / typical;
            if apart < ALIKE {
                ties.push((apart, Tie { layer: *layer, row, chosen, other }));
            }
        }
    }
    ties.sort_by(|a, b| a.0.total_cmp(&b.0));
    ties.truncate(MOST);
    let mut tied = case.clone();
    tied.ties = ties.into_iter().map(|(_, tie)| tie).collect();
    Ok((!tied.ties.is_empty()).then_some(tied))
}

/// How far the reference is from the trainer: the sum over all tensors of the squared share beyond
/// one.
fn distance(case: &Case) -> Result<f64> {
    let exact = case.run(&Variant::default())?;
    let rounded = case.run(&Variant { rounding: Some(case.rounding), ..Variant::default() })?;
    let rungs = climb(case, &exact, &rounded);
    let tensors = rungs.iter().flat_map(|rung| &rung.tensors);
    Ok(tensors.map(|m| m.share.min(1e6).powi(2)).sum())
}

/// The case with ties decided as the trainer seems to have, and how many that changes; `None` if no
/// change brings it nearer.
///
/// # Errors
/// As [`Case::run`].
pub fn as_trainer(case: &Case, watch: &dyn Watch) -> Result<Option<(Case, usize)>> {
    let mut best = (case.clone(), distance(case)?);
    let mut moved = 0;
    loop {
        watch.begins("tokens between two experts");
        let mut next: Option<(Case, f64)> = None;
        for i in (0..case.ties.len()).filter(|&i| best.0.ties[i] == case.ties[i]) {
            let mut other = best.0.clone();
            let Tie { chosen, other: next_best, .. } = other.ties[i];
            (other.ties[i].chosen, other.ties[i].other) = (next_best, chosen);
            let distance = distance(&other)?;
            // A change that is the trainer's removes a good part of what is left.
            if distance < 0.8 * next.as_ref().map_or(best.1, |(_, d)| *d) {
                next = Some((other, distance));
            }
        }
        match next {
            Some(found) => {
                best = found;
                moved += 1;
            }
            None => break,
        }
    }
    Ok((moved > 0).then_some((best.0, moved)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn the_chosen_of_two_experts_scores_higher_in_its_own_layer_and_part() {
        let tie = |row| Tie { layer: 1, row, chosen: 2, other: 0 };
        let place = |layer| Place { layer: Some(layer), point: Point::Router, gradient: false };
        let before = array![[0.5, -1.0, 0.4], [0.3, 0.2, 0.3]];
        for (layer, first, row, changed) in
            [(1, 4, 4, Some(0)), (1, 4, 5, Some(1)), (0, 4, 4, None), (1, 5, 4, None)]
        {
            let mut scores = before.clone();
            settle_scores(&[tie(row)], place(layer), first, &mut scores);
            for i in 0..2 {
                if changed == Some(i) {
                    assert!(scores[[i, 2]] > scores[[i, 0]], "{scores}");
                    assert!((scores[[i, 2]] - before[[i, 0]].max(before[[i, 2]])).abs() < 1e-9);
                } else {
                    assert_eq!(
                        scores.row(i),
                        before.row(i),
                        "layer {layer}, part from {first}, tie in row {row}"
                    );
                }
            }
        }
    }
}
