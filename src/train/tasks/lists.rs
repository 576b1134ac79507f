//! Operations on short lists of digits.
//!
//! ```
//! use peft_limits::train::tasks::{lists::ListsParams, row, Split};
//! let task = ListsParams::default().check()?;
//! let example = row(&task, 1, Split::Train, 0)?;
//! assert_eq!(example.text(), "last 2 8 7 6 0 5 = 5");
//! assert_eq!(example.answers(), "5"); // labels: the byte of `5`
//! # Ok::<(), peft_limits::Error>(())
//! ```

use super::{Row, Split, Task};
use crate::error::{Error, Result};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What is asked of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// The list backwards.
    Reverse,
    /// Ascending order.
    Sort,
    /// Largest entry.
    Max,
    /// Smallest entry.
    Min,
    /// First entry.
    First,
    /// Last entry.
    Last,
    /// Number of entries.
    Length,
    /// Sum of the entries.
    Sum,
}

impl Operation {
    /// All of them.
    pub const ALL: [Operation; 8] = [
        Self::Reverse,
        Self::Sort,
        Self::Max,
        Self::Min,
        Self::First,
        Self::Last,
        Self::Length,
        Self::Sum,
    ];

    /// Name in the prompt.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reverse => "reverse",
            Self::Sort => "sort",
            Self::Max => "max",
            Self::Min => "min",
            Self::First => "first",
            Self::Last => "last",
            Self::Length => "length",
            Self::Sum => "sum",
        }
    }

    /// The answer for a list that is not empty.
    pub fn apply(self, list: &[u32]) -> Vec<u32> {
        let mut out = list.to_vec();
        match self {
            Self::Reverse => out.reverse(),
            Self::Sort => out.sort_unstable(),
            Self::Max => out = list.iter().copied().max().into_iter().collect(),
            Self::Min => out = list.iter().copied().min().into_iter().collect(),
            Self::First => out.truncate(1),
            Self::Last => out = list.last().copied().into_iter().collect(),
            Self::Length => out = vec![list.len() as u32],
            Self::Sum => out = vec![list.iter().sum()],
        }
        out
    }
}

/// Parameters.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `length` | 6 | longest list; the shifted test has up to half as many entries more | 3 to 64 |
/// | `operations` | all eight | what is asked | not empty |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListsParams {
    /// Longest list.
    pub length: usize,
    /// What is asked.
    pub operations: Vec<Operation>,
}

impl Default for ListsParams {
    fn default() -> Self {
        Self { length: 6, operations: Operation::ALL.to_vec() }
    }
}

impl ListsParams {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the key.
    pub fn check(self) -> Result<Lists> {
        if !(3..=64).contains(&self.length) {
            return Err(Error::invalid("lists.length", self.length, "must be 3 to 64"));
        }
        if self.operations.is_empty() {
            return Err(Error::invalid(
                "lists.operations",
                "[]",
                "must name at least one operation",
            ));
        }
        Ok(Lists { params: self })
    }
}

/// The checked task.
#[derive(Debug, Clone, PartialEq)]
pub struct Lists {
    params: ListsParams,
}

impl Task for Lists {
    fn name(&self) -> &str {
        "lists"
    }

    fn draw(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Row> {
        let longest = self.params.length;
        let length = match split {
            Split::Shifted => rng.random_range(longest + 1..=longest + longest.div_ceil(2)),
            _ => rng.random_range(2..=longest),
        };
        let list: Vec<u32> = (0..length).map(|_| rng.random_range(0..10)).collect();
        let operation = self.params.operations[rng.random_range(0..self.params.operations.len())];
        let join = |list: &[u32]| list.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
        // The list alone is the problem: a held-out list is never seen under any operation.
        let key = join(&list);
        Ok(Row::question(
            &key,
            format!("{} {key} = ", operation.name()),
            join(&operation.apply(&list)),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::check_task;
    use super::*;

    #[test]
    fn every_operation_on_a_worked_list() {
        let list = [3, 1, 4, 1, 5];
        let want: [&[u32]; 8] =
            [&[5, 1, 4, 1, 3], &[1, 1, 3, 4, 5], &[5], &[1], &[3], &[5], &[5], &[14]];
        for (operation, want) in Operation::ALL.into_iter().zip(want) {
            assert_eq!(operation.apply(&list), want, "{}", operation.name());
        }
    }

    #[test]
    fn the_common_contract_holds() {
        check_task(&ListsParams::default().check().unwrap(), 400);
        for bad in [
            ListsParams { length: 2, ..Default::default() },
            ListsParams { operations: vec![], ..Default::default() },
        ] {
            assert!(matches!(bad.check(), Err(Error::InvalidParam { .. })));
        }
    }
}
