//! What of the papers reproduces: the table of `paper-notes/what-reproduces.md`, each word and
//! number computed from a committed table of `figures`.
//!
//! After a new run of a figure `BLESS=1 cargo test -p peft-limits-experiments reproduced` writes
//! the table again; without it the test fails where the page and the tables differ. A reason that
//! no longer fits its word is for the reader of the difference to see.

use crate::harness::over_bases::{difference, interval};
use crate::{adapter_fusion, generalization, s2ft_selection};
use peft_limits::Result;
use peft_limits::limits::exponent::fit_exponent;
use peft_limits::report::{Summary, Table};
use std::path::{Path, PathBuf};

/// What a claim comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    /// Same sign and at least three quarters of the size, or the statement itself.
    Same,
    /// Same sign, smaller.
    Weaker,
    /// The interval holds zero.
    NotSeen,
    /// The other sign.
    Opposite,
}

impl Word {
    fn text(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Weaker => "weaker",
            Self::NotSeen => "not seen",
            Self::Opposite => "opposite",
        }
    }
}

/// Share of the paper's effect from which on it counts as the same.
const ENOUGH: f64 = 0.75;

/// Of an effect with an interval, given the paper's.
fn effect((mean, low, high): (f64, f64, f64), paper: f64) -> Word {
    let (low, high) = if paper < 0.0 { (-high, -low) } else { (low, high) };
    match () {
        () if high < 0.0 => Word::Opposite,
        () if !(low > 0.0) => Word::NotSeen,
        () if mean.abs() >= ENOUGH * paper.abs() => Word::Same,
        () => Word::Weaker,
    }
}

/// Of a number that is exact or a median, given the paper's.
fn size(ours: f64, paper: f64) -> Word {
    effect((ours, ours, ours), paper)
}

fn holds(statement: bool) -> Word {
    if statement { Word::Same } else { Word::Opposite }
}

/// Of three groups in the paper's order: both steps up, only the ends apart, or neither.
fn order(first: (f64, f64, f64), second: (f64, f64, f64), ends: (f64, f64, f64)) -> Word {
    match () {
        () if first.1 > 0.0 && second.1 > 0.0 => Word::Same,
        () if ends.1 > 0.0 => Word::Weaker,
        () if ends.2 < 0.0 => Word::Opposite,
        () => Word::NotSeen,
    }
}

fn points((mean, low, high): (f64, f64, f64)) -> String {
    if low.is_infinite() {
        return format!("{:+.1} points, one base", 100.0 * mean);
    }
    format!("{:+.1} points ({:+.1} to {:+.1})", 100.0 * mean, 100.0 * low, 100.0 * high)
}

fn percent(x: f64) -> String {
    format!("{:+.1}%", 100.0 * x)
}

type Outcome = Result<(Word, String)>;

/// A statement of a paper with a figure of ours.
struct Claim {
    place: &'static str,
    says: &'static str,
    figure: &'static str,
    outcome: fn(&Table) -> Outcome,
    reason: &'static str,
}

fn median(table: &Table, method: &str, column: &str) -> Result<f64> {
    Ok(Summary::of(&table.filter_eq("method", method).floats(column)?).median)
}

/// Relative difference of two methods in the median of a column.
fn against(table: &Table, method: &str, other: &str, column: &str) -> Result<f64> {
    Ok(median(table, method, column)? / median(table, other, column)? - 1.0)
}

const STEP: &str = "step (ms)";
const PREDICTED: &str = "total predicted (MiB)";
const LONGEST: &str = "longest (tokens)";
const LLAMA: &str = "llama-2-7b";

/// The measured model on which a saving is quoted.
fn micro(table: &Table) -> Table {
    table.filter_eq("model", "micro")
}

fn llama(table: &Table) -> Table {
    table.filter_eq("model", LLAMA)
}

fn longest(table: &Table, other: &str, paper: f64) -> Outcome {
    let rows = llama(table).filter(|r| r.text("checkpointing") == "false");
    let gain = against(&rows, "paca", other, LONGEST)?;
    Ok((size(gain, paper), percent(gain)))
}

/// Difference in in-domain accuracy over bases, 95%.
fn accuracy(table: &Table, method: &str) -> Result<(f64, f64, f64)> {
    let of = |method: &str| table.filter_eq("method", method);
    Ok(interval(&difference(&of(method), &of("lora"), "in-domain tokens")?, 0.95))
}

/// Of sparse against another method out of distribution at 1%, in points.
fn generalizes(table: &Table, a: &str, b: &str, column: &str) -> Outcome {
    let d = generalization::compared(table, (a, b), "1%", column, 0.95)?;
    Ok((effect(d, 0.01), points(d)))
}

fn selected(table: &Table, rule: &str, paper: f64) -> Outcome {
    let d = s2ft_selection::from_random(table, "down_proj", rule, "in-domain tokens", 0.95)?;
    Ok((effect(d, paper / 100.0), points(d)))
}

fn fused(table: &Table, a: &str, paper: f64) -> Outcome {
    let (mean, low, high) =
        adapter_fusion::compared(table, a, adapter_fusion::LORA, "sum", adapter_fusion::LOST)?;
    Ok((effect((mean, low, high), paper), format!("{mean:+.1} points ({low:+.1} to {high:+.1})")))
}

fn switch_slope(table: &Table, method: &str) -> Result<f64> {
    let rows = table.filter_eq("part", "switch").filter_eq("method", method);
    let medians = rows.summarise(&["width"], "time (ms)")?;
    let at = |cell: &[peft_limits::report::Cell]| cell[0].as_f64().unwrap_or(f64::NAN);
    let points: Vec<(f64, f64)> = medians.iter().map(|(width, s)| (at(width), s.median)).collect();
    Ok(fit_exponent(&points, 0.95)?.slope)
}

fn slice_bound(table: &Table, method: &str) -> Result<Summary> {
    let rows = table.filter_eq("kind", "linear").filter_eq("method", method);
    let mut shares = Vec::new();
    for (_, rows) in rows.group_by(&["world", "t"])? {
        let of =
            |column: &str| Ok::<_, peft_limits::Error>(Summary::of(&rows.floats(column)?).mean);
        shares.push(of("risk on the other task")? / of("bound")?);
    }
    Ok(Summary::of(&shares))
}

/// Papers in the order of the page.
const PAPERS: [(&str, &[Claim]); 3] = [
    (
        "[CL-LoRA]",
        &[
            Claim {
                place: "theorems 3.1 and A.1",
                says: "gradients in almost linear time for norms o(√log L), error 1/poly(L)",
                figure: "theorem_limits",
                outcome: |table| {
                    let rows = table.filter(|r| {
                        r.text("kind") == "trajectory" && (r.f64("s") - 0.35).abs() < 1e-9
                    });
                    let e = rows.sorted_by("log2 L")?.floats("certified")?;
                    let (first, last) = (e[0], e[e.len() - 1]);
                    Ok((
                        holds(last < first && last < 1.5),
                        format!("exponent {first:.2} to {last:.2}"),
                    ))
                },
                reason: "norms 0.4 (ln L)^0.35 from L = 2^9 to 2^255; at lengths that run the \
                         exponent is still near 2",
            },
            Claim {
                place: "lemmas 3.1 to 3.7",
                says: "the error of the chain is controlled term by term",
                figure: "bounds",
                outcome: |table| {
                    let held = table.rows().filter(|r| {
                        let (certified, error) =
                            (r.f64("certified error / norm"), r.f64("gradient error"));
                        certified.is_nan() || error.is_nan() || error <= certified + 1e-11
                    });
                    let held = held.count();
                    Ok((
                        holds(held == table.len()),
                        format!("{held} of {} errors in their bounds", table.len()),
                    ))
                },
                reason: "the certificates are hundreds of times too large",
            },
            Claim {
                place: "theorem F.1",
                says: "the exact gradient takes quadratic time",
                figure: "crossover",
                outcome: |table| {
                    let rows =
                        table.filter_eq("method", "streaming f32").filter(|r| r.f64("c") < 1.0);
                    let points: Vec<(f64, f64)> = rows
                        .floats("tokens")?
                        .into_iter()
                        .zip(rows.floats("operations (flops)")?)
                        .collect();
                    let slope = fit_exponent(&points, 0.95)?.slope;
                    Ok((holds((slope - 2.0).abs() < 0.05), format!("slope {slope:.2}")))
                },
                reason: "counted operations of the streaming gradient",
            },
            Claim {
                place: "theorem 4.1, lemma E.1",
                says: "a fast gradient would decide nearest neighbours: the reduction",
                figure: "hardness",
                outcome: |table| {
                    let rows = table.filter(|r| {
                        r.text("kind") == "exact"
                            && r.text("oracle") == "LoRA gradient, Y = 0"
                            && r.text("guaranteed") == "true"
                    });
                    let sum = |columns: [&str; 2]| -> Result<f64> {
                        let mut all = 0.0;
                        for column in columns {
                            all += rows.floats(column)?.iter().sum::<f64>();
                        }
                        Ok(all)
                    };
                    let (right, all) =
                        (sum(["planted right", "null right"])?, sum(["planted", "null"])?);
                    Ok((
                        holds(right >= all && all > 0.0),
                        format!("{right} of {all} instances right"),
                    ))
                },
                reason: "squared loss, Y = 0, to L = 2^15, where the promise decides; a lower \
                         bound itself cannot be run",
            },
        ],
    ),
    (
        "[PaCA]",
        &[
            Claim {
                place: "abstract: time",
                says: "22% less training time than LoRA",
                figure: "peft_cost",
                outcome: |table| {
                    let saved = against(&micro(table), "paca", "lora", STEP)?;
                    Ok((size(saved, -0.22), percent(saved)))
                },
                reason: "4.5 M parameters on a CPU, which launches no kernels, the paper's cause",
            },
            Claim {
                place: "abstract: memory",
                says: "16% less total memory than LoRA",
                figure: "peft_cost",
                outcome: |table| {
                    let saved = against(&llama(table), "paca", "lora", PREDICTED)?;
                    Ok((size(saved, -0.16), percent(saved)))
                },
                reason: "LLaMA-2-7B, 8 x 512, two bytes, predicted; it depends on batch and length",
            },
            Claim {
                place: "tables of accuracy",
                says: "accuracy as LoRA's (MMLU, Oasst1)",
                figure: "peft_accuracy",
                outcome: |table| {
                    let d = accuracy(table, "paca")?;
                    Ok((if d.2 < 0.0 { Word::Opposite } else { Word::Same }, points(d)))
                },
                reason: "not separated below; one artificial task, each at its best rate",
            },
            Claim {
                place: "longest sequence, LoRA",
                says: "23% longer than LoRA's",
                figure: "sequence_limit",
                outcome: |table| longest(table, "lora", 0.23),
                reason: "our step keeps no attention matrix and no logits, so what PaCA saves is a \
                         larger share",
            },
            Claim {
                place: "longest sequence, DoRA",
                says: "108% longer than DoRA's",
                figure: "sequence_limit",
                outcome: |table| longest(table, "dora", 1.08),
                reason: "our DoRA keeps no more than LoRA; theirs keeps the merged weight's \
                         intermediate results",
            },
            Claim {
                place: "longest sequence, MosLoRA",
                says: "23% longer than MosLoRA's",
                figure: "sequence_limit",
                outcome: |table| longest(table, "moslora", 0.23),
                reason: "as against LoRA",
            },
            Claim {
                place: "abstract: throughput",
                says: "16% more than LoRA's",
                figure: "sequence_limit",
                outcome: |table| {
                    let rows =
                        table.filter(|r| r.text("kind") == "throughput" && r.text("batch") == "16");
                    let gain = against(&rows, "paca", "lora", "tokens per second")?;
                    Ok((size(gain, 0.16), percent(gain)))
                },
                reason: "batch 16, 4.5 M parameters, a CPU",
            },
            Claim {
                place: "QPaCA",
                says: "combines with a quantized base",
                figure: "peft_cost",
                outcome: |table| {
                    let saved = against(&llama(table), "qpaca", "qlora", PREDICTED)?;
                    Ok((holds(saved < 0.0), format!("{} against QLoRA", percent(saved))))
                },
                reason: "predicted memory of LLaMA-2-7B",
            },
            Claim {
                place: "convergence theorem",
                says: "converges at full fine-tuning's order",
                figure: "convergence",
                outcome: |table| {
                    let d = crate::convergence::gap(table)?;
                    let word = if d.1 > 0.0 { Word::Opposite } else { Word::Same };
                    Ok((word, format!("slope {:+.2} ({:+.2} to {:+.2})", d.0, d.1, d.2)))
                },
                reason: "difference from full's slope, not separated; the bound itself holds for \
                         any subset of numbers",
            },
        ],
    ),
    (
        "[S2FT]",
        &[
            Claim {
                place: "figure 2: memorization",
                says: "full fine-tuning has the lowest training loss",
                figure: "generalization",
                outcome: |table| {
                    let d = generalization::compared(
                        table,
                        ("full", "s2ft"),
                        "10%",
                        "training loss (nats)",
                        0.95,
                    )?;
                    Ok((effect(d, -0.01), format!("{:+.3} nats ({:+.3} to {:+.3})", d.0, d.1, d.2)))
                },
                reason: "against S2FT at 10%, each at its best rate",
            },
            Claim {
                place: "figure 2: near",
                says: "SpFT generalizes better than LoRA, near",
                figure: "generalization",
                outcome: |table| generalizes(table, "spft", "lora", "shifted tokens"),
                reason: "lists longer than those trained on, 1% of the parameters",
            },
            Claim {
                place: "figure 2: far",
                says: "SpFT generalizes better than LoRA, far",
                figure: "generalization",
                outcome: |table| generalizes(table, "spft", "lora", "lists tokens"),
                reason: "other questions about lists, 1%",
            },
            Claim {
                place: "figure 2: far, full",
                says: "SpFT generalizes better than full, far",
                figure: "generalization",
                outcome: |table| generalizes(table, "spft", "full", "lists tokens"),
                reason: "as above",
            },
            Claim {
                place: "abstract: other domains",
                says: "+11.5% over full fine-tuning",
                figure: "generalization",
                outcome: |table| {
                    let d = generalization::compared(
                        table,
                        ("s2ft", "full"),
                        "1%",
                        "lists tokens",
                        0.95,
                    )?;
                    Ok((effect(d, 0.115), points(d)))
                },
                reason: "far, S2FT at 1%",
            },
            Claim {
                place: "abstract: accuracy",
                says: "+4.6% (commonsense), +1.3% (arithmetic) over LoRA",
                figure: "peft_accuracy",
                outcome: |table| {
                    let d = accuracy(table, "s2ft")?;
                    Ok((effect(d, 0.046), points(d)))
                },
                reason: "in-domain, one artificial task, each at its best rate",
            },
            Claim {
                place: "figure 4",
                says: "Query, Key << Value, Up, Gate < Output, Down",
                figure: "s2ft_selection",
                outcome: |table| {
                    let [low, middle, high] = s2ft_selection::PAPERS_ORDER;
                    let gap = |a, b| {
                        s2ft_selection::groups_apart(table, (a, b), "in-domain tokens", 0.95)
                    };
                    let (first, second, ends) =
                        (gap(middle, low)?, gap(high, middle)?, gap(high, low)?);
                    Ok((order(first, second, ends), format!("last less first {}", points(ends))))
                },
                reason: "in-domain, 2% of the model each; whether the means alone stand in that \
                         order is not asked",
            },
            Claim {
                place: "table 4: small activations",
                says: "+0.7 and +0.4 points over random channels",
                figure: "s2ft_selection",
                outcome: |table| selected(table, "activation, smallest", 0.4),
                reason: "channels of down",
            },
            Claim {
                place: "table 4: large activations",
                says: "-1.9 and -2.5 points",
                figure: "s2ft_selection",
                outcome: |table| selected(table, "activation", -1.9),
                reason: "channels of down: where the input is large, a weight moves the output \
                         most",
            },
            Claim {
                place: "table 4: large gradients",
                says: "-1.2 and -1.8 points",
                figure: "s2ft_selection",
                outcome: |table| selected(table, "gradient", -1.2),
                reason: "channels of down",
            },
            Claim {
                place: "figure 5: memory, LoRA",
                says: "about 10% less than LoRA",
                figure: "peft_cost",
                outcome: |table| {
                    let saved = against(&llama(table), "s2ft", "lora", PREDICTED)?;
                    Ok((size(saved, -0.1), percent(saved)))
                },
                reason: "LLaMA-2-7B, 8 x 512, two bytes, predicted",
            },
            Claim {
                place: "figure 5: memory, full",
                says: "1.4 to 3.0 times less than full",
                figure: "peft_cost",
                outcome: |table| {
                    let rows = llama(table);
                    let times =
                        median(&rows, "full", PREDICTED)? / median(&rows, "s2ft", PREDICTED)?;
                    Ok((
                        if times >= 1.4 { Word::Same } else { Word::Weaker },
                        format!("{times:.1} times"),
                    ))
                },
                reason: "as above",
            },
            Claim {
                place: "figure 5: latency, LoRA",
                says: "about 10% less than LoRA",
                figure: "peft_cost",
                outcome: |table| {
                    let saved = against(&micro(table), "s2ft", "lora", STEP)?;
                    Ok((size(saved, -0.1), percent(saved)))
                },
                reason: "4.5 M parameters, a CPU",
            },
            Claim {
                place: "figure 5: latency, full",
                says: "1.5 to 2.7 times less than full",
                figure: "peft_cost",
                outcome: |table| {
                    let rows = micro(table);
                    let times = median(&rows, "full", STEP)? / median(&rows, "s2ft", STEP)?;
                    let word = if times >= 1.5 {
                        Word::Same
                    } else if times > 1.0 {
                        Word::Weaker
                    } else {
                        Word::Opposite
                    };
                    Ok((word, format!("{times:.2} times")))
                },
                reason: "4.5 M parameters, a CPU, where the update costs little",
            },
            Claim {
                place: "table 5: apart",
                says: "fused slices apart lose 0.7 and 1.3 points less than LoRA",
                figure: "adapter_fusion",
                outcome: |table| fused(table, adapter_fusion::APART, 0.7),
                reason: "sum of two, to the same training loss",
            },
            Claim {
                place: "table 5: overlapping",
                says: "overlapping slices lose 1.3 and 1.8 points more than LoRA",
                figure: "adapter_fusion",
                outcome: |table| fused(table, adapter_fusion::SAME, -1.3),
                reason: "as above",
            },
            Claim {
                place: "figure 6: switch",
                says: "switching LoRA grows quadratically with the width, S2FT's does not",
                figure: "adapter_serving",
                outcome: |table| {
                    let (slice, lora) =
                        (switch_slope(table, "S2FT")?, switch_slope(table, "LoRA")?);
                    let word = if slice < lora - 0.5 { Word::Same } else { Word::Weaker };
                    Ok((word, format!("exponents {slice:.1} and {lora:.1}")))
                },
                reason: "widths 256 to 2048; our slices are a sixteenth of the channels, so they \
                         grow with the width too",
            },
            Claim {
                place: "figure 6: serving",
                says: "22% faster than LoRA",
                figure: "adapter_serving",
                outcome: |table| {
                    let rows =
                        table.filter(|r| r.text("part") == "mixed" && r.text("adapters") == "32");
                    let gain = against(&rows, "S2FT", "LoRA", "time (ms)")?;
                    Ok((size(gain, -0.22), percent(gain)))
                },
                reason: "32 adapters in one batch; as many multiply-adds as LoRA",
            },
            Claim {
                place: "theorem 4.2: slices",
                says: "a slice's risk on another task is at most (1 + ε²) times the pretrained one",
                figure: "generalization",
                outcome: |table| {
                    let s = slice_bound(table, "s2ft, the channels of the shift")?;
                    Ok((holds(s.max <= 1.0), format!("{:.2} to {:.2} of the bound", s.min, s.max)))
                },
                reason: "finite sample, noise; holds for any channels, also without the assumption",
            },
            Claim {
                place: "theorem 4.2: LoRA",
                says: "LoRA's is at least the distance of the tasks",
                figure: "generalization",
                outcome: |table| {
                    let s = slice_bound(table, "lora")?;
                    Ok((
                        holds(s.min >= 1.0),
                        format!("{:.2} to {:.2} times the distance", s.min, s.max),
                    ))
                },
                reason: "its rank reaches that of the shift",
            },
        ],
    ),
];

/// What no figure of ours tries: (paper, place, what it says, why not).
const NOT_TRIED: [(&str, &str, &str, &str); 8] = [
    (
        "[CL-LoRA]",
        "appendix G",
        "outlier-free models (softmax-one) fine-tune faster",
        "needs models pretrained with softmax-one; one head fine-tuned with it is \
         [norm_control](../figures/norm_control/findings.md)",
    ),
    (
        "[CL-LoRA]",
        "theorem 4.1",
        "no sub-quadratic algorithm above the threshold",
        "a statement about all algorithms",
    ),
    (
        "[PaCA]",
        "MMLU, MT-Bench, images",
        "accuracy on LLaMA, ViT, EfficientNet",
        "models and data of that size",
    ),
    (
        "[PaCA]",
        "selection rules",
        "random, weight norm, gradient norm are alike",
        "the code has them; no figure yet",
    ),
    ("[PaCA]", "A100, Gaudi2", "time from kernel launches", "no accelerator in these figures"),
    (
        "[S2FT]",
        "tables 1 to 3",
        "commonsense, arithmetic, instruction tuning",
        "models and data of that size",
    ),
    (
        "[S2FT]",
        "figure 5: LISA, LoReFT, GaLore",
        "time and memory beside S2FT's",
        "not implemented",
    ),
    (
        "[S2FT]",
        "figure 6",
        "base width 32,768; 100,000 adapters",
        "memory; measured to width 2,048 and 32 adapters",
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rendered() -> Result<String> {
    let mut lines = vec![
        "| paper | place | it says | word | ours | why | figure |".to_string(),
        "|---|---|---|---|---|---|---|".to_string(),
    ];
    for (paper, claims) in PAPERS {
        for claim in claims {
            let table =
                Table::read_csv(&root().join("figures").join(claim.figure).join("table.csv"))?;
            let (word, number) = (claim.outcome)(&table)?;
            lines.push(format!(
                "| {paper} | {} | {} | **{}** | {number} | {} | [{f}](../figures/{f}/findings.md) \
                 |",
                claim.place,
                claim.says,
                word.text(),
                claim.reason,
                f = claim.figure
            ));
        }
        for (_, place, says, why) in NOT_TRIED.iter().filter(|n| n.0 == paper) {
            lines.push(format!("| {paper} | {place} | {says} | **not tried** | | {why} | |"));
        }
    }
    Ok(lines.join("\n"))
}

const BEGIN: &str = "<!-- computed -->";
const END: &str = "<!-- end -->";

#[test]
fn the_page_is_what_the_tables_say() {
    let path = root().join("paper-notes/what-reproduces.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (head, rest) = page.split_once(BEGIN).expect("the mark before the table");
    let (found, tail) = rest.split_once(END).expect("the mark after the table");
    let wanted = rendered().unwrap();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, format!("{head}{BEGIN}\n\n{wanted}\n\n{END}{tail}")).unwrap();
        return;
    }
    let found: Vec<&str> = found.trim().lines().collect();
    for (found, wanted) in found.iter().zip(wanted.lines()) {
        assert_eq!(*found, wanted, "BLESS=1 writes the page again");
    }
    assert_eq!(found.len(), wanted.lines().count());
}

#[test]
fn words_follow_from_signs_sizes_and_intervals() {
    assert_eq!(effect((-0.2, -0.3, -0.1), -0.22), Word::Same);
    assert_eq!(effect((-0.1, -0.15, -0.05), -0.22), Word::Weaker);
    assert_eq!(effect((-0.1, -0.3, 0.1), -0.22), Word::NotSeen);
    assert_eq!(effect((0.1, 0.05, 0.2), -0.22), Word::Opposite);
    assert_eq!(effect((f64::NAN, f64::NAN, f64::NAN), 1.0), Word::NotSeen);
    assert_eq!(effect((0.2, f64::NEG_INFINITY, f64::INFINITY), 0.1), Word::NotSeen);
    let (up, down, open) = ((0.1, 0.05, 0.2), (-0.1, -0.2, -0.05), (0.1, -0.1, 0.3));
    assert_eq!((order(up, up, up), order(open, up, up)), (Word::Same, Word::Weaker));
    assert_eq!((order(open, open, open), order(down, down, down)), (Word::NotSeen, Word::Opposite));
    assert_eq!(
        (size(0.4, 0.23), size(0.4, 1.08), size(-0.1, 0.2)),
        (Word::Same, Word::Weaker, Word::Opposite)
    );
}
