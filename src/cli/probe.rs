//! `peft-limits probe`.

use super::devices::{DEVICE_HELP, PRODUCTS_HELP};
use super::gradient::products_need_a_gpu;
use super::prefixes;
use super::{INPUT_HELP, features_help};
use crate::attention::exact::streaming;
use crate::attention::factorization::{SoftmaxFactorization, build};
use crate::attention::{AttentionProblem, Gradients, Mask, Request, SoftmaxKind, file};
use crate::cost::Cost;
use crate::device::{DeviceChoice, ProductPrecision};
use crate::error::Result;
use crate::limits::head_phase::{Phase, Sides, effective_keys, sides};
use crate::limits::threshold::Threshold;
#[cfg(feature = "gpu")]
use crate::limits::trial::trial_of;
use crate::limits::trial::{Trial, natural_request, reference, trial};
use crate::linalg::Real;
use crate::report::{Cell, Row, Table, short_float};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Args)]
#[command(after_long_help = format!("{INPUT_HELP}\n\n{}\n\nExamples:\n  \
    peft-limits probe tests/data/heads/minilm_l3_h10.safetensors\n  \
    peft-limits probe head.safetensors --features taylor:degree=2 --features \
    truncated-svd:rank=32\n  peft-limits probe head.safetensors --plot cost.png\n  \
    peft-limits probe head.safetensors --json > head.json", features_help()))]
pub(super) struct ProbeArgs {
    /// The head, a safetensors file
    pub(super) input: PathBuf,
    /// Factorization to try; may be given several times (default: a survey of all methods)
    #[arg(long, value_name = "SPEC")]
    features: Vec<String>,
    #[arg(long, default_value_t, help = DEVICE_HELP)]
    device: DeviceChoice,
    #[arg(long, value_name = "PRECISION", default_value_t, help = PRODUCTS_HELP)]
    products: ProductPrecision,
    /// Also measure how the cost grows over the head's first L/16, L/8, ..., L tokens, and draw it
    /// to FILE (.svg or .png)
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// Tried when no `--features` is given.
const SURVEY: [&str; 20] = [
    "taylor:degree=1",
    "taylor:degree=2",
    "taylor:degree=3",
    "chebyshev:degree=1,check=scan,center=both",
    "chebyshev:degree=2,check=scan,center=both",
    "chebyshev:degree=3,check=scan,center=both",
    "fitted:degree=1",
    "fitted:degree=2",
    "fitted:degree=3",
    "positive-features:rank=64",
    "positive-features:rank=256",
    "tensor-sketch:degree=3,rank=256",
    "nystrom:rank=32",
    "nystrom:rank=128",
    "support-basis:degree=1,threshold=1",
    "auto:eps=0.1",
    "auto:eps=0.01",
    "truncated-svd:rank=8",
    "truncated-svd:rank=32",
    "truncated-svd:rank=128",
];

/// The survey leaves out what would need more feature columns than this many times the tokens.
const SURVEY_RANK_PER_TOKEN: usize = 16;

/// Gradient errors that the answer is given for.
const TARGETS: [f64; 2] = [0.1, 0.01];
/// Thresholds of `sparse` that the survey chooses from, by a tenth of a decade.
const SPARSE_STEPS: std::ops::RangeInclusive<i32> = 3..=60;

/// eps of the reported eps-ranks.
const RANK_EPS: [f64; 3] = [0.1, 0.01, 0.001];
/// Longest sequence whose matrices are decomposed.
const RANK_TOKENS: usize = 1024;

pub(super) fn run(args: &ProbeArgs) -> Result<ExitCode> {
    let survey = args.features.is_empty();
    let specs: Vec<String> =
        if survey { SURVEY.map(String::from).to_vec() } else { args.features.clone() };
    let methods: Vec<Box<dyn SoftmaxFactorization<f64>>> =
        specs.iter().map(|s| build(s)).collect::<Result<_>>()?;
    products_need_a_gpu(args.products, args.device)?;
    if let Some(path) = &args.plot {
        prefixes::check(path, &args.input)?;
    }
    let on = Place::open(args.device, args.products)?;
    let problem: AttentionProblem<f64> = file::read_problem(&args.input)?;
    let projected = problem.project(&mut Cost::default());
    let growth = args.plot.as_ref().map(|_| prefixes::Growth::measure(&problem)).transpose()?;
    let threshold = Threshold::measure(&problem, &projected, &mut Cost::default());
    let request = natural_request(&problem);
    let exact = reference(&problem, request)?;
    let streamed = on.streaming(&problem, &exact, request)?;
    let keys = effective_keys(&problem, &projected);
    let sides = if threshold.tokens <= RANK_TOKENS {
        sides(&problem, &projected, request, &RANK_EPS)?
    } else {
        vec![]
    };
    let mut outcomes: Vec<(String, Result<Trial>)> = Vec::new();
    for (spec, method) in specs.iter().zip(&methods) {
        if survey
            && survey_rank(spec, &threshold) > (SURVEY_RANK_PER_TOKEN * threshold.tokens) as u128
        {
            continue;
        }
        outcomes.push((spec.clone(), on.trial(&problem, &exact, method.as_ref(), request)));
    }
    if survey && on.name().is_none() {
        outcomes.extend(sparse_trials(&problem, &exact, request)?);
    }
    let answers = TARGETS.map(|target| Answer::new(target, &outcomes, &streamed));
    let streaming_flops = streamed.flops;
    if args.json {
        let mut value = to_json(args, &problem, &threshold, &streamed, &on, &outcomes);
        value["phase"] = phase_of(&sides).map_or(Value::Null, Value::from);
        value["effective_keys"] = json!(keys);
        value["eps_rank"] = ranks_to_json(&sides);
        value["answers"] = answers.iter().map(Answer::to_json).collect();
        if let (Some(growth), Some(path)) = (&growth, &args.plot) {
            growth.draw(&args.input, path)?;
            value["prefixes"] = growth.to_json();
        }
        println!("{value:#}");
        return Ok(ExitCode::SUCCESS);
    }
    if let (Some(growth), Some(path)) = (&growth, &args.plot) {
        growth.draw(&args.input, path)?;
    }
    println!("{}", args.input.display());
    println!("{}", phase_line(&sides, keys, threshold.tokens));
    answers.iter().for_each(|answer| println!("{}", answer.line()));
    println!();
    print_head(&problem, &threshold);
    if let Some(name) = on.name() {
        println!("  streaming and chained gradients in f32 on {name}, against the processor's f64");
    }
    if !sides.is_empty() {
        println!(
            "\nerror (relative Frobenius)      {}",
            RANK_EPS.map(|e| format!("{e:>8}")).join("")
        );
        type Column = fn(&Sides) -> usize;
        let rows: [(&str, Column); 3] = [
            ("eps-rank of P", |s| s.rank_probabilities),
            ("eps-rank of dS", |s| s.rank_scores),
            ("entries of P for dS (oracle)", |s| s.entries),
        ];
        for (name, column) in rows {
            println!(
                "  {name:<30}{}",
                sides.iter().map(|s| format!("{:>8}", column(s))).collect::<String>()
            );
        }
    }
    println!();
    let mut table = Table::default();
    table.push(&row(
        "streaming (exact)",
        None,
        Some(streamed.gradient_error),
        None,
        streaming_flops,
        1.0,
        streamed.seconds,
    ));
    for (_, outcome) in &outcomes {
        if let Ok(t) = outcome {
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
    }
    print!("{}", table.to_text(usize::MAX));
    if let (Some(growth), Some(path)) = (&growth, &args.plot) {
        println!();
        print!("{}", growth.table().to_text(usize::MAX));
        println!("drawn to {}", path.display());
    }
    let mut failed = Vec::new();
    for (spec, outcome) in &outcomes {
        match outcome {
            Err(error) => failed.push((spec.as_str(), error.to_string())),
            Ok(t) => {
                if let Some(s) = &t.certificate.selection {
                    println!(
                        "note: {spec} chose {}: error of P predicted {}, measured {}",
                        s.chosen.spec,
                        short_float(s.chosen.predicted_error),
                        short_float(s.measured_error)
                    );
                }
            }
        }
    }
    match &failed[..] {
        [] => {}
        [(_, error)] => println!("note: {error}"),
        [(_, first), ..] => {
            let names: Vec<&str> = failed.iter().map(|f| f.0).collect();
            println!(
                "note: no gradient from {} methods ({}); the first: {first}",
                failed.len(),
                names.join(", ")
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// For each target the largest threshold of `sparse` that reaches it, with both searches that can
/// be paid for.
fn sparse_trials(
    problem: &AttentionProblem<f64>,
    exact: &Gradients<f64>,
    request: Request,
) -> Result<Vec<(String, Result<Trial>)>> {
    let run = |step: i32, search: &str| -> Result<(String, Result<Trial>)> {
        let spec =
            format!("sparse:threshold={}{search}", short_float(10f64.powf(-0.1 * f64::from(step))));
        let outcome = trial(problem, exact, build(&spec)?.as_ref(), request);
        Ok((spec, outcome))
    };
    let mut found = Vec::new();
    for target in TARGETS {
        let (mut low, mut high) = (*SPARSE_STEPS.start(), *SPARSE_STEPS.end());
        while low < high {
            let middle = (low + high) / 2;
            let reached = matches!(run(middle, "")?.1, Ok(t) if t.gradient_error <= target);
            if reached { high = middle } else { low = middle + 1 }
        }
        found.push(run(high, "")?);
        found.push(run(high, ",search=tree")?);
    }
    Ok(found)
}

/// The cheapest method that reaches a gradient error.
struct Answer {
    target: f64,
    /// Spec, operations and seconds relative to the exact gradient's.
    cheapest: Option<(String, f64, f64)>,
}

impl Answer {
    /// By counted operations, among what was tried; oracles do not take part.
    fn new(target: f64, outcomes: &[(String, Result<Trial>)], streamed: &Streamed) -> Self {
        let reached = |(_, outcome): &(String, Result<Trial>)| {
            let t = outcome.as_ref().ok().filter(|t| t.gradient_error <= target)?;
            let spec = &t.certificate.spec;
            let oracle = spec.starts_with("truncated-svd") || spec.contains("search=oracle");
            (!oracle).then(|| {
                (spec.clone(), t.cost.flops() as f64 / streamed.flops, t.seconds / streamed.seconds)
            })
        };
        let cheapest = outcomes.iter().filter_map(reached).min_by(|a, b| a.1.total_cmp(&b.1));
        Self { target, cheapest }
    }

    fn line(&self) -> String {
        let percent = 100.0 * self.target;
        match &self.cheapest {
            None => format!(
                "  {percent}% gradient error: no method that was tried; take the exact gradient"
            ),
            Some((spec, flops, seconds)) => {
                let advice =
                    if flops.max(*seconds) < 1.0 { "" } else { "; take the exact gradient" };
                format!(
                    "  {percent}% gradient error: {spec}, {flops:.2} times the operations of the \
                     exact gradient and ~{seconds:.2} times its time{advice}"
                )
            }
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "gradient_error": self.target,
            "features": self.cheapest.as_ref().map(|c| &c.0),
            "flops_relative": self.cheapest.as_ref().map(|c| c.1),
            "seconds_relative": self.cheapest.as_ref().map(|c| c.2),
        })
    }
}

/// The phase at the errors of the answer: one word where they agree.
fn phase_of(sides: &[Sides]) -> Option<String> {
    let phases: Vec<(f64, Phase)> =
        sides.iter().filter(|s| TARGETS.contains(&s.eps)).map(|s| (s.eps, s.phase())).collect();
    let (first, rest) = phases.split_first()?;
    if rest.iter().all(|p| p.1 == first.1) {
        return Some(first.1.to_string());
    }
    Some(
        phases
            .iter()
            .map(|(eps, phase)| format!("{phase} at {}%", 100.0 * eps))
            .collect::<Vec<_>>()
            .join(", "),
    )
}

fn phase_line(sides: &[Sides], keys: f64, tokens: usize) -> String {
    match (phase_of(sides), sides.iter().find(|s| s.eps <= TARGETS[1])) {
        (Some(phase), Some(at)) => format!(
            "  phase: {phase}; {keys:.0} effective keys of {tokens}; at {}% the best rank is {}, \
             the fewest entries {:.0} a query",
            100.0 * at.eps,
            at.rank_probabilities,
            at.entries as f64 / tokens as f64
        ),
        _ => format!(
            "  {keys:.0} effective keys of {tokens}; ranks, and with them the phase, are measured \
             up to {RANK_TOKENS} tokens"
        ),
    }
}

fn ranks_to_json(sides: &[Sides]) -> Value {
    if sides.is_empty() {
        return Value::Null;
    }
    let column = |of: fn(&Sides) -> Value| sides.iter().map(of).collect::<Vec<_>>();
    json!({
        "eps": RANK_EPS,
        "probabilities": column(|s| json!(s.rank_probabilities)),
        "score_gradient": column(|s| json!(s.rank_scores)),
        "entries": column(|s| json!(s.entries)),
        "low_rank_cost": column(|s| json!(s.low_rank_cost)),
        "sparse_cost": column(|s| json!(s.sparse_cost)),
    })
}

/// Where the streaming and the chained gradients are computed.
enum Place {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu(crate::gpu::Device, crate::gpu::attention::streaming::Options),
}

/// The exact streaming gradient of the head.
struct Streamed {
    flops: f64,
    seconds: f64,
    gradient_error: f64,
}

impl Streamed {
    fn timed<T: Real>(
        exact: &Gradients<f64>,
        compute: impl FnOnce() -> Result<Gradients<T>>,
    ) -> Result<Self> {
        let start = Instant::now();
        let gradients = compute()?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(Self {
            flops: gradients.cost.flops() as f64,
            seconds,
            gradient_error: gradients.relative_gap(exact),
        })
    }
}

impl Place {
    #[cfg_attr(not(feature = "gpu"), expect(unused_variables, reason = "a GPU's option"))]
    fn open(choice: DeviceChoice, products: ProductPrecision) -> Result<Self> {
        if choice == DeviceChoice::Cpu {
            return Ok(Place::Cpu);
        }
        #[cfg(feature = "gpu")]
        return Ok(Place::Gpu(
            crate::gpu::Device::open(choice)?,
            crate::gpu::attention::streaming::Options { precision: products, ..Default::default() },
        ));
        #[cfg(not(feature = "gpu"))]
        Err(choice.not_built())
    }

    /// The device, if it is not the processor.
    fn name(&self) -> Option<String> {
        match self {
            Place::Cpu => None,
            #[cfg(feature = "gpu")]
            Place::Gpu(device, options) => {
                Some(format!("{}, {} products", device.info(), options.precision))
            }
        }
    }

    fn streaming(
        &self,
        problem: &AttentionProblem<f64>,
        exact: &Gradients<f64>,
        request: Request,
    ) -> Result<Streamed> {
        match self {
            Place::Cpu => Streamed::timed(exact, || streaming::gradients(problem, request)),
            #[cfg(feature = "gpu")]
            Place::Gpu(device, options) => {
                let compute = || {
                    crate::gpu::attention::streaming::gradients(device, problem, request, options)
                };
                // The first run compiles the kernels.
                compute()?;
                Streamed::timed(exact, compute)
            }
        }
    }

    fn trial(
        &self,
        problem: &AttentionProblem<f64>,
        exact: &Gradients<f64>,
        method: &dyn SoftmaxFactorization<f64>,
        request: Request,
    ) -> Result<Trial> {
        match self {
            Place::Cpu => trial(problem, exact, method, request),
            #[cfg(feature = "gpu")]
            Place::Gpu(device, options) => {
                let compute = || {
                    crate::gpu::attention::chained::gradients(
                        device, problem, method, request, options,
                    )
                };
                compute()?;
                trial_of(exact, compute)
            }
        }
    }
}

/// Feature columns of a survey spec.
fn survey_rank(spec: &str, threshold: &Threshold) -> u128 {
    let key = |name: &str| -> Option<usize> {
        spec.split([':', ','])
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
    };
    if let Some(rank) = key("rank") {
        // Above the sequence there is nothing to choose from; above RANK_TOKENS nothing is
        // decomposed.
        let decomposed = spec.starts_with("truncated-svd") && threshold.tokens > RANK_TOKENS;
        return if rank <= threshold.tokens && !decomposed { rank as u128 } else { u128::MAX };
    }
    key("degree").map_or(1, |degree| {
        crate::attention::factorization::monomials::count(threshold.head_dim, degree)
    })
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

fn print_head(problem: &AttentionProblem<f64>, t: &Threshold) {
    let mask = if problem.mask() == Mask::Causal { "causal" } else { "full" };
    let softmax = if problem.softmax() == SoftmaxKind::One { "one" } else { "standard" };
    let f = short_float;
    println!(
        "  L_q = {}, L_k = {}, d_h = {}, beta = {}, mask {mask}, softmax {softmax}",
        problem.num_queries(),
        problem.num_keys(),
        t.head_dim,
        f(t.beta)
    );
    println!(
        "  max|Q| = {}   max|K| = {}   max|V| = {}",
        f(t.max_abs.query),
        f(t.max_abs.key),
        f(t.max_abs.value)
    );
    println!("  Gamma = sqrt(beta d_h max|Q| max|K|) = {}", f(t.gamma));
    println!(
        "  threshold sqrt(ln L) = {}   c = Gamma / sqrt(ln L) = {}",
        f(t.sqrt_log_tokens),
        f(t.ratio)
    );
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
    streaming: &Streamed,
    on: &Place,
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
                "corrected_pairs": t.certificate.corrected_pairs,
                "selection": t.certificate.selection.as_ref().map(|s| json!({
                    "chosen": s.chosen.spec,
                    "target_error": s.eps,
                    "predicted_error": s.chosen.predicted_error,
                    "measured_error": s.measured_error,
                    "predicted_multiply_adds": s.chosen.predicted_multiply_adds,
                    "candidates": s.candidates.iter().map(|c| json!({
                        "features": c.spec, "rank": c.rank, "predicted_error": c.predicted_error,
                        "predicted_multiply_adds": c.predicted_multiply_adds,
                    })).collect::<Vec<_>>(),
                })),
                "gradient_error": t.gradient_error,
                "output_error": t.output_error,
                "flops": t.cost.flops(),
                "seconds": t.seconds,
            }),
            Err(e) => json!({ "features": spec, "error": e.to_string() }),
        })
        .collect();
    json!({
        "device": on.name().unwrap_or_else(|| "cpu".into()),
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
        "streaming": {
            "flops": streaming.flops, "seconds": streaming.seconds, "gradient_error": streaming.gradient_error,
        },
        "methods": methods,
    })
}
