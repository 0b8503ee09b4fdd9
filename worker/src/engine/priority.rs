//! How far a thread stands back for others.

/// How far work in the background stands back for requests: about a tenth of a core that both want.
const BACKGROUND_NICE: i32 = 10;

/// Has the calling thread stand back, with all threads that it starts. On other systems than Linux it may be the whole process
/// that does. Where it can't be had, everything works as well, and `what` is slower to give way.
pub fn stand_back(what: &str) {
    if let Err(error) = rustix::process::setpriority_process(None, BACKGROUND_NICE) {
        tracing::debug!(%error, "{what} doesn't stand back for requests");
    }
}
