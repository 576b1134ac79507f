//! Low-rank updates of the embedding and the output projection, which stand outside the layers.

use super::gradients::GradientsOn;
use super::parameters::ModelOn;
use crate::adapters::lora::{Lora, LoraOn};
use crate::error::Result;
use crate::linalg::Real;
use crate::model::Model;
use crate::ops::{Cpu, Ops};
use ndarray::Array2;
use std::borrow::Cow;

/// Updates outside the layers.
#[derive(Debug, Clone)]
pub struct OutsideAdapters<E: Ops> {
    /// Of the output projection: A `r x D`, B `V x r`.
    pub head: Option<LoraOn<E>>,
    /// Of the embedding: A `r x V`, B `D x r`; a token adds s B times its column of A.
    pub embedding: Option<LoraOn<E>>,
}

impl<E: Ops> Default for OutsideAdapters<E> {
    fn default() -> Self {
        Self { head: None, embedding: None }
    }
}

/// Where their gradients add up.
#[derive(Debug, Clone)]
pub struct OutsideSinks<E: Ops> {
    /// A and B of the output projection.
    pub head: Option<[E::Sink; 2]>,
    /// A and B of the embedding.
    pub embedding: Option<[E::Sink; 2]>,
}

impl<E: Ops> OutsideAdapters<E> {
    /// Sinks of zeros.
    pub(super) fn sinks(&self, engine: &E) -> OutsideSinks<E> {
        let of = |lora: &LoraOn<E>| [engine.sink(E::shape(&lora.a)), engine.sink(E::shape(&lora.b))];
        OutsideSinks { head: self.head.as_ref().map(of), embedding: self.embedding.as_ref().map(of) }
    }

    /// Both, each with the names of its factors.
    pub(super) fn named(&self) -> [(&Option<LoraOn<E>>, [&'static str; 2]); 2] {
        [(&self.embedding, EMBEDDING_FACTORS), (&self.head, HEAD_FACTORS)]
    }
}

/// PEFT's names of the factors.
pub(super) const EMBEDDING_FACTORS: [&str; 2] = ["lora_embedding_A", "lora_embedding_B"];
/// PEFT's names of the factors.
pub(super) const HEAD_FACTORS: [&str; 2] = ["lora_A", "lora_B"];

impl<E: Ops> ModelOn<E> {
    /// The output projection with its update; formed whole, so that logits stay one product a chunk.
    pub(super) fn head_with_update(&self, e: &mut E) -> Option<E::Matrix> {
        let lora = self.adapters.head.as_ref()?;
        let delta = e.small_product((&lora.b, false), (&lora.a, false));
        let head = e.copy(self.head());
        Some(e.add(head, delta, lora.scaling))
    }

    /// The gradients of the head's factors from that of the projection with its update.
    pub(super) fn head_factors_backward(&self, whole: &E::Matrix, gradients: &mut GradientsOn<E>) {
        let GradientsOn { outside, engine: e, .. } = gradients;
        if let (Some(lora), Some([a, b])) = (&self.adapters.head, &mut outside.head) {
            let db = e.small_product((whole, false), (&lora.a, true));
            let da = e.small_product((&lora.b, true), (whole, false));
            e.accumulate(b, lora.scaling, &db);
            e.accumulate(a, lora.scaling, &da);
        }
    }

    /// x with the embedding's update added.
    pub(super) fn embedding_update(&self, x: E::Matrix, inputs: &E::Inputs, e: &mut E) -> Result<E::Matrix> {
        let Some(lora) = &self.adapters.embedding else { return Ok(x) };
        let turned = e.transposed(&lora.a)?;
        let columns = e.embed(inputs, &turned)?;
        let columns = e.scale(columns, lora.scaling);
        Ok(e.product_with(&columns, &lora.b, Some(x)))
    }

    /// The gradients of the embedding's factors from that of its output.
    pub(super) fn embedding_factors_backward(
        &self,
        dx: &E::Matrix,
        inputs: &E::Inputs,
        outside: &mut OutsideSinks<E>,
        e: &mut E,
    ) -> Result<()> {
        let (Some(lora), Some([a, b])) = (&self.adapters.embedding, &mut outside.embedding) else { return Ok(()) };
        let turned = e.transposed(&lora.a)?;
        let columns = e.embed(inputs, &turned)?;
        let db = e.outer(dx, &columns);
        e.accumulate(b, lora.scaling, &db);
        let dcolumns = e.product_with_backward(dx, &lora.b, None);
        let shape = E::shape(&turned);
        let mut rows = e.sink(shape);
        e.embed_backward(inputs, &dcolumns, (&mut rows, shape))?;
        let rows = e.sunk(rows)?;
        let da = e.transposed(&rows)?;
        e.accumulate(a, lora.scaling, &da);
        Ok(())
    }
}

impl<T: Real> Model<T> {
    /// The output projection as it acts, `V x D`.
    pub fn acting_head(&self) -> Cow<'_, Array2<T>> {
        match self.head_with_update(&mut Cpu::default()) {
            Some(head) => Cow::Owned(head),
            None => Cow::Borrowed(self.head()),
        }
    }

    /// The embedding as it acts, `V x D`.
    pub fn acting_embedding(&self) -> Cow<'_, Array2<T>> {
        match &self.adapters.embedding {
            Some(lora) => {
                let mut table = self.embedding.clone();
                embedding_delta(lora, &mut table);
                Cow::Owned(table)
            }
            None => Cow::Borrowed(&self.embedding),
        }
    }
}

/// table += s (B A)^T.
fn embedding_delta<T: Real>(lora: &Lora<T>, table: &mut Array2<T>) {
    table.scaled_add(T::of(lora.scaling), &lora.a.t().dot(&lora.b.t()));
}
