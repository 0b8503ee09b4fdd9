//! The table that people read: each figure with its spread, its goal and its reference.

use std::fmt;

use comfy_table::{CellAlignment, Table, presets::NOTHING};

use super::figures::Part;

/// A goal: the figure may be at most or at least this.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    Most(f64),
    Least(f64),
    None,
}

/// The rows so far.
pub(crate) struct Rows(Table);

impl Rows {
    /// None yet.
    pub(crate) fn new() -> Self {
        let mut table = Table::new();
        table.load_preset(NOTHING).set_header(["FIGURE", "MEDIAN", "SPREAD", "GOAL", "REFERENCE"]);
        Self(table)
    }

    /// One figure of a part, if it was measured.
    pub(crate) fn row(&mut self, words: &str, part: &Part, name: &str, digits: usize, goal: Goal, reference: &str) {
        let Some((middle, (low, high))) = part.median(name).zip(part.spread(name)) else { return };
        let goal = match goal {
            Goal::Most(most) => format!("≤ {most}{}", if middle <= most { "" } else { "  missed" }),
            Goal::Least(least) => format!("≥ {least}{}", if middle >= least { "" } else { "  missed" }),
            Goal::None => String::new(),
        };
        let spread = if part.rounds(name).len() > 1 { format!("{low:.digits$} … {high:.digits$}") } else { String::new() };
        self.0.add_row([words.to_owned(), format!("{middle:.digits$}"), spread, goal, reference.to_owned()]);
    }
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = self.0.clone();
        for (number, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            column.set_cell_alignment(if (1..=2).contains(&number) { CellAlignment::Right } else { CellAlignment::Left });
        }
        f.write_str(&table.trim_fmt())
    }
}

/// A figure in words.
pub(crate) fn word(part: &Part, name: &str, digits: usize) -> String {
    part.median(name).map_or("?".to_owned(), |value| format!("{value:.digits$}"))
}
