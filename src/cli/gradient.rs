//! `peft-limits gradient`.

use super::{INPUT_HELP, features_help};
use crate::attention::exact::{dense, streaming};
use crate::attention::factorization::{Certificate, build};
use crate::attention::{AttentionProblem, Gradients, Request, chained, file};
use crate::error::{Error, Result};
use crate::limits::trial::natural_request;
use crate::linalg::Real;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Args)]
#[command(after_long_help = format!("{INPUT_HELP}\n\n{}\n\nExamples:\n  \
    peft-limits gradient tests/data/attention_small.safetensors --method dense -o grads.safetensors\n  \
    peft-limits gradient head.safetensors --dtype f32 -o grads.safetensors\n  \
    peft-limits gradient head.safetensors --method chained --features taylor:degree=3 --only-adapters -o grads.safetensors",
    features_help()))]
pub(super) struct GradientArgs {
    /// The head, a safetensors file
    input: PathBuf,
    /// How to compute: dense (reference, f64, L x L memory), streaming (exact, tiled), chained (low rank)
    #[arg(long, value_enum, default_value_t = Method::Streaming)]
    method: Method,
    /// Factorization of exp(S) for --method chained
    #[arg(long, value_name = "SPEC")]
    features: Option<String>,
    /// Precision of the computation and of the output
    #[arg(long, value_enum, default_value_t = Dtype::F64)]
    dtype: Dtype,
    /// Only dA and dB: every product has r columns (cheaper); otherwise dW too
    #[arg(long)]
    only_adapters: bool,
    /// Where to write O, loss, dW*, dA*, dB* (or dQ, dK, dV)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    Dense,
    Streaming,
    Chained,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    F32,
    F64,
}

pub(super) fn run(args: &GradientArgs) -> Result<ExitCode> {
    match (args.method, &args.features, args.dtype) {
        (Method::Dense, _, Dtype::F32) => {
            return Err(Error::invalid("--dtype", "f32", "the dense reference is f64; use --method streaming for f32"));
        }
        (Method::Chained, None, _) => {
            return Err(Error::invalid("--method", "chained", "needs --features SPEC, for instance taylor:degree=3"));
        }
        (Method::Dense | Method::Streaming, Some(spec), _) => {
            return Err(Error::invalid("--features", spec, "belongs to --method chained"));
        }
        _ => {}
    }
    match args.dtype {
        Dtype::F32 => compute::<f32>(args),
        Dtype::F64 => compute::<f64>(args),
    }
}

fn compute<T: Real>(args: &GradientArgs) -> Result<ExitCode> {
    // A spec that cannot be read is found before a large file is.
    let factorization = args.features.as_deref().map(build::<T>).transpose()?;
    let problem: AttentionProblem<T> = file::read_problem(&args.input)?;
    let request = if args.only_adapters { Request::Adapters } else { Request::All };
    if args.only_adapters && natural_request(&problem) == Request::All {
        return Err(Error::format(&args.input, "adapters", "at least one pair A, B for --only-adapters", "none"));
    }
    let start = Instant::now();
    let (gradients, certificate): (Gradients<T>, Option<Certificate>) = match (args.method, &factorization) {
        (Method::Chained, Some(method)) => {
            let result = chained::gradients(&problem, method.as_ref(), request)?;
            (result.gradients, Some(result.certificate))
        }
        (Method::Dense, _) => (from_f64(dense::gradients(&problem.cast::<f64>(), request)?), None),
        _ => (streaming::gradients(&problem, request)?, None),
    };
    let seconds = start.elapsed().as_secs_f64();
    let method = match args.method {
        Method::Dense => "dense",
        Method::Streaming => "streaming",
        Method::Chained => "chained",
    };
    let mut metadata = vec![("method", method.to_string()), ("dtype", T::NAME.to_string())];
    if let Some(c) = &certificate {
        metadata.push(("features", c.spec.clone()));
        metadata.push(("rank", c.rank.to_string()));
        if let Some(bound) = c.exp_error_bound {
            metadata.push(("exp_error_bound", bound.to_string()));
        }
    }
    file::write_gradients(&args.output, &gradients, &metadata)?;
    if let Some(loss) = gradients.loss {
        println!("loss             {loss:.12e}");
    }
    for (name, a) in gradients.named() {
        let norm = crate::linalg::norms::frobenius(&a.view());
        println!("{name:<4} {:>5} x {:<5} ||.||_F = {norm:.6e}", a.nrows(), a.ncols());
    }
    if let Some(c) = &certificate {
        println!("features         {} (k = {})", c.spec, c.rank);
        if let Some((b, evidence)) = c.interval {
            println!("interval         [-{b:.4}, {b:.4}] ({evidence})");
        }
        if let Some(bound) = c.exp_error_bound {
            println!("|exp error| <=   {bound:.3e}");
        }
    }
    let cost = &gradients.cost;
    println!(
        "operations       {:.4e} flops, {:.3e} exponentials, {seconds:.4} s",
        cost.flops() as f64,
        cost.exponentials as f64
    );
    println!("written          {}", args.output.display());
    Ok(ExitCode::SUCCESS)
}

/// The dense reference's result under the caller's scalar type, which [`run`] has made sure is f64.
fn from_f64<T: Real>(g: Gradients<f64>) -> Gradients<T> {
    use crate::attention::Qkv;
    use ndarray::Array2;
    let one = |a: &Array2<f64>| crate::linalg::real::cast::<f64, T>(a.view());
    let three = |q: &Qkv<Option<Array2<f64>>>| Qkv {
        query: q.query.as_ref().map(one),
        key: q.key.as_ref().map(one),
        value: q.value.as_ref().map(one),
    };
    Gradients {
        output: one(&g.output),
        loss: g.loss,
        projected: three(&g.projected),
        weight: three(&g.weight),
        lora_a: three(&g.lora_a),
        lora_b: three(&g.lora_b),
        cost: g.cost,
    }
}
