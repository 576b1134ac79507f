//! The chain without a mask: right moments over keys; then queries, with left moments over them;
//! then keys again.

use super::{Block, Chain, Collected, Results};
use crate::error::Result;
use crate::gpu::Engine;
use crate::gpu::attention::head::Counted;
use crate::gpu::attention::streaming::Options;
use crate::linalg::Real;

pub(super) fn products<B: Engine, T: Real>(
    chain: &Chain<'_, B, T>,
    options: &Options,
    count: &mut Counted,
) -> Result<Results<B>> {
    let (queries, keys) = (chain.head.query.dims()[0], chain.head.key.dims()[0]);
    let widest = chain.widths.right().max(chain.widths.left());
    let rank = chain.features.rank();
    let bytes = size_of::<f32>() as u64;
    // Alive at once for a row: features, columns with their parts, and sums.
    let budget = options.tile_bytes / (bytes * (2 * rank + 4 * widest) as u64);
    let single = chain.on.info.max_buffer_bytes / (bytes * rank.max(widest) as u64);
    let rows = usize::try_from(budget.min(single)).unwrap_or(usize::MAX).max(1);
    count.cost.hold(rows.min(queries.max(keys)) * (2 * rank + 4 * widest) + 2 * rank * widest);

    let mut right = None;
    for block in blocks(keys, rows) {
        let psi = chain.features.keys(block, count)?;
        let moments = count.chunk_product(psi.swap_dims(1, 2), chain.right_columns(block));
        right = Some(match right {
            None => moments,
            Some(before) => before + moments,
        });
    }
    let mut collected = Collected::new();
    let mut left = None;
    if let Some(right) = right {
        for block in blocks(queries, rows) {
            let phi = chain.features.queries(block, count)?;
            let side = chain.finish_queries(count.chunk_product(phi.clone(), right.clone()), block);
            let columns = chain.left_columns(&side, block, count);
            let moments = count.chunk_product(phi.swap_dims(1, 2), columns);
            left = Some(match left {
                None => moments,
                Some(before) => before + moments,
            });
            collected.push_queries(side);
        }
    }
    if let Some(left) = left {
        for block in blocks(keys, rows) {
            let psi = chain.features.keys(block, count)?;
            collected.push_keys(chain.finish_keys(count.chunk_product(psi, left.clone()), block));
        }
    }
    Ok(collected.results(chain.on))
}

fn blocks(length: usize, rows: usize) -> impl Iterator<Item = Block> {
    (0..length).step_by(rows).map(move |start| Block {
        start,
        chunks: 1,
        rows: rows.min(length - start),
    })
}
