//! What `validate` prints: the verdict with its evidence.

use crate::report::short_float;
use crate::validate::Report;
use crate::validate::ladder::{Outcome, Rung};
use crate::validate::measure::{MULTIPLE, Measure};
use crate::validate::own_forward::OwnForward;
use crate::validate::selftest::Planted;

pub(super) fn print(report: &Report, all: bool) {
    let (products, weights) = &report.precision;
    let precision =
        if products == weights { products.clone() } else { format!("{products} over {weights}") };
    let loss = if report.reference_loss.is_nan() {
        String::new()
    } else {
        format!(", reference loss {:.6}", report.reference_loss)
    };
    println!("{}: {precision}{loss}", report.name);
    println!();
    println!("  {:<18} {:<8} {:>9} {:>9}", "rung", "result", "tensors", "share");
    for rung in &report.rungs {
        let (result, note) = match &rung.outcome {
            Outcome::Pass => ("pass", String::new()),
            Outcome::Fail => ("FAIL", worst(&rung.tensors)),
            Outcome::Skipped(why) => ("-", why.clone()),
        };
        let share = if rung.tensors.is_empty() { String::new() } else { short_float(rung.share()) };
        let line = format!(
            "  {:<18} {result:<8} {:>9} {share:>9}  {note}",
            rung.name.name(),
            rung.tensors.len()
        );
        println!("{}", line.trim_end());
        let shown = if all { usize::MAX } else { 3 };
        rung.problems.iter().take(shown).for_each(|problem| println!("  {:<18} {problem}", ""));
        if rung.problems.len() > shown {
            println!("  {:<18} and {} more (--all)", "", rung.problems.len() - shown);
        }
    }
    print_ranks(report);
    if let Some(own) = &report.own_forward {
        println!("{}", own.line());
        print_wrong(own, all);
    }
    print_tensors(report, all);
    print_not_exercised(report, all);
    println!();
    if report.passed {
        println!(
            "PASS: every gap is within {MULTIPLE} times what rounding to {precision} explains."
        );
        let blurred = report.gradients().iter().filter(|m| m.rounding > 0.1).count();
        if blurred > 0 {
            println!(
                "      {blurred} gradients are tested weakly: rounding alone moves them by more \
                 than 10%."
            );
        }
        return;
    }
    println!("FAIL");
    if !report.rungs.iter().any(Rung::failed) {
        println!(
            "      The dumped numbers agree with the reference; the trainer's backward is not the \
             derivative of its own forward."
        );
        return;
    }
    for (i, d) in report.diagnoses.iter().enumerate() {
        let certain = if d.complete { "this explains every gap" } else { "this explains a part" };
        let (explained, failing) = d.tensors;
        println!();
        println!("  {}. {}: {}", i + 1, d.fault, d.what);
        if failing > 0 {
            println!(
                "     {certain} ({explained} of {failing} tensors, largest remaining share {})",
                short_float(d.share)
            );
        }
        println!("     {}", d.fix);
    }
    if !report.diagnoses.iter().any(|d| d.complete) {
        println!();
        let parts = match report.ruled_out {
            0 => String::new(),
            n => format!(", {n} faults ruled out by a part of one"),
        };
        let steps = report.reference_steps;
        println!(
            "  No known fault explains all of it ({steps} steps of the reference tried{parts})."
        );
        if !report.left_out.is_empty() {
            let names = report.left_out.join(", ");
            println!(
                "  The search ended there, to stay within five times a right step; not tried: {names}."
            );
        }
        if let Some(lead) = report.lead() {
            println!("  Where to look: {lead}.");
        }
    }
}

/// What each process holds of the gradients.
fn print_ranks(report: &Report) {
    if report.ranks.is_empty() {
        return;
    }
    println!();
    println!(
        "  {:<6} {:<12} {:>8} {:>8} {:>9}  worst of its gradients",
        "rank", "data", "tensors", "wrong", "share"
    );
    for r in &report.ranks {
        let data = format!("{}..{}", r.span.0, r.span.1);
        let share = short_float(r.share);
        println!(
            "  {:<6} {data:<12} {:>8} {:>8} {share:>9}  {}",
            r.rank, r.tensors, r.wrong, r.worst
        );
    }
}

/// The gradients that are not the derivative of the trainer's own forward.
fn print_wrong(own: &OwnForward, all: bool) {
    let wrong: Vec<_> = own.tensors.iter().filter(|t| t.status == "wrong").collect();
    let shown = if all { usize::MAX } else { 3 };
    wrong.iter().take(shown).for_each(|t| println!("  {:<18} {}: {}", "", t.name, t.what));
    if wrong.len() > shown {
        println!("  {:<18} and {} more (--all)", "", wrong.len() - shown);
    }
}

/// What the step cannot show, in a line each.
fn print_not_exercised(report: &Report, all: bool) {
    let shown = if all { usize::MAX } else { 4 };
    if !report.not_exercised.is_empty() {
        println!();
        println!("  This step cannot show:");
    }
    report.not_exercised.iter().take(shown).for_each(|line| println!("    {line}"));
    if report.not_exercised.len() > shown {
        println!("    and {} more (--all)", report.not_exercised.len() - shown);
    }
}

/// What became of planted faults.
pub(super) fn print_selftest(name: &str, planted: &[Planted]) {
    println!("{name}: {} faults planted, one at a time", planted.len());
    println!();
    println!("  {:<30} {:>9}  {:<28} what", "fault", "share", "verdict");
    for p in planted {
        let verdict = match (p.failed, p.named.first()) {
            (true, _) if p.named_first() => "named".into(),
            (true, Some(other)) => format!("named {other}"),
            (true, None) => "fails, without a name".into(),
            (false, _) if p.shows() => "MISSED".into(),
            (false, _) => "not seen: below rounding".into(),
        };
        println!("  {:<30} {:>9}  {verdict:<28} {}", p.fault, short_float(p.share), p.what);
    }
    let count = |keep: &dyn Fn(&&Planted) -> bool| planted.iter().filter(keep).count();
    println!();
    println!(
        "{} of {} fail; {} are named first; {} are below what rounding hides in this dump.",
        count(&|p| p.failed),
        planted.len(),
        count(&|p| p.named_first()),
        count(&|p| !p.failed && !p.shows()),
    );
}

fn worst(tensors: &[Measure]) -> String {
    let wrong = tensors.iter().filter(|m| !m.passes()).count();
    let most = tensors.iter().max_by(|a, b| a.share.total_cmp(&b.share));
    most.map_or(String::new(), |m| format!("{wrong} wrong, worst {}", m.name))
}

fn print_tensors(report: &Report, all: bool) {
    let mut tensors: Vec<&Measure> = report
        .rungs
        .iter()
        .flat_map(|r| &r.tensors)
        .filter(|m| m.worst.is_some() && m.name != "loss")
        .collect();
    if !all {
        tensors.sort_by(|a, b| b.share.total_cmp(&a.share));
        tensors.truncate(if report.passed { 3 } else { 8 });
    }
    if tensors.is_empty() {
        return;
    }
    println!();
    println!(
        "  {:<46} {:>9} {:>9} {:>9} {:>8} {:>9}  worst entry: trainer, reference",
        "tensor", "gap", "rounding", "share", "cosine", "norms"
    );
    for m in tensors {
        let entry = m
            .worst
            .map_or(String::new(), |(i, j, got, want)| format!("[{i}, {j}] {got:.4e}, {want:.4e}"));
        println!(
            "  {:<46} {:>9} {:>9} {:>9} {:>8.4} {:>9}  {entry}",
            m.name.replace("model.layers.", ""),
            scientific(m.relative),
            scientific(m.rounding),
            short_float(m.share),
            m.cosine,
            short_float(m.norm_ratio),
        );
    }
}

fn scientific(x: f64) -> String {
    if x.is_finite() { format!("{x:.1e}") } else { "NaN".into() }
}
