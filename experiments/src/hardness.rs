//! Claim (\[AS23\], \[AS24\], \[CL-LoRA\] section 5): above the norm threshold a fast accurate
//! attention, or a fast accurate LoRA gradient, would decide gap nearest neighbour in Hamming
//! distance, which no sub-quadratic algorithm does unless SETH fails.
//!
//! Measured on planted and null instances, half each, embedded at entries bounded by Gamma = c
//! sqrt(ln L), and decided from the output, from dB_Q with G = 1, and from dB_Q with the papers'
//! squared loss and Y = 0:
//!
//! - *exact*: the exact answers to L = 2^15, from the distances; the gradient error that turns a
//!   tenth of them, against the theorems' (ln L)^-4;
//! - *budget*: factorizations with k = L^0.5 or L^0.75 columns against c;
//! - *ladder*: the smallest k that decides 90% of the planted and 90% of the null instances,
//!   against L, below and above the reduction's constant sqrt(16/3) = 2.31.
//!
//! Shares are of the instances that a method answers: without a positive denominator it has no
//! answer. A method that gives every instance the same answer decides nothing, and is shown as
//! such.
//!
//! Refuted if the exact oracle erred where the promise decides, a method of linear cost were right
//! at every c, or one that does not look at every pair decided above the constant with columns that
//! grow more slowly than L^0.5.
//!
//! `cargo run --release --bin hardness [-- --profile full]`; about 20 seconds; in full 20 minutes beside other work.

mod measured;
mod results;

use crate::harness::{Experiment, Point, Profile};
use peft_limits::limits::hardness::decision::Oracle;
use peft_limits::limits::hardness::embedding::Form;

/// The experiment.
pub const EXPERIMENT: Experiment = Experiment {
    name: "hardness",
    title: "Nearest neighbours decided by attention and by a LoRA gradient",
    claim: "Above the threshold an accurate LoRA gradient decides gap nearest neighbour (AS24, \
            CL-LoRA section 5), so cheap factorizations must fail there.",
    refuted_by: "an exact oracle that errs where the promise decides, a method of linear cost that \
                 is right at every norm, or one that does not look at every pair and decides above \
                 the reduction's constant with columns that grow more slowly than L^0.5",
    doubt: "Planted random instances of fixed width are the easy kind, and failing methods only \
            show that these methods fail: no experiment can show that none succeeds.",
    grid,
    measure: measured::measure,
    parallel: true,
    plot: results::plot,
    findings: results::findings,
    checks: Some(results::checks),
};

const RATIOS: [f64; 10] = [0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5];
/// Below and above the reduction's constant.
const SIDES: [f64; 2] = [2.0, 3.5];
/// Budgets of columns as powers of L.
const EXPONENTS: [f64; 2] = [0.5, 0.75];
/// Budgets of columns as shares of L: the ladder, after k = 1.
const SHARES: [f64; 6] = [0.0625, 0.125, 0.25, 0.375, 0.5, 0.75];
const EXACT: &str = "exact";
const SVD: &str = "truncated-svd";
/// Methods that look at no more pairs than their columns make them; the exact gradient, the support
/// basis, `sparse` and the SVD look at all.
const CHEAP: [&str; 4] = ["fitted", "positive-features", "tensor-sketch", "nystrom"];
const BUDGET: [&str; 6] =
    [EXACT, "fitted", "positive-features", "tensor-sketch", "nystrom", "support-basis"];
const LADDER: [&str; 6] =
    ["fitted", "positive-features", "tensor-sketch", "nystrom", "sparse", SVD];
const ORACLES: [(&str, Oracle); 3] = [
    ("output", Oracle::Output),
    ("LoRA gradient", Oracle::LoraGradient(Form::Given)),
    ("LoRA gradient, Y = 0", Oracle::LoraGradient(Form::Squared)),
];
/// Instances with the decomposition of P are at most this large.
const DECOMPOSED: usize = 256;

fn grid(profile: Profile, seed: u64) -> Vec<Point> {
    let mut points = Vec::new();
    let mut push = |kind: &str, size: u64, c: Option<f64>, instances: u64, block: u64| {
        for first in (seed..seed + instances).step_by(block as usize) {
            let at = c.map_or(String::new(), |c| format!(", c = {c}"));
            let point = Point::new(format!("{kind}, n = {size}{at}, instances from {first}"));
            let point = point
                .with("kind", kind)
                .with("size", size)
                .with("seed", first)
                .with("instances", block);
            points.push(if let Some(c) = c { point.with("c", c) } else { point });
        }
    };
    // The longest first: one takes as long as many others. An exact point has every c, which share
    // its distances.
    for power in profile.pick(7..11, 7..15).rev() {
        push(EXACT, 1 << power, None, profile.pick(80, 400), profile.pick(80, 100));
    }
    for power in profile.pick(6..9, 6..10).rev() {
        SIDES
            .into_iter()
            .for_each(|c| push("ladder", 1 << power, Some(c), profile.pick(20, 200), 20));
    }
    for c in RATIOS {
        push("budget", profile.pick(128, 512), Some(c), profile.pick(40, 400), 20);
    }
    points
}
