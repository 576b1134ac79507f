//! `validate --html`: the report as one page that needs nothing else.

use crate::atomic_file::write_atomically;
use crate::error::{Error, Result};
use crate::report::short_float;
use crate::validate::ladder::Outcome;
use crate::validate::measure::{MULTIPLE, Measure};
use crate::validate::{Report, place_of};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

const STYLE: &str = "\
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:0 \
auto;padding:1rem}h1{font-size:1.3rem;margin:.2rem \
0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}.verdict{border-left:.5rem \
solid;padding:.6rem 1rem;margin:1rem \
0;font-size:1.1rem}.pass{border-color:#1a7f37}.fail{border-color:#c62828}.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.15rem .6rem;text-align:left;border-bottom:1px solid #8884;vertical-align:top}\
td.n,th.n{text-align:right}.map td{min-width:3.2rem;text-align:center;color:#111;border:2px solid \
Canvas}li{margin:.3rem 0}.fault{margin:.8rem 0}.fault \
b{font-family:ui-monospace,monospace}small{opacity:.8}";

/// Writes the page.
///
/// # Errors
/// [`crate::Error::Io`].
pub(super) fn write(report: &Report, path: &Path) -> Result<()> {
    write_atomically(path, |file| {
        file.write_all(page(report).as_bytes()).map_err(|e| Error::io(path, e))
    })
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The verdict in a sentence.
fn sentence(report: &Report) -> String {
    if report.passed {
        return format!(
            "The step is right: every gap is within {MULTIPLE} times what rounding explains."
        );
    }
    match report.diagnoses.iter().find(|d| d.complete) {
        Some(d) => format!("The step is wrong: {}.", d.what),
        None if !report.diagnoses.is_empty() => {
            format!("The step is wrong; a part is explained: {}.", report.diagnoses[0].what)
        }
        None => match report.lead() {
            Some(lead) => format!("The step is wrong, and no known fault explains it: {lead}."),
            None => "The step is wrong, and no known fault explains it.".into(),
        },
    }
}

fn page(report: &Report) -> String {
    let name = escaped(&report.name);
    let (class, word) = if report.passed { ("pass", "PASS") } else { ("fail", "FAIL") };
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>{word}: \
         {name}</title><style>{STYLE}</style></head><body>\n<h1>{name}</h1>\n\
         <p class=\"verdict {class}\"><strong>{word}.</strong> {}</p>\n",
        escaped(&sentence(report))
    );
    faults(report, &mut html);
    list("Faults that no step was left for", &report.left_out, &mut html);
    ladder(report, &mut html);
    heat_map(report, &mut html);
    worst(report, &mut html);
    list("What this step cannot show", &report.not_exercised, &mut html);
    html.push_str("<h2>As recorded</h2><div class=\"scroll\"><table>\n");
    for (what, how) in &report.recorded {
        let _ = writeln!(html, "<tr><th>{}</th><td>{}</td></tr>", escaped(what), escaped(how));
    }
    let _ = writeln!(
        html,
        "</table></div>\n<p><small>peft-limits {}; {} steps of the f64 \
         reference.</small></p>\n</body></html>",
        env!("CARGO_PKG_VERSION"),
        report.reference_steps
    );
    html
}

fn list(title: &str, lines: &[String], html: &mut String) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(html, "<h2>{title}</h2><ul>");
    for line in lines {
        let _ = writeln!(html, "<li>{}</li>", escaped(line));
    }
    html.push_str("</ul>\n");
}

fn faults(report: &Report, html: &mut String) {
    if report.diagnoses.is_empty() {
        return;
    }
    html.push_str("<h2>What is wrong</h2>\n");
    for d in &report.diagnoses {
        let all = if d.complete { "explains every gap" } else { "explains a part" };
        let (explained, failing) = d.tensors;
        let _ = writeln!(
            html,
            "<div class=\"fault\"><b>{}</b>: {}<br>To mend it: {}<br><small>{all}: {explained} of \
             {failing} tensors, largest remaining share {}</small></div>",
            escaped(&d.fault),
            escaped(&d.what),
            escaped(&d.fix),
            short_float(d.share)
        );
    }
}

fn ladder(report: &Report, html: &mut String) {
    html.push_str(
        "<h2>Rungs</h2><div class=\"scroll\"><table><tr><th>compared</th><th>result</th><th \
         class=\"n\">tensors</th><th class=\"n\">share</th></tr>\n",
    );
    for rung in &report.rungs {
        let (result, why) = match &rung.outcome {
            Outcome::Pass => ("pass", String::new()),
            Outcome::Fail => ("FAIL", String::new()),
            Outcome::Skipped(why) => ("not compared", why.clone()),
        };
        let share = if rung.tensors.is_empty() { String::new() } else { short_float(rung.share()) };
        let notes = std::iter::once(&why)
            .chain(rung.problems.iter().take(5))
            .filter(|note| !note.is_empty());
        let notes: String =
            notes.map(|note| format!("<br><small>{}</small>", escaped(note))).collect();
        let _ = writeln!(
            html,
            "<tr><td>{}{notes}</td><td>{result}</td><td class=\"n\">{}</td><td \
             class=\"n\">{share}</td></tr>",
            rung.name.name(),
            rung.tensors.len(),
        );
    }
    html.push_str(
        "</table></div>\n<p><small>Share: the gap in units of what is allowed; above 1 is \
         wrong.</small></p>\n",
    );
}

/// Green up to the tolerance, then yellow to red over two decades.
fn colour(share: f64) -> String {
    let wrong =
        if share.is_finite() { (share.max(1e-9).log10() / 2.0).clamp(-1.0, 1.0) } else { 1.0 };
    let hue = if wrong <= 0.0 { 110.0 } else { 50.0 * (1.0 - wrong) };
    let light = if wrong <= 0.0 { 88.0 + 6.0 * wrong } else { 78.0 - 16.0 * wrong };
    format!("hsl({hue:.0} 70% {light:.0}%)")
}

fn heat_map(report: &Report, html: &mut String) {
    let placed: Vec<(usize, String, f64)> = report
        .gradients()
        .iter()
        .filter_map(|m| {
            let (layer, module, tensor) = place_of(&m.name);
            Some((
                layer?,
                format!(
                    "{} {}",
                    module.trim_end_matches("_proj"),
                    tensor.trim_start_matches("lora_")
                ),
                m.share,
            ))
        })
        .collect();
    if placed.is_empty() {
        return;
    }
    let layers: BTreeSet<usize> = placed.iter().map(|p| p.0).collect();
    let mut rows: Vec<&String> = Vec::new();
    placed.iter().for_each(|(_, row, _)| {
        if !rows.contains(&row) {
            rows.push(row);
        }
    });
    html.push_str(
        "<h2>Gradients, module by layer (shares)</h2><div class=\"scroll\"><table \
         class=\"map\"><tr><th></th>",
    );
    layers.iter().for_each(|layer| {
        let _ = write!(html, "<th class=\"n\">{layer}</th>");
    });
    html.push_str("</tr>\n");
    for row in rows {
        let _ = write!(html, "<tr><th>{}</th>", escaped(row));
        for &layer in &layers {
            match placed.iter().find(|(l, r, _)| *l == layer && r == row) {
                Some((_, _, share)) => {
                    let _ = write!(
                        html,
                        "<td style=\"background:{}\">{}</td>",
                        colour(*share),
                        short_float(*share)
                    );
                }
                None => html.push_str("<td></td>"),
            }
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
    if let Some(lead) = report.lead() {
        let _ = writeln!(html, "<p>First gap: {}.</p>", escaped(&lead));
    }
}

fn worst(report: &Report, html: &mut String) {
    let mut tensors: Vec<&Measure> =
        report.rungs.iter().flat_map(|r| &r.tensors).filter(|m| m.worst.is_some()).collect();
    tensors.sort_by(|a, b| b.share.total_cmp(&a.share));
    tensors.truncate(12);
    if tensors.is_empty() {
        return;
    }
    html.push_str(
        "<h2>Largest gaps</h2><div class=\"scroll\"><table><tr><th>tensor</th><th \
         class=\"n\">gap</th><th class=\"n\">rounding</th><th class=\"n\">share</th><th \
         class=\"n\">cosine</th><th class=\"n\">norms</th></tr>\n",
    );
    for m in tensors {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td class=\"n\">{:.1e}</td><td class=\"n\">{:.1e}</td><td \
             class=\"n\">{}</td><td class=\"n\">{:.4}</td><td class=\"n\">{}</td></tr>",
            escaped(&m.name),
            m.relative,
            m.rounding,
            short_float(m.share),
            m.cosine,
            short_float(m.norm_ratio)
        );
    }
    html.push_str("</table></div>\n");
}
