//! One decoder layer: h = x + o(attention(norm(x))), out = h + mlp(norm(h)).

use super::config::ModelConfig;
use super::experts::{ExpertsCacheOn, experts_backward, experts_forward};
use super::gradients::LayerGradientsOn;
use super::instruments::{InstrumentsOn, Masked, Point};
use super::mlp::{MlpCacheOn, mlp_backward, mlp_forward};
use super::norm::{NormInput, NormOn, NormSinks, Rest, fork, keep, norm_backward, norm_forward};
use super::options::Norm;
use super::parameters::ModelOn;
use super::projecting::{Joining, Projecting, Unprojecting, join_parts, split_parts};
use super::projection::{Input, Projection};
use crate::adapters::{InputNeed, LinearOn};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::{Cpu, InputGradient, Ops, Scoring};
use std::collections::BTreeMap;

/// Weights of a layer, on some engine.
#[derive(Debug, Clone)]
pub struct LayerOn<E: Ops> {
    pub(super) projections: BTreeMap<Projection, LinearOn<E>>,
    /// Norms in the order of [`Norm::ALL`]; `None` where the family has none.
    pub norms: [Option<NormOn<E>>; 6],
    /// One more entry of each head's softmax, in families that have it.
    pub sinks: Option<E::Vector>,
    /// How heads and channels are ordered relative to the checkpoint, after an S2FT co-permutation.
    pub order: Option<super::s2ft::LayerOrder>,
}

/// Weights of a layer on the processor.
pub type Layer<T> = LayerOn<Cpu<T>>;

impl<T: Real> Layer<T> {
    /// Numbers of norms, biases and sinks.
    pub(crate) fn vectors(&self) -> usize {
        let norm = |norm: &NormOn<Cpu<T>>| {
            norm.gain.len() + norm.bias.as_ref().map_or(0, |bias| bias.len())
        };
        let norms: usize = self.norms.iter().flatten().map(norm).sum();
        let biases: usize =
            self.projections.values().filter_map(|p| p.bias.as_ref()).map(|bias| bias.len()).sum();
        norms + biases + self.sinks.as_ref().map_or(0, |sinks| sinks.len())
    }
}

impl<E: Ops> LayerOn<E> {
    /// From a family's projections and norms, the latter in the order of [`Norm::ALL`].
    pub fn new(
        projections: impl IntoIterator<Item = (Projection, LinearOn<E>)>,
        norms: [Option<NormOn<E>>; 6],
        sinks: Option<E::Vector>,
    ) -> Self {
        Self { projections: projections.into_iter().collect(), norms, sinks, order: None }
    }

    /// A norm, if there is one.
    pub fn norm(&self, norm: Norm) -> Option<&NormOn<E>> {
        self.norms[norm as usize].as_ref()
    }

    /// Every projection, in the order in which they are updated.
    pub fn projections(&self) -> impl Iterator<Item = (Projection, &LinearOn<E>)> {
        self.projections.iter().map(|(&p, projection)| (p, projection))
    }

    /// Every projection, to be changed.
    pub fn projections_mut(&mut self) -> impl Iterator<Item = (Projection, &mut LinearOn<E>)> {
        self.projections.iter_mut().map(|(&p, projection)| (p, projection))
    }

    /// A projection, if the layer has it.
    pub fn get(&self, p: Projection) -> Option<&LinearOn<E>> {
        self.projections.get(&p)
    }

    /// A projection, if the layer has it, to be changed.
    pub fn get_mut(&mut self, p: Projection) -> Option<&mut LinearOn<E>> {
        self.projections.get_mut(&p)
    }

    /// A projection.
    ///
    /// # Panics
    /// If the layer does not have it: see [`LayerOn::get`].
    pub fn projection(&self, p: Projection) -> &LinearOn<E> {
        &self.projections[&p]
    }

    /// A projection, to be changed.
    ///
    /// # Panics
    /// As [`LayerOn::projection`].
    pub fn projection_mut(&mut self, p: Projection) -> &mut LinearOn<E> {
        let found = self.projections.get_mut(&p);
        found.unwrap_or_else(|| panic!("the layer has no {}", p.module()))
    }

    /// Whether a norm is trained for itself.
    pub(super) fn has_whole_norm(&self) -> bool {
        self.norms.iter().flatten().any(|norm| norm.whole)
    }

    fn trains(&self, input: Input) -> bool {
        self.projections().any(|(p, projection)| p.input() == input && projection.is_trainable())
    }

    /// Whether an input of projections must be kept whole. Experts keep the rows that they see
    /// themselves.
    fn needs_whole(&self, input: Input) -> bool {
        let own =
            |p: Projection| matches!(p, Projection::ExpertGateUp(_) | Projection::ExpertDown(_));
        let whole = |projection: &LinearOn<E>| projection.method.input_need() == InputNeed::Whole;
        self.projections().any(|(p, projection)| p.input() == input && !own(p) && whole(projection))
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
    /// Of a layer in a step that begins at layer `first`.
    pub fn of<E: Ops>(model: &ModelOn<E>, index: usize, first: usize) -> Self {
        let (layer, parts) = (&model.layers[index], model.trainable);
        let norms = parts.vectors() || layer.has_whole_norm();
        let input = model.trained_below(index, first);
        let normed_input = input || norms;
        let attention = normed_input || layer.trains(Input::Normed);
        let middle = attention || layer.trains(Input::Attended);
        let normed_middle = middle || norms;
        let gated = normed_middle || layer.trains(Input::NormedMiddle);
        let any = gated || layer.trains(Input::Gated);
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
        let usual =
            || options.attention_scale.unwrap_or(1.0 / (self.config.head_dim as f64).sqrt());
        Scoring {
            scale: self.instruments.scale.unwrap_or_else(usual),
            cap: options.attention_cap,
            ahead: self.instruments.ahead,
            window: options.window(self.layer),
            errors: self.instruments.score_errors,
        }
    }

    /// A copy of x under the dropout mask of a projection's adapter, or under what the mask takes
    /// away; `None` without mask.
    pub fn masked(
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
            (Some(width), (rows, columns)) if width != columns => {
                e.reshape(x, (rows * columns / width, width))
            }
            _ => x,
        }
    }

    /// The normalised rows, and what backward needs if `save`; x itself where the layer has no such
    /// norm.
    pub fn norm(
        &self,
        layer: &LayerOn<E>,
        norm: Norm,
        x: E::Matrix,
        save: bool,
        e: &mut E,
    ) -> Result<(E::Matrix, Option<NormInput<E>>)> {
        let Some(vectors) = layer.norm(norm) else { return Ok((x, None)) };
        let shape = E::shape(&x);
        let x = self.norm_rows(norm, x, e);
        let (y, rest) = norm_forward(&x, vectors, self.config, e)?;
        let y = e.reshape(y, shape);
        Ok((y, keep(save, x, rest, e)))
    }

    /// The gradient of a norm's input from that of its output; dy itself where the layer has no
    /// such norm.
    fn norm_backward(
        &self,
        layer: &LayerOn<E>,
        norm: Norm,
        dy: E::Matrix,
        saved: &mut Norms<E>,
        sinks: &mut [NormSinks<E>; 6],
        e: &mut E,
    ) -> Result<E::Matrix> {
        let Some(vectors) = layer.norm(norm) else { return Ok(dy) };
        let shape = E::shape(&dy);
        let dy = self.norm_rows(norm, dy, e);
        let dx = e.zeros(E::shape(&dy));
        let saved = take(saved[norm as usize].take(), "a norm's input")?;
        let dx =
            norm_backward(dy, saved, vectors, self.config, &mut sinks[norm as usize], Some(dx), e)?;
        Ok(e.reshape(take(dx, "a norm's gradient")?, shape))
    }

    /// The gradient of a residual branch that is normalised or scaled before it joins; `None` where
    /// it is dx.
    fn branch_backward(
        &self,
        layer: &LayerOn<E>,
        norm: Norm,
        dx: &E::Matrix,
        saved: &mut Norms<E>,
        sinks: &mut [NormSinks<E>; 6],
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

    /// dx + the gradient that comes through the norm before a branch; without it if it is not
    /// wanted.
    fn enter_backward(
        &self,
        layer: &LayerOn<E>,
        norm: Norm,
        dnormed: E::Matrix,
        dx: E::Matrix,
        wanted: bool,
        (saved, sinks): (&mut Norms<E>, &mut [NormSinks<E>; 6]),
        e: &mut E,
    ) -> Result<E::Matrix> {
        let Some(vectors) = layer.norm(norm) else { return Ok(e.add(dx, dnormed, 1.0)) };
        let saved = take(saved[norm as usize].take(), "a norm's input")?;
        let sinks = &mut sinks[norm as usize];
        if !wanted {
            norm_backward(dnormed, saved, vectors, self.config, sinks, None, e)?;
            return Ok(dx);
        }
        take(
            norm_backward(dnormed, saved, vectors, self.config, sinks, Some(dx), e)?,
            "a norm's gradient",
        )
    }

    /// Shows a tensor that has just been computed.
    pub fn tap(&self, point: Point, tensor: &mut E::Matrix) {
        self.instruments.tap(Some(self.layer), point, false, tensor);
    }

    /// Shows a gradient that has just been computed.
    pub fn tap_gradient(&self, point: Point, tensor: &mut E::Matrix) {
        self.instruments.tap(Some(self.layer), point, true, tensor);
    }
}

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
    /// What the MLP keeps.
    pub mlp: MlpCacheOn<E>,
    /// What the experts keep, where there are some.
    pub experts: Option<ExpertsCacheOn<E>>,
    /// What each projection's method keeps beside its input, with its name.
    pub projections: BTreeMap<Projection, (&'static str, Option<E::Matrix>)>,
}

/// What a layer keeps on the processor.
pub type LayerCache<T> = LayerCacheOn<Cpu<T>>;

/// Names of the norms' inputs among what is saved.
const NORM_INPUTS: [&str; 6] =
    ["input", "query_rows", "key_rows", "attention_branch", "middle", "mlp_branch"];

impl<E: Ops> LayerCacheOn<E> {
    /// (name, numbers) of every saved tensor.
    pub fn saved_by_name(&self) -> Vec<(String, usize)> {
        let size = |x: &E::Matrix| {
            let (rows, columns) = E::shape(x);
            rows * columns
        };
        let norm = |norm: Norm| {
            (NORM_INPUTS[norm as usize], self.norms[norm as usize].as_ref().map(|(x, _)| size(x)))
        };
        let mut named: Vec<(&str, Option<usize>)> =
            vec![norm(Norm::BeforeAttention), norm(Norm::Query), norm(Norm::Key)];
        named.push(("normed_input", self.normed_input.as_ref().map(size)));
        let attention = self.attention.iter().flat_map(E::attention_elements);
        named.extend(attention.map(|(name, numbers)| (name, Some(numbers))));
        named.push(("attention_output", self.attention_output.as_ref().map(size)));
        named.extend([norm(Norm::AfterAttention), norm(Norm::BeforeMlp)]);
        named.push(("normed_middle", self.normed_middle.as_ref().map(size)));
        named.push(("gate", self.mlp.gate.as_ref().map(size)));
        named.push(("up", self.mlp.up.as_ref().map(size)));
        named.push(("gated", self.mlp.gated.as_ref().map(size)));
        named.push(norm(Norm::AfterMlp));
        let mut all: Vec<(String, usize)> = named
            .into_iter()
            .filter_map(|(name, numbers)| Some((name.to_string(), numbers?)))
            .collect();
        for (name, saved) in NORM_INPUTS.iter().zip(&self.norms) {
            all.extend(
                saved
                    .as_ref()
                    .map(|(_, stats)| (format!("{name}_inverse_rms"), E::stats_length(stats))),
            );
        }
        for (p, (name, saved)) in &self.projections {
            all.extend(saved.as_ref().map(|x| (format!("{}.{name}", p.module()), size(x))));
        }
        all.extend(self.experts.iter().flat_map(ExpertsCacheOn::saved_by_name));
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

/// The input of a branch: its norm's output and what is left of the norm, or a copy of x where it
/// has none.
fn enter<E: Ops>(
    layer: &LayerOn<E>,
    norm: Norm,
    x: &E::Matrix,
    config: &ModelConfig,
    e: &mut E,
) -> Result<(E::Matrix, Option<Rest<E>>)> {
    match layer.norm(norm) {
        Some(vectors) => {
            norm_forward(x, vectors, config, e).map(|(normed, rest)| (normed, Some(rest)))
        }
        None => Ok((e.copy(x), None)),
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
    let keep = |wanted: fn(LayerNeeds) -> bool| needs.is_some_and(wanted);
    let (save, config, options) = (needs.is_some(), context.config, &context.config.options);
    let mut project = Projecting { layer, context, save, saved: BTreeMap::new() };

    let (mut normed, rest) = enter(layer, Norm::BeforeAttention, &x, config, e)?;
    context.tap(Point::NormedInput, &mut normed);
    let [mut query, mut key, mut value] = query_key_value(&mut project, &normed, e)?;
    context.tap(Point::Query, &mut query);
    context.tap(Point::Key, &mut key);
    context.tap(Point::Value, &mut value);
    let normed_input = retain(save && layer.needs_whole(Input::Normed), normed, e);
    let wants_attention = keep(|n| n.attention);
    let (mut query, query_rows) = context.norm(layer, Norm::Query, query, wants_attention, e)?;
    let (mut key, key_rows) = context.norm(layer, Norm::Key, key, wants_attention, e)?;
    if let Some(kind) = options.rotary(context.layer) {
        query = e.rotate(query, context.inputs, kind, false)?;
        key = e.rotate(key, context.inputs, kind, false)?;
    }
    context.tap(Point::RotatedQuery, &mut query);
    context.tap(Point::RotatedKey, &mut key);
    let mut attention = e.attention(query, key, value, context.inputs, &context.scoring())?;
    if let Some(sinks) = &layer.sinks {
        attention = e.add_sinks(attention, sinks, context.inputs)?;
    }
    let (mut attended, attention) = attention;
    context.tap(Point::Attended, &mut attended);
    let attention = if wants_attention {
        Some(attention)
    } else {
        e.release_attention(attention);
        None
    };

    let (input, residual) = fork(keep(|n| n.normed_input), x, rest, e);
    // In parallel with attention, the MLP reads the layer's input.
    let beside = options.parallel.then(|| e.copy(&residual));
    let joining =
        Joining { p: Projection::Output, norm: Norm::AfterAttention, wanted: keep(|n| n.middle) };
    let (mut middle, attention_branch) = project.join(&joining, &attended, residual, e)?;
    context.tap(Point::Middle, &mut middle);
    let keep_output = attention.is_some() || (save && layer.needs_whole(Input::Attended));
    let attention_output = retain(keep_output, attended, e);

    let (mut normed, rest) =
        enter(layer, Norm::BeforeMlp, beside.as_ref().unwrap_or(&middle), config, e)?;
    context.tap(Point::NormedMiddle, &mut normed);
    let wants_middle = keep(|n| n.normed_middle);
    let (read, residual) = match beside {
        Some(beside) => {
            let (read, rest) = fork(wants_middle, beside, rest, e);
            e.release(rest);
            (read, middle)
        }
        None => fork(wants_middle, middle, rest, e),
    };
    let (wants_gated, wants_any) = (keep(|n| n.gated), keep(|n| n.any));
    let keep_middle = save && layer.needs_whole(Input::NormedMiddle);
    let (mut mlp, mut experts) = (MlpCacheOn::default(), None);
    let (mut out, normed_middle, mlp_branch);
    if let Some(of) = options.experts_of(context.layer) {
        let plain = options.plain_branch(Norm::AfterMlp);
        let (onto, aside) =
            if plain { (residual, None) } else { (e.zeros(E::shape(&residual)), Some(residual)) };
        let (sum, kept) = experts_forward(&mut project, of, &normed, onto, wants_gated, e)?;
        experts = Some(kept);
        normed_middle = retain(keep_middle, normed, e);
        (out, mlp_branch) = match aside {
            None => (sum, None),
            Some(residual) => project.add(Norm::AfterMlp, sum, residual, wants_any, e)?,
        };
    } else {
        let (gated, cache) = mlp_forward(&mut project, &normed, wants_gated, e)?;
        normed_middle = retain(keep_middle, normed, e);
        let joining = Joining { p: Projection::Down, norm: Norm::AfterMlp, wanted: wants_any };
        (out, mlp_branch) = project.join(&joining, &gated, residual, e)?;
        mlp = MlpCacheOn {
            gated: retain(save && layer.needs_whole(Input::Gated), gated, e),
            ..cache
        };
    }
    context.tap(Point::Output, &mut out);
    if !wants_any {
        return Ok((out, None));
    }
    let cache = LayerCacheOn {
        norms: [input, query_rows, key_rows, attention_branch, read, mlp_branch],
        normed_input,
        attention,
        attention_output,
        normed_middle,
        mlp,
        experts,
        projections: project.saved,
    };
    Ok((out, Some(cache)))
}

/// Query, key and value, however they are stored.
fn query_key_value<E: Ops>(
    project: &mut Projecting<'_, '_, E>,
    normed: &E::Matrix,
    e: &mut E,
) -> Result<[E::Matrix; 3]> {
    use Projection::*;
    let config = project.context.config;
    if config.options.query_key_value == super::options::QkvStorage::Separate {
        let query = project.run(Query, normed, None, e)?;
        return Ok([
            query,
            project.run(Key, normed, None, e)?,
            project.run(Value, normed, None, e)?,
        ]);
    }
    let joined = project.run(QueryKeyValue, normed, None, e)?;
    let widths = [Query, Key, Value].map(|p| config.projection_shape(p).0);
    let groups = if config.options.query_key_value == super::options::QkvStorage::PerHead {
        config.num_attention_heads
    } else {
        1
    };
    let (parts, joined) = split_parts(joined, widths, groups, e);
    e.release(joined);
    Ok(parts)
}

pub(super) fn take<M>(field: Option<M>, name: &str) -> Result<M> {
    field.ok_or_else(|| Error::invalid(name, "absent", "the layer's forward must save it"))
}

/// The layer's backward, in the reverse order of [`layer_forward`]. `dout` is the gradient of the
/// output; the result is that of the input, or `None` when nothing below is trained.
pub(super) fn layer_backward<E: Ops>(
    layer: &LayerOn<E>,
    cache: LayerCacheOn<E>,
    dout: E::Matrix,
    context: &Context<'_, E>,
    needs: LayerNeeds,
    sinks: &mut LayerGradientsOn<E>,
    e: &mut E,
) -> Result<Option<E::Matrix>> {
    let (mut norms, options) = (cache.norms, &context.config.options);
    let LayerGradientsOn { projections, norms: norm_sinks, biases, sinks: attention_sinks, .. } =
        sinks;
    let mut project =
        Unprojecting { layer, context, saved: cache.projections, sinks: projections, biases };
    // The gradient of h starts as that of the output (residual path) and collects the rest in
    // place.
    let mut dx = dout;
    let beside = options.parallel.then(|| e.copy(&dx));

    // out = h + mlp(normed), the branch perhaps normalised and scaled
    let own = context.branch_backward(layer, Norm::AfterMlp, &dx, &mut norms, norm_sinks, e)?;
    let upstream = own.as_ref().unwrap_or(&dx);
    let normed = cache.normed_middle.as_ref();
    let dnormed = match cache.experts {
        Some(kept) => experts_backward(&mut project, kept, upstream, normed, needs, e)?,
        None => mlp_backward(&mut project, cache.mlp, upstream, normed, needs, e)?,
    };
    [own, cache.normed_middle].into_iter().flatten().for_each(|x| e.release(x));
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
    let upstream = beside.as_ref().unwrap_or(&dx);
    let own = context.branch_backward(
        layer,
        Norm::AfterAttention,
        upstream,
        &mut norms,
        norm_sinks,
        e,
    )?;
    let upstream = own.as_ref().unwrap_or(upstream);
    let wanted = InputGradient::fresh_if(needs.attention);
    let dattended =
        project.run(Projection::Output, upstream, cache.attention_output.as_ref(), wanted, e)?;
    [own, beside].into_iter().flatten().for_each(|x| e.release(x));
    let Some(mut dattended) = dattended else { return Ok(None) };
    context.tap_gradient(Point::Attended, &mut dattended);
    // attended = attention(rope(norm(q)), rope(norm(k)), v)
    let attention = take(cache.attention, "query, key, value")?;
    let attended = take(cache.attention_output, "attention_output")?;
    if let (Some(numbers), Some(sink)) = (&layer.sinks, attention_sinks) {
        e.sinks_backward(&dattended, (&attended, &attention), numbers, context.inputs, sink)?;
    }
    let [mut dquery, mut dkey, mut dvalue] =
        e.attention_backward(dattended, attention, attended, context.inputs, &context.scoring())?;
    context.tap_gradient(Point::RotatedQuery, &mut dquery);
    context.tap_gradient(Point::RotatedKey, &mut dkey);
    context.tap_gradient(Point::Value, &mut dvalue);
    if let Some(kind) = options.rotary(context.layer) {
        dquery = e.rotate(dquery, context.inputs, kind, true)?;
        dkey = e.rotate(dkey, context.inputs, kind, true)?;
    }
    let mut dquery =
        context.norm_backward(layer, Norm::Query, dquery, &mut norms, norm_sinks, e)?;
    let mut dkey = context.norm_backward(layer, Norm::Key, dkey, &mut norms, norm_sinks, e)?;
    context.tap_gradient(Point::Query, &mut dquery);
    context.tap_gradient(Point::Key, &mut dkey);
    // q, k, v = projections of normed
    let normed = cache.normed_input;
    let wanted = InputGradient::fresh_if(needs.normed_input);
    let dnormed =
        query_key_value_backward(&mut project, [dquery, dkey, dvalue], normed.as_ref(), wanted, e)?;
    normed.into_iter().for_each(|x| e.release(x));
    // normed = norm(x)
    if let Some(mut dnormed) = dnormed {
        context.tap_gradient(Point::NormedInput, &mut dnormed);
        let state = (&mut norms, &mut *norm_sinks);
        dx = context.enter_backward(
            layer,
            Norm::BeforeAttention,
            dnormed,
            dx,
            needs.input,
            state,
            e,
        )?;
    }
    Ok(needs.input.then_some(dx))
}

/// The backward of [`query_key_value`].
fn query_key_value_backward<E: Ops>(
    project: &mut Unprojecting<'_, '_, E>,
    gradients: [E::Matrix; 3],
    normed: Option<&E::Matrix>,
    mut wanted: InputGradient<E::Matrix>,
    e: &mut E,
) -> Result<Option<E::Matrix>> {
    use Projection::*;
    let config = project.context.config;
    let groups = match config.options.query_key_value {
        super::options::QkvStorage::Separate => {
            for (p, dy) in [Query, Key, Value].into_iter().zip(&gradients) {
                wanted = project
                    .run(p, dy, normed, wanted, e)?
                    .map_or(InputGradient::Skip, InputGradient::AddTo);
            }
            gradients.into_iter().for_each(|dy| e.release(dy));
            return Ok(match wanted {
                InputGradient::AddTo(sum) => Some(sum),
                _ => None,
            });
        }
        super::options::QkvStorage::Blocks => 1,
        super::options::QkvStorage::PerHead => config.num_attention_heads,
    };
    let joined = join_parts(gradients.into(), groups, e)?;
    let dnormed = project.run(QueryKeyValue, &joined, normed, wanted, e)?;
    e.release(joined);
    Ok(dnormed)
}
