//! The processor: arrays of f32 or f64, buffers that are handed out again, counted operations.

use super::{BesideWeight, Choice, InputGradient, ObserveLogits, Ops, Scoring, Side};
use crate::blocks::attention_sinks;
use crate::blocks::base_weight::BaseWeight;
use crate::blocks::causal_attention::{
    AttentionCache, AttentionShape, Scores, Visibility, causal_attention_backward,
    causal_attention_forward,
};
use crate::blocks::cross_entropy::{CrossEntropySinks, Head, cross_entropy_through};
use crate::blocks::embedding::{embedding_backward, embedding_forward};
use crate::blocks::experts::{self, Routing};
use crate::blocks::linear::linear_backward_weight;
use crate::blocks::low_rank::{InputSink, LowRank};
use crate::blocks::rms_norm::{rms_norm_backward, rms_norm_forward};
use crate::blocks::rope::{RopeTable, rope_backward, rope_forward};
use crate::blocks::swiglu::{
    Activation, activation_backward, activation_forward, gated_backward, gated_forward,
};
use crate::blocks::{numbers, numbers_mut};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::elementwise::vectorized_closure;
use crate::linalg::gemm::{parallel_product, parallel_product_into};
use crate::linalg::{Real, Scratch};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// The processor with its working memory and its counters.
#[derive(Debug, Clone)]
pub struct Cpu<T> {
    /// Buffers that are handed out again.
    pub scratch: Scratch<T>,
    /// Operations counted so far.
    pub cost: Cost,
}

impl<T> Default for Cpu<T> {
    fn default() -> Self {
        Self { scratch: Scratch::default(), cost: Cost::default() }
    }
}

/// A batch as the processor's operations read it.
#[derive(Debug, Clone)]
pub struct CpuInputs<T> {
    /// Ids of all rows.
    pub ids: Vec<u32>,
    /// `B x T`, false for padding; nothing is padding when absent.
    pub mask: Option<Array2<bool>>,
    /// Sequences, tokens and heads.
    pub shape: AttentionShape,
    /// `B x T`, first token of each token's document; a row is one document when absent.
    pub starts: Option<Array2<u32>>,
    /// Position of every row's token.
    pub positions: Vec<u32>,
    /// Angles of the positions, by kind of rotary embedding.
    pub angles: Vec<RopeTable<T>>,
    /// (row, label) pairs of the loss.
    pub targets: Vec<(usize, usize)>,
    /// What the sum of losses is divided by.
    pub divisor: f64,
}

impl<T> CpuInputs<T> {
    /// Rows of a table of positions that starts at row `offset`.
    fn table_rows(&self, offset: usize) -> Vec<u32> {
        self.positions.iter().map(|p| p.saturating_add(offset as u32)).collect()
    }

    fn visible(&self, scoring: &Scoring) -> Visibility<'_> {
        Visibility {
            keys: self.mask.as_ref().map(|mask| mask.view()),
            ahead: scoring.ahead,
            window: scoring.window,
            starts: self.starts.as_ref().map(|starts| starts.view()),
        }
    }
}

/// What attention's backward reads.
#[derive(Debug, Clone)]
pub struct SavedAttention<T> {
    /// Queries after rotary embedding.
    pub query: Array2<T>,
    /// Keys after rotary embedding.
    pub key: Array2<T>,
    /// Values.
    pub value: Array2<T>,
    /// Log-sum-exp of the scores, `(B H) x T`.
    pub log_sum_exp: Array2<T>,
}

impl<T: Real> Cpu<T> {
    /// The array to write into, and the factor of what it holds.
    fn target(&mut self, shape: (usize, usize), add_to: Option<Array2<T>>) -> (Array2<T>, T) {
        match add_to {
            Some(array) => (array, T::one()),
            None => (self.scratch.array(shape), T::zero()),
        }
    }

    fn multiply(
        &mut self,
        a: ArrayView2<T>,
        b: ArrayView2<T>,
        add_to: Option<Array2<T>>,
    ) -> Array2<T> {
        let (mut y, beta) = self.target((a.nrows(), b.ncols()), add_to);
        parallel_product_into(T::one(), a, b, beta, &mut y.view_mut(), &mut self.cost);
        y
    }

    fn cross_entropy(
        &mut self,
        hidden: &Array2<T>,
        head: &Head<'_, T>,
        inputs: &CpuInputs<T>,
        sink: Option<&mut Array2<T>>,
        cap: Option<f64>,
        wanted: bool,
        observe: ObserveLogits<'_, Self>,
    ) -> Result<(f64, Option<Array2<T>>)> {
        let mut dhidden = self.scratch.zeros(hidden.dim());
        let mut view = dhidden.view_mut();
        let sinks =
            CrossEntropySinks { dhidden: &mut view, dweight: sink.map(|sink| sink.view_mut()) };
        let (targets, divisor) = (&inputs.targets, (inputs.divisor, cap));
        let loss = cross_entropy_through(
            hidden.view(),
            head,
            targets,
            divisor,
            Some(sinks),
            observe,
            &mut self.cost,
        )?;
        if wanted {
            return Ok((loss, Some(dhidden)));
        }
        self.scratch.keep(dhidden);
        Ok((loss, None))
    }

    /// Changes every row of a matrix, several at a time; `change` gets the row's number.
    fn each_row(x: &mut Array2<T>, change: impl Fn(usize, &mut [T]) + Sync) {
        let width = x.ncols().max(1);
        if let Some(entries) = x.as_slice_mut() {
            entries.par_chunks_mut(width).enumerate().for_each(|(j, row)| change(j, row));
            return;
        }
        for (j, mut row) in x.rows_mut().into_iter().enumerate() {
            let mut copy = row.to_vec();
            change(j, &mut copy);
            row.assign(&Array1::from(copy));
        }
    }
}

/// A matrix that was made row by row in one piece.
fn entries<T>(x: &Array1<T>) -> Result<&[T]> {
    x.as_slice().ok_or_else(|| Error::invalid("gain", "strided", "must lie in one piece"))
}

impl<T: Real> Ops for Cpu<T> {
    type Matrix = Array2<T>;
    type Vector = Array1<T>;
    type Weight = BaseWeight<T>;
    type Index = Vec<usize>;
    type Sink = Array2<T>;
    type RowStats = Vec<T>;
    type Attention = SavedAttention<T>;
    type Inputs = CpuInputs<T>;
    type Loss = f64;
    type Routing = Routing<T>;

    fn shape(x: &Array2<T>) -> (usize, usize) {
        x.dim()
    }

    fn weight_shape(weight: &BaseWeight<T>) -> (usize, usize) {
        weight.shape()
    }

    fn is_packed(weight: &BaseWeight<T>) -> bool {
        weight.is_packed()
    }

    fn index_length(index: &Vec<usize>) -> usize {
        index.len()
    }

    fn stats_length(stats: &Vec<T>) -> usize {
        stats.len()
    }

    fn attention_elements(saved: &SavedAttention<T>) -> [(&'static str, usize); 4] {
        [
            ("query", saved.query.len()),
            ("key", saved.key.len()),
            ("value", saved.value.len()),
            ("log_sum_exp", saved.log_sum_exp.len()),
        ]
    }

    fn angle_elements(inputs: &CpuInputs<T>) -> usize {
        inputs.angles.iter().map(|table| 2 * table.cos().len()).sum()
    }

    fn next_step(&mut self) {
        self.scratch.next_step();
    }

    fn release(&mut self, x: Array2<T>) {
        self.scratch.keep(x);
    }

    fn release_attention(&mut self, saved: SavedAttention<T>) {
        let SavedAttention { query, key, value, log_sum_exp } = saved;
        [query, key, value, log_sum_exp].into_iter().for_each(|x| self.scratch.keep(x));
    }

    fn copy(&mut self, x: &Array2<T>) -> Array2<T> {
        self.scratch.copy(x)
    }

    fn zeros(&mut self, shape: (usize, usize)) -> Array2<T> {
        self.scratch.zeros(shape)
    }

    fn sink(&self, shape: (usize, usize)) -> Array2<T> {
        Array2::zeros(shape)
    }

    fn accumulate(&mut self, sink: &mut Array2<T>, factor: f64, x: &Array2<T>) {
        sink.scaled_add(T::of(factor), x);
    }

    fn resident<'a>(&mut self, weight: &'a BaseWeight<T>) -> Result<Cow<'a, BaseWeight<T>>> {
        let BaseWeight::Stored(stored) = weight else { return Ok(Cow::Borrowed(weight)) };
        if let Some(there) = stored.in_memory() {
            return Ok(Cow::Borrowed(there));
        }
        let mut dense = self.scratch.array(stored.shape());
        stored.read_into(&mut dense)?;
        Ok(Cow::Owned(BaseWeight::Dense(dense)))
    }

    fn give_back(&mut self, weight: Cow<'_, BaseWeight<T>>) {
        if let Cow::Owned(BaseWeight::Dense(dense)) = weight {
            self.scratch.keep(dense);
        }
    }

    fn embed_from(&mut self, inputs: &CpuInputs<T>, table: &BaseWeight<T>) -> Result<Array2<T>> {
        match table {
            BaseWeight::Stored(stored) if stored.in_memory().is_none() => {
                stored.gather(&inputs.ids)
            }
            _ => embedding_forward(&inputs.ids, table.dense().view()),
        }
    }

    fn loss_through(
        &mut self,
        hidden: &Array2<T>,
        head: &BaseWeight<T>,
        inputs: &CpuInputs<T>,
        cap: Option<f64>,
        wanted: bool,
        observe: ObserveLogits<'_, Self>,
    ) -> Result<(f64, Option<Array2<T>>)> {
        self.cross_entropy(hidden, &Head::of(head), inputs, None, cap, wanted, observe)
    }

    fn embed(&mut self, inputs: &CpuInputs<T>, table: &Array2<T>) -> Result<Array2<T>> {
        embedding_forward(&inputs.ids, table.view())
    }

    fn embed_backward(
        &mut self,
        inputs: &CpuInputs<T>,
        dx: &Array2<T>,
        (sink, _): (&mut Array2<T>, (usize, usize)),
    ) -> Result<()> {
        embedding_backward(&inputs.ids, dx.view(), &mut sink.view_mut())
    }

    fn embed_positions(
        &mut self,
        inputs: &CpuInputs<T>,
        table: &Array2<T>,
        offset: usize,
    ) -> Result<Array2<T>> {
        let rows = inputs.table_rows(offset);
        if let Some(&row) = rows.iter().find(|&&row| row as usize >= table.nrows()) {
            let requirement = format!("the model has {} learned positions", table.nrows() - offset);
            return Err(Error::invalid("position_ids", row as usize - offset, requirement));
        }
        embedding_forward(&rows, table.view())
    }

    fn embed_positions_backward(
        &mut self,
        inputs: &CpuInputs<T>,
        dx: &Array2<T>,
        offset: usize,
        sink: &mut Array2<T>,
    ) -> Result<()> {
        embedding_backward(&inputs.table_rows(offset), dx.view(), &mut sink.view_mut())
    }

    fn center(&mut self, mut x: Array2<T>) -> Result<Array2<T>> {
        self.cost.elementwise += 2 * x.len() as u64;
        let width = T::of(x.ncols().max(1) as f64);
        Self::each_row(&mut x, |_, row| {
            let mean = row.iter().copied().sum::<T>() / width;
            row.iter_mut().for_each(|x| *x -= mean);
        });
        Ok(x)
    }

    fn add_matrix_row(&mut self, mut y: Array2<T>, row: &Array2<T>, s: f64) -> Result<Array2<T>> {
        self.cost.elementwise += 2 * y.len() as u64;
        y += &(row * T::of(s));
        Ok(y)
    }

    fn row_sum(&mut self, x: &Array2<T>) -> Result<Array2<T>> {
        self.cost.elementwise += x.len() as u64;
        Ok(x.sum_axis(Axis(0)).insert_axis(Axis(0)))
    }

    fn transposed(&mut self, x: &Array2<T>) -> Result<Array2<T>> {
        Ok(x.t().as_standard_layout().into_owned())
    }

    fn sunk(&mut self, sink: Array2<T>) -> Result<Array2<T>> {
        Ok(sink)
    }

    fn concat(&mut self, parts: Vec<Array2<T>>) -> Result<Array2<T>> {
        let rows = parts.first().map_or(0, Array2::nrows);
        let mut all = self.scratch.array((rows, parts.iter().map(Array2::ncols).sum()));
        let mut start = 0;
        for part in parts {
            let columns = start..start + part.ncols();
            start = columns.end;
            all.slice_mut(s![.., columns]).assign(&part);
        }
        Ok(all)
    }

    fn rms_norm(
        &mut self,
        x: &Array2<T>,
        gain: &Array1<T>,
        eps: f64,
    ) -> Result<(Array2<T>, Vec<T>)> {
        rms_norm_forward(x.view(), entries(gain)?, eps, &mut self.scratch, &mut self.cost)
    }

    fn rms_norm_backward(
        &mut self,
        dy: Array2<T>,
        (x, inverse_rms): (Array2<T>, Vec<T>),
        gain: &Array1<T>,
        sink: Option<&mut Array2<T>>,
        dx: Option<&mut Array2<T>>,
    ) -> Result<()> {
        let sink = sink.map(numbers_mut);
        let mut dx = dx.map(|dx| dx.view_mut());
        rms_norm_backward(
            dy.view(),
            x.view(),
            &inverse_rms,
            entries(gain)?,
            sink,
            dx.as_mut(),
            &mut self.cost,
        )?;
        self.scratch.keep(dy);
        self.scratch.keep(x);
        Ok(())
    }

    fn product(
        &mut self,
        x: &Array2<T>,
        weight: &BaseWeight<T>,
        add_to: Option<Array2<T>>,
    ) -> Array2<T> {
        self.multiply(x.view(), weight.dense().t(), add_to)
    }

    fn product_backward(
        &mut self,
        dy: &Array2<T>,
        weight: &BaseWeight<T>,
        add_to: Option<Array2<T>>,
    ) -> Array2<T> {
        self.multiply(dy.view(), weight.dense().view(), add_to)
    }

    fn product_with(
        &mut self,
        x: &Array2<T>,
        weight: &Array2<T>,
        add_to: Option<Array2<T>>,
    ) -> Array2<T> {
        self.multiply(x.view(), weight.t(), add_to)
    }

    fn product_with_backward(
        &mut self,
        dy: &Array2<T>,
        weight: &Array2<T>,
        add_to: Option<Array2<T>>,
    ) -> Array2<T> {
        self.multiply(dy.view(), weight.view(), add_to)
    }

    fn outer(&mut self, dy: &Array2<T>, x: &Array2<T>) -> Array2<T> {
        let mut y = Array2::zeros((dy.ncols(), x.ncols()));
        parallel_product_into(
            T::one(),
            dy.t(),
            x.view(),
            T::zero(),
            &mut y.view_mut(),
            &mut self.cost,
        );
        y
    }

    fn add_outer(
        &mut self,
        scaling: f64,
        dy: &Array2<T>,
        rows: Option<Range<usize>>,
        x: &Array2<T>,
        sink: &mut Array2<T>,
    ) -> Result<()> {
        let dy = match rows {
            Some(rows) => dy.slice(s![.., rows]),
            None => dy.view(),
        };
        linear_backward_weight(T::of(scaling), dy, x.view(), &mut sink.view_mut(), &mut self.cost)
    }

    fn small_product(
        &mut self,
        (a, turn_a): (&Array2<T>, bool),
        (b, turn_b): (&Array2<T>, bool),
    ) -> Array2<T> {
        let a = if turn_a { a.t() } else { a.view() };
        let b = if turn_b { b.t() } else { b.view() };
        parallel_product(a, b, &mut self.cost)
    }

    fn low_rank(
        &mut self,
        beside: &BesideWeight<'_, Self>,
        x: &Array2<T>,
        add_to: Option<Array2<T>>,
    ) -> (Array2<T>, Array2<T>) {
        let dense = beside.weight.dense();
        let (mut y, beta) = self.target((x.nrows(), dense.nrows()), add_to);
        let update = LowRank::of(dense.view(), beside.a, beside.b, beside.scaling);
        let z = update.forward(x.view(), beta, &mut y.view_mut(), &mut self.cost);
        (y, z)
    }

    fn low_rank_backward(
        &mut self,
        beside: &BesideWeight<'_, Self>,
        dy: &Array2<T>,
        x: &Array2<T>,
        z: &Array2<T>,
        dx: InputGradient<Array2<T>>,
    ) -> (Array2<T>, Array2<T>, Option<Array2<T>>) {
        let dense = beside.weight.dense();
        let mut dx = dx.wanted().map(|add_to| self.target(x.dim(), add_to));
        let update = LowRank::of(dense.view(), beside.a, beside.b, beside.scaling);
        let mut view = dx.as_mut().map(|(dx, beta)| (dx.view_mut(), *beta));
        let sink = view.as_mut().map(|(dx, beta)| InputSink { dx, beta: *beta });
        let (outer, da) = update.backward(dy.view(), x.view(), z.view(), sink, &mut self.cost);
        (outer, da, dx.map(|(dx, _)| dx))
    }

    fn merged(&mut self, beside: &BesideWeight<'_, Self>) -> Array2<T> {
        let mut weight = beside.weight.dense().into_owned();
        let (a, b) = (beside.a.view(), beside.b.view());
        parallel_product_into(
            T::of(beside.scaling),
            b,
            a,
            T::one(),
            &mut weight.view_mut(),
            &mut self.cost,
        );
        weight
    }

    fn row_norms(&mut self, x: &Array2<T>) -> Result<Array2<T>> {
        let norms = self.row_dots(x, x).mapv_into(T::sqrt);
        match norms.iter().position(|n| !(*n > T::zero())) {
            Some(row) => Err(Error::invalid(
                format!("norm of row {row}"),
                norms[[0, row]],
                "DoRA needs nonzero rows",
            )),
            None => Ok(norms),
        }
    }

    fn divided(&mut self, a: &Array2<T>, by: &Array2<T>) -> Array2<T> {
        a / by
    }

    fn scale_rows(&mut self, mut x: Array2<T>, factor: &Array2<T>, divide: bool) -> Array2<T> {
        self.cost.elementwise += x.len() as u64;
        Self::each_row(&mut x, |j, row| {
            let g = if divide { T::one() / factor[[0, j]] } else { factor[[0, j]] };
            vectorized_closure(
                #[inline(always)]
                || row.iter_mut().for_each(|x| *x *= g),
            );
        });
        x
    }

    fn row_dots(&mut self, a: &Array2<T>, b: &Array2<T>) -> Array2<T> {
        self.cost.elementwise += 2 * a.len() as u64;
        let mut dots = Array2::zeros((1, a.nrows()));
        numbers_mut(&mut dots)
            .par_iter_mut()
            .enumerate()
            .for_each(|(j, dot)| *dot = a.row(j).dot(&b.row(j)));
        dots
    }

    fn subtract_rows(&mut self, mut x: Array2<T>, c: &Array2<T>, d: &Array2<T>) -> Array2<T> {
        self.cost.elementwise += 2 * x.len() as u64;
        Self::each_row(&mut x, |j, row| {
            let c = c[[0, j]];
            row.iter_mut().zip(d.row(j)).for_each(|(x, &d)| *x -= c * d);
        });
        x
    }

    fn reshape(&mut self, x: Array2<T>, shape: (usize, usize)) -> Array2<T> {
        match x.into_shape_with_order(shape) {
            Ok(x) => x,
            Err(_) => unreachable!("as many numbers as before"),
        }
    }

    fn scale(&mut self, mut x: Array2<T>, s: f64) -> Array2<T> {
        self.cost.elementwise += x.len() as u64;
        x.par_mapv_inplace(|v| v * T::of(s));
        x
    }

    fn add(&mut self, mut x: Array2<T>, y: Array2<T>, s: f64) -> Array2<T> {
        self.cost.elementwise += x.len() as u64;
        x.scaled_add(T::of(s), &y);
        self.scratch.keep(y);
        x
    }

    fn add_row(&mut self, mut x: Array2<T>, row: &Array1<T>) -> Array2<T> {
        self.cost.elementwise += x.len() as u64;
        x += row;
        x
    }

    fn add_row_sums(&mut self, dx: &Array2<T>, sink: &mut Array2<T>) {
        self.cost.elementwise += dx.len() as u64;
        *sink += &dx.sum_axis(Axis(0)).insert_axis(Axis(0));
    }

    fn one_plus(&mut self, w: &Array1<T>) -> Array1<T> {
        w + T::one()
    }

    fn scaled(&mut self, x: &Array2<T>, s: f64) -> Array2<T> {
        x * T::of(s)
    }

    fn select(&mut self, x: &Array2<T>, index: &Vec<usize>) -> Array2<T> {
        let (rank, width) = (index.len(), x.ncols());
        self.cost.elementwise += (x.nrows() * rank) as u64;
        let x = x.as_standard_layout();
        let mut columns = Array2::zeros((x.nrows(), rank));
        let (to, from) = (numbers_mut(&mut columns), numbers(&x));
        let task = crate::blocks::ROWS_PER_TASK;
        to.par_chunks_mut(task * rank.max(1)).zip(from.par_chunks(task * width.max(1))).for_each(
            |(to, from)| {
                for (to, from) in to.chunks_exact_mut(rank).zip(from.chunks_exact(width)) {
                    to.iter_mut().zip(index).for_each(|(to, &i)| *to = from[i]);
                }
            },
        );
        columns
    }

    fn select_range(&mut self, x: &Array2<T>, range: Range<usize>) -> Array2<T> {
        x.slice(s![.., range]).to_owned()
    }

    fn columns(&mut self, weight: &BaseWeight<T>, index: &Vec<usize>) -> Array2<T> {
        // Selecting columns of a row-major matrix can leave them column-major.
        weight.columns(index).as_standard_layout().into_owned()
    }

    fn put_columns(&mut self, weight: &mut BaseWeight<T>, index: &Vec<usize>, values: Array2<T>) {
        weight.put_columns(index, values);
    }

    fn slice(&mut self, weight: &BaseWeight<T>, side: Side, range: Range<usize>) -> Array2<T> {
        side.of(&weight.dense().view(), range).as_standard_layout().into_owned()
    }

    fn put_slice(
        &mut self,
        weight: &mut BaseWeight<T>,
        side: Side,
        range: Range<usize>,
        values: Array2<T>,
    ) -> Result<()> {
        weight.change("s2ft", move |weight| side.of_mut(weight, range.clone()).assign(&values))?;
        Ok(())
    }

    fn dense(&mut self, weight: &BaseWeight<T>) -> Array2<T> {
        weight.dense().into_owned()
    }

    fn dense_mut<'a>(
        weight: &'a mut BaseWeight<T>,
        method: &'static str,
    ) -> Result<&'a mut Array2<T>> {
        weight.dense_mut(method)
    }

    fn put_entries(
        &mut self,
        weight: &mut Array2<T>,
        index: &Vec<usize>,
        values: &Array2<T>,
    ) -> Result<()> {
        let width = weight.ncols();
        for (&i, &x) in index.iter().zip(values) {
            weight[[i / width, i % width]] = x;
        }
        Ok(())
    }

    fn row(&mut self, vector: &Array1<T>) -> Array2<T> {
        vector.view().insert_axis(Axis(0)).to_owned()
    }

    fn put_row(&mut self, vector: &mut Array1<T>, row: Array2<T>) {
        vector.assign(&row.row(0));
    }

    fn rotate(
        &mut self,
        mut x: Array2<T>,
        inputs: &CpuInputs<T>,
        kind: usize,
        back: bool,
    ) -> Result<Array2<T>> {
        let turn = if back { rope_backward } else { rope_forward };
        turn(&mut x.view_mut(), &inputs.angles[kind], &mut self.cost)?;
        Ok(x)
    }

    fn attention(
        &mut self,
        query: Array2<T>,
        key: Array2<T>,
        value: Array2<T>,
        inputs: &CpuInputs<T>,
        scoring: &Scoring,
    ) -> Result<(Array2<T>, SavedAttention<T>)> {
        let (output, log_sum_exp) = causal_attention_forward(
            query.view(),
            key.view(),
            value.view(),
            inputs.shape,
            inputs.visible(scoring),
            Scores { scale: scoring.scale, cap: scoring.cap, errors: scoring.errors },
            &mut self.scratch,
            &mut self.cost,
        )?;
        Ok((output, SavedAttention { query, key, value, log_sum_exp }))
    }

    fn attention_backward(
        &mut self,
        doutput: Array2<T>,
        saved: SavedAttention<T>,
        output: Array2<T>,
        inputs: &CpuInputs<T>,
        scoring: &Scoring,
    ) -> Result<[Array2<T>; 3]> {
        let views = AttentionCache {
            query: saved.query.view(),
            key: saved.key.view(),
            value: saved.value.view(),
            output: output.view(),
            log_sum_exp: saved.log_sum_exp.view(),
        };
        let (dquery, dkey, dvalue) = causal_attention_backward(
            doutput.view(),
            &views,
            inputs.shape,
            inputs.visible(scoring),
            Scores { scale: scoring.scale, cap: scoring.cap, errors: scoring.errors },
            &mut self.scratch,
            &mut self.cost,
        )?;
        self.release_attention(saved);
        self.scratch.keep(output);
        self.scratch.keep(doutput);
        Ok([dquery, dkey, dvalue])
    }

    fn add_sinks(
        &mut self,
        (mut output, mut saved): (Array2<T>, SavedAttention<T>),
        sinks: &Array1<T>,
        inputs: &CpuInputs<T>,
    ) -> Result<(Array2<T>, SavedAttention<T>)> {
        attention_sinks::add_sinks(
            &mut output,
            &mut saved.log_sum_exp,
            entries(sinks)?,
            &inputs.shape,
        )?;
        Ok((output, saved))
    }

    fn sinks_backward(
        &mut self,
        doutput: &Array2<T>,
        (output, saved): (&Array2<T>, &SavedAttention<T>),
        sinks: &Array1<T>,
        inputs: &CpuInputs<T>,
        sink: &mut Array2<T>,
    ) -> Result<()> {
        let lse = saved.log_sum_exp.view();
        let d = attention_sinks::sinks_backward(
            doutput.view(),
            output.view(),
            lse,
            entries(sinks)?,
            &inputs.shape,
        )?;
        sink.iter_mut().zip(d).for_each(|(sink, d)| *sink += d);
        Ok(())
    }

    fn activated(&mut self, activation: Activation, x: &Array2<T>) -> Result<Array2<T>> {
        Ok(activation_forward(activation, x.view(), &mut self.scratch, &mut self.cost))
    }

    fn activated_backward(
        &mut self,
        activation: Activation,
        da: &Array2<T>,
        mut x: Array2<T>,
    ) -> Result<Array2<T>> {
        activation_backward(activation, da.view(), &mut x, &mut self.cost)?;
        Ok(x)
    }

    fn route(&mut self, scores: Array2<T>, choice: Choice) -> Result<Routing<T>> {
        let routing = experts::route(scores.view(), choice)?;
        self.scratch.keep(scores);
        Ok(routing)
    }

    fn route_backward(
        &mut self,
        routing: &Routing<T>,
        dweights: Vec<Array2<T>>,
    ) -> Result<Array2<T>> {
        let dweights: Vec<Vec<T>> = dweights.into_iter().map(|d| d.into_iter().collect()).collect();
        Ok(experts::route_backward(routing, &dweights))
    }

    fn routing_elements(routing: &Routing<T>) -> usize {
        routing.numbers()
    }

    fn routing_weights(&mut self, routing: &Routing<T>, expert: usize) -> Result<Array2<T>> {
        Ok(Array1::from(routing.weights[expert].clone()).insert_axis(Axis(0)))
    }

    fn dispatch(
        &mut self,
        x: &Array2<T>,
        routing: &Routing<T>,
        expert: usize,
    ) -> Result<Array2<T>> {
        let rows = &routing.rows[expert];
        let mut seen = self.scratch.array((rows.len(), x.ncols()));
        seen.rows_mut().into_iter().zip(rows).for_each(|(mut to, &i)| to.assign(&x.row(i)));
        Ok(seen)
    }

    fn combine(
        &mut self,
        mut sum: Array2<T>,
        y: Array2<T>,
        routing: &Routing<T>,
        expert: usize,
    ) -> Result<Array2<T>> {
        self.cost.elementwise += y.len() as u64;
        y.rows().into_iter().zip(&routing.rows[expert]).for_each(|(y, &i)| {
            let mut row = sum.row_mut(i);
            row += &y;
        });
        Ok(sum)
    }

    fn gated(
        &mut self,
        activation: Activation,
        gate: &Array2<T>,
        up: &Array2<T>,
    ) -> Result<Array2<T>> {
        gated_forward(activation, gate.view(), up.view(), &mut self.scratch, &mut self.cost)
    }

    fn gated_backward(
        &mut self,
        activation: Activation,
        da: &Array2<T>,
        mut gate: Array2<T>,
        mut up: Array2<T>,
    ) -> Result<(Array2<T>, Array2<T>)> {
        gated_backward(activation, da.view(), &mut gate, &mut up, &mut self.cost)?;
        Ok((gate, up))
    }

    fn loss(
        &mut self,
        hidden: &Array2<T>,
        head: &Array2<T>,
        inputs: &CpuInputs<T>,
        sink: Option<&mut Array2<T>>,
        cap: Option<f64>,
        wanted: bool,
        observe: ObserveLogits<'_, Self>,
    ) -> Result<(f64, Option<Array2<T>>)> {
        self.cross_entropy(hidden, &Head::Whole(head.view()), inputs, sink, cap, wanted, observe)
    }
}
