//! Accuracy of a model on a task.
//!
//! A row is **exact** if every supervised token is the argmax of its logits given the true tokens
//! before it. For one answer this is the same as greedy decoding giving the answer: up to the first
//! wrong token both see the same prefix, and an answer without a wrong token is the greedy one. A
//! **choice** is right if the answer has the largest log-likelihood (sum over its tokens, end token
//! included) among the row's choices.

use crate::blocks::cross_entropy::prediction_targets;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::model::{Batch, Model};
use crate::train::data::{Encoder, Example};
use crate::train::tasks::{Split, Task, row};
use ndarray::{ArrayView1, ArrayView2};

/// What an evaluation found.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Scores {
    /// Rows seen.
    pub rows: usize,
    /// Share of rows with every supervised token right.
    pub exact: f64,
    /// Share of supervised tokens that are right.
    pub tokens: f64,
    /// Mean loss per supervised token, nats.
    pub loss: f64,
    /// Share of choice questions answered right; NaN if the rows have no choices.
    pub choice: f64,
}

/// What one sequence gets.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Sequence {
    /// Supervised tokens.
    pub counted: usize,
    /// Those that are the argmax of their logits.
    pub right: usize,
    /// Sum of the supervised tokens' log-probabilities, nats.
    pub log_likelihood: f64,
}

/// Evaluates `rows` rows of a split, `batch` sequences at a time. Cost: one forward per sequence.
///
/// # Errors
/// As [`row`], [`Encoder::row`] and [`Model::logits`].
pub fn evaluate<T: Real>(
    model: &Model<T>,
    encoder: &Encoder<'_>,
    task: &dyn Task,
    seed: u64,
    split: Split,
    rows: usize,
    batch: usize,
) -> Result<Scores> {
    let mut scores = Scores { rows, ..Scores::default() };
    let (mut counted, mut right, mut likelihood) = (0, 0, 0.0);
    let (mut questions, mut chosen) = (0usize, 0usize);
    let all = (0..rows as u64).map(|i| row(task, seed, split, i)).collect::<Result<Vec<_>>>()?;
    let examples = all.iter().map(|r| encoder.row(r)).collect::<Result<Vec<_>>>()?;
    for sequence in score(model, encoder, &examples, batch)? {
        counted += sequence.counted;
        right += sequence.right;
        likelihood += sequence.log_likelihood;
        scores.exact += f64::from(sequence.right == sequence.counted) / rows as f64;
    }
    let candidates = all.iter().map(|r| encoder.choices(r)).collect::<Result<Vec<_>>>()?;
    let flat: Vec<Example> = candidates.iter().flatten().cloned().collect();
    let mut sequences = score(model, encoder, &flat, batch)?.into_iter();
    for (row, candidates) in all.iter().zip(&candidates).filter(|(_, c)| !c.is_empty()) {
        let ranked: Vec<f64> =
            sequences.by_ref().take(candidates.len()).map(|s| s.log_likelihood).collect();
        let best =
            (0..ranked.len()).fold(0, |best, i| if ranked[i] > ranked[best] { i } else { best });
        questions += 1;
        chosen += usize::from(best == row.answer);
    }
    scores.tokens = right as f64 / counted as f64;
    scores.loss = -likelihood / counted as f64;
    scores.choice = chosen as f64 / questions as f64;
    Ok(scores)
}

fn score<T: Real>(
    model: &Model<T>,
    encoder: &Encoder<'_>,
    examples: &[Example],
    batch: usize,
) -> Result<Vec<Sequence>> {
    let mut all = Vec::with_capacity(examples.len());
    for chunk in examples.chunks(batch.max(1)) {
        let batch = encoder.batch(chunk, None)?;
        let logits = model.logits(batch.input_ids.view(), &mut Cost::default())?;
        all.extend(score_logits(logits.view(), &batch, model.config.vocab_size)?);
    }
    Ok(all)
}

/// What each sequence of a batch gets from its logits, `(B T) x V`.
pub(super) fn score_logits<T: Real>(
    logits: ArrayView2<T>,
    batch: &Batch,
    vocabulary: usize,
) -> Result<Vec<Sequence>> {
    let (sequences, length) = batch.labels.dim();
    let mut all = vec![Sequence::default(); sequences];
    for (position, label) in prediction_targets(batch.labels.view(), vocabulary)? {
        let (best, log_probability) = read_logits(logits.row(position), label);
        let sequence = &mut all[position / length];
        sequence.counted += 1;
        sequence.right += usize::from(best == label);
        sequence.log_likelihood += log_probability;
    }
    Ok(all)
}

/// (argmax, log-probability of `label`); the first of equal logits wins.
fn read_logits<T: Real>(logits: ArrayView1<T>, label: usize) -> (usize, f64) {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    let largest = logits[best].widen();
    let sum: f64 = logits.iter().map(|x| (x.widen() - largest).exp()).sum();
    (best, logits[label].widen() - largest - sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::generator;
    use crate::train::preset::preset;
    use crate::train::tasks::TaskParams;
    use crate::train::tokenizer::Tokenizer;
    use ndarray::array;

    #[test]
    fn logits_of_log_integers_give_simple_fractions() {
        let logits = array![2f64.ln(), 5f64.ln(), 3f64.ln()];
        let (best, log_probability) = read_logits(logits.view(), 2);
        assert_eq!(best, 1);
        assert!((log_probability - 0.3f64.ln()).abs() < 1e-14);
        assert_eq!(read_logits(array![1.0, 1.0].view(), 0).0, 0);
    }

    fn nano() -> Model<f32> {
        let mut config = preset("nano").unwrap();
        config.num_hidden_layers = 2;
        Model::random(config, &mut generator(1, "init/model", 0)).unwrap()
    }

    /// The loss equals the model's own mean over all counted positions, and batching does not
    /// matter.
    #[test]
    fn loss_agrees_with_the_models_and_chance_is_chance() {
        let model = nano();
        let tokenizer = Tokenizer::bytes();
        let encoder = Encoder { tokenizer: &tokenizer, length: 128, truncate: false };
        let task = TaskParams::named("facts").unwrap().open().unwrap();
        let one = evaluate(&model, &encoder, task.as_ref(), 1, Split::Test, 24, 5).unwrap();
        let two = evaluate(&model, &encoder, task.as_ref(), 1, Split::Test, 24, 24).unwrap();
        assert!((one.loss - two.loss).abs() < 1e-5);
        let examples: Vec<Example> = (0..24)
            .map(|i| encoder.row(&row(task.as_ref(), 1, Split::Test, i).unwrap()).unwrap())
            .collect();
        let batch = encoder.batch(&examples, None).unwrap();
        let want = model.loss(&batch, &mut Cost::default()).unwrap();
        assert!((one.loss - want).abs() < 1e-5 * want, "{} against {want}", one.loss);
        assert!(one.exact < 0.1 && (0.0..=1.0).contains(&one.choice));
    }

    /// Greedy decoding, done naively, agrees with the exact-match rule on a model that answers some
    /// rows.
    #[test]
    fn exact_match_is_greedy_decoding() {
        let mut model = nano();
        let tokenizer = Tokenizer::bytes();
        let encoder = Encoder { tokenizer: &tokenizer, length: 64, truncate: false };
        let task = TaskParams::named("lists").unwrap().open().unwrap();
        // A bias towards one digit and the end token makes one-digit answers come out right now and
        // then.
        model.train_fully();
        let batch = encoder
            .batch(
                &(0..32)
                    .map(|i| encoder.row(&row(task.as_ref(), 1, Split::Train, i).unwrap()).unwrap())
                    .collect::<Vec<_>>(),
                None,
            )
            .unwrap();
        let mut optimizer =
            crate::train::optimizer::OptimizerParams { lr: 3e-3, ..Default::default() }
                .check::<f32>()
                .unwrap();
        let mut gradients = model.zero_gradients();
        for _ in 0..40 {
            model
                .loss_and_gradients(
                    &batch,
                    &Default::default(),
                    &mut gradients,
                    &mut Cost::default(),
                )
                .unwrap();
            optimizer.begin_step();
            model
                .update(&gradients, &mut |t| {
                    let (p, g) = (t.values.as_slice_mut().unwrap(), t.gradient.as_slice().unwrap());
                    optimizer.update(t.name, p, g, 3e-3, 1.0)
                })
                .unwrap();
            gradients.fill_zero();
        }
        let rows = 40;
        let scores = evaluate(&model, &encoder, task.as_ref(), 1, Split::Train, rows, 8).unwrap();
        let mut exact = 0;
        for i in 0..rows as u64 {
            let r = row(task.as_ref(), 1, Split::Train, i).unwrap();
            let prompt = encoder.tokenizer.encode(&r.segments[0].text).unwrap();
            let mut ids: Vec<u32> = tokenizer.begin.into_iter().chain(prompt).collect();
            let start = ids.len();
            while ids.len() < 64 && ids.last() != Some(&tokenizer.end) {
                let view = ndarray::ArrayView2::from_shape((1, ids.len()), &ids).unwrap();
                let logits = model.logits(view, &mut Cost::default()).unwrap();
                ids.push(read_logits(logits.row(ids.len() - 1), 0).0 as u32);
            }
            let answer = tokenizer.decode(&ids[start..]).unwrap();
            exact += usize::from(answer == r.answers() && ids.last() == Some(&tokenizer.end));
        }
        assert!(exact > 0, "the test needs some right answers");
        assert!(
            (scores.exact - exact as f64 / rows as f64).abs() < 1e-12,
            "{} against {exact} of {rows}",
            scores.exact
        );
    }
}
