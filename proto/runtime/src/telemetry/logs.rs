//! What goes into the log: the filter that the process was started with, and switches over it that change at run time.
//!
//! The switches are atomics and not a lock, since the filter is asked at every span of every request.
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
};

use tracing::{
    Level, Metadata, Subscriber,
    level_filters::LevelFilter,
    span::{Attributes, Id, Record},
    subscriber::Interest,
};
use tracing_subscriber::{
    EnvFilter,
    layer::{Context, Filter},
};

/// Levels of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLevels {
    /// What has to be mended.
    pub error: bool,
    /// What should be looked at.
    pub warning: bool,
    /// What happens.
    pub info: bool,
    /// 1 for debug, 2 and above for everything.
    pub verbose: u32,
}

impl LogLevels {
    fn up_to(hint: LevelFilter) -> Self {
        let verbose = if hint >= LevelFilter::TRACE { 2 } else { u32::from(hint >= LevelFilter::DEBUG) };
        Self { error: hint >= LevelFilter::ERROR, warning: hint >= LevelFilter::WARN, info: hint >= LevelFilter::INFO, verbose }
    }

    fn has(self, level: Level) -> bool {
        match level {
            Level::ERROR => self.error,
            Level::WARN => self.warning,
            Level::INFO => self.info,
            Level::DEBUG => self.verbose >= 1,
            Level::TRACE => self.verbose >= 2,
        }
    }

    fn highest(self) -> LevelFilter {
        let levels = [Level::TRACE, Level::DEBUG, Level::INFO, Level::WARN, Level::ERROR];
        levels.into_iter().find(|level| self.has(*level)).map_or(LevelFilter::OFF, LevelFilter::from_level)
    }
}

/// The levels in force. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Switches(Arc<Flags>);

#[derive(Debug)]
struct Flags {
    error: AtomicBool,
    warning: AtomicBool,
    info: AtomicBool,
    verbose: AtomicU32,
}

impl Switches {
    fn new(start: LogLevels) -> Self {
        let LogLevels { error, warning, info, verbose } = start;
        let flags = Flags { error: error.into(), warning: warning.into(), info: info.into(), verbose: verbose.into() };
        Self(Arc::new(flags))
    }

    pub(super) fn now(&self) -> LogLevels {
        LogLevels {
            error: self.0.error.load(Relaxed),
            warning: self.0.warning.load(Relaxed),
            info: self.0.info.load(Relaxed),
            verbose: self.0.verbose.load(Relaxed),
        }
    }

    pub(super) fn set(&self, levels: LogLevels) {
        self.0.error.store(levels.error, Relaxed);
        self.0.warning.store(levels.warning, Relaxed);
        self.0.info.store(levels.info, Relaxed);
        self.0.verbose.store(levels.verbose, Relaxed);
        // Call sites remember what the filter said of them.
        tracing::callsite::rebuild_interest_cache();
    }
}

/// The filter of the log.
#[derive(Debug)]
pub(super) struct LogFilter {
    base: EnvFilter,
    start: LogLevels,
    switches: Switches,
}

impl LogFilter {
    /// What `base` lets through, until the switches change.
    pub(super) fn new(base: EnvFilter) -> (Self, Switches) {
        let start = LogLevels::up_to(base.max_level_hint().unwrap_or(LevelFilter::TRACE));
        let switches = Switches::new(start);
        (Self { base, start, switches: switches.clone() }, switches)
    }

    /// Whether the switches let something through that the process wasn't started with. Only our own: what HTTP libraries
    /// say in detail would drown it.
    fn raised(&self, metadata: &Metadata<'_>) -> bool {
        let is_ours = metadata.target() == "cresset" || metadata.target().starts_with("cresset_");
        is_ours && !self.start.has(*metadata.level())
    }

    fn is_off(&self, metadata: &Metadata<'_>) -> bool {
        !self.switches.now().has(*metadata.level())
    }
}

impl<S: Subscriber> Filter<S> for LogFilter {
    fn enabled(&self, metadata: &Metadata<'_>, context: &Context<'_, S>) -> bool {
        !self.is_off(metadata) && (self.raised(metadata) || Filter::enabled(&self.base, metadata, context))
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        // Asked in any case: it takes note of the call sites that its directives speak of.
        let base = Filter::<S>::callsite_enabled(&self.base, metadata);
        if self.is_off(metadata) {
            Interest::never()
        } else if self.raised(metadata) {
            Interest::always()
        } else {
            base
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.switches.now().highest())
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        Filter::on_new_span(&self.base, attributes, id, context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        Filter::on_record(&self.base, id, values, context);
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        Filter::on_enter(&self.base, id, context);
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        Filter::on_exit(&self.base, id, context);
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        Filter::on_close(&self.base, id, context);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use parking_lot::Mutex;
    use tracing_subscriber::{Layer as _, fmt::MakeWriter, layer::SubscriberExt};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Lines {
        type Writer = Lines;

        fn make_writer(&'a self) -> Lines {
            self.clone()
        }
    }

    /// Says a word at each level, for us and for a library, and returns those that were written.
    fn said(lines: &Lines) -> String {
        lines.0.lock().clear();
        tracing::error!(target: "cresset_x", "E");
        tracing::warn!(target: "cresset_x", "W");
        tracing::info!(target: "cresset_x", "I");
        tracing::debug!(target: "cresset_x", "D");
        tracing::trace!(target: "cresset_x", "T");
        tracing::info!(target: "h2", "i");
        tracing::debug!(target: "h2", "d");
        let text = String::from_utf8(lines.0.lock().clone()).unwrap();
        text.lines().filter_map(|line| line.chars().last()).collect()
    }

    #[test]
    fn levels_are_switched_while_the_process_runs() {
        let lines = Lines::default();
        let (filter, switches) = LogFilter::new(EnvFilter::new("info"));
        let logs = tracing_subscriber::fmt::layer().with_writer(lines.clone()).with_ansi(false).with_filter(filter);
        let start = LogLevels { error: true, warning: true, info: true, verbose: 0 };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(logs), || {
            assert_eq!((switches.now(), said(&lines)), (start, "EWIi".into()));
            switches.set(LogLevels { verbose: 1, ..start });
            assert_eq!(said(&lines), "EWIDi", "details are ours alone");
            switches.set(LogLevels { verbose: 7, ..start });
            assert_eq!(said(&lines), "EWIDTi");
            switches.set(LogLevels { info: false, ..start });
            assert_eq!(said(&lines), "EW");
            switches.set(LogLevels { warning: false, error: false, ..start });
            assert_eq!(said(&lines), "Ii", "each switch is its own");
            switches.set(start);
            assert_eq!(said(&lines), "EWIi");
        });
    }

    #[test]
    fn what_the_process_was_started_with_stays_in_force() {
        let lines = Lines::default();
        let (filter, switches) = LogFilter::new(EnvFilter::new("error,cresset_x=warn,h2=debug"));
        let logs = tracing_subscriber::fmt::layer().with_writer(lines.clone()).with_ansi(false).with_filter(filter);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(logs), || {
            assert_eq!(said(&lines), "EWid");
            assert_eq!(switches.now(), LogLevels { error: true, warning: true, info: true, verbose: 1 });
            switches.set(LogLevels { verbose: 2, ..switches.now() });
            assert_eq!(said(&lines), "EWTid");
            switches.set(LogLevels { verbose: 0, ..switches.now() });
            assert_eq!(said(&lines), "EWi");
        });
    }
}
