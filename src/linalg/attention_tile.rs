//! A tile of scores in softmax attention: what is hidden, the online softmax of its rows, and
//! backward (\[FA2\]).
//!
//! Both exact paths are made of these: the streaming gradient of one head
//! ([`crate::attention::exact::streaming`]), whose keys lie transposed and whose products are
//! narrow, and the decoder's attention ([`crate::blocks::causal_attention`]), with windows, caps
//! and groups of heads.

use super::Real;
use super::elementwise::{Kernel, contiguous, row_exp_sum, row_max, vectorized};
use ndarray::ArrayViewMut2;
use std::ops::Range;

/// The front of a buffer as a contiguous `rows x columns` tile; a shorter buffer is an internal
/// error.
#[track_caller]
pub fn front<T>(buffer: &mut [T], rows: usize, columns: usize) -> ArrayViewMut2<'_, T> {
    match ArrayViewMut2::from_shape((rows, columns), &mut buffer[..rows * columns]) {
        Ok(tile) => tile,
        Err(_) => unreachable!("the slice has rows * columns entries"),
    }
}

/// A range of keys cut into tiles of at most `width`.
pub fn key_tiles(keys: Range<usize>, width: usize) -> impl Iterator<Item = Range<usize>> {
    keys.clone().step_by(width).map(move |start| start..(start + width).min(keys.end))
}

/// Sets entry (i, j) of a score tile to -inf where key `first_key + j` comes after query
/// `first_query + i`.
pub fn hide_future<T: Real>(scores: &mut ArrayViewMut2<T>, first_query: usize, first_key: usize) {
    let width = scores.ncols();
    if first_key + width <= first_query + 1 {
        return;
    }
    for (i, row) in contiguous(scores).chunks_exact_mut(width).enumerate() {
        let visible = (first_query + i + 1).saturating_sub(first_key).min(width);
        row[visible..].fill(T::neg_infinity());
    }
}

/// Numbers that [`OnlineSoftmax`] keeps of a row.
pub const ROW_STATISTICS: usize = 3;

/// The softmax of a tile of queries over tiles of keys that come one after another.
///
/// Per row it holds the largest score m, the sum of exp(s - m), and the factor by which the last
/// tile moved both.
pub struct OnlineSoftmax<'a, T> {
    maximum: &'a mut [T],
    sum: &'a mut [T],
    correction: &'a mut [T],
}

impl<'a, T: Real> OnlineSoftmax<'a, T> {
    /// Rows that have seen no key, in a buffer of [`ROW_STATISTICS`] numbers a row; with
    /// `zero_score` they have seen one score of 0 (softmax One: the sum starts at exp(0 - 0)).
    pub fn new(buffer: &'a mut [T], rows: usize, zero_score: bool) -> Self {
        let (maximum, rest) = buffer.split_at_mut(rows);
        let (sum, rest) = rest.split_at_mut(rows);
        maximum.fill(if zero_score { T::zero() } else { T::neg_infinity() });
        sum.fill(if zero_score { T::one() } else { T::zero() });
        Self { maximum, sum, correction: &mut rest[..rows] }
    }

    /// `scores` becomes P = exp(scores - m); `output`, what earlier tiles added up, is brought to
    /// the new m.
    ///
    /// The caller then adds P V. Both are contiguous; `output` is not read at the first tile.
    pub fn absorb(&mut self, scores: ArrayViewMut2<T>, output: ArrayViewMut2<T>, first: bool) {
        online_softmax_tile(scores, self.maximum, self.sum, self.correction);
        if !first {
            scale_rows(output, self.correction);
        }
    }

    /// Divides each row of `output` by its sum and writes its log-sum-exp.
    ///
    /// A row that saw no key has output 0 and log-sum-exp +inf, so that backward finds exp(s -
    /// inf) = 0.
    pub fn finish<'b>(
        self,
        mut output: ArrayViewMut2<T>,
        log_sum_exp: impl IntoIterator<Item = &'b mut T>,
    ) where
        T: 'b,
    {
        for (i, lse) in log_sum_exp.into_iter().enumerate().take(self.sum.len()) {
            if !(self.sum[i] > T::zero()) && self.maximum[i] == T::neg_infinity() {
                *lse = T::infinity();
                output.row_mut(i).fill(T::zero());
                self.correction[i] = T::one();
            } else {
                *lse = self.maximum[i] + self.sum[i].ln();
                self.correction[i] = T::one() / self.sum[i];
            }
        }
        scale_rows(output, self.correction);
    }
}

/// One tile of the online softmax: `scores` becomes exp(scores - m'), with m' the running maximum.
///
/// For each row i: m' = max(m_i, max_j s_ij), c = exp(m_i - m'), sum_i = c sum_i + sum_j exp(s_ij -
/// m'). `correction` receives c, by which the caller scales the row of its output accumulator.
/// `scores` must be contiguous in row-major order.
fn online_softmax_tile<T: Real>(
    mut scores: ArrayViewMut2<T>,
    row_maximum: &mut [T],
    row_sum: &mut [T],
    correction: &mut [T],
) {
    vectorized(Absorb {
        width: scores.ncols(),
        scores: contiguous(&mut scores),
        row_maximum,
        row_sum,
        correction,
    });
}

struct Absorb<'a, T> {
    width: usize,
    scores: &'a mut [T],
    row_maximum: &'a mut [T],
    row_sum: &'a mut [T],
    correction: &'a mut [T],
}

impl<T: Real> Kernel for Absorb<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let rows = self.scores.chunks_exact_mut(self.width.max(1));
        for (((row, maximum), sum), factor) in
            rows.zip(self.row_maximum).zip(self.row_sum).zip(self.correction)
        {
            let tile_maximum = row_max(row);
            let updated = if tile_maximum > *maximum { tile_maximum } else { *maximum };
            // A row with no key yet has maximum -inf; -inf - -inf would be NaN.
            if updated == T::neg_infinity() {
                row.fill(T::zero());
                *factor = T::one();
                continue;
            }
            *factor = (*maximum - updated).exp_nonpositive_lane();
            *sum = *factor * *sum + row_exp_sum(row, updated);
            *maximum = updated;
        }
    }
}

/// Multiplies row i of `output` by `factor[i]`, skipping factors that are exactly one.
fn scale_rows<T: Real>(mut output: ArrayViewMut2<T>, factor: &[T]) {
    vectorized(ScaleRows { width: output.ncols(), output: contiguous(&mut output), factor });
}

struct ScaleRows<'a, T> {
    width: usize,
    output: &'a mut [T],
    factor: &'a [T],
}

impl<T: Real> Kernel for ScaleRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (row, &f) in self.output.chunks_exact_mut(self.width.max(1)).zip(self.factor) {
            if f < T::one() || f > T::one() {
                for x in row {
                    *x *= f;
                }
            }
        }
    }
}

/// Softmax backward on a tile: `scores` becomes p = exp(s - log_sum_exp), `upstream` (holding
/// t = G V^T) becomes p (t - delta). Both tiles must be contiguous in row-major order.
pub fn softmax_backward_tile<T: Real>(
    mut scores: ArrayViewMut2<T>,
    mut upstream: ArrayViewMut2<T>,
    log_sum_exp: &[T],
    delta: &[T],
) {
    let width = scores.ncols();
    vectorized(SoftmaxBackward {
        width,
        scores: contiguous(&mut scores),
        upstream: contiguous(&mut upstream),
        log_sum_exp,
        delta,
    });
}

struct SoftmaxBackward<'a, T> {
    width: usize,
    scores: &'a mut [T],
    upstream: &'a mut [T],
    log_sum_exp: &'a [T],
    delta: &'a [T],
}

impl<T: Real> Kernel for SoftmaxBackward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let width = self.width.max(1);
        let tiles = self.scores.chunks_exact_mut(width).zip(self.upstream.chunks_exact_mut(width));
        for (((s_row, t_row), &lse), &d) in tiles.zip(self.log_sum_exp).zip(self.delta) {
            for (s, t) in s_row.iter_mut().zip(t_row) {
                let p = (*s - lse).exp_nonpositive_lane();
                *s = p;
                *t = p * (*t - d);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, array};

    /// Softmax of log-integers has simple fractions: rows (ln 1, ln 2 | ln 5) sum to 8.
    #[test]
    fn online_softmax_of_log_integers() {
        let (mut maximum, mut sum, mut factor) = ([f64::NEG_INFINITY], [0.0], [0.0]);
        let mut first = array![[0.0, 2f64.ln()]];
        online_softmax_tile(first.view_mut(), &mut maximum, &mut sum, &mut factor);
        let mut second = array![[5f64.ln()]];
        online_softmax_tile(second.view_mut(), &mut maximum, &mut sum, &mut factor);
        assert!((sum[0] * maximum[0].exp() - 8.0).abs() < 1e-14);
        assert!((factor[0] - 0.4).abs() < 1e-15, "2/5 rescales what came before");
    }

    #[test]
    fn a_row_without_keys_stays_empty() {
        let (mut maximum, mut sum, mut factor) = ([f32::NEG_INFINITY], [0.0f32], [0.0f32]);
        let mut tile = array![[f32::NEG_INFINITY; 40]];
        online_softmax_tile(tile.view_mut(), &mut maximum, &mut sum, &mut factor);
        assert!(tile.iter().all(|x| x.to_bits() == 0));
        assert_eq!((sum[0].to_bits(), factor[0].to_bits()), (0, 1f32.to_bits()));
    }

    /// Rows over tiles of every width equal the softmax of the whole row; a hidden row has
    /// output 0.
    #[test]
    fn tiles_add_up_to_the_softmax_of_the_row() {
        let scores = Array2::from_shape_fn((3, 10), |(i, j)| {
            if i == 2 { f64::NEG_INFINITY } else { ((i * 7 + j * 5) % 9) as f64 }
        });
        let values = Array2::from_shape_fn((10, 2), |(j, c)| (j + 3 * c) as f64);
        for (width, one) in [(1, false), (3, true), (10, false), (4, true)] {
            let mut statistics = [0.0; 9];
            let mut softmax = OnlineSoftmax::new(&mut statistics, 3, one);
            let (mut output, mut lse) = (Array2::from_elem((3, 2), 7.0), [0.0; 3]);
            for keys in key_tiles(0..10, width) {
                let mut tile = scores.slice(ndarray::s![.., keys.clone()]).to_owned();
                softmax.absorb(tile.view_mut(), output.view_mut(), keys.start == 0);
                let product = tile.dot(&values.slice(ndarray::s![keys.clone(), ..]));
                output = if keys.start == 0 { product } else { output + product };
            }
            softmax.finish(output.view_mut(), &mut lse);
            for i in 0..2 {
                let weights = scores.row(i).mapv(f64::exp);
                let sum = weights.sum() + f64::from(u8::from(one));
                assert!((lse[i] - sum.ln()).abs() < 1e-14);
                let want = weights.dot(&values) / sum;
                assert!(
                    output.row(i).iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-13)
                );
            }
            assert!(output.row(2).iter().all(|x| x.abs() <= 0.0));
            assert_eq!(lse[2].is_sign_positive() && lse[2].is_infinite(), !one);
        }
    }

    #[test]
    fn later_keys_are_hidden() {
        let mut tile = Array2::<f32>::zeros((3, 4));
        hide_future(&mut tile.view_mut(), 5, 4);
        let hidden = tile.mapv(|x| x == f32::NEG_INFINITY);
        assert_eq!(
            hidden,
            array![[false, false, true, true], [false, false, false, true], [false; 4]]
        );
    }
}
