//! Exact gradients over tiles: no L x L memory, every product on a tile that fits the cache
//! ([`crate::linalg::tile`]).
//!
//! Pass 1 walks the key tiles of each query tile with the online softmax and leaves O, P R and the
//! row log-sum-exps. Pass 2 recomputes the scores of each tile (\[FA2\] backward) and accumulates
//! dS Z by query rows and dS^T W, P^T N by key rows.
//!
//! Counted floor, per query-key pair and head, in multiply-adds: 2 d_h + 2 d_v for S twice, P V and
//! G V^T, plus the columns of Z, W, R and N (6 r when only the adapters of Q, K and V are asked
//! for, 2 d_h + d_v for all gradients).

mod backward;
mod forward;
mod pass;

use crate::attention::contraction::{Contraction, Products, upstream_gradient};
use crate::attention::gradients::{Gradients, Request};
use crate::attention::problem::{AttentionProblem, Qkv};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::linalg::row_dots::row_dots;
use crate::linalg::tile::Padded;
use ndarray::{Array1, ArrayView2, s};

pub(crate) use backward::{Sides, backward, key_rows};
pub(crate) use forward::forward;
pub(crate) use pass::Pass;

/// Rows and columns of a score tile.
///
/// Results do not depend on the number of threads; they depend on the tile only through rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// Query rows.
    pub queries: usize,
    /// Key columns.
    pub keys: usize,
}

impl Tile {
    /// The default for a number of queries: 512 x 256, fewer rows when that would leave under eight
    /// tiles.
    ///
    /// The two score tiles (S and G V^T) then take 1 MiB in f32, half of the second-level cache of
    /// one core of the development machine. Tall tiles pay: the taller the tile, the more rows
    /// share a tile of keys (measured at L = 4096, d = 64: 512 x 256 is 15% faster than 128 x 256).
    pub fn for_queries(queries: usize) -> Self {
        Tile { queries: queries.div_ceil(8).next_multiple_of(64).clamp(64, 512), keys: 256 }
    }
}

/// Exact gradients with the default tile. See [`gradients_with_tile`].
///
/// # Errors
/// As [`gradients_with_tile`].
pub fn gradients<T: Real>(problem: &AttentionProblem<T>, request: Request) -> Result<Gradients<T>> {
    gradients_with_tile(problem, request, Tile::for_queries(problem.num_queries()))
}

/// Exact gradients by tiles; O(L_q L_k d) operations, O((L_q + L_k) d) memory plus one tile pair
/// and one key-side accumulator for each thread.
///
/// # Errors
/// [`crate::Error::InvalidParam`] for [`Request::Adapters`] on a head without adapters, or an empty
/// tile.
pub fn gradients_with_tile<T: Real>(
    problem: &AttentionProblem<T>,
    request: Request,
    tile: Tile,
) -> Result<Gradients<T>> {
    if tile.queries == 0 || tile.keys == 0 {
        return Err(crate::Error::invalid(
            "tile",
            format!("{tile:?}"),
            "both sides must be at least 1",
        ));
    }
    let mut cost = Cost::default();
    let projected = problem.project(&mut cost);
    let contraction = Contraction::new(problem, &projected, request, &mut cost)?;
    let Qkv { query, key, value } = &projected.qkv;
    let scaled_query = query.mapv(|x| x * T::of(problem.beta()));
    let pass = Pass::new(
        scaled_query.view(),
        key.view(),
        value.view(),
        problem.mask(),
        problem.softmax(),
        tile,
    );
    cost.hold(pass.len());
    let forward = forward(&pass, contraction.value_right.view(), &mut cost);
    let upstream = upstream_gradient(problem, &forward.output);
    let value_left = contraction.value_left(problem, upstream.view(), &mut cost);
    let delta = deltas(upstream.view(), forward.output.view());
    let sides = Sides {
        upstream: upstream.view(),
        log_sum_exp: forward.log_sum_exp.view(),
        delta: delta.view(),
        score_right: Padded::new(contraction.score_right.view()),
        score_left: contraction.score_left.view(),
        value_left: value_left.view(),
    };
    let (score_right, key_side) = backward(&pass, &sides, &mut cost);
    let m = contraction.score_left.ncols();
    let products = Products {
        output: forward.output,
        value_right: forward.value_right,
        score_right,
        score_left: key_rows(key_side.slice(s![.., ..m, ..]), value.nrows()),
        value_left: key_rows(key_side.slice(s![.., m.., ..]), value.nrows()),
    };
    Ok(contraction.finish(problem, &projected, &upstream, products, cost))
}

/// Multiply-adds of a streaming gradient on `pairs` visible query-key pairs, as counted by
/// [`gradients`] apart from the projections, whose cost every method shares. Columns as in
/// [`crate::attention::chained::predicted_multiply_adds`].
pub fn predicted_multiply_adds(
    pairs: u64,
    head_dim: usize,
    value_dim: usize,
    moment_columns: usize,
    value_columns: usize,
) -> f64 {
    pairs as f64 * (2 * head_dim + 2 * value_dim + 2 * moment_columns + value_columns) as f64
}

/// delta_i = G_i . O_i.
pub(crate) fn deltas<T: Real>(upstream: ArrayView2<T>, output: ArrayView2<T>) -> Array1<T> {
    let mut deltas = vec![T::zero(); upstream.nrows()];
    row_dots(&upstream, &output, &mut deltas);
    deltas.into()
}
