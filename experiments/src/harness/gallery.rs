//! `index.html` of a figures folder: every figure with its finding, readable on a phone, without
//! any script.

use super::experiment::{Experiment, Profile};
use peft_limits::atomic_file::write_bytes;
use peft_limits::error::Result;
use peft_limits::report::manifest::Manifest;
use std::path::Path;

/// Writes `root/index.html` from the manifests of the experiments' folders under `root`.
///
/// # Errors
/// As [`super::index::write_index`].
pub(super) fn write_gallery(
    root: &Path,
    profile: Profile,
    experiments: &[Experiment],
) -> Result<()> {
    let mut sections = String::new();
    let mut contents = String::new();
    for experiment in experiments {
        let Some(manifest) = Manifest::read(&root.join(experiment.name))? else { continue };
        contents += &format!(
            "<li><a href=\"#{}\">{}</a></li>\n",
            experiment.name,
            escaped(experiment.title)
        );
        sections += &section(experiment, &manifest);
    }
    let note = profile.pick(
        "<p class=\"note\">Quick profile: small grids, to be read as a check, not as a result.</p>",
        "<p>What each figure claims, what was found, what is doubtful about it, and what would \
         refute it.</p>",
    );
    let page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>peft-limits: figures</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>peft-limits: figures</h1>\n{note}\n<nav><ul>\n{contents}</ul></nav>\n{sections}</body>\n</html>\n"
    );
    write_bytes(&root.join("index.html"), page.as_bytes())
}

/// Figures keep their white ground in the dark, since their ink is dark. On a phone they stay wide
/// enough to be read and scroll sideways in their own box.
const STYLE: &str = "
:root{color-scheme:light dark}
body{font:1rem/1.5 system-ui,sans-serif;max-width:58rem;margin:0 auto;padding:0 1rem 4rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:3rem}
figure{margin:1rem 0}figure a{display:block;overflow-x:auto}
img{display:block;width:100%;height:auto;background:#fff;border-radius:.4rem}
@media(max-width:40rem){img{width:42rem;max-width:none}}
figcaption{font-size:.9rem;margin-top:.4rem}
dt{font-weight:600}dd{margin:0 0 .6rem}
code{overflow-wrap:anywhere}.fail{color:#d55e00;font-weight:600}.note{font-style:italic}
nav ul{padding-left:1.2rem}details{margin:.6rem 0}summary{cursor:pointer}";

fn section(experiment: &Experiment, manifest: &Manifest) -> String {
    let name = experiment.name;
    let mut text = format!("<section id=\"{name}\">\n<h2>{}</h2>\n", escaped(experiment.title));
    let found = manifest.findings.first().map_or("nothing", |finding| finding);
    for (at, figure) in manifest.figures.iter().enumerate() {
        let words = escaped(&figure.replace('_', " "));
        let figure = escaped(figure);
        // The finding and the doubt stand under the first figure; they are about all of them.
        let caption = match at {
            0 => {
                format!(
                    "<b>Found:</b> {} <b>Doubt:</b> {}",
                    escaped(found),
                    escaped(experiment.doubt)
                )
            }
            _ => words.clone(),
        };
        text += &format!(
            "<figure><a href=\"{name}/{figure}.svg\"><img loading=\"lazy\" \
             src=\"{name}/{figure}.svg\" alt=\"{}, {words}: \
             {}\"></a><figcaption>{caption}</figcaption></figure>\n",
            escaped(experiment.title),
            escaped(found)
        );
    }
    text += &format!("<dl>\n<dt>Claim</dt><dd>{}</dd>\n", escaped(experiment.claim));
    text += &format!(
        "<dt>It would be refuted by</dt><dd>{}</dd>\n</dl>\n",
        escaped(experiment.refuted_by)
    );
    if manifest.findings.len() > 1 || !manifest.checks.is_empty() {
        text += "<details><summary>All findings and checks</summary>\n<ul>\n";
        manifest
            .findings
            .iter()
            .skip(1)
            .for_each(|f| text += &format!("<li>{}</li>\n", escaped(f)));
        for check in &manifest.checks {
            let (class, word) = if check.passed { ("pass", "holds") } else { ("fail", "fails") };
            text += &format!(
                "<li><span class=\"{class}\">{word}</span>: {}</li>\n",
                escaped(&check.check)
            );
        }
        text += "</ul>\n</details>\n";
    }
    manifest.failures.iter().for_each(|f| {
        text += &format!("<p class=\"fail\">{}: {}</p>\n", escaped(&f.point), escaped(&f.error));
    });
    text + &format!(
        "<p><a href=\"{name}/table.csv\">table</a>, <a href=\"{name}/manifest.json\">manifest</a>; \
         {} profile, {:.0} s on {} threads</p>\n</section>\n",
        escaped(&manifest.profile),
        manifest.wall_seconds.ceil(),
        manifest.machine.threads,
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_texts_is_escaped() {
        assert_eq!(escaped("a < b & \"c\" > d"), "a &lt; b &amp; &quot;c&quot; &gt; d");
    }
}
