//! A projection and a low-rank update beside it, in one pass over the rows.
//!
//! The update's products are narrow: each reads or writes a whole activation for r multiply-adds an
//! entry, so their time is that of moving activations. Here the projection and the update of a
//! block of rows follow each other while the block is in the cache.

use crate::cost::Cost;
use crate::linalg::Real;
use crate::linalg::gemm::multiply;
use crate::linalg::tile::{Padded, add_transposed_times_tile, tile_times};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

/// Where the gradient of an input goes: dx = beta dx + gradient.
pub(crate) struct InputSink<'a, 'v, T> {
    /// `N x in`.
    pub dx: &'a mut ArrayViewMut2<'v, T>,
    /// Zero overwrites, one accumulates.
    pub beta: T,
}

/// s B A beside a weight W: y = x W^T + s (x A^T) B^T.
pub(crate) struct LowRank<'a, T> {
    /// W, `out x in`.
    pub weight: ArrayView2<'a, T>,
    /// A, `r x in`.
    pub a: ArrayView2<'a, T>,
    /// B, `out x r`.
    pub b: ArrayView2<'a, T>,
    /// s.
    pub scaling: T,
}

/// Rows whose part of a weight's gradient is summed at a time; fixed, so that the sum does not
/// depend on the threads.
const GROUP: usize = 256;

/// Rows of one task, of `rows` on rayon's threads: several tasks a thread even out other load, but
/// each packs W again.
fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(16).max(128)
}

impl<'a, T: Real> LowRank<'a, T> {
    /// s B A beside W.
    pub fn of(weight: ArrayView2<'a, T>, a: &'a Array2<T>, b: &'a Array2<T>, scaling: f64) -> Self {
        Self { weight, a: a.view(), b: b.view(), scaling: T::of(scaling) }
    }

    /// y = beta y + x W^T + s z B^T; returns z = x A^T.
    ///
    /// Shapes: x `N x in`, y `N x out`, z `N x r`.
    pub fn forward(
        &self,
        x: ArrayView2<T>,
        beta: T,
        y: &mut ArrayViewMut2<T>,
        cost: &mut Cost,
    ) -> Array2<T> {
        if !y.is_standard_layout() {
            let mut copy = y.to_owned();
            let z = self.forward(x, beta, &mut copy.view_mut(), cost);
            y.assign(&copy);
            return z;
        }
        let x = x.as_standard_layout();
        let (rank, width) = self.a.dim();
        let out = self.b.nrows();
        let (down, up) =
            (Padded::new(self.a.t()), Padded::new((&self.b.t() * self.scaling).view()));
        let mut z = Array2::zeros((x.nrows(), rank));
        let rows = rows_per_task(x.nrows());
        let tasks = y.axis_chunks_iter_mut(Axis(0), rows).zip(x.axis_chunks_iter(Axis(0), rows));
        let tasks: Vec<_> = tasks.zip(z.axis_chunks_iter_mut(Axis(0), rows)).collect();
        let costs = tasks.into_par_iter().map(|((mut y, x), mut z)| {
            let mut cost = Cost::default();
            cost.product(x.nrows(), width, out);
            multiply(T::one(), &x, &self.weight.t(), beta, &mut y);
            tile_times(x, &down, 0..width, false, z.view_mut(), &mut cost);
            tile_times(z.view(), &up, 0..rank, true, y, &mut cost);
            cost
        });
        costs.collect::<Vec<_>>().iter().for_each(|task| cost.add_operations(task));
        z
    }

    /// (dy^T z, dA) and dx = beta dx + dy W + dz A, with dz = s dy B and dA = dz^T x.
    ///
    /// Shapes: dy `N x out`, x `N x in`, z `N x r`; dy^T z `out x r`, dA `r x in`.
    pub fn backward(
        &self,
        dy: ArrayView2<T>,
        x: ArrayView2<T>,
        z: ArrayView2<T>,
        dx: Option<InputSink<'_, '_, T>>,
        cost: &mut Cost,
    ) -> (Array2<T>, Array2<T>) {
        let dx = match dx {
            Some(InputSink { dx, beta }) if !dx.is_standard_layout() => {
                let mut copy = dx.to_owned();
                let sink = InputSink { dx: &mut copy.view_mut(), beta };
                let gradients = self.backward(dy, x, z, Some(sink), cost);
                dx.assign(&copy);
                return gradients;
            }
            dx => dx,
        };
        let (dy, x, z) = (dy.as_standard_layout(), x.as_standard_layout(), z.as_standard_layout());
        let (rank, width) = self.a.dim();
        let out = self.b.nrows();
        let (down, up) = (Padded::new(self.a), Padded::new((&self.b * self.scaling).view()));
        let mut dz = Array2::zeros((x.nrows(), rank));
        let rows = rows_per_task(x.nrows()).next_multiple_of(GROUP);
        let (mut dx, beta) = dx.map(|sink| (sink.dx.view_mut(), sink.beta)).unzip();
        let mut dx = dx.as_mut().map(|dx| dx.axis_chunks_iter_mut(Axis(0), rows));
        let tasks = dy.axis_chunks_iter(Axis(0), rows).zip(x.axis_chunks_iter(Axis(0), rows));
        let tasks = tasks
            .zip(z.axis_chunks_iter(Axis(0), rows))
            .zip(dz.axis_chunks_iter_mut(Axis(0), rows));
        let tasks: Vec<_> =
            tasks.map(|task| (task, dx.as_mut().and_then(|dx| dx.next()))).collect();
        let parts = tasks.into_par_iter().map(|((((dy, x), z), mut dz), dx)| {
            let mut cost = Cost::default();
            tile_times(dy, &up, 0..out, false, dz.view_mut(), &mut cost);
            let groups = (0..x.nrows()).step_by(GROUP).map(|first| {
                let rows = s![first..x.nrows().min(first + GROUP), ..];
                let (mut up, mut down) = (Array2::zeros((rank, out)), Array2::zeros((rank, width)));
                add_transposed_times_tile(z.slice(rows), dy.slice(rows), up.view_mut(), &mut cost);
                add_transposed_times_tile(
                    dz.slice(rows),
                    x.slice(rows),
                    down.view_mut(),
                    &mut cost,
                );
                (up, down)
            });
            let groups: Vec<_> = groups.collect();
            if let (Some(mut dx), Some(beta)) = (dx, beta) {
                cost.product(dy.nrows(), out, width);
                multiply(T::one(), &dy, &self.weight, beta, &mut dx);
                tile_times(dz.view(), &down, 0..rank, true, dx, &mut cost);
            }
            (groups, cost)
        });
        let parts: Vec<_> = parts.collect();
        let (mut up, mut down) = (Array2::zeros((rank, out)), Array2::zeros((rank, width)));
        for (groups, task) in &parts {
            cost.add_operations(task);
            for (u, d) in groups {
                up += u;
                down += d;
            }
        }
        (up.reversed_axes(), down)
    }
}
