//! The norm threshold and what it limits: degree, rank, cost exponent.

pub mod degree;
