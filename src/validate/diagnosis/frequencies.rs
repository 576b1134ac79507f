//! Rotary embeddings of other frequencies: scaled as for long contexts, or computed in a half
//! format.

use super::forward::{one_part, whole_table};
use super::{Context, Fault, Tested};
use crate::blocks::rope::{Rotary, Scaling, rope_backward, rope_forward};
use crate::cost::Cost;
use crate::error::Result;
use crate::model::{Place, Point};
use crate::validate::reference::Variant;
use ndarray::Array2;
use std::ops::Range;

/// Rotary angles from other frequencies: scaled as for long contexts, or computed in a half format.
pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let config = &context.case.model.config;
    let (half, theta) = (config.head_dim / 2, config.rope_theta);
    // What follows takes whole heads with frequencies that nothing scales.
    if config.options.rotaries.first() != Some(&Rotary::default()) {
        return Ok(());
    }
    let Some(parts) = one_part(context) else { return Ok(()) };
    let plain: Vec<f64> =
        (0..half).map(|j| theta.powf(-2.0 * j as f64 / config.head_dim as f64)).collect();
    let llama3 = |factor: f64, low: f64, high: f64, original: f64| -> Vec<f64> {
        let scale = |f: &f64| {
            let wave = 2.0 * std::f64::consts::PI / f;
            if wave < original / high {
                *f
            } else if wave > original / low {
                f / factor
            } else {
                let smooth = (original / wave - low) / (high - low);
                (1.0 - smooth) * f / factor + smooth * f
            }
        };
        plain.iter().map(scale).collect()
    };
    let mut candidates: Vec<(String, Vec<f64>)> = Vec::new();
    let own = config.max_position_embeddings as f64;
    for factor in [8.0, 32.0, 4.0, 2.0, 16.0] {
        for original in [8192.0, own, own / factor, 4096.0, 2048.0, 16.0, 32.0, 64.0, 128.0] {
            let values = llama3(factor, 1.0, 4.0, original);
            candidates.push((
                format!("scaled as for Llama 3.1 (factor {factor}, original length {original})"),
                values,
            ));
        }
    }
    for factor in [2.0, 4.0, 8.0, 16.0, 32.0, 0.5, 0.25] {
        candidates.push((
            format!("divided by {factor} (linear scaling)"),
            plain.iter().map(|f| f / factor).collect(),
        ));
        let base = theta
            * f64::powf(factor, config.head_dim as f64 / (config.head_dim as f64 - 2.0).max(1.0));
        let values =
            (0..half).map(|j| base.powf(-2.0 * j as f64 / config.head_dim as f64)).collect();
        candidates.push((format!("those of a base scaled by NTK (factor {factor})"), values));
    }
    let mut tried: Vec<Vec<f64>> = vec![plain.clone()];
    let best = |values: &[f64], exact: bool| -> Array2<f64> { angles(context, values, exact) };
    for (text, values) in candidates {
        let same =
            |other: &Vec<f64>| other.iter().zip(&values).all(|(a, b)| (a / b - 1.0).abs() < 1e-9);
        if tested.settled_well() {
            return Ok(());
        }
        if tried.iter().any(same) {
            continue;
        }
        tried.push(values.clone());
        let what = format!("the rotary frequencies are {text}; the config declares no scaling");
        let fault = Fault::new(
            "rotary-scaling",
            what,
            "give rope_scaling the same value in config and trainer",
        );
        turned(context, fault, &best(&values, true), &parts, tested)?;
    }
    yarn(context, tested)?;
    if !tested.settled() {
        let what = "rotary positions, frequencies and angles are computed in a half format, which \
                    is wrong from a few hundred tokens on";
        let fault = Fault::new(
            "rotary-precision",
            what,
            "compute angles in float32 (autocast off), and cast cos and sin only",
        );
        turned(context, fault, &best(&plain, false), &parts, tested)?;
    }
    Ok(())
}

/// Rotary embeddings scaled by YaRN, which also changes the size of cos and sin.
fn yarn(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let own = context.case.model.config.max_position_embeddings;
    for factor in [2.0, 4.0, 8.0, 16.0, 32.0, 40.0] {
        for original in [own, (own as f64 / factor) as usize, 2048, 4096, 8192, 32768] {
            if tested.settled() || original == 0 {
                continue;
            }
            let mut model = context.case.model.clone();
            model.config.options.rotaries[0].scaling = Scaling::Yarn {
                factor,
                original,
                fast: 32.0,
                slow: 1.0,
                attention: None,
                truncate: true,
            };
            let what = format!(
                "the rotary frequencies are scaled by YaRN (factor {factor}, original length \
                 {original}); the config declares no scaling"
            );
            let fault = Fault::new(
                "rotary-scaling",
                what,
                "give rope_scaling the same value in config and trainer",
            );
            context.test(
                fault,
                &Variant { forward: Some(&model), ..Variant::default() },
                |_| (),
                tested,
            )?;
        }
    }
    Ok(())
}

/// Angles of every token of the batch.
fn angles(context: &Context<'_>, frequencies: &[f64], exact: bool) -> Array2<f64> {
    use crate::validate::precision::Precision;
    let (rows, length) = context.case.batch.input_ids.dim();
    let coarse = context.case.rounding.coarsest();
    let coarse = if coarse.epsilon() > 1e-4 { coarse } else { Precision::Bf16 };
    let round = |x: f64| if exact { x } else { coarse.round(x) };
    let position = |i: usize| match &context.case.batch.position_ids {
        Some(positions) => f64::from(positions[[i / length, i % length]]),
        None => (i % length) as f64,
    };
    Array2::from_shape_fn((rows * length, frequencies.len()), |(i, j)| {
        round(round(position(i)) * round(frequencies[j]))
    })
}

/// The step with other rotary angles.
fn turned(
    context: &Context<'_>,
    fault: Fault,
    angles: &Array2<f64>,
    parts: &[(Range<usize>, f64)],
    tested: &mut Tested<'_>,
) -> Result<()> {
    let Some(table) = whole_table(context, context.case.model.config.rope_theta)? else {
        return Ok(());
    };
    let half = angles.ncols();
    let turn = |x: &mut Array2<f64>, direction: f64| {
        for (mut row, angle) in x.rows_mut().into_iter().zip(angles.rows()) {
            for head in 0..row.len() / (2 * half) {
                for j in 0..half {
                    let (one, other) = (head * 2 * half + j, head * 2 * half + j + half);
                    let (sin, cos) = (direction * angle[j]).sin_cos();
                    (row[one], row[other]) =
                        (row[one] * cos - row[other] * sin, row[other] * cos + row[one] * sin);
                }
            }
        }
    };
    let tap = |place: Place, x: &mut Array2<f64>| match (place.point, place.gradient) {
        (Point::RotatedQuery | Point::RotatedKey, false) => {
            drop(rope_backward(&mut x.view_mut(), &table, &mut Cost::default()));
            turn(x, 1.0);
        }
        (Point::Query | Point::Key, true) => {
            drop(rope_forward(&mut x.view_mut(), &table, &mut Cost::default()));
            turn(x, -1.0);
        }
        _ => {}
    };
    let variant = Variant { tap: Some(&tap), parts: Some(parts.to_vec()), ..Variant::default() };
    context.test(fault, &variant, |_| (), tested)
}
