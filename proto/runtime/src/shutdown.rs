//! How a process ends: on a signal, with its parent, or because a part of it failed.
use nix::{
    sys::{prctl, signal::Signal},
    unistd::getppid,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Why the process can't watch for its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("can't watch for signals: {0}")]
    Signals(#[from] std::io::Error),
    /// The parent is gone already, or isn't the one that was named.
    #[error("the parent process {0} is not there any more")]
    Orphan(i32),
    /// The kernel refused to tie this process to its parent.
    #[error("can't ask to die with the parent process: {0}")]
    Parent(nix::Error),
}

/// A token that is cancelled by the first SIGTERM or SIGINT. A second one ends the process at once, with exit code 1.
///
/// # Errors
/// [`Error::Signals`].
pub fn on_signal() -> Result<CancellationToken, Error> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = CancellationToken::new();
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("asked to stop");
        cancel.cancel();
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        std::process::exit(1);
    });
    Ok(token)
}

/// Ties this process's life to its parent's: when the parent dies, however it dies, the kernel kills this process too.
///
/// # Errors
/// [`Error::Orphan`] if `parent` isn't this process's parent (it died before this call), [`Error::Parent`] otherwise.
pub fn with_parent(parent: i32) -> Result<(), Error> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(Error::Parent)?;
    // The signal is sent only for a death that comes after the call above.
    if getppid().as_raw() == parent { Ok(()) } else { Err(Error::Orphan(parent)) }
}
