//! Adaptation methods, one file each.

pub mod nf4;
