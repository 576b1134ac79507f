//! The MLP of a layer: down(act(gate) o up), or down(act(up)) without a gate.

use super::instruments::Point;
use super::layer::{LayerNeeds, take};
use super::options::MlpKind;
use super::projecting::{Projecting, Unprojecting, join_parts, split_parts};
use super::projection::Projection;
use crate::error::Result;
use crate::ops::{InputGradient, Ops};

/// What an MLP keeps for its backward.
#[derive(Debug, Clone)]
pub struct MlpCacheOn<E: Ops> {
    /// Output of gate, before its activation.
    pub gate: Option<E::Matrix>,
    /// Output of up; before its activation where there is no gate.
    pub up: Option<E::Matrix>,
    /// Input of down.
    pub gated: Option<E::Matrix>,
}

impl<E: Ops> Default for MlpCacheOn<E> {
    fn default() -> Self {
        Self { gate: None, up: None, gated: None }
    }
}

/// The input of down, and gate and up if they are wanted.
pub(super) fn mlp_forward<E: Ops>(
    project: &mut Projecting<'_, '_, E>,
    normed: &E::Matrix,
    wanted: bool,
    e: &mut E,
) -> Result<(E::Matrix, MlpCacheOn<E>)> {
    let (context, options) = (project.context, &project.context.config.options);
    let (mut gate, mut up) = match options.mlp {
        MlpKind::Gated => {
            let gate = project.run(Projection::Gate, normed, None, e)?;
            (Some(gate), project.run(Projection::Up, normed, None, e)?)
        }
        MlpKind::GatedInOne => {
            let joined = project.run(Projection::GateUp, normed, None, e)?;
            let ([gate, up], joined) =
                split_parts(joined, [context.config.intermediate_size; 2], 1, e);
            e.release(joined);
            (Some(gate), up)
        }
        MlpKind::Plain => (None, project.run(Projection::Up, normed, None, e)?),
    };
    if let Some(gate) = &mut gate {
        context.tap(Point::Gate, gate);
    }
    context.tap(Point::Up, &mut up);
    let mut gated = match &gate {
        Some(gate) => e.gated(options.activation, gate, &up)?,
        None => e.activated(options.activation, &up)?,
    };
    context.tap(Point::Gated, &mut gated);
    if wanted {
        return Ok((gated, MlpCacheOn { gate, up: Some(up), gated: None }));
    }
    [gate, Some(up)].into_iter().flatten().for_each(|x| e.release(x));
    Ok((gated, MlpCacheOn::default()))
}

/// The gradient of the MLP's input from that of its output, if it is wanted.
pub(super) fn mlp_backward<E: Ops>(
    project: &mut Unprojecting<'_, '_, E>,
    cache: MlpCacheOn<E>,
    dout: &E::Matrix,
    normed: Option<&E::Matrix>,
    needs: LayerNeeds,
    e: &mut E,
) -> Result<Option<E::Matrix>> {
    let (context, options) = (project.context, &project.context.config.options);
    let wanted = InputGradient::fresh_if(needs.gated);
    let dgated = project.run(Projection::Down, dout, cache.gated.as_ref(), wanted, e)?;
    cache.gated.into_iter().for_each(|x| e.release(x));
    let Some(mut dgated) = dgated else { return Ok(None) };
    context.tap_gradient(Point::Gated, &mut dgated);
    let up = take(cache.up, "up")?;
    let (mut dgate, mut dup) = match cache.gate {
        Some(gate) => {
            let (dgate, dup) = e.gated_backward(options.activation, &dgated, gate, up)?;
            (Some(dgate), dup)
        }
        None => (None, e.activated_backward(options.activation, &dgated, up)?),
    };
    if let Some(dgate) = &mut dgate {
        context.tap_gradient(Point::Gate, dgate);
    }
    context.tap_gradient(Point::Up, &mut dup);
    e.release(dgated);
    let wanted = InputGradient::fresh_if(needs.normed_middle);
    match dgate {
        Some(dgate) if options.mlp == MlpKind::GatedInOne => {
            let joined = join_parts(vec![dgate, dup], 1, e)?;
            let dnormed = project.run(Projection::GateUp, &joined, normed, wanted, e)?;
            e.release(joined);
            Ok(dnormed)
        }
        Some(dgate) => {
            let dnormed = project.run(Projection::Gate, &dgate, normed, wanted, e)?;
            let sum = dnormed.map_or(InputGradient::Skip, InputGradient::AddTo);
            let dnormed = project.run(Projection::Up, &dup, normed, sum, e)?;
            [dgate, dup].into_iter().for_each(|x| e.release(x));
            Ok(dnormed)
        }
        None => {
            let dnormed = project.run(Projection::Up, &dup, normed, wanted, e)?;
            e.release(dup);
            Ok(dnormed)
        }
    }
}
