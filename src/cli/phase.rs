//! `peft-limits phase`: the phase diagram of random heads, without a head.

use super::output::check_file;
use crate::error::{Error, Result};
use crate::limits::phase_diagram::{Exponents, Law, Model};
use crate::report::{Axis, Figure, LineChart, Reference, Row, Series, Table, short_float};
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HELP: &str = "\
A random head: d = K ln L, beta = 1/d, the coordinates of queries and keys Gamma times independent \
numbers of the law, c = Gamma / sqrt(ln L). Each cost is L^(1 + exponent) up to powers of ln L; \
the exponents below leave out the 1 of the tokens, so 1 is the exact gradient's. Derivations: \
paper-notes/phase-diagram.md.

  rank                        best rank at any fixed error (relative, Frobenius)
  rank_error_1_over_L         best rank at error 1/L; null (-) if no rank below full reaches it
  all_monomials               all monomials up to the typical degree
  certified, ..._1_over_L     all monomials up to the degree that is certified on [-Gamma^2, \
  Gamma^2]
  support, support_squared    keys that hold a query's weight, or its squared weights; 0: O(1) keys

Examples:
  peft-limits phase --c 0.25,0.5,1,2
  # a head of 4,096 tokens: how many columns for 10% and 1%?
  peft-limits phase --c 0.5 --length 4096 --eps 0.1,0.01
  peft-limits phase --law sign --kappa 2 --c 1 --json
  peft-limits phase --plot phases.png";

#[derive(Args)]
#[command(after_long_help = HELP)]
pub(super) struct PhaseArgs {
    /// Law of a coordinate: uniform (on [-1, 1]), sign (-1 or 1), or a file of numbers in [-1, 1]
    #[arg(long, value_name = "LAW", default_value = "uniform")]
    law: String,
    /// d / ln L
    #[arg(long, value_name = "K", default_value_t = 1.0)]
    kappa: f64,
    /// Gamma / sqrt(ln L), comma-separated
    #[arg(long, value_name = "C,...", value_delimiter = ',',
          default_values_t = [0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0])]
    c: Vec<f64>,
    /// Also count eps-ranks of heads of this many tokens, with d = ceil(K ln L); a number such as
    /// 4096, 1e9 or 2^40
    #[arg(long, value_name = "L", value_delimiter = ',', value_parser = parse_length)]
    length: Vec<f64>,
    /// Errors of those eps-ranks, comma-separated
    #[arg(long, value_name = "EPS,...", value_delimiter = ',', default_values_t = [0.3, 0.1, 0.03])]
    eps: Vec<f64>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Draw the diagram of this law and kappa to FILE (.svg or .png)
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// One eps-rank at finite L.
struct Finite {
    tokens: f64,
    head_dim: usize,
    c: f64,
    eps: f64,
    k: f64,
}

fn parse_length(text: &str) -> std::result::Result<f64, String> {
    let number = match text.split_once('^') {
        Some((base, power)) => {
            base.parse::<f64>().ok().zip(power.parse::<f64>().ok()).map(|(b, p)| b.powf(p))
        }
        None => text.parse().ok(),
    };
    // The square of it, and powers below, must stay a number.
    number
        .filter(|x: &f64| (2.0..=1e150).contains(x))
        .ok_or_else(|| "expected a number from 2 to 1e150".into())
}

pub(super) fn run(args: &PhaseArgs) -> Result<ExitCode> {
    if let Some(path) = &args.plot {
        if !path.extension().is_some_and(|end| end == "svg" || end == "png") {
            return Err(Error::invalid("--plot", path.display(), "must end in .svg or .png"));
        }
        check_file("--plot", path, &[Path::new(&args.law)])?;
    }
    let law = match args.law.as_str() {
        "uniform" => Law::Uniform,
        "sign" => Law::Sign,
        path => Law::read(Path::new(path))?,
    };
    let model = Model::new(law, args.kappa)?;
    let exponents: Vec<Exponents> =
        args.c.iter().map(|&c| model.exponents(c)).collect::<Result<_>>()?;
    let mut finite = Vec::new();
    for &tokens in &args.length {
        for &c in &args.c {
            for &eps in &args.eps {
                let k = model.finite_rank(c, tokens, eps)?;
                finite.push(Finite { tokens, head_dim: model.head_dim(tokens), c, eps, k });
            }
        }
    }
    if let Some(path) = &args.plot {
        plot(&model, &args.law, path)?;
    }
    if args.json {
        let exponents: Vec<Value> = exponents.iter().map(exponents_json).collect();
        let finite: Vec<Value> = finite.iter().map(finite_json).collect();
        println!("{:#}", json!({ "exponents": exponents, "finite": finite }));
        return Ok(ExitCode::SUCCESS);
    }
    print_tables(args, &model, &exponents, &finite);
    Ok(ExitCode::SUCCESS)
}

fn exponents_json(e: &Exponents) -> Value {
    json!({
        "c": e.c, "theta": e.theta, "rank": e.rank, "rank_error_1_over_L": e.rank_error_1_over_l,
        "all_monomials": e.all_monomials, "certified": e.certified,
        "certified_error_1_over_L": e.certified_error_1_over_l, "support": e.support, "support_squared": e.support_squared,
    })
}

fn finite_json(f: &Finite) -> Value {
    // Lengths beyond 2^53 are no exact integers in double precision.
    let tokens = if f.tokens < 9e15 && f.tokens.fract() == 0.0 {
        json!(f.tokens as u64)
    } else {
        json!(f.tokens)
    };
    json!({ "L": tokens, "d": f.head_dim, "c": f.c, "eps": f.eps, "k": f.k })
}

fn print_tables(args: &PhaseArgs, model: &Model, exponents: &[Exponents], finite: &[Finite]) {
    println!(
        "Exponents of a random head, law {}, d = {} ln L (1 is the exact gradient's):\n",
        args.law,
        model.kappa()
    );
    let mut table = Table::default();
    for e in exponents {
        table.push(
            &Row::new()
                .with("c", e.c)
                .with("theta", e.theta)
                .with("rank", e.rank)
                .with("rank 1/L", e.rank_error_1_over_l)
                .with("all monomials", e.all_monomials)
                .with("certified", e.certified)
                .with("certified 1/L", e.certified_error_1_over_l)
                .with("support", e.support)
                .with("squared", e.support_squared),
        );
    }
    println!("{}", table.to_text(usize::MAX));
    let line = |what: &str, found: Option<f64>, never: &str| match found {
        Some(c) => println!("{what:<63} c = {}", short_float(c)),
        None => println!("{what:<63} {never}"),
    };
    line(
        "certified polynomials stop being sub-quadratic, fixed error",
        model.certified_is_quadratic_from(0.0),
        "never",
    );
    line(
        "certified polynomials stop being sub-quadratic, error 1/L",
        model.certified_is_quadratic_from(1.0),
        "never",
    );
    line(
        "the best rank stops being sub-quadratic, fixed error",
        model.rank_is_quadratic_from(0.0),
        "never",
    );
    line(
        "the best rank stops being sub-quadratic, error 1/L",
        model.rank_is_quadratic_from(1.0),
        "never",
    );
    let middle = model.middle();
    line("low rank and an oracle's sparsity cost the same", middle.map(|m| m.0), "never");
    if let Some((_, exponent)) = middle {
        println!("{:<63} L^{:.2}", "  and that cost is", 1.0 + exponent);
    }
    line("the softmax condenses on O(1) keys", model.condensation(), "never");
    if !finite.is_empty() {
        println!(
            "\neps-ranks of P, as many columns as the best factorization needs (tokens without end \
             at this d):\n"
        );
        let mut table = Table::default();
        for f in finite {
            let row = Row::new().with("L", f.tokens).with("d", f.head_dim).with("c", f.c);
            table.push(&row.with("eps", f.eps).with("k", f.k).with("k / L", f.k / f.tokens));
        }
        print!("{}", table.to_text(usize::MAX));
    }
}

/// 1 + exponent against c.
fn plot(model: &Model, law: &str, path: &Path) -> Result<()> {
    const POINTS: u32 = 60;
    let largest = 3.0 * model.kappa().sqrt().max(1.0);
    let curves: Vec<Exponents> = (1..=POINTS)
        .map(|i| model.exponents(largest * f64::from(i) / f64::from(POINTS)))
        .collect::<Result<_>>()?;
    let of = |name: &str, f: &dyn Fn(&Exponents) -> f64| Series {
        markers: false,
        ..Series::new(name, curves.iter().map(|e| (e.c, 1.0 + f(e))))
    };
    let chart = LineChart {
        x: Axis::linear("c = Γ / √(ln L)"),
        y: Axis::linear("cost exponent").range(0.95, 2.6),
        series: vec![
            of("certified polynomials", &|e| e.certified),
            of("all monomials", &|e| e.all_monomials),
            of("best rank", &|e| e.rank),
            of("best rank, error 1/L", &|e| e.rank_error_1_over_l.unwrap_or(f64::NAN)),
            of("oracle's sparsity", &|e| e.support),
        ],
        references: vec![Reference::Horizontal(2.0, "exact".into())],
        ..LineChart::default()
    };
    let name = Path::new(law).file_name().unwrap_or_default().to_string_lossy();
    Figure::new(format!("A random head, law {name}, d = {} ln L", model.kappa()), [chart])
        .caption(
            "Exponents of L as L grows, at a fixed error where none is named; closed forms, \
                  nothing measured.",
        )
        .write_to(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_may_be_powers() {
        for (text, power) in [("4096", 12), ("2^20", 20), ("1099511627776", 40)] {
            assert!((parse_length(text).unwrap() / 2f64.powi(power) - 1.0).abs() < 1e-15, "{text}");
        }
        for bad in ["1", "x", "2^", "-3", "nan", "2^1000"] {
            assert!(parse_length(bad).is_err(), "{bad}");
        }
    }
}
