//! Rows of Phi and Psi on the device.
//!
//! Monomials are made there: one gather and one product for each degree, from the rows of Q and K
//! that are there already. Every other map is asked for its rows on the processor, chunk by chunk
//! on all cores, and they are sent.

use super::{Block, Chunks};
use crate::attention::factorization::FeatureMap;
use crate::attention::factorization::monomials::MonomialMap;
use crate::error::Result;
use crate::gpu::attention::head::{Counted, Matrix, rows_of};
use crate::gpu::{Engine, Opened};
use crate::linalg::Real;
use burn::tensor::{Int, Tensor, TensorData};
use ndarray::{Array2, ArrayView1, ArrayView2, Axis, parallel::prelude::*, s};

/// Rows that one core makes at a time.
const ROWS: usize = 256;

/// The features of one head.
pub(super) struct Features<'a, B: Engine, T> {
    on: &'a Opened<B>,
    map: &'a dyn FeatureMap<T>,
    query: ArrayView2<'a, T>,
    key: ArrayView2<'a, T>,
    monomials: Option<Monomials<B>>,
}

impl<'a, B: Engine, T: Real> Features<'a, B, T> {
    /// # Errors
    /// [`crate::Error::TooLarge`].
    pub fn new(
        on: &'a Opened<B>,
        map: &'a dyn FeatureMap<T>,
        query: ArrayView2<'a, T>,
        key: ArrayView2<'a, T>,
    ) -> Result<Self> {
        let monomials = map.monomials().map(|m| Monomials::new(on, m, query, key)).transpose()?;
        Ok(Self { on, map, query, key, monomials })
    }

    /// Number of columns k.
    pub fn rank(&self) -> usize {
        self.map.rank()
    }

    /// Rows of Phi.
    ///
    /// # Errors
    /// [`crate::Error::TooLarge`].
    pub fn queries(&self, block: Block, count: &mut Counted) -> Result<Chunks<B>> {
        let rows = block.range();
        self.map.count_query_features(rows.len(), &mut count.cost);
        count.cost.elementwise += 2 * (rows.len() * self.rank()) as u64;
        let made = match &self.monomials {
            Some(m) => m.rows(rows_of(&m.query, rows)) * m.weights.clone(),
            None => self.made(self.query, block, |first, rows, out| {
                self.map.query_features(first, rows, out)
            })?,
        };
        Ok(made.reshape([block.chunks, block.rows, self.rank()]))
    }

    /// Rows of Psi.
    ///
    /// # Errors
    /// [`crate::Error::TooLarge`].
    pub fn keys(&self, block: Block, count: &mut Counted) -> Result<Chunks<B>> {
        let rows = block.range();
        self.map.count_key_features(rows.len(), &mut count.cost);
        count.cost.elementwise += (rows.len() * self.rank()) as u64;
        let made = match &self.monomials {
            Some(m) => {
                let made = m.rows(rows_of(&m.key, rows.clone()));
                match &m.column_factor {
                    Some(factor) => made * rows_of(factor, rows),
                    None => made,
                }
            }
            None => self.made(self.key, block, |first, rows, out| {
                self.map.key_features(first, rows, out)
            })?,
        };
        Ok(made.reshape([block.chunks, block.rows, self.rank()]))
    }

    /// Rows made on the processor, `rows x k`.
    fn made(
        &self,
        of: ArrayView2<T>,
        block: Block,
        make: impl Fn(usize, ArrayView2<T>, ndarray::ArrayViewMut2<T>) + Sync,
    ) -> Result<Matrix<B>> {
        let range = block.range();
        let mut out = Array2::<f32>::zeros((range.len(), self.rank()));
        out.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter().enumerate().for_each(
            |(index, mut part)| {
                let first = range.start + index * ROWS;
                let mut features = Array2::<T>::zeros((part.ncols(), part.nrows()));
                make(first, of.slice(s![first..first + part.nrows(), ..]), features.view_mut());
                part.zip_mut_with(&features.t(), |to, from| *to = from.widen() as f32);
            },
        );
        self.on.upload("the features", out.view())
    }
}

/// What monomials are made of, on the device.
struct Monomials<B: Engine> {
    /// Centered and scaled Q and K.
    query: Matrix<B>,
    key: Matrix<B>,
    /// For each degree from 1 on: the place of each monomial's parent among those of one degree
    /// less, and the variable that it is multiplied with.
    degrees: Vec<(Tensor<B, 1, Int>, Tensor<B, 1, Int>)>,
    /// `1 x k`.
    weights: Matrix<B>,
    /// `L_k x 1`.
    column_factor: Option<Matrix<B>>,
}

impl<B: Engine> Monomials<B> {
    fn new<T: Real>(
        on: &Opened<B>,
        map: &MonomialMap<T>,
        query: ArrayView2<T>,
        key: ArrayView2<T>,
    ) -> Result<Self> {
        let indices = |of: &[u32]| {
            let numbers: Vec<i32> = of.iter().map(|&i| i as i32).collect();
            Tensor::from_data(TensorData::new(numbers, [of.len()]), &on.device)
        };
        let weights = ArrayView1::from(map.weights()).insert_axis(Axis(0));
        Ok(Self {
            query: on.upload("Q", map.scaled_query(query).view())?,
            key: on.upload("K", map.scaled_key(key).view())?,
            degrees: map
                .by_degree()
                .iter()
                .map(|(parents, variables)| (indices(parents), indices(variables)))
                .collect(),
            weights: on.upload("the weights of the monomials", weights)?,
            column_factor: match map.column_factor() {
                Some(factor) => Some(on.upload("the column factors", super::column(factor))?),
                None => None,
            },
        })
    }

    /// Every monomial of the rows, unweighted.
    fn rows(&self, x: Matrix<B>) -> Matrix<B> {
        let mut all: Vec<Matrix<B>> = vec![Tensor::ones([x.dims()[0], 1], &x.device())];
        for (parents, variables) in &self.degrees {
            let Some(last) = all.last() else { break };
            all.push(
                last.clone().select(1, parents.clone()) * x.clone().select(1, variables.clone()),
            );
        }
        if all.len() == 1 { all.remove(0) } else { Tensor::cat(all, 1) }
    }
}
