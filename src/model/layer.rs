//! One decoder layer: h = x + o(attention(norm(x))), out = h + down(swiglu(norm(h))).

use super::config::ModelConfig;
use super::gradients::LayerGradientsOn;
use super::instruments::{InstrumentsOn, Point};
use super::parameters::{ModelOn, Projection};
use crate::adapters::{InputNeed, LinearOn};
use crate::error::{Error, Result};
use crate::ops::{Cpu, InputGradient, Ops, Scoring};

/// Weights of a layer, on some engine.
#[derive(Debug, Clone)]
pub struct LayerOn<E: Ops> {
    projections: [LinearOn<E>; 7],
    /// Gain of the norm before attention.
    pub input_norm: E::Vector,
    /// Gain of the norm before the feed-forward part.
    pub post_attention_norm: E::Vector,
    /// How heads and channels are ordered relative to the checkpoint, after an S2FT co-permutation.
    pub order: Option<super::s2ft::LayerOrder>,
}

/// Weights of a layer on the processor.
pub type Layer<T> = LayerOn<Cpu<T>>;

impl<E: Ops> LayerOn<E> {
    /// From projections in the order of [`Projection::ALL`] and the two gains.
    pub fn new(projections: [LinearOn<E>; 7], input_norm: E::Vector, post_attention_norm: E::Vector) -> Self {
        Self { projections, input_norm, post_attention_norm, order: None }
    }

    /// A projection.
    pub fn projection(&self, p: Projection) -> &LinearOn<E> {
        &self.projections[p as usize]
    }

    /// A projection, to be changed.
    pub fn projection_mut(&mut self, p: Projection) -> &mut LinearOn<E> {
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
pub(super) struct LayerNeeds {
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
    pub fn of<E: Ops>(model: &ModelOn<E>, index: usize) -> Self {
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

/// What a layer shares with its siblings, and its own number.
pub(super) struct Context<'a, E: Ops> {
    pub layer: usize,
    pub config: &'a ModelConfig,
    pub inputs: &'a E::Inputs,
    pub instruments: InstrumentsOn<'a, E>,
}

impl<E: Ops> Context<'_, E> {
    fn scoring(&self) -> Scoring {
        let scale = self.instruments.scale.unwrap_or_else(|| 1.0 / (self.config.head_dim as f64).sqrt());
        Scoring { scale, ahead: self.instruments.ahead }
    }

    /// Shows a tensor that has just been computed.
    fn tap(&self, point: Point, tensor: &mut E::Matrix) {
        self.instruments.tap(Some(self.layer), point, false, tensor);
    }

    /// Shows a gradient that has just been computed.
    pub fn tap_gradient(&self, point: Point, tensor: &mut E::Matrix) {
        self.instruments.tap(Some(self.layer), point, true, tensor);
    }
}

/// A matrix with the statistics of its rows, the input of a norm.
pub(super) type NormInput<E> = (<E as Ops>::Matrix, <E as Ops>::RowStats);

/// What a layer keeps for its backward; a field is `None` when no trainable tensor needs it.
#[derive(Debug, Clone)]
pub struct LayerCacheOn<E: Ops> {
    /// x, input of the first norm, and the statistics of its rows.
    pub input: Option<NormInput<E>>,
    /// Normalised x, input of q, k, v.
    pub normed_input: Option<E::Matrix>,
    /// Queries and keys after rotary embedding, values, log-sum-exp of the scores.
    pub attention: Option<E::Attention>,
    /// Output of attention, input of o.
    pub attention_output: Option<E::Matrix>,
    /// h, input of the second norm, and the statistics of its rows.
    pub middle: Option<NormInput<E>>,
    /// Normalised h, input of gate and up.
    pub normed_middle: Option<E::Matrix>,
    /// Outputs of gate, before silu, and of up.
    pub gate_and_up: Option<(E::Matrix, E::Matrix)>,
    /// silu(gate) o up, input of down.
    pub gated: Option<E::Matrix>,
    /// What each projection's method keeps beside its input, with its name.
    pub projections: [(&'static str, Option<E::Matrix>); 7],
}

/// What a layer keeps on the processor.
pub type LayerCache<T> = LayerCacheOn<Cpu<T>>;

impl<E: Ops> LayerCacheOn<E> {
    /// (name, numbers) of every saved tensor.
    pub fn saved_by_name(&self) -> Vec<(String, usize)> {
        let size = |x: &E::Matrix| {
            let (rows, columns) = E::shape(x);
            rows * columns
        };
        let mut all = Vec::new();
        let mut add = |name: &str, numbers: Option<usize>| all.extend(numbers.map(|n| (name.to_string(), n)));
        add("input", self.input.as_ref().map(|(x, _)| size(x)));
        add("normed_input", self.normed_input.as_ref().map(size));
        for (name, numbers) in self.attention.iter().flat_map(E::attention_elements) {
            add(name, Some(numbers));
        }
        add("attention_output", self.attention_output.as_ref().map(size));
        add("middle", self.middle.as_ref().map(|(x, _)| size(x)));
        add("normed_middle", self.normed_middle.as_ref().map(size));
        add("gate", self.gate_and_up.as_ref().map(|(gate, _)| size(gate)));
        add("up", self.gate_and_up.as_ref().map(|(_, up)| size(up)));
        add("gated", self.gated.as_ref().map(size));
        add("input_inverse_rms", self.input.as_ref().map(|(_, stats)| E::stats_length(stats)));
        add("middle_inverse_rms", self.middle.as_ref().map(|(_, stats)| E::stats_length(stats)));
        for (p, (name, saved)) in Projection::ALL.into_iter().zip(&self.projections) {
            add(&format!("{}.{name}", p.module()), saved.as_ref().map(size));
        }
        all
    }
}

/// The matrix if it is wanted; otherwise its buffer goes back.
fn retain<E: Ops>(wanted: bool, x: E::Matrix, e: &mut E) -> Option<E::Matrix> {
    if wanted {
        return Some(x);
    }
    e.release(x);
    None
}

/// x twice: to be kept, if it is wanted, and to be gone on with.
fn fork<E: Ops>(wanted: bool, x: E::Matrix, stats: E::RowStats, e: &mut E) -> (Option<NormInput<E>>, E::Matrix) {
    if !wanted {
        return (None, x);
    }
    let next = e.copy(&x);
    (Some((x, stats)), next)
}

/// Runs a layer; with `needs`, returns what backward must find.
pub(super) fn layer_forward<E: Ops>(
    layer: &LayerOn<E>,
    x: E::Matrix,
    context: &Context<'_, E>,
    needs: Option<LayerNeeds>,
    e: &mut E,
) -> Result<(E::Matrix, Option<LayerCacheOn<E>>)> {
    use Projection::*;
    let keep = |wanted: fn(LayerNeeds) -> bool| needs.is_some_and(wanted);
    let (save, eps) = (needs.is_some(), context.config.rms_norm_eps);
    let mut saved: [(&'static str, Option<E::Matrix>); 7] = std::array::from_fn(|_| ("", None));
    let mut project = |p: Projection, x: &E::Matrix, add_to: Option<E::Matrix>, e: &mut E| {
        let projection = layer.projection(p);
        let (mut y, kept) = projection.forward(e, x, add_to, save)?;
        saved[p as usize] = (projection.method.adaptation().saved_name(), kept);
        if let Some(add) = context.instruments.extra {
            add(e, (context.layer, p), x, &mut y)?;
        }
        Ok::<_, Error>(y)
    };

    let (mut normed, stats) = e.rms_norm(&x, &layer.input_norm, eps)?;
    context.tap(Point::NormedInput, &mut normed);
    let mut query = project(Query, &normed, None, e)?;
    let mut key = project(Key, &normed, None, e)?;
    let mut value = project(Value, &normed, None, e)?;
    context.tap(Point::Query, &mut query);
    context.tap(Point::Key, &mut key);
    context.tap(Point::Value, &mut value);
    let normed_input = retain(save && layer.needs_whole_input(&[Query, Key, Value]), normed, e);
    let mut query = e.rotate(query, context.inputs, false)?;
    let mut key = e.rotate(key, context.inputs, false)?;
    context.tap(Point::RotatedQuery, &mut query);
    context.tap(Point::RotatedKey, &mut key);
    let (mut attended, attention) = e.attention(query, key, value, context.inputs, &context.scoring())?;
    context.tap(Point::Attended, &mut attended);
    let attention = if keep(|n| n.attention) {
        Some(attention)
    } else {
        e.release_attention(attention);
        None
    };

    let (input, residual) = fork(keep(|n| n.normed_input), x, stats, e);
    let mut middle = project(Output, &attended, Some(residual), e)?;
    context.tap(Point::Middle, &mut middle);
    let keep_output = attention.is_some() || (save && layer.needs_whole_input(&[Output]));
    let attention_output = retain(keep_output, attended, e);

    let (mut normed, stats) = e.rms_norm(&middle, &layer.post_attention_norm, eps)?;
    context.tap(Point::NormedMiddle, &mut normed);
    let mut gate = project(Gate, &normed, None, e)?;
    let mut up = project(Up, &normed, None, e)?;
    context.tap(Point::Gate, &mut gate);
    context.tap(Point::Up, &mut up);
    let normed_middle = retain(save && layer.needs_whole_input(&[Gate, Up]), normed, e);
    let mut gated = e.swiglu(&gate, &up)?;
    context.tap(Point::Gated, &mut gated);
    let gate_and_up = if keep(|n| n.gated) {
        Some((gate, up))
    } else {
        e.release(gate);
        e.release(up);
        None
    };

    let (middle, residual) = fork(keep(|n| n.normed_middle), middle, stats, e);
    let mut out = project(Down, &gated, Some(residual), e)?;
    context.tap(Point::Output, &mut out);
    let gated = retain(save && layer.needs_whole_input(&[Down]), gated, e);
    if needs.is_none_or(|n| !n.any) {
        return Ok((out, None));
    }
    let cache = LayerCacheOn {
        input,
        normed_input,
        attention,
        attention_output,
        middle,
        normed_middle,
        gate_and_up,
        gated,
        projections: saved,
    };
    Ok((out, Some(cache)))
}

fn take<M>(field: Option<M>, name: &str) -> Result<M> {
    field.ok_or_else(|| Error::invalid(name, "absent", "the layer's forward must save it"))
}

/// The layer's backward, in the reverse order of [`layer_forward`]. `dout` is the gradient of the output; the
/// result is that of the input, or `None` when nothing below is trained.
pub(super) fn layer_backward<E: Ops>(
    layer: &LayerOn<E>,
    cache: LayerCacheOn<E>,
    dout: E::Matrix,
    context: &Context<'_, E>,
    needs: LayerNeeds,
    sinks: &mut LayerGradientsOn<E>,
    e: &mut E,
) -> Result<Option<E::Matrix>> {
    use InputGradient::AddTo;
    use Projection::*;
    let mut saved = cache.projections;
    let LayerGradientsOn { projections: projection_sinks, input_norm, post_attention_norm, .. } = sinks;
    let mut project =
        |p: Projection, dy: &E::Matrix, x: Option<&E::Matrix>, dx: InputGradient<E::Matrix>, e: &mut E| {
            let saved = saved[p as usize].1.take();
            layer.projection(p).backward(e, dy, x, saved, &mut projection_sinks[p as usize], dx)
        };
    // The gradient of h starts as that of the output (residual path) and collects the rest in place.
    let mut dx = dout;

    // out = h + down(gated)
    let dgated = project(Down, &dx, cache.gated.as_ref(), InputGradient::fresh_if(needs.gated), e)?;
    cache.gated.into_iter().for_each(|x| e.release(x));
    let Some(mut dgated) = dgated else { return Ok(None) };
    context.tap_gradient(Point::Gated, &mut dgated);
    // gated = silu(gate) o up
    let (gate, up) = take(cache.gate_and_up, "gate and up")?;
    let (mut dgate, mut dup) = e.swiglu_backward(&dgated, gate, up)?;
    context.tap_gradient(Point::Gate, &mut dgate);
    context.tap_gradient(Point::Up, &mut dup);
    e.release(dgated);
    // gate = gate_proj(normed), up = up_proj(normed)
    let normed = cache.normed_middle.as_ref();
    let dnormed = project(Gate, &dgate, normed, InputGradient::fresh_if(needs.normed_middle), e)?;
    let dnormed = project(Up, &dup, normed, dnormed.map_or(InputGradient::Skip, AddTo), e)?;
    [Some(dgate), Some(dup), cache.normed_middle].into_iter().flatten().for_each(|x| e.release(x));
    // normed = norm(h)
    if let Some(mut dnormed) = dnormed {
        context.tap_gradient(Point::NormedMiddle, &mut dnormed);
        let middle = take(cache.middle, "middle")?;
        let sink = post_attention_norm.as_mut();
        e.rms_norm_backward(dnormed, middle, &layer.post_attention_norm, sink, needs.middle.then_some(&mut dx))?;
        context.tap_gradient(Point::Middle, &mut dx);
    }
    if !needs.middle {
        return Ok(None);
    }
    // h = x + o(attended)
    let wanted = InputGradient::fresh_if(needs.attention);
    let dattended = project(Output, &dx, cache.attention_output.as_ref(), wanted, e)?;
    let Some(mut dattended) = dattended else { return Ok(None) };
    context.tap_gradient(Point::Attended, &mut dattended);
    // attended = attention(rope(q), rope(k), v)
    let attention = take(cache.attention, "query, key, value")?;
    let attended = take(cache.attention_output, "attention_output")?;
    let [mut dquery, mut dkey, mut dvalue] =
        e.attention_backward(dattended, attention, attended, context.inputs, &context.scoring())?;
    context.tap_gradient(Point::RotatedQuery, &mut dquery);
    context.tap_gradient(Point::RotatedKey, &mut dkey);
    context.tap_gradient(Point::Value, &mut dvalue);
    let mut dquery = e.rotate(dquery, context.inputs, true)?;
    let mut dkey = e.rotate(dkey, context.inputs, true)?;
    context.tap_gradient(Point::Query, &mut dquery);
    context.tap_gradient(Point::Key, &mut dkey);
    // q, k, v = projections of normed
    let mut sum = InputGradient::fresh_if(needs.normed_input);
    for (p, dy) in [(Query, &dquery), (Key, &dkey), (Value, &dvalue)] {
        sum = project(p, dy, cache.normed_input.as_ref(), sum, e)?.map_or(InputGradient::Skip, AddTo);
    }
    [Some(dquery), Some(dkey), Some(dvalue), cache.normed_input].into_iter().flatten().for_each(|x| e.release(x));
    // normed = norm(x)
    if let AddTo(mut dnormed) = sum {
        context.tap_gradient(Point::NormedInput, &mut dnormed);
        let input = take(cache.input, "input")?;
        let sink = input_norm.as_mut();
        e.rms_norm_backward(dnormed, input, &layer.input_norm, sink, needs.input.then_some(&mut dx))?;
    }
    Ok(needs.input.then_some(dx))
}
