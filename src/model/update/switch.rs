//! One model, many adapters, one in place at a time.

use super::super::parameters::Model;
use super::super::projection::Projection;
use super::{ModelUpdate, plain_weight, require_plain};
use crate::adapters::update::{SlicePlace, WeightUpdate};
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use ndarray::Array2;

/// A base model in which one update at a time is in effect.
///
/// What an update overwrites is kept beside it, not recomputed by subtracting: taking the update
/// out restores every bit of the base, however often adapters are switched. A slice update keeps
/// (and moves) only its slice; a low-rank one has to keep the whole weight.
///
/// ```
/// use peft_limits::model::update::{ModelUpdate, Switchable};
/// # use peft_limits::model::{AdapterPlan, MethodSpec, Model, ModelConfig, Projection};
/// # use peft_limits::adapters::{paca::PacaSpec, Method};
/// # let config = ModelConfig { vocab_size: 13, hidden_size: 8, intermediate_size: 12, num_hidden_layers: 1,
/// #     num_attention_heads: 2, num_key_value_heads: 1, head_dim: 4, max_position_embeddings: 32,
/// #     rms_norm_eps: 1e-5, rope_theta: 1e4, tie_word_embeddings: false, options: Default::default() };
/// # let mut rng = <rand_chacha::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(1);
/// # let base: Model<f32> = Model::random(config, &mut rng)?;
/// # let mut tuned = base.clone();
/// # tuned.attach(&AdapterPlan::everywhere(&[Projection::Down], MethodSpec::Paca(PacaSpec::default())), &mut rng)?;
/// # tuned.for_each_trainable(&mut |_, v| { v.mapv_inplace(|x| x + 0.1); Ok(()) })?;
/// let update = ModelUpdate::of_adapters(&tuned)?;             // PaCA on `down`
/// let before = base.layers[0].projection(Projection::Down).base.dense().into_owned();
/// let mut model = Switchable::new(base)?;
/// model.switch(Some(&update))?;
/// assert_ne!(model.model().layers[0].projection(Projection::Down).base.dense(), before);
/// model.switch(None)?;                                        // every bit is back
/// assert_eq!(model.model().layers[0].projection(Projection::Down).base.dense(), before);
/// # Ok::<(), peft_limits::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Switchable<T: Real> {
    model: Model<T>,
    kept: Vec<Kept<T>>,
}

/// What an update overwrote at one projection.
#[derive(Debug, Clone)]
struct Kept<T> {
    place: (usize, Projection),
    /// Which rows or columns; `None` for a whole weight.
    slice: Option<SlicePlace>,
    values: Array2<T>,
}

impl<T: Real> Switchable<T> {
    /// A base model with no update in effect.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for a model with adapters, reordered or packed weights.
    pub fn new(model: Model<T>) -> Result<Self> {
        require_plain(&model)?;
        Ok(Self { model, kept: Vec::new() })
    }

    /// Takes the present update out, bit for bit, and puts another in place; `None` leaves the
    /// base.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] or [`crate::Error::ShapeMismatch`] for an update of another
    /// architecture; the present one then stays in effect.
    pub fn switch(&mut self, update: Option<&ModelUpdate<T>>) -> Result<()> {
        if let Some(update) = update {
            update.check_fits(&self.model)?;
        }
        for Kept { place: (l, p), slice, values } in std::mem::take(&mut self.kept) {
            let weight = plain_weight(&mut self.model, l, p)?;
            match slice {
                Some(slice) => slice.write(&mut weight.view_mut(), values.view()),
                None => *weight = values,
            }
        }
        for (&(l, p), update) in update.iter().flat_map(|u| &u.entries) {
            let weight = plain_weight(&mut self.model, l, p)?;
            let kept = match update {
                WeightUpdate::Slice(slice) => Kept {
                    place: (l, p),
                    values: slice.place().read(weight.view()),
                    slice: Some(slice.place().clone()),
                },
                WeightUpdate::LowRank(_) => {
                    Kept { place: (l, p), values: weight.clone(), slice: None }
                }
            };
            update.add_to(&mut weight.view_mut(), &mut Cost::default());
            self.kept.push(kept);
        }
        Ok(())
    }

    /// The model with the present update in effect.
    pub fn model(&self) -> &Model<T> {
        &self.model
    }

    /// Bytes of kept original values.
    pub fn kept_bytes(&self) -> usize {
        self.kept.iter().map(|k| k.values.len() * size_of::<T>()).sum()
    }

    /// The base model, with nothing in effect.
    ///
    /// # Errors
    /// None today; the signature matches [`Switchable::switch`].
    pub fn into_base(mut self) -> Result<Model<T>> {
        self.switch(None)?;
        Ok(self.model)
    }
}
