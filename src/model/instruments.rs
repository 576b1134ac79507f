//! Looking into a step, and changing it, at named points: how validation records hidden states,
//! imitates the rounding of a trainer's precision, and computes what a known fault would give.

use super::projection::Projection;
use crate::blocks::causal_attention::ScoreErrors;
use crate::error::Result;
use crate::ops::{Cpu, Ops};
use std::fmt;

/// A tensor between two blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Point {
    /// Output of the embedding table, `N x D`.
    Embedded,
    /// Normalised input of q, k, v.
    NormedInput,
    /// Output of the query projection.
    Query,
    /// Output of the key projection.
    Key,
    /// Output of the value projection.
    Value,
    /// Queries after rotary embedding.
    RotatedQuery,
    /// Keys after rotary embedding.
    RotatedKey,
    /// Output of attention, input of o.
    Attended,
    /// The sum after attention.
    Middle,
    /// Normalised input of gate and up.
    NormedMiddle,
    /// Scores of the experts, `N x E`.
    Router,
    /// Output of the gate projection.
    Gate,
    /// Output of the up projection.
    Up,
    /// silu(gate) o up, input of down.
    Gated,
    /// Output of a layer.
    Output,
    /// Output of the last norm.
    FinalNorm,
    /// Logits of a chunk of counted positions.
    Logits,
}

/// A point of one layer, or outside the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The layer.
    pub layer: Option<usize>,
    /// The tensor.
    pub point: Point,
    /// Whether it is the tensor's gradient.
    pub gradient: bool,
}

/// A function that sees each tensor of a step when it has just been computed, and may change it.
///
/// It is called on the thread that runs the step. State it keeps is its own business (a `RefCell`).
pub type TapOn<'a, E> = &'a dyn Fn(Place, &mut <E as Ops>::Matrix);

/// A tap on the processor.
pub type Tap<'a, T> = TapOn<'a, Cpu<T>>;

/// `(engine, (layer, projection), x, y)`: adds to the output y, `N x out`, of a projection with
/// input x, `N x in`.
pub type AddToOutput<'a, E> = &'a dyn Fn(
    &mut E,
    (usize, Projection),
    &<E as Ops>::Matrix,
    &mut <E as Ops>::Matrix,
) -> Result<()>;

/// Where a dropout mask acts on an adapter's input x, or on what backward makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masked {
    /// x in forward.
    Input,
    /// x again in backward, for the gradient of A.
    SavedInput,
    /// The adapter's part of dx.
    InputGradient,
}

/// `((layer, projection), where, rest, tensor)`: multiplies the tensor, `N x in`, by the
/// projection's mask m, or by 1 - m if `rest`; false if the projection has none.
pub type MaskOn<'a, E> =
    &'a dyn Fn((usize, Projection), Masked, bool, &mut <E as Ops>::Matrix) -> bool;

/// Deviations of a step from the ordinary one; the default deviates in nothing.
pub struct InstrumentsOn<'a, E: Ops> {
    /// Factor of the scores in place of 1 / sqrt(head_dim).
    pub scale: Option<f64>,
    /// Tokens after its own that a query sees.
    pub ahead: usize,
    /// Random errors of the scores.
    pub score_errors: Option<ScoreErrors>,
    /// (row, label) pairs of the loss in place of those that the labels give.
    pub targets: Option<&'a [(usize, usize)]>,
    /// Sees every tensor.
    pub tap: Option<TapOn<'a, E>>,
    /// Dropout of the input of low-rank adapters, by masks that are known.
    pub mask: Option<MaskOn<'a, E>>,
    /// Added to every projection's output, in forwards that save nothing.
    pub extra: Option<AddToOutput<'a, E>>,
    /// A layer and its input: nothing below it runs, forward or backward.
    pub from: Option<(usize, &'a E::Matrix)>,
    /// The layer after which a forward that saves nothing ends.
    pub until: Option<usize>,
    /// The lowest layer whose gradients are wanted; those below run forward only.
    pub lowest: usize,
}

/// Instruments on the processor.
pub type Instruments<'a, T> = InstrumentsOn<'a, Cpu<T>>;

impl<E: Ops> Default for InstrumentsOn<'_, E> {
    fn default() -> Self {
        Self {
            scale: None,
            ahead: 0,
            score_errors: None,
            targets: None,
            tap: None,
            mask: None,
            extra: None,
            from: None,
            until: None,
            lowest: 0,
        }
    }
}

impl<E: Ops> Clone for InstrumentsOn<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E: Ops> Copy for InstrumentsOn<'_, E> {}

impl<E: Ops> InstrumentsOn<'_, E> {
    /// The first layer that runs.
    pub(super) fn first(&self) -> usize {
        self.from.map_or(0, |(layer, _)| layer)
    }

    /// The lowest layer of the backward.
    pub(super) fn lowest(&self) -> usize {
        self.lowest.max(self.first())
    }

    pub(super) fn tap(
        &self,
        layer: Option<usize>,
        point: Point,
        gradient: bool,
        tensor: &mut E::Matrix,
    ) {
        if let Some(tap) = self.tap {
            tap(Place { layer, point, gradient }, tensor);
        }
    }
}

impl<E: Ops> fmt::Debug for InstrumentsOn<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instruments")
            .field("scale", &self.scale)
            .field("ahead", &self.ahead)
            .finish_non_exhaustive()
    }
}
