//! A timer that is exact to some µs: tokio's own ticks once a millisecond, which is longer than many answers take.

use std::{io, os::fd::AsFd, time::Duration};

use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use tokio::net::unix::pipe::Receiver;

/// One alarm at a time.
#[derive(Debug)]
pub struct Timer {
    fd: TimerFd,
    /// The same timer, waited for. It is read like a pipe: eight bytes when it has gone off, and none before.
    alarm: Receiver,
    /// What it is set to.
    set_ns: Option<u64>,
}

impl Timer {
    /// A timer of this thread's runtime.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> io::Result<Self> {
        let fd = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let alarm = Receiver::from_owned_fd_unchecked(fd.as_fd().try_clone_to_owned()?)?;
        Ok(Self { fd, alarm, set_ns: None })
    }

    /// Waits until `at_ns`, given that it is `now_ns`. May be dropped and called again.
    ///
    /// # Errors
    /// The system's.
    pub async fn until(&mut self, at_ns: u64, now_ns: u64) -> io::Result<()> {
        if self.set_ns != Some(at_ns) {
            // Zero would switch it off. Setting it again takes back an alarm that nobody has read.
            let wait = Duration::from_nanos(at_ns.saturating_sub(now_ns).max(1));
            self.fd.set(Expiration::OneShot(TimeSpec::from_duration(wait)), TimerSetTimeFlags::empty())?;
            self.set_ns = Some(at_ns);
        }
        loop {
            self.alarm.readable().await?;
            match self.alarm.try_read(&mut [0; 8]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => {
                    self.set_ns = None;
                    return read.map(drop);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn it_is_never_early_and_can_be_dropped_half_way() {
        let mut timer = Timer::new().unwrap();
        let begun = Instant::now();
        let now = |begun: Instant| begun.elapsed().as_nanos() as u64;
        for at_ns in [300_000, 400_000, 5_000_000] {
            timer.until(at_ns, now(begun)).await.unwrap();
            assert!(now(begun) >= at_ns);
        }
        {
            let given_up = timer.until(60_000_000_000, now(begun));
            assert!(tokio::time::timeout(Duration::from_millis(1), given_up).await.is_err());
        }
        timer.until(10_000_000, now(begun)).await.unwrap();
        assert!((10_000_000..30_000_000_000).contains(&now(begun)), "the later alarm was taken back");
    }
}
