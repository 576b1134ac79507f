//! Exact gradients on a device over tiles: no L x L tensor, backward by hand (\[FA2\], design 2.1).
//!
//! Pass 1 walks the key tiles of each query tile with the online softmax and leaves O, P R and the
//! row log-sum-exps. Pass 2 recomputes the scores of each tile and accumulates dS Z by query rows
//! and dS^T W, P^T N by key rows. A tile is as large as a memory budget allows, because on a device
//! every operation is a launch of its own.

use super::head::{Counted, Factors, Head, Matrix, Products, rows_of, side_by_side, stacked};
use crate::attention::exact::streaming::Tile;
use crate::attention::{AttentionProblem, Gradients, Mask, Request, SoftmaxKind};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::gpu::{Device, Engine, Opened, Precision, Work};
use crate::linalg::Real;
use burn::tensor::{Bool, Tensor};
use std::ops::Range;

/// How to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Bytes that the score tiles of pass 2 may take together.
    pub tile_bytes: u64,
    /// What products round their operands to.
    pub precision: Precision,
}

impl Default for Options {
    /// 512 MiB of tiles, f32 products.
    fn default() -> Self {
        Self { tile_bytes: 512 << 20, precision: Precision::F32 }
    }
}

/// Tiles alive at once in pass 2: scores (then P), G V^T (then dS), and the result of the operation
/// between them.
const LIVE_TILES: u64 = 3;

/// Side of a causal tile at most: half a diagonal tile is computed in vain, so tiles stay below an
/// eighth of the length, but not below this many rows, where launches would cost more than they
/// save.
const CAUSAL_SIDE: usize = 1024;

impl Options {
    /// The tile of a head of `queries` and `keys` that the budget and a buffer of `max_buffer`
    /// bytes allow.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when not even one score fits.
    pub fn tile(&self, queries: usize, keys: usize, mask: Mask, max_buffer: u64) -> Result<Tile> {
        let elements = (self.tile_bytes / LIVE_TILES).min(max_buffer) / size_of::<f32>() as u64;
        if elements == 0 {
            let needed = u128::from(LIVE_TILES) * size_of::<f32>() as u128;
            let limit = u128::from(self.tile_bytes.min(max_buffer));
            return Err(Error::TooLarge {
                what: "one tile of scores".into(),
                needed,
                limit,
                unit: "bytes",
            });
        }
        let side = match mask {
            Mask::Full => usize::MAX,
            Mask::Causal => CAUSAL_SIDE.max(queries / 8),
        };
        let elements = usize::try_from(elements).unwrap_or(usize::MAX);
        // As square as the head allows: a product reads (1 / rows + 1 / columns) of what it
        // computes.
        let square = elements.isqrt().max(1);
        let keys_tile = keys.min(side).min(square.max(elements / queries.min(side).min(elements)));
        Ok(Tile { queries: queries.min(side).min(elements / keys_tile).max(1), keys: keys_tile })
    }
}

/// Exact gradients of a head, computed on `device`.
///
/// O(L_q L_k d) operations, O((L_q + L_k) d) memory beside the tiles. The entries of `problem` are
/// rounded to f32.
///
/// # Errors
/// [`Error::InvalidParam`] for [`Request::Adapters`] on a head without adapters, or a precision
/// that the device lacks; [`Error::TooLarge`] for a matrix above the device's largest buffer;
/// [`Error::Device`].
pub fn gradients<T: Real>(
    device: &Device,
    problem: &AttentionProblem<T>,
    request: Request,
    options: &Options,
) -> Result<Gradients<f32>> {
    device.run("streaming gradient", Streaming { problem, request, options })
}

struct Streaming<'a, T> {
    problem: &'a AttentionProblem<T>,
    request: Request,
    options: &'a Options,
}

impl<T: Real> Work for Streaming<'_, T> {
    type Output = Gradients<f32>;

    fn run<B: Engine>(self, on: &Opened<B>) -> Result<Gradients<f32>> {
        let Streaming { problem, request, options } = self;
        on.require(options.precision)?;
        let (queries, keys) = (problem.num_queries(), problem.num_keys());
        let tile = options.tile(queries, keys, problem.mask(), on.info.max_buffer_bytes)?;
        let mut count = Counted { precision: options.precision, cost: Cost::default() };
        let head = Head::new(on, problem, request, &mut count)?;
        let factors = head.factors(&mut count);
        let pass = Pass {
            query: head.query.clone() * head.beta,
            key: head.key.clone(),
            value: head.value.clone(),
            mask: problem.mask(),
            softmax: problem.softmax(),
            tile,
        };
        count.cost.hold(2 * tile.queries * tile.keys);
        count.cost.largest_buffer = (tile.queries * tile.keys) as u64;
        let forward = pass.forward(&factors, &mut count);
        let upstream = head.upstream(&forward.output, 0..queries);
        let value_left = head.value_left(&upstream, &mut count);
        let delta = (upstream.clone() * forward.output.clone()).sum_dim(1);
        let sides =
            Sides { upstream: &upstream, log_sum_exp: forward.log_sum_exp, delta, value_left };
        let (score_right, score_left, value_left) = pass.backward(&factors, &sides, &mut count);
        let value_right = forward.value_right;
        let output = forward.output;
        head.finish(
            on,
            Products { output, upstream, value_right, score_right, score_left, value_left },
            count,
        )
    }
}

/// What both passes read; `query` is beta Q.
struct Pass<B: Engine> {
    query: Matrix<B>,
    key: Matrix<B>,
    value: Matrix<B>,
    mask: Mask,
    softmax: SoftmaxKind,
    tile: Tile,
}

struct Forward<B: Engine> {
    output: Matrix<B>,
    value_right: Option<Matrix<B>>,
    /// `L_q x 1`.
    log_sum_exp: Matrix<B>,
}

struct Sides<'a, B: Engine> {
    upstream: &'a Matrix<B>,
    /// Both `L_q x 1`.
    log_sum_exp: Matrix<B>,
    delta: Matrix<B>,
    value_left: Option<Matrix<B>>,
}

/// Score of a masked pair: its exponential is 0 for every row maximum, and no infinity enters a
/// kernel.
pub(super) const MASKED: f32 = -1e37;

fn tiles(length: usize, tile: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length).step_by(tile).map(move |start| start..(start + tile).min(length))
}

impl<B: Engine> Pass<B> {
    /// Key tiles that some query of the tile sees.
    fn key_tiles(&self, queries: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let visible = match self.mask {
            Mask::Full => self.key.dims()[0],
            Mask::Causal => queries.end,
        };
        tiles(self.key.dims()[0], self.tile.keys).take_while(move |keys| keys.start < visible)
    }

    /// beta Q K^T of a tile.
    fn scores(
        &self,
        query: &Matrix<B>,
        rows: &Range<usize>,
        keys: &Range<usize>,
        count: &mut Counted,
    ) -> Matrix<B> {
        let scores = count.product(query.clone(), rows_of(&self.key, keys.clone()).transpose());
        count.cost.exponentials += (rows.len() * keys.len()) as u64;
        count.cost.elementwise += 3 * (rows.len() * keys.len()) as u64;
        if self.mask == Mask::Full || keys.end <= rows.start + 1 {
            return scores;
        }
        let offset = rows.start as i64 - keys.start as i64;
        let hidden =
            Tensor::<B, 2, Bool>::tril_mask([rows.len(), keys.len()], offset, &scores.device());
        scores.mask_fill(hidden, MASKED)
    }

    fn forward(&self, factors: &Factors<B>, count: &mut Counted) -> Forward<B> {
        let (queries, width_v) = (self.query.dims()[0], self.value.dims()[1]);
        // One product for both: [V | R].
        let parts = [Some(self.value.clone()), factors.value_right.clone()];
        let values = side_by_side(parts).unwrap_or_else(|| self.value.clone());
        let (mut outputs, mut log_sum_exp) = (Vec::new(), Vec::new());
        for rows in tiles(queries, self.tile.queries) {
            let query = rows_of(&self.query, rows.clone());
            // Running row maximum, row sum and weighted values.
            let mut state: Option<(Matrix<B>, Matrix<B>, Matrix<B>)> = None;
            for keys in self.key_tiles(&rows) {
                let scores = self.scores(&query, &rows, &keys, count);
                let value = rows_of(&values, keys);
                let largest = scores.clone().max_dim(1);
                state = Some(match state {
                    None => {
                        // `One` has the extra score 0.
                        let one = self.softmax == SoftmaxKind::One;
                        let maximum = if one { largest.clamp_min(0.0) } else { largest };
                        let p = (scores - maximum.clone()).exp();
                        let sum = p.clone().sum_dim(1);
                        let sum = if one { sum + (-maximum.clone()).exp() } else { sum };
                        (maximum, sum, count.product(p, value))
                    }
                    Some((before, sum, weighted)) => {
                        let maximum = before.clone().max_pair(largest);
                        let correction = (before - maximum.clone()).exp();
                        let p = (scores - maximum.clone()).exp();
                        let sum = sum * correction.clone() + p.clone().sum_dim(1);
                        (maximum, sum, weighted * correction + count.product(p, value))
                    }
                });
            }
            // Every query tile sees the first key tile.
            if let Some((maximum, sum, weighted)) = state {
                log_sum_exp.push(Some(maximum + sum.clone().log()));
                outputs.push(Some(weighted / sum));
            }
        }
        let empty = || Tensor::zeros([queries, 1], &self.query.device());
        let output = stacked(outputs).unwrap_or_else(empty);
        let log_sum_exp = stacked(log_sum_exp).unwrap_or_else(empty);
        let extra = output.dims()[1] - width_v;
        let value_right = (extra > 0).then(|| output.clone().narrow(1, width_v, extra));
        Forward { output: output.narrow(1, 0, width_v), value_right, log_sum_exp }
    }

    /// dS Z, dS^T W and P^T N.
    #[allow(clippy::type_complexity)]
    fn backward(
        &self,
        factors: &Factors<B>,
        sides: &Sides<B>,
        count: &mut Counted,
    ) -> (Option<Matrix<B>>, Option<Matrix<B>>, Option<Matrix<B>>) {
        let (queries, keys) = (self.query.dims()[0], self.key.dims()[0]);
        let key_tiles = keys.div_ceil(self.tile.keys);
        let mut score_right = Vec::new();
        let mut score_left: Vec<Option<Matrix<B>>> = vec![None; key_tiles];
        let mut value_left = score_left.clone();
        for rows in tiles(queries, self.tile.queries) {
            let of = |a: &Matrix<B>| rows_of(a, rows.clone());
            let (query, upstream) = (of(&self.query), of(sides.upstream));
            let (log_sum_exp, delta) = (of(&sides.log_sum_exp), of(&sides.delta));
            let (left, value) =
                (factors.score_left.as_ref().map(of), sides.value_left.as_ref().map(of));
            let mut right_sum = None;
            for (index, keys) in self.key_tiles(&rows).enumerate() {
                let p = (self.scores(&query, &rows, &keys, count) - log_sum_exp.clone()).exp();
                if let Some(value) = &value {
                    add(&mut value_left[index], count.transposed_product(p.clone(), value.clone()));
                }
                let (Some(right), Some(left)) = (&factors.score_right, &left) else { continue };
                let upstream_by_value =
                    count.product(upstream.clone(), rows_of(&self.value, keys.clone()).transpose());
                let ds = (upstream_by_value - delta.clone()) * p;
                add(&mut right_sum, count.product(ds.clone(), rows_of(right, keys)));
                add(&mut score_left[index], count.transposed_product(ds, left.clone()));
            }
            score_right.push(right_sum);
        }
        (stacked(score_right), stacked(score_left), stacked(value_left))
    }
}

fn add<B: Engine>(sum: &mut Option<Matrix<B>>, part: Matrix<B>) {
    *sum = Some(match sum.take() {
        Some(before) => before + part,
        None => part,
    });
}
