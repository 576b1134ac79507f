//! What a rank hands to MPI, in closed form; the counted bytes are exactly these (`tests/mpi.rs`).

use super::ranks::Traffic;
use crate::attention::{AttentionProblem, Mask, Request};
use crate::linalg::Real;

/// Columns of the factors that travel, for a head and a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// d_h.
    pub head_dim: usize,
    /// d_v.
    pub value_dim: usize,
    /// m: columns of Z and of W. r for each adapter of Q and K, or d_h.
    pub scores: usize,
    /// Columns of R: r of the value adapter, or none.
    pub value_right: usize,
    /// Columns of N: r of the value adapter, or d_v.
    pub value_left: usize,
    /// Entries of all dW, dA and dB.
    pub gradients: usize,
    /// Whether the request is for all gradients.
    pub all: bool,
    /// Whether the mask is causal.
    pub causal: bool,
}

impl Columns {
    /// Those of a head.
    pub fn of<T: Real>(problem: &AttentionProblem<T>, request: Request) -> Self {
        let adapters = problem.adapters();
        let rank = |letter: char| adapters.letter(letter).map_or(0, |a| a.lora_a.nrows());
        let factors: usize = adapters
            .named()
            .iter()
            .filter_map(|(_, a)| a.map(|a| a.lora_a.len() + a.lora_b.len()))
            .sum();
        let all = request == Request::All;
        let (head_dim, value_dim) = (problem.head_dim(), problem.value_dim());
        let weights = problem
            .hidden()
            .filter(|_| all)
            .map_or(0, |h| h.projections.named().iter().map(|(_, p)| p.weight.len()).sum());
        Self {
            head_dim,
            value_dim,
            scores: if all { head_dim } else { rank('Q') + rank('K') },
            value_right: if all { 0 } else { rank('V') },
            value_left: if all { value_dim } else { rank('V') },
            gradients: factors + weights,
            all,
            causal: problem.mask() == Mask::Causal,
        }
    }

    /// Numbers in the right moments Psi^T \[1 | V | R | V' * Z\] for k feature columns.
    pub fn right_moments(&self, rank: usize) -> usize {
        rank * (1 + self.value_dim + self.value_right + (self.value_dim + 1) * self.scores)
    }

    /// Numbers in the left moments U^T \[N | G' * W\].
    pub fn left_moments(&self, rank: usize) -> usize {
        rank * (self.value_left + (self.value_dim + 1) * self.scores)
    }

    /// Bytes of a chained gradient with k feature columns of `width` bytes, apart from the few
    /// numbers by which ranks agree and those of the factorization's means and maxima. It does not
    /// depend on L or on the number of ranks.
    pub fn chained(&self, rank: usize, width: usize) -> Traffic {
        let (right, left) = (self.right_moments(rank), self.left_moments(rank));
        let bytes = |numbers: usize| (numbers * width) as u64;
        let (reduced, scanned) = if self.causal { (0, right + left) } else { (right + left, 0) };
        Traffic {
            reduced: bytes(reduced + self.gradients),
            scanned: bytes(scanned),
            ..Traffic::default()
        }
    }

    /// Bytes that rank `rank` sends in the ring, `rows` being the key rows of every rank.
    ///
    /// Forward \[K | V | R\] of all blocks but the one that comes to it last, backward \[K | V |
    /// Z\] likewise and \[dS^T W | P^T N\] of every block.
    pub fn ring(&self, rows: &[usize], rank: usize, width: usize) -> Traffic {
        let total: usize = rows.iter().sum();
        if rows.len() < 2 {
            return Traffic { reduced: (self.gradients * width) as u64, ..Traffic::default() };
        }
        // After p - 1 steps a rank holds its next neighbour's block and keeps it.
        let passed = total - rows[(rank + 1) % rows.len()];
        let keys = self.head_dim + self.value_dim;
        let right = if self.all { 0 } else { self.scores };
        let numbers = passed * (2 * keys + self.value_right + right)
            + total * (self.scores + self.value_left);
        Traffic {
            reduced: (self.gradients * width) as u64,
            sent: (numbers * width) as u64,
            ..Traffic::default()
        }
    }
}
