//! Comparators and finite differences, for tests and for the validation of other trainers.

pub mod compare;
pub mod finite_differences;
