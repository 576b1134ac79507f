//! Figures, findings and checks of the table.

use super::{DRIFT_SWITCHES, SERVED, SWITCHES};
use peft_limits::report::{Axis, Figure, LineChart, NamedFigure, Panel, Series, Table};
use peft_limits::{Error, Result};

fn part(table: &Table, name: &str) -> Table {
    table.filter_eq("part", name)
}

fn numbers(table: &Table, column: &str) -> Result<Vec<f64>> {
    let mut values: Vec<f64> = table.distinct(column)?.iter().filter_map(|c| c.as_f64()).collect();
    values.sort_by(f64::total_cmp);
    Ok(values)
}

/// Median and the range over seeds of a column at one x.
fn spread(table: &Table, method: &str, x: (&str, f64), column: &str) -> Result<(f64, f64, f64)> {
    let chosen = table.filter(|r| r.text("method") == method && (r.f64(x.0) - x.1).abs() < 1e-9);
    let mut v = chosen.floats(column)?;
    v.sort_by(f64::total_cmp);
    let at = |i: usize| v.get(i).copied().unwrap_or(f64::NAN);
    Ok((at(v.len() / 2), at(0), at(v.len().saturating_sub(1))))
}

fn lines(table: &Table, methods: &[&str], x: &str, column: &str) -> Result<Vec<Series>> {
    let places = numbers(table, x)?;
    methods
        .iter()
        .map(|method| {
            let points = places
                .iter()
                .map(|&at| {
                    let (median, low, high) = spread(table, method, (x, at), column)?;
                    Ok((at, median, low, high))
                })
                .collect::<Result<Vec<_>>>()?;
            Ok(Series::new(*method, points))
        })
        .collect()
}

pub(super) fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    let (switch, mixed) = (part(table, "switch"), part(table, "mixed"));
    let chart = |title: &str, x: &str, y: &str, series: Vec<Series>| LineChart {
        title: title.into(),
        x: Axis::log2(x),
        y: Axis::log10(y),
        series,
        ..Default::default()
    };
    let width = "model width";
    let switching = [
        ("Switching: time", "time (ms)", "time (ms)", &SWITCHES[..]),
        ("Switching: memory overwritten", "overwritten (bytes)", "bytes", &SWITCHES[..2]),
    ];
    let mut panels: Vec<Panel> = Vec::new();
    for (title, column, label, methods) in switching {
        panels.push(chart(title, width, label, lines(&switch, methods, "width", column)?).into());
    }
    let title = "Serving one batch of 32 sequences";
    panels.push(
        chart(
            title,
            "different adapters",
            "time (ms)",
            lines(&mixed, &SERVED, "adapters", "time (ms)")?,
        )
        .into(),
    );
    let mut figure = Figure::new(
        "Adapters after training: S2FT slices against LoRA of the same \
                                  size",
        panels,
    )
    .columns(3)
    .caption(
        "Adapters of o and down: S2FT on 1/16 of the heads and channels, LoRA of the nearest \
             rank. Old values are kept for the way back, except where LoRA is subtracted. One by \
             one: switch, run that adapter's sequences, switch again. Medians over 5 seeds with \
             their range.",
    );
    figure.share_y = false;
    Ok(vec![NamedFigure::new("adapter_serving", figure)])
}

pub(super) fn findings(table: &Table) -> Result<Vec<String>> {
    let (switch, mixed) = (part(table, "switch"), part(table, "mixed"));
    let mut lines = Vec::new();
    let widths = numbers(&switch, "width")?;
    let last = widths[widths.len() - 1];
    let at = |method: &str, column: &str| {
        Ok::<f64, Error>(spread(&switch, method, ("width", last), column)?.0)
    };
    let time =
        [0, 1, 2].map(|i| at(SWITCHES[i], "time (ms)")).into_iter().collect::<Result<Vec<_>>>()?;
    lines.push(format!(
        "Width {last}: a switch takes {:.2} ms with slices, {:.2} ms with LoRA and kept weights \
         ({:.0}x), {:.2} ms with LoRA subtracted ({:.0}x).",
        time[0],
        time[1],
        time[1] / time[0],
        time[2],
        time[2] / time[0]
    ));
    lines.push(format!(
        "Memory overwritten by a switch: {:.2} MiB against {:.2} MiB; kept beside the model: the \
         same amounts (nothing when LoRA is subtracted).",
        at(SWITCHES[0], "overwritten (bytes)")? / 1048576.0,
        at(SWITCHES[1], "overwritten (bytes)")? / 1048576.0,
    ));
    lines.push(format!(
        "After {DRIFT_SWITCHES} switches the base comes back bit for bit where old values are \
         kept; where LoRA is subtracted it has drifted by {:.1e} (relative, f32).",
        at(SWITCHES[2], "drift after switches")?
    ));
    let counts = numbers(&mixed, "adapters")?;
    let most = counts[counts.len() - 1];
    let serve = |method: &str, column: &str| {
        Ok::<f64, Error>(spread(&mixed, method, ("adapters", most), column)?.0)
    };
    lines.push(format!(
        "{most} adapters in one batch: {:.2} ms (S2FT) and {:.2} ms (LoRA) mixed, {:.2} and {:.2} \
         ms one by one, {:.2} ms for the base alone; multiply-adds beyond the base {:.1}% and \
         {:.1}%.",
        serve(SERVED[1], "time (ms)")?,
        serve(SERVED[2], "time (ms)")?,
        serve(SERVED[3], "time (ms)")?,
        serve(SERVED[4], "time (ms)")?,
        serve(SERVED[0], "time (ms)")?,
        100.0 * (serve(SERVED[1], "multiply-adds")? / serve(SERVED[0], "multiply-adds")? - 1.0),
        100.0 * (serve(SERVED[2], "multiply-adds")? / serve(SERVED[0], "multiply-adds")? - 1.0),
    ));
    Ok(lines)
}

pub(super) fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let (switch, mixed) = (part(table, "switch"), part(table, "mixed"));
    let restored = |method: &str| -> Result<bool> {
        Ok(switch
            .filter_eq("method", method)
            .floats("drift after switches")?
            .iter()
            .all(|d| d.abs() < f64::MIN_POSITIVE))
    };
    let widths = numbers(&switch, "width")?;
    let last = ("width", widths[widths.len() - 1]);
    let time = |method: &str| Ok::<f64, Error>(spread(&switch, method, last, "time (ms)")?.0);
    let gaps = mixed.rows().map(|r| r.f64("gap of logits, mixed against one by one"));
    let gaps: Vec<f64> = gaps.filter(|g| g.is_finite()).collect();
    let counts = numbers(&mixed, "adapters")?;
    let most = ("adapters", counts[counts.len() - 1]);
    let serve = |method: &str| spread(&mixed, method, most, "time (ms)");
    Ok(vec![
        (
            "kept slices and kept weights restore every bit of the base".into(),
            restored(SWITCHES[0])? && restored(SWITCHES[1])?,
        ),
        (
            "at the largest width slices switch faster than LoRA, kept or subtracted".into(),
            time(SWITCHES[0])? < time(SWITCHES[1])?.min(time(SWITCHES[2])?),
        ),
        // 256 tokens through two layers in f32; rounding of sums of 688 products.
        (
            "a mixed batch gives the logits of one adapter at a time (1e-5)".into(),
            !gaps.is_empty() && gaps.iter().all(|g| *g < 1e-5),
        ),
        (
            "a mixed batch of the most adapters does not take separably longer with slices than \
             with LoRA"
                .into(),
            serve(SERVED[1])?.1 <= serve(SERVED[2])?.2,
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_limits::report::{Cell, Row};

    /// Times of a switch with slices and with LoRA, the drift of kept weights, the gap and the
    /// times of a mixed batch.
    fn made_up(switch: [f64; 2], drift: f64, gap: f64, served: [f64; 2]) -> Vec<bool> {
        let mut table = Table::default();
        for seed in 0..3 {
            let noise = 1.0 + 0.01 * f64::from(seed);
            for (method, time) in SWITCHES.into_iter().zip([switch[0], switch[1], switch[1]]) {
                let row =
                    Row::new().with("part", "switch").with("method", method).with("width", 256.0);
                table
                    .push(&row.with("time (ms)", noise * time).with("drift after switches", drift));
            }
            for (method, time) in SERVED.into_iter().zip([1.0, served[0], served[1], 9.0, 9.0]) {
                let row =
                    Row::new().with("part", "mixed").with("method", method).with("adapters", 32.0);
                let gap = if method == SERVED[0] { Cell::Missing } else { Cell::Float(gap) };
                let row = row.with("gap of logits, mixed against one by one", gap);
                table.push(&row.with("time (ms)", noise * time));
            }
        }
        checks(&table).unwrap().into_iter().map(|c| c.1).collect()
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        assert_eq!(made_up([1.0, 5.0], 0.0, 1e-6, [2.0, 2.1]), [true; 4]);
        assert_eq!(
            made_up([5.0, 5.0], 0.0, 1e-6, [2.0, 2.1]),
            [true, false, true, true],
            "LoRA switches as fast"
        );
        assert_eq!(made_up([1.0, 5.0], 1e-7, 1e-6, [2.0, 2.1]), [false, true, true, true]);
        assert_eq!(made_up([1.0, 5.0], 0.0, 1e-3, [2.0, 2.1]), [true, true, false, true]);
        assert_eq!(
            made_up([1.0, 5.0], 0.0, f64::NAN, [2.0, 2.1]),
            [true, true, false, true],
            "never compared"
        );
        assert_eq!(
            made_up([1.0, 5.0], 0.0, 1e-6, [2.2, 2.1]),
            [true, true, true, false],
            "separably longer"
        );
        assert_eq!(
            made_up([1.0, 5.0], 0.0, 1e-6, [2.11, 2.1]),
            [true; 4],
            "longer within the spread"
        );
    }
}
