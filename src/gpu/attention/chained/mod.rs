//! Chained low-rank gradients on a device (design 2.2), for every factorization that is made of
//! products.
//!
//! The factorization is prepared on the processor, in the precision of the problem. Monomials are
//! then made on the device from Q and K; other features are made on the processor, tile by tile,
//! and sent. All products, and the columns they multiply, are the device's. The equations are those
//! of [`crate::attention::chained`]; under a causal mask the same chunks are exact, so that both
//! compute the same approximation.

mod causal;
mod features;
mod full;

use self::features::Features;
use super::head::{Counted, Factors, Head, Matrix, Products, rows_of, side_by_side, stacked};
use super::streaming::Options;
use crate::attention::chained::ChainedGradients;
use crate::attention::factorization::{FeatureMap, Scores, SoftmaxFactorization};
use crate::attention::{AttentionProblem, Mask, Request, SoftmaxKind};
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::gpu::{Device, Engine, Opened, Work};
use crate::linalg::Real;
use burn::tensor::Tensor;
use ndarray::ArrayView2;
use std::ops::Range;

/// Chained gradients of a head, computed on `device`.
///
/// O(L k (d_v + 1) m) operations and O(L d + k (d_v + 1) m) memory beside the tiles, as on the
/// processor. The factorization is prepared in `T`: f64 keeps methods that draw at random at the
/// same draws as the processor's f64.
///
/// # Errors
/// Those of the factorization's `prepare`; [`Error::InvalidParam`] for a factorization that
/// corrects single pairs, which no product does, or a precision that the device lacks;
/// [`Error::NonPositiveDenominator`]; [`Error::TooLarge`]; [`Error::Device`].
pub fn gradients<T: Real>(
    device: &Device,
    problem: &AttentionProblem<T>,
    factorization: &dyn SoftmaxFactorization<T>,
    request: Request,
    options: &Options,
) -> Result<ChainedGradients<f32>> {
    let mut cost = Cost::default();
    let projected = problem.project(&mut Cost::default());
    let map = factorization.prepare(&Scores::of(problem, &projected), &mut cost)?;
    if let Some(sparse) = map.sparse().filter(|sparse| !sparse.is_empty()) {
        return Err(Error::invalid(
            "features",
            &map.certificate().spec,
            format!(
                "corrects {} pairs one by one, which is not made of products; compute it with \
                 --device cpu, or raise the threshold until no pair is corrected",
                sparse.len()
            ),
        ));
    }
    let (query, key) = (projected.qkv.query.view(), projected.qkv.key.view());
    device.run(
        "chained gradient",
        Chaining { problem, map: map.as_ref(), query, key, request, options, cost },
    )
}

struct Chaining<'a, T> {
    problem: &'a AttentionProblem<T>,
    map: &'a dyn FeatureMap<T>,
    query: ArrayView2<'a, T>,
    key: ArrayView2<'a, T>,
    request: Request,
    options: &'a Options,
    cost: Cost,
}

impl<T: Real> Work for Chaining<'_, T> {
    type Output = ChainedGradients<f32>;

    fn run<B: Engine>(self, on: &Opened<B>) -> Result<ChainedGradients<f32>> {
        let Chaining { problem, map, query, key, request, options, cost } = self;
        on.require(options.precision)?;
        let mut count = Counted { precision: options.precision, cost };
        let head = Head::new(on, problem, request, &mut count)?;
        let factors = head.factors(&mut count);
        let shift = match map.row_shift() {
            None => None,
            Some(shift) => Some(on.upload("the row shifts", column(shift))?),
        };
        let features = Features::new(on, map, query, key)?;
        let widths = Widths::new(&head, &factors);
        let chain = Chain {
            on,
            head: &head,
            factors: &factors,
            features,
            shift,
            softmax: problem.softmax(),
            widths,
        };
        let rank = map.rank();
        on.check_buffer("the moments", rank * widths.right().max(widths.left()))?;
        let results = match problem.mask() {
            Mask::Full => full::products(&chain, options, &mut count)?,
            Mask::Causal => causal::products(&chain, options, &mut count)?,
        };
        let denominators = on.download(results.denominator)?;
        if let Some(row) = denominators.iter().position(|&d| !(d > 0.0 && d.is_finite())) {
            return Err(Error::NonPositiveDenominator {
                factorization: map.certificate().spec.clone(),
                row,
                value: f64::from(denominators[[row, 0]]),
            });
        }
        Ok(ChainedGradients {
            gradients: head.finish(on, results.products, count)?,
            inverse_denominators: denominators.iter().map(|d| d.recip()).collect(),
            certificate: map.certificate().clone(),
        })
    }
}

fn column<T: Real>(values: &[T]) -> ArrayView2<'_, T> {
    ArrayView2::from_shape((values.len(), 1), values)
        .unwrap_or_else(|_| unreachable!("one column of all values"))
}

/// Chunks of rows, `[chunks, rows, columns]`.
type Chunks<B> = Tensor<B, 3>;

/// `chunks` runs of `rows` tokens each, from `start` on.
#[derive(Debug, Clone, Copy)]
struct Block {
    start: usize,
    chunks: usize,
    rows: usize,
}

impl Block {
    fn range(self) -> Range<usize> {
        self.start..self.start + self.chunks * self.rows
    }
}

/// Column counts: d_v, R, Z, W, N.
#[derive(Debug, Clone, Copy)]
struct Widths {
    value: usize,
    value_right: usize,
    score_right: usize,
    score_left: usize,
    value_left: usize,
}

impl Widths {
    fn new<B: Engine>(head: &Head<B>, factors: &Factors<B>) -> Self {
        let columns = |a: &Option<Matrix<B>>| a.as_ref().map_or(0, |a| a.dims()[1]);
        Self {
            value: head.value.dims()[1],
            value_right: columns(&factors.value_right),
            score_right: columns(&factors.score_right),
            score_left: columns(&factors.score_left),
            value_left: head.value_left_width(),
        }
    }

    /// Columns of [1 | V | R | V' * Z].
    fn right(self) -> usize {
        1 + self.value + self.value_right + (self.value + 1) * self.score_right
    }

    /// Columns of [N | G' * W].
    fn left(self) -> usize {
        self.value_left + (self.value + 1) * self.score_left
    }
}

/// Everything the passes read.
struct Chain<'a, B: Engine, T> {
    on: &'a Opened<B>,
    head: &'a Head<B>,
    factors: &'a Factors<B>,
    features: Features<'a, B, T>,
    /// `L_q x 1`.
    shift: Option<Matrix<B>>,
    softmax: SoftmaxKind,
    widths: Widths,
}

/// The query side's results, rows of one block or of all queries.
struct QuerySide<B: Engine> {
    denominator: Matrix<B>,
    output: Matrix<B>,
    upstream: Matrix<B>,
    /// [G | -delta].
    extended: Matrix<B>,
    value_right: Option<Matrix<B>>,
    score_right: Option<Matrix<B>>,
}

/// What the passes leave.
struct Results<B: Engine> {
    denominator: Matrix<B>,
    products: Products<B>,
}

impl<B: Engine, T: Real> Chain<'_, B, T> {
    /// Rows of a block of a matrix.
    fn block(&self, a: &Matrix<B>, block: Block) -> Chunks<B> {
        rows_of(a, block.range()).reshape([block.chunks, block.rows, a.dims()[1]])
    }

    /// [1 | V | R | V' * Z] of key rows.
    fn right_columns(&self, block: Block) -> Chunks<B> {
        let value = self.block(&self.head.value, block);
        let one = Tensor::ones([block.chunks, block.rows, 1], &self.on.device);
        let mut parts = vec![one.clone(), value.clone()];
        parts.extend(self.factors.value_right.as_ref().map(|r| self.block(r, block)));
        if let Some(z) = &self.factors.score_right {
            parts.push(face_splitting(Tensor::cat(vec![value, one], 2), self.block(z, block)));
        }
        Tensor::cat(parts, 2)
    }

    /// [N | G' * W] / D of query rows.
    fn left_columns(&self, side: &QuerySide<B>, block: Block, count: &mut Counted) -> Chunks<B> {
        let shape = |a: Matrix<B>| {
            let width = a.dims()[1];
            a.reshape([block.chunks, block.rows, width])
        };
        let mut parts: Vec<Chunks<B>> =
            self.head.value_left(&side.upstream, count).map(shape).into_iter().collect();
        if let Some(w) = &self.factors.score_left {
            parts.push(face_splitting(shape(side.extended.clone()), self.block(w, block)));
        }
        let columns = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 2) };
        columns / shape(side.denominator.clone())
    }

    /// Turns products with the right moments into the query side's results.
    fn finish_queries(&self, sums: Chunks<B>, block: Block) -> QuerySide<B> {
        let w = self.widths;
        let rows = block.range();
        let sums: Matrix<B> = sums.reshape([rows.len(), w.right()]);
        let columns = |start: usize, width: usize| sums.clone().narrow(1, start, width);
        let denominator = match (self.softmax, &self.shift) {
            (SoftmaxKind::Standard, _) => columns(0, 1),
            (SoftmaxKind::One, None) => columns(0, 1) + 1.0,
            (SoftmaxKind::One, Some(shift)) => {
                columns(0, 1) + (-rows_of(shift, rows.clone())).exp()
            }
        };
        let output = columns(1, w.value) / denominator.clone();
        let value_right =
            (w.value_right > 0).then(|| columns(1 + w.value, w.value_right) / denominator.clone());
        let upstream = self.head.upstream(&output, rows);
        let delta = (upstream.clone() * output.clone()).sum_dim(1);
        let extended = Tensor::cat(vec![upstream.clone(), -delta], 1);
        let score_right = (w.score_right > 0).then(|| {
            let start = 1 + w.value + w.value_right;
            let moments = columns(start, (w.value + 1) * w.score_right);
            contract(extended.clone(), moments, w.score_right) / denominator.clone()
        });
        QuerySide { denominator, output, upstream, extended, value_right, score_right }
    }

    /// Turns products with the left moments into the rows of dS^T W and P^T N.
    fn finish_keys(&self, sums: Chunks<B>, block: Block) -> (Option<Matrix<B>>, Option<Matrix<B>>) {
        let w = self.widths;
        let rows = block.range();
        let sums: Matrix<B> = sums.reshape([rows.len(), w.left()]);
        let score_left = (w.score_left > 0).then(|| {
            let value = rows_of(&self.head.value, rows.clone());
            let one = Tensor::ones([rows.len(), 1], &self.on.device);
            let moments = sums.clone().narrow(1, w.value_left, (w.value + 1) * w.score_left);
            contract(Tensor::cat(vec![value, one], 1), moments, w.score_left)
        });
        let value_left = (w.value_left > 0).then(|| sums.clone().narrow(1, 0, w.value_left));
        (score_left, value_left)
    }
}

/// Row-wise Kronecker product: column `p q_count + q` is a_p b_q.
fn face_splitting<B: Engine>(a: Chunks<B>, b: Chunks<B>) -> Chunks<B> {
    let ([chunks, rows, p], [.., q]) = (a.dims(), b.dims());
    let product: Chunks<B> = a.reshape([chunks * rows, p, 1]) * b.reshape([chunks * rows, 1, q]);
    product.reshape([chunks, rows, p * q])
}

/// The adjoint: sum over p of a_p times column `p width + q` of `sums`.
fn contract<B: Engine>(a: Matrix<B>, sums: Matrix<B>, width: usize) -> Matrix<B> {
    let [rows, p] = a.dims();
    let weighted: Chunks<B> = sums.reshape([rows, p, width]) * a.reshape([rows, p, 1]);
    weighted.sum_dim(1).reshape([rows, width])
}

impl Counted {
    /// `a b` of every chunk.
    fn chunk_product<B: Engine>(&mut self, a: Chunks<B>, b: Chunks<B>) -> Chunks<B> {
        let ([chunks, m, k], [.., n]) = (a.dims(), b.dims());
        self.cost.product(chunks * m, k, n);
        B::product(a, b, self.precision)
    }
}

/// The query sides of all blocks, in order, and the key side.
struct Collected<B: Engine> {
    denominator: Vec<Option<Matrix<B>>>,
    output: Vec<Option<Matrix<B>>>,
    upstream: Vec<Option<Matrix<B>>>,
    value_right: Vec<Option<Matrix<B>>>,
    score_right: Vec<Option<Matrix<B>>>,
    score_left: Vec<Option<Matrix<B>>>,
    value_left: Vec<Option<Matrix<B>>>,
}

impl<B: Engine> Collected<B> {
    fn new() -> Self {
        let none = Vec::new;
        Self {
            denominator: none(),
            output: none(),
            upstream: none(),
            value_right: none(),
            score_right: none(),
            score_left: none(),
            value_left: none(),
        }
    }

    fn push_queries(&mut self, side: QuerySide<B>) {
        self.denominator.push(Some(side.denominator));
        self.output.push(Some(side.output));
        self.upstream.push(Some(side.upstream));
        self.value_right.push(side.value_right);
        self.score_right.push(side.score_right);
    }

    fn push_keys(&mut self, (score_left, value_left): (Option<Matrix<B>>, Option<Matrix<B>>)) {
        self.score_left.push(score_left);
        self.value_left.push(value_left);
    }

    fn results(self, on: &Opened<B>) -> Results<B> {
        let all = |parts| stacked(parts).unwrap_or_else(|| Tensor::zeros([1, 1], &on.device));
        Results {
            denominator: all(self.denominator),
            products: Products {
                output: all(self.output),
                upstream: all(self.upstream),
                value_right: side_by_side([stacked(self.value_right)]),
                score_right: stacked(self.score_right),
                score_left: stacked(self.score_left),
                value_left: stacked(self.value_left),
            },
        }
    }
}
