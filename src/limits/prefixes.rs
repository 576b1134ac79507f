//! The cost exponent of one's own head: what a gradient of given accuracy costs on the head's first
//! L/16, L/8, ..., L tokens.
//!
//! Of a synthetic head the length can be varied at a fixed norm; of a trained one only its
//! beginnings are there. Their norms and largest logits vary, so the exponent says how this head's
//! cost grows, not where the threshold lies.

use super::exponent::{Exponent, fit_exponent};
use super::oracle::OracleTrials;
use super::trial::{natural_request, reference, trial};
use crate::attention::contraction::{Contraction, Products};
use crate::attention::exact::streaming;
use crate::attention::factorization::{build, monomials};
use crate::attention::problem::{Hidden, Source};
use crate::attention::{AttentionProblem, Gradients, Objective, Qkv, Request};
use crate::cost::Cost;
use crate::error::{Error, Result};
use ndarray::{Array2, s};

/// Shortest head whose prefixes are measured: the shortest prefix then has two tokens.
pub const SHORTEST: usize = 32;
/// Longest prefix that is decomposed for the oracle.
pub const LONGEST_DECOMPOSED: usize = 1024;
/// Confidence of the intervals.
pub const LEVEL: f64 = 0.95;

/// Where a cost comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// The streaming gradient.
    Exact,
    /// The cheapest of fitted polynomials and Nystrom of rising rank that reaches the target.
    Runnable,
    /// The truncated SVD of P, without the decomposition: the best that any factorization can do.
    Oracle,
}

/// What one way costs on one prefix.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixCost {
    /// Tokens of the prefix.
    pub tokens: usize,
    /// Relative error of the gradient that was to be reached.
    pub eps: f64,
    /// The way.
    pub way: Way,
    /// Counted operations apart from the products with inputs and weights, which every way shares
    /// and which grow linearly; the exact gradient's where the target is not reached for less.
    pub flops: f64,
    /// The method that reached it; `None` for the exact gradient.
    pub method: Option<String>,
}

/// The problem on the first `part` of its queries and keys, at least one of each.
///
/// # Errors
/// [`Error::InvalidParam`] for a part outside (0, 1].
pub fn prefix(problem: &AttentionProblem<f64>, part: f64) -> Result<AttentionProblem<f64>> {
    if !(part > 0.0 && part <= 1.0) {
        return Err(Error::invalid("part", part, "must lie in (0, 1]"));
    }
    let rows = |n: usize| ((n as f64 * part).round() as usize).clamp(1, n);
    let (queries, keys) = (rows(problem.num_queries()), rows(problem.num_keys()));
    let top = |a: &Array2<f64>, n: usize| a.slice(s![..n, ..]).to_owned();
    let source = match problem.source() {
        Source::Projected(qkv) => Source::Projected(Qkv {
            query: top(&qkv.query, queries),
            key: top(&qkv.key, keys),
            value: top(&qkv.value, keys),
        }),
        Source::Hidden(hidden) => {
            let top = |a: &ndarray::ArcArray2<f64>, n: usize| a.slice(s![..n, ..]).to_shared();
            let inputs = Qkv {
                query: top(&hidden.inputs.query, queries),
                key: top(&hidden.inputs.key, keys),
                value: top(&hidden.inputs.value, keys),
            };
            Source::Hidden(Box::new(Hidden { inputs, ..(**hidden).clone() }))
        }
    };
    let objective = match problem.objective() {
        Objective::Target(y) => Objective::Target(top(y, queries)),
        Objective::UpstreamGradient(g) => Objective::UpstreamGradient(top(g, queries)),
    };
    AttentionProblem::new(source, objective, problem.mask(), problem.softmax(), problem.beta())
}

/// Costs on the prefixes L/16, L/8, ..., L for every target.
///
/// # Errors
/// [`Error::InvalidParam`] for a head shorter than [`SHORTEST`] tokens; those of the exact
/// gradient.
pub fn prefix_costs(problem: &AttentionProblem<f64>, targets: &[f64]) -> Result<Vec<PrefixCost>> {
    let all = problem.num_queries().min(problem.num_keys());
    if all < SHORTEST {
        return Err(Error::invalid(
            "tokens",
            all,
            format!("prefixes need a head of at least {SHORTEST} tokens"),
        ));
    }
    let request = natural_request(problem);
    let mut costs = Vec::new();
    for halvings in (0..5).rev() {
        let problem = prefix(problem, 0.5f64.powi(halvings))?;
        let tokens = problem.num_queries().max(problem.num_keys());
        let exact = reference(&problem, request)?;
        let shared = shared_flops(&problem, request)?;
        let bound = (streaming::gradients(&problem, request)?.cost.flops() - shared.all()) as f64;
        let oracle = if tokens <= LONGEST_DECOMPOSED {
            Some(OracleTrials::new(&problem, request)?)
        } else {
            None
        };
        let mut runnable = Candidates::new(&problem, &exact, request, shared.all(), bound);
        for &eps in targets {
            let mut push = |way, found: Option<(f64, String)>| {
                let (flops, method) =
                    found.filter(|f| f.0 < bound).map_or((bound, None), |(f, m)| (f, Some(m)));
                costs.push(PrefixCost { tokens, eps, way, flops, method });
            };
            push(Way::Exact, None);
            push(Way::Runnable, runnable.cheapest(eps));
            if let Some(oracle) = &oracle {
                push(Way::Oracle, smallest_rank(oracle, &exact, shared.contraction, eps)?);
            }
        }
    }
    Ok(costs)
}

/// Operations of the products with inputs and weights.
struct Shared {
    projections: u64,
    contraction: u64,
}

impl Shared {
    fn all(&self) -> u64 {
        self.projections + self.contraction
    }
}

/// Counts what every way does before and after it meets the L x L matrices, on products of zeros.
fn shared_flops(problem: &AttentionProblem<f64>, request: Request) -> Result<Shared> {
    let (mut projections, mut cost) = (Cost::default(), Cost::default());
    let projected = problem.project(&mut projections);
    let contraction = Contraction::new(problem, &projected, request, &mut cost)?;
    let zeros = |rows: usize, columns: usize| Array2::<f64>::zeros((rows, columns));
    let (queries, keys) = (problem.num_queries(), problem.num_keys());
    let upstream = zeros(queries, problem.value_dim());
    contraction.value_left(problem, upstream.view(), &mut cost);
    let m = contraction.score_left.ncols();
    let products = Products {
        output: upstream.clone(),
        value_right: zeros(queries, contraction.value_right.ncols()),
        score_right: zeros(queries, m),
        score_left: zeros(keys, m),
        value_left: zeros(keys, contraction.value_left_width(problem)),
    };
    let contracted = contraction.finish(problem, &projected, &upstream, products, cost).cost;
    Ok(Shared { projections: projections.flops(), contraction: contracted.flops() })
}

/// The exponent of one way at one target, and how many of its points had to take the exact
/// gradient.
///
/// # Errors
/// As [`fit_exponent`].
pub fn exponent_of(costs: &[PrefixCost], way: Way, eps: f64) -> Result<(Exponent, usize)> {
    let mine = || costs.iter().filter(|c| c.way == way && c.eps.to_bits() == eps.to_bits());
    let points: Vec<(f64, f64)> = mine().map(|c| (c.tokens as f64, c.flops)).collect();
    Ok((fit_exponent(&points, LEVEL)?, mine().filter(|c| c.method.is_none()).count()))
}

/// Methods in the order of their columns, each tried once.
struct Candidates<'a> {
    problem: &'a AttentionProblem<f64>,
    exact: &'a Gradients<f64>,
    request: Request,
    specs: std::vec::IntoIter<String>,
    /// (flops, error, spec) of those tried.
    tried: Vec<(f64, f64, String)>,
    shared: u64,
    /// Cost of the exact gradient; what costs more is no candidate.
    bound: f64,
}

impl<'a> Candidates<'a> {
    fn new(
        problem: &'a AttentionProblem<f64>,
        exact: &'a Gradients<f64>,
        request: Request,
        shared: u64,
        bound: f64,
    ) -> Self {
        let (tokens, width) = (problem.num_keys(), problem.head_dim());
        // Beyond two columns a token no chain is cheaper than the exact gradient.
        let degrees = (1..=8).map(|g| (monomials::count(width, g), format!("fitted:degree={g}")));
        let ranks = (1..).map(|i| 1usize << i).take_while(|k| *k <= tokens);
        let ranks = ranks.map(|k| (k as u128, format!("nystrom:rank={k}")));
        let mut specs: Vec<_> =
            degrees.chain(ranks).filter(|(k, _)| *k <= 2 * tokens as u128).collect();
        specs.sort();
        let specs: Vec<String> = specs.into_iter().map(|(_, spec)| spec).collect();
        Self { problem, exact, request, specs: specs.into_iter(), tried: Vec::new(), shared, bound }
    }

    /// The cheapest that reaches `eps`.
    fn cheapest(&mut self, eps: f64) -> Option<(f64, String)> {
        loop {
            let good = self.tried.iter().filter(|t| t.1 <= eps).min_by(|a, b| a.0.total_cmp(&b.0));
            if let Some((flops, _, spec)) = good {
                return Some((*flops, spec.clone()));
            }
            let spec = self.specs.next()?;
            // A method whose assumption fails on this head does not reach the target.
            let Ok(method) = build::<f64>(&spec) else { continue };
            if let Ok(t) = trial(self.problem, self.exact, method.as_ref(), self.request) {
                let flops = t.cost.flops().saturating_sub(self.shared) as f64;
                if flops < self.bound {
                    self.tried.push((flops, t.gradient_error, spec));
                }
            }
        }
    }
}

/// (flops without the decomposition, name) of the smallest rank that reaches `eps`, by bisection.
fn smallest_rank(
    oracle: &OracleTrials<'_>,
    exact: &Gradients<f64>,
    shared: u64,
    eps: f64,
) -> Result<Option<(f64, String)>> {
    let reaches = |rank: usize| -> Result<bool> { Ok(oracle.trial(rank, exact)?.0 <= eps) };
    let (mut low, mut high) = (0, oracle.full_rank());
    if high == 0 || !reaches(high)? {
        return Ok(None);
    }
    while low + 1 < high {
        let middle = low + (high - low) / 2;
        if reaches(middle)? {
            high = middle;
        } else {
            low = middle;
        }
    }
    Ok(Some(((oracle.chain_flops(high)? - shared) as f64, format!("truncated-svd:rank={high}"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Mask;
    use crate::attention::exact::dense;
    use crate::attention::synthetic::SyntheticHead;

    #[test]
    fn a_prefix_is_the_head_of_its_first_tokens() {
        let problem: AttentionProblem<f64> =
            SyntheticHead { rank: 2, mask: Mask::Causal, ..SyntheticHead::new(64, 4) }
                .draw()
                .unwrap();
        let whole = dense::gradients(&problem, Request::All).unwrap();
        let half = dense::gradients(&prefix(&problem, 0.5).unwrap(), Request::All).unwrap();
        assert_eq!(half.output.nrows(), 32);
        // With a causal mask no output depends on later tokens.
        let gap = &half.output - &whole.output.slice(s![..32, ..]);
        assert!(gap.iter().all(|x| x.abs() < 1e-13));
        for bad in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(
                matches!(prefix(&problem, bad), Err(Error::InvalidParam { name, .. }) if name == "part")
            );
        }
    }

    #[test]
    fn the_exact_cost_is_quadratic_and_small_logits_cost_less() {
        let head = SyntheticHead { rank: 2, ..SyntheticHead::new(512, 4) }.at_threshold_ratio(0.2);
        let problem: AttentionProblem<f64> = head.draw().unwrap();
        let costs = prefix_costs(&problem, &[0.01]).unwrap();
        let lengths: Vec<usize> =
            costs.iter().filter(|c| c.way == Way::Exact).map(|c| c.tokens).collect();
        assert_eq!(lengths, [32, 64, 128, 256, 512]);
        let of = |way| exponent_of(&costs, way, 0.01).unwrap();
        let (exact, all) = of(Way::Exact);
        assert!((1.7..2.05).contains(&exact.slope) && all == 5, "{exact:?}");
        for way in [Way::Runnable, Way::Oracle] {
            let (fit, _) = of(way);
            assert!(
                fit.slope < 1.5 && fit.low <= fit.slope && fit.slope <= fit.high,
                "{way:?} {fit:?}"
            );
        }
        for tokens in lengths {
            let flops =
                |way| costs.iter().find(|c| c.way == way && c.tokens == tokens).unwrap().flops;
            assert!(
                flops(Way::Oracle) <= flops(Way::Exact)
                    && flops(Way::Runnable) <= flops(Way::Exact)
            );
        }
    }

    #[test]
    fn short_heads_are_refused() {
        let problem: AttentionProblem<f64> =
            SyntheticHead { rank: 2, ..SyntheticHead::new(31, 4) }.draw().unwrap();
        match prefix_costs(&problem, &[0.1]) {
            Err(Error::InvalidParam { name, value, requirement }) => {
                assert_eq!((name.as_str(), value.as_str()), ("tokens", "31"));
                assert!(requirement.contains("32"), "{requirement}");
            }
            other => panic!("{other:?}"),
        }
    }
}
