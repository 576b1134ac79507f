//! Weighted mixtures of tasks.

use super::{Row, Split, Task, arithmetic, facts, jsonl, lists, modular, recall, row, text};
use crate::error::{Error, Result};
use crate::streams::generator;
use rand::RngExt;
use serde::{Deserialize, Serialize};

/// A task with its parameters, as configuration files name it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case")]
pub enum TaskParams {
    /// Sums, differences, products.
    Arithmetic(arithmetic::ArithmeticParams),
    /// Arithmetic modulo a number.
    Modular(modular::ModularParams),
    /// Operations on lists.
    Lists(lists::ListsParams),
    /// Associative recall.
    Recall(recall::RecallParams),
    /// A language with facts.
    Facts(facts::FactsParams),
    /// A text file.
    Text(text::TextParams),
    /// A JSON Lines file.
    Jsonl(jsonl::JsonlParams),
}

impl TaskParams {
    /// Checks the parameters, reads files.
    ///
    /// # Errors
    /// As the task's own `check` or `open`.
    pub fn open(&self) -> Result<Box<dyn Task>> {
        Ok(match self.clone() {
            Self::Arithmetic(p) => Box::new(p.check()?),
            Self::Modular(p) => Box::new(p.check()?),
            Self::Lists(p) => Box::new(p.check()?),
            Self::Recall(p) => Box::new(p.check()?),
            Self::Facts(p) => Box::new(p.check()?),
            Self::Text(p) => Box::new(p.open()?),
            Self::Jsonl(p) => Box::new(p.open()?),
        })
    }

    /// The task of this name with its defaults; tasks that read a file are `text=FILE` and
    /// `jsonl=FILE`.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] listing the names.
    pub fn named(name: &str) -> Result<Self> {
        if let Some((kind, path)) = name.split_once('=').filter(|(_, path)| !path.is_empty()) {
            let path = path.into();
            match kind {
                "text" => return Ok(Self::Text(text::TextParams { path, window: text::WINDOW })),
                "jsonl" => return Ok(Self::Jsonl(jsonl::JsonlParams { path, shifted: None })),
                _ => {}
            }
        }
        Ok(match name {
            "arithmetic" => Self::Arithmetic(Default::default()),
            "modular" => Self::Modular(Default::default()),
            "lists" => Self::Lists(Default::default()),
            "recall" => Self::Recall(Default::default()),
            "facts" => Self::Facts(Default::default()),
            "text" | "jsonl" | "text=" | "jsonl=" => {
                let kind = name.trim_end_matches('=');
                return Err(Error::invalid(
                    "task",
                    name,
                    format!("reads a file: give {kind}=FILE"),
                ));
            }
            _ => {
                let names =
                    "must be arithmetic, modular, lists, recall, facts, text=FILE or jsonl=FILE";
                return Err(Error::invalid("task", name, names));
            }
        })
    }

    /// The mixture that models are pretrained on: every generated task with equal weight.
    pub fn pretraining() -> Vec<Part> {
        let tasks = [
            Self::Arithmetic(Default::default()),
            Self::Modular(Default::default()),
            Self::Lists(Default::default()),
            Self::Recall(Default::default()),
            Self::Facts(Default::default()),
        ];
        tasks.into_iter().map(|task| Part { weight: 1.0, task }).collect()
    }
}

fn one() -> f64 {
    1.0
}

/// One task of a mixture: `{ task = "arithmetic", weight = 2.0, digits = 3 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Relative frequency, positive.
    #[serde(default = "one")]
    pub weight: f64,
    /// The task.
    #[serde(flatten)]
    pub task: TaskParams,
}

/// An opened mixture.
pub struct Mixture {
    parts: Vec<(f64, Box<dyn Task>)>,
    total: f64,
}

impl Mixture {
    /// Opens every part.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for no part or a weight that is not positive; as
    /// [`TaskParams::open`].
    pub fn open(parts: &[Part]) -> Result<Self> {
        if parts.is_empty() {
            return Err(Error::invalid("data", "[]", "must name at least one task"));
        }
        let mut opened = Vec::with_capacity(parts.len());
        for part in parts {
            if !(part.weight > 0.0 && part.weight.is_finite()) {
                return Err(Error::invalid("data.weight", part.weight, "must be positive"));
            }
            opened.push((part.weight, part.task.open()?));
        }
        let total = opened.iter().map(|p| p.0).sum();
        Ok(Self { parts: opened, total })
    }

    /// The tasks, in order.
    pub fn tasks(&self) -> impl Iterator<Item = &dyn Task> {
        self.parts.iter().map(|p| p.1.as_ref())
    }

    /// Row `index` of a split: a task drawn by weight, then that task's row of the same index.
    ///
    /// # Errors
    /// As [`row`].
    ///
    /// ```
    /// use peft_limits::train::tasks::{Mixture, Split, TaskParams};
    /// let mixture = Mixture::open(&TaskParams::pretraining())?;
    /// assert_eq!(mixture.row(1, Split::Train, 5)?, mixture.row(1, Split::Train, 5)?);
    /// # Ok::<(), peft_limits::Error>(())
    /// ```
    pub fn row(&self, seed: u64, split: Split, index: u64) -> Result<Row> {
        let mut rng = generator(seed, &format!("mixture/{}", split.name()), index);
        let mut left = rng.random::<f64>() * self.total;
        let mut chosen = &self.parts[0];
        for part in &self.parts {
            chosen = part;
            left -= part.0;
            if left < 0.0 {
                break;
            }
        }
        row(chosen.1.as_ref(), seed, split, index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_frequencies() {
        let mut parts = TaskParams::pretraining();
        parts.truncate(2);
        parts[0].weight = 3.0;
        let mixture = Mixture::open(&parts).unwrap();
        let modular = (0..4000)
            .filter(|&i| mixture.row(1, Split::Train, i).unwrap().text().contains(" mod "))
            .count();
        // Binomial(4000, 1/4): mean 1000, deviation 27; five deviations.
        assert!((863..1137).contains(&modular), "{modular}");
    }

    #[test]
    fn configuration_names_tasks_and_denies_unknown_keys() {
        #[derive(Debug, Deserialize)]
        struct File {
            data: Vec<Part>,
        }
        let parse = |text: &str| toml::from_str::<File>(text);
        let file = parse(
            "[[data]]\ntask = \"arithmetic\"\ndigits = 4\n[[data]]\ntask \
                   = \"recall\"\nweight = 2\n",
        )
        .unwrap();
        assert_eq!(
            file.data[0].task,
            TaskParams::Arithmetic(arithmetic::ArithmeticParams {
                digits: 4,
                ..Default::default()
            })
        );
        assert!((file.data[1].weight - 2.0).abs() < 1e-15);
        for (text, word) in [
            ("[[data]]\ntask = \"arithmetic\"\ndigit = 4\n", "digit"),
            ("[[data]]\ntask = \"algebra\"\n", "algebra"),
            ("[[data]]\ntask = \"text\"\n", "path"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
        let again = toml::to_string(&TaskParams::pretraining()[0]).unwrap();
        assert!(again.contains("task = \"arithmetic\"") && again.contains("weight = 1"), "{again}");
    }

    #[test]
    fn empty_mixtures_and_bad_weights_are_refused() {
        assert!(matches!(Mixture::open(&[]), Err(Error::InvalidParam { .. })));
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let part = Part { weight, task: TaskParams::named("lists").unwrap() };
            assert!(
                matches!(Mixture::open(&[part]), Err(Error::InvalidParam { name, .. }) if name == "data.weight")
            );
        }
        assert!(TaskParams::named("nothing").unwrap_err().to_string().contains("recall"));
    }
}
