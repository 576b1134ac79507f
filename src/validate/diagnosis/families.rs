//! Faults that only some families of decoders can have: an option of the family that the trainer
//! does not run, or runs otherwise. Each is the step with one option changed.

use super::{Context, Diagnosis, Fault, Tested};
use crate::blocks::rope::Scaling;
use crate::blocks::swiglu::Activation;
use crate::error::Result;
use crate::model::options::{Norm, QueryKeyNorm};
use crate::model::{Model, Projection};
use crate::validate::reference::Variant;

/// Changes the model if it has the option; says whether it did.
type Change = fn(&mut Model<f64>) -> bool;

/// Sets an option to what it is where a family does not have it.
fn reset<V: PartialEq>(option: &mut V, plain: V) -> bool {
    let changed = *option != plain;
    *option = plain;
    changed
}

fn windows(model: &mut Model<f64>, change: impl Fn(usize) -> usize) -> bool {
    let windows = model.config.options.windows.iter_mut().flatten();
    windows.fold(false, |_, window| {
        *window = change(*window).max(1);
        true
    })
}

fn without_bias(model: &mut Model<f64>, of: fn(Projection) -> bool) -> bool {
    let layers = model.layers.iter_mut().flat_map(|layer| layer.projections_mut());
    layers.filter(|(p, _)| of(*p)).fold(false, |any, (_, projection)| match &mut projection.bias {
        Some(bias) => {
            bias.fill(0.0);
            true
        }
        None => any,
    })
}

/// (name, what, fix, the step with it).
const FAULTS: [(&str, &str, &str, Change); 25] = [
    (
        "window-missing",
        "queries see every earlier key: the sliding window is missing",
        "pass sliding_window to attention",
        |m| reset(&mut m.config.options.windows, Vec::new()),
    ),
    (
        "window-off-by-one",
        "the sliding window has one key too many",
        "sliding_window counts the query's own key",
        |m| windows(m, |w| w + 1),
    ),
    (
        "window-off-by-one",
        "the sliding window has one key too few",
        "sliding_window counts the query's own key",
        |m| windows(m, |w| w - 1),
    ),
    (
        "window-everywhere",
        "every layer has the sliding window",
        "layer_types says which layers have it",
        |m| {
            let some = m.config.options.windows.iter().flatten().next().copied();
            let windows = vec![some; m.config.num_hidden_layers];
            some.is_some() && reset(&mut m.config.options.windows, windows)
        },
    ),
    (
        "attention-cap-missing",
        "the scores are not capped",
        "apply attn_logit_softcapping before the mask",
        |m| reset(&mut m.config.options.attention_cap, None),
    ),
    (
        "logit-cap-missing",
        "the logits are not capped",
        "apply final_logit_softcapping before the loss",
        |m| reset(&mut m.config.options.logit_cap, None),
    ),
    (
        "norm-gain-without-one",
        "norms multiply by w instead of 1 + w",
        "the gains of this family are stored less 1",
        |m| reset(&mut m.config.options.unit_gain, false),
    ),
    (
        "embedding-multiplier-missing",
        "the embedded tokens are not multiplied",
        "multiply them by the family's factor",
        |m| reset(&mut m.config.options.embedding_multiplier, 1.0),
    ),
    (
        "residual-multiplier-missing",
        "residual branches are added whole",
        "multiply them by residual_multiplier",
        |m| reset(&mut m.config.options.residual_multiplier, 1.0),
    ),
    (
        "logit-multiplier-missing",
        "the logits are not divided",
        "divide them by logits_scaling",
        |m| reset(&mut m.config.options.logit_multiplier, 1.0),
    ),
    (
        "attention-multiplier-missing",
        "scores are scaled by 1 / sqrt(head_dim)",
        "use the family's own scale",
        |m| reset(&mut m.config.options.attention_scale, None),
    ),
    (
        "query-key-norm-missing",
        "queries and keys are not normalised",
        "apply q_norm and k_norm before the rotation",
        |m| {
            for layer in &mut m.layers {
                layer.norms[Norm::Query as usize] = None;
                layer.norms[Norm::Key as usize] = None;
            }
            reset(&mut m.config.options.query_key_norm, QueryKeyNorm::None)
        },
    ),
    (
        "rotary-scaling-missing",
        "rotary frequencies are not scaled",
        "config.json declares a scaling",
        |m| {
            m.config
                .options
                .rotaries
                .iter_mut()
                .map(|r| reset(&mut r.scaling, Scaling::None))
                .filter(|c| *c)
                .count()
                > 0
        },
    ),
    (
        "rotary-share",
        "the whole head is rotated",
        "rotate partial_rotary_factor of each head only",
        |m| {
            m.config
                .options
                .rotaries
                .iter_mut()
                .map(|r| reset(&mut r.share, None))
                .filter(|c| *c)
                .count()
                > 0
        },
    ),
    (
        "rotary-everywhere",
        "layers without rotary embedding are rotated",
        "no_rope_layers says which are not",
        |m| {
            let without =
                m.config.options.rotary_of.contains(&None) && !m.config.options.rotaries.is_empty();
            without && reset(&mut m.config.options.rotary_of, Vec::new())
        },
    ),
    (
        "rotary-local-base",
        "windowed layers use the rotary base of the others",
        "they have rope_local_base_freq",
        |m| {
            let several = m.config.options.rotaries.len() > 1;
            several && reset(&mut m.config.options.rotary_of, Vec::new())
        },
    ),
    (
        "attention-sink-dropped",
        "the softmax lacks the attention sinks",
        "add exp(sink) to each head's denominator",
        |m| {
            m.config.options.sinks
                && m.layers.iter_mut().filter_map(|layer| layer.sinks.take()).count() > 0
        },
    ),
    (
        "router-not-renormalised",
        "the weights of a token's experts do not add up to one",
        "divide them by their sum (norm_topk_prob), or take the softmax after the choice",
        |m| {
            m.config
                .options
                .experts
                .as_mut()
                .is_some_and(|experts| reset(&mut experts.renormalise, false))
        },
    ),
    (
        "router-renormalised",
        "the weights of a token's experts are divided by their sum",
        "norm_topk_prob is false: leave the softmax over all experts as it is",
        |m| {
            m.config
                .options
                .experts
                .as_mut()
                .is_some_and(|experts| reset(&mut experts.renormalise, true))
        },
    ),
    (
        "expert-bias-dropped",
        "the experts' biases are missing",
        "add gate_up_proj_bias and down_proj_bias",
        |m| without_bias(m, Projection::is_expert),
    ),
    (
        "expert-bias-dropped",
        "the router's bias is missing",
        "add the bias to the scores of the experts",
        |m| without_bias(m, |p| p == Projection::Router),
    ),
    (
        "gate-and-up-order",
        "rows of gate and up are taken in the other order",
        "they alternate, or stand in halves",
        |m| {
            let experts = m.config.options.experts.as_mut();
            experts.is_some_and(|experts| {
                experts.interleaved = !experts.interleaved;
                true
            })
        },
    ),
    (
        "position-offset",
        "learned positions are read from row 0 of their table",
        "this family's start at row 2",
        |m| m.config.options.positions.is_some() && reset(&mut m.config.options.positions, Some(0)),
    ),
    (
        "parallel-residual",
        "attention and MLP run one after the other",
        "both read the layer's input here",
        |m| reset(&mut m.config.options.parallel, false),
    ),
    (
        "gelu-form",
        "the MLP uses the other form of gelu",
        "config.json names the exact form or that with tanh",
        |m| {
            let other = match m.config.options.activation {
                Activation::Gelu => Activation::GeluTanh,
                Activation::GeluTanh => Activation::Gelu,
                other => other,
            };
            reset(&mut m.config.options.activation, other)
        },
    ),
];

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    for (name, what, fix, change) in FAULTS {
        let mut model = context.case.model.clone();
        // In a half format one factor may come near another's effect.
        if tested.settled_well() || !change(&mut model) {
            continue;
        }
        context.test(
            Fault::new(name, what, fix),
            &Variant { forward: Some(&model), ..Variant::default() },
            |_| (),
            tested,
        )?;
    }
    Ok(())
}

/// Most pairs of faults that are tried.
const MOST_PAIRS: usize = 48;

/// Two of them at once, where none alone explains the step: those first that come nearest by
/// themselves.
pub(super) fn pairs(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let alone = |number: &usize| {
        let (name, what, ..) = FAULTS[*number];
        let found = tested.found.iter().filter(|d| d.fault == name && d.what == what);
        found.map(|d| d.share).fold(f64::INFINITY, f64::min)
    };
    let mut known: Vec<(usize, f64)> = (0..FAULTS.len())
        .filter(|&i| FAULTS[i].3(&mut context.case.model.clone()))
        .map(|i| (i, alone(&i)))
        .collect();
    known.sort_by(|a, b| a.1.total_cmp(&b.1));
    let both = (1..known.len()).flat_map(|j| (0..j).map(move |i| (i, j)));
    for (i, j) in both.take(MOST_PAIRS) {
        let ((one, what, fix, change), (other, what_else, _, change_too)) =
            (FAULTS[known[i].0], FAULTS[known[j].0]);
        let mut model = context.case.model.clone();
        if tested.settled() || !(change(&mut model) && change_too(&mut model)) {
            continue;
        }
        let before = tested.found.len();
        let fault = Fault::new(one, format!("{what}; and at once: {what_else}"), fix);
        context.test(
            fault,
            &Variant { forward: Some(&model), ..Variant::default() },
            |_| (),
            tested,
        )?;
        if let Some(both) = tested.found.get(before).filter(|d| d.complete).cloned() {
            let what = format!("{what_else}; and at once: {what}");
            tested.found.push(Diagnosis {
                fault: other.into(),
                what,
                fix: FAULTS[known[j].0].2.into(),
                ..both
            });
        }
    }
    Ok(())
}
