//! Axes: scale, range and readable ticks.

/// How values are laid along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Equal steps.
    #[default]
    Linear,
    /// Equal factors, ticks at powers of ten.
    Log10,
    /// Equal factors, ticks at powers of two (sequence lengths, ranks).
    Log2,
}

impl Scale {
    /// The value in the units in which the axis is even; zero on a logarithmic scale is minus
    /// infinity, a negative number is NaN.
    pub(super) fn forward(self, x: f64) -> f64 {
        match self {
            Scale::Linear => x,
            Scale::Log10 => x.log10(),
            Scale::Log2 => x.log2(),
        }
    }

    fn backward(self, u: f64) -> f64 {
        match self {
            Scale::Linear => u,
            Scale::Log10 => 10f64.powf(u),
            Scale::Log2 => u.exp2(),
        }
    }
}

/// One axis of a chart.
///
/// ```
/// use peft_limits::report::Axis;
/// let x = Axis::log2("sequence length L (tokens)");
/// let y = Axis::log10("relative error").range(1e-12, 1.0);
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Axis {
    /// What is measured, with its unit.
    pub label: String,
    /// Scale.
    pub scale: Scale,
    /// Ends; computed from the data when absent or unusable (reversed, not finite, not positive on
    /// a logarithmic scale).
    pub range: Option<(f64, f64)>,
    /// Tick values and texts; computed when absent.
    pub ticks: Option<Vec<(f64, String)>>,
}

impl Axis {
    /// A linear axis.
    pub fn linear(label: impl Into<String>) -> Self {
        Self { label: label.into(), ..Self::default() }
    }

    /// A logarithmic axis with ticks at powers of ten.
    pub fn log10(label: impl Into<String>) -> Self {
        Self { scale: Scale::Log10, ..Self::linear(label) }
    }

    /// A logarithmic axis with ticks at powers of two.
    pub fn log2(label: impl Into<String>) -> Self {
        Self { scale: Scale::Log2, ..Self::linear(label) }
    }

    /// Fixes the ends; points beyond are drawn as arrows at the border.
    pub fn range(mut self, low: f64, high: f64) -> Self {
        self.range = Some((low, high));
        self
    }

    /// Fixes the ticks.
    pub fn ticks<S: Into<String>>(mut self, ticks: impl IntoIterator<Item = (f64, S)>) -> Self {
        self.ticks = Some(ticks.into_iter().map(|(at, text)| (at, text.into())).collect());
        self
    }

    /// The extent of the usable values in scale units, without margin.
    pub(super) fn extent(&self, values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
        let usable = values.map(|v| self.scale.forward(v)).filter(|u| u.is_finite());
        usable.fold(None, |range, u| {
            Some(range.map_or((u, u), |(lo, hi): (f64, f64)| (lo.min(u), hi.max(u))))
        })
    }

    /// The mapping to [0, 1] for data of this extent.
    pub(super) fn mapping(&self, extent: Option<(f64, f64)>, margin: f64) -> Mapping {
        let fixed = self.range.map(|(a, b)| (self.scale.forward(a), self.scale.forward(b)));
        let (low, high) = match fixed {
            Some((a, b)) if a.is_finite() && b.is_finite() && a < b => (a, b),
            _ => match extent {
                Some((lo, hi)) if hi - lo > 1e-12 * lo.abs().max(hi.abs()) => {
                    (lo - margin * (hi - lo), hi + margin * (hi - lo))
                }
                Some((lo, _)) if self.scale == Scale::Linear => {
                    let half = if lo == 0.0 { 1.0 } else { 0.5 * lo.abs() };
                    (lo - half, lo + half)
                }
                Some((lo, _)) => (lo - 1.0, lo + 1.0),
                None => (0.0, 1.0),
            },
        };
        Mapping { scale: self.scale, low, high }
    }

    /// Ticks inside the mapping, about `count` of them, and unlabelled minor ticks; in [0, 1].
    pub(super) fn tick_marks(
        &self,
        mapping: &Mapping,
        count: usize,
    ) -> (Vec<(f64, String)>, Vec<f64>) {
        let inside = |f: f64| (-1e-9..=1.0 + 1e-9).contains(&f);
        if let Some(ticks) = &self.ticks {
            let placed = ticks.iter().map(|(v, text)| (mapping.fraction(*v), text.clone()));
            return (placed.filter(|(f, _)| inside(*f)).collect(), Vec::new());
        }
        let (values, minor) = match self.scale {
            Scale::Linear => (linear_ticks(mapping.low, mapping.high, count), Vec::new()),
            Scale::Log10 => log10_ticks(mapping.low, mapping.high, count),
            Scale::Log2 => (log2_ticks(mapping.low, mapping.high, count), Vec::new()),
        };
        let placed = values.into_iter().map(|(v, text)| (mapping.fraction(v), text));
        let minor = minor.into_iter().map(|v| mapping.fraction(v));
        (placed.filter(|(f, _)| inside(*f)).collect(), minor.filter(|f| inside(*f)).collect())
    }
}

/// Values to [0, 1] along an axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Mapping {
    pub scale: Scale,
    /// Ends in scale units, `low < high`.
    pub low: f64,
    pub high: f64,
}

impl Mapping {
    /// Position of a value, 0 at the low end and 1 at the high end; infinite or NaN like the value.
    pub fn fraction(&self, value: f64) -> f64 {
        (self.scale.forward(value) - self.low) / (self.high - self.low)
    }

    /// The ends in data units.
    pub fn ends(&self) -> (f64, f64) {
        (self.scale.backward(self.low), self.scale.backward(self.high))
    }
}

fn nice_step(span: f64, count: usize) -> f64 {
    let rough = span / count.max(1) as f64;
    let decade = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|m| m * decade)
        .find(|s| *s >= rough * (1.0 - 1e-9))
        .unwrap_or(rough)
}

fn linear_ticks(low: f64, high: f64, count: usize) -> Vec<(f64, String)> {
    let step = nice_step(high - low, count);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    let largest = (first.unsigned_abs().max(last.unsigned_abs()) as f64) * step;
    let text = |v: f64| {
        if v == 0.0 {
            return "0".to_string();
        }
        let exponent = largest.log10().floor() as i32;
        let plain = (-3..5).contains(&exponent);
        let unit = if plain { 0 } else { exponent };
        let decimals = (unit - (step * 1.0001).log10().floor() as i32).clamp(0, 12) as usize;
        let mantissa = minus(&format!("{:.decimals$}", v / 10f64.powi(unit)));
        if plain { mantissa } else { format!("{mantissa}×{}", power("10", unit)) }
    };
    (first..=last).map(|i| i as f64 * step).map(|v| (v, text(v))).collect()
}

/// Labelled ticks and the unlabelled ones between decades.
fn log10_ticks(low: f64, high: f64, count: usize) -> (Vec<(f64, String)>, Vec<f64>) {
    let (first, last) = ((low - 1e-9).ceil() as i32, (high + 1e-9).floor() as i32);
    let decades = last - first + 1;
    let within = |v: &f64| (low - 1e-9..=high + 1e-9).contains(&v.log10());
    let multiples = |ms: &[i32]| -> Vec<f64> {
        (first - 1..=last)
            .flat_map(|k| ms.iter().map(move |m| f64::from(*m) * 10f64.powi(k)))
            .filter(within)
            .collect()
    };
    if decades >= 3 {
        let step = (decades as usize).div_ceil(count.max(2)).max(1);
        let labelled = (first..=last).filter(|k| k.rem_euclid(step as i32) == 0);
        let labels = labelled.map(|k| (10f64.powi(k), power("10", k))).collect();
        let minor = match (step, decades) {
            (1, ..=7) => multiples(&[2, 3, 4, 5, 6, 7, 8, 9]),
            (1, _) => Vec::new(),
            _ => (first..=last).map(|k| 10f64.powi(k)).collect(),
        };
        return (labels, minor);
    }
    let dense = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    let choices: [&[i32]; 4] = [&[1], &[1, 3], &[1, 2, 5], &[1, 2, 3, 4, 6, 8]];
    let fits = |ms: &&[i32]| (3..=count.max(4)).contains(&multiples(ms).len());
    match choices.iter().rev().copied().find(fits) {
        Some(ms) => {
            (multiples(ms).into_iter().map(|v| (v, plain_or_power(v))).collect(), multiples(&dense))
        }
        None => {
            // Less than about half a decade: even steps read better than powers.
            let even = linear_ticks(10f64.powf(low), 10f64.powf(high), count.min(4));
            (even.into_iter().filter(|(v, _)| *v > 0.0).collect(), Vec::new())
        }
    }
}

fn log2_ticks(low: f64, high: f64, count: usize) -> Vec<(f64, String)> {
    let (first, last) = ((low - 1e-9).ceil() as i32, (high + 1e-9).floor() as i32);
    if last - first < 1 {
        let even =
            linear_ticks(Scale::Log2.backward(low), Scale::Log2.backward(high), count.min(4));
        return even.into_iter().filter(|(v, _)| *v > 0.0).collect();
    }
    let step = ((last - first + 1) as usize).div_ceil(count.max(2)).max(1) as i32;
    let text = |k: i32| {
        if (-3..=16).contains(&k) { format!("{}", f64::from(k).exp2()) } else { power("2", k) }
    };
    (first..=last)
        .filter(|k| (k - first) % step == 0)
        .map(|k| (f64::from(k).exp2(), text(k)))
        .collect()
}

fn plain_or_power(v: f64) -> String {
    let exponent = (v * 1.000001).log10().floor() as i32;
    if (-3..5).contains(&exponent) {
        return format!("{:.*}", (-exponent).max(0) as usize, v);
    }
    let mantissa = (v / 10f64.powi(exponent)).round() as i64;
    if mantissa == 1 {
        power("10", exponent)
    } else {
        format!("{mantissa}×{}", power("10", exponent))
    }
}

/// `base` with a superscript exponent.
pub(super) fn power(base: &str, exponent: i32) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    let raised = exponent
        .to_string()
        .chars()
        .map(|c| c.to_digit(10).map_or('⁻', |d| DIGITS[d as usize]))
        .collect::<String>();
    format!("{base}{raised}")
}

/// A number's text with a typographic minus.
fn minus(text: &str) -> String {
    text.replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: &Axis, values: &[f64], count: usize) -> Vec<String> {
        let mapping = axis.mapping(axis.extent(values.iter().copied()), 0.0);
        axis.tick_marks(&mapping, count).0.into_iter().map(|(_, t)| t).collect()
    }

    #[test]
    fn ticks_read_well() {
        assert_eq!(
            texts(&Axis::linear(""), &[0.0, 1.0], 5),
            ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]
        );
        assert_eq!(texts(&Axis::linear(""), &[-1.0, 1.0], 4), ["−1.0", "−0.5", "0", "0.5", "1.0"]);
        assert_eq!(texts(&Axis::linear(""), &[0.0, 3e7], 3), ["0", "1×10⁷", "2×10⁷", "3×10⁷"]);
        assert_eq!(
            texts(&Axis::log10(""), &[1e-12, 1.0], 5),
            ["10⁻¹²", "10⁻⁹", "10⁻⁶", "10⁻³", "10⁰"]
        );
        assert_eq!(texts(&Axis::log10(""), &[1.0, 20.0], 6), ["1", "2", "5", "10", "20"]);
        assert_eq!(texts(&Axis::log2(""), &[128.0, 1024.0], 6), ["128", "256", "512", "1024"]);
        assert_eq!(texts(&Axis::log2(""), &[65536.0, 262144.0], 6), ["65536", "2¹⁷", "2¹⁸"]);
        assert_eq!(texts(&Axis::log10(""), &[2.1, 2.4], 4), ["2.1", "2.2", "2.3", "2.4"]);
    }

    #[test]
    fn unusable_data_and_ranges_still_give_an_axis() {
        let axis = Axis::log10("").range(-1.0, 5.0);
        for values in [vec![], vec![f64::NAN, f64::INFINITY, 0.0, -3.0], vec![7.0]] {
            let mapping = axis.mapping(axis.extent(values.iter().copied()), 0.05);
            assert!(
                mapping.low < mapping.high && mapping.low.is_finite() && mapping.high.is_finite()
            );
            assert!(axis.tick_marks(&mapping, 5).0.len() >= 2, "{values:?}");
        }
    }
}
