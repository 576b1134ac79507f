//! Starting ranks, and the main function of a program that starts itself as ranks.

// `experiments/tests/mpi` uses a part of it.
#![allow(dead_code)]

use std::path::Path;
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

/// What one rank does.
pub type Role = (&'static str, fn() -> ExitCode);

/// A test: panics when it fails.
pub type Test = (&'static str, fn());

/// The environment variable that tells a rank what to do.
pub const ROLE: &str = "PEFT_LIMITS_MPI_ROLE";

/// No test may wait for ever.
const LIMIT: Duration = Duration::from_secs(240);

/// `mpirun -n ranks program arguments`, one thread a rank.
pub fn mpirun(ranks: usize, program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    // Root and more ranks than cores are refused by Open MPI unless asked for; other libraries
    // ignore the variables.
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command
        .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
        .env("OMPI_MCA_hwloc_base_binding_policy", "none");
    command.env("OMPI_MCA_btl_vader_single_copy_mechanism", "none").env("RAYON_NUM_THREADS", "1");
    command.arg("-n").arg(ranks.to_string()).arg(program).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// This program in a role.
pub fn role(ranks: usize, role: &str, arguments: &[&str]) -> Command {
    let program = std::env::current_exe().unwrap();
    let mut command = mpirun(ranks, &program, arguments);
    command.env(ROLE, role);
    command
}

/// Starts a job.
pub fn start(mut command: Command) -> Child {
    command.spawn().unwrap_or_else(|error| {
        panic!(
            "mpirun cannot be started ({error}); with feature mpi these tests need it (Debian: \
                openmpi-bin)"
        )
    })
}

/// Waits for a job, whose output must be short.
pub fn finish(mut child: Child) -> Output {
    let deadline = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("the job was still running after {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

/// Runs a job that must succeed; its standard output.
pub fn succeeds(command: Command) -> String {
    let output = finish(start(command));
    let (out, error) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{error}", output.status);
    out.into_owned()
}

/// The main function of such a program: a role that was asked for, or the tests.
pub fn main(roles: &[Role], tests: &[Test]) -> ExitCode {
    if let Ok(wanted) = std::env::var(ROLE) {
        return match roles.iter().find(|(name, _)| *name == wanted) {
            Some((_, role)) => role(),
            None => panic!("no role {wanted}"),
        };
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let chosen = tests.iter().filter(|(name, _)| {
        filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()))
    });
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
