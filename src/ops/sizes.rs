//! Sizes in place of numbers: a step run on them tells what it holds.

use super::{BesideWeight, Choice, InputGradient, ObserveLogits, Ops, Scoring, Side};
use crate::blocks::causal_attention::AttentionShape;
use crate::blocks::cross_entropy::LOGIT_ROWS;
use crate::blocks::swiglu::Activation;
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// Buffers by size, as [`crate::linalg::Scratch`] hands them out, and what is held in all; sizes in
/// numbers.
#[derive(Debug, Default)]
struct Pool {
    free: BTreeMap<usize, Vec<u64>>,
    step: u64,
    held: usize,
    peak: usize,
}

impl Pool {
    fn hold(&mut self, numbers: usize) {
        self.held += numbers;
        self.peak = self.peak.max(self.held);
    }
}

/// The size of a matrix. One that a step made counts as held until it is dropped or released.
#[derive(Debug)]
pub struct Buffer {
    shape: (usize, usize),
    pool: Option<Rc<RefCell<Pool>>>,
}

impl Buffer {
    /// A tensor that lives outside the step: a weight, an adapter tensor.
    pub fn at_rest(shape: (usize, usize)) -> Self {
        Self { shape, pool: None }
    }

    /// Numbers.
    pub fn numbers(&self) -> usize {
        self.shape.0 * self.shape.1
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        if let Some(pool) = &self.pool {
            pool.borrow_mut().hold(self.numbers());
        }
        Self { shape: self.shape, pool: self.pool.clone() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.borrow_mut().held -= self.numbers();
        }
    }
}

/// The size of a weight, and whether it is packed.
#[derive(Debug, Clone)]
pub struct SizedWeight {
    /// As its matrix.
    pub dense: Buffer,
    /// Whether each product decodes it first.
    pub packed: bool,
}

/// The size of a batch.
#[derive(Debug)]
pub struct SizeInputs {
    shape: AttentionShape,
    /// Of a number: the targets are held in eight bytes each.
    bytes: usize,
    angles: Buffer,
}

/// The engine of sizes.
#[derive(Debug, Clone, Default)]
pub struct Sizes {
    pool: Rc<RefCell<Pool>>,
}

/// Numbers live while the loss is formed: rows, their logits and gradients, one chunk at a time,
/// and the targets.
pub(crate) fn loss_chunk(rows: usize, width: usize, vocabulary: usize, bytes: usize) -> usize {
    LOGIT_ROWS.min(rows) * (2 * width + vocabulary) + 16 * rows / bytes.max(1)
}

impl Sizes {
    /// A batch of numbers of so many bytes, with so many rotary angles for each position.
    pub fn inputs(&self, shape: AttentionShape, angles: usize, bytes: usize) -> SizeInputs {
        SizeInputs { shape, bytes, angles: self.fresh((shape.length, angles)) }
    }

    /// Most numbers held at a time since the step began.
    pub fn peak(&self) -> usize {
        self.pool.borrow().peak
    }

    /// A buffer of its own.
    fn fresh(&self, shape: (usize, usize)) -> Buffer {
        self.pool.borrow_mut().hold(shape.0 * shape.1);
        Buffer { shape, pool: Some(self.pool.clone()) }
    }

    /// A buffer that is handed out again if one of its size is free.
    fn take(&self, shape: (usize, usize)) -> Buffer {
        let size = shape.0 * shape.1;
        let mut pool = self.pool.borrow_mut();
        if pool.free.get_mut(&size).and_then(Vec::pop).is_none() {
            pool.hold(size);
        }
        Buffer { shape, pool: Some(self.pool.clone()) }
    }

    /// A buffer that lives for a moment.
    fn touch(&self, numbers: usize) {
        drop(self.fresh((numbers, 1)));
    }

    fn or_take(&self, add_to: Option<Buffer>, shape: (usize, usize)) -> Buffer {
        add_to.unwrap_or_else(|| self.take(shape))
    }

    /// The decoded weight, for the time of a product.
    fn decode(&self, weight: &SizedWeight) {
        if weight.packed {
            self.touch(weight.dense.numbers());
        }
    }
}

/// The size of a routing: rows are taken to be spread evenly over the experts.
#[derive(Debug, Clone)]
pub struct SizedRouting {
    rows: usize,
    experts: usize,
    per_token: usize,
    /// Probabilities and weights.
    _held: Rc<Buffer>,
}

impl SizedRouting {
    /// Rows of an expert.
    fn seen(&self, expert: usize) -> usize {
        let all = self.rows * self.per_token;
        (expert + 1) * all / self.experts - expert * all / self.experts
    }
}

/// Queries, keys, values and the log-sum-exp.
type Saved = [Buffer; 4];

impl Ops for Sizes {
    type Matrix = Buffer;
    type Vector = Buffer;
    type Weight = SizedWeight;
    type Index = usize;
    type Sink = Buffer;
    type RowStats = Buffer;
    type Attention = Saved;
    type Inputs = SizeInputs;
    type Loss = ();
    type Routing = SizedRouting;

    fn shape(x: &Buffer) -> (usize, usize) {
        x.shape
    }

    fn weight_shape(weight: &SizedWeight) -> (usize, usize) {
        weight.dense.shape
    }

    fn is_packed(weight: &SizedWeight) -> bool {
        weight.packed
    }

    fn index_length(index: &usize) -> usize {
        *index
    }

    fn stats_length(stats: &Buffer) -> usize {
        stats.numbers()
    }

    fn attention_elements(saved: &Saved) -> [(&'static str, usize); 4] {
        let [query, key, value, log_sum_exp] = saved.each_ref().map(Buffer::numbers);
        [("query", query), ("key", key), ("value", value), ("log_sum_exp", log_sum_exp)]
    }

    fn angle_elements(inputs: &SizeInputs) -> usize {
        inputs.angles.numbers()
    }

    fn next_step(&mut self) {
        let mut pool = self.pool.borrow_mut();
        let step = pool.step;
        let mut freed = 0;
        for (size, steps) in &mut pool.free {
            let before = steps.len();
            steps.retain(|&used| used >= step);
            freed += size * (before - steps.len());
        }
        pool.held -= freed;
        pool.step += 1;
        pool.peak = pool.held;
    }

    fn release(&mut self, mut x: Buffer) {
        if x.pool.take().is_some() {
            let mut pool = self.pool.borrow_mut();
            let step = pool.step;
            pool.free.entry(x.numbers()).or_default().push(step);
        }
    }

    fn release_attention(&mut self, saved: Saved) {
        saved.into_iter().for_each(|x| self.release(x));
    }

    fn copy(&mut self, x: &Buffer) -> Buffer {
        self.take(x.shape)
    }

    fn zeros(&mut self, shape: (usize, usize)) -> Buffer {
        self.take(shape)
    }

    fn sink(&self, shape: (usize, usize)) -> Buffer {
        Buffer::at_rest(shape)
    }

    fn accumulate(&mut self, _: &mut Buffer, _: f64, _: &Buffer) {}

    fn embed(&mut self, inputs: &SizeInputs, table: &Buffer) -> Result<Buffer> {
        Ok(self.fresh((inputs.shape.batch * inputs.shape.length, table.shape.1)))
    }

    fn embed_backward(
        &mut self,
        _: &SizeInputs,
        _: &Buffer,
        _: (&mut Buffer, (usize, usize)),
    ) -> Result<()> {
        Ok(())
    }

    fn embed_positions(&mut self, inputs: &SizeInputs, table: &Buffer, _: usize) -> Result<Buffer> {
        self.embed(inputs, table)
    }

    fn embed_positions_backward(
        &mut self,
        _: &SizeInputs,
        _: &Buffer,
        _: usize,
        _: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn center(&mut self, x: Buffer) -> Result<Buffer> {
        Ok(x)
    }

    fn add_matrix_row(&mut self, y: Buffer, _: &Buffer, _: f64) -> Result<Buffer> {
        Ok(y)
    }

    fn row_sum(&mut self, x: &Buffer) -> Result<Buffer> {
        Ok(self.fresh((1, x.shape.1)))
    }

    fn transposed(&mut self, x: &Buffer) -> Result<Buffer> {
        Ok(self.fresh((x.shape.1, x.shape.0)))
    }

    fn sunk(&mut self, sink: Buffer) -> Result<Buffer> {
        Ok(sink)
    }

    fn concat(&mut self, parts: Vec<Buffer>) -> Result<Buffer> {
        let rows = parts.first().map_or(0, |part| part.shape.0);
        Ok(self.take((rows, parts.iter().map(|part| part.shape.1).sum())))
    }

    fn add_sinks(
        &mut self,
        attended: (Buffer, Saved),
        _: &Buffer,
        _: &SizeInputs,
    ) -> Result<(Buffer, Saved)> {
        Ok(attended)
    }

    fn sinks_backward(
        &mut self,
        _: &Buffer,
        _: (&Buffer, &Saved),
        _: &Buffer,
        _: &SizeInputs,
        _: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn activated(&mut self, _: Activation, x: &Buffer) -> Result<Buffer> {
        Ok(self.take(x.shape))
    }

    fn activated_backward(&mut self, _: Activation, _: &Buffer, x: Buffer) -> Result<Buffer> {
        Ok(x)
    }

    fn route(&mut self, scores: Buffer, choice: Choice) -> Result<SizedRouting> {
        let (rows, experts) = scores.shape;
        self.release(scores);
        // Probabilities, weights and the rows themselves.
        let held = Rc::new(self.fresh((rows, experts + 2 * choice.per_token)));
        Ok(SizedRouting { rows, experts, per_token: choice.per_token, _held: held })
    }

    fn route_backward(&mut self, routing: &SizedRouting, _: Vec<Buffer>) -> Result<Buffer> {
        Ok(self.fresh((routing.rows, routing.experts)))
    }

    fn routing_elements(routing: &SizedRouting) -> usize {
        routing.rows * (routing.experts + routing.per_token)
    }

    fn routing_weights(&mut self, routing: &SizedRouting, expert: usize) -> Result<Buffer> {
        Ok(self.fresh((1, routing.seen(expert))))
    }

    fn dispatch(&mut self, x: &Buffer, routing: &SizedRouting, expert: usize) -> Result<Buffer> {
        Ok(self.take((routing.seen(expert), x.shape.1)))
    }

    fn combine(&mut self, sum: Buffer, _: Buffer, _: &SizedRouting, _: usize) -> Result<Buffer> {
        Ok(sum)
    }

    fn rms_norm(&mut self, x: &Buffer, _: &Buffer, _: f64) -> Result<(Buffer, Buffer)> {
        Ok((self.take(x.shape), self.fresh((x.shape.0, 1))))
    }

    fn rms_norm_backward(
        &mut self,
        dy: Buffer,
        (x, _): (Buffer, Buffer),
        _: &Buffer,
        _: Option<&mut Buffer>,
        _: Option<&mut Buffer>,
    ) -> Result<()> {
        self.release(dy);
        self.release(x);
        Ok(())
    }

    fn product(&mut self, x: &Buffer, weight: &SizedWeight, add_to: Option<Buffer>) -> Buffer {
        let y = self.or_take(add_to, (x.shape.0, weight.dense.shape.0));
        self.decode(weight);
        y
    }

    fn product_backward(
        &mut self,
        dy: &Buffer,
        weight: &SizedWeight,
        add_to: Option<Buffer>,
    ) -> Buffer {
        let dx = self.or_take(add_to, (dy.shape.0, weight.dense.shape.1));
        self.decode(weight);
        dx
    }

    fn product_with(&mut self, x: &Buffer, weight: &Buffer, add_to: Option<Buffer>) -> Buffer {
        self.or_take(add_to, (x.shape.0, weight.shape.0))
    }

    fn product_with_backward(
        &mut self,
        dy: &Buffer,
        weight: &Buffer,
        add_to: Option<Buffer>,
    ) -> Buffer {
        self.or_take(add_to, (dy.shape.0, weight.shape.1))
    }

    fn outer(&mut self, dy: &Buffer, x: &Buffer) -> Buffer {
        self.fresh((dy.shape.1, x.shape.1))
    }

    fn add_outer(
        &mut self,
        _: f64,
        _: &Buffer,
        _: Option<Range<usize>>,
        _: &Buffer,
        _: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn small_product(
        &mut self,
        (a, turn_a): (&Buffer, bool),
        (b, turn_b): (&Buffer, bool),
    ) -> Buffer {
        let rows = if turn_a { a.shape.1 } else { a.shape.0 };
        let columns = if turn_b { b.shape.0 } else { b.shape.1 };
        self.fresh((rows, columns))
    }

    fn low_rank(
        &mut self,
        beside: &BesideWeight<'_, Self>,
        x: &Buffer,
        add_to: Option<Buffer>,
    ) -> (Buffer, Buffer) {
        let y = self.product(x, beside.weight, add_to);
        (y, self.fresh((x.shape.0, beside.a.shape.0)))
    }

    fn low_rank_backward(
        &mut self,
        beside: &BesideWeight<'_, Self>,
        dy: &Buffer,
        x: &Buffer,
        z: &Buffer,
        dx: InputGradient<Buffer>,
    ) -> (Buffer, Buffer, Option<Buffer>) {
        let dx = dx.wanted().map(|add_to| self.or_take(add_to, x.shape));
        let decoded = if beside.weight.packed { beside.weight.dense.numbers() } else { 0 };
        let results = (self.fresh((dy.shape.1, z.shape.1)), self.fresh((z.shape.1, x.shape.1)));
        self.touch(decoded + z.numbers());
        (results.0, results.1, dx)
    }

    fn merged(&mut self, beside: &BesideWeight<'_, Self>) -> Buffer {
        self.fresh(beside.weight.dense.shape)
    }

    fn row_norms(&mut self, x: &Buffer) -> Result<Buffer> {
        Ok(self.fresh((1, x.shape.0)))
    }

    fn divided(&mut self, a: &Buffer, _: &Buffer) -> Buffer {
        self.fresh(a.shape)
    }

    fn scale_rows(&mut self, x: Buffer, _: &Buffer, _: bool) -> Buffer {
        x
    }

    fn row_dots(&mut self, a: &Buffer, _: &Buffer) -> Buffer {
        self.fresh((1, a.shape.0))
    }

    fn subtract_rows(&mut self, x: Buffer, _: &Buffer, _: &Buffer) -> Buffer {
        x
    }

    fn reshape(&mut self, mut x: Buffer, shape: (usize, usize)) -> Buffer {
        x.shape = shape;
        x
    }

    fn scale(&mut self, x: Buffer, _: f64) -> Buffer {
        x
    }

    fn add(&mut self, x: Buffer, y: Buffer, _: f64) -> Buffer {
        self.release(y);
        x
    }

    fn add_row(&mut self, x: Buffer, _: &Buffer) -> Buffer {
        x
    }

    fn add_row_sums(&mut self, _: &Buffer, _: &mut Buffer) {}

    fn one_plus(&mut self, w: &Buffer) -> Buffer {
        self.fresh(w.shape)
    }

    fn scaled(&mut self, x: &Buffer, _: f64) -> Buffer {
        self.fresh(x.shape)
    }

    fn select(&mut self, x: &Buffer, index: &usize) -> Buffer {
        self.fresh((x.shape.0, *index))
    }

    fn select_range(&mut self, x: &Buffer, range: Range<usize>) -> Buffer {
        self.fresh((x.shape.0, range.len()))
    }

    fn columns(&mut self, weight: &SizedWeight, index: &usize) -> Buffer {
        self.fresh((weight.dense.shape.0, *index))
    }

    fn put_columns(&mut self, _: &mut SizedWeight, _: &usize, _: Buffer) {}

    fn slice(&mut self, weight: &SizedWeight, side: Side, range: Range<usize>) -> Buffer {
        self.fresh(side.shape(weight.dense.shape, &range))
    }

    fn put_slice(
        &mut self,
        weight: &mut SizedWeight,
        _: Side,
        _: Range<usize>,
        _: Buffer,
    ) -> Result<()> {
        Self::dense_mut(weight, "s2ft").map(|_| ())
    }

    fn dense(&mut self, weight: &SizedWeight) -> Buffer {
        self.fresh(weight.dense.shape)
    }

    fn dense_mut<'a>(weight: &'a mut SizedWeight, method: &'static str) -> Result<&'a mut Buffer> {
        if weight.packed {
            return Err(Error::invalid(
                "method",
                method,
                "writes into the base weight, which is packed (quantized)",
            ));
        }
        Ok(&mut weight.dense)
    }

    fn put_entries(&mut self, _: &mut Buffer, _: &usize, _: &Buffer) -> Result<()> {
        Ok(())
    }

    fn row(&mut self, vector: &Buffer) -> Buffer {
        self.fresh(vector.shape)
    }

    fn put_row(&mut self, _: &mut Buffer, _: Buffer) {}

    fn rotate(&mut self, x: Buffer, _: &SizeInputs, _: usize, _: bool) -> Result<Buffer> {
        Ok(x)
    }

    fn attention(
        &mut self,
        query: Buffer,
        key: Buffer,
        value: Buffer,
        inputs: &SizeInputs,
        _: &Scoring,
    ) -> Result<(Buffer, Saved)> {
        let output = self.take(query.shape);
        let log_sum_exp = self.take((inputs.shape.batch * inputs.shape.heads, inputs.shape.length));
        Ok((output, [query, key, value, log_sum_exp]))
    }

    fn attention_backward(
        &mut self,
        doutput: Buffer,
        saved: Saved,
        output: Buffer,
        _: &SizeInputs,
        _: &Scoring,
    ) -> Result<[Buffer; 3]> {
        let gradients = [&saved[0], &saved[1], &saved[2]].map(|x| self.take(x.shape));
        self.release_attention(saved);
        self.release(output);
        self.release(doutput);
        Ok(gradients)
    }

    fn gated(&mut self, _: Activation, gate: &Buffer, _: &Buffer) -> Result<Buffer> {
        Ok(self.take(gate.shape))
    }

    fn gated_backward(
        &mut self,
        _: Activation,
        _: &Buffer,
        gate: Buffer,
        up: Buffer,
    ) -> Result<(Buffer, Buffer)> {
        Ok((gate, up))
    }

    fn loss(
        &mut self,
        hidden: &Buffer,
        head: &Buffer,
        inputs: &SizeInputs,
        _: Option<&mut Buffer>,
        cap: Option<f64>,
        wanted: bool,
        _: ObserveLogits<'_, Self>,
    ) -> Result<((), Option<Buffer>)> {
        let dhidden = self.take(hidden.shape);
        let (rows, width) = hidden.shape;
        let chunk = loss_chunk(rows, width, head.shape.0, inputs.bytes);
        // The slope of a cap needs the capped logits once more.
        let capped = if cap.is_some() { LOGIT_ROWS.min(rows) * head.shape.0 } else { 0 };
        self.touch(chunk + capped);
        if wanted {
            return Ok(((), Some(dhidden)));
        }
        self.release(dhidden);
        Ok(((), None))
    }
}
