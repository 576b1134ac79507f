//! Lines over one quantity: series with markers, intervals, reference lines.

use super::axis::{Axis, Mapping};
use super::frame::{Insets, Plot, Side, Styles, draw_axes, draw_no_data, draw_outline};
use super::geometry::{Point, Rect, clip};
use super::legend::LegendEntry;
use super::scene::{Align, Scene, Text, text_width, wrap};
use super::theme::{LINE_HEIGHT, MARKER_RADIUS, MUTED, Marker, PAPER, SERIES_WIDTH, SMALL};

/// How the points of a series are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LineStyle {
    /// Not joined: markers only.
    None,
    /// A solid line.
    #[default]
    Solid,
    /// A dashed line.
    Dashed,
    /// A dotted line.
    Dotted,
}

impl LineStyle {
    pub(super) fn dash(self) -> Option<&'static [f64]> {
        match self {
            LineStyle::None => None,
            LineStyle::Solid => Some(&[]),
            LineStyle::Dashed => Some(&[9.0, 5.0]),
            LineStyle::Dotted => Some(&[2.5, 4.0]),
        }
    }
}

/// A point of a series. A NaN coordinate leaves the point out and breaks the line; a coordinate
/// beyond the axis (infinite, or zero on a logarithmic axis) is an arrow at the border.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlotPoint {
    /// Horizontal coordinate.
    pub x: f64,
    /// Vertical coordinate.
    pub y: f64,
    /// Interval of `y` (low, high), shaded along lines, a whisker otherwise.
    pub interval: Option<(f64, f64)>,
}

impl From<(f64, f64)> for PlotPoint {
    fn from((x, y): (f64, f64)) -> Self {
        Self { x, y, interval: None }
    }
}

impl From<(f64, f64, f64, f64)> for PlotPoint {
    /// (x, y, low, high)
    fn from((x, y, low, high): (f64, f64, f64, f64)) -> Self {
        Self { x, y, interval: Some((low, high)) }
    }
}

/// A named sequence of points.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series {
    /// Name in the legend; a series of the same name looks the same in every panel. Empty: no
    /// entry.
    pub name: String,
    /// Points in drawing order.
    pub points: Vec<PlotPoint>,
    /// How points are joined.
    pub line: LineStyle,
    /// Whether points have markers (false for theory curves).
    pub markers: bool,
    /// The series whose colour and marker this one shares: a prediction that of its measurement.
    pub like: Option<String>,
}

impl Series {
    /// A solid line with markers.
    pub fn new<P: Into<PlotPoint>>(
        name: impl Into<String>,
        points: impl IntoIterator<Item = P>,
    ) -> Self {
        let points = points.into_iter().map(Into::into).collect();
        Self { name: name.into(), points, line: LineStyle::Solid, markers: true, like: None }
    }

    /// A dashed line without markers: a prediction.
    pub fn prediction<P: Into<PlotPoint>>(
        name: impl Into<String>,
        points: impl IntoIterator<Item = P>,
    ) -> Self {
        Self { line: LineStyle::Dashed, markers: false, ..Self::new(name, points) }
    }

    /// Gives the series the colour and marker of the one named `other`.
    pub fn like(self, other: impl Into<String>) -> Self {
        Self { like: Some(other.into()), ..self }
    }

    fn style_name(&self) -> &str {
        self.like.as_deref().unwrap_or(&self.name)
    }
}

/// A straight line across the plot, labelled outside the frame.
#[derive(Debug, Clone, PartialEq)]
pub enum Reference {
    /// At this horizontal coordinate, labelled above the frame.
    Vertical(f64, String),
    /// At this vertical coordinate, labelled on the right.
    Horizontal(f64, String),
}

/// A chart of lines.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LineChart {
    /// Title of the panel.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// Series, drawn in order.
    pub series: Vec<Series>,
    /// Reference lines.
    pub references: Vec<Reference>,
}

const RIGHT_LABEL: f64 = 120.0;

impl LineChart {
    fn mappings(&self) -> (Mapping, Mapping) {
        let references = |vertical: bool| {
            self.references.iter().filter_map(move |r| match r {
                Reference::Vertical(v, _) if vertical => Some(*v),
                Reference::Horizontal(v, _) if !vertical => Some(*v),
                _ => None,
            })
        };
        let points = || self.series.iter().flat_map(|s| &s.points);
        let intervals = points().filter_map(|p| p.interval).flat_map(|(lo, hi)| [lo, hi]);
        let x = self.x.extent(points().map(|p| p.x).chain(references(true)));
        let y = self.y.extent(points().map(|p| p.y).chain(intervals).chain(references(false)));
        (self.x.mapping(x, 0.04), self.y.mapping(y, 0.06))
    }

    /// The ends of the axes in data units, for sharing between panels.
    pub(super) fn ends(&self) -> [(f64, f64); 2] {
        let (x, y) = self.mappings();
        [x, y].map(|m| m.ends())
    }

    fn sides(&self, width: f64, height: f64) -> (Side, Side) {
        let (x, y) = self.mappings();
        let side = |axis: &Axis, m: &Mapping, count: f64| {
            let (ticks, minor) = axis.tick_marks(m, (count as usize).clamp(2, 8));
            Side { label: axis.label.clone(), ticks, minor, grid: true, categories: false }
        };
        (side(&self.x, &x, width / 75.0), side(&self.y, &y, height / 50.0))
    }

    /// Labels above the frame: text, centre and row, staggered where they would touch.
    fn labels_above(&self, x: &Mapping, width: f64) -> Vec<(String, f64, usize)> {
        let mut row_ends: Vec<f64> = Vec::new();
        let mut labels: Vec<(f64, &String)> = self
            .references
            .iter()
            .filter_map(|r| match r {
                Reference::Vertical(v, text) if inside(x.fraction(*v)) => {
                    Some((x.fraction(*v) * width, text))
                }
                _ => None,
            })
            .collect();
        labels.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut placed = Vec::new();
        for (at, text) in labels {
            let wide = text_width(text, SMALL, false);
            let centre = at.min(width - wide / 2.0).max(wide / 2.0);
            let row = row_ends
                .iter()
                .position(|end| centre - wide / 2.0 > end + 10.0)
                .unwrap_or(row_ends.len());
            if row == row_ends.len() {
                row_ends.push(0.0);
            }
            row_ends[row] = centre + wide / 2.0;
            placed.push((text.clone(), centre, row));
        }
        placed
    }

    /// Labels on the right: lines of text and the top of the first, moved down where they would
    /// touch.
    fn labels_right(&self, y: &Mapping, height: f64) -> Vec<(Vec<String>, f64)> {
        let mut labels: Vec<(f64, Vec<String>)> = self
            .references
            .iter()
            .filter_map(|r| match r {
                Reference::Horizontal(v, text) if inside(y.fraction(*v)) => {
                    Some(((1.0 - y.fraction(*v)) * height, wrap(text, SMALL, false, RIGHT_LABEL)))
                }
                _ => None,
            })
            .collect();
        labels.sort_by(|a, b| a.0.total_cmp(&b.0));
        let tall = |lines: &[String]| lines.len() as f64 * SMALL * LINE_HEIGHT;
        let mut tops: Vec<f64> = labels.iter().map(|(at, lines)| at - tall(lines) / 2.0).collect();
        for i in 1..tops.len() {
            tops[i] = tops[i].max(tops[i - 1] + tall(&labels[i - 1].1));
        }
        // The last ones move up again when they would leave the frame.
        let mut limit = height;
        for i in (0..tops.len()).rev() {
            tops[i] = tops[i].min(limit - tall(&labels[i].1));
            limit = tops[i];
        }
        labels.into_iter().zip(tops).map(|((_, lines), top)| (lines, top)).collect()
    }

    fn draw_references(&self, scene: &mut Scene, frame: Rect, x: &Mapping, y: &Mapping) {
        for reference in &self.references {
            let (from, to) = match reference {
                Reference::Vertical(v, _) if inside(x.fraction(*v)) => {
                    let at = frame.x0 + x.fraction(*v) * frame.width();
                    ((at, frame.y0 - 5.0), (at, frame.y1))
                }
                Reference::Horizontal(v, _) if inside(y.fraction(*v)) => {
                    let at = frame.y1 - y.fraction(*v) * frame.height();
                    ((frame.x0, at), (frame.x1 + 5.0, at))
                }
                _ => continue,
            };
            scene.line(&[from, to], MUTED, 1.4, &[6.0, 4.0]);
        }
        for (text, centre, row) in self.labels_above(x, frame.width()) {
            let at = (frame.x0 + centre, frame.y0 - 8.0 - (row as f64 + 0.5) * SMALL * LINE_HEIGHT);
            scene.text(Text::new(at, text, SMALL, Align::Centre).colour(MUTED));
        }
        let like = Text::new((0.0, 0.0), "", SMALL, Align::Left).colour(MUTED);
        for (lines, top) in self.labels_right(y, frame.height()) {
            scene.lines_of_text(&lines, frame.x1 + 8.0, frame.y0 + top, &like);
        }
    }
}

fn inside(fraction: f64) -> bool {
    (-1e-9..=1.0 + 1e-9).contains(&fraction)
}

/// Where a point is drawn: in the frame, or on its border with the direction in which it lies.
pub(super) fn place(frame: Rect, fx: f64, fy: f64) -> Option<(Point, Option<Marker>)> {
    if fx.is_nan() || fy.is_nan() || !inside(fx) {
        return None;
    }
    let at = |fy: f64| (frame.x0 + fx * frame.width(), frame.y1 - fy * frame.height());
    Some(match fy {
        fy if fy > 1.0 + 1e-9 => ((at(1.0).0, frame.y0 + 7.0), Some(Marker::TriangleUp)),
        fy if fy < -1e-9 => ((at(0.0).0, frame.y1 - 7.0), Some(Marker::TriangleDown)),
        fy => (at(fy), None),
    })
}

/// Draws one series; shared by charts of lines and of scattered points.
fn draw_series(
    scene: &mut Scene,
    frame: Rect,
    x: &Mapping,
    y: &Mapping,
    series: &Series,
    styles: &Styles,
) {
    let (colour, marker) = styles.of(series.style_name());
    let fractions = |p: &PlotPoint| (x.fraction(p.x), y.fraction(p.y));
    let pixel =
        |(fx, fy): (f64, f64)| (frame.x0 + fx * frame.width(), frame.y1 - fy * frame.height());
    if let Some(dash) = series.line.dash() {
        for run in
            series.points.split(|p| !fractions(p).0.is_finite() || !fractions(p).1.is_finite())
        {
            let mut piece: Vec<Point> = Vec::new();
            for pair in run.windows(2) {
                let clipped = clip(pixel(fractions(&pair[0])), pixel(fractions(&pair[1])), frame);
                match clipped {
                    Some((a, b)) if piece.last() == Some(&a) => piece.push(b),
                    Some((a, b)) => {
                        scene.line(
                            &std::mem::replace(&mut piece, vec![a, b]),
                            colour,
                            SERIES_WIDTH,
                            dash,
                        );
                    }
                    None => {}
                }
            }
            scene.line(&piece, colour, SERIES_WIDTH, dash);
        }
    }
    for point in &series.points {
        let (fx, fy) = fractions(point);
        let Some((at, arrow)) = place(frame, fx, fy) else { continue };
        match (arrow, point.interval) {
            // A line that continues beyond a fixed range needs no arrow.
            (Some(_), _) if fy.is_finite() && series.line != LineStyle::None => continue,
            (Some(arrow), _) => scene.marker(at, arrow, colour, MARKER_RADIUS),
            (None, Some((lo, hi)))
                if series.line == LineStyle::None || series.points.len() == 1 =>
            {
                let end = |v: f64| pixel((fx, y.fraction(v).clamp(0.0, 1.0)));
                let (a, b) = (end(lo), end(hi));
                if a.1.is_finite() && b.1.is_finite() {
                    whisker(scene, a, b, colour);
                }
            }
            _ => {}
        }
        if arrow.is_none() && (series.markers || series.points.len() == 1) {
            scene.marker(at, marker, colour, MARKER_RADIUS);
        }
    }
}

/// A vertical interval with end bars.
pub(super) fn whisker(scene: &mut Scene, a: Point, b: Point, colour: plotters::style::RGBColor) {
    // A white edge keeps it visible on a bar of any colour.
    for (ink, width) in [(PAPER, 3.6), (colour, 1.6)] {
        scene.line(&[a, b], ink, width, &[]);
        for end in [a, b] {
            scene.line(&[(end.0 - 4.0, end.1), (end.0 + 4.0, end.1)], ink, width, &[]);
        }
    }
}

/// Shades the interval along a line, one polygon per unbroken run.
fn draw_band(
    scene: &mut Scene,
    frame: Rect,
    x: &Mapping,
    y: &Mapping,
    series: &Series,
    styles: &Styles,
) {
    if series.line == LineStyle::None {
        return;
    }
    let edge = |p: &PlotPoint, v: f64| {
        let (fx, fy) = (x.fraction(p.x), y.fraction(v).clamp(0.0, 1.0));
        (frame.x0 + fx * frame.width(), frame.y1 - fy * frame.height())
    };
    let usable = |p: &PlotPoint| {
        let ends =
            p.interval.is_some_and(|(lo, hi)| !y.fraction(lo).is_nan() && !y.fraction(hi).is_nan());
        ends && inside(x.fraction(p.x))
    };
    for run in series.points.split(|p| !usable(p)).filter(|run| run.len() > 1) {
        let ends = |p: &PlotPoint| p.interval.unwrap_or((p.y, p.y));
        let mut outline: Vec<Point> = run.iter().map(|p| edge(p, ends(p).1)).collect();
        outline.extend(run.iter().rev().map(|p| edge(p, ends(p).0)));
        scene.polygon(outline, styles.of(series.style_name()).0, 0.2);
    }
}

impl Plot for LineChart {
    fn title(&self) -> &str {
        &self.title
    }

    fn series_names(&self) -> Vec<String> {
        self.series.iter().map(|s| s.style_name().to_string()).collect()
    }

    fn legend(&self, styles: &Styles) -> Vec<LegendEntry> {
        let entry = |s: &Series| {
            let (colour, marker) = styles.of(s.style_name());
            let marker = s.markers.then_some(marker);
            LegendEntry { name: s.name.clone(), colour, line: s.line, marker, swatch: false }
        };
        self.series.iter().filter(|s| !s.name.is_empty()).map(entry).collect()
    }

    fn insets(&self, width: f64, height: f64) -> Insets {
        let (x, y) = self.sides(width, height);
        let (mx, my) = self.mappings();
        let rows =
            self.labels_above(&mx, width).iter().map(|(_, _, row)| row + 1).max().unwrap_or(0);
        let right = self.labels_right(&my, height);
        let right =
            right.iter().flat_map(|(lines, _)| lines).map(|l| text_width(l, SMALL, false) + 10.0);
        Insets {
            left: y.left_room(height),
            top: if rows == 0 { 6.0 } else { rows as f64 * SMALL * LINE_HEIGHT + 10.0 },
            right: right.fold(x.overhang(width).max(4.0), f64::max),
            bottom: x.bottom_room(width),
        }
    }

    fn obstacles(&self, frame: Rect) -> Vec<Point> {
        let (x, y) = self.mappings();
        let mut points = Vec::new();
        for series in &self.series {
            let heights = |p: &PlotPoint| {
                let mut values = vec![p.y];
                values.extend(p.interval.into_iter().flat_map(|(lo, hi)| [lo, hi]));
                values
            };
            let placed = |p: &PlotPoint, v: f64| {
                place(frame, x.fraction(p.x), y.fraction(v)).map(|(at, _)| at)
            };
            for p in &series.points {
                points.extend(heights(p).into_iter().filter_map(|v| placed(p, v)));
            }
            for pair in series.points.windows(2) {
                for (v, w) in heights(&pair[0]).into_iter().zip(heights(&pair[1])) {
                    let (Some(a), Some(b)) = (placed(&pair[0], v), placed(&pair[1], w)) else {
                        continue;
                    };
                    points.extend((1..40).map(|i| {
                        let t = f64::from(i) / 40.0;
                        (a.0 + t * (b.0 - a.0), a.1 + t * (b.1 - a.1))
                    }));
                }
            }
        }
        for reference in &self.references {
            let along = |i: i32| f64::from(i) / 60.0;
            let line = |fx: f64, fy: f64| place(frame, fx, fy).map(|(at, _)| at);
            match reference {
                Reference::Vertical(v, _) => {
                    points.extend((0..=60).filter_map(|i| line(x.fraction(*v), along(i))))
                }
                Reference::Horizontal(v, _) => {
                    points.extend((0..=60).filter_map(|i| line(along(i), y.fraction(*v))))
                }
            }
        }
        points
    }

    fn draw(&self, scene: &mut Scene, frame: Rect, styles: &Styles) {
        let (x, y) = self.mappings();
        let (bottom, left) = self.sides(frame.width(), frame.height());
        draw_axes(scene, frame, &bottom, &left);
        self.series.iter().for_each(|s| draw_band(scene, frame, &x, &y, s, styles));
        self.draw_references(scene, frame, &x, &y);
        draw_outline(scene, frame);
        self.series.iter().for_each(|s| draw_series(scene, frame, &x, &y, s, styles));
        if !self
            .series
            .iter()
            .flat_map(|s| &s.points)
            .any(|p| !x.fraction(p.x).is_nan() && !y.fraction(p.y).is_nan())
        {
            draw_no_data(scene, frame);
        }
    }
}
