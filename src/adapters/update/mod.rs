//! What training added to one weight, apart from the weight: a slice of rows or columns, or a
//! low-rank product.
//!
//! \[S2FT\] and \[PaCA\] change a slice of W and nothing else, so W' - W is that slice: an adapter
//! that can be stored, added to others, put in place and taken out again, and served beside other
//! adapters. \[LoRA\]'s update is the product s B A. Both are a [`WeightUpdate`] here. Sums of
//! updates are in [`fuse()`]; derivations and costs in `paper-notes/adapter-algebra.md`.

mod fuse;
mod slice;

use crate::adapters::lora::{Lora, LoraSpec};
use crate::adapters::s2ft::Side;
use crate::cost::Cost;
use crate::error::Result;
use crate::linalg::Real;
use crate::linalg::gemm::parallel_product;
pub use fuse::fuse;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
pub use slice::{SlicePlace, SliceUpdate};

/// W' - W of one projection.
#[derive(Debug, Clone)]
pub enum WeightUpdate<T: Real> {
    /// Some rows or columns.
    Slice(SliceUpdate<T>),
    /// s B A.
    LowRank(Lora<T>),
}

impl<T: Real> WeightUpdate<T> {
    /// (out, in) of the weight it belongs to.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            WeightUpdate::Slice(slice) => slice.shape(),
            WeightUpdate::LowRank(lora) => (lora.b.nrows(), lora.a.ncols()),
        }
    }

    /// Numbers of the update itself (indices not counted).
    pub fn elements(&self) -> usize {
        match self {
            WeightUpdate::Slice(slice) => slice.delta().len(),
            WeightUpdate::LowRank(lora) => lora.a.len() + lora.b.len(),
        }
    }

    /// Bytes of numbers and, for slices, of indices (8 each, as they are held in memory).
    pub fn bytes(&self) -> usize {
        let indices = match self {
            WeightUpdate::Slice(slice) => size_of_val(slice.place().index.as_slice()),
            WeightUpdate::LowRank(_) => 0,
        };
        self.elements() * size_of::<T>() + indices
    }

    /// Numbers of the weight that putting the update in place overwrites.
    pub fn touched_elements(&self) -> usize {
        match self {
            WeightUpdate::Slice(slice) => slice.delta().len(),
            WeightUpdate::LowRank(_) => self.shape().0 * self.shape().1,
        }
    }

    /// weight += update. Slice: one addition per number of the slice; low rank: out r in
    /// multiply-adds.
    ///
    /// Shapes: weight `out x in`.
    pub fn add_to(&self, weight: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        match self {
            WeightUpdate::Slice(slice) => slice.add_to(weight, cost),
            WeightUpdate::LowRank(lora) => lora.add_delta(weight, cost),
        }
    }

    /// y += x update^T without forming the update: k in (or k out) multiply-adds per row of x for a
    /// slice of k rows (columns), r (in + out) for rank r.
    ///
    /// Shapes: x `N x in`, y `N x out`.
    pub fn forward_add(&self, x: ArrayView2<T>, y: &mut ArrayViewMut2<T>, cost: &mut Cost) {
        match self {
            WeightUpdate::Slice(slice) => slice.forward_add(x, y, cost),
            WeightUpdate::LowRank(lora) => lora.forward_add(x, y, cost),
        }
    }

    /// The update as an `out x in` matrix.
    pub fn dense(&self) -> Array2<T> {
        let mut dense = Array2::zeros(self.shape());
        self.add_to(&mut dense.view_mut(), &mut Cost::default());
        dense
    }

    /// The same update as factors B A with scaling 1.
    ///
    /// A slice of rows is S D with S the `out x k` selection of those rows and D the slice; a slice
    /// of columns is D S^T. No number is rounded. Factors whose rank exceeds the smaller side of
    /// the weight are replaced by the update itself and an identity.
    ///
    /// # Errors
    /// As [`Lora::from_factors`]; an update held here has none.
    pub fn to_low_rank(&self) -> Result<Lora<T>> {
        let slice = match self {
            WeightUpdate::LowRank(lora) => return Ok(lora.clone()),
            WeightUpdate::Slice(slice) => slice,
        };
        let (out, width) = slice.shape();
        let (count, delta) = (slice.place().index.len(), slice.delta().to_owned());
        if count > out.min(width) {
            return from_dense(self.dense());
        }
        let selection = |rows: usize| {
            let mut s = Array2::zeros((rows, count));
            slice.place().index.iter().enumerate().for_each(|(k, &i)| s[[i, k]] = T::one());
            s
        };
        let (b, a) = match slice.place().side {
            Side::Output => (selection(out), delta),
            Side::Input => {
                (delta, selection(width).reversed_axes().as_standard_layout().into_owned())
            }
        };
        unscaled(b, a)
    }
}

/// B A with alpha = r, so that the scaling is exactly one.
fn unscaled<T: Real>(b: Array2<T>, a: Array2<T>) -> Result<Lora<T>> {
    let (rank, shape) = (a.nrows(), (b.nrows(), a.ncols()));
    let spec = LoraSpec { rank, alpha: rank as f64, rank_stabilized: false };
    Lora::from_factors(spec, shape, a, b)
}

/// A dense update as factors: itself and an identity on the smaller side.
fn from_dense<T: Real>(update: Array2<T>) -> Result<Lora<T>> {
    let (out, width) = update.dim();
    if out <= width {
        unscaled(Array2::eye(out), update)
    } else {
        unscaled(update, Array2::eye(width))
    }
}

/// [`unscaled`], or [`from_dense`] of the product where the rank exceeds the smaller side.
fn compact<T: Real>(b: Array2<T>, a: Array2<T>) -> Result<Lora<T>> {
    if a.nrows() > b.nrows().min(a.ncols()) {
        return from_dense(parallel_product(b.view(), a.view(), &mut Cost::default()));
    }
    unscaled(b, a)
}
