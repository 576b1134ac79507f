//! Independent random streams named by what they are for.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// The stream of random numbers for `name` under `seed`.
///
/// Its key is SHA-256 of the seed (8 bytes, little-endian) and the name, so streams of different
/// names or seeds are independent, adding one disturbs no other, and the numbers are the same on
/// every platform. Use one per purpose: `data`, `init`, `order`.
///
/// ```
/// use peft_limits::streams::seed_stream;
/// use rand::Rng;
/// let first = |seed, name| seed_stream(seed, name).next_u64();
/// assert_eq!(first(3, "data"), first(3, "data"));
/// assert_ne!(first(3, "data"), first(3, "init"));
/// assert_ne!(first(3, "data"), first(4, "data"));
/// ```
pub fn seed_stream(seed: u64, name: &str) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name).finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn the_numbers_never_change() {
        // SHA-256 of eight zero bytes and "data" as a ChaCha8 key; this crate's own output, recorded
        // so that stored results stay reproducible.
        let mut stream = seed_stream(0, "data");
        assert_eq!([stream.next_u64(), stream.next_u64()], [16788391703126760310, 9291284337595492255]);
    }
}
