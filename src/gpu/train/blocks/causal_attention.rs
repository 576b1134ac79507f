//! Grouped-query causal softmax attention by tiles of queries: scores exist one tile at a time.
//!
//! The query heads that share a key/value head are rows of one matrix, so that a tile is one
//! batched product and the gradients of keys and values add up over the group inside it. A tile
//! holds some query positions of every sequence and head against all keys that they may see; how
//! many positions follows from [`TILE_ENTRIES`].

use super::{Matrix, product};
use crate::blocks::causal_attention::AttentionShape;
use crate::gpu::{Engine, Precision};
use burn::tensor::{Int, Tensor};

/// Score entries of a tile over all sequences and heads (64 MiB in f32).
pub const TILE_ENTRIES: usize = 1 << 24;
/// Fewest query positions of a tile.
const LEAST_TILE: usize = 16;
/// Added to the score of a hidden key. A finite number, since shaders have no literal for infinity;
/// f32 absorbs any score into it.
const HIDDEN: f64 = -1e30;

/// Queries of all heads, `(B K) x G x T x d` for K key/value heads of G query heads each.
pub type Queries<B> = Tensor<B, 4>;
/// Keys or values, `(B K) x T x d`.
pub type Keys<B> = Tensor<B, 3>;

/// Query positions of one tile.
pub fn tile_rows(shape: &AttentionShape) -> usize {
    let per_row = (shape.batch * shape.heads * shape.length).max(1);
    (TILE_ENTRIES / per_row).max(LEAST_TILE).min(shape.length.max(1))
}

/// Rows `(B T) x (H d)` as [`Queries`].
pub fn split_queries<B: Engine>(x: Matrix<B>, shape: &AttentionShape) -> Queries<B> {
    let AttentionShape { batch, length, heads, kv_heads, head_dim } = *shape;
    x.reshape([batch, length, heads, head_dim]).swap_dims(1, 2).reshape([
        batch * kv_heads,
        heads / kv_heads,
        length,
        head_dim,
    ])
}

/// [`Queries`] as rows `(B T) x (H d)`.
pub fn join_queries<B: Engine>(x: Queries<B>, shape: &AttentionShape) -> Matrix<B> {
    let AttentionShape { batch, length, heads, head_dim, .. } = *shape;
    x.reshape([batch, heads, length, head_dim])
        .swap_dims(1, 2)
        .reshape([batch * length, heads * head_dim])
}

/// Rows `(B T) x (K d)` as [`Keys`].
pub fn split_keys<B: Engine>(x: Matrix<B>, shape: &AttentionShape) -> Keys<B> {
    let AttentionShape { batch, length, kv_heads, head_dim, .. } = *shape;
    x.reshape([batch, length, kv_heads, head_dim]).swap_dims(1, 2).reshape([
        batch * kv_heads,
        length,
        head_dim,
    ])
}

/// [`Keys`] as rows `(B T) x (K d)`.
pub fn join_keys<B: Engine>(x: Keys<B>, shape: &AttentionShape) -> Matrix<B> {
    let AttentionShape { batch, length, kv_heads, head_dim, .. } = *shape;
    x.reshape([batch, kv_heads, length, head_dim])
        .swap_dims(1, 2)
        .reshape([batch * length, kv_heads * head_dim])
}

/// Which keys may be seen besides the causal rule.
#[derive(Debug, Clone)]
pub struct Padding<B: Engine> {
    /// `(B K) x 1 x T`, 0 for a key and [`HIDDEN`] for padding.
    bias: Tensor<B, 3>,
}

impl<B: Engine> Padding<B> {
    /// From the mask of a batch, false for padding.
    pub fn upload(
        mask: ndarray::ArrayView2<bool>,
        shape: &AttentionShape,
        device: &B::Device,
    ) -> Self {
        let mut bias = Vec::with_capacity(shape.batch * shape.kv_heads * shape.length);
        for row in mask.rows() {
            for _ in 0..shape.kv_heads {
                bias.extend(row.iter().map(|&seen| if seen { 0.0f32 } else { HIDDEN as f32 }));
            }
        }
        let data =
            burn::tensor::TensorData::new(bias, [shape.batch * shape.kv_heads, 1, shape.length]);
        Self { bias: Tensor::from_data(data, device) }
    }
}

impl<B: Engine> Padding<B> {
    /// Numbers held.
    pub fn elements(&self) -> usize {
        self.bias.shape().num_elements()
    }
}

/// One tile's query positions and the keys before their end.
struct Tile {
    start: usize,
    rows: usize,
    keys: usize,
}

fn tiles(shape: &AttentionShape, step: usize) -> Vec<Tile> {
    let starts = (0..shape.length).step_by(step);
    starts
        .map(|start| (start, (start + step).min(shape.length)))
        .map(|(start, end)| Tile { start, rows: end - start, keys: end })
        .collect()
}

/// A tile's scores with the hidden ones pushed away: scale Q K^T + bias, `(B K) x (G rows) x keys`.
fn tile_scores<B: Engine>(
    query: &Keys<B>,
    key: &Keys<B>,
    tile: &Tile,
    group: usize,
    padding: Option<&Padding<B>>,
    scale: f64,
    precision: Precision,
) -> Tensor<B, 3> {
    let device = query.device();
    let positions =
        Tensor::<B, 1, Int>::arange(tile.start as i64..(tile.start + tile.rows) as i64, &device);
    let positions: Tensor<B, 3, Int> = positions.reshape([1, tile.rows, 1]).repeat_dim(1, group);
    let keys: Tensor<B, 3, Int> =
        Tensor::<B, 1, Int>::arange(0..tile.keys as i64, &device).reshape([1, 1, tile.keys]);
    let shape = [1, group * tile.rows, tile.keys];
    let future = keys.expand(shape).greater(positions.expand(shape)).float().mul_scalar(HIDDEN);
    let scores =
        product(query.clone(), key.clone().swap_dims(1, 2), precision).mul_scalar(scale) + future;
    match padding {
        Some(padding) => scores + padding.bias.clone().narrow(2, 0, tile.keys),
        None => scores,
    }
}

/// What [`causal_attention_forward`] leaves for its backward.
#[derive(Debug, Clone)]
pub struct AttentionSaved<B: Engine> {
    /// Queries after rotary embedding.
    pub query: Queries<B>,
    /// Keys after rotary embedding.
    pub key: Keys<B>,
    /// Values.
    pub value: Keys<B>,
    /// Log-sum-exp of the scores, `(B K) x G x T x 1`.
    pub log_sum_exp: Queries<B>,
}

/// O = softmax(scale Q K^T + mask) V for every sequence and head; returns (O, log-sum-exp), both as
/// [`Queries`]. `tile` is the number of query positions of a tile ([`tile_rows`]).
///
/// A query that sees no key (padding on the left) has output 0 and passes no gradient, as on the
/// CPU.
pub fn causal_attention_forward<B: Engine>(
    query: &Queries<B>,
    key: &Keys<B>,
    value: &Keys<B>,
    shape: &AttentionShape,
    padding: Option<&Padding<B>>,
    scale: f64,
    tile: usize,
    precision: Precision,
) -> (Queries<B>, Queries<B>) {
    let [outer, group, _, head_dim] = query.dims();
    let (mut outputs, mut sums) = (Vec::new(), Vec::new());
    for tile in tiles(shape, tile) {
        let q = query.clone().narrow(2, tile.start, tile.rows).reshape([
            outer,
            group * tile.rows,
            head_dim,
        ]);
        let (k, v) = (key.clone().narrow(1, 0, tile.keys), value.clone().narrow(1, 0, tile.keys));
        let scores = tile_scores(&q, &k, &tile, group, padding, scale, precision);
        let largest = scores.clone().max_dim(2);
        let weights = (scores - largest.clone()).exp();
        let sum = weights.clone().sum_dim(2);
        let mut output = product(weights, v, precision) * sum.clone().recip();
        let mut log_sum_exp = largest.clone() + sum.log();
        if padding.is_some() {
            let blind = largest.lower_elem(HIDDEN / 2.0).float();
            output = output * blind.clone().neg().add_scalar(1.0);
            // exp(s - lse) = 0 in backward.
            log_sum_exp = log_sum_exp + blind.mul_scalar(-3.0 * HIDDEN);
        }
        outputs.push(output.reshape([outer, group, tile.rows, head_dim]));
        sums.push(log_sum_exp.reshape([outer, group, tile.rows, 1]));
    }
    (concatenate(outputs), concatenate(sums))
}

/// Tiles along the positions; a single one is not copied.
fn concatenate<B: Engine>(mut tiles: Vec<Queries<B>>) -> Queries<B> {
    if tiles.len() == 1 { tiles.remove(0) } else { Tensor::cat(tiles, 2) }
}

/// Gradients (dQ, dK, dV) for the upstream gradient G = dO; `output` is the forward's.
///
/// Per tile, with P = exp(scale Q K^T - lse) and delta_i = G_i . O_i: dS = P o (G V^T - delta),
/// dQ = scale dS K, dK += scale dS^T Q, dV += P^T G.
pub fn causal_attention_backward<B: Engine>(
    upstream: Queries<B>,
    saved: AttentionSaved<B>,
    output: Queries<B>,
    shape: &AttentionShape,
    padding: Option<&Padding<B>>,
    scale: f64,
    tile: usize,
    precision: Precision,
) -> (Queries<B>, Keys<B>, Keys<B>) {
    let [outer, group, _, head_dim] = saved.query.dims();
    let delta = (upstream.clone() * output).sum_dim(3);
    let mut dqueries = Vec::new();
    let mut sums: Option<(Keys<B>, Keys<B>)> = None;
    // The last tile sees every key: its products start the sums, and the others are added to their
    // first rows.
    for tile in tiles(shape, tile).into_iter().rev() {
        let rows = group * tile.rows;
        let part = |x: &Queries<B>, width: usize| {
            x.clone().narrow(2, tile.start, tile.rows).reshape([outer, rows, width])
        };
        let (q, g) = (part(&saved.query, head_dim), part(&upstream, head_dim));
        let (shift, delta) = (part(&saved.log_sum_exp, 1), part(&delta, 1));
        let (k, v) = (
            saved.key.clone().narrow(1, 0, tile.keys),
            saved.value.clone().narrow(1, 0, tile.keys),
        );
        let probs = (tile_scores(&q, &k, &tile, group, padding, scale, precision) - shift).exp();
        let dvalue = product(probs.clone().swap_dims(1, 2), g.clone(), precision);
        let dscores = (product(g, v.swap_dims(1, 2), precision) - delta) * probs;
        let dkey = product(dscores.clone().swap_dims(1, 2), q, precision).mul_scalar(scale);
        let dquery = product(dscores, k, precision).mul_scalar(scale);
        dqueries.push(dquery.reshape([outer, group, tile.rows, head_dim]));
        sums = Some(match sums {
            None => (dkey, dvalue),
            Some((keys, values)) => {
                (add_to_first_rows(keys, dkey), add_to_first_rows(values, dvalue))
            }
        });
    }
    dqueries.reverse();
    let (dkey, dvalue) = sums.unwrap_or_else(|| (saved.key.zeros_like(), saved.value.zeros_like()));
    (concatenate(dqueries), dkey, dvalue)
}

/// sum[:, ..rows, :] += part.
fn add_to_first_rows<B: Engine>(sum: Keys<B>, part: Keys<B>) -> Keys<B> {
    let [outer, rows, width] = part.dims();
    let first = sum.clone().narrow(1, 0, rows) + part;
    sum.slice_assign([0..outer, 0..rows, 0..width], first)
}
