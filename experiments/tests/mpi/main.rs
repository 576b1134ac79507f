//! Experiments over MPI: this program starts itself under `mpirun` and judges what the ranks say.
//!
//! `cargo test --features mpi --test mpi_grid`; needs an `mpirun` (Debian: openmpi-bin). A name as
//! argument selects tests.

mod grid;
#[path = "../../../tests/mpi/launch.rs"]
mod launch;

use std::process::ExitCode;

const ROLES: [launch::Role; 2] = [("grid", grid::rank), ("several", grid::several)];

const TESTS: [launch::Test; 4] = [
    ("grid_shared_by_ranks_gives_the_same_table", grid::same_table),
    ("killed_rank_ends_the_job_and_resume_finishes_it", grid::killed_and_resumed),
    ("failures_of_ranks_are_listed", grid::failures),
    ("processes_that_do_not_see_each_other_are_refused", grid::strangers),
];

fn main() -> ExitCode {
    launch::main(&ROLES, &TESTS)
}
