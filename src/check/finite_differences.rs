//! Central finite differences along a direction.

/// Central differences (f(h) - f(-h)) / (2 h) of a function of one step length, at `h`, `h/2`,
/// `h/4`.
///
/// `f(t)` evaluates the loss at `parameters + t * direction`. The error of a central difference
/// falls as h^2, so against the exact derivative the three gaps fall by 4 each time, until
/// roundoff.
///
/// ```
/// use peft_limits::check::finite_differences::{central_differences, observed_order};
/// let estimates = central_differences(|t| (1.0 + t).powi(3), 1e-2);
/// let order = observed_order(&estimates, 3.0);
/// assert!((order - 2.0).abs() < 1e-3);
/// ```
pub fn central_differences(f: impl Fn(f64) -> f64, h: f64) -> [f64; 3] {
    [h, h / 2.0, h / 4.0].map(|h| (f(h) - f(-h)) / (2.0 * h))
}

/// Order at which three estimates at halved steps approach `derivative`: log2 of the mean ratio of
/// gaps.
pub fn observed_order(estimates: &[f64; 3], derivative: f64) -> f64 {
    let gap = estimates.map(|e| (e - derivative).abs());
    (gap[0] / gap[2]).log2() / 2.0
}
