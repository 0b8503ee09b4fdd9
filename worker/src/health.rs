//! Whether a device can be trusted, and when to try it. Pure: time comes in as a number, what to do goes out.
//!
//! A device that works proves itself by working. One that has been idle for a while is given a tiny inference with a known
//! result, a canary; if that fails or doesn't answer, the device is fenced until one succeeds. A device that was lost, or
//! whose thread was given up with a call that ran too long, stays fenced: nothing but a new process helps it.
use std::time::Duration;

/// How long a device is idle, or fenced, before it is tried, in ms.
pub const CANARY_INTERVAL_MS: u64 = 5_000;
/// How long a canary may take before the device is fenced, in ms. Far above what it takes: another process may have the
/// device or the machine to itself for a while.
pub const CANARY_LIMIT_MS: u64 = 5_000;

/// What a device is known to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulse {
    /// When it was last seen at work, tried or new.
    active_at_ms: u64,
    busy_total_us: u64,
    canary_since_ms: Option<u64>,
    fence: Fence,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Fence {
    Open,
    UntilCanary(String),
    ForGood(String),
}

/// What to do about a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Rest,
    /// Send a canary, and tell [`Pulse::sang`] what came of it.
    SendCanary,
}

impl Pulse {
    /// A device that is trusted.
    pub fn new(now_ms: u64) -> Self {
        Self { active_at_ms: now_ms, busy_total_us: 0, canary_since_ms: None, fence: Fence::Open }
    }

    /// Looks at a device: whether one of its threads is at work, and how long they have worked together.
    pub fn look(&mut self, now_ms: u64, is_busy: bool, busy_total_us: u64) -> Next {
        let worked = is_busy || busy_total_us != self.busy_total_us;
        self.busy_total_us = busy_total_us;
        if let Some(since_ms) = self.canary_since_ms {
            if now_ms.saturating_sub(since_ms) >= CANARY_LIMIT_MS && self.fence == Fence::Open {
                self.fence = Fence::UntilCanary(format!("a canary inference has had no answer for {CANARY_LIMIT_MS} ms"));
            }
            return Next::Rest;
        }
        // Work doesn't prove that a fenced device is well again.
        if worked && self.fence == Fence::Open {
            self.active_at_ms = now_ms;
        }
        let is_due = now_ms.saturating_sub(self.active_at_ms) >= CANARY_INTERVAL_MS;
        if !is_due || matches!(self.fence, Fence::ForGood(_)) {
            return Next::Rest;
        }
        self.canary_since_ms = Some(now_ms);
        Next::SendCanary
    }

    /// What came of a canary.
    pub fn sang(&mut self, now_ms: u64, result: Result<(), String>) {
        self.canary_since_ms = None;
        self.active_at_ms = now_ms;
        match (result, &self.fence) {
            (_, Fence::ForGood(_)) => {}
            (Ok(()), _) => self.fence = Fence::Open,
            (Err(why), _) => self.fence = Fence::UntilCanary(format!("a canary inference failed: {why}")),
        }
    }

    /// The device is lost to this process. The first reason stays.
    pub fn lose(&mut self, why: String) {
        if !self.is_lost() {
            self.fence = Fence::ForGood(why);
        }
    }

    /// Whether only a new process can use the device again.
    pub fn is_lost(&self) -> bool {
        matches!(self.fence, Fence::ForGood(_))
    }

    /// Why the device is fenced, if it is.
    pub fn fenced(&self) -> Option<&str> {
        match &self.fence {
            Fence::Open => None,
            Fence::UntilCanary(why) | Fence::ForGood(why) => Some(why),
        }
    }
}

/// Why a call that has been running for so long is given up, if it is.
pub fn overrun(model: &str, running: Option<Duration>, limit: Option<Duration>) -> Option<String> {
    let limit = limit.filter(|limit| running.is_some_and(|running| running > *limit))?;
    Some(format!("a call of model '{model}' ran longer than its max_execution_ms, which is {}", limit.as_millis()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_device_is_tried_and_a_busy_one_is_not() {
        let mut pulse = Pulse::new(0);
        assert_eq!(pulse.look(4_999, false, 0), Next::Rest);
        assert_eq!(pulse.look(5_000, true, 0), Next::Rest, "it is at work");
        assert_eq!(pulse.look(9_000, false, 70), Next::Rest, "it was at work since");
        assert_eq!(pulse.look(13_999, false, 70), Next::Rest);
        assert_eq!(pulse.look(14_000, false, 70), Next::SendCanary);
        assert_eq!(pulse.look(14_050, false, 70), Next::Rest, "one at a time");
        pulse.sang(14_060, Ok(()));
        assert_eq!(pulse.fenced(), None);
        assert_eq!(pulse.look(19_059, false, 75), Next::Rest, "the canary was work");
        assert_eq!(pulse.look(24_059, false, 75), Next::SendCanary);
    }

    #[test]
    fn a_failed_canary_fences_until_one_succeeds() {
        let mut pulse = Pulse::new(0);
        assert_eq!(pulse.look(5_000, false, 0), Next::SendCanary);
        pulse.sang(5_001, Err("wrong".into()));
        assert_eq!(pulse.fenced(), Some("a canary inference failed: wrong"));
        assert_eq!(pulse.look(10_001, true, 9), Next::SendCanary, "work is no proof any more");
        pulse.sang(10_002, Ok(()));
        assert_eq!(pulse.fenced(), None);
    }

    #[test]
    fn a_canary_without_an_answer_fences_and_a_late_one_lifts_it() {
        let mut pulse = Pulse::new(0);
        assert_eq!(pulse.look(5_000, false, 0), Next::SendCanary);
        pulse.look(9_999, true, 0);
        assert_eq!(pulse.fenced(), None);
        pulse.look(10_000, true, 0);
        assert_eq!(pulse.fenced(), Some("a canary inference has had no answer for 5000 ms"));
        pulse.sang(12_000, Ok(()));
        assert_eq!(pulse.fenced(), None);
    }

    #[test]
    fn a_lost_device_stays_fenced_for_its_first_reason() {
        let mut pulse = Pulse::new(0);
        assert_eq!(pulse.look(5_000, false, 0), Next::SendCanary);
        pulse.lose("gone".into());
        pulse.lose("gone again".into());
        pulse.sang(5_001, Ok(()));
        assert_eq!((pulse.fenced(), pulse.is_lost()), (Some("gone"), true));
        assert_eq!(pulse.look(60_000, false, 0), Next::Rest);
    }

    #[test]
    fn only_a_call_over_its_limit_is_given_up() {
        let ms = Duration::from_millis;
        assert_eq!(overrun("m", Some(ms(900)), None), None);
        assert_eq!(overrun("m", None, Some(ms(1))), None);
        assert_eq!(overrun("m", Some(ms(500)), Some(ms(500))), None);
        let why = overrun("m", Some(ms(501)), Some(ms(500))).unwrap();
        assert_eq!(why, "a call of model 'm' ran longer than its max_execution_ms, which is 500");
    }
}
