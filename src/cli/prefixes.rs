//! `peft-limits probe --plot`: how the cost of a gradient grows over the beginnings of one's own
//! head.

use super::output::check_file;
use crate::attention::AttentionProblem;
use crate::error::{Error, Result};
use crate::limits::exponent::Exponent;
use crate::limits::prefixes::{PrefixCost, Way, exponent_of, prefix_costs};
use crate::report::{Axis, Cell, Figure, LineChart, LineStyle, Row, Series, Table};
use serde_json::{Value, json};
use std::path::Path;

/// Relative errors of the gradient that are to be reached.
const TARGETS: [f64; 2] = [0.1, 0.01];

const WAYS: [(Way, &str); 3] = [
    (Way::Exact, "exact (streaming)"),
    (Way::Runnable, "cheapest of fitted and nystrom"),
    (Way::Oracle, "truncated SVD (SVD not counted)"),
];

/// Refuses a file that cannot be drawn to.
pub(super) fn check(path: &Path, input: &Path) -> Result<()> {
    if !path.extension().is_some_and(|end| end == "svg" || end == "png") {
        return Err(Error::invalid("--plot", path.display(), "must end in .svg or .png"));
    }
    check_file("--plot", path, &[input])
}

/// Costs and the exponents fitted to them.
pub(super) struct Growth {
    costs: Vec<PrefixCost>,
    /// (target, way, its name, exponent, points that took the exact gradient)
    fits: Vec<(f64, Way, &'static str, Exponent, usize)>,
}

impl Growth {
    pub fn measure(problem: &AttentionProblem<f64>) -> Result<Self> {
        let costs = prefix_costs(problem, &TARGETS)?;
        let mut fits = Vec::new();
        for eps in TARGETS {
            for (way, name) in WAYS {
                // Prefixes that are too long to decompose leave the oracle with too few points for
                // a slope.
                if let Ok((fit, exact)) = exponent_of(&costs, way, eps) {
                    fits.push((eps, way, name, fit, exact));
                }
            }
        }
        Ok(Self { costs, fits })
    }

    fn points(&self, way: Way, eps: f64) -> impl Iterator<Item = &PrefixCost> {
        self.costs.iter().filter(move |c| c.way == way && c.eps.to_bits() == eps.to_bits())
    }

    /// One line for each target and way.
    pub fn table(&self) -> Table {
        let mut table = Table::default();
        for (eps, way, name, fit, exact) in &self.fits {
            let last = self.points(*way, *eps).last();
            let method =
                last.and_then(|c| c.method.clone()).unwrap_or_else(|| "the exact gradient".into());
            table.push(
                &Row::new()
                    .with("gradient error", *eps)
                    .with("over prefixes L/16 to L", *name)
                    .with(
                        "cost exponent",
                        format!("{:.2} [{:.2}, {:.2}]", fit.slope, fit.low, fit.high),
                    )
                    .with("flops at L", last.map_or(Cell::Missing, |c| Cell::Float(c.flops)))
                    .with("by", method)
                    .with("points as dear as exact", format!("{exact} of {}", fit.points)),
            );
        }
        table
    }

    pub fn draw(&self, input: &Path, path: &Path) -> Result<()> {
        let panels = TARGETS.map(|eps| {
            let fits = self.fits.iter().filter(|f| f.0.to_bits() == eps.to_bits());
            let mut slopes: Vec<String> = fits
                .clone()
                .map(|f| format!("{:.2} ± {:.2}", f.3.slope, f.3.high - f.3.slope))
                .collect();
            let mut series: Vec<Series> = fits
                .map(|(_, way, name, ..)| {
                    Series::new(*name, self.points(*way, eps).map(|c| (c.tokens as f64, c.flops)))
                })
                .collect();
            // On top and dashed: where nothing is cheaper both lines are seen.
            if let Some(exact) = series.first_mut() {
                (exact.line, exact.markers) = (LineStyle::Dashed, false);
            }
            let first = series.len().min(1);
            series.rotate_left(first);
            slopes.rotate_left(first);
            LineChart {
                title: format!("error {eps}: slopes {}", slopes.join(", ")),
                x: Axis::log2("L (first tokens of the head)"),
                y: Axis::log10("flops to reach it"),
                series,
                ..LineChart::default()
            }
        });
        let name = input.file_stem().unwrap_or_default().to_string_lossy();
        let mut figure = Figure::new(
            format!(
                "Cost of the gradient over the beginnings of \
                                              {name}"
            ),
            panels,
        )
        .caption(
            "Slopes of log cost against log L with 95% intervals, in the order of the legend. \
             Costs are capped at the exact gradient's; products with inputs and weights, which are \
             linear in L, are not counted.",
        );
        figure.share_y = true;
        figure.panel_size.0 = 700.0;
        figure.write_to(path)
    }

    pub fn to_json(&self) -> Value {
        let fits: Vec<Value> = self
            .fits
            .iter()
            .map(|(eps, way, name, fit, exact)| {
                let points: Vec<Value> = self
                    .points(*way, *eps)
                    .map(|c| json!({ "tokens": c.tokens, "flops": c.flops, "features": c.method }))
                    .collect();
                json!({
                    "gradient_error": eps, "way": name, "exponent": fit.slope, "interval": [fit.low, fit.high],
                    "points_as_dear_as_exact": exact, "points": points,
                })
            })
            .collect();
        json!(fits)
    }
}
