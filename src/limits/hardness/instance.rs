//! Gap nearest-neighbour instances with an exact promise: two sets of codewords of the Reed-Muller
//! code RM(2, 5).
//!
//! The code has 2^16 words of 32 bits and distances 8, 12, 16, 20, 24 and 32 with known counts.
//! Distinct codewords make a null instance, all of whose pairs are at least [`NULL_DISTANCE`]
//! apart. A planted one replaces one key by a query with [`NEAR`] bits flipped: that pair is near,
//! and every other is still at least `NULL_DISTANCE - NEAR` apart.

use crate::error::{Error, Result};
use crate::streams::seed_stream;
use rand::{RngExt, seq::SliceRandom};

/// Bits of a vector.
pub const BITS: usize = 32;
/// Distance of a planted pair, t.
pub const NEAR: u32 = 2;
/// Least distance of any pair of a null instance.
pub const NULL_DISTANCE: u32 = 8;
/// (distance, number of codewords at it from any given one), the distance 0 left out.
pub const WEIGHTS: [(u32, u32); 6] =
    [(8, 620), (12, 13888), (16, 36518), (20, 13888), (24, 620), (32, 1)];

/// Two sets of bit vectors, and the near pair if there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// One vector for each query.
    pub queries: Vec<u32>,
    /// One vector for each (real) key.
    pub keys: Vec<u32>,
    /// (query, key) within [`NEAR`].
    pub planted: Option<(usize, usize)>,
}

impl Instance {
    /// `size` queries and as many keys.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] unless 1 <= size <= 2^15.
    ///
    /// ```
    /// use peft_limits::limits::hardness::instance::{Instance, NEAR, NULL_DISTANCE};
    /// assert!(Instance::draw(64, false, 1)?.least_distance() >= NULL_DISTANCE);
    /// assert_eq!(Instance::draw(64, true, 1)?.least_distance(), NEAR);
    /// # Ok::<(), peft_limits::Error>(())
    /// ```
    pub fn draw(size: usize, planted: bool, seed: u64) -> Result<Self> {
        if size == 0 || size > 1 << 15 {
            return Err(Error::invalid(
                "size",
                size,
                "must be between 1 and 32768, half of the code",
            ));
        }
        let mut rng = seed_stream(seed, "gap-nearest-neighbour");
        let mut messages: Vec<u32> = (0..1 << 16).collect();
        let (chosen, _) = messages.partial_shuffle(&mut rng, 2 * size);
        let generators = generators();
        let words: Vec<u32> = chosen.iter().map(|&m| encode(m, &generators)).collect();
        let (queries, keys) = words.split_at(size);
        let mut instance = Self { queries: queries.to_vec(), keys: keys.to_vec(), planted: None };
        if planted {
            let (i, j) = (rng.random_range(0..size), rng.random_range(0..size));
            let mut bits: Vec<u32> = (0..BITS as u32).collect();
            let (flipped, _) = bits.partial_shuffle(&mut rng, NEAR as usize);
            instance.keys[j] =
                flipped.iter().fold(instance.queries[i], |word, bit| word ^ (1 << bit));
            instance.planted = Some((i, j));
        }
        Ok(instance)
    }

    /// Distance of the nearest pair, by trying all.
    pub fn least_distance(&self) -> u32 {
        let nearest =
            |q: &u32| self.keys.iter().map(|k| (q ^ k).count_ones()).min().unwrap_or(u32::MAX);
        self.queries.iter().map(nearest).min().unwrap_or(u32::MAX)
    }
}

/// Evaluations of the monomials 1, x_a and x_a x_b on the 32 points of F_2^5.
fn generators() -> [u32; 16] {
    let variable = |a: usize| (0..32u32).fold(0, |word, point| word | ((point >> a & 1) << point));
    let mut rows = [u32::MAX; 16];
    let mut next = 1;
    for a in 0..5 {
        rows[next] = variable(a);
        next += 1;
        for b in 0..a {
            rows[next] = variable(a) & variable(b);
            next += 1;
        }
    }
    rows
}

fn encode(message: u32, generators: &[u32; 16]) -> u32 {
    generators
        .iter()
        .enumerate()
        .filter(|(bit, _)| message >> bit & 1 == 1)
        .fold(0, |word, (_, row)| word ^ row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_has_the_stated_weights() {
        let generators = generators();
        let mut counts = [0u32; 33];
        (0..1u32 << 16).for_each(|m| counts[encode(m, &generators).count_ones() as usize] += 1);
        assert_eq!(counts[0], 1, "messages give different words");
        for (weight, count) in counts.iter().enumerate().skip(1) {
            let want = WEIGHTS.iter().find(|(w, _)| *w as usize == weight).map_or(0, |(_, n)| *n);
            assert_eq!(*count, want, "weight {weight}");
        }
    }

    #[test]
    fn promises_hold_and_the_planted_pair_is_the_only_near_one() {
        for seed in 0..5 {
            assert!(Instance::draw(200, false, seed).unwrap().least_distance() >= NULL_DISTANCE);
            let mut planted = Instance::draw(200, true, seed).unwrap();
            let (i, j) = planted.planted.unwrap();
            assert_eq!((planted.queries[i] ^ planted.keys[j]).count_ones(), NEAR);
            planted.queries.remove(i);
            assert!(planted.least_distance() >= NULL_DISTANCE - NEAR);
        }
        assert!(matches!(Instance::draw(0, true, 0), Err(Error::InvalidParam { .. })));
        assert!(matches!(Instance::draw(40_000, true, 0), Err(Error::InvalidParam { .. })));
    }
}
