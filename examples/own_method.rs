//! A fine-tuning method of your own, checked the way the crate checks its own: IA3-like output
//! scaling y = (x W^T) diag(1 + scale), where only `scale` is trained.
//!
//! The backward is written from the blocks that the reference transformer uses, and checked against
//! central differences, whose error must fall as h^2. `cargo run --release --example own_method`

use ndarray::{Array1, Array2, Axis};
use peft_limits::Error;
use peft_limits::blocks::linear::{linear_backward_input, linear_forward};
use peft_limits::check::finite_differences::{central_differences, observed_order};
use peft_limits::cost::Cost;

struct OutputScale {
    weight: Array2<f64>,
    scale: Array1<f64>,
}

impl OutputScale {
    /// y = (x W^T) (1 + scale); x W^T is what backward needs, `N x out`.
    fn forward(&self, x: &Array2<f64>) -> Result<(Array2<f64>, Array2<f64>), Error> {
        let base = linear_forward(x.view(), self.weight.view(), &mut Cost::default())?;
        Ok((&base * &self.scale.mapv(|s| 1.0 + s), base))
    }

    /// dscale = sum over rows of dy o (x W^T), and dx = (dy (1 + scale)) W.
    fn backward(
        &self,
        dy: &Array2<f64>,
        base: &Array2<f64>,
    ) -> Result<(Array1<f64>, Array2<f64>), Error> {
        let dscale = (dy * base).sum_axis(Axis(0));
        let mut dx = Array2::zeros((dy.nrows(), self.weight.ncols()));
        let scaled = dy * &self.scale.mapv(|s| 1.0 + s);
        linear_backward_input(
            scaled.view(),
            self.weight.view(),
            &mut dx.view_mut(),
            &mut Cost::default(),
        )?;
        Ok((dscale, dx))
    }

    /// A loss with curvature in every direction: sum of y^3 / 3, so dy = y^2.
    fn loss(&self, x: &Array2<f64>) -> Result<f64, Error> {
        Ok(self.forward(x)?.0.mapv(|y| y.powi(3) / 3.0).sum())
    }
}

pub(crate) fn main() -> Result<(), Error> {
    let wave = |rows: usize, columns: usize, f: f64| {
        Array2::from_shape_fn((rows, columns), |(i, j)| (f * (i * columns + j + 1) as f64).sin())
    };
    let (x, direction) = (wave(5, 6, 0.7), wave(5, 6, 1.9));
    let layer = OutputScale {
        weight: wave(4, 6, 1.3),
        scale: Array1::from_vec(vec![0.1, -0.2, 0.3, 0.05]),
    };
    let (y, base) = layer.forward(&x)?;
    let (dscale, dx) = layer.backward(&y.mapv(|y| y * y), &base)?;

    let along_scale = central_differences(
        |t| {
            let moved = OutputScale { weight: layer.weight.clone(), scale: &layer.scale + t };
            moved.loss(&x).unwrap_or(f64::NAN)
        },
        1e-2,
    );
    let along_x =
        central_differences(|t| layer.loss(&(&x + &(&direction * t))).unwrap_or(f64::NAN), 1e-2);
    for (name, estimates, exact) in
        [("scale", along_scale, dscale.sum()), ("x", along_x, (&dx * &direction).sum())]
    {
        let order = observed_order(&estimates, exact);
        println!(
            "d{name}: backward {exact:+.9}, differences {:+.9}, order {order:.2} (2 expected)",
            estimates[2]
        );
        assert!((order - 2.0).abs() < 0.1, "the backward of {name} is wrong");
    }
    Ok(())
}
