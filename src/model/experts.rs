//! A mixture of experts in place of an MLP: a router scores them, each row goes to the best few,
//! and their outputs add up with weights.
//!
//! A weight multiplies the input of its expert's down projection. That is the same number as at its
//! output, and its gradient then needs no output: it is the product of that input's gradient with
//! the input before the weight.
//!
//! An expert's matrices have as many rows as the batch happens to send it: they are dropped, not
//! kept for the next step, which will ask for other sizes.

use super::instruments::Point;
use super::layer::{LayerNeeds, take};
use super::options::Experts;
use super::projecting::{Projecting, Unprojecting, join_parts, split_parts};
use super::projection::Projection;
use crate::adapters::InputNeed;
use crate::error::Result;
use crate::ops::{Choice, InputGradient, Ops};

/// What one expert keeps.
#[derive(Debug, Clone)]
struct ExpertCache<E: Ops> {
    seen: Option<E::Matrix>,
    gate_and_up: Option<(E::Matrix, E::Matrix)>,
    weighted: Option<E::Matrix>,
}

/// What a mixture keeps for its backward.
#[derive(Debug, Clone)]
pub struct ExpertsCacheOn<E: Ops> {
    routing: E::Routing,
    /// `None` for an expert that saw no row.
    experts: Vec<Option<ExpertCache<E>>>,
}

impl<E: Ops> ExpertsCacheOn<E> {
    /// (name, numbers) of every saved tensor.
    pub fn saved_by_name(&self) -> Vec<(String, usize)> {
        let size = |x: &E::Matrix| {
            let (rows, columns) = E::shape(x);
            rows * columns
        };
        let mut all = vec![("experts.routing".to_string(), E::routing_elements(&self.routing))];
        for expert in self.experts.iter().flatten() {
            let (gate, up) = expert
                .gate_and_up
                .as_ref()
                .map_or((None, None), |(gate, up)| (Some(gate), Some(up)));
            let parts = [
                ("seen", expert.seen.as_ref()),
                ("gate", gate),
                ("up", up),
                ("gated", expert.weighted.as_ref()),
            ];
            all.extend(
                parts
                    .into_iter()
                    .filter_map(|(name, x)| Some((format!("experts.{name}"), size(x?)))),
            );
        }
        all
    }
}

/// A bias as a column.
fn column<E: Ops>(bias: &E::Vector, e: &mut E) -> E::Matrix {
    let row = e.row(bias);
    let width = E::shape(&row).1;
    e.reshape(row, (width, 1))
}

/// Pieces of the joined rows of gate and up.
fn pieces(experts: &Experts) -> usize {
    if experts.interleaved { experts.inner } else { 1 }
}

/// `sum` with the experts' outputs added.
pub(super) fn experts_forward<E: Ops>(
    project: &mut Projecting<'_, '_, E>,
    experts: &Experts,
    normed: &E::Matrix,
    mut sum: E::Matrix,
    wanted: bool,
    e: &mut E,
) -> Result<(E::Matrix, ExpertsCacheOn<E>)> {
    let (context, layer, activation) =
        (project.context, project.layer, project.context.config.options.activation);
    let mut scores = project.run(Projection::Router, normed, None, e)?;
    context.tap(Point::Router, &mut scores);
    let choice = Choice { per_token: experts.per_token, renormalise: experts.renormalise };
    let routing = e.route(scores, choice)?;
    let mut kept = Vec::with_capacity(experts.count);
    for expert in 0..experts.count {
        let weights = e.routing_weights(&routing, expert)?;
        let rows = E::shape(&weights).1;
        if rows == 0 {
            kept.push(None);
            continue;
        }
        let (first, last) =
            (Projection::ExpertGateUp(expert as u16), Projection::ExpertDown(expert as u16));
        let seen = e.dispatch(normed, &routing, expert)?;
        let joined = project.run(first, &seen, None, e)?;
        let ([mut gate, mut up], _) = split_parts(joined, [experts.inner; 2], pieces(experts), e);
        context.tap(Point::Gate, &mut gate);
        context.tap(Point::Up, &mut up);
        let mut gated = e.gated(activation, &gate, &up)?;
        context.tap(Point::Gated, &mut gated);
        let weighted = e.scale_rows(gated, &weights, false);
        let mut y = project.without_bias(last, &weighted, None, e)?;
        if let Some(bias) = layer.get(last).and_then(|projection| projection.bias.as_ref()) {
            let bias = column(bias, e);
            let weights = e.reshape(weights, (rows, 1));
            y = e.product_with(&weights, &bias, Some(y));
        }
        sum = e.combine(sum, y, &routing, expert)?;
        let whole = |p| {
            project.save && layer.get(p).is_some_and(|l| l.method.input_need() == InputNeed::Whole)
        };
        let retain = |wanted: bool, x: E::Matrix| wanted.then_some(x);
        let (seen, weighted) = (retain(whole(first), seen), retain(whole(last), weighted));
        let gate_and_up = match (retain(wanted, gate), retain(wanted, up)) {
            (Some(gate), Some(up)) => Some((gate, up)),
            _ => None,
        };
        kept.push(Some(ExpertCache { seen, gate_and_up, weighted }));
    }
    Ok((sum, ExpertsCacheOn { routing, experts: kept }))
}

/// The gradient of the mixture's input from that of its output, if it is wanted.
pub(super) fn experts_backward<E: Ops>(
    project: &mut Unprojecting<'_, '_, E>,
    cache: ExpertsCacheOn<E>,
    dout: &E::Matrix,
    normed: Option<&E::Matrix>,
    needs: LayerNeeds,
    e: &mut E,
) -> Result<Option<E::Matrix>> {
    let (context, options) = (project.context, &project.context.config.options);
    let pieces = options.experts_of(context.layer).map_or(1, pieces);
    let ExpertsCacheOn { routing, experts } = cache;
    let mut dnormed = needs.normed_middle.then(|| e.zeros(E::shape(dout)));
    let mut dweights = Vec::with_capacity(experts.len());
    for (expert, kept) in experts.into_iter().enumerate() {
        let weights = e.routing_weights(&routing, expert)?;
        let rows = E::shape(&weights).1;
        let Some(kept) = kept else {
            dweights.push(weights);
            continue;
        };
        let (first, last) =
            (Projection::ExpertGateUp(expert as u16), Projection::ExpertDown(expert as u16));
        let dy = e.dispatch(dout, &routing, expert)?;
        let bias = project.layer.get(last).and_then(|projection| projection.bias.as_ref());
        if let Some(sink) = project.biases.get_mut(&last) {
            let copy = e.copy(&weights);
            let weights = e.reshape(copy, (rows, 1));
            let dbias = e.outer(&dy, &weights);
            let width = E::shape(&dbias).0;
            let dbias = e.reshape(dbias, (1, width));
            e.accumulate(sink, 1.0, &dbias);
        }
        let wanted = InputGradient::fresh_if(needs.gated);
        let dweighted = project.without_bias(last, &dy, kept.weighted.as_ref(), wanted, e)?;
        let Some(dweighted) = dweighted else { continue };
        let (gate, up) = take(kept.gate_and_up, "gate and up")?;
        let gated = e.gated(options.activation, &gate, &up)?;
        let mut dots = e.row_dots(&dweighted, &gated);
        drop(gated);
        if let Some(bias) = bias {
            let bias = column(bias, e);
            let more = e.product_with_backward(&dy, &bias, None);
            let more = e.reshape(more, (1, rows));
            dots = e.add(dots, more, 1.0);
        }
        drop((dy, kept.weighted));
        dweights.push(dots);
        let mut dgated = e.scale_rows(dweighted, &weights, false);
        context.tap_gradient(Point::Gated, &mut dgated);
        let (mut dgate, mut dup) = e.gated_backward(options.activation, &dgated, gate, up)?;
        drop(dgated);
        context.tap_gradient(Point::Gate, &mut dgate);
        context.tap_gradient(Point::Up, &mut dup);
        let joined = join_parts(vec![dgate, dup], pieces, e)?;
        let wanted = InputGradient::fresh_if(needs.normed_middle);
        let dseen = project.run(first, &joined, kept.seen.as_ref(), wanted, e)?;
        drop((joined, kept.seen));
        if let (Some(sum), Some(dseen)) = (dnormed.take(), dseen) {
            dnormed = Some(e.combine(sum, dseen, &routing, expert)?);
        }
    }
    if !needs.gated {
        return Ok(None);
    }
    let dscores = e.route_backward(&routing, dweights)?;
    let sum = dnormed.map_or(InputGradient::Skip, InputGradient::AddTo);
    project.run(Projection::Router, &dscores, normed, sum, e)
}
