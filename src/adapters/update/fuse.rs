//! Weighted sums of updates.

use super::{SlicePlace, SliceUpdate, WeightUpdate, compact};
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, Axis, concatenate};
use std::collections::BTreeSet;

/// sum_i w_i update_i of one weight.
///
/// Slices of the same side give the slice of the union of their indices, added where they overlap.
/// Any other mix gives low-rank factors: `[w_1 s_1 B_1, w_2 s_2 B_2, ...]` times the stacked `A_i`,
/// so ranks add and nothing is approximated (slices enter through their selection matrix). One
/// update of weight 1 comes back as it is.
///
/// # Errors
/// [`Error::InvalidParam`] for no part or a weight that is not finite; [`Error::ShapeMismatch`] for
/// updates of different weights.
///
/// ```
/// use ndarray::array;
/// use peft_limits::adapters::s2ft::Side;
/// use peft_limits::adapters::update::{SliceUpdate, WeightUpdate, fuse};
/// let rows = |index: Vec<usize>, delta| SliceUpdate::new((4, 2), Side::Output, index, delta);
/// let a = WeightUpdate::Slice(rows(vec![0, 2], array![[1.0, 2.0], [3.0, 4.0]])?);
/// let b = WeightUpdate::Slice(rows(vec![2, 3], array![[10.0, 20.0], [30.0, 40.0]])?);
/// let sum = fuse(&[(1.0, &a), (0.5, &b)])?;     // row 2 is in both
/// assert_eq!(sum.dense(), array![[1.0, 2.0], [0.0, 0.0], [8.0, 14.0], [15.0, 20.0]]);
/// assert_eq!(sum.elements(), 6);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn fuse<T: Real>(parts: &[(f64, &WeightUpdate<T>)]) -> Result<WeightUpdate<T>> {
    let Some(&(first_weight, first)) = parts.first() else {
        return Err(Error::invalid("updates", "none", "at least one is needed"));
    };
    for (weight, update) in parts {
        if !weight.is_finite() {
            return Err(Error::invalid("fusion weight", weight, "must be finite"));
        }
        if update.shape() != first.shape() {
            return Err(Error::shape("fuse", "update", first.shape(), update.shape()));
        }
    }
    if parts.len() == 1 && first_weight.to_bits() == 1f64.to_bits() {
        return Ok(first.clone());
    }
    let slices: Option<Vec<(f64, &SliceUpdate<T>)>> = parts
        .iter()
        .map(|&(weight, update)| match update {
            WeightUpdate::Slice(slice) => Some((weight, slice)),
            WeightUpdate::LowRank(_) => None,
        })
        .collect();
    if let Some(slices) = slices
        && slices.iter().all(|(_, s)| s.place().side == slices[0].1.place().side)
    {
        return fuse_slices(&slices).map(WeightUpdate::Slice);
    }
    let factors =
        parts.iter().map(|(w, u)| Ok((*w, u.to_low_rank()?))).collect::<Result<Vec<_>>>()?;
    let b: Vec<Array2<T>> =
        factors.iter().map(|(w, f)| f.b.mapv(|x| x * T::of(w * f.scaling))).collect();
    let b_views: Vec<_> = b.iter().map(|b| b.view()).collect();
    let a_views: Vec<_> = factors.iter().map(|(_, f)| f.a.view()).collect();
    let join = |axis, views: &[_]| {
        concatenate(axis, views)
            .map_err(|e| Error::invalid("factors", e, "must have the sides of one weight"))
    };
    let b = join(Axis(1), &b_views)?.as_standard_layout().into_owned();
    compact(b, join(Axis(0), &a_views)?).map(WeightUpdate::LowRank)
}

fn fuse_slices<T: Real>(parts: &[(f64, &SliceUpdate<T>)]) -> Result<SliceUpdate<T>> {
    let (shape, side) = (parts[0].1.shape(), parts[0].1.place().side);
    let union: BTreeSet<usize> =
        parts.iter().flat_map(|(_, s)| s.place().index.iter().copied()).collect();
    let place = SlicePlace { side, index: union.into_iter().collect() };
    let zeros = Array2::zeros(place.shape_in(shape));
    let mut total = SliceUpdate::new(shape, side, place.index, zeros)?;
    for (weight, slice) in parts {
        slice.add_scaled_into(T::of(*weight), &mut total);
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::lora::{Lora, LoraSpec};
    use crate::adapters::s2ft::Side;
    use crate::check::compare::assert_close;
    use crate::cost::Cost;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng, seq::SliceRandom};
    use rand_chacha::ChaCha8Rng;

    fn random(shape: (usize, usize), rng: &mut ChaCha8Rng) -> Array2<f64> {
        Array2::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
    }

    /// A random update: rows, columns or factors.
    fn update(kind: u8, (out, width): (usize, usize), rng: &mut ChaCha8Rng) -> WeightUpdate<f64> {
        let pick = |extent: usize, rng: &mut ChaCha8Rng| {
            let mut all: Vec<usize> = (0..extent).collect();
            all.shuffle(rng);
            all.truncate(rng.random_range(1..=extent));
            all
        };
        match kind {
            0 => {
                let index = pick(out, rng);
                let delta = random((index.len(), width), rng);
                WeightUpdate::Slice(
                    SliceUpdate::new((out, width), Side::Output, index, delta).unwrap(),
                )
            }
            1 => {
                let index = pick(width, rng);
                let delta = random((out, index.len()), rng);
                WeightUpdate::Slice(
                    SliceUpdate::new((out, width), Side::Input, index, delta).unwrap(),
                )
            }
            _ => {
                let rank = rng.random_range(1..=out.min(width));
                let spec = LoraSpec { rank, alpha: 3.0, rank_stabilized: rng.random() };
                let (a, b) = (random((rank, width), rng), random((out, rank), rng));
                WeightUpdate::LowRank(Lora::from_factors(spec, (out, width), a, b).unwrap())
            }
        }
    }

    proptest! {
        /// The fused update, its factors and its products all equal the weighted sum of dense
        /// updates.
        #[test]
        fn fusion_is_the_weighted_sum(
            kinds in prop::collection::vec(0u8..3, 1..4), out in 1usize..9, width in 1usize..9, seed: u64,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let updates: Vec<_> = kinds.iter().map(|&k| update(k, (out, width), &mut rng)).collect();
            let parts: Vec<_> = updates.iter().map(|u| (rng.random_range(-2.0..2.0), u)).collect();
            let fused = fuse(&parts).unwrap();
            let mut want = Array2::<f64>::zeros((out, width));
            for (weight, update) in &parts {
                want.scaled_add(*weight, &update.dense());
            }
            // Sums of at most 3 * 8 * 8 products of size one in f64.
            assert_close("fused", &fused.dense().view(), &want.view(), 1e-13);
            let factors = fused.to_low_rank().unwrap();
            prop_assert!(factors.a.nrows() <= out.min(width));
            assert_close("factors", &WeightUpdate::LowRank(factors).dense().view(), &want.view(), 1e-13);
            let x = random((5, width), &mut rng);
            let mut y = random((5, out), &mut rng);
            let want = &y + &x.dot(&want.t());
            fused.forward_add(x.view(), &mut y.view_mut(), &mut Cost::default());
            assert_close("x update^T", &y.view(), &want.view(), 1e-13);
        }

        /// `between` finds exactly what was changed, and adding it back gives the trained weight.
        #[test]
        fn a_difference_is_found_and_reproduced(kind in 0u8..2, out in 2usize..9, width in 2usize..9, seed: u64) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let base = random((out, width), &mut rng);
            let mut trained = base.clone();
            let change = update(kind, (out, width), &mut rng);
            change.add_to(&mut trained.view_mut(), &mut Cost::default());
            let found = SliceUpdate::between(base.view(), trained.view()).unwrap().unwrap();
            prop_assert!(found.delta().len() <= change.elements());
            let mut again = base.clone();
            found.add_to(&mut again.view_mut(), &mut Cost::default());
            assert_close("trained again", &again.view(), &trained.view(), 1e-15);
            prop_assert!(SliceUpdate::between(base.view(), base.view()).unwrap().is_none());
        }
    }

    #[test]
    fn bad_parts_are_refused() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (a, b) = (update(0, (3, 4), &mut rng), update(2, (4, 3), &mut rng));
        assert!(matches!(fuse::<f64>(&[]), Err(Error::InvalidParam { .. })));
        assert!(
            matches!(fuse(&[(f64::NAN, &a)]), Err(Error::InvalidParam { name, .. }) if name == "fusion weight")
        );
        assert!(matches!(fuse(&[(1.0, &a), (1.0, &b)]), Err(Error::ShapeMismatch { .. })));
        let delta = Array2::<f64>::zeros((2, 4));
        let bad = |index: Vec<usize>| {
            SliceUpdate::new((3, 4), Side::Output, index, delta.clone()).unwrap_err()
        };
        assert!(bad(vec![1, 1]).to_string().contains("twice"));
        assert!(bad(vec![1, 3]).to_string().contains("below 3"));
        assert!(matches!(bad(vec![1]), Error::ShapeMismatch { .. }));
    }
}
