//! Looking into a step, and changing it, at named points: how validation records hidden states, imitates the rounding
//! of a trainer's precision, and computes what a known fault would give.

use ndarray::Array2;
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
pub type Tap<'a, T> = &'a dyn Fn(Place, &mut Array2<T>);

/// Deviations of a step from the ordinary one; the default deviates in nothing.
#[derive(Clone, Copy)]
pub struct Instruments<'a, T> {
    /// Factor of the scores in place of 1 / sqrt(head_dim).
    pub scale: Option<f64>,
    /// Tokens after its own that a query sees.
    pub ahead: usize,
    /// (row, label) pairs of the loss in place of those that the labels give.
    pub targets: Option<&'a [(usize, usize)]>,
    /// Sees every tensor.
    pub tap: Option<Tap<'a, T>>,
}

impl<T> Default for Instruments<'_, T> {
    fn default() -> Self {
        Self { scale: None, ahead: 0, targets: None, tap: None }
    }
}

impl<T> Instruments<'_, T> {
    pub(super) fn tap(&self, layer: Option<usize>, point: Point, gradient: bool, tensor: &mut Array2<T>) {
        if let Some(tap) = self.tap {
            tap(Place { layer, point, gradient }, tensor);
        }
    }
}

impl<T> fmt::Debug for Instruments<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instruments").field("scale", &self.scale).field("ahead", &self.ahead).finish_non_exhaustive()
    }
}
