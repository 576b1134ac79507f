//! Accuracy of several updates of one model on a task, served together in the same batches.

use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::model::Model;
use crate::model::update::ModelUpdate;
use crate::train::data::{Encoder, Example};
use crate::train::evaluate::{Scores, score_logits};
use crate::train::tasks::{Split, Task, row};

/// Scores of the plain model (first) and of each update on `rows` rows of a split. Every batch
/// mixes them: sequence i is row `i / (updates + 1)` under choice `i % (updates + 1)`, `batch`
/// sequences at a time.
///
/// Choice questions are not ranked: [`Scores::choice`] is NaN.
///
/// # Errors
/// As [`row`], [`Encoder::row`] and [`Model::logits_mixed`].
pub fn evaluate_mixed<T: Real>(
    model: &Model<T>,
    updates: &[&ModelUpdate<T>],
    encoder: &Encoder<'_>,
    task: &dyn Task,
    (seed, split): (u64, Split),
    rows: usize,
    batch: usize,
) -> Result<Vec<Scores>> {
    let choices = updates.len() + 1;
    let mut scores = vec![Scores { rows, choice: f64::NAN, ..Scores::default() }; choices];
    let (mut counted, mut right, mut likelihood) =
        (vec![0; choices], vec![0; choices], vec![0.0; choices]);
    let examples = (0..rows as u64)
        .map(|i| encoder.row(&row(task, seed, split, i)?))
        .collect::<Result<Vec<Example>>>()?;
    let sequences: Vec<usize> = (0..rows * choices).collect();
    for chunk in sequences.chunks(batch.max(1)) {
        let served: Vec<Example> = chunk.iter().map(|i| examples[i / choices].clone()).collect();
        let of_sequence: Vec<Option<usize>> =
            chunk.iter().map(|i| (i % choices).checked_sub(1)).collect();
        let batch = encoder.batch(&served, None)?;
        let logits = model.logits_mixed(
            batch.input_ids.view(),
            updates,
            &of_sequence,
            &mut Cost::default(),
        )?;
        for (i, sequence) in
            chunk.iter().zip(score_logits(logits.view(), &batch, model.config.vocab_size)?)
        {
            let choice = i % choices;
            counted[choice] += sequence.counted;
            right[choice] += sequence.right;
            likelihood[choice] += sequence.log_likelihood;
            scores[choice].exact += f64::from(sequence.right == sequence.counted) / rows as f64;
        }
    }
    for (choice, scores) in scores.iter_mut().enumerate() {
        scores.tokens = right[choice] as f64 / counted[choice] as f64;
        scores.loss = -likelihood[choice] / counted[choice] as f64;
    }
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::update::Switchable;
    use crate::streams::generator;
    use crate::train::evaluate::evaluate;
    use crate::train::method::{MethodName, MethodParams};
    use crate::train::preset::preset;
    use crate::train::tasks::TaskParams;
    use crate::train::tokenizer::Tokenizer;

    /// Serving together changes no score.
    #[test]
    fn scores_are_those_of_each_model_alone() {
        let mut config = preset("nano").unwrap();
        (config.num_hidden_layers, config.hidden_size, config.head_dim) = (2, 32, 8);
        let base: Model<f64> = Model::random(config, &mut generator(1, "init/model", 0)).unwrap();
        let updates: Vec<ModelUpdate<f64>> = [MethodName::Lora, MethodName::S2ft, MethodName::Paca]
            .into_iter()
            .map(|name| {
                let mut model = base.clone();
                MethodParams { rank: 3, ..MethodParams::named(name) }
                    .apply(&mut model, None, 1)
                    .unwrap();
                let mut rng = generator(2, name.name(), 0);
                model
                    .for_each_trainable(&mut |_, v| {
                        v.mapv_inplace(|x| x + rand::RngExt::random_range(&mut rng, -0.2..0.2));
                        Ok(())
                    })
                    .unwrap();
                ModelUpdate::of_adapters(&model).unwrap()
            })
            .collect();
        let tokenizer = Tokenizer::bytes();
        let encoder = Encoder { tokenizer: &tokenizer, length: 64, truncate: false };
        let task = TaskParams::named("lists").unwrap().open().unwrap();
        let given: Vec<_> = updates.iter().collect();
        let (split, rows) = (Split::Test, 9);
        let together =
            evaluate_mixed(&base, &given, &encoder, task.as_ref(), (1, split), rows, 7).unwrap();
        let mut model = Switchable::new(base).unwrap();
        for (i, got) in together.iter().enumerate() {
            model.switch(i.checked_sub(1).map(|u| given[u])).unwrap();
            let want = evaluate(model.model(), &encoder, task.as_ref(), 1, split, rows, 5).unwrap();
            assert!(
                (got.loss - want.loss).abs() < 1e-10 * want.loss,
                "choice {i}: {} and {}",
                got.loss,
                want.loss
            );
            assert_eq!(
                (got.exact.to_bits(), got.tokens.to_bits()),
                (want.exact.to_bits(), want.tokens.to_bits())
            );
        }
        assert!(
            (together[0].loss - together[1].loss).abs() > 1e-6,
            "an update must change the scores"
        );
    }
}
