//! Embedding and output projection that several models share, or that are read when they are
//! needed.

use super::parameters::{Model, ModelOn};
use crate::adapters::BaseWeight;
use crate::blocks::cross_entropy::Head;
use crate::blocks::stored_weight::StoredWeight;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::ops::Ops;
use ndarray::{Array2, ArrayView2};

/// Tables that stand in place of a model's own, which are then of no rows. They are frozen and have
/// no adapter.
#[derive(Debug, Clone)]
pub struct Tables<E: Ops> {
    /// The embedding, `V x D`.
    pub embedding: Option<E::Weight>,
    /// The output projection, `V x D`; `None` where it is the embedding or the model's own.
    pub head: Option<E::Weight>,
}

impl<E: Ops> Default for Tables<E> {
    fn default() -> Self {
        Self { embedding: None, head: None }
    }
}

impl<E: Ops> ModelOn<E> {
    /// The output projection, if it stands in the tables.
    pub(super) fn stored_head(&self) -> Option<&E::Weight> {
        match (&self.tables.head, &self.lm_head) {
            (Some(head), _) => Some(head),
            (None, None) => self.tables.embedding.as_ref(),
            (None, Some(_)) => None,
        }
    }
}

impl<T: Real> Model<T> {
    /// Logits of rows of the last norm's result through the output projection as it acts, without
    /// cap: `N x V`.
    ///
    /// # Errors
    /// Those of reading a stored projection.
    pub fn project(&self, rows: ArrayView2<T>, cost: &mut Cost) -> Result<Array2<T>> {
        match self.stored_head() {
            Some(head) => Head::of(head).logits(rows, cost),
            None => Head::Whole(self.acting_head()?.view()).logits(rows, cost),
        }
    }

    /// Makes embedding and output projection the model's own where they are trained or adapted.
    ///
    /// # Errors
    /// Those of reading.
    pub(crate) fn own_trained_tables(&mut self) -> Result<()> {
        let own = |table: Option<BaseWeight<T>>| {
            table.map(|table| table.read().map(|t| t.into_owned())).transpose()
        };
        let tied = self.is_tied();
        let (parts, adapters) = (self.trainable, &self.adapters);
        let head = adapters.head.is_some() || (parts.lm_head && !tied);
        let embedding = parts.embedding || adapters.embedding.is_some() || (tied && head);
        if head && self.lm_head.is_none() {
            self.lm_head = own(self.tables.head.take())?;
        }
        if embedding && let Some(table) = own(self.tables.embedding.take())? {
            self.embedding = table;
        }
        Ok(())
    }

    /// Gives up its own frozen arrays to shared ones, so that a clone of this model costs what its
    /// adapters take.
    pub(crate) fn share_frozen(&mut self) {
        let none = || Array2::zeros((0, self.config.hidden_size));
        let share = |table: &mut Array2<T>, left: Array2<T>| {
            BaseWeight::Stored(StoredWeight::shared(std::mem::replace(table, left)))
        };
        let (parts, adapters, tied) = (self.trainable, &self.adapters, self.is_tied());
        let head = parts.lm_head || adapters.head.is_some();
        let embedding = parts.embedding || adapters.embedding.is_some() || (tied && head);
        if let (Some(table), false) = (&mut self.lm_head, head) {
            self.tables.head = Some(share(table, none()));
            self.lm_head = None;
        }
        if !embedding && self.tables.embedding.is_none() {
            self.tables.embedding = Some(share(&mut self.embedding, none()));
        }
        for layer in &mut self.layers {
            for (_, projection) in layer.projections_mut() {
                if let BaseWeight::Dense(weight) = &mut projection.base {
                    let weight = std::mem::replace(weight, Array2::zeros((0, 0)));
                    projection.base = BaseWeight::Stored(StoredWeight::shared(weight));
                }
            }
        }
    }
}
