//! The updates of a whole model: what training added to each projection, in the checkpoint's order
//! of heads and channels, independent of the method that trained it.
//!
//! | from | update of a projection |
//! |---|---|
//! | LoRA, MosLoRA | s B A; s (B M) A |
//! | PaCA | the selected columns, trained - original |
//! | S2FT | the slice, trained - original, at its original rows or columns |
//! | DoRA, SpFT, full fine-tuning | every row that changed (a dense update) |
//!
//! A slice update in a precision of unit u gives the trained weight back to within u times the
//! larger of the two values, and exactly where trained and base are within a factor of two of each
//! other (Sterbenz).

mod folder;
mod mixed_batch;
mod on_disk;
mod switch;

use super::names::Outside;
use super::options::Norm;
use super::parameters::{Model, TrainableParts};
use super::projection::Projection;
use super::s2ft::original_places;
use crate::adapters::Method;
use crate::adapters::lora::Lora;
use crate::adapters::update::{SliceUpdate, WeightUpdate, fuse};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::gemm::parallel_product;
pub use folder::is_slice_folder;
use ndarray::Array2;
pub use on_disk::{KEPT, OnDisk, switch_off_on_disk, switch_on_on_disk};
use std::collections::BTreeMap;
pub use switch::Switchable;

/// Updates by layer and projection; a projection that is absent is unchanged.
#[derive(Debug, Clone)]
pub struct ModelUpdate<T: Real> {
    /// (layer, projection), update.
    pub entries: BTreeMap<(usize, Projection), WeightUpdate<T>>,
}

impl<T: Real> ModelUpdate<T> {
    /// What the adapters attached to `model` have learned. LoRA's factors are taken as they are; a
    /// sparse method's slice is the difference from the original values it keeps.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if nothing is adapted, something outside the projections is trained,
    /// a projection is fine-tuned in full (no original is kept: use [`ModelUpdate::between`]), a
    /// DoRA adapter is merged, or factors act on weights that S2FT has reordered.
    pub fn of_adapters(model: &Model<T>) -> Result<Self> {
        let parts = model.trainable;
        if parts != TrainableParts::default() {
            let requirement = "an update holds projections only; merge the folder into a \
                               checkpoint instead (peft-limits adapter merge)";
            return Err(Error::invalid("trainable", format!("{parts:?}"), requirement));
        }
        let outside = [
            (&model.adapters.embedding, Outside::Embedding),
            (&model.adapters.head, Outside::Head),
        ];
        if let Some((_, module)) = outside.into_iter().find(|(lora, _)| lora.is_some()) {
            let requirement = "an update holds projections of layers only; merge the folder into a \
                               checkpoint instead (peft-limits adapter merge)";
            return Err(Error::invalid(
                model.config.options.outside(module),
                "adapted",
                requirement,
            ));
        }
        if model.norms().any(|norm| norm.whole) {
            return Err(Error::invalid(
                "norms",
                "trained (modules_to_save)",
                "an update holds projections only",
            ));
        }
        let mut entries = BTreeMap::new();
        for (l, layer) in model.layers.iter().enumerate() {
            for (p, projection) in layer.projections() {
                let refuse = |requirement: &str| {
                    let name = model.config.options.module(l, p);
                    Error::invalid(name, projection.method.name(), requirement)
                };
                let sparse = matches!(projection.method, Method::Frozen | Method::S2ft(_));
                if layer.order.is_some() && !sparse {
                    return Err(refuse(
                        "its weights are reordered by S2FT; restore the order first",
                    ));
                }
                let update = match &projection.method {
                    Method::Frozen => continue,
                    Method::Full => {
                        return Err(refuse(
                            "keeps no original; compare with the base model instead",
                        ));
                    }
                    Method::Lora(lora) if lora.bias.is_some() => {
                        return Err(refuse(
                            "has a bias of its own (lora_bias), which an update does not hold",
                        ));
                    }
                    Method::Lora(lora) => Some(WeightUpdate::LowRank(lora.clone())),
                    Method::Moslora(m) => {
                        let b = parallel_product(m.b.view(), m.mixer.view(), &mut Cost::default());
                        let lora = Lora::from_factors(m.spec, projection.shape(), m.a.clone(), b)?;
                        Some(WeightUpdate::LowRank(lora))
                    }
                    Method::Dora(_) if projection.is_merged() => {
                        return Err(refuse("is merged; unmerge first"));
                    }
                    Method::Dora(_) => {
                        let trained = projection.effective_weight()?;
                        SliceUpdate::between(projection.base.dense().view(), trained.view())?
                            .map(WeightUpdate::Slice)
                    }
                    Method::Spft(_) => {
                        let mut before = projection.clone();
                        before.unmerge()?;
                        let mut after = projection.clone();
                        after.merge()?;
                        let (before, after) = (before.base.dense(), after.base.dense());
                        SliceUpdate::between(before.view(), after.view())?.map(WeightUpdate::Slice)
                    }
                    Method::Paca(_) if projection.base.is_packed() => {
                        return Err(refuse(
                            "differs from a quantized weight, not from the checkpoint's",
                        ));
                    }
                    Method::Paca(paca) => {
                        let here = projection.base.columns(&paca.index);
                        let delta = difference(here, paca.inactive.as_ref(), paca.active);
                        let index = paca.index.clone();
                        let side = crate::adapters::s2ft::Side::Input;
                        Some(WeightUpdate::Slice(SliceUpdate::new(
                            projection.shape(),
                            side,
                            index,
                            delta,
                        )?))
                    }
                    Method::S2ft(slice) => {
                        let here = slice.of(&projection.base.dense().view()).to_owned();
                        let delta = difference(here, slice.original.as_ref(), slice.active);
                        let places = original_places(layer.order.as_ref(), p, &model.config);
                        let index = match places {
                            Some(places) => places[slice.range.clone()].to_vec(),
                            None => slice.range.clone().collect(),
                        };
                        Some(WeightUpdate::Slice(SliceUpdate::new(
                            projection.shape(),
                            slice.side,
                            index,
                            delta,
                        )?))
                    }
                };
                entries.extend(update.map(|update| ((l, p), update)));
            }
        }
        if entries.is_empty() {
            return Err(Error::invalid("adapter", "none", "no projection carries an adapter"));
        }
        Ok(Self { entries })
    }

    /// `trained - base` of two checkpoints of the same architecture: per projection the rows or
    /// columns that changed, whichever is the smaller slice. Adapters of either model count as
    /// merged.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for different sizes, a difference outside the projections (which an
    /// adapter cannot hold), or none at all; as
    /// [`crate::adapters::AdaptedLinear::effective_weight`].
    pub fn between(base: &Model<T>, trained: &Model<T>) -> Result<Self> {
        if base.config != trained.config {
            let found = format!("{:?}", trained.config);
            return Err(Error::invalid(
                "trained model",
                found,
                "must have the sizes of the base model",
            ));
        }
        let outside = |name: &str| {
            Error::invalid(name, "changed", "an adapter holds changes of projections only")
        };
        let options = &base.config.options;
        let table = |module: Outside| outside(&options.outside_tensor(module, "weight"));
        if base.embedding != trained.embedding {
            return Err(table(Outside::Embedding));
        }
        if base.positions != trained.positions {
            return Err(table(Outside::Positions));
        }
        if base.lm_head != trained.lm_head {
            return Err(table(Outside::Head));
        }
        if base.final_norm != trained.final_norm {
            return Err(table(Outside::FinalNorm));
        }
        let mut entries = BTreeMap::new();
        for (l, (a, b)) in base.layers.iter().zip(&trained.layers).enumerate() {
            if let Some(norm) = Norm::ALL
                .into_iter()
                .find(|&n| a.checkpoint_norm(n, &base.config) != b.checkpoint_norm(n, &base.config))
            {
                return Err(outside(&options.norm_tensor(l, norm, "weight")));
            }
            if a.checkpoint_sinks(&base.config) != b.checkpoint_sinks(&base.config) {
                return Err(outside(&options.sinks_name(l)));
            }
            for (p, _) in a.projections() {
                if a.checkpoint_bias(p, &base.config) != b.checkpoint_bias(p, &base.config) {
                    return Err(outside(&format!("{}.bias", options.module(l, p))));
                }
                let (a, b) =
                    (a.checkpoint_weight(p, &base.config)?, b.checkpoint_weight(p, &base.config)?);
                let slice = SliceUpdate::between(a.view(), b.view())?;
                entries.extend(slice.map(|slice| ((l, p), WeightUpdate::Slice(slice))));
            }
        }
        if entries.is_empty() {
            return Err(Error::invalid(
                "trained model",
                "equal to the base model",
                "must differ from it",
            ));
        }
        Ok(Self { entries })
    }

    /// sum_i w_i update_i, projection by projection ([`fuse()`]).
    ///
    /// # Errors
    /// As [`fuse()`].
    pub fn fuse(parts: &[(f64, &Self)]) -> Result<Self> {
        if parts.is_empty() {
            return Err(Error::invalid("adapters", "none", "at least one is needed"));
        }
        let mut by_place: BTreeMap<_, Vec<(f64, &WeightUpdate<T>)>> = BTreeMap::new();
        for (weight, update) in parts {
            for (place, entry) in &update.entries {
                by_place.entry(*place).or_default().push((*weight, entry));
            }
        }
        let entries = by_place
            .into_iter()
            .map(|(place, parts)| Ok((place, fuse(&parts)?)))
            .collect::<Result<_>>()?;
        Ok(Self { entries })
    }

    /// The same update as low-rank factors everywhere, without rounding
    /// ([`WeightUpdate::to_low_rank`]).
    ///
    /// # Errors
    /// As there.
    pub fn to_low_rank(&self) -> Result<Self> {
        let factors = |update: &WeightUpdate<T>| Ok(WeightUpdate::LowRank(update.to_low_rank()?));
        let entries = self
            .entries
            .iter()
            .map(|(&place, u)| Ok((place, factors(u)?)))
            .collect::<Result<_>>()?;
        Ok(Self { entries })
    }

    /// Numbers of all updates.
    pub fn elements(&self) -> usize {
        self.entries.values().map(WeightUpdate::elements).sum()
    }

    /// Bytes of all updates.
    pub fn bytes(&self) -> usize {
        self.entries.values().map(WeightUpdate::bytes).sum()
    }

    /// Numbers of the model that putting the update in place overwrites.
    pub fn touched_elements(&self) -> usize {
        self.entries.values().map(WeightUpdate::touched_elements).sum()
    }

    /// How many of the overwritten numbers of `base` come back with every bit of `trained` when the
    /// update is added, and how many there are.
    ///
    /// # Errors
    /// As [`Switchable::new`] and [`Switchable::switch`].
    pub fn exact_numbers(&self, base: &Model<T>, trained: &Model<T>) -> Result<(usize, usize)> {
        let mut switchable = Switchable::new(base.clone())?;
        switchable.switch(Some(self))?;
        let (mut exact, mut all) = (0, 0);
        for (&(l, p), update) in &self.entries {
            let weight = switchable.model().layers[l].projection(p).base.dense();
            let want = trained.layers[l].checkpoint_weight(p, &trained.config)?;
            let (got, want) = match update {
                WeightUpdate::Slice(slice) => {
                    (slice.place().read(weight.view()), slice.place().read(want.view()))
                }
                WeightUpdate::LowRank(_) => (weight.into_owned(), want),
            };
            all += got.len();
            exact += got
                .iter()
                .zip(&want)
                .filter(|(a, b)| a.widen().to_bits() == b.widen().to_bits())
                .count();
        }
        Ok((exact, all))
    }

    /// Refuses an update that does not fit the model, whose projections must be dense, frozen and
    /// in the checkpoint's order.
    fn check_fits(&self, model: &Model<T>) -> Result<()> {
        for (&(l, p), update) in &self.entries {
            let name = model.config.options.module(l, p);
            let Some(layer) = model.layers.get(l) else {
                return Err(Error::invalid(
                    "update",
                    name,
                    format!("the model has {} layers", model.layers.len()),
                ));
            };
            let Some(projection) = layer.get(p) else {
                return Err(Error::invalid("update", name, "the model has no such projection"));
            };
            if update.shape() != projection.shape() {
                return Err(Error::shape("update", name, projection.shape(), update.shape()));
            }
        }
        Ok(())
    }
}

/// trained - original, whichever of the two is in effect.
fn difference<T: Real>(
    here: Array2<T>,
    other: Option<&Array2<T>>,
    trained_here: bool,
) -> Array2<T> {
    match other {
        Some(other) if trained_here => here - other,
        Some(other) => other - &here,
        None => here,
    }
}

/// Refuses a model that carries adapters or packed weights.
fn require_plain<T: Real>(model: &Model<T>) -> Result<()> {
    for (l, layer) in model.layers.iter().enumerate() {
        for (p, projection) in layer.projections() {
            let name = model.config.options.module(l, p);
            if projection.is_trainable() || projection.is_merged() || layer.order.is_some() {
                return Err(Error::invalid(
                    name,
                    projection.method.name(),
                    "must be frozen and unadapted here",
                ));
            }
            if projection.base.is_packed() {
                return Err(Error::invalid(name, "packed", "must be dense here"));
            }
        }
    }
    Ok(())
}

/// The weight of a projection that [`require_plain`] has accepted.
fn plain_weight<T: Real>(model: &mut Model<T>, l: usize, p: Projection) -> Result<&mut Array2<T>> {
    model.layers[l].projection_mut(p).base.dense_mut("update")
}
