//! The operations of a training step on a device.

use super::blocks::causal_attention::{
    AttentionSaved, Padding, causal_attention_backward, causal_attention_forward, join_keys,
    join_queries, split_keys, split_queries, tile_rows,
};
use super::blocks::cross_entropy::{Targets, cross_entropy};
use super::blocks::embedding::{embedding_backward, embedding_forward};
use super::blocks::linear::{linear_backward_input, linear_backward_weight, linear_forward};
use super::blocks::rms_norm::{rms_norm_backward, rms_norm_forward};
use super::blocks::rope::{RotaryAngles, rope_backward, rope_forward};
use super::blocks::swiglu::{gated_backward, gated_forward};
use super::blocks::{Matrix, Sink, accumulate, product};
use super::model::DeviceLoss;
use crate::adapters::s2ft::Side;
use crate::blocks::causal_attention::AttentionShape;
use crate::blocks::swiglu::Activation;
use crate::error::Result;
use crate::gpu::{Engine, Precision};
use crate::ops::{BesideWeight, InputGradient, ObserveLogits, Ops, Scoring};
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use std::ops::Range;

/// A device as an engine of operations. A tensor is a reference to device memory: what a step no
/// longer needs is dropped.
#[derive(Debug, Clone)]
pub struct Gpu<B: Engine> {
    /// Burn's handle.
    pub device: B::Device,
    /// What products round their operands to.
    pub products: Precision,
}

/// A batch on a device.
#[derive(Debug)]
pub struct DeviceInputs<B: Engine> {
    pub(super) ids: Tensor<B, 1, Int>,
    pub(super) shape: AttentionShape,
    pub(super) padding: Option<Padding<B>>,
    pub(super) angles: Vec<RotaryAngles<B>>,
    pub(super) targets: Targets<B>,
    pub(super) divisor: f64,
}

fn plus<B: Engine>(x: Matrix<B>, add_to: Option<Matrix<B>>) -> Matrix<B> {
    match add_to {
        Some(sum) => sum + x,
        None => x,
    }
}

/// A `1 x n` matrix as a column.
fn column<B: Engine>(row: &Matrix<B>) -> Matrix<B> {
    row.clone().reshape([row.dims()[1], 1])
}

fn turned<B: Engine>((x, turn): (&Matrix<B>, bool)) -> Matrix<B> {
    if turn { x.clone().transpose() } else { x.clone() }
}

impl<B: Engine> Ops for Gpu<B> {
    type Matrix = Matrix<B>;
    type Vector = Matrix<B>;
    type Weight = Matrix<B>;
    type Index = Tensor<B, 1, Int>;
    type Sink = Sink<B>;
    type RowStats = Matrix<B>;
    type Attention = AttentionSaved<B>;
    type Inputs = DeviceInputs<B>;
    type Loss = DeviceLoss<B>;
    type Routing = std::convert::Infallible;

    fn shape(x: &Matrix<B>) -> (usize, usize) {
        let [rows, columns] = x.dims();
        (rows, columns)
    }

    fn weight_shape(weight: &Matrix<B>) -> (usize, usize) {
        Self::shape(weight)
    }

    fn index_length(index: &Tensor<B, 1, Int>) -> usize {
        index.dims()[0]
    }

    fn stats_length(stats: &Matrix<B>) -> usize {
        stats.shape().num_elements()
    }

    fn attention_elements(saved: &AttentionSaved<B>) -> [(&'static str, usize); 4] {
        [
            ("query", saved.query.shape().num_elements()),
            ("key", saved.key.shape().num_elements()),
            ("value", saved.value.shape().num_elements()),
            ("log_sum_exp", saved.log_sum_exp.shape().num_elements()),
        ]
    }

    fn angle_elements(inputs: &DeviceInputs<B>) -> usize {
        inputs.angles.iter().map(RotaryAngles::elements).sum()
    }

    fn release(&mut self, _: Matrix<B>) {}

    fn release_attention(&mut self, _: AttentionSaved<B>) {}

    fn copy(&mut self, x: &Matrix<B>) -> Matrix<B> {
        x.clone()
    }

    fn zeros(&mut self, (rows, columns): (usize, usize)) -> Matrix<B> {
        Tensor::zeros([rows, columns], &self.device)
    }

    /// Absent until the first contribution, so that no buffer of zeros exists.
    fn sink(&self, _: (usize, usize)) -> Sink<B> {
        None
    }

    fn accumulate(&mut self, sink: &mut Sink<B>, factor: f64, x: &Matrix<B>) {
        accumulate(sink, self.scaled(x, factor));
    }

    fn embed(&mut self, inputs: &DeviceInputs<B>, table: &Matrix<B>) -> Result<Matrix<B>> {
        Ok(embedding_forward(&inputs.ids, table))
    }

    fn embed_backward(
        &mut self,
        inputs: &DeviceInputs<B>,
        dx: &Matrix<B>,
        (sink, table): (&mut Sink<B>, (usize, usize)),
    ) -> Result<()> {
        embedding_backward(&inputs.ids, dx.clone(), table.0, sink);
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &Matrix<B>,
        gain: &Matrix<B>,
        eps: f64,
    ) -> Result<(Matrix<B>, Matrix<B>)> {
        Ok(rms_norm_forward(x, gain, eps))
    }

    fn rms_norm_backward(
        &mut self,
        dy: Matrix<B>,
        (x, inverse_rms): (Matrix<B>, Matrix<B>),
        gain: &Matrix<B>,
        sink: Option<&mut Sink<B>>,
        dx: Option<&mut Matrix<B>>,
    ) -> Result<()> {
        let own = rms_norm_backward(dy, x, inverse_rms, gain, sink, dx.is_some());
        if let (Some(dx), Some(own)) = (dx, own) {
            dx.inplace(|dx| dx + own);
        }
        Ok(())
    }

    fn product(
        &mut self,
        x: &Matrix<B>,
        weight: &Matrix<B>,
        add_to: Option<Matrix<B>>,
    ) -> Matrix<B> {
        plus(linear_forward(x, weight, self.products), add_to)
    }

    fn product_backward(
        &mut self,
        dy: &Matrix<B>,
        weight: &Matrix<B>,
        add_to: Option<Matrix<B>>,
    ) -> Matrix<B> {
        plus(linear_backward_input(dy, weight, self.products), add_to)
    }

    fn product_with(
        &mut self,
        x: &Matrix<B>,
        weight: &Matrix<B>,
        add_to: Option<Matrix<B>>,
    ) -> Matrix<B> {
        self.product(x, weight, add_to)
    }

    fn product_with_backward(
        &mut self,
        dy: &Matrix<B>,
        weight: &Matrix<B>,
        add_to: Option<Matrix<B>>,
    ) -> Matrix<B> {
        self.product_backward(dy, weight, add_to)
    }

    fn outer(&mut self, dy: &Matrix<B>, x: &Matrix<B>) -> Matrix<B> {
        linear_backward_weight(dy, x, self.products)
    }

    fn add_outer(
        &mut self,
        scaling: f64,
        dy: &Matrix<B>,
        rows: Option<Range<usize>>,
        x: &Matrix<B>,
        sink: &mut Sink<B>,
    ) -> Result<()> {
        let outer = match rows {
            Some(rows) => linear_backward_weight(
                &dy.clone().narrow(1, rows.start, rows.len()),
                x,
                self.products,
            ),
            None => linear_backward_weight(dy, x, self.products),
        };
        self.accumulate(sink, scaling, &outer);
        Ok(())
    }

    fn small_product(&mut self, a: (&Matrix<B>, bool), b: (&Matrix<B>, bool)) -> Matrix<B> {
        product(turned(a), turned(b), self.products)
    }

    fn low_rank(
        &mut self,
        beside: &BesideWeight<'_, Self>,
        x: &Matrix<B>,
        add_to: Option<Matrix<B>>,
    ) -> (Matrix<B>, Matrix<B>) {
        let z = linear_forward(x, beside.a, self.products);
        let update = linear_forward(&z, beside.b, self.products).mul_scalar(beside.scaling);
        (self.product(x, beside.weight, add_to) + update, z)
    }

    fn low_rank_backward(
        &mut self,
        beside: &BesideWeight<'_, Self>,
        dy: &Matrix<B>,
        x: &Matrix<B>,
        z: &Matrix<B>,
        dx: InputGradient<Matrix<B>>,
    ) -> (Matrix<B>, Matrix<B>, Option<Matrix<B>>) {
        let dz = linear_backward_input(dy, beside.b, self.products).mul_scalar(beside.scaling);
        let dx = dx.wanted().map(|add_to| {
            let whole = self.product_backward(dy, beside.weight, add_to);
            whole + linear_backward_input(&dz, beside.a, self.products)
        });
        (
            linear_backward_weight(dy, z, self.products),
            linear_backward_weight(&dz, x, self.products),
            dx,
        )
    }

    fn merged(&mut self, beside: &BesideWeight<'_, Self>) -> Matrix<B> {
        beside.weight.clone()
            + product(beside.b.clone(), beside.a.clone(), self.products).mul_scalar(beside.scaling)
    }

    fn row_norms(&mut self, x: &Matrix<B>) -> Result<Matrix<B>> {
        Ok(self.row_dots(x, x).sqrt())
    }

    fn divided(&mut self, a: &Matrix<B>, by: &Matrix<B>) -> Matrix<B> {
        a.clone() / by.clone()
    }

    fn scale_rows(&mut self, x: Matrix<B>, factor: &Matrix<B>, divide: bool) -> Matrix<B> {
        if divide { x / column(factor) } else { x * column(factor) }
    }

    fn row_dots(&mut self, a: &Matrix<B>, b: &Matrix<B>) -> Matrix<B> {
        let rows = a.dims()[0];
        (a.clone() * b.clone()).sum_dim(1).reshape([1, rows])
    }

    fn subtract_rows(&mut self, x: Matrix<B>, c: &Matrix<B>, d: &Matrix<B>) -> Matrix<B> {
        x - d.clone() * column(c)
    }

    fn reshape(&mut self, x: Matrix<B>, (rows, columns): (usize, usize)) -> Matrix<B> {
        x.reshape([rows, columns])
    }

    fn scale(&mut self, x: Matrix<B>, s: f64) -> Matrix<B> {
        x.mul_scalar(s)
    }

    fn add(&mut self, x: Matrix<B>, y: Matrix<B>, s: f64) -> Matrix<B> {
        x + y.mul_scalar(s)
    }

    fn add_row(&mut self, x: Matrix<B>, row: &Matrix<B>) -> Matrix<B> {
        x + row.clone()
    }

    fn add_row_sums(&mut self, dx: &Matrix<B>, sink: &mut Sink<B>) {
        accumulate(sink, dx.clone().sum_dim(0));
    }

    fn one_plus(&mut self, w: &Matrix<B>) -> Matrix<B> {
        w.clone().add_scalar(1.0)
    }

    fn scaled(&mut self, x: &Matrix<B>, s: f64) -> Matrix<B> {
        if s.to_bits() == 1f64.to_bits() { x.clone() } else { x.clone().mul_scalar(s) }
    }

    fn select(&mut self, x: &Matrix<B>, index: &Tensor<B, 1, Int>) -> Matrix<B> {
        x.clone().select(1, index.clone())
    }

    /// By `select`, which copies: a slice could be a view, which keeps all of x alive.
    fn select_range(&mut self, x: &Matrix<B>, range: Range<usize>) -> Matrix<B> {
        let index = Tensor::arange(range.start as i64..range.end as i64, &self.device);
        self.select(x, &index)
    }

    fn columns(&mut self, weight: &Matrix<B>, index: &Tensor<B, 1, Int>) -> Matrix<B> {
        self.select(weight, index)
    }

    fn put_columns(
        &mut self,
        weight: &mut Matrix<B>,
        index: &Tensor<B, 1, Int>,
        values: Matrix<B>,
    ) {
        let moved = values - self.select(weight, index);
        // Columns can only be added to; the sum rounds once more than an assignment would.
        weight
            .inplace(|weight| weight.select_assign(1, index.clone(), moved, IndexingUpdateOp::Add));
    }

    fn slice(&mut self, weight: &Matrix<B>, side: Side, range: Range<usize>) -> Matrix<B> {
        let axis = if side == Side::Output { 0 } else { 1 };
        weight.clone().narrow(axis, range.start, range.len())
    }

    fn put_slice(
        &mut self,
        weight: &mut Matrix<B>,
        side: Side,
        range: Range<usize>,
        values: Matrix<B>,
    ) -> Result<()> {
        let [rows, columns] = weight.dims();
        let place = match side {
            Side::Output => [range, 0..columns],
            Side::Input => [0..rows, range],
        };
        weight.inplace(|weight| weight.slice_assign(place, values));
        Ok(())
    }

    fn dense(&mut self, weight: &Matrix<B>) -> Matrix<B> {
        weight.clone()
    }

    fn dense_mut<'a>(weight: &'a mut Matrix<B>, _: &'static str) -> Result<&'a mut Matrix<B>> {
        Ok(weight)
    }

    fn row(&mut self, vector: &Matrix<B>) -> Matrix<B> {
        vector.clone()
    }

    fn put_row(&mut self, vector: &mut Matrix<B>, row: Matrix<B>) {
        *vector = row;
    }

    fn rotate(
        &mut self,
        x: Matrix<B>,
        inputs: &DeviceInputs<B>,
        kind: usize,
        back: bool,
    ) -> Result<Matrix<B>> {
        let angles = &inputs.angles[kind];
        Ok(if back { rope_backward(x, angles) } else { rope_forward(x, angles) })
    }

    /// Causal and not capped: models that need more are refused before they are uploaded.
    fn attention(
        &mut self,
        query: Matrix<B>,
        key: Matrix<B>,
        value: Matrix<B>,
        inputs: &DeviceInputs<B>,
        scoring: &Scoring,
    ) -> Result<(Matrix<B>, AttentionSaved<B>)> {
        let shape = &inputs.shape;
        let (query, key, value) =
            (split_queries(query, shape), split_keys(key, shape), split_keys(value, shape));
        let (padding, tile) = (inputs.padding.as_ref(), tile_rows(shape));
        let (scale, products) = (scoring.scale, self.products);
        let (output, log_sum_exp) =
            causal_attention_forward(&query, &key, &value, shape, padding, scale, tile, products);
        Ok((join_queries(output, shape), AttentionSaved { query, key, value, log_sum_exp }))
    }

    fn attention_backward(
        &mut self,
        doutput: Matrix<B>,
        saved: AttentionSaved<B>,
        output: Matrix<B>,
        inputs: &DeviceInputs<B>,
        scoring: &Scoring,
    ) -> Result<[Matrix<B>; 3]> {
        let shape = &inputs.shape;
        let (upstream, output) = (split_queries(doutput, shape), split_queries(output, shape));
        let (padding, tile) = (inputs.padding.as_ref(), tile_rows(shape));
        let (dquery, dkey, dvalue) = causal_attention_backward(
            upstream,
            saved,
            output,
            shape,
            padding,
            scoring.scale,
            tile,
            self.products,
        );
        Ok([join_queries(dquery, shape), join_keys(dkey, shape), join_keys(dvalue, shape)])
    }

    fn gated(
        &mut self,
        activation: Activation,
        gate: &Matrix<B>,
        up: &Matrix<B>,
    ) -> Result<Matrix<B>> {
        Ok(gated_forward(activation, gate, up))
    }

    fn gated_backward(
        &mut self,
        activation: Activation,
        da: &Matrix<B>,
        gate: Matrix<B>,
        up: Matrix<B>,
    ) -> Result<(Matrix<B>, Matrix<B>)> {
        Ok(gated_backward(activation, da.clone(), gate, up))
    }

    fn loss(
        &mut self,
        hidden: &Matrix<B>,
        head: &Matrix<B>,
        inputs: &DeviceInputs<B>,
        sink: Option<&mut Sink<B>>,
        _: Option<f64>,
        wanted: bool,
        observe: ObserveLogits<'_, Self>,
    ) -> Result<(DeviceLoss<B>, Option<Matrix<B>>)> {
        let divisor = inputs.divisor;
        let (losses, dhidden) = cross_entropy(
            hidden,
            head,
            &inputs.targets,
            divisor,
            sink,
            wanted,
            observe,
            self.products,
        );
        Ok((DeviceLoss { losses, divisor }, dhidden))
    }
}
