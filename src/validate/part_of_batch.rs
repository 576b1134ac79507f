//! A part of the batch judged alone: some rows, the first tokens of each.
//!
//! The forward pass of those tokens depends on no other: logits and hidden states are compared.
//! Gradients sum over the whole batch; they are compared where nothing else in it counts in the
//! loss, and left out where something does.

use super::dump::{Case, Observed};
use super::objective::Upstream;
use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::error::{Error, Result};
use crate::model::Batch;
use ndarray::{Array2, Axis, s};
use std::ops::Range;

impl Case {
    /// The case with some rows, and the first `tokens` tokens of each, or all of them.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for rows or tokens that the batch does not have, or of which none
    /// counts; for a step of several processes, or one whose recorded loss stands for labels that
    /// are not there.
    pub fn only_rows(mut self, rows: Range<usize>, tokens: Option<usize>) -> Result<Self> {
        let (all, length) = self.batch.input_ids.dim();
        let kept = tokens.unwrap_or(length);
        let text = format!("{}..{}", rows.start, rows.end);
        if rows.is_empty() || rows.end > all {
            return Err(Error::invalid("rows", text, format!("must be a range within 0..{all}")));
        }
        if !(2..=length).contains(&kept) {
            return Err(Error::invalid("tokens", kept, format!("must be 2 to {length}")));
        }
        // A prediction is made one token before its label.
        let counts = |b: usize, t: usize| t > 0 && self.batch.labels[[b, t]] != IGNORED_LABEL;
        let inside = |b: usize, t: usize| rows.contains(&b) && t < kept;
        let places = || (0..all).flat_map(|b| (0..length).map(move |t| (b, t)));
        if !places().any(|(b, t)| inside(b, t) && counts(b, t)) {
            return Err(Error::invalid("rows", text, "must hold a token that counts in the loss"));
        }
        let alone = !places().any(|(b, t)| !inside(b, t) && counts(b, t));
        let parts = self.parts();
        let places: Vec<usize> = rows.clone().flat_map(|b| b * length..b * length + kept).collect();
        let cut = |observed: &mut Observed| {
            // One of another shape is reported as it is.
            if observed.values.nrows() == all * length {
                observed.values = observed.values.select(Axis(0), &places);
                observed.shape = vec![rows.len(), kept, observed.values.ncols()];
            }
        };
        self.trainer.logits.iter_mut().for_each(cut);
        self.trainer.hidden.values_mut().for_each(cut);
        let select = |values: &mut Array2<f64>| *values = values.select(Axis(0), &places);
        self.trainer.masks.values_mut().for_each(select);
        match &mut self.trainer.upstream {
            Some(Upstream::Logits(values) | Upstream::FinalNorm(values)) => select(values),
            None => {}
        }
        self.input.iter_mut().for_each(select);
        if let Some(weights) = &mut self.objective.weights {
            *weights = places.iter().map(|&place| weights[place]).collect();
        }
        if let Some(lengths) = &mut self.trainer.setting.row_lengths {
            *lengths = lengths[rows.clone()].iter().map(|&n| n.min(kept)).collect();
        }
        // Each micro-batch keeps the divisor that the whole one has.
        let micro = self.micro_batches();
        let divisor = |own: &Range<usize>| {
            parts.iter().find(|(part, _)| part == own).map_or(1.0, |(_, d)| *d)
        };
        let left =
            |own: &Range<usize>| own.end.min(rows.end).saturating_sub(own.start.max(rows.start));
        let divisors: Vec<(usize, f64)> = micro
            .iter()
            .map(|own| (left(own), divisor(own)))
            .filter(|(rows, _)| *rows > 0)
            .collect();
        self.loss.micro_batch_rows = divisors.iter().map(|(rows, _)| *rows).collect();
        self.loss.micro_batch_divisors = divisors.iter().map(|(_, divisor)| *divisor).collect();
        self.batch = part_of(&self.batch, &rows, kept)?;
        if !alone {
            self.without_gradients();
        }
        Ok(self)
    }

    /// Leaves out what is a sum over the whole batch.
    fn without_gradients(&mut self) {
        self.forward_only = true;
        self.faint = Some(false);
        self.trained.clear();
        (self.trainer.loss, self.trainer.upstream) = (None, None);
        let trainer = &mut self.trainer;
        for group in [
            &mut trainer.gradients,
            &mut trainer.applied,
            &mut trainer.after,
            &mut trainer.previous,
        ] {
            group.clear();
        }
    }
}

/// Rows of a batch, the first tokens of each.
pub(super) fn part_of(batch: &Batch, rows: &Range<usize>, tokens: usize) -> Result<Batch> {
    let cut = s![rows.clone(), ..tokens];
    let mut part =
        Batch::new(batch.input_ids.slice(cut).to_owned(), batch.labels.slice(cut).to_owned())?;
    if let Some(mask) = &batch.attention_mask {
        part = part.with_attention_mask(mask.slice(cut).to_owned())?;
    }
    if let Some(positions) = &batch.position_ids {
        part = part.with_position_ids(positions.slice(cut).to_owned())?;
    }
    if let Some(documents) = &batch.documents {
        part = part.with_documents(documents.slice(cut).to_owned())?;
    }
    Ok(part)
}
