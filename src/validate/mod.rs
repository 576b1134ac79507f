//! Validation of other trainers: their gradients against the exact reference, and what is wrong
//! with them.
//!
//! A dump ([`dump`], [`manifest`]; `paper-notes/dump-format.md`) holds a model, a batch and what a
//! trainer computed. [`validate`] climbs a ladder of comparisons ([`ladder`]), each three-way: the
//! exact f64 reference, the reference with the trainer's rounding imitated ([`mod@reference`]), the
//! trainer. A tensor passes when its gap is within a stated multiple of the rounding gap
//! ([`measure`]). When something fails, [`diagnosis`] tries known faults and names those that
//! explain it. [`head`] does the same for one attention head.

pub mod diagnosis;
pub mod dump;
pub mod faint;
pub mod head;
pub mod ladder;
pub mod manifest;
pub mod measure;
pub mod memory;
mod names;
mod not_exercised;
pub mod objective;
pub mod own_forward;
mod part_of_batch;
pub mod ranks;
mod recorded;
mod recorded_batch;
pub mod reference;
mod report;
mod roundings;
pub mod routing;
pub mod selftest;
mod stacked;
mod update;

use crate::precision;
pub use crate::precision::Precision;
pub use names::{canonical_name, place_of};
pub use report::{Report, Silent, Watch, validate};
