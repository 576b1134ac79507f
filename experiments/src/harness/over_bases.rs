//! Means and intervals over bases: what happens on one pretrained model is one observation, however
//! many seeds it has.

use peft_limits::Result;
use peft_limits::report::{Summary, Table};
use std::collections::BTreeMap;

/// The mean of a column on each base, by the base's name; a table without the column `base` is one
/// base.
///
/// # Errors
/// As [`Table::floats`].
pub fn by_base(table: &Table, column: &str) -> Result<BTreeMap<String, f64>> {
    let mut means = BTreeMap::new();
    if table.is_empty() {
        return Ok(means);
    }
    if !table.columns().iter().any(|c| c == "base") {
        means.insert(String::new(), Summary::of(&table.floats(column)?).mean);
        return Ok(means);
    }
    for (base, rows) in table.group_by(&["base"])? {
        means.insert(base[0].to_field(), Summary::of(&rows.floats(column)?).mean);
    }
    Ok(means)
}

/// Summary of the means on each base.
///
/// # Errors
/// As [`by_base`].
pub fn over_bases(table: &Table, column: &str) -> Result<Summary> {
    Ok(Summary::of(&by_base(table, column)?.into_values().collect::<Vec<_>>()))
}

/// (mean, low, high) over bases at this level; without a second base the interval is unbounded.
pub fn interval(summary: &Summary, level: f64) -> (f64, f64, f64) {
    let (low, high) = summary.t_interval(level).unwrap_or((f64::NEG_INFINITY, f64::INFINITY));
    (summary.mean, low, high)
}

/// As [`interval`] at 95% for a picture: the mean alone without a second base.
pub fn drawn(summary: &Summary) -> (f64, f64, f64) {
    let (low, high) = summary.t_interval(0.95).unwrap_or((summary.mean, summary.mean));
    (summary.mean, low, high)
}

/// Differences a - b on the bases that both have.
///
/// # Errors
/// As [`by_base`].
pub fn difference(a: &Table, b: &Table, column: &str) -> Result<Summary> {
    let (a, b) = (by_base(a, column)?, by_base(b, column)?);
    Ok(Summary::of(&a.iter().filter_map(|(base, x)| Some(x - b.get(base)?)).collect::<Vec<_>>()))
}

/// Mean over bases of a column (less is better) by rising learning rate.
///
/// # Errors
/// As [`by_base`].
pub fn by_rate(runs: &Table, column: &str) -> Result<Vec<(f64, f64)>> {
    let mut tried = Vec::new();
    if runs.is_empty() {
        return Ok(tried);
    }
    for (lr, rows) in runs.group_by(&["lr"])? {
        tried.push((lr[0].as_f64().unwrap_or(f64::NAN), over_bases(&rows, column)?.mean));
    }
    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(tried)
}

fn best(tried: &[(f64, f64)]) -> f64 {
    tried.iter().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(f64::NAN, |t| t.0)
}

/// Whether two learning rates are the same.
pub fn is_rate(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 1e-9
}

/// The best rate, if it is the smallest or the largest of several that were tried.
///
/// # Errors
/// As [`by_base`].
pub fn not_bracketed(runs: &Table, column: &str) -> Result<Option<f64>> {
    let tried = by_rate(runs, column)?;
    let at = best(&tried);
    let ends = tried.first().zip(tried.last()).filter(|_| tried.len() > 1);
    Ok(ends.is_some_and(|(a, b)| is_rate(a.0, at) || is_rate(b.0, at)).then_some(at))
}

/// Of each base the runs at the rate that the *other* bases find best by a column (less is better),
/// so that no base chooses for itself; of a single base those at its best.
///
/// # Errors
/// As [`by_base`].
pub fn at_best_rate(runs: &Table, column: &str) -> Result<Table> {
    let mut rates = BTreeMap::new();
    for base in by_base(runs, column)?.into_keys() {
        let others = runs.filter(|r| r.text("base") != base);
        rates.insert(base, best(&by_rate(if others.is_empty() { runs } else { &others }, column)?));
    }
    Ok(runs.filter(|r| rates.get(&r.text("base")).is_some_and(|&lr| is_rate(r.f64("lr"), lr))))
}

/// `more`, `less` or `not separated`: where an interval of a difference lies.
pub fn word((_, low, high): (f64, f64, f64)) -> &'static str {
    match (low > 0.0, high < 0.0) {
        (true, _) => "more",
        (_, true) => "less",
        _ => "not separated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_limits::report::Row;

    fn table(rows: &[(&str, f64)]) -> Table {
        let rows: Vec<Row> =
            rows.iter().map(|(base, x)| Row::new().with("base", *base).with("x", *x)).collect();
        Table::from_rows(&rows)
    }

    #[test]
    fn no_base_chooses_its_own_rate() {
        // Base 0 alone does best at 2; the others at 1.
        let losses = [
            ("ours 0", 1.0, 5.0),
            ("ours 0", 2.0, 1.0),
            ("ours 1", 1.0, 1.0),
            ("ours 1", 2.0, 3.0),
            ("ours 2", 1.0, 1.0),
            ("ours 2", 2.0, 3.0),
        ];
        let row = |&(base, lr, loss): &(&str, f64, f64)| {
            Row::new().with("base", base).with("lr", lr).with("loss", loss)
        };
        let runs = Table::from_rows(&losses.iter().map(row).collect::<Vec<_>>());
        let chosen = at_best_rate(&runs, "loss").unwrap();
        assert_eq!(chosen.floats("lr").unwrap(), [1.0, 2.0, 2.0]);
        assert!(not_bracketed(&runs, "loss").unwrap().is_some());
        let middle = Table::from_rows(
            &[(1.0, 2.0), (2.0, 1.0), (4.0, 2.0)].map(|(lr, loss)| row(&("ours 0", lr, loss))),
        );
        assert_eq!(not_bracketed(&middle, "loss").unwrap(), None);
        assert_eq!(at_best_rate(&middle, "loss").unwrap().floats("lr").unwrap(), [2.0]);
    }

    #[test]
    fn seeds_of_one_base_count_once_and_differences_are_paired() {
        let a = table(&[("ours 0", 1.0), ("ours 0", 3.0), ("ours 1", 4.0), ("ours 2", 9.0)]);
        let s = over_bases(&a, "x").unwrap();
        assert!(s.n == 3 && (s.mean - 5.0).abs() < 1e-12);
        // On one base any number of seeds gives no interval.
        let one = over_bases(&table(&[("ours 0", 1.0), ("ours 0", 1.1)]), "x").unwrap();
        assert!(interval(&one, 0.95).1.is_infinite());
        let unnamed = Table::from_rows(&[Row::new().with("x", 2.0), Row::new().with("x", 4.0)]);
        let unnamed = over_bases(&unnamed, "x").unwrap();
        assert!(unnamed.n == 1 && (unnamed.mean - 3.0).abs() < 1e-12);
        let b = table(&[("ours 1", 1.0), ("ours 0", 1.5), ("ours 7", 0.0)]);
        let d = difference(&a, &b, "x").unwrap();
        assert!(d.n == 2 && (d.mean - 1.75).abs() < 1e-12);
        assert_eq!(
            [word((1.0, 0.5, 2.0)), word((0.0, -1.0, 1.0)), word((-1.0, -2.0, -0.1))],
            ["more", "not separated", "less"]
        );
    }
}
