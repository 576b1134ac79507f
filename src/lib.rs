//! How cheap can a fine-tuning gradient be, and is a trainer's gradient right?
//!
//! A LoRA gradient of softmax attention costs time quadratic in the number of tokens, or almost
//! linear time; theory (\[CL-LoRA\], arXiv 2406.03136) says that the norms of the head decide. This
//! crate computes such gradients exactly and by chained low-rank approximation, measures where the
//! second stops working, holds a reference transformer with hand-written backward for LoRA, DoRA,
//! MosLoRA, PaCA and S2FT, and validates recorded steps of other trainers against it.
//!
//! ```
//! use peft_limits::attention::{AttentionProblem, Request, chained, exact::streaming};
//! use peft_limits::attention::{factorization::build, synthetic::SyntheticHead};
//!
//! // A head of 2,000 tokens whose norms are at half the threshold.
//! let head: AttentionProblem<f32> = SyntheticHead::new(2000, 8).at_threshold_ratio(0.5).draw()?;
//! let exact = streaming::gradients(&head, Request::Adapters)?;
//! let fast = chained::gradients(&head, build("taylor:degree=3")?.as_ref(), Request::Adapters)?;
//! assert!(fast.gradients.relative_gap(&exact) < 2e-3);
//! assert!(fast.gradients.cost.flops() < exact.cost.flops());
//! # Ok::<(), peft_limits::Error>(())
//! ```
//!
//! # Three stories
//!
//! | question | command | in the library |
//! |---|---|---|
//! | Where is the norm threshold on my head? | `peft-limits probe HEAD` | [`limits::threshold`], [`limits::trial`] |
//! | What is the exact gradient of this head? | `peft-limits gradient HEAD -o OUT` | [`attention::exact`], [`attention::chained`] |
//! | Are my trainer's adapter gradients right? | `peft-limits validate DUMP` | [`validate::validate`], [`validate::diagnosis`] |
//! | Which method, and what will it cost? | `peft-limits memory`, `peft-limits train` | [`train::memory::predict`], [`train::method`] |
//! | What can be done with an adapter afterwards? | `peft-limits adapter` | [`model::update`], [`adapters::update`] |
//!
//! # Where things are
//!
//! Modules use those above them in this table, never those below:
//!
//! | module | what |
//! |---|---|
//! | [`cost`] | counters of operations and memory that every gradient fills |
//! | [`linalg`] | one door to matrix products, decompositions, norms, the face-splitting product |
//! | [`check`] | finite differences and comparators |
//! | [`attention`] | a head ([`attention::AttentionProblem`]), its exact gradients, factorizations of exp(S) ([`attention::factorization::SoftmaxFactorization`]), the chain |
//! | [`limits`] | threshold, degree, rank, fitted exponents, certified bounds, hardness instances, the norm guard |
//! | [`blocks`] | forward and backward of every block of the reference transformer, one file each |
//! | [`ops`] | the operations of a training step, on arrays, on a GPU, or on sizes alone |
//! | [`adapters`] | full, LoRA, DoRA, MosLoRA, PaCA, S2FT, SpFT, NF4 bases; selection; updates after training |
//! | [`model`] | configuration, parameters, wiring, Hugging Face checkpoints |
//! | [`train`] | tasks, optimizer, trainer, the memory ledger |
//! | [`validate`] | dumps, the ladder of comparisons, known faults |
//! | `gpu` | the same gradients and training steps on a GPU: with the feature `gpu` or `cuda` |
//! | `distributed` | gradients with the tokens divided among MPI ranks: with the feature `mpi` |
//! | `report`, `cli` | tables and charts, commands: with the default feature `cli` |
//!
//! [`tensor_file`] reads and writes safetensors, [`precision`] rounds to number formats,
//! [`atomic_file`] makes files appear whole or not at all, [`streams`] derives seeds. Feature
//! `hf-tokenizer` (default) reads `tokenizer.json`; `lapack` decomposes by OpenBLAS; `mpi` divides
//! tokens among processes.
//!
//! # Limits
//!
//! The theorem is asymptotic, and silent about norms between o(sqrt(log L)) and a constant times
//! it: at finite length the transition is gradual. On trained heads of width 32 no polynomial
//! factorization pays; certified bounds are hundreds of times the error. The README says more, and
//! `paper-notes/README.md` maps every equation to its function.

pub mod adapters;
pub mod atomic_file;
pub mod attention;
pub mod blocks;
pub mod check;
#[cfg(feature = "cli")]
pub mod cli;
pub mod cost;
pub mod device;
mod disk_file;
#[cfg(feature = "mpi")]
pub mod distributed;
pub mod error;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod limits;
pub mod linalg;
pub mod model;
pub mod ops;
pub mod precision;
#[cfg(feature = "cli")]
pub mod report;
pub mod streams;
pub mod tensor_file;
pub mod train;
pub mod validate;

pub use error::{Error, Result};
