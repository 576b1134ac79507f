//! Experiments whose points the ranks share: the same table, and nothing lost with a rank.

use super::launch;
use peft_limits::Error;
use peft_limits::report::{Axis, Figure, LineChart, NamedFigure, Row, Series, Table};
use peft_limits_experiments::harness::{self, Experiment, Point, Profile, reproduce};
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Folder where points leave traces: who measured what.
const TRACES: &str = "PEFT_LIMITS_TEST_TRACES";
/// What this test wants of the points: milliseconds to take, or `fail`.
const WANTED: &str = "PEFT_LIMITS_TEST_POINTS";
const POINTS: u64 = 23;

fn grid(_: Profile, seed: u64) -> Vec<Point> {
    (0..POINTS)
        .map(|n| Point::new(format!("n = {n}")).with("n (tokens)", n + 1).with("seed", seed))
        .collect()
}

fn measure(point: &Point) -> peft_limits::Result<Vec<Row>> {
    let n = point.u64("n (tokens)")?;
    if let Ok(folder) = std::env::var(TRACES) {
        // One line a measurement, appended in one write: the ranks' process and the point.
        let rank = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"]
            .iter()
            .find_map(|name| std::env::var(name).ok());
        let line = format!("{} {} {n}\n", rank.unwrap_or_else(|| "-".into()), std::process::id());
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(Path::new(&folder).join("measured"));
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .map_err(|e| Error::io(&folder, e))?;
    }
    match std::env::var(WANTED).ok().as_deref() {
        Some("fail") if n == 5 => return Err(Error::invalid("n", n, "fails on request")),
        Some("fail") if n == 9 => panic!("panics on request"),
        Some(milliseconds) => {
            std::thread::sleep(Duration::from_millis(milliseconds.parse().unwrap_or(0)))
        }
        None => {}
    }
    Ok(vec![
        Row::new().with("cost (flops)", (n * n) as f64 / 7.0),
        Row::new().with("cost (flops)", n as f64),
    ])
}

fn plot(table: &Table) -> peft_limits::Result<Vec<NamedFigure>> {
    let points: Vec<(f64, f64)> =
        table.floats("n (tokens)")?.into_iter().zip(table.floats("cost (flops)")?).collect();
    let chart = LineChart {
        x: Axis::log2("n (tokens)"),
        y: Axis::log10("cost (flops)"),
        series: vec![Series::new("demo", points)],
        ..LineChart::default()
    };
    Ok(vec![NamedFigure::new("cost", Figure::new("Cost", [chart]))])
}

const TIMED: Experiment = Experiment {
    name: "shared-grid",
    title: "A grid shared by ranks",
    claim: "Cost is quadratic.",
    refuted_by: "Any other exponent.",
    doubt: "It is made up.",
    grid,
    measure,
    parallel: false,
    plot,
    findings: |table| Ok(vec![format!("{} rows.", table.len())]),
    checks: None,
};
const COUNTED: Experiment = Experiment { name: "counted-grid", parallel: true, ..TIMED };

/// One rank, or the only process.
pub fn rank() -> ExitCode {
    harness::main(&TIMED)
}

pub fn several() -> ExitCode {
    reproduce(&[TIMED, COUNTED])
}

/// A run of the role in `folder`.
fn run(ranks: usize, role: &str, folder: &Path, flags: &[&str], points: &str) -> Command {
    let out = folder.join("out");
    let arguments: Vec<&str> =
        ["--out", out.to_str().unwrap()].into_iter().chain(flags.iter().copied()).collect();
    let mut command = match ranks {
        0 => {
            let mut alone = Command::new(std::env::current_exe().unwrap());
            alone.args(&arguments).env(launch::ROLE, role).env("RAYON_NUM_THREADS", "1");
            alone.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            alone
        }
        _ => launch::role(ranks, role, &arguments),
    };
    command.env(TRACES, folder).env(WANTED, points);
    command
}

/// (rank, process, point) of every measurement made so far.
fn measured(folder: &Path) -> Vec<(String, String, u64)> {
    let text = std::fs::read_to_string(folder.join("measured")).unwrap_or_default();
    let fields = |line: &str| {
        let mut words = line.split(' ').map(str::to_string);
        (words.next().unwrap(), words.next().unwrap(), words.next().unwrap().parse().unwrap())
    };
    text.lines().map(fields).collect()
}

fn table(folder: &Path, path: &str) -> String {
    std::fs::read_to_string(folder.join("out").join(path)).unwrap()
}

fn leftovers(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder.join("out"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("partial")).collect()
}

pub fn same_table() {
    let (one, three) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    launch::succeeds(run(0, "grid", one.path(), &["--seed", "4"], "0"));
    launch::succeeds(run(3, "grid", three.path(), &["--seed", "4"], "20"));
    assert_eq!(table(one.path(), "table.csv"), table(three.path(), "table.csv"));
    let mut points: Vec<u64> = measured(three.path()).iter().map(|(_, _, n)| *n).collect();
    points.sort_unstable();
    assert_eq!(points, (1..=POINTS).collect::<Vec<_>>(), "every point once");
    for rank in ["0", "1", "2"] {
        // 23 points of 20 ms: no rank can have been idle.
        assert!(
            measured(three.path()).iter().any(|(r, _, _)| r == rank),
            "rank {rank} measured nothing"
        );
    }
    assert!(leftovers(three.path()).is_empty());
    let manifest = table(three.path(), "manifest.json");
    assert!(
        manifest.contains("\"ranks\": 3")
            && !table(one.path(), "manifest.json").contains("\"ranks\"")
    );

    // Several experiments in one job, one of them with points in batches.
    let two = tempfile::tempdir().unwrap();
    launch::succeeds(run(2, "several", two.path(), &["--seed", "4"], "1"));
    for name in ["shared-grid", "counted-grid"] {
        assert_eq!(table(one.path(), "table.csv"), table(two.path(), &format!("{name}/table.csv")));
    }
}

pub fn failures() {
    let home = tempfile::tempdir().unwrap();
    let output = launch::finish(launch::start(run(2, "grid", home.path(), &[], "fail")));
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = table(home.path(), "manifest.json");
    let at = |text: &str| manifest.find(text).unwrap_or_else(|| panic!("no {text} in {manifest}"));
    assert!(at("fails on request") < at("panics on request"));
    assert_eq!(table(home.path(), "table.csv").lines().count(), 1 + 2 * (POINTS as usize - 2));
    // Only those two are measured by --resume, whoever measured the others.
    std::fs::remove_file(home.path().join("measured")).unwrap();
    launch::succeeds(run(2, "grid", home.path(), &["--resume"], "0"));
    let mut again: Vec<u64> = measured(home.path()).iter().map(|(_, _, n)| *n).collect();
    again.sort_unstable();
    assert_eq!(again, [5, 9]);
    // A usage error ends all ranks.
    let output =
        launch::finish(launch::start(run(2, "grid", home.path(), &["--no-such-flag"], "0")));
    assert_eq!(output.status.code(), Some(2));
}

pub fn killed_and_resumed() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path();
    let job = launch::start(run(3, "grid", folder, &[], "250"));
    // Wait until the victim has finished a point and is in another.
    let deadline = Instant::now() + Duration::from_secs(60);
    let victim = loop {
        let of_two: Vec<_> =
            measured(folder).into_iter().filter(|(rank, _, _)| rank == "2").collect();
        if of_two.len() >= 2 {
            break of_two[0].1.clone();
        }
        assert!(Instant::now() < deadline, "rank 2 measures nothing");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(Command::new("kill").args(["-9", &victim]).status().unwrap().success());
    let killed = Instant::now();
    let output = launch::finish(job);
    assert!(!output.status.success(), "the job must not pass for a finished one");
    assert!(killed.elapsed() < Duration::from_secs(60), "the job hung for {:?}", killed.elapsed());
    assert!(!folder.join("out/table.csv").exists(), "no half result");

    let finished = |folder: &Path| -> usize {
        let files = leftovers(folder).into_iter().map(|name| table(folder, &name));
        files.map(|text| text.lines().count() - 1).sum()
    };
    let kept = finished(folder);
    let begun = measured(folder).len();
    assert!(kept >= 1 && kept < begun && begun < POINTS as usize, "{kept} kept of {begun} begun");
    assert!(
        leftovers(folder).iter().any(|name| name.contains("rank-2")),
        "{:?}",
        leftovers(folder)
    );

    // On another number of ranks: the missing points, no other.
    std::fs::remove_file(folder.join("measured")).unwrap();
    launch::succeeds(run(2, "grid", folder, &["--resume"], "0"));
    assert_eq!(measured(folder).len(), POINTS as usize - kept);
    assert!(leftovers(folder).is_empty());
    assert!(table(folder, "manifest.json").contains(&format!("\"resumed_points\": {kept}")));
    let alone = tempfile::tempdir().unwrap();
    launch::succeeds(run(0, "grid", alone.path(), &[], "0"));
    assert_eq!(table(folder, "table.csv"), table(alone.path(), "table.csv"));
}

/// Processes that a launcher started but whose MPI library does not see each other.
pub fn strangers() {
    let folder = tempfile::tempdir().unwrap();
    let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
    alone
        .args(["--out", folder.path().to_str().unwrap()])
        .env(launch::ROLE, "grid")
        .env("SLURM_STEP_NUM_TASKS", "2");
    alone.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let output = launch::finish(launch::start(alone));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("started 2 processes") && text.contains("sees 1"), "{text}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was written");
}
