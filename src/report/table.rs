//! Tidy tables: one row per configuration, seed and measurement; units are in the column names.

use super::cell::Cell;
use super::summary::Summary;
use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One row: (column, value) pairs in order.
///
/// ```
/// use peft_limits::report::Row;
/// let row = Row::new().with("tokens", 128usize).with("time (s)", 0.25);
/// assert_eq!(row.get("tokens").unwrap().to_field(), "128");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Row {
    cells: Vec<(String, Cell)>,
}

impl Row {
    /// A row without columns.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a column, or replaces its value when the row has it already.
    pub fn with(mut self, column: impl Into<String>, value: impl Into<Cell>) -> Self {
        self.set(column, value);
        self
    }

    /// [`Row::with`] in place.
    pub fn set(&mut self, column: impl Into<String>, value: impl Into<Cell>) {
        let (column, value) = (column.into(), value.into());
        match self.cells.iter_mut().find(|(name, _)| *name == column) {
            Some((_, cell)) => *cell = value,
            None => self.cells.push((column, value)),
        }
    }

    /// The value of a column.
    pub fn get(&self, column: &str) -> Option<&Cell> {
        self.cells.iter().find(|(name, _)| name == column).map(|(_, cell)| cell)
    }

    /// The pairs in order.
    pub fn cells(&self) -> &[(String, Cell)] {
        &self.cells
    }
}

/// A table: ordered column names and rows of as many cells.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<Cell>>,
}

/// A row of a table, seen with its column names.
#[derive(Debug, Clone, Copy)]
pub struct RowView<'a> {
    columns: &'a [String],
    cells: &'a [Cell],
}

impl<'a> RowView<'a> {
    /// The value of a column, `None` when the table has no such column.
    pub fn get(&self, column: &str) -> Option<&'a Cell> {
        self.columns.iter().position(|c| c == column).map(|i| &self.cells[i])
    }

    /// The value of a column as a number; NaN when it is absent, missing or a text.
    pub fn f64(&self, column: &str) -> f64 {
        self.get(column).and_then(Cell::as_f64).unwrap_or(f64::NAN)
    }

    /// The value of a column as people read it; empty when absent.
    pub fn text(&self, column: &str) -> String {
        self.get(column).map(Cell::to_short).unwrap_or_default()
    }

    /// The cells in column order.
    pub fn cells(&self) -> &'a [Cell] {
        self.cells
    }
}

impl Table {
    /// An empty table with these columns.
    pub fn new(columns: &[&str]) -> Self {
        Self { columns: columns.iter().map(|c| c.to_string()).collect(), rows: Vec::new() }
    }

    /// A table of these rows; columns in the order of first appearance, absent values missing.
    pub fn from_rows<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let mut table = Self::default();
        rows.into_iter().for_each(|row| table.push(row));
        table
    }

    /// Appends a row. A column the table lacks is added, and is missing in the earlier rows.
    pub fn push(&mut self, row: &Row) {
        let mut cells = vec![Cell::Missing; self.columns.len()];
        for (name, value) in row.cells() {
            match self.columns.iter().position(|c| c == name) {
                Some(i) => cells[i] = value.clone(),
                None => {
                    self.columns.push(name.clone());
                    self.rows.iter_mut().for_each(|r| r.push(Cell::Missing));
                    cells.push(value.clone());
                }
            }
        }
        self.rows.push(cells);
    }

    /// Column names in order.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether the table has no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows in order.
    pub fn rows(&self) -> impl Iterator<Item = RowView<'_>> {
        self.rows.iter().map(|cells| RowView { columns: &self.columns, cells })
    }

    /// The cells of one column.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] naming the columns when there is no such column.
    pub fn column(&self, name: &str) -> Result<Vec<&Cell>> {
        let i = self.index(name)?;
        Ok(self.rows.iter().map(|r| &r[i]).collect())
    }

    /// One column as numbers; missing values are NaN.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] when there is no such column or a cell is a text.
    pub fn floats(&self, name: &str) -> Result<Vec<f64>> {
        let number = |c: &Cell| {
            c.as_f64().ok_or_else(|| Error::invalid(name, c, "this column must hold numbers"))
        };
        self.column(name)?.into_iter().map(number).collect()
    }

    /// One column as people read it.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] when there is no such column.
    pub fn texts(&self, name: &str) -> Result<Vec<String>> {
        Ok(self.column(name)?.into_iter().map(Cell::to_short).collect())
    }

    /// The different values of a column, in order of first appearance.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] when there is no such column.
    pub fn distinct(&self, name: &str) -> Result<Vec<Cell>> {
        let mut seen: Vec<Cell> = Vec::new();
        for cell in self.column(name)? {
            if !seen.contains(cell) {
                seen.push(cell.clone());
            }
        }
        Ok(seen)
    }

    /// The rows for which `keep` holds.
    pub fn filter(&self, mut keep: impl FnMut(RowView<'_>) -> bool) -> Self {
        let rows = self
            .rows
            .iter()
            .filter(|cells| keep(RowView { columns: &self.columns, cells }))
            .cloned()
            .collect();
        Self { columns: self.columns.clone(), rows }
    }

    /// The rows whose `column` equals `value` in type and value.
    pub fn filter_eq(&self, column: &str, value: impl Into<Cell>) -> Self {
        let value = value.into();
        self.filter(|row| row.get(column) == Some(&value))
    }

    /// Splits by the values of `columns`, in order of first appearance.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] when a column is absent.
    pub fn group_by(&self, columns: &[&str]) -> Result<Vec<(Vec<Cell>, Table)>> {
        let indices = columns.iter().map(|c| self.index(c)).collect::<Result<Vec<_>>>()?;
        let mut groups: Vec<(Vec<Cell>, Table)> = Vec::new();
        for cells in &self.rows {
            let key: Vec<Cell> = indices.iter().map(|&i| cells[i].clone()).collect();
            match groups.iter_mut().find(|(k, _)| *k == key) {
                Some((_, table)) => table.rows.push(cells.clone()),
                None => groups.push((
                    key,
                    Table { columns: self.columns.clone(), rows: vec![cells.clone()] },
                )),
            }
        }
        Ok(groups)
    }

    /// The rows ordered by a numeric column, NaN last; equal values keep their order.
    ///
    /// # Errors
    /// As [`Table::floats`].
    pub fn sorted_by(&self, column: &str) -> Result<Self> {
        let keys = self.floats(column)?;
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        order.sort_by(|&a, &b| {
            keys[a].is_nan().cmp(&keys[b].is_nan()).then(keys[a].total_cmp(&keys[b]))
        });
        Ok(Self {
            columns: self.columns.clone(),
            rows: order.into_iter().map(|i| self.rows[i].clone()).collect(),
        })
    }

    /// The summary of `value` over the rows (seeds, repeats) of each combination of `by`.
    ///
    /// # Errors
    /// As [`Table::group_by`] and [`Table::floats`].
    pub fn summarise(&self, by: &[&str], value: &str) -> Result<Vec<(Vec<Cell>, Summary)>> {
        self.group_by(by)?
            .into_iter()
            .map(|(key, group)| Ok((key, Summary::of(&group.floats(value)?))))
            .collect()
    }

    /// The table as CSV; see [`Cell`] for the form of values.
    pub fn to_csv(&self) -> Vec<u8> {
        let mut out = String::new();
        let mut line = |fields: Vec<String>| {
            out.push_str(&fields.iter().map(|f| quoted(f)).collect::<Vec<_>>().join(","));
            out.push('\n');
        };
        line(self.columns.clone());
        self.rows.iter().for_each(|cells| line(cells.iter().map(Cell::to_field).collect()));
        out.into_bytes()
    }

    /// Writes the table as CSV, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_csv(&self, path: &Path) -> Result<()> {
        write_bytes(path, &self.to_csv())
    }

    /// Reads a table written by [`Table::write_csv`].
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] naming the line of a malformed row.
    pub fn read_csv(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let malformed = |e: csv::Error| {
            Error::format(path, "rows", "comma-separated values of equal length", e.to_string())
        };
        let mut reader = csv::ReaderBuilder::new().from_reader(bytes.as_slice());
        let columns: Vec<String> =
            reader.headers().map_err(malformed)?.iter().map(str::to_string).collect();
        let mut rows = Vec::new();
        for record in reader.records() {
            rows.push(record.map_err(malformed)?.iter().map(Cell::from_field).collect());
        }
        Ok(Self { columns, rows })
    }

    /// Fixed-width text for a terminal: numbers right-aligned, at most `max_rows` rows.
    pub fn to_text(&self, max_rows: usize) -> String {
        let shown = &self.rows[..self.rows.len().min(max_rows)];
        let body: Vec<Vec<String>> =
            shown.iter().map(|r| r.iter().map(Cell::to_short).collect()).collect();
        let width = |s: &str| s.chars().count();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|j| {
                body.iter().map(|r| width(&r[j])).max().unwrap_or(0).max(width(&self.columns[j]))
            })
            .collect();
        let numeric: Vec<bool> = (0..self.columns.len())
            .map(|j| !shown.iter().any(|r| matches!(r[j], Cell::Text(_))))
            .collect();
        let line = |fields: &[String]| {
            let mut text = String::new();
            for (j, field) in fields.iter().enumerate() {
                let pad = " ".repeat(widths[j] - width(field));
                let gap = if j == 0 { "" } else { "  " };
                text += &if numeric[j] {
                    format!("{gap}{pad}{field}")
                } else {
                    format!("{gap}{field}{pad}")
                };
            }
            format!("{}\n", text.trim_end())
        };
        let mut text = line(&self.columns);
        text += &line(&widths.iter().map(|w| "-".repeat(*w)).collect::<Vec<_>>());
        body.iter().for_each(|fields| text += &line(fields));
        if self.rows.len() > shown.len() {
            text += &format!("... {} more rows\n", self.rows.len() - shown.len());
        }
        text
    }

    fn index(&self, name: &str) -> Result<usize> {
        self.columns.iter().position(|c| c == name).ok_or_else(|| {
            Error::invalid(
                "column",
                name,
                format!("the table has the columns {}", self.columns.join(", ")),
            )
        })
    }
}

/// A CSV field, in quotes when it needs them.
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Table {
        Table::from_rows(&[
            Row::new()
                .with("method", "chained, fast")
                .with("tokens", 128usize)
                .with("time (s)", 0.1),
            Row::new().with("method", "dense").with("tokens", 64usize).with("time (s)", f64::NAN),
            Row::new()
                .with("method", "12")
                .with("tokens", 64usize)
                .with("error (relative)", 1e-300),
            Row::new()
                .with("method", "dense")
                .with("tokens", 256usize)
                .with("time (s)", 3.0)
                .with("\"q\"\n", ""),
        ])
    }

    #[test]
    fn csv_reads_back_equal() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.csv");
        for table in [example(), Table::new(&["a", "b (s)"])] {
            table.write_csv(&path).unwrap();
            assert_eq!(Table::read_csv(&path).unwrap(), table);
        }
    }

    #[test]
    fn a_short_line_is_refused_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.csv");
        std::fs::write(&path, "a,b\n1,2\n3\n").unwrap();
        let message = Table::read_csv(&path).unwrap_err().to_string();
        assert!(message.contains("table.csv") && message.contains("line: 3"), "{message}");
    }

    #[test]
    fn late_columns_are_missing_before() {
        let table = example();
        assert_eq!(
            table.columns(),
            ["method", "tokens", "time (s)", "error (relative)", "\"q\"\n"]
        );
        assert_eq!(table.column("error (relative)").unwrap()[0], &Cell::Missing);
        assert!(table.floats("error (relative)").unwrap()[0].is_nan());
    }

    #[test]
    fn selection() {
        let table = example();
        assert_eq!(table.filter_eq("tokens", 64usize).len(), 2);
        assert_eq!(table.filter(|r| r.f64("tokens") > 100.0).len(), 2);
        let groups = table.group_by(&["method"]).unwrap();
        assert_eq!(groups.iter().map(|(_, t)| t.len()).collect::<Vec<_>>(), [1, 2, 1]);
        assert_eq!(groups[1].0, [Cell::from("dense")]);
        assert_eq!(table.distinct("tokens").unwrap(), [128usize, 64, 256].map(Cell::from));
        assert_eq!(
            table.sorted_by("time (s)").unwrap().texts("tokens").unwrap(),
            ["128", "256", "64", "64"]
        );
        let summaries = table.summarise(&["method"], "time (s)").unwrap();
        assert_eq!((summaries[1].1.n, summaries[1].1.skipped, summaries[1].1.mean), (1, 1, 3.0));
    }

    #[test]
    fn an_absent_column_names_those_present() {
        let message = example().floats("tokenz").unwrap_err().to_string();
        assert!(message.contains("tokenz") && message.contains("method, tokens"), "{message}");
        assert!(example().floats("method").is_err());
    }

    #[test]
    fn text_is_aligned_and_cut() {
        let text = Table::from_rows(&[
            Row::new().with("m", "ab").with("n (s)", 1usize),
            Row::new().with("m", "c").with("n (s)", 100usize),
            Row::new().with("m", "d").with("n (s)", 5usize),
        ])
        .to_text(2);
        assert_eq!(text, "m   n (s)\n--  -----\nab      1\nc     100\n... 1 more rows\n");
    }
}
