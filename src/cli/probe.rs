//! `peft-limits probe`.

use super::{INPUT_HELP, features_help};
use crate::attention::exact::{dense, streaming};
use crate::attention::factorization::{SoftmaxFactorization, build};
use crate::attention::{AttentionProblem, Mask, SoftmaxKind, file};
use crate::cost::Cost;
use crate::error::Result;
use crate::limits::rank::frobenius_ranks;
use crate::limits::threshold::Threshold;
use crate::limits::trial::{Trial, natural_request, reference, trial};
use crate::report::{Cell, Row, Table, short_float};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Args)]
#[command(after_long_help = format!("{INPUT_HELP}\n\n{}\n\nExamples:\n  \
    peft-limits probe tests/data/heads/minilm_l3_h10.safetensors\n  \
    peft-limits probe head.safetensors --features taylor:degree=2 --features truncated-svd:rank=32\n  \
    peft-limits probe head.safetensors --json > head.json", features_help()))]
pub(super) struct ProbeArgs {
    /// The head, a safetensors file
    input: PathBuf,
    /// Factorization to try; may be given several times (default: a survey of all methods)
    #[arg(long, value_name = "SPEC")]
    features: Vec<String>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// Tried when no `--features` is given.
const SURVEY: [&str; 12] = [
    "taylor:degree=1",
    "taylor:degree=2",
    "taylor:degree=3",
    "chebyshev:degree=1,check=scan,center=both",
    "chebyshev:degree=2,check=scan,center=both",
    "chebyshev:degree=3,check=scan,center=both",
    "fitted:degree=1",
    "fitted:degree=2",
    "fitted:degree=3",
    "truncated-svd:rank=8",
    "truncated-svd:rank=32",
    "truncated-svd:rank=128",
];

/// The survey leaves out what would need more feature columns than this many times the tokens.
const SURVEY_RANK_PER_TOKEN: usize = 16;

/// eps of the reported eps-ranks.
const RANK_EPS: [f64; 3] = [0.1, 0.01, 0.001];
/// Longest sequence whose matrices are decomposed.
const RANK_TOKENS: usize = 1024;

pub(super) fn run(args: &ProbeArgs) -> Result<ExitCode> {
    let survey = args.features.is_empty();
    let specs: Vec<String> = if survey { SURVEY.map(String::from).to_vec() } else { args.features.clone() };
    let methods: Vec<Box<dyn SoftmaxFactorization<f64>>> = specs.iter().map(|s| build(s)).collect::<Result<_>>()?;
    let problem: AttentionProblem<f64> = file::read_problem(&args.input)?;
    let projected = problem.project(&mut Cost::default());
    let threshold = Threshold::measure(&problem, &projected, &mut Cost::default());
    let request = natural_request(&problem);
    let exact = reference(&problem, request)?;
    let start = Instant::now();
    let streamed = streaming::gradients(&problem, request)?;
    let streaming_seconds = start.elapsed().as_secs_f64();
    let ranks = if threshold.tokens <= RANK_TOKENS {
        let matrices = dense::matrices(&problem, &projected.qkv);
        Some((frobenius_ranks(matrices.P.view(), &RANK_EPS)?, frobenius_ranks(matrices.dS.view(), &RANK_EPS)?))
    } else {
        None
    };
    let mut outcomes: Vec<(String, Result<Trial>)> = Vec::new();
    for (spec, method) in specs.iter().zip(&methods) {
        if survey && survey_rank(spec, &threshold) > (SURVEY_RANK_PER_TOKEN * threshold.tokens) as u128 {
            continue;
        }
        outcomes.push((spec.clone(), trial(&problem, &exact, method.as_ref(), request)));
    }
    let streaming_flops = streamed.cost.flops() as f64;
    if args.json {
        let value =
            to_json(args, &problem, &threshold, ranks.as_ref(), (streaming_flops, streaming_seconds), &outcomes);
        println!("{value:#}");
        return Ok(ExitCode::SUCCESS);
    }
    print_head(args, &problem, &threshold);
    if let Some((p, ds)) = &ranks {
        println!("\neps-rank (relative Frobenius)   {}", RANK_EPS.map(|e| format!("{e:>8}")).join(""));
        for (name, ranks) in [("P ", p), ("dS", ds)] {
            println!(
                "  {name}                            {}",
                ranks.iter().map(|k| format!("{k:>8}")).collect::<String>()
            );
        }
    }
    println!();
    let mut table = Table::default();
    table.push(&row(
        "streaming (exact)",
        None,
        Some(streamed.relative_gap(&exact)),
        None,
        streaming_flops,
        1.0,
        streaming_seconds,
    ));
    for (spec, outcome) in &outcomes {
        match outcome {
            Ok(t) => {
                let flops = t.cost.flops() as f64;
                table.push(&row(
                    &t.certificate.spec,
                    Some(t.certificate.rank),
                    Some(t.gradient_error),
                    t.certificate.exp_error_bound,
                    flops,
                    flops / streaming_flops,
                    t.seconds,
                ));
            }
            Err(_) => table.push(&Row::new().with("method", spec.as_str())),
        }
    }
    print!("{}", table.to_text(usize::MAX));
    for (_, outcome) in &outcomes {
        if let Err(error) = outcome {
            println!("note: {error}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Feature columns of a survey spec, whose degree is its first digit.
fn survey_rank(spec: &str, threshold: &Threshold) -> u128 {
    let number = spec.split(['=', ',']).nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    if spec.starts_with("truncated-svd") {
        // Above the sequence there is nothing to cut; above 4096 tokens nothing is decomposed.
        return if number <= threshold.tokens && threshold.tokens <= RANK_TOKENS { number as u128 } else { u128::MAX };
    }
    crate::attention::factorization::monomials::count(threshold.head_dim, number)
}

fn row(
    method: &str,
    rank: Option<usize>,
    error: Option<f64>,
    bound: Option<f64>,
    flops: f64,
    relative: f64,
    seconds: f64,
) -> Row {
    let or_missing = |x: Option<f64>| x.map_or(Cell::Missing, Cell::Float);
    Row::new()
        .with("method", method)
        .with("k", rank.map_or(Cell::Missing, |k| Cell::Integer(k as i128)))
        .with("gradient error (relative)", or_missing(error))
        .with("exp error bound", or_missing(bound))
        .with("flops", flops)
        .with("flops / exact", relative)
        .with("time (s)", seconds)
}

fn print_head(args: &ProbeArgs, problem: &AttentionProblem<f64>, t: &Threshold) {
    let mask = if problem.mask() == Mask::Causal { "causal" } else { "full" };
    let softmax = if problem.softmax() == SoftmaxKind::One { "one" } else { "standard" };
    let f = short_float;
    println!("{}", args.input.display());
    println!(
        "  L_q = {}, L_k = {}, d_h = {}, beta = {}, mask {mask}, softmax {softmax}",
        problem.num_queries(),
        problem.num_keys(),
        t.head_dim,
        f(t.beta)
    );
    println!("  max|Q| = {}   max|K| = {}   max|V| = {}", f(t.max_abs.query), f(t.max_abs.key), f(t.max_abs.value));
    println!("  Gamma = sqrt(beta d_h max|Q| max|K|) = {}", f(t.gamma));
    println!("  threshold sqrt(ln L) = {}   c = Gamma / sqrt(ln L) = {}", f(t.sqrt_log_tokens), f(t.ratio));
    println!(
        "  largest |logit| = {} <= norm bound {} <= Gamma^2 = {}   ({:.1}% of Gamma^2)",
        f(t.largest_logit),
        f(t.norm_bound),
        f(t.gamma * t.gamma),
        100.0 * t.concentration()
    );
}

fn to_json(
    args: &ProbeArgs,
    problem: &AttentionProblem<f64>,
    t: &Threshold,
    ranks: Option<&(Vec<usize>, Vec<usize>)>,
    streaming: (f64, f64),
    outcomes: &[(String, Result<Trial>)],
) -> Value {
    let methods: Vec<Value> = outcomes
        .iter()
        .map(|(spec, outcome)| match outcome {
            Ok(t) => json!({
                "features": t.certificate.spec,
                "rank": t.certificate.rank,
                "degree": t.certificate.degree,
                "interval": t.certificate.interval.map(|(b, _)| b),
                "interval_evidence": t.certificate.interval.map(|(_, e)| e.to_string()),
                "exp_error_bound": t.certificate.exp_error_bound,
                "gradient_error": t.gradient_error,
                "output_error": t.output_error,
                "flops": t.cost.flops(),
                "seconds": t.seconds,
            }),
            Err(e) => json!({ "features": spec, "error": e.to_string() }),
        })
        .collect();
    json!({
        "input": args.input.display().to_string(),
        "num_queries": problem.num_queries(),
        "num_keys": problem.num_keys(),
        "head_dim": t.head_dim,
        "beta": t.beta,
        "causal": problem.mask() == Mask::Causal,
        "softmax_one": problem.softmax() == SoftmaxKind::One,
        "max_abs": { "query": t.max_abs.query, "key": t.max_abs.key, "value": t.max_abs.value },
        "gamma": t.gamma,
        "sqrt_log_tokens": t.sqrt_log_tokens,
        "ratio": t.ratio.is_finite().then_some(t.ratio),
        "largest_logit": t.largest_logit,
        "norm_bound": t.norm_bound,
        "eps_rank": ranks.map(|(p, ds)| json!({ "eps": RANK_EPS, "probabilities": p, "score_gradient": ds })),
        "streaming": { "flops": streaming.0, "seconds": streaming.1 },
        "methods": methods,
    })
}
