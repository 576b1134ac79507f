//! Settings that give different methods the same number of trained numbers, so that a comparison is
//! fair.
//!
//! ```text
//! LoRA, QLoRA    r sum(in + out)             DoRA     r sum(in + out) + sum(out)
//! MosLoRA        r sum(in + out) + 7 r^2     PaCA     r sum(out)              sums over the seven projections
//! SpFT           share sum(in out)
//! S2FT           n_o g D + n_d D             n_o head groups of g columns, n_d channels
//! ```
//!
//! per layer (S2FT: over all layers). Ranks and units are whole, so the numbers agree only nearly;
//! tables give each method's own.

use crate::error::{Error, Result};
use crate::model::{ModelConfig, Projection};
use crate::train::memory::trained_numbers;
use crate::train::method::{MethodName, MethodParams};
use std::collections::BTreeMap;

/// Share of S2FT's budget that goes to heads, in `o_proj`; channels of `down_proj` get the rest.
const HEADS_SHARE: f64 = 0.25;

/// The settings of `name` with the number of trained numbers nearest to `trained`, at least the
/// smallest that the method has; alpha keeps the scaling at `alpha / rank = 2` where there is one.
/// `full` trains everything whatever the budget.
///
/// # Errors
/// As [`trained_numbers`].
///
/// ```
/// use peft_limits::train::budget::with_budget;
/// use peft_limits::train::memory::trained_numbers;
/// use peft_limits::train::method::{MethodName, MethodParams};
/// use peft_limits::train::preset::preset;
/// let config = preset("nano")?;
/// let lora = MethodParams { rank: 4, ..MethodParams::named(MethodName::Lora) };
/// let budget = trained_numbers(&config, &lora)?;
/// let paca = with_budget(MethodName::Paca, &config, budget)?;
/// assert_eq!(paca.rank, 8); // about twice LoRA's rank, as in the paper
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn with_budget(name: MethodName, config: &ModelConfig, trained: usize) -> Result<MethodParams> {
    let base = MethodParams::named(name);
    match name {
        MethodName::Full => Ok(base),
        MethodName::S2ft => {
            let (group, channel) =
                (unit_numbers(config, Projection::Output), unit_numbers(config, Projection::Down));
            let groups = ((HEADS_SHARE * trained as f64 / group as f64).round() as usize).max(1);
            let channels =
                (trained.saturating_sub(groups * group) as f64 / channel as f64).round() as usize;
            let all = |units: usize| (config.num_hidden_layers * units) as f64;
            let ratios = BTreeMap::from([
                (
                    Projection::Output.module().to_string(),
                    groups as f64 / all(config.num_key_value_heads),
                ),
                (
                    Projection::Down.module().to_string(),
                    channels.max(1) as f64 / all(config.intermediate_size),
                ),
            ]);
            Ok(MethodParams { ratios: Some(ratios), ..base })
        }
        MethodName::Spft => {
            let shapes = config.all_projections().into_iter().map(|p| config.projection_shape(p));
            let each: usize = shapes.map(|(out, input)| out * input).sum();
            let share = (trained as f64 / (config.num_hidden_layers * each) as f64).min(1.0);
            Ok(MethodParams { share: Some(share), ..base })
        }
        _ => {
            // PaCA's scaling stays the paper's 1.
            let scaled = !matches!(name, MethodName::Paca | MethodName::Qpaca);
            let of = |rank: usize| MethodParams {
                rank,
                alpha: scaled.then_some(2.0 * rank as f64),
                ..base.clone()
            };
            let mut best = of(1);
            let gap =
                |m: &MethodParams| Ok::<_, Error>(trained_numbers(config, m)?.abs_diff(trained));
            for rank in 2..=smallest_side(config) {
                let next = of(rank);
                if gap(&next)? >= gap(&best)? {
                    break;
                }
                best = next;
            }
            Ok(best)
        }
    }
}

/// S2FT on one projection: the share of its units, over all layers, that holds `trained` numbers
/// (at least one unit), and what is trained then.
///
/// ```
/// use peft_limits::model::Projection;
/// use peft_limits::train::budget::s2ft_share;
/// use peft_limits::train::preset::preset;
/// // 344 channels in each of 5 layers, 128 numbers each.
/// let (share, trained) = s2ft_share(&preset("nano")?, Projection::Down, 43 * 128);
/// assert_eq!((share * 1720.0, trained), (43.0, 43 * 128));
/// # Ok::<(), peft_limits::Error>(())
/// ```
pub fn s2ft_share(config: &ModelConfig, projection: Projection, trained: usize) -> (f64, usize) {
    let unit = unit_numbers(config, projection);
    let units = match projection {
        Projection::Gate | Projection::Up | Projection::Down => config.intermediate_size,
        _ => config.num_key_value_heads,
    } * config.num_hidden_layers;
    let chosen = ((trained as f64 / unit as f64).round() as usize).clamp(1, units);
    (chosen as f64 / units as f64, chosen * unit)
}

/// Trained numbers of one head group or channel in a projection.
fn unit_numbers(config: &ModelConfig, projection: Projection) -> usize {
    let heads = match projection {
        Projection::Query | Projection::Output => {
            config.num_attention_heads / config.num_key_value_heads * config.head_dim
        }
        Projection::Key | Projection::Value => config.head_dim,
        _ => 1,
    };
    heads * config.hidden_size
}

fn smallest_side(config: &ModelConfig) -> usize {
    let sides = config.all_projections().into_iter().map(|p| config.projection_shape(p));
    sides.map(|(out, input)| out.min(input)).min().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::streams::generator;
    use crate::train::preset::preset;

    /// What the attached model really trains is near the budget for every method, and as predicted.
    #[test]
    fn budgets_are_met_by_the_models_themselves() {
        for size in ["pico", "nano"] {
            let config = preset(size).unwrap();
            let base: Model<f32> =
                Model::random(config.clone(), &mut generator(1, "init/model", 0)).unwrap();
            let lora = MethodParams { rank: 4, ..MethodParams::named(MethodName::Lora) };
            let budget = trained_numbers(&config, &lora).unwrap();
            for name in MethodName::ALL.into_iter().filter(|&n| n != MethodName::Full) {
                let method = with_budget(name, &config, budget).unwrap();
                let mut model = base.clone();
                method.apply(&mut model, None, 1).unwrap();
                let trained = model.trainable_elements();
                let gap = trained as f64 / budget as f64 - 1.0;
                // One rank is about a quarter of this budget, so rounding leaves at most half of
                // that.
                assert!(
                    gap.abs() <= 1.0 / 8.0,
                    "{size} {}: {trained} for a budget of {budget}",
                    name.name()
                );
                assert_eq!(
                    trained,
                    trained_numbers(&config, &method).unwrap(),
                    "{size} {}",
                    name.name()
                );
            }
        }
    }

    #[test]
    fn shares_of_one_projection_are_whole_units() {
        let config = preset("pico").unwrap();
        for p in Projection::ALL {
            let (share, trained) = s2ft_share(&config, p, 4096);
            let ratios = BTreeMap::from([(p.module().to_string(), share)]);
            let method =
                MethodParams { ratios: Some(ratios), ..MethodParams::named(MethodName::S2ft) };
            let mut model: Model<f32> =
                Model::random(config.clone(), &mut generator(1, "init/model", 0)).unwrap();
            method.apply(&mut model, None, 1).unwrap();
            assert_eq!((model.trainable_elements(), trained), (4096, 4096), "{}", p.module());
        }
    }
}
