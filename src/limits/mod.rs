//! The norm threshold and what it limits: degree, rank, cost exponent (design 2.4).

pub mod degree;
pub mod exponent;
pub mod rank;
pub mod threshold;
pub mod trial;
