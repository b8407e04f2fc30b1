//! What verbs print: tables and lines for people, JSON for programs. Nothing else writes to the terminal
//! but [`crate::progress`], which uses standard error.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{ContentArrangement, Table, TableStyle};
use serde::Serialize;

/// Writes text to standard output. A reader that has gone (`forkd ls | head`) ends forkd quietly.
///
/// # Errors
/// Standard output can't be written.
pub fn print(text: &str) -> Result<()> {
    write_all(text.as_bytes())
}

/// Writes one line to standard output.
///
/// # Errors
/// As for [`print()`].
pub fn line(text: &str) -> Result<()> {
    write_all(format!("{text}\n").as_bytes())
}

/// Writes a value as JSON, indented, with a line end.
///
/// # Errors
/// As for [`print()`].
pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("cannot write the answer as JSON")?;
    line(&text)
}

/// Writes bytes to standard output and flushes it.
///
/// # Errors
/// As for [`print()`].
pub fn write_all(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        other => other.context("cannot write to standard output"),
    }
}

/// Writes bytes to standard error. That nobody reads it is no failure.
pub fn write_stderr(bytes: &[u8]) {
    let mut err = io::stderr().lock();
    // There is nobody left to tell.
    let _ = err.write_all(bytes).and_then(|()| err.flush());
}

/// Writes one line to standard error.
pub fn note(text: &str) {
    write_stderr(format!("{text}\n").as_bytes());
}

/// An error and its causes in one line. A cause that is part of what was said already is left out.
pub fn error_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    lines.join(" ")
}

/// Standard output was closed by its reader.
#[derive(Debug)]
pub struct ReaderGone;

impl std::fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the reader of standard output has gone")
    }
}

impl std::error::Error for ReaderGone {}

/// A plain table: a header, then rows.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(|h| h.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

/// A time with three significant digits: `1.23 ms`, `12.3 ms`, `4.56 s`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let (value, unit) = match seconds {
        s if s >= 100.0 => return format!("{s:.0} s"),
        s if s >= 0.9995 => (s, "s"),
        s if s >= 0.000_999_5 => (s * 1e3, "ms"),
        s => (s * 1e6, "us"),
    };
    match value {
        v if v >= 99.95 => format!("{v:.0} {unit}"),
        v if v >= 9.995 => format!("{v:.1} {unit}"),
        v => format!("{v:.2} {unit}"),
    }
}

/// The time between two marks of [`forkd_api::types::Timing`]; none if one was not reached.
pub fn between(from_ns: u64, to_ns: u64) -> Option<Duration> {
    (from_ns > 0 && to_ns >= from_ns).then(|| Duration::from_nanos(to_ns - from_ns))
}

/// A time, or a dash.
pub fn maybe_duration(time: Option<Duration>) -> String {
    time.map_or_else(|| "-".to_string(), duration)
}

/// How long ago, coarsely: `7 s`, `3 min`, `2 h`, `5 d`.
pub fn age(created_unix_ms: u64) -> String {
    let now = forkd_sys::clock::realtime_ns() / 1_000_000;
    let seconds = now.saturating_sub(created_unix_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Bytes in MiB with one digit, or KiB below one MiB.
pub fn bytes(count: u64) -> String {
    if count < 1 << 20 {
        return format!("{} KiB", count.div_ceil(1024));
    }
    format!("{:.1} MiB", count as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_keep_three_digits() {
        let text = |ns| duration(Duration::from_nanos(ns));
        assert_eq!(text(1_234), "1.23 us");
        assert_eq!(text(12_345_678), "12.3 ms");
        assert_eq!(text(999_999), "1.00 ms");
        assert_eq!(text(123_000_000), "123 ms");
        assert_eq!(text(4_560_000_000), "4.56 s");
        assert_eq!(text(250_000_000_000), "250 s");
    }

    #[test]
    fn tables_are_plain_columns() {
        let text = table(&["id", "name"], [vec!["vm-1".into(), "web".into()]]);
        assert_eq!(text, "ID    NAME\nvm-1  web");
    }

    #[test]
    fn a_mark_that_was_not_reached_gives_no_time() {
        assert_eq!(between(0, 5), None);
        assert_eq!(between(5, 0), None);
        assert_eq!(between(5, 7), Some(Duration::from_nanos(2)));
    }

    #[test]
    fn errors_are_one_line_without_repetition() {
        let error = anyhow::anyhow!("closed")
            .context("cannot read: closed")
            .context("vm-1\n does\nnot answer");
        assert_eq!(error_line(&error), "vm-1 does not answer: cannot read: closed");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(bytes(1), "1 KiB");
        assert_eq!(bytes(3 << 19), "1.5 MiB");
    }
}
