//! One attention head: a kernel's output and gradients against the dense reference.

use super::diagnosis::Diagnosis;
use super::dump::{Observed, observed};
use super::ladder::{Rung, RungName};
use super::measure::{dot, floor, measure};
use super::precision::Precision;
use super::report::Report;
use crate::attention::contraction::{half_square, upstream_gradient};
use crate::attention::exact::dense;
use crate::attention::problem::{
    Adapter, AttentionProblem, Hidden, Mask, Objective, Qkv, SoftmaxKind, Source,
};
use crate::attention::{Request, file};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::norms::frobenius;
use crate::tensor_file::TensorFile;
use ndarray::{Array2, Axis};
use std::collections::BTreeMap;
use std::path::Path;

/// Longest head: the reference forms L x L matrices.
pub const LONGEST: usize = 8192;

/// O, the loss and every gradient, by the names of `attention::file`.
type Results = BTreeMap<String, Array2<f64>>;

/// Validates a kernel: `input` is a head, `output` holds what the kernel computed for it (O, loss,
/// dWQ, dAQ, ... or dQ, dK, dV; any subset with at least one gradient). `dtype` is the kernel's
/// format; that of its gradients when absent.
///
/// # Errors
/// Those of the two files; [`Error::TooLarge`] beyond [`LONGEST`] tokens; [`Error::MissingTensor`]
/// if the output holds no gradient.
pub fn validate_head(input: &Path, output: &Path, dtype: Option<Precision>) -> Result<Report> {
    let problem = file::read_problem::<f64>(input)?;
    let longest = problem.num_queries().max(problem.num_keys());
    if longest > LONGEST {
        let what = format!("{}: the dense reference of a head", input.display());
        return Err(Error::TooLarge {
            what,
            needed: longest as u128,
            limit: LONGEST as u128,
            unit: "tokens",
        });
    }
    let exact = results(&problem)?;
    let file = TensorFile::open(output)?;
    let mut kernel: BTreeMap<String, Observed> = BTreeMap::new();
    for name in file.names().filter(|name| exact.contains_key(*name)) {
        kernel.insert(name.to_string(), observed(&file, name, 1.0)?);
    }
    let gradients = || exact.keys().filter(|name| name.starts_with('d'));
    if !gradients().any(|name| kernel.contains_key(name)) {
        let wanted = gradients().cloned().collect::<Vec<_>>().join(", ");
        return Err(file.missing("d*", format!("at least one gradient among {wanted}")));
    }
    let stored = kernel.iter().filter(|(n, _)| n.starts_with('d')).map(|(_, o)| o.precision);
    let precision = dtype.or_else(|| stored.reduce(Precision::coarser)).unwrap_or(Precision::F32);
    let rounded = rounded_results(&problem, precision)?;

    let of = |name: RungName, keep: &dyn Fn(&str) -> bool| -> Rung {
        let tensors: Vec<_> = kernel
            .iter()
            .filter(|(n, _)| keep(n))
            .map(|(n, got)| {
                measure(n, &got.values, &exact[n], &rounded[n], unit(n, precision), scale(&exact))
            })
            .collect();
        if tensors.is_empty() {
            Rung::skipped(name, "not in the file")
        } else {
            Rung::of(name, tensors)
        }
    };
    let rungs = vec![
        of(RungName::Loss, &|n| n == "loss"),
        of(RungName::Output, &|n| n == "O"),
        of(RungName::Gradients, &|n| n.starts_with('d')),
    ];
    let passed = !rungs.iter().any(Rung::failed);
    let (diagnoses, steps) = if passed {
        (Vec::new(), 2)
    } else {
        explain(&problem, &kernel, &exact, &rounded, precision)?
    };
    Ok(Report {
        name: input.display().to_string(),
        passed,
        precision: (precision.name().into(), precision.name().into()),
        reference_loss: exact.get("loss").map_or(f64::NAN, |l| l[[0, 0]]),
        rungs,
        diagnoses,
        own_forward: None,
        recorded: Vec::new(),
        not_exercised: Vec::new(),
        amplitudes: Vec::new(),
        reference_steps: steps,
        ruled_out: 0,
        left_out: Vec::new(),
        ranks: Vec::new(),
    })
}

fn unit(name: &str, precision: Precision) -> f64 {
    // The terms of a loss cancel by chance: one unit of the format is allowed.
    if name == "loss" && precision != Precision::F64 {
        precision.epsilon().max(4e-6)
    } else {
        floor(precision)
    }
}

fn scale(exact: &Results) -> f64 {
    let norms: Vec<f64> = exact
        .iter()
        .filter(|(n, _)| n.starts_with('d'))
        .map(|(_, g)| frobenius(&g.view()))
        .collect();
    norms.iter().fold(f64::MIN_POSITIVE, |m, n| m.max(*n))
}

fn results(problem: &AttentionProblem<f64>) -> Result<Results> {
    let gradients = dense::gradients(problem, Request::All)?;
    let mut all: Results =
        gradients.named().into_iter().map(|(name, g)| (name, g.clone())).collect();
    all.insert("O".into(), gradients.output.clone());
    if let Some(loss) = gradients.loss {
        all.insert("loss".into(), ndarray::arr2(&[[loss]]));
    }
    Ok(all)
}

/// The same with inputs, Q, K, V, P, O, dS and every gradient rounded, as a fused kernel does that
/// accumulates wider.
fn rounded_results(problem: &AttentionProblem<f64>, precision: Precision) -> Result<Results> {
    let round = |mut a: Array2<f64>| {
        precision.round_array(&mut a);
        a
    };
    let source = match problem.source() {
        Source::Projected(qkv) => Source::Projected(Qkv {
            query: round(qkv.query.clone()),
            key: round(qkv.key.clone()),
            value: round(qkv.value.clone()),
        }),
        Source::Hidden(h) => {
            let mut h = h.clone();
            for x in [&mut h.inputs.query, &mut h.inputs.key, &mut h.inputs.value] {
                *x = round(x.to_owned().into_owned()).into_shared();
            }
            for p in [&mut h.projections.query, &mut h.projections.key, &mut h.projections.value] {
                p.weight = round(p.weight.clone());
                if let Some(Adapter { lora_a, lora_b }) = &mut p.adapter {
                    precision.round_array(lora_a);
                    precision.round_array(lora_b);
                }
            }
            Source::Hidden(h)
        }
    };
    let problem = rebuilt(problem, source, problem.beta(), problem.mask(), problem.softmax())?;
    let projected = problem.project(&mut Cost::default());
    let Qkv { query, key, value } = projected.qkv;
    let qkv = Qkv { query: round(query), key: round(key), value: round(value) };
    let probs = round(dense::matrices(&problem, &qkv).P);
    let output = round(probs.dot(&qkv.value));
    let upstream = round(upstream_gradient(&problem, &output));
    let delta = (&upstream * &output).sum_axis(Axis(1)).insert_axis(Axis(1));
    let dscores = round(&probs * &(upstream.dot(&qkv.value.t()) - &delta));
    let dprojected = Qkv {
        query: round(dscores.dot(&qkv.key) * problem.beta()),
        key: round(dscores.t().dot(&qkv.query) * problem.beta()),
        value: round(probs.t().dot(&upstream)),
    };
    let mut all = Results::new();
    if matches!(problem.objective(), Objective::Target(_)) {
        all.insert("loss".into(), ndarray::arr2(&[[half_square(&upstream)]]));
    }
    all.insert("O".into(), output);
    for letter in ['Q', 'K', 'V'] {
        let dp = dprojected.letter(letter);
        match problem.hidden() {
            None => drop(all.insert(format!("d{letter}"), dp.clone())),
            Some(Hidden { inputs, projections, scaling }) => {
                let weight = round(inputs.letter(letter).t().dot(dp));
                if let Some(a) = &projections.letter(letter).adapter {
                    all.insert(format!("dA{letter}"), round(a.lora_b.t().dot(&weight) * *scaling));
                    all.insert(format!("dB{letter}"), round(weight.dot(&a.lora_a.t()) * *scaling));
                }
                all.insert(format!("dW{letter}"), weight);
            }
        }
    }
    Ok(all)
}

fn rebuilt(
    problem: &AttentionProblem<f64>,
    source: Source<f64>,
    beta: f64,
    mask: Mask,
    softmax: SoftmaxKind,
) -> Result<AttentionProblem<f64>> {
    AttentionProblem::new(source, problem.objective().clone(), mask, softmax, beta)
}

/// Known faults of kernels.
fn explain(
    problem: &AttentionProblem<f64>,
    kernel: &BTreeMap<String, Observed>,
    exact: &Results,
    rounded: &Results,
    precision: Precision,
) -> Result<(Vec<Diagnosis>, usize)> {
    let share = |name: &str, got: &Array2<f64>, want: &Array2<f64>| {
        let shifted = want + &(&rounded[name] - &exact[name]);
        measure(name, got, want, &shifted, unit(name, precision), scale(exact)).share
    };
    let failing: Vec<&String> = kernel
        .iter()
        .filter(|(n, o)| share(n, &o.values, &exact[*n]) > 1.0)
        .map(|(n, _)| n)
        .collect();
    let mut found = Vec::new();
    // `predicted` holds what changes; the rest is as in the reference.
    let mut judge = |fault: &str, what: String, fix: &str, predicted: &Results| {
        let of = |name: &String| predicted.get(name).unwrap_or(&exact[name]);
        let worst = kernel.iter().map(|(n, o)| share(n, &o.values, of(n))).fold(0.0, f64::max);
        let explained =
            failing.iter().filter(|n| share(n, &kernel[**n].values, of(n)) <= 4.0).count();
        if explained > 0 {
            let complete = worst <= 4.0;
            let explains =
                if complete { vec![RungName::Output, RungName::Gradients] } else { Vec::new() };
            let tensors = (explained, failing.len());
            found.push(Diagnosis {
                fault: fault.into(),
                what,
                fix: fix.into(),
                explains,
                complete,
                tensors,
                share: worst,
            });
        }
    };
    let (beta, mask, softmax) = (problem.beta(), problem.mask(), problem.softmax());
    let width = problem.head_dim() as f64;
    let again = |beta: f64, mask: Mask, softmax: SoftmaxKind| -> Result<Results> {
        results(&rebuilt(problem, problem.source().clone(), beta, mask, softmax)?)
    };
    for other in [1.0, 1.0 / width.sqrt(), 1.0 / width] {
        if (other / beta - 1.0).abs() > 1e-9 {
            let what = format!("Q K^T is multiplied by {other} instead of beta = {beta}");
            judge("attention-scale", what, "use the file's beta", &again(other, mask, softmax)?);
        }
    }
    if problem.num_queries() == problem.num_keys() {
        let other = if mask == Mask::Causal { Mask::Full } else { Mask::Causal };
        let what = format!("the mask is {other:?} instead of {mask:?}");
        judge(
            "mask",
            what,
            "key j is visible to query i when j <= i under a causal mask",
            &again(beta, other, softmax)?,
        );
    }
    let other = if softmax == SoftmaxKind::One { SoftmaxKind::Standard } else { SoftmaxKind::One };
    let what = format!("the softmax is {other:?} instead of {softmax:?}");
    judge("softmax", what, "One adds 1 to the denominator", &again(beta, mask, other)?);
    // Backward faults, in terms of dS.
    let projected = problem.project(&mut Cost::default());
    let all = dense::matrices(problem, &projected.qkv);
    let Qkv { query, key, value } = &projected.qkv;
    let through = |dquery: Array2<f64>, dkey: Array2<f64>| -> Results {
        let mut out = Results::new();
        for (letter, dp) in [('Q', dquery), ('K', dkey)] {
            match problem.hidden() {
                None => drop(out.insert(format!("d{letter}"), dp)),
                Some(h) => {
                    let weight = h.inputs.letter(letter).t().dot(&dp);
                    if let Some(a) = &h.projections.letter(letter).adapter {
                        out.insert(format!("dA{letter}"), a.lora_b.t().dot(&weight) * h.scaling);
                        out.insert(format!("dB{letter}"), weight.dot(&a.lora_a.t()) * h.scaling);
                    }
                    out.insert(format!("dW{letter}"), weight);
                }
            }
        }
        out
    };
    let undiminished = &all.P * &all.G.dot(&value.t());
    judge(
        "softmax-backward",
        "the softmax's backward lacks the row sum: dS = P o dP instead of P o (dP - delta)".into(),
        "delta_i = sum_j P_ij dP_ij = G_i . O_i",
        &through(undiminished.dot(key) * beta, undiminished.t().dot(query) * beta),
    );
    judge(
        "attention-scale-backward",
        "the backward of the scores lacks beta".into(),
        "dQ = beta dS K, dK = beta dS^T Q",
        &through(all.dS.dot(key), all.dS.t().dot(query)),
    );
    // One factor in every gradient that fails.
    let (mut along, mut square) = (0.0, 0.0);
    for name in failing
        .iter()
        .filter(|n| n.starts_with('d') && kernel[**n].values.dim() == exact[**n].dim())
    {
        along += dot(&kernel[*name].values, &exact[*name]);
        square += dot(&exact[*name], &exact[*name]);
    }
    if square > 0.0 && along.abs() > 0.0 {
        let c = along / square;
        let times = failing.iter().map(|n| ((*n).clone(), exact[*n].mapv(|x| c * x))).collect();
        let what = format!("{} gradients are {c:.6} times the right ones", failing.len());
        judge("constant-factor", what, "look for alpha / r, beta or a factor of the loss", &times);
    }
    found.sort_by(|a, b| {
        b.complete
            .cmp(&a.complete)
            .then(b.tensors.0.cmp(&a.tensors.0))
            .then(a.share.total_cmp(&b.share))
    });
    let complete = found.iter().any(|d| d.complete);
    found.retain(|d| !complete || d.complete);
    found.truncate(3);
    Ok((found, 8))
}
