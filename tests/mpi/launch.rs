//! Starting ranks.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The environment variable that tells a rank what to do.
pub const ROLE: &str = "PEFT_LIMITS_MPI_ROLE";

/// No test may wait for ever.
const LIMIT: Duration = Duration::from_secs(240);

/// `mpirun -n ranks program arguments`, one thread a rank.
pub fn mpirun(ranks: usize, program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    // Root and more ranks than cores are refused by Open MPI unless asked for; other libraries ignore the variables.
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("OMPI_MCA_hwloc_base_binding_policy", "none");
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
        panic!("mpirun cannot be started ({error}); with feature mpi these tests need it (Debian: openmpi-bin)")
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
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{error}", output.status);
    out.into_owned()
}
