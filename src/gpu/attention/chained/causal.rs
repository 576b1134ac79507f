//! The chain under a causal mask: a chunked prefix scan, the diagonal chunks exact; linear in L.
//!
//! Many chunks go through each operation together: their moments are made at once, and a running
//! sum over the chunks gives each one what lies before it (or, on the way back, after it).

use super::{Block, Chain, Chunks, Collected, QuerySide, Results};
use crate::attention::chained::CHUNK;
use crate::error::Result;
use crate::gpu::Engine;
use crate::gpu::attention::head::{Counted, rows_of};
use crate::gpu::attention::streaming::{MASKED, Options};
use crate::linalg::Real;
use burn::tensor::{Bool, Tensor};

pub(super) fn products<B: Engine, T: Real>(
    chain: &Chain<'_, B, T>,
    options: &Options,
    count: &mut Counted,
) -> Result<Results<B>> {
    let tokens = chain.head.query.dims()[0];
    let widest = chain.widths.right().max(chain.widths.left());
    let rank = chain.features.rank();
    let bytes = size_of::<f32>() as u64;
    // Alive at once for a chunk: moments and their running sums, features, columns and sums, exact
    // exponentials.
    let held = 3 * rank * widest + CHUNK * (2 * rank + 4 * widest) + 2 * CHUNK * CHUNK;
    let budget = options.tile_bytes / (bytes * held as u64);
    let single = chain.on.info.max_buffer_bytes
        / (bytes * (rank * widest).max(CHUNK * rank.max(widest)) as u64);
    let chunks = usize::try_from(budget.min(single)).unwrap_or(usize::MAX).max(1);
    count.cost.hold(chunks.min(tokens.div_ceil(CHUNK)) * held);
    let blocks = blocks(tokens, chunks);

    let mut collected = Collected::new();
    let mut sides: Vec<QuerySide<B>> = Vec::new();
    // Key rows' part of their own chunk.
    let mut own: Vec<Chunks<B>> = Vec::new();
    let mut state = None;
    for &block in &blocks {
        let (phi, psi) =
            (chain.features.queries(block, count)?, chain.features.keys(block, count)?);
        let columns = chain.right_columns(block);
        let moments = count.chunk_product(psi.swap_dims(1, 2), columns.clone());
        let before = running(moments, &mut state);
        let exact = diagonal(chain, block, count);
        let sums = count.chunk_product(phi, before) + count.chunk_product(exact.clone(), columns);
        let side = chain.finish_queries(sums, block);
        let left = chain.left_columns(&side, block, count);
        own.push(count.chunk_product(exact.swap_dims(1, 2), left));
        sides.push(side);
    }
    let mut state = None;
    let mut keys = Vec::new();
    for ((&block, side), own) in blocks.iter().zip(&sides).zip(own).rev() {
        let (phi, psi) =
            (chain.features.queries(block, count)?, chain.features.keys(block, count)?);
        let left = chain.left_columns(side, block, count);
        let moments = count.chunk_product(phi.swap_dims(1, 2), left);
        let after = running(moments.flip([0]), &mut state).flip([0]);
        keys.push(chain.finish_keys(count.chunk_product(psi, after) + own, block));
    }
    sides.into_iter().for_each(|side| collected.push_queries(side));
    keys.into_iter().rev().for_each(|rows| collected.push_keys(rows));
    Ok(collected.results(chain.on))
}

/// For each chunk the sum of the moments before it, those of earlier blocks (`state`, `[1, k, w]`)
/// included; `state` then includes all of them.
fn running<B: Engine>(moments: Chunks<B>, state: &mut Option<Chunks<B>>) -> Chunks<B> {
    let [chunks, rank, width] = moments.dims();
    let before = state.take().unwrap_or_else(|| Tensor::zeros([1, rank, width], &moments.device()));
    if chunks == 1 {
        *state = Some(before.clone() + moments);
        return before;
    }
    let sums = Tensor::cat(vec![before, moments], 0).cumsum(0);
    *state = Some(sums.clone().narrow(0, chunks, 1));
    sums.narrow(0, 0, chunks)
}

/// exp(S - shift) of the diagonal chunks, zero above the diagonal.
fn diagonal<B: Engine, T: Real>(
    chain: &Chain<'_, B, T>,
    block: Block,
    count: &mut Counted,
) -> Chunks<B> {
    let query = chain.block(&chain.head.query, block) * chain.head.beta;
    let key = chain.block(&chain.head.key, block);
    let mut scores = count.chunk_product(query, key.swap_dims(1, 2));
    if let Some(shift) = &chain.shift {
        scores = scores - rows_of(shift, block.range()).reshape([block.chunks, block.rows, 1]);
    }
    count.cost.exponentials += (block.chunks * block.rows * block.rows) as u64;
    let hidden = Tensor::<B, 2, Bool>::tril_mask([block.rows, block.rows], 0, &chain.on.device);
    let hidden =
        hidden.reshape([1, block.rows, block.rows]).expand([block.chunks, block.rows, block.rows]);
    scores.mask_fill(hidden, MASKED).exp()
}

/// Blocks of whole chunks, then the last, shorter one.
fn blocks(tokens: usize, chunks: usize) -> Vec<Block> {
    let whole = tokens / CHUNK;
    let mut all: Vec<Block> = (0..whole)
        .step_by(chunks)
        .map(|first| Block { start: first * CHUNK, chunks: chunks.min(whole - first), rows: CHUNK })
        .collect();
    if !tokens.is_multiple_of(CHUNK) {
        all.push(Block { start: whole * CHUNK, chunks: 1, rows: tokens % CHUNK });
    }
    all
}
