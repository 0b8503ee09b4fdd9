//! The raft library logs through `slog`; the rest of the process through `tracing`.
use std::fmt::{self, Write as _};

use slog::{Drain, KV as _, Key, Level, Logger, Never, OwnedKVList, Record, Serializer, o};

struct Tracing;

/// A logger for the library. What it calls information is for debugging: role changes are logged by the driver.
pub(super) fn logger() -> Logger {
    Logger::root(Tracing, o!())
}

/// A logger that says nothing, for a [`Node`](super::Node) in a simulation: millions of its messages would interest nobody.
pub fn silent() -> Logger {
    Logger::root(slog::Discard, o!())
}

impl Drain for Tracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        let warns = record.level().is_at_least(Level::Warning);
        if !warns && !tracing::enabled!(target: "raft", tracing::Level::DEBUG) {
            return Ok(());
        }
        let mut text = Text(record.msg().to_string());
        // Writing to a string doesn't fail.
        let _ = record.kv().serialize(record, &mut text);
        let _ = values.serialize(record, &mut text);
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", "{}", text.0),
            Level::Warning => tracing::warn!(target: "raft", "{}", text.0),
            Level::Info => tracing::debug!(target: "raft", "{}", text.0),
            Level::Debug | Level::Trace => tracing::trace!(target: "raft", "{}", text.0),
        }
        Ok(())
    }

    fn is_enabled(&self, level: Level) -> bool {
        level.is_at_least(Level::Info) || tracing::enabled!(target: "raft", tracing::Level::TRACE)
    }
}

struct Text(String);

impl Serializer for Text {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}").map_err(|_| slog::Error::Other)
    }
}
