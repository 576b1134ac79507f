//! One batch of token sequences.

use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::error::{Error, Result};
use ndarray::Array2;

/// Token sequences of equal length with their labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `B x T`.
    pub input_ids: Array2<u32>,
    /// Labels, `B x T`: usually the ids, -100 where a token is not to be predicted. The shift by
    /// one is the loss's business.
    pub labels: Array2<i64>,
    /// `B x T`, false for padding, which no token attends to; nothing is padding when absent.
    pub attention_mask: Option<Array2<bool>>,
    /// `B x T`, positions of the rotary embedding; 0, 1, 2, ... in each sequence when absent.
    pub position_ids: Option<Array2<u32>>,
    /// `B x T`, place in its row of the first token of each token's document, before which it sees
    /// nothing; a row is one document when absent.
    pub documents: Option<Array2<u32>>,
}

impl Batch {
    /// Checks that shapes agree and nothing is empty.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] for an empty batch.
    pub fn new(input_ids: Array2<u32>, labels: Array2<i64>) -> Result<Self> {
        if input_ids.dim() != labels.dim() {
            return Err(Error::shape("batch", "labels", input_ids.dim(), labels.dim()));
        }
        if input_ids.is_empty() {
            return Err(Error::invalid(
                "input_ids",
                format!("{:?}", input_ids.dim()),
                "must not be empty",
            ));
        }
        Ok(Self {
            input_ids: input_ids.as_standard_layout().into_owned(),
            labels: labels.as_standard_layout().into_owned(),
            attention_mask: None,
            position_ids: None,
            documents: None,
        })
    }

    /// With padding: false marks tokens that are not attended to, on either side.
    ///
    /// Labels are not touched: padding enters the loss unless its label is -100, as in
    /// Transformers.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`].
    pub fn with_attention_mask(mut self, mask: Array2<bool>) -> Result<Self> {
        if mask.dim() != self.input_ids.dim() {
            return Err(Error::shape("batch", "attention_mask", self.input_ids.dim(), mask.dim()));
        }
        self.attention_mask = Some(mask.as_standard_layout().into_owned());
        Ok(self)
    }

    /// With given positions of the rotary embedding.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`].
    pub fn with_position_ids(mut self, positions: Array2<u32>) -> Result<Self> {
        if positions.dim() != self.input_ids.dim() {
            return Err(Error::shape(
                "batch",
                "position_ids",
                self.input_ids.dim(),
                positions.dim(),
            ));
        }
        self.position_ids = Some(positions.as_standard_layout().into_owned());
        Ok(self)
    }

    /// Documents by Transformers' rule for a batch without a mask: one begins where positions do
    /// not go on by one. `None` where every row is one document.
    pub fn documents_of_positions(positions: &Array2<u32>) -> Option<Array2<u32>> {
        Self::starts(positions.dim(), |b, t| {
            positions[[b, t]] == positions[[b, t - 1]].wrapping_add(1)
        })
    }

    /// Documents by their numbers: one begins where the number changes. `None` where every row is
    /// one document.
    pub fn documents_of_numbers(numbers: &Array2<i64>) -> Option<Array2<u32>> {
        Self::starts(numbers.dim(), |b, t| numbers[[b, t]] == numbers[[b, t - 1]])
    }

    /// Where each token's document begins, if a row has several; `goes_on` says of a token that it
    /// follows the one before.
    fn starts(
        shape: (usize, usize),
        goes_on: impl Fn(usize, usize) -> bool,
    ) -> Option<Array2<u32>> {
        let mut starts = Array2::zeros(shape);
        let mut several = false;
        for b in 0..shape.0 {
            for t in 1..shape.1 {
                let goes_on = goes_on(b, t);
                starts[[b, t]] = if goes_on { starts[[b, t - 1]] } else { t as u32 };
                several |= !goes_on;
            }
        }
        several.then_some(starts)
    }

    /// With documents: each token sees those of its own document only. `starts` holds, for each
    /// token, the place in its row of its document's first token.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] for a start after its token.
    pub fn with_documents(mut self, starts: Array2<u32>) -> Result<Self> {
        if starts.dim() != self.input_ids.dim() {
            return Err(Error::shape("batch", "documents", self.input_ids.dim(), starts.dim()));
        }
        if let Some(((b, t), start)) =
            starts.indexed_iter().find(|((_, t), start)| **start as usize > *t)
        {
            return Err(Error::invalid(
                format!("documents[{b}, {t}]"),
                start,
                "must not come after the token",
            ));
        }
        self.documents = Some(starts.as_standard_layout().into_owned());
        Ok(self)
    }

    /// Positions that enter the loss: labels other than -100 that are not the first of their
    /// sequence.
    pub fn counted(&self) -> usize {
        self.labels
            .indexed_iter()
            .filter(|((_, t), label)| *t > 0 && **label != IGNORED_LABEL)
            .count()
    }

    /// B T.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }
}

/// How a step is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepOptions {
    /// The loss is the sum over counted positions divided by this; `None` is the number of counted
    /// positions of this batch (the mean).
    pub divisor: Option<f64>,
    /// Keep only each layer's input and run its forward again in backward.
    pub checkpointing: bool,
}

/// What a step returns beside its gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutput {
    /// Loss in nats (see [`StepOptions::divisor`]).
    pub loss: f64,
    /// Positions that entered it.
    pub counted: usize,
}
