//! `peft-limits gradient`.

use super::devices::{DEVICE_HELP, PRODUCTS_HELP};
use super::output::check_file;
use super::{INPUT_HELP, features_help};
use crate::attention::exact::{dense, streaming};
use crate::attention::factorization::{Certificate, SoftmaxFactorization, build};
use crate::attention::{AttentionProblem, Gradients, Request, chained, file};
use crate::device::{DeviceChoice, ProductPrecision};
use crate::error::{Error, Result};
use crate::limits::trial::natural_request;
use crate::linalg::Real;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Args)]
#[command(after_long_help = format!("{INPUT_HELP}\n\n{}\n\nExamples:\n  \
    peft-limits gradient tests/data/attention_small.safetensors --method dense -o \
    grads.safetensors\n  peft-limits gradient head.safetensors --dtype f32 -o grads.safetensors\n  \
    peft-limits gradient head.safetensors --method chained --features taylor:degree=3 \
    --only-adapters -o grads.safetensors",
    features_help()))]
pub(super) struct GradientArgs {
    /// The head, a safetensors file
    pub(super) input: PathBuf,
    /// How to compute: dense (reference, f64, L x L memory), streaming (exact, tiled), chained (low
    /// rank)
    #[arg(long, value_enum, default_value_t = Method::Streaming)]
    pub(super) method: Method,
    /// Factorization of exp(S) for --method chained
    #[arg(long, value_name = "SPEC")]
    features: Option<String>,
    /// Precision of the computation and of the output [default: f64, or f32 on a GPU, which has no
    /// other]
    #[arg(long, value_enum)]
    pub(super) dtype: Option<Dtype>,
    #[arg(long, default_value_t, help = DEVICE_HELP)]
    pub(super) device: DeviceChoice,
    #[arg(long, value_name = "PRECISION", default_value_t, help = PRODUCTS_HELP)]
    products: ProductPrecision,
    /// Only dA and dB: every product has r columns (cheaper); otherwise dW too
    #[arg(long)]
    only_adapters: bool,
    /// Where to write O, loss, dW*, dA*, dB* (or dQ, dK, dV)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Method {
    Dense,
    Streaming,
    Chained,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Dtype {
    F32,
    F64,
}

pub(super) fn run(args: &GradientArgs) -> Result<ExitCode> {
    #[cfg(feature = "mpi")]
    if let Some(job) = crate::distributed::Job::launched()? {
        return Ok(super::gradient_over_ranks::run(args, job.ranks()));
    }
    args.check()?;
    check_file("--output", &args.output, &[&args.input])?;
    match args.dtype {
        _ if args.device != DeviceChoice::Cpu => on_device(args)?,
        Some(Dtype::F32) => compute::<f32>(args)?,
        _ => compute::<f64>(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

impl GradientArgs {
    /// Refuses flags that do not go together.
    pub(super) fn check(&self) -> Result<()> {
        let on_cpu = self.device == DeviceChoice::Cpu;
        match (self.method, &self.features, self.dtype) {
            (Method::Dense, _, Some(Dtype::F32)) => {
                let why = "the dense reference is f64; use --method streaming for f32";
                Err(Error::invalid("--dtype", "f32", why))
            }
            (Method::Chained, None, _) => Err(Error::invalid(
                "--method",
                "chained",
                "needs --features SPEC, for instance taylor:degree=3",
            )),
            (Method::Dense | Method::Streaming, Some(spec), _) => {
                Err(Error::invalid("--features", spec, "belongs to --method chained"))
            }
            (Method::Dense, _, _) if !on_cpu => Err(Error::invalid(
                "--method",
                "dense",
                "the reference runs with --device cpu only",
            )),
            (_, _, Some(Dtype::F64)) if !on_cpu => {
                Err(Error::invalid("--dtype", "f64", "a GPU computes in f32; leave --dtype out"))
            }
            _ => products_need_a_gpu(self.products, self.device),
        }
    }

    /// The head, the factorization and what is asked for.
    pub(super) fn load<T: Real>(&self) -> Result<Task<T>> {
        // A spec that cannot be read is found before a large file is.
        let factorization = self.features.as_deref().map(build::<T>).transpose()?;
        let problem: AttentionProblem<T> = file::read_problem(&self.input)?;
        let request = if self.only_adapters { Request::Adapters } else { Request::All };
        if self.only_adapters && natural_request(&problem) == Request::All {
            return Err(Error::format(
                &self.input,
                "adapters",
                "at least one pair A, B for --only-adapters",
                "none",
            ));
        }
        Ok(Task { problem, factorization, request })
    }
}

/// Refuses operands rounded on the processor, whose products are in the numbers' own precision.
pub(super) fn products_need_a_gpu(products: ProductPrecision, device: DeviceChoice) -> Result<()> {
    if device == DeviceChoice::Cpu && products != ProductPrecision::F32 {
        return Err(Error::invalid(
            "--products",
            products,
            "goes with --device gpu or cuda; the processor rounds nothing",
        ));
    }
    Ok(())
}

/// What is to be computed.
pub(super) struct Task<T: Real> {
    pub problem: AttentionProblem<T>,
    pub factorization: Option<Box<dyn SoftmaxFactorization<T>>>,
    pub request: Request,
}

#[cfg(not(feature = "gpu"))]
fn on_device(args: &GradientArgs) -> Result<()> {
    Err(args.device.not_built())
}

/// On a GPU; what is prepared on the processor is prepared in f64.
#[cfg(feature = "gpu")]
fn on_device(args: &GradientArgs) -> Result<()> {
    use crate::gpu::{Device, attention};
    let device = Device::open(args.device)?;
    let Task { problem, factorization, request } = args.load::<f64>()?;
    let options = attention::streaming::Options { precision: args.products, ..Default::default() };
    let start = Instant::now();
    let (gradients, certificate) = match &factorization {
        Some(method) => {
            let result = attention::chained::gradients(
                &device,
                &problem,
                method.as_ref(),
                request,
                &options,
            )?;
            (result.gradients, Some(result.certificate))
        }
        None => (attention::streaming::gradients(&device, &problem, request, &options)?, None),
    };
    let seconds = start.elapsed().as_secs_f64();
    report(args, &gradients, certificate.as_ref(), &device.info().to_string(), seconds)
}

fn compute<T: Real>(args: &GradientArgs) -> Result<()> {
    let Task { problem, factorization, request } = args.load::<T>()?;
    let start = Instant::now();
    let (gradients, certificate): (Gradients<T>, Option<Certificate>) =
        match (args.method, &factorization) {
            (Method::Chained, Some(method)) => {
                let result = chained::gradients(&problem, method.as_ref(), request)?;
                (result.gradients, Some(result.certificate))
            }
            (Method::Dense, _) => {
                (from_f64(dense::gradients(&problem.cast::<f64>(), request)?), None)
            }
            _ => (streaming::gradients(&problem, request)?, None),
        };
    report(args, &gradients, certificate.as_ref(), "cpu", start.elapsed().as_secs_f64())
}

/// Writes the file and prints norms, certificate and cost.
pub(super) fn report<T: Real>(
    args: &GradientArgs,
    gradients: &Gradients<T>,
    certificate: Option<&Certificate>,
    device: &str,
    seconds: f64,
) -> Result<()> {
    let method = match args.method {
        Method::Dense => "dense",
        Method::Streaming => "streaming",
        Method::Chained => "chained",
    };
    let mut metadata = vec![
        ("method", method.to_string()),
        ("dtype", T::NAME.to_string()),
        ("device", device.to_string()),
    ];
    if args.device != DeviceChoice::Cpu {
        metadata.push(("products", args.products.to_string()));
    }
    if let Some(c) = certificate {
        metadata.push(("features", c.spec.clone()));
        metadata.push(("rank", c.rank.to_string()));
        if let Some(bound) = c.exp_error_bound {
            metadata.push(("exp_error_bound", bound.to_string()));
        }
    }
    file::write_gradients(&args.output, gradients, &metadata)?;
    if let Some(loss) = gradients.loss {
        println!("loss             {loss:.12e}");
    }
    for (name, a) in gradients.named() {
        let norm = crate::linalg::norms::frobenius(&a.view());
        println!("{name:<4} {:>5} x {:<5} ||.||_F = {norm:.6e}", a.nrows(), a.ncols());
    }
    if let Some(c) = certificate {
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
        "operations       {:.4e} flops, {:.3e} exponentials, {seconds:.4} s on {device}",
        cost.flops() as f64,
        cost.exponentials as f64
    );
    println!("written          {}", args.output.display());
    Ok(())
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
