//! Rows of a JSON Lines file in the forms common on the Hugging Face hub.
//!
//! | keys of a line | supervised |
//! |---|---|
//! | `text` | all of it |
//! | `prompt` and `completion`, `response`, `answer` or `output` | the second |
//! | `instruction`, optional `input`, and `output` | the output |
//! | `question`, `choices` (texts), `answer` (index or text) | the right choice; choices are ranked in tests |
//! | `messages` (list of `role`, `content`) | what the role `assistant` says |
//!
//! The hash of a line's prompt decides whether it trains or is held out. The shifted test needs a
//! second file.
//!
//! ```
//! use peft_limits::train::tasks::jsonl::parse_line;
//! let row = parse_line(r#"{"question": "2+2? ", "choices": ["3", "4"], "answer": 1}"#).unwrap();
//! assert_eq!((row.text().as_str(), row.answers().as_str()), ("2+2? 4", "4"));
//! ```

use super::{Row, Segment, Split, Task, held_out};
use crate::error::{Error, Result};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Parameters.
///
/// | name | default | purpose |
/// |---|---|---|
/// | `path` | | the file; an eighth of its rows is held out for the test |
/// | `shifted` | none | a second file for the shifted test |
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonlParams {
    /// The file.
    pub path: PathBuf,
    /// A second file for the shifted test.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shifted: Option<PathBuf>,
}

impl JsonlParams {
    /// Reads and checks every line.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the file, the line and the key.
    pub fn open(self) -> Result<Jsonl> {
        let (held, train): (Vec<Row>, Vec<Row>) =
            read(&self.path)?.into_iter().partition(|r| held_out(&r.key));
        let shifted = self.shifted.as_deref().map(read).transpose()?.unwrap_or_default();
        // A line of the second file whose prompt is on the training side would not be held out.
        let trained: HashSet<&str> = train.iter().map(|r| r.key.as_str()).collect();
        let shifted = shifted.into_iter().filter(|r| !trained.contains(r.key.as_str())).collect();
        if train.is_empty() {
            return Err(Error::format(&self.path, "file", "at least one training row", "none"));
        }
        Ok(Jsonl { path: self.path, train, held, shifted })
    }
}

/// An opened file.
#[derive(Debug, Clone)]
pub struct Jsonl {
    path: PathBuf,
    train: Vec<Row>,
    held: Vec<Row>,
    shifted: Vec<Row>,
}

impl Task for Jsonl {
    fn name(&self) -> &str {
        "jsonl"
    }

    fn has(&self, split: Split) -> bool {
        match split {
            Split::Train => true,
            Split::Test => !self.held.is_empty(),
            Split::Shifted => !self.shifted.is_empty(),
        }
    }

    fn draw(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Row> {
        let (rows, remedy) = match split {
            Split::Train => (&self.train, "a line"),
            Split::Test => (&self.held, "more lines, so that some are held out"),
            Split::Shifted => {
                (&self.shifted, "data.shifted, a second file whose prompts do not train")
            }
        };
        if rows.is_empty() {
            return Err(Error::format(
                &self.path,
                format!("{} rows", split.name()),
                remedy,
                "none",
            ));
        }
        let mut row = rows[rng.random_range(0..rows.len())].clone();
        if split == Split::Shifted && !held_out(&row.key) {
            // Rows of the second file are held out whatever their hash: give them a key that says
            // so.
            row.key = held_out_key(&row.key);
        }
        Ok(row)
    }
}

/// A key on the held-out side that names the same problem.
fn held_out_key(key: &str) -> String {
    (0..).map(|i: u32| format!("{key}#{i}")).find(|k| held_out(k)).unwrap_or_default()
}

fn read(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row = parse_line(line).map_err(|bad| {
            Error::format(path, format!("line {}: {}", i + 1, bad.field), bad.expected, bad.found)
        })?;
        rows.push(row);
    }
    Ok(rows)
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLine {
    /// Key or part.
    pub field: String,
    /// What is required.
    pub expected: String,
    /// What is there.
    pub found: String,
}

fn bad(field: &str, expected: &str, found: impl ToString) -> BadLine {
    BadLine { field: field.into(), expected: expected.into(), found: found.to_string() }
}

fn string<'a>(object: &'a Map<String, Value>, key: &str) -> std::result::Result<&'a str, BadLine> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(bad(key, "a text", other)),
        None => Err(bad(key, "a text", "nothing")),
    }
}

/// Parses one line.
///
/// # Errors
/// [`BadLine`] with the key.
pub fn parse_line(line: &str) -> std::result::Result<Row, BadLine> {
    let value: Value = serde_json::from_str(line).map_err(|e| bad("line", "JSON", e))?;
    let Value::Object(object) = &value else { return Err(bad("line", "a JSON object", &value)) };
    let supervised = |text: &str| Segment { text: text.into(), supervised: true };
    let has = |key: &str| object.contains_key(key);
    let row = if has("messages") {
        messages(object)?
    } else if has("choices") {
        choices(object)?
    } else if has("instruction") {
        let input = if has("input") { string(object, "input")? } else { "" };
        let joint = if input.is_empty() { "" } else { "\n" };
        let prompt = format!("{}{joint}{input}\n", string(object, "instruction")?);
        Row::question(&prompt, &prompt, string(object, "output")?)
    } else if has("prompt") {
        let answer = ["completion", "response", "answer", "output"].into_iter().find(|k| has(k));
        let prompt = string(object, "prompt")?;
        Row::question(prompt, prompt, string(object, answer.unwrap_or("completion"))?)
    } else if has("text") {
        let text = string(object, "text")?;
        Row { segments: vec![supervised(text)], ..Row::question(text, "", "") }
    } else {
        let found = object.keys().cloned().collect::<Vec<_>>().join(", ");
        return Err(bad(
            "keys",
            "text, prompt, instruction, question with choices, or messages",
            found,
        ));
    };
    if row.segments.iter().all(|s| !s.supervised || s.text.is_empty()) {
        return Err(bad("answer", "a text that is not empty", "nothing to learn"));
    }
    Ok(row)
}

fn choices(object: &Map<String, Value>) -> std::result::Result<Row, BadLine> {
    let Some(Value::Array(list)) = object.get("choices") else {
        return Err(bad("choices", "a list of texts", "another type"));
    };
    let texts: Vec<String> = list
        .iter()
        .map(|c| c.as_str().map(str::to_string).ok_or_else(|| bad("choices", "a list of texts", c)))
        .collect::<std::result::Result<_, _>>()?;
    let answer = match object.get("answer") {
        Some(Value::Number(n)) => n.as_u64().map(|n| n as usize).filter(|&n| n < texts.len()),
        Some(Value::String(text)) => texts.iter().position(|c| c == text),
        _ => None,
    };
    let found = object.get("answer").map_or("nothing".to_string(), Value::to_string);
    let answer = answer.ok_or_else(|| bad("answer", "an index or a text of choices", found))?;
    let prompt = string(object, "question")?;
    Ok(Row { answer, choices: texts.clone(), ..Row::question(prompt, prompt, &texts[answer]) })
}

fn messages(object: &Map<String, Value>) -> std::result::Result<Row, BadLine> {
    let Some(Value::Array(list)) = object.get("messages") else {
        return Err(bad("messages", "a list", "another type"));
    };
    let mut segments = Vec::new();
    let mut key = String::new();
    for message in list {
        let Value::Object(message) = message else {
            return Err(bad("messages", "objects with role and content", message));
        };
        let (role, content) = (string(message, "role")?, string(message, "content")?);
        segments.push(Segment { text: format!("{role}: "), supervised: false });
        segments.push(Segment { text: format!("{content}\n"), supervised: role == "assistant" });
        if role != "assistant" {
            key.push_str(content);
        }
    }
    Ok(Row { segments, ..Row::question(key, "", "") })
}

#[cfg(test)]
mod tests {
    use super::super::{row, tests::check_task};
    use super::*;

    #[test]
    fn every_form_of_line() {
        let cases = [
            (r#"{"text": "abc"}"#, "abc", "abc"),
            (r#"{"prompt": "a?", "completion": " b"}"#, "a? b", " b"),
            (r#"{"prompt": "a?", "response": " c", "id": 3}"#, "a? c", " c"),
            (r#"{"instruction": "Add", "input": "1 2", "output": "3"}"#, "Add\n1 2\n3", "3"),
            (r#"{"instruction": "Say", "output": "hi"}"#, "Say\nhi", "hi"),
            (r#"{"question": "q ", "choices": ["x", "y"], "answer": "y"}"#, "q y", "y"),
            (
                r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
                "user: q\nassistant: a\n",
                "a\n",
            ),
        ];
        for (line, text, answers) in cases {
            let row = parse_line(line).unwrap();
            assert_eq!((row.text().as_str(), row.answers().as_str()), (text, answers), "{line}");
        }
    }

    #[test]
    fn bad_lines_name_the_key() {
        let cases = [
            ("{", "line"),
            ("[1]", "line"),
            (r#"{"prompt": 3, "completion": "x"}"#, "prompt"),
            (r#"{"prompt": "x"}"#, "completion"),
            (r#"{"question": "q", "choices": ["a"], "answer": 1}"#, "answer"),
            (r#"{"question": "q", "choices": ["a", 2], "answer": 0}"#, "choices"),
            (r#"{"words": "x"}"#, "keys"),
            (r#"{"text": ""}"#, "answer"),
            (r#"{"messages": [{"role": "user"}]}"#, "content"),
        ];
        for (line, field) in cases {
            assert_eq!(parse_line(line).unwrap_err().field, field, "{line}");
        }
    }

    #[test]
    fn files_split_by_prompt_and_errors_name_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("a.jsonl"), folder.path().join("b.jsonl"));
        let lines = |from: u32| -> String {
            (from..from + 200)
                .map(|i| format!("{{\"prompt\": \"{i}? \", \"completion\": \"{}\"}}\n\n", i * i))
                .collect()
        };
        std::fs::write(&path, lines(0)).unwrap();
        std::fs::write(&other, lines(100)).unwrap();
        let task = JsonlParams { path: path.clone(), shifted: Some(other) }.open().unwrap();
        check_task(&task, 200);
        for i in 0..100 {
            let text = row(&task, 1, Split::Shifted, i).unwrap().text();
            assert!(!task.train.iter().any(|t| t.text() == text), "{text} trains");
        }
        let alone = JsonlParams { path: path.clone(), shifted: None }.open().unwrap();
        let text = row(&alone, 1, Split::Shifted, 0).unwrap_err().to_string();
        assert!(text.contains("data.shifted"), "{text}");
        std::fs::write(&path, "{\"text\": \"x\"}\n\n{\"text\": 1}\n").unwrap();
        let text = JsonlParams { path, shifted: None }.open().unwrap_err().to_string();
        assert!(text.contains("a.jsonl") && text.contains("line 3: text"), "{text}");
    }
}
