//! The norm threshold and what it limits: degree, rank, cost exponent (design 2.4).

pub mod bounds;
pub mod descent;
pub mod exponent;
pub mod guard;
pub mod hardness;
pub mod head_phase;
pub mod oracle;
pub mod phase_diagram;
pub mod prefixes;
pub mod rank;
pub mod threshold;
pub mod trial;

// The factorizations choose degrees by it, and `attention` must not reach back into `limits`.
pub use crate::attention::factorization::degree;
