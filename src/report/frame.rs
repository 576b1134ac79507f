//! The room around a plot: insets, axes, grid, tick and axis labels.

use super::geometry::{Point, Rect};
use super::legend::LegendEntry;
use super::scatter_chart::FRONT_NAME;
use super::scene::{Align, Scene, Text, text_width, wrap};
use super::theme::{self, LABEL, LINE_HEIGHT, Palette, SMALL};
use plotters::style::RGBColor;

/// Margins in pixels between a panel's outer rectangle and its plot frame.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Insets {
    pub left: f64,
    pub top: f64,
    pub right: f64,
    pub bottom: f64,
}

impl Insets {
    /// Side by side the larger of two.
    pub fn max(self, o: Insets) -> Insets {
        Insets {
            left: self.left.max(o.left),
            top: self.top.max(o.top),
            right: self.right.max(o.right),
            bottom: self.bottom.max(o.bottom),
        }
    }
}

/// Which style each series name of a figure has, the same in every panel.
#[derive(Debug, Clone)]
pub(super) struct Styles {
    pub palette: Palette,
    pub names: Vec<String>,
}

impl Styles {
    pub fn of(&self, name: &str) -> (RGBColor, theme::Marker) {
        if name == FRONT_NAME {
            return (theme::INK, theme::Marker::Circle);
        }
        let slot = self.names.iter().position(|n| n == name).unwrap_or(0);
        if self.palette == Palette::Categorical
            && let Some(style) = self.among_methods(slot)
        {
            return style;
        }
        theme::series_style(self.palette, slot, self.names.len())
    }

    /// Style of a series in a figure that compares methods (names at least two of them): a method's
    /// own colour, its variants told apart by the marker; the colours that are left for other
    /// series.
    fn among_methods(&self, slot: usize) -> Option<(RGBColor, theme::Marker)> {
        let slots: Vec<Option<usize>> = self.names.iter().map(|n| theme::method_slot(n)).collect();
        let used: Vec<usize> = slots.iter().flatten().copied().collect();
        if used.len() < 2 {
            return None;
        }
        let marker = |i: usize| theme::MARKERS[i % theme::MARKERS.len()];
        let before = |like: Option<usize>| slots[..slot].iter().filter(|s| **s == like).count();
        let own = slots.get(slot).copied().flatten();
        Some(match own {
            Some(method) => (theme::CATEGORICAL[method], marker(method + 3 * before(own))),
            None => {
                let free: Vec<usize> =
                    (0..theme::CATEGORICAL.len()).filter(|i| !used.contains(i)).collect();
                let nth = before(None);
                let colour = free
                    .get(nth % free.len().max(1))
                    .copied()
                    .unwrap_or(nth % theme::CATEGORICAL.len());
                (
                    theme::CATEGORICAL[colour],
                    marker(theme::MARKERS.len() - 1 - nth % theme::MARKERS.len()),
                )
            }
        })
    }
}

/// What a kind of chart tells the figure.
pub(super) trait Plot {
    fn title(&self) -> &str;
    /// Names that need a style, in order.
    fn series_names(&self) -> Vec<String>;
    /// Entries of its legend.
    fn legend(&self, styles: &Styles) -> Vec<LegendEntry>;
    /// Room needed around a plot frame of about this size, title and legend apart.
    fn insets(&self, width: f64, height: f64) -> Insets;
    /// Points of the picture that a legend inside the frame must not cover.
    fn obstacles(&self, frame: Rect) -> Vec<Point>;
    fn draw(&self, scene: &mut Scene, frame: Rect, styles: &Styles);
}

/// Ticks (positions in [0, 1]) and the label of one side.
#[derive(Debug, Clone, Default)]
pub(super) struct Side {
    pub label: String,
    pub ticks: Vec<(f64, String)>,
    pub minor: Vec<f64>,
    /// Grid lines at the ticks.
    pub grid: bool,
    /// The ticks name categories: all texts are kept, wrapped or turned to fit.
    pub categories: bool,
}

const TICK: f64 = 5.0;
const GAP: f64 = 7.0;

/// How the texts under the horizontal axis are set.
enum BottomTexts {
    /// Each category on some lines.
    Wrapped(Vec<Vec<String>>),
    /// Every `stride`-th text on one line.
    Strided(usize),
    /// Bottom to top.
    Upright,
}

fn bottom_texts(side: &Side, width: f64) -> BottomTexts {
    let measure = |t: &str| text_width(t, SMALL, false);
    if side.categories {
        let slot = width / side.ticks.len().max(1) as f64 - 8.0;
        let wrapped: Vec<Vec<String>> =
            side.ticks.iter().map(|(_, t)| wrap(t, SMALL, false, slot)).collect();
        let fits = wrapped
            .iter()
            .all(|lines| lines.len() <= 3 && lines.iter().all(|l| measure(l) <= slot));
        return if fits { BottomTexts::Wrapped(wrapped) } else { BottomTexts::Upright };
    }
    let clear = |stride: usize| {
        let mut end = f64::NEG_INFINITY;
        side.ticks.iter().step_by(stride).all(|(f, t)| {
            let (start, half) = (f * width - measure(t) / 2.0, measure(t) / 2.0);
            let free = start > end + 8.0;
            end = f * width + half;
            free
        })
    };
    BottomTexts::Strided(
        (1..side.ticks.len().max(2)).find(|s| clear(*s)).unwrap_or(side.ticks.len().max(1)),
    )
}

impl Side {
    /// Room on the left of the frame for a vertical axis.
    pub fn left_room(&self, height: f64) -> f64 {
        let ticks = self.ticks.iter().map(|(_, t)| text_width(t, SMALL, false)).fold(0.0, f64::max);
        let label = wrap(&self.label, LABEL, false, height).len() as f64 * LABEL * LINE_HEIGHT;
        ticks + TICK + GAP + label
    }

    /// Room under the frame for a horizontal axis.
    pub fn bottom_room(&self, width: f64) -> f64 {
        let ticks = match bottom_texts(self, width) {
            BottomTexts::Wrapped(texts) => {
                texts.iter().map(Vec::len).max().unwrap_or(0) as f64 * SMALL * LINE_HEIGHT
            }
            BottomTexts::Strided(_) => SMALL * LINE_HEIGHT,
            BottomTexts::Upright => {
                self.ticks.iter().map(|(_, t)| text_width(t, SMALL, false)).fold(0.0, f64::max)
            }
        };
        let label = wrap(&self.label, LABEL, false, width).len() as f64 * LABEL * LINE_HEIGHT;
        ticks + TICK + GAP + label
    }

    /// Room right of the frame for the half of a last horizontal tick text that stands out.
    pub fn overhang(&self, width: f64) -> f64 {
        let out = |(f, t): &(f64, String)| text_width(t, SMALL, false) / 2.0 - (1.0 - f) * width;
        if self.categories { 0.0 } else { self.ticks.iter().map(out).fold(0.0, f64::max) }
    }
}

/// Grid and, over a plot's background, ticks and texts of both sides.
pub(super) fn draw_axes(scene: &mut Scene, frame: Rect, x: &Side, y: &Side) {
    if x.grid {
        for (f, _) in &x.ticks {
            let at = frame.x0 + f * frame.width();
            scene.line(&[(at, frame.y0), (at, frame.y1)], theme::GRID, 1.0, &[]);
        }
    }
    if y.grid {
        for (f, _) in &y.ticks {
            let at = frame.y1 - f * frame.height();
            scene.line(&[(frame.x0, at), (frame.x1, at)], theme::GRID, 1.0, &[]);
        }
    }
    draw_bottom(scene, frame, x);
    draw_left(scene, frame, y);
}

fn draw_bottom(scene: &mut Scene, frame: Rect, side: &Side) {
    let place = |f: f64| frame.x0 + f * frame.width();
    let mut tick = |f: f64, length: f64| {
        scene.line(&[(place(f), frame.y1), (place(f), frame.y1 + length)], theme::INK, 1.2, &[]);
    };
    if !side.categories {
        side.ticks.iter().for_each(|(f, _)| tick(*f, TICK));
        side.minor.iter().for_each(|f| tick(*f, TICK * 0.55));
    }
    let top = frame.y1 + TICK + 2.0;
    let like = Text::new((0.0, 0.0), "", SMALL, Align::Centre);
    match bottom_texts(side, frame.width()) {
        BottomTexts::Wrapped(texts) => {
            for ((f, _), lines) in side.ticks.iter().zip(&texts) {
                scene.lines_of_text(lines, place(*f), top, &like);
            }
        }
        BottomTexts::Strided(stride) => {
            for (f, text) in side.ticks.iter().step_by(stride) {
                scene.lines_of_text(std::slice::from_ref(text), place(*f), top, &like);
            }
        }
        BottomTexts::Upright => {
            for (f, text) in &side.ticks {
                scene.text(Text::new((place(*f), top), text, SMALL, Align::Right).upright());
            }
        }
    }
    let lines = wrap(&side.label, LABEL, false, frame.width());
    let label_top =
        frame.y1 + side.bottom_room(frame.width()) - lines.len() as f64 * LABEL * LINE_HEIGHT;
    let like = Text::new((0.0, 0.0), "", LABEL, Align::Centre);
    scene.lines_of_text(&lines, (frame.x0 + frame.x1) / 2.0, label_top, &like);
}

fn draw_left(scene: &mut Scene, frame: Rect, side: &Side) {
    let place = |f: f64| frame.y1 - f * frame.height();
    let mut tick = |f: f64, length: f64| {
        scene.line(&[(frame.x0 - length, place(f)), (frame.x0, place(f))], theme::INK, 1.2, &[]);
    };
    if !side.categories {
        side.ticks.iter().for_each(|(f, _)| tick(*f, TICK));
        side.minor.iter().for_each(|f| tick(*f, TICK * 0.55));
    }
    let mut lowest_free = f64::INFINITY;
    for (f, text) in &side.ticks {
        // Ticks rise: a text that would touch the one below it is left out.
        if side.categories || place(*f) + SMALL / 2.0 < lowest_free {
            scene.text(Text::new((frame.x0 - TICK - 3.0, place(*f)), text, SMALL, Align::Right));
            lowest_free = place(*f) - SMALL / 2.0 - 2.0;
        }
    }
    let lines = wrap(&side.label, LABEL, false, frame.height());
    let left = frame.x0 - side.left_room(frame.height());
    for (i, line) in lines.iter().enumerate() {
        let at = (left + (i as f64 + 0.5) * LABEL * LINE_HEIGHT, (frame.y0 + frame.y1) / 2.0);
        scene.text(Text::new(at, line, LABEL, Align::Centre).upright());
    }
}

/// A frame's outline, drawn after the data.
pub(super) fn draw_outline(scene: &mut Scene, frame: Rect) {
    scene.outline(frame, theme::INK, 1.2);
}

/// "no data" in the middle of a frame.
pub(super) fn draw_no_data(scene: &mut Scene, frame: Rect) {
    let middle = ((frame.x0 + frame.x1) / 2.0, (frame.y0 + frame.y1) / 2.0);
    scene.text(Text::new(middle, "no data", LABEL, Align::Centre).colour(theme::MUTED));
}
