//! When a router takes a replica out, and when it comes back.
//!
//! Pure: what is seen of one replica comes in as events, with what its siblings do; a verdict goes out. Nothing here sends
//! anything or knows the time.
//!
//! A request that is unanswered for longer than is usual for its model ([`patience_ms`]) makes the replica suspect, and it is asked
//! whether it lives. One that doesn't answer that either (stopped, cut off, half a connection) is out at once. One that answers
//! is slow: out when it happens again and again while its siblings answer the same kind of requests in time. So a model that is slow
//! everywhere, or by nature, costs nobody his place. Failures in a row and a device that failed its canary take a replica out too.
//!
//! Whoever is out is asked again after a pause that grows, then tried with one request at a time, and is back when that one is
//! answered in time. At most half of the replicas of a model are out at once, but for those that don't answer at all.
use cresset_proto::reason::Reason;
use tonic::Code;

use crate::retry::Failure;

/// No request is suspicious before this, however quick its model.
const PATIENCE_MS_MIN: f32 = 250.0;
/// Of a model that nothing is known of yet.
const PATIENCE_MS_UNKNOWN: u64 = 1_000;
/// Failures in a row that are too many.
const FAILURES_MAX: u32 = 3;
/// Requests in a row that were suspicious, of a replica that lives, that are too many.
const OVERDUE_MAX: u32 = 3;
/// The first pause before one that is out is asked whether it lives.
const PAUSE_MS_MIN: u64 = 200;
/// The longest.
const PAUSE_MS_MAX: u64 = 5_000;
/// Whoever was back for so long is no longer known for having been out.
const FORGOTTEN_AFTER_MS: u64 = 30_000;

/// Why a replica was taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It doesn't answer, not even whether it lives.
    Silence,
    /// It lives, and is far slower than its siblings.
    Slow,
    /// It failed several times in a row.
    Failures,
    /// It says that its device can't be trusted.
    Canary,
}

impl Cause {
    /// In one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Silence => "silence",
            Self::Slow => "slow",
            Self::Failures => "failures",
            Self::Canary => "canary",
        }
    }
}

/// What a replica may be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Whatever comes.
    #[default]
    Serving,
    /// Nothing, unless nobody else is left.
    Out(Cause),
    /// One request at a time, to see how it goes.
    OnTrial,
}

/// What was seen of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It answered in time.
    Answered,
    /// It failed, and the request can't be to blame alone.
    Failed,
    /// It says that its device can't be trusted.
    Unhealthy,
    /// A request is unanswered for longer than usual. `others_answer`: its siblings answered in the meantime.
    Overdue {
        /// Whether it is this replica alone.
        others_answer: bool,
    },
    /// It was asked whether it lives, and answered or didn't.
    Asked {
        /// In time.
        answered: bool,
    },
}

/// The replicas beside it: of the model that has the fewest left, out of those that the worker serves beside others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peers {
    /// All of them, this one included.
    pub replicas: usize,
    /// Others that are out.
    pub out: usize,
}

impl Peers {
    /// Whether one more may go.
    fn may_lose_one(self) -> bool {
        2 * (self.out + 1) <= self.replicas
    }

    /// The one that can do less without.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        let left = |peers: Self| (peers.out + 1) * 1_000 / peers.replicas.max(1);
        if left(other) > left(self) { other } else { self }
    }
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Nothing,
    /// Ask it whether it lives.
    Ask,
    /// It is out: what it has may move. Ask it after the pause.
    Eject {
        /// Why.
        cause: Cause,
        /// How long it is left alone.
        pause_ms: u64,
    },
    /// It stays out. Ask it again after the pause.
    AskLater {
        /// How long it is left alone.
        pause_ms: u64,
    },
    /// It may have one request at a time.
    Try,
    /// It may have whatever comes.
    Restore,
}

/// What is held against one replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    phase: Phase,
    /// In a row.
    failures: u32,
    /// In a row, each while its siblings answered.
    overdue: u32,
    /// Somebody asks whether it lives.
    is_asked: bool,
    /// How often it was out or stayed out, without a good time in between.
    pauses: u32,
    restored_ms: u64,
}

impl Standing {
    /// What it may be given.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether an answer would change nothing.
    pub fn is_spotless(&self) -> bool {
        self.phase == Phase::Serving && self.failures == 0 && self.overdue == 0
    }

    /// Takes note of an event. `jitter` from 0 to 1 keeps routers from asking together.
    pub fn on(&mut self, event: Event, peers: Peers, now_ms: u64, jitter: f32) -> Verdict {
        let eject = |this: &mut Self, cause| {
            this.eject(cause, now_ms);
            Verdict::Eject { cause, pause_ms: pause_ms(this.pauses, jitter) }
        };
        match (self.phase, event) {
            (Phase::Serving, Event::Answered) => {
                (self.failures, self.overdue) = (0, 0);
                Verdict::Nothing
            }
            (Phase::Serving, Event::Failed) => {
                self.failures += 1;
                match self.failures >= FAILURES_MAX {
                    true if peers.may_lose_one() => eject(self, Cause::Failures),
                    // Then it has to be gone for good to be left.
                    true => self.ask(),
                    false => Verdict::Nothing,
                }
            }
            (Phase::Serving, Event::Unhealthy) if peers.may_lose_one() => eject(self, Cause::Canary),
            // Many requests are overdue together; until it has answered they count once.
            (Phase::Serving, Event::Overdue { .. }) if self.is_asked => Verdict::Nothing,
            (Phase::Serving, Event::Overdue { others_answer }) => {
                self.overdue += u32::from(others_answer);
                if self.overdue >= OVERDUE_MAX && peers.may_lose_one() { eject(self, Cause::Slow) } else { self.ask() }
            }
            (Phase::OnTrial, Event::Answered) => {
                *self = Self { restored_ms: now_ms, pauses: self.pauses, ..Self::default() };
                Verdict::Restore
            }
            (Phase::OnTrial, Event::Failed) => eject(self, Cause::Failures),
            (Phase::OnTrial, Event::Unhealthy) => eject(self, Cause::Canary),
            (Phase::OnTrial, Event::Overdue { others_answer: true }) => eject(self, Cause::Slow),
            (Phase::OnTrial, Event::Overdue { others_answer: false }) => self.ask(),
            (Phase::Serving | Phase::OnTrial, Event::Asked { answered }) => {
                self.is_asked = false;
                if answered { Verdict::Nothing } else { eject(self, Cause::Silence) }
            }
            (Phase::Out(_), Event::Asked { answered: true }) => {
                self.phase = Phase::OnTrial;
                Verdict::Try
            }
            (Phase::Out(_), Event::Asked { answered: false }) => {
                self.pauses = self.pauses.saturating_add(1);
                Verdict::AskLater { pause_ms: pause_ms(self.pauses, jitter) }
            }
            (Phase::Serving, Event::Unhealthy) | (Phase::Out(_), _) => Verdict::Nothing,
        }
    }

    fn ask(&mut self) -> Verdict {
        if std::mem::replace(&mut self.is_asked, true) { Verdict::Nothing } else { Verdict::Ask }
    }

    fn eject(&mut self, cause: Cause, now_ms: u64) {
        let is_forgotten = self.phase == Phase::Serving && now_ms.saturating_sub(self.restored_ms) >= FORGOTTEN_AFTER_MS;
        let pauses = if is_forgotten { 1 } else { self.pauses.saturating_add(1) };
        *self = Self { phase: Phase::Out(cause), pauses, restored_ms: self.restored_ms, ..Self::default() };
    }
}

/// How long one that is out is left alone: doubled each time, and between half of that and all.
fn pause_ms(pauses: u32, jitter: f32) -> u64 {
    let whole = (PAUSE_MS_MIN << pauses.saturating_sub(1).min(16)).min(PAUSE_MS_MAX);
    whole / 2 + (whole as f32 / 2.0 * jitter.clamp(0.0, 1.0)) as u64
}

/// How long a request may be unanswered before it is suspicious: well beyond the mean of its model's answers from all replicas,
/// and beyond the longest of the last seconds. `None` when none has come yet.
pub fn patience_ms(usual_us: Option<f32>, longest_us: f32) -> u64 {
    match usual_us {
        Some(usual_us) => (3.0 * usual_us / 1e3).max(2.0 * longest_us / 1e3).max(PATIENCE_MS_MIN) as u64,
        None => PATIENCE_MS_UNKNOWN,
    }
}

/// What a failure says about the replica; `None` where the routes were out of date, the replica full, or the request wrong.
pub fn blame(failure: Failure) -> Option<Event> {
    match failure {
        Failure::Unreachable | Failure::Broken => Some(Event::Failed),
        Failure::Refused(Reason::DeviceUnhealthy) => Some(Event::Unhealthy),
        Failure::Refused(Reason::Suspect | Reason::Internal) => Some(Event::Failed),
        Failure::Coded(Code::Unavailable | Code::Unknown | Code::Cancelled) => Some(Event::Failed),
        Failure::Refused(_) | Failure::Coded(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const THREE: Peers = Peers { replicas: 3, out: 0 };
    const ALONE: Peers = Peers { replicas: 1, out: 0 };
    const SLOWER: Event = Event::Overdue { others_answer: true };
    const SLOW_LIKE_ALL: Event = Event::Overdue { others_answer: false };
    const ALIVE: Event = Event::Asked { answered: true };
    const SILENT: Event = Event::Asked { answered: false };

    fn verdicts(standing: &mut Standing, events: &[Event], peers: Peers) -> Vec<Verdict> {
        events.iter().map(|event| standing.on(*event, peers, 1_000, 1.0)).collect()
    }

    fn out(cause: Cause, pause_ms: u64) -> Verdict {
        Verdict::Eject { cause, pause_ms }
    }

    #[test]
    fn a_stopped_worker_is_out_at_its_first_overdue_request_and_back_after_one_good_one() {
        let mut standing = Standing::default();
        let events = [SLOW_LIKE_ALL, SLOW_LIKE_ALL, SILENT, SILENT, ALIVE, Event::Answered];
        let expected = [
            Verdict::Ask,
            Verdict::Nothing,
            out(Cause::Silence, 200),
            Verdict::AskLater { pause_ms: 400 },
            Verdict::Try,
            Verdict::Restore,
        ];
        assert_eq!(verdicts(&mut standing, &events, ALONE), expected);
        assert!(standing.is_spotless());
    }

    #[test]
    fn a_slow_one_is_out_only_if_its_siblings_are_not_slow_too() {
        let mut like_all = Standing::default();
        for _ in 0..10 {
            assert_eq!(verdicts(&mut like_all, &[SLOW_LIKE_ALL, ALIVE], THREE), [Verdict::Ask, Verdict::Nothing]);
        }
        let mut alone = Standing::default();
        assert_eq!(verdicts(&mut alone, &[SLOWER, ALIVE, SLOWER, ALIVE], THREE)[3], Verdict::Nothing);
        assert_eq!(alone.on(SLOWER, THREE, 0, 1.0), out(Cause::Slow, 200));
        // On trial it is judged by one request.
        assert_eq!(verdicts(&mut alone, &[ALIVE, SLOWER], THREE), [Verdict::Try, out(Cause::Slow, 400)]);
    }

    #[test]
    fn failures_count_in_a_row_and_a_failed_canary_at_once() {
        let mut standing = Standing::default();
        let events = [Event::Failed, Event::Failed, Event::Answered, Event::Failed, Event::Failed];
        assert!(verdicts(&mut standing, &events, THREE).iter().all(|verdict| *verdict == Verdict::Nothing));
        assert_eq!(standing.on(Event::Failed, THREE, 0, 1.0), out(Cause::Failures, 200));
        assert_eq!(Standing::default().on(Event::Unhealthy, THREE, 0, 0.0), out(Cause::Canary, 100));
    }

    #[test]
    fn no_more_than_half_go_unless_they_do_not_answer_at_all() {
        for (replicas, out, may) in [(1, 0, false), (2, 0, true), (2, 1, false), (3, 0, true), (3, 1, false), (4, 1, true)] {
            let mut standing = Standing::default();
            let verdict = standing.on(Event::Unhealthy, Peers { replicas, out }, 0, 1.0);
            assert_eq!(verdict != Verdict::Nothing, may, "{out} of {replicas}");
        }
        let mut standing = Standing::default();
        let events = [Event::Failed, Event::Failed, Event::Failed, SILENT];
        assert_eq!(verdicts(&mut standing, &events, ALONE)[2..], [Verdict::Ask, out(Cause::Silence, 200)]);
    }

    #[test]
    fn who_was_good_for_long_is_asked_again_soon() {
        let mut standing = Standing::default();
        let round = |standing: &mut Standing, now_ms| {
            let verdict = [Event::Unhealthy, ALIVE, Event::Answered].map(|event| standing.on(event, THREE, now_ms, 1.0))[0];
            match verdict {
                Verdict::Eject { pause_ms, .. } => pause_ms,
                other => panic!("{other:?}"),
            }
        };
        let pauses = [0, 1_000, 2_000, 3_000, 4_000, 5_000, 6_000, 60_000].map(|now_ms| round(&mut standing, now_ms));
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 5_000, 5_000, 200]);
    }

    #[test]
    fn patience_follows_the_model() {
        assert_eq!(patience_ms(None, 0.0), 1_000);
        assert_eq!(patience_ms(Some(800.0), 2_000.0), 250, "a quick one");
        assert_eq!(patience_ms(Some(500_000.0), 600_000.0), 1_500, "a slow one");
        assert_eq!(patience_ms(Some(5_000.0), 2_000_000.0), 4_000, "one that is slow now and then");
    }

    #[test]
    fn stale_routes_and_full_queues_are_not_held_against_a_replica() {
        for reason in [Reason::NotHere, Reason::Fenced, Reason::Draining, Reason::QueueFull, Reason::ModelFailed] {
            assert_eq!(blame(Failure::Refused(reason)), None, "{reason}");
        }
        assert_eq!(blame(Failure::Broken), Some(Event::Failed));
    }

    proptest! {
        #[test]
        fn whoever_is_out_can_come_back_and_only_silence_breaks_the_bound(
            events in prop::collection::vec((0_usize..6, 1_usize..5, 0_usize..5), 1..200),
        ) {
            let all = [Event::Answered, Event::Failed, Event::Unhealthy, SLOWER, SLOW_LIKE_ALL, SILENT];
            let mut standing = Standing::default();
            for (which, replicas, out) in events {
                let (peers, before) = (Peers { replicas, out: out.min(replicas - 1) }, standing.phase());
                let verdict = standing.on(all[which], peers, 0, 0.5);
                if let Verdict::Eject { cause, pause_ms } = verdict {
                    prop_assert!(cause == Cause::Silence || before == Phase::OnTrial || peers.may_lose_one());
                    prop_assert!((PAUSE_MS_MIN / 2..=PAUSE_MS_MAX).contains(&pause_ms));
                    prop_assert_eq!(standing.phase(), Phase::Out(cause));
                }
                if matches!(standing.phase(), Phase::Out(_)) {
                    let mut later = standing;
                    prop_assert_eq!(later.on(ALIVE, peers, 0, 0.5), Verdict::Try);
                    prop_assert_eq!(later.on(Event::Answered, peers, 0, 0.5), Verdict::Restore);
                }
            }
        }
    }
}
