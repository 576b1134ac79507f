//! Exact gradients: the dense reference and the streaming routine.

pub mod dense;
pub mod streaming;
