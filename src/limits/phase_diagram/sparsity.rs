//! Keys that hold a query's weight: the other easy side.

use super::law::Law;

/// E_u h(tilt theta u), h(t) = ln M(t) - t M'(t) / M(t) <= 0: the entropy that one coordinate takes
/// from ln L.
pub fn entropy_of_coordinate(law: &Law, theta: f64, tilt: f64) -> f64 {
    law.rule(tilt * theta).expectation(|u| entropy_at(law, tilt * theta * u))
}

fn entropy_at(law: &Law, t: f64) -> f64 {
    let (log, slope) = law.log_moment(t);
    log - t * slope
}

/// 1 + kappa E_u h(tilt theta u), also where it is negative: beyond condensation it is not the
/// number of keys.
pub fn raw_support_exponent(law: &Law, theta: f64, kappa: f64, tilt: f64) -> f64 {
    1.0 + kappa * entropy_of_coordinate(law, theta, tilt)
}

/// lim ln(keys that hold a query's weight) / ln L, 0 once the softmax has condensed; tilt 2 for its
/// squared weights.
pub fn support_exponent(law: &Law, theta: f64, kappa: f64, tilt: f64) -> f64 {
    raw_support_exponent(law, theta, kappa, tilt).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_in_theta() {
        // h(t) ~ -t^2 E w^2 / 2 at 0, so 1 - s ~ kappa theta^2 (E w^2)^2 / 2.
        for law in [Law::Uniform, Law::Sign] {
            let theta = 1e-3;
            let lost = 1.0 - raw_support_exponent(&law, theta, 2.0, 1.0);
            let expected = theta * theta * law.second_moment().powi(2);
            assert!((lost / expected - 1.0).abs() < 1e-6, "{law:?}: {lost} {expected}");
        }
        // Signs: in the limit half of the keys of each coordinate are lost.
        let sign = raw_support_exponent(&Law::Sign, 800.0, 1.0, 1.0);
        assert!((sign - (1.0 - std::f64::consts::LN_2)).abs() < 1e-12);
        // Uniform: h(t) ~ 1 - ln(2 t), so it falls without end.
        let uniform = raw_support_exponent(&Law::Uniform, 1000.0, 1.0, 1.0);
        assert!((uniform - (1.0 + 2.0 - 2000f64.ln())).abs() < 1e-2, "{uniform}");
        assert!(support_exponent(&Law::Uniform, 1000.0, 1.0, 1.0) <= 0.0);
    }
}
