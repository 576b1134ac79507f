//! Grouped-query causal softmax attention by tiles: scores exist one tile at a time.

use super::require_shape;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::elementwise::{online_softmax_tile, scale_rows, softmax_backward_tile};
use crate::linalg::panel::{PanelProduct, panel_product};
use crate::linalg::{Real, Scratch};
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
    fn check<T>(&self, op: &'static str, query: &ArrayView2<T>, keys: [(&str, &ArrayView2<T>); 2]) -> Result<()> {
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

    /// Multiply-adds of one product of all causal score tiles with a width-d matrix.
    fn tile_products(&self) -> u64 {
        let mut entries = 0;
        for start in (0..self.length).step_by(QUERY_TILE) {
            let end = (start + QUERY_TILE).min(self.length);
            entries += (end - start) * end;
        }
        (self.batch * self.heads * entries * self.head_dim) as u64
    }

    /// Widths of the rows of Q and of K, V.
    fn widths(&self) -> (usize, usize) {
        (self.heads * self.head_dim, self.kv_heads * self.head_dim)
    }

    /// Every key/value head of a contiguous `(B T) x (H_kv d)` array transposed: d rows of T entries per head.
    fn transposed_heads<T: Real>(&self, array: &[T], scratch: &mut Scratch<T>) -> Array2<T> {
        let (length, head_dim, width) = (self.length, self.head_dim, self.widths().1);
        let mut transposed = scratch.array((self.batch * width, length));
        let heads = transposed.as_slice_mut().unwrap_or(&mut []).par_chunks_mut((head_dim * length).max(1));
        heads.enumerate().for_each(|(index, head)| {
            let start = index / self.kv_heads * length * width + index % self.kv_heads * head_dim;
            for t in 0..length {
                let row = &array[start + t * width..][..head_dim];
                for (c, &x) in row.iter().enumerate() {
                    head[c * length + t] = x;
                }
            }
        });
        transposed
    }
}

/// A `(B T) x (heads d)` array as disjoint `T x d` views, ordered by sequence, then head.
fn split_heads<'a, T>(array: &'a mut Array2<T>, length: usize, head_dim: usize) -> Vec<ArrayViewMut2<'a, T>> {
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

/// Sets entry (i, j) of a score tile to -inf where key `key_start + j` comes after query `query_start + i`.
fn mask_future<T: Real>(scores: &mut ArrayViewMut2<T>, query_start: usize, key_start: usize) {
    let width = scores.ncols();
    if key_start + width <= query_start + 1 {
        return;
    }
    for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
        let visible = (query_start + i + 1).saturating_sub(key_start).min(width);
        row.slice_mut(s![visible..]).fill(T::neg_infinity());
    }
}

/// Dot product in eight independent sums.
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::zero(); 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let mut rest = T::zero();
    for (&x, &y) in a_chunks.remainder().iter().zip(b_chunks.remainder()) {
        rest += x * y;
    }
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.into_iter().fold(rest, |total, sum| total + sum)
}

fn tile_view<'a, T>(buffer: &'a mut [T], rows: usize, columns: usize) -> ArrayViewMut2<'a, T> {
    match ArrayViewMut2::from_shape((rows, columns), &mut buffer[..rows * columns]) {
        Ok(view) => view,
        Err(_) => unreachable!("the slice has rows * columns entries"),
    }
}

/// O = softmax(scale Q K^T + causal mask) V for every sequence and head; returns (O, log-sum-exp).
///
/// Shapes: query `(B T) x (H d)`, key and value `(B T) x (H_kv d)`, O as query, log-sum-exp `(B H) x T` in nats.
/// Backward needs Q, K, V, O and the log-sum-exp. Work O(B H T^2 d / 2); memory beyond the results is one
/// `64 x 256` tile per thread (\[FA2\], with an online softmax).
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] if the heads do not form equal groups.
pub fn causal_attention_forward<T: Real>(
    query: ArrayView2<T>,
    key: ArrayView2<T>,
    value: ArrayView2<T>,
    shape: AttentionShape,
    scale: f64,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Result<(Array2<T>, Array2<T>)> {
    shape.check("causal_attention_forward", &query, [("key", &key), ("value", &value)])?;
    let (length, head_dim) = (shape.length, shape.head_dim);
    cost.multiply_adds += 2 * shape.tile_products();
    cost.exponentials += shape.tile_products() / (head_dim as u64).max(1);
    cost.hold(QUERY_TILE * (KEY_TILE + head_dim));
    let mut output = scratch.array(query.dim());
    let mut log_sum_exp = scratch.array((shape.batch * shape.heads, length));
    let group = shape.heads / shape.kv_heads;
    let mut tasks = Vec::new();
    let lse_rows = log_sum_exp.as_slice_mut().unwrap_or(&mut []).chunks_mut(length.max(1));
    for (index, (head, lse)) in split_heads(&mut output, length, head_dim).into_iter().zip(lse_rows).enumerate() {
        let mut rest = head;
        for (tile, lse) in lse.chunks_mut(QUERY_TILE).enumerate() {
            let (now, later) = rest.split_at(Axis(0), lse.len());
            tasks.push((index, tile * QUERY_TILE, now, lse));
            rest = later;
        }
    }
    let (query, key, value) = (query.as_standard_layout(), key.as_standard_layout(), value.as_standard_layout());
    let (queries, values) = (query.as_slice().unwrap_or(&[]), value.as_slice().unwrap_or(&[]));
    let key_t = shape.transposed_heads(key.as_slice().unwrap_or(&[]), scratch);
    let keys_t = key_t.as_slice().unwrap_or(&[]);
    let (query_width, kv_width) = shape.widths();
    let tiles = || (vec![T::zero(); QUERY_TILE * KEY_TILE], vec![T::zero(); QUERY_TILE * head_dim]);
    tasks.into_par_iter().for_each_init(tiles, |(scores, sums), (index, start, mut out, lse)| {
        let (batch, head) = (index / shape.heads, index % shape.heads);
        let (rows, kv_head) = (lse.len(), head / group);
        let q = &queries[(batch * length + start) * query_width + head * head_dim..];
        let k_t = &keys_t[(batch * shape.kv_heads + kv_head) * head_dim * length..];
        let v = &values[batch * length * kv_width + kv_head * head_dim..];
        let (mut maximum, mut sum) = ([T::neg_infinity(); QUERY_TILE], [T::zero(); QUERY_TILE]);
        let mut factor = [T::one(); QUERY_TILE];
        for key_start in (0..start + rows).step_by(KEY_TILE) {
            let width = KEY_TILE.min(start + rows - key_start);
            panel_product(PanelProduct {
                alpha: T::of(scale),
                a: q,
                a_strides: (query_width, 1),
                b: &k_t[key_start..],
                b_stride: length,
                c: &mut scores[..rows * width],
                add: false,
                shape: (rows, head_dim, width),
            });
            let mut tile = tile_view(scores, rows, width);
            mask_future(&mut tile, start, key_start);
            online_softmax_tile(tile, &mut maximum[..rows], &mut sum[..rows], &mut factor[..rows]);
            if key_start > 0 {
                scale_rows(tile_view(sums, rows, head_dim), &factor[..rows]);
            }
            panel_product(PanelProduct {
                alpha: T::one(),
                a: scores,
                a_strides: (width, 1),
                b: &v[key_start * kv_width..],
                b_stride: kv_width,
                c: &mut sums[..rows * head_dim],
                add: key_start > 0,
                shape: (rows, width, head_dim),
            });
        }
        let acc = tile_view(sums, rows, head_dim);
        for i in 0..rows {
            let inverse = T::one() / sum[i];
            out.row_mut(i).zip_mut_with(&acc.row(i), |o, &a| *o = a * inverse);
            lse[i] = maximum[i] + sum[i].ln();
        }
    });
    scratch.keep(key_t);
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
/// Per tile, with P = exp(scale Q K^T - lse) and delta_i = G_i . O_i:
/// dS = P o (G V^T - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T G; keys and values add up over the
/// query heads of their group. Parallel over (sequence, key/value head), each writing its own slices.
///
/// # Errors
/// As [`causal_attention_forward`].
pub fn causal_attention_backward<T: Real>(
    upstream: ArrayView2<T>,
    cache: &AttentionCache<'_, T>,
    shape: AttentionShape,
    scale: f64,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Result<(Array2<T>, Array2<T>, Array2<T>)> {
    let op = "causal_attention_backward";
    shape.check(op, &cache.query, [("key", &cache.key), ("value", &cache.value)])?;
    require_shape(op, "upstream", &upstream, cache.query.dim())?;
    require_shape(op, "output", &cache.output, cache.query.dim())?;
    require_shape(op, "log_sum_exp", &cache.log_sum_exp, (shape.batch * shape.heads, shape.length))?;
    let (length, head_dim, group) = (shape.length, shape.head_dim, shape.heads / shape.kv_heads);
    cost.multiply_adds += 5 * shape.tile_products();
    cost.exponentials += shape.tile_products() / (head_dim as u64).max(1);
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
    let contiguous = [&cache.query, &cache.key, &cache.value, &upstream, &cache.output].map(|a| a.as_standard_layout());
    let [queries, keys, values, upstreams, outputs] = contiguous.each_ref().map(|a| a.as_slice().unwrap_or(&[]));
    let (key_t, value_t) = (shape.transposed_heads(keys, scratch), shape.transposed_heads(values, scratch));
    let (keys_t, values_t) = (key_t.as_slice().unwrap_or(&[]), value_t.as_slice().unwrap_or(&[]));
    let (query_width, kv_width) = shape.widths();
    let tiles = || {
        let tile = || vec![T::zero(); QUERY_TILE * KEY_TILE];
        let head = || vec![T::zero(); length * head_dim];
        (tile(), tile(), vec![T::zero(); QUERY_TILE * head_dim], head(), head())
    };
    tasks.into_par_iter().for_each_init(tiles, |(p, ds, dq_tile, dk_sum, dv_sum), (index, dqs, mut dk, mut dv)| {
        let (batch, kv_head) = (index / shape.kv_heads, index % shape.kv_heads);
        let k = &keys[batch * length * kv_width + kv_head * head_dim..];
        let (k_t, v_t) = (&keys_t[index * head_dim * length..], &values_t[index * head_dim * length..]);
        dk_sum.fill(T::zero());
        dv_sum.fill(T::zero());
        for (member, mut dq) in dqs.into_iter().enumerate() {
            let head = kv_head * group + member;
            let lse = cache.log_sum_exp.row(batch * shape.heads + head);
            for start in (0..length).step_by(QUERY_TILE) {
                let rows = QUERY_TILE.min(length - start);
                let at = (batch * length + start) * query_width + head * head_dim;
                let (q, g, o) = (&queries[at..], &upstreams[at..], &outputs[at..]);
                let (mut shift, mut delta) = ([T::zero(); QUERY_TILE], [T::zero(); QUERY_TILE]);
                for i in 0..rows {
                    shift[i] = lse[start + i];
                    let row = i * query_width..i * query_width + head_dim;
                    delta[i] = dot(&g[row.clone()], &o[row]);
                }
                for key_start in (0..start + rows).step_by(KEY_TILE) {
                    let width = KEY_TILE.min(start + rows - key_start);
                    let by_rows = |a, b_t: &[T], alpha, c: &mut [T]| {
                        let (b, shape) = (&b_t[key_start..], (rows, head_dim, width));
                        let a_strides = (query_width, 1);
                        panel_product(PanelProduct { alpha, a, a_strides, b, b_stride: length, c, add: false, shape });
                    };
                    by_rows(q, k_t, T::of(scale), &mut p[..rows * width]);
                    by_rows(g, v_t, T::one(), &mut ds[..rows * width]);
                    let mut tile = tile_view(p, rows, width);
                    mask_future(&mut tile, start, key_start);
                    softmax_backward_tile(tile, tile_view(ds, rows, width), &shift[..rows], &delta[..rows]);
                    let by_keys = |a: &[T], b: &[T], alpha, c: &mut [T]| {
                        let c = &mut c[key_start * head_dim..(key_start + width) * head_dim];
                        let (shape, a_strides) = ((width, rows, head_dim), (1, width));
                        panel_product(PanelProduct {
                            alpha,
                            a,
                            a_strides,
                            b,
                            b_stride: query_width,
                            c,
                            add: true,
                            shape,
                        });
                    };
                    by_keys(p, g, T::one(), dv_sum);
                    by_keys(ds, q, T::of(scale), dk_sum);
                    panel_product(PanelProduct {
                        alpha: T::of(scale),
                        a: ds,
                        a_strides: (width, 1),
                        b: &k[key_start * kv_width..],
                        b_stride: kv_width,
                        c: &mut dq_tile[..rows * head_dim],
                        add: key_start > 0,
                        shape: (rows, width, head_dim),
                    });
                }
                dq.slice_mut(s![start..start + rows, ..]).assign(&tile_view(dq_tile, rows, head_dim));
            }
        }
        dk.assign(&tile_view(dk_sum, length, head_dim));
        dv.assign(&tile_view(dv_sum, length, head_dim));
    });
    scratch.keep(key_t);
    scratch.keep(value_t);
    cost.release(2 * QUERY_TILE * KEY_TILE);
    Ok((dquery, dkey, dvalue))
}
