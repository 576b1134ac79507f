//! The operations of a training step, and the engines that carry them out.
//!
//! The layer, the model, every adaptation method and partial backpropagation are written once, over
//! [`Ops`]. An engine says what a matrix is and how it is multiplied:
//!
//! | engine | a matrix is | used for |
//! |---|---|---|
//! | [`Cpu`] | an array of f32 or f64 | training, validation |
//! | `gpu::train::Gpu` | a tensor on a device | training on a GPU |
//! | [`Sizes`] | its size alone | [`crate::train::memory`]: what a step will hold |
//!
//! So the memory prediction is the step itself, run on sizes.

mod cpu;
mod side;
mod sizes;

use crate::blocks::causal_attention::ScoreErrors;
pub use crate::blocks::experts::Choice;
use crate::blocks::swiglu::Activation;
use crate::error::{Error, Result};
pub use cpu::{Cpu, CpuInputs, SavedAttention};
pub use side::Side;
pub(crate) use sizes::loss_chunk;
pub use sizes::{Buffer, SizeInputs, SizedWeight, Sizes};
use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::Range;

/// What becomes of the gradient of an input.
#[derive(Debug)]
pub enum InputGradient<M> {
    /// Nothing below is trained.
    Skip,
    /// A matrix of its own.
    Fresh,
    /// Added to this one.
    AddTo(M),
}

impl<M> InputGradient<M> {
    /// [`InputGradient::Fresh`] if `wanted`.
    pub fn fresh_if(wanted: bool) -> Self {
        if wanted { Self::Fresh } else { Self::Skip }
    }

    /// `Some(what to add to)` if the gradient is wanted.
    pub fn wanted(self) -> Option<Option<M>> {
        match self {
            Self::Skip => None,
            Self::Fresh => Some(None),
            Self::AddTo(sum) => Some(Some(sum)),
        }
    }
}

/// A weight and the factors of the update beside it: W + s B A.
#[derive(Debug)]
pub struct BesideWeight<'a, E: Ops> {
    /// W, `out x in`.
    pub weight: &'a E::Weight,
    /// A, `r x in`.
    pub a: &'a E::Matrix,
    /// B, `out x r`.
    pub b: &'a E::Matrix,
    /// s.
    pub scaling: f64,
}

/// How attention scores its keys.
#[derive(Debug, Clone, Copy)]
pub struct Scoring {
    /// Factor of Q K^T.
    pub scale: f64,
    /// c of c tanh(s / c) on the scores.
    pub cap: Option<f64>,
    /// Tokens after its own that a query sees: 0 is causal.
    pub ahead: usize,
    /// Keys up to its own that a query sees; all of them when absent.
    pub window: Option<usize>,
    /// Random errors of the scores; on the processor only.
    pub errors: Option<ScoreErrors>,
}

/// A function shown each chunk of logits (false) and of their gradient (true), which it may change.
pub type ObserveLogits<'a, E> = &'a dyn Fn(bool, &mut <E as Ops>::Matrix);

fn lacking(what: &str) -> Error {
    Error::invalid("device", what, "has no such operation: train this family on the processor")
}

/// Carries out the operations of a step.
///
/// Rows are tokens; a weight is `out x in`. A matrix that is handed over by value is reused where
/// that is possible: give back what is no longer needed by [`Ops::release`].
pub trait Ops: Clone + Debug + Sized {
    /// An activation, its gradient, a table or an adapter tensor.
    type Matrix: Clone + Debug;
    /// The gain of a norm.
    type Vector: Clone + Debug;
    /// The weight under an adapter, possibly packed.
    type Weight: Clone + Debug;
    /// Selected columns.
    type Index: Clone + Debug;
    /// Where the gradient of a trained tensor adds up.
    type Sink: Clone + Debug;
    /// One number for each row: what a norm's backward needs again.
    type RowStats: Clone + Debug;
    /// What attention's backward needs besides its output.
    type Attention: Clone + Debug;
    /// A batch: ids, positions, padding, targets.
    type Inputs: Debug;
    /// The loss of a batch.
    type Loss: Debug;
    /// Which rows each expert of a mixture sees.
    type Routing: Clone + Debug;

    /// (rows, columns).
    fn shape(x: &Self::Matrix) -> (usize, usize);
    /// (out, in).
    fn weight_shape(weight: &Self::Weight) -> (usize, usize);
    /// Whether the weight is stored packed.
    fn is_packed(_: &Self::Weight) -> bool {
        false
    }
    /// Number of selected columns.
    fn index_length(index: &Self::Index) -> usize;
    /// Numbers of a norm's row statistics.
    fn stats_length(stats: &Self::RowStats) -> usize;
    /// (name, numbers) of what attention saved.
    fn attention_elements(saved: &Self::Attention) -> [(&'static str, usize); 4];
    /// Numbers of the tables of rotary angles.
    fn angle_elements(inputs: &Self::Inputs) -> usize;

    /// A new step begins: buffers that the last one did not use are freed.
    fn next_step(&mut self) {}
    /// Takes back a matrix that is no longer needed.
    fn release(&mut self, x: Self::Matrix);
    /// Takes back what attention saved.
    fn release_attention(&mut self, saved: Self::Attention);
    /// A copy.
    fn copy(&mut self, x: &Self::Matrix) -> Self::Matrix;
    /// A matrix of zeros.
    fn zeros(&mut self, shape: (usize, usize)) -> Self::Matrix;
    /// A sink of zeros for a tensor.
    fn sink(&self, shape: (usize, usize)) -> Self::Sink;
    /// sink += factor x.
    fn accumulate(&mut self, sink: &mut Self::Sink, factor: f64, x: &Self::Matrix);

    /// The weight in memory: itself, or what is read now. [`Ops::give_back`] takes it when it is no
    /// longer needed.
    ///
    /// # Errors
    /// Those of reading.
    fn resident<'a>(&mut self, weight: &'a Self::Weight) -> Result<Cow<'a, Self::Weight>> {
        Ok(Cow::Borrowed(weight))
    }
    /// Takes back what [`Ops::resident`] gave.
    fn give_back(&mut self, _weight: Cow<'_, Self::Weight>) {}
    /// As [`Ops::embed`], from a weight.
    ///
    /// # Errors
    /// As there; those of reading.
    fn embed_from(
        &mut self,
        _inputs: &Self::Inputs,
        _table: &Self::Weight,
    ) -> Result<Self::Matrix> {
        Err(lacking("a stored embedding"))
    }
    /// As [`Ops::loss`], with a weight for the output projection, which is frozen.
    ///
    /// # Errors
    /// As there; those of reading.
    fn loss_through(
        &mut self,
        _hidden: &Self::Matrix,
        _head: &Self::Weight,
        _inputs: &Self::Inputs,
        _cap: Option<f64>,
        _wanted: bool,
        _observe: ObserveLogits<'_, Self>,
    ) -> Result<(Self::Loss, Option<Self::Matrix>)> {
        Err(lacking("a stored output projection"))
    }

    /// Rows of the table by id.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for an id outside the table.
    fn embed(&mut self, inputs: &Self::Inputs, table: &Self::Matrix) -> Result<Self::Matrix>;
    /// Rows of the table by position, from its row `offset` on.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for a position outside the table, or an engine without this
    /// operation.
    fn embed_positions(
        &mut self,
        _inputs: &Self::Inputs,
        _table: &Self::Matrix,
        _offset: usize,
    ) -> Result<Self::Matrix> {
        Err(lacking("learned positions"))
    }
    /// Adds each row of dx to the row of its position in a sink.
    ///
    /// # Errors
    /// As [`Ops::embed_positions`].
    fn embed_positions_backward(
        &mut self,
        _inputs: &Self::Inputs,
        _dx: &Self::Matrix,
        _offset: usize,
        _sink: &mut Self::Sink,
    ) -> Result<()> {
        Err(lacking("learned positions"))
    }
    /// Adds each row of dx to the row of its id in the sink of a table of some shape.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    fn embed_backward(
        &mut self,
        inputs: &Self::Inputs,
        dx: &Self::Matrix,
        sink: (&mut Self::Sink, (usize, usize)),
    ) -> Result<()>;

    /// gain o x / rms(x), row by row.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`]; [`crate::Error::InvalidParam`] unless eps is positive.
    fn rms_norm(
        &mut self,
        x: &Self::Matrix,
        gain: &Self::Vector,
        eps: f64,
    ) -> Result<(Self::Matrix, Self::RowStats)>;
    /// dx += the gradient of the input, if wanted; the gain's goes to the sink. `dy` is given up.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    fn rms_norm_backward(
        &mut self,
        dy: Self::Matrix,
        saved: (Self::Matrix, Self::RowStats),
        gain: &Self::Vector,
        sink: Option<&mut Self::Sink>,
        dx: Option<&mut Self::Matrix>,
    ) -> Result<()>;

    /// Every row less its mean.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for an engine without this operation.
    fn center(&mut self, _x: Self::Matrix) -> Result<Self::Matrix> {
        Err(lacking("layer norms"))
    }
    /// y + s row, a `1 x n` matrix, to every row of y.
    ///
    /// # Errors
    /// As [`Ops::center`].
    fn add_matrix_row(
        &mut self,
        _y: Self::Matrix,
        _row: &Self::Matrix,
        _s: f64,
    ) -> Result<Self::Matrix> {
        Err(lacking("biases of adapters"))
    }
    /// The sum of the rows, `1 x n`.
    ///
    /// # Errors
    /// As [`Ops::center`].
    fn row_sum(&mut self, _x: &Self::Matrix) -> Result<Self::Matrix> {
        Err(lacking("biases of adapters"))
    }
    /// The transpose.
    ///
    /// # Errors
    /// As [`Ops::center`].
    fn transposed(&mut self, _x: &Self::Matrix) -> Result<Self::Matrix> {
        Err(lacking("an adapter of the embedding"))
    }
    /// What a sink holds.
    ///
    /// # Errors
    /// As [`Ops::center`].
    fn sunk(&mut self, _sink: Self::Sink) -> Result<Self::Matrix> {
        Err(lacking("adapters outside the layers"))
    }
    /// Matrices of the same rows, side by side; they are given up.
    ///
    /// # Errors
    /// As [`Ops::center`].
    fn concat(&mut self, _parts: Vec<Self::Matrix>) -> Result<Self::Matrix> {
        Err(lacking("projections that are stored as one"))
    }

    /// y = x W^T, or added to a matrix.
    fn product(
        &mut self,
        x: &Self::Matrix,
        weight: &Self::Weight,
        add_to: Option<Self::Matrix>,
    ) -> Self::Matrix;
    /// dx = dy W, or added to a matrix.
    fn product_backward(
        &mut self,
        dy: &Self::Matrix,
        weight: &Self::Weight,
        add_to: Option<Self::Matrix>,
    ) -> Self::Matrix;
    /// As [`Ops::product`], with a matrix of this engine for the weight.
    fn product_with(
        &mut self,
        x: &Self::Matrix,
        weight: &Self::Matrix,
        add_to: Option<Self::Matrix>,
    ) -> Self::Matrix;
    /// As [`Ops::product_backward`], with a matrix of this engine for the weight.
    fn product_with_backward(
        &mut self,
        dy: &Self::Matrix,
        weight: &Self::Matrix,
        add_to: Option<Self::Matrix>,
    ) -> Self::Matrix;
    /// dy^T x as a matrix of its own.
    fn outer(&mut self, dy: &Self::Matrix, x: &Self::Matrix) -> Self::Matrix;
    /// sink += s `dy[:, rows]`^T x; all rows of the weight when there is no range.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    fn add_outer(
        &mut self,
        scaling: f64,
        dy: &Self::Matrix,
        rows: Option<Range<usize>>,
        x: &Self::Matrix,
        sink: &mut Self::Sink,
    ) -> Result<()>;
    /// a b of two small matrices, each transposed on request.
    fn small_product(&mut self, a: (&Self::Matrix, bool), b: (&Self::Matrix, bool))
    -> Self::Matrix;

    /// (y, z) with z = x A^T, y = x W^T + s z B^T, added to a matrix on request.
    fn low_rank(
        &mut self,
        beside: &BesideWeight<'_, Self>,
        x: &Self::Matrix,
        add_to: Option<Self::Matrix>,
    ) -> (Self::Matrix, Self::Matrix);
    /// (dy^T z, dA, dx) with dz = s dy B, dA = dz^T x and dx = dy W + dz A.
    fn low_rank_backward(
        &mut self,
        beside: &BesideWeight<'_, Self>,
        dy: &Self::Matrix,
        x: &Self::Matrix,
        z: &Self::Matrix,
        dx: InputGradient<Self::Matrix>,
    ) -> (Self::Matrix, Self::Matrix, Option<Self::Matrix>);
    /// W + s B A as a matrix.
    fn merged(&mut self, beside: &BesideWeight<'_, Self>) -> Self::Matrix;
    /// Euclidean norms of the rows, `1 x rows`.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for a row of norm zero, on an engine whose numbers can be
    /// looked at.
    fn row_norms(&mut self, x: &Self::Matrix) -> Result<Self::Matrix>;
    /// Entries of a `1 x n` matrix divided by those of another.
    fn divided(&mut self, a: &Self::Matrix, by: &Self::Matrix) -> Self::Matrix;
    /// Row j times factor j, `1 x rows`, or divided by it.
    fn scale_rows(&mut self, x: Self::Matrix, factor: &Self::Matrix, divide: bool) -> Self::Matrix;
    /// a_j . b_j, `1 x rows`.
    fn row_dots(&mut self, a: &Self::Matrix, b: &Self::Matrix) -> Self::Matrix;
    /// Row j less c_j times row j of d.
    fn subtract_rows(
        &mut self,
        x: Self::Matrix,
        c: &Self::Matrix,
        d: &Self::Matrix,
    ) -> Self::Matrix;
    /// The same numbers in another shape.
    fn reshape(&mut self, x: Self::Matrix, shape: (usize, usize)) -> Self::Matrix;
    /// s x, in place.
    fn scale(&mut self, x: Self::Matrix, s: f64) -> Self::Matrix;
    /// x + s y; y is given up.
    fn add(&mut self, x: Self::Matrix, y: Self::Matrix, s: f64) -> Self::Matrix;
    /// Adds a bias to every row.
    fn add_row(&mut self, x: Self::Matrix, row: &Self::Vector) -> Self::Matrix;
    /// sink += the sum of the rows, a bias's gradient.
    fn add_row_sums(&mut self, dx: &Self::Matrix, sink: &mut Self::Sink);
    /// 1 + w.
    fn one_plus(&mut self, w: &Self::Vector) -> Self::Vector;
    /// s x.
    fn scaled(&mut self, x: &Self::Matrix, s: f64) -> Self::Matrix;

    /// `x[:, index]`, a copy.
    fn select(&mut self, x: &Self::Matrix, index: &Self::Index) -> Self::Matrix;
    /// `x[:, range]`, a copy that does not keep x.
    fn select_range(&mut self, x: &Self::Matrix, range: Range<usize>) -> Self::Matrix;
    /// `W[:, index]`, a copy.
    fn columns(&mut self, weight: &Self::Weight, index: &Self::Index) -> Self::Matrix;
    /// `W[:, index]` = values; beside a packed weight they are kept as they are.
    fn put_columns(&mut self, weight: &mut Self::Weight, index: &Self::Index, values: Self::Matrix);
    /// A contiguous slice of rows or columns of a weight, a copy.
    fn slice(&mut self, weight: &Self::Weight, side: Side, range: Range<usize>) -> Self::Matrix;
    /// Puts a slice back.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for a packed weight.
    fn put_slice(
        &mut self,
        weight: &mut Self::Weight,
        side: Side,
        range: Range<usize>,
        values: Self::Matrix,
    ) -> Result<()>;
    /// The weight as a matrix, a copy.
    fn dense(&mut self, weight: &Self::Weight) -> Self::Matrix;
    /// The weight itself, for a method that trains it.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for a packed weight.
    fn dense_mut<'a>(
        weight: &'a mut Self::Weight,
        method: &'static str,
    ) -> Result<&'a mut Self::Matrix>;
    /// Writes values, `1 x n`, to entries (row x columns + column) of a weight.
    ///
    /// # Errors
    /// [`crate::Error::InvalidParam`] for an engine without this operation.
    fn put_entries(
        &mut self,
        _weight: &mut Self::Matrix,
        _index: &Self::Index,
        _values: &Self::Matrix,
    ) -> Result<()> {
        Err(lacking("writes of single entries"))
    }
    /// A gain as a `1 x D` matrix, a copy.
    fn row(&mut self, vector: &Self::Vector) -> Self::Matrix;
    /// Puts a `1 x D` matrix into a gain.
    fn put_row(&mut self, vector: &mut Self::Vector, row: Self::Matrix);

    /// Rotates every head of every row by its position's angles of one kind, or back.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    fn rotate(
        &mut self,
        x: Self::Matrix,
        inputs: &Self::Inputs,
        kind: usize,
        back: bool,
    ) -> Result<Self::Matrix>;
    /// softmax(scale Q K^T + mask) V for every sequence and head.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    fn attention(
        &mut self,
        query: Self::Matrix,
        key: Self::Matrix,
        value: Self::Matrix,
        inputs: &Self::Inputs,
        scoring: &Scoring,
    ) -> Result<(Self::Matrix, Self::Attention)>;
    /// Gradients of query, key and value; `output` is the forward's.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    fn attention_backward(
        &mut self,
        doutput: Self::Matrix,
        saved: Self::Attention,
        output: Self::Matrix,
        inputs: &Self::Inputs,
        scoring: &Scoring,
    ) -> Result<[Self::Matrix; 3]>;

    /// Adds one more entry to each head's softmax.
    ///
    /// # Errors
    /// As [`Ops::center`]; [`crate::Error::ShapeMismatch`].
    fn add_sinks(
        &mut self,
        _attended: (Self::Matrix, Self::Attention),
        _sinks: &Self::Vector,
        _inputs: &Self::Inputs,
    ) -> Result<(Self::Matrix, Self::Attention)> {
        Err(lacking("attention sinks"))
    }
    /// The gradient of those entries, added to their sink.
    ///
    /// # Errors
    /// As [`Ops::add_sinks`].
    fn sinks_backward(
        &mut self,
        _doutput: &Self::Matrix,
        _attended: (&Self::Matrix, &Self::Attention),
        _sinks: &Self::Vector,
        _inputs: &Self::Inputs,
        _sink: &mut Self::Sink,
    ) -> Result<()> {
        Err(lacking("attention sinks"))
    }

    /// act(x).
    ///
    /// # Errors
    /// As [`Ops::center`].
    fn activated(&mut self, _activation: Activation, _x: &Self::Matrix) -> Result<Self::Matrix> {
        Err(lacking("an MLP without gate"))
    }
    /// dx from da; x is given up.
    ///
    /// # Errors
    /// As [`Ops::activated`].
    fn activated_backward(
        &mut self,
        _activation: Activation,
        _da: &Self::Matrix,
        _x: Self::Matrix,
    ) -> Result<Self::Matrix> {
        Err(lacking("an MLP without gate"))
    }

    /// Chooses the experts of each row by their scores, `N x E`; those are given up.
    ///
    /// # Errors
    /// As [`Ops::center`].
    fn route(&mut self, _scores: Self::Matrix, _choice: Choice) -> Result<Self::Routing> {
        Err(lacking("experts"))
    }
    /// Gradient of the scores from those of each expert's weights, `1 x rows` each.
    ///
    /// # Errors
    /// As [`Ops::route`].
    fn route_backward(
        &mut self,
        _routing: &Self::Routing,
        _dweights: Vec<Self::Matrix>,
    ) -> Result<Self::Matrix> {
        Err(lacking("experts"))
    }
    /// Numbers that a routing holds for backward.
    fn routing_elements(_: &Self::Routing) -> usize {
        0
    }
    /// Weights of an expert's rows, `1 x rows`.
    ///
    /// # Errors
    /// As [`Ops::route`].
    fn routing_weights(
        &mut self,
        _routing: &Self::Routing,
        _expert: usize,
    ) -> Result<Self::Matrix> {
        Err(lacking("experts"))
    }
    /// The rows of x that an expert sees.
    ///
    /// # Errors
    /// As [`Ops::route`].
    fn dispatch(
        &mut self,
        _x: &Self::Matrix,
        _routing: &Self::Routing,
        _expert: usize,
    ) -> Result<Self::Matrix> {
        Err(lacking("experts"))
    }
    /// Adds an expert's rows to those of a sum; y is given up.
    ///
    /// # Errors
    /// As [`Ops::route`].
    fn combine(
        &mut self,
        _sum: Self::Matrix,
        _y: Self::Matrix,
        _routing: &Self::Routing,
        _expert: usize,
    ) -> Result<Self::Matrix> {
        Err(lacking("experts"))
    }

    /// act(gate) o up.
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    fn gated(
        &mut self,
        activation: Activation,
        gate: &Self::Matrix,
        up: &Self::Matrix,
    ) -> Result<Self::Matrix>;
    /// (dgate, dup).
    ///
    /// # Errors
    /// [`crate::Error::ShapeMismatch`].
    fn gated_backward(
        &mut self,
        activation: Activation,
        da: &Self::Matrix,
        gate: Self::Matrix,
        up: Self::Matrix,
    ) -> Result<(Self::Matrix, Self::Matrix)>;

    /// The loss of the inputs' targets with logits hidden W^T, capped on request, the gradient of
    /// the hidden rows if `wanted`, and that of W added to the sink. Logits exist for a chunk of
    /// positions at a time.
    ///
    /// # Errors
    /// [`crate::Error::NonFinite`] for a loss that is NaN or infinite, on an engine whose numbers
    /// can be looked at.
    fn loss(
        &mut self,
        hidden: &Self::Matrix,
        head: &Self::Matrix,
        inputs: &Self::Inputs,
        sink: Option<&mut Self::Sink>,
        cap: Option<f64>,
        wanted: bool,
        observe: ObserveLogits<'_, Self>,
    ) -> Result<(Self::Loss, Option<Self::Matrix>)>;
}
