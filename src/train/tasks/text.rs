//! Windows of any UTF-8 text file.
//!
//! The file is cut into blocks of two windows; the hash of a block's content decides whether it
//! trains or is held out. Training windows start anywhere in a block's first half; the test is the
//! first window of a held-out block, the shifted test the whole block, twice as long.
//!
//! ```
//! use peft_limits::train::tasks::{row, text::Text, Split};
//! let numbers: String = (1000..2000).map(|i| format!("{i} ")).collect();
//! let task = Text::from_text("numbers.txt", numbers, 15)?;
//! let example = row(&task, 1, Split::Test, 0)?;
//! assert_eq!(example.text(), "1252 1253 1254 "); // labels: every byte
//! # Ok::<(), peft_limits::Error>(())
//! ```

use super::{Row, Segment, Split, Task, held_out};
use crate::error::{Error, Result};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Parameters.
///
/// | name | default | purpose | range |
/// |---|---|---|---|
/// | `path` | | the file | UTF-8 |
/// | `window` | 127 | bytes per row; the shifted test has twice as many | 8 to 65536 |
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextParams {
    /// The file.
    pub path: PathBuf,
    /// Bytes per row.
    #[serde(default = "default_window")]
    pub window: usize,
}

/// Bytes per row where nothing is said: two windows with a token at either end fit the default
/// length of 256.
pub const WINDOW: usize = 127;

fn default_window() -> usize {
    WINDOW
}

impl TextParams {
    /// Reads the file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] at the first byte that is not UTF-8; as
    /// [`Text::from_text`].
    pub fn open(self) -> Result<Text> {
        let bytes = std::fs::read(&self.path).map_err(|e| Error::io(&self.path, e))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            let byte = e.as_bytes().get(at).copied().unwrap_or(0);
            Error::format(&self.path, format!("byte {at}"), "UTF-8 text", format!("0x{byte:02x}"))
        })?;
        Text::from_text(&self.path, text, self.window)
    }
}

/// An opened text.
#[derive(Debug, Clone)]
pub struct Text {
    text: String,
    window: usize,
    /// First byte of each block, and the end.
    starts: Vec<usize>,
}

impl Text {
    /// Cuts a text into blocks; `path` only serves messages.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a window outside its range; [`Error::Format`] if the text is too
    /// short to have both training and held-out blocks.
    pub fn from_text(path: impl AsRef<Path>, text: String, window: usize) -> Result<Self> {
        if !(8..=65536).contains(&window) {
            return Err(Error::invalid("text.window", window, "must be 8 to 65536"));
        }
        let mut starts = vec![0];
        while let Some(&last) = starts.last() {
            let next = text.floor_char_boundary(last + 2 * window);
            if next - last + 4 <= 2 * window {
                break; // the rest is shorter than a block
            }
            starts.push(next);
        }
        let this = Self { text, window, starts };
        let blocks = this.starts.len() - 1;
        let held = (0..blocks).filter(|&i| held_out(this.block(i))).count();
        if held == 0 || held == blocks {
            let found = format!(
                "{} bytes in {blocks} blocks of {}, {held} held out",
                this.text.len(),
                2 * window
            );
            return Err(Error::format(
                path,
                "text",
                "enough text for training and held-out blocks",
                found,
            ));
        }
        Ok(this)
    }

    fn block(&self, i: usize) -> &str {
        &self.text[self.starts[i]..self.starts[i + 1]]
    }
}

impl Task for Text {
    fn name(&self) -> &str {
        "text"
    }

    fn draw(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Row> {
        let block = self.block(rng.random_range(0..self.starts.len() - 1));
        let start = if split == Split::Train {
            rng.random_range(0..=block.len() - self.window.min(block.len()))
        } else {
            0
        };
        let start = block.floor_char_boundary(start);
        let end = if split == Split::Shifted {
            block.len()
        } else {
            block.floor_char_boundary(start + self.window)
        };
        let segments = vec![Segment { text: block[start..end].to_string(), supervised: true }];
        Ok(Row { key: block.to_string(), segments, choices: vec![], answer: 0, background: false })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{row, tests::check_task};
    use super::*;

    fn numbers() -> String {
        (0..2000).map(|i| format!("{i}é ")).collect()
    }

    #[test]
    fn the_common_contract_holds_and_windows_have_their_length() {
        let task = Text::from_text("a.txt", numbers(), 32).unwrap();
        check_task(&task, 300);
        for i in 0..100 {
            assert!((29..=32).contains(&row(&task, 1, Split::Train, i).unwrap().text().len()));
            assert!((61..=64).contains(&row(&task, 1, Split::Shifted, i).unwrap().text().len()));
        }
    }

    #[test]
    fn no_training_window_overlaps_a_held_out_block() {
        let task = Text::from_text("a.txt", numbers(), 32).unwrap();
        for i in 0..300 {
            let window = row(&task, 1, Split::Train, i).unwrap().text();
            let at = task.text.find(&window).unwrap();
            let block = task.starts.partition_point(|&s| s <= at) - 1;
            assert!(!held_out(task.block(block)) && at + window.len() <= task.starts[block + 1]);
        }
    }

    #[test]
    fn bad_files_are_refused_by_name_and_position() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.txt");
        std::fs::write(&path, b"fine so far \xff").unwrap();
        let text = TextParams { path: path.clone(), window: 8 }.open().unwrap_err().to_string();
        assert!(
            text.contains("bad.txt") && text.contains("byte 12") && text.contains("0xff"),
            "{text}"
        );
        std::fs::write(&path, b"short").unwrap();
        assert!(matches!(
            TextParams { path: path.clone(), window: 8 }.open(),
            Err(Error::Format { .. })
        ));
        assert!(matches!(
            TextParams { path: path.clone(), window: 7 }.open(),
            Err(Error::InvalidParam { .. })
        ));
        let absent = TextParams { path: folder.path().join("none"), window: 8 };
        assert!(matches!(absent.open(), Err(Error::Io { .. })));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(TextParams { path, window: 8 }.open(), Err(Error::Format { .. })));
    }
}
