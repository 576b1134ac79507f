//! Gradients over many processes (feature `mpi`): every rank holds its own rows (tokens) of X, Y or
//! G.
//!
//! - [`ranks`]: the job, its collectives and the bytes they move;
//! - [`rows`]: which rows a rank holds;
//! - [`chained`]: the chained gradient: all-reduces of k x (d_v m) and smaller matrices, nothing
//!   that grows with L;
//! - [`ring`]: the exact streaming gradient: blocks of keys and values travel round a ring;
//! - [`traffic`]: what both must move, in closed form.
//!
//! Formulas and measurements: `paper-notes/many-machines.md`. Start programs with `mpirun -n N` or
//! `srun`.

pub mod chained;
pub mod ranks;
pub mod ring;
pub mod rows;
mod totals;
pub mod traffic;

pub use ranks::{Job, Ranks};

/// A scalar of the crate that MPI can send.
pub trait Scalar: crate::linalg::Real + mpi::traits::Equivalence {}

impl<T: crate::linalg::Real + mpi::traits::Equivalence> Scalar for T {}
