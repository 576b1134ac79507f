//! Next-token cross-entropy through the output projection, in chunks of positions.

use super::base_weight::BaseWeight;
use super::stored_weight::StoredWeight;
use super::{numbers_mut, require_shape};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::linalg::elementwise::{row_exp_sum, row_max, vectorized_closure};
use crate::linalg::gemm::parallel_product_into;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

/// The label that excludes a position from the loss.
pub const IGNORED_LABEL: i64 = -100;
/// Positions whose logits exist at one time.
pub const LOGIT_ROWS: usize = 256;

/// Rows that count and what they must predict: row b T + t predicts label (b, t + 1), shifted by
/// one, unless that label is [`IGNORED_LABEL`]; the last position of a sequence predicts nothing.
///
/// ```
/// use ndarray::array;
/// use peft_limits::blocks::cross_entropy::prediction_targets;
/// let targets = prediction_targets(array![[-100, 7, 9], [4, -100, 2]].view(), 10)?;
/// assert_eq!(targets, [(0, 7), (1, 9), (4, 2)]);
/// # Ok::<(), peft_limits::Error>(())
/// ```
///
/// # Errors
/// [`Error::InvalidParam`] for a label outside the vocabulary that is not -100.
pub fn prediction_targets(
    labels: ArrayView2<i64>,
    vocabulary: usize,
) -> Result<Vec<(usize, usize)>> {
    let (batch, length) = labels.dim();
    let mut targets = Vec::with_capacity(batch * length);
    for ((b, t), &label) in labels.indexed_iter() {
        if label != IGNORED_LABEL && (label < 0 || label >= vocabulary as i64) {
            let requirement = format!("must be {IGNORED_LABEL} or in 0..{vocabulary}");
            return Err(Error::invalid(format!("labels[{b}, {t}]"), label, requirement));
        }
        if t > 0 && label != IGNORED_LABEL {
            targets.push((b * length + t - 1, label as usize));
        }
    }
    Ok(targets)
}

/// What [`cross_entropy`] adds to when gradients are wanted.
pub struct CrossEntropySinks<'a, 'b, T> {
    /// Gradient of the hidden rows, `N x D`.
    pub dhidden: &'a mut ArrayViewMut2<'b, T>,
    /// Gradient of the output projection, `V x D`; `None` when frozen.
    pub dweight: Option<ArrayViewMut2<'a, T>>,
}

/// The output projection, `V x D`.
pub enum Head<'a, T> {
    /// In memory.
    Whole(ArrayView2<'a, T>),
    /// Read in blocks of rows, for each product anew.
    Blocks(&'a StoredWeight<T>),
}

impl<'a, T: Real> Head<'a, T> {
    /// A weight that is not packed.
    pub fn of(weight: &'a BaseWeight<T>) -> Self {
        match weight {
            BaseWeight::Dense(weight) => Self::Whole(weight.view()),
            BaseWeight::Stored(stored) => match stored.in_memory() {
                Some(BaseWeight::Dense(weight)) => Self::Whole(weight.view()),
                _ => Self::Blocks(stored),
            },
            _ => unreachable!("an output projection is never packed"),
        }
    }

    fn shape(&self) -> (usize, usize) {
        match self {
            Self::Whole(weight) => weight.dim(),
            Self::Blocks(stored) => stored.shape(),
        }
    }

    /// z = x W^T. A block of it has the bits of the whole.
    ///
    /// # Errors
    /// Those of reading.
    pub fn logits(&self, x: ArrayView2<T>, cost: &mut Cost) -> Result<Array2<T>> {
        let mut z = Array2::zeros((x.nrows(), self.shape().0));
        match self {
            Self::Whole(weight) => {
                parallel_product_into(T::one(), x, weight.t(), T::zero(), &mut z.view_mut(), cost);
            }
            Self::Blocks(stored) => stored.blocks(&mut |first, rows| {
                let mut part = z.slice_mut(s![.., first..first + rows.nrows()]);
                parallel_product_into(T::one(), x, rows.t(), T::zero(), &mut part, cost);
                Ok(())
            })?,
        }
        Ok(z)
    }

    /// dx = dz W; a sum over blocks where W is read in blocks.
    fn logits_backward(&self, dz: ArrayView2<T>, cost: &mut Cost) -> Result<Array2<T>> {
        let mut dx = Array2::zeros((dz.nrows(), self.shape().1));
        match self {
            Self::Whole(weight) => {
                parallel_product_into(T::one(), dz, *weight, T::zero(), &mut dx.view_mut(), cost);
            }
            Self::Blocks(stored) => stored.blocks(&mut |first, rows| {
                let part = dz.slice(s![.., first..first + rows.nrows()]);
                parallel_product_into(
                    T::one(),
                    part,
                    rows.view(),
                    T::one(),
                    &mut dx.view_mut(),
                    cost,
                );
                Ok(())
            })?,
        }
        Ok(dx)
    }
}

/// Sum over the targets (i, y) of (log sum_v exp z_iv - z_iy) / divisor, in nats, with z = hidden
/// W^T.
///
/// Shapes: hidden `N x D`, weight `V x D`. With `divisor` the number of targets this is the mean.
/// The gradient dz = (softmax(z) - onehot(y)) / divisor is formed in place of a chunk of logits and
/// pushed into the sinks at once, so no `N x V` array exists. Rows that do not count are never
/// multiplied.
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::NonFinite`] naming the logits if a loss is NaN or infinite.
pub fn cross_entropy<T: Real>(
    hidden: ArrayView2<T>,
    weight: ArrayView2<T>,
    targets: &[(usize, usize)],
    divisor: f64,
    sinks: Option<CrossEntropySinks<'_, '_, T>>,
    cost: &mut Cost,
) -> Result<f64> {
    cross_entropy_observed(hidden, weight, targets, (divisor, None), sinks, &|_, _| (), cost)
}

/// As [`cross_entropy`], with logits c tanh(z / c) where there is a cap c beside the divisor,
/// showing each chunk of logits (false) and of their gradient (true) to `observe`, which may change
/// it: that is how the rounding of a lower precision is imitated.
///
/// # Errors
/// As [`cross_entropy`].
pub fn cross_entropy_observed<T: Real>(
    hidden: ArrayView2<T>,
    weight: ArrayView2<T>,
    targets: &[(usize, usize)],
    (divisor, cap): (f64, Option<f64>),
    sinks: Option<CrossEntropySinks<'_, '_, T>>,
    observe: &dyn Fn(bool, &mut Array2<T>),
    cost: &mut Cost,
) -> Result<f64> {
    cross_entropy_through(
        hidden,
        &Head::Whole(weight),
        targets,
        (divisor, cap),
        sinks,
        observe,
        cost,
    )
}

/// As [`cross_entropy_observed`], through an output projection that may be read block by block.
///
/// # Errors
/// As there; those of reading.
pub fn cross_entropy_through<T: Real>(
    hidden: ArrayView2<T>,
    head: &Head<'_, T>,
    targets: &[(usize, usize)],
    (divisor, cap): (f64, Option<f64>),
    mut sinks: Option<CrossEntropySinks<'_, '_, T>>,
    observe: &dyn Fn(bool, &mut Array2<T>),
    cost: &mut Cost,
) -> Result<f64> {
    let (op, width, vocabulary) = ("cross_entropy", hidden.ncols(), head.shape().0);
    if head.shape().1 != width {
        return Err(Error::shape(op, "weight", (vocabulary, width), head.shape()));
    }
    if let Some(sinks) = &sinks {
        require_shape(op, "dhidden", &sinks.dhidden.view(), hidden.dim())?;
        if let Some(dweight) = &sinks.dweight {
            require_shape(op, "dweight", &dweight.view(), (vocabulary, width))?;
        }
    }
    let scale = T::of(1.0 / divisor);
    let mut total = 0.0;
    for chunk in targets.chunks(LOGIT_ROWS) {
        let indices: Vec<usize> = chunk.iter().map(|&(row, _)| row).collect();
        let rows = hidden.select(Axis(0), &indices);
        cost.hold(rows.len());
        cost.hold(chunk.len() * vocabulary);
        let mut logits = head.logits(rows.view(), cost)?;
        cost.exponentials += logits.len() as u64;
        cost.elementwise += 4 * logits.len() as u64;
        if let Some(cap) = cap.map(T::of) {
            logits.mapv_inplace(|z| cap * (z / cap).tanh());
        }
        observe(false, &mut logits);
        let capped = cap.filter(|_| sinks.is_some()).map(|cap| (T::of(cap), logits.clone()));
        let losses: Vec<f64> = numbers_mut(&mut logits)
            .par_chunks_exact_mut(vocabulary.max(1))
            .zip(chunk)
            .map(|(z, &(_, label))| loss_row(z, label, scale))
            .collect();
        for (loss, &(row, _)) in losses.iter().zip(chunk) {
            if !loss.is_finite() {
                return Err(Error::NonFinite {
                    op,
                    tensor: "logits".into(),
                    index: vec![row],
                    value: *loss,
                });
            }
            total += loss;
        }
        if let Some(sinks) = &mut sinks {
            if let Some((cap, capped)) = &capped {
                logits.zip_mut_with(capped, |d, z| *d *= T::one() - (*z / *cap) * (*z / *cap));
            }
            observe(true, &mut logits);
            let drows = head.logits_backward(logits.view(), cost)?;
            for (&row, drow) in indices.iter().zip(drows.rows()) {
                let mut sink = sinks.dhidden.row_mut(row);
                sink += &drow;
            }
            if let Some(dweight) = &mut sinks.dweight {
                parallel_product_into(T::one(), logits.t(), rows.view(), T::one(), dweight, cost);
            }
        }
        cost.release(rows.len() + logits.len());
    }
    Ok(total / divisor)
}

/// Loss of one row; the row becomes scale (softmax(z) - onehot(label)).
fn loss_row<T: Real>(z: &mut [T], label: usize, scale: T) -> f64 {
    vectorized_closure(
        #[inline(always)]
        || {
            let largest = row_max(z);
            let target = z[label];
            let sum = row_exp_sum(z, largest);
            let factor = scale / sum;
            for x in z.iter_mut() {
                *x *= factor;
            }
            z[label] -= scale;
            sum.widen().ln() + (largest.widen() - target.widen())
        },
    )
}
