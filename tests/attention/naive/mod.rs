//! An adapted head computed again by plain loops, sharing no arithmetic with the crate.
//!
//! Probabilities come from P_ij = 1 / sum_l exp(s_il - s_ij), which needs no row maximum: an
//! overflow to infinity is a probability of 0.

#![allow(dead_code)] // Each test binary uses a part.

use ndarray::Array2;
use peft_limits::attention::problem::{Adapter, AttentionProblem, Hidden, Projection, Source};
use peft_limits::attention::{Gradients, Mask, Objective, Qkv, SoftmaxKind};
use peft_limits::check::compare::gap;
use peft_limits::linalg::{Real, norms};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

pub const LETTERS: [char; 3] = ['Q', 'K', 'V'];
pub const BOTH_MASKS: [Mask; 2] = [Mask::Full, Mask::Causal];
pub const BOTH_SOFTMAX: [SoftmaxKind; 2] = [SoftmaxKind::Standard, SoftmaxKind::One];

/// The lengths and widths of a head; `inputs` are the three d_in.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub queries: usize,
    pub keys: usize,
    pub inputs: [usize; 3],
    pub head_dim: usize,
    pub value_dim: usize,
    pub rank: usize,
}

impl Sizes {
    pub fn width(&self, p: usize) -> usize {
        if p == 2 { self.value_dim } else { self.head_dim }
    }
}

/// A head with adapters on Q, K and V (index 0, 1, 2).
#[derive(Debug, Clone)]
pub struct Head {
    pub x: [Array2<f64>; 3],
    pub w: [Array2<f64>; 3],
    pub a: [Array2<f64>; 3],
    pub b: [Array2<f64>; 3],
    pub scaling: f64,
    pub beta: f64,
    pub mask: Mask,
    pub softmax: SoftmaxKind,
    pub objective: Objective<f64>,
}

/// Independent normal entries of the given deviation.
pub fn normal(rng: &mut ChaCha8Rng, rows: usize, columns: usize, deviation: f64) -> Array2<f64> {
    Array2::from_shape_simple_fn((rows, columns), || {
        let x: f64 = StandardNormal.sample(rng);
        x * deviation
    })
}

/// a b by three loops.
pub fn multiply(a: &Array2<f64>, b: &Array2<f64>) -> Array2<f64> {
    assert_eq!(a.ncols(), b.nrows());
    Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
        (0..a.ncols()).map(|k| a[[i, k]] * b[[k, j]]).sum()
    })
}

fn transposed(a: &Array2<f64>) -> Array2<f64> {
    Array2::from_shape_fn((a.ncols(), a.nrows()), |(i, j)| a[[j, i]])
}

impl Head {
    /// A random head whose logits have a deviation of about 1; `target` chooses Y or G.
    pub fn draw(s: Sizes, mask: Mask, softmax: SoftmaxKind, target: bool, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rows = |p: usize| if p == 0 { s.queries } else { s.keys };
        let x = [0, 1, 2].map(|p| normal(&mut rng, rows(p), s.inputs[p], 1.0));
        let w = [0, 1, 2]
            .map(|p| normal(&mut rng, s.inputs[p], s.width(p), 1.0 / (s.inputs[p] as f64).sqrt()));
        let a = [0, 1, 2].map(|p| normal(&mut rng, s.rank, s.width(p), 0.5));
        let b = [0, 1, 2].map(|p| normal(&mut rng, s.inputs[p], s.rank, 0.5));
        let y = normal(&mut rng, s.queries, s.value_dim, 1.0);
        Self {
            x,
            w,
            a,
            b,
            scaling: 0.75,
            beta: 1.1 / (s.head_dim as f64).sqrt(),
            mask,
            softmax,
            objective: if target { Objective::Target(y) } else { Objective::UpstreamGradient(y) },
        }
    }

    /// The same head for the crate.
    pub fn problem(&self) -> AttentionProblem<f64> {
        let projection = |p: usize| Projection {
            weight: self.w[p].clone(),
            adapter: Some(Adapter { lora_a: self.a[p].clone(), lora_b: self.b[p].clone() }),
        };
        let input = |p: usize| self.x[p].clone().into_shared();
        let hidden = Hidden {
            inputs: Qkv { query: input(0), key: input(1), value: input(2) },
            projections: Qkv { query: projection(0), key: projection(1), value: projection(2) },
            scaling: self.scaling,
        };
        let source = Source::Hidden(Box::new(hidden));
        AttentionProblem::new(source, self.objective.clone(), self.mask, self.softmax, self.beta)
            .unwrap()
    }

    /// X_p (W_p + (alpha/r) B_p A_p).
    pub fn project(&self, p: usize) -> Array2<f64> {
        let update = multiply(&self.b[p], &self.a[p]);
        let weight = Array2::from_shape_fn(self.w[p].dim(), |(i, j)| {
            self.w[p][[i, j]] + self.scaling * update[[i, j]]
        });
        multiply(&self.x[p], &weight)
    }

    fn visible(&self, i: usize, j: usize) -> bool {
        self.mask == Mask::Full || j <= i
    }

    /// P from its definition.
    pub fn probabilities(&self) -> Array2<f64> {
        let (q, k) = (self.project(0), self.project(1));
        probabilities(&q, &k, self.beta, self.mask, self.softmax)
    }

    pub fn output(&self) -> Array2<f64> {
        multiply(&self.probabilities(), &self.project(2))
    }

    /// 1/2 ||O - Y||^2, or <G, O>, whose gradient in O is G.
    pub fn loss(&self) -> f64 {
        let output = self.output();
        let terms = output.iter().zip(self.objective.tensor());
        match self.objective {
            Objective::Target(_) => terms.map(|(o, y)| 0.5 * (o - y) * (o - y)).sum(),
            Objective::UpstreamGradient(_) => terms.map(|(o, g)| o * g).sum(),
        }
    }

    /// Largest |logit| over visible pairs, from absolute values of everything it is made of.
    pub fn largest_logit(&self) -> f64 {
        let (q, k) = (self.absolute_projection(0), self.absolute_projection(1));
        let s = multiply(&q, &transposed(&k));
        s.indexed_iter()
            .filter(|((i, j), _)| self.visible(*i, *j))
            .fold(0.0f64, |m, (_, x)| m.max(x * self.beta))
    }

    fn absolute_projection(&self, p: usize) -> Array2<f64> {
        let abs = |a: &Array2<f64>| a.mapv(f64::abs);
        let update = multiply(&abs(&self.b[p]), &abs(&self.a[p])) * self.scaling.abs();
        multiply(&abs(&self.x[p]), &(abs(&self.w[p]) + update))
    }

    /// The magnitude of each result: the formulas of the gradient with every term taken positive.
    ///
    /// A computation with unit roundoff u is off by at most a small multiple of u times these,
    /// whatever cancels.
    pub fn magnitudes(&self) -> Vec<(String, Array2<f64>)> {
        let abs = |a: &Array2<f64>| a.mapv(f64::abs);
        let p = self.probabilities();
        let [q, k, v] = [0, 1, 2].map(|i| self.absolute_projection(i));
        let output = multiply(&p, &v);
        let upstream = match &self.objective {
            Objective::Target(y) => &output + &abs(y),
            Objective::UpstreamGradient(g) => abs(g),
        };
        let gv = multiply(&upstream, &transposed(&v));
        let ds = Array2::from_shape_fn(p.dim(), |(i, j)| {
            let delta: f64 = (0..output.ncols()).map(|c| upstream[[i, c]] * output[[i, c]]).sum();
            p[[i, j]] * (gv[[i, j]] + delta)
        });
        let d = [
            multiply(&ds, &k) * self.beta,
            multiply(&transposed(&ds), &q) * self.beta,
            multiply(&transposed(&p), &upstream),
        ];
        let mut all = vec![("O".to_string(), output)];
        for (i, letter) in LETTERS.into_iter().enumerate() {
            let dw = multiply(&transposed(&abs(&self.x[i])), &d[i]);
            let s = self.scaling.abs();
            all.push((format!("dA{letter}"), multiply(&transposed(&abs(&self.b[i])), &dw) * s));
            all.push((format!("dB{letter}"), multiply(&dw, &transposed(&abs(&self.a[i]))) * s));
            all.push((format!("dW{letter}"), dw));
            all.push((format!("d{letter}"), d[i].clone()));
        }
        all
    }

    /// Allowed error relative to [`Head::magnitudes`] at machine epsilon `eps`.
    ///
    /// A sum of n terms loses n eps/2 in the worst case; the deepest path sums over d_in, r, d_h (a
    /// logit), keys (a row of P V), d_v (G V^T), keys or queries, and rows of X. A logit s off by
    /// its share of |s| eps changes exp by as much in relative terms, and it is computed twice; exp
    /// itself adds 2 eps.
    pub fn tolerance(&self, eps: f64) -> f64 {
        let rows = self.x[0].nrows() + 2 * self.x[1].nrows();
        let width = self.x.iter().map(|x| x.ncols()).max().unwrap_or(0);
        let terms = rows + width + self.a[0].nrows() + self.a[0].ncols() + 2 * self.a[2].ncols();
        eps * (terms as f64
            + 8.0
            + 2.0 * self.largest_logit() * (width + self.a[0].nrows() + self.a[0].ncols()) as f64)
    }
}

/// P from its definition, for given Q and K.
pub fn probabilities(
    q: &Array2<f64>,
    k: &Array2<f64>,
    beta: f64,
    mask: Mask,
    softmax: SoftmaxKind,
) -> Array2<f64> {
    let s = multiply(q, &transposed(k)) * beta;
    let visible = |i: usize, j: usize| mask == Mask::Full || j <= i;
    Array2::from_shape_fn(s.dim(), |(i, j)| {
        if !visible(i, j) {
            return 0.0;
        }
        let mut sum = if softmax == SoftmaxKind::One { (-s[[i, j]]).exp() } else { 0.0 };
        for l in (0..s.ncols()).filter(|&l| visible(i, l)) {
            sum += (s[[i, l]] - s[[i, j]]).exp();
        }
        1.0 / sum
    })
}

/// Everything a routine returned, by name; dQ, dK, dV too when dW is there.
pub fn results<T: Real>(gradients: &Gradients<T>) -> Vec<(String, Array2<f64>)> {
    let widen = |a: &Array2<T>| a.mapv(|x| x.widen());
    let mut all = vec![("O".to_string(), widen(&gradients.output))];
    let sets = [
        ("", &gradients.projected),
        ("W", &gradients.weight),
        ("A", &gradients.lora_a),
        ("B", &gradients.lora_b),
    ];
    for (kind, set) in sets {
        for (letter, d) in set.named() {
            if let Some(d) = d {
                all.push((format!("d{kind}{letter}"), widen(d)));
            }
        }
    }
    all
}

/// The result of a name.
#[track_caller]
pub fn find<'a>(all: &'a [(String, Array2<f64>)], name: &str) -> &'a Array2<f64> {
    &all.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}")).1
}

/// Whether ||got - want||_F <= tolerance ||magnitude||_F, with the reason if not.
pub fn within(
    name: &str,
    got: &Array2<f64>,
    want: &Array2<f64>,
    magnitude: &Array2<f64>,
    tolerance: f64,
) -> Result<(), String> {
    let measured = gap(&got.view(), &want.view());
    if !measured.relative_frobenius.is_finite() {
        return Err(format!("{name}: {measured}"));
    }
    let off = norms::frobenius(&(got - want).view());
    let allowed = tolerance * norms::frobenius(&magnitude.view());
    if off <= allowed {
        Ok(())
    } else {
        Err(format!("{name}: off by {off:.3e}, allowed {allowed:.3e}; {measured}"))
    }
}

/// [`within`] for every result of `got`, which `want` must hold too.
pub fn all_within<T: Real, U: Real>(
    head: &Head,
    got: &Gradients<T>,
    want: &Gradients<U>,
    tolerance: f64,
) -> Result<(), String> {
    let (want, magnitudes) = (results(want), head.magnitudes());
    for (name, got) in results(got) {
        within(&name, &got, find(&want, &name), find(&magnitudes, &name), tolerance)?;
    }
    Ok(())
}
