//! Attention gradients on a device: exact ([`streaming`]) and chained ([`chained`]).

pub mod chained;
mod head;
pub mod streaming;
