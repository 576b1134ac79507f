//! One value of a table, and its lossless text form.

use serde::{Deserialize, Serialize};
use std::fmt;

/// One value of a [`Table`](super::table::Table).
///
/// The text form ([`Cell::to_field`]) of every value reads back ([`Cell::from_field`]) as the same
/// value of the same type: floats always carry a point, an exponent or a name (`1.0`, `1e-7`,
/// `NaN`, `inf`), integers are digits, and a text that could be taken for either is written with a
/// leading apostrophe, as spreadsheets do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "(String, String)", into = "(String, String)")]
pub enum Cell {
    /// No value: a metric that does not apply to this row.
    Missing,
    /// A name or a sentence.
    Text(String),
    /// A count; wide enough for any `u64`.
    Integer(i128),
    /// A measurement; NaN and infinities are kept.
    Float(f64),
}

/// Equal type and equal value; floats are compared by their bits, so NaN equals itself.
impl PartialEq for Cell {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Cell::Missing, Cell::Missing) => true,
            (Cell::Text(a), Cell::Text(b)) => a == b,
            (Cell::Integer(a), Cell::Integer(b)) => a == b,
            (Cell::Float(a), Cell::Float(b)) => {
                a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
            }
            _ => false,
        }
    }
}

impl Cell {
    /// The value as a number: integers are converted, a missing value is NaN, a text is `None`.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Cell::Missing => Some(f64::NAN),
            Cell::Text(_) => None,
            Cell::Integer(i) => Some(*i as f64),
            Cell::Float(x) => Some(*x),
        }
    }

    /// The lossless text form, as written to CSV.
    pub fn to_field(&self) -> String {
        match self {
            Cell::Missing => String::new(),
            Cell::Text(t) if matches!(Self::from_field(t), Cell::Text(plain) if plain == *t) => {
                t.clone()
            }
            Cell::Text(t) => format!("'{t}"),
            Cell::Integer(i) => i.to_string(),
            Cell::Float(x) => format!("{x:?}"),
        }
    }

    /// Reads a field written by [`Cell::to_field`]; any text is accepted.
    pub fn from_field(field: &str) -> Self {
        if field.is_empty() {
            return Cell::Missing;
        }
        if let Some(text) = field.strip_prefix('\'') {
            return Cell::Text(text.to_string());
        }
        if let Ok(i) = field.parse::<i128>() {
            return Cell::Integer(i);
        }
        match field.parse::<f64>() {
            Ok(x) => Cell::Float(x),
            Err(_) => Cell::Text(field.to_string()),
        }
    }

    /// The form shown to people: floats to four significant digits, everything else in full.
    pub fn to_short(&self) -> String {
        match self {
            Cell::Missing => "-".into(),
            Cell::Text(t) => t.clone(),
            Cell::Integer(i) => i.to_string(),
            Cell::Float(x) => short_float(*x),
        }
    }
}

/// A float to four significant digits, with an exponent outside [1e-3, 1e6).
pub fn short_float(x: f64) -> String {
    if x == 0.0 {
        return "0".into();
    }
    let size = x.abs();
    if !x.is_finite() {
        format!("{x}")
    } else if (1e-3..1e6).contains(&size) {
        let decimals = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
        format!("{x:.decimals$}")
    } else {
        format!("{x:.3e}")
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_short())
    }
}

impl From<(String, String)> for Cell {
    fn from((kind, field): (String, String)) -> Self {
        match kind.as_str() {
            "text" => Cell::Text(field),
            _ => Cell::from_field(&field),
        }
    }
}

impl From<Cell> for (String, String) {
    fn from(cell: Cell) -> Self {
        match cell {
            Cell::Text(t) => ("text".into(), t),
            other => ("number".into(), other.to_field()),
        }
    }
}

impl From<&str> for Cell {
    fn from(t: &str) -> Self {
        Cell::Text(t.to_string())
    }
}
impl From<String> for Cell {
    fn from(t: String) -> Self {
        Cell::Text(t)
    }
}
impl From<bool> for Cell {
    fn from(b: bool) -> Self {
        Cell::Text(b.to_string())
    }
}
impl From<f64> for Cell {
    fn from(x: f64) -> Self {
        Cell::Float(x)
    }
}
impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or(Cell::Missing, Into::into)
    }
}
macro_rules! integers {
    ($($t:ty),*) => {$(
        impl From<$t> for Cell {
            fn from(i: $t) -> Self {
                Cell::Integer(i as i128)
            }
        }
    )*};
}
integers!(i32, i64, u32, u64, usize, i128);

impl From<&serde_json::Value> for Cell {
    /// Scalars keep their type; arrays and objects become their JSON text.
    fn from(value: &serde_json::Value) -> Self {
        use serde_json::Value;
        match value {
            Value::Null => Cell::Missing,
            Value::Bool(b) => (*b).into(),
            Value::String(t) => Cell::Text(t.clone()),
            Value::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(i), _) => i.into(),
                (_, Some(u)) => u.into(),
                _ => n.as_f64().map_or(Cell::Missing, Cell::Float),
            },
            other => Cell::Text(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Cell> {
        vec![
            Cell::Missing,
            "plain".into(),
            "".into(),
            "12".into(),
            "1e5".into(),
            "nan".into(),
            "'quoted".into(),
            "a,b\n\"c\"".into(),
            7usize.into(),
            u64::MAX.into(),
            (-3i64).into(),
            1.0.into(),
            0.1.into(),
            (1.0 / 3.0).into(),
            f64::MIN_POSITIVE.into(),
            5e-324.into(),
            1e300.into(),
            (-0.0).into(),
            f64::NAN.into(),
            f64::INFINITY.into(),
            f64::NEG_INFINITY.into(),
        ]
    }

    #[test]
    fn fields_and_json_read_back_as_the_same_value_and_type() {
        for cell in samples() {
            assert_eq!(Cell::from_field(&cell.to_field()), cell, "field {:?}", cell.to_field());
            let json = serde_json::to_string(&cell).unwrap();
            assert_eq!(serde_json::from_str::<Cell>(&json).unwrap(), cell, "json {json}");
        }
    }

    #[test]
    fn short_forms_have_four_digits() {
        assert_eq!(short_float(1234.567), "1235");
        assert_eq!(short_float(0.0123456), "0.01235");
        assert_eq!(short_float(1.0), "1.000");
        assert_eq!(short_float(1.23456e-9), "1.235e-9");
        assert_eq!(short_float(f64::NAN), "NaN");
    }
}
