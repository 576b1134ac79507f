//! Bars in groups, side by side or stacked, with intervals.

use super::axis::{Axis, Mapping, Scale};
use super::frame::{Insets, Plot, Side, Styles, draw_axes, draw_no_data, draw_outline};
use super::geometry::{Point, Rect};
use super::legend::LegendEntry;
use super::line_chart::{LineStyle, place, whisker};
use super::scene::{Align, Scene, Text, text_width};
use super::theme::{self, MARKER_RADIUS, Marker, SMALL};

/// One bar. A NaN value leaves a gap, an infinite one is an arrow at the border.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bar {
    /// Height.
    pub value: f64,
    /// Interval of the height (low, high).
    pub interval: Option<(f64, f64)>,
}

impl From<f64> for Bar {
    fn from(value: f64) -> Self {
        Self { value, interval: None }
    }
}

impl From<(f64, f64, f64)> for Bar {
    /// (value, low, high)
    fn from((value, low, high): (f64, f64, f64)) -> Self {
        Self { value, interval: Some((low, high)) }
    }
}

/// The bars of one colour, one per group.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BarSeries {
    /// Name in the legend.
    pub name: String,
    /// Bars in the order of the groups; absent ones leave gaps.
    pub bars: Vec<Bar>,
}

impl BarSeries {
    /// A named series of bars.
    pub fn new<B: Into<Bar>>(name: impl Into<String>, bars: impl IntoIterator<Item = B>) -> Self {
        Self { name: name.into(), bars: bars.into_iter().map(Into::into).collect() }
    }
}

/// A chart of grouped bars.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BarChart {
    /// Title of the panel.
    pub title: String,
    /// What the groups are.
    pub group_label: String,
    /// Names of the groups, left to right.
    pub groups: Vec<String>,
    /// Vertical axis. A linear one starts at zero; a logarithmic one needs no zero.
    pub y: Axis,
    /// Series.
    pub series: Vec<BarSeries>,
    /// Piles the series of a group on each other instead of side by side; linear axis only.
    pub stacked: bool,
    /// Writes each value (three digits) over its bar when there is room, the total when stacked.
    pub values: bool,
}

/// Share of a group's slot that its bars fill.
const FILLED: f64 = 0.8;

impl BarChart {
    fn stacks(&self) -> bool {
        self.stacked && self.y.scale == Scale::Linear
    }

    /// Bottom and top of a bar in data units.
    fn span(&self, series: usize, group: usize) -> Option<(f64, f64)> {
        let height = |s: &BarSeries| s.bars.get(group).map(|b| b.value);
        let value = height(&self.series[series])?;
        if !self.stacks() {
            return Some((0.0, value));
        }
        let below: f64 =
            self.series[..series].iter().filter_map(height).filter(|v| v.is_finite()).sum();
        Some((below, below + value))
    }

    fn mapping(&self) -> Mapping {
        let linear = self.y.scale == Scale::Linear;
        let every =
            (0..self.series.len()).flat_map(|s| (0..self.groups.len()).map(move |g| (s, g)));
        let tops = every.filter_map(|(s, g)| self.span(s, g)).map(|(_, top)| top);
        let intervals = self
            .series
            .iter()
            .flat_map(|s| &s.bars)
            .filter_map(|b| b.interval)
            .flat_map(|(a, b)| [a, b]);
        let zero = linear.then_some(0.0);
        let mut mapping = self.y.mapping(self.y.extent(tops.chain(intervals).chain(zero)), 0.08);
        if linear && self.y.range.is_none() {
            // Bars stand on zero, without a margin under it.
            let data_low = mapping.low + 0.08 / 1.16 * (mapping.high - mapping.low);
            if data_low.abs() < 1e-9 * mapping.high.abs() {
                mapping.low = 0.0;
            }
        }
        mapping
    }

    fn sides(&self, height: f64) -> (Side, Side) {
        let n = self.groups.len().max(1) as f64;
        let ticks = self
            .groups
            .iter()
            .enumerate()
            .map(|(g, name)| ((g as f64 + 0.5) / n, name.clone()))
            .collect();
        let bottom =
            Side { label: self.group_label.clone(), ticks, categories: true, ..Side::default() };
        let (ticks, minor) =
            self.y.tick_marks(&self.mapping(), ((height / 50.0) as usize).clamp(2, 8));
        (bottom, Side { label: self.y.label.clone(), ticks, minor, grid: true, categories: false })
    }

    /// The rectangle of a bar in the frame, clamped to it; `None` for a gap or an infinite bar.
    fn rect(&self, series: usize, group: usize, frame: Rect) -> Option<Rect> {
        let mapping = self.mapping();
        let (from, to) = self.span(series, group)?;
        let fraction = |v: f64| mapping.fraction(v);
        // On a logarithmic axis the bar stands on the border.
        let from = if self.y.scale == Scale::Linear { fraction(from) } else { 0.0 };
        if !fraction(to).is_finite() {
            return None;
        }
        let y = |f: f64| frame.y1 - f.clamp(0.0, 1.0) * frame.height();
        let (x0, x1) = self.columns(series, group, frame);
        Some(Rect { x0, x1, y0: y(from.max(fraction(to))), y1: y(from.min(fraction(to))) })
    }

    fn columns(&self, series: usize, group: usize, frame: Rect) -> (f64, f64) {
        let slot = frame.width() / self.groups.len().max(1) as f64;
        let count = if self.stacks() { 1 } else { self.series.len().max(1) };
        let wide = (FILLED * slot / count as f64).min(70.0);
        let middle = frame.x0 + (group as f64 + 0.5) * slot;
        let position = if self.stacks() { 0 } else { series };
        let x0 = middle - wide * count as f64 / 2.0 + wide * position as f64;
        let gap = if count > 1 { 0.06 * wide } else { 0.0 };
        (x0 + gap, x0 + wide - gap)
    }

    fn draw_values(&self, scene: &mut Scene, frame: Rect) {
        for g in 0..self.groups.len() {
            let last = self.series.len().saturating_sub(1);
            for s in if self.stacks() { last..self.series.len() } else { 0..self.series.len() } {
                let (Some(rect), Some((_, top))) = (self.rect(s, g, frame), self.span(s, g)) else {
                    continue;
                };
                let text = short_value(top);
                let interval = self.series[s].bars[g].interval.filter(|_| !self.stacks());
                let raised = interval.map_or(rect.y0, |(_, hi)| {
                    let f = self.mapping().fraction(hi);
                    if f.is_finite() {
                        rect.y0.min(frame.y1 - f.clamp(0.0, 1.0) * frame.height())
                    } else {
                        rect.y0
                    }
                });
                let at = ((rect.x0 + rect.x1) / 2.0, raised - 10.0);
                let room = if self.stacks() {
                    frame.width() / self.groups.len() as f64
                } else {
                    rect.width() + 4.0
                };
                if text_width(&text, SMALL, false) <= room
                    && at.1 - SMALL / 2.0 > frame.y0
                    && top >= 0.0
                {
                    scene.text(Text::new(at, text, SMALL, Align::Centre));
                }
            }
        }
    }
}

/// Three significant digits.
fn short_value(v: f64) -> String {
    match v.abs() {
        0.0 => "0".into(),
        a if (1e-2..1e4).contains(&a) => {
            let decimals = (2 - a.log10().floor() as i32).clamp(0, 4) as usize;
            format!("{v:.decimals$}")
        }
        _ => format!("{v:.1e}"),
    }
}

impl Plot for BarChart {
    fn title(&self) -> &str {
        &self.title
    }

    fn series_names(&self) -> Vec<String> {
        self.series.iter().map(|s| s.name.clone()).collect()
    }

    fn legend(&self, styles: &Styles) -> Vec<LegendEntry> {
        let entry = |s: &BarSeries| LegendEntry {
            name: s.name.clone(),
            colour: styles.of(&s.name).0,
            line: LineStyle::None,
            marker: None,
            swatch: true,
        };
        self.series.iter().filter(|s| !s.name.is_empty()).map(entry).collect()
    }

    fn insets(&self, width: f64, height: f64) -> Insets {
        let (x, y) = self.sides(height);
        Insets { left: y.left_room(height), top: 6.0, right: 4.0, bottom: x.bottom_room(width) }
    }

    fn obstacles(&self, frame: Rect) -> Vec<Point> {
        let mut points = Vec::new();
        for (s, series) in self.series.iter().enumerate() {
            for g in 0..self.groups.len() {
                let Some(rect) = self.rect(s, g, frame) else { continue };
                let whisker =
                    series.bars[g].interval.map_or(f64::NAN, |(_, hi)| self.mapping().fraction(hi));
                let top = rect.y0.min(if whisker.is_finite() {
                    frame.y1 - whisker * frame.height()
                } else {
                    rect.y0
                });
                let top = if self.values { top - 20.0 } else { top };
                for i in 0..=20 {
                    let y = top + (rect.y1 - top) * f64::from(i) / 20.0;
                    points.extend(
                        [0.0, 0.25, 0.5, 0.75, 1.0].map(|t| (rect.x0 + t * rect.width(), y)),
                    );
                }
            }
        }
        points
    }

    fn draw(&self, scene: &mut Scene, frame: Rect, styles: &Styles) {
        let mapping = self.mapping();
        let (bottom, left) = self.sides(frame.height());
        draw_axes(scene, frame, &bottom, &left);
        let mut any = false;
        for (s, series) in self.series.iter().enumerate() {
            let colour = styles.of(&series.name).0;
            for (g, bar) in series.bars.iter().enumerate().take(self.groups.len()) {
                if bar.value.is_nan() {
                    continue;
                }
                any = true;
                let (x0, x1) = self.columns(s, g, frame);
                let middle = ((x0 + x1) / 2.0 - frame.x0) / frame.width();
                let Some(rect) = self.rect(s, g, frame) else {
                    if let Some((at, arrow)) = place(frame, middle, mapping.fraction(bar.value)) {
                        scene.marker(at, arrow.unwrap_or(Marker::Cross), colour, MARKER_RADIUS);
                    }
                    continue;
                };
                scene.fill(rect, colour);
                if self.stacks() && rect.height() > 3.0 {
                    scene.line(&[(rect.x0, rect.y0), (rect.x1, rect.y0)], theme::PAPER, 1.0, &[]);
                }
                let ends =
                    bar.interval.map(|(lo, hi)| (mapping.fraction(lo), mapping.fraction(hi)));
                if let (Some((lo, hi)), false) =
                    (ends.filter(|(lo, hi)| !lo.is_nan() && !hi.is_nan()), self.stacks())
                {
                    let x = frame.x0 + middle * frame.width();
                    let y = |f: f64| frame.y1 - f.clamp(0.0, 1.0) * frame.height();
                    whisker(scene, (x, y(lo)), (x, y(hi)), theme::INK);
                }
            }
        }
        if self.values {
            self.draw_values(scene, frame);
        }
        let zero = mapping.fraction(0.0);
        if self.y.scale == Scale::Linear && zero > 0.0 && zero < 1.0 {
            let at = frame.y1 - zero * frame.height();
            scene.line(&[(frame.x0, at), (frame.x1, at)], theme::INK, 1.2, &[]);
        }
        draw_outline(scene, frame);
        if !any {
            draw_no_data(scene, frame);
        }
    }
}
