//! What local processes cost: CPU time and memory, as the system counts them.

use std::{fs, io};

use nix::unistd::{SysconfVar, sysconf};

/// What one process has used so far, and holds now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// User and system time of all its threads, in seconds.
    pub cpu_seconds: f64,
    /// Resident memory in bytes.
    pub rss_bytes: u64,
}

/// A process can't be asked.
#[derive(Debug, thiserror::Error)]
#[error("process {pid} can't be watched: {}", crate::settings::plain(source))]
pub struct ProcessError {
    pid: u32,
    source: io::Error,
}

/// Asks for a process of this machine.
///
/// # Errors
/// [`ProcessError`] if it is gone.
pub fn usage(pid: u32) -> Result<Usage, ProcessError> {
    let failed = |source| ProcessError { pid, source };
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).map_err(failed);
    let odd = || failed(io::Error::other("the system's words about it are not understood"));
    let ticks = cpu_ticks(&read("stat")?).ok_or_else(odd)?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().filter(|ticks| *ticks > 0).ok_or_else(odd)?;
    let rss_bytes = rss_bytes(&read("status")?).ok_or_else(odd)?;
    Ok(Usage { cpu_seconds: ticks as f64 / per_second as f64, rss_bytes })
}

/// `utime` and `stime` of `/proc/PID/stat`, the fields 14 and 15. The second one, the program's name, may hold spaces and
/// brackets, so they are counted from its end.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

fn rss_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_time_and_memory() {
        let before = usage(std::process::id()).unwrap();
        let mut sum = 0u64;
        let begun = std::time::Instant::now();
        while usage(std::process::id()).unwrap().cpu_seconds <= before.cpu_seconds {
            (0..100_000u64).for_each(|number| sum = sum.wrapping_add(std::hint::black_box(number)));
            assert!(begun.elapsed().as_secs() < 30, "no tick in 30 s");
        }
        assert!(before.rss_bytes > 1 << 20 && sum > 0);
    }

    #[test]
    fn names_with_brackets_do_not_shift_the_fields() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 6 7 20 0 1 0 99";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("7 (a"), None);
        assert_eq!(rss_bytes("Name:\tx\nVmRSS:\t    2048 kB\n"), Some(2 << 20));
    }

    #[test]
    fn a_process_that_is_gone_is_named() {
        let error = usage(u32::MAX).unwrap_err().to_string();
        assert!(error.starts_with("process 4294967295 can't be watched: no such file"), "{error}");
    }
}
