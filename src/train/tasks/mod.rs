//! Tasks with exact answers: rows of text, seeded, streaming, with held-out problems that never
//! train.
//!
//! Row i of a split is a function of (seed, task, split, i). Each row carries a **key** that names
//! the problem behind it, however it is worded; the hash of the key puts the problem on the
//! training side or on the held-out side, so no held-out problem is ever trained on in any wording.
//! The shifted test holds held-out problems that are longer, or worded by templates that training
//! never uses.

pub mod arithmetic;
pub mod facts;
pub mod jsonl;
pub mod lists;
pub mod mixture;
pub mod modular;
pub mod recall;
pub mod text;

use crate::error::{Error, Result};
use crate::streams::{fnv1a, generator, mix};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use mixture::{Mixture, TaskParams};

/// One problem in `1 / HELD_OUT` is held out.
pub const HELD_OUT: u64 = 8;
/// Draws tried before a split is declared empty.
const ATTEMPTS: usize = 4096;

/// Which rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Rows to learn from.
    Train,
    /// Held-out problems of the training distribution.
    Test,
    /// Held-out problems that are longer or worded otherwise.
    Shifted,
}

impl Split {
    /// Name used in streams, logs and tables.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Test => "test",
            Split::Shifted => "shifted",
        }
    }
}

/// A stretch of a row's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The text.
    pub text: String,
    /// Whether the model is asked to produce it (otherwise its labels are -100).
    pub supervised: bool,
}

/// One row of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Names the problem, independent of its wording.
    pub key: String,
    /// The text in order.
    pub segments: Vec<Segment>,
    /// For choice questions: all candidate answers, else empty. The right one is `choices[answer]`.
    pub choices: Vec<String>,
    /// Index of the right choice.
    pub answer: usize,
    /// Background knowledge: always on the training side, never a question of a test.
    pub background: bool,
}

impl Row {
    /// A prompt and its answer.
    pub fn question(
        key: impl Into<String>,
        prompt: impl Into<String>,
        answer: impl Into<String>,
    ) -> Self {
        let segments = vec![
            Segment { text: prompt.into(), supervised: false },
            Segment { text: answer.into(), supervised: true },
        ];
        Self { key: key.into(), segments, choices: vec![], answer: 0, background: false }
    }

    /// The row as plain text.
    pub fn text(&self) -> String {
        self.segments.iter().map(|s| s.text.as_str()).collect()
    }

    /// The supervised stretches, joined by `|`.
    pub fn answers(&self) -> String {
        let parts: Vec<&str> =
            self.segments.iter().filter(|s| s.supervised).map(|s| s.text.as_str()).collect();
        parts.join("|")
    }
}

/// A source of rows.
pub trait Task: Send + Sync {
    /// Name used in streams, logs and tables.
    fn name(&self) -> &str;

    /// Whether the split has rows; a file may lack some.
    fn has(&self, split: Split) -> bool {
        let _ = split;
        true
    }

    /// Draws one row of the form that `split` has, from either side of the held-out rule.
    ///
    /// # Errors
    /// Whatever reading a file can give; generated tasks have none.
    fn draw(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Row>;
}

/// Whether a key is held out.
pub fn held_out(key: &str) -> bool {
    mix(fnv1a(key)).is_multiple_of(HELD_OUT)
}

/// Row `index` of a split.
///
/// # Errors
/// What [`Task::draw`] gives; [`Error::InvalidParam`] if the task seems to have no row on the
/// wanted side.
pub fn row(task: &dyn Task, seed: u64, split: Split, index: u64) -> Result<Row> {
    let mut rng = generator(seed, &format!("{}/{}", task.name(), split.name()), index);
    for _ in 0..ATTEMPTS {
        let row = task.draw(split, &mut rng)?;
        let wanted = if row.background {
            split == Split::Train
        } else {
            held_out(&row.key) == (split != Split::Train)
        };
        if wanted {
            return Ok(row);
        }
    }
    let requirement = format!(
        "no {} row among {ATTEMPTS} draws: the task has too few different problems",
        split.name()
    );
    Err(Error::invalid("data.task", task.name(), requirement))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::HashSet;

    /// What every task must satisfy; called from each task's tests.
    pub(crate) fn check_task(task: &dyn Task, rows: u64) {
        let keys = |split: Split, seed: u64| -> HashSet<String> {
            (0..rows)
                .map(|i| row(task, seed, split, i).unwrap())
                .filter(|r| !r.background)
                .map(|r| r.key)
                .collect()
        };
        let train = keys(Split::Train, 1);
        for split in [Split::Test, Split::Shifted] {
            // Another seed must not leak either: the rule does not depend on it.
            for seed in [1, 2] {
                let held = keys(split, seed);
                assert!(!held.is_empty());
                assert!(
                    train.is_disjoint(&held),
                    "{}: {} problem trained on",
                    task.name(),
                    split.name()
                );
            }
        }
        for split in [Split::Train, Split::Test, Split::Shifted] {
            for i in 0..rows.min(100) {
                let (a, b) = (row(task, 3, split, i).unwrap(), row(task, 3, split, i).unwrap());
                assert_eq!(a, b, "a row is a function of its index");
                assert!(
                    a.segments.iter().any(|s| s.supervised && !s.text.is_empty()),
                    "nothing to learn in {a:?}"
                );
                if !a.choices.is_empty() {
                    assert_eq!(a.choices[a.answer], a.answers());
                    let distinct: HashSet<&String> = a.choices.iter().collect();
                    assert_eq!(distinct.len(), a.choices.len(), "choices repeat in {a:?}");
                }
            }
            let texts: HashSet<String> =
                (0..rows).map(|i| row(task, 3, split, i).unwrap().text()).collect();
            assert!(texts.len() > 3, "{}: {} distinct rows", task.name(), texts.len());
        }
        let other: Vec<String> =
            (0..20).map(|i| row(task, 4, Split::Train, i).unwrap().text()).collect();
        let this: Vec<String> =
            (0..20).map(|i| row(task, 3, Split::Train, i).unwrap().text()).collect();
        assert_ne!(this, other, "the seed has no effect");
    }

    #[test]
    fn about_one_key_in_eight_is_held_out() {
        let held = (0..8000).filter(|i| held_out(&format!("key {i}"))).count();
        // Binomial(8000, 1/8): mean 1000, deviation 29.6; five deviations.
        assert!((852..1148).contains(&held), "{held}");
    }

    #[test]
    fn an_empty_side_is_an_error_not_a_loop() {
        struct One;
        impl Task for One {
            fn name(&self) -> &str {
                "one"
            }
            fn draw(&self, _: Split, _: &mut ChaCha8Rng) -> Result<Row> {
                Ok(Row::question("the only problem", "1", "1"))
            }
        }
        let outcomes = [Split::Train, Split::Test].map(|s| row(&One, 0, s, 0));
        assert_eq!(outcomes.iter().filter(|o| o.is_ok()).count(), 1);
        let text = outcomes.into_iter().find_map(|o| o.err()).unwrap().to_string();
        assert!(text.contains("one") && text.contains("too few different problems"), "{text}");
    }
}
