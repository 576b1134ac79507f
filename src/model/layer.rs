//! One decoder layer: h = x + o(attention(norm(x))), out = h + down(swiglu(norm(h))).

use super::gradients::LayerGradients;
use super::instruments::{Instruments, Point};
use super::parameters::{Model, Projection};
use crate::adapters::{AdaptedLinear, InputNeed, InputSink, LinearSaved};
use crate::blocks::causal_attention::{
    AttentionCache, AttentionShape, Visibility, causal_attention_backward, causal_attention_forward,
};
use crate::blocks::rms_norm::{rms_norm_backward, rms_norm_forward};
use crate::blocks::rope::{RopeTable, rope_backward, rope_forward};
use crate::blocks::swiglu::{swiglu_backward, swiglu_forward};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::{Real, Scratch};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};

/// Weights of a layer.
#[derive(Debug, Clone)]
pub struct Layer<T> {
    projections: [AdaptedLinear<T>; 7],
    /// Gain of the norm before attention.
    pub input_norm: Array1<T>,
    /// Gain of the norm before the feed-forward part.
    pub post_attention_norm: Array1<T>,
    /// How heads and channels are ordered relative to the checkpoint, after an S2FT co-permutation.
    pub order: Option<super::s2ft::LayerOrder>,
}

impl<T: Real> Layer<T> {
    /// From projections in the order of [`Projection::ALL`] and the two gains.
    pub fn new(projections: [AdaptedLinear<T>; 7], input_norm: Array1<T>, post_attention_norm: Array1<T>) -> Self {
        Self { projections, input_norm, post_attention_norm, order: None }
    }

    /// A projection.
    pub fn projection(&self, p: Projection) -> &AdaptedLinear<T> {
        &self.projections[p as usize]
    }

    /// A projection, to be changed.
    pub fn projection_mut(&mut self, p: Projection) -> &mut AdaptedLinear<T> {
        &mut self.projections[p as usize]
    }

    fn trains(&self, ps: &[Projection]) -> bool {
        ps.iter().any(|&p| self.projection(p).is_trainable())
    }

    fn needs_whole_input(&self, ps: &[Projection]) -> bool {
        ps.iter().any(|&p| self.projection(p).method.input_need() == InputNeed::Whole)
    }
}

/// Which gradients a layer's backward must form; everything else is neither saved nor computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerNeeds {
    /// Of the layer's input: something below is trained.
    pub input: bool,
    /// Of the first normalised input, hence through attention.
    pub normed_input: bool,
    /// Of q, k, v.
    pub attention: bool,
    /// Of h, the sum after attention.
    pub middle: bool,
    /// Of the second normalised input.
    pub normed_middle: bool,
    /// Of gate and up.
    pub gated: bool,
    /// Of anything at all.
    pub any: bool,
}

impl LayerNeeds {
    pub fn of<T: Real>(model: &Model<T>, index: usize) -> Self {
        use Projection::*;
        let (layer, norms) = (&model.layers[index], model.trainable.norms);
        let input = model.trained_below(index);
        let normed_input = input || norms;
        let attention = normed_input || layer.trains(&[Query, Key, Value]);
        let middle = attention || layer.trains(&[Output]);
        let normed_middle = middle || norms;
        let gated = normed_middle || layer.trains(&[Gate, Up]);
        let any = gated || layer.trains(&[Down]);
        Self { input, normed_input, attention, middle, normed_middle, gated, any }
    }
}

/// Sizes and tables that a layer shares with its siblings, and its own number.
#[derive(Clone, Copy)]
pub(super) struct Context<'a, T> {
    pub layer: usize,
    pub attention: AttentionShape,
    pub visible: Visibility<'a>,
    pub rope: &'a RopeTable<T>,
    pub eps: f64,
    pub instruments: Instruments<'a, T>,
    /// Added to every projection's output, in forwards that save nothing.
    pub extra: Option<&'a AddToOutput<'a, T>>,
}

/// `((layer, projection), x, y, cost)`: adds to the output y, `N x out`, of a projection with input x, `N x in`.
pub(super) type AddToOutput<'a, T> =
    dyn Fn((usize, Projection), ArrayView2<T>, &mut ArrayViewMut2<T>, &mut Cost) -> Result<()> + 'a;

impl<T> Context<'_, T> {
    fn scale(&self) -> f64 {
        self.instruments.scale.unwrap_or_else(|| 1.0 / (self.attention.head_dim as f64).sqrt())
    }

    /// Shows a tensor that has just been computed.
    fn tap(&self, point: Point, tensor: &mut Array2<T>) {
        self.instruments.tap(Some(self.layer), point, false, tensor);
    }

    /// Shows a gradient that has just been computed.
    fn tap_gradient(&self, point: Point, tensor: &mut Array2<T>) {
        self.instruments.tap(Some(self.layer), point, true, tensor);
    }
}

/// What a layer keeps for its backward; a field is `None` when no trainable tensor needs it.
#[derive(Debug, Clone)]
pub struct LayerCache<T> {
    /// x, input of the first norm.
    pub input: Option<Array2<T>>,
    /// 1 / rms of its rows.
    pub input_inverse_rms: Vec<T>,
    /// Normalised x, input of q, k, v.
    pub normed_input: Option<Array2<T>>,
    /// Queries after rotary embedding.
    pub query: Option<Array2<T>>,
    /// Keys after rotary embedding.
    pub key: Option<Array2<T>>,
    /// Values.
    pub value: Option<Array2<T>>,
    /// Output of attention, input of o.
    pub attention_output: Option<Array2<T>>,
    /// Log-sum-exp of the scores, `(B H) x T`.
    pub log_sum_exp: Option<Array2<T>>,
    /// h, input of the second norm.
    pub middle: Option<Array2<T>>,
    /// 1 / rms of its rows.
    pub middle_inverse_rms: Vec<T>,
    /// Normalised h, input of gate and up.
    pub normed_middle: Option<Array2<T>>,
    /// Output of the gate projection, before silu.
    pub gate: Option<Array2<T>>,
    /// Output of the up projection.
    pub up: Option<Array2<T>>,
    /// silu(gate) o up, input of down.
    pub gated: Option<Array2<T>>,
    /// What each projection's method keeps beside its input.
    pub projections: [LinearSaved<T>; 7],
}

impl<T: Real> LayerCache<T> {
    /// (name, bytes) of every saved tensor.
    pub fn saved_bytes_by_name(&self) -> Vec<(String, usize)> {
        let mut all = Vec::new();
        let arrays = [
            ("input", &self.input),
            ("normed_input", &self.normed_input),
            ("query", &self.query),
            ("key", &self.key),
            ("value", &self.value),
            ("attention_output", &self.attention_output),
            ("log_sum_exp", &self.log_sum_exp),
            ("middle", &self.middle),
            ("normed_middle", &self.normed_middle),
            ("gate", &self.gate),
            ("up", &self.up),
            ("gated", &self.gated),
        ];
        for (name, array) in arrays {
            all.extend(array.as_ref().map(|a| (name.to_string(), a.len())));
        }
        for (name, values) in
            [("input_inverse_rms", &self.input_inverse_rms), ("middle_inverse_rms", &self.middle_inverse_rms)]
        {
            if !values.is_empty() {
                all.push((name.to_string(), values.len()));
            }
        }
        for (p, saved) in Projection::ALL.into_iter().zip(&self.projections) {
            let path = p.module();
            all.extend(saved.projected.as_ref().map(|a| (format!("{path}.projected"), a.len())));
            all.extend(saved.columns.as_ref().map(|a| (format!("{path}.columns"), a.len())));
        }
        all.into_iter().map(|(name, elements)| (name, elements * size_of::<T>())).collect()
    }
}

/// The array if it is wanted; otherwise its buffer goes back.
fn retain<T: Real>(wanted: bool, array: Array2<T>, scratch: &mut Scratch<T>) -> Option<Array2<T>> {
    if wanted {
        return Some(array);
    }
    scratch.keep(array);
    None
}

/// Runs a layer; with `needs`, returns what backward must find.
pub(super) fn layer_forward<T: Real>(
    layer: &Layer<T>,
    x: Array2<T>,
    context: &Context<'_, T>,
    needs: Option<LayerNeeds>,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Result<(Array2<T>, Option<LayerCache<T>>)> {
    use Projection::*;
    let keep = |wanted: fn(LayerNeeds) -> bool| needs.is_some_and(wanted);
    let save = needs.is_some();
    let extra = |p: Projection, x: &Array2<T>, y: &mut Array2<T>, cost: &mut Cost| match context.extra {
        Some(add) => add((context.layer, p), x.view(), &mut y.view_mut(), cost),
        None => Ok(()),
    };
    let project = |p: Projection, x: &Array2<T>, scratch: &mut Scratch<T>, cost: &mut Cost| {
        let (mut y, saved) = layer.projection(p).forward(x.view(), save, scratch, cost)?;
        extra(p, x, &mut y, cost)?;
        Ok::<_, Error>((y, saved))
    };

    let gain = layer.input_norm.to_vec();
    let (mut normed, input_inverse_rms) = rms_norm_forward(x.view(), &gain, context.eps, scratch, cost)?;
    context.tap(Point::NormedInput, &mut normed);
    let (mut query, saved_query) = project(Query, &normed, scratch, cost)?;
    let (mut key, saved_key) = project(Key, &normed, scratch, cost)?;
    let (mut value, saved_value) = project(Value, &normed, scratch, cost)?;
    context.tap(Point::Query, &mut query);
    context.tap(Point::Key, &mut key);
    context.tap(Point::Value, &mut value);
    let normed_input = retain(save && layer.needs_whole_input(&[Query, Key, Value]), normed, scratch);
    rope_forward(&mut query.view_mut(), context.rope, cost)?;
    rope_forward(&mut key.view_mut(), context.rope, cost)?;
    context.tap(Point::RotatedQuery, &mut query);
    context.tap(Point::RotatedKey, &mut key);
    let (shape, visible, scale) = (context.attention, context.visible, context.scale());
    let (mut attended, log_sum_exp) =
        causal_attention_forward(query.view(), key.view(), value.view(), shape, visible, scale, scratch, cost)?;
    context.tap(Point::Attended, &mut attended);
    let attention = keep(|n| n.attention);
    let [query, key, value, log_sum_exp] = [query, key, value, log_sum_exp].map(|a| retain(attention, a, scratch));

    let normed_input_backward = keep(|n| n.normed_input);
    let (mut middle, input) = if normed_input_backward { (scratch.copy(&x), Some(x)) } else { (x, None) };
    let output = layer.projection(Output);
    let saved_output = output.forward_into(attended.view(), T::one(), &mut middle.view_mut(), save, cost)?;
    extra(Output, &attended, &mut middle, cost)?;
    context.tap(Point::Middle, &mut middle);
    let attention_output = retain(attention || (save && layer.needs_whole_input(&[Output])), attended, scratch);

    let gain = layer.post_attention_norm.to_vec();
    let (mut normed, middle_inverse_rms) = rms_norm_forward(middle.view(), &gain, context.eps, scratch, cost)?;
    context.tap(Point::NormedMiddle, &mut normed);
    let (mut gate, saved_gate) = project(Gate, &normed, scratch, cost)?;
    let (mut up, saved_up) = project(Up, &normed, scratch, cost)?;
    context.tap(Point::Gate, &mut gate);
    context.tap(Point::Up, &mut up);
    let normed_middle = retain(save && layer.needs_whole_input(&[Gate, Up]), normed, scratch);
    let mut gated = swiglu_forward(gate.view(), up.view(), scratch, cost)?;
    context.tap(Point::Gated, &mut gated);
    let gated_backward = keep(|n| n.gated);
    let [gate, up] = [gate, up].map(|a| retain(gated_backward, a, scratch));

    let normed_middle_backward = keep(|n| n.normed_middle);
    let (mut out, middle) = if normed_middle_backward { (scratch.copy(&middle), Some(middle)) } else { (middle, None) };
    let saved_down = layer.projection(Down).forward_into(gated.view(), T::one(), &mut out.view_mut(), save, cost)?;
    extra(Down, &gated, &mut out, cost)?;
    context.tap(Point::Output, &mut out);
    let gated = retain(save && layer.needs_whole_input(&[Down]), gated, scratch);
    if needs.is_none_or(|n| !n.any) {
        return Ok((out, None));
    }
    let cache = LayerCache {
        input,
        input_inverse_rms: if normed_input_backward { input_inverse_rms } else { Vec::new() },
        normed_input,
        query,
        key,
        value,
        attention_output,
        log_sum_exp,
        middle,
        middle_inverse_rms: if normed_middle_backward { middle_inverse_rms } else { Vec::new() },
        normed_middle,
        gate,
        up,
        gated,
        projections: [saved_query, saved_key, saved_value, saved_output, saved_gate, saved_up, saved_down],
    };
    Ok((out, Some(cache)))
}

fn take<T>(field: &mut Option<Array2<T>>, name: &str) -> Result<Array2<T>> {
    field.take().ok_or_else(|| Error::invalid(name, "absent", "the layer's forward must save it"))
}

/// One layer's backward under way: what its steps share.
struct Backward<'a, T> {
    layer: &'a Layer<T>,
    saved: [LinearSaved<T>; 7],
    sinks: &'a mut LayerGradients<T>,
    scratch: &'a mut Scratch<T>,
    cost: &'a mut Cost,
}

impl<T: Real> Backward<'_, T> {
    /// Backward of a projection; dx = beta dx + its input's gradient.
    fn project(
        &mut self,
        p: Projection,
        dy: &Array2<T>,
        x: &Option<Array2<T>>,
        dx: Option<&mut Array2<T>>,
        beta: T,
    ) -> Result<()> {
        let (x, mut dx) = (x.as_ref().map(|x| x.view()), dx.map(|dx| dx.view_mut()));
        let sinks = &mut self.sinks.projections[p as usize];
        let saved = &self.saved[p as usize];
        let dx = dx.as_mut().map(|dx| InputSink { dx, beta });
        self.layer.projection(p).backward(dy.view(), x, saved, sinks, dx, self.cost)
    }

    /// An array for the gradient of a projection's input, if wanted.
    fn input_gradient(&mut self, wanted: bool, rows: usize, p: Projection) -> Option<Array2<T>> {
        let width = self.layer.projection(p).shape().1;
        wanted.then(|| self.scratch.array((rows, width)))
    }

    fn release(&mut self, arrays: impl IntoIterator<Item = Option<Array2<T>>>) {
        arrays.into_iter().flatten().for_each(|a| self.scratch.keep(a));
    }
}

/// The layer's backward, in the reverse order of [`layer_forward`]. `dout` is the gradient of the output; the
/// result is that of the input, or `None` when nothing below is trained.
#[allow(clippy::too_many_arguments)] // forward's arguments, the upstream gradient and the sinks
pub(super) fn layer_backward<T: Real>(
    layer: &Layer<T>,
    mut cache: LayerCache<T>,
    dout: Array2<T>,
    context: &Context<'_, T>,
    needs: LayerNeeds,
    sinks: &mut LayerGradients<T>,
    scratch: &mut Scratch<T>,
    cost: &mut Cost,
) -> Result<Option<Array2<T>>> {
    use Projection::*;
    let (one, zero) = (T::one(), T::zero());
    let rows = dout.nrows();
    let saved = std::mem::take(&mut cache.projections);
    let mut run = Backward { layer, saved, sinks, scratch, cost };
    // The gradient of h starts as that of the output (residual path) and collects the rest in place.
    let mut dx = dout;

    // out = h + down(gated)
    let mut dgated = run.input_gradient(needs.gated, rows, Down);
    run.project(Down, &dx, &cache.gated, dgated.as_mut(), zero)?;
    run.release([cache.gated.take()]);
    let Some(mut dgated) = dgated else { return Ok(None) };
    context.tap_gradient(Point::Gated, &mut dgated);
    // gated = silu(gate) o up
    let (mut gate, mut up) = (take(&mut cache.gate, "gate")?, take(&mut cache.up, "up")?);
    swiglu_backward(dgated.view(), &mut gate, &mut up, run.cost)?;
    context.tap_gradient(Point::Gate, &mut gate);
    context.tap_gradient(Point::Up, &mut up);
    run.release([Some(dgated)]);
    // gate = gate_proj(normed), up = up_proj(normed)
    let mut dnormed = run.input_gradient(needs.normed_middle, rows, Gate);
    run.project(Gate, &gate, &cache.normed_middle, dnormed.as_mut(), zero)?;
    run.project(Up, &up, &cache.normed_middle, dnormed.as_mut(), one)?;
    run.release([Some(gate), Some(up), cache.normed_middle.take()]);
    // normed = norm(h)
    if let Some(mut dnormed) = dnormed {
        context.tap_gradient(Point::NormedMiddle, &mut dnormed);
        let middle = take(&mut cache.middle, "middle")?;
        let gain = layer.post_attention_norm.to_vec();
        let sink = run.sinks.post_attention_norm.as_mut().and_then(Array2::as_slice_mut);
        let mut view = dx.view_mut();
        let dmiddle = needs.middle.then_some(&mut view);
        let inverse = &cache.middle_inverse_rms;
        rms_norm_backward(dnormed.view(), middle.view(), inverse, &gain, sink, dmiddle, run.cost)?;
        run.release([Some(dnormed), Some(middle)]);
        context.tap_gradient(Point::Middle, &mut dx);
    }
    if !needs.middle {
        return Ok(None);
    }
    // h = x + o(attended)
    let mut dattended = run.input_gradient(needs.attention, rows, Output);
    run.project(Output, &dx, &cache.attention_output, dattended.as_mut(), zero)?;
    let Some(mut dattended) = dattended else { return Ok(None) };
    context.tap_gradient(Point::Attended, &mut dattended);
    // attended = attention(rope(q), rope(k), v)
    let (query, key, value) =
        (take(&mut cache.query, "query")?, take(&mut cache.key, "key")?, take(&mut cache.value, "value")?);
    let attended = take(&mut cache.attention_output, "attention_output")?;
    let log_sum_exp = take(&mut cache.log_sum_exp, "log_sum_exp")?;
    let views = AttentionCache {
        query: query.view(),
        key: key.view(),
        value: value.view(),
        output: attended.view(),
        log_sum_exp: log_sum_exp.view(),
    };
    let (shape, visible, scale) = (context.attention, context.visible, context.scale());
    let (mut dquery, mut dkey, mut dvalue) =
        causal_attention_backward(dattended.view(), &views, shape, visible, scale, run.scratch, run.cost)?;
    context.tap_gradient(Point::RotatedQuery, &mut dquery);
    context.tap_gradient(Point::RotatedKey, &mut dkey);
    context.tap_gradient(Point::Value, &mut dvalue);
    run.release([query, key, value, attended, log_sum_exp, dattended].map(Some));
    rope_backward(&mut dquery.view_mut(), context.rope, run.cost)?;
    rope_backward(&mut dkey.view_mut(), context.rope, run.cost)?;
    context.tap_gradient(Point::Query, &mut dquery);
    context.tap_gradient(Point::Key, &mut dkey);
    // q, k, v = projections of normed
    let mut dnormed = run.input_gradient(needs.normed_input, rows, Query);
    for (p, dy, beta) in [(Query, &dquery, zero), (Key, &dkey, one), (Value, &dvalue, one)] {
        run.project(p, dy, &cache.normed_input, dnormed.as_mut(), beta)?;
    }
    run.release([Some(dquery), Some(dkey), Some(dvalue), cache.normed_input.take()]);
    // normed = norm(x)
    if let Some(mut dnormed) = dnormed {
        context.tap_gradient(Point::NormedInput, &mut dnormed);
        let input = take(&mut cache.input, "input")?;
        let gain = layer.input_norm.to_vec();
        let sink = run.sinks.input_norm.as_mut().and_then(Array2::as_slice_mut);
        let mut view = dx.view_mut();
        let dinput = needs.input.then_some(&mut view);
        rms_norm_backward(dnormed.view(), input.view(), &cache.input_inverse_rms, &gain, sink, dinput, run.cost)?;
        run.release([Some(dnormed), Some(input)]);
    }
    Ok(needs.input.then_some(dx))
}
