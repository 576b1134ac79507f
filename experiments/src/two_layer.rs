//! Fine-tuning of a two-layer linear model in closed form: what each method reaches, and what it
//! forgets.
//!
//! The model of \[S2FT\]'s theory (its section on generalization), derived in
//! `paper-notes/fine-tuning.md`:
//!
//! ```text
//! f(x) = W2 W1 x                      W1: h x d,  W2: p x h
//! in-distribution    y = B_i x,  E[x x^T] = S_i          out of distribution    y = B_o x,  E[x x^T] = S_o
//! risk(B; C, S) = ||(C - B) S^(1/2)||_F^2               of the model B = W2 W1 + D on the task C
//! D = L M R,    M free, of rank at most r               min over M of risk(W2 W1 + D; B_i, S_i)
//! ```
//!
//! | method | L | R | rank |
//! |---|---|---|---|
//! | rows I of W1 (S2FT on up) | W2[:, I] | 1 | free |
//! | columns I of W2 (S2FT on down, PaCA) | 1 | W1[I, :] | free |
//! | LoRA on W1, on W2 | W2; 1 | 1; W1 | r |
//! | full W1, full W2 | W2; 1 | 1; W1 | free |
//!
//! With thin bases Q_L of the columns of L and Q_R of the rows of R S_i^(1/2), and E = (B_i - W2
//! W1) S_i^(1/2), the risk is ||E - Q_L K Q_R^T||^2 for a free K, so K is the best approximation of
//! rank r of Q_L^T E Q_R (Eckart-Young), and D follows from D S_i^(1/2) = Q_L K Q_R^T.
//!
//! ```
//! use ndarray::array;
//! use peft_limits_experiments::two_layer::{Task, TwoLayer, Update};
//! // One hidden unit of two is trained: the part of the shift in its direction is fitted, the rest stays.
//! let model = TwoLayer { first: array![[1.0, 0.0], [0.0, 1.0]], second: array![[1.0, 0.0], [0.0, 1.0]] };
//! let task = Task { target: array![[3.0, 0.0], [0.0, 4.0]], second_moment: array![[1.0, 0.0], [0.0, 1.0]] };
//! let tuned = model.fine_tune(&task, &Update::FirstRows(vec![0]))?;
//! assert!((task.risk(&model.product())? - 13.0).abs() < 1e-12);
//! assert!((task.risk(&tuned)? - 9.0).abs() < 1e-12);
//! # Ok::<(), peft_limits::Error>(())
//! ```

use ndarray::{Array1, Array2, Axis, s};
use peft_limits::adapters::paca::check_index;
use peft_limits::error::{Error, Result};
use peft_limits::linalg::decompositions::{Svd, svd};
use peft_limits::linalg::norms::require_finite;
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

/// Directions below this share of the largest singular value count as absent.
const CUT: f64 = 1e-12;

/// The pretrained model.
#[derive(Debug, Clone, PartialEq)]
pub struct TwoLayer {
    /// W1, h x d.
    pub first: Array2<f64>,
    /// W2, p x h.
    pub second: Array2<f64>,
}

/// A regression (noise of y adds a constant to every risk, and error to what is fitted to a
/// sample).
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// B, p x d: y = B x.
    pub target: Array2<f64>,
    /// E\[x x^T\], d x d, symmetric and positive semidefinite.
    pub second_moment: Array2<f64>,
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// Rows of W1, by hidden unit: S2FT on the output side.
    FirstRows(Vec<usize>),
    /// Columns of W2, by hidden unit: S2FT on the input side, PaCA.
    SecondColumns(Vec<usize>),
    /// W1 + B A of this rank.
    FirstLowRank(usize),
    /// W2 + B A of this rank.
    SecondLowRank(usize),
    /// All of W1.
    FirstFull,
    /// All of W2.
    SecondFull,
}

impl Update {
    /// Trained numbers in a model of these sizes.
    pub fn trained(&self, model: &TwoLayer) -> usize {
        let ((h, d), p) = (model.first.dim(), model.second.nrows());
        match self {
            Self::FirstRows(units) => units.len() * d,
            Self::SecondColumns(units) => units.len() * p,
            Self::FirstLowRank(r) => r * (h + d),
            Self::SecondLowRank(r) => r * (p + h),
            Self::FirstFull => h * d,
            Self::SecondFull => p * h,
        }
    }
}

impl Task {
    /// ||(target - product) S^(1/2)||_F^2 = trace of (target - product) S (target - product)^T.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`].
    pub fn risk(&self, product: &Array2<f64>) -> Result<f64> {
        expect("target", self.target.dim(), product.dim())?;
        expect("second_moment", self.second_moment.dim(), (product.ncols(), product.ncols()))?;
        let gap = &self.target - product;
        Ok((&gap.dot(&self.second_moment) * &gap).sum())
    }

    /// The task that n samples with Gaussian inputs and noise of deviation sigma stand for: fitting
    /// it is fitting them.
    ///
    /// With X (d x n) and Y = B X + sigma Z, ||Y - C X||^2 / n is the risk of C on the
    /// least-squares map Y X^T (X X^T)^-1 under X X^T / n, plus what no C changes.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for n <= d + 1 or a negative sigma; as [`svd`].
    pub fn sampled(&self, n: usize, sigma: f64, rng: &mut impl Rng) -> Result<Self> {
        let (p, d) = self.target.dim();
        expect("second_moment", self.second_moment.dim(), (d, d))?;
        if n <= d + 1 {
            return Err(Error::invalid("samples", n, format!("must be above {}", d + 1)));
        }
        if !(sigma >= 0.0) {
            return Err(Error::invalid("noise", sigma, "must not be negative"));
        }
        let mut normal = |rows: usize, columns: usize| -> Array2<f64> {
            Array2::from_shape_simple_fn((rows, columns), || StandardNormal.sample(rng))
        };
        let inputs = square_root(&self.second_moment)?.dot(&normal(d, n));
        let noise = normal(p, n) * sigma;
        // noise X^T (X X^T)^-1 = noise V diag(1/s) U^T.
        let range = Range::of(&inputs)?;
        let scaled = &noise.dot(&range.domain) / &range.values.view().insert_axis(Axis(0));
        let target = &self.target + &scaled.dot(&range.basis.t());
        Ok(Self { target, second_moment: inputs.dot(&inputs.t()) / n as f64 })
    }
}

impl TwoLayer {
    /// W2 W1, p x d.
    pub fn product(&self) -> Array2<f64> {
        self.second.dot(&self.first)
    }

    /// W2 W1 after fine-tuning to the optimum on `task` (the solution of least norm where there are
    /// many).
    ///
    /// Cost: three SVDs of the model's sizes.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; [`Error::InvalidParam`] for hidden units out of range or repeated,
    /// none, or rank 0; [`Error::NonFinite`].
    pub fn fine_tune(&self, task: &Task, update: &Update) -> Result<Array2<f64>> {
        let ((h, d), (p, inner)) = (self.first.dim(), self.second.dim());
        expect("second", (p, inner), (p, h))?;
        expect("target", task.target.dim(), (p, d))?;
        expect("second_moment", task.second_moment.dim(), (d, d))?;
        if let Update::FirstRows(units) | Update::SecondColumns(units) = update {
            check_index(units, h)?;
            if units.is_empty() {
                return Err(Error::invalid("units", "none", "must name at least one hidden unit"));
            }
        }
        for (name, matrix) in
            [("first", &self.first), ("second", &self.second), ("target", &task.target)]
        {
            require_finite("two_layer", name, &matrix.view())?;
        }
        let (left, right, rank) = match update {
            Update::FirstRows(units) => {
                (Some(self.second.select(Axis(1), units)), None, usize::MAX)
            }
            Update::SecondColumns(units) => {
                (None, Some(self.first.select(Axis(0), units)), usize::MAX)
            }
            Update::FirstLowRank(r) => (Some(self.second.clone()), None, *r),
            Update::SecondLowRank(r) => (None, Some(self.first.clone()), *r),
            Update::FirstFull => (Some(self.second.clone()), None, usize::MAX),
            Update::SecondFull => (None, Some(self.first.clone()), usize::MAX),
        };
        if rank == 0 {
            return Err(Error::invalid("rank", 0, "must be at least 1"));
        }
        let root = square_root(&task.second_moment)?;
        let before = self.product();
        let error = (&task.target - &before).dot(&root);
        let left = match &left {
            Some(left) => Range::of(left)?.basis,
            None => Array2::eye(p),
        };
        let right = right.unwrap_or_else(|| Array2::eye(d));
        // Z = R S^(1/2) = U diag(s) Q_R^T, so that D = Q_L K diag(1/s) U^T R.
        let z = Range::of(&right.dot(&root).reversed_axes())?;
        let inner = left.t().dot(&error).dot(&z.basis);
        let kept = best_of_rank(&inner, rank)?;
        let scaled = &kept / &z.values.view().insert_axis(Axis(0));
        Ok(before + left.dot(&scaled).dot(&z.domain.t()).dot(&right))
    }
}

/// The range of a matrix: A = basis diag(values) domain^T with the absent directions dropped.
pub(crate) struct Range {
    /// Orthonormal columns.
    pub(crate) basis: Array2<f64>,
    values: Array1<f64>,
    domain: Array2<f64>,
}

impl Range {
    pub(crate) fn of(a: &Array2<f64>) -> Result<Self> {
        let Svd { u, s, vt } = svd(a.view())?;
        let largest = s.iter().copied().fold(0.0, f64::max);
        let kept = s.iter().filter(|&&x| x > CUT * largest).count();
        Ok(Self {
            basis: u.slice(s![.., ..kept]).to_owned(),
            values: s.slice(s![..kept]).to_owned(),
            domain: vt.slice(s![..kept, ..]).reversed_axes().to_owned(),
        })
    }
}

/// The nearest matrix of rank at most r (Eckart-Young).
fn best_of_rank(a: &Array2<f64>, rank: usize) -> Result<Array2<f64>> {
    if rank >= a.nrows().min(a.ncols()) {
        return Ok(a.clone());
    }
    let Svd { u, s, vt } = svd(a.view())?;
    let left = &u.slice(s![.., ..rank]) * &s.slice(s![..rank]).insert_axis(Axis(0));
    Ok(left.dot(&vt.slice(s![..rank, ..])))
}

/// The symmetric square root of a positive semidefinite matrix, whose SVD is its spectral
/// decomposition.
fn square_root(a: &Array2<f64>) -> Result<Array2<f64>> {
    let scale = a.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    if a.iter().zip(a.t()).any(|(x, y)| !((x - y).abs() <= 1e-9 * scale)) {
        return Err(Error::invalid(
            "second_moment",
            "not symmetric",
            "must be symmetric and finite",
        ));
    }
    let Svd { u, s, vt } = svd(a.view())?;
    // A negative eigenvalue has left and right singular vectors of opposite signs.
    let negative = (0..s.len()).any(|i| s[i] > 1e-9 * scale && u.column(i).dot(&vt.row(i)) < 0.0);
    if negative {
        return Err(Error::invalid(
            "second_moment",
            "has a negative eigenvalue",
            "must be positive semidefinite",
        ));
    }
    Ok((&u * &s.mapv(f64::sqrt).insert_axis(Axis(0))).dot(&u.t()))
}

fn expect(arg: &str, got: (usize, usize), expected: (usize, usize)) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let (expected, got) = (format!("{expected:?}"), format!("{got:?}"));
    Err(Error::ShapeMismatch { op: "two_layer", arg: arg.into(), expected, got })
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_limits::streams::generator;
    use rand::Rng;
    use rand_distr::{Distribution, StandardNormal};

    fn normal(shape: (usize, usize), rng: &mut impl Rng) -> Array2<f64> {
        Array2::from_shape_simple_fn(shape, || StandardNormal.sample(rng))
    }

    /// d = 4, h = 6, p = 5.
    fn case(seed: u64) -> (TwoLayer, Task) {
        let mut rng = generator(seed, "two_layer/test", 0);
        let model = TwoLayer { first: normal((6, 4), &mut rng), second: normal((5, 6), &mut rng) };
        let x = normal((4, 9), &mut rng);
        let target = normal((5, 4), &mut rng);
        (model, Task { target, second_moment: x.dot(&x.t()) / 9.0 })
    }

    /// The layers themselves after gradient descent on what is trained, with a step found by
    /// halving.
    fn descend(model: &TwoLayer, task: &Task, update: &Update, seed: u64) -> f64 {
        let mut rng = generator(seed, "two_layer/init", 0);
        let (h, d) = model.first.dim();
        let p = model.second.nrows();
        let low_rank = |r: usize, shape: (usize, usize), rng: &mut _| {
            (normal((shape.0, r), rng) * 0.3, normal((r, shape.1), rng) * 0.3)
        };
        let mask = |units: &[usize]| {
            Array1::from_iter((0..h).map(|i| f64::from(u8::from(units.contains(&i)))))
        };
        // Two factors a, b and the layer they make; the second factor is unused without a low rank.
        let (mut a, mut b) = match update {
            Update::FirstLowRank(r) => low_rank(*r, (h, d), &mut rng),
            Update::SecondLowRank(r) => low_rank(*r, (p, h), &mut rng),
            Update::FirstRows(_) | Update::FirstFull => {
                (Array2::zeros((h, d)), Array2::zeros((0, 0)))
            }
            Update::SecondColumns(_) | Update::SecondFull => {
                (Array2::zeros((p, h)), Array2::zeros((0, 0)))
            }
        };
        let product = |a: &Array2<f64>, b: &Array2<f64>| match update {
            Update::FirstLowRank(_) => model.second.dot(&(&model.first + &a.dot(b))),
            Update::SecondLowRank(_) => (&model.second + &a.dot(b)).dot(&model.first),
            Update::FirstRows(_) | Update::FirstFull => model.second.dot(&(&model.first + a)),
            Update::SecondColumns(_) | Update::SecondFull => (&model.second + a).dot(&model.first),
        };
        let mut risk = task.risk(&product(&a, &b)).unwrap();
        let mut step = 1e-2;
        for _ in 0..20_000 {
            // d risk / d product.
            let g = (&product(&a, &b) - &task.target).dot(&task.second_moment) * 2.0;
            let first = model.second.t().dot(&g);
            let second = g.dot(&model.first.t());
            let (da, db) = match update {
                Update::FirstLowRank(_) => (first.dot(&b.t()), a.t().dot(&first)),
                Update::SecondLowRank(_) => (second.dot(&b.t()), a.t().dot(&second)),
                Update::FirstRows(units) => (&first * &mask(units).insert_axis(Axis(1)), b.clone()),
                Update::SecondColumns(units) => (&second * &mask(units), b.clone()),
                Update::FirstFull => (first, b.clone()),
                Update::SecondFull => (second, b.clone()),
            };
            if da.iter().chain(&db).map(|x| x * x).sum::<f64>() < 1e-16 * risk {
                break;
            }
            loop {
                let (na, nb) =
                    (&a - &(&da * step), if b.is_empty() { b.clone() } else { &b - &(&db * step) });
                let next = task.risk(&product(&na, &nb)).unwrap();
                if next <= risk || step < 1e-12 {
                    (a, b, risk) = (na, nb, next);
                    step *= 1.5;
                    break;
                }
                step *= 0.5;
            }
        }
        risk
    }

    /// Gradient descent on the layers reaches the closed form, and no start gets below it.
    #[test]
    fn closed_forms_are_the_numerical_optima() {
        let updates = [
            Update::FirstRows(vec![4, 1]),
            Update::SecondColumns(vec![0, 3, 5]),
            Update::FirstLowRank(2),
            Update::SecondLowRank(1),
            Update::SecondLowRank(3),
            Update::FirstFull,
            Update::SecondFull,
        ];
        for seed in 0..2 {
            let (model, task) = case(seed);
            let scale = task.risk(&model.product()).unwrap();
            for update in &updates {
                let closed = task.risk(&model.fine_tune(&task, update).unwrap()).unwrap();
                let found =
                    (0..2).map(|s| descend(&model, &task, update, s)).fold(f64::INFINITY, f64::min);
                // No start may get below; descent stops a little above.
                assert!(
                    found >= closed - 1e-12 * scale,
                    "{update:?}: {found} found below {closed}"
                );
                assert!(
                    found - closed < 1e-6 * scale,
                    "{update:?}: {found} found, {closed} in closed form"
                );
            }
        }
    }

    /// If the shift has rank at most r, LoRA fits the task exactly and its risk elsewhere is the
    /// distance of the tasks; rows I of W1 move the model by the projection of the shift on the
    /// columns I of W2, whatever S_i.
    #[test]
    fn the_two_statements_of_the_theory() {
        let (model, mut task) = case(7);
        let mut rng = generator(7, "two_layer/shift", 0);
        let shift = normal((5, 2), &mut rng).dot(&normal((2, 4), &mut rng));
        task.target = model.product() + &shift;
        let other = Task { target: model.product(), second_moment: Array2::eye(4) };
        let lora = model.fine_tune(&task, &Update::FirstLowRank(2)).unwrap();
        assert!(task.risk(&lora).unwrap() < 1e-18);
        assert!((other.risk(&lora).unwrap() - other.risk(&task.target).unwrap()).abs() < 1e-10);

        let units = vec![2, 5];
        let tuned = model.fine_tune(&task, &Update::FirstRows(units.clone())).unwrap();
        let q = Range::of(&model.second.select(Axis(1), &units)).unwrap().basis;
        let want = model.product() + q.dot(&q.t()).dot(&shift);
        assert!((&tuned - &want).iter().all(|x| x.abs() < 1e-10));
    }

    #[test]
    fn more_is_never_worse_and_everything_is_full() {
        let (model, task) = case(1);
        let risk = |u: Update| task.risk(&model.fine_tune(&task, &u).unwrap()).unwrap();
        for n in 1..6 {
            let units = |n: usize| (0..n).collect::<Vec<_>>();
            assert!(
                risk(Update::FirstRows(units(n + 1))) <= risk(Update::FirstRows(units(n))) + 1e-12
            );
            assert!(
                risk(Update::SecondColumns(units(n + 1)))
                    <= risk(Update::SecondColumns(units(n))) + 1e-12
            );
            assert!(risk(Update::FirstLowRank(n + 1)) <= risk(Update::FirstLowRank(n)) + 1e-12);
        }
        let full = risk(Update::SecondFull);
        assert!((risk(Update::SecondColumns((0..6).collect())) - full).abs() < 1e-10);
        assert!((risk(Update::SecondLowRank(5)) - full).abs() < 1e-10);
        assert_eq!(Update::SecondLowRank(2).trained(&model), 22);
        assert_eq!(Update::FirstRows(vec![1, 2]).trained(&model), 8);
    }

    /// Mean over samples of a slice's risk elsewhere, against the closed form of
    /// `generalization::linear`.
    #[test]
    fn noise_costs_a_slice_its_degrees_of_freedom() {
        let (model, task) = case(5);
        let (n, sigma, units) = (12, 0.7, vec![1, 4]);
        let other = Task { target: case(6).1.target, ..task.clone() };
        let q = Range::of(&model.second.select(Axis(1), &units)).unwrap().basis;
        let inside = |m: &Array2<f64>| q.dot(&q.t()).dot(m);
        let energy = |m: &Array2<f64>| (&m.dot(&task.second_moment) * m).sum();
        let (from_base, apart) = (&other.target - &model.product(), &other.target - &task.target);
        let want = energy(&(&from_base - &inside(&from_base)))
            + energy(&inside(&apart))
            + sigma * sigma * (2 * 4) as f64 / (n - 4 - 1) as f64;
        let mut rng = generator(1, "two_layer/samples", 0);
        let mut risks = Vec::new();
        for _ in 0..4000 {
            let sampled = task.sampled(n, sigma, &mut rng).unwrap();
            risks.push(
                other
                    .risk(&model.fine_tune(&sampled, &Update::FirstRows(units.clone())).unwrap())
                    .unwrap(),
            );
        }
        let mean = risks.iter().sum::<f64>() / 4000.0;
        let deviation =
            (risks.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / 4000.0 / 4000.0).sqrt();
        assert!(
            (mean - want).abs() < 5.0 * deviation,
            "{mean} against {want}, deviation {deviation}"
        );
        assert!(
            task.sampled(5, 0.1, &mut rng).is_err() && task.sampled(9, -1.0, &mut rng).is_err()
        );
        // Without noise the sample has the task's map.
        let clean = task.sampled(9, 0.0, &mut rng).unwrap();
        assert!((&clean.target - &task.target).iter().all(|x| x.abs() < 1e-12));
    }

    #[test]
    fn bad_input_is_refused() {
        let (model, task) = case(2);
        let refused = |task: &Task, update: Update| model.fine_tune(task, &update).unwrap_err();
        assert!(
            matches!(refused(&task, Update::FirstLowRank(0)), Error::InvalidParam { name, .. } if name == "rank")
        );
        for units in [vec![], vec![6], vec![1, 1]] {
            assert!(matches!(refused(&task, Update::FirstRows(units)), Error::InvalidParam { .. }));
        }
        let wide = Task { target: Array2::zeros((5, 3)), ..task.clone() };
        assert!(
            matches!(refused(&wide, Update::FirstFull), Error::ShapeMismatch { arg, .. } if arg == "target")
        );
        let mut skew = task.clone();
        skew.second_moment[[0, 1]] += 1.0;
        assert!(refused(&skew, Update::FirstFull).to_string().contains("symmetric"));
        let mut negative = task.clone();
        negative.second_moment = -Array2::<f64>::eye(4);
        assert!(refused(&negative, Update::FirstFull).to_string().contains("semidefinite"));
        let mut nan = task;
        nan.target[[0, 0]] = f64::NAN;
        assert!(matches!(refused(&nan, Update::FirstFull), Error::NonFinite { .. }));
    }
}
