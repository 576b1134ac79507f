//! Steps computed elsewhere than by the model itself, for instance on a GPU.

use crate::error::Result;
use crate::linalg::Real;
use crate::model::{Batch, Model, StepOptions};
use crate::train::optimizer::Optimizer;

/// Holds a copy of a model and its optimizer, and trains that copy.
pub trait StepEngine<T: Real> {
    /// Gradients of the batches' summed losses, in place of the last step's: (loss, Euclidean
    /// norm).
    ///
    /// # Errors
    /// [`crate::Error::NonFinite`] for a loss or a norm that is NaN or infinite; what the engine
    /// itself fails with.
    fn gradients(&mut self, batches: &[Batch], options: &StepOptions) -> Result<(f64, f64)>;

    /// One update from the gradients times `scale`.
    ///
    /// # Errors
    /// What the engine fails with.
    fn update(&mut self, lr: f64, scale: f64) -> Result<()>;

    /// Brings the trained values and the optimizer's state back.
    ///
    /// # Errors
    /// What the engine fails with.
    fn download(&self, model: &mut Model<T>, optimizer: &mut Optimizer<T>) -> Result<()>;
}
