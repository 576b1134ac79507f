//! Parallel sums whose result does not depend on the number of threads.

use super::Real;
use crate::cost::Cost;
use crate::error::Result;
use ndarray::{Array2, Axis, parallel::prelude::*};

/// Sum over items of an accumulator that `work` fills for each, starting from zero.
///
/// One accumulator a thread; they are added to the total in the order of the items, so that neither
/// the number of threads nor their timing changes a bit. `work` may also write outputs that its
/// item owns.
///
/// # Errors
/// The error of the first item, in order, whose `work` fails.
pub fn ordered_sum<T: Real, I: Send>(
    mut items: Vec<I>,
    shape: (usize, usize),
    cost: &mut Cost,
    work: impl Fn(&mut I, &mut Array2<T>, &mut Cost) -> Result<()> + Sync,
) -> Result<Array2<T>> {
    let threads = rayon::current_num_threads().min(items.len()).max(1);
    let mut accumulators: Vec<Array2<T>> = (0..threads).map(|_| Array2::zeros(shape)).collect();
    let size = shape.0 * shape.1;
    cost.hold(size);
    (0..threads).for_each(|_| cost.hold(size));
    let mut total = Array2::<T>::zeros(shape);
    for round in items.chunks_mut(threads) {
        let outcomes: Vec<Result<Cost>> = round
            .par_iter_mut()
            .zip(accumulators.par_iter_mut())
            .map(|(item, accumulator)| {
                accumulator.fill(T::zero());
                let mut cost = Cost::default();
                work(item, accumulator, &mut cost).map(|()| cost)
            })
            .collect();
        for outcome in outcomes {
            cost.add_operations(&outcome?);
        }
        // Rows are independent; within a row the items are added in order.
        let in_order = &accumulators[..round.len()];
        total.axis_chunks_iter_mut(Axis(0), MERGE_ROWS).into_par_iter().enumerate().for_each(
            |(chunk, mut rows)| {
                let start = chunk * MERGE_ROWS;
                for accumulator in in_order {
                    rows += &accumulator.slice(ndarray::s![start..start + rows.nrows(), ..]);
                }
            },
        );
    }
    cost.release(threads * size);
    Ok(total)
}

/// Rows that one task of the merge adds.
const MERGE_ROWS: usize = 256;

/// Splits `length` into at most `groups` runs of whole tiles, as equal as can be.
pub fn tile_groups(length: usize, tile: usize, groups: usize) -> Vec<std::ops::Range<usize>> {
    let tiles = length.div_ceil(tile.max(1));
    let groups = groups.min(tiles).max(1);
    (0..groups)
        .map(|g| {
            (g * tiles / groups * tile).min(length)..((g + 1) * tiles / groups * tile).min(length)
        })
        .filter(|range| !range.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn the_sum_has_the_same_bits_for_every_number_of_threads() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                ordered_sum::<f32, usize>(
                    (0..23).collect(),
                    (301, 3),
                    &mut Cost::default(),
                    |item, a, _| {
                        a.indexed_iter_mut()
                            .for_each(|((i, j), x)| *x = ((*item * 31 + i * 7 + j) as f32).sin());
                        Ok(())
                    },
                )
                .unwrap()
            })
        };
        let one = run(1);
        for threads in [2, 3, 8] {
            assert!(
                run(threads).iter().zip(&one).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{threads} threads"
            );
        }
    }

    #[test]
    fn the_first_failing_item_is_reported() {
        let outcome = ordered_sum::<f64, usize>(
            (0..9).collect(),
            (1, 1),
            &mut Cost::default(),
            |item, _, _| {
                if *item >= 4 { Err(Error::invalid("item", *item, "below 4")) } else { Ok(()) }
            },
        );
        assert!(matches!(outcome, Err(Error::InvalidParam { value, .. }) if value == "4"));
    }

    #[test]
    fn groups_cover_every_row_once() {
        for (length, tile, groups) in [(1, 4, 3), (17, 4, 3), (64, 8, 16), (100, 7, 5), (3, 1, 8)] {
            let ranges = tile_groups(length, tile, groups);
            let mut next = 0;
            for r in &ranges {
                assert_eq!((r.start, r.start % tile), (next, 0));
                next = r.end;
            }
            assert_eq!(next, length);
            assert!(ranges.len() <= groups);
        }
    }
}
