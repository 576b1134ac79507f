//! Operation and memory counters that every gradient routine fills.
//!
//! Counts are exact and do not depend on the machine or the number of threads, so scaling claims
//! rest on them first and on seconds second. One multiply-add is two floating-point operations.

/// What one routine did.
///
/// ```
/// use peft_limits::cost::Cost;
/// let mut cost = Cost::default();
/// cost.product(3, 4, 5);          // a 3x4 by 4x5 matrix product
/// cost.exponentials += 6;
/// assert_eq!(cost.multiply_adds, 60);
/// assert_eq!(cost.flops(), 2 * 60 + 6);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Multiply-adds inside matrix products.
    pub multiply_adds: u64,
    /// Exponentials (and logarithms) of single numbers.
    pub exponentials: u64,
    /// Other element-wise operations on single numbers.
    pub elementwise: u64,
    /// Numbers held now in workspaces and results, beyond the inputs.
    pub live_elements: u64,
    /// Largest `live_elements` seen.
    pub peak_live_elements: u64,
    /// Largest single buffer, in numbers: shows that no `L x L` matrix was formed.
    pub largest_buffer: u64,
}

impl Cost {
    /// Counts an `m x k` by `k x n` product.
    pub fn product(&mut self, m: usize, k: usize, n: usize) {
        self.multiply_adds += (m as u64) * (k as u64) * (n as u64);
    }

    /// Registers a buffer of `elements` numbers.
    pub fn hold(&mut self, elements: usize) {
        self.live_elements += elements as u64;
        self.peak_live_elements = self.peak_live_elements.max(self.live_elements);
        self.largest_buffer = self.largest_buffer.max(elements as u64);
    }

    /// Releases a buffer registered with [`Cost::hold`].
    pub fn release(&mut self, elements: usize) {
        self.live_elements = self.live_elements.saturating_sub(elements as u64);
    }

    /// Floating-point operations: two per multiply-add, one per exponential or element-wise step.
    pub fn flops(&self) -> u64 {
        2 * self.multiply_adds + self.exponentials + self.elementwise
    }

    /// Adds the operations of a part whose buffers were registered by the caller.
    pub fn add_operations(&mut self, part: &Cost) {
        self.multiply_adds += part.multiply_adds;
        self.exponentials += part.exponentials;
        self.elementwise += part.elementwise;
    }
}
