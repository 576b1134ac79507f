//! What a random head costs, in closed form: the exponents behind the norm threshold, for any L.
//!
//! The head: d = kappa ln L, beta = 1/d, Q = Gamma u, K = Gamma w, the coordinates of u and w
//! independent from a law on \[-1, 1\]. Then S_ij = theta sum_t u_it w_jt with theta = Gamma^2 /
//! d = c^2 / kappa, and P is, up to sampling, the d-fold tensor product of a kernel of one
//! coordinate. Every cost is L^(1 + exponent) up to powers of ln L; the functions here return the
//! exponent, without the 1 of the tokens.
//!
//! Derivations: paper-notes/phase-diagram.md.

mod energies;
pub mod law;
mod one_sided_jacobi;
pub mod polynomials;
pub mod rank;
pub mod sample;
pub mod sparsity;

pub use energies::{MAX_THETA, energies};
pub use law::Law;

use crate::error::{Error, Result};

/// A family of random heads: the law of a coordinate and d / ln L.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    law: Law,
    kappa: f64,
}

/// Exponents of one c, all without the 1 of the tokens. `None`: no such rank exists (see
/// [`rank::exponent`]).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exponents {
    /// Gamma / sqrt(ln L).
    pub c: f64,
    /// c^2 / kappa.
    pub theta: f64,
    /// The eps-rank at any fixed eps.
    pub rank: f64,
    /// The eps-rank at eps = 1/L.
    pub rank_error_1_over_l: Option<f64>,
    /// Every monomial up to the typical degree.
    pub all_monomials: f64,
    /// Every monomial up to the degree that is certified for a fixed relative error of exp.
    pub certified: f64,
    /// The same for a relative error of 1/L.
    pub certified_error_1_over_l: f64,
    /// Keys that hold a query's weight.
    pub support: f64,
    /// Keys that hold the sum of a query's squared weights.
    pub support_squared: f64,
}

impl Model {
    /// # Errors
    /// [`Error::InvalidParam`] unless kappa is positive and finite.
    pub fn new(law: Law, kappa: f64) -> Result<Self> {
        if !(kappa > 0.0 && kappa.is_finite()) {
            return Err(Error::invalid("kappa", kappa, "d / ln L must be positive and finite"));
        }
        Ok(Self { law, kappa })
    }

    /// The law of a coordinate.
    pub fn law(&self) -> &Law {
        &self.law
    }

    /// d / ln L.
    pub fn kappa(&self) -> f64 {
        self.kappa
    }

    /// theta = c^2 / kappa.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] unless c is positive and theta at most [`MAX_THETA`].
    pub fn theta(&self, c: f64) -> Result<f64> {
        if !(c > 0.0 && c.is_finite()) {
            return Err(Error::invalid("c", c, "Gamma / sqrt(ln L) must be positive and finite"));
        }
        let theta = c * c / self.kappa;
        if theta > MAX_THETA {
            let least = (MAX_THETA * self.kappa).sqrt();
            return Err(Error::invalid(
                "c",
                c,
                format!("at kappa = {} must be at most {least:.1}", self.kappa),
            ));
        }
        Ok(theta)
    }

    /// All exponents at one c.
    ///
    /// # Errors
    /// As [`Model::theta`].
    pub fn exponents(&self, c: f64) -> Result<Exponents> {
        let theta = self.theta(c)?;
        let p = energies(&self.law, theta)?;
        Ok(Exponents {
            c,
            theta,
            rank: rank::entropy(&p) * self.kappa,
            rank_error_1_over_l: rank::exponent(&p, self.kappa, 1.0),
            all_monomials: polynomials::all_monomials_exponent(&p, self.kappa),
            certified: polynomials::certified_exponent(c, self.kappa, 0.0),
            certified_error_1_over_l: polynomials::certified_exponent(c, self.kappa, 1.0),
            support: sparsity::support_exponent(&self.law, theta, self.kappa, 1.0),
            support_squared: sparsity::support_exponent(&self.law, theta, self.kappa, 2.0),
        })
    }

    /// d = ceil(kappa ln L), at least 1.
    pub fn head_dim(&self, tokens: f64) -> usize {
        ((self.kappa * tokens.ln()).ceil() as usize).max(1)
    }

    /// theta of a head of that many tokens: c^2 ln L / d with the whole d of [`Model::head_dim`].
    pub fn finite_theta(&self, c: f64, tokens: f64) -> f64 {
        c * c * tokens.ln() / self.head_dim(tokens) as f64
    }

    /// eps-rank of P (relative Frobenius error) at this L and its d, as the number of tokens grows
    /// at fixed d.
    ///
    /// # Errors
    /// As [`Model::theta`]; [`Error::InvalidParam`] for L < 2 or eps outside (0, 1).
    pub fn finite_rank(&self, c: f64, tokens: f64, eps: f64) -> Result<f64> {
        if !(tokens >= 2.0 && tokens.is_finite()) {
            return Err(Error::invalid("length", tokens, "must be at least 2 and finite"));
        }
        self.theta(c)?;
        let p = energies(&self.law, self.finite_theta(c, tokens))?;
        Ok(rank::ln_finite_rank(&p, self.head_dim(tokens), eps)?.exp())
    }

    /// c at which the softmax condenses on O(1) keys: the support exponent reaches 0. `None` if it
    /// never does.
    pub fn condensation(&self) -> Option<f64> {
        // The exponent falls with theta towards 1 - kappa times the entropy that the largest keys
        // cost.
        first_root(self.largest_c(), |c| {
            Some(sparsity::raw_support_exponent(&self.law, c * c / self.kappa, self.kappa, 1.0))
        })
    }

    /// c and exponent where the low-rank and the sparse cost are equal: the top of the hard middle
    /// at fixed eps.
    pub fn middle(&self) -> Option<(f64, f64)> {
        let rank = |c: f64| self.rank_at(c, 0.0);
        let gap = |c: f64| {
            Some(
                sparsity::support_exponent(&self.law, c * c / self.kappa, self.kappa, 1.0)
                    - rank(c)?,
            )
        };
        let c = first_root(self.largest_c(), gap)?;
        Some((c, rank(c)?))
    }

    /// c from which the best rank at eps = L^-q is no longer sub-quadratic. `None` if it always is.
    pub fn rank_is_quadratic_from(&self, q: f64) -> Option<f64> {
        first_root(self.largest_c(), |c| Some(1.0 - self.rank_at(c, q)?))
    }

    /// c from which certified polynomials at relative error L^-q are no longer sub-quadratic.
    pub fn certified_is_quadratic_from(&self, q: f64) -> Option<f64> {
        first_root(self.largest_c(), |c| {
            Some(1.0 - polynomials::certified_exponent(c, self.kappa, q))
        })
    }

    fn rank_at(&self, c: f64, q: f64) -> Option<f64> {
        let p = energies(&self.law, c * c / self.kappa).ok()?;
        rank::exponent(&p, self.kappa, q)
    }

    fn largest_c(&self) -> f64 {
        (MAX_THETA.min(100.0) * self.kappa).sqrt()
    }
}

/// Where a function that is positive at small c first turns negative: a scan for the sign, then
/// bisection.
fn first_root(largest: f64, f: impl Fn(f64) -> Option<f64>) -> Option<f64> {
    const STEPS: usize = 64;
    let mut low = largest * 1e-3;
    if f(low)? <= 0.0 {
        return None;
    }
    // Finer at small c, where the curves of high accuracy cross.
    let mut high = (1..=STEPS).map(|i| largest * (i as f64 / STEPS as f64).powi(2)).find(|&c| {
        let below = f(c).is_some_and(|y| y <= 0.0);
        if !below {
            low = low.max(c);
        }
        below
    })?;
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if f(middle)? > 0.0 { low = middle } else { high = middle }
    }
    Some(high)
}
