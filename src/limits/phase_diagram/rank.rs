//! eps-rank of P: an entropy as L grows, a count of products at finite d.

use crate::error::{Error, Result};

/// Shannon entropy in nats of energies in descending order, accurate also where the first is nearly 1.
pub fn entropy(p: &[f64]) -> f64 {
    let Some((first, rest)) = p.split_first() else { return 0.0 };
    let others: f64 = rest.iter().rev().sum();
    let largest = if others < 0.5 { (-others).ln_1p() } else { first.ln() };
    rest.iter().rev().map(|p| -p * p.ln()).sum::<f64>() - first * largest
}

/// Exponent of the eps-rank at eps = L^-q: kappa H(p_s) with p_s ~ p^s and kappa KL(p_s, p) = 2 q; kappa H(p) for q = 0.
///
/// `None` where no product of modes is as improbable as L^-2q, so that every mode is needed.
pub fn exponent(p: &[f64], kappa: f64, q: f64) -> Option<f64> {
    if q <= 0.0 {
        return Some(kappa * entropy(p));
    }
    tilt(p, 2.0 * q / kappa).map(|tilted| kappa * entropy_of(&tilted))
}

/// p_s with KL(p_s, p) = `divergence`, s between 0 and 1.
fn tilt(p: &[f64], divergence: f64) -> Option<Vec<f64>> {
    let logs: Vec<f64> = p.iter().map(|p| p.ln()).collect();
    let tilted = |s: f64| {
        // Descending, so the first is the largest.
        let raw: Vec<f64> = logs.iter().map(|l| (s * (l - logs[0])).exp()).collect();
        let total: f64 = raw.iter().sum();
        raw.into_iter().map(|r| r / total).collect::<Vec<f64>>()
    };
    let distance =
        |t: &[f64]| t.iter().zip(&logs).filter(|(t, _)| **t > 0.0).map(|(t, l)| t * (t.ln() - l)).sum::<f64>();
    let (mut low, mut high) = (1e-9, 1.0);
    if distance(&tilted(low)) < divergence {
        return None;
    }
    for _ in 0..100 {
        let middle = (low + high) / 2.0;
        if distance(&tilted(middle)) > divergence { low = middle } else { high = middle }
    }
    Some(tilted(high))
}

fn entropy_of(p: &[f64]) -> f64 {
    p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum()
}

/// Width in nats of the bins of [`ln_finite_rank`].
pub const BIN: f64 = 0.02;
/// Bins of the first attempt.
const BINS: usize = 3000;
/// Bins that are not exceeded.
const MOST_BINS: usize = 1 << 20;

/// ln of the least number of products p_n1 ... p_nd that hold 1 - eps^2 of the sum of all, whole numbers interpolated.
///
/// -ln p is rounded to multiples of [`BIN`] and the products are counted by convolution. Each rounding is off by at most
/// half a bin, so that eps^2 and the count are right within a factor e^(d BIN / 2) each; as roundings differ in sign, far closer.
///
/// # Errors
/// [`Error::InvalidParam`] for eps outside (0, 1) or d = 0; [`Error::TooLarge`] where the products spread over more than
/// 20,000 nats.
pub fn ln_finite_rank(p: &[f64], d: usize, eps: f64) -> Result<f64> {
    if !(eps > 0.0 && eps < 1.0) {
        return Err(Error::invalid("eps", eps, "must lie between 0 and 1"));
    }
    if d == 0 {
        return Err(Error::invalid("d", d, "must be at least 1"));
    }
    let mut size = BINS;
    loop {
        let bins: Vec<usize> = p.iter().map(|p| (-p.ln() / BIN).round_ties_even() as usize).collect();
        let shares: Vec<f64> = bins.iter().map(|&b| (-(b as f64) * BIN).exp()).collect();
        let total: f64 = shares.iter().sum();
        let mut energy = vec![0.0; size];
        energy[0] = 1.0;
        for _ in 0..d {
            let mut next = vec![0.0; size];
            for (&bin, share) in bins.iter().zip(&shares).take_while(|(b, _)| **b < size) {
                next[bin..].iter_mut().zip(&energy).for_each(|(n, e)| *n += e * share / total);
            }
            energy = next;
        }
        let held: f64 = energy.iter().rev().sum();
        // What fell off the end must not matter to the count.
        if 1.0 - held > 1e-9 * eps * eps + 1e-12 {
            if 2 * size > MOST_BINS {
                let (needed, limit) = (2 * size as u128, MOST_BINS as u128);
                return Err(Error::TooLarge {
                    what: "counting products of energies".into(),
                    needed,
                    limit,
                    unit: "bins",
                });
            }
            size *= 2;
            continue;
        }
        return Ok(ln_count(&energy, d as f64 * total.ln(), eps * eps * held));
    }
}

/// ln of the number of products in the leading bins that leave `allowed` outside; a product in bin b has the energy
/// e^(-b BIN - normaliser).
fn ln_count(energy: &[f64], normaliser: f64, allowed: f64) -> f64 {
    let mut outside = 0.0;
    let mut last = 0;
    for (bin, e) in energy.iter().enumerate().rev() {
        if outside + e > allowed {
            last = bin;
            break;
        }
        outside += e;
    }
    let ln_products = |bin: usize, e: f64| e.ln() + bin as f64 * BIN + normaliser;
    let part = energy[last] + outside - allowed;
    let mut terms: Vec<f64> =
        energy[..last].iter().enumerate().filter(|(_, e)| **e > 0.0).map(|(b, &e)| ln_products(b, e)).collect();
    terms.push(ln_products(last, part));
    let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + terms.iter().map(|t| (t - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::super::{Law, energies};
    use super::*;

    /// Every product written out and sorted.
    fn brute_force(p: &[f64], d: usize, eps: f64) -> f64 {
        let mut products = vec![1.0];
        for _ in 0..d {
            products = products.iter().flat_map(|x| p.iter().map(move |p| x * p)).collect();
        }
        products.sort_by(|a, b| b.total_cmp(a));
        let total: f64 = products.iter().sum();
        let (mut held, wanted) = (0.0, (1.0 - eps * eps) * total);
        for (k, x) in products.iter().enumerate() {
            if held + x >= wanted {
                return k as f64 + (wanted - held) / x;
            }
            held += x;
        }
        products.len() as f64
    }

    #[test]
    fn counts_are_those_of_brute_force_within_the_bins() {
        for (law, theta, d) in [(Law::Uniform, 0.6, 3), (Law::Uniform, 1.2, 4), (Law::Sign, 0.4, 12)] {
            let p: Vec<f64> = energies(&law, theta).unwrap().into_iter().take(9).collect();
            for eps in [0.3, 0.1, 0.03] {
                let (ours, truth) = (ln_finite_rank(&p, d, eps).unwrap().exp(), brute_force(&p, d, eps));
                // A sign law has one energy many times over, so the steps of its count are those of binomials.
                let bound = (d as f64 * BIN / 2.0).exp();
                let (loose, tight) = (eps * bound.sqrt(), eps / bound.sqrt());
                let (low, high) = (brute_force(&p, d, loose) / bound, brute_force(&p, d, tight) * bound);
                assert!(low <= ours && ours <= high, "{law:?} d = {d}, eps = {eps}: {ours} not in {low} to {high}");
                assert!((ours / truth - 1.0).abs() < 0.05, "{law:?} d = {d}, eps = {eps}: {ours} {truth}");
            }
        }
    }

    #[test]
    fn the_exponent_is_the_limit_of_the_count() {
        // ln k / d approaches H(p) like 1 / sqrt(d).
        let p = energies(&Law::Uniform, 1.0).unwrap();
        let h = entropy(&p);
        let gap = |d: usize, eps: f64| ln_finite_rank(&p, d, eps).unwrap() / d as f64 - h;
        for eps in [0.1, 0.3] {
            let (near, far) = (gap(50, eps), gap(200, eps));
            assert!(far.abs() < 0.65 * near.abs() && far.abs() < 0.3 * h, "{near} {far} {h}");
        }
        // eps = e^(-q d): the tilted entropy.
        let tilted = exponent(&p, 1.0, 0.1).unwrap();
        let near = |d: usize| ln_finite_rank(&p, d, (-0.1 * d as f64).exp()).unwrap() / d as f64 - tilted;
        assert!(near(80).abs() < 0.1 && near(80).abs() < near(20).abs(), "{} {}", near(20), near(80));
    }

    #[test]
    fn a_tilt_reaches_its_divergence_or_there_is_none() {
        let p = [0.5, 0.25, 0.125, 0.125];
        assert!((entropy(&p) - 1.75 * std::f64::consts::LN_2).abs() < 1e-15);
        let t = tilt(&p, 0.05).unwrap();
        let kl: f64 = t.iter().zip(&p).map(|(t, p)| t * (t / p).ln()).sum();
        assert!((kl - 0.05).abs() < 1e-12);
        // The flattest tilt is uniform: KL = ln of (1/4) over geometric mean.
        assert!(tilt(&p, 10.0).is_none() && exponent(&[1.0], 1.0, 1.0).is_none());
        assert!((exponent(&p, 2.0, 0.0).unwrap() - 2.0 * entropy(&p)).abs() < 1e-15);
    }

    #[test]
    fn bad_parameters_are_refused() {
        for (d, eps) in [(0, 0.1), (3, 0.0), (3, 1.0), (3, f64::NAN)] {
            assert!(matches!(ln_finite_rank(&[0.9, 0.1], d, eps), Err(Error::InvalidParam { .. })));
        }
    }
}
