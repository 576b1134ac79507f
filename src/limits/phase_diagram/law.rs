//! Laws of one coordinate of a query or a key on \[-1, 1\], and expectations over them.

use crate::error::{Error, Result};
use crate::linalg::decompositions::svd;
use gauss_quad::GaussLegendre;
use ndarray::Array2;
use std::num::NonZeroUsize;
use std::path::Path;

/// The law of one coordinate.
#[derive(Debug, Clone, PartialEq)]
pub enum Law {
    /// Uniform on \[-1, 1\]: the project's synthetic heads.
    Uniform,
    /// -1 or 1, each with probability 1/2: every entry as large as the bound allows.
    Sign,
    /// Given numbers, each as probable as it is frequent.
    Sampled(Rule),
}

/// Points with probabilities that sum to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    pub(super) nodes: Vec<f64>,
    pub(super) weights: Vec<f64>,
}

/// A symmetric tridiagonal matrix: multiplication by w in the orthonormal polynomials of a law.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Recurrence {
    pub diagonal: Vec<f64>,
    /// One fewer than the diagonal, all positive.
    pub beside: Vec<f64>,
}

/// Nodes of each panel of the composite rule for the uniform law.
const PANEL_NODES: usize = 32;

/// A sampled law of more distinct numbers than this is replaced by its Gauss rule, which has the
/// same moments.
const MOST_ATOMS: usize = 1000;
/// Nodes of that rule: moments up to degree 399 agree.
const GAUSS_NODES: usize = 200;
/// Of still more numbers, each group of neighbours is replaced by two points of its mean and
/// variance first.
const MOST_SORTED: usize = 10_000;

impl Law {
    /// The law of the given numbers.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] without numbers or for one outside \[-1, 1\]; those of [`svd`] for
    /// more than 1,000 different ones.
    pub fn sampled(values: &[f64]) -> Result<Self> {
        if values.is_empty() {
            return Err(Error::invalid("law", "no numbers", "a sampled law needs at least one"));
        }
        if let Some(bad) = values.iter().find(|x| !(x.abs() <= 1.0)) {
            return Err(Error::invalid(
                "law",
                bad,
                "numbers must lie in [-1, 1]: divide by the largest magnitude",
            ));
        }
        Ok(Law::Sampled(Rule::of_sample(values)?))
    }

    /// Reads numbers separated by white space, commas or semicolons; `#` begins a comment.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] that names the line of a word that is no number, or of a
    /// number outside \[-1, 1\].
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let mut values = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or("");
            for word in line.split([',', ';', ' ', '\t', '\r']).filter(|w| !w.is_empty()) {
                let number = word.parse::<f64>().ok().filter(|x| x.abs() <= 1.0);
                let number = number.ok_or_else(|| {
                    Error::format(
                        path,
                        format!("line {}", i + 1),
                        "numbers in [-1, 1]",
                        format!("{word:?}"),
                    )
                })?;
                values.push(number);
            }
        }
        if values.is_empty() {
            return Err(Error::format(path, "numbers", "at least one number in [-1, 1]", "none"));
        }
        Self::sampled(&values)
    }

    /// A rule for expectations of functions of theta u that are smooth at scale 1, as ln M is.
    pub(super) fn rule(&self, theta: f64) -> Rule {
        match self {
            Law::Sampled(rule) => rule.clone(),
            Law::Sign => Rule { nodes: vec![-1.0, 1.0], weights: vec![0.5; 2] },
            Law::Uniform => graded_rule(theta),
        }
    }

    /// The first `size` rows of the recurrence, or as many as the law has points.
    pub(super) fn recurrence(&self, size: usize) -> Recurrence {
        match self {
            Law::Uniform => Recurrence {
                diagonal: vec![0.0; size],
                beside: (1..size).map(|n| n as f64 / ((4 * n * n - 1) as f64).sqrt()).collect(),
            },
            Law::Sign => {
                let size = size.min(2);
                Recurrence { diagonal: vec![0.0; size], beside: vec![1.0; size - 1] }
            }
            Law::Sampled(rule) => rule.recurrence(size),
        }
    }

    /// E w^2.
    pub fn second_moment(&self) -> f64 {
        match self {
            Law::Uniform => 1.0 / 3.0,
            Law::Sign => 1.0,
            Law::Sampled(rule) => rule.expectation(|w| w * w),
        }
    }

    /// ln E exp(t w) and its derivative.
    pub fn log_moment(&self, t: f64) -> (f64, f64) {
        match self {
            // cosh t and sinh t / t, without overflow; the series where the difference would
            // cancel.
            Law::Sign => {
                (t.abs() + (-2.0 * t.abs()).exp().ln_1p() - std::f64::consts::LN_2, t.tanh())
            }
            Law::Uniform if t.abs() < 0.1 => {
                let s = t * t;
                let log = s / 6.0 - s * s / 180.0 + s.powi(3) / 2835.0 - s.powi(4) / 37800.0
                    + s.powi(5) / 467_775.0;
                let slope = 1.0 / 3.0 - s / 45.0 + 2.0 * s * s / 945.0 - s.powi(3) / 4725.0
                    + 2.0 * s.powi(4) / 93555.0;
                (log, t * slope)
            }
            Law::Uniform => {
                let (a, tail) = (t.abs(), (-2.0 * t.abs()).exp());
                let log = a + (-tail).ln_1p() - (2.0 * a).ln();
                (log, t.signum() * ((1.0 + tail) / (1.0 - tail) - 1.0 / a))
            }
            Law::Sampled(rule) => {
                let shift = rule.nodes.iter().map(|w| t * w).fold(f64::NEG_INFINITY, f64::max);
                let total = rule.expectation(|w| (t * w - shift).exp());
                let mean = rule.expectation(|w| w * (t * w - shift).exp()) / total;
                (shift + total.ln(), mean)
            }
        }
    }
}

impl Rule {
    fn of_sample(values: &[f64]) -> Result<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let mut atoms: Vec<(f64, f64)> = Vec::new();
        for x in sorted {
            match atoms.last_mut() {
                Some((last, count)) if *last >= x => *count += 1.0,
                _ => atoms.push((x, 1.0)),
            }
        }
        if atoms.len() > 2 * MOST_SORTED {
            let per = 2 * atoms.len().div_ceil(MOST_SORTED);
            let merged = |group: &[(f64, f64)]| {
                let count: f64 = group.iter().map(|a| a.1).sum();
                let mean = group.iter().map(|a| a.0 * a.1).sum::<f64>() / count;
                let deviation =
                    (group.iter().map(|a| (a.0 - mean).powi(2) * a.1).sum::<f64>() / count).sqrt();
                [-1.0, 1.0].map(|sign| ((mean + sign * deviation).clamp(-1.0, 1.0), count / 2.0))
            };
            atoms = atoms.chunks(per).flat_map(merged).collect();
        }
        let total = values.len() as f64;
        let (nodes, weights): (Vec<f64>, Vec<f64>) =
            atoms.iter().map(|a| (a.0, a.1 / total)).unzip();
        let all = Self { nodes, weights };
        if all.nodes.len() > MOST_ATOMS {
            all.recurrence(GAUSS_NODES).gauss_rule()
        } else {
            Ok(all)
        }
    }

    pub(super) fn expectation(&self, f: impl Fn(f64) -> f64) -> f64 {
        self.nodes.iter().zip(&self.weights).map(|(&x, w)| w * f(x)).sum()
    }

    /// Lanczos on multiplication by w from the constant function, every vector made orthogonal to
    /// all before it, twice.
    fn recurrence(&self, size: usize) -> Recurrence {
        let size = size.min(self.nodes.len());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let mut basis: Vec<Vec<f64>> = vec![self.weights.iter().map(|w| w.sqrt()).collect()];
        let (mut diagonal, mut beside) = (Vec::new(), Vec::new());
        loop {
            let last = &basis[basis.len() - 1];
            let mut next: Vec<f64> = last.iter().zip(&self.nodes).map(|(v, x)| v * x).collect();
            diagonal.push(dot(last, &next));
            if basis.len() == size {
                break;
            }
            for _ in 0..2 {
                for v in &basis {
                    let share = dot(v, &next);
                    next.iter_mut().zip(v).for_each(|(n, v)| *n -= share * v);
                }
            }
            let length = dot(&next, &next).sqrt();
            // What is left is rounding: the law has no more points that double precision tells
            // apart.
            if length < 1e-13 {
                break;
            }
            next.iter_mut().for_each(|n| *n /= length);
            beside.push(length);
            basis.push(next);
        }
        Recurrence { diagonal, beside }
    }
}

impl Recurrence {
    /// Golub and Welsch: nodes are the eigenvalues, weights the squared first entries of the
    /// eigenvectors. With I added the matrix has no negative eigenvalue, so they are its singular
    /// values.
    fn gauss_rule(&self) -> Result<Rule> {
        let n = self.diagonal.len();
        let mut matrix = Array2::eye(n);
        for (i, a) in self.diagonal.iter().enumerate() {
            matrix[[i, i]] += a;
        }
        for (i, &b) in self.beside.iter().enumerate() {
            matrix[[i, i + 1]] = b;
            matrix[[i + 1, i]] = b;
        }
        let d = svd(matrix.view())?;
        let weights: Vec<f64> = d.u.row(0).iter().map(|v| v * v).collect();
        Ok(Rule { nodes: d.s.iter().map(|s| (s - 1.0).clamp(-1.0, 1.0)).collect(), weights })
    }
}

/// Gauss-Legendre panels that double in width away from 0, mirrored: ln M(theta u) is singular at
/// theta u = i pi n, and no panel comes nearer to a singularity than a fixed share of its width.
fn graded_rule(theta: f64) -> Rule {
    let gauss = GaussLegendre::new(NonZeroUsize::new(PANEL_NODES).unwrap_or(NonZeroUsize::MIN));
    let mut right = Vec::new();
    let (mut low, mut high) = (0.0, (4.0 / theta).min(1.0));
    loop {
        let half: f64 = (high - low) / 2.0;
        // The density on [-1, 1] is 1/2.
        right.extend(gauss.iter().map(|(x, w)| (low + half * (1.0 + x), w * half / 2.0)));
        if high >= 1.0 {
            break;
        }
        (low, high) = (high, (2.0 * high).min(1.0));
    }
    let (nodes, weights) = right.iter().map(|&(x, w)| (-x, w)).chain(right.iter().copied()).unzip();
    Rule { nodes, weights }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_integrate_what_they_should() {
        for theta in [0.01, 1.0, 30.0, 1000.0] {
            let rule = Law::Uniform.rule(theta);
            for n in 0..20 {
                let expected = if n % 2 == 0 { 1.0 / f64::from(n + 1) } else { 0.0 };
                assert!((rule.expectation(|x| x.powi(n)) - expected).abs() < 1e-14);
            }
        }
        // E ln(1 + (theta u / pi)^2), singular where ln M is.
        let x = 1000.0 / std::f64::consts::PI;
        let closed = (x * x).ln_1p() - 2.0 + 2.0 * x.atan() / x;
        let found = Law::Uniform.rule(1000.0).expectation(|u| ((u * x).powi(2)).ln_1p());
        assert!((found - closed).abs() < 1e-13, "{found} {closed}");
    }

    #[test]
    fn moments_and_their_derivatives_agree_with_sums() {
        let sample = Law::sampled(&[-0.9, 0.1, 0.1, 0.7]).unwrap();
        for law in [Law::Uniform, Law::Sign, sample] {
            for t in [-40.0f64, -2.0, -0.1, -0.099, 1e-3, 0.0999, 0.1, 3.0, 60.0] {
                let rule = law.rule(t.abs().max(1.0));
                let (log, slope) = law.log_moment(t);
                let total = rule.expectation(|w| (t * w).exp());
                let mean = rule.expectation(|w| w * (t * w).exp()) / total;
                assert!(
                    (log - total.ln()).abs() < 1e-13 * (1.0 + log.abs()),
                    "{law:?} {t}: {log} {}",
                    total.ln()
                );
                assert!((slope - mean).abs() < 1e-13, "{law:?} {t}: {slope} {mean}");
            }
        }
    }

    #[test]
    fn a_recurrence_of_a_sample_is_that_of_its_law() {
        // 64 points of Gauss-Legendre with their weights are the uniform law up to degree 127.
        let gauss = GaussLegendre::new(NonZeroUsize::new(64).unwrap());
        let (nodes, weights): (Vec<f64>, Vec<f64>) =
            gauss.iter().map(|(x, w)| (*x, w / 2.0)).unzip();
        let (a, b) = (Rule { nodes, weights }.recurrence(40), Law::Uniform.recurrence(40));
        for (x, y) in a.diagonal.iter().zip(&b.diagonal).chain(a.beside.iter().zip(&b.beside)) {
            assert!((x - y).abs() < 1e-13, "{x} {y}");
        }
        let two = Law::sampled(&[1.0, -1.0, 1.0, -1.0]).unwrap();
        assert_eq!(two.recurrence(9), Law::Sign.recurrence(9));
        assert_eq!(Law::sampled(&[0.25; 3]).unwrap().recurrence(9).diagonal, [0.25]);
    }

    #[test]
    fn many_numbers_become_a_rule_of_the_same_law() {
        let ends =
            |n: u32| (0..n).map(move |i| ((f64::from(i) + 0.5) * 2.0 / f64::from(n) - 1.0).powi(3));
        let exact = |n: u32, f: fn(f64) -> f64| ends(n).map(f).sum::<f64>() / f64::from(n);
        for (n, tolerance) in [(900, 1e-13), (5000, 1e-12), (60_000, 1e-9)] {
            let Law::Sampled(rule) = Law::sampled(&ends(n).collect::<Vec<_>>()).unwrap() else {
                unreachable!()
            };
            assert_eq!(rule.nodes.len(), if n > 1000 { GAUSS_NODES } else { n as usize });
            let functions: [fn(f64) -> f64; 4] =
                [|_| 1.0, |x| x * x, |x| (9.0 * x).exp() / 1e3, |x| (x * x * 4.0).ln_1p()];
            for f in functions {
                let (ours, sum) = (rule.expectation(f), exact(n, f));
                assert!((ours - sum).abs() < tolerance, "{n}: {ours} {sum}");
            }
        }
    }

    #[test]
    fn bad_samples_are_refused_by_name_and_line() {
        assert!(matches!(Law::sampled(&[]), Err(Error::InvalidParam { .. })));
        assert!(matches!(Law::sampled(&[0.0, f64::NAN]), Err(Error::InvalidParam { .. })));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("law.txt");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Law::read(&path)
        };
        assert_eq!(
            read("1, -1\n# note\n1;-1 # end\n").unwrap().recurrence(4),
            Law::Sign.recurrence(4)
        );
        for (text, place) in [
            ("0.5\n0.5 x\n", "line 2"),
            ("1.5", "line 1"),
            ("nan", "line 1"),
            ("# nothing\n", "numbers"),
        ] {
            match read(text) {
                Err(Error::Format { field, .. }) => assert_eq!(field, place),
                other => panic!("{text:?}: {other:?}"),
            }
        }
        assert!(matches!(Law::read(&folder.path().join("none")), Err(Error::Io { .. })));
    }
}
