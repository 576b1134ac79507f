//! Counted multiply-adds against the formulas of `paper-notes/attention-gradients.md`, exactly.

use peft_limits::attention::exact::streaming::{Tile, gradients_with_tile};
use peft_limits::attention::factorization::build;
use peft_limits::attention::synthetic::SyntheticHead;
use peft_limits::attention::{AttentionProblem, Mask, Request, chained};

const R: u64 = 2;
const D: u64 = 3;

fn head(tokens: usize, mask: Mask) -> AttentionProblem<f64> {
    SyntheticHead { mask, rank: R as usize, gamma: 0.8, ..SyntheticHead::new(tokens, D as usize) }
        .draw()
        .unwrap()
}

/// What every method does outside its four products: projections, section 3's factors and outer
/// products.
fn shared(l: u64, request: Request) -> u64 {
    let projections = 3 * l * (D * D + 2 * D * R);
    projections
        + match request {
            // K A_Q^T and Q A_K^T; six outer products of r columns.
            Request::Adapters => 2 * l * D * R + 6 * l * D * R,
            // dW, then dA and dB from it.
            Request::All => 3 * l * D * D + 6 * D * D * R,
        }
}

/// Columns m of Z and of W, of R and of N.
fn columns(request: Request) -> (u64, u64, u64) {
    match request {
        Request::Adapters => (2 * R, R, R),
        Request::All => (D, 0, D),
    }
}

/// G A_V^T, once.
fn value_left(l: u64, request: Request) -> u64 {
    if request == Request::Adapters { l * D * R } else { 0 }
}

/// Equation (7).
#[test]
fn streaming() {
    let l = 96u64;
    for request in [Request::Adapters, Request::All] {
        let (m, right, left) = columns(request);
        let per_pair = 4 * D + 2 * m + right + left;
        let tile = Tile { queries: 16, keys: 40 };
        let full = gradients_with_tile(&head(96, Mask::Full), request, tile).unwrap().cost;
        assert_eq!(
            full.multiply_adds,
            l * l * per_pair + shared(l, request) + value_left(l, request)
        );
        assert_eq!(full.exponentials, 2 * l * l);
        assert_eq!(full.elementwise, 6 * l * l);
        // Query tiles of 16 see the keys up to their own end: 16 (16 + 32 + ... + 96) pairs.
        let causal = gradients_with_tile(&head(96, Mask::Causal), request, tile).unwrap().cost;
        let pairs = 16 * (1..=6).map(|t| 16 * t).sum::<u64>();
        assert_eq!(
            causal.multiply_adds,
            pairs * per_pair + shared(l, request) + value_left(l, request)
        );
    }
}

/// Equations (11) and (13); 2048 tokens are eight chunks of 256 in eight groups.
#[test]
fn chain() {
    let l = 2048u64;
    for request in [Request::Adapters, Request::All] {
        let (m, right, left) = columns(request);
        let w_right = 1 + D + right + (D + 1) * m;
        let w_left = left + (D + 1) * m;
        let run = |mask| {
            let method = build::<f64>("taylor:degree=2").unwrap();
            let result =
                chained::gradients(&head(l as usize, mask), method.as_ref(), request).unwrap();
            (result.gradients.cost, result.certificate.rank as u64)
        };
        let (full, k) = run(Mask::Full);
        assert_eq!(k, 10);
        assert_eq!(
            full.multiply_adds,
            2 * k * l * (w_right + w_left)
                + 2 * (D + 1) * l * m
                + shared(l, request)
                + value_left(l, request)
        );
        assert_eq!(full.exponentials, 0);
        let (causal, _) = run(Mask::Causal);
        assert_eq!(
            causal.multiply_adds,
            3 * k * l * (w_right + w_left)
                + 256 * l * (D + w_right + w_left)
                + 3 * (D + 1) * l * m
                + shared(l, request)
                + 2 * value_left(l, request)
        );
        assert_eq!(causal.exponentials, 256 * l);
    }
}
