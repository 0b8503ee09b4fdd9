//! What the command line prints: tables for people, JSON for programs.
use std::{
    io::{self, Write},
    time::Duration,
};

use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Aligned columns with human units.
    Table,
    /// A stable contract with raw numbers.
    Json,
}

impl Format {
    /// Reads the word.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "table" => Ok(Self::Table),
            "json" => Ok(Self::Json),
            _ => Err("must be table or json".to_owned()),
        }
    }
}

/// Prints text to stdout; `print!` would panic where the reader has gone.
///
/// # Errors
/// When stdout can't be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        stdout.write_all(b"\n")?;
    }
    stdout.flush()
}

/// Prints indented JSON to stdout.
///
/// # Errors
/// When stdout can't be written.
pub fn print_json(value: &impl Serialize) -> io::Result<()> {
    print(&serde_json::to_string_pretty(value).map_err(io::Error::other)?)
}

/// Columns under upper-case headers, two spaces apart, without lines.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(header.iter().copied()).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt() + "\n"
}

/// `1536` as `1.5 KiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A time in milliseconds since 1970, as it is written in HTTP.
pub fn time(unix_ms: u64) -> String {
    // Later than the year 9999 can't be written so.
    httpdate::fmt_http_date(std::time::UNIX_EPOCH + Duration::from_millis(unix_ms.min(250_000_000_000_000)))
}

/// A duration with one digit behind the point where that says something.
pub fn seconds(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

/// Text from elsewhere, on one line and without terminal codes.
pub fn one_line(text: &str) -> String {
    const LINE_CHARS_MAX: usize = 600;
    let plain = console::strip_ansi_codes(text);
    let line: String = plain.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LINE_CHARS_MAX).collect();
    line.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_human() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(seconds(Duration::from_millis(70)), "70 ms");
        assert_eq!(seconds(Duration::from_millis(3250)), "3.2 s");
    }

    #[test]
    fn tables_are_aligned_and_have_no_trailing_space() {
        let text = table(&["A", "LONGER"], vec![vec!["x".into(), "1".into()], vec!["yyyy".into(), "2".into()]]);
        assert_eq!(text, "A     LONGER\nx     1\nyyyy  2\n");
    }

    #[test]
    fn foreign_text_cannot_move_the_cursor() {
        assert_eq!(one_line("a\u{1b}[2Jb\r\nc"), "ab  c");
    }
}
