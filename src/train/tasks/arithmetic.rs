//! Sums, differences and products of whole numbers, in digits and in English words.
//!
//! ```
//! use peft_limits::train::tasks::{arithmetic::ArithmeticParams, row, Split};
//! let task = ArithmeticParams::default().check()?;
//! let example = row(&task, 1, Split::Train, 1)?;
//! assert_eq!(example.text(), "93-6=87");
//! assert_eq!(example.answers(), "87"); // labels: the bytes of `87`; the prompt `93-6=` is -100
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
/// | `digits` | 2 | most digits of an operand; the shifted test has one more | 1 to 8 |
/// | `operations` | `"+-"` | which of `+`, `-`, `*` | not empty |
/// | `words` | 0.25 | share of problems spelled out | 0 to 1 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArithmeticParams {
    /// Most digits of an operand.
    pub digits: u32,
    /// Which of `+`, `-`, `*`.
    pub operations: String,
    /// Share of problems spelled out.
    pub words: f64,
}

impl Default for ArithmeticParams {
    fn default() -> Self {
        Self { digits: 2, operations: "+-".into(), words: 0.25 }
    }
}

impl ArithmeticParams {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key.
    pub fn check(self) -> Result<Arithmetic> {
        if !(1..=8).contains(&self.digits) {
            return Err(Error::invalid("arithmetic.digits", self.digits, "must be 1 to 8"));
        }
        if self.operations.is_empty() || self.operations.chars().any(|c| !"+-*".contains(c)) {
            return Err(Error::invalid(
                "arithmetic.operations",
                &self.operations,
                "must be some of + - *",
            ));
        }
        if !(0.0..=1.0).contains(&self.words) {
            return Err(Error::invalid("arithmetic.words", self.words, "must be between 0 and 1"));
        }
        let operations = self.operations.bytes().collect();
        Ok(Arithmetic { digits: self.digits, operations, words: self.words })
    }
}

/// The checked task.
#[derive(Debug, Clone, PartialEq)]
pub struct Arithmetic {
    digits: u32,
    operations: Vec<u8>,
    words: f64,
}

impl Task for Arithmetic {
    fn name(&self) -> &str {
        "arithmetic"
    }

    fn draw(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Row> {
        let mut operand = || -> i64 {
            // Every number of digits is equally likely; the shifted test has exactly one more
            // digit.
            let digits = if split == Split::Shifted {
                self.digits + 1
            } else {
                rng.random_range(1..=self.digits)
            };
            let least = if digits == 1 { 0 } else { 10i64.pow(digits - 1) };
            rng.random_range(least..10i64.pow(digits))
        };
        let (a, b) = (operand(), operand());
        let operation = self.operations[rng.random_range(0..self.operations.len())];
        let (value, verb) = match operation {
            b'+' => (a + b, "plus"),
            b'-' => (a - b, "minus"),
            _ => (a * b, "times"),
        };
        // a + b and b + a, in digits or in words, are one problem.
        let (low, high) = if operation == b'-' { (a, b) } else { (a.min(b), a.max(b)) };
        let key = format!("{low}{}{high}", operation as char);
        Ok(if rng.random::<f64>() < self.words {
            Row::question(
                key,
                format!("{} {verb} {} is ", in_words(a), in_words(b)),
                in_words(value),
            )
        } else {
            Row::question(key, format!("{a}{}{b}=", operation as char), value.to_string())
        })
    }
}

/// A whole number in English.
///
/// ```
/// use peft_limits::train::tasks::arithmetic::in_words;
/// assert_eq!(in_words(0), "zero");
/// assert_eq!(in_words(-1042), "minus one thousand forty-two");
/// assert_eq!(in_words(900_013_300), "nine hundred million thirteen thousand three hundred");
/// ```
pub fn in_words(n: i64) -> String {
    const SCALES: [&str; 7] =
        ["", " thousand", " million", " billion", " trillion", " quadrillion", " quintillion"];
    if n == 0 {
        return "zero".into();
    }
    let mut rest = n.unsigned_abs();
    let mut parts = Vec::new();
    for scale in SCALES {
        let group = (rest % 1000) as usize;
        if group > 0 {
            parts.push(below_thousand(group) + scale);
        }
        rest /= 1000;
    }
    parts.reverse();
    let magnitude = parts.join(" ");
    if n < 0 { format!("minus {magnitude}") } else { magnitude }
}

fn below_thousand(n: usize) -> String {
    const SMALL: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 10] =
        ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
    let mut parts = Vec::new();
    if n >= 100 {
        parts.push(format!("{} hundred", SMALL[n / 100]));
    }
    match n % 100 {
        0 => {}
        m if m < 20 => parts.push(SMALL[m].into()),
        m if m % 10 == 0 => parts.push(TENS[m / 10].into()),
        m => parts.push(format!("{}-{}", TENS[m / 10], SMALL[m % 10])),
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::{row, tests::check_task};
    use super::*;

    /// Reads words back by another route: a scanner that adds and multiplies.
    fn read_words(text: &str) -> i64 {
        let (sign, text) = text.strip_prefix("minus ").map_or((1, text), |t| (-1, t));
        let names: Vec<(String, i64)> = (0..100).map(|n| (in_words(n), n)).collect();
        let (mut total, mut group) = (0, 0);
        for word in text.split(' ') {
            match word {
                "hundred" => group *= 100,
                "thousand" => (total, group) = (total + group * 1000, 0),
                "million" => (total, group) = (total + group * 1_000_000, 0),
                other => group += names.iter().find(|(w, _)| w == other).unwrap().1,
            }
        }
        sign * (total + group)
    }

    fn recompute(text: &str) -> (i64, i64, char, i64) {
        if let Some((left, right)) = text.split_once(" is ") {
            for (verb, sign) in [(" plus ", '+'), (" minus ", '-'), (" times ", '*')] {
                if let Some((a, b)) = left.split_once(verb) {
                    return (read_words(a), read_words(b), sign, read_words(right));
                }
            }
            panic!("{text}");
        }
        let (left, right) = text.split_once('=').unwrap();
        let at = left.find(['+', '-', '*']).unwrap();
        let sign = left[at..].chars().next().unwrap();
        (left[..at].parse().unwrap(), left[at + 1..].parse().unwrap(), sign, right.parse().unwrap())
    }

    #[test]
    fn answers_are_right_in_every_wording() {
        let task =
            ArithmeticParams { digits: 3, operations: "+-*".into(), words: 0.5 }.check().unwrap();
        let mut spelled = 0;
        for split in [Split::Train, Split::Test, Split::Shifted] {
            for i in 0..400 {
                let r = row(&task, 5, split, i).unwrap();
                let (a, b, sign, value) = recompute(&r.text());
                let want = match sign {
                    '+' => a + b,
                    '-' => a - b,
                    _ => a * b,
                };
                assert_eq!(value, want, "{}", r.text());
                spelled += usize::from(r.text().contains(" is "));
                let digits = a.to_string().len().max(b.to_string().len());
                assert!(
                    if split == Split::Shifted { digits == 4 } else { digits <= 3 },
                    "{}",
                    r.text()
                );
            }
        }
        assert!((450..750).contains(&spelled), "{spelled} of 1200 in words");
    }

    #[test]
    fn the_common_contract_holds() {
        check_task(&ArithmeticParams::default().check().unwrap(), 400);
    }

    #[test]
    fn each_end_of_each_range() {
        let ok = ArithmeticParams::default;
        assert!(ArithmeticParams { digits: 1, words: 0.0, ..ok() }.check().is_ok());
        assert!(ArithmeticParams { digits: 8, words: 1.0, ..ok() }.check().is_ok());
        let bad = [
            ArithmeticParams { digits: 0, ..ok() },
            ArithmeticParams { digits: 9, ..ok() },
            ArithmeticParams { operations: String::new(), ..ok() },
            ArithmeticParams { operations: "+/".into(), ..ok() },
            ArithmeticParams { words: f64::NAN, ..ok() },
        ];
        for params in bad {
            assert!(
                matches!(params.check(), Err(Error::InvalidParam { name, .. }) if name.starts_with("arithmetic."))
            );
        }
    }
}
