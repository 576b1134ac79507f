//! The runner, driven as a user drives it: by flags, looking at files and exit codes.

use super::reproduce::run_all;
use super::*;
use peft_limits::error::Error;
use peft_limits::report::manifest::Manifest;
use peft_limits::report::{Axis, Figure, LineChart, NamedFigure, Row, Series, Table};
use peft_limits::streams::sha256_hex;
use std::cell::{Cell, RefCell};
use std::path::Path;

thread_local! {
    /// Labels of measured points, of sequential experiments run by this test's thread.
    static MEASURED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    /// The point that fails, if any.
    static FAILING: Cell<Option<u64>> = const { Cell::new(None) };
}

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let sizes = profile.pick(vec![2, 3, 5], vec![2, 3, 5, 7, 11]);
    let point = |n: u64| Point::new(format!("n = {n}")).with("n (tokens)", n).with("seed", seed);
    sizes.into_iter().map(point).collect()
}

fn measure(point: &Point) -> Result<Vec<Row>> {
    let n = point.u64("n (tokens)")?;
    MEASURED.with_borrow_mut(|m| m.push(point.label.clone()));
    if FAILING.get() == Some(n) {
        return Err(Error::invalid("n", n, "fails on request"));
    }
    if FAILING.get() == Some(100 + n) {
        panic!("panics on request");
    }
    Ok(vec![Row::new().with("time (s)", (n * n) as f64 / 7.0)])
}

fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let points: Vec<(f64, f64)> =
        table.floats("n (tokens)")?.into_iter().zip(table.floats("time (s)")?).collect();
    let chart = LineChart {
        x: Axis::log2("n (tokens)"),
        y: Axis::log10("time (s)"),
        series: vec![Series::new("demo", points)],
        ..LineChart::default()
    };
    Ok(vec![NamedFigure::new("cost", Figure::new("Cost", [chart]))])
}

fn findings(table: &Table) -> Result<Vec<String>> {
    let largest = table.floats("time (s)")?.into_iter().fold(0.0, f64::max);
    Ok(vec![format!("The largest of {} points takes {largest:.2} s.", table.len())])
}

const DEMO: Experiment = Experiment {
    name: "demo-cost",
    title: "Cost of the demo",
    claim: "Cost is quadratic.",
    refuted_by: "Any other exponent.",
    doubt: "Two < three points.",
    grid,
    measure,
    parallel: false,
    plot,
    findings,
    checks: Some(|table| {
        Ok(vec![(
            "all times are positive".into(),
            table.floats("time (s)")?.iter().all(|t| *t > 0.0),
        )])
    }),
};

/// Runs `experiment` with `--out folder` and `flags`; (exit code, standard output, labels
/// measured).
fn execute(
    experiment: &Experiment,
    folder: &Path,
    flags: &str,
    stop: &(dyn Fn() -> bool + Sync),
) -> (u8, String, Vec<String>) {
    MEASURED.take();
    let arguments = ["demo", "--out"].map(OsString::from).into_iter().chain([folder.into()]);
    let arguments = arguments.chain(flags.split_whitespace().map(OsString::from));
    let mut out = Vec::new();
    let code = run_single(experiment, arguments, stop, Crew::default(), &mut out);
    (code, String::from_utf8(out).unwrap(), MEASURED.take())
}

fn never() -> bool {
    false
}

/// Stops once `n` points have been measured by this thread.
fn after(n: usize) -> impl Fn() -> bool + Sync {
    move || MEASURED.with_borrow(|m| m.len() >= n)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn text(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn manifest(folder: &Path) -> Manifest {
    Manifest::read(folder).unwrap().unwrap()
}

const ALL_FILES: [&str; 5] = ["cost.png", "cost.svg", "findings.md", "manifest.json", "table.csv"];

#[test]
fn a_run_leaves_its_files_and_their_checksums() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("new/folder");
    let (code, out, measured) = execute(&DEMO, &folder, "--seed 4", &never);
    assert_eq!((code, measured.len()), (0, 3));
    assert_eq!(names(&folder), ALL_FILES);
    assert_eq!(text(&folder, "table.csv").lines().next().unwrap(), "n (tokens),seed,time (s)");
    let manifest = manifest(&folder);
    assert_eq!((manifest.profile.as_str(), manifest.seeds.as_slice()), ("quick", &[4][..]));
    assert_eq!(manifest.config["points"][2]["n (tokens)"], 5);
    for (name, sum) in &manifest.files {
        assert_eq!(*sum, sha256_hex(&std::fs::read(folder.join(name)).unwrap()), "{name}");
    }
    assert_eq!(manifest.files.len(), 4);
    let finding = "The largest of 3 points takes 3.57 s.";
    let page = text(&folder, "findings.md");
    for part in
        [finding, DEMO.claim, DEMO.refuted_by, "pass: all times are positive", "Quick profile"]
    {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    assert!(
        out.contains(finding) && out.contains("PASS all times") && out.contains("n (tokens)"),
        "{out}"
    );
}

#[test]
fn a_failed_point_is_recorded_and_only_it_is_measured_again() {
    let home = tempfile::tempdir().unwrap();
    for (failing, message) in [(3, "fails on request"), (103, "panics on request")] {
        FAILING.set(Some(failing));
        let (code, _, measured) = execute(&DEMO, home.path(), "", &never);
        assert_eq!((code, measured.len()), (1, 3));
        let failures = manifest(home.path()).failures;
        assert_eq!((failures.len(), failures[0].point.as_str()), (1, "n = 3"));
        assert!(failures[0].error.contains(message), "{failures:?}");
        assert!(text(home.path(), "findings.md").contains("`n = 3`"));
        assert_eq!(Table::read_csv(&home.path().join("table.csv")).unwrap().len(), 2);

        FAILING.set(None);
        let (code, _, measured) = execute(&DEMO, home.path(), "--resume", &never);
        assert_eq!((code, measured), (0, vec!["n = 3".to_string()]));
        assert_eq!(manifest(home.path()).resumed_points, 2);
        assert_eq!(names(home.path()), ALL_FILES);
        assert_eq!(text(home.path(), "table.csv"), fresh_table("", 0));
    }
}

/// The table of an uninterrupted run.
fn fresh_table(flags: &str, code: u8) -> String {
    let home = tempfile::tempdir().unwrap();
    assert_eq!(execute(&DEMO, home.path(), flags, &never).0, code);
    text(home.path(), "table.csv")
}

#[test]
fn an_interrupted_run_resumes_with_what_is_missing() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, measured) = execute(&DEMO, home.path(), "--profile full", &after(2));
    assert_eq!((code, out.as_str(), measured.len()), (130, "", 2));
    assert_eq!(names(home.path()), ["rows.partial.jsonl"]);
    // Without a decision of the user a full run's points are not thrown away.
    assert_eq!(execute(&DEMO, home.path(), "--profile full", &never).0, 2);
    assert_eq!(execute(&DEMO, home.path(), "--force", &never).0, 2, "quick over full");
    let (code, _, measured) = execute(&DEMO, home.path(), "--profile full --resume", &after(1));
    assert_eq!((code, measured), (130, vec!["n = 5".to_string()]));
    let (code, _, measured) = execute(&DEMO, home.path(), "--profile full --resume", &never);
    assert_eq!((code, measured), (0, vec!["n = 7".to_string(), "n = 11".to_string()]));
    assert_eq!(names(home.path()), ALL_FILES);
    assert_eq!(text(home.path(), "table.csv"), fresh_table("--profile full", 0));
}

#[test]
fn a_cut_line_and_other_keys_are_measured_again() {
    let home = tempfile::tempdir().unwrap();
    execute(&DEMO, home.path(), "", &after(2));
    let path = home.path().join("rows.partial.jsonl");
    let whole = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let (code, _, measured) = execute(&DEMO, home.path(), "--resume", &never);
    assert_eq!((code, measured), (0, vec!["n = 3".to_string(), "n = 5".to_string()]));
    assert_eq!(text(home.path(), "table.csv"), fresh_table("", 0));

    execute(&DEMO, home.path(), "", &after(2));
    let (code, _, measured) = execute(&DEMO, home.path(), "--resume --seed 1", &never);
    assert_eq!((code, measured.len()), (0, 3), "rows of seed 0 must not serve seed 1");
    assert_eq!(text(home.path(), "table.csv"), fresh_table("--seed 1", 0));
    let aside = text(home.path(), partial::SET_ASIDE);
    assert_eq!(aside.lines().count(), 1 + 2, "a header and the two points of seed 0: {aside}");
}

#[test]
fn finished_points_of_a_quick_run_are_not_thrown_away_either() {
    let home = tempfile::tempdir().unwrap();
    assert_eq!(execute(&DEMO, home.path(), "", &after(2)).0, 130);
    let kept = text(home.path(), "rows.partial.jsonl");
    let (code, _, measured) = execute(&DEMO, home.path(), "", &never);
    assert_eq!((code, measured.len()), (2, 0), "neither --resume nor --force");
    assert_eq!(text(home.path(), "rows.partial.jsonl"), kept);
    match run::guard(home.path(), &flags_of(""), None, Some("quick")) {
        Err(Error::InvalidParam { name, requirement, .. }) => {
            assert!(
                name == "--out"
                    && requirement.contains("--resume")
                    && requirement.contains("--force"),
                "{requirement}"
            )
        }
        other => panic!("{other:?}"),
    }
    let (code, _, measured) = execute(&DEMO, home.path(), "--force", &never);
    assert_eq!((code, measured.len()), (0, 3));
}

fn flags_of(text: &str) -> Flags {
    let words = std::iter::once("demo").chain(text.split_whitespace()).map(Into::into);
    flags::parse_single(&DEMO, words).unwrap()
}

#[test]
fn run_keys_follow_what_affects_results() {
    let point = Point::new("a").with("n", 3);
    let key = partial::run_key(&DEMO, 0, &point);
    assert_eq!(key.len(), 64);
    assert_eq!(key, partial::run_key(&DEMO, 0, &Point::new("another label").with("n", 3)));
    let other = Experiment { name: "other", ..DEMO };
    let parallel = Experiment { parallel: true, ..DEMO };
    let different = [
        partial::run_key(&DEMO, 1, &point),
        partial::run_key(&other, 0, &point),
        partial::run_key(&parallel, 0, &point),
        partial::run_key(&DEMO, 0, &Point::new("a").with("n", 4)),
        partial::run_key(&DEMO, 0, &Point::new("a").with("n", 3.0)),
        partial::run_key(&DEMO, 0, &Point::new("a").with("m", 3)),
    ];
    for other in &different {
        assert_ne!(*other, key);
    }
}

#[test]
fn a_finished_result_is_protected_by_its_profile() {
    let home = tempfile::tempdir().unwrap();
    let run = |flags: &str| {
        let (code, _, measured) = execute(&DEMO, home.path(), flags, &never);
        (code, measured.len())
    };
    assert_eq!(run(""), (0, 3));
    assert_eq!(run(""), (0, 3), "quick over quick");
    assert_eq!(run("--profile full"), (2, 0), "full over quick");
    assert_eq!(run("--profile full --force"), (0, 5));
    let kept = text(home.path(), "manifest.json");
    for flags in ["", "--force", "--resume", "--profile full", "--profile full --resume --seed 9"] {
        assert_eq!(run(flags), (2, 0), "{flags:?}");
        assert_eq!(text(home.path(), "manifest.json"), kept, "{flags:?}");
    }
    assert_eq!(run("--profile full --resume"), (0, 0), "nothing is missing");
    assert_eq!(
        manifest(home.path()).started_at,
        serde_json::from_str::<Manifest>(&kept).unwrap().started_at
    );
    assert_eq!(run("--profile full --force"), (0, 5));
}

#[test]
fn a_false_check_fails_the_run() {
    let home = tempfile::tempdir().unwrap();
    let experiment =
        Experiment { checks: Some(|_| Ok(vec![("moon is cheese".into(), false)])), ..DEMO };
    let (code, out, _) = execute(&experiment, home.path(), "", &never);
    assert_eq!(code, 1);
    assert!(out.contains("FAIL moon is cheese"), "{out}");
    assert_eq!(manifest(home.path()).stop_reason, StopReason::CheckFailed);
    assert!(text(home.path(), "findings.md").contains("**fail**: moon is cheese"));
}

#[test]
fn plot_only_reads_the_table_and_measures_nothing() {
    let home = tempfile::tempdir().unwrap();
    assert_eq!(execute(&DEMO, home.path(), "--plot-only", &never).0, 2, "there is no table yet");
    execute(&DEMO, home.path(), "", &never);
    let before = manifest(home.path());
    let csv = text(home.path(), "table.csv");
    std::fs::write(home.path().join("table.csv"), csv.replace("3.5714285714285716", "9.25"))
        .unwrap();
    std::fs::remove_file(home.path().join("cost.png")).unwrap();
    // A figure of another name replaces the old one.
    let renamed = Experiment {
        plot: |table| {
            Ok(plot(table)?
                .into_iter()
                .map(|f| NamedFigure { name: "price".into(), ..f })
                .collect())
        },
        ..DEMO
    };
    let (code, _, measured) = execute(&renamed, home.path(), "--plot-only", &never);
    assert_eq!((code, measured.len()), (0, 0));
    assert!(text(home.path(), "findings.md").contains("takes 9.25 s"));
    assert_eq!(
        names(home.path()),
        ["findings.md", "manifest.json", "price.png", "price.svg", "table.csv"]
    );
    let after = manifest(home.path());
    assert_eq!((&after.started_at, &after.config), (&before.started_at, &before.config));
    assert_ne!(after.files["table.csv"], before.files["table.csv"]);
}

/// A table that somebody changed: no panic, and what cannot be drawn is a failure that names the
/// file.
#[test]
fn a_table_of_another_form_is_said_to_be_one() {
    let home = tempfile::tempdir().unwrap();
    execute(&DEMO, home.path(), "", &never);
    let csv = text(home.path(), "table.csv");
    std::fs::write(home.path().join("table.csv"), csv.lines().next().unwrap()).unwrap();
    assert_eq!(execute(&DEMO, home.path(), "--plot-only", &never).0, 2, "no rows");
    std::fs::write(home.path().join("table.csv"), csv).unwrap();
    let panics = Experiment { findings: |table| Ok(vec![table.columns()[1000].clone()]), ..DEMO };
    assert_eq!(execute(&panics, home.path(), "--plot-only", &never).0, 1);
    let failures = manifest(home.path()).failures;
    assert!(
        failures[0].point == "(findings)" && failures[0].error.contains("table.csv"),
        "{failures:?}"
    );
}

#[test]
fn an_experiment_that_cannot_draw_or_judge_says_so() {
    let home = tempfile::tempdir().unwrap();
    let experiment = Experiment {
        plot: |table| table.floats("no such column").map(|_| Vec::new()),
        checks: Some(|table| table.floats("neither").map(|_| Vec::new())),
        ..DEMO
    };
    assert_eq!(execute(&experiment, home.path(), "", &never).0, 1);
    let failures = manifest(home.path()).failures;
    assert_eq!(
        failures.iter().map(|f| f.point.as_str()).collect::<Vec<_>>(),
        ["(figures)", "(checks)"]
    );
    // Mended, the measurements serve.
    let (code, _, measured) = execute(&DEMO, home.path(), "--plot-only", &never);
    assert_eq!((code, measured.len()), (0, 0));
    assert!(manifest(home.path()).failures.is_empty());
}

#[test]
fn parallel_points_give_the_same_table() {
    let home = tempfile::tempdir().unwrap();
    let parallel = Experiment { parallel: true, ..DEMO };
    assert_eq!(execute(&parallel, home.path(), "--profile full", &never).0, 0);
    assert_eq!(text(home.path(), "table.csv"), fresh_table("--profile full", 0));
}

#[test]
fn usage_errors_are_two_and_help_is_zero() {
    let home = tempfile::tempdir().unwrap();
    for flags in [
        "--profile medium",
        "--unknown",
        "--seed -1",
        "--resume --force",
        "--plot-only --force",
        "stray",
    ] {
        assert_eq!(execute(&DEMO, home.path(), flags, &never).0, 2, "{flags}");
    }
    assert_eq!(execute(&DEMO, home.path(), "--help", &never).0, 0);
    assert!(names(home.path()).is_empty());
    let twice = Experiment {
        grid: |_, _| vec![Point::new("a").with("n", 1), Point::new("b").with("n", 1)],
        ..DEMO
    };
    assert_eq!(execute(&twice, home.path(), "", &never).0, 2);
}

#[test]
fn a_folder_that_cannot_be_written_is_two() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    assert_eq!(execute(&DEMO, &file, "", &never).0, 2);
    assert_eq!(text(home.path(), "file"), "in the way");
}

#[test]
fn reproduce_runs_all_and_writes_the_index() {
    let home = tempfile::tempdir().unwrap();
    let broken = Experiment {
        name: "broken",
        title: "Broken: c > 1?",
        measure: |_| Err(Error::invalid("n", 1, "too hard")),
        ..DEMO
    };
    let later = Experiment { name: "later", title: "Later", ..DEMO };
    let all = [broken, DEMO, later];
    let run = |flags: &str| {
        let arguments =
            ["reproduce", "--out"].map(OsString::from).into_iter().chain([home.path().into()]);
        let mut out = Vec::new();
        let code = run_all(
            &all,
            arguments.chain(flags.split_whitespace().map(OsString::from)),
            &never,
            Crew::default(),
            &mut out,
        );
        (code, String::from_utf8(out).unwrap())
    };
    assert_eq!(run("--only nothing").0, 2);
    let (code, out) = run("--only broken,demo-cost");
    assert_eq!(code, 1);
    assert!(out.contains("FAILED n = 2") && out.contains("takes 3.57 s"), "{out}");
    assert_eq!(names(home.path()), ["README.md", "broken", "demo-cost", "index.html"]);
    let gallery = text(home.path(), "index.html");
    for part in [
        "<h2>Broken: c &gt; 1?</h2>",
        "src=\"demo-cost/cost.svg\"",
        "<b>Found:</b> The largest of",
        "<b>Doubt:</b> Two &lt; three points.",
        "<p class=\"fail\">n = 2: n = 1: too hard</p>",
        "name=\"viewport\"",
    ] {
        assert!(gallery.contains(part), "{part} is not in {gallery}");
    }
    assert!(!gallery.contains("Later"), "an experiment that has not run has no section");
    let page = text(home.path(), "README.md");
    for part in [
        "quick profile",
        "- [Broken: c > 1?](#broken-c--1)",
        "## Cost of the demo",
        "[![cost](demo-cost/cost.png)](demo-cost/cost.svg)",
        "**Claim.** Cost is quadratic.",
        "cargo run --release --bin demo-cost -- --profile quick --seed 0",
        "- The largest of 3 points takes 3.57 s.",
        "- `n = 5`: n = 1: too hard",
        "Not run yet: `cargo run --release --bin later`",
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    assert!(home.path().join("demo-cost/cost.png").is_file());
    assert_eq!(run("--only later").0, 0);
    let page = text(home.path(), "README.md");
    assert!(!page.contains("Not run yet") && page.contains("(demo-cost/cost.png)"), "{page}");
}
