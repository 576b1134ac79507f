//! Grouped-query causal softmax attention by tiles: scores exist one tile at a time.

use super::{numbers_mut, require_shape};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::attention_tile::{
    OnlineSoftmax, ROW_STATISTICS, front, hide_future, key_tiles, softmax_backward_tile,
};
use crate::linalg::gemm::multiply;
use crate::linalg::row_dots::row_dots;
use crate::linalg::{Real, Scratch};
use crate::streams::mix;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

/// Query rows of a tile.
const QUERY_TILE: usize = 64;
/// Key rows of a tile.
const KEY_TILE: usize = 256;

/// Sizes of a batch of attention heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// B, sequences.
    pub batch: usize,
    /// T, tokens of a sequence.
    pub length: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// d, width of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    fn check<T>(
        &self,
        op: &'static str,
        query: &ArrayView2<T>,
        keys: [(&str, &ArrayView2<T>); 2],
    ) -> Result<()> {
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let requirement = format!("must divide num_attention_heads = {}", self.heads);
            return Err(Error::invalid("num_key_value_heads", self.kv_heads, requirement));
        }
        let rows = self.batch * self.length;
        require_shape(op, "query", query, (rows, self.heads * self.head_dim))?;
        for (name, array) in keys {
            require_shape(op, name, array, (rows, self.kv_heads * self.head_dim))?;
        }
        Ok(())
    }

    /// Multiply-adds of one product of all score tiles with a width-d matrix.
    fn tile_products(&self, ahead: usize) -> u64 {
        let mut entries = 0;
        for start in (0..self.length).step_by(QUERY_TILE) {
            let end = (start + QUERY_TILE).min(self.length);
            entries += (end - start) * end.saturating_add(ahead).min(self.length);
        }
        (self.batch * self.heads * entries * self.head_dim) as u64
    }

    fn head<'a, T>(
        &self,
        array: &'a ArrayView2<T>,
        batch: usize,
        head: usize,
    ) -> ArrayView2<'a, T> {
        let (rows, columns) = (batch * self.length, head * self.head_dim);
        array.slice(s![rows..rows + self.length, columns..columns + self.head_dim])
    }
}

/// Which keys a query sees.
///
/// The default is causal attention without padding. A query that sees no key has output 0 and
/// passes no gradient (frameworks differ there; no counted position depends on it).
#[derive(Debug, Clone, Copy, Default)]
pub struct Visibility<'a> {
    /// `B x T`, false for keys that no query may see (padding); every key when absent.
    pub keys: Option<ArrayView2<'a, bool>>,
    /// Tokens after its own that a query sees: 0 is causal, T - 1 bidirectional.
    pub ahead: usize,
    /// Keys up to its own that a query sees, its own among them; all of them when absent.
    pub window: Option<usize>,
    /// `B x T`, position of the first token of each token's document, before which it sees nothing.
    pub starts: Option<ArrayView2<'a, u32>>,
}

/// How scores follow from queries and keys.
#[derive(Debug, Clone, Copy)]
pub struct Scores {
    /// Factor of Q K^T.
    pub scale: f64,
    /// c of c tanh(s / c), applied to the scores before the mask.
    pub cap: Option<f64>,
    /// Random errors of the scores, as rounding them makes.
    pub errors: Option<ScoreErrors>,
}

/// Each score is multiplied by 1 + `size` u, u uniform in (-1, 1) and a function of the seed and
/// the score's place.
#[derive(Debug, Clone, Copy)]
pub struct ScoreErrors {
    /// Largest relative error.
    pub size: f64,
    /// Seed of the errors.
    pub seed: u64,
}

impl ScoreErrors {
    /// The factor of the score of one query and key; `head` counts over sequences and heads.
    fn factor(self, head: usize, query: usize, key: usize) -> f64 {
        let place = mix(self.seed
            ^ mix(head as u64 ^ mix(query as u64 ^ mix(key as u64 ^ 0x9e37_79b9_7f4a_7c15))));
        // 53 bits to [0, 2), then to [-1, 1).
        1.0 + self.size * ((place >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
    }
}

impl From<f64> for Scores {
    fn from(scale: f64) -> Self {
        Self { scale, cap: None, errors: None }
    }
}

impl Scores {
    /// Errors of a tile of scores that begins at (query, key).
    fn disturb<T: Real>(
        &self,
        scores: &mut ArrayViewMut2<T>,
        head: usize,
        (query, key): (usize, usize),
    ) {
        if let Some(errors) = self.errors {
            scores
                .indexed_iter_mut()
                .for_each(|((i, j), s)| *s *= T::of(errors.factor(head, query + i, key + j)));
        }
    }

    /// s becomes c tanh(s / c); `slope`, if given, receives the derivative there.
    fn apply_cap<T: Real>(
        &self,
        scores: &mut ArrayViewMut2<T>,
        slope: Option<&mut ArrayViewMut2<T>>,
    ) {
        let Some(cap) = self.cap.map(T::of) else { return };
        match slope {
            None => scores.mapv_inplace(|s| cap * (s / cap).tanh()),
            Some(slope) => ndarray::Zip::from(scores).and(slope).for_each(|s, d| {
                let t = (*s / cap).tanh();
                *s = cap * t;
                *d = T::one() - t * t;
            }),
        }
    }
}

impl Visibility<'_> {
    fn check(&self, op: &'static str, shape: &AttentionShape) -> Result<()> {
        let expected = (shape.batch, shape.length);
        if self.window == Some(0) {
            return Err(Error::invalid(
                "sliding_window",
                0,
                "must be at least 1: a query sees its own key",
            ));
        }
        if let Some(starts) = self.starts.filter(|starts| starts.dim() != expected) {
            return Err(Error::shape(op, "document starts", expected, starts.dim()));
        }
        match &self.keys {
            Some(keys) if keys.dim() != expected => {
                Err(Error::shape(op, "attention_mask", expected, keys.dim()))
            }
            _ => Ok(()),
        }
    }

    /// First tile of keys that queries from `start` on can see.
    fn key_start(&self, start: usize) -> usize {
        let first = self.window.map_or(0, |window| (start + 1).saturating_sub(window));
        first / KEY_TILE * KEY_TILE
    }

    /// End of the keys that queries before `end` can see.
    fn key_end(&self, end: usize, length: usize) -> usize {
        end.saturating_add(self.ahead).min(length)
    }

    /// Sets entry (i, j) of a score tile to -inf where key `key_start + j` is hidden from query
    /// `query_start + i`.
    fn hide<T: Real>(
        &self,
        scores: &mut ArrayViewMut2<T>,
        shape: &AttentionShape,
        batch: usize,
        query_start: usize,
        key_start: usize,
    ) {
        hide_future(scores, query_start + self.ahead.min(shape.length), key_start);
        if self.window.is_some() || self.starts.is_some() {
            for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
                let query = query_start + i;
                let first = self.window.map_or(0, |window| (query + 1).saturating_sub(window));
                let start = self.starts.map_or(0, |starts| starts[[batch, query]] as usize);
                let hidden = first.max(start).saturating_sub(key_start).min(row.len());
                row.slice_mut(s![..hidden]).fill(T::neg_infinity());
            }
        }
        let Some(keys) = &self.keys else { return };
        for (j, mut column) in scores.columns_mut().into_iter().enumerate() {
            if !keys[[batch, key_start + j]] {
                column.fill(T::neg_infinity());
            }
        }
    }
}

/// A `(B T) x (heads d)` array as disjoint `T x d` views, ordered by sequence, then head.
fn split_heads<'a, T>(
    array: &'a mut Array2<T>,
    length: usize,
    head_dim: usize,
) -> Vec<ArrayViewMut2<'a, T>> {
    let mut views = Vec::new();
    for mut sequence in array.axis_chunks_iter_mut(Axis(0), length.max(1)) {
        while sequence.ncols() > 0 {
            let (head, rest) = sequence.split_at(Axis(1), head_dim);
            views.push(head);
            sequence = rest;
        }
    }
    views
}

/// O = softmax(scale Q K^T + mask) V, the mask being `visible`, for every sequence and head;
/// returns (O, log-sum-exp).
///
/// Shapes: query `(B T) x (H d)`, key and value `(B T) x (H_kv d)`, O as query, log-sum-exp `(B H)
/// x T` in nats. Backward needs Q, K, V, O and the log-sum-exp. Work O(B H T^2 d / 2); memory
/// beyond the results is one `64 x 256` tile per thread (\[FA2\], with an online softmax).
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] if the heads do not form equal groups.
pub fn causal_attention_forward<T: Real>(
    query: ArrayView2<T>,
    key: ArrayView2<T>,
    value: ArrayView2<T>,
    shape: AttentionShape,
    visible: Visibility<'_>,
    scores: impl Into<Scores>,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Result<(Array2<T>, Array2<T>)> {
    let scoring = scores.into();
    shape.check("causal_attention_forward", &query, [("key", &key), ("value", &value)])?;
    visible.check("causal_attention_forward", &shape)?;
    let (length, head_dim) = (shape.length, shape.head_dim);
    cost.multiply_adds += 2 * shape.tile_products(visible.ahead);
    cost.exponentials += shape.tile_products(visible.ahead) / (head_dim as u64).max(1);
    cost.hold(QUERY_TILE * (KEY_TILE + head_dim));
    let mut output = scratch.array(query.dim());
    let mut log_sum_exp = scratch.array((shape.batch * shape.heads, length));
    let group = shape.heads / shape.kv_heads;
    let mut tasks = Vec::new();
    let lse_rows = numbers_mut(&mut log_sum_exp).chunks_mut(length.max(1));
    for (index, (head, lse)) in
        split_heads(&mut output, length, head_dim).into_iter().zip(lse_rows).enumerate()
    {
        let mut rest = head;
        for (tile, lse) in lse.chunks_mut(QUERY_TILE).enumerate() {
            let (now, later) = rest.split_at(Axis(0), lse.len());
            tasks.push((index, tile * QUERY_TILE, now, lse));
            rest = later;
        }
    }
    let tiles = || [KEY_TILE, head_dim].map(|n| vec![T::zero(); QUERY_TILE * n]);
    tasks.into_par_iter().for_each_init(tiles, |[scores, sums], (index, start, mut out, lse)| {
        let (batch, head) = (index / shape.heads, index % shape.heads);
        let rows = lse.len();
        let q = shape.head(&query, batch, head);
        let q = q.slice(s![start..start + rows, ..]);
        let k = shape.head(&key, batch, head / group);
        let v = shape.head(&value, batch, head / group);
        let mut statistics = [T::zero(); QUERY_TILE * ROW_STATISTICS];
        let mut softmax = OnlineSoftmax::new(&mut statistics, rows, false);
        let mut acc = front(sums, rows, head_dim);
        let begin = visible.key_start(start);
        for keys in key_tiles(begin..visible.key_end(start + rows, length), KEY_TILE) {
            let (first, range) = (keys.start == begin, s![keys.clone(), ..]);
            let mut tile = front(scores, rows, keys.len());
            multiply(T::of(scoring.scale), &q, &k.slice(range).t(), T::zero(), &mut tile);
            scoring.disturb(&mut tile, index, (start, keys.start));
            scoring.apply_cap(&mut tile, None);
            visible.hide(&mut tile, &shape, batch, start, keys.start);
            softmax.absorb(tile.view_mut(), acc.view_mut(), first);
            multiply(
                T::one(),
                &tile.view(),
                &v.slice(range),
                if first { T::zero() } else { T::one() },
                &mut acc,
            );
        }
        softmax.finish(acc.view_mut(), lse);
        out.assign(&acc);
    });
    cost.release(QUERY_TILE * (KEY_TILE + head_dim));
    Ok((output, log_sum_exp))
}

/// What [`causal_attention_forward`] leaves for its backward.
pub struct AttentionCache<'a, T> {
    /// Queries after rotary embedding.
    pub query: ArrayView2<'a, T>,
    /// Keys after rotary embedding.
    pub key: ArrayView2<'a, T>,
    /// Values.
    pub value: ArrayView2<'a, T>,
    /// Output O.
    pub output: ArrayView2<'a, T>,
    /// Log-sum-exp, `(B H) x T`.
    pub log_sum_exp: ArrayView2<'a, T>,
}

/// Gradients (dQ, dK, dV) for the upstream gradient G = dO.
///
/// Per tile, with P = exp(scale Q K^T - lse) and delta_i = G_i . O_i: dS = scale P o (G V^T -
/// delta), dQ = dS K, dK = dS^T Q, dV = P^T G; keys and values add up over the query heads of their
/// group. Parallel over (sequence, key/value head), each writing its own slices.
///
/// # Errors
/// As [`causal_attention_forward`].
pub fn causal_attention_backward<T: Real>(
    upstream: ArrayView2<T>,
    cache: &AttentionCache<'_, T>,
    shape: AttentionShape,
    visible: Visibility<'_>,
    scores: impl Into<Scores>,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Result<(Array2<T>, Array2<T>, Array2<T>)> {
    let scoring = scores.into();
    let op = "causal_attention_backward";
    shape.check(op, &cache.query, [("key", &cache.key), ("value", &cache.value)])?;
    visible.check(op, &shape)?;
    require_shape(op, "upstream", &upstream, cache.query.dim())?;
    require_shape(op, "output", &cache.output, cache.query.dim())?;
    require_shape(
        op,
        "log_sum_exp",
        &cache.log_sum_exp,
        (shape.batch * shape.heads, shape.length),
    )?;
    let (length, head_dim, group) = (shape.length, shape.head_dim, shape.heads / shape.kv_heads);
    let scale = T::of(scoring.scale);
    cost.multiply_adds += 5 * shape.tile_products(visible.ahead);
    cost.exponentials += shape.tile_products(visible.ahead) / (head_dim as u64).max(1);
    cost.hold(2 * QUERY_TILE * KEY_TILE);
    let mut dquery = scratch.array(cache.query.dim());
    let mut dkey = scratch.array(cache.key.dim());
    let mut dvalue = scratch.array(cache.key.dim());
    let mut queries = split_heads(&mut dquery, length, head_dim).into_iter();
    let keys = split_heads(&mut dkey, length, head_dim).into_iter();
    let values = split_heads(&mut dvalue, length, head_dim).into_iter();
    let tasks: Vec<_> = keys
        .zip(values)
        .enumerate()
        .map(|(index, (dk, dv))| (index, queries.by_ref().take(group).collect::<Vec<_>>(), dk, dv))
        .collect();
    let tile = || vec![T::zero(); QUERY_TILE * KEY_TILE];
    let tiles = || (tile(), tile(), if scoring.cap.is_some() { tile() } else { Vec::new() });
    tasks.into_par_iter().for_each_init(
        tiles,
        |(scores, products, slopes), (index, dqs, mut dk, mut dv)| {
            // With a window the last queries do not see every key, so theirs are not the first sums
            // everywhere.
            let windowed = visible.window.is_some();
            if windowed {
                dk.fill(T::zero());
                dv.fill(T::zero());
            }
            let (batch, kv_head) = (index / shape.kv_heads, index % shape.kv_heads);
            let k = shape.head(&cache.key, batch, kv_head);
            let v = shape.head(&cache.value, batch, kv_head);
            for (member, mut dq) in dqs.into_iter().enumerate() {
                let head = kv_head * group + member;
                let (q, g) =
                    (shape.head(&cache.query, batch, head), shape.head(&upstream, batch, head));
                let o = shape.head(&cache.output, batch, head);
                let lse = cache.log_sum_exp.row(batch * shape.heads + head);
                // From the last queries, which see every key: theirs are the first sums of dK and
                // dV.
                for start in (0..length).step_by(QUERY_TILE).rev() {
                    let end = (start + QUERY_TILE).min(length);
                    let rows = end - start;
                    let first = if member == 0 && end == length && !windowed {
                        T::zero()
                    } else {
                        T::one()
                    };
                    let (q, g) = (q.slice(s![start..end, ..]), g.slice(s![start..end, ..]));
                    let (mut shift, mut delta) = ([T::zero(); QUERY_TILE], [T::zero(); QUERY_TILE]);
                    for i in 0..rows {
                        shift[i] = lse[start + i];
                    }
                    row_dots(&g, &o.slice(s![start..end, ..]), &mut delta[..rows]);
                    // dS comes out scaled.
                    delta.iter_mut().for_each(|d| *d *= scale);
                    let mut dq = dq.slice_mut(s![start..end, ..]);
                    let begin = visible.key_start(start);
                    for keys in key_tiles(begin..visible.key_end(end, length), KEY_TILE) {
                        let (key_start, width, range) = (keys.start, keys.len(), s![keys, ..]);
                        let mut p = front(scores, rows, width);
                        let mut ds = front(products, rows, width);
                        multiply(scale, &q, &k.slice(range).t(), T::zero(), &mut p);
                        scoring.disturb(&mut p, batch * shape.heads + head, (start, key_start));
                        if scoring.cap.is_some() {
                            scoring.apply_cap(&mut p, Some(&mut front(slopes, rows, width)));
                        }
                        visible.hide(&mut p, &shape, batch, start, key_start);
                        multiply(scale, &g, &v.slice(range).t(), T::zero(), &mut ds);
                        softmax_backward_tile(
                            p.view_mut(),
                            ds.view_mut(),
                            &shift[..rows],
                            &delta[..rows],
                        );
                        if scoring.cap.is_some() {
                            ds *= &front(slopes, rows, width);
                        }
                        multiply(T::one(), &p.t(), &g, first, &mut dv.slice_mut(range));
                        multiply(T::one(), &ds.t(), &q, first, &mut dk.slice_mut(range));
                        let keep = if key_start == begin { T::zero() } else { T::one() };
                        multiply(T::one(), &ds.view(), &k.slice(range), keep, &mut dq);
                    }
                }
            }
        },
    );
    cost.release(2 * QUERY_TILE * KEY_TILE);
    Ok((dquery, dkey, dvalue))
}
