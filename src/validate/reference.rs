//! The reference step: exact, with the trainer's rounding imitated, or as a hypothesis about a
//! fault would have it.

use super::dump::Case;
use super::ladder::RungName;
use super::manifest::Reduction;
use super::objective::{Chunks, Objective, Upstream, copy_rows};
use super::part_of_batch::part_of;
use super::precision::Precision;
use super::report::Watch;
use crate::blocks::causal_attention::ScoreErrors;
use crate::blocks::cross_entropy::prediction_targets;
use crate::cost::Cost;
use crate::error::{Error, Result};
use crate::model::adapter_folder::AdapterKind;
use crate::model::{
    Batch, Instruments, Masked, Model, Outside, Place, Point, Projection, StepOptions, Tap,
};
use ndarray::{Array2, Axis, s};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

/// Where a trainer rounds.
///
/// | tensor | rounded to |
/// |---|---|
/// | weights | as dumped; to `products` where autocast casts them |
/// | embedding, sums after attention and feed-forward, and their gradients | `stream` |
/// | inputs and outputs of matrix products and attention, logits, and their gradients | `products` |
/// | normalised inputs, rotated queries and keys, attention, logits | also to `internals`, if that is coarser |
/// | products of a layer whose weights are quantized | also to the format they are computed in, if that is coarser |
/// | quantized weights in backward | the format they are restored in there, which may differ from that of the forward pass |
/// | parameter gradients | the format they are stored in, or `products` under autocast |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounding {
    /// Format of weights and of the residual stream.
    pub stream: Precision,
    /// Format of matrix products.
    pub products: Precision,
    /// Whether products are in another format because of autocast.
    pub autocast: bool,
    /// Format of norms, angles, softmax and loss.
    pub internals: Precision,
    /// How products with a quantized base are computed, where there are any.
    pub quantized: Option<Restored>,
}

/// Formats of the products with a quantized base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Of the inputs and outputs of the products.
    pub compute: Precision,
    /// Of the weights restored for the forward pass: what the exact step has.
    pub forward: Precision,
    /// Of the weights restored for the backward pass.
    pub backward: Precision,
}

impl Rounding {
    /// The coarsest format.
    pub fn coarsest(&self) -> Precision {
        self.stream.coarser(self.inside()).coarser(self.internals)
    }

    /// Format of the products of a layer.
    pub(super) fn inside(&self) -> Precision {
        self.quantized.map_or(self.products, |restored| self.products.coarser(restored.compute))
    }

    /// The format of a tensor.
    pub(super) fn at(&self, place: Place) -> Precision {
        match place.point {
            Point::Embedded | Point::Middle | Point::Output => self.stream,
            Point::FinalNorm | Point::Logits => self.products.coarser(self.internals),
            Point::NormedInput
            | Point::NormedMiddle
            | Point::RotatedQuery
            | Point::RotatedKey
            | Point::Attended => self.inside().coarser(self.internals),
            _ => self.inside(),
        }
    }
}

/// What a step computes.
#[derive(Debug, Clone, Default)]
pub struct Evidence {
    /// Loss.
    pub loss: f64,
    /// Logits, `(B T) x V`.
    pub logits: Option<Array2<f64>>,
    /// Output of each layer.
    pub hidden: BTreeMap<usize, Array2<f64>>,
    /// Gradients by name.
    pub gradients: BTreeMap<String, Array2<f64>>,
}

impl Evidence {
    /// The tensor that a rung measures under that name.
    pub(super) fn tensor(&self, rung: RungName, name: &str) -> Option<&Array2<f64>> {
        match rung {
            RungName::Logits => self.logits.as_ref(),
            RungName::Hidden => {
                self.hidden.iter().find(|(layer, _)| hidden_name(**layer) == name).map(|(_, x)| x)
            }
            RungName::Gradients => self.gradients.get(name),
            _ => None,
        }
    }
}

/// Name of a hidden state in reports.
pub(super) fn hidden_name(layer: usize) -> String {
    format!("output of layer {layer}")
}

/// A step that differs from the case's own; the default does not.
#[derive(Clone, Default)]
pub struct Variant<'a> {
    /// The model of the forward pass.
    pub forward: Option<&'a Model<f64>>,
    /// The model of the backward pass; that of the forward when absent.
    pub backward: Option<&'a Model<f64>>,
    /// The batch.
    pub batch: Option<&'a Batch>,
    /// Rows of each part of the step and the divisor of its loss.
    pub parts: Option<Vec<(Range<usize>, f64)>>,
    /// Factor of the scores.
    pub scale: Option<f64>,
    /// Tokens ahead that a query sees.
    pub ahead: usize,
    /// Random errors of the scores.
    pub score_errors: Option<ScoreErrors>,
    /// (row, label) pairs that the loss counts, rows being those of the whole batch.
    pub targets: Option<Vec<(usize, usize)>>,
    /// Changes tensors on their way.
    pub tap: Option<Tap<'a, f64>>,
    /// Rounds them.
    pub rounding: Option<Rounding>,
    /// Loss scale of a rounded step, in place of the trainer's.
    pub loss_scale: Option<f64>,
    /// Where the dropout masks of adapters are forgotten.
    pub unmasked: Option<Masked>,
    /// The loss, in place of the declared one.
    pub objective: Option<Objective>,
    /// Layers whose output is recorded besides those of the dump.
    pub hidden: Vec<usize>,
    /// Which part of the step is run.
    pub part: Part<'a>,
    /// Is told of each layer.
    pub watch: Option<&'a dyn Watch>,
}

/// A part of a step; the default is all of it.
#[derive(Clone, Copy, Default)]
pub struct Part<'a> {
    /// A layer and its input, rows of the whole batch: nothing below it runs, and it has no
    /// gradients.
    pub from: Option<(usize, &'a Array2<f64>)>,
    /// The lowest layer whose gradients are wanted.
    pub lowest: usize,
    /// No gradients at all.
    pub forward_only: bool,
    /// The layer after whose output a step without gradients ends: it has no loss and no logits.
    pub until: Option<usize>,
}

impl Part<'_> {
    /// Layers that run forward, and backward, of `layers`; whether the loss is formed.
    fn extent(&self, layers: usize) -> (usize, usize, bool) {
        let first = self.from.map_or(0, |(layer, _)| layer);
        let last = self.until.map_or(layers, |layer| layer + 1);
        let backward =
            if self.forward_only { 0 } else { layers.saturating_sub(first.max(self.lowest)) };
        (last.saturating_sub(first), backward, self.until.is_none())
    }

    /// Cost as a share of the whole step's, whose layers and output projection have so many weights
    /// each.
    pub(super) fn cost(&self, layers: usize, layer: f64, head: f64) -> f64 {
        let (forward, backward, loss) = self.extent(layers);
        let head = if !loss {
            0.0
        } else if self.forward_only {
            head
        } else {
            2.0 * head
        };
        ((forward + backward) as f64 * layer + head)
            / (2.0 * (layers as f64 * layer + head.max(f64::MIN_POSITIVE)))
    }
}

/// A copy of the model whose weights are rounded as autocast does; embedding and norms are not
/// cast.
fn cast_products(model: &Model<f64>, precision: Precision) -> Result<Model<f64>> {
    let mut cast = model.clone();
    for layer in &mut cast.layers {
        for (_, projection) in layer.projections_mut() {
            projection.base.change_entries("autocast", move |x| precision.round(x))?;
            if let Some(bias) = &mut projection.bias {
                bias.mapv_inplace(|x| precision.round(x));
            }
            projection.update(&mut |_, values| {
                precision.round_array(values);
                Ok(())
            })?;
        }
    }
    if cast.is_tied() {
        match cast.tables.embedding.clone() {
            Some(table) => cast.tables.head = Some(table),
            None => cast.lm_head = Some(cast.embedding.clone()),
        }
    }
    if let Some(head) = &mut cast.tables.head {
        head.change_entries("autocast", move |x| precision.round(x))?;
    }
    if let Some(head) = &mut cast.lm_head {
        precision.round_array(head);
    }
    Ok(cast)
}

impl Case {
    /// The step's parts with the divisor of each one's loss, by the declared reduction.
    pub fn parts(&self) -> Vec<(Range<usize>, f64)> {
        let micro = self.micro_batches();
        let counted = |rows: &Range<usize>| {
            let labels = self.batch.labels.slice(s![rows.clone(), 1..]);
            labels.iter().filter(|&&l| l != crate::blocks::cross_entropy::IGNORED_LABEL).count()
                as f64
        };
        let total: f64 = self.loss.divisor.unwrap_or_else(|| micro.iter().map(&counted).sum());
        let divisor = |rows: &Range<usize>| match self.loss.reduction {
            // A given gradient has its factors.
            _ if self.given().is_some() => 1.0,
            Reduction::Mean => total,
            Reduction::Sum => 1.0,
            Reduction::MicroMean => counted(rows) * micro.len() as f64,
        };
        let divisors = &self.loss.micro_batch_divisors;
        let divisor = |(i, rows): (usize, &Range<usize>)| match divisors.get(i) {
            Some(&own) if self.given().is_none() && divisors.len() == micro.len() => own,
            _ => divisor(rows),
        };
        let counts = |rows: &Range<usize>| counted(rows) > 0.0 || self.given().is_some();
        let numbered = micro.iter().enumerate().filter(|(_, rows)| counts(rows));
        numbered.map(|(i, rows)| (rows.clone(), divisor((i, rows)))).collect()
    }

    /// The recorded gradient of the logits, where the step is judged from there on.
    pub(super) fn given(&self) -> Option<&Upstream> {
        self.trainer.upstream.as_ref().filter(|_| self.trainer.setting.from_upstream)
    }

    /// A part of the step within the layers that are judged.
    fn within<'a>(&'a self, part: Part<'a>) -> Part<'a> {
        let part = Part { forward_only: part.forward_only || self.forward_only, ..part };
        match &self.layers {
            Some(layers) if part.from.is_none() => Part {
                from: self.input.as_ref().map(|input| (layers.start, input)),
                lowest: part.lowest.max(layers.start),
                ..part
            },
            _ => part,
        }
    }

    /// The case with the gradients of some layers alone. It begins at the recorded input of the
    /// first of them, if the dump has it; what the optimizer made of all gradients is not judged.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for layers that the model does not have or that train nothing;
    /// [`Error::Format`] for a recorded input of another shape.
    pub fn only_layers(mut self, layers: Range<usize>) -> Result<Self> {
        let all = self.model.layers.len();
        let text = format!("{}..{}", layers.start, layers.end);
        if layers.is_empty() || layers.end > all {
            return Err(Error::invalid(
                "layers",
                text,
                format!("must be a range within 0..{all}, from 0 on"),
            ));
        }
        let inside = |name: &str| {
            super::names::place_of(name).0.is_some_and(|layer| layers.contains(&layer))
        };
        self.trained.retain(|name| inside(name));
        if self.trained.is_empty() {
            return Err(Error::invalid("layers", text, "must hold something that is trained"));
        }
        self.trainer.gradients.retain(|name, _| inside(name));
        for group in
            [&mut self.trainer.applied, &mut self.trainer.after, &mut self.trainer.previous]
        {
            group.clear();
        }
        let below = layers.start.checked_sub(1).and_then(|below| self.trainer.hidden.get(&below));
        if let Some(input) = below {
            let expected = (self.batch.tokens(), self.model.config.hidden_size);
            if input.values.dim() != expected {
                let name = format!("hidden.{}", layers.start - 1);
                return Err(Error::shape("validate", name, expected, input.values.dim()));
            }
            self.input = Some(input.values.clone());
        }
        self.trainer.hidden.retain(|&layer, _| layer >= layers.start);
        self.layers = Some(layers);
        Ok(self)
    }

    /// A copy of the model whose quantized weights are in another format.
    fn restored_again(&self, model: &Model<f64>, format: Precision) -> Result<Model<f64>> {
        let mut copy = model.clone();
        for &((layer, p), _) in &self.quantized {
            copy.layers[layer]
                .projection_mut(p)
                .base
                .change_entries("restored", move |x| format.round(x))?;
        }
        Ok(copy)
    }

    /// Runs one step.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`Error::InvalidParam`] if no position counts.
    pub fn run(&self, variant: &Variant<'_>) -> Result<Evidence> {
        let forward = variant.forward.unwrap_or(&self.model);
        let backward = variant.backward.unwrap_or(forward);
        let autocast = variant.rounding.filter(|r| r.autocast).map(|r| r.products);
        let cast = autocast.map(|p| cast_products(forward, p)).transpose()?;
        let cast_backward = match autocast {
            Some(p) if !std::ptr::eq(forward, backward) => Some(cast_products(backward, p)?),
            _ => None,
        };
        let tied_cast = cast.is_some() && forward.is_tied();
        let backward = cast_backward.as_ref().or(cast.as_ref()).unwrap_or(backward);
        let restored =
            variant.rounding.and_then(|r| r.quantized).filter(|q| q.forward != q.backward);
        let restored = restored.map(|q| self.restored_again(backward, q.backward)).transpose()?;
        let backward = restored.as_ref().unwrap_or(backward);
        // PEFT takes DoRA's norms of the weight as backward restores it.
        let forward =
            restored.as_ref().filter(|_| self.kind == Some(AdapterKind::Dora)).unwrap_or(forward);
        let forward = cast.as_ref().unwrap_or(forward);

        let batch = variant.batch.unwrap_or(&self.batch);
        let (rows, length) = batch.input_ids.dim();
        let parts = variant.parts.clone().unwrap_or_else(|| self.parts());
        // Loss scaling decides what a half format loses.
        let scale = if variant.rounding.is_some() {
            variant.loss_scale.unwrap_or(self.loss.scale)
        } else {
            1.0
        };
        let given = self.given();
        let all_targets = match (&variant.targets, given) {
            (_, Some(upstream)) => upstream.targets(),
            (Some(targets), None) => targets.clone(),
            (None, None) => prediction_targets(batch.labels.view(), forward.config.vocab_size)?,
        };
        if all_targets.is_empty() || parts.is_empty() {
            let requirement = if given.is_some() {
                "must have a gradient"
            } else {
                "at least one position must count"
            };
            return Err(Error::invalid("labels", "all ignored", requirement));
        }
        let mut gradients = backward.zero_gradients();
        if tied_cast {
            // The head was made separate so that the embedding stays uncast; its gradient belongs
            // to the embedding.
            gradients.lm_head = gradients.embedding.as_ref().map(|e| Array2::zeros(e.dim()));
        }
        let objective =
            variant.objective.as_ref().or(Some(&self.objective)).filter(|o| !o.is_plain());
        let multiplier = forward.config.options.logit_multiplier;
        let mut evidence = Evidence::default();
        // A hypothesis that begins at the top layer is judged by gradients.
        let want_logits = self.trainer.logits.is_some()
            && variant.part.until.is_none()
            && variant.part.from.is_none();
        if want_logits {
            evidence.logits = Some(Array2::zeros((rows * length, forward.config.vocab_size)));
        }
        let part = self.within(variant.part);
        let runs = |layer: usize| {
            part.from.is_none_or(|(first, _)| layer >= first)
                && part.until.is_none_or(|last| layer <= last)
        };
        for &layer in self
            .trainer
            .hidden
            .keys()
            .chain(&variant.hidden)
            .filter(|l| **l < forward.layers.len() && runs(**l))
        {
            evidence
                .hidden
                .insert(layer, Array2::zeros((rows * length, forward.config.hidden_size)));
        }
        for (range, divisor) in &parts {
            let first = range.start * length;
            let record = RefCell::new(&mut evidence);
            let inside = first..range.end * length;
            let targets: Vec<(usize, usize)> = all_targets
                .iter()
                .filter(|(row, _)| inside.contains(row))
                .map(|&(row, label)| (row - first, label))
                .collect();
            let chunks = RefCell::new(Chunks::new(&targets, first, scale / divisor));
            let tap = |place: Place, tensor: &mut Array2<f64>| {
                let mut chunks = chunks.borrow_mut();
                match (place.point, place.gradient, given, objective) {
                    (Point::Logits, true, Some(Upstream::Logits(all)), _) => {
                        chunks.copy(all, scale / multiplier, tensor);
                    }
                    (Point::Logits, true, Some(Upstream::FinalNorm(_)), _) => tensor.fill(0.0),
                    (Point::FinalNorm, true, Some(Upstream::FinalNorm(all)), _) => {
                        copy_rows(all, inside.clone(), scale / multiplier, tensor);
                    }
                    (Point::Logits, true, None, Some(objective)) => {
                        chunks.differentiate(objective, forward.config.options.logit_cap, tensor);
                    }
                    _ => {}
                }
                if let Some(tap) = variant.tap {
                    tap(place, tensor);
                }
                if let Some(rounding) = &variant.rounding {
                    rounding.at(place).round_array(tensor);
                }
                if let (Some(watch), Point::Output, Some(layer)) =
                    (variant.watch, place.point, place.layer)
                {
                    watch.layer(layer, place.gradient);
                }
                if place.gradient {
                    return;
                }
                super::routing::settle_scores(&self.ties, place, first, tensor);
                if place.point == Point::Logits && objective.is_some() {
                    chunks.see(tensor);
                }
                let mut evidence = record.borrow_mut();
                match (place.point, place.layer) {
                    (Point::Output, Some(layer)) => {
                        if let Some(all) = evidence.hidden.get_mut(&layer) {
                            all.slice_mut(s![first..first + tensor.nrows(), ..]).assign(tensor);
                        }
                    }
                    (Point::FinalNorm, None) => {
                        if let Some(all) = &mut evidence.logits
                            && let Ok(mut logits) =
                                forward.project(tensor.view(), &mut Cost::default())
                        {
                            forward.config.options.cap_logits(&mut logits);
                            if let Some(rounding) = &variant.rounding {
                                rounding
                                    .at(Place {
                                        layer: None,
                                        point: Point::Logits,
                                        gradient: false,
                                    })
                                    .round_array(&mut logits);
                            }
                            all.slice_mut(s![first..first + tensor.nrows(), ..]).assign(&logits);
                        }
                    }
                    _ => {}
                }
            };
            let mask =
                |(layer, p): (usize, Projection), at: Masked, rest: bool, x: &mut Array2<f64>| {
                    let Some(all) = self.trainer.masks.get(&(layer, p)) else { return false };
                    let rows = all.slice(s![inside.clone(), ..]);
                    if rows.dim() != x.dim() {
                        return false;
                    }
                    let forgotten = variant.unmasked == Some(at);
                    x.zip_mut_with(&rows, |x, &m| {
                        let m = if forgotten { 1.0 } else { m };
                        *x *= if rest { 1.0 - m } else { m };
                    });
                    true
                };
            let from =
                part.from.map(|(layer, all)| (layer, all.slice(s![inside.clone(), ..]).to_owned()));
            let instruments = Instruments {
                from: from.as_ref().map(|(layer, x)| (*layer, x)),
                until: part.until,
                lowest: part.lowest,
                mask: (!self.trainer.masks.is_empty()).then_some(&mask),
                scale: variant.scale,
                ahead: variant.ahead,
                score_errors: variant.score_errors,
                targets: Some(&targets),
                tap: Some(&tap),
                ..Instruments::default()
            };
            let options =
                StepOptions { divisor: Some(*divisor / scale), checkpointing: self.recompute };
            let rows = part_of(batch, range, length)?;
            let mut cost = Cost::default();
            if part.forward_only {
                let loss = forward.loss_with(&rows, &options, &instruments, &mut cost)?;
                // Another objective than the plain one is summed up where its gradient is formed.
                evidence.loss +=
                    loss.filter(|_| objective.is_none()).map_or(f64::NAN, |loss| loss / scale);
                continue;
            }
            let pass =
                forward.forward_with(&rows, &options, &instruments, &mut gradients, &mut cost)?;
            let output =
                backward.backward_with(forward, pass, &instruments, &mut gradients, &mut cost)?;
            let whole = if objective.is_some() {
                chunks.into_inner().loss / divisor
            } else {
                output.loss / scale
            };
            evidence.loss += whole;
        }
        if tied_cast
            && let (Some(head), Some(embedding)) =
                (gradients.lm_head.take(), &mut gradients.embedding)
        {
            *embedding += &head;
        }
        let first = part.lowest.max(part.from.map_or(0, |(layer, _)| layer));
        let embedding =
            [Outside::Embedding, Outside::Positions].map(|m| forward.config.options.outside(m));
        // What lies below the part has no gradient.
        let inside = |name: &str| match super::names::place_of(name).0 {
            Some(layer) => layer >= first && self.layers.as_ref().is_none_or(|all| layer < all.end),
            None if self.layers.is_some() => false,
            None => {
                first == 0
                    || !embedding
                        .iter()
                        .any(|module| !module.is_empty() && name.starts_with(module))
            }
        };
        let named = if part.forward_only { Vec::new() } else { gradients.named() };
        evidence.gradients = named
            .into_iter()
            .filter(|(name, _)| inside(name))
            .map(|(name, g)| {
                let mut g = g.to_owned();
                if let Some(rounding) = &variant.rounding {
                    let stored =
                        self.trainer.gradients.get(&name).map_or(rounding.stream, |o| o.precision);
                    // Under autocast a weight's gradient comes out of a product; a gain's does not.
                    let product = rounding.autocast && !name.ends_with("norm.weight");
                    if product { rounding.products.coarser(stored) } else { stored }
                        .round_array(&mut g);
                    g.mapv_inplace(|x| x / scale);
                }
                (name, g)
            })
            .collect();
        Ok(evidence)
    }

    /// Rows of logits and hidden states that mean something: not padding, nor in a micro-batch that
    /// counts no token.
    pub fn real_rows(&self) -> Vec<usize> {
        let length = self.batch.input_ids.ncols();
        let parts = self.parts();
        let run = |row: &usize| parts.iter().any(|(rows, _)| rows.contains(&(row / length)));
        self.unpadded_rows().into_iter().filter(run).collect()
    }

    fn unpadded_rows(&self) -> Vec<usize> {
        match &self.batch.attention_mask {
            Some(mask) => {
                mask.iter().enumerate().filter(|(_, m)| **m).map(|(row, _)| row).collect()
            }
            None => {
                let (rows, length) = self.batch.input_ids.dim();
                let real = |b: usize| {
                    self.trainer.setting.row_lengths.as_ref().map_or(length, |lengths| lengths[b])
                };
                (0..rows).flat_map(|b| b * length..b * length + real(b)).collect()
            }
        }
    }
}

/// Some rows of an array.
pub(super) fn select_rows(array: &Array2<f64>, rows: &[usize]) -> Array2<f64> {
    if rows.len() == array.nrows() { array.clone() } else { array.select(Axis(0), rows) }
}
