//! Colours, fonts, sizes and markers of every figure.
//!
//! Series differ by colour, marker and dash together, so that figures survive colour-blind readers
//! and black-and-white print.

use plotters::style::{FontStyle, RGBColor, register_font};
use std::sync::OnceLock;

/// Font family of every text, as SVG names it.
pub const FONT_FAMILY: &str = "DejaVu Sans, sans-serif";
/// Figure title, in pixels per em at the figure's nominal size.
pub const FIGURE_TITLE: f64 = 20.0;
/// Panel title.
pub const PANEL_TITLE: f64 = 16.5;
/// Axis labels.
pub const LABEL: f64 = 15.5;
/// Tick labels, legends, annotations and captions; no text is smaller.
pub const SMALL: f64 = 14.0;
/// Distance between baselines, as a multiple of the text size.
pub const LINE_HEIGHT: f64 = 1.3;
/// Width of a series line in pixels.
pub const SERIES_WIDTH: f64 = 2.2;
/// Radius of a marker in pixels.
pub const MARKER_RADIUS: f64 = 4.6;

/// Text and axes.
pub const INK: RGBColor = RGBColor(34, 34, 34);
/// Captions, reference lines.
pub const MUTED: RGBColor = RGBColor(96, 96, 96);
/// Grid lines.
pub const GRID: RGBColor = RGBColor(228, 228, 228);
/// Background of figures.
pub const PAPER: RGBColor = RGBColor(255, 255, 255);
/// Missing heat-map cells.
pub const ABSENT: RGBColor = RGBColor(214, 214, 214);

/// The categorical palette of Okabe and Ito (jfly.uni-koeln.de/color), without its yellow, which is
/// too light for lines on white.
pub const CATEGORICAL: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// Shapes of markers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// Filled circle.
    Circle,
    /// Filled square.
    Square,
    /// Filled triangle, point up.
    TriangleUp,
    /// Filled diamond.
    Diamond,
    /// Filled triangle, point down.
    TriangleDown,
    /// Diagonal cross.
    Cross,
    /// Upright cross.
    Plus,
    /// Open circle.
    Ring,
}

/// The markers in the order series take them.
pub const MARKERS: [Marker; 8] = [
    Marker::Circle,
    Marker::Square,
    Marker::TriangleUp,
    Marker::Diamond,
    Marker::TriangleDown,
    Marker::Cross,
    Marker::Plus,
    Marker::Ring,
];

/// Fine-tuning methods by the place of their colour in [`CATEGORICAL`]: the same in every figure.
const METHODS: [&str; 7] = ["full", "lora", "paca", "s2ft", "spft", "dora", "moslora"];

/// The place of a method's colour; of variants too, whose names begin with the method's (`qlora`,
/// `paca 2r`).
pub fn method_slot(name: &str) -> Option<usize> {
    let word: String =
        name.chars().take_while(|c| c.is_alphanumeric()).collect::<String>().to_lowercase();
    let base = if word == "qlora" || word == "qpaca" { &word[1..] } else { &word[..] };
    METHODS.iter().position(|method| *method == base)
}

/// How the colours of a figure's series are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Palette {
    /// Unordered series: [`CATEGORICAL`].
    #[default]
    Categorical,
    /// Ordered series (lengths, ranks, degrees): dark to light along [`sequential`].
    Ordered,
}

/// Colour and marker of the series in position `slot` of `count`.
pub fn series_style(palette: Palette, slot: usize, count: usize) -> (RGBColor, Marker) {
    let colour = match palette {
        Palette::Categorical => CATEGORICAL[slot % CATEGORICAL.len()],
        // The lightest tenth would vanish on white.
        Palette::Ordered => sequential(0.85 * slot as f64 / count.saturating_sub(1).max(1) as f64),
    };
    (colour, MARKERS[slot % MARKERS.len()])
}

/// A perceptually ordered map from dark blue through green to yellow; `t` in [0, 1], clamped.
///
/// Linear interpolation between nine anchors of rising lightness, close to the `viridis` map.
pub fn sequential(t: f64) -> RGBColor {
    const ANCHORS: [RGBColor; 9] = [
        RGBColor(68, 1, 84),
        RGBColor(71, 45, 123),
        RGBColor(59, 82, 139),
        RGBColor(44, 114, 142),
        RGBColor(33, 145, 140),
        RGBColor(40, 174, 128),
        RGBColor(94, 201, 98),
        RGBColor(173, 220, 48),
        RGBColor(253, 231, 37),
    ];
    interpolate(&ANCHORS, t)
}

/// A map from blue through white to orange-red around `t = 1/2`, for signed quantities.
pub fn diverging(t: f64) -> RGBColor {
    const ANCHORS: [RGBColor; 5] = [
        RGBColor(0, 84, 136),
        RGBColor(120, 178, 214),
        RGBColor(247, 247, 247),
        RGBColor(240, 160, 106),
        RGBColor(176, 66, 0),
    ];
    interpolate(&ANCHORS, t)
}

fn interpolate(anchors: &[RGBColor], t: f64) -> RGBColor {
    let t = if t.is_nan() { 0.0 } else { t.clamp(0.0, 1.0) };
    let at = t * (anchors.len() - 1) as f64;
    let low = (at.floor() as usize).min(anchors.len() - 2);
    mix(anchors[low + 1], anchors[low], at - low as f64)
}

/// `share` of `a` and the rest of `b`, per channel.
pub fn mix(a: RGBColor, b: RGBColor, share: f64) -> RGBColor {
    let channel =
        |a: u8, b: u8| (f64::from(a) * share + f64::from(b) * (1.0 - share)).round() as u8;
    RGBColor(channel(a.0, b.0), channel(a.1, b.1), channel(a.2, b.2))
}

/// Relative luminance (ITU-R BT.709 weights on sRGB values) in [0, 1]: chooses ink on a colour.
pub fn luminance(c: RGBColor) -> f64 {
    (0.2126 * f64::from(c.0) + 0.7152 * f64::from(c.1) + 0.0722 * f64::from(c.2)) / 255.0
}

/// Makes the DejaVu fonts known to the PNG renderer; returns whether they are usable.
pub(super) fn fonts_ready() -> bool {
    static READY: OnceLock<bool> = OnceLock::new();
    *READY.get_or_init(|| {
        register_font(FONT_FAMILY, FontStyle::Normal, dejavu::sans::regular()).is_ok()
            && register_font(FONT_FAMILY, FontStyle::Bold, dejavu::sans::bold()).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequential_map_gets_lighter_all_along() {
        let lightness: Vec<f64> =
            (0..=100).map(|i| luminance(sequential(f64::from(i) / 100.0))).collect();
        assert!(lightness.windows(2).all(|w| w[1] >= w[0] - 0.004), "{lightness:?}");
        assert_eq!(sequential(f64::NAN), sequential(-3.0));
    }

    #[test]
    fn the_first_56_series_all_look_different() {
        let styles: Vec<_> = (0..56).map(|i| series_style(Palette::Categorical, i, 56)).collect();
        for (i, a) in styles.iter().enumerate() {
            assert!(styles[..i].iter().all(|b| b != a), "series {i} repeats");
        }
    }

    #[test]
    fn the_fonts_load() {
        assert!(fonts_ready());
    }
}
