//! Low-rank updates of the embedding and the output projection, which stand outside the layers,
//! also with DoRA's magnitudes.

use super::gradients::GradientsOn;
use super::names::Outside;
use super::parameters::ModelOn;
use crate::adapters::lora::LoraOn;
use crate::error::Result;
use crate::linalg::Real;
use crate::model::Model;
use crate::ops::{Cpu, Ops};
use ndarray::Array2;
use std::borrow::Cow;

/// An update outside the layers.
#[derive(Debug, Clone)]
pub struct OutsideAdapter<E: Ops> {
    /// Factors. Of the output projection A is `r x D` and B `V x r`; of the embedding A is `r x V`
    /// and B `D x r`: a token adds s B times its column of A.
    pub lora: LoraOn<E>,
    /// DoRA's magnitudes, `1 x V` of the output projection, `1 x D` of the embedding. The norms
    /// beside them are constants in backward, as in PEFT.
    pub magnitude: Option<E::Matrix>,
}

/// Updates outside the layers.
#[derive(Debug, Clone)]
pub struct OutsideAdapters<E: Ops> {
    /// Of the output projection.
    pub head: Option<OutsideAdapter<E>>,
    /// Of the embedding.
    pub embedding: Option<OutsideAdapter<E>>,
}

impl<E: Ops> Default for OutsideAdapters<E> {
    fn default() -> Self {
        Self { head: None, embedding: None }
    }
}

/// Where their gradients add up, in the order of [`OutsideAdapter::tensors`].
#[derive(Debug, Clone)]
pub struct OutsideSinks<E: Ops> {
    /// Of the output projection.
    pub head: Vec<E::Sink>,
    /// Of the embedding.
    pub embedding: Vec<E::Sink>,
}

/// PEFT's names of A, B and the magnitude.
pub(super) fn outside_names(module: Outside) -> [&'static str; 3] {
    match module {
        Outside::Embedding => ["lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"],
        _ => ["lora_A", "lora_B", "lora_magnitude_vector"],
    }
}

impl<E: Ops> OutsideAdapter<E> {
    /// Its tensors: A, B and, for DoRA, the magnitude.
    pub fn tensors(&self) -> impl Iterator<Item = &E::Matrix> {
        [&self.lora.a, &self.lora.b].into_iter().chain(&self.magnitude)
    }

    /// The same, to be changed.
    pub(super) fn tensors_mut(&mut self) -> impl Iterator<Item = &mut E::Matrix> {
        [&mut self.lora.a, &mut self.lora.b].into_iter().chain(&mut self.magnitude)
    }

    /// A table with its update, rows being the outputs: W + s B A, and each row's norm.
    fn merged(&self, e: &mut E, table: E::Matrix) -> Result<(E::Matrix, Option<E::Matrix>)> {
        let delta = e.small_product((&self.lora.b, false), (&self.lora.a, false));
        let merged = e.add(table, delta, self.lora.scaling);
        let norms = self.magnitude.is_some().then(|| e.row_norms(&merged)).transpose()?;
        Ok((merged, norms))
    }

    /// Magnitudes over norms, `1 x rows`, if there are any.
    fn factor(&self, e: &mut E, norms: Option<&E::Matrix>) -> Option<E::Matrix> {
        Some(e.divided(self.magnitude.as_ref()?, norms?))
    }

    /// The table as it acts.
    fn acting(&self, e: &mut E, table: E::Matrix) -> Result<E::Matrix> {
        let (merged, norms) = self.merged(e, table)?;
        Ok(match self.factor(e, norms.as_ref()) {
            Some(factor) => e.scale_rows(merged, &factor, false),
            None => merged,
        })
    }
}

/// x with column j times entry j of a `1 x columns` matrix.
fn scale_columns<E: Ops>(e: &mut E, x: &E::Matrix, factor: &E::Matrix) -> Result<E::Matrix> {
    let turned = e.transposed(x)?;
    let scaled = e.scale_rows(turned, factor, false);
    e.transposed(&scaled)
}

impl<E: Ops> OutsideAdapters<E> {
    /// Sinks of zeros.
    pub(super) fn sinks(&self, engine: &E) -> OutsideSinks<E> {
        let of = |adapter: &Option<OutsideAdapter<E>>| {
            adapter
                .iter()
                .flat_map(OutsideAdapter::tensors)
                .map(|t| engine.sink(E::shape(t)))
                .collect()
        };
        OutsideSinks { head: of(&self.head), embedding: of(&self.embedding) }
    }

    /// The update of a module.
    pub fn of(&self, module: Outside) -> Option<&OutsideAdapter<E>> {
        match module {
            Outside::Embedding => self.embedding.as_ref(),
            Outside::Head => self.head.as_ref(),
            _ => None,
        }
    }

    /// All tensors.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &E::Matrix> {
        self.embedding.iter().chain(&self.head).flat_map(OutsideAdapter::tensors)
    }
}

impl<E: Ops> ModelOn<E> {
    /// The output projection with its update; formed whole, so that logits stay one product a
    /// chunk.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for a row of norm zero under DoRA.
    pub(super) fn head_with_update(&self, e: &mut E) -> Result<Option<E::Matrix>> {
        let Some(adapter) = &self.adapters.head else { return Ok(None) };
        let head = e.copy(self.head());
        adapter.acting(e, head).map(Some)
    }

    /// The gradients of the head's factors from that of the projection with its update. Under DoRA,
    /// with D_j = W'_j / ||W'_j|| and c_j = P_j . D_j for the gradient P: dm_j = c_j, dW'_j = m_j /
    /// ||W'_j|| P_j.
    pub(super) fn head_factors_backward(
        &self,
        whole: E::Matrix,
        gradients: &mut GradientsOn<E>,
    ) -> Result<()> {
        let head = self.adapters.head.as_ref().map(|_| gradients.engine.copy(self.head()));
        let GradientsOn { outside, engine: e, .. } = gradients;
        let (Some(adapter), Some(head)) = (&self.adapters.head, head) else { return Ok(()) };
        let mut whole = whole;
        if adapter.magnitude.is_some() {
            let (merged, norms) = adapter.merged(e, head)?;
            let factor = adapter.factor(e, norms.as_ref());
            if let (Some(norms), Some(factor), Some(sink)) =
                (norms, factor, outside.head.get_mut(2))
            {
                let direction = e.scale_rows(merged, &norms, true);
                let along = e.row_dots(&whole, &direction);
                e.accumulate(sink, 1.0, &along);
                whole = e.scale_rows(whole, &factor, false);
            }
        }
        if let [a, b, ..] = &mut outside.head[..] {
            let lora = &adapter.lora;
            let db = e.small_product((&whole, false), (&lora.a, true));
            let da = e.small_product((&lora.b, true), (&whole, false));
            e.accumulate(b, lora.scaling, &db);
            e.accumulate(a, lora.scaling, &da);
        }
        Ok(())
    }

    /// Norms of the embedding's columns with its update, `1 x D`, under DoRA.
    fn embedding_norms(&self, adapter: &OutsideAdapter<E>, e: &mut E) -> Result<Option<E::Matrix>> {
        if adapter.magnitude.is_none() {
            return Ok(None);
        }
        let turned = e.transposed(&self.embedding)?;
        Ok(adapter.merged(e, turned)?.1)
    }

    /// x with the embedding's update added.
    pub(super) fn embedding_update(
        &self,
        x: E::Matrix,
        inputs: &E::Inputs,
        e: &mut E,
    ) -> Result<E::Matrix> {
        let Some(adapter) = &self.adapters.embedding else { return Ok(x) };
        let x = Self::embedding_sum(adapter, x, inputs, e)?;
        let norms = self.embedding_norms(adapter, e)?;
        match adapter.factor(e, norms.as_ref()) {
            Some(factor) => scale_columns(e, &x, &factor),
            None => Ok(x),
        }
    }

    /// x plus what the factors add.
    fn embedding_sum(
        adapter: &OutsideAdapter<E>,
        x: E::Matrix,
        inputs: &E::Inputs,
        e: &mut E,
    ) -> Result<E::Matrix> {
        let turned = e.transposed(&adapter.lora.a)?;
        let columns = e.embed(inputs, &turned)?;
        let columns = e.scale(columns, adapter.lora.scaling);
        Ok(e.product_with(&columns, &adapter.lora.b, Some(x)))
    }

    /// The gradients of the embedding's factors from that of its output. Under DoRA column j of the
    /// output is m_j / n_j times the sum z, so dm_j = dx_j . z_j / n_j, and the rest sees dx_j
    /// m_j / n_j.
    pub(super) fn embedding_factors_backward(
        &self,
        dx: &E::Matrix,
        inputs: &E::Inputs,
        outside: &mut OutsideSinks<E>,
        e: &mut E,
    ) -> Result<()> {
        let (Some(adapter), [a, b, magnitude @ ..]) =
            (&self.adapters.embedding, &mut outside.embedding[..])
        else {
            return Ok(());
        };
        let norms = self.embedding_norms(adapter, e)?;
        let factor = adapter.factor(e, norms.as_ref());
        let mut scaled = None;
        if let (Some(norms), Some(factor), [sink, ..]) = (norms, factor, magnitude) {
            let base = e.embed(inputs, &self.embedding)?;
            let sum = Self::embedding_sum(adapter, base, inputs, e)?;
            let (sum, turned) = (e.transposed(&sum)?, e.transposed(dx)?);
            let along = e.row_dots(&turned, &sum);
            let along = e.divided(&along, &norms);
            e.accumulate(sink, 1.0, &along);
            let turned = e.scale_rows(turned, &factor, false);
            scaled = Some(e.transposed(&turned)?);
        }
        let (dx, lora) = (scaled.as_ref().unwrap_or(dx), &adapter.lora);
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
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for a row of norm zero under DoRA.
    pub fn acting_head(&self) -> Result<Cow<'_, Array2<T>>> {
        Ok(match self.head_with_update(&mut Cpu::default())? {
            Some(head) => Cow::Owned(head),
            None => Cow::Borrowed(self.head()),
        })
    }

    /// The embedding as it acts, `V x D`.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for a column of norm zero under DoRA.
    pub fn acting_embedding(&self) -> Result<Cow<'_, Array2<T>>> {
        let Some(adapter) = &self.adapters.embedding else {
            return Ok(Cow::Borrowed(&self.embedding));
        };
        let turned = self.embedding.t().as_standard_layout().into_owned();
        let acting = adapter.acting(&mut Cpu::default(), turned)?;
        Ok(Cow::Owned(acting.t().as_standard_layout().into_owned()))
    }
}
