//! A picture as a list of shapes in pixels, played onto plotters' SVG and bitmap backends.
//!
//! Layout is decided once, on this list, so that both files agree and tests can ask whether a text
//! leaves the picture or touches another.

use super::geometry::{Point, Rect, dashes};
use super::theme::{self, FONT_FAMILY, LINE_HEIGHT, Marker, PAPER};
use crate::error::{Error, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontFamily, FontTransform, RGBColor};
use std::path::Path;

/// SVG coordinates per pixel, so that plotters' integer coordinates keep a quarter of a pixel.
const SVG_SCALE: f64 = 4.0;
/// Bitmap samples per nominal pixel, and how many of them are averaged into one stored pixel.
const PNG_SCALE: f64 = 4.0;
const PNG_AVERAGE: usize = 2;
/// `ab_glyph` counts sizes from ascent to descent: DejaVu's are 0.928 and 0.236 em.
const BITMAP_SIZE_PER_EM: f64 = 1.164;
/// plotters writes `font-size = size / 1.24`.
const SVG_SIZE_PER_EM: f64 = 1.24;

/// Horizontal alignment of a text about its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Centre,
    Right,
}

/// One line of text; `at` is on the vertical middle of its capitals.
#[derive(Debug, Clone)]
pub(super) struct Text {
    pub at: Point,
    pub text: String,
    pub size: f64,
    pub colour: RGBColor,
    pub bold: bool,
    pub align: Align,
    /// Read from bottom to top.
    pub upright: bool,
}

impl Text {
    pub fn new(at: Point, text: impl Into<String>, size: f64, align: Align) -> Self {
        Self { at, text: text.into(), size, colour: theme::INK, bold: false, align, upright: false }
    }
    pub fn colour(mut self, colour: RGBColor) -> Self {
        self.colour = colour;
        self
    }
    pub fn bold(mut self) -> Self {
        self.bold = true;
        self
    }
    pub fn upright(mut self) -> Self {
        self.upright = true;
        self
    }
    /// The box of the glyphs.
    #[cfg(test)]
    pub fn bounds(&self) -> Rect {
        let (w, h) = (text_width(&self.text, self.size, self.bold), self.size);
        let start = match self.align {
            Align::Left => 0.0,
            Align::Centre => -w / 2.0,
            Align::Right => -w,
        };
        let (x, y) = self.at;
        match self.upright {
            false => Rect { x0: x + start, x1: x + start + w, y0: y - h / 2.0, y1: y + h / 2.0 },
            true => Rect { x0: x - h / 2.0, x1: x + h / 2.0, y0: y - start - w, y1: y - start },
        }
    }
}

#[derive(Debug, Clone)]
pub(super) enum Shape {
    Line { points: Vec<Point>, colour: RGBColor, width: f64 },
    Polygon { points: Vec<Point>, colour: RGBColor, alpha: f64 },
    Circle { at: Point, radius: f64, colour: RGBColor },
    Text(Text),
}

/// A picture of `width` x `height` pixels on white.
#[derive(Debug)]
pub(super) struct Scene {
    pub width: f64,
    pub height: f64,
    pub shapes: Vec<Shape>,
}

impl Scene {
    pub fn new(width: f64, height: f64) -> Self {
        Self { width, height, shapes: Vec::new() }
    }

    /// A polyline; `dash` holds alternating lengths of ink and gap, none for a solid line.
    pub fn line(&mut self, points: &[Point], colour: RGBColor, width: f64, dash: &[f64]) {
        let pieces = if dash.is_empty() { vec![points.to_vec()] } else { dashes(points, dash) };
        self.shapes.extend(pieces.into_iter().map(|points| Shape::Line { points, colour, width }));
    }

    pub fn fill(&mut self, rect: Rect, colour: RGBColor) {
        self.polygon(rect.corners(), colour, 1.0);
    }

    pub fn outline(&mut self, rect: Rect, colour: RGBColor, width: f64) {
        let mut points = rect.corners();
        points.push(points[0]);
        self.line(&points, colour, width, &[]);
    }

    pub fn polygon(&mut self, points: Vec<Point>, colour: RGBColor, alpha: f64) {
        self.shapes.push(Shape::Polygon { points, colour, alpha });
    }

    pub fn text(&mut self, text: Text) {
        if !text.text.is_empty() {
            self.shapes.push(Shape::Text(text));
        }
    }

    /// Lines of text under each other, the first one centred on `y + LINE_HEIGHT size / 2`.
    pub fn lines_of_text(&mut self, lines: &[String], x: f64, y: f64, like: &Text) {
        for (i, line) in lines.iter().enumerate() {
            let at = (x, y + (i as f64 + 0.5) * LINE_HEIGHT * like.size);
            self.text(Text { at, text: line.clone(), ..like.clone() });
        }
    }

    pub fn marker(&mut self, (x, y): Point, marker: Marker, colour: RGBColor, r: f64) {
        let fill = |scene: &mut Self, offsets: &[Point]| {
            scene.polygon(
                offsets.iter().map(|(dx, dy)| (x + r * dx, y + r * dy)).collect(),
                colour,
                1.0,
            );
        };
        match marker {
            Marker::Circle => self.shapes.push(Shape::Circle { at: (x, y), radius: r, colour }),
            Marker::Ring => {
                self.shapes.push(Shape::Circle { at: (x, y), radius: r, colour });
                self.shapes.push(Shape::Circle { at: (x, y), radius: r - 1.8, colour: PAPER });
            }
            Marker::Square => fill(self, &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
            Marker::Diamond => fill(self, &[(0.0, -1.3), (1.1, 0.0), (0.0, 1.3), (-1.1, 0.0)]),
            Marker::TriangleUp => fill(self, &[(0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)]),
            Marker::TriangleDown => fill(self, &[(0.0, 1.2), (1.1, -0.8), (-1.1, -0.8)]),
            Marker::Cross | Marker::Plus => {
                let arms = if marker == Marker::Cross {
                    [(0.9, 0.9), (0.9, -0.9)]
                } else {
                    [(1.15, 0.0), (0.0, 1.15)]
                };
                for (dx, dy) in arms {
                    self.line(
                        &[(x - r * dx, y - r * dy), (x + r * dx, y + r * dy)],
                        colour,
                        2.4,
                        &[],
                    );
                }
            }
        }
    }

    /// The picture as an SVG file; `path` is for the error only.
    pub fn to_svg(&self, path: &Path) -> Result<Vec<u8>> {
        let mut svg = String::new();
        let size = self.samples(SVG_SCALE);
        self.play(
            &SVGBackend::with_string(&mut svg, size).into_drawing_area(),
            SVG_SCALE,
            false,
            path,
        )?;
        // The coordinates are finer than pixels; the picture is shown at its nominal size.
        let written = format!("width=\"{}\" height=\"{}\"", size.0, size.1);
        let nominal = format!("width=\"{}\" height=\"{}\"", self.width, self.height);
        Ok(svg.replacen(&written, &nominal, 1).into_bytes())
    }

    /// The picture as a PNG file of two pixels per nominal pixel.
    pub fn to_png(&self, path: &Path) -> Result<Vec<u8>> {
        let (w, h) = self.samples(PNG_SCALE);
        let mut samples = vec![255u8; w as usize * h as usize * 3];
        self.play(
            &BitMapBackend::with_buffer(&mut samples, (w, h)).into_drawing_area(),
            PNG_SCALE,
            true,
            path,
        )?;
        let (w, h, n) = (w as usize, h as usize, PNG_AVERAGE);
        let mut pixels = Vec::with_capacity(w * h * 3 / (n * n));
        for y in 0..h / n {
            for x in 0..w / n {
                for c in 0..3 {
                    let block = (0..n * n).map(|i| ((y * n + i / n) * w + x * n + i % n) * 3 + c);
                    let sum: u32 = block.map(|i| u32::from(samples[i])).sum();
                    pixels.push((sum / (n * n) as u32) as u8);
                }
            }
        }
        let failed =
            |e: png::EncodingError| Error::Draw { path: path.into(), reason: e.to_string() };
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, (w / n) as u32, (h / n) as u32);
        // Flat colours compress best without prediction.
        encoder.set_compression(png::Compression::Best);
        encoder.set_filter(png::FilterType::NoFilter);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }

    fn samples(&self, scale: f64) -> (u32, u32) {
        ((self.width * scale) as u32, (self.height * scale) as u32)
    }

    fn play<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, plotters::coord::Shift>,
        scale: f64,
        bitmap: bool,
        path: &Path,
    ) -> Result<()> {
        let failed = |reason: String| Error::Draw { path: path.into(), reason };
        if !theme::fonts_ready() {
            return Err(failed("the DejaVu font does not load".into()));
        }
        area.fill(&PAPER).map_err(|e| failed(e.to_string()))?;
        for shape in &self.shapes {
            play_shape(area, shape, scale, bitmap).map_err(|e| failed(e.to_string()))?;
        }
        area.present().map_err(|e| failed(e.to_string()))
    }
}

type Played<B> = std::result::Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

fn play_shape<B: DrawingBackend>(
    area: &DrawingArea<B, plotters::coord::Shift>,
    shape: &Shape,
    scale: f64,
    bitmap: bool,
) -> Played<B> {
    let place = |p: &Point| ((p.0 * scale).round() as i32, (p.1 * scale).round() as i32);
    match shape {
        Shape::Line { points, colour, width } => {
            let mut path: Vec<(i32, i32)> = points.iter().map(place).collect();
            path.dedup();
            let width = (width * scale).round().max(1.0);
            let style =
                ShapeStyle { color: colour.to_rgba(), filled: false, stroke_width: width as u32 };
            if !bitmap {
                return area.draw(&PathElement::new(path, style));
            }
            // plotters' bitmap joints spike at sharp turns: segments and round joints instead.
            for pair in path.windows(2) {
                area.draw(&PathElement::new(pair.to_vec(), style))?;
            }
            for joint in path.iter().skip(1).take(path.len().saturating_sub(2)) {
                area.draw(&plotters::element::Circle::new(
                    *joint,
                    (width / 2.0) as i32,
                    colour.filled(),
                ))?;
            }
            Ok(())
        }
        Shape::Polygon { points, colour, alpha } => area.draw(&Polygon::new(
            points.iter().map(place).collect::<Vec<_>>(),
            colour.mix(*alpha).filled(),
        )),
        Shape::Circle { at, radius, colour } => area.draw(&plotters::element::Circle::new(
            place(at),
            (radius * scale).round() as i32,
            colour.filled(),
        )),
        Shape::Text(text) => {
            // Both put the baseline 0.35 em under `at`: plotters' centred baselines lie 0.113 em
            // (bitmap) and half an x-height, 0.27 em (SVG), under the position they are given.
            let (size_per_em, drop) =
                if bitmap { (BITMAP_SIZE_PER_EM, 0.237) } else { (SVG_SIZE_PER_EM, 0.08) };
            let drop = drop * text.size;
            let at = if text.upright {
                (text.at.0 + drop, text.at.1)
            } else {
                (text.at.0, text.at.1 + drop)
            };
            let horizontal = match text.align {
                Align::Left => HPos::Left,
                Align::Centre => HPos::Center,
                Align::Right => HPos::Right,
            };
            let turn = if text.upright { FontTransform::Rotate270 } else { FontTransform::None };
            let font = font(text.size * scale * size_per_em, text.bold).transform(turn);
            let style =
                TextStyle::from(font).color(&text.colour).pos(Pos::new(horizontal, VPos::Center));
            area.draw(&plotters::element::Text::new(text.text.as_str(), place(&at), style))
        }
    }
}

fn font(size: f64, bold: bool) -> FontDesc<'static> {
    let weight = if bold { FontStyle::Bold } else { FontStyle::Normal };
    FontDesc::new(FontFamily::Name(FONT_FAMILY), size, weight)
}

/// Width in pixels of a line of text of `size` pixels per em.
pub(super) fn text_width(text: &str, size: f64, bold: bool) -> f64 {
    // Measured ten times larger, because plotters rounds to whole pixels.
    let fine = if theme::fonts_ready() {
        font(10.0 * size * BITMAP_SIZE_PER_EM, bold).layout_box(text).ok()
    } else {
        None
    };
    fine.map_or(0.65 * size * text.chars().count() as f64, |((x0, _), (x1, _))| {
        f64::from(x1 - x0) / 10.0
    })
}

/// Breaks a text at spaces so that lines fit `width` where words allow; keeps its line breaks.
pub(super) fn wrap(text: &str, size: f64, bold: bool, width: f64) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            let longer = if line.is_empty() { word.to_string() } else { format!("{line} {word}") };
            if !line.is_empty() && text_width(&longer, size, bold) > width {
                lines.push(std::mem::replace(&mut line, word.to_string()));
            } else {
                line = longer;
            }
        }
        if !line.is_empty() {
            lines.push(line);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_keeps_words_and_fits() {
        let text = "relative error of the gradient (Frobenius norm)";
        let lines = wrap(text, 15.0, false, 160.0);
        assert!(lines.len() > 1);
        assert_eq!(lines.join(" "), text);
        assert!(lines.iter().all(|l| text_width(l, 15.0, false) <= 160.0), "{lines:?}");
    }

    #[test]
    fn upright_text_bounds_turn() {
        let flat = Text::new((50.0, 60.0), "label", 15.0, Align::Left).bounds();
        let tall = Text::new((50.0, 60.0), "label", 15.0, Align::Left).upright().bounds();
        assert!((flat.width() - tall.height()).abs() < 1e-9);
        assert!((tall.y1 - 60.0).abs() < 1e-9 && tall.y0 < 60.0);
    }
}
