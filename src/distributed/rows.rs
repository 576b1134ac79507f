//! Which rows of a head a rank holds: consecutive ones, in nearly equal number.

use crate::attention::AttentionProblem;
use crate::attention::chained::CHUNK;
use crate::attention::problem::{Hidden, Objective, Qkv, Source};
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{ArcArray2, Array2, s};
use std::ops::Range;

/// Rows of `rank` when `rows` are divided among `ranks`: whole chunks of [`CHUNK`] rows where there
/// are enough, so that the exact diagonal of a causal chain is the same for any number of ranks;
/// single rows otherwise. The first ranks hold one more where they do not divide.
///
/// ```
/// use peft_limits::distributed::rows::rows_of;
/// let rows = |length, ranks| (0..ranks).map(|rank| rows_of(length, rank, ranks).unwrap()).collect::<Vec<_>>();
/// assert_eq!(rows(1000, 3), [0..512, 512..768, 768..1000]);
/// assert_eq!(rows(11, 3), [0..4, 4..8, 8..11]);
/// assert!(rows_of(2, 0, 3).is_err());
/// ```
///
/// # Errors
/// [`Error::InvalidParam`] when there are fewer rows than ranks.
pub fn rows_of(rows: usize, rank: usize, ranks: usize) -> Result<Range<usize>> {
    if rows < ranks {
        return Err(Error::invalid(
            "ranks",
            ranks,
            format!("must be at most the number of tokens, {rows}"),
        ));
    }
    let unit = if rows.div_ceil(CHUNK) >= ranks { CHUNK } else { 1 };
    let units = rows.div_ceil(unit);
    let start = |rank: usize| ((rank * (units / ranks) + rank.min(units % ranks)) * unit).min(rows);
    Ok(start(rank)..start(rank + 1))
}

/// The shard of a whole head that `rank` works on.
///
/// # Errors
/// Those of [`rows_of`].
pub fn shard<T: Real>(
    problem: &AttentionProblem<T>,
    rank: usize,
    ranks: usize,
) -> Result<AttentionProblem<T>> {
    let queries = rows_of(problem.num_queries(), rank, ranks)?;
    let keys = rows_of(problem.num_keys(), rank, ranks)?;
    let rows = |a: &Array2<T>, range: &Range<usize>| a.slice(s![range.clone(), ..]).to_owned();
    let source = match problem.source() {
        Source::Projected(qkv) => Source::Projected(Qkv {
            query: rows(&qkv.query, &queries),
            key: rows(&qkv.key, &keys),
            value: rows(&qkv.value, &keys),
        }),
        Source::Hidden(hidden) => {
            let x = &hidden.inputs;
            let query: ArcArray2<T> =
                x.query.slice(s![queries.clone(), ..]).to_owned().into_shared();
            let of_keys = |other: &ArcArray2<T>| match other.as_ptr() == x.query.as_ptr()
                && queries == keys
            {
                true => query.clone(),
                false => other.slice(s![keys.clone(), ..]).to_owned().into_shared(),
            };
            let (key, value) = (of_keys(&x.key), of_keys(&x.value));
            let inputs = Qkv { query, key, value };
            Source::Hidden(Box::new(Hidden {
                inputs,
                projections: hidden.projections.clone(),
                scaling: hidden.scaling,
            }))
        }
    };
    let objective = match problem.objective() {
        Objective::Target(y) => Objective::Target(rows(y, &queries)),
        Objective::UpstreamGradient(g) => Objective::UpstreamGradient(rows(g, &queries)),
    };
    AttentionProblem::new(source, objective, problem.mask(), problem.softmax(), problem.beta())
}
