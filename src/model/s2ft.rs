//! S2FT on a layer: co-permutation of coupled structures, so that what is trained is a dense slice
//! (\[S2FT\]).
//!
//! Two structures of a layer are coupled. A key/value head with its group of query heads ties rows
//! of q, k, v to columns of o; a feed-forward channel ties a row of gate and up to a column of
//! down. Reordering heads or channels on both sides leaves the function unchanged. The order after
//! the co-permutation is
//!
//! ```text
//! rows only | rows and columns | columns only | the rest
//! ```
//!
//! where "rows" are the units chosen for q, k, v (or gate, up) and "columns" those chosen for o (or
//! down), as in the official code: each trained part is then one contiguous range.

use super::calibration::Calibration;
use super::config::ModelConfig;
use super::layer::Layer;
use super::norm::NormOn;
use super::options::{Norm, QkvStorage, QueryKeyNorm};
use super::parameters::Model;
use super::projection::Projection;
use crate::adapters::s2ft::{S2ftSlice, Side};
use crate::adapters::selection::{ColumnRule, Score, rank};
use crate::adapters::{BaseWeight, Method};
use crate::error::{Error, Result};
use crate::linalg::Real;
use crate::ops::Cpu;
use ndarray::{Array1, Array2, Axis};
use rand::Rng;
use std::ops::Range;

/// Order of heads and channels relative to the checkpoint: entry i is the original index of what
/// now stands at i.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerOrder {
    /// Key/value heads, each with its group of query heads.
    pub groups: Vec<usize>,
    /// Feed-forward channels.
    pub channels: Vec<usize>,
}

impl LayerOrder {
    /// The original row (or column, for o and down) of what now stands at each place of a
    /// projection.
    pub fn lines(&self, p: Projection, config: &ModelConfig) -> Vec<usize> {
        lines(p, self.of(p), config)
    }

    /// The order of what a projection's units are.
    fn of(&self, p: Projection) -> &[usize] {
        if is_of_channels(p) { &self.channels } else { &self.groups }
    }
}

/// Over what a share is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// The best units of all layers together, as in the official code; layers may get different
    /// numbers.
    #[default]
    AllLayers,
    /// The same number in every layer.
    EachLayer,
}

/// Settings of S2FT.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `ratios` | o 0.052, down 0.02 | share of heads or channels trained per projection, in the order of [`Projection::ALL`] | 0 to 1; equal where not zero among q, k, v, and among gate, up |
/// | `rule` | random | which units | |
/// | `scope` | all layers | over what the share is taken | |
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct S2ftSpec {
    /// Share of units per projection.
    pub ratios: [f64; 7],
    /// Which units.
    pub rule: ColumnRule,
    /// Over what the share is taken.
    pub scope: Scope,
}

impl Default for S2ftSpec {
    fn default() -> Self {
        let mut ratios = [0.0; 7];
        for (ratio, p) in ratios.iter_mut().zip(Projection::ALL) {
            *ratio = match p {
                Projection::Output => 0.052,
                Projection::Down => 0.02,
                _ => 0.0,
            };
        }
        Self { ratios, rule: ColumnRule::default(), scope: Scope::default() }
    }
}

impl S2ftSpec {
    /// Share of a projection's units; zero for one that S2FT does not slice.
    pub fn ratio(&self, p: Projection) -> f64 {
        p.index().map_or(0.0, |i| self.ratios[i])
    }

    /// Sets it.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a projection that S2FT does not slice.
    pub fn set_ratio(&mut self, p: Projection, ratio: f64) -> Result<()> {
        let Some(i) = p.index() else {
            return Err(Error::invalid(
                "method.ratios",
                p.module(),
                "s2ft slices q, k, v, o, gate, up, down only",
            ));
        };
        self.ratios[i] = ratio;
        Ok(())
    }
}

/// A coupled structure of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Structure {
    Heads,
    Channels,
}

impl Structure {
    fn rows(self) -> &'static [Projection] {
        match self {
            Structure::Heads => &[Projection::Query, Projection::Key, Projection::Value],
            Structure::Channels => &[Projection::Gate, Projection::Up],
        }
    }

    fn columns(self) -> Projection {
        match self {
            Structure::Heads => Projection::Output,
            Structure::Channels => Projection::Down,
        }
    }

    fn units(self, config: &ModelConfig) -> usize {
        match self {
            Structure::Heads => config.num_key_value_heads,
            Structure::Channels => config.intermediate_size,
        }
    }
}

/// Rows (or columns) that one unit occupies in a projection.
fn unit_width(p: Projection, config: &ModelConfig) -> usize {
    match p {
        Projection::Key | Projection::Value => config.head_dim,
        Projection::Query | Projection::Output => {
            config.head_dim * config.num_attention_heads / config.num_key_value_heads
        }
        _ => 1,
    }
}

/// Which side of a projection a slice cuts.
pub(super) fn side_of(p: Projection) -> Side {
    if matches!(p, Projection::Output | Projection::Down) { Side::Input } else { Side::Output }
}

/// Unit order expanded to rows or columns of a projection.
fn expand(order: &[usize], width: usize) -> Vec<usize> {
    order.iter().flat_map(|&unit| unit * width..(unit + 1) * width).collect()
}

/// Whether a projection's units are channels of the MLP, not heads.
fn is_of_channels(p: Projection) -> bool {
    matches!(p, Projection::Gate | Projection::Up | Projection::GateUp | Projection::Down)
}

/// Rows (or columns, for o and down) of a projection in an order of its units.
fn lines(p: Projection, order: &[usize], config: &ModelConfig) -> Vec<usize> {
    let after =
        |start: usize, width: usize| expand(order, width).into_iter().map(move |i| start + i);
    match p {
        Projection::QueryKeyValue if config.options.query_key_value == QkvStorage::PerHead => {
            expand(order, 3 * config.head_dim)
        }
        Projection::QueryKeyValue => {
            let mut start = 0;
            let mut all = Vec::new();
            for p in [Projection::Query, Projection::Key, Projection::Value] {
                all.extend(after(start, unit_width(p, config)));
                start += config.projection_shape(p).0;
            }
            all
        }
        Projection::GateUp => after(0, 1).chain(after(config.intermediate_size, 1)).collect(),
        p => expand(order, unit_width(p, config)),
    }
}

/// Original row or column of a projection that now stands at each place; `None` in the checkpoint's
/// order.
pub(super) fn original_places(
    order: Option<&LayerOrder>,
    p: Projection,
    config: &ModelConfig,
) -> Option<Vec<usize>> {
    order.map(|order| order.lines(p, config))
}

/// The projection whose heads a norm of the full width normalises.
fn normalised_heads(norm: Norm, config: &ModelConfig) -> Option<Projection> {
    let whole = config.options.query_key_norm == QueryKeyNorm::Width;
    match norm {
        Norm::Query if whole => Some(Projection::Query),
        Norm::Key if whole => Some(Projection::Key),
        _ => None,
    }
}

fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    for (now, &original) in order.iter().enumerate() {
        inverse[original] = now;
    }
    inverse
}

fn reorder<T: Real>(
    weight: &Array2<T>,
    p: Projection,
    order: &[usize],
    config: &ModelConfig,
) -> Array2<T> {
    let axis = if side_of(p) == Side::Output { Axis(0) } else { Axis(1) };
    // Selecting columns can leave a matrix column-major; products and checkpoints want it
    // row-major.
    weight.select(axis, &lines(p, order, config)).as_standard_layout().into_owned()
}

impl<T: Real> Layer<T> {
    /// The effective weight of a projection in the checkpoint's order of heads and channels.
    pub(super) fn checkpoint_weight(
        &self,
        p: Projection,
        config: &ModelConfig,
    ) -> Result<Array2<T>> {
        let weight = self.projection(p).effective_weight()?;
        Ok(match &self.order {
            Some(order) if !p.of_experts() => reorder(&weight, p, &inverse(order.of(p)), config),
            _ => weight,
        })
    }

    /// The bias of a projection in the checkpoint's order of heads and channels.
    pub(super) fn checkpoint_bias(&self, p: Projection, config: &ModelConfig) -> Option<Array1<T>> {
        let bias = self.projection(p).bias.as_ref()?;
        Some(match &self.order {
            Some(order) if side_of(p) == Side::Output && !p.of_experts() => {
                bias.select(Axis(0), &lines(p, &inverse(order.of(p)), config))
            }
            _ => bias.clone(),
        })
    }

    /// A norm in the checkpoint's order of heads.
    pub(super) fn checkpoint_norm(
        &self,
        norm: Norm,
        config: &ModelConfig,
    ) -> Option<NormOn<Cpu<T>>> {
        let mut vectors = self.norm(norm)?.clone();
        if let (Some(order), Some(p)) = (&self.order, normalised_heads(norm, config)) {
            vectors.gain = vectors.gain.select(Axis(0), &lines(p, &inverse(&order.groups), config));
        }
        Some(vectors)
    }

    /// Attention sinks in the checkpoint's order of heads.
    pub(super) fn checkpoint_sinks(&self, config: &ModelConfig) -> Option<Array1<T>> {
        let sinks = self.sinks.as_ref()?;
        let group = config.num_attention_heads / config.num_key_value_heads;
        Some(match &self.order {
            Some(order) => sinks.select(Axis(0), &expand(&inverse(&order.groups), group)),
            None => sinks.clone(),
        })
    }

    /// Reorders coupled structures; `next` is relative to the present order.
    pub(super) fn co_permute(&mut self, next: &LayerOrder, config: &ModelConfig) -> Result<()> {
        let identity = |order: &[usize]| order.iter().enumerate().all(|(i, &o)| i == o);
        for order in [&next.groups, &next.channels] {
            crate::adapters::paca::check_index(order, order.len())?;
        }
        if !identity(&next.groups) {
            for norm in [Norm::Query, Norm::Key] {
                if let (Some(p), Some(vectors)) =
                    (normalised_heads(norm, config), &mut self.norms[norm as usize])
                {
                    vectors.gain = vectors.gain.select(Axis(0), &lines(p, &next.groups, config));
                }
            }
            let group = config.num_attention_heads / config.num_key_value_heads;
            if let Some(sinks) = &mut self.sinks {
                *sinks = sinks.select(Axis(0), &expand(&next.groups, group));
            }
        }
        for (p, projection) in self.projections_mut().filter(|(p, _)| !p.of_experts()) {
            let order = next.of(p);
            if identity(order) {
                continue;
            }
            if projection.is_trainable() {
                let requirement = "S2FT reorders weights; attach it before other methods";
                return Err(Error::invalid(p.path(), projection.method.name(), requirement));
            }
            let (order_of_lines, config_of) = (order.to_vec(), config.clone());
            projection.base.change("s2ft", move |weight| {
                *weight = reorder(weight, p, &order_of_lines, &config_of)
            })?;
            if side_of(p) == Side::Output
                && let Some(bias) = &mut projection.bias
            {
                *bias = bias.select(Axis(0), &lines(p, order, config));
            }
        }
        let compose = |old: &[usize], next: &[usize]| next.iter().map(|&i| old[i]).collect();
        self.order = Some(match &self.order {
            None => next.clone(),
            Some(old) => LayerOrder {
                groups: compose(&old.groups, &next.groups),
                channels: compose(&old.channels, &next.channels),
            },
        });
        Ok(())
    }

    /// Puts a slice on a projection of an already reordered layer.
    pub(super) fn slice(
        &mut self,
        p: Projection,
        units: Range<usize>,
        config: &ModelConfig,
    ) -> Result<()> {
        let width = unit_width(p, config);
        let projection = self.projection_mut(p);
        let BaseWeight::Dense(weight) = &projection.base else {
            return Err(Error::invalid(
                "method",
                "s2ft",
                "trains the base weight, which is packed",
            ));
        };
        let slice =
            S2ftSlice::new(side_of(p), units.start * width..units.end * width, weight.view())?;
        projection.method = Method::S2ft(slice);
        Ok(())
    }
}

/// rows only | both | columns only | rest, with the ranges of rows and columns.
fn arrange(
    rows: &[usize],
    columns: &[usize],
    units: usize,
) -> (Vec<usize>, Range<usize>, Range<usize>) {
    let is_in = |list: &[usize]| {
        let mut flags = vec![false; units];
        list.iter().for_each(|&i| flags[i] = true);
        flags
    };
    let (in_rows, in_columns) = (is_in(rows), is_in(columns));
    let pick = |r: bool, c: bool| -> Vec<usize> {
        (0..units).filter(|&i| (r, c) == (in_rows[i], in_columns[i])).collect()
    };
    let mut order = pick(true, false);
    let rows_only = order.len();
    order.extend(pick(true, true));
    let rows_end = order.len();
    order.extend(pick(false, true));
    let columns_end = order.len();
    order.extend(pick(false, false));
    (order, 0..rows_end, rows_only..columns_end)
}

impl<T: Real> Model<T> {
    /// Chooses units, co-permutes every layer that has some, and makes their slices trainable.
    ///
    /// Returns (layer, projection, number of units) of each slice. The model's function does not
    /// change.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for ratios outside 0..=1, unequal within q, k, v or gate, up, all
    /// zero; a rule that needs calibration without any; projections that already carry a method.
    pub fn attach_s2ft(
        &mut self,
        spec: &S2ftSpec,
        calibration: Option<&Calibration<T>>,
        rng: &mut impl Rng,
    ) -> Result<Vec<(usize, Projection, usize)>> {
        for (p, ratio) in Projection::ALL.into_iter().zip(spec.ratios) {
            if !(0.0..=1.0).contains(&ratio) {
                return Err(Error::invalid(
                    format!("ratio of {}", p.module()),
                    ratio,
                    "must be in 0..=1",
                ));
            }
        }
        if spec.rule.needs_calibration() && calibration.is_none() {
            return Err(Error::invalid(
                "calibration",
                "absent",
                "this selection needs Model::calibrate first",
            ));
        }
        if let Some(calibration) = calibration
            && calibration.layers.len() != self.layers.len()
        {
            return Err(Error::invalid(
                "calibration",
                calibration.layers.len(),
                "made for another number of layers",
            ));
        }
        let mut there = self.config.all_projections();
        there.retain(|&p| self.layers.iter().all(|layer| layer.get(p).is_some()));
        let mut spec = *spec;
        let usual = spec.ratios.map(f64::to_bits) == S2ftSpec::default().ratios.map(f64::to_bits);
        for p in Projection::ALL.into_iter().filter(|p| !there.contains(p)) {
            if spec.ratio(p) > 0.0 && !usual {
                let family = self.config.options.family.model_type();
                let requirement = format!(
                    "{family} has no such projection to slice: experts and weights stored as one \
                     are not"
                );
                return Err(Error::invalid("method.ratios", p.module(), requirement));
            }
            spec.set_ratio(p, 0.0)?;
        }
        let spec = &spec;
        for structure in [Structure::Heads, Structure::Channels] {
            let coupled = || {
                structure
                    .rows()
                    .iter()
                    .copied()
                    .chain([structure.columns()])
                    .filter(|p| there.contains(p))
            };
            if coupled().all(|p| spec.ratio(p).abs() < f64::MIN_POSITIVE) {
                continue;
            }
            for (layer, p) in
                self.layers.iter().flat_map(|layer| coupled().map(move |p| (layer, p)))
            {
                if layer.projection(p).is_trainable() {
                    let requirement = "already adapted; S2FT reorders weights, so attach it first";
                    return Err(Error::invalid(
                        p.path(),
                        layer.projection(p).method.name(),
                        requirement,
                    ));
                }
            }
        }
        let layers = self.layers.len();
        let mut attached = Vec::new();
        let config = self.config.clone();
        let identity = |n: usize| (0..n).collect::<Vec<_>>();
        let mut plans = Vec::new();
        for structure in [Structure::Heads, Structure::Channels] {
            let units = structure.units(&config);
            let trained: Vec<Projection> =
                structure.rows().iter().copied().filter(|&p| spec.ratio(p) > 0.0).collect();
            let ratio = trained.first().map_or(0.0, |&p| spec.ratio(p));
            if trained.iter().any(|&p| (spec.ratio(p) - ratio).abs() > 0.0) {
                let requirement = "q, k, v share one set of heads and gate, up one of channels: \
                                   equal where not zero";
                return Err(Error::invalid("ratios", format!("{:?}", spec.ratios), requirement));
            }
            let column = structure.columns();
            let rows = self.choose(spec, structure, &trained, ratio, calibration, rng)?;
            let columns =
                self.choose(spec, structure, &[column], spec.ratio(column), calibration, rng)?;
            plans.push((trained, column, rows, columns, units));
        }
        if plans
            .iter()
            .all(|(_, _, rows, columns, _)| rows.iter().chain(columns).all(Vec::is_empty))
        {
            return Err(Error::invalid(
                "ratios",
                format!("{:?}", spec.ratios),
                "at least one must be above zero",
            ));
        }
        for l in 0..layers {
            let mut order = LayerOrder {
                groups: identity(config.num_key_value_heads),
                channels: identity(config.intermediate_size),
            };
            let mut slices: Vec<(Projection, Range<usize>)> = Vec::new();
            for (structure, (trained, column, rows, columns, units)) in plans.iter().enumerate() {
                let (units_order, row_range, column_range) = arrange(&rows[l], &columns[l], *units);
                slices.extend(trained.iter().map(|&p| (p, row_range.clone())));
                slices.push((*column, column_range));
                *(if structure == 0 { &mut order.groups } else { &mut order.channels }) =
                    units_order;
            }
            slices.retain(|(_, range)| !range.is_empty());
            if slices.is_empty() {
                continue;
            }
            let layer = &mut self.layers[l];
            layer.co_permute(&order, &config)?;
            for (p, range) in slices {
                attached.push((l, p, range.len()));
                layer.slice(p, range, &config)?;
            }
        }
        Ok(attached)
    }

    /// Units chosen in each layer.
    fn choose(
        &self,
        spec: &S2ftSpec,
        structure: Structure,
        projections: &[Projection],
        ratio: f64,
        calibration: Option<&Calibration<T>>,
        rng: &mut impl Rng,
    ) -> Result<Vec<Vec<usize>>> {
        let (layers, units) = (self.layers.len(), structure.units(&self.config));
        let mut chosen = vec![Vec::new(); layers];
        if projections.is_empty() || !(ratio > 0.0) {
            return Ok(chosen);
        }
        let scores = (0..layers)
            .map(|l| self.unit_scores(spec.rule.score, structure, projections, l, calibration))
            .collect::<Result<Vec<_>>>()?;
        let take =
            |candidates: usize| ((ratio * candidates as f64).round() as usize).clamp(1, candidates);
        match spec.scope {
            Scope::AllLayers => {
                let joined: Option<Vec<f64>> =
                    scores.into_iter().collect::<Option<Vec<_>>>().map(|s| s.concat());
                for i in rank(joined, layers * units, spec.rule.order, take(layers * units), rng)? {
                    chosen[i / units].push(i % units);
                }
            }
            Scope::EachLayer => {
                for (l, scores) in scores.into_iter().enumerate() {
                    chosen[l] = rank(scores, units, spec.rule.order, take(units), rng)?;
                }
            }
        }
        Ok(chosen)
    }

    /// Score of every unit of a layer; `None` for a random choice.
    fn unit_scores(
        &self,
        score: Score,
        structure: Structure,
        projections: &[Projection],
        l: usize,
        calibration: Option<&Calibration<T>>,
    ) -> Result<Option<Vec<f64>>> {
        let units = structure.units(&self.config);
        let statistics = || {
            calibration.map(|c| &c.layers[l]).ok_or_else(|| {
                Error::invalid(
                    "calibration",
                    "absent",
                    "this selection needs Model::calibrate first",
                )
            })
        };
        let of = |p: Projection| {
            let missing = || Error::invalid("calibration", p.module(), "was not measured");
            statistics()?.get(&p).ok_or_else(missing)
        };
        // Sums of squares per unit, of per-row or per-column squares.
        let fold = |total: &mut Vec<f64>, p: Projection, squares: Vec<f64>| {
            let width = unit_width(p, &self.config);
            for (unit, chunk) in squares.chunks(width).enumerate() {
                total[unit] += chunk.iter().sum::<f64>();
            }
        };
        let weight = || {
            let mut total = vec![0.0; units];
            for &p in projections {
                let dense = self.layers[l].projection(p).base.dense();
                let axis = if side_of(p) == Side::Output { Axis(0) } else { Axis(1) };
                let squares = dense
                    .axis_iter(axis)
                    .map(|v| v.iter().map(|x| x.widen() * x.widen()).sum())
                    .collect::<Vec<f64>>();
                fold(&mut total, p, squares);
            }
            total
        };
        let square =
            |values: &[T]| values.iter().map(|x| x.widen() * x.widen()).collect::<Vec<f64>>();
        let activation = || -> Result<Vec<f64>> {
            let mut total = vec![0.0; units];
            let p = structure.columns();
            fold(&mut total, p, square(&of(p)?.input));
            Ok(total)
        };
        let root = |values: Vec<f64>| Some(values.into_iter().map(f64::sqrt).collect::<Vec<f64>>());
        Ok(match score {
            Score::Random => None,
            Score::Weight => root(weight()),
            Score::Activation => root(activation()?),
            Score::WeightActivation => root(
                weight().into_iter().zip(activation()?).map(|(w, a)| w * a).collect::<Vec<f64>>(),
            ),
            Score::Gradient => {
                let mut total = vec![0.0; units];
                for &p in projections {
                    let statistics = of(p)?;
                    let rows = side_of(p) == Side::Output;
                    let values =
                        if rows { &statistics.gradient_rows } else { &statistics.gradient_columns };
                    fold(&mut total, p, square(values));
                }
                root(total)
            }
        })
    }
}
