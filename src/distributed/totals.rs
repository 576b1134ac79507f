//! What both gradients share: the ranks' tasks are the same, and the sums over rows are made whole.

use super::{Ranks, Scalar};
use crate::attention::shards::{RowShards, entries};
use crate::attention::{AttentionProblem, Gradients, Request};
use crate::error::Result;
use ndarray::Array2;

/// Makes sure that all ranks were given shards of one head and ask for the same.
///
/// # Errors
/// [`crate::Error::Mpi`].
pub(super) fn require_one_head<T: Scalar>(
    ranks: &Ranks,
    op: &'static str,
    problem: &AttentionProblem<T>,
    request: Request,
    method: &str,
) -> Result<()> {
    let adapters = problem.adapters();
    let shapes: Vec<_> =
        adapters.named().map(|(_, a)| a.map(|a| (a.lora_b.dim(), a.lora_a.dim()))).into();
    let description = format!(
        "{method}, {request:?}, {:?}, {:?}, beta {}, d_h {}, d_v {}, adapters {shapes:?}, {}, {}",
        problem.mask(),
        problem.softmax(),
        problem.beta(),
        problem.head_dim(),
        problem.value_dim(),
        problem.objective().tensor_name(),
        T::NAME
    );
    ranks.require_same(op, &description)
}

/// Replaces dW, dA, dB, the loss and the counted operations, which are sums over rows, by their
/// sums over all ranks.
///
/// # Errors
/// Those of the transport.
pub(super) fn sum_over_ranks<T: Scalar>(
    ranks: &Ranks,
    mut gradients: Gradients<T>,
) -> Result<Gradients<T>> {
    let Gradients { weight, lora_a, lora_b, loss, cost, .. } = &mut gradients;
    let sets = [weight, lora_a, lora_b];
    let mut matrices: Vec<&mut Array2<T>> = sets
        .into_iter()
        .flat_map(|set| [&mut set.query, &mut set.key, &mut set.value])
        .filter_map(Option::as_mut)
        .collect();
    let mut packed: Vec<T> = Vec::with_capacity(matrices.iter().map(|a| a.len()).sum());
    matrices.iter_mut().for_each(|a| packed.extend_from_slice(entries(a)));
    ranks.sum(&mut packed)?;
    let mut rest = &packed[..];
    for a in matrices {
        let (here, after) = rest.split_at(a.len());
        entries(a).copy_from_slice(here);
        rest = after;
    }
    let counts = [cost.multiply_adds, cost.exponentials, cost.elementwise].map(|n| n as f64);
    let mut sums = [loss.unwrap_or(0.0), counts[0], counts[1], counts[2]];
    RowShards::<T>::sum_wide(ranks, &mut sums)?;
    if let Some(loss) = loss {
        *loss = sums[0];
    }
    [cost.multiply_adds, cost.exponentials, cost.elementwise] =
        [sums[1], sums[2], sums[3]].map(|n| n as u64);
    Ok(gradients)
}
