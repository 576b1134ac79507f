//! Tables, manifests and figures: what an experiment leaves behind.
//!
//! A figure is a grid of panels, each a plain data struct ([`LineChart`], [`ScatterChart`],
//! [`HeatMap`], [`BarChart`]); [`Figure::write`] draws it as SVG and PNG. Everything is written
//! whole or not at all.

mod axis;
mod bar_chart;
mod cell;
mod figure;
mod frame;
mod geometry;
mod heat_map;
mod legend;
mod line_chart;
pub mod machine;
pub mod manifest;
mod scatter_chart;
mod scene;
mod summary;
mod table;
pub mod theme;

pub use axis::{Axis, Scale};
pub use bar_chart::{Bar, BarChart, BarSeries};
pub use cell::{Cell, short_float};
pub use figure::{Figure, LegendPlace, NamedFigure, Panel};
pub use heat_map::{ColourScale, HeatAxis, HeatMap};
pub use line_chart::{LineChart, LineStyle, PlotPoint, Reference, Series};
pub use manifest::Manifest;
pub use scatter_chart::{Front, ScatterChart, ScatterGroup};
pub use summary::Summary;
pub use table::{Row, RowView, Table};
