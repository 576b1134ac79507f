//! One batch whose sequences use different updates.

use super::super::batch::Batch;
use super::super::instruments::Instruments;
use super::super::parameters::Model;
use super::super::projection::Projection;
use super::ModelUpdate;
use crate::adapters::update::WeightUpdate;
use crate::blocks::linear::linear_forward;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::Cpu;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;
use std::ops::Range;

impl<T: Real> Model<T> {
    /// Logits of every position, `(B T) x V`, sequence i under update `of_sequence[i]` (`None`: the
    /// model as it is).
    ///
    /// The model's own products run once over the whole batch; each update adds its part on its own
    /// sequences only, y += x update^T, without ever forming a merged weight. Sequences of one
    /// update are brought together first, so each part is one product. Cost beyond
    /// [`Model::logits`]: per token and projection k in (k out) for a slice of k rows (columns), r
    /// (in + out) for rank r.
    ///
    /// # Errors
    /// As [`Model::logits`]; [`Error::InvalidParam`] if `of_sequence` does not name one of
    /// `updates` for each sequence, or an update does not fit the model, or the model's heads and
    /// channels are reordered.
    pub fn logits_mixed(
        &self,
        ids: ArrayView2<u32>,
        updates: &[&ModelUpdate<T>],
        of_sequence: &[Option<usize>],
        cost: &mut Cost,
    ) -> Result<Array2<T>> {
        let (sequences, length) = ids.dim();
        if of_sequence.len() != sequences {
            return Err(Error::invalid(
                "of_sequence",
                of_sequence.len(),
                format!("must hold {sequences} choices"),
            ));
        }
        if let Some(bad) = of_sequence.iter().flatten().find(|&&u| u >= updates.len()) {
            return Err(Error::invalid(
                "of_sequence",
                bad,
                format!("only {} updates are given", updates.len()),
            ));
        }
        if self.layers.iter().any(|layer| layer.order.is_some()) {
            return Err(Error::invalid(
                "model",
                "reordered by S2FT",
                "must be in the checkpoint's order here",
            ));
        }
        updates.iter().try_for_each(|update| update.check_fits(self))?;
        let mut order: Vec<usize> = (0..sequences).collect();
        order.sort_by_key(|&i| of_sequence[i]);
        let groups = groups(&order, of_sequence, length);
        let add = |e: &mut Cpu<T>, place: (usize, Projection), x: &Array2<T>, y: &mut Array2<T>| {
            // Each group has its own rows of y, so groups run at the same time.
            let (mut rest, mut at, mut parts) = (y.view_mut(), 0, Vec::with_capacity(groups.len()));
            for (update, rows) in &groups {
                let (_, tail) = rest.split_at(Axis(0), rows.start - at);
                let (own, tail) = tail.split_at(Axis(0), rows.len());
                (rest, at) = (tail, rows.end);
                if let Some(entry) = updates[*update].entries.get(&place) {
                    parts.push((entry, x.slice(s![rows.clone(), ..]), own));
                }
            }
            let serve = |(entry, x, mut y): (&WeightUpdate<T>, ArrayView2<T>, ArrayViewMut2<T>)| {
                let mut cost = Cost::default();
                entry.forward_add(x, &mut y, &mut cost);
                cost
            };
            let costs: Vec<Cost> = parts.into_par_iter().map(serve).collect();
            costs.iter().for_each(|part| e.cost.add_operations(part));
            Ok(())
        };
        let batch = Batch::new(ids.select(Axis(0), &order), Array2::zeros(ids.dim()))?;
        let hidden = self.hidden(
            &batch,
            &Instruments { extra: Some(&add), ..Instruments::default() },
            cost,
        )?;
        let mut in_order = Array2::zeros(hidden.dim());
        for (now, &original) in order.iter().enumerate() {
            let from = hidden.slice(s![now * length..(now + 1) * length, ..]);
            in_order.slice_mut(s![original * length..(original + 1) * length, ..]).assign(&from);
        }
        let mut logits = linear_forward(in_order.view(), self.head().view(), cost)?;
        self.config.options.cap_logits(&mut logits);
        Ok(logits)
    }
}

/// (update, rows of the reordered batch) for each run of sequences with the same update.
fn groups(
    order: &[usize],
    of_sequence: &[Option<usize>],
    length: usize,
) -> Vec<(usize, Range<usize>)> {
    let mut groups: Vec<(usize, Range<usize>)> = Vec::new();
    for (now, &sequence) in order.iter().enumerate() {
        let Some(update) = of_sequence[sequence] else { continue };
        match groups.last_mut() {
            Some((last, rows)) if *last == update => rows.end += length,
            _ => groups.push((update, now * length..(now + 1) * length)),
        }
    }
    groups
}
