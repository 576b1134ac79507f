//! Keys in blocks, and boxes over the blocks: which keys can have a large product with a query.
//!
//! Products are made for [`WIDTH`] keys at a time. A tree of boxes (centre c, half-widths h) passes
//! over keys that cannot matter: q.k <= q.c + |q|.h for every key of a box, so the search is exact.
//! Boxes are drawn in coordinates in which the queries have no preferred direction, q' = q A and
//! k' = k B with A B^T = 1, and the keys' axes are the principal ones: q'.k' = q.k, but the sum
//! over |q'_c| h_c is far smaller where queries lie in few directions.

use crate::attention::problem::Mask;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::decompositions::svd;
use crate::linalg::elementwise::{Kernel, vectorized};
use crate::linalg::{Real, norms, real::cast};
use ndarray::{Array1, Array2, ArrayView2, Axis};
use rayon::prelude::*;

use super::Scores;

/// Keys of a block, and children of a node.
pub(super) const WIDTH: usize = 16;
/// Query rows of one task.
const ROWS: usize = 64;
/// Directions of the queries with less than this share of the largest variance count as if they had
/// it: the conditioning of the change of coordinates is then at most a thousand.
const LEAST_VARIANCE: f64 = 1e-6;

/// What a search looks for.
pub(super) trait Collector<T> {
    /// What is found for one query.
    type Found: Send;

    /// Whether large negative logits are wanted too: bounds and logits are then magnitudes.
    const BOTH_SIGNS: bool;

    /// Logits below this are not offered; it may rise from offer to offer.
    fn threshold(&self) -> T;

    /// Takes a visible key with its logit.
    fn offer(&mut self, key: u32, logit: T);

    /// Hands over what was found for a query, adds its operations, and is as new for the next one.
    fn finish(&mut self, cost: &mut Cost) -> Self::Found;

    /// Is told the logit of a visible key that will be offered later.
    #[inline(always)]
    fn seed(&mut self, _logit: T) {}
}

/// Keys by blocks of [`WIDTH`], each transposed; missing keys are zero and numbered `u32::MAX`.
pub(super) struct Blocks<T> {
    head_dim: usize,
    entries: Vec<T>,
    origin: Vec<u32>,
}

impl<T: Real> Blocks<T> {
    fn new(head_dim: usize) -> Self {
        Self { head_dim, entries: Vec::new(), origin: Vec::new() }
    }

    /// Adds one block and returns its number.
    fn push(&mut self, key: ArrayView2<T>, indices: &[u32]) -> u32 {
        let start = self.entries.len();
        self.entries.resize(start + self.head_dim * WIDTH, T::zero());
        for (w, &j) in indices.iter().enumerate() {
            for (c, &x) in key.row(j as usize).iter().enumerate() {
                self.entries[start + c * WIDTH + w] = x;
            }
        }
        self.origin.extend((0..WIDTH).map(|w| indices.get(w).copied().unwrap_or(u32::MAX)));
        (self.origin.len() / WIDTH - 1) as u32
    }

    /// The products of a block with a query.
    #[inline(always)]
    fn logits(&self, block: usize, query: &[T]) -> [T; WIDTH] {
        let size = self.head_dim * WIDTH;
        let mut logits = [T::zero(); WIDTH];
        add_products(&self.entries[block * size..][..size], query, &mut logits);
        logits
    }

    /// Tells the collector the logits of a block's visible keys.
    #[inline(always)]
    fn seed<C: Collector<T>>(&self, block: usize, query: &[T], end: u32, collector: &mut C) {
        let logits = self.logits(block, query);
        for (&j, &x) in self.origin[block * WIDTH..][..WIDTH].iter().zip(&logits) {
            if j < end {
                collector.seed(x);
            }
        }
    }

    /// Offers the keys of a block that lie below `end` and reach the threshold.
    #[inline(always)]
    fn visit<C: Collector<T>>(&self, block: usize, query: &[T], end: u32, collector: &mut C) {
        let logits = self.logits(block, query);
        let value = |x: T| if C::BOTH_SIGNS { x.abs() } else { x };
        let threshold = collector.threshold();
        let mut reached = 0u32;
        for (w, &x) in logits.iter().enumerate() {
            reached |= u32::from(value(x) >= threshold) << w;
        }
        while reached != 0 {
            let w = reached.trailing_zeros() as usize;
            reached &= reached - 1;
            let key = self.origin[block * WIDTH + w];
            if key < end && value(logits[w]) >= collector.threshold() {
                collector.offer(key, logits[w]);
            }
        }
    }
}

/// out += query (a row) times a `d x WIDTH` block.
#[inline(always)]
fn add_products<T: Real>(block: &[T], query: &[T], out: &mut [T; WIDTH]) {
    // Eight rows at a time with known bounds: the loops below are then straight code.
    const ROWS: usize = 8;
    let whole = query.len() / ROWS * ROWS;
    let (blocks, rest) = block.split_at(whole * WIDTH);
    for (block, query) in blocks.chunks_exact(ROWS * WIDTH).zip(query.chunks_exact(ROWS)) {
        let mut other = [T::zero(); WIDTH];
        for r in 0..ROWS / 2 {
            for w in 0..WIDTH {
                out[w] = query[2 * r].mul_add(block[2 * r * WIDTH + w], out[w]);
            }
            for w in 0..WIDTH {
                other[w] = query[2 * r + 1].mul_add(block[(2 * r + 1) * WIDTH + w], other[w]);
            }
        }
        for w in 0..WIDTH {
            out[w] += other[w];
        }
    }
    for (row, &q) in rest.chunks_exact(WIDTH).zip(&query[whole..]) {
        for (o, &x) in out.iter_mut().zip(row) {
            *o = q.mul_add(x, *o);
        }
    }
}

/// Boxes over keys. Node 0 is the root; a node's children are nodes or, in the last level, blocks.
pub(super) struct Tree<T> {
    blocks: Blocks<T>,
    /// Centre and half-width of each child of each node, both `d x WIDTH`, one node after the
    /// other.
    centres: Vec<T>,
    halves: Vec<T>,
    /// Number of each child, `u32::MAX` where there is none.
    children: Vec<u32>,
    /// Lowest key of each child.
    first_keys: Vec<u32>,
    /// Whether the children are blocks.
    last_level: Vec<bool>,
    /// A: q' = q A.
    coordinates: Array2<f64>,
    /// Roundings of a bound, per length of the query.
    slack: f64,
}

impl<T: Real> Tree<T> {
    fn new(scores: &Scores<T>, cost: &mut Cost) -> Result<Self> {
        let (keys, d) = scores.key.dim();
        let (a, b) = coordinates(scores, cost)?;
        let boxed = cast::<T, f64>(scores.key).dot(&b);
        cost.product(keys, d, d);
        let column_length = |c: usize| norms::frobenius(&a.column(c));
        let slack =
            (0..d).map(|c| column_length(c) * norms::max_abs(&boxed.column(c))).sum::<f64>()
                * 8.0
                * d as f64
                * T::epsilon().widen();
        let mut tree = Self {
            blocks: Blocks::new(d),
            centres: Vec::new(),
            halves: Vec::new(),
            children: Vec::new(),
            first_keys: Vec::new(),
            last_level: Vec::new(),
            coordinates: a,
            slack,
        };
        let mut all: Vec<u32> = (0..keys as u32).collect();
        let mut capacity = WIDTH;
        while capacity * WIDTH < keys {
            capacity *= WIDTH;
        }
        // Every level moves and measures each key once for every halving.
        cost.elementwise += (keys * d) as u64 * u64::from(keys.max(2).ilog2());
        tree.add(scores.key, boxed.view(), &mut all, capacity);
        Ok(tree)
    }

    /// Adds a node whose children hold at most `capacity` keys each, and returns its number.
    fn add(
        &mut self,
        key: ArrayView2<T>,
        boxed: ArrayView2<f64>,
        keys: &mut [u32],
        capacity: usize,
    ) -> u32 {
        let (node, d) = (self.last_level.len(), boxed.ncols());
        self.centres.resize((node + 1) * d * WIDTH, T::zero());
        self.halves.resize((node + 1) * d * WIDTH, T::zero());
        self.children.resize((node + 1) * WIDTH, u32::MAX);
        self.first_keys.resize((node + 1) * WIDTH, u32::MAX);
        self.last_level.push(capacity == WIDTH);
        let parts = keys.len().div_ceil(capacity);
        for (w, part) in split(boxed, keys, parts).into_iter().enumerate() {
            for c in 0..d {
                let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
                for &j in part.iter() {
                    let x = boxed[[j as usize, c]];
                    (low, high) = (low.min(x), high.max(x));
                }
                self.centres[(node * d + c) * WIDTH + w] = T::of(0.5 * (low + high));
                self.halves[(node * d + c) * WIDTH + w] = T::of(0.5 * (high - low));
            }
            let first = part.iter().copied().min().unwrap_or(u32::MAX);
            let child = if capacity == WIDTH {
                part.sort_unstable();
                self.blocks.push(key, part)
            } else {
                self.add(key, boxed, part, capacity / WIDTH)
            };
            self.children[node * WIDTH + w] = child;
            self.first_keys[node * WIDTH + w] = first;
        }
        node as u32
    }

    /// Offers every key below `end` that reaches the threshold. `query` is beta q.
    #[inline(always)]
    fn search<C: Collector<T>>(
        &self,
        query: &[T],
        boxed: &[T],
        length: f64,
        end: u32,
        stack: &mut Vec<(T, u32)>,
        collector: &mut C,
    ) -> Looked {
        let d = query.len();
        let slack = T::of(self.slack * length);
        let mut looked = Looked::default();
        stack.clear();
        stack.push((T::infinity(), 0));
        while let Some((bound, node)) = stack.pop() {
            if !(bound >= collector.threshold()) {
                continue;
            }
            let node = node as usize;
            looked.nodes += 1;
            let mut centre = [T::zero(); WIDTH];
            let mut spread = [slack; WIDTH];
            add_products(&self.centres[node * d * WIDTH..][..d * WIDTH], &boxed[..d], &mut centre);
            add_products(&self.halves[node * d * WIDTH..][..d * WIDTH], &boxed[d..], &mut spread);
            let mut open = [(T::zero(), 0u32); WIDTH];
            let mut count = 0;
            for w in 0..WIDTH {
                let middle = if C::BOTH_SIGNS { centre[w].abs() } else { centre[w] };
                let bound = middle + spread[w];
                if self.first_keys[node * WIDTH + w] < end && bound >= collector.threshold() {
                    open[count] = (bound, self.children[node * WIDTH + w]);
                    count += 1;
                }
            }
            // The highest bound is looked at first.
            open[..count]
                .sort_unstable_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
            if self.last_level[node] {
                for &(bound, block) in open[..count].iter().rev() {
                    if bound >= collector.threshold() {
                        looked.blocks += 1;
                        self.blocks.visit(block as usize, query, end, collector);
                    }
                }
            } else {
                stack.extend_from_slice(&open[..count]);
            }
        }
        looked
    }
}

/// A and B of q' = q A, k' = k B: queries white, keys along their principal axes.
fn coordinates<T: Real>(scores: &Scores<T>, cost: &mut Cost) -> Result<(Array2<f64>, Array2<f64>)> {
    let d = scores.query.ncols();
    let second_moment = |a: &Array2<f64>| a.t().dot(a) / a.nrows().max(1) as f64;
    cost.product(d, scores.query.nrows() + scores.key.nrows(), d);
    let moments = svd(second_moment(&cast::<T, f64>(scores.query)).view())?;
    let largest = moments.s.first().copied().unwrap_or(0.0);
    if !(largest > 0.0) {
        return Ok((Array2::eye(d), Array2::eye(d)));
    }
    let lengths = moments.s.mapv(|x| x.max(LEAST_VARIANCE * largest).sqrt());
    let whitened = &moments.u / &lengths;
    let coloured = &moments.u * &lengths;
    let key = cast::<T, f64>(scores.key);
    let mean = key.mean_axis(Axis(0)).unwrap_or_else(|| Array1::zeros(d));
    let axes = svd(second_moment(&(key - mean).dot(&coloured)).view())?.u;
    Ok((whitened.dot(&axes), coloured.dot(&axes)))
}

/// Splits keys into parts of nearly equal size, by halving along the coordinate of largest
/// variance.
fn split<'a>(boxed: ArrayView2<f64>, keys: &'a mut [u32], parts: usize) -> Vec<&'a mut [u32]> {
    if parts <= 1 {
        return vec![keys];
    }
    let n = keys.len() as f64;
    let variance = |c: usize| {
        let (sum, squares) = keys.iter().fold((0.0, 0.0), |(sum, squares), &j| {
            let x = boxed[[j as usize, c]];
            (sum + x, squares + x * x)
        });
        squares / n - (sum / n) * (sum / n)
    };
    let (mut widest, mut most) = (0, f64::NEG_INFINITY);
    for c in 0..boxed.ncols() {
        let spread = variance(c);
        if spread > most {
            (widest, most) = (c, spread);
        }
    }
    let half = keys.len() * (parts / 2) / parts;
    let at = |j: u32| boxed[[j as usize, widest]];
    keys.select_nth_unstable_by(half, |&a, &b| at(a).total_cmp(&at(b)).then(a.cmp(&b)));
    let (low, high) = keys.split_at_mut(half);
    let mut all = split(boxed, low, parts / 2);
    all.extend(split(boxed, high, parts - parts / 2));
    all
}

/// How much one query looked at.
#[derive(Debug, Clone, Copy, Default)]
struct Looked {
    nodes: u64,
    blocks: u64,
}

/// Which way keys are searched.
pub(super) enum Index<T> {
    /// Every visible key, in blocks in the order of the keys.
    Scan(Blocks<T>),
    /// By boxes.
    Tree(Tree<T>),
}

impl<T: Real> Index<T> {
    /// Blocks in the order of the keys.
    pub fn scan(scores: &Scores<T>) -> Self {
        let mut blocks = Blocks::new(scores.key.ncols());
        let all: Vec<u32> = (0..scores.key.nrows() as u32).collect();
        all.chunks(WIDTH).for_each(|part| {
            blocks.push(scores.key, part);
        });
        Index::Scan(blocks)
    }

    /// A tree of boxes; O(L d (d + log L)) operations.
    ///
    /// # Errors
    /// Those of the decomposition of `d x d` matrices.
    pub fn tree(scores: &Scores<T>, cost: &mut Cost) -> Result<Self> {
        Ok(Index::Tree(Tree::new(scores, cost)?))
    }

    /// Numbers held.
    pub fn len(&self) -> usize {
        match self {
            Index::Scan(blocks) => blocks.entries.len(),
            Index::Tree(tree) => tree.blocks.entries.len() + 2 * tree.centres.len(),
        }
    }

    /// What collectors find for each query, in order, with the share of visible keys looked at.
    pub fn collect<C: Collector<T>>(
        &self,
        scores: &Scores<T>,
        queries: &[usize],
        collector: impl Fn() -> C + Sync,
        cost: &mut Cost,
    ) -> (Vec<C::Found>, f64) {
        let outcomes: Vec<(Vec<C::Found>, Looked, Cost)> = queries
            .par_chunks(ROWS)
            .map(|queries| {
                vectorized(SearchTile { index: self, scores, queries, collector: collector() })
            })
            .collect();
        let d = scores.query.ncols() as u64;
        let width = WIDTH as u64;
        let mut visited = 0u64;
        let mut all = Vec::with_capacity(queries.len());
        for (found, looked, operations) in outcomes {
            cost.add_operations(&operations);
            cost.multiply_adds += width * d * (looked.blocks + 2 * looked.nodes);
            cost.elementwise += width * (looked.blocks + 2 * looked.nodes);
            visited += looked.blocks * width;
            all.extend(found);
        }
        if matches!(self, Index::Tree(_)) {
            cost.multiply_adds += queries.len() as u64 * d * d;
        }
        let visible: u64 = queries.iter().map(|&i| u64::from(end_of(scores, i))).sum();
        (all, visited as f64 / visible.max(1) as f64)
    }
}

/// Number of keys that a query sees.
fn end_of<T>(scores: &Scores<T>, query: usize) -> u32 {
    (if scores.mask == Mask::Causal { query + 1 } else { scores.key.nrows() }) as u32
}

/// The search of one tile of queries.
struct SearchTile<'a, 'b, T, C> {
    index: &'a Index<T>,
    scores: &'a Scores<'b, T>,
    queries: &'a [usize],
    collector: C,
}

impl<T: Real, C: Collector<T>> Kernel for SearchTile<'_, '_, T, C> {
    type Output = (Vec<C::Found>, Looked, Cost);

    #[inline(always)]
    fn run(mut self) -> Self::Output {
        let scores = self.scores;
        let beta = T::of(scores.beta);
        let mut looked = Looked::default();
        let mut cost = Cost::default();
        let mut stack = Vec::new();
        let mut found = Vec::with_capacity(self.queries.len());
        let collector = &mut self.collector;
        for &i in self.queries {
            let end = end_of(scores, i);
            let query: Vec<T> = scores.query.row(i).iter().map(|&x| beta * x).collect();
            match self.index {
                Index::Scan(blocks) => {
                    let count = (end as usize).div_ceil(WIDTH);
                    // The last keys are often the largest: known first, they keep others from being
                    // offered.
                    blocks.seed(count - 1, &query, end, collector);
                    for block in 0..count {
                        blocks.visit(block, &query, end, collector);
                    }
                    looked.blocks += count as u64 + 1;
                }
                Index::Tree(tree) => {
                    let wide: Array1<f64> = query.iter().map(|x| x.widen()).collect();
                    let mut boxed = tree.coordinates.t().dot(&wide).mapv(T::of).to_vec();
                    boxed.extend_from_within(..);
                    boxed[query.len()..].iter_mut().for_each(|x| *x = x.abs());
                    let length = norms::frobenius(&wide.view());
                    let part = tree.search(&query, &boxed, length, end, &mut stack, collector);
                    looked.nodes += part.nodes;
                    looked.blocks += part.blocks;
                }
            }
            found.push(collector.finish(&mut cost));
        }
        (found, looked, cost)
    }
}
