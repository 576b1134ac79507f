//! Singular values of a matrix with graded columns, each to high relative accuracy.
//!
//! A general decomposition finds every value to within rounding of the largest one. The energies
//! here fall like theta^(2n), and the exponent of a small error hangs on the smallest: rounding of
//! the largest moves it by 0.2% at c = 0.1. Rotations of pairs of columns keep the accuracy of each
//! column (Demmel, Veselic 1992).

/// Squared singular values, descending, of the matrix with these columns.
pub(super) fn squared_singular_values(mut columns: Vec<Vec<f64>>) -> Vec<f64> {
    const SWEEPS: usize = 60;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let length = |a: &[f64]| dot(a, a);
    for _ in 0..SWEEPS {
        let mut turned = false;
        for p in 0..columns.len() {
            for q in p + 1..columns.len() {
                let (head, tail) = columns.split_at_mut(q);
                let (x, y) = (&mut head[p], &mut tail[0]);
                let (a, b, g) = (length(x), length(y), dot(x, y));
                // Square roots apart: the product of two small energies would underflow.
                if a == 0.0 || b == 0.0 || g.abs() <= 1e-15 * a.sqrt() * b.sqrt() {
                    continue;
                }
                turned = true;
                let zeta = (b - a) / (2.0 * g);
                let t = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cosine = 1.0 / t.hypot(1.0);
                for (x, y) in x.iter_mut().zip(y.iter_mut()) {
                    (*x, *y) = (cosine * (*x - t * *y), cosine * (t * *x + *y));
                }
            }
        }
        if !turned {
            break;
        }
    }
    let mut squares: Vec<f64> = columns.iter().map(|c| length(c)).collect();
    squares.sort_by(|a, b| b.total_cmp(a));
    squares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::decompositions::singular_values;
    use ndarray::Array2;

    #[test]
    fn values_are_those_of_the_general_routine_and_small_ones_keep_their_digits() {
        let a = Array2::from_shape_fn((9, 5), |(i, j)| ((3 * i + 7 * j + i * j) as f64).sin());
        let columns =
            |a: &Array2<f64>| a.columns().into_iter().map(|c| c.to_vec()).collect::<Vec<_>>();
        for (ours, theirs) in
            squared_singular_values(columns(&a)).iter().zip(&singular_values(a.view()).unwrap())
        {
            assert!((ours.sqrt() - theirs).abs() < 1e-14 * theirs);
        }
        // Columns (1, 1) and (0, s): the values multiply to the determinant s, and the large one is
        // sqrt(2) nearly.
        let small = squared_singular_values(vec![vec![1.0, 1.0], vec![0.0, 1e-40]]);
        assert!((small[1].sqrt() * small[0].sqrt() / 1e-40 - 1.0).abs() < 1e-14);
    }
}
