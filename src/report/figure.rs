//! A figure: a grid of panels with a title and a caption, drawn as SVG and PNG.

use super::bar_chart::BarChart;
use super::frame::{Insets, Plot, Styles};
use super::geometry::Rect;
use super::heat_map::HeatMap;
use super::legend::{LegendEntry, draw_box, draw_rows, free_box, rows_height};
use super::line_chart::LineChart;
use super::scatter_chart::{FRONT_NAME, ScatterChart};
use super::scene::{Align, Scene, Text, wrap};
use super::theme::{self, FIGURE_TITLE, LINE_HEIGHT, PANEL_TITLE, Palette, SMALL};
use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// One chart of a figure.
#[derive(Debug, Clone, PartialEq)]
pub enum Panel {
    /// Lines.
    Lines(LineChart),
    /// Scattered points.
    Scatter(ScatterChart),
    /// A heat map.
    Heat(HeatMap),
    /// Bars.
    Bars(BarChart),
}

macro_rules! panel_from {
    ($($kind:ident: $chart:ty),*) => {$(
        impl From<$chart> for Panel {
            fn from(chart: $chart) -> Self {
                Panel::$kind(chart)
            }
        }
    )*};
}
panel_from!(Lines: LineChart, Scatter: ScatterChart, Heat: HeatMap, Bars: BarChart);

/// Where the names of the series stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LegendPlace {
    /// In the frame of a single panel, shared under the title of several.
    #[default]
    Auto,
    /// Once for all panels, under the figure's title.
    Shared,
    /// In each panel, in a free corner or, when there is none, above the frame.
    Panels,
    /// Nowhere.
    Hidden,
}

/// A grid of panels.
///
/// ```
/// use peft_limits::report::{Axis, Figure, LineChart, Series};
/// let chart = LineChart {
///     x: Axis::log2("sequence length (tokens)"),
///     y: Axis::log10("time (s)"),
///     series: vec![Series::new("dense", [(128.0, 0.01), (256.0, 0.04)])],
///     ..Default::default()
/// };
/// let folder = tempfile::tempdir().unwrap();
/// let files = Figure::new("Cost of one gradient", [chart]).write(folder.path(), "cost").unwrap();
/// assert!(files[0].ends_with("cost.svg") && files[1].ends_with("cost.png"));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Title over all panels.
    pub title: String,
    /// Text under all panels: what intervals are, how many seeds, where numbers come from.
    pub caption: String,
    /// Panels, row by row.
    pub panels: Vec<Panel>,
    /// Panels in a row.
    pub columns: usize,
    /// Width and height of one panel in pixels, its title and axis labels included.
    pub panel_size: (f64, f64),
    /// Legend.
    pub legend: LegendPlace,
    /// Colours of the series.
    pub palette: Palette,
    /// Gives all line and scatter panels the same horizontal range.
    pub share_x: bool,
    /// Gives all line and scatter panels the same vertical range.
    pub share_y: bool,
}

/// A figure and the stem of its file names.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedFigure {
    /// File name without extension.
    pub name: String,
    /// The figure.
    pub figure: Figure,
}

impl NamedFigure {
    /// Names a figure.
    pub fn new(name: impl Into<String>, figure: Figure) -> Self {
        Self { name: name.into(), figure }
    }
}

const MARGIN: f64 = 18.0;
const PANEL_GAP: f64 = 22.0;

impl Figure {
    /// A figure of these panels: one of 960 x 600, two or four in two columns, others in up to
    /// three.
    pub fn new<P: Into<Panel>>(
        title: impl Into<String>,
        panels: impl IntoIterator<Item = P>,
    ) -> Self {
        let panels: Vec<Panel> = panels.into_iter().map(Into::into).collect();
        let (columns, panel_size) = match panels.len() {
            0 | 1 => (1, (924.0, 540.0)),
            2 | 4 => (2, (580.0, 430.0)),
            _ => (3, (470.0, 390.0)),
        };
        Self {
            title: title.into(),
            caption: String::new(),
            panels,
            columns,
            panel_size,
            legend: LegendPlace::Auto,
            palette: Palette::Categorical,
            share_x: false,
            share_y: false,
        }
    }

    /// Adds the text under the panels.
    pub fn caption(mut self, caption: impl Into<String>) -> Self {
        self.caption = caption.into();
        self
    }

    /// Sets the number of panels in a row.
    pub fn columns(mut self, columns: usize) -> Self {
        self.columns = columns.max(1);
        self
    }

    /// Colours the series by order.
    pub fn ordered(mut self) -> Self {
        self.palette = Palette::Ordered;
        self
    }

    /// Draws the figure to `folder/name.svg` and `folder/name.png`; returns both paths.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Draw`]. Neither file is left
    /// half-written.
    pub fn write(&self, folder: &Path, name: &str) -> Result<[PathBuf; 2]> {
        let scene = self.scene();
        let (svg, png) = (folder.join(format!("{name}.svg")), folder.join(format!("{name}.png")));
        // Both are drawn before either replaces an older file.
        let (svg_bytes, png_bytes) = (scene.to_svg(&svg)?, scene.to_png(&png)?);
        write_bytes(&svg, &svg_bytes)?;
        write_bytes(&png, &png_bytes)?;
        Ok([svg, png])
    }

    /// Draws to one file, SVG or PNG by its ending.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for another ending; as [`Figure::write`].
    pub fn write_to(&self, path: &Path) -> Result<()> {
        let scene = self.scene();
        match path.extension().and_then(|e| e.to_str()) {
            Some("svg") => write_bytes(path, &scene.to_svg(path)?),
            Some("png") => write_bytes(path, &scene.to_png(path)?),
            _ => Err(Error::invalid("figure", path.display(), "must end in .svg or .png")),
        }
    }

    /// Lays the figure out.
    pub(super) fn scene(&self) -> Scene {
        let plots = self.plots();
        let styles = self.styles(&plots);
        let columns = self.columns.clamp(1, plots.len().max(1));
        let rows = plots.len().div_ceil(columns).max(1);
        let (w, h) = (self.panel_size.0.max(200.0), self.panel_size.1.max(160.0));
        let width = (2.0 * MARGIN + w * columns as f64 + PANEL_GAP * (columns - 1) as f64).ceil();
        let inner = width - 2.0 * MARGIN;

        let title = wrap(&self.title, FIGURE_TITLE, true, inner);
        let caption = wrap(&self.caption, SMALL, false, inner);
        let shared = match self.legend {
            LegendPlace::Shared => true,
            LegendPlace::Auto => plots.len() > 1,
            _ => false,
        };
        let mut entries: Vec<LegendEntry> = Vec::new();
        for entry in plots.iter().flat_map(|p| p.legend(&styles)).filter(|_| shared) {
            if !entries.contains(&entry) {
                entries.push(entry);
            }
        }
        let title_end = MARGIN
            + title.len() as f64 * FIGURE_TITLE * LINE_HEIGHT
            + if title.is_empty() { 0.0 } else { 6.0 };
        let top =
            title_end + rows_height(&entries, inner) + if entries.is_empty() { 0.0 } else { 4.0 };
        let grid_end = top + h * rows as f64 + PANEL_GAP * (rows - 1) as f64;
        let caption_top = grid_end + if caption.is_empty() { 0.0 } else { 10.0 };
        let height = (caption_top + caption.len() as f64 * SMALL * LINE_HEIGHT + MARGIN).ceil();

        let mut scene = Scene::new(width, height);
        let like = Text::new((0.0, 0.0), "", FIGURE_TITLE, Align::Centre).bold();
        scene.lines_of_text(&title, width / 2.0, MARGIN - 4.0, &like);
        draw_rows(&mut scene, &entries, MARGIN, width - MARGIN, title_end);
        let like = Text::new((0.0, 0.0), "", SMALL, Align::Left).colour(theme::MUTED);
        scene.lines_of_text(&caption, MARGIN, caption_top, &like);

        let in_panels = !shared && self.legend != LegendPlace::Hidden;
        let outer = |i: usize| {
            let (x0, y0) = (
                MARGIN + (w + PANEL_GAP) * (i % columns) as f64,
                top + (h + PANEL_GAP) * (i / columns) as f64,
            );
            Rect { x0, y0, x1: x0 + w, y1: y0 + h }
        };
        let insets = aligned_insets(&plots, &styles, columns, (w, h), in_panels);
        for (i, (plot, insets)) in plots.iter().zip(insets).enumerate() {
            draw_panel(&mut scene, plot.as_ref(), outer(i), insets, &styles, in_panels);
        }
        scene
    }

    /// The panels as things to draw, with shared ranges settled.
    fn plots(&self) -> Vec<Box<dyn Plot>> {
        let lines = |panel: &Panel| match panel {
            Panel::Lines(chart) => Some(chart.clone()),
            Panel::Scatter(chart) => Some(chart.as_lines()),
            _ => None,
        };
        let has_data = |c: &LineChart| c.series.iter().any(|s| !s.points.is_empty());
        let ends: Vec<_> =
            self.panels.iter().filter_map(lines).filter(has_data).map(|c| c.ends()).collect();
        let common = |axis: usize| {
            let low = ends.iter().map(|e| e[axis].0).fold(f64::INFINITY, f64::min);
            (low, ends.iter().map(|e| e[axis].1).fold(f64::NEG_INFINITY, f64::max))
        };
        let prepare = |panel: &Panel| -> Box<dyn Plot> {
            if let Some(mut chart) = lines(panel) {
                if self.share_x && !ends.is_empty() {
                    chart.x.range = chart.x.range.or(Some(common(0)));
                }
                if self.share_y && !ends.is_empty() {
                    chart.y.range = chart.y.range.or(Some(common(1)));
                }
                return Box::new(chart);
            }
            match panel {
                Panel::Heat(chart) => Box::new(chart.clone()),
                Panel::Bars(chart) => Box::new(chart.clone()),
                Panel::Lines(chart) => Box::new(chart.clone()),
                Panel::Scatter(chart) => Box::new(chart.as_lines()),
            }
        };
        self.panels.iter().map(prepare).collect()
    }

    fn styles(&self, plots: &[Box<dyn Plot>]) -> Styles {
        let mut names: Vec<String> = Vec::new();
        for name in plots.iter().flat_map(|p| p.series_names()) {
            if name != FRONT_NAME && !names.contains(&name) {
                names.push(name);
            }
        }
        Styles { palette: self.palette, names }
    }
}

fn title_lines(plot: &dyn Plot, width: f64) -> Vec<String> {
    wrap(plot.title(), PANEL_TITLE, true, width)
}

/// Insets of all panels: equal left and right within a column, equal top and bottom within a row.
fn aligned_insets(
    plots: &[Box<dyn Plot>],
    styles: &Styles,
    columns: usize,
    (w, h): (f64, f64),
    legends: bool,
) -> Vec<Insets> {
    let mut all = vec![
        Insets { left: 0.15 * w, top: 0.08 * h, right: 0.05 * w, bottom: 0.15 * h };
        plots.len()
    ];
    // What an axis needs depends on the frame it leaves; three rounds settle it.
    for _ in 0..3 {
        let own: Vec<Insets> = plots
            .iter()
            .zip(&all)
            .map(|(plot, i)| {
                let (fw, fh) = ((w - i.left - i.right).max(40.0), (h - i.top - i.bottom).max(40.0));
                let mut insets = plot.insets(fw, fh);
                let titles = title_lines(plot.as_ref(), w).len() as f64;
                insets.top +=
                    if titles > 0.0 { titles * PANEL_TITLE * LINE_HEIGHT + 2.0 } else { 0.0 };
                let entries = plot.legend(styles);
                let frame = Rect { x0: 0.0, y0: 0.0, x1: fw, y1: fh };
                if legends && free_box(&entries, frame, &plot.obstacles(frame)).is_none() {
                    insets.top += rows_height(&entries, fw);
                }
                insets
            })
            .collect();
        let joint = |i: usize| {
            let column = (i % columns..own.len())
                .step_by(columns)
                .fold(Insets::default(), |m, j| m.max(own[j]));
            let row = (i / columns * columns..own.len())
                .take(columns)
                .fold(Insets::default(), |m, j| m.max(own[j]));
            Insets { left: column.left, right: column.right, top: row.top, bottom: row.bottom }
        };
        all = (0..own.len()).map(joint).collect();
    }
    all
}

fn draw_panel(
    scene: &mut Scene,
    plot: &dyn Plot,
    outer: Rect,
    insets: Insets,
    styles: &Styles,
    legends: bool,
) {
    let frame = Rect {
        x0: outer.x0 + insets.left,
        y0: outer.y0 + insets.top,
        x1: (outer.x1 - insets.right).max(outer.x0 + insets.left + 40.0),
        y1: (outer.y1 - insets.bottom).max(outer.y0 + insets.top + 40.0),
    };
    let titles = title_lines(plot, outer.width());
    let like = Text::new((0.0, 0.0), "", PANEL_TITLE, Align::Centre).bold();
    let half =
        titles.iter().map(|t| super::scene::text_width(t, PANEL_TITLE, true)).fold(0.0, f64::max)
            / 2.0;
    // Over the frame, but inside the panel.
    let middle = ((frame.x0 + frame.x1) / 2.0).max(outer.x0 + half).min(outer.x1 - half);
    scene.lines_of_text(&titles, middle, outer.y0, &like);
    plot.draw(scene, frame, styles);
    let entries = plot.legend(styles);
    if !legends || entries.is_empty() {
        return;
    }
    match free_box(&entries, frame, &plot.obstacles(frame)) {
        Some(place) => draw_box(scene, &entries, place),
        None => {
            let own_top = plot.insets(frame.width(), frame.height()).top;
            let top = frame.y0 - own_top - rows_height(&entries, frame.width());
            draw_rows(scene, &entries, frame.x0, frame.x1, top);
        }
    }
}

#[cfg(test)]
#[path = "figure_tests.rs"]
mod tests;
