//! The crate's matrix products beside ndarray's on one thread, in the shapes of a training step and
//! of attention tiles: `cargo bench --bench products`. Medians of rates, and their ratio within the
//! run.

use ndarray::{Array2, linalg::general_mat_mul};
use peft_limits::linalg::gemm::multiply;
use std::time::Instant;

const REPEATS: usize = 41;

/// Median seconds of two pieces of work that take turns, so that a change of the machine's speed
/// meets both.
fn compare(mut first: impl FnMut(), mut second: impl FnMut()) -> [f64; 2] {
    let mut seconds = [Vec::new(), Vec::new()];
    for _ in 0..REPEATS {
        let works: [&mut dyn FnMut(); 2] = [&mut first, &mut second];
        for (work, seconds) in works.into_iter().zip(&mut seconds) {
            let start = Instant::now();
            work();
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.map(|mut s| {
        s.sort_by(f64::total_cmp);
        s[REPEATS / 2]
    })
}

fn main() {
    // c is m x n with k terms; which operand is a transposed view; what it is.
    let shapes = [
        (512, 256, 688, [false, true], "X W^T, gate and up"),
        (512, 688, 256, [false, true], "X W^T, down"),
        (512, 688, 256, [false, false], "dY W, gate and up"),
        (128, 2048, 256, [true, false], "dY^T X, queries"),
        (344, 2048, 256, [true, false], "dY^T X, gate and up"),
        (64, 32, 256, [false, true], "Q K^T, a tile"),
        (64, 256, 32, [false, false], "P V, a tile"),
        (256, 64, 32, [true, false], "P^T G, a tile"),
    ];
    println!(
        "{:<22}{:>18}{:>16}{:>18}{:>8}",
        "product", "m x k x n", "here, GFLOP/s", "ndarray, GFLOP/s", "ratio"
    );
    for (m, k, n, [a_transposed, b_transposed], name) in shapes {
        let filled = |rows: usize, columns: usize| {
            Array2::from_shape_fn((rows, columns), |(i, j)| {
                ((i * 7 + j * 3) % 13) as f32 * 0.1 - 0.5
            })
        };
        let (a, b) = (
            if a_transposed { filled(k, m).reversed_axes() } else { filled(m, k) },
            if b_transposed { filled(n, k).reversed_axes() } else { filled(k, n) },
        );
        let (mut ours, mut theirs) = (Array2::<f32>::zeros((m, n)), Array2::<f32>::zeros((m, n)));
        let seconds = compare(
            || multiply(1.0, &a.view(), &b.view(), 0.0, &mut ours.view_mut()),
            || general_mat_mul(1.0, &a, &b, 0.0, &mut theirs),
        );
        let gap = ours.iter().zip(&theirs).fold(0f32, |gap, (x, y)| gap.max((x - y).abs()));
        assert!(gap < 1e-2, "{name}: the two products differ by {gap}");
        let rate = |seconds: f64| 2e-9 * (m * k * n) as f64 / seconds;
        let (here, there) = (rate(seconds[0]), rate(seconds[1]));
        println!(
            "{name:<22}{:>18}{here:>16.0}{there:>18.0}{:>8.2}",
            format!("{m} x {k} x {n}"),
            here / there
        );
    }
}
