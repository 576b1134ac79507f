//! The head of an instance: entries bounded by Gamma, logits that are affine in Hamming distances.
//!
//! With u, w in {-1, 1}^32 for the bits, 32 further coordinates and beta = 1/64,
//!
//! ```text
//! Q_i = Gamma [u_i, 1],   K_j = Gamma [w_j, 0]  (real),   K = Gamma kappa [0, 1]  (as many dummies)
//! logit of a real pair = x (1 - 2 dist / 32),   of a dummy = x kappa,   x = Gamma^2 / 2
//! ```
//!
//! V is 1 on real keys and 0 on dummies, so O_i = R_i / (R_i + M) with R_i the sum of exponentials
//! of row i over real keys and M = n exp(x kappa). kappa in [-1, 1] is chosen such that a row with
//! a near pair has O_i about 1/2.
//!
//! The adapter is LoRA's start on the query projection: B_Q = 0, and A_Q picks the last coordinate
//! so that K A_Q^T is 1 on dummies and 0 on real keys. With G = 1, (dS K A_Q^T)_i = -O_i (1 - O_i),
//! and as the last column of X_Q is Gamma throughout, the last row of dB_Q is -beta Gamma sum_i O_i
//! (1 - O_i): the gradient alone tells. With the papers' squared loss and Y = 0 the upstream
//! gradient is O itself, and O_i (1 - O_i) becomes O_i^2 (1 - O_i) ([`Form`]).

use super::instance::{BITS, Instance, NEAR, NULL_DISTANCE, WEIGHTS};
use crate::attention::problem::{Adapter, Hidden, Projection, Source};
use crate::attention::{AttentionProblem, Mask, Objective, Qkv, SoftmaxKind};
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array2, s};

/// Width of queries and keys.
pub const HEAD_DIM: usize = 2 * BITS;

/// The loss of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// G = 1, given.
    Given,
    /// 1/2 ||O - Y||^2 with Y = 0, as \[AS24\] and \[CL-LoRA\] have it: G = O.
    Squared,
}

impl Form {
    /// p in O^p (1 - O): what a row adds to the gradient.
    pub fn power(self) -> i32 {
        match self {
            Form::Given => 1,
            Form::Squared => 2,
        }
    }

    /// O^p (1 - O).
    pub fn of_row(self, output: f64) -> f64 {
        output.powi(self.power()) * (1.0 - output)
    }
}

/// Everything that the size of an instance and Gamma settle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Embedding {
    /// n: queries, real keys and dummies each.
    pub size: usize,
    /// Largest |entry| of Q and K.
    pub gamma: f64,
    /// Logit of a dummy key.
    pub dummy_logit: f64,
}

impl Embedding {
    /// Chooses the dummies' logit for `size` keys.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a gamma that is not positive and finite or whose exponentials
    /// overflow.
    pub fn new(size: usize, gamma: f64) -> Result<Self> {
        if !(gamma > 0.0 && gamma.is_finite() && (0.5 * gamma * gamma).exp().is_finite()) {
            return Err(Error::invalid(
                "gamma",
                gamma,
                "must be positive, and exp(gamma^2 / 2) must not overflow",
            ));
        }
        let mut embedding = Self { size, gamma, dummy_logit: 0.0 };
        let x = 0.5 * gamma * gamma;
        let wanted = (embedding.background() + embedding.pair(NEAR)).ln() - (size as f64).ln();
        embedding.dummy_logit = wanted.clamp(-x, x);
        // A key of zeros would leave the adapter nothing to pick.
        if embedding.dummy_logit.abs() < 1e-3 * x {
            embedding.dummy_logit = 1e-3 * x;
        }
        Ok(embedding)
    }

    /// Gamma = c sqrt(ln L) with L = 2 n keys.
    ///
    /// # Errors
    /// As [`Embedding::new`].
    pub fn at_threshold_ratio(size: usize, c: f64) -> Result<Self> {
        Self::new(size, c * (2.0 * size as f64).ln().sqrt())
    }

    /// exp(logit) of a real pair at a distance.
    pub fn pair(&self, distance: u32) -> f64 {
        (0.5 * self.gamma * self.gamma * (1.0 - 2.0 * f64::from(distance) / BITS as f64)).exp()
    }

    /// Mean of R_i over null instances: n times the mean over the code's distances.
    pub fn background(&self) -> f64 {
        let (sum, count) = WEIGHTS.iter().fold((0.0, 0.0), |(sum, count), &(distance, n)| {
            (sum + f64::from(n) * self.pair(distance), count + f64::from(n))
        });
        self.size as f64 * sum / count
    }

    /// M, the sum of exponentials of the dummies.
    pub fn dummy_mass(&self) -> f64 {
        self.size as f64 * self.dummy_logit.exp()
    }

    /// Largest R_i that a null instance can have.
    pub fn largest_null(&self) -> f64 {
        self.size as f64 * self.pair(NULL_DISTANCE)
    }

    /// The head whose output and query-adapter gradient answer an instance.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for an instance of another size.
    pub fn head<T: Real>(&self, instance: &Instance, form: Form) -> Result<AttentionProblem<T>> {
        let n = self.size;
        if instance.queries.len() != n || instance.keys.len() != n {
            let got = (instance.queries.len(), instance.keys.len());
            return Err(Error::shape("Embedding::head", "instance", (n, n), got));
        }
        let entry = |bit: bool| T::of(if bit { -self.gamma } else { self.gamma });
        let bit = |word: u32, at: usize| word >> at & 1 == 1;
        let kappa = self.dummy_logit / (0.5 * self.gamma * self.gamma);
        let dummy = T::of(self.gamma * kappa);
        let query = Array2::from_shape_fn((n, HEAD_DIM), |(i, c)| {
            entry(c < BITS && bit(instance.queries[i], c))
        });
        let key = Array2::from_shape_fn((2 * n, HEAD_DIM), |(j, c)| match (j < n, c < BITS) {
            (true, true) => entry(bit(instance.keys[j], c)),
            (false, false) => dummy,
            _ => T::zero(),
        });
        let mut value = Array2::zeros((2 * n, 1));
        value.slice_mut(s![..n, ..]).fill(T::one());
        let mut lora_a = Array2::zeros((1, HEAD_DIM));
        lora_a[[0, HEAD_DIM - 1]] = T::one() / dummy;
        let adapter = Adapter { lora_a, lora_b: Array2::zeros((HEAD_DIM, 1)) };
        let identity = |width| Projection { weight: Array2::eye(width), adapter: None };
        let source = Source::Hidden(Box::new(Hidden {
            inputs: Qkv {
                query: query.into_shared(),
                key: key.into_shared(),
                value: value.into_shared(),
            },
            projections: Qkv {
                query: Projection { adapter: Some(adapter), ..identity(HEAD_DIM) },
                key: identity(HEAD_DIM),
                value: identity(1),
            },
            scaling: 1.0,
        }));
        let objective = match form {
            Form::Given => Objective::UpstreamGradient(Array2::ones((n, 1))),
            Form::Squared => Objective::Target(Array2::zeros((n, 1))),
        };
        AttentionProblem::new(
            source,
            objective,
            Mask::Full,
            SoftmaxKind::Standard,
            1.0 / HEAD_DIM as f64,
        )
    }
}
