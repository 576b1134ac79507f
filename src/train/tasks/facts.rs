//! A small language with facts: who is what, what each kind has, and choice questions that need
//! both.
//!
//! Each entity has a kind; each kind has one value per relation. Training states every entity's
//! kind and every kind's values, and asks about most (entity, relation) pairs. The held-out pairs
//! can be answered only by combining an entity's kind with the kind's value. The shifted test asks
//! them in other words.
//!
//! ```
//! use peft_limits::train::tasks::{facts::FactsParams, row, Split};
//! let task = FactsParams::default().check()?;
//! let example = row(&task, 1, Split::Test, 0)?;
//! assert_eq!(example.text(), "The motion of kibu is walk");
//! assert_eq!(example.answers(), "walk"); // labels: the bytes of `walk`
//! assert_eq!(example.choices, ["walk", "jump", "swim", "ride"]);
//! # Ok::<(), peft_limits::Error>(())
//! ```

use super::{Row, Split, Task};
use crate::error::{Error, Result};
use crate::streams::mix;
use rand::{RngExt, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

const KINDS: [&str; 8] = ["bird", "fish", "cat", "tree", "stone", "robot", "king", "cook"];

/// Relation, then the value of each kind.
const RELATIONS: [(&str, [&str; 8]); 5] = [
    ("home", ["nest", "river", "house", "forest", "cave", "factory", "castle", "kitchen"]),
    ("food", ["seeds", "worms", "milk", "rain", "sand", "oil", "cake", "soup"]),
    ("sound", ["song", "splash", "purr", "rustle", "crack", "beep", "order", "whistle"]),
    ("motion", ["flight", "swim", "jump", "sway", "roll", "drive", "ride", "walk"]),
    ("cover", ["feathers", "scales", "fur", "leaves", "moss", "steel", "velvet", "cotton"]),
];

/// Names are two syllables of these, so up to `(13 * 5)^2` entities.
const CONSONANTS: [char; 13] = ['b', 'd', 'f', 'g', 'k', 'l', 'm', 'n', 'p', 'r', 't', 'v', 'z'];
const VOWELS: [char; 5] = ['a', 'e', 'i', 'o', 'u'];
const NAMES: usize = (CONSONANTS.len() * VOWELS.len()) * (CONSONANTS.len() * VOWELS.len());

/// Candidates per question.
const CHOICES: usize = 4;

/// Parameters.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `entities` | 64 | how many entities | 16 to 4225 |
/// | `world` | 1 | which assignment of kinds to entities | any |
/// | `statements` | 0.3 | share of training rows that state a kind or a kind's value | above 0, below 1 |
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FactsParams {
    /// How many entities.
    pub entities: usize,
    /// Which assignment of kinds to entities.
    pub world: u64,
    /// Share of training rows that state rather than ask.
    pub statements: f64,
}

impl Default for FactsParams {
    fn default() -> Self {
        Self { entities: 64, world: 1, statements: 0.3 }
    }
}

impl FactsParams {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key.
    pub fn check(self) -> Result<Facts> {
        if !(16..=NAMES).contains(&self.entities) {
            return Err(Error::invalid(
                "facts.entities",
                self.entities,
                format!("must be 16 to {NAMES}"),
            ));
        }
        if !(self.statements > 0.0 && self.statements < 1.0) {
            return Err(Error::invalid(
                "facts.statements",
                self.statements,
                "must be above 0 and below 1",
            ));
        }
        Ok(Facts { params: self })
    }
}

/// The checked task.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Facts {
    params: FactsParams,
}

impl Facts {
    /// Name of an entity; distinct for distinct numbers.
    fn entity(&self, number: usize) -> String {
        // 1289 has no factor in common with 65^2, so this visits every name once, in a mixed order.
        let code = (number * 1289 + self.params.world as usize % NAMES) % NAMES;
        let syllables = CONSONANTS.len() * VOWELS.len();
        [code / syllables, code % syllables]
            .iter()
            .flat_map(|s| [CONSONANTS[s / VOWELS.len()], VOWELS[s % VOWELS.len()]])
            .collect()
    }

    /// Kind of an entity, as an index.
    fn kind(&self, number: usize) -> usize {
        (mix(self.params.world.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number as u64)
            % KINDS.len() as u64) as usize
    }
}

impl Task for Facts {
    fn name(&self) -> &str {
        "facts"
    }

    fn draw(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Row> {
        let number = rng.random_range(0..self.params.entities);
        let (entity, kind) = (self.entity(number), self.kind(number));
        let (relation, values) = RELATIONS[rng.random_range(0..RELATIONS.len())];
        if split == Split::Train && rng.random::<f64>() < self.params.statements {
            let mut statement = if rng.random::<f64>() < 0.7 {
                Row::question("kind", format!("{entity} is a "), KINDS[kind])
            } else {
                Row::question(
                    "value",
                    format!("The {relation} of a {} is ", KINDS[kind]),
                    values[kind],
                )
            };
            statement.background = true;
            return Ok(statement);
        }
        let prompt = match (split, rng.random::<bool>()) {
            (Split::Shifted, true) => format!("Tell me, {entity} has which {relation}? "),
            (Split::Shifted, false) => format!("As for {relation}, {entity} has "),
            (_, true) => format!("What is the {relation} of {entity}? "),
            (_, false) => format!("The {relation} of {entity} is "),
        };
        let mut others: Vec<usize> = (0..KINDS.len()).filter(|&k| k != kind).collect();
        others.shuffle(rng);
        let answer = rng.random_range(0..CHOICES);
        others.insert(answer, kind);
        let choices = others.into_iter().take(CHOICES).map(|k| values[k].to_string()).collect();
        Ok(Row {
            choices,
            answer,
            ..Row::question(format!("{relation} of {entity}"), prompt, values[kind])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{row, tests::check_task};
    use super::*;
    use std::collections::{HashMap, HashSet};

    /// A reader that knows only the training statements answers every held-out question.
    #[test]
    fn held_out_questions_follow_from_training_statements() {
        let task = FactsParams::default().check().unwrap();
        let (mut kinds, mut values) = (HashMap::new(), HashMap::new());
        for i in 0..6000 {
            let r = row(&task, 1, Split::Train, i).unwrap();
            if r.background {
                let text = r.text();
                if let Some((entity, kind)) = text.split_once(" is a ") {
                    assert_eq!(*kinds.entry(entity.to_string()).or_insert(kind.to_string()), kind);
                } else {
                    let words: Vec<&str> = text.split(' ').collect();
                    values
                        .insert((words[1].to_string(), words[4].to_string()), words[6].to_string());
                }
            }
        }
        assert_eq!((kinds.len(), values.len()), (64, 40));
        for split in [Split::Test, Split::Shifted] {
            for i in 0..200 {
                let r = row(&task, 1, split, i).unwrap();
                let (relation, entity) = r.key.split_once(" of ").unwrap();
                assert_eq!(
                    values[&(relation.to_string(), kinds[entity].clone())],
                    r.answers(),
                    "{}",
                    r.text()
                );
                assert_eq!(r.choices.len(), CHOICES);
            }
        }
    }

    #[test]
    fn templates_of_the_shifted_test_never_train() {
        let task = FactsParams::default().check().unwrap();
        for i in 0..1000 {
            let text = row(&task, 1, Split::Train, i).unwrap().text();
            assert!(!text.starts_with("Tell me") && !text.starts_with("As for"), "{text}");
        }
    }

    #[test]
    fn entities_have_distinct_names_and_several_kinds() {
        let task = FactsParams { entities: NAMES, ..Default::default() }.check().unwrap();
        let names: HashSet<String> = (0..NAMES).map(|i| task.entity(i)).collect();
        assert_eq!(names.len(), NAMES);
        let kinds: HashSet<usize> = (0..64).map(|i| task.kind(i)).collect();
        assert_eq!(kinds.len(), KINDS.len());
    }

    #[test]
    fn the_common_contract_holds() {
        check_task(&FactsParams::default().check().unwrap(), 400);
        for bad in [
            FactsParams { entities: 15, ..Default::default() },
            FactsParams { statements: 1.0, ..Default::default() },
            FactsParams { statements: 0.0, ..Default::default() },
        ] {
            assert!(matches!(bad.check(), Err(Error::InvalidParam { .. })));
        }
    }
}
