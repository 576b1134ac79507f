//! The blocks of a LLaMA-style decoder: one file each, a forward and a backward function side by
//! side.
//!
//! Axes: `B` sequences of `T` tokens give `N = B T` rows; `D` model width, `H` heads of width `d`,
//! `F` intermediate width, `V` vocabulary, `r` adapter rank. Rows are tokens; weights are stored
//! out x in, as in Hugging Face checkpoints, so a projection is x W^T.
//!
//! Gradient sinks accumulate: `Option<..>` sinks that are `None` belong to frozen tensors and cost
//! nothing, which the operation counter shows. What a backward needs of its forward is an argument,
//! so the saved set is explicit. Derivations: `paper-notes/transformer.md`.

pub mod attention_sinks;
pub mod base_weight;
pub mod causal_attention;
pub mod cross_entropy;
pub mod embedding;
pub mod experts;
pub mod linear;
pub(crate) mod low_rank;
pub mod rms_norm;
pub mod rope;
pub mod stored_weight;
pub mod swiglu;

use crate::error::{Error, Result};
use ndarray::{ArrayBase, ArrayView2, Data, DataMut, Ix2};

/// Rows of one task of an element-wise block.
pub(crate) const ROWS_PER_TASK: usize = 64;

/// Refuses a matrix whose shape is not the expected one.
pub(crate) fn require_shape<T>(
    op: &'static str,
    arg: &str,
    array: &ArrayView2<T>,
    expected: (usize, usize),
) -> Result<()> {
    if array.dim() == expected { Ok(()) } else { Err(Error::shape(op, arg, expected, array.dim())) }
}

/// The numbers of a matrix that was just laid out row by row.
pub(crate) fn numbers<T, S: Data<Elem = T>>(x: &ArrayBase<S, Ix2>) -> &[T] {
    match x.as_slice() {
        Some(numbers) => numbers,
        None => unreachable!("laid out row by row"),
    }
}

/// As [`numbers`], to be changed.
pub(crate) fn numbers_mut<T, S: DataMut<Elem = T>>(x: &mut ArrayBase<S, Ix2>) -> &mut [T] {
    match x.as_slice_mut() {
        Some(numbers) => numbers,
        None => unreachable!("laid out row by row"),
    }
}
