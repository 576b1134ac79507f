//! Gradients and experiments over MPI: this program starts itself under `mpirun` and judges what the ranks say.
//!
//! `cargo test --features mpi --test mpi`; needs an `mpirun` (Debian: openmpi-bin). A name as argument selects tests.

mod command;
mod equality;
mod grid;
mod launch;
mod refusals;

use std::process::ExitCode;

/// What one rank does.
type Role = (&'static str, fn() -> ExitCode);

const ROLES: [Role; 4] =
    [("equality", equality::rank), ("refusals", refusals::rank), ("grid", grid::rank), ("several", grid::several)];

/// A test: panics when it fails.
type Test = (&'static str, fn());

const TESTS: [Test; 9] = [
    ("equality_on_one_rank", equality::on_one),
    ("equality_on_two_ranks", equality::on_two),
    ("equality_on_three_ranks", equality::on_three),
    ("refusals_reach_every_rank", refusals::on_three),
    ("processes_that_do_not_see_each_other_are_refused", refusals::strangers),
    ("gradient_command_writes_the_same_file", command::same_file),
    ("grid_shared_by_ranks_gives_the_same_table", grid::same_table),
    ("killed_rank_ends_the_job_and_resume_finishes_it", grid::killed_and_resumed),
    ("failures_of_ranks_are_listed", grid::failures),
];

fn main() -> ExitCode {
    if let Ok(wanted) = std::env::var(launch::ROLE) {
        return match ROLES.iter().find(|(name, _)| *name == wanted) {
            Some((_, role)) => role(),
            None => panic!("no role {wanted}"),
        };
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let chosen =
        TESTS.iter().filter(|(name, _)| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str())));
    let mut failed = 0;
    for (name, test) in chosen {
        let start = std::time::Instant::now();
        let outcome = std::panic::catch_unwind(test);
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({:.1} s)", start.elapsed().as_secs_f64());
        failed += usize::from(outcome.is_err());
    }
    if failed > 0 {
        println!("{failed} failed");
    }
    ExitCode::from(u8::from(failed > 0))
}
