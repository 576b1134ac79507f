//! Multi-query associative recall: pairs of a key and a value, then keys whose values are asked.
//!
//! The task of *Zoology* (arXiv 2312.04927), in letters and digits, every pair asked once.
//!
//! ```
//! use peft_limits::train::tasks::{recall::RecallParams, row, Split};
//! let task = RecallParams { pairs: 3 }.check()?;
//! let example = row(&task, 1, Split::Train, 0)?;
//! assert_eq!(example.text(), "H1 C8 j3;j3 H1 C8");
//! assert_eq!(example.answers(), "3|1|8"); // labels: the three values; all else is -100
//! # Ok::<(), peft_limits::Error>(())
//! ```

use super::{Row, Segment, Split, Task};
use crate::error::{Error, Result};
use rand::{RngExt, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Parameters.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `pairs` | 6 | pairs per row; the shifted test has twice as many | 2 to 26 |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecallParams {
    /// Pairs per row.
    pub pairs: usize,
}

impl Default for RecallParams {
    fn default() -> Self {
        Self { pairs: 6 }
    }
}

impl RecallParams {
    /// Checks the range.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key.
    pub fn check(self) -> Result<Recall> {
        if !(2..=26).contains(&self.pairs) {
            return Err(Error::invalid("recall.pairs", self.pairs, "must be 2 to 26"));
        }
        Ok(Recall { pairs: self.pairs })
    }
}

/// The checked task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recall {
    pairs: usize,
}

impl Task for Recall {
    fn name(&self) -> &str {
        "recall"
    }

    fn draw(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Row> {
        let pairs = if split == Split::Shifted { 2 * self.pairs } else { self.pairs };
        let mut letters: Vec<char> = ('a'..='z').chain('A'..='Z').collect();
        letters.shuffle(rng);
        let mut pairs: Vec<(char, u32)> = letters
            .into_iter()
            .take(pairs)
            .map(|letter| (letter, rng.random_range(0..10)))
            .collect();
        let shown: Vec<String> = pairs.iter().map(|(k, v)| format!("{k}{v}")).collect();
        let prompt = shown.join(" ") + ";";
        pairs.shuffle(rng);
        let mut segments = Vec::with_capacity(2 * pairs.len());
        for (i, (letter, value)) in pairs.iter().enumerate() {
            let lead = if i == 0 { prompt.as_str() } else { " " };
            segments.push(Segment { text: format!("{lead}{letter}"), supervised: false });
            segments.push(Segment { text: value.to_string(), supervised: true });
        }
        // The association is the problem, whatever the order of showing and asking.
        let mut map: Vec<String> = pairs.iter().map(|(k, v)| format!("{k}{v}")).collect();
        map.sort();
        Ok(Row { key: map.join(" "), segments, choices: vec![], answer: 0, background: false })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{row, tests::check_task};
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_query_is_answered_by_its_pair() {
        let task = RecallParams { pairs: 5 }.check().unwrap();
        for (split, n) in [(Split::Train, 5), (Split::Test, 5), (Split::Shifted, 10)] {
            for i in 0..200 {
                let text = row(&task, 2, split, i).unwrap().text();
                let (shown, asked) = text.split_once(';').unwrap();
                let map: HashMap<&str, &str> = shown.split(' ').map(|p| p.split_at(1)).collect();
                assert_eq!(map.len(), n, "keys repeat in {text}");
                assert_eq!(asked.split(' ').count(), n);
                for query in asked.split(' ') {
                    let (key, value) = query.split_at(1);
                    assert_eq!(map[key], value, "{text}");
                }
            }
        }
    }

    #[test]
    fn the_common_contract_holds() {
        check_task(&RecallParams::default().check().unwrap(), 300);
        for pairs in [1, 27] {
            assert!(matches!(RecallParams { pairs }.check(), Err(Error::InvalidParam { .. })));
        }
    }
}
