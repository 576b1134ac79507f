//! Arithmetic modulo a number.
//!
//! ```
//! use peft_limits::train::tasks::{modular::ModularParams, row, Split};
//! let task = ModularParams::default().check()?;
//! let example = row(&task, 1, Split::Train, 0)?;
//! assert_eq!(example.text(), "11*13 mod 23=5");
//! assert_eq!(example.answers(), "5"); // labels: the byte of `5`
//! # Ok::<(), peft_limits::Error>(())
//! ```

use super::{Row, Split, Task};
use crate::error::{Error, Result};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Parameters.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `modulus` | 23 | the modulus | 5 to 9999 |
/// | `operations` | `"+-*"` | which of `+`, `-`, `*` | not empty |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModularParams {
    /// The modulus.
    pub modulus: u32,
    /// Which of `+`, `-`, `*`.
    pub operations: String,
}

impl Default for ModularParams {
    fn default() -> Self {
        Self { modulus: 23, operations: "+-*".into() }
    }
}

impl ModularParams {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key.
    pub fn check(self) -> Result<Modular> {
        if !(5..=9999).contains(&self.modulus) {
            return Err(Error::invalid("modular.modulus", self.modulus, "must be 5 to 9999"));
        }
        if self.operations.is_empty() || self.operations.chars().any(|c| !"+-*".contains(c)) {
            return Err(Error::invalid(
                "modular.operations",
                &self.operations,
                "must be some of + - *",
            ));
        }
        Ok(Modular {
            modulus: i64::from(self.modulus),
            operations: self.operations.bytes().collect(),
        })
    }
}

/// The checked task. Two operands; three, taken from left to right, in the shifted test.
#[derive(Debug, Clone, PartialEq)]
pub struct Modular {
    modulus: i64,
    operations: Vec<u8>,
}

impl Task for Modular {
    fn name(&self) -> &str {
        "modular"
    }

    fn draw(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Row> {
        let first = rng.random_range(0..self.modulus);
        let (mut value, mut text, mut key) = (first, first.to_string(), String::new());
        for _ in 0..if split == Split::Shifted { 2 } else { 1 } {
            let b = rng.random_range(0..self.modulus);
            let operation = self.operations[rng.random_range(0..self.operations.len())];
            let (low, high) =
                if operation == b'-' { (value, b) } else { (value.min(b), value.max(b)) };
            key = format!("{key}{low}{}{high};", operation as char);
            value = match operation {
                b'+' => value + b,
                b'-' => value - b,
                _ => value * b,
            }
            .rem_euclid(self.modulus);
            text = format!("{text}{}{b}", operation as char);
        }
        Ok(Row::question(key, format!("{text} mod {}=", self.modulus), value.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{row, tests::check_task};
    use super::*;

    /// Evaluates the prompt over the integers, left to right, and reduces once at the end.
    #[test]
    fn answers_are_right() {
        let task = ModularParams { modulus: 31, ..Default::default() }.check().unwrap();
        for split in [Split::Train, Split::Test, Split::Shifted] {
            for i in 0..300 {
                let r = row(&task, 9, split, i).unwrap();
                let text = r.text();
                let (left, right) = text.split_once(" mod 31=").unwrap();
                let (mut total, mut sign, mut number, mut terms) = (0i64, '+', String::new(), 0);
                for c in left.chars().chain(['+']) {
                    if c.is_ascii_digit() {
                        number.push(c);
                        continue;
                    }
                    let b: i64 = number.parse().unwrap();
                    total = match sign {
                        '+' => total + b,
                        '-' => total - b,
                        _ => total * b,
                    };
                    (sign, terms) = (c, terms + 1);
                    number.clear();
                }
                assert_eq!(right.parse::<i64>().unwrap(), ((total % 31) + 31) % 31, "{text}");
                assert_eq!(terms, if split == Split::Shifted { 3 } else { 2 });
            }
        }
    }

    #[test]
    fn the_common_contract_holds() {
        check_task(&ModularParams::default().check().unwrap(), 400);
        for bad in [
            ModularParams { modulus: 4, ..Default::default() },
            ModularParams { operations: "%".into(), ..Default::default() },
        ] {
            assert!(matches!(bad.check(), Err(Error::InvalidParam { .. })));
        }
    }
}
