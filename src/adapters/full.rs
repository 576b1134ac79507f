//! Full fine-tuning and no adaptation at all, as the two ends of the list.

use super::{Adaptation, Change, InputNeed};
use crate::error::Result;
use crate::ops::{InputGradient, Ops};

/// The weight is not trained.
#[derive(Debug, Clone, Copy)]
pub struct Frozen;

/// The whole weight is trained.
#[derive(Debug, Clone, Copy)]
pub struct Full;

impl<E: Ops> Adaptation<E> for Frozen {
    fn name(&self) -> &'static str {
        "frozen"
    }

    fn trained_names(&self) -> &'static [&'static str] {
        &[]
    }

    fn trained_shapes(&self, _: (usize, usize)) -> Vec<(usize, usize)> {
        Vec::new()
    }

    fn input_need(&self) -> InputNeed {
        InputNeed::Nothing
    }

    fn backward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        dy: &E::Matrix,
        _: Option<&E::Matrix>,
        _: Option<E::Matrix>,
        _: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>> {
        Ok(dx.wanted().map(|add_to| e.product_backward(dy, weight, add_to)))
    }

    fn values(&self, _: &mut E, _: &E::Weight) -> Vec<E::Matrix> {
        Vec::new()
    }

    fn update(&mut self, _: &mut E, _: &mut E::Weight, _: Change<'_, E>) -> Result<()> {
        Ok(())
    }
}

impl<E: Ops> Adaptation<E> for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn trained_names(&self) -> &'static [&'static str] {
        &["weight"]
    }

    fn trained_shapes(&self, weight: (usize, usize)) -> Vec<(usize, usize)> {
        vec![weight]
    }

    fn held(&self, _: (usize, usize), _: bool) -> usize {
        0
    }

    fn input_need(&self) -> InputNeed {
        InputNeed::Whole
    }

    fn backward(
        &self,
        e: &mut E,
        weight: &E::Weight,
        dy: &E::Matrix,
        x: Option<&E::Matrix>,
        _: Option<E::Matrix>,
        sinks: &mut [E::Sink],
        dx: InputGradient<E::Matrix>,
    ) -> Result<Option<E::Matrix>> {
        let x = super::whole(x)?;
        let dx = dx.wanted().map(|add_to| e.product_backward(dy, weight, add_to));
        e.add_outer(1.0, dy, None, x, &mut sinks[0])?;
        Ok(dx)
    }

    fn values(&self, e: &mut E, weight: &E::Weight) -> Vec<E::Matrix> {
        vec![e.dense(weight)]
    }

    fn update(&mut self, _: &mut E, weight: &mut E::Weight, change: Change<'_, E>) -> Result<()> {
        change("weight", E::dense_mut(weight, "full")?)
    }
}
