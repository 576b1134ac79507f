//! Legends: rows above panels, or a box in a free place of a frame.

use super::geometry::{Point, Rect};
use super::line_chart::LineStyle;
use super::scene::{Align, Scene, Text, text_width};
use super::theme::{self, LINE_HEIGHT, MARKER_RADIUS, Marker, SERIES_WIDTH, SMALL};
use plotters::style::RGBColor;

/// One name and the key that stands for it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LegendEntry {
    pub name: String,
    pub colour: RGBColor,
    pub line: LineStyle,
    pub marker: Option<Marker>,
    /// A filled square, for bars.
    pub swatch: bool,
}

const KEY: f64 = 34.0;
const KEY_GAP: f64 = 7.0;
const ENTRY_GAP: f64 = 22.0;
const PADDING: f64 = 7.0;
const ROW: f64 = SMALL * LINE_HEIGHT + 2.0;

fn entry_width(entry: &LegendEntry) -> f64 {
    KEY + KEY_GAP + text_width(&entry.name, SMALL, false)
}

/// Entries in rows that fit `width`.
fn rows(entries: &[LegendEntry], width: f64) -> Vec<&[LegendEntry]> {
    let mut rows = Vec::new();
    let (mut start, mut used) = (0, 0.0);
    for (i, entry) in entries.iter().enumerate() {
        let wide = entry_width(entry);
        if i > start && used + ENTRY_GAP + wide > width {
            rows.push(&entries[start..i]);
            (start, used) = (i, wide);
        } else {
            used += wide + if i > start { ENTRY_GAP } else { 0.0 };
        }
    }
    if start < entries.len() {
        rows.push(&entries[start..]);
    }
    rows
}

/// Height of the legend as rows of at most `width`.
pub(super) fn rows_height(entries: &[LegendEntry], width: f64) -> f64 {
    let n = rows(entries, width).len() as f64;
    if n == 0.0 { 0.0 } else { n * ROW + 6.0 }
}

/// Draws rows centred over [x0, x1] from `top`.
pub(super) fn draw_rows(scene: &mut Scene, entries: &[LegendEntry], x0: f64, x1: f64, top: f64) {
    for (r, row) in rows(entries, x1 - x0).into_iter().enumerate() {
        let total = row.iter().map(entry_width).sum::<f64>() + ENTRY_GAP * (row.len() - 1) as f64;
        let mut x = (x0 + x1 - total) / 2.0;
        for entry in row {
            draw_entry(scene, entry, (x, top + (r as f64 + 0.5) * ROW));
            x += entry_width(entry) + ENTRY_GAP;
        }
    }
}

/// A place for the legend in the frame that covers no obstacle, corners first.
pub(super) fn free_box(entries: &[LegendEntry], frame: Rect, obstacles: &[Point]) -> Option<Rect> {
    let width = entries.iter().map(entry_width).fold(0.0, f64::max) + 2.0 * PADDING;
    let height = entries.len() as f64 * ROW + 2.0 * PADDING - 4.0;
    let inner = frame.grown(-9.0);
    if width > 0.6 * frame.width() || height > 0.6 * frame.height() {
        return None;
    }
    let columns = [inner.x1 - width, inner.x0, (inner.x0 + inner.x1 - width) / 2.0];
    let tops = [inner.y0, inner.y1 - height, (inner.y0 + inner.y1 - height) / 2.0];
    let places = tops.iter().flat_map(|y0| columns.iter().map(move |x0| (*x0, *y0)));
    let boxes = places.map(|(x0, y0)| Rect { x0, y0, x1: x0 + width, y1: y0 + height });
    boxes.into_iter().find(|b| !obstacles.iter().any(|p| b.grown(8.0).holds(*p)))
}

/// Draws the legend as a column on white.
pub(super) fn draw_box(scene: &mut Scene, entries: &[LegendEntry], place: Rect) {
    scene.fill(place, theme::PAPER);
    scene.outline(place, theme::GRID, 1.0);
    for (i, entry) in entries.iter().enumerate() {
        draw_entry(
            scene,
            entry,
            (place.x0 + PADDING, place.y0 + PADDING - 2.0 + (i as f64 + 0.5) * ROW),
        );
    }
}

fn draw_entry(scene: &mut Scene, entry: &LegendEntry, (x, y): Point) {
    if entry.swatch {
        scene.fill(Rect { x0: x + 10.0, y0: y - 6.5, x1: x + 24.0, y1: y + 6.5 }, entry.colour);
    }
    if let Some(dash) = entry.line.dash() {
        scene.line(&[(x, y), (x + KEY, y)], entry.colour, SERIES_WIDTH, dash);
    }
    if let Some(marker) = entry.marker {
        scene.marker((x + KEY / 2.0, y), marker, entry.colour, MARKER_RADIUS);
    }
    scene.text(Text::new((x + KEY + KEY_GAP, y), &entry.name, SMALL, Align::Left));
}
