//! Heat maps: a quantity over two others, by colour, with its scale.

use super::axis::{Axis, Mapping, Scale};
use super::cell::short_float;
use super::frame::{Insets, Plot, Side, Styles, draw_axes, draw_no_data, draw_outline};
use super::geometry::{Point, Rect, clip};
use super::legend::LegendEntry;
use super::line_chart::Series;
use super::scene::{Align, Scene, Text, text_width, wrap};
use super::theme::{self, LABEL, LINE_HEIGHT, SERIES_WIDTH, SMALL};
use plotters::style::RGBColor;

/// One side of a heat map.
#[derive(Debug, Clone, PartialEq)]
pub enum HeatAxis {
    /// Cells of equal width with names.
    Categories {
        /// What the names are.
        label: String,
        /// One name per cell, from the left or from the bottom.
        names: Vec<String>,
    },
    /// Cells around rising numbers, with borders half-way between them on the axis' scale.
    Numbers {
        /// Label, scale and optional ticks; the range is that of the cells.
        axis: Axis,
        /// One rising value per cell.
        centres: Vec<f64>,
    },
}

impl HeatAxis {
    /// Named cells.
    pub fn categories<S: Into<String>>(
        label: impl Into<String>,
        names: impl IntoIterator<Item = S>,
    ) -> Self {
        HeatAxis::Categories {
            label: label.into(),
            names: names.into_iter().map(Into::into).collect(),
        }
    }

    /// Cells around numbers.
    pub fn numbers(axis: Axis, centres: Vec<f64>) -> Self {
        HeatAxis::Numbers { axis, centres }
    }

    fn len(&self) -> usize {
        match self {
            HeatAxis::Categories { names, .. } => names.len(),
            HeatAxis::Numbers { centres, .. } => centres.len(),
        }
    }

    /// Borders of the cells in scale units (cell numbers for categories); empty when the centres
    /// are unusable.
    fn borders(&self) -> Vec<f64> {
        let HeatAxis::Numbers { axis, centres } = self else {
            return (0..=self.len()).map(|i| i as f64).collect();
        };
        let at: Vec<f64> = centres.iter().map(|c| axis.scale.forward(*c)).collect();
        if at.is_empty() || !at.iter().all(|u| u.is_finite()) || at.windows(2).any(|w| w[0] >= w[1])
        {
            return Vec::new();
        }
        let inner: Vec<f64> = at.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
        let last = at.len() - 1;
        let (first_half, last_half) = match inner.as_slice() {
            [] => (0.5, 0.5),
            _ => (inner[0] - at[0], at[last] - inner[last - 1]),
        };
        let ends = (at[0] - first_half, at[last] + last_half);
        std::iter::once(ends.0).chain(inner).chain(std::iter::once(ends.1)).collect()
    }

    fn mapping(&self) -> Mapping {
        let borders = self.borders();
        let scale =
            if let HeatAxis::Numbers { axis, .. } = self { axis.scale } else { Scale::Linear };
        match (borders.first(), borders.last()) {
            (Some(low), Some(high)) if low < high => Mapping { scale, low: *low, high: *high },
            _ => Mapping { scale, low: 0.0, high: 1.0 },
        }
    }

    fn side(&self, count: usize) -> Side {
        match self {
            HeatAxis::Categories { label, names } => {
                let n = names.len().max(1) as f64;
                let ticks = names
                    .iter()
                    .enumerate()
                    .map(|(i, t)| ((i as f64 + 0.5) / n, t.clone()))
                    .collect();
                Side { label: label.clone(), ticks, categories: true, ..Side::default() }
            }
            HeatAxis::Numbers { axis, .. } => {
                let (ticks, minor) = axis.tick_marks(&self.mapping(), count);
                Side { label: axis.label.clone(), ticks, minor, ..Side::default() }
            }
        }
    }
}

/// How values become colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ColourScale {
    /// Dark to light with the value.
    #[default]
    Linear,
    /// Dark to light with the logarithm of the value.
    Log10,
    /// Blue below zero, orange above, white at zero.
    Diverging,
}

/// A heat map. NaN cells, and on a logarithmic scale those not positive, are grey and crossed out.
#[derive(Debug, Clone, PartialEq)]
pub struct HeatMap {
    /// Title of the panel.
    pub title: String,
    /// Horizontal side.
    pub x: HeatAxis,
    /// Vertical side, from the bottom up.
    pub y: HeatAxis,
    /// `values[row][column]`, row 0 at the bottom; missing rows and columns are missing cells.
    pub values: Vec<Vec<f64>>,
    /// What the colour shows, with its unit.
    pub value_label: String,
    /// How values become colours.
    pub colours: ColourScale,
    /// Ends of the colour bar; those of the finite values when absent. Beyond, the end colour.
    pub range: Option<(f64, f64)>,
    /// Writes the value into each cell that has room for it.
    pub annotate: bool,
    /// Curves over the cells, in the numbers of both sides (predicted boundaries); white-edged.
    pub curves: Vec<Series>,
}

const BAR_GAP: f64 = 16.0;
const BAR_WIDTH: f64 = 18.0;

impl HeatMap {
    /// A heat map with the default colours.
    pub fn new(
        title: impl Into<String>,
        x: HeatAxis,
        y: HeatAxis,
        values: Vec<Vec<f64>>,
        value_label: impl Into<String>,
    ) -> Self {
        Self {
            title: title.into(),
            x,
            y,
            values,
            value_label: value_label.into(),
            colours: ColourScale::default(),
            range: None,
            annotate: false,
            curves: Vec::new(),
        }
    }

    fn value_axis(&self) -> Axis {
        let scale = if self.colours == ColourScale::Log10 { Scale::Log10 } else { Scale::Linear };
        Axis { label: self.value_label.clone(), scale, range: self.range, ticks: None }
    }

    fn value_mapping(&self) -> Mapping {
        let axis = self.value_axis();
        let mut extent = axis.extent(self.values.iter().flatten().copied());
        if let (ColourScale::Diverging, Some((lo, hi))) = (self.colours, extent) {
            let half = lo.abs().max(hi.abs()).max(f64::MIN_POSITIVE);
            extent = Some((-half, half));
        }
        axis.mapping(extent, 0.0)
    }

    /// `None` for a missing cell.
    fn colour(&self, mapping: &Mapping, value: f64) -> Option<RGBColor> {
        let t = mapping.fraction(value);
        let map = if self.colours == ColourScale::Diverging {
            theme::diverging
        } else {
            theme::sequential
        };
        let absent = t.is_nan() || (self.colours == ColourScale::Log10 && value <= 0.0);
        (!absent).then(|| map(t))
    }

    fn bar_ticks(&self, height: f64) -> Side {
        let (ticks, minor) = self
            .value_axis()
            .tick_marks(&self.value_mapping(), ((height / 50.0) as usize).clamp(2, 7));
        Side { label: self.value_label.clone(), ticks, minor, ..Side::default() }
    }

    fn draw_cells(&self, scene: &mut Scene, frame: Rect) {
        let (xs, ys, mapping) = (self.x.borders(), self.y.borders(), self.value_mapping());
        let (mx, my) = (self.x.mapping(), self.y.mapping());
        let px = |u: f64| frame.x0 + (u - mx.low) / (mx.high - mx.low) * frame.width();
        let py = |u: f64| frame.y1 - (u - my.low) / (my.high - my.low) * frame.height();
        for (row, y) in ys.windows(2).enumerate() {
            for (column, x) in xs.windows(2).enumerate() {
                let value =
                    self.values.get(row).and_then(|r| r.get(column)).copied().unwrap_or(f64::NAN);
                let cell = Rect { x0: px(x[0]), x1: px(x[1]), y0: py(y[1]), y1: py(y[0]) };
                let Some(colour) = self.colour(&mapping, value) else {
                    scene.fill(cell, theme::ABSENT);
                    scene.line(&[(cell.x0, cell.y1), (cell.x1, cell.y0)], theme::MUTED, 1.0, &[]);
                    continue;
                };
                // The neighbours drawn later cover the excess; cells that only met would show seams
                // in SVG.
                scene.fill(
                    Rect {
                        x1: (cell.x1 + 0.7).min(frame.x1),
                        y0: (cell.y0 - 0.7).max(frame.y0),
                        ..cell
                    },
                    colour,
                );
                let text = annotation(value);
                if self.annotate
                    && text_width(&text, SMALL, false) + 4.0 < cell.width()
                    && cell.height() > SMALL * 1.2
                {
                    let ink =
                        if theme::luminance(colour) > 0.5 { theme::INK } else { theme::PAPER };
                    let middle = ((cell.x0 + cell.x1) / 2.0, (cell.y0 + cell.y1) / 2.0);
                    scene.text(Text::new(middle, text, SMALL, Align::Centre).colour(ink));
                }
            }
        }
    }

    fn draw_colour_bar(&self, scene: &mut Scene, frame: Rect) {
        let bar = Rect { x0: frame.x1 + BAR_GAP, x1: frame.x1 + BAR_GAP + BAR_WIDTH, ..frame };
        let map = if self.colours == ColourScale::Diverging {
            theme::diverging
        } else {
            theme::sequential
        };
        const STEPS: usize = 64;
        // From the top, each down to the bottom: strips that only met would show seams in SVG.
        for i in (0..STEPS).rev() {
            let top = bar.y1 - bar.height() * (i + 1) as f64 / STEPS as f64;
            scene.fill(Rect { y0: top, ..bar }, map((i as f64 + 0.5) / STEPS as f64));
        }
        scene.outline(bar, theme::INK, 1.2);
        let side = self.bar_ticks(frame.height());
        for (f, text) in &side.ticks {
            let at = bar.y1 - f * bar.height();
            scene.line(&[(bar.x1, at), (bar.x1 + 4.0, at)], theme::INK, 1.2, &[]);
            scene.text(Text::new((bar.x1 + 8.0, at), text, SMALL, Align::Left));
        }
        let ticks = side.ticks.iter().map(|(_, t)| text_width(t, SMALL, false)).fold(0.0, f64::max);
        for (i, line) in wrap(&side.label, LABEL, false, frame.height()).iter().enumerate() {
            let x = bar.x1 + 14.0 + ticks + (i as f64 + 0.5) * LABEL * LINE_HEIGHT;
            scene.text(
                Text::new((x, (frame.y0 + frame.y1) / 2.0), line, LABEL, Align::Centre).upright(),
            );
        }
    }

    fn draw_curves(&self, scene: &mut Scene, frame: Rect) {
        let (mx, my) = (self.x.mapping(), self.y.mapping());
        let pixel = |x: f64, y: f64| {
            (frame.x0 + mx.fraction(x) * frame.width(), frame.y1 - my.fraction(y) * frame.height())
        };
        for curve in &self.curves {
            let mut pieces: Vec<Vec<Point>> = Vec::new();
            for pair in curve.points.windows(2) {
                let (a, b) = (pixel(pair[0].x, pair[0].y), pixel(pair[1].x, pair[1].y));
                if ![a.0, a.1, b.0, b.1].iter().all(|v| v.is_finite()) {
                    continue;
                }
                let Some((a, b)) = clip(a, b, frame) else { continue };
                match pieces.last_mut() {
                    Some(piece) if piece.last() == Some(&a) => piece.push(b),
                    _ => pieces.push(vec![a, b]),
                }
            }
            let dash = curve.line.dash().unwrap_or(&[]);
            pieces
                .iter()
                .for_each(|piece| scene.line(piece, theme::PAPER, 2.4 * SERIES_WIDTH, &[]));
            pieces.iter().for_each(|piece| scene.line(piece, theme::INK, SERIES_WIDTH, dash));
        }
    }
}

/// A value in a cell: three digits or fewer.
fn annotation(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || (size.fract() == 0.0 && size < 1e4) {
        format!("{value}")
    } else if (0.01..1e4).contains(&size) {
        format!("{value:.*}", (1 - size.log10().floor() as i32).clamp(0, 3) as usize)
    } else if value.is_finite() {
        format!("{value:.0e}")
    } else {
        short_float(value)
    }
}

impl Plot for HeatMap {
    fn title(&self) -> &str {
        &self.title
    }

    fn series_names(&self) -> Vec<String> {
        Vec::new()
    }

    fn legend(&self, _styles: &Styles) -> Vec<LegendEntry> {
        let entry = |s: &Series| LegendEntry {
            name: s.name.clone(),
            colour: theme::INK,
            line: s.line,
            marker: None,
            swatch: false,
        };
        self.curves.iter().filter(|s| !s.name.is_empty()).map(entry).collect()
    }

    fn insets(&self, width: f64, height: f64) -> Insets {
        let (x, y) = (self.x.side((width / 75.0) as usize), self.y.side((height / 50.0) as usize));
        let bar = self.bar_ticks(height);
        let ticks = bar.ticks.iter().map(|(_, t)| text_width(t, SMALL, false)).fold(0.0, f64::max);
        let label = wrap(&bar.label, LABEL, false, height).len() as f64 * LABEL * LINE_HEIGHT;
        Insets {
            left: y.left_room(height),
            // Half a colour-bar text stands over the frame.
            top: SMALL * 0.6,
            right: BAR_GAP + BAR_WIDTH + 14.0 + ticks + label,
            bottom: x.bottom_room(width),
        }
    }

    fn obstacles(&self, frame: Rect) -> Vec<Point> {
        // Cells everywhere: a legend goes above the frame.
        (0..=40)
            .flat_map(|i| (0..=40).map(move |j| (f64::from(i) / 40.0, f64::from(j) / 40.0)))
            .map(|(a, b)| (frame.x0 + a * frame.width(), frame.y0 + b * frame.height()))
            .collect()
    }

    fn draw(&self, scene: &mut Scene, frame: Rect, _styles: &Styles) {
        self.draw_cells(scene, frame);
        self.draw_curves(scene, frame);
        let (x, y) = (
            self.x.side((frame.width() / 75.0) as usize),
            self.y.side((frame.height() / 50.0) as usize),
        );
        draw_axes(scene, frame, &x, &y);
        draw_outline(scene, frame);
        self.draw_colour_bar(scene, frame);
        if self.x.borders().len() < 2 || self.y.borders().len() < 2 {
            draw_no_data(scene, frame);
        }
    }
}
