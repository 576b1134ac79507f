//! The projections of a layer under way: forward with what their methods keep, backward with their
//! sinks.

use super::instruments::Masked;
use super::layer::{Context, LayerOn};
use super::norm::NormInput;
use super::options::Norm;
use super::projection::Projection;
use crate::error::{Error, Result};
use crate::ops::{InputGradient, Ops};
use std::collections::BTreeMap;

/// A layer's forward under way.
pub(super) struct Projecting<'a, 'b, E: Ops> {
    pub layer: &'a LayerOn<E>,
    pub context: &'a Context<'b, E>,
    pub save: bool,
    pub saved: BTreeMap<Projection, (&'static str, Option<E::Matrix>)>,
}

/// The last projection of a branch, the norm after it, and whether that norm's input is wanted.
pub(super) struct Joining {
    pub p: Projection,
    pub norm: Norm,
    pub wanted: bool,
}

fn absent(p: Projection) -> Error {
    Error::invalid("layer", p.module(), "is missing from this layer, though the config has it")
}

impl<E: Ops> Projecting<'_, '_, E> {
    /// y = the projection of x, or added to a matrix.
    pub fn run(
        &mut self,
        p: Projection,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        e: &mut E,
    ) -> Result<E::Matrix> {
        let y = self.without_bias(p, x, add_to, e)?;
        Ok(match self.layer.get(p).and_then(|projection| projection.bias.as_ref()) {
            Some(bias) => e.add_row(y, bias),
            None => y,
        })
    }

    /// As [`Projecting::run`] without the bias.
    pub fn without_bias(
        &mut self,
        p: Projection,
        x: &E::Matrix,
        add_to: Option<E::Matrix>,
        e: &mut E,
    ) -> Result<E::Matrix> {
        let projection = self.layer.get(p).ok_or_else(|| absent(p))?;
        // With x' = m o x in the adapter: y = W x + D x' = (W + D) x' + W (x - x').
        let place = (self.context.layer, p);
        let (mut y, kept) = match self.context.masked(place, Masked::Input, false, x, e) {
            Some(masked) => {
                let (y, kept) = projection.forward_without_bias(e, &masked, add_to, self.save)?;
                match self.context.masked(place, Masked::Input, true, x, e) {
                    Some(rest) => (projection.base_forward(e, &rest, y)?, kept),
                    None => (y, kept),
                }
            }
            None => projection.forward_without_bias(e, x, add_to, self.save)?,
        };
        if kept.is_some() {
            self.saved.insert(p, (projection.method.adaptation().saved_name(), kept));
        }
        if let Some(add) = self.context.instruments.extra {
            add(e, (self.context.layer, p), x, &mut y)?;
        }
        Ok(y)
    }

    /// The last projection of a branch, joined to the residual path: in place, or after a norm and
    /// a factor.
    pub fn join(
        &mut self,
        joining: &Joining,
        x: &E::Matrix,
        residual: E::Matrix,
        e: &mut E,
    ) -> Result<(E::Matrix, Option<NormInput<E>>)> {
        if self.context.config.options.plain_branch(joining.norm) {
            return Ok((self.run(joining.p, x, Some(residual), e)?, None));
        }
        let branch = self.run(joining.p, x, None, e)?;
        self.add(joining.norm, branch, residual, joining.wanted, e)
    }

    /// A finished branch, joined to the residual path after a norm and a factor.
    pub fn add(
        &self,
        norm: Norm,
        branch: E::Matrix,
        residual: E::Matrix,
        wanted: bool,
        e: &mut E,
    ) -> Result<(E::Matrix, Option<NormInput<E>>)> {
        let (branch, kept) = self.context.norm(self.layer, norm, branch, wanted, e)?;
        Ok((e.add(residual, branch, self.context.config.options.residual_multiplier), kept))
    }
}

/// A layer's backward under way.
pub(super) struct Unprojecting<'a, 'b, E: Ops> {
    pub layer: &'a LayerOn<E>,
    pub context: &'a Context<'b, E>,
    pub saved: BTreeMap<Projection, (&'static str, Option<E::Matrix>)>,
    pub sinks: &'a mut BTreeMap<Projection, Vec<E::Sink>>,
    pub biases: &'a mut BTreeMap<Projection, E::Sink>,
}

impl<E: Ops> Unprojecting<'_, '_, E> {
    /// Adds the gradients of a projection to its sinks; that of its input if it is wanted.
    pub fn run(
        &mut self,
        p: Projection,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        dx: InputGradient<E::Matrix>,
        e: &mut E,
    ) -> Result<Option<E::Matrix>> {
        if let Some(sink) = self.biases.get_mut(&p) {
            e.add_row_sums(dy, sink);
        }
        self.without_bias(p, dy, x, dx, e)
    }

    /// As [`Unprojecting::run`] without the bias.
    pub fn without_bias(
        &mut self,
        p: Projection,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        dx: InputGradient<E::Matrix>,
        e: &mut E,
    ) -> Result<Option<E::Matrix>> {
        let projection = self.layer.get(p).ok_or_else(|| absent(p))?;
        let saved = self.saved.remove(&p).and_then(|(_, saved)| saved);
        let mut none = Vec::new();
        let (context, sinks) = (self.context, self.sinks.get_mut(&p).unwrap_or(&mut none));
        let place = (context.layer, p);
        let masked = x.and_then(|x| context.masked(place, Masked::SavedInput, false, x, e));
        let Some(masked) = masked else { return projection.backward(e, dy, x, saved, sinks, dx) };
        // dx = W^T dy + m o D^T dy = m o (W + D)^T dy + (1 - m) o W^T dy
        let wanted = InputGradient::fresh_if(!matches!(dx, InputGradient::Skip));
        let own = projection.backward(e, dy, Some(&masked), saved, sinks, wanted)?;
        let Some(own) = own else { return Ok(None) };
        let frozen = projection.base_backward(e, dy)?;
        let own = context.masked(place, Masked::InputGradient, false, &own, e).unwrap_or(own);
        let sum = match context.masked(place, Masked::InputGradient, true, &frozen, e) {
            Some(rest) => e.add(own, rest, 1.0),
            None => own,
        };
        Ok(Some(match dx {
            InputGradient::AddTo(all) => e.add(all, sum, 1.0),
            _ => sum,
        }))
    }
}

/// The parts of rows that hold several of them side by side, once or in each of `groups` pieces;
/// and the rows themselves, in another shape.
pub(super) fn split_parts<E: Ops, const N: usize>(
    joined: E::Matrix,
    widths: [usize; N],
    groups: usize,
    e: &mut E,
) -> ([E::Matrix; N], E::Matrix) {
    let (rows, columns) = E::shape(&joined);
    let joined =
        if groups > 1 { e.reshape(joined, (rows * groups, columns / groups)) } else { joined };
    let mut start = 0;
    let parts = widths.map(|width| {
        let range = start..start + width / groups;
        start = range.end;
        let part = e.select_range(&joined, range);
        if groups > 1 { e.reshape(part, (rows, width)) } else { part }
    });
    (parts, joined)
}

/// The reverse of [`split_parts`].
pub(super) fn join_parts<E: Ops>(
    parts: Vec<E::Matrix>,
    groups: usize,
    e: &mut E,
) -> Result<E::Matrix> {
    let rows = parts.first().map_or(0, |part| E::shape(part).0);
    let piece = |part: E::Matrix, e: &mut E| {
        let width = E::shape(&part).1;
        if groups > 1 { e.reshape(part, (rows * groups, width / groups)) } else { part }
    };
    let parts: Vec<_> = parts.into_iter().map(|part| piece(part, e)).collect();
    let joined = e.concat(parts)?;
    let columns = E::shape(&joined).1;
    Ok(if groups > 1 { e.reshape(joined, (rows, columns * groups)) } else { joined })
}
