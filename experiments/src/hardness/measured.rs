//! Instances drawn, approximated and decided.

use super::{BUDGET, DECOMPOSED, EXACT, EXPONENTS, LADDER, ORACLES, RATIOS, SHARES, SVD};
use crate::harness::{Point, interrupted, seed_stream};
use peft_limits::attention::exact::streaming;
use peft_limits::attention::factorization::monomials::count;
use peft_limits::attention::factorization::truncated_svd::Oracle as Decomposition;
use peft_limits::attention::factorization::{FeatureMap, Scores, build};
use peft_limits::attention::{AttentionProblem, Gradients, Request, chained};
use peft_limits::cost::Cost;
use peft_limits::limits::hardness::decision::{
    Oracle, gradient_margin, guaranteed, has_near_pair, output_tells,
};
use peft_limits::limits::hardness::embedding::{Embedding, Form, HEAD_DIM};
use peft_limits::limits::hardness::instance::Instance;
use peft_limits::limits::hardness::row_sums::{distance_counts, outputs, query_adapter_gradient};
use peft_limits::report::{Cell, Row};
use peft_limits::{Error, Result};
use rand::Rng;

const FORMS: [Form; 2] = [Form::Given, Form::Squared];
/// Ranks of the decomposition.
const RANKS: [usize; 6] = [1, 2, 3, 4, 8, 16];

struct Drawn {
    planted: bool,
    seed: u64,
    instance: Instance,
}

/// Answers of one method from one oracle over a block of instances.
#[derive(Default)]
struct Tally {
    instances: [u64; 2],
    answered: [u64; 2],
    right: [u64; 2],
    operations: Vec<f64>,
    /// Smallest gradient error with a wrong answer, largest with a right one.
    errors: Option<(f64, f64)>,
}

impl Tally {
    fn add(&mut self, planted: bool, answer: Option<bool>) {
        let at = usize::from(!planted);
        self.instances[at] += 1;
        self.answered[at] += u64::from(answer.is_some());
        self.right[at] += u64::from(answer == Some(planted));
    }

    fn row(&self) -> Row {
        let mut row = Row::new();
        for (i, kind) in ["planted", "null"].into_iter().enumerate() {
            row.set(kind, self.instances[i]);
            row.set(format!("{kind} answered"), self.answered[i]);
            row.set(format!("{kind} right"), self.right[i]);
        }
        let known = |x: f64| if x.is_finite() { Cell::Float(x) } else { Cell::Missing };
        let mean = self.operations.iter().sum::<f64>() / self.operations.len() as f64;
        row.set("operations / exact", known(mean));
        let (wrong, right) = self.errors.unwrap_or((f64::NAN, f64::NAN));
        row.with("least error of a wrong answer", known(wrong))
            .with("largest error of a right answer", known(right))
    }
}

pub(super) fn measure(point: &Point) -> Result<Vec<Row>> {
    let (size, first, instances) =
        (point.usize("size")?, point.u64("seed")?, point.u64("instances")?);
    let drawn = |s: u64| {
        let planted = s.is_multiple_of(2);
        let seed = seed_stream(s, "instance").next_u64();
        Ok(Drawn { planted, seed, instance: Instance::draw(size, planted, seed)? })
    };
    let seeds = first..first + instances;
    if point.text("kind")? == EXACT {
        return exact(size, seeds.map(drawn));
    }
    let embedding = Embedding::at_threshold_ratio(size, point.f64("c")?)?;
    let (families, powers) = if point.text("kind")? == "budget" {
        (&BUDGET, &EXPONENTS[..])
    } else {
        (&LADDER, &[][..])
    };
    let budgets: Vec<f64> = if powers.is_empty() { SHARES.to_vec() } else { powers.to_vec() };
    let tokens = 2 * size;
    let columns = |budget: f64| {
        let k =
            if powers.is_empty() { budget * tokens as f64 } else { (tokens as f64).powf(budget) };
        k.ceil() as usize
    };
    // (family, budget or missing, columns), the same for every instance.
    let mut settings: Vec<(&str, Option<f64>, usize)> = Vec::new();
    for family in families {
        match *family {
            SVD if size > DECOMPOSED => {}
            SVD => settings.extend(RANKS.map(|rank| (SVD, None, rank))),
            // Few of them may do where they are the right ones.
            "sparse" => {
                settings.extend((0..).map(|i| ("sparse", None, 1 << i)).take_while(|s| s.2 <= size))
            }
            _ if powers.is_empty() => {
                settings.push((*family, None, 1));
                settings.extend(budgets.iter().map(|&b| (*family, Some(b), columns(b))));
            }
            _ => settings.extend(budgets.iter().map(|&b| (*family, Some(b), columns(b)))),
        }
    }
    let mut tallies: Vec<[Tally; 3]> = settings.iter().map(|_| Default::default()).collect();
    for drawn in seeds.map(drawn) {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        one(&embedding, &drawn?, &settings, &mut tallies)?;
    }
    let mut rows = Vec::new();
    for ((family, budget, columns), tallies) in settings.iter().zip(&tallies) {
        // A method that has no member within the budget has no row.
        for ((name, oracle), tally) in
            ORACLES.iter().zip(tallies).filter(|(_, t)| t.instances[0] > 0)
        {
            let row = row(family, name, *oracle, &embedding, tally);
            rows.push(
                row.with("budget", budget.map_or(Cell::Missing, Cell::Float))
                    .with("columns k", *columns),
            );
        }
    }
    Ok(rows)
}

fn row(family: &str, name: &str, oracle: Oracle, embedding: &Embedding, tally: &Tally) -> Row {
    let mut row =
        Row::new().with("family", family).with("oracle", name).with("Gamma", embedding.gamma);
    row.set("guaranteed", guaranteed(embedding, oracle));
    tally.row().cells().iter().for_each(|(name, cell)| row.set(name.clone(), cell.clone()));
    row
}

/// Every setting on one instance.
fn one(
    embedding: &Embedding,
    drawn: &Drawn,
    settings: &[(&str, Option<f64>, usize)],
    tallies: &mut [[Tally; 3]],
) -> Result<()> {
    let Drawn { planted, seed, ref instance } = *drawn;
    let problems: Vec<AttentionProblem<f64>> =
        FORMS.into_iter().map(|form| embedding.head(instance, form)).collect::<Result<_>>()?;
    let exact: Vec<Gradients<f64>> = problems
        .iter()
        .map(|p| streaming::gradients(p, Request::Adapters))
        .collect::<Result<_>>()?;
    let projected = problems[0].project(&mut Cost::default());
    let scores = Scores::of(&problems[0], &projected);
    let mut decomposition = None;
    for ((family, _, columns), tallies) in settings.iter().zip(tallies) {
        let mut cost = Cost::default();
        let map: Option<Box<dyn FeatureMap<f64>>> = match *family {
            EXACT => None,
            SVD => {
                let of = decomposition
                    .get_or_insert_with(|| Decomposition::new(&scores, &mut Cost::default()));
                Some(
                    of.as_ref()
                        .map_err(|e| Error::invalid("truncated-svd", *columns, e.to_string()))?
                        .cut(*columns)?,
                )
            }
            _ => match within(family, *columns, embedding, seed % 1000) {
                Some(spec) => Some(build::<f64>(&spec)?.prepare(&scores, &mut cost)?),
                None => continue,
            },
        };
        for (form, (problem, exact)) in problems.iter().zip(&exact).enumerate() {
            let found = match &map {
                None => Some(exact.clone()),
                Some(map) => match chained::with_map(
                    problem,
                    &projected,
                    map.as_ref(),
                    Request::Adapters,
                    cost,
                ) {
                    Ok(found) => Some(found.gradients),
                    Err(Error::NonPositiveDenominator { .. }) => None,
                    Err(error) => return Err(error),
                },
            };
            // The output is the same with either loss.
            let oracles = if form == 0 { &[0, 1][..] } else { &[2] };
            for &at in oracles {
                let tally = &mut tallies[at];
                let answer = found
                    .as_ref()
                    .map(|g| has_near_pair(embedding, g, ORACLES[at].1))
                    .transpose()?;
                tally.add(planted, answer);
                let Some(found) = &found else { continue };
                tally.operations.push(found.cost.flops() as f64 / exact.cost.flops() as f64);
                if at > 0 {
                    let error = found.relative_gap(exact);
                    let (wrong, right) = tally.errors.unwrap_or((f64::INFINITY, f64::NEG_INFINITY));
                    let is_right = answer == Some(planted);
                    tally.errors = Some(if is_right {
                        (wrong, right.max(error))
                    } else {
                        (wrong.min(error), right)
                    });
                }
            }
        }
    }
    Ok(())
}

/// The spec of a family within a budget of columns; `None` if no member is that small.
fn within(family: &str, columns: usize, embedding: &Embedding, seed: u64) -> Option<String> {
    let degree = (1..).take_while(|&g| count(HEAD_DIM, g) <= columns as u128).last();
    match family {
        "fitted" => degree.map(|g| format!("fitted:degree={g},seed={seed}")),
        "tensor-sketch" => (columns > HEAD_DIM + 3)
            .then(|| format!("tensor-sketch:degree=3,rank={columns},seed={seed}")),
        // A threshold between the near pair's logit, 7/8 x, and the next possible one, 5/8 x, with
        // x = Gamma^2 / 2.
        "support-basis" => degree.map(|g| {
            format!(
                "support-basis:degree={g},threshold={},center=none",
                0.375 * embedding.gamma * embedding.gamma
            )
        }),
        "sparse" => Some(format!("sparse:keys={columns}")),
        _ => Some(format!("{family}:rank={columns},seed={seed}")),
    }
}

/// Exact answers at every c, and how far from turning they are.
fn exact(size: usize, drawn: impl Iterator<Item = Result<Drawn>>) -> Result<Vec<Row>> {
    let embeddings = RATIOS
        .into_iter()
        .map(|c| Embedding::at_threshold_ratio(size, c))
        .collect::<Result<Vec<_>>>()?;
    let mut found: Vec<[(Tally, Vec<[f64; 2]>); 3]> =
        embeddings.iter().map(|_| Default::default()).collect();
    for drawn in drawn {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        let Drawn { planted, instance, .. } = drawn?;
        let counts = distance_counts(&instance);
        for (embedding, found) in embeddings.iter().zip(&mut found) {
            let output = outputs(embedding, &counts);
            for ((_, oracle), (tally, margins)) in ORACLES.iter().zip(found) {
                let Oracle::LoraGradient(form) = oracle else {
                    tally.add(planted, Some(output_tells(embedding, output.iter().copied())));
                    continue;
                };
                let total: f64 = output.iter().map(|&o| form.of_row(o)).sum();
                let margin = gradient_margin(embedding, total, *form);
                tally.add(planted, Some(margin > 0.0));
                let gradient = query_adapter_gradient(embedding, &instance, &output, *form);
                let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
                // The error sits best in the one entry that is read.
                let read = gradient[HEAD_DIM - 1].abs();
                margins.push([margin.abs(), margin.abs() * read / norm]);
            }
        }
    }
    let mut rows = Vec::new();
    for (c, (embedding, found)) in RATIOS.into_iter().zip(embeddings.iter().zip(&found)) {
        for ((name, oracle), (tally, margins)) in ORACLES.iter().zip(found) {
            let mut row = row(EXACT, name, *oracle, embedding, tally).with("c", c);
            for (i, norm) in ["largest entry", "Frobenius"].into_iter().enumerate() {
                let mut all: Vec<f64> = margins.iter().map(|m| m[i]).collect();
                all.sort_by(f64::total_cmp);
                let tenth = all.get(all.len() / 10).map_or(Cell::Missing, |&m| Cell::Float(m));
                row.set(format!("error that turns a tenth ({norm})"), tenth);
            }
            rows.push(row);
        }
    }
    Ok(rows)
}
