//! One decoder layer on a device: h = x + o(attention(norm(x))), out = h + down(swiglu(norm(h))).
//!
//! The order of steps, and what is kept under which condition, are those of `model::layer`.

use super::blocks::causal_attention::{
    AttentionSaved, Padding, Queries, causal_attention_backward, causal_attention_forward, join_keys, join_queries,
    split_keys, split_queries, tile_rows,
};
use super::blocks::rms_norm::{rms_norm_backward, rms_norm_forward};
use super::blocks::rope::{RotaryAngles, rope_backward, rope_forward};
use super::blocks::swiglu::{swiglu_backward, swiglu_forward};
use super::blocks::{Matrix, Sink};
use super::projection::{DeviceLinear, Saved};
use crate::blocks::causal_attention::AttentionShape;
use crate::error::{Error, Result};
use crate::gpu::{Engine, Opened};
use crate::linalg::Real;
use crate::model::{Layer, LayerNeeds, Place, Point, Projection};
use std::array::from_fn;

/// A function that sees each tensor of a step when it has just been computed, and gives what the step goes on with.
///
/// Tests plant faults by it, and validation records hidden states. The tensors of attention are rows, as on the CPU.
pub type DeviceTap<'a, B> = &'a dyn Fn(Place, Matrix<B>) -> Matrix<B>;

/// Weights of a layer on a device.
#[derive(Debug, Clone)]
pub(super) struct DeviceLayer<B: Engine> {
    pub projections: [DeviceLinear<B>; 7],
    pub input_norm: Matrix<B>,
    pub post_attention_norm: Matrix<B>,
    pub needs: LayerNeeds,
}

impl<B: Engine> DeviceLayer<B> {
    pub fn upload<T: Real>(layer: &Layer<T>, needs: LayerNeeds, index: usize, on: &Opened<B>) -> Result<Self> {
        let prefix = format!("model.layers.{index}");
        let upload = |p: Projection| DeviceLinear::upload(layer.projection(p), &format!("{prefix}.{}", p.path()), on);
        let [q, k, v, o, gate, up, down] = Projection::ALL.map(upload);
        let gain = |name: &str, gain: &ndarray::Array1<T>| {
            on.upload(&format!("{prefix}.{name}.weight"), gain.view().insert_axis(ndarray::Axis(0)))
        };
        Ok(Self {
            projections: [q?, k?, v?, o?, gate?, up?, down?],
            input_norm: gain("input_layernorm", &layer.input_norm)?,
            post_attention_norm: gain("post_attention_layernorm", &layer.post_attention_norm)?,
            needs,
        })
    }

    fn projection(&self, p: Projection) -> &DeviceLinear<B> {
        &self.projections[p as usize]
    }

    fn needs_whole_input(&self, ps: &[Projection]) -> bool {
        ps.iter().any(|&p| self.projection(p).whole_input)
    }
}

/// Sinks of one layer; `None` where nothing has been added, which stays so for what is frozen.
#[derive(Debug, Clone)]
pub(super) struct LayerSinks<B: Engine> {
    pub input_norm: Sink<B>,
    pub post_attention_norm: Sink<B>,
    pub projections: [Vec<Sink<B>>; 7],
    /// Names of the projections' trainable tensors.
    pub names: [&'static [&'static str]; 7],
}

impl<B: Engine> LayerSinks<B> {
    pub fn of(layer: &DeviceLayer<B>) -> Self {
        let names: [&'static [&'static str]; 7] = from_fn(|i| layer.projections[i].names);
        Self { input_norm: None, post_attention_norm: None, projections: names.map(|n| vec![None; n.len()]), names }
    }
}

/// Sizes and tables that a layer shares with its siblings, and its own number.
pub(super) struct Context<'a, B: Engine> {
    pub layer: usize,
    pub attention: AttentionShape,
    pub padding: Option<&'a Padding<B>>,
    pub angles: &'a RotaryAngles<B>,
    pub eps: f64,
    /// Whether the gains are trained.
    pub norms: bool,
    pub tap: Option<DeviceTap<'a, B>>,
}

impl<B: Engine> Context<'_, B> {
    fn scale(&self) -> f64 {
        1.0 / (self.attention.head_dim as f64).sqrt()
    }

    fn tap(&self, point: Point, tensor: Matrix<B>) -> Matrix<B> {
        self.show(point, false, tensor)
    }

    pub fn tap_gradient(&self, point: Point, tensor: Matrix<B>) -> Matrix<B> {
        self.show(point, true, tensor)
    }

    fn show(&self, point: Point, gradient: bool, tensor: Matrix<B>) -> Matrix<B> {
        match self.tap {
            Some(tap) => tap(Place { layer: Some(self.layer), point, gradient }, tensor),
            None => tensor,
        }
    }

    /// As [`Context::tap`] for tensors split into heads, which are joined only when someone looks.
    fn tap_queries(&self, point: Point, gradient: bool, tensor: Queries<B>) -> Queries<B> {
        match self.tap {
            Some(_) => {
                split_queries(self.show(point, gradient, join_queries(tensor, &self.attention)), &self.attention)
            }
            None => tensor,
        }
    }
}

/// What a layer keeps for its backward; a field is `None` when no trainable tensor needs it.
#[derive(Debug, Clone)]
pub(super) struct LayerSaved<B: Engine> {
    /// x and 1 / rms of its rows.
    input: Option<(Matrix<B>, Matrix<B>)>,
    normed_input: Option<Matrix<B>>,
    attention: Option<AttentionSaved<B>>,
    attention_output: Option<Queries<B>>,
    /// h and 1 / rms of its rows.
    middle: Option<(Matrix<B>, Matrix<B>)>,
    normed_middle: Option<Matrix<B>>,
    /// Outputs of gate and up.
    gated_inputs: Option<(Matrix<B>, Matrix<B>)>,
    gated: Option<Matrix<B>>,
    projections: [Saved<B>; 7],
}

impl<B: Engine> LayerSaved<B> {
    /// (name, numbers) of every saved tensor, named as [`crate::model::LayerCache::saved_bytes_by_name`] names them.
    pub fn elements_by_name(&self) -> Vec<(String, usize)> {
        fn size<B: Engine, const D: usize>(x: &burn::tensor::Tensor<B, D>) -> usize {
            x.shape().num_elements()
        }
        let mut all: Vec<(String, usize)> = Vec::new();
        let mut add = |name: &str, elements: usize| all.push((name.to_string(), elements));
        for (name, rms, pair) in
            [("input", "input_inverse_rms", &self.input), ("middle", "middle_inverse_rms", &self.middle)]
        {
            if let Some((x, inverse_rms)) = pair {
                add(name, size(x));
                add(rms, size(inverse_rms));
            }
        }
        if let Some(saved) = &self.attention {
            add("query", size(&saved.query));
            add("key", size(&saved.key));
            add("value", size(&saved.value));
            add("log_sum_exp", size(&saved.log_sum_exp));
        }
        if let Some(output) = &self.attention_output {
            add("attention_output", size(output));
        }
        if let Some((gate, up)) = &self.gated_inputs {
            add("gate", size(gate));
            add("up", size(up));
        }
        for (name, x) in
            [("normed_input", &self.normed_input), ("normed_middle", &self.normed_middle), ("gated", &self.gated)]
        {
            if let Some(x) = x {
                add(name, size(x));
            }
        }
        for (p, saved) in Projection::ALL.into_iter().zip(&self.projections) {
            if let Some(x) = &saved.projected {
                add(&format!("{}.projected", p.module()), size(x));
            }
            if let Some(x) = &saved.columns {
                add(&format!("{}.columns", p.module()), size(x));
            }
        }
        all
    }
}

/// Runs a layer; `save` keeps what backward must find.
pub(super) fn layer_forward<B: Engine>(
    layer: &DeviceLayer<B>,
    x: Matrix<B>,
    context: &Context<'_, B>,
    save: bool,
) -> (Matrix<B>, Option<LayerSaved<B>>) {
    use Projection::*;
    let (shape, needs) = (&context.attention, layer.needs);
    let project = |p: Projection, x: &Matrix<B>| layer.projection(p).forward(x, save);

    let (normed, inverse_rms) = rms_norm_forward(&x, &layer.input_norm, context.eps);
    let normed = context.tap(Point::NormedInput, normed);
    let (query, saved_query) = project(Query, &normed);
    let (key, saved_key) = project(Key, &normed);
    let (value, saved_value) = project(Value, &normed);
    let normed_input = (save && layer.needs_whole_input(&[Query, Key, Value])).then_some(normed);
    let [query, key, value] =
        [(Point::Query, query), (Point::Key, key), (Point::Value, value)].map(|(point, x)| context.tap(point, x));
    let query = context.tap(Point::RotatedQuery, rope_forward(query, context.angles));
    let key = context.tap(Point::RotatedKey, rope_forward(key, context.angles));
    let (query, key, value) = (split_queries(query, shape), split_keys(key, shape), split_keys(value, shape));
    let (attended, log_sum_exp) =
        causal_attention_forward(&query, &key, &value, shape, context.padding, context.scale(), tile_rows(shape));
    let attended = context.tap_queries(Point::Attended, false, attended);
    let attention = (save && needs.attention).then(|| AttentionSaved { query, key, value, log_sum_exp });

    let rows = join_queries(attended.clone(), shape);
    let (branch, saved_output) = project(Output, &rows);
    drop(rows);
    let keep_output = save && (needs.attention || layer.needs_whole_input(&[Output]));
    let attention_output = keep_output.then_some(attended);
    let middle = context.tap(Point::Middle, branch + x.clone());
    let input = (save && needs.normed_input).then_some((x, inverse_rms));

    let (normed, inverse_rms) = rms_norm_forward(&middle, &layer.post_attention_norm, context.eps);
    let normed = context.tap(Point::NormedMiddle, normed);
    let (gate, saved_gate) = project(Gate, &normed);
    let (up, saved_up) = project(Up, &normed);
    let normed_middle = (save && layer.needs_whole_input(&[Gate, Up])).then_some(normed);
    let (gate, up) = (context.tap(Point::Gate, gate), context.tap(Point::Up, up));
    let gated = context.tap(Point::Gated, swiglu_forward(&gate, &up));
    let gated_inputs = (save && needs.gated).then_some((gate, up));
    let (branch, saved_down) = project(Down, &gated);
    let gated = (save && layer.needs_whole_input(&[Down])).then_some(gated);
    let out = context.tap(Point::Output, branch + middle.clone());
    let middle = (save && needs.normed_middle).then_some((middle, inverse_rms));
    let projections = [saved_query, saved_key, saved_value, saved_output, saved_gate, saved_up, saved_down];
    let saved = LayerSaved {
        input,
        normed_input,
        attention,
        attention_output,
        middle,
        normed_middle,
        gated_inputs,
        gated,
        projections,
    };
    (out, save.then_some(saved))
}

fn absent(name: &str) -> Error {
    Error::invalid(name, "absent", "the layer's forward must save it")
}

/// The layer's backward, in the reverse order of [`layer_forward`]. `dout` is the gradient of the output; the result
/// is that of the input, or `None` when nothing below is trained.
pub(super) fn layer_backward<B: Engine>(
    layer: &DeviceLayer<B>,
    saved: LayerSaved<B>,
    dout: Matrix<B>,
    context: &Context<'_, B>,
    sinks: &mut LayerSinks<B>,
) -> Result<Option<Matrix<B>>> {
    use Projection::*;
    let (shape, needs) = (&context.attention, layer.needs);
    let LayerSaved {
        input, normed_input, attention, attention_output, middle, normed_middle, gated_inputs, gated, ..
    } = saved;
    let mut kept = saved.projections.map(Some);
    let mut project =
        |p: Projection, dy: &Matrix<B>, x: Option<&Matrix<B>>, sinks: &mut LayerSinks<B>, wanted: bool| {
            let saved = kept[p as usize].take().unwrap_or_default();
            layer.projection(p).backward(dy, x, saved, &mut sinks.projections[p as usize], wanted)
        };
    // The gradient of h starts as that of the output (residual path) and collects the rest.
    let mut dx = dout;

    // out = h + down(gated)
    let dgated = project(Down, &dx, gated.as_ref(), sinks, needs.gated)?;
    drop(gated);
    let Some(dgated) = dgated else { return Ok(None) };
    let dgated = context.tap_gradient(Point::Gated, dgated);
    // gated = silu(gate) o up
    let (gate, up) = gated_inputs.ok_or_else(|| absent("gate and up"))?;
    let (dgate, dup) = swiglu_backward(dgated, gate, up);
    let (dgate, dup) = (context.tap_gradient(Point::Gate, dgate), context.tap_gradient(Point::Up, dup));
    // gate = gate_proj(normed), up = up_proj(normed)
    let from_gate = project(Gate, &dgate, normed_middle.as_ref(), sinks, needs.normed_middle)?;
    drop(dgate);
    let from_up = project(Up, &dup, normed_middle.as_ref(), sinks, needs.normed_middle)?;
    drop((dup, normed_middle));
    // normed = norm(h)
    if let (Some(from_gate), Some(from_up)) = (from_gate, from_up) {
        let dnormed = context.tap_gradient(Point::NormedMiddle, from_gate + from_up);
        let (middle, inverse_rms) = middle.ok_or_else(|| absent("middle"))?;
        let sink = context.norms.then_some(&mut sinks.post_attention_norm);
        let dmiddle = rms_norm_backward(dnormed, middle, inverse_rms, &layer.post_attention_norm, sink, needs.middle);
        if let Some(dmiddle) = dmiddle {
            dx = context.tap_gradient(Point::Middle, dx + dmiddle);
        }
    }
    if !needs.middle {
        return Ok(None);
    }
    // h = x + o(attended)
    let rows = layer.needs_whole_input(&[Output]).then(|| attention_output.clone().map(|x| join_queries(x, shape)));
    let dattended = project(Output, &dx, rows.flatten().as_ref(), sinks, needs.attention)?;
    let Some(dattended) = dattended else { return Ok(None) };
    let dattended = context.tap_gradient(Point::Attended, dattended);
    // attended = attention(rope(q), rope(k), v)
    let attention = attention.ok_or_else(|| absent("query, key, value"))?;
    let attended = attention_output.ok_or_else(|| absent("attention_output"))?;
    let upstream = split_queries(dattended, shape);
    let (dquery, dkey, dvalue) = causal_attention_backward(
        upstream,
        attention,
        attended,
        shape,
        context.padding,
        context.scale(),
        tile_rows(shape),
    );
    let dquery = context.tap_gradient(Point::RotatedQuery, join_queries(dquery, shape));
    let dkey = context.tap_gradient(Point::RotatedKey, join_keys(dkey, shape));
    let dvalue = context.tap_gradient(Point::Value, join_keys(dvalue, shape));
    let dquery = context.tap_gradient(Point::Query, rope_backward(dquery, context.angles));
    let dkey = context.tap_gradient(Point::Key, rope_backward(dkey, context.angles));
    // q, k, v = projections of normed
    let mut dnormed: Option<Matrix<B>> = None;
    for (p, dy) in [(Query, dquery), (Key, dkey), (Value, dvalue)] {
        let part = project(p, &dy, normed_input.as_ref(), sinks, needs.normed_input)?;
        dnormed = match (dnormed, part) {
            (Some(sum), Some(part)) => Some(sum + part),
            (sum, part) => sum.or(part),
        };
    }
    drop(normed_input);
    // normed = norm(x)
    if let Some(dnormed) = dnormed {
        let dnormed = context.tap_gradient(Point::NormedInput, dnormed);
        let (x, inverse_rms) = input.ok_or_else(|| absent("input"))?;
        let sink = context.norms.then_some(&mut sinks.input_norm);
        let dinput = rms_norm_backward(dnormed, x, inverse_rms, &layer.input_norm, sink, needs.input);
        return Ok(dinput.map(|dinput| dx + dinput));
    }
    Ok(None)
}
