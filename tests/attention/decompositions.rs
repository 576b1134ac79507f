//! Singular values, singular vectors and least squares against closed forms, for either backend.
//!
//! Backward stability: the computed singular values are those of a matrix within c n eps ||a|| of
//! a, so each is off by at most that, whatever the condition number; 16 n covers the constants of
//! Golub-Kahan and divide and conquer.

use ndarray::{Array1, Array2, Axis, array};
use peft_limits::Error;
use peft_limits::linalg::decompositions::{Svd, least_squares, singular_values, svd};
use peft_limits::linalg::norms;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const EPS: f64 = f64::EPSILON;

/// Allowed error of a singular value.
fn allowed(a: &Array2<f64>) -> f64 {
    16.0 * a.nrows().max(a.ncols()) as f64 * EPS * norms::frobenius(&a.view())
}

/// u diag(s) vt = a, u^T u = 1, vt vt^T = 1, s descending and not negative, the same s as without
/// vectors.
fn check(name: &str, a: &Array2<f64>) -> Svd {
    let f = svd(a.view()).unwrap();
    let k = a.nrows().min(a.ncols());
    assert_eq!((f.u.dim(), f.s.len(), f.vt.dim()), ((a.nrows(), k), k, (k, a.ncols())), "{name}");
    let orthogonal = |q: &Array2<f64>, side: &str| {
        let off = norms::frobenius(&(q - &Array2::<f64>::eye(k)).view());
        assert!(
            off <= 16.0 * (a.nrows() + a.ncols()) as f64 * EPS,
            "{name}: {side} off by {off:e}"
        );
    };
    orthogonal(&f.u.t().dot(&f.u), "u");
    orthogonal(&f.vt.dot(&f.vt.t()), "vt");
    let rebuilt = f.u.dot(&(&f.vt * &f.s.view().insert_axis(Axis(1))));
    let off = norms::frobenius(&(&rebuilt - a).view());
    assert!(off <= allowed(a), "{name}: rebuilt to {off:e}, allowed {:e}", allowed(a));
    let alone = singular_values(a.view()).unwrap();
    for (set, s) in [("svd", &f.s), ("singular_values", &alone)] {
        assert!(s.iter().all(|x| *x >= 0.0), "{name}: {set} {s}");
        assert!(
            s.windows(2).into_iter().all(|w| w[0] >= w[1]),
            "{name}: {set} not descending: {s}"
        );
    }
    assert_values(name, a, &alone, &f.s.to_vec());
    f
}

fn assert_values(name: &str, a: &Array2<f64>, got: &Array1<f64>, want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= allowed(a), "{name}: value {i} is {g:e}, not {w:e}");
    }
}

fn random(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, columns), || rng.random_range(-1.0..1.0))
}

/// The Walsh-Hadamard matrix of a power of two, orthonormal.
fn hadamard(n: usize) -> Array2<f64> {
    let root = (n as f64).sqrt();
    Array2::from_shape_fn((n, n), |(i, j)| {
        if (i & j).count_ones() % 2 == 0 { 1.0 / root } else { -1.0 / root }
    })
}

/// Matrices whose singular values are known in closed form.
#[test]
fn closed_forms() {
    use std::f64::consts::PI;
    for n in [1, 2, 3, 7, 20, 41] {
        // Second differences: 2 - 2 cos(k pi / (n + 1)).
        let second = Array2::from_shape_fn((n, n), |(i, j)| match i.abs_diff(j) {
            0 => 2.0,
            1 => -1.0,
            _ => 0.0,
        });
        let want: Vec<f64> =
            (1..=n).rev().map(|k| 2.0 - 2.0 * (k as f64 * PI / (n + 1) as f64).cos()).collect();
        assert_values(
            "second differences",
            &second,
            &check("second differences", &second).s,
            &want,
        );
        // Running sums: 1 / (2 sin((2 k - 1) pi / (4 n + 2))).
        let sums = Array2::from_shape_fn((n, n), |(i, j)| if j <= i { 1.0 } else { 0.0 });
        let want: Vec<f64> =
            (1..=n).map(|k| 0.5 / ((2 * k - 1) as f64 * PI / (4 * n + 2) as f64).sin()).collect();
        assert_values("running sums", &sums, &check("running sums", &sums).s, &want);
        // An orthogonal matrix (the discrete sine transform) and a permutation: all ones.
        let sine = Array2::from_shape_fn((n, n), |(i, j)| {
            (2.0 / (n + 1) as f64).sqrt()
                * ((i + 1) as f64 * (j + 1) as f64 * PI / (n + 1) as f64).sin()
        });
        let rotation =
            Array2::from_shape_fn((n, n), |(i, j)| if (i + 1) % n == j { -1.0 } else { 0.0 });
        for (name, a) in [("sine transform", sine), ("signed permutation", rotation)] {
            assert_values(name, &a, &check(name, &a).s, &vec![1.0; n]);
        }
    }
}

/// The product of the singular values of a Hilbert matrix is its determinant, of its inverse
/// (integers) the reciprocal.
#[test]
fn hilbert() {
    // 1 / det H_n for n = 1, 2, ...
    let reciprocal = [1.0, 12.0, 2160.0, 6_048_000.0, 266_716_800_000.0];
    for n in 1..=5usize {
        let a = Array2::from_shape_fn((n, n), |(i, j)| 1.0 / (i + j + 1) as f64);
        let f = check("Hilbert", &a);
        let product: f64 = f.s.iter().product();
        // Each value is off by `allowed`, so the product by the sum of the relative errors.
        let relative: f64 = f.s.iter().map(|s| allowed(&a) / s).sum();
        assert!((product * reciprocal[n - 1] - 1.0).abs() <= relative, "n = {n}: {product:e}");
        let squares: f64 = f.s.iter().map(|s| s * s).sum();
        assert!((squares.sqrt() - norms::frobenius(&a.view())).abs() <= allowed(&a));
    }
    // Condition number 1e18 and beyond: still orthogonal, ordered, rebuilt.
    for (rows, columns) in [(15, 15), (30, 12), (9, 25)] {
        check(
            "Hilbert",
            &Array2::from_shape_fn((rows, columns), |(i, j)| 1.0 / (i + j + 1) as f64),
        );
    }
}

#[test]
fn vandermonde() {
    let nodes = [-1.5, -1.0, -0.25, 0.5, 1.0, 2.0];
    let a = Array2::from_shape_fn((6, 6), |(i, j)| f64::powi(nodes[i], j as i32));
    let determinant: f64 = (0..6).flat_map(|j| (0..j).map(move |i| nodes[j] - nodes[i])).product();
    let f = check("Vandermonde", &a);
    let relative: f64 = f.s.iter().map(|s| allowed(&a) / s).sum();
    assert!((f.s.iter().product::<f64>() / determinant - 1.0).abs() <= relative);
    // Interpolation: the coefficients come back, within the condition number.
    let coefficients = array![3.0, -1.0, 0.5, 2.0, -0.25, 1.0];
    let x = least_squares(a.view(), a.dot(&coefficients).view()).unwrap();
    let condition = f.s[0] / f.s[5];
    assert!(norms::max_abs(&(&x - &coefficients).view()) <= 100.0 * EPS * condition, "{x}");
}

/// Sums of orthonormal outer products with chosen weights: exact values, exact rank, ties.
#[test]
fn rank_deficient() {
    let (left, right) = (hadamard(16), hadamard(8));
    for weights in
        [vec![5.0, 2.0, 0.5], vec![1.0], vec![3.0, 3.0, 3.0, 1e-8], vec![1e8, 1.0, 1e-8], vec![]]
    {
        let mut a = Array2::<f64>::zeros((16, 8));
        for (i, w) in weights.iter().enumerate() {
            a.indexed_iter_mut()
                .for_each(|((r, c), x)| *x += w * left[[r, i + 3]] * right[[c, i + 1]]);
        }
        let mut want = weights.clone();
        want.resize(8, 0.0);
        assert_values("outer products", &a, &check("outer products", &a).s, &want);
        let transposed = a.t().to_owned();
        assert_values("transposed", &transposed, &check("transposed", &transposed).s, &want);
    }
    // Rank one without symmetry, equal columns, a zero row and column, a single row and column.
    let ones = Array2::<f64>::ones((7, 4));
    assert_values("ones", &ones, &check("ones", &ones).s, &[28f64.sqrt(), 0.0, 0.0, 0.0]);
    let mut holes = random(9, 6, 1);
    holes.row_mut(4).fill(0.0);
    holes.column_mut(2).fill(0.0);
    assert!(check("holes", &holes).s[5] <= allowed(&holes));
    for (rows, columns) in [(1, 1), (1, 6), (6, 1)] {
        let a = random(rows, columns, 2);
        assert_values("vector", &a, &check("vector", &a).s, &[norms::frobenius(&a.view())]);
    }
}

#[test]
fn random_matrices_of_every_shape_and_scale() {
    for (seed, (rows, columns)) in
        [(3, 3), (4, 9), (9, 4), (31, 30), (30, 31), (120, 7), (65, 65)].into_iter().enumerate()
    {
        let a = random(rows, columns, seed as u64);
        let unit = check("random", &a).s;
        for scale in [1e-150, 1e-8, 1e8, 1e150] {
            let scaled = &a * scale;
            let s = check("scaled", &scaled).s;
            assert_values(
                "scaled",
                &scaled,
                &s,
                &unit.iter().map(|s| s * scale).collect::<Vec<_>>(),
            );
        }
        // Graded columns: twelve orders of magnitude inside one matrix.
        let graded =
            Array2::from_shape_fn(a.dim(), |(i, j)| a[[i, j]] * 10f64.powi(-(j as i32 % 13)));
        check("graded", &graded);
    }
    // Small integers give many ties and exact zeros.
    for seed in 0..60 {
        let mut rng = ChaCha8Rng::seed_from_u64(1000 + seed);
        let shape = (rng.random_range(1..9), rng.random_range(1..9));
        check(
            "small integers",
            &Array2::from_shape_simple_fn(shape, || f64::from(rng.random_range(-1..=1))),
        );
    }
}

/// The residual is orthogonal to the columns, and nothing near does better.
#[test]
fn least_squares_is_optimal() {
    let (a, b) = (random(40, 6, 7), random(40, 1, 8).column(0).to_owned());
    let x = least_squares(a.view(), b.view()).unwrap();
    let residual = a.dot(&x) - &b;
    let normal = a.t().dot(&residual);
    let scale = norms::frobenius(&a.view()) * norms::frobenius(&b.view());
    assert!(norms::max_abs(&normal.view()) <= 16.0 * 40.0 * EPS * scale, "{normal}");
    for i in 0..6 {
        for step in [-1e-4, 1e-4] {
            let mut other = x.clone();
            other[i] += step;
            assert!(
                norms::frobenius(&(a.dot(&other) - &b).view()) > norms::frobenius(&residual.view())
            );
        }
    }
    // A straight line through (0, 1), (1, 3), (2, 4), (3, 4): intercept 3/2, slope 1.
    let line = array![[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]];
    let x = least_squares(line.view(), array![1.0, 3.0, 4.0, 4.0].view()).unwrap();
    assert!((x[0] - 1.5).abs() < 40.0 * EPS && (x[1] - 1.0).abs() < 40.0 * EPS, "{x}");
}

#[test]
fn what_is_refused() {
    let dependent = array![[1.0, 2.0, 3.0], [4.0, 5.0, 9.0], [7.0, 8.0, 15.0], [2.0, -1.0, 1.0]];
    match least_squares(dependent.view(), array![1.0, 2.0, 3.0, 4.0].view()) {
        Err(Error::Decomposition { op, reason }) => {
            assert_eq!(op, "least_squares");
            assert!(reason.contains("depends on the others"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let zero = Array2::<f64>::zeros((4, 2));
    assert!(matches!(
        least_squares(zero.view(), Array1::ones(4).view()),
        Err(Error::Decomposition { .. })
    ));
    for (rows, columns, length) in [(2, 3, 2), (4, 2, 3), (4, 2, 5)] {
        let outcome = least_squares(random(rows, columns, 1).view(), Array1::ones(length).view());
        assert!(
            matches!(outcome, Err(Error::ShapeMismatch { op: "least_squares", .. })),
            "{outcome:?}"
        );
    }
    for bad in [f64::NAN, f64::INFINITY] {
        let mut a = random(5, 3, 1);
        a[[3, 1]] = bad;
        for outcome in [
            singular_values(a.view()).err(),
            svd(a.view()).err(),
            least_squares(a.view(), Array1::ones(5).view()).err(),
        ] {
            assert!(
                matches!(&outcome, Some(Error::NonFinite { index, .. }) if *index == [3, 1]),
                "{outcome:?}"
            );
        }
        let mut b = Array1::ones(5);
        b[2] = bad;
        let outcome = least_squares(random(5, 3, 1).view(), b.view());
        assert!(
            matches!(&outcome, Err(Error::NonFinite { tensor, .. }) if tensor == "b"),
            "{outcome:?}"
        );
    }
}

/// A matrix without entries has no singular value; without columns, nothing to solve for.
#[test]
fn empty_matrices() {
    for shape in [(0, 0), (0, 3), (3, 0)] {
        let a = Array2::<f64>::zeros(shape);
        assert_eq!(singular_values(a.view()).unwrap().len(), 0);
        let f = svd(a.view()).unwrap();
        assert_eq!((f.u.dim(), f.s.len(), f.vt.dim()), ((shape.0, 0), 0, (0, shape.1)));
    }
    assert_eq!(
        least_squares(Array2::<f64>::zeros((3, 0)).view(), Array1::ones(3).view()).unwrap().len(),
        0
    );
}
