//! Model sizes by name.
//!
//! | name | parameters | width | layers | FFN | heads / key-value heads |
//! |---|---|---|---|---|---|
//! | `pico` | 0.2 M | 64 | 4 | 176 | 4 / 2 |
//! | `nano` | 1.0 M | 128 | 5 | 344 | 4 / 2 |
//! | `micro` | 4.5 M | 256 | 6 | 688 | 8 / 4 |
//! | `mini` | 23.5 M | 512 | 8 | 1376 | 8 / 4 |
//!
//! The vocabulary is that of the byte tokenizer; embeddings are not tied.

use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::train::tokenizer::BYTE_VOCABULARY;

/// Names of the presets.
pub const NAMES: [&str; 4] = ["pico", "nano", "micro", "mini"];

/// The sizes of a preset.
///
/// # Errors
/// [`Error::InvalidParam`] listing the names.
///
/// ```
/// use peft_limits::train::preset::preset;
/// assert_eq!(preset("micro")?.parameters(), 4_485_888);
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn preset(name: &str) -> Result<ModelConfig> {
    let (hidden_size, num_hidden_layers, intermediate_size, heads, num_key_value_heads) = match name
    {
        "pico" => (64, 4, 176, 4, 2),
        "nano" => (128, 5, 344, 4, 2),
        "micro" => (256, 6, 688, 8, 4),
        "mini" => (512, 8, 1376, 8, 4),
        _ => {
            return Err(Error::invalid(
                "model.preset",
                name,
                format!("must be one of {}", NAMES.join(", ")),
            ));
        }
    };
    Ok(ModelConfig {
        vocab_size: BYTE_VOCABULARY,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads: heads,
        num_key_value_heads,
        head_dim: hidden_size / heads,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        options: Default::default(),
    })
}

/// The sizes of LLaMA-2-7B, from its public configuration: what the papers measure on, here for
/// predictions.
///
/// ```
/// use peft_limits::train::preset::llama_2_7b;
/// assert_eq!(llama_2_7b().parameters(), 6_738_415_616);
/// ```
pub fn llama_2_7b() -> ModelConfig {
    ModelConfig {
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 11_008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        options: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_advertised_sizes() {
        for (name, least, most) in [
            ("pico", 0.15e6, 0.25e6),
            ("nano", 0.9e6, 1.1e6),
            ("micro", 4.4e6, 5.5e6),
            ("mini", 23e6, 27e6),
        ] {
            let config = preset(name).unwrap();
            config.check().unwrap();
            let n = config.parameters() as f64;
            assert!((least..most).contains(&n), "{name}: {n}");
        }
        assert!(preset("huge").unwrap_err().to_string().contains("pico, nano, micro, mini"));
    }
}
