//! Figures, findings and checks of the table.

use super::{BUDGET, CHEAP, EXACT, EXPONENTS, LADDER, ORACLES, RATIOS, SIDES};
use peft_limits::limits::exponent::fit_exponent;
use peft_limits::limits::hardness::accuracy::clopper_pearson;
use peft_limits::report::{
    Axis, Figure, LineChart, LineStyle, NamedFigure, PlotPoint, Reference, Series, Table,
};
use peft_limits::{Error, Result};

/// Share of the planted and of the null instances that counts as deciding.
const DECIDES: f64 = 0.9;
/// sqrt(16/3): from this c on the reduction decides at large L.
const CONSTANT: f64 = 2.309_401_076_758_503;
/// Ratios at which the tolerated error is shown: below and above what the promise with G = 1 needs.
const TOLERATED: [f64; 2] = [2.5, 3.5];
const TURNS: [&str; 2] =
    ["error that turns a tenth (largest entry)", "error that turns a tenth (Frobenius)"];

/// What a family answers over some blocks of instances.
#[derive(Default)]
struct Answers {
    instances: f64,
    answered: u64,
    right: u64,
    /// Shares right of all planted and of all null instances; no answer is not right.
    sides: [f64; 2],
    /// Instances that it says have a near pair.
    near: u64,
}

impl Answers {
    fn of(rows: &Table) -> Result<Self> {
        let sum = |column: &str| Ok::<f64, Error>(rows.floats(column)?.into_iter().sum());
        let mut all = Self::default();
        for (i, kind) in ["planted", "null"].into_iter().enumerate() {
            let (n, answered) = (sum(kind)?, sum(&format!("{kind} answered"))?);
            let right = sum(&format!("{kind} right"))?;
            all.sides[i] = right / n;
            all.instances += n;
            all.answered += answered as u64;
            all.right += right as u64;
            all.near += if i == 0 { right } else { answered - right } as u64;
        }
        Ok(all)
    }

    /// Share right of those answered, with its 95% interval.
    fn share(&self) -> Result<(f64, f64, f64)> {
        if self.answered == 0 {
            return Ok((f64::NAN, f64::NAN, f64::NAN));
        }
        let (low, high) = clopper_pearson(self.right, self.answered, 0.95)?;
        Ok((self.right as f64 / self.answered as f64, low, high))
    }

    fn answered_share(&self) -> f64 {
        self.answered as f64 / self.instances
    }

    /// The same answer for every instance: right on half of them without having looked.
    fn constant(&self) -> bool {
        self.answered > 1 && (self.near == 0 || self.near == self.answered)
    }

    fn worse_side(&self) -> f64 {
        self.sides[0].min(self.sides[1])
    }
}

fn of_kind(table: &Table, kind: &str, family: &str, oracle: &str) -> Table {
    table.filter_eq("kind", kind).filter_eq("family", family).filter_eq("oracle", oracle)
}

/// Rows at one value of a number.
fn at(table: &Table, column: &str, value: f64) -> Table {
    table.filter(|r| (r.f64(column) - value).abs() < 1e-9)
}

/// Different numbers of a column, rising.
fn numbers(table: &Table, column: &str) -> Result<Vec<f64>> {
    let mut values: Vec<f64> = table.distinct(column)?.iter().filter_map(|c| c.as_f64()).collect();
    values.sort_by(f64::total_cmp);
    Ok(values)
}

/// Least c from which the promise decides at the size of the budgets.
fn guarantee(table: &Table, oracle: &str) -> f64 {
    let rows = of_kind(table, "budget", EXACT, oracle);
    rows.rows()
        .filter(|r| r.text("guaranteed") == "true")
        .map(|r| r.f64("c"))
        .fold(f64::INFINITY, f64::min)
}

/// Least c from which the exact answers decide at every larger c too, by size.
fn exact_from(table: &Table, oracle: &str, size: f64) -> Result<f64> {
    let rows = at(&of_kind(table, EXACT, EXACT, oracle), "size", size);
    let mut from = f64::NAN;
    for c in RATIOS.into_iter().rev() {
        if !(Answers::of(&at(&rows, "c", c))?.worse_side() >= DECIDES) {
            break;
        }
        from = c;
    }
    Ok(from)
}

/// Smallest k from which on every measured one decides, between measured ones on logarithms; `None`
/// if the largest does not.
fn smallest(rows: &Table) -> Result<Option<f64>> {
    let mut from = None;
    let mut last: Option<(f64, f64)> = None;
    for k in numbers(rows, "columns k")?.into_iter().rev() {
        let share = Answers::of(&at(rows, "columns k", k))?.worse_side();
        if !(share >= DECIDES) {
            // The crossing lies between this one and the next larger.
            from =
                last.map(|(above, high)| k * (above / k).powf((DECIDES - share) / (high - share)));
            return Ok(from.map(f64::ceil));
        }
        (from, last) = (Some(k), Some((k, share)));
    }
    Ok(from)
}

/// (L, smallest k) of a family on one side, where it decides.
fn scaling(table: &Table, family: &str, oracle: &str, c: f64) -> Result<Vec<(f64, f64)>> {
    let rows = at(&of_kind(table, "ladder", family, oracle), "c", c);
    let mut points = Vec::new();
    for size in numbers(&rows, "size")? {
        points.extend(smallest(&at(&rows, "size", size))?.map(|k| (2.0 * size, k)));
    }
    Ok(points)
}

fn budgets(table: &Table) -> Result<NamedFigure> {
    let mut panels = Vec::new();
    for (oracle, _) in ORACLES {
        for exponent in EXPONENTS {
            let of_budget = at(&table.filter_eq("kind", "budget"), "budget", exponent);
            let columns = of_budget.floats("columns k")?.first().copied().unwrap_or(f64::NAN);
            let (mut series, mut constants): (Vec<Series>, Vec<(f64, f64)>) = Default::default();
            for family in BUDGET {
                let rows = of_kind(&of_budget, "budget", family, oracle);
                let mut points = Vec::new();
                for c in numbers(&rows, "c")? {
                    let answers = Answers::of(&at(&rows, "c", c))?;
                    let (share, low, high) = answers.share()?;
                    let shown = answers.answered_share() >= 0.5 && !answers.constant();
                    if answers.constant() {
                        constants.push((c, share));
                    }
                    let y = if shown { share } else { f64::NAN };
                    points.push(PlotPoint { x: c, y, interval: shown.then_some((low, high)) });
                }
                if points.iter().any(|p| p.y.is_finite()) {
                    series.push(Series::new(family, points));
                }
            }
            series.push(Series {
                line: LineStyle::None,
                ..Series::new("same answer to all", constants)
            });
            let mut references = vec![Reference::Horizontal(0.5, "guess".into())];
            let c = guarantee(table, oracle);
            if c.is_finite() {
                references.push(Reference::Vertical(c, "promise decides".into()));
            }
            panels.push(LineChart {
                title: format!("from the {oracle}, k = L^{exponent} = {columns}"),
                x: Axis::linear("c = Γ / √ln L").range(0.4, 3.6),
                y: Axis::linear("share decided rightly").range(0.0, 1.0),
                series,
                references,
            });
        }
    }
    let figure = Figure::new(
        "Planted and null nearest-neighbour \
                              instances",
        panels,
    )
    .columns(2)
    .caption(
        "Shares of the instances answered, 95% Clopper-Pearson intervals. A method that gives \
         every instance of a c the same answer has a marker there and no line, one that answers \
         fewer than half (denominators not positive) neither. Right of the dashed line an exact \
         oracle is right whenever the promise holds. support-basis pays for its search (findings).",
    );
    Ok(NamedFigure::new("hardness", figure))
}

fn ladders(table: &Table) -> Result<NamedFigure> {
    let mut panels = Vec::new();
    for (oracle, _) in ORACLES {
        for c in SIDES {
            let mut series = Vec::new();
            for family in LADDER {
                let points = scaling(table, family, oracle, c)?;
                if !points.is_empty() {
                    series.push(Series::new(family, points));
                }
            }
            let lengths = numbers(&table.filter_eq("kind", "ladder"), "size")?;
            let all = lengths.into_iter().map(|n| (2.0 * n, 2.0 * n)).collect::<Vec<_>>();
            series.push(Series {
                line: LineStyle::Dashed,
                markers: false,
                ..Series::new("k = L", all)
            });
            panels.push(LineChart {
                title: format!("from the {oracle}, c = {c}"),
                x: Axis::log2("L (keys)"),
                y: Axis::log2("smallest k that decides").range(1.0, 4096.0),
                series,
                ..LineChart::default()
            });
        }
    }
    let figure = Figure::new("Columns that decide nine in ten", panels).columns(2).caption(
        "Smallest k from which on a method is right on 90% of the planted and 90% of the null \
         instances, between measured k on logarithms; k is keys a query for sparse. A method \
         without a line does not decide with 3/4 L columns (sparse: L/2 keys); from the LoRA \
         gradient at c = 2 not even exact answers do. sparse and truncated-svd have seen every \
         pair; the latter is measured up to L = 512.",
    );
    Ok(NamedFigure::new("columns", figure))
}

fn exact_answers(table: &Table) -> Result<NamedFigure> {
    let mut panels = Vec::new();
    let sizes = numbers(&table.filter_eq("kind", EXACT), "size")?;
    for (oracle, _) in ORACLES {
        let rows = of_kind(table, EXACT, EXACT, oracle);
        let mut series = Vec::new();
        for &size in sizes.iter().step_by((sizes.len() / 3).max(1)).chain(sizes.last()) {
            let mut points = Vec::new();
            for c in RATIOS {
                points.push((c, Answers::of(&at(&at(&rows, "size", size), "c", c))?.worse_side()));
            }
            let name = format!("L = {}", 2.0 * size);
            if series.iter().all(|s: &Series| s.name != name) {
                series.push(Series::new(name, points));
            }
        }
        panels.push(LineChart {
            title: format!("from the {oracle}"),
            x: Axis::linear("c = Γ / √ln L"),
            y: Axis::linear("worse of the two shares right").range(0.0, 1.0),
            series,
            references: vec![Reference::Horizontal(DECIDES, "decides".into())],
        });
    }
    let figure = Figure::new("What exact answers decide", panels).columns(3).caption(
        "From the distances alone, half of the instances planted; the worse of the shares of \
         planted and of null ones.",
    );
    Ok(NamedFigure::new("exact", figure))
}

fn tolerances(table: &Table) -> Result<NamedFigure> {
    let mut panels = Vec::new();
    let sizes = numbers(&table.filter_eq("kind", EXACT), "size")?;
    for c in TOLERATED {
        let mut series = Vec::new();
        // "LoRA ..." would take the colour of the method.
        for ((oracle, _), name) in ORACLES[1..].iter().zip(["G = 1", "Y = 0"]) {
            for (column, norm) in TURNS.into_iter().zip(["largest entry", "Frobenius"]) {
                series.push(Series::new(
                    format!("{name}, {norm}"),
                    turning(table, oracle, c, column)?,
                ));
            }
        }
        let theorem = sizes.iter().map(|&n| (2.0 * n, (2.0 * n).ln().powi(-4))).collect::<Vec<_>>();
        series.push(Series {
            line: LineStyle::Dashed,
            markers: false,
            ..Series::new("(ln L)^-4", theorem)
        });
        panels.push(LineChart {
            title: format!("error that turns one answer in ten, c = {c}"),
            x: Axis::log2("L (keys)"),
            y: Axis::log10("relative gradient error").range(1e-5, 1.0),
            series,
            ..LineChart::default()
        });
    }
    let figure = Figure::new("How exact a gradient must be to decide", panels).columns(2).caption(
        "The error of dB_Q, placed where it harms most, that turns a tenth of the exact answers: \
         relative to the largest entry, and to the Frobenius norm. Dashed: the error for which the \
         theorems are stated.",
    );
    Ok(NamedFigure::new("tolerance", figure))
}

/// (L, error that turns a tenth of the answers), means over blocks.
fn turning(table: &Table, oracle: &str, c: f64, column: &str) -> Result<Vec<(f64, f64)>> {
    let rows = at(&of_kind(table, EXACT, EXACT, oracle), "c", c);
    let by_size = rows.summarise(&["size"], column)?;
    let mut points: Vec<(f64, f64)> = by_size
        .into_iter()
        .map(|(key, s)| (2.0 * key[0].as_f64().unwrap_or(f64::NAN), s.mean))
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(points)
}

pub(super) fn plot(table: &Table) -> Result<Vec<NamedFigure>> {
    Ok(vec![budgets(table)?, ladders(table)?, exact_answers(table)?, tolerances(table)?])
}

/// How a family does on the right of `from` within a budget.
fn in_words(rows: &Table, family: &str, from: f64) -> Result<String> {
    let above = rows.filter(|r| r.f64("c") >= from);
    if above.is_empty() {
        return Ok(format!("{family} has no member this small"));
    }
    let all = Answers::of(&above)?;
    let cost: Vec<f64> =
        above.floats("operations / exact")?.into_iter().filter(|x| x.is_finite()).collect();
    if cost.is_empty() {
        return Ok(format!("{family} gives no answer (denominators are not positive)"));
    }
    let mean = cost.iter().sum::<f64>() / cost.len() as f64;
    let what =
        if all.constant() { "by the same answer to every instance" } else { "of its answers" };
    let silent = match all.answered_share() {
        share if share < 1.0 => format!(", {:.0}% without an answer", 100.0 * (1.0 - share)),
        _ => String::new(),
    };
    let share = 100.0 * all.share()?.0;
    Ok(format!("{family} {share:.0}% right {what}{silent} at {mean:.2} of the exact operations"))
}

pub(super) fn findings(table: &Table) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let sizes = numbers(&table.filter_eq("kind", EXACT), "size")?;
    let (Some(&short), Some(&long)) = (sizes.first(), sizes.last()) else { return Ok(lines) };
    for (oracle, _) in ORACLES {
        let c = guarantee(table, oracle);
        lines.push(format!(
            "From the {oracle}: the promise alone decides from c = {c} on (of those measured, n = \
             {}); exact answers are right on nine in ten of either kind from c = {} on at L = {} \
             and from c = {} on at L = {}.",
            numbers(&table.filter_eq("kind", "budget"), "size")?[0],
            exact_from(table, oracle, short)?,
            2.0 * short,
            exact_from(table, oracle, long)?,
            2.0 * long
        ));
    }
    for (oracle, _) in ORACLES {
        for c in SIDES {
            let (mut words, mut none) = (Vec::new(), Vec::new());
            for family in LADDER {
                let points = scaling(table, family, oracle, c)?;
                let Some((tokens, k)) = points.last() else {
                    none.push(family);
                    continue;
                };
                let slope = match fit_exponent(&points, 0.95) {
                    Ok(e) => {
                        format!(
                            ", exponent {:.2} [{:.2}, {:.2}] over {} lengths",
                            e.slope, e.low, e.high, e.points
                        )
                    }
                    Err(_) => String::new(),
                };
                words.push(format!("{family} k = {k} at L = {tokens}{slope}"));
            }
            let words = if words.is_empty() { "no method".into() } else { words.join("; ") };
            let none = if none.is_empty() {
                String::new()
            } else {
                format!(" Not with 3/4 L columns (sparse: L/2 keys): {}.", none.join(", "))
            };
            lines.push(format!(
                "Smallest k that decides from the {oracle} at c = {c}: {words}.{none}"
            ));
        }
    }
    for (oracle, _) in &ORACLES[1..] {
        for c in TOLERATED {
            let (entry, whole) =
                (turning(table, oracle, c, TURNS[0])?, turning(table, oracle, c, TURNS[1])?);
            let slope = fit_exponent(&entry, 0.95).map_or(f64::NAN, |e| e.slope);
            let (Some(entry), Some(whole)) = (entry.last(), whole.last()) else { continue };
            let theorem = entry.0.ln().powi(-4);
            lines.push(format!(
                "{oracle}, c = {c}, L = {}: a tenth of the exact answers turn at a gradient error \
                 of {:.2e} (of the largest entry; {:.2e} in the Frobenius norm), {:.0} times (ln \
                 L)^-4 = {theorem:.1e}; it changes like L^{slope:.2}.",
                entry.0,
                entry.1,
                whole.1,
                entry.1 / theorem
            ));
        }
    }
    for (oracle, _) in ORACLES {
        let c = guarantee(table, oracle);
        for exponent in EXPONENTS {
            let of_budget = at(&table.filter_eq("kind", "budget"), "budget", exponent);
            let words = BUDGET
                .iter()
                .map(|family| in_words(&of_kind(&of_budget, "budget", family, oracle), family, c))
                .collect::<Result<Vec<_>>>()?;
            lines.push(format!(
                "From the {oracle} at c >= {c}, with k = L^{exponent}: {}.",
                words.join("; ")
            ));
        }
        let wrong = |column: &str| -> Vec<f64> {
            let rows = table.filter(|r| {
                r.text("oracle") == oracle && r.f64("c") >= c && r.text("family") != EXACT
            });
            rows.rows().map(|r| r.f64(column)).filter(|x| x.is_finite()).collect()
        };
        let least =
            wrong("least error of a wrong answer").into_iter().fold(f64::INFINITY, f64::min);
        if least.is_finite() {
            lines.push(format!(
                "From the {oracle} at c >= {c}: the least gradient error with which a method \
                 answers wrongly is {least:.1e} (Frobenius)."
            ));
        }
    }
    Ok(lines)
}

pub(super) fn checks(table: &Table) -> Result<Vec<(String, bool)>> {
    let exact = table.filter(|r| r.text("family") == EXACT && r.text("guaranteed") == "true");
    let (mut within, mut slow, mut sharp) = (true, true, true);
    for (oracle, _) in ORACLES {
        let c = guarantee(table, oracle);
        for family in CHEAP {
            let rows = at(&of_kind(table, "budget", family, oracle), "budget", EXPONENTS[1]);
            for c in numbers(&rows.filter(|r| r.f64("c") >= c), "c")? {
                within &= !(Answers::of(&at(&rows, "c", c))?.worse_side() >= DECIDES);
            }
            let points = scaling(table, family, oracle, SIDES[1])?;
            // Few columns at the longest, or growth that would make them few.
            let grows = fit_exponent(&points, 0.95).map_or(1.0, |e| e.slope);
            slow &= grows >= 0.5 && points.last().is_none_or(|(tokens, k)| *k >= tokens.sqrt());
        }
    }
    for (oracle, _) in &ORACLES[1..] {
        for c in RATIOS.into_iter().filter(|&c| c > CONSTANT) {
            let sure = |tokens: f64| {
                let rows = of_kind(table, EXACT, EXACT, oracle);
                rows.rows().any(|r| {
                    r.text("guaranteed") == "true"
                        && (r.f64("c") - c).abs() < 1e-9
                        && (2.0 * r.f64("size") - tokens).abs() < 0.5
                })
            };
            for (tokens, error) in turning(table, oracle, c, TURNS[0])? {
                sharp &= !sure(tokens) || error > tokens.ln().powi(-4);
            }
        }
    }
    let right = |r: &peft_limits::report::RowView| {
        ["planted", "null"]
            .iter()
            .all(|kind| r.f64(kind) > 0.0 && r.f64(&format!("{kind} right")) >= r.f64(kind))
    };
    Ok(vec![
        (
            "the exact oracle is right on every instance where the promise decides".into(),
            !exact.is_empty() && exact.rows().all(|r| right(&r)),
        ),
        (
            "no method that does not look at every pair decides nine in ten there with L^0.75 \
          columns"
                .into(),
            within,
        ),
        (
            format!(
                "at c = {} the columns with which such a method decides are at least L^0.5 and \
                 grow like L^0.5 or faster",
                SIDES[1]
            ),
            slow,
        ),
        (
            "where the promise decides, a gradient error of (ln L)^-4 turns fewer than one exact \
             answer in ten"
                .into(),
            sharp,
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_limits::report::Row;

    /// 100 planted and 100 null instances, and how many of each are right.
    fn row(kind: &str, size: f64, c: f64, family: &str, oracle: &str, right: [u64; 2]) -> Row {
        let row =
            Row::new().with("kind", kind).with("size", size).with("c", c).with("family", family);
        let mut row = row.with("oracle", oracle).with("guaranteed", c >= 2.5);
        for (i, kind) in ["planted", "null"].into_iter().enumerate() {
            row.set(kind, 100u64);
            row.set(format!("{kind} answered"), 100u64);
            row.set(format!("{kind} right"), right[i]);
        }
        row.with("operations / exact", 0.5)
    }

    /// An exact oracle that is right on `exact` of a hundred; a coreset that decides from `power`
    /// of L on, and in the budget on `cheap` of a hundred planted ones; exact answers that turn at
    /// `error`.
    fn made_up(exact: u64, cheap: u64, power: f64, error: f64) -> Table {
        let mut table = Table::default();
        for (oracle, _) in ORACLES {
            for c in RATIOS {
                let sure = if c >= 2.5 { [exact, exact] } else { [100, 20] };
                for size in [128.0, 1024.0] {
                    let mut row = row(EXACT, size, c, EXACT, oracle, sure);
                    TURNS.iter().for_each(|t| row.set(*t, error));
                    table.push(&row);
                }
                table.push(&row("budget", 1024.0, c, EXACT, oracle, sure).with("budget", 0.75));
                let coreset = row("budget", 1024.0, c, "nystrom", oracle, [cheap, 95]);
                table.push(&coreset.with("budget", 0.75).with("columns k", 304u64));
            }
            for size in [128.0f64, 256.0, 512.0] {
                for k in [4.0, 16.0, 64.0, 256.0, 1024.0] {
                    let enough = k >= (2.0 * size).powf(power);
                    let row = row(
                        "ladder",
                        size,
                        SIDES[1],
                        "nystrom",
                        oracle,
                        [if enough { 95 } else { 30 }, 100],
                    );
                    table.push(&row.with("columns k", k));
                }
            }
        }
        table
    }

    #[test]
    fn made_up_data_refute_what_they_should() {
        let outcome =
            |table: Table| checks(&table).unwrap().iter().map(|c| c.1).collect::<Vec<_>>();
        assert_eq!(outcome(made_up(100, 30, 0.9, 0.2)), [true; 4]);
        // One wrong answer of an exact oracle; a coreset that decides within its budget; with few
        // columns; exact answers that a small error turns.
        assert_eq!(outcome(made_up(99, 30, 0.9, 0.2)), [false, true, true, true]);
        assert_eq!(outcome(made_up(100, 92, 0.9, 0.2)), [true, false, true, true]);
        assert_eq!(outcome(made_up(100, 30, 0.2, 0.2)), [true, true, false, true]);
        assert_eq!(outcome(made_up(100, 30, 0.9, 1e-5)), [true, true, true, false]);
        assert!(!outcome(made_up(100, 30, 0.9, f64::NAN))[3]);
    }

    #[test]
    fn a_constant_answer_decides_nothing() {
        let table = Table::from_rows(&[row("budget", 64.0, 3.0, "fitted", "output", [100, 0])]);
        let answers = Answers::of(&table).unwrap();
        assert!(
            answers.constant()
                && answers.worse_side() <= 0.0
                && (answers.share().unwrap().0 - 0.5).abs() < 1e-12
        );
        assert!(
            in_words(&table, "fitted", 2.5)
                .unwrap()
                .contains("50% right by the same answer to every instance")
        );
    }

    #[test]
    fn the_smallest_k_is_the_one_from_which_all_decide() {
        let ladder = |shares: &[(u64, u64)]| {
            let rows: Vec<Row> = shares
                .iter()
                .map(|&(k, right)| {
                    row("ladder", 64.0, 3.5, "nystrom", "output", [right, 100]).with("columns k", k)
                })
                .collect();
            smallest(&Table::from_rows(&rows)).unwrap()
        };
        assert_eq!(ladder(&[(8, 80), (32, 100)]), Some(16.0));
        assert_eq!(ladder(&[(8, 95), (32, 100)]), Some(8.0));
        assert_eq!(ladder(&[(8, 95), (32, 50), (64, 90)]), Some(64.0));
        assert_eq!(ladder(&[(8, 95), (32, 50)]), None);
    }
}
