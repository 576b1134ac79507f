//! Gradients over MPI: this program starts itself under `mpirun` and judges what the ranks say.
//!
//! `cargo test --features mpi --test mpi`; needs an `mpirun` (Debian: openmpi-bin). A name as
//! argument selects tests.

mod command;
mod equality;
mod launch;
mod refusals;

use std::process::ExitCode;

const ROLES: [launch::Role; 2] = [("equality", equality::rank), ("refusals", refusals::rank)];

const TESTS: [launch::Test; 5] = [
    ("equality_on_one_rank", equality::on_one),
    ("equality_on_two_ranks", equality::on_two),
    ("equality_on_three_ranks", equality::on_three),
    ("refusals_reach_every_rank", refusals::on_three),
    ("gradient_command_writes_the_same_file", command::same_file),
];

fn main() -> ExitCode {
    launch::main(&ROLES, &TESTS)
}
