//! The exact output and dB_Q of an instance from its Hamming distances alone: n^2 word operations,
//! no attention.

use super::embedding::{Embedding, Form, HEAD_DIM};
use super::instance::{BITS, Instance};

/// How many keys lie at each distance, for every query.
pub type DistanceCounts = Vec<[u32; BITS + 1]>;

/// Counts the distances of every query; the same for every Gamma.
pub fn distance_counts(instance: &Instance) -> DistanceCounts {
    let of_query = |q: &u32| {
        let mut counts = [0; BITS + 1];
        instance.keys.iter().for_each(|k| counts[(q ^ k).count_ones() as usize] += 1);
        counts
    };
    instance.queries.iter().map(of_query).collect()
}

/// O_i = R_i / (R_i + M), equation (1) of paper-notes/hardness.md.
pub fn outputs(embedding: &Embedding, counts: &DistanceCounts) -> Vec<f64> {
    let pair: Vec<f64> = (0..=BITS as u32).map(|distance| embedding.pair(distance)).collect();
    let mass = embedding.dummy_mass();
    let of_query = |counts: &[u32; BITS + 1]| {
        let sum: f64 = counts.iter().zip(&pair).map(|(&n, e)| f64::from(n) * e).sum();
        sum / (sum + mass)
    };
    counts.iter().map(of_query).collect()
}

/// dB_Q, one number a row of B_Q: -beta sum_i O_i^p (1 - O_i) Q_i, equation (2).
///
/// ```
/// use peft_limits::limits::hardness::embedding::{Embedding, Form};
/// use peft_limits::limits::hardness::instance::Instance;
/// use peft_limits::limits::hardness::row_sums::{distance_counts, outputs, query_adapter_gradient};
/// let (instance, embedding) = (Instance::draw(8, true, 1)?, Embedding::at_threshold_ratio(8, 2.0)?);
/// let output = outputs(&embedding, &distance_counts(&instance));
/// let gradient = query_adapter_gradient(&embedding, &instance, &output, Form::Given);
/// let total: f64 = output.iter().map(|o| o * (1.0 - o)).sum();
/// assert!((gradient[63] + embedding.gamma * total / 64.0).abs() < 1e-12);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn query_adapter_gradient(
    embedding: &Embedding,
    instance: &Instance,
    output: &[f64],
    form: Form,
) -> [f64; HEAD_DIM] {
    let mut gradient = [0.0; HEAD_DIM];
    let scale = embedding.gamma / HEAD_DIM as f64;
    for (&query, &o) in instance.queries.iter().zip(output) {
        let row = scale * form.of_row(o);
        for (bit, entry) in gradient.iter_mut().enumerate() {
            let minus = bit < BITS && query >> bit & 1 == 1;
            *entry -= if minus { -row } else { row };
        }
    }
    gradient
}
