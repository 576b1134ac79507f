//! Rows of text to batches of token ids and labels.
//!
//! A row becomes `begin, segments, end`. Labels equal the ids on supervised stretches and on the
//! end token that follows one, and are -100 elsewhere (the shift by one is the loss's business).
//! Short rows are padded on the right: attention is causal, so padding changes nothing before it.

use crate::blocks::cross_entropy::IGNORED_LABEL;
use crate::error::{Error, Result};
use crate::model::Batch;
use crate::train::tasks::{Mixture, Row, Segment, Split};
use crate::train::tokenizer::Tokenizer;
use ndarray::Array2;

/// One row as ids and labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Labels, as long as the ids.
    pub labels: Vec<i64>,
}

/// Turns rows into examples.
pub struct Encoder<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Most tokens of an example.
    pub length: usize,
    /// Cut longer rows instead of refusing them.
    pub truncate: bool,
}

impl Encoder<'_> {
    /// Encodes a row.
    ///
    /// # Errors
    /// [`Error::TooLarge`] naming the key of the row if it is longer than `length` and `truncate`
    /// is off, or if cutting leaves nothing supervised; as [`Tokenizer::encode`].
    ///
    /// ```
    /// use peft_limits::train::{data::Encoder, tasks::Row, tokenizer::Tokenizer};
    /// let tokenizer = Tokenizer::bytes();
    /// let encoder = Encoder { tokenizer: &tokenizer, length: 16, truncate: false };
    /// let example = encoder.row(&Row::question("4+4", "4+4=", "8"))?;
    /// assert_eq!(example.ids, [257, 52, 43, 52, 61, 56, 258]);
    /// assert_eq!(example.labels, [-100, -100, -100, -100, -100, 56, 258]);
    /// # Ok::<(), peft_limits::Error>(())
    /// ```
    pub fn row(&self, row: &Row) -> Result<Example> {
        self.segments(&row.segments, &row.key)
    }

    fn segments(&self, segments: &[Segment], key: &str) -> Result<Example> {
        let mut example = Example { ids: Vec::new(), labels: Vec::new() };
        let mut push = |ids: &[u32], supervised: bool| {
            example.ids.extend_from_slice(ids);
            example.labels.extend(
                ids.iter().map(|&id| if supervised { i64::from(id) } else { IGNORED_LABEL }),
            );
        };
        if let Some(begin) = self.tokenizer.begin {
            push(&[begin], false);
        }
        for segment in segments {
            push(&self.tokenizer.encode(&segment.text)?, segment.supervised);
        }
        push(&[self.tokenizer.end], segments.last().is_some_and(|s| s.supervised));
        let too_long = |needed: usize| Error::TooLarge {
            what: format!("row {key:?} (raise train.length, or set train.truncate)"),
            needed: needed as u128,
            limit: self.length as u128,
            unit: "tokens",
        };
        let needed = example.ids.len();
        if needed > self.length {
            example.ids.truncate(self.length);
            example.labels.truncate(self.length);
            if !self.truncate || example.labels.iter().skip(1).all(|&l| l == IGNORED_LABEL) {
                return Err(too_long(needed));
            }
        }
        Ok(example)
    }

    /// One example per choice of a question: the prompt with that choice in place of the answer.
    ///
    /// # Errors
    /// As [`Encoder::row`].
    pub fn choices(&self, row: &Row) -> Result<Vec<Example>> {
        let with = |choice: &String| {
            let segments: Vec<Segment> = row
                .segments
                .iter()
                .map(|s| {
                    if s.supervised {
                        Segment { text: choice.clone(), ..s.clone() }
                    } else {
                        s.clone()
                    }
                })
                .collect();
            self.segments(&segments, &row.key)
        };
        row.choices.iter().map(with).collect()
    }

    /// Pads examples to the longest of them, or to `width` columns if that is given and larger.
    ///
    /// # Errors
    /// As [`Batch::new`] for no example.
    pub fn batch(&self, examples: &[Example], width: Option<usize>) -> Result<Batch> {
        let longest =
            examples.iter().map(|e| e.ids.len()).max().unwrap_or(0).max(width.unwrap_or(0));
        let mut ids = Array2::from_elem((examples.len(), longest), self.tokenizer.pad);
        let mut labels = Array2::from_elem((examples.len(), longest), IGNORED_LABEL);
        for (i, example) in examples.iter().enumerate() {
            for (t, (&id, &label)) in example.ids.iter().zip(&example.labels).enumerate() {
                ids[[i, t]] = id;
                labels[[i, t]] = label;
            }
        }
        Batch::new(ids, labels)
    }

    /// Rows `first..first + rows` of a split as one batch.
    ///
    /// # Errors
    /// As [`Mixture::row`] and [`Encoder::row`].
    pub fn draw(
        &self,
        mixture: &Mixture,
        seed: u64,
        split: Split,
        first: u64,
        rows: usize,
        width: Option<usize>,
    ) -> Result<Batch> {
        let examples = (first..first + rows as u64)
            .map(|i| self.row(&mixture.row(seed, split, i)?))
            .collect::<Result<Vec<Example>>>()?;
        self.batch(&examples, width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tasks::TaskParams;

    #[test]
    fn padding_is_ignored_and_prompts_are_not_labelled() {
        let tokenizer = Tokenizer::bytes();
        let encoder = Encoder { tokenizer: &tokenizer, length: 32, truncate: false };
        let rows = [Row::question("a", "1+1=", "2"), Row::question("b", "10+10=", "20")];
        let examples: Vec<Example> = rows.iter().map(|r| encoder.row(r).unwrap()).collect();
        let batch = encoder.batch(&examples, None).unwrap();
        assert_eq!(batch.input_ids.dim(), (2, 10));
        assert_eq!(batch.input_ids.row(0).to_vec()[7..], [256, 256, 256]);
        assert_eq!(batch.labels.row(0).to_vec()[5..], [50, 258, -100, -100, -100]);
        // Two answers of one and two bytes, each with its end token.
        assert_eq!(batch.counted(), 2 + 3);
        assert_eq!(encoder.batch(&examples, Some(16)).unwrap().input_ids.dim(), (2, 16));
    }

    #[test]
    fn long_rows_are_refused_or_cut() {
        let tokenizer = Tokenizer::bytes();
        let row = Row::question("long", "abc=", "0123456789");
        let mut encoder = Encoder { tokenizer: &tokenizer, length: 8, truncate: false };
        match encoder.row(&row) {
            Err(Error::TooLarge { needed, limit, what, .. }) => {
                assert_eq!((needed, limit), (16, 8));
                assert!(what.contains("long") && what.contains("train.length"));
            }
            other => panic!("{other:?}"),
        }
        encoder.truncate = true;
        assert_eq!(encoder.row(&row).unwrap().labels, [-100, -100, -100, -100, -100, 48, 49, 50]);
        encoder.length = 5;
        assert!(
            matches!(encoder.row(&row), Err(Error::TooLarge { .. })),
            "nothing supervised is left"
        );
    }

    #[test]
    fn choices_replace_the_answer_only() {
        let tokenizer = Tokenizer::bytes();
        let encoder = Encoder { tokenizer: &tokenizer, length: 64, truncate: false };
        let row = Row {
            choices: vec!["no".into(), "yes".into()],
            answer: 1,
            ..Row::question("k", "ok? ", "yes")
        };
        let examples = encoder.choices(&row).unwrap();
        assert_eq!(examples[1], encoder.row(&row).unwrap());
        assert_eq!(tokenizer.decode(&examples[0].ids).unwrap(), "ok? no");
    }

    #[test]
    fn every_generated_task_fits_its_batch() {
        let tokenizer = Tokenizer::bytes();
        let encoder = Encoder { tokenizer: &tokenizer, length: 160, truncate: false };
        let mixture = Mixture::open(&TaskParams::pretraining()).unwrap();
        for split in [Split::Train, Split::Test, Split::Shifted] {
            let batch = encoder.draw(&mixture, 1, split, 0, 64, None).unwrap();
            assert_eq!(batch, encoder.draw(&mixture, 1, split, 0, 64, None).unwrap());
            assert!(batch.counted() > 64);
        }
    }
}
