//! Buffers that are handed out again, so that a training step does not ask the system for the same
//! memory anew.

use super::Real;
use ndarray::Array2;
use rayon::prelude::*;

/// Free buffers by size. A fresh allocation of many megabytes costs a page fault per 4 kB and a
/// pass that zeroes it; a step that reuses the last step's buffers pays neither.
///
/// Buffers that a whole step left unused are released by [`Scratch::next_step`], so the memory held
/// between steps is at most that of one step.
///
/// ```
/// use peft_limits::linalg::scratch::Scratch;
/// let mut scratch = Scratch::<f32>::default();
/// let a = scratch.array((3, 4));
/// scratch.keep(a);
/// assert_eq!(scratch.bytes(), 48);
/// let b = scratch.zeros((4, 3)); // the same memory
/// assert_eq!((scratch.bytes(), b.sum().to_bits()), (0, 0));
/// ```
#[derive(Debug)]
pub struct Scratch<T> {
    /// (step in which it was last used, buffer).
    free: Vec<(u64, Vec<T>)>,
    step: u64,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { free: Vec::new(), step: 0 }
    }
}

impl<T> Clone for Scratch<T> {
    /// A clone starts empty: buffers are worth nothing.
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl<T: Real> Scratch<T> {
    /// An array with arbitrary contents, to be overwritten. With debug assertions it holds NaN, so
    /// that a test sees an entry that was not.
    pub fn array(&mut self, shape: (usize, usize)) -> Array2<T> {
        let length = shape.0 * shape.1;
        let found = self.free.iter().rposition(|(_, buffer)| buffer.len() == length);
        let mut buffer = match found {
            Some(at) => self.free.swap_remove(at).1,
            None => vec![T::zero(); length],
        };
        if cfg!(debug_assertions) {
            buffer.fill(T::nan());
        }
        match Array2::from_shape_vec(shape, buffer) {
            Ok(array) => array,
            Err(_) => unreachable!("the buffer has the length of the shape"),
        }
    }

    /// An array of zeros.
    pub fn zeros(&mut self, shape: (usize, usize)) -> Array2<T> {
        let mut array = self.array(shape);
        fill_zero(entries(&mut array));
        array
    }

    /// A copy of a contiguous array.
    pub fn copy(&mut self, source: &Array2<T>) -> Array2<T> {
        let mut array = self.array(source.dim());
        match source.as_slice() {
            Some(source) => entries(&mut array)
                .par_chunks_mut(COPY)
                .zip(source.par_chunks(COPY))
                .for_each(|(to, from)| to.copy_from_slice(from)),
            None => array.assign(source),
        }
        array
    }

    /// Takes back an array that is no longer needed.
    pub fn keep(&mut self, array: Array2<T>) {
        let (buffer, offset) = array.into_raw_vec_and_offset();
        if offset.unwrap_or(0) == 0 && !buffer.is_empty() {
            self.free.push((self.step, buffer));
        }
    }

    /// Starts a step: releases what the last one did not use.
    pub fn next_step(&mut self) {
        let step = self.step;
        self.free.retain(|(used, _)| *used >= step);
        self.step += 1;
    }

    /// Bytes of the free buffers.
    pub fn bytes(&self) -> usize {
        self.free.iter().map(|(_, buffer)| buffer.len() * size_of::<T>()).sum()
    }
}

/// Zeroes entries on rayon's threads.
pub fn fill_zero<T: Real>(entries: &mut [T]) {
    entries.par_chunks_mut(COPY).for_each(|part| part.fill(T::zero()));
}

/// Entries of one task of a copy.
const COPY: usize = 1 << 16;

/// The numbers of an array that was made here, row by row.
fn entries<T>(array: &mut Array2<T>) -> &mut [T] {
    match array.as_slice_mut() {
        Some(entries) => entries,
        None => unreachable!("arrays of the scratch are row-major"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_unused_for_a_step_are_released() {
        let mut scratch = Scratch::<f64>::default();
        scratch.next_step();
        let (a, b) = (scratch.array((2, 3)), scratch.array((5, 1)));
        assert!(a.iter().all(|x| x.is_nan()), "unwritten entries show in tests");
        scratch.keep(a);
        scratch.keep(b);
        scratch.next_step();
        let a = scratch.copy(&Array2::ones((3, 2)));
        assert_eq!((a.sum().to_bits(), scratch.bytes()), (6f64.to_bits(), 40));
        scratch.keep(a);
        scratch.next_step();
        assert_eq!(scratch.bytes(), 48, "the buffer of five went, that of six was used");
    }
}
