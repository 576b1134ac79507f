//! Text to token ids: bytes, or the `tokenizer.json` of a Hugging Face model folder.

use crate::error::{Error, Result};
use std::path::Path;

/// Ids of the byte tokenizer beyond the 256 bytes.
pub const PAD: u32 = 256;
/// Begins every row.
pub const BEGIN: u32 = 257;
/// Ends every row.
pub const END: u32 = 258;
/// Vocabulary of the byte tokenizer.
pub const BYTE_VOCABULARY: usize = 259;

/// A tokenizer with the ids that begin, end and pad a row.
///
/// ```
/// use peft_limits::train::tokenizer::Tokenizer;
/// let bytes = Tokenizer::bytes();
/// assert_eq!(bytes.encode("4+4=")?, [52, 43, 52, 61]);
/// assert_eq!(bytes.decode(&[257, 56, 258])?, "8"); // begin and end are not text
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub struct Tokenizer {
    kind: Kind,
    /// Id before the first token of a row, if the model uses one.
    pub begin: Option<u32>,
    /// Id after the last token of a row.
    pub end: u32,
    /// Id that fills short rows; its labels are -100.
    pub pad: u32,
}

enum Kind {
    Bytes,
    #[cfg(feature = "hf-tokenizer")]
    HuggingFace(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// One token per byte of UTF-8.
    pub fn bytes() -> Self {
        Self { kind: Kind::Bytes, begin: Some(BEGIN), end: END, pad: PAD }
    }

    /// The tokenizer of a model folder: its `tokenizer.json`, or bytes if there is none.
    ///
    /// `bos_token_id`, `eos_token_id` and `pad_token_id` come from the folder's `config.json`;
    /// padding falls back to the end id, which is harmless because padded labels are -100.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a broken `tokenizer.json`, a `config.json` without
    /// `eos_token_id`, or a vocabulary too small for bytes; [`Error::InvalidParam`] if the crate
    /// was built without the feature `hf-tokenizer`.
    pub fn of_model(folder: &Path, vocabulary: usize) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if path.exists() {
            return Self::from_json(folder, &path);
        }
        if vocabulary < BYTE_VOCABULARY {
            let expected = format!(
                "a tokenizer.json, or vocab_size >= {BYTE_VOCABULARY} for the byte tokenizer"
            );
            return Err(Error::format(
                folder,
                "tokenizer",
                expected,
                format!("vocab_size {vocabulary}"),
            ));
        }
        Ok(Self::bytes())
    }

    #[cfg(feature = "hf-tokenizer")]
    fn from_json(folder: &Path, path: &Path) -> Result<Self> {
        let refused =
            |found: String| Error::format(path, "file", "a Hugging Face tokenizer", found);
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        serde_json::from_slice::<serde::de::IgnoredAny>(&bytes)
            .map_err(|e| refused(e.to_string()))?;
        let inner = without_panic(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(refused)?;
        let config = folder.join("config.json");
        let text = std::fs::read_to_string(&config).map_err(|e| Error::io(&config, e))?;
        let value: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| Error::format(&config, "file", "JSON", e.to_string()))?;
        // `eos_token_id` may be a list; the first entry ends a row.
        let id = |key: &str| {
            let value = value.get(key)?;
            value.as_u64().or_else(|| value.get(0)?.as_u64()).and_then(|id| u32::try_from(id).ok())
        };
        let end = id("eos_token_id").ok_or_else(|| {
            Error::format(&config, "key eos_token_id", "the id that ends a row", "nothing")
        })?;
        let (begin, pad) = (id("bos_token_id"), id("pad_token_id").unwrap_or(end));
        Ok(Self { kind: Kind::HuggingFace(Box::new(inner)), begin, end, pad })
    }

    #[cfg(not(feature = "hf-tokenizer"))]
    fn from_json(_: &Path, path: &Path) -> Result<Self> {
        Err(Error::invalid(
            "tokenizer",
            path.display(),
            "this build lacks the feature `hf-tokenizer`",
        ))
    }

    /// Number of ids.
    pub fn vocabulary(&self) -> usize {
        match &self.kind {
            Kind::Bytes => BYTE_VOCABULARY,
            #[cfg(feature = "hf-tokenizer")]
            Kind::HuggingFace(inner) => inner.get_vocab_size(true),
        }
    }

    /// Ids of a text, without begin or end.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] with the text if a Hugging Face tokenizer refuses it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            #[cfg(feature = "hf-tokenizer")]
            Kind::HuggingFace(inner) => match without_panic(|| inner.encode(text, false)) {
                Ok(encoding) => Ok(encoding.get_ids().to_vec()),
                Err(reason) => Err(Error::invalid("text", format!("{text:?}"), reason)),
            },
        }
    }

    /// Text of ids; special ids are left out, bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] if a Hugging Face tokenizer refuses the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match &self.kind {
            Kind::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            #[cfg(feature = "hf-tokenizer")]
            Kind::HuggingFace(inner) => without_panic(|| inner.decode(ids, true))
                .map_err(|reason| Error::invalid("token ids", format!("{ids:?}"), reason)),
        }
    }
}

/// The library's answer, or its error or panic as a text: it panics on some files that are JSON but
/// no tokenizer.
#[cfg(feature = "hf-tokenizer")]
fn without_panic<X>(
    call: impl FnOnce() -> tokenizers::Result<X>,
) -> std::result::Result<X, String> {
    // Nothing outside the call can be left half changed: it borrows immutably.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)) {
        Ok(answer) => answer.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| t.to_string()));
            Err(text.unwrap_or_else(|| "something on which the tokenizer library fails".into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_the_vocabulary_is_checked() {
        let tokenizer = Tokenizer::bytes();
        for text in ["", "a", "née 12+3=15\n", "\u{10ffff}"] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
        assert_eq!(tokenizer.decode(&[0xff, 65]).unwrap(), "\u{fffd}A");
        let folder = tempfile::tempdir().unwrap();
        assert!(Tokenizer::of_model(folder.path(), 259).is_ok());
        assert!(matches!(Tokenizer::of_model(folder.path(), 258), Err(Error::Format { .. })));
    }

    #[cfg(feature = "hf-tokenizer")]
    #[test]
    fn a_word_level_tokenizer_json_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "two": 1, "plus": 2, "four": 3}, "unk_token": "[UNK]"}}"#;
        std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        std::fs::write(
            folder.path().join("config.json"),
            r#"{"eos_token_id": [7, 8], "bos_token_id": 6}"#,
        )
        .unwrap();
        let tokenizer = Tokenizer::of_model(folder.path(), 9).unwrap();
        assert_eq!(
            (tokenizer.begin, tokenizer.end, tokenizer.pad, tokenizer.vocabulary()),
            (Some(6), 7, 7, 4)
        );
        assert_eq!(tokenizer.encode("two plus two is four").unwrap(), [1, 2, 1, 0, 3]);
        assert_eq!(tokenizer.decode(&[1, 2, 3]).unwrap(), "two plus four");
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let text = Tokenizer::of_model(folder.path(), 9).err().unwrap().to_string();
        assert!(text.contains("eos_token_id"), "{text}");
        std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        assert!(matches!(Tokenizer::of_model(folder.path(), 9), Err(Error::Format { .. })));
    }
}
