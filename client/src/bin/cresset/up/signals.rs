//! The signals that end `cresset up`.
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT, SIGTERM and SIGHUP as one.
pub enum Signals {
    /// Those of this process.
    Process([Signal; 3]),
    /// None, ever.
    #[cfg(test)]
    Never,
    /// One without waiting.
    #[cfg(test)]
    AtOnce,
}

impl Signals {
    /// From here on these signals don't end the process by themselves.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn install() -> io::Result<Self> {
        Ok(Self::Process([signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?]))
    }

    /// Waits for the next signal. Safe to drop and to call again.
    pub async fn next(&mut self) {
        match self {
            Self::Process([interrupt, terminate, hangup]) => {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
            }
            #[cfg(test)]
            Self::Never => std::future::pending().await,
            #[cfg(test)]
            Self::AtOnce => {}
        }
    }

    /// Waits for the next Ctrl-C. Other signals don't count: a supervisor may well send SIGTERM twice.
    pub async fn next_interrupt(&mut self) {
        match self {
            Self::Process([interrupt, _, _]) => drop(interrupt.recv().await),
            #[cfg(test)]
            Self::Never => std::future::pending().await,
            #[cfg(test)]
            Self::AtOnce => {}
        }
    }

    /// For tests: no signal.
    #[cfg(test)]
    pub fn never() -> Self {
        Self::Never
    }

    /// For tests: a signal at every call.
    #[cfg(test)]
    pub fn at_once() -> Self {
        Self::AtOnce
    }
}
