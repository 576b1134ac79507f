//! The two-layer linear model with a finite sample and noise: both sides of the theorem (\[S2FT\],
//! theorem 4.2 and F.7).
//!
//! With W = W2 W1 the pretrained map and S the second moment of the inputs in both worlds, unit
//! energies
//! ||. S^(1/2)||^2 = 1 of a shift Z that both tasks share, of R that only the new task has, of C that only the other has:
//!
//! ```text
//! new task   y = (W + Z + t R) x + sigma z,  n samples       other task   y = (W + Z + C) x       t >= 0
//! ```
//!
//! | world | Z | what it is |
//! |---|---|---|
//! | sparse | W2[:, I] M with few channels I | the theorem's assumption (F.4), but for t R |
//! | dense | of the same rank, no channels | violates it |
//!
//! Rows I of W1 move the map inside the range of W2[:, I] (projection P), so that over samples
//! (`two_layer`)
//!
//! ```text
//! E risk(S2FT) = ||(1 - P)(Z + C) S^(1/2)||^2 + ||P (C - t R) S^(1/2)||^2 + sigma^2 k d / (n - d - 1)
//!             <= (1 + eps^2) risk(pretrained) + the last term,    eps^2 = ||P (C - t R) S^(1/2)||^2 / risk(pretrained)
//! risk(LoRA)   = ||(C - t R) S^(1/2)||^2  without noise, where its rank reaches that of Z + t R
//! ```

use crate::harness::Point;
use crate::two_layer::{Range, Task, TwoLayer, Update};
use ndarray::{Array2, Axis};
use peft_limits::Result;
use peft_limits::report::Row;
use peft_limits::streams::generator;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, StandardNormal};

/// Inputs, hidden units, outputs.
const SIDE: usize = 32;
/// Channels of the slice; LoRA of the same number of numbers has half as many ranks.
pub(super) const CHANNELS: usize = 8;
pub(super) const RANK: usize = CHANNELS / 2;
/// Rank of Z; with R it is LoRA's.
const SHARED_RANK: usize = RANK - 1;
const SAMPLES: usize = 256;
const NOISE: f64 = 0.3;
/// Random instances.
pub(super) const INSTANCES: u64 = 10;
const OWN_SHIFTS: [f64; 6] = [0.0, 0.4, 0.8, 1.2, 1.6, 2.0];
pub(super) const WORLDS: [&str; 2] = ["sparse", "dense"];
pub(super) const LORA: &str = "lora";
pub(super) const S2FT: &str = "s2ft, the channels of the shift";
pub(super) const S2FT_RANDOM: &str = "s2ft, random channels";
pub(super) const OTHER: &str = "risk on the other task";
pub(super) const NEW: &str = "risk on the new task";
pub(super) const LIMIT: &str = "bound";

pub(super) fn point(seed: u64) -> Point {
    Point::new(format!("linear model, seed {seed}")).with("kind", "linear").with("seed", seed)
}

pub(super) fn measure(point: &Point) -> Result<Vec<Row>> {
    let seed = point.u64("seed")?;
    let mut rng = generator(seed, "generalization/linear", 0);
    let mut normal = |rows: usize, columns: usize| {
        Array2::<f64>::from_shape_simple_fn((rows, columns), || StandardNormal.sample(&mut rng))
    };
    let model = TwoLayer {
        first: normal(SIDE, SIDE) / (SIDE as f64).sqrt(),
        second: normal(SIDE, SIDE) / (SIDE as f64).sqrt(),
    };
    let mix = normal(SIDE, 2 * SIDE) / (2.0 * SIDE as f64).sqrt();
    let moment = mix.dot(&mix.t());
    let mut units: Vec<usize> = (0..SIDE).collect();
    units.shuffle(&mut generator(seed, "generalization/units", 0));
    let (shifted, random) = (units[..CHANNELS].to_vec(), units[CHANNELS..2 * CHANNELS].to_vec());
    let unit = |shift: Array2<f64>| {
        let energy = (&shift.dot(&moment) * &shift).sum();
        shift / energy.sqrt()
    };
    let sparse = unit(
        model
            .second
            .select(Axis(1), &shifted)
            .dot(&normal(CHANNELS, SHARED_RANK))
            .dot(&normal(SHARED_RANK, SIDE)),
    );
    let dense = unit(normal(SIDE, SHARED_RANK).dot(&normal(SHARED_RANK, SIDE)));
    let own = unit(normal(SIDE, 1).dot(&normal(1, SIDE)));
    let others = unit(normal(SIDE, SIDE));
    let product = model.product();
    let mut rows = Vec::new();
    for (world, shared) in WORLDS.into_iter().zip([sparse, dense]) {
        let other = Task { target: &product + &shared + &others, second_moment: moment.clone() };
        let pretrained = other.risk(&product)?;
        for t in OWN_SHIFTS {
            let new =
                Task { target: &product + &shared + &(&own * t), second_moment: moment.clone() };
            let sampled = new.sampled(
                SAMPLES,
                NOISE,
                &mut generator(seed, &format!("generalization/{world}/{t}"), 0),
            )?;
            let apart = new.risk(&other.target)?;
            let slice = |units: &[usize]| Update::FirstRows(units.to_vec());
            let methods = [
                (S2FT, slice(&shifted)),
                (S2FT_RANDOM, slice(&random)),
                (LORA, Update::FirstLowRank(RANK)),
                ("full", Update::FirstFull),
            ];
            for (method, update) in methods {
                let tuned = model.fine_tune(&sampled, &update)?;
                let bound = match &update {
                    Update::FirstRows(units) => {
                        let basis = Range::of(&model.second.select(Axis(1), units))?.basis;
                        let moved = basis.dot(&basis.t()).dot(&(&other.target - &new.target));
                        let spread = (&moved.dot(&moment) * &moved).sum();
                        let variance =
                            NOISE * NOISE * (CHANNELS * SIDE) as f64 / (SAMPLES - SIDE - 1) as f64;
                        pretrained + spread + variance
                    }
                    _ => apart,
                };
                rows.push(
                    Row::new()
                        .with("world", world)
                        .with("t", t)
                        .with("method", method)
                        .with("trained", update.trained(&model))
                        .with(OTHER, other.risk(&tuned)? / pretrained)
                        .with(NEW, new.risk(&tuned)? / new.risk(&product)?)
                        .with(LIMIT, bound / pretrained),
                );
            }
        }
    }
    Ok(rows)
}
