//! Which experts of a mixture see a token, with what weight, and the gradient of that weight.

use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, ArrayView2};

/// The rows that each expert sees.
#[derive(Debug, Clone)]
pub struct Routing<T> {
    /// Rows of each expert, ascending.
    pub rows: Vec<Vec<usize>>,
    /// Their weights.
    pub weights: Vec<Vec<T>>,
    /// Softmax of the scores, over the chosen experts if weights add up to one, else over all: `N x
    /// E`, zero elsewhere.
    probabilities: Array2<T>,
}

impl<T> Routing<T> {
    /// Numbers held for backward.
    pub fn numbers(&self) -> usize {
        self.probabilities.len() + self.weights.iter().map(Vec::len).sum::<usize>()
    }
}

/// How experts are chosen from their scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// Experts of a row.
    pub per_token: usize,
    /// Whether the weights of a row's experts add up to one.
    pub renormalise: bool,
}

/// Chooses the experts of the largest scores for each row of `N x E`; of equal ones the first.
///
/// The weights are the softmax of all scores, or of the chosen ones if they are to add up to one:
/// taking it before the choice and dividing by the sum of the chosen is the same.
///
/// # Errors
/// [`Error::InvalidParam`] for more experts of a row than there are.
pub fn route<T: Real>(scores: ArrayView2<T>, choice: Choice) -> Result<Routing<T>> {
    let count = scores.ncols();
    if choice.per_token == 0 || choice.per_token > count {
        return Err(Error::invalid(
            "num_experts_per_tok",
            choice.per_token,
            format!("must be in 1..={count}"),
        ));
    }
    let (mut rows, mut weights) = (vec![Vec::new(); count], vec![Vec::new(); count]);
    let mut probabilities = Array2::zeros(scores.dim());
    for (i, row) in scores.rows().into_iter().enumerate() {
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap_or(std::cmp::Ordering::Equal));
        let chosen = &order[..choice.per_token];
        let over = if choice.renormalise { chosen } else { &order[..] };
        let largest = row[order[0]];
        let sum: T = over.iter().map(|&e| (row[e] - largest).exp()).sum();
        over.iter().for_each(|&e| probabilities[[i, e]] = (row[e] - largest).exp() / sum);
        for &e in chosen {
            rows[e].push(i);
            weights[e].push(probabilities[[i, e]]);
        }
    }
    Ok(Routing { rows, weights, probabilities })
}

/// Gradient of the scores from that of each expert's weights: with p the softmax and g the gradient
/// of a row's weights, p o (g - p . g).
pub fn route_backward<T: Real>(routing: &Routing<T>, dweights: &[Vec<T>]) -> Array2<T> {
    let mut dscores = Array2::zeros(routing.probabilities.dim());
    for ((e, rows), dweights) in routing.rows.iter().enumerate().zip(dweights) {
        rows.iter().zip(dweights).for_each(|(&i, &g)| dscores[[i, e]] = g);
    }
    for (mut d, p) in dscores.rows_mut().into_iter().zip(routing.probabilities.rows()) {
        let mean = d.dot(&p);
        d.zip_mut_with(&p, |d, &p| *d = p * (*d - mean));
    }
    dscores
}
