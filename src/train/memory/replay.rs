//! The order in which a training step takes and returns buffers, with sizes in place of arrays.
//!
//! Mirrors `model::layer` and `model::llama` line by line; `tests/memory.rs` fails when they part.

use super::{Adapted, StepShape};
use crate::blocks::cross_entropy::LOGIT_ROWS;
use crate::model::{ModelConfig, Projection};
use std::collections::BTreeMap;

/// Numbers live while the loss is formed: rows, their logits and gradients, one chunk at a time, and the targets.
pub(super) fn loss_chunk(config: &ModelConfig, shape: &StepShape) -> usize {
    let n = shape.batch * shape.length;
    LOGIT_ROWS.min(n) * (2 * config.hidden_size + config.vocab_size) + 16 * n / shape.bytes
}

/// Buffers by size, as `linalg::scratch` hands them out; sizes in numbers.
#[derive(Default)]
struct Pool {
    free: BTreeMap<usize, Vec<u64>>,
    step: u64,
    held: usize,
    peak: usize,
}

impl Pool {
    fn take(&mut self, size: usize) -> usize {
        if self.free.get_mut(&size).and_then(Vec::pop).is_none() {
            self.fresh(size);
        }
        size
    }

    /// An allocation outside the pool (which [`Pool::keep`] may adopt).
    fn fresh(&mut self, size: usize) -> usize {
        self.held += size;
        self.peak = self.peak.max(self.held);
        size
    }

    fn keep(&mut self, size: usize) {
        self.free.entry(size).or_default().push(self.step);
    }

    fn drop(&mut self, size: usize) {
        self.held -= size;
    }

    /// A buffer that lives for a moment.
    fn touch(&mut self, size: usize) {
        self.fresh(size);
        self.drop(size);
    }

    fn next_step(&mut self) {
        for (size, steps) in &mut self.free {
            let before = steps.len();
            steps.retain(|&used| used >= self.step);
            self.held -= size * (before - steps.len());
        }
        self.step += 1;
        self.peak = self.held;
    }
}

/// Which gradients a layer's backward forms; the rule of the model's own layers.
#[derive(Debug, Clone, Copy)]
struct Needs {
    input: bool,
    normed_input: bool,
    attention: bool,
    middle: bool,
    normed_middle: bool,
    gated: bool,
    any: bool,
}

pub(super) struct Replay<'a> {
    config: &'a ModelConfig,
    adapted: &'a [[Adapted; 7]],
    everything: bool,
    shape: &'a StepShape,
}

/// One layer's saved tensors, in numbers.
type Saved = BTreeMap<&'static str, usize>;

impl<'a> Replay<'a> {
    pub(super) fn new(
        config: &'a ModelConfig,
        adapted: &'a [[Adapted; 7]],
        everything: bool,
        shape: &'a StepShape,
    ) -> Self {
        Self { config, adapted, everything, shape }
    }

    fn of(&self, layer: usize, p: Projection) -> &Adapted {
        &self.adapted[layer][p as usize]
    }

    fn trains(&self, layer: usize, ps: &[Projection]) -> bool {
        ps.iter().any(|&p| self.of(layer, p).trained > 0)
    }

    fn whole(&self, layer: usize, ps: &[Projection]) -> bool {
        ps.iter().any(|&p| self.of(layer, p).whole_input)
    }

    fn needs(&self, layer: usize) -> Needs {
        use Projection::*;
        let norms = self.everything;
        let below = (0..layer).any(|l| self.trains(l, &Projection::ALL));
        let input = self.everything || below;
        let normed_input = input || norms;
        let attention = normed_input || self.trains(layer, &[Query, Key, Value]);
        let middle = attention || self.trains(layer, &[Output]);
        let normed_middle = middle || norms;
        let gated = normed_middle || self.trains(layer, &[Gate, Up]);
        let any = gated || self.trains(layer, &[Down]);
        Needs { input, normed_input, attention, middle, normed_middle, gated, any }
    }

    /// Three steps; (saved activations in bytes by name, bytes held at the peak of the last step).
    pub(super) fn run(&self) -> (BTreeMap<String, usize>, usize) {
        let mut pool = Pool::default();
        let mut activations = BTreeMap::new();
        for _ in 0..3 {
            activations = self.step(&mut pool);
        }
        let bytes = self.shape.bytes;
        let activations = activations.into_iter().map(|(name, n)| (name, n * bytes)).collect();
        (activations, pool.peak * bytes)
    }

    fn step(&self, pool: &mut Pool) -> BTreeMap<String, usize> {
        let c = self.config;
        let n = self.shape.batch * self.shape.length;
        let (hidden, rope) = (n * c.hidden_size, self.shape.length * c.head_dim);
        pool.fresh(rope);
        let mut x = pool.fresh(hidden);
        pool.next_step();
        let mut layers: Vec<Saved> = Vec::new();
        for l in 0..c.num_hidden_layers {
            let needs = self.needs(l);
            if !needs.any {
                x = self.forward(pool, l, x, None).0;
                layers.push(Saved::new());
            } else if self.shape.checkpointing {
                let input = pool.take(hidden);
                x = self.forward(pool, l, x, None).0;
                layers.push(Saved::from([("checkpoint", input)]));
            } else {
                let (out, saved) = self.forward(pool, l, x, Some(needs));
                x = out;
                layers.push(saved);
            }
        }
        let normed = pool.take(hidden);
        pool.fresh(n); // inverse rms of the last norm
        let dnormed = pool.take(hidden);
        pool.touch(loss_chunk(c, self.shape));
        pool.keep(normed);
        let mut named: BTreeMap<String, usize> = BTreeMap::new();
        for (name, size) in layers.iter().flatten() {
            *named.entry((*name).to_string()).or_default() += size;
        }
        for (name, size) in
            [("rope", rope), ("final_norm.input", x), ("final_norm.inverse_rms", n), ("loss.dhidden", dnormed)]
        {
            named.insert(name.into(), size);
        }
        let mut dx = pool.take(hidden);
        pool.keep(x);
        pool.keep(dnormed);
        let mut alive = true;
        for (l, saved) in layers.into_iter().enumerate().rev() {
            let needs = self.needs(l);
            if !alive || !needs.any {
                alive = false;
                // What was saved below the last trained layer: nothing.
                continue;
            }
            let saved = match saved.get("checkpoint") {
                Some(&input) => {
                    let (out, saved) = self.forward(pool, l, input, Some(needs));
                    pool.keep(out);
                    saved
                }
                None => saved,
            };
            (dx, alive) = self.backward(pool, l, saved, dx, needs);
        }
        pool.drop(dx);
        pool.drop(n);
        pool.drop(rope);
        named
    }

    /// What a projection's forward leaves outside the pool.
    fn project(&self, pool: &mut Pool, layer: usize, p: Projection, save: bool, saved: &mut Saved) {
        let a = self.of(layer, p);
        pool.touch(a.temporary / if a.saved_columns == 0 && a.beside > 0 { 2 } else { 1 });
        let n = self.shape.batch * self.shape.length * a.saved_columns;
        if n > 0 && save {
            pool.fresh(n);
            *saved.entry("method").or_default() += n;
        }
    }

    fn forward(&self, pool: &mut Pool, layer: usize, x: usize, needs: Option<Needs>) -> (usize, Saved) {
        use Projection::*;
        let c = self.config;
        let n = self.shape.batch * self.shape.length;
        let (query, key) = (n * c.num_attention_heads * c.head_dim, n * c.num_key_value_heads * c.head_dim);
        let (hidden, inner, heads) = (n * c.hidden_size, n * c.intermediate_size, n * c.num_attention_heads);
        let save = needs.is_some();
        let wants = |f: fn(Needs) -> bool| needs.is_some_and(f);
        let mut saved = Saved::new();
        let retain = |pool: &mut Pool, saved: &mut Saved, wanted: bool, name: &'static str, size: usize| {
            if wanted {
                *saved.entry(name).or_default() += size;
            } else {
                pool.keep(size);
            }
        };
        let normed = pool.take(hidden);
        pool.fresh(n);
        for (p, size) in [(Query, query), (Key, key), (Value, key)] {
            pool.take(size);
            self.project(pool, layer, p, save, &mut saved);
        }
        retain(pool, &mut saved, save && self.whole(layer, &[Query, Key, Value]), "normed_input", normed);
        pool.take(query);
        pool.take(heads);
        let attention = wants(|n| n.attention);
        for (name, size) in [("query", query), ("key", key), ("value", key), ("log_sum_exp", heads)] {
            retain(pool, &mut saved, attention, name, size);
        }
        if wants(|n| n.normed_input) {
            pool.take(hidden);
            saved.insert("input", x);
            saved.insert("input_inverse_rms", n);
        } else {
            pool.drop(n);
        }
        self.project(pool, layer, Output, save, &mut saved);
        retain(pool, &mut saved, attention || (save && self.whole(layer, &[Output])), "attention_output", query);
        let normed = pool.take(hidden);
        pool.fresh(n);
        for p in [Gate, Up] {
            pool.take(inner);
            self.project(pool, layer, p, save, &mut saved);
        }
        retain(pool, &mut saved, save && self.whole(layer, &[Gate, Up]), "normed_middle", normed);
        pool.take(inner);
        let gated = wants(|n| n.gated);
        retain(pool, &mut saved, gated, "gate", inner);
        retain(pool, &mut saved, gated, "up", inner);
        if wants(|n| n.normed_middle) {
            saved.insert("middle", pool.take(hidden));
            saved.insert("middle_inverse_rms", n);
        } else {
            pool.drop(n);
        }
        self.project(pool, layer, Down, save, &mut saved);
        retain(pool, &mut saved, save && self.whole(layer, &[Down]), "gated", inner);
        (hidden, saved)
    }

    /// Temporaries of a projection's backward: the gradient of a low-rank projection of the input, a weight.
    fn pull(&self, pool: &mut Pool, layer: usize, p: Projection) {
        let a = self.of(layer, p);
        let low_rank = if a.whole_input { self.shape.batch * self.shape.length * a.saved_columns } else { 0 };
        pool.touch(a.temporary + low_rank);
    }

    /// Returns (size of the gradient passed on, whether there is one).
    fn backward(&self, pool: &mut Pool, layer: usize, mut saved: Saved, dx: usize, needs: Needs) -> (usize, bool) {
        use Projection::*;
        let c = self.config;
        let n = self.shape.batch * self.shape.length;
        let (query, key) = (n * c.num_attention_heads * c.head_dim, n * c.num_key_value_heads * c.head_dim);
        let (hidden, inner) = (n * c.hidden_size, n * c.intermediate_size);
        let give = |pool: &mut Pool, saved: &mut Saved, name: &str| {
            if let Some(size) = saved.remove(name) {
                pool.keep(size);
            }
        };
        let method = |pool: &mut Pool, saved: &Saved| {
            for name in ["method", "input_inverse_rms", "middle_inverse_rms"] {
                pool.drop(saved.get(name).copied().unwrap_or(0));
            }
        };
        let dgated = if needs.gated { pool.take(inner) } else { 0 };
        self.pull(pool, layer, Down);
        give(pool, &mut saved, "gated");
        if !needs.gated {
            method(pool, &saved);
            return (dx, false);
        }
        pool.keep(dgated);
        let dnormed = if needs.normed_middle { pool.take(hidden) } else { 0 };
        self.pull(pool, layer, Gate);
        self.pull(pool, layer, Up);
        give(pool, &mut saved, "gate");
        give(pool, &mut saved, "up");
        give(pool, &mut saved, "normed_middle");
        if needs.normed_middle {
            pool.keep(dnormed);
            give(pool, &mut saved, "middle");
        }
        if !needs.middle {
            method(pool, &saved);
            return (dx, false);
        }
        let dattended = if needs.attention { pool.take(query) } else { 0 };
        self.pull(pool, layer, Output);
        if !needs.attention {
            method(pool, &saved);
            return (dx, false);
        }
        for size in [query, key, key] {
            pool.take(size);
        }
        for name in ["query", "key", "value", "attention_output", "log_sum_exp"] {
            give(pool, &mut saved, name);
        }
        pool.keep(dattended);
        let dnormed = if needs.normed_input { pool.take(hidden) } else { 0 };
        for p in [Query, Key, Value] {
            self.pull(pool, layer, p);
        }
        for size in [query, key, key] {
            pool.keep(size);
        }
        give(pool, &mut saved, "normed_input");
        if needs.normed_input {
            pool.keep(dnormed);
            give(pool, &mut saved, "input");
        }
        method(pool, &saved);
        (dx, needs.input)
    }
}
