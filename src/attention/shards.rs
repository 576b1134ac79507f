//! A head whose rows (tokens) are divided among several processes, seen by one of them.
//!
//! Every routine of a chained gradient works on its own rows; what it needs of the others are sums
//! over all rows, sums over the rows before or after its own (a causal mask), and a few maxima.
//! [`RowShards`] is that and no more: `distributed` implements it over MPI, [`WholeHead`] for the
//! process that holds everything.

use crate::error::Result;
use ndarray::Array2;

/// The shards of a head's rows, in the order of the tokens. Every process calls the same methods in
/// the same order.
pub trait RowShards<T> {
    /// Number of shards.
    fn count(&self) -> usize;

    /// Replaces the values by their sums over all shards.
    ///
    /// # Errors
    /// Those of the transport.
    fn sum(&self, values: &mut [T]) -> Result<()>;

    /// Replaces the values by their sums over the shards before this one: zero on the first.
    ///
    /// # Errors
    /// Those of the transport.
    fn sum_before(&self, values: &mut [T]) -> Result<()>;

    /// Replaces the values by their sums over the shards after this one: zero on the last.
    ///
    /// # Errors
    /// Those of the transport.
    fn sum_after(&self, values: &mut [T]) -> Result<()>;

    /// Sums over all shards, in double precision.
    ///
    /// # Errors
    /// Those of the transport.
    fn sum_wide(&self, values: &mut [f64]) -> Result<()>;

    /// The largest of a value over all shards.
    ///
    /// # Errors
    /// Those of the transport.
    fn largest(&self, value: f64) -> Result<f64>;

    /// Passes on this shard's outcome once all shards have succeeded, so that none waits for one
    /// that gave up.
    ///
    /// # Errors
    /// [`crate::Error::OtherRank`] when this shard succeeded and another failed.
    fn agree(&self, failed: bool) -> Result<()>;
}

/// The only shard.
#[derive(Debug, Clone, Copy, Default)]
pub struct WholeHead;

impl<T: num_traits::Zero + Clone> RowShards<T> for WholeHead {
    fn count(&self) -> usize {
        1
    }

    fn sum(&self, _values: &mut [T]) -> Result<()> {
        Ok(())
    }

    fn sum_before(&self, values: &mut [T]) -> Result<()> {
        values.fill(T::zero());
        Ok(())
    }

    fn sum_after(&self, values: &mut [T]) -> Result<()> {
        values.fill(T::zero());
        Ok(())
    }

    fn sum_wide(&self, _values: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn largest(&self, value: f64) -> Result<f64> {
        Ok(value)
    }

    fn agree(&self, _failed: bool) -> Result<()> {
        Ok(())
    }
}

/// This shard's outcome, or the error that another shard's failure is.
///
/// # Errors
/// The outcome's own error, or [`crate::Error::OtherRank`].
pub fn together<T, X>(shards: &dyn RowShards<T>, outcome: Result<X>) -> Result<X> {
    let agreed = shards.agree(outcome.is_err());
    let value = outcome?;
    agreed?;
    Ok(value)
}

/// The entries of a matrix that was made row by row.
pub(crate) fn entries<T: Clone>(a: &mut Array2<T>) -> &mut [T] {
    if !a.is_standard_layout() {
        *a = a.as_standard_layout().into_owned();
    }
    a.as_slice_mut().unwrap_or_else(|| unreachable!("standard layout"))
}
