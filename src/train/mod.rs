//! Training: objective, optimizer, schedule, data, trainer, memory ledger.

pub mod optimizer;
pub mod schedule;
pub mod stream;
pub mod tasks;
