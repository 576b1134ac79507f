//! eps-rank of P: an entropy as L grows, a count of products at finite d.

use crate::error::{Error, Result};

/// Shannon entropy in nats of energies in descending order, accurate also where the first is
/// nearly 1.
pub fn entropy(p: &[f64]) -> f64 {
    let Some((first, rest)) = p.split_first() else { return 0.0 };
    let others: f64 = rest.iter().rev().sum();
    let largest = if others < 0.5 { (-others).ln_1p() } else { first.ln() };
    rest.iter().rev().map(|p| -p * p.ln()).sum::<f64>() - first * largest
}

/// Exponent of the eps-rank at eps = L^-q: kappa H(p_s) with p_s ~ p^s and kappa KL(p_s, p) = 2 q;
/// kappa H(p) for q = 0.
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
    let distance = |t: &[f64]| {
        t.iter().zip(&logs).filter(|(t, _)| **t > 0.0).map(|(t, l)| t * (t.ln() - l)).sum::<f64>()
    };
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

/// Largest q at which the rank at eps = L^-q is still sub-quadratic: kappa H(p_s) = 1 at q = kappa
/// KL(p_s, p) / 2. 0 if it is quadratic at any fixed eps, infinite if no eps makes it so.
pub fn largest_power(p: &[f64], kappa: f64) -> f64 {
    if kappa * entropy(p) >= 1.0 {
        return 0.0;
    }
    let (mut low, mut high) = (0.0, kappa * 1e-3);
    while exponent(p, kappa, high).is_some_and(|e| e < 1.0) {
        (low, high) = (high, 2.0 * high);
    }
    if exponent(p, kappa, high).is_none() && kappa * (p.len() as f64).ln() < 1.0 {
        return f64::INFINITY;
    }
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if exponent(p, kappa, middle).is_some_and(|e| e < 1.0) {
            low = middle
        } else {
            high = middle
        }
    }
    low
}

fn entropy_of(p: &[f64]) -> f64 {
    p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum()
}

/// Width in nats of the bins of [`Levels`].
pub const BIN: f64 = 0.02;
/// Bins of the first attempt.
const BINS: usize = 3000;
/// Bins that are not exceeded.
const MOST_BINS: usize = 1 << 20;

/// The products p_n1 ... p_nd of the energies of d coordinates, by size.
///
/// --ln p is rounded to multiples of [`BIN`] and the products are collected by convolution. Each
/// -rounding is off by at most half a bin, so that eps^2 and a count are right within a factor e^(d
/// -BIN / 2) each; as roundings differ in sign, far closer.
#[derive(Debug, Clone)]
pub struct Levels {
    /// Sum of the products of each bin, relative to the sum of all.
    pub(super) energy: Vec<f64>,
    /// A product in bin b is e^(-b BIN - normaliser).
    pub(super) normaliser: f64,
}

impl Levels {
    /// Products of d energies, down to those that together hold less than a part in 10^9 of
    /// `smallest_eps`^2.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for eps outside (0, 1) or d = 0; [`Error::TooLarge`] where the
    /// products spread over more than 20,000 nats.
    pub fn new(p: &[f64], d: usize, smallest_eps: f64) -> Result<Self> {
        check(smallest_eps)?;
        if d == 0 {
            return Err(Error::invalid("d", d, "must be at least 1"));
        }
        let bins: Vec<usize> =
            p.iter().map(|p| (-p.ln() / BIN).round_ties_even() as usize).collect();
        let shares: Vec<f64> = bins.iter().map(|&b| (-(b as f64) * BIN).exp()).collect();
        let total: f64 = shares.iter().sum();
        let mut size = BINS;
        while size <= MOST_BINS {
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
            if 1.0 - held <= 1e-9 * smallest_eps * smallest_eps + 1e-12 {
                energy.iter_mut().for_each(|e| *e /= held);
                return Ok(Self { energy, normaliser: d as f64 * total.ln() });
            }
            size *= 2;
        }
        let (needed, limit) = (size as u128, MOST_BINS as u128);
        Err(Error::TooLarge {
            what: "counting products of energies".into(),
            needed,
            limit,
            unit: "bins",
        })
    }

    /// ln of the least number of products that hold 1 - eps^2 of the sum of all, whole numbers
    /// interpolated.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for eps outside (0, 1).
    pub fn ln_rank(&self, eps: f64) -> Result<f64> {
        check(eps)?;
        let allowed = eps * eps;
        let (mut outside, mut last) = (0.0, 0);
        for (bin, e) in self.energy.iter().enumerate().rev() {
            if outside + e > allowed {
                last = bin;
                break;
            }
            outside += e;
        }
        let ln_products = |bin: usize, e: f64| e.ln() + bin as f64 * BIN + self.normaliser;
        let before = self.energy[..last].iter().enumerate().filter(|(_, e)| **e > 0.0);
        let mut terms: Vec<f64> = before.map(|(b, &e)| ln_products(b, e)).collect();
        terms.push(ln_products(last, self.energy[last] + outside - allowed));
        let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Ok(largest + terms.iter().map(|t| (t - largest).exp()).sum::<f64>().ln())
    }
}

/// [`Levels::ln_rank`] of d coordinates.
///
/// # Errors
/// As [`Levels::new`].
pub fn ln_finite_rank(p: &[f64], d: usize, eps: f64) -> Result<f64> {
    Levels::new(p, d, eps)?.ln_rank(eps)
}

fn check(eps: f64) -> Result<()> {
    if eps > 0.0 && eps < 1.0 {
        Ok(())
    } else {
        Err(Error::invalid("eps", eps, "must lie between 0 and 1"))
    }
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
        for (law, theta, d) in
            [(Law::Uniform, 0.6, 3), (Law::Uniform, 1.2, 4), (Law::Sign, 0.4, 12)]
        {
            let p: Vec<f64> = energies(&law, theta).unwrap().into_iter().take(9).collect();
            for eps in [0.3, 0.1, 0.03] {
                let (ours, truth) =
                    (ln_finite_rank(&p, d, eps).unwrap().exp(), brute_force(&p, d, eps));
                // A sign law has one energy many times over, so the steps of its count are those of
                // binomials.
                let bound = (d as f64 * BIN / 2.0).exp();
                let (loose, tight) = (eps * bound.sqrt(), eps / bound.sqrt());
                let (low, high) =
                    (brute_force(&p, d, loose) / bound, brute_force(&p, d, tight) * bound);
                assert!(
                    low <= ours && ours <= high,
                    "{law:?} d = {d}, eps = {eps}: {ours} not in {low} to {high}"
                );
                assert!(
                    (ours / truth - 1.0).abs() < 0.05,
                    "{law:?} d = {d}, eps = {eps}: {ours} {truth}"
                );
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
        let near =
            |d: usize| ln_finite_rank(&p, d, (-0.1 * d as f64).exp()).unwrap() / d as f64 - tilted;
        assert!(
            near(80).abs() < 0.1 && near(80).abs() < near(20).abs(),
            "{} {}",
            near(20),
            near(80)
        );
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
        // The power at which the exponent passes 1, or whether it always or never does.
        let q = largest_power(&p, 0.8);
        assert!((exponent(&p, 0.8, q).unwrap() - 1.0).abs() < 1e-9 && q > 0.0);
        assert!(largest_power(&p, 2.0) <= 0.0 && largest_power(&p, 0.5).is_infinite());
    }

    #[test]
    fn bad_parameters_are_refused() {
        for (d, eps) in [(0, 0.1), (3, 0.0), (3, 1.0), (3, f64::NAN)] {
            assert!(matches!(ln_finite_rank(&[0.9, 0.1], d, eps), Err(Error::InvalidParam { .. })));
        }
    }
}
