//! Random numbers as a function of (seed, name, index).
//!
//! Every use of randomness has a name (`init`, `data/train`, ...). Draw number i of a named stream is a
//! function of the seed, the name and i alone, so a run resumes from its step count, streams never share
//! numbers, and data do not depend on the model.

use crate::streams::seed_stream;
use rand_chacha::ChaCha8Rng;

/// FNV-1a hash of a string, 64 bits: stable across platforms and versions.
///
/// ```
/// use peft_limits::train::stream::fnv1a;
/// assert_eq!(fnv1a(""), 0xcbf29ce484222325);
/// assert_eq!(fnv1a("a"), 0xaf63dc4c8601ec8c);
/// ```
pub fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Bits mixed so that every input bit reaches every output bit (the finaliser of SplitMix64).
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The generator of draw `index` of stream `name`.
///
/// ```
/// use peft_limits::train::stream::generator;
/// use rand::Rng;
/// let mut again = generator(7, "init", 3);
/// assert_eq!(generator(7, "init", 3).next_u64(), again.next_u64());
/// assert_ne!(generator(7, "init", 4).next_u64(), generator(7, "data", 3).next_u64());
/// ```
pub fn generator(seed: u64, name: &str, index: u64) -> ChaCha8Rng {
    seed_stream(seed, &format!("{name}#{index}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;
    use std::collections::HashSet;

    #[test]
    fn streams_differ_in_every_argument() {
        let mut seen = HashSet::new();
        for seed in 0..5 {
            for name in ["init", "data/train", "data/test"] {
                for index in 0..50 {
                    assert!(seen.insert(generator(seed, name, index).next_u64()));
                }
            }
        }
    }
}
