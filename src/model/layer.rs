//! One decoder layer: h = x + o(attention(norm(x))), out = h + down(swiglu(norm(h))).

use super::config::ModelConfig;
use super::gradients::LayerGradientsOn;
use super::instruments::{InstrumentsOn, Masked, Point};
use super::options::Norm;
use super::parameters::{ModelOn, Projection};
use crate::adapters::full::Frozen;
use crate::adapters::{Adaptation, InputNeed, LinearOn};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::{Cpu, InputGradient, Ops, Scoring};

/// Weights of a layer, on some engine.
#[derive(Debug, Clone)]
pub struct LayerOn<E: Ops> {
    projections: [LinearOn<E>; 7],
    /// Gains in the order of [`Norm::ALL`]; `None` where the family has no norm.
    pub norms: [Option<E::Vector>; 6],
    /// How heads and channels are ordered relative to the checkpoint, after an S2FT co-permutation.
    pub order: Option<super::s2ft::LayerOrder>,
}

/// Weights of a layer on the processor.
pub type Layer<T> = LayerOn<Cpu<T>>;

impl<T: Real> Layer<T> {
    /// Numbers of gains and biases.
    pub(crate) fn vectors(&self) -> usize {
        let gains: usize = self.norms.iter().flatten().map(|gain| gain.len()).sum();
        gains + self.projections.iter().filter_map(|p| p.bias.as_ref()).map(|bias| bias.len()).sum::<usize>()
    }
}

impl<E: Ops> LayerOn<E> {
    /// From projections in the order of [`Projection::ALL`] and gains in that of [`Norm::ALL`].
    pub fn new(projections: [LinearOn<E>; 7], norms: [Option<E::Vector>; 6]) -> Self {
        Self { projections, norms, order: None }
    }

    /// The gain of a norm, if there is one.
    pub fn gain(&self, norm: Norm) -> Option<&E::Vector> {
        self.norms[norm as usize].as_ref()
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
        let (layer, parts) = (&model.layers[index], model.trainable);
        let norms = parts.norms || parts.biases;
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
        let options = &self.config.options;
        let usual = || options.attention_scale.unwrap_or(1.0 / (self.config.head_dim as f64).sqrt());
        Scoring {
            scale: self.instruments.scale.unwrap_or_else(usual),
            cap: options.attention_cap,
            ahead: self.instruments.ahead,
            window: options.window(self.layer),
        }
    }

    /// A copy of x under the dropout mask of a projection's adapter, or under what the mask takes away; `None` without mask.
    fn masked(
        &self,
        place: (usize, Projection),
        at: Masked,
        rest: bool,
        x: &E::Matrix,
        e: &mut E,
    ) -> Option<E::Matrix> {
        let mask = self.instruments.mask?;
        let mut x = e.copy(x);
        mask(place, at, rest, &mut x).then_some(x)
    }

    /// Rows of one head each where a norm is of heads.
    fn norm_rows(&self, norm: Norm, x: E::Matrix, e: &mut E) -> E::Matrix {
        match (self.config.norm_width(norm), E::shape(&x)) {
            (Some(width), (rows, columns)) if width != columns => e.reshape(x, (rows * columns / width, width)),
            _ => x,
        }
    }

    /// The normalised rows, and what backward needs if `save`; x itself where the layer has no such norm.
    fn norm(
        &self,
        layer: &LayerOn<E>,
        norm: Norm,
        x: E::Matrix,
        save: bool,
        e: &mut E,
    ) -> Result<(E::Matrix, Option<NormInput<E>>)> {
        let Some(gain) = layer.gain(norm) else { return Ok((x, None)) };
        let shape = E::shape(&x);
        let x = self.norm_rows(norm, x, e);
        let (y, stats) = rms_norm(&x, gain, self.config, e)?;
        let y = e.reshape(y, shape);
        if save {
            return Ok((y, Some((x, stats))));
        }
        e.release(x);
        Ok((y, None))
    }

    /// The gradient of a norm's input from that of its output; dy itself where the layer has no such norm.
    fn norm_backward(
        &self,
        layer: &LayerOn<E>,
        norm: Norm,
        dy: E::Matrix,
        saved: &mut Norms<E>,
        sinks: &mut [Option<E::Sink>; 6],
        e: &mut E,
    ) -> Result<E::Matrix> {
        let Some(gain) = layer.gain(norm) else { return Ok(dy) };
        let shape = E::shape(&dy);
        let dy = self.norm_rows(norm, dy, e);
        let mut dx = e.zeros(E::shape(&dy));
        let saved = take(saved[norm as usize].take(), "a norm's input")?;
        rms_norm_backward(dy, saved, gain, self.config, sinks[norm as usize].as_mut(), Some(&mut dx), e)?;
        Ok(e.reshape(dx, shape))
    }

    /// The gradient of a residual branch that is normalised or scaled before it joins; `None` where it is dx.
    fn branch_backward(
        &self,
        layer: &LayerOn<E>,
        norm: Norm,
        dx: &E::Matrix,
        saved: &mut Norms<E>,
        sinks: &mut [Option<E::Sink>; 6],
        e: &mut E,
    ) -> Result<Option<E::Matrix>> {
        let options = &self.config.options;
        if options.plain_branch(norm) {
            return Ok(None);
        }
        let dbranch = e.copy(dx);
        let dbranch = e.scale(dbranch, options.residual_multiplier);
        self.norm_backward(layer, norm, dbranch, saved, sinks, e).map(Some)
    }

    /// dx + the gradient that comes through the norm before a branch.
    fn enter_backward(
        &self,
        layer: &LayerOn<E>,
        norm: Norm,
        dnormed: E::Matrix,
        mut dx: E::Matrix,
        wanted: bool,
        (saved, sinks): (&mut Norms<E>, &mut [Option<E::Sink>; 6]),
        e: &mut E,
    ) -> Result<E::Matrix> {
        let Some(gain) = layer.gain(norm) else { return Ok(e.add(dx, dnormed, 1.0)) };
        let saved = take(saved[norm as usize].take(), "a norm's input")?;
        let sink = sinks[norm as usize].as_mut();
        rms_norm_backward(dnormed, saved, gain, self.config, sink, wanted.then_some(&mut dx), e)?;
        Ok(dx)
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

/// A norm of whole rows, with the family's gain.
pub(super) fn rms_norm<E: Ops>(
    x: &E::Matrix,
    gain: &E::Vector,
    config: &ModelConfig,
    e: &mut E,
) -> Result<NormInput<E>> {
    if !config.options.unit_gain {
        return e.rms_norm(x, gain, config.rms_norm_eps);
    }
    let gain = e.one_plus(gain);
    e.rms_norm(x, &gain, config.rms_norm_eps)
}

/// The backward of [`rms_norm`]: dx += the gradient of its input.
pub(super) fn rms_norm_backward<E: Ops>(
    dy: E::Matrix,
    saved: NormInput<E>,
    gain: &E::Vector,
    config: &ModelConfig,
    sink: Option<&mut E::Sink>,
    dx: Option<&mut E::Matrix>,
    e: &mut E,
) -> Result<()> {
    if !config.options.unit_gain {
        return e.rms_norm_backward(dy, saved, gain, sink, dx);
    }
    let gain = e.one_plus(gain);
    e.rms_norm_backward(dy, saved, &gain, sink, dx)
}

/// A matrix with the statistics of its rows, the input of a norm.
pub(super) type NormInput<E> = (<E as Ops>::Matrix, <E as Ops>::RowStats);

/// The inputs of a layer's norms, in the order of [`Norm::ALL`].
type Norms<E> = [Option<NormInput<E>>; 6];

/// What a layer keeps for its backward; a field is `None` when no trainable tensor needs it.
#[derive(Debug, Clone)]
pub struct LayerCacheOn<E: Ops> {
    /// Input of each norm and the statistics of its rows, in the order of [`Norm::ALL`].
    pub norms: [Option<NormInput<E>>; 6],
    /// Normalised x, input of q, k, v.
    pub normed_input: Option<E::Matrix>,
    /// Queries and keys after rotary embedding, values, log-sum-exp of the scores.
    pub attention: Option<E::Attention>,
    /// Output of attention, input of o.
    pub attention_output: Option<E::Matrix>,
    /// Normalised h, input of gate and up.
    pub normed_middle: Option<E::Matrix>,
    /// Outputs of gate, before its activation, and of up.
    pub gate_and_up: Option<(E::Matrix, E::Matrix)>,
    /// act(gate) o up, input of down.
    pub gated: Option<E::Matrix>,
    /// What each projection's method keeps beside its input, with its name.
    pub projections: [(&'static str, Option<E::Matrix>); 7],
}

/// What a layer keeps on the processor.
pub type LayerCache<T> = LayerCacheOn<Cpu<T>>;

/// Names of the norms' inputs among what is saved.
const NORM_INPUTS: [&str; 6] = ["input", "query_rows", "key_rows", "attention_branch", "middle", "mlp_branch"];

impl<E: Ops> LayerCacheOn<E> {
    /// (name, numbers) of every saved tensor.
    pub fn saved_by_name(&self) -> Vec<(String, usize)> {
        let size = |x: &E::Matrix| {
            let (rows, columns) = E::shape(x);
            rows * columns
        };
        let norm = |norm: Norm| (NORM_INPUTS[norm as usize], self.norms[norm as usize].as_ref().map(|(x, _)| size(x)));
        let mut named: Vec<(&str, Option<usize>)> =
            vec![norm(Norm::BeforeAttention), norm(Norm::Query), norm(Norm::Key)];
        named.push(("normed_input", self.normed_input.as_ref().map(size)));
        let attention = self.attention.iter().flat_map(E::attention_elements);
        named.extend(attention.map(|(name, numbers)| (name, Some(numbers))));
        named.push(("attention_output", self.attention_output.as_ref().map(size)));
        named.extend([norm(Norm::AfterAttention), norm(Norm::BeforeMlp)]);
        named.push(("normed_middle", self.normed_middle.as_ref().map(size)));
        named.push(("gate", self.gate_and_up.as_ref().map(|(gate, _)| size(gate))));
        named.push(("up", self.gate_and_up.as_ref().map(|(_, up)| size(up))));
        named.push(("gated", self.gated.as_ref().map(size)));
        named.push(norm(Norm::AfterMlp));
        let mut all: Vec<(String, usize)> =
            named.into_iter().filter_map(|(name, numbers)| Some((name.to_string(), numbers?))).collect();
        for (name, saved) in NORM_INPUTS.iter().zip(&self.norms) {
            all.extend(saved.as_ref().map(|(_, stats)| (format!("{name}_inverse_rms"), E::stats_length(stats))));
        }
        for (p, (name, saved)) in Projection::ALL.into_iter().zip(&self.projections) {
            all.extend(saved.as_ref().map(|x| (format!("{}.{name}", p.module()), size(x))));
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

/// The input of a branch: its norm's output with the statistics of x, or a copy of x where it has no norm.
fn enter<E: Ops>(
    layer: &LayerOn<E>,
    norm: Norm,
    x: &E::Matrix,
    config: &ModelConfig,
    e: &mut E,
) -> Result<(E::Matrix, Option<E::RowStats>)> {
    match layer.gain(norm) {
        Some(gain) => rms_norm(x, gain, config, e).map(|(normed, stats)| (normed, Some(stats))),
        None => Ok((e.copy(x), None)),
    }
}

/// x twice: to be kept, if backward needs it, and to be gone on with.
fn fork<E: Ops>(
    wanted: bool,
    x: E::Matrix,
    stats: Option<E::RowStats>,
    e: &mut E,
) -> (Option<NormInput<E>>, E::Matrix) {
    match stats {
        Some(stats) if wanted => {
            let next = e.copy(&x);
            (Some((x, stats)), next)
        }
        _ => (None, x),
    }
}

/// The projections of a layer's forward under way, and what their methods keep.
struct Projecting<'a, 'b, E: Ops> {
    layer: &'a LayerOn<E>,
    context: &'a Context<'b, E>,
    save: bool,
    saved: [(&'static str, Option<E::Matrix>); 7],
}

impl<E: Ops> Projecting<'_, '_, E> {
    fn run(&mut self, p: Projection, x: &E::Matrix, add_to: Option<E::Matrix>, e: &mut E) -> Result<E::Matrix> {
        let projection = self.layer.projection(p);
        // With x' = m o x in the adapter: y = W x + D x' = (W + D) x' + W (x - x').
        let place = (self.context.layer, p);
        let (mut y, kept) = match self.context.masked(place, Masked::Input, false, x, e) {
            Some(masked) => {
                let (y, kept) = projection.forward(e, &masked, add_to, self.save)?;
                match self.context.masked(place, Masked::Input, true, x, e) {
                    Some(rest) => (e.product(&rest, &projection.base, Some(y)), kept),
                    None => (y, kept),
                }
            }
            None => projection.forward(e, x, add_to, self.save)?,
        };
        self.saved[p as usize] = (projection.method.adaptation().saved_name(), kept);
        if let Some(add) = self.context.instruments.extra {
            add(e, (self.context.layer, p), x, &mut y)?;
        }
        Ok(y)
    }

    /// The last projection of a branch, joined to the residual path: in place, or after a norm and a factor.
    fn join(
        &mut self,
        p: Projection,
        norm: Norm,
        x: &E::Matrix,
        residual: E::Matrix,
        wanted: bool,
        e: &mut E,
    ) -> Result<(E::Matrix, Option<NormInput<E>>)> {
        let options = &self.context.config.options;
        if options.plain_branch(norm) {
            return Ok((self.run(p, x, Some(residual), e)?, None));
        }
        let branch = self.run(p, x, None, e)?;
        let (branch, kept) = self.context.norm(self.layer, norm, branch, wanted, e)?;
        Ok((e.add(residual, branch, options.residual_multiplier), kept))
    }
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
    let (save, config, options) = (needs.is_some(), context.config, &context.config.options);
    let mut project = Projecting { layer, context, save, saved: std::array::from_fn(|_| ("", None)) };

    let (mut normed, stats) = enter(layer, Norm::BeforeAttention, &x, config, e)?;
    context.tap(Point::NormedInput, &mut normed);
    let mut query = project.run(Query, &normed, None, e)?;
    let mut key = project.run(Key, &normed, None, e)?;
    let mut value = project.run(Value, &normed, None, e)?;
    context.tap(Point::Query, &mut query);
    context.tap(Point::Key, &mut key);
    context.tap(Point::Value, &mut value);
    let normed_input = retain(save && layer.needs_whole_input(&[Query, Key, Value]), normed, e);
    let wants_attention = keep(|n| n.attention);
    let (mut query, query_rows) = context.norm(layer, Norm::Query, query, wants_attention, e)?;
    let (mut key, key_rows) = context.norm(layer, Norm::Key, key, wants_attention, e)?;
    if let Some(kind) = options.rotary(context.layer) {
        query = e.rotate(query, context.inputs, kind, false)?;
        key = e.rotate(key, context.inputs, kind, false)?;
    }
    context.tap(Point::RotatedQuery, &mut query);
    context.tap(Point::RotatedKey, &mut key);
    let (mut attended, attention) = e.attention(query, key, value, context.inputs, &context.scoring())?;
    context.tap(Point::Attended, &mut attended);
    let attention = if wants_attention {
        Some(attention)
    } else {
        e.release_attention(attention);
        None
    };

    let (input, residual) = fork(keep(|n| n.normed_input), x, stats, e);
    let wanted = keep(|n| n.middle);
    let (mut middle, attention_branch) = project.join(Output, Norm::AfterAttention, &attended, residual, wanted, e)?;
    context.tap(Point::Middle, &mut middle);
    let keep_output = attention.is_some() || (save && layer.needs_whole_input(&[Output]));
    let attention_output = retain(keep_output, attended, e);

    let (mut normed, stats) = enter(layer, Norm::BeforeMlp, &middle, config, e)?;
    context.tap(Point::NormedMiddle, &mut normed);
    let mut gate = project.run(Gate, &normed, None, e)?;
    let mut up = project.run(Up, &normed, None, e)?;
    context.tap(Point::Gate, &mut gate);
    context.tap(Point::Up, &mut up);
    let normed_middle = retain(save && layer.needs_whole_input(&[Gate, Up]), normed, e);
    let mut gated = e.gated(options.activation, &gate, &up)?;
    context.tap(Point::Gated, &mut gated);
    let gate_and_up = if keep(|n| n.gated) {
        Some((gate, up))
    } else {
        e.release(gate);
        e.release(up);
        None
    };

    let (middle, residual) = fork(keep(|n| n.normed_middle), middle, stats, e);
    let (mut out, mlp_branch) = project.join(Down, Norm::AfterMlp, &gated, residual, keep(|n| n.any), e)?;
    context.tap(Point::Output, &mut out);
    let gated = retain(save && layer.needs_whole_input(&[Down]), gated, e);
    if needs.is_none_or(|n| !n.any) {
        return Ok((out, None));
    }
    let cache = LayerCacheOn {
        norms: [input, query_rows, key_rows, attention_branch, middle, mlp_branch],
        normed_input,
        attention,
        attention_output,
        normed_middle,
        gate_and_up,
        gated,
        projections: project.saved,
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
    let (mut saved, mut norms, options) = (cache.projections, cache.norms, &context.config.options);
    let LayerGradientsOn { projections: projection_sinks, norms: norm_sinks, biases, .. } = sinks;
    let mut project =
        |p: Projection, dy: &E::Matrix, x: Option<&E::Matrix>, dx: InputGradient<E::Matrix>, e: &mut E| {
            if let Some(sink) = &mut biases[p as usize] {
                e.add_row_sums(dy, sink);
            }
            let saved = saved[p as usize].1.take();
            let (projection, sinks) = (layer.projection(p), &mut projection_sinks[p as usize]);
            let place = (context.layer, p);
            let masked = x.and_then(|x| context.masked(place, Masked::SavedInput, false, x, e));
            let Some(masked) = masked else { return projection.backward(e, dy, x, saved, sinks, dx) };
            // dx = W^T dy + m o D^T dy = m o (W + D)^T dy + (1 - m) o W^T dy
            let wanted = InputGradient::fresh_if(!matches!(dx, InputGradient::Skip));
            let own = projection.backward(e, dy, Some(&masked), saved, sinks, wanted)?;
            let Some(own) = own else { return Ok(None) };
            let frozen =
                Frozen.backward(e, &projection.base, dy, None, None, &mut [], InputGradient::fresh_if(true))?;
            let own = context.masked(place, Masked::InputGradient, false, &own, e).unwrap_or(own);
            let sum = match frozen.and_then(|f| context.masked(place, Masked::InputGradient, true, &f, e)) {
                Some(rest) => e.add(own, rest, 1.0),
                None => own,
            };
            Ok(Some(match dx {
                AddTo(dx) => e.add(dx, sum, 1.0),
                _ => sum,
            }))
        };
    // The gradient of h starts as that of the output (residual path) and collects the rest in place.
    let mut dx = dout;

    // out = h + down(gated), the branch perhaps normalised and scaled
    let own = context.branch_backward(layer, Norm::AfterMlp, &dx, &mut norms, norm_sinks, e)?;
    let wanted = InputGradient::fresh_if(needs.gated);
    let dgated = project(Down, own.as_ref().unwrap_or(&dx), cache.gated.as_ref(), wanted, e)?;
    [own, cache.gated].into_iter().flatten().for_each(|x| e.release(x));
    let Some(mut dgated) = dgated else { return Ok(None) };
    context.tap_gradient(Point::Gated, &mut dgated);
    // gated = act(gate) o up
    let (gate, up) = take(cache.gate_and_up, "gate and up")?;
    let (mut dgate, mut dup) = e.gated_backward(options.activation, &dgated, gate, up)?;
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
        let state = (&mut norms, &mut *norm_sinks);
        dx = context.enter_backward(layer, Norm::BeforeMlp, dnormed, dx, needs.middle, state, e)?;
        context.tap_gradient(Point::Middle, &mut dx);
    }
    if !needs.middle {
        return Ok(None);
    }
    // h = x + o(attended), the branch perhaps normalised and scaled
    let own = context.branch_backward(layer, Norm::AfterAttention, &dx, &mut norms, norm_sinks, e)?;
    let wanted = InputGradient::fresh_if(needs.attention);
    let dattended = project(Output, own.as_ref().unwrap_or(&dx), cache.attention_output.as_ref(), wanted, e)?;
    own.into_iter().for_each(|x| e.release(x));
    let Some(mut dattended) = dattended else { return Ok(None) };
    context.tap_gradient(Point::Attended, &mut dattended);
    // attended = attention(rope(norm(q)), rope(norm(k)), v)
    let attention = take(cache.attention, "query, key, value")?;
    let attended = take(cache.attention_output, "attention_output")?;
    let [mut dquery, mut dkey, mut dvalue] =
        e.attention_backward(dattended, attention, attended, context.inputs, &context.scoring())?;
    context.tap_gradient(Point::RotatedQuery, &mut dquery);
    context.tap_gradient(Point::RotatedKey, &mut dkey);
    context.tap_gradient(Point::Value, &mut dvalue);
    if let Some(kind) = options.rotary(context.layer) {
        dquery = e.rotate(dquery, context.inputs, kind, true)?;
        dkey = e.rotate(dkey, context.inputs, kind, true)?;
    }
    let mut dquery = context.norm_backward(layer, Norm::Query, dquery, &mut norms, norm_sinks, e)?;
    let mut dkey = context.norm_backward(layer, Norm::Key, dkey, &mut norms, norm_sinks, e)?;
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
        let state = (&mut norms, &mut *norm_sinks);
        dx = context.enter_backward(layer, Norm::BeforeAttention, dnormed, dx, needs.input, state, e)?;
    }
    Ok(needs.input.then_some(dx))
}
