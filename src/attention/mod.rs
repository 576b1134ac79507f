//! LoRA gradients of softmax attention: the problem, exact gradients, factorizations, chained
//! gradients.
//!
//! Notation and derivations: `paper-notes/attention-gradients.md`.

pub mod chained;
pub mod contraction;
pub mod exact;
pub mod factorization;
pub mod file;
pub mod gradients;
pub mod problem;
pub mod shards;
pub mod synthetic;

pub use gradients::{Gradients, Request};
pub use problem::{AttentionProblem, Mask, Objective, Qkv, SoftmaxKind};
