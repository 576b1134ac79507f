//! Training: objective, optimizer, schedule, data, trainer, memory ledger.

pub mod budget;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod engine;
pub mod evaluate;
pub mod evaluate_mixed;
pub mod memory;
pub mod method;
pub mod observe;
pub mod optimizer;
pub mod preset;
pub mod schedule;
pub mod storage;
pub mod tasks;
pub mod tokenizer;
pub mod trainer;
