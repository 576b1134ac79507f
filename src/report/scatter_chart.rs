//! Scattered points of two costs or qualities, with the frontier of the best trade-offs.

use super::axis::Axis;
use super::line_chart::{LineChart, LineStyle, PlotPoint, Reference, Series};

/// Points of one group.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScatterGroup {
    /// Name in the legend.
    pub name: String,
    /// (x, y); NaN is left out.
    pub points: Vec<(f64, f64)>,
}

/// Which trade-offs the frontier joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// Small x and small y are good (cost against error).
    MinimiseBoth,
    /// Small x and large y are good (cost against accuracy).
    MinimiseXMaximiseY,
}

/// A chart of points.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScatterChart {
    /// Title of the panel.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// Groups.
    pub groups: Vec<ScatterGroup>,
    /// Draws the Pareto front over all groups as a step line.
    pub front: Option<Front>,
    /// Reference lines.
    pub references: Vec<Reference>,
}

impl ScatterChart {
    /// The points on the front, by rising x: those no other point equals or betters in both
    /// coordinates (the first of equal points).
    pub fn pareto_front(&self, front: Front) -> Vec<(f64, f64)> {
        let good = |y: f64| if front == Front::MinimiseBoth { y } else { -y };
        let usable = |(x, y): &(f64, f64)| {
            self.x.scale.forward(*x).is_finite() && self.y.scale.forward(*y).is_finite()
        };
        let mut points: Vec<(f64, f64)> =
            self.groups.iter().flat_map(|g| g.points.iter().copied()).filter(usable).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0).then(good(a.1).total_cmp(&good(b.1))));
        let mut best = f64::INFINITY;
        points.retain(|(_, y)| {
            let better = good(*y) < best;
            best = best.min(good(*y));
            better
        });
        points
    }

    /// The same picture as a chart of lines, which draws it.
    pub(super) fn as_lines(&self) -> LineChart {
        let group = |g: &ScatterGroup| Series {
            name: g.name.clone(),
            points: g.points.iter().copied().map(PlotPoint::from).collect(),
            line: LineStyle::None,
            markers: true,
            like: None,
        };
        let mut series: Vec<Series> = Vec::new();
        if let Some(front) = self.front {
            let mut steps: Vec<(f64, f64)> = Vec::new();
            for (x, y) in self.pareto_front(front) {
                // What was best so far holds until the next point's cost is reached.
                steps.extend(steps.last().map(|(_, before)| (x, *before)));
                steps.push((x, y));
            }
            if steps.len() > 1 {
                series.push(Series {
                    line: LineStyle::Dotted,
                    markers: false,
                    ..Series::new(FRONT_NAME, steps)
                });
            }
        }
        series.extend(self.groups.iter().map(group));
        LineChart {
            title: self.title.clone(),
            x: self.x.clone(),
            y: self.y.clone(),
            series,
            references: self.references.clone(),
        }
    }
}

/// The front's name in legends; it has its own colour, apart from the groups'.
pub(super) const FRONT_NAME: &str = "best trade-offs";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_holds_the_undominated_points() {
        let points = vec![
            (1.0, 9.0),
            (2.0, 9.0),
            (2.0, 5.0),
            (3.0, 6.0),
            (4.0, 1.0),
            (4.0, 1.0),
            (f64::NAN, 0.0),
        ];
        let chart = ScatterChart {
            groups: vec![ScatterGroup { name: "a".into(), points }],
            ..Default::default()
        };
        assert_eq!(chart.pareto_front(Front::MinimiseBoth), [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0)]);
        assert_eq!(chart.pareto_front(Front::MinimiseXMaximiseY), [(1.0, 9.0)]);
    }
}
